package vhosttest

import "github.com/sluicefs/sluice/vhostuser"

// U64 is the payload of the messages that carry one number.
func U64(v uint64) []byte {
	return vhostuser.Append(nil, v)
}

// State is the payload of SET_VRING_NUM, _BASE, _ENABLE and GET_VRING_BASE.
func State(index, num uint32) []byte {
	return vhostuser.Append(nil, vhostuser.VringState{Index: index, Num: num})
}

// MemTable is the payload of SET_MEM_TABLE.
func MemTable(regions ...vhostuser.MemRegion) []byte {
	b := vhostuser.Append(nil, vhostuser.MemTable{NumRegions: uint32(len(regions))})
	for _, r := range regions {
		b = vhostuser.Append(b, r)
	}
	return b
}

// MemReg is the payload of ADD_MEM_REG and REM_MEM_REG.
func MemReg(r vhostuser.MemRegion) []byte {
	return vhostuser.Append(nil, vhostuser.MemReg{Region: r})
}

// Config is the payload of GET_CONFIG and SET_CONFIG for a window of zeros.
func Config(offset, size, flags uint32) []byte {
	return append(vhostuser.Append(nil, vhostuser.ConfigWindow{Offset: offset, Size: size, Flags: flags}), make([]byte, size)...)
}

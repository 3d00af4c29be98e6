package vhostuser

import "unsafe"

// Wire is every struct that a message carries.
type Wire interface {
	Header | VringState | VringAddr | MemTable | MemRegion | MemReg | ConfigWindow | uint64
}

// The sizes are the specification's: a wrong struct does not build.
var (
	_ [12]byte = [unsafe.Sizeof(Header{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(VringState{})]byte{}
	_ [40]byte = [unsafe.Sizeof(VringAddr{})]byte{}
	_ [8]byte  = [unsafe.Sizeof(MemTable{})]byte{}
	_ [32]byte = [unsafe.Sizeof(MemRegion{})]byte{}
	_ [40]byte = [unsafe.Sizeof(MemReg{})]byte{}
	_ [12]byte = [unsafe.Sizeof(ConfigWindow{})]byte{}
)

const (
	headerSize    = int(unsafe.Sizeof(Header{}))
	memRegionSize = int(unsafe.Sizeof(MemRegion{}))
)

// Decode copies a T from the start of b, which must hold at least its size.
func Decode[T Wire](b []byte) (v T) {
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&v)), unsafe.Sizeof(v))
	copy(raw, b[:len(raw)])
	return v
}

// Append appends the bytes of v to b.
func Append[T Wire](b []byte, v T) []byte {
	return append(b, unsafe.Slice((*byte)(unsafe.Pointer(&v)), unsafe.Sizeof(v))...)
}

// sizeOf returns the bytes that a T takes in a message.
func sizeOf[T Wire]() int {
	var v T
	return int(unsafe.Sizeof(v))
}

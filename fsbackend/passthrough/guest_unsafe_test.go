package passthrough

import (
	"unsafe"

	"github.com/sluicefs/sluice/fuseproto"
)

func parseDirents(b []byte, plus bool) []dirent {
	var list []dirent
	for len(b) > 0 {
		var d dirent
		at := 0
		if plus {
			d.entry = *(*fuseproto.EntryOut)(unsafe.Pointer(&b[0]))
			at = int(unsafe.Sizeof(d.entry))
		}
		wire := (*fuseproto.Dirent)(unsafe.Pointer(&b[at]))
		at += int(unsafe.Sizeof(*wire))
		d.ino, d.off, d.typ = wire.Ino, wire.Off, wire.Type
		d.name = string(b[at : at+int(wire.Namelen)])
		list = append(list, d)
		b = b[(at+int(wire.Namelen)+7)&^7:]
	}
	return list
}

// lastOffset is the offset of the last entry of a READDIRPLUS reply.
func lastOffset(b []byte) (off uint64) {
	const entry = int(unsafe.Sizeof(fuseproto.EntryOut{}))
	for len(b) > 0 {
		wire := (*fuseproto.Dirent)(unsafe.Pointer(&b[entry]))
		off = wire.Off
		b = b[(entry+int(unsafe.Sizeof(*wire))+int(wire.Namelen)+7)&^7:]
	}
	return off
}

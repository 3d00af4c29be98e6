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

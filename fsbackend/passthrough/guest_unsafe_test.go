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

// walkEntries calls f with what is in a READDIRPLUS reply.
func walkEntries(b []byte, f func(e *fuseproto.EntryOut, d *fuseproto.Dirent)) {
	const size = int(unsafe.Sizeof(fuseproto.EntryOut{}))
	for len(b) > 0 {
		d := (*fuseproto.Dirent)(unsafe.Pointer(&b[size]))
		f((*fuseproto.EntryOut)(unsafe.Pointer(&b[0])), d)
		b = b[(size+int(unsafe.Sizeof(*d))+int(d.Namelen)+7)&^7:]
	}
}

// lastOffset is the offset of the last entry of a READDIRPLUS reply.
func lastOffset(b []byte) (off uint64) {
	walkEntries(b, func(_ *fuseproto.EntryOut, d *fuseproto.Dirent) { off = d.Off })
	return off
}

package fsbackend

import (
	"unsafe"

	"github.com/sluicefs/sluice/fuseproto"
)

func entryBytes(e *fuseproto.EntryOut) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(e)), unsafe.Sizeof(*e))
}

func direntBytes(d *fuseproto.Dirent) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(d)), unsafe.Sizeof(*d))
}

package overlay

import (
	"unsafe"

	"github.com/sluicefs/sluice/fuseproto"
)

func entryBytes(e *fuseproto.EntryOut) *[entryHead]byte {
	return (*[entryHead]byte)(unsafe.Pointer(e))
}

// An entry is as long as its bytes.
var _ = [1]struct{}{}[unsafe.Sizeof(fuseproto.EntryOut{})-entryHead]

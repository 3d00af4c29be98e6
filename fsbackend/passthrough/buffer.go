package passthrough

import "sync"

// bufferSize is the kernel's limit of an extended attribute's value and of a list of their names (XATTR_SIZE_MAX,
// XATTR_LIST_MAX), and plenty for a piece of a directory.
const bufferSize = 64 << 10

type buffer [bufferSize]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

func getBuffer() *buffer  { return buffers.Get().(*buffer) }
func putBuffer(b *buffer) { buffers.Put(b) }

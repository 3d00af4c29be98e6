package fusebridge

import (
	"unsafe"

	"github.com/sluicefs/sluice/fuseproto"
)

// bytesOf is the memory of a struct of the wire.
func bytesOf[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// sizeOf is the size of a struct of the wire.
func sizeOf[T any]() int {
	var v T
	return int(unsafe.Sizeof(v))
}

// header is the header of a request that begins at b.
func header(b []byte) *fuseproto.InHeader {
	_ = b[inHeaderSize-1]
	return (*fuseproto.InHeader)(unsafe.Pointer(unsafe.SliceData(b)))
}

// put begins a request with in, which begins with a header, and returns its copy, to be changed until something is appended.
func put[T any](r *request, op fuseproto.Opcode, in *T) *T {
	r.op = op
	r.buf = append(r.buf[:0], bytesOf(in)...)
	return (*T)(unsafe.Pointer(unsafe.SliceData(r.buf)))
}

const (
	inHeaderSize  = int(unsafe.Sizeof(fuseproto.InHeader{}))
	outHeaderSize = int(unsafe.Sizeof(fuseproto.OutHeader{}))
)

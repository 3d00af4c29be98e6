package fuseserver

import (
	"unsafe"

	"github.com/sluicefs/sluice/fuseproto"
)

// reply is a reply as it is staged: no struct is larger than fuse_statx_out.
type reply struct {
	header fuseproto.OutHeader
	body   [unsafe.Sizeof(fuseproto.StatxOut{}) / 8]uint64
}

func (r *reply) bytes() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(r)), unsafe.Sizeof(*r))
}

// private returns the first n bytes of the buffer, which is aligned for every struct.
func (r *Request) private(n int) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(r.words))), len(r.words)*8)[:n]
}

func (r *Request) header() *fuseproto.InHeader {
	return in[fuseproto.InHeader](r)
}

// in returns the request's struct. Its bytes are in the private buffer: the table's size of it is checked before any
// handler runs, and that this is T's is what TestOpSizes checks.
func in[T any](r *Request) *T {
	return (*T)(unsafe.Pointer(unsafe.SliceData(r.words)))
}

// out returns the reply's struct, all 0 when a handler is called.
func out[T any](r *Request) *T {
	return (*T)(unsafe.Pointer(&r.out.body))
}

// outBytes returns *v as the wire has it.
func outBytes[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// forgetBytes returns list as the wire has it.
func forgetBytes(list []fuseproto.ForgetOne) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(list))), len(list)*int(unsafe.Sizeof(fuseproto.ForgetOne{})))
}

package frontend

import (
	"sync/atomic"
	"unsafe"

	"github.com/sluicefs/sluice/virtqueue"
)

// usedElem is struct virtq_used_elem (virtio 1.3, section 2.7.8).
type usedElem struct {
	id, len uint32
}

// fields are the three parts of a split ring in the driver's mapping (virtio 1.3, section 2.7). Go has no 16-bit atomics; the
// driver owns both halves of each word that it stores, so it stores whole words. Little-endian hosts only, as guest memory is.
type fields struct {
	desc       []virtqueue.Desc
	availIdx   *uint32 // flags, then idx in the upper half
	avail      []uint16
	usedEvent  *uint32
	usedIdx    *uint32 // flags, then idx in the upper half
	used       []usedElem
	availEvent *uint32
}

// layFields lays the parts over memory, each of which begins on a page and has 4 bytes to spare.
func layFields(num int, desc, avail, used []byte) fields {
	return fields{
		desc:       unsafe.Slice(as[virtqueue.Desc](desc), num),
		availIdx:   as[uint32](avail),
		avail:      unsafe.Slice(as[uint16](avail[4:]), num),
		usedEvent:  as[uint32](avail[4+2*num:]),
		usedIdx:    as[uint32](used),
		used:       unsafe.Slice(as[usedElem](used[4:]), num),
		availEvent: as[uint32](used[4+8*num:]),
	}
}

// table lays an indirect table of n descriptors over memory.
func table(b []byte, n int) []virtqueue.Desc {
	_ = b[16*n-1]
	return unsafe.Slice(as[virtqueue.Desc](b), n)
}

// as lays a T over the start of b, which is guest memory and aligned for it.
func as[T any](b []byte) *T {
	_ = b[unsafe.Sizeof(*new(T))-1]
	return (*T)(unsafe.Pointer(unsafe.SliceData(b)))
}

// words lays 64-bit words over b, whose length is a multiple of 8.
func words(b []byte) []uint64 {
	return unsafe.Slice(as[uint64](b), len(b)/8)
}

// load16 loads a field that the device stores in the lower half of a word.
func load16(w *uint32) uint16 { return uint16(atomic.LoadUint32(w)) }

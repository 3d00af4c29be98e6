package vqtest

import (
	"sync/atomic"
	"unsafe"
)

// word returns the aligned 32-bit word that holds the 16-bit field at b[off:], whose address must be even, and the
// field's shift in it.
func word(b []byte, off int) (w *uint32, shift uint) {
	p := unsafe.Pointer(&b[off])
	half := uintptr(p) & 2
	return (*uint32)(unsafe.Add(p, -int(half))), uint(half * 8)
}

// load16 loads the 16-bit field at b[off:] with acquire semantics.
func load16(b []byte, off int) uint16 {
	w, shift := word(b, off)
	return uint16(atomic.LoadUint32(w) >> shift)
}

// store16 stores the 16-bit field at b[off:] with release semantics and leaves the rest of its word as it is.
func store16(b []byte, off int, v uint16) {
	w, shift := word(b, off)
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return
		}
	}
}

// barrier orders the stores before it before the atomic loads after it.
func barrier(fence *uint32) {
	atomic.StoreUint32(fence, 0)
}

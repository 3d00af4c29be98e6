package virtqueue

import (
	"sync/atomic"
	"unsafe"
)

// Guest memory is little-endian, and so are the machines we run on (amd64, arm64): a 16-bit field at an address that is 2
// modulo 4 is the upper half of its word.

func aligned(b []byte, align uint64) bool {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))%align == 0
}

// load16 loads the 16-bit field at b[off:] atomically, with acquire semantics. There is no 16-bit atomic: it loads the aligned
// 32-bit word around the field, which is mapped, for mappings are whole pages. The address must be even.
func load16(b []byte, off int) uint16 {
	p := unsafe.Pointer(&b[off])
	half := uintptr(p) & 2
	return uint16(atomic.LoadUint32((*uint32)(unsafe.Add(p, -int(half)))) >> (half * 8))
}

// store32 stores the 32-bit field at b[off:] atomically. With the atomic loads around it, it is sequentially consistent: XCHG
// on amd64, STLR on arm64, which a later LDAR does not overtake. The address must be a multiple of 4.
func store32(b []byte, off int, v uint32) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[off])), v)
}

// store16 stores the 16-bit field at b[off:] in one piece, without order. The word around it is not ours to write.
// The address must be even.
func store16(b []byte, off int, v uint16) {
	*(*uint16)(unsafe.Pointer(&b[off])) = v
}

// barrier orders the stores before it before the atomic loads after it. fence is the caller's own word. On amd64 its XCHG is a
// full barrier; on arm64 the earlier stores come before its STLR, and that before a later LDAR.
func barrier(fence *uint32) {
	atomic.StoreUint32(fence, 0)
}

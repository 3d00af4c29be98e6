package fuseserver

import (
	"testing"
	"unsafe"
)

// Two threads' counters share no cache line: what each writes all the time lies in objects of whole lines.
func TestCountersSize(t *testing.T) {
	if size := unsafe.Sizeof(opCounters{}); size != 256 {
		t.Errorf("opCounters have %d bytes, expected 256", size)
	}
	c := new(Counters)
	for slot := range uint16(opcodes) {
		if at := uintptr(unsafe.Pointer(c.op(slot))); at%64 != 0 {
			t.Fatalf("opCounters at %#x, expected the beginning of a cache line", at)
		}
	}
}

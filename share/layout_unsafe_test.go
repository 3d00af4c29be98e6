package share

import (
	"testing"
	"unsafe"
)

// TestLayout has what every request reads of a part in two cache lines; Go's allocator begins objects of such sizes on one.
func TestLayout(t *testing.T) {
	const line = 64
	var p part
	if end := unsafe.Offsetof(p.picky) + unsafe.Sizeof(p.picky); end > line {
		t.Errorf("what is read first ends at byte %d", end)
	}
	if at := unsafe.Offsetof(p.info); at != line || at+unsafe.Offsetof(p.info.Leave)+unsafe.Sizeof(p.info.Leave) > 2*line {
		t.Errorf("what others read begins at byte %d", at)
	}
	if n := unsafe.Sizeof(callShard{}); n != line {
		t.Errorf("a shard has %d bytes", n)
	}
}

package fsbackend

import (
	"fmt"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/fuseproto"
)

func TestListing(t *testing.T) {
	l := new(Listing)
	for _, plus := range []bool{false, true} {
		if n := l.Begin(plus, 1000); n != 1000 || l.Len() != 1000 {
			t.Fatalf("room for %d, %d bytes, expected 1000", n, l.Len())
		}
		added := 0
		for i := uint64(1); ; i++ {
			name := []byte(strings.Repeat("n", int(i)))
			ok := false
			if plus {
				entry := &fuseproto.EntryOut{NodeId: i * 10, EntryValidNsec: Stale, AttrValidNsec: Stale}
				entry.Size = i
				ok = l.AddPlus(entry, i, i+1, uint32(i), name)
			} else {
				ok = l.Add(i, i+1, uint32(i), name)
			}
			if !ok {
				break
			}
			added++
		}
		seen := uint64(0)
		whole := l.Each(func(e *fuseproto.EntryOut, d fuseproto.Dirent, name []byte) bool {
			seen++
			if d.Ino != seen || d.Off != seen+1 || d.Type != uint32(seen) || string(name) != strings.Repeat("n", int(seen)) {
				t.Errorf("entry %d is %+v, %q", seen, d, name)
			}
			if (e != nil) != plus || plus && (e.NodeId != seen*10 || e.Size != seen || e.EntryValidNsec != Stale || e.AttrValidNsec != Stale) {
				t.Errorf("entry %d has %+v", seen, e)
			}
			return true
		})
		if !whole || int(seen) != added || added < 4 {
			t.Errorf("%d entries of %d, whole %v", seen, added, whole)
		}
		seen = 0
		if whole := l.Each(func(*fuseproto.EntryOut, fuseproto.Dirent, []byte) bool { seen++; return seen < 2 }); !whole || seen != 2 {
			t.Errorf("it ended after %d entries, %v", seen, whole)
		}
	}
	if n := l.Begin(true, 1<<30); int(n) != len(l.buf) {
		t.Errorf("room for %d bytes, expected all of %d", n, len(l.buf))
	}
}

// TestListingMalformed: what a backend has put in by the Sink alone is not taken for entries.
func TestListingMalformed(t *testing.T) {
	l := new(Listing)
	for _, plus := range []bool{false, true} {
		for _, n := range []int{1, 23, 24, 100, 151, 152, 1000} {
			for _, fill := range []string{"\x00", "\xff", "\x01"} {
				l.Begin(plus, 4096)
				l.Write([]byte(strings.Repeat(fill, n)))
				if l.Each(func(*fuseproto.EntryOut, fuseproto.Dirent, []byte) bool { return true }) {
					t.Errorf("%d bytes %x were taken for entries (plus %v)", n, fill, plus)
				}
			}
		}
	}
	l.Begin(false, 4096)
	l.Add(1, 2, 3, []byte("good"))
	l.Write([]byte("bad"))
	var names []string
	if l.Each(func(_ *fuseproto.EntryOut, _ fuseproto.Dirent, name []byte) bool {
		names = append(names, string(name))
		return true
	}) || fmt.Sprint(names) != "[good]" {
		t.Errorf("entries before the bad one are %q", names)
	}
}

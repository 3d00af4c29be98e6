package virtqueue_test

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/virtqueue"
)

// checkChain fails unless every byte of c lies in one of the regions' mappings, and the totals are the sums.
func checkChain(tb testing.TB, m *guestmem.Map, regions []guestmem.RegionConfig, c *virtqueue.Chain) {
	tb.Helper()
	type span struct{ start, end uint64 }
	var spans []span
	for _, r := range regions {
		iov, err := m.Translate(nil, r.GuestPhysAddr, r.Size)
		if err != nil || len(iov) != 1 {
			tb.Fatalf("region %#x translates to %d pieces, %v", r.GuestPhysAddr, len(iov), err)
		}
		start := uint64(uintptr(unsafe.Pointer(iov[0].Base)))
		spans = append(spans, span{start, start + iov[0].Len})
	}
	check := func(name string, iov []unix.Iovec, total uint64) {
		sum := uint64(0)
		for _, v := range iov {
			start := uint64(uintptr(unsafe.Pointer(v.Base)))
			inside := false
			for _, s := range spans {
				inside = inside || start >= s.start && start < s.end && v.Len <= s.end-start
			}
			if !inside || v.Len == 0 {
				tb.Fatalf("%s piece at %#x of %d bytes is not in guest memory", name, start, v.Len)
			}
			sum += v.Len
		}
		if sum != total {
			tb.Fatalf("%s pieces have %d bytes, expected the total %d", name, sum, total)
		}
	}
	check("readable", c.Readable, c.ReadableLen)
	check("writable", c.Writable, c.WritableLen)
}

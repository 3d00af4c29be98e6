package guestmem_test

import (
	"errors"
	"math/bits"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/guestmem"
)

const fuzzFile = 16 * page

// fuzzRegions makes regions of 5 bytes each, most of them near one another, some at the ends of the address space.
func fuzzRegions(b []byte) []guestmem.RegionConfig {
	var cs []guestmem.RegionConfig
	for ; len(b) >= 5 && len(cs) < 12; b = b[5:] {
		c := guestmem.RegionConfig{
			GuestPhysAddr: uint64(b[0]) * 0x200,
			Size:          uint64(b[1]) * 0x100,
			UserAddr:      uint64(b[2]) * 0x200,
			MmapOffset:    uint64(b[3]) * 0x100,
		}
		switch b[4] & 7 {
		case 1:
			c.GuestPhysAddr = 1<<63 - c.GuestPhysAddr
		case 2:
			c.UserAddr = -c.UserAddr
		case 3:
			c.MmapOffset = -c.MmapOffset
		case 4:
			c.Size = -c.Size
		case 5:
			c.GuestPhysAddr++
			c.Size++
		}
		cs = append(cs, c)
	}
	return cs
}

// fits says whether Add must take c beside cs, by the plainest rules.
func fits(cs []guestmem.RegionConfig, c guestmem.RegionConfig) bool {
	for _, start := range []uint64{c.GuestPhysAddr, c.UserAddr, c.MmapOffset} {
		if end, carry := bits.Add64(start, c.Size, 0); carry != 0 || end > 1<<63 {
			return false
		}
	}
	for _, o := range cs {
		if c.GuestPhysAddr < o.GuestPhysAddr+o.Size && o.GuestPhysAddr < c.GuestPhysAddr+c.Size ||
			c.UserAddr < o.UserAddr+o.Size && o.UserAddr < c.UserAddr+c.Size {
			return false
		}
	}
	return c.Size > 0 && c.MmapOffset+c.Size <= fuzzFile
}

func FuzzTranslate(f *testing.F) {
	f.Add([]byte{0, 16, 0, 0, 0, 8, 16, 64, 32, 0}, uint64(0x800), uint64(0x1000))
	f.Add([]byte{0, 16, 0, 0, 0, 16, 16, 64, 32, 0}, uint64(0x800), uint64(0x2000))
	f.Add([]byte{2, 255, 2, 1, 5, 4, 1, 200, 0, 1}, ^uint64(0), uint64(2))
	f.Add([]byte{1, 2, 1, 0, 1, 1, 2, 1, 0, 2, 1, 2, 3, 4, 3}, uint64(1)<<63-1, uint64(1))
	fl := newFile(f, fuzzFile/page)
	f.Fuzz(func(t *testing.T, table []byte, addr, length uint64) {
		mm := guestmem.New()
		defer mm.Clear()
		var cs []guestmem.RegionConfig
		for _, c := range fuzzRegions(table) {
			want := fits(cs, c)
			if _, err := mm.Add(c, fl.fd); (err == nil) != want {
				t.Fatalf("Add(%+v) beside %+v = %v, expected it to be accepted: %v", c, cs, err, want)
			}
			if want {
				cs = append(cs, c)
			}
		}
		m := mm.Acquire()
		defer m.Release()
		iov, err := m.Translate(nil, addr, length)
		if err != nil && !errors.Is(err, guestmem.ErrUnmapped) {
			t.Fatalf("error is %v, expected ErrUnmapped", err)
		}
		want, mapped := pieces(t, m, cs, addr, length)
		if mapped != (err == nil) {
			t.Fatalf("Translate(%#x, %#x) in %+v = %v, expected it mapped: %v", addr, length, cs, err, mapped)
		}
		if !mapped {
			return
		}
		if len(iov) != len(want) {
			t.Fatalf("Translate(%#x, %#x) in %+v has %d pieces, expected %d", addr, length, cs, len(iov), len(want))
		}
		for i := range iov {
			if iov[i] != want[i] {
				t.Fatalf("Translate(%#x, %#x) in %+v: piece %d is %v, expected %v", addr, length, cs, i, iov[i], want[i])
			}
		}
	})
}

// pieces translates by searching all regions, and finds their memory by front-end address.
func pieces(t *testing.T, m *guestmem.Map, cs []guestmem.RegionConfig, addr, length uint64) ([]unix.Iovec, bool) {
	var iov []unix.Iovec
	if _, carry := bits.Add64(addr, length, 0); carry != 0 {
		return nil, false
	}
	for length > 0 {
		found := false
		for _, c := range cs {
			if addr < c.GuestPhysAddr || addr >= c.GuestPhysAddr+c.Size {
				continue
			}
			off := addr - c.GuestPhysAddr
			n := min(length, c.Size-off)
			b, err := m.User(c.UserAddr+off, n)
			if err != nil {
				t.Fatalf("User(%#x, %#x) in %+v: %v", c.UserAddr+off, n, cs, err)
			}
			iov = append(iov, unix.Iovec{Base: &b[0], Len: n})
			addr, length, found = addr+n, length-n, true
			break
		}
		if !found {
			return nil, false
		}
	}
	return iov, true
}

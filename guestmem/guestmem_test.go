package guestmem_test

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/internal/sys"
)

const page = 4096

// file is a memfd whose byte at offset n*page is n.
type file struct {
	fd   int
	name string
}

func newFile(tb testing.TB, pages int) file {
	tb.Helper()
	f := file{name: strings.NewReplacer("/", "_", " ", "_").Replace(tb.Name())}
	var err error
	if f.fd, err = unix.MemfdCreate(f.name, unix.MFD_CLOEXEC); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = unix.Close(f.fd) })
	if err := unix.Ftruncate(f.fd, int64(pages)*page); err != nil {
		tb.Fatal(err)
	}
	for i := range pages {
		if _, err := unix.Pwrite(f.fd, []byte{byte(i)}, int64(i)*page); err != nil {
			tb.Fatal(err)
		}
	}
	return f
}

// mappings counts the file's mappings in the process.
func (f file) mappings(tb testing.TB) int {
	tb.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		tb.Fatal(err)
	}
	return strings.Count(string(maps), "/memfd:"+f.name+" ")
}

func (f file) wantMappings(tb testing.TB, want int) {
	tb.Helper()
	if got := f.mappings(tb); got != want {
		tb.Errorf("%d mappings, expected %d", got, want)
	}
}

func openFDs(tb testing.TB) int {
	tb.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(entries)
}

func newMemory(tb testing.TB, f file, regions ...guestmem.RegionConfig) *guestmem.Memory {
	tb.Helper()
	mm := guestmem.New()
	tb.Cleanup(func() { mm.Clear() })
	for _, r := range regions {
		if _, err := mm.Add(r, f.fd); err != nil {
			tb.Fatal(err)
		}
	}
	return mm
}

func acquire(tb testing.TB, mm *guestmem.Memory) *guestmem.Map {
	tb.Helper()
	m := mm.Acquire()
	tb.Cleanup(m.Release)
	return m
}

func done(m *guestmem.Map) bool {
	select {
	case <-m.Done():
		return true
	default:
		return false
	}
}

// layout is low memory, a gap, and three adjacent regions that lie in the file in another order; the last is one page.
var layout = []guestmem.RegionConfig{
	{GuestPhysAddr: 5 * page, Size: 2 * page, UserAddr: 0x70_0000, MmapOffset: 1 * page},
	{GuestPhysAddr: 0, Size: 2 * page, UserAddr: 0, MmapOffset: 6 * page},
	{GuestPhysAddr: 3 * page, Size: 2 * page, UserAddr: 0x90_0000, MmapOffset: 3 * page},
	{GuestPhysAddr: 7 * page, Size: page, UserAddr: 0x70_2000, MmapOffset: 5 * page},
}

func TestTranslate(t *testing.T) {
	f := newFile(t, 8)
	m := acquire(t, newMemory(t, f, layout...))
	type piece struct {
		first byte // at the piece's start, which is a page's
		n     uint64
	}
	for _, c := range []struct {
		name         string
		addr, length uint64
		want         []piece // nil: not mapped
	}{
		{"first region", 0, 2 * page, []piece{{6, 2 * page}}},
		{"second page", page, 10, []piece{{7, 10}}},
		{"last byte before the gap", 2*page - 1, 1, []piece{{0, 1}}},
		{"into the gap", 2*page - 1, 2, nil},
		{"the gap", 2 * page, 1, nil},
		{"last byte of the gap", 3*page - 1, 1, nil},
		{"out of the gap", 3*page - 1, 2, nil},
		{"over the gap", 0, 4 * page, nil},
		{"two adjacent", 4 * page, 2 * page, []piece{{4, page}, {1, page}}},
		{"three adjacent", 3 * page, 5 * page, []piece{{3, 2 * page}, {1, 2 * page}, {5, page}}},
		{"past the end", 7 * page, page + 1, nil},
		{"at the end", 8 * page, 1, nil},
		{"far", 1 << 62, 1, nil},
		{"overflow", ^uint64(0), 2, nil},
		{"overflow to mapped memory", ^uint64(0) - page + 1, 2 * page, nil},
		{"everything", 0, ^uint64(0), nil},
		{"front-end address", 0x70_0000, 1, nil},
		{"nothing", 0, 0, []piece{}},
		{"nothing in the gap", 2 * page, 0, []piece{}},
		{"nothing at the top", ^uint64(0), 0, []piece{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			held := unix.Iovec{Len: 77} // what dst had stays
			iov, err := m.Translate([]unix.Iovec{held}, c.addr, c.length)
			if len(iov) == 0 || iov[0] != held {
				t.Fatalf("dst is %v, expected it to start with what it held", iov)
			}
			if c.want == nil {
				if !errors.Is(err, guestmem.ErrUnmapped) {
					t.Fatalf("error is %v, expected ErrUnmapped", err)
				}
				return
			}
			if err != nil || len(iov)-1 != len(c.want) {
				t.Fatalf("%d pieces, %v, expected %v", len(iov)-1, err, c.want)
			}
			for i, want := range c.want {
				v := iov[i+1]
				if got := sys.Bytes(&v); got[0] != want.first || v.Len != want.n {
					t.Errorf("piece %d starts with %d and has %d bytes, expected %+v", i, got[0], v.Len, want)
				}
			}
		})
	}
}

func TestUser(t *testing.T) {
	f := newFile(t, 8)
	m := acquire(t, newMemory(t, f, layout...))
	for _, c := range []struct {
		name         string
		addr, length uint64
		want         int // first byte, -1 for not mapped
	}{
		{"at 0", 0, 2 * page, 6},
		{"second page", page, page, 7},
		{"past a region", page, page + 1, -1},
		{"second region", 0x90_0000, 2 * page, 3},
		{"inside", 0x90_1000, 16, 4},
		{"into a neighbour", 0x70_1000, page + 1, -1},
		{"a neighbour", 0x70_2000, page, 5},
		{"before a region", 0x90_0000 - 1, 1, -1},
		{"after a region", 0x90_2000, 1, -1},
		{"nothing", 0, 0, -1},
		{"overflow", 0x70_2000, ^uint64(0), -1},
		{"top", ^uint64(0), 1, -1},
		{"guest-physical address", 3 * page, 1, -1},
	} {
		b, err := m.User(c.addr, c.length)
		if c.want < 0 {
			if !errors.Is(err, guestmem.ErrUnmapped) {
				t.Errorf("%s: error is %v, expected ErrUnmapped", c.name, err)
			}
			continue
		}
		if err != nil || uint64(len(b)) != c.length || cap(b) != len(b) || b[0] != byte(c.want) {
			t.Errorf("%s: %d bytes (capacity %d), %v, expected %d that start with %d", c.name, len(b), cap(b), err, c.length, c.want)
		}
	}
	empty := acquire(t, guestmem.New())
	if _, err := empty.User(0, 1); !errors.Is(err, guestmem.ErrUnmapped) {
		t.Errorf("no regions: error is %v, expected ErrUnmapped", err)
	}
	if _, err := empty.Translate(nil, 0, 1); !errors.Is(err, guestmem.ErrUnmapped) {
		t.Errorf("no regions: error is %v, expected ErrUnmapped", err)
	}
}

func TestTranslateAllocs(t *testing.T) {
	m := acquire(t, newMemory(t, newFile(t, 8), layout...))
	dst := make([]unix.Iovec, 0, 8)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := m.Translate(dst, 3*page, 5*page); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Translate(dst, 0, 5*page); err == nil {
			t.Fatal("translated a gap")
		}
		if _, err := m.User(0, page); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations, expected 0", n)
	}
}

func TestAddRefuses(t *testing.T) {
	f := newFile(t, 8)
	mm := newMemory(t, f, layout...)
	fds := openFDs(t)
	before := acquire(t, mm)
	free := guestmem.RegionConfig{GuestPhysAddr: 1 << 30, Size: page, UserAddr: 1 << 40}
	for name, change := range map[string]func(*guestmem.RegionConfig){
		"empty":                        func(c *guestmem.RegionConfig) { c.Size = 0 },
		"longer than the file":         func(c *guestmem.RegionConfig) { c.Size = 8*page + 1 },
		"past the end of the file":     func(c *guestmem.RegionConfig) { c.MmapOffset = 8 * page },
		"address overflows":            func(c *guestmem.RegionConfig) { c.GuestPhysAddr = ^uint64(0) - 1 },
		"front-end address overflows":  func(c *guestmem.RegionConfig) { c.UserAddr = ^uint64(0) - 1 },
		"offset overflows":             func(c *guestmem.RegionConfig) { c.MmapOffset = ^uint64(0) - 1 },
		"size overflows":               func(c *guestmem.RegionConfig) { c.Size = ^uint64(0) },
		"offset is negative as signed": func(c *guestmem.RegionConfig) { c.MmapOffset = 1 << 63 },
		"guest address past 2^63":      func(c *guestmem.RegionConfig) { c.GuestPhysAddr = 1 << 63 },
		"same guest address":           func(c *guestmem.RegionConfig) { c.GuestPhysAddr = 0 },
		"overlaps the start":           func(c *guestmem.RegionConfig) { c.GuestPhysAddr, c.Size = 3*page-1, 2 },
		"overlaps the end":             func(c *guestmem.RegionConfig) { c.GuestPhysAddr = 8*page - 1 },
		"covers all":                   func(c *guestmem.RegionConfig) { c.GuestPhysAddr, c.Size = 0, 8*page },
		"same front-end address":       func(c *guestmem.RegionConfig) { c.UserAddr = 0x90_0000 },
		"overlaps in front-end":        func(c *guestmem.RegionConfig) { c.UserAddr = 0x90_1fff },
	} {
		c := free
		change(&c)
		if old, err := mm.Add(c, f.fd); err == nil || old != nil {
			t.Errorf("%s: Add accepts %+v", name, c)
		}
		if _, err := mm.Replace([]guestmem.RegionConfig{free, c, layout[2], layout[1]}, []int{f.fd, f.fd, f.fd, f.fd}); err == nil {
			t.Errorf("%s: Replace accepts %+v", name, c)
		}
	}
	if _, err := mm.Add(free, -1); err == nil {
		t.Error("Add accepts a bad fd")
	}
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.fd))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mm.Add(free, int(ro.Fd())); err == nil {
		t.Error("Add accepts memory that cannot be written")
	}
	_ = ro.Close()
	if _, err := mm.Replace([]guestmem.RegionConfig{free}, nil); err == nil {
		t.Error("Replace accepts a region without an fd")
	}
	if now := acquire(t, mm); now != before {
		t.Error("a refused change made a new Map")
	}
	f.wantMappings(t, len(layout))
	if now := openFDs(t); now != fds {
		t.Errorf("%d fds are open, expected %d as before", now, fds)
	}
}

// TestMappingLives checks that a mapping goes with the last Map that has it, and not earlier.
func TestMappingLives(t *testing.T) {
	f := newFile(t, 8)
	mm := newMemory(t, f, layout[:2]...)
	f.wantMappings(t, 2)
	m1 := mm.Acquire()
	again := m1.Retain()

	old, err := mm.Remove(layout[0])
	if err != nil {
		t.Fatal(err)
	}
	if old != m1 || done(old) {
		t.Errorf("Remove retires %p, done %v, expected %p that is held", old, done(old), m1)
	}
	m2 := mm.Acquire()
	if _, err := m2.Translate(nil, layout[0].GuestPhysAddr, 1); err == nil {
		t.Error("the new Map still translates what was removed")
	}
	f.wantMappings(t, 2)
	m1.Release()
	iov, err := again.Translate(nil, layout[0].GuestPhysAddr, 1)
	if err != nil || sys.Bytes(&iov[0])[0] != 1 {
		t.Errorf("the held Map translates to %v, %v", iov, err)
	}
	again.Release()
	f.wantMappings(t, 1)
	if !done(old) {
		t.Error("the removed region's Map is released, but not done")
	}

	old, err = mm.Add(layout[0], f.fd)
	if err != nil || old != m2 {
		t.Fatalf("Add = %p, %v, expected %p", old, err, m2)
	}
	f.wantMappings(t, 2)
	m2.Release()
	if !done(m2) {
		t.Error("Map is not done")
	}
	f.wantMappings(t, 2) // layout[1] lives on in the new Map

	m3 := mm.Acquire()
	if _, err := mm.Replace(layout, []int{f.fd, f.fd, f.fd, f.fd}); err != nil {
		t.Fatal(err)
	}
	f.wantMappings(t, 6)
	m3.Release()
	f.wantMappings(t, 4)

	old = mm.Clear()
	if !done(old) {
		t.Error("a Map that nobody holds is not done after Clear")
	}
	f.wantMappings(t, 0)
	if _, err := mm.Remove(layout[0]); err == nil {
		t.Error("Remove finds a region after Clear")
	}
}

func TestRemoveWantsTheRegion(t *testing.T) {
	f := newFile(t, 8)
	mm := newMemory(t, f, layout...)
	for name, change := range map[string]func(*guestmem.RegionConfig){
		"address":           func(c *guestmem.RegionConfig) { c.GuestPhysAddr += page },
		"size":              func(c *guestmem.RegionConfig) { c.Size-- },
		"front-end address": func(c *guestmem.RegionConfig) { c.UserAddr++ },
	} {
		c := layout[0]
		change(&c)
		if _, err := mm.Remove(c); err == nil {
			t.Errorf("Remove accepts another %s", name)
		}
	}
	c := layout[0]
	c.MmapOffset = 0 // not compared
	if _, err := mm.Remove(c); err != nil {
		t.Error(err)
	}
}

// TestFDStaysTheCallers checks that the fd is neither closed nor needed.
func TestFDStaysTheCallers(t *testing.T) {
	f := newFile(t, 8)
	fds := openFDs(t)
	fd, err := unix.Dup(f.fd)
	if err != nil {
		t.Fatal(err)
	}
	mm := guestmem.New()
	if _, err := mm.Add(layout[0], fd); err != nil {
		t.Fatal(err)
	}
	if now := openFDs(t); now != fds+1 {
		t.Errorf("%d fds after Add, expected %d", now, fds+1)
	}
	if err := unix.Close(fd); err != nil {
		t.Errorf("the fd was closed: %v", err)
	}
	m := mm.Acquire()
	iov, err := m.Translate(nil, layout[0].GuestPhysAddr, 1)
	if err != nil {
		t.Fatal(err)
	}
	sys.Bytes(&iov[0])[0] = 99
	var got [1]byte
	if _, err := unix.Pread(f.fd, got[:], int64(layout[0].MmapOffset)); err != nil || got[0] != 99 {
		t.Errorf("the file has %d, %v, expected what was written to memory", got[0], err)
	}
	m.Release()
	mm.Clear()
	if now := openFDs(t); now != fds {
		t.Errorf("%d fds at the end, expected %d", now, fds)
	}
}

func TestMaxRegions(t *testing.T) {
	f := newFile(t, 1)
	mm := newMemory(t, f)
	at := func(i int) guestmem.RegionConfig {
		return guestmem.RegionConfig{GuestPhysAddr: uint64(i) * page, Size: page, UserAddr: uint64(i) * page}
	}
	var cs []guestmem.RegionConfig
	var fds []int
	for i := range guestmem.MaxRegions {
		if _, err := mm.Add(at(i), f.fd); err != nil {
			t.Fatalf("region %d: %v", i, err)
		}
		cs, fds = append(cs, at(i)), append(fds, f.fd)
	}
	if _, err := mm.Add(at(guestmem.MaxRegions), f.fd); err == nil {
		t.Errorf("Add accepts region %d", guestmem.MaxRegions+1)
	}
	m := mm.Acquire()
	iov, err := m.Translate(nil, 0, guestmem.MaxRegions*page)
	if err != nil || len(iov) != guestmem.MaxRegions {
		t.Errorf("all regions are %d pieces, %v, expected %d", len(iov), err, guestmem.MaxRegions)
	}
	m.Release()
	if _, err := mm.Replace(cs, fds); err != nil {
		t.Error(err)
	}
	if _, err := mm.Replace(append(cs, at(len(cs))), append(fds, f.fd)); err == nil {
		t.Errorf("Replace accepts %d regions", guestmem.MaxRegions+1)
	}
	// No page of the file is left over in the address space.
	mm.Clear()
	f.wantMappings(t, 0)
}

// TestOffsets has regions that start off a page, as QEMU's with huge pages do relative to those.
func TestOffsets(t *testing.T) {
	f := newFile(t, 8)
	for _, off := range []uint64{1, 16, page - 1, page, 3*page + 5} {
		mm := newMemory(t, f)
		if _, err := mm.Add(guestmem.RegionConfig{GuestPhysAddr: page, Size: 8*page - off, UserAddr: page, MmapOffset: off}, f.fd); err != nil {
			t.Fatal(err)
		}
		m := mm.Acquire()
		for n := (off + page - 1) / page; n < 8; n++ {
			iov, err := m.Translate(nil, page+n*page-off, 1)
			if err != nil || sys.Bytes(&iov[0])[0] != byte(n) {
				t.Errorf("offset %#x: page %d of the file is not where it belongs (%v)", off, n, err)
			}
			b, err := m.User(page+n*page-off, 1)
			if err != nil || b[0] != byte(n) {
				t.Errorf("offset %#x: page %d of the file is not at its front-end address (%v)", off, n, err)
			}
		}
		m.Release()
		mm.Clear()
		f.wantMappings(t, 0)
	}
}

// TestHugePages maps parts of a hugetlb file that start and end inside a huge page. Nothing is touched, for the host may
// have no huge pages to give.
func TestHugePages(t *testing.T) {
	const huge = 2 << 20
	fd, err := unix.MemfdCreate("huge", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 4*huge); err != nil {
		t.Fatal(err)
	}
	mm := guestmem.New()
	for i, c := range []guestmem.RegionConfig{
		{GuestPhysAddr: 0, Size: 0xa0000, UserAddr: 0},
		{GuestPhysAddr: 0xc0000, Size: 3*huge - 0xc0000, UserAddr: 0x4000_0000, MmapOffset: 0xc0000},
	} {
		if _, err := mm.Add(c, fd); err != nil {
			t.Fatalf("region %d: %v", i, err)
		}
	}
	m := mm.Acquire()
	if iov, err := m.Translate(nil, 0xc0000, 3*huge-0xc0000); err != nil || len(iov) != 1 {
		t.Errorf("high memory is %d pieces, %v, expected 1", len(iov), err)
	}
	m.Release()
	mm.Clear()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(maps), "/memfd:huge ") {
		t.Error("a mapping of huge pages is left")
	}
}

func TestTruncatedFile(t *testing.T) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	f := newFile(t, 8)
	m := acquire(t, newMemory(t, f, layout[:2]...))
	if err := unix.Ftruncate(f.fd, 0); err != nil {
		t.Fatal(err)
	}
	iov, err := m.Translate(nil, 0, 8)
	if err != nil {
		t.Fatal(err)
	}
	if n := sys.Copy(make([]byte, 8), sys.Bytes(&iov[0])); n != 0 {
		t.Errorf("copied %d bytes of a file that was truncated, expected 0", n)
	}
	mm := guestmem.New()
	if _, err := mm.Add(layout[0], f.fd); err == nil {
		t.Error("Add accepts a file that was truncated")
	}
}

// TestConcurrent reads through Maps while regions come and go: a mapping that goes too early faults.
func TestConcurrent(t *testing.T) {
	f := newFile(t, 8)
	mm := newMemory(t, f, layout[1])
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			var iov []unix.Iovec
			for {
				select {
				case <-stop:
					return
				default:
				}
				m := mm.Acquire()
				if done(m) {
					t.Error("an acquired Map is done")
				}
				second := m.Retain()
				for i, want := range []byte{1, 6, 3, 5} {
					var err error
					if iov, err = m.Translate(iov[:0], layout[i].GuestPhysAddr, 1); err == nil && sys.Bytes(&iov[0])[0] != want {
						t.Errorf("region %d starts with %d, expected %d", i, sys.Bytes(&iov[0])[0], want)
					}
				}
				m.Release()
				second.Release()
				runtime.Gosched()
			}
		})
	}
	for i := range 500 {
		var old *guestmem.Map
		var err error
		switch i % 4 {
		case 0:
			old, err = mm.Add(layout[0], f.fd)
		case 1:
			old, err = mm.Remove(layout[0])
		case 2:
			old, err = mm.Replace(layout, []int{f.fd, f.fd, f.fd, f.fd})
		case 3:
			old, err = mm.Replace(layout[1:2], []int{f.fd})
		}
		if err != nil {
			t.Fatal(err)
		}
		if i%8 < 4 {
			<-old.Done() // as before an answer to the front-end
		}
	}
	close(stop)
	readers.Wait()
	f.wantMappings(t, 1)
	mm.Clear()
	f.wantMappings(t, 0)
}

// TestAcquireRace acquires Maps at the moment when their last holder releases them.
func TestAcquireRace(t *testing.T) {
	mm := guestmem.New()
	stop := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			m := mm.Acquire()
			if done(m) {
				t.Error("an acquired Map is done")
			}
			m.Release()
		}
	})
	for range 200000 {
		mm.Clear()
	}
	close(stop)
	reader.Wait()
}

func BenchmarkTranslate(b *testing.B) {
	f := newFile(b, 8)
	m := acquire(b, newMemory(b, f, layout...))
	dst := make([]unix.Iovec, 0, 8)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := m.Translate(dst, 4*page, page); err != nil {
			b.Fatal(err)
		}
	}
}

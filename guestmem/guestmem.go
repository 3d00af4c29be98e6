// Package guestmem maps a guest's memory and translates its addresses to host memory.
//
//	Memory ──Acquire──▶ Map (immutable snapshot, counted) ──Translate──▶ iovecs into Region mappings
//
// The front-end adds and removes regions while requests are in flight (VHOST_USER_ADD_MEM_REG, REM_MEM_REG,
// SET_MEM_TABLE). Each change makes a new Map and retires the old one; a region's mapping goes when the last Map that
// holds it is released, so a request that holds its Map never touches unmapped memory.
package guestmem

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// MaxRegions is the most regions a Memory holds: what GET_MAX_MEM_SLOTS reports. libvhost-user has 509 too, and QEMU
// refuses a back-end whose number shrinks on a later connection (reference: vhost_user_backend_init).
const MaxRegions = 509

// ErrUnmapped is returned for an address range that no region, or no unbroken run of adjacent regions, covers.
var ErrUnmapped = errors.New("guest address range is not mapped")

// RegionConfig describes one region as the vhost-user memory region description does (all in bytes).
type RegionConfig struct {
	GuestPhysAddr uint64
	Size          uint64
	UserAddr      uint64 // the front-end's own address of the region, in which ring addresses are given
	MmapOffset    uint64 // where the region starts in the file behind its fd
}

func (c RegionConfig) validate() error {
	if c.Size == 0 {
		return fmt.Errorf("memory region %#x has size 0", c.GuestPhysAddr)
	}
	for _, start := range []uint64{c.GuestPhysAddr, c.UserAddr, c.MmapOffset} {
		if start+c.Size < start || start+c.Size > 1<<63 {
			return fmt.Errorf("memory region %#x of size %#x: %#x + size overflows", c.GuestPhysAddr, c.Size, start)
		}
	}
	return nil
}

type region struct {
	RegionConfig
	host    []byte // Size bytes
	mapping []byte // what was mapped: host and what precedes it to the page boundary
	maps    atomic.Int32
}

func mapRegion(c RegionConfig, fd int) (*region, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat the file of memory region %#x: %w", c.GuestPhysAddr, err)
	}
	// A mapping past the end of the file faults on access instead of here.
	if st.Mode&unix.S_IFMT == unix.S_IFREG && uint64(st.Size) < c.MmapOffset+c.Size {
		return nil, fmt.Errorf("memory region %#x ends at byte %#x of a file of %#x bytes", c.GuestPhysAddr, c.MmapOffset+c.Size, st.Size)
	}
	// hugetlbfs maps at its own page size, which it reports as the block size.
	page := uint64(max(unix.Getpagesize(), int(st.Blksize)))
	if page&(page-1) != 0 {
		page = uint64(unix.Getpagesize())
	}
	lead := c.MmapOffset & (page - 1)
	length := (lead + c.Size + page - 1) &^ (page - 1)
	mapping, err := unix.Mmap(fd, int64(c.MmapOffset-lead), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map memory region %#x of %#x bytes: %w", c.GuestPhysAddr, c.Size, err)
	}
	// A core dump of the daemon is no place for the guest's memory.
	_ = unix.Madvise(mapping, unix.MADV_DONTDUMP)
	return &region{RegionConfig: c, host: mapping[lead : lead+c.Size : lead+c.Size], mapping: mapping}, nil
}

func (r *region) release() {
	if r.maps.Add(-1) == 0 {
		_ = unix.Munmap(r.mapping)
	}
}

// Map is one state of a guest's memory. It never changes; hold it (Memory.Acquire) while using what it translated.
type Map struct {
	byGPA  []*region
	byUser []*region
	refs   atomic.Int64
	done   chan struct{}
}

func newMap(regions []*region) *Map {
	m := &Map{byGPA: slices.Clone(regions), byUser: slices.Clone(regions), done: make(chan struct{})}
	slices.SortFunc(m.byGPA, func(a, b *region) int { return cmp.Compare(a.GuestPhysAddr, b.GuestPhysAddr) })
	slices.SortFunc(m.byUser, func(a, b *region) int { return cmp.Compare(a.UserAddr, b.UserAddr) })
	for _, r := range regions {
		r.maps.Add(1)
	}
	m.refs.Store(1)
	return m
}

// overlap names two regions that share guest-physical or front-end addresses.
func (m *Map) overlap() error {
	for i := 1; i < len(m.byGPA); i++ {
		a, b := m.byGPA[i-1], m.byGPA[i]
		if a.GuestPhysAddr+a.Size > b.GuestPhysAddr {
			return fmt.Errorf("memory regions %#x and %#x overlap in guest-physical addresses", a.GuestPhysAddr, b.GuestPhysAddr)
		}
		a, b = m.byUser[i-1], m.byUser[i]
		if a.UserAddr+a.Size > b.UserAddr {
			return fmt.Errorf("memory regions %#x and %#x overlap in front-end addresses", a.GuestPhysAddr, b.GuestPhysAddr)
		}
	}
	return nil
}

// Retain holds m once more, for somebody who releases it later; the caller holds it already.
func (m *Map) Retain() *Map {
	m.refs.Add(1)
	return m
}

// Release gives back a Map got from Memory.Acquire or Retain; nothing translated through it may be used any more.
func (m *Map) Release() {
	if m.refs.Add(-1) == 0 {
		for _, r := range m.byGPA {
			r.release()
		}
		close(m.done)
	}
}

// Done is closed when the Map has been replaced and its last holder has released it.
func (m *Map) Done() <-chan struct{} {
	return m.done
}

// Translate appends to dst the host memory of length bytes at guest-physical addr: one iovec for each region that the
// range touches, for a range may span adjacent regions. It returns ErrUnmapped if any byte lies in none.
// A length of 0 appends nothing.
func (m *Map) Translate(dst []unix.Iovec, addr, length uint64) ([]unix.Iovec, error) {
	if addr+length < addr {
		return dst, ErrUnmapped
	}
	for length > 0 {
		r := find(m.byGPA, addr)
		if r == nil {
			return dst, ErrUnmapped
		}
		off := addr - r.GuestPhysAddr
		n := min(length, r.Size-off)
		dst = append(dst, unix.Iovec{Base: &r.host[off], Len: n})
		addr, length = addr+n, length-n
	}
	return dst, nil
}

// User returns the host memory of length bytes at front-end address addr, which must lie in one region: rings are
// given so (vhost-user, "vring address description").
func (m *Map) User(addr, length uint64) ([]byte, error) {
	i, found := slices.BinarySearchFunc(m.byUser, addr, func(r *region, a uint64) int { return cmp.Compare(r.UserAddr, a) })
	if !found {
		i--
	}
	if i < 0 || length == 0 {
		return nil, ErrUnmapped
	}
	r := m.byUser[i]
	off := addr - r.UserAddr
	if off >= r.Size || length > r.Size-off {
		return nil, ErrUnmapped
	}
	return r.host[off : off+length : off+length], nil
}

// find is written out, not slices.BinarySearchFunc, because it runs for every descriptor.
func find(regions []*region, addr uint64) *region {
	lo, hi := 0, len(regions)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if regions[mid].GuestPhysAddr <= addr {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return nil
	}
	if r := regions[lo-1]; addr-r.GuestPhysAddr < r.Size {
		return r
	}
	return nil
}

// Memory is a guest's memory as the front-end describes it over time. The zero value is not usable; see New.
type Memory struct {
	mu  sync.Mutex // orders changes
	cur atomic.Pointer[Map]
}

// New returns a Memory without regions.
func New() *Memory {
	mm := new(Memory)
	mm.cur.Store(newMap(nil))
	return mm
}

// Acquire returns the present Map and holds it until Release.
func (mm *Memory) Acquire() *Map {
	for {
		m := mm.cur.Load()
		// A Map at 0 is already going; its successor is in cur.
		if n := m.refs.Load(); n > 0 && m.refs.CompareAndSwap(n, n+1) {
			return m
		}
	}
}

// Add maps one region of the file behind fd, which the caller keeps (VHOST_USER_ADD_MEM_REG). It returns the Map that
// the change retired. Nothing changes on an error: a bad description, an overlap, too many regions, a failed mapping.
func (mm *Memory) Add(c RegionConfig, fd int) (old *Map, err error) {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	cur := mm.cur.Load()
	if len(cur.byGPA) >= MaxRegions {
		return nil, fmt.Errorf("add memory region %#x: all %d slots are in use", c.GuestPhysAddr, MaxRegions)
	}
	r, err := mapRegion(c, fd)
	if err != nil {
		return nil, err
	}
	return mm.swap(append(slices.Clone(cur.byGPA), r))
}

// Remove takes out the region with c's guest address, size and front-end address (VHOST_USER_REM_MEM_REG; the offset is
// not compared). It returns the Map that the change retired: wait for its Done before telling the front-end.
func (mm *Memory) Remove(c RegionConfig) (old *Map, err error) {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	cur := mm.cur.Load()
	i := slices.IndexFunc(cur.byGPA, func(r *region) bool {
		return r.GuestPhysAddr == c.GuestPhysAddr && r.Size == c.Size && r.UserAddr == c.UserAddr
	})
	if i < 0 {
		return nil, fmt.Errorf("remove memory region %#x of size %#x: no such region", c.GuestPhysAddr, c.Size)
	}
	return mm.swap(slices.Delete(slices.Clone(cur.byGPA), i, i+1))
}

// Replace maps regions, one for each fd, in place of all that there were (VHOST_USER_SET_MEM_TABLE). It returns the Map
// that the change retired. Nothing changes on an error.
func (mm *Memory) Replace(cs []RegionConfig, fds []int) (old *Map, err error) {
	if len(cs) != len(fds) || len(cs) > MaxRegions {
		return nil, fmt.Errorf("replace memory: %d regions with %d fds, expected as many of each and at most %d", len(cs), len(fds), MaxRegions)
	}
	mm.mu.Lock()
	defer mm.mu.Unlock()
	regions := make([]*region, 0, len(cs))
	for i, c := range cs {
		r, err := mapRegion(c, fds[i])
		if err != nil {
			for _, r := range regions {
				_ = unix.Munmap(r.mapping)
			}
			return nil, err
		}
		regions = append(regions, r)
	}
	return mm.swap(regions)
}

// Clear removes every region and returns the Map that held them.
func (mm *Memory) Clear() *Map {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	old, _ := mm.swap(nil) // no regions cannot overlap
	return old
}

// swap publishes a Map of regions unless they overlap. mm.mu is held.
func (mm *Memory) swap(regions []*region) (*Map, error) {
	next := newMap(regions)
	if err := next.overlap(); err != nil {
		next.Release() // unmaps those regions that only next holds
		return nil, err
	}
	old := mm.cur.Swap(next)
	old.Release()
	return old, nil
}

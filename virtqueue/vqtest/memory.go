package vqtest

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/guestmem"
)

// Page is the guest's page size in bytes.
const Page = 4096

// Memory is a guest's memory: regions of one memfd, as a VMM makes them.
type Memory struct {
	fd      int
	host    []byte // the whole file
	regions []guestmem.RegionConfig
	next    uint64 // the next address to allocate
}

// Regions returns a layout in the file of a memfd with what guests have: low memory that ends at 640 KiB, the gap after it,
// and size bytes each in two adjacent regions, which lie apart in the file and in front-end addresses. size is in bytes, a multiple
// of Page.
func Regions(size uint64) []guestmem.RegionConfig {
	const low, high = 0xa0000, 0xc0000
	return []guestmem.RegionConfig{
		{GuestPhysAddr: 0, Size: low, UserAddr: 0x7f00_0000_0000, MmapOffset: 0},
		{GuestPhysAddr: high, Size: size, UserAddr: 0x7f10_0000_0000, MmapOffset: low + Page + size},
		{GuestPhysAddr: high + size, Size: size, UserAddr: 0x7f20_0000_0000, MmapOffset: low + Page},
	}
}

// NewMemory makes a memfd that is large enough for regions. Nothing of it is allocated yet; address 0 never is.
func NewMemory(regions []guestmem.RegionConfig) (*Memory, error) {
	size := uint64(0)
	for _, r := range regions {
		size = max(size, r.MmapOffset+r.Size)
	}
	size = (size + Page - 1) &^ (Page - 1)
	fd, err := unix.MemfdCreate("vqtest", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create guest memory: %w", err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("size guest memory to %#x bytes: %w", size, err)
	}
	host, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("map guest memory: %w", err)
	}
	m := &Memory{fd: fd, host: host, regions: regions}
	m.next = regions[0].GuestPhysAddr + Page
	return m, nil
}

// Close unmaps the memory and closes the memfd.
func (m *Memory) Close() error {
	if m.host == nil {
		return nil
	}
	err := unix.Munmap(m.host)
	m.host = nil
	return errors.Join(err, unix.Close(m.fd))
}

// FD returns the memfd, which stays the Memory's own.
func (m *Memory) FD() int { return m.fd }

// Regions returns what a front-end sends in VHOST_USER_ADD_MEM_REG or SET_MEM_TABLE; each goes with FD.
func (m *Memory) Regions() []guestmem.RegionConfig { return m.regions }

// Truncate cuts the file behind the memory to size bytes, as a hostile front-end does. The Driver must not be used after it.
func (m *Memory) Truncate(size int64) error { return unix.Ftruncate(m.fd, size) }

// piece returns the memory at guest-physical addr to the end of its region, at most n bytes.
func (m *Memory) piece(addr, n uint64) []byte {
	for _, r := range m.regions {
		if off := addr - r.GuestPhysAddr; addr >= r.GuestPhysAddr && off < r.Size {
			start := r.MmapOffset + off
			return m.host[start : start+min(n, r.Size-off)]
		}
	}
	panic(fmt.Sprintf("vqtest: guest address %#x is in no region", addr))
}

// Bytes returns the n bytes at guest-physical addr, which must lie in one region.
func (m *Memory) Bytes(addr, n uint64) []byte {
	b := m.piece(addr, n)
	if uint64(len(b)) < n {
		panic(fmt.Sprintf("vqtest: %d bytes at %#x go past the end of the region", n, addr))
	}
	return b[:n:n]
}

// Write copies p to guest-physical addr, across adjacent regions.
func (m *Memory) Write(addr uint64, p []byte) {
	for len(p) > 0 {
		n := copy(m.piece(addr, uint64(len(p))), p)
		addr, p = addr+uint64(n), p[n:]
	}
}

// Read copies from guest-physical addr to p, across adjacent regions.
func (m *Memory) Read(addr uint64, p []byte) {
	for len(p) > 0 {
		n := copy(p, m.piece(addr, uint64(len(p))))
		addr, p = addr+uint64(n), p[n:]
	}
}

// UserAddr returns the front-end's address of guest-physical addr, in which rings are given.
func (m *Memory) UserAddr(addr uint64) uint64 {
	for _, r := range m.regions {
		if off := addr - r.GuestPhysAddr; addr >= r.GuestPhysAddr && off < r.Size {
			return r.UserAddr + off
		}
	}
	panic(fmt.Sprintf("vqtest: guest address %#x is in no region", addr))
}

// Alloc returns the guest-physical address of n unused bytes in one region, aligned to align, a power of two. It panics
// when there is no room: Regions takes the size.
func (m *Memory) Alloc(n, align uint64) uint64 {
	for _, r := range m.regions {
		addr := (max(m.next, r.GuestPhysAddr) + align - 1) &^ (align - 1)
		if off := addr - r.GuestPhysAddr; off < r.Size && n <= r.Size-off {
			m.next = addr + n
			return addr
		}
	}
	panic(fmt.Sprintf("vqtest: no room for %d bytes after %#x in the guest's memory, make the regions larger", n, m.next))
}

// Mark returns where the next allocation starts; Reset(Mark()) later frees all that was allocated in between.
func (m *Memory) Mark() uint64 { return m.next }

// Reset frees what was allocated since mark was taken.
func (m *Memory) Reset(mark uint64) { m.next = mark }

// Map adds the regions to a new guestmem.Memory, as the device has it. The caller calls Clear and releases the Maps it acquires.
func (m *Memory) Map() (*guestmem.Memory, error) {
	mm := guestmem.New()
	for _, r := range m.regions {
		if _, err := mm.Add(r, m.fd); err != nil {
			mm.Clear()
			return nil, err
		}
	}
	return mm, nil
}

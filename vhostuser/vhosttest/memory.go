package vhosttest

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// Memory is a file in memory that stands for a guest's: the descriptor goes to the back-end, Bytes is the driver's view.
type Memory struct {
	Bytes []byte
	fd    *sys.FD
}

// NewMemory makes a Memory of size bytes, all 0; only what is touched takes space.
func NewMemory(size int) (*Memory, error) {
	n, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make guest memory: %w", err)
	}
	fd := sys.NewFD(n)
	if err := unix.Ftruncate(n, int64(size)); err != nil {
		_ = fd.Close()
		return nil, fmt.Errorf("make %d bytes of guest memory: %w", size, err)
	}
	b, err := unix.Mmap(n, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		_ = fd.Close()
		return nil, fmt.Errorf("map %d bytes of guest memory: %w", size, err)
	}
	return &Memory{Bytes: b, fd: fd}, nil
}

// FD returns the file's descriptor, which stays the Memory's own.
func (m *Memory) FD() int {
	return m.fd.Int()
}

// Close unmaps and closes; Bytes must not be used any more.
func (m *Memory) Close() {
	_ = unix.Munmap(m.Bytes)
	m.Bytes = nil
	_ = m.fd.Close()
}

// Package sys holds the few system calls and owner types that golang.org/x/sys/unix lacks or gives only with an allocation.
package sys

import (
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// FD owns a file descriptor: whoever holds the *FD closes it, once. Every descriptor of the process that outlives
// a function lives in one, so that a leak is a missing Close and not a lost integer.
type FD struct {
	raw atomic.Int32
}

// NewFD takes ownership of fd, which must be open.
func NewFD(fd int) *FD {
	f := new(FD)
	f.raw.Store(int32(fd))
	return f
}

// Int returns the descriptor's number, -1 once it is closed or disowned. It stays the FD's own.
func (f *FD) Int() int {
	return int(f.raw.Load())
}

// Close closes the descriptor; closing twice, or a nil FD, does nothing.
func (f *FD) Close() error {
	if f == nil {
		return nil
	}
	fd := int(f.raw.Swap(-1))
	if fd < 0 {
		return nil
	}
	return unix.Close(fd)
}

// Disown gives the descriptor to the caller, who closes it from now on.
func (f *FD) Disown() int {
	return int(f.raw.Swap(-1))
}

// Dup returns a second owner of the same open file description (close-on-exec).
func (f *FD) Dup() (*FD, error) {
	fd, err := unix.FcntlInt(uintptr(f.Int()), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate fd %d: %w", f.Int(), err)
	}
	return NewFD(fd), nil
}

// CloseAll closes every descriptor of fds, which must be numbers that nobody owns yet.
func CloseAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

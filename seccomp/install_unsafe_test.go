//go:build linux && cgo && (amd64 || arm64)

package seccomp

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func openatRaw(dir uintptr, path []byte) (uintptr, unix.Errno) {
	fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, dir, uintptr(unsafe.Pointer(&path[0])), unix.O_RDONLY, 0, 0, 0)
	return fd, errno
}

// loadForThread loads a filter for the calling thread alone.
func loadForThread(program []unix.SockFilter) error {
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return errno
	}
	return nil
}

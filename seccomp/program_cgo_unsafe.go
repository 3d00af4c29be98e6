//go:build linux && cgo && (amd64 || arm64)

package seccomp

import (
	"unsafe"

	libseccomp "github.com/seccomp/libseccomp-golang"
	"golang.org/x/sys/unix"
)

// ConfineProgram confines the calling thread, for it to execute a program that is not the daemon: what the deny set forbids the
// daemon for the machine's, other processes' and the mounts' sake fails with EPERM. With mayMount, mount(2) and umount2(2) do not.
// The thread must have no_new_privs, and be locked.
func ConfineProgram(mayMount bool) error {
	if err := supported(Kill); err != nil {
		return programError(err)
	}
	deny, missing, err := programDenials(mayMount)
	if err != nil {
		return programError(err)
	}
	filter, err := compile(libseccomp.ActAllow, libseccomp.ActErrno.SetReturnCode(int16(unix.EPERM)), deny, missing)
	if err != nil {
		return programError(err)
	}
	fprog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&fprog))); errno != 0 {
		return programError(errno)
	}
	return nil
}

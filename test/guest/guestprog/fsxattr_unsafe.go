package main

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fsxattr is struct fsxattr of linux/fs.h.
type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	_                                             [8]byte
}

// extendedFlags are a file's FS_XFLAG_*.
func extendedFlags(f *os.File) (uint32, error) {
	var x fsxattr
	err := fsxattrCall(f, 0x801c581f, &x) // FS_IOC_FSGETXATTR
	return x.xflags, err
}

// setExtendedFlags replaces them.
func setExtendedFlags(f *os.File, flags uint32) error {
	var x fsxattr
	if err := fsxattrCall(f, 0x801c581f, &x); err != nil {
		return err
	}
	x.xflags = flags
	return fsxattrCall(f, 0x401c5820, &x) // FS_IOC_FSSETXATTR
}

func fsxattrCall(f *os.File, request uintptr, x *fsxattr) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(x))); errno != 0 {
		return errno
	}
	return nil
}

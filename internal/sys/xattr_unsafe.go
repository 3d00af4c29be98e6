package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ProcXattr reaches the extended attributes of files known by O_PATH descriptors, which fgetxattr(2) and its like refuse.
// From Linux 6.13 on it names them relative to its own descriptor of /proc/self/fd; before, by absolute path, so that
// /proc has to stay mounted.
type ProcXattr struct {
	procfd int
	byPath bool
}

// NewProcXattr finds out what the kernel can do; procfd is /proc/self/fd and stays the caller's.
func NewProcXattr(procfd int) ProcXattr {
	p := ProcXattr{procfd: procfd}
	dot := [2]byte{'.'}
	_, _, errno := unix.Syscall6(unix.SYS_LISTXATTRAT, uintptr(procfd), uintptr(unsafe.Pointer(&dot)), 0, 0, 0, 0)
	// EPERM is what some seccomp profiles say to a number they do not know.
	p.byPath = errno == unix.ENOSYS || errno == unix.EPERM
	return p
}

// xattrArgs is struct xattr_args (include/uapi/linux/xattr.h). Its value is a 64-bit number there, which a pointer is on
// the machines we support, and as one it follows a stack that moves.
type xattrArgs struct {
	value unsafe.Pointer
	size  uint32
	flags uint32
}

const procSelfFD = "/proc/self/fd/"

// procPath is the absolute path of a descriptor, as a C string.
type procPath [len(procSelfFD) + 12]byte

func (p *procPath) set(fd int) *byte {
	var d Decimal
	first := FormatDecimal(&d, fd)
	at := copy(p[:], procSelfFD)
	skip := int(uintptr(unsafe.Pointer(first)) - uintptr(unsafe.Pointer(&d)))
	copy(p[at:], d[skip:])
	return &p[0]
}

// Get reads the value of name to buf and returns its length; an empty buf only asks for the length.
func (p ProcXattr) Get(fd int, name *byte, buf []byte) (int, unix.Errno) {
	value := unsafe.Pointer(unsafe.SliceData(buf))
	if p.byPath {
		var path procPath
		file := path.set(fd)
		for {
			r, _, errno := unix.Syscall6(unix.SYS_GETXATTR, uintptr(unsafe.Pointer(file)), uintptr(unsafe.Pointer(name)), uintptr(value), uintptr(len(buf)), 0, 0)
			if errno != unix.EINTR {
				return result(r, errno)
			}
		}
	}
	return p.at(unix.SYS_GETXATTRAT, fd, name, value, len(buf), 0)
}

// Set sets name to value with XATTR_* flags.
func (p ProcXattr) Set(fd int, name *byte, value []byte, flags uint32) unix.Errno {
	v := unsafe.Pointer(unsafe.SliceData(value))
	if p.byPath {
		var path procPath
		file := path.set(fd)
		for {
			_, _, errno := unix.Syscall6(unix.SYS_SETXATTR, uintptr(unsafe.Pointer(file)), uintptr(unsafe.Pointer(name)), uintptr(v), uintptr(len(value)), uintptr(flags), 0)
			if errno != unix.EINTR {
				return errno
			}
		}
	}
	_, errno := p.at(unix.SYS_SETXATTRAT, fd, name, v, len(value), flags)
	return errno
}

// at calls getxattrat(2) or setxattrat(2).
func (p ProcXattr) at(trap uintptr, fd int, name *byte, value unsafe.Pointer, size int, flags uint32) (int, unix.Errno) {
	var d Decimal
	link := FormatDecimal(&d, fd)
	args := xattrArgs{value: value, size: uint32(size), flags: flags}
	for {
		r, _, errno := unix.Syscall6(trap, uintptr(p.procfd), uintptr(unsafe.Pointer(link)), 0, uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args))
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// List reads the names, each with its NUL, to buf and returns their length; an empty buf only asks for the length.
func (p ProcXattr) List(fd int, buf []byte) (int, unix.Errno) {
	if p.byPath {
		var path procPath
		file := path.set(fd)
		for {
			r, _, errno := unix.Syscall6(unix.SYS_LISTXATTR, uintptr(unsafe.Pointer(file)), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0, 0, 0)
			if errno != unix.EINTR {
				return result(r, errno)
			}
		}
	}
	var d Decimal
	link := FormatDecimal(&d, fd)
	for {
		r, _, errno := unix.Syscall6(unix.SYS_LISTXATTRAT, uintptr(p.procfd), uintptr(unsafe.Pointer(link)), 0, uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// Remove removes name.
func (p ProcXattr) Remove(fd int, name *byte) unix.Errno {
	if p.byPath {
		var path procPath
		file := path.set(fd)
		for {
			_, _, errno := unix.Syscall6(unix.SYS_REMOVEXATTR, uintptr(unsafe.Pointer(file)), uintptr(unsafe.Pointer(name)), 0, 0, 0, 0)
			if errno != unix.EINTR {
				return errno
			}
		}
	}
	var d Decimal
	link := FormatDecimal(&d, fd)
	for {
		_, _, errno := unix.Syscall6(unix.SYS_REMOVEXATTRAT, uintptr(p.procfd), uintptr(unsafe.Pointer(link)), 0, uintptr(unsafe.Pointer(name)), 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

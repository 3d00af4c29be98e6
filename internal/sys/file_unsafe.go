package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of this file take names as C strings and allocate nothing. Their x/sys counterparts copy each name.

// empty is the name that AT_EMPTY_PATH goes with.
var empty [1]byte

// result is a system call's result and error. Calls are repeated while a signal interrupts them, as the Go runtime's own do.
// Each names unix.Syscall6 itself: only in its argument list may a pointer become a uintptr.
func result(r uintptr, errno unix.Errno) (int, unix.Errno) {
	if errno != 0 {
		return -1, errno
	}
	return int(r), 0
}

// Decimal is a small number as a C string, the name of a descriptor in /proc/self/fd.
type Decimal [12]byte

// FormatDecimal writes n, which must not be negative, to d and returns its first byte's address.
func FormatDecimal(d *Decimal, n int) *byte {
	i := len(d) - 1
	d[i] = 0
	for {
		i--
		d[i] = byte('0' + n%10)
		if n /= 10; n == 0 || i == 0 {
			return &d[i]
		}
	}
}

// Openat2 opens name in the directory dirfd as openat2(2): resolve is RESOLVE_*.
func Openat2(dirfd int, name *byte, flags uint64, mode uint32, resolve uint64) (int, unix.Errno) {
	how := unix.OpenHow{Flags: flags, Mode: uint64(mode), Resolve: resolve}
	for {
		r, _, errno := unix.Syscall6(unix.SYS_OPENAT2, uintptr(dirfd), uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(&how)), unsafe.Sizeof(how), 0, 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// Reopen opens the file behind the descriptor fd anew: procfd is /proc/self/fd.
func Reopen(procfd, fd, flags int) (int, unix.Errno) {
	var d Decimal
	link := FormatDecimal(&d, fd)
	for {
		r, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(procfd), uintptr(unsafe.Pointer(link)), uintptr(flags), 0, 0, 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// OpenDot opens the directory dirfd itself anew.
func OpenDot(dirfd, flags int) (int, unix.Errno) {
	dot := [2]byte{'.'}
	for {
		r, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(dirfd), uintptr(unsafe.Pointer(&dot)), uintptr(flags), 0, 0, 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// OpenTmpfile makes a file without a name in the directory dirfd: flags must hold O_TMPFILE.
func OpenTmpfile(dirfd, flags int, mode uint32) (int, unix.Errno) {
	dot := [2]byte{'.'}
	for {
		r, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(dirfd), uintptr(unsafe.Pointer(&dot)), uintptr(flags), uintptr(mode), 0, 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// Statx fills st for name in dirfd, or with a nil name for dirfd itself.
func Statx(dirfd int, name *byte, flags int, mask uint32, st *unix.Statx_t) unix.Errno {
	if name == nil {
		name = &empty[0]
		flags |= unix.AT_EMPTY_PATH
	}
	for {
		_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(dirfd), uintptr(unsafe.Pointer(name)), uintptr(flags), uintptr(mask), uintptr(unsafe.Pointer(st)), 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// Fstat is fstat(2): of the calls that describe an open file the cheapest, and it takes O_PATH descriptors, too.
func Fstat(fd int, st *unix.Stat_t) unix.Errno {
	for {
		_, _, errno := unix.Syscall(unix.SYS_FSTAT, uintptr(fd), uintptr(unsafe.Pointer(st)), 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// FstatAtOnce is Fstat for a file whose file system is known never to sleep in it: Go's scheduler is not told, which costs a tenth of
// the call. While it lasts the thread cannot be stopped for the garbage collector, and all others would wait for it.
func FstatAtOnce(fd int, st *unix.Stat_t) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_FSTAT, uintptr(fd), uintptr(unsafe.Pointer(st)), 0)
	return errno
}

// MaxHandleSize is MAX_HANDLE_SZ (include/linux/exportfs.h).
const MaxHandleSize = 128

// FileHandle is struct file_handle with room for the longest handle.
type FileHandle struct {
	Bytes  uint32 // how much of Handle is used
	Type   int32
	Handle [MaxHandleSize]byte
}

// NameToHandle fills h for the file behind fd.
func NameToHandle(fd int, h *FileHandle) unix.Errno {
	h.Bytes = MaxHandleSize
	var mount int32
	for {
		_, _, errno := unix.Syscall6(unix.SYS_NAME_TO_HANDLE_AT, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])), uintptr(unsafe.Pointer(h)), uintptr(unsafe.Pointer(&mount)), unix.AT_EMPTY_PATH, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// OpenByHandle opens h on the mount that mountfd, which must not be O_PATH, is on.
func OpenByHandle(mountfd int, h *FileHandle, flags int) (int, unix.Errno) {
	for {
		r, _, errno := unix.Syscall6(unix.SYS_OPEN_BY_HANDLE_AT, uintptr(mountfd), uintptr(unsafe.Pointer(h)), uintptr(flags), 0, 0, 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// Getdents64 reads struct linux_dirent64 records into buf, which must not be empty.
func Getdents64(fd int, buf []byte) (int, unix.Errno) {
	for {
		r, _, errno := unix.Syscall6(unix.SYS_GETDENTS64, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0, 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// Lseek moves fd's offset.
func Lseek(fd int, off int64, whence int) (int64, unix.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_LSEEK, uintptr(fd), uintptr(off), uintptr(whence))
	return int64(n), errno
}

// Mkdirat is mkdirat(2).
func Mkdirat(dirfd int, name *byte, mode uint32) unix.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_MKDIRAT, uintptr(dirfd), uintptr(unsafe.Pointer(name)), uintptr(mode), 0, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// Mknodat is mknodat(2); dev is in the kernel's 32-bit form.
func Mknodat(dirfd int, name *byte, mode, dev uint32) unix.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_MKNODAT, uintptr(dirfd), uintptr(unsafe.Pointer(name)), uintptr(mode), uintptr(dev), 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// Symlinkat is symlinkat(2).
func Symlinkat(target *byte, dirfd int, name *byte) unix.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_SYMLINKAT, uintptr(unsafe.Pointer(target)), uintptr(dirfd), uintptr(unsafe.Pointer(name)), 0, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// Unlinkat is unlinkat(2).
func Unlinkat(dirfd int, name *byte, flags int) unix.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_UNLINKAT, uintptr(dirfd), uintptr(unsafe.Pointer(name)), uintptr(flags), 0, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// Renameat2 is renameat2(2).
func Renameat2(olddir int, oldName *byte, newdir int, newName *byte, flags uint32) unix.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_RENAMEAT2, uintptr(olddir), uintptr(unsafe.Pointer(oldName)), uintptr(newdir), uintptr(unsafe.Pointer(newName)), uintptr(flags), 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// LinkFD links the file behind fd as name in dirfd: procfd is /proc/self/fd.
func LinkFD(procfd, fd, dirfd int, name *byte) unix.Errno {
	var d Decimal
	link := FormatDecimal(&d, fd)
	for {
		_, _, errno := unix.Syscall6(unix.SYS_LINKAT, uintptr(procfd), uintptr(unsafe.Pointer(link)), uintptr(dirfd), uintptr(unsafe.Pointer(name)), unix.AT_SYMLINK_FOLLOW, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// ReadlinkFD reads the target of the symbolic link that fd, an O_PATH descriptor, is.
func ReadlinkFD(fd int, buf []byte) (int, unix.Errno) {
	for {
		r, _, errno := unix.Syscall6(unix.SYS_READLINKAT, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// ChmodFD changes the mode of the file behind fd, which may be O_PATH: procfd is /proc/self/fd.
func ChmodFD(procfd, fd int, mode uint32) unix.Errno {
	var d Decimal
	link := FormatDecimal(&d, fd)
	for {
		_, _, errno := unix.Syscall6(unix.SYS_FCHMODAT, uintptr(procfd), uintptr(unsafe.Pointer(link)), uintptr(mode), 0, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// ChownFD changes the owner of the file behind fd, which may be O_PATH; ^uint32(0) leaves one as it is.
func ChownFD(fd int, uid, gid uint32) unix.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_FCHOWNAT, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])), uintptr(uid), uintptr(gid), unix.AT_EMPTY_PATH, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// UtimensFD sets access and modification times of the file behind fd, which may be O_PATH: procfd is /proc/self/fd.
func UtimensFD(procfd, fd int, times *[2]unix.Timespec) unix.Errno {
	var d Decimal
	link := FormatDecimal(&d, fd)
	for {
		_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(procfd), uintptr(unsafe.Pointer(link)), uintptr(unsafe.Pointer(times)), 0, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// Ftruncate is ftruncate(2).
func Ftruncate(fd int, size int64) unix.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_FTRUNCATE, uintptr(fd), uintptr(size), 0, 0, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// Fallocate is fallocate(2).
func Fallocate(fd int, mode uint32, off, size int64) unix.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_FALLOCATE, uintptr(fd), uintptr(mode), uintptr(off), uintptr(size), 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// CopyFileRange is copy_file_range(2) with both offsets given.
func CopyFileRange(in int, offIn int64, out int, offOut int64, n uint64, flags uint32) (int, unix.Errno) {
	for {
		r, _, errno := unix.Syscall6(unix.SYS_COPY_FILE_RANGE, uintptr(in), uintptr(unsafe.Pointer(&offIn)), uintptr(out), uintptr(unsafe.Pointer(&offOut)), uintptr(n), uintptr(flags))
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

// Ioctl is ioctl(2) with arg, which must be as long as cmd has it.
func Ioctl(fd int, cmd uint32, arg []byte) (int, unix.Errno) {
	for {
		r, _, errno := unix.Syscall6(unix.SYS_IOCTL, uintptr(fd), uintptr(cmd), uintptr(unsafe.Pointer(&arg[0])), 0, 0, 0)
		if errno != unix.EINTR {
			return result(r, errno)
		}
	}
}

package floor

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of the floor are raw: a server in any language pays at least this much. None of them waits for another thread of
// ours, as a raw call must not.

func fstat(fd int, st *unix.Stat_t) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_FSTAT, uintptr(fd), uintptr(unsafe.Pointer(st)), 0)
	return errno
}

func fstatat(dirfd int, name *byte, flags int, st *unix.Stat_t) unix.Errno {
	_, _, errno := unix.RawSyscall6(sysFstatat, uintptr(dirfd), uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(st)), uintptr(flags), 0, 0)
	return errno
}

func statx(dirfd int, name *byte, flags int, st *unix.Statx_t) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_STATX, uintptr(dirfd), uintptr(unsafe.Pointer(name)), uintptr(flags), unix.STATX_BASIC_STATS, uintptr(unsafe.Pointer(st)), 0)
	return errno
}

func openat(dirfd int, name *byte, flags int, mode uint32) (int, unix.Errno) {
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(dirfd), uintptr(unsafe.Pointer(name)), uintptr(flags)|unix.O_CLOEXEC, uintptr(mode), 0, 0)
	return int(fd), errno
}

func closeFD(fd int) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
	return errno
}

func unlinkat(dirfd int, name *byte) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_UNLINKAT, uintptr(dirfd), uintptr(unsafe.Pointer(name)), 0)
	return errno
}

func renameat(dirfd int, from, to *byte) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_RENAMEAT2, uintptr(dirfd), uintptr(unsafe.Pointer(from)), uintptr(dirfd), uintptr(unsafe.Pointer(to)), 0, 0)
	return errno
}

func utimensat(fd int, times *[2]unix.Timespec) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(times)), 0, 0, 0)
	return errno
}

func fstatfs(fd int, st *unix.Statfs_t) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_FSTATFS, uintptr(fd), uintptr(unsafe.Pointer(st)), 0)
	return errno
}

// vectored is preadv or pwritev, by trap.
func vectored(trap uintptr, fd int, iov []unix.Iovec, off int64) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)), uintptr(off), 0, 0)
	return int(n), errno
}

func rewind(fd int) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_LSEEK, uintptr(fd), 0, unix.SEEK_SET)
	return errno
}

func getdents(fd int, buf []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(unix.SYS_GETDENTS64, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
	return int(n), errno
}

// send writes the eight bytes of an eventfd.
func send(fd int, count *uint64) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(count)), 8)
	return errno
}

// receive reads them. It sleeps until another thread sends, which the runtime must know: were it a raw call, who stops the world
// would stop the other thread first, and wait for this one for ever.
func receive(fd int, count *uint64) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(count)), 8)
	return errno
}

// iovecs describes b in pieces of at most size bytes.
func iovecs(b []byte, size int) []unix.Iovec {
	var iov []unix.Iovec
	for len(b) > 0 {
		n := min(size, len(b))
		iov = append(iov, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(n)})
		b = b[n:]
	}
	return iov
}

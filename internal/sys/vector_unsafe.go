package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// IOVMax is Linux's UIO_MAXIOV: the most segments one vectored call takes (include/uapi/linux/uio.h).
const IOVMax = 1024

// Preadv2 reads from fd at byte offset off into iov, at most IOVMax segments of it, with RWF_* flags, and returns
// the bytes read. unix.Preadv allocates a copy of the vector; this does not.
func Preadv2(fd int, iov []unix.Iovec, off int64, flags int) (int, unix.Errno) {
	if len(iov) == 1 && flags == 0 {
		return single(unix.SYS_PREAD64, fd, &iov[0], off)
	}
	return vectored(unix.SYS_PREADV2, fd, iov, off, flags)
}

// Pwritev2 writes iov to fd at byte offset off, as Preadv2 reads it.
func Pwritev2(fd int, iov []unix.Iovec, off int64, flags int) (int, unix.Errno) {
	if len(iov) == 1 && flags == 0 {
		return single(unix.SYS_PWRITE64, fd, &iov[0], off)
	}
	return vectored(unix.SYS_PWRITEV2, fd, iov, off, flags)
}

// single is vectored for one segment: the kernel need not fetch it first, which is a tenth of 4 KiB.
func single(trap uintptr, fd int, v *unix.Iovec, off int64) (int, unix.Errno) {
	for {
		n, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(v.Base)), uintptr(v.Len), uintptr(off), 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), 0
	}
}

func vectored(trap uintptr, fd int, iov []unix.Iovec, off int64, flags int) (int, unix.Errno) {
	if len(iov) == 0 {
		return 0, 0
	}
	if len(iov) > IOVMax {
		iov = iov[:IOVMax]
	}
	for {
		// The kernel joins the two offset words itself; on 64-bit the low one holds it all (fs/read_write.c, pos_from_hilo).
		n, _, errno := unix.Syscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)), uintptr(off), 0, uintptr(flags))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), 0
	}
}

// Bytes returns the memory that v describes; it is valid as long as that memory is.
func Bytes(v *unix.Iovec) []byte {
	return unsafe.Slice(v.Base, int(v.Len))
}

// MakeIovec describes b, which must not be empty.
func MakeIovec(b []byte) unix.Iovec {
	return unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
}

// Advance moves the start of v on by n bytes, n at most v.Len.
func Advance(v *unix.Iovec, n uint64) {
	v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
	v.Len -= n
}

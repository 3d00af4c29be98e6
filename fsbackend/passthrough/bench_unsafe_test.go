package passthrough

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// threadTime is the CPU time that the calling thread has used.
func threadTime() time.Duration {
	var ts unix.Timespec
	_, _, _ = unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_THREAD_CPUTIME_ID, uintptr(unsafe.Pointer(&ts)), 0)
	return time.Duration(ts.Nano())
}

// The calls of floorCalls are the system calls that an operation cannot do without, with nothing around them: not even what tells
// Go's scheduler of them.
type floorCalls struct {
	st     unix.Stat_t
	stx    unix.Statx_t
	buf    [32 << 10]byte
	iov    unix.Iovec
	decode sys.Decimal
}

func (f *floorCalls) must(r uintptr, errno unix.Errno) int {
	if errno != 0 {
		panic(errno)
	}
	return int(r)
}

func (f *floorCalls) statxFD(fd int) {
	var none [1]byte
	r, _, e := unix.RawSyscall6(unix.SYS_STATX, uintptr(fd), uintptr(unsafe.Pointer(&none)), unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, uintptr(unsafe.Pointer(&f.stx)), 0)
	f.must(r, e)
}

func (f *floorCalls) fstat(fd int) {
	r, _, e := unix.RawSyscall(unix.SYS_FSTAT, uintptr(fd), uintptr(unsafe.Pointer(&f.st)), 0)
	f.must(r, e)
}

func (f *floorCalls) fstatat(dir int, name []byte) {
	r, _, e := unix.RawSyscall6(unix.SYS_NEWFSTATAT, uintptr(dir), uintptr(unsafe.Pointer(&name[0])), uintptr(unsafe.Pointer(&f.st)), unix.AT_SYMLINK_NOFOLLOW, 0, 0)
	f.must(r, e)
}

func (f *floorCalls) openat(dir int, name []byte, flags, mode int) int {
	r, _, e := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(&name[0])), uintptr(flags), uintptr(mode), 0, 0)
	return f.must(r, e)
}

func (f *floorCalls) reopen(procfd, fd, flags int) int {
	r, _, e := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(procfd), uintptr(unsafe.Pointer(sys.FormatDecimal(&f.decode, fd))), uintptr(flags), 0, 0, 0)
	return f.must(r, e)
}

func (f *floorCalls) close(fd int) {
	r, _, e := unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
	f.must(r, e)
}

func (f *floorCalls) unlinkat(dir int, name []byte, flags int) {
	r, _, e := unix.RawSyscall(unix.SYS_UNLINKAT, uintptr(dir), uintptr(unsafe.Pointer(&name[0])), uintptr(flags))
	f.must(r, e)
}

func (f *floorCalls) mkdirat(dir int, name []byte) {
	r, _, e := unix.RawSyscall(unix.SYS_MKDIRAT, uintptr(dir), uintptr(unsafe.Pointer(&name[0])), 0o755)
	f.must(r, e)
}

func (f *floorCalls) vectored(trap uintptr, fd int, off uint64) {
	f.iov = sys.MakeIovec(f.buf[:4096])
	r, _, e := unix.RawSyscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&f.iov)), 1, uintptr(off), 0, 0)
	f.must(r, e)
}

// list lists the open directory fd and looks at each entry.
func (f *floorCalls) list(fd int) {
	_, _, _ = unix.RawSyscall(unix.SYS_LSEEK, uintptr(fd), 0, unix.SEEK_SET)
	for {
		r, _, e := unix.RawSyscall(unix.SYS_GETDENTS64, uintptr(fd), uintptr(unsafe.Pointer(&f.buf)), uintptr(len(f.buf)))
		n := f.must(r, e)
		if n == 0 {
			return
		}
		for at := 0; at < n; {
			size := int(*(*uint16)(unsafe.Pointer(&f.buf[at+16])))
			if f.buf[at+direntHeader] != '.' {
				f.fstatat(fd, f.buf[at+direntHeader:])
			}
			at += size
		}
	}
}

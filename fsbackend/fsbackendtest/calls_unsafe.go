package fsbackendtest

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// syscallInfo says which system call the stopped thread enters; entry is false where it leaves one.
func syscallInfo(tid int) (nr uint64, args [6]uint64, entry bool) {
	// struct ptrace_syscall_info (include/uapi/linux/ptrace.h)
	var info struct {
		op   uint8
		_    [3]uint8
		arch uint32
		ip   uint64
		sp   uint64
		nr   uint64
		args [6]uint64
		_    [16]byte
	}
	const getSyscallInfo, infoEntry = 0x420e, 1
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, getSyscallInfo, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	return info.nr, info.args, errno == 0 && info.op == infoEntry
}

package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of this file change the calling thread only, where x/sys's change every thread of the process: the goroutine
// must be locked to its thread until it has changed back.

// SetThreadUID sets the thread's effective and file-system user id.
func SetThreadUID(uid uint32) unix.Errno {
	const keep = ^uintptr(0)
	_, _, errno := unix.Syscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep)
	return errno
}

// SetThreadGID sets the thread's effective and file-system group id.
func SetThreadGID(gid uint32) unix.Errno {
	const keep = ^uintptr(0)
	_, _, errno := unix.Syscall(unix.SYS_SETRESGID, keep, uintptr(gid), keep)
	return errno
}

// SetThreadGroups sets the thread's supplementary groups.
func SetThreadGroups(gids []uint32) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_SETGROUPS, uintptr(len(gids)), uintptr(unsafe.Pointer(unsafe.SliceData(gids))), 0)
	return errno
}

// Caps are the thread's capability sets, a bit for each CAP_*.
type Caps struct {
	Effective, Permitted, Inheritable uint64
}

type capHeader struct {
	version uint32
	pid     int32
}

// capData is cap_user_data_t[2] of version 3: low words, then high words.
type capData [2]struct{ effective, permitted, inheritable uint32 }

// ThreadCaps returns the calling thread's capabilities.
func ThreadCaps() (Caps, unix.Errno) {
	header := capHeader{version: unix.LINUX_CAPABILITY_VERSION_3}
	var d capData
	_, _, errno := unix.Syscall(unix.SYS_CAPGET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&d)), 0)
	return Caps{
		Effective:   uint64(d[1].effective)<<32 | uint64(d[0].effective),
		Permitted:   uint64(d[1].permitted)<<32 | uint64(d[0].permitted),
		Inheritable: uint64(d[1].inheritable)<<32 | uint64(d[0].inheritable),
	}, errno
}

// SetThreadCaps sets the calling thread's capabilities.
func SetThreadCaps(c Caps) unix.Errno {
	header := capHeader{version: unix.LINUX_CAPABILITY_VERSION_3}
	var d capData
	for i := range d {
		shift := 32 * i
		d[i].effective = uint32(c.Effective >> shift)
		d[i].permitted = uint32(c.Permitted >> shift)
		d[i].inheritable = uint32(c.Inheritable >> shift)
	}
	_, _, errno := unix.Syscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&d)), 0)
	return errno
}

package sandbox

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// The calls of this file change every thread of the process.

// capsetAll makes caps the permitted and effective set, and empties the inheritable one.
func capsetAll(caps CapSet) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		data[i].Permitted = uint32(caps >> (32 * i))
		data[i].Effective = data[i].Permitted
	}
	if _, _, errno := psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data)), 0); errno != 0 {
		return fmt.Errorf("reduce the capabilities to %s: %w", caps, errno)
	}
	return nil
}

// prctlAll is prctl(2) with the arguments that it does not take zero.
func prctlAll(option, arg uintptr) error {
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, option, arg, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

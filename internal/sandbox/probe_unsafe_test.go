package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"unsafe"

	"golang.org/x/sys/unix"
)

// forbiddenCall makes a system call that a seccomp filter does not allow.
func forbiddenCall() error {
	code := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the number of the system call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_GETPRIORITY, Jt: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	filter := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&filter))); errno != 0 {
		return errno
	}
	_, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	return errors.Join(errors.New("it was allowed"), err)
}

// waitForSignals prints each signal that comes, until SIGTERM.
func waitForSignals(*inside) (any, error) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	fmt.Println("ready")
	for sig := range signals {
		fmt.Println(unix.SignalName(sig.(unix.Signal)))
		if sig == unix.SIGTERM {
			break
		}
	}
	os.Exit(7)
	return nil, nil
}

package fsbackendtest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// marker is the first argument of a getpriority(2) that says, in its second, which operation begins.
const marker = 0x51CE

// MarkCalls says, in a process that CountCalls has started, that operation op begins on this thread; the number of operations says
// that one ends.
func MarkCalls(op int) {
	_, _, _ = unix.RawSyscall(unix.SYS_GETPRIORITY, marker, uintptr(op), 0)
}

// runtimeCalls are the Go runtime's own: locks of its own and memory.
var runtimeCalls = []uint64{
	unix.SYS_FUTEX, unix.SYS_NANOSLEEP, unix.SYS_SCHED_YIELD, unix.SYS_MMAP, unix.SYS_MUNMAP, unix.SYS_MADVISE,
	unix.SYS_RT_SIGRETURN, unix.SYS_RT_SIGPROCMASK, unix.SYS_TGKILL, unix.SYS_GETPID, unix.SYS_CLONE, unix.SYS_GETTID,
}

// CountCalls runs the test's program again with env in its environment, which is to have it do ops operations between MarkCalls,
// and returns the numbers of the system calls of each, the Go runtime's left out.
func CountCalls(t *testing.T, ops int, env string) [][]uint64 {
	t.Helper()
	// Only the thread that started it may trace a process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), env)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	calls, err := trace(cmd.Process.Pid, ops)
	_ = cmd.Process.Release()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	made := make([][]uint64, ops)
	for op := range made {
		made[op] = slices.DeleteFunc(calls[op], func(nr uint64) bool { return slices.Contains(runtimeCalls, nr) })
	}
	return made
}

// trace follows a process to its end and returns the system calls it made within each operation below ends.
func trace(pid, ends int) (map[int][]uint64, error) {
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, 0, nil); err != nil {
		return nil, fmt.Errorf("wait for the process to start: %w", err)
	}
	if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	if err := unix.PtraceSyscall(pid, 0); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	calls := map[int][]uint64{}
	op, thread := ends, 0
	for {
		tid, err := unix.Wait4(-1, &ws, unix.WALL, nil)
		if err != nil {
			return nil, fmt.Errorf("wait: %w", err)
		}
		if ws.Exited() || ws.Signaled() {
			if tid != pid {
				continue
			}
			if ws.ExitStatus() != 0 {
				return nil, fmt.Errorf("the process ended with %#x", int(ws))
			}
			return calls, nil
		}
		signal := 0
		switch stop := ws.StopSignal(); {
		case stop == unix.SIGTRAP|0x80:
			if nr, args, entry := syscallInfo(tid); entry {
				switch {
				case nr == unix.SYS_GETPRIORITY && args[0] == marker:
					op, thread = int(args[1]), tid
				case tid == thread && op < ends:
					calls[op] = append(calls[op], nr)
				}
			}
		case stop != unix.SIGTRAP && stop != unix.SIGSTOP:
			signal = int(stop)
		}
		if err := unix.PtraceSyscall(tid, signal); err != nil && err != unix.ESRCH {
			return nil, fmt.Errorf("go on: %w", err)
		}
	}
}

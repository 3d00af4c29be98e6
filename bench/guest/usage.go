package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// usage is the CPU time that a server and a guest had used when it was started.
type usage struct{ server, guest time.Duration }

func (u *usage) start(server []int, guest int) (err error) {
	u.server, u.guest, err = usedBy(server, guest)
	return err
}

// since returns what they have used since start.
func (u *usage) since(servers []int, guest int) (server, machine time.Duration, err error) {
	server, machine, err = usedBy(servers, guest)
	return server - u.server, machine - u.guest, err
}

func usedBy(servers []int, guest int) (server, machine time.Duration, err error) {
	for _, pid := range servers {
		t, err := cpuTime(pid)
		if err != nil {
			return 0, 0, err
		}
		server += t
	}
	machine, err = treeTime(guest)
	return server, machine, err
}

// cpuTime is the CPU time of a process, of threads that have ended too, in nanoseconds where /proc has hundredths of a second.
func cpuTime(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED of the kernel's posix-timers.h; the rest of the clock's number is clock_getcpuclockid(3)'s
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|sched), &ts); err != nil {
		return 0, fmt.Errorf("read the CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// treeTime is the CPU time of a process and of all that it has started: User-Mode Linux has one for each of the guest's address spaces.
func treeTime(pid int) (time.Duration, error) {
	total, err := cpuTime(pid)
	if err != nil {
		return 0, err
	}
	ended, err := childrenTime(pid)
	if err != nil {
		return 0, err
	}
	total += ended
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return 0, err
	}
	for _, path := range tasks {
		// A thread or process that has ended meanwhile is among its parent's children that have.
		text, _ := os.ReadFile(path)
		for word := range strings.FieldsSeq(string(text)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				return 0, fmt.Errorf("read %s: %w", path, err)
			}
			if t, err := treeTime(child); err == nil {
				total += t
			}
		}
	}
	return total, nil
}

// childrenTime is the CPU time of a process's children that have ended and been waited for.
func childrenTime(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseChildrenTime(string(text))
}

// parseChildrenTime adds up cutime and cstime of proc(5)'s stat.
func parseChildrenTime(stat string) (time.Duration, error) {
	// The name, in parentheses, may have anything in it.
	end := strings.LastIndexByte(stat, ')')
	fields := strings.Fields(stat[end+1:])
	const cutime, cstime = 16 - 3, 17 - 3 // state, the first after the name, is number 3
	if end < 0 || len(fields) <= cstime {
		return 0, fmt.Errorf("read a process's stat %q: too few fields", stat)
	}
	user, errUser := strconv.ParseInt(fields[cutime], 10, 64)
	system, errSystem := strconv.ParseInt(fields[cstime], 10, 64)
	const tick = time.Second / 100 // USER_HZ
	return time.Duration(user+system) * tick, errors.Join(errUser, errSystem)
}

// Package meter reads what a server's processes have cost, from outside.
package meter

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Sample is what a process and all its descendants have used so far. Memory is what they use now.
type Sample struct {
	CPU          time.Duration // time on a CPU, to the ns
	User, System time.Duration // the same by /proc/PID/stat, in ticks of 10 ms
	Voluntary    uint64        // context switches of threads that wait for something
	Involuntary  uint64        // context switches of threads that another took the CPU from
	RSS          uint64        // bytes in memory
	Private      uint64        // bytes in memory that are in no other process
	Processes    int
	Threads      int
}

// Sub returns what was used between o and s; memory, processes and threads are those of s.
func (s Sample) Sub(o Sample) Sample {
	s.CPU -= o.CPU
	s.User -= o.User
	s.System -= o.System
	s.Voluntary -= o.Voluntary
	s.Involuntary -= o.Involuntary
	return s
}

// Read samples the process pid and all its descendants. What ends meanwhile is left out.
func Read(pid int) (Sample, error) {
	var sum Sample
	pids, err := family(pid)
	if err != nil {
		return sum, fmt.Errorf("measure process %d: %w", pid, err)
	}
	for i, p := range pids {
		s, err := readOne(p)
		if i > 0 && gone(err) {
			continue
		}
		if err != nil {
			return sum, fmt.Errorf("measure process %d: %w", p, err)
		}
		sum.CPU += s.CPU
		sum.User += s.User
		sum.System += s.System
		sum.Voluntary += s.Voluntary
		sum.Involuntary += s.Involuntary
		sum.RSS += s.RSS
		sum.Private += s.Private
		sum.Processes++
		sum.Threads += s.Threads
	}
	return sum, nil
}

// gone says that err is a process's or a thread's having ended.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL)
}

// family returns pid and its descendants.
func family(pid int) ([]int, error) {
	all := []int{pid}
	for i := 0; i < len(all); i++ {
		threads, err := threads(all[i])
		if err != nil {
			if i > 0 && gone(err) {
				continue
			}
			return nil, err
		}
		for _, tid := range threads {
			children, err := os.ReadFile(procPath(all[i], "task", tid, "children"))
			if err != nil {
				continue // the thread has ended; its children are another's by now
			}
			for field := range strings.FieldsSeq(string(children)) {
				child, err := strconv.Atoi(field)
				if err != nil {
					return nil, fmt.Errorf("parse the children of thread %s: %w", tid, err)
				}
				all = append(all, child)
			}
		}
	}
	return all, nil
}

func procPath(pid int, names ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(pid)}, names...)...)
}

// threads returns the ids of pid's threads.
func threads(pid int) ([]string, error) {
	entries, err := os.ReadDir(procPath(pid, "task"))
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(entries))
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids, nil
}

func readOne(pid int) (s Sample, err error) {
	if s.CPU, err = cpuTime(pid); err != nil {
		return s, err
	}
	if s.User, s.System, err = split(pid); err != nil {
		return s, err
	}
	tids, err := threads(pid)
	if err != nil {
		return s, err
	}
	s.Processes, s.Threads = 1, len(tids)
	for _, tid := range tids {
		status, err := os.ReadFile(procPath(pid, "task", tid, "status"))
		if gone(err) {
			continue
		}
		if err != nil {
			return s, err
		}
		s.Voluntary += field(status, "voluntary_ctxt_switches:")
		s.Involuntary += field(status, "nonvoluntary_ctxt_switches:")
	}
	rollup, err := os.ReadFile(procPath(pid, "smaps_rollup"))
	if err != nil {
		return s, err
	}
	s.RSS = 1024 * field(rollup, "Rss:")
	s.Private = 1024 * (field(rollup, "Private_Clean:") + field(rollup, "Private_Dirty:"))
	return s, nil
}

// field returns the number in the line of text that begins with name; 0 if there is none.
func field(text []byte, name string) uint64 {
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(name)); ok {
			words := strings.Fields(string(rest))
			if len(words) == 0 {
				return 0
			}
			n, _ := strconv.ParseUint(words[0], 10, 64)
			return n
		}
	}
	return 0
}

// cpuTime returns a process's time on a CPU, that of threads that have ended included.
func cpuTime(pid int) (time.Duration, error) {
	// The process's CPU-time clock: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of linux/posix-timers.h.
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err == nil {
		return time.Duration(ts.Nano()), nil
	}
	tids, err := threads(pid)
	if err != nil {
		return 0, err
	}
	sum := time.Duration(0)
	for _, tid := range tids {
		stat, err := os.ReadFile(procPath(pid, "task", tid, "schedstat"))
		if gone(err) {
			continue
		}
		if err != nil {
			return 0, err
		}
		ns, err := strconv.ParseUint(strings.Fields(string(stat) + " x")[0], 10, 63)
		if err != nil {
			return 0, fmt.Errorf("parse schedstat of thread %s: %w", tid, err)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}

// tick is USER_HZ of every Linux that Go runs on.
const tick = 10 * time.Millisecond

// split returns a process's time in user space and in the kernel.
func split(pid int) (user, system time.Duration, err error) {
	stat, err := os.ReadFile(procPath(pid, "stat"))
	if err != nil {
		return 0, 0, err
	}
	// The name, in parentheses, may have anything in it.
	words := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const utime, stime = 11, 12 // fields 14 and 15 of proc_pid_stat(5), which count from 1 and have two before the name's end
	if len(words) <= stime {
		return 0, 0, fmt.Errorf("parse %q: expected utime and stime", stat)
	}
	u, err := strconv.ParseUint(words[utime], 10, 63)
	k, kerr := strconv.ParseUint(words[stime], 10, 63)
	return time.Duration(u) * tick, time.Duration(k) * tick, errors.Join(err, kerr)
}

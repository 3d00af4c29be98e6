package meter

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Thread is what a thread does right now.
type Thread struct {
	ID    int
	State byte // R: runs or waits for a CPU; S: waits for something; D: waits for a disk or the like; see proc_pid_stat(5)
	// RunDelay is how long it has waited for a CPU so far.
	RunDelay time.Duration
}

// Threads returns those of the process pid and of all its descendants.
func Threads(pid int) ([]Thread, error) {
	pids, err := family(pid)
	if err != nil {
		return nil, fmt.Errorf("list the threads of process %d: %w", pid, err)
	}
	var all []Thread
	for i, p := range pids {
		tids, err := threads(p)
		if err != nil {
			if i > 0 && gone(err) {
				continue
			}
			return nil, fmt.Errorf("list the threads of process %d: %w", p, err)
		}
		for _, tid := range tids {
			t, err := thread(procPath(p, "task", tid))
			if gone(err) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("look at thread %s: %w", tid, err)
			}
			t.ID, _ = strconv.Atoi(tid)
			all = append(all, t)
		}
	}
	return all, nil
}

func thread(dir string) (t Thread, err error) {
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return t, err
	}
	words := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(words) == 0 {
		return t, fmt.Errorf("parse %q: expected a state", stat)
	}
	t.State = words[0][0]
	sched, err := os.ReadFile(dir + "/schedstat")
	if err != nil {
		return t, err
	}
	t.RunDelay, err = runDelay(string(sched))
	return t, err
}

// runDelay takes the second of the three numbers of schedstat: ns.
func runDelay(sched string) (time.Duration, error) {
	words := strings.Fields(sched)
	if len(words) != 3 {
		return 0, fmt.Errorf("parse %q: expected three numbers", sched)
	}
	ns, err := strconv.ParseUint(words[1], 10, 63)
	return time.Duration(ns), err
}

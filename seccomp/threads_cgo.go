//go:build linux && cgo && (amd64 || arm64)

package seccomp

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// threads are those of this process, with their status files opened before there is a filter that might forbid it.
type threads struct {
	status map[int]int // descriptors, by thread
	own    int         // the calling thread
	before string      // how many filters that has
}

// openThreads opens the status of all threads in tasks, /proc/self/task, which it opens if it is nil. Threads that are
// started later inherit their filters.
func openThreads(tasks *os.File) (_ *threads, err error) {
	dir := -1
	if tasks == nil {
		if dir, err = unix.Open("/proc/self/task", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return nil, fmt.Errorf("open /proc/self/task, to see that all threads are confined: %w", err)
		}
	} else if dir, err = unix.Openat(int(tasks.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("open %s again: %w", tasks.Name(), err)
	}
	list := os.NewFile(uintptr(dir), "/proc/self/task")
	defer list.Close()
	t := &threads{status: map[int]int{}, own: unix.Gettid()}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	names, err := list.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list threads: %w", err)
	}
	for _, name := range names {
		thread, err := strconv.Atoi(name)
		if err != nil {
			return nil, fmt.Errorf("list threads: found %q: expected the directory /proc/self/task", name)
		}
		fd, err := openStatus(dir, thread)
		if err == unix.ENOENT || err == unix.ESRCH {
			continue // it has ended
		}
		if err != nil {
			return nil, fmt.Errorf("open status of thread %d: %w", thread, err)
		}
		t.status[thread] = fd
	}
	if _, ok := t.status[t.own]; !ok {
		return nil, fmt.Errorf("thread %d is not among the %d of %s: expected this process's threads", t.own, len(t.status), list.Name())
	}
	fd, err := openStatus(dir, t.own)
	if err != nil {
		return nil, fmt.Errorf("open status of thread %d: %w", t.own, err)
	}
	defer unix.Close(fd)
	_, t.before, err = readStatus(fd, t.own)
	return t, err
}

func openStatus(tasks, thread int) (int, error) {
	return unix.Openat(tasks, strconv.Itoa(thread)+"/status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
}

// check returns an error unless all threads are confined, by as many filters as this one, and this one by more than before.
func (t *threads) check() error {
	mode, filters, err := readStatus(t.status[t.own], t.own)
	if err != nil {
		return err
	}
	if mode != "2" || filters == t.before && filters != "" {
		return fmt.Errorf("thread %d is in seccomp mode %q with %q filters, and had %q before: expected mode 2 and more filters", t.own, mode, filters, t.before)
	}
	for thread, fd := range t.status {
		if thread == t.own {
			continue
		}
		mode, n, err := readStatus(fd, thread)
		if err == unix.ESRCH {
			continue // it has ended
		}
		if err != nil {
			return err
		}
		if mode != "2" || n != filters {
			return fmt.Errorf("thread %d is in seccomp mode %q with %q filters: expected mode 2 with %q as in thread %d", thread, mode, n, filters, t.own)
		}
	}
	return nil
}

// readStatus returns the mode of a thread, 2 for filters, and their number, "" before Linux 5.9. It makes no other call than
// read(2), which there is no Go without, and so works for each descriptor once.
func readStatus(fd, thread int) (mode, filters string, err error) {
	b := make([]byte, 16384)
	n, err := unix.Read(fd, b)
	if err == unix.ESRCH {
		return "", "", err
	}
	if err != nil {
		return "", "", fmt.Errorf("read status of thread %d: %w", thread, err)
	}
	for line := range strings.Lines(string(b[:n])) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		switch name {
		case "Seccomp":
			mode = value
		case "Seccomp_filters":
			filters = value
		}
	}
	return mode, filters, nil
}

func (t *threads) close() {
	for _, fd := range t.status {
		unix.Close(fd)
	}
}

package sandbox

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// Confine gives up all capabilities but caps, for good: the bounding, ambient and inheritable sets become empty, and
// no_new_privs is set, on every thread, and it is an error if afterwards a single one is otherwise. It returns what of caps
// the process did not have in the first place; whoever started it may have had reasons.
//
// Under Namespace / becomes read-only and /proc goes, except on kernels before 6.13, where reaching extended attributes
// takes /proc/self/fd; nothing else of /proc is ever in the tree.
func (b *Box) Confine(caps CapSet) (missing CapSet, err error) {
	if b.procfd == nil {
		return 0, errors.New("confine before the sandbox was entered")
	}
	if b.root != nil {
		if err := b.sealRoot(); err != nil {
			return 0, err
		}
	}
	// A dump would hold the guest's memory.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return 0, fmt.Errorf("forbid core dumps: %w", err)
	}

	tasks := b.porter.tasks
	b.porter.tasks = nil
	defer tasks.Close()
	var want threadState
	if err := b.porter.do(func() error {
		missing, want, err = dropAll(caps, true)
		return err
	}); err != nil {
		return 0, err
	}
	if err := b.porter.end(); err != nil {
		return 0, err
	}
	b.porter = nil
	return missing, checkThreads(tasks, want)
}

// dropAll leaves every thread with what it has of caps, and returns what it has not, and the state to be found in /proc.
// It must run where /proc lists this process's threads.
func dropAll(caps CapSet, bounding bool) (missing CapSet, want threadState, err error) {
	has, errno := sys.ThreadCaps()
	if errno != 0 {
		return 0, want, fmt.Errorf("read the capabilities: %w", errno)
	}
	keep := caps & CapSet(has.Permitted)
	for number := range lastCap() + 1 {
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(number), 0, 0, 0)
		if err != nil {
			return 0, want, fmt.Errorf("read the bounding set: %w", err)
		}
		if in == 0 {
			continue
		}
		// Without CAP_SETPCAP it stays, and no_new_privs makes it ineffective all the same.
		if !bounding || !CapSet(has.Effective).Has(capOf(unix.CAP_SETPCAP)) {
			want.bounding |= capOf(number)
			continue
		}
		if err := prctlAll(unix.PR_CAPBSET_DROP, uintptr(number)); err != nil {
			return 0, want, fmt.Errorf("drop %s from the bounding set: %w", capOf(number), err)
		}
	}
	// An empty inheritable set empties the ambient one.
	if err := capsetAll(keep); err != nil {
		return 0, want, err
	}
	if err := prctlAll(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return 0, want, fmt.Errorf("set no_new_privs: %w", err)
	}
	want.permitted, want.effective, want.noNewPrivs = keep, keep, true
	return caps &^ keep, want, nil
}

// lastCap is the highest capability that the kernel knows.
func lastCap() int {
	last := unix.CAP_CHOWN
	for {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(last+1), 0, 0, 0); err != nil {
			return last
		}
		last++
	}
}

// A threadState is what /proc says of a thread's privileges.
type threadState struct {
	inheritable, permitted, effective, bounding, ambient CapSet
	noNewPrivs                                           bool
}

func (s threadState) String() string {
	return fmt.Sprintf("permitted %#x, effective %#x, inheritable %#x, bounding %#x, ambient %#x, no_new_privs %t",
		uint64(s.permitted), uint64(s.effective), uint64(s.inheritable), uint64(s.bounding), uint64(s.ambient), s.noNewPrivs)
}

// checkThreads fails if a thread in tasks is not as wanted, or has another root directory than this one.
func checkThreads(tasks *os.File, want threadState) error {
	var root, other unix.Stat_t
	if err := unix.Stat("/", &root); err != nil {
		return fmt.Errorf("inspect /: %w", err)
	}
	states, err := readThreads(tasks)
	if err != nil {
		return err
	}
	if len(states) == 0 {
		return errors.New("check the threads: /proc lists none")
	}
	for tid, state := range states {
		if state != want {
			return fmt.Errorf("thread %s kept privileges: it has %s; expected %s", tid, state, want)
		}
		err := unix.Fstatat(int(tasks.Fd()), tid+"/root", &other, 0)
		if gone(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("inspect the root directory of thread %s: %w", tid, err)
		}
		if other.Dev != root.Dev || other.Ino != root.Ino {
			return fmt.Errorf("thread %s has a root directory of its own: expected all of them to have one", tid)
		}
	}
	return nil
}

// gone says whether err means that the thread has ended.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH)
}

// readThreads returns the state of each thread in tasks, by its id.
func readThreads(tasks *os.File) (map[string]threadState, error) {
	if _, err := tasks.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("list the threads: %w", err)
	}
	tids, err := tasks.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list the threads: %w", err)
	}
	states := make(map[string]threadState, len(tids))
	for _, tid := range tids {
		state, err := readThread(tasks, tid)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the state of thread %s: %w", tid, err)
		}
		states[tid] = state
	}
	return states, nil
}

func readThread(tasks *os.File, tid string) (threadState, error) {
	fd, err := unix.Openat(int(tasks.Fd()), tid+"/status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return threadState{}, err
	}
	f := os.NewFile(uintptr(fd), "status")
	defer f.Close()
	return parseStatus(f)
}

// parseStatus reads /proc/PID/status.
func parseStatus(r io.Reader) (threadState, error) {
	var s threadState
	sets := map[string]*CapSet{
		"CapInh": &s.inheritable, "CapPrm": &s.permitted, "CapEff": &s.effective, "CapBnd": &s.bounding, "CapAmb": &s.ambient,
	}
	found := 0
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimSpace(value)
		if set := sets[key]; set != nil {
			n, err := strconv.ParseUint(value, 16, 64)
			if err != nil {
				return threadState{}, fmt.Errorf("%s: %w", key, err)
			}
			*set = CapSet(n)
			found++
		}
		if key == "NoNewPrivs" {
			s.noNewPrivs = value == "1"
			found++
		}
	}
	if err := lines.Err(); err != nil {
		return threadState{}, err
	}
	if found != len(sets)+1 {
		return threadState{}, fmt.Errorf("%d of %d lines found: expected Linux 4.10 or later", found, len(sets)+1)
	}
	return s, nil
}

package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A porter is a thread that stays outside when the process enters. It has a root directory of its own, and under Namespace
// mounts of its own with a /proc of the new process namespace: changing every thread takes the list in /proc/PID/task,
// by path, and when that is to be done /proc is out of everyone else's reach already.
type porter struct {
	work  chan func() error
	tried chan error
	tid   int
	tasks *os.File // /proc/self/task
}

// newPorter starts a thread that nothing else runs on.
func newPorter() *porter {
	p := &porter{work: make(chan func() error), tried: make(chan error)}
	go p.run()
	return p
}

// startPorter starts a thread that unshares flags, runs setup and then what do is given.
func startPorter(flags int, setup func() error) (*porter, error) {
	p := newPorter()
	err := p.do(func() error {
		if err := unix.Unshare(flags); err != nil {
			return fmt.Errorf("give a thread a root directory of its own: %w", err)
		}
		if err := setup(); err != nil {
			return err
		}
		var err error
		p.tasks, err = openTasks()
		return err
	})
	if err != nil {
		return nil, errors.Join(err, p.end())
	}
	return p, nil
}

// run does the work. Its thread ends with it, for it is never unlocked.
func (p *porter) run() {
	runtime.LockOSThread()
	p.tid = unix.Gettid()
	if p.tid == unix.Getpid() {
		// The first thread cannot end. While this goroutine holds it, another gets another.
		taken := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(taken)
			p.run()
		}()
		<-taken
		runtime.UnlockOSThread()
		return
	}
	for f := range p.work {
		p.tried <- f()
	}
}

// do runs f on the thread.
func (p *porter) do(f func() error) error {
	p.work <- f
	return <-p.tried
}

// porterPatience is how long a thread may take to end.
const porterPatience = 10 * time.Second

// end returns when the thread has ended.
func (p *porter) end() error {
	close(p.work)
	if p.tasks != nil {
		_ = p.tasks.Close()
	}
	for start := time.Now(); time.Since(start) < porterPatience; time.Sleep(20 * time.Microsecond) {
		// There is no event for the end of a thread.
		if err := unix.Tgkill(unix.Getpid(), p.tid, 0); errors.Is(err, unix.ESRCH) {
			return nil
		}
	}
	return fmt.Errorf("the thread outside the sandbox did not end within %s", porterPatience)
}

// Tasks returns a descriptor of /proc/self/task, which is out of reach by path after Enter, to check other properties of all
// threads by. It is to be had between Enter and Confine, and is the caller's to close.
func (b *Box) Tasks() (*os.File, error) {
	if b.porter == nil {
		return nil, errors.New("list the threads: expected the sandbox to be entered, and not to be confined yet")
	}
	fd, err := unix.FcntlInt(b.porter.tasks.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("list the threads: %w", err)
	}
	return os.NewFile(uintptr(fd), "tasks"), nil
}

// openTasks opens the list of this process's threads and makes sure that it is one: psx trusts it blindly.
func openTasks() (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/task", os.Getpid()))
	if err != nil {
		return nil, fmt.Errorf("list the threads: %w: expected /proc to be mounted", err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(f.Fd()), strconv.Itoa(unix.Gettid()), &st, 0); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("/proc does not know this process: %w: expected the /proc of its own process namespace", err)
	}
	return f, nil
}

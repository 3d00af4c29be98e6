package testguest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a child that dies with us, with the output it has left.
type process struct {
	name   string
	cmd    *exec.Cmd
	log    *logBuffer
	exited chan struct{}
	err    error // how it ended; valid when exited is closed
}

// spawner runs functions on one thread that lives as long as the process. PR_SET_PDEATHSIG is about the thread that forked,
// not about its process, and Go ends threads when it likes.
var spawner = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go spawn(work)
	return work
})

func spawn(work <-chan func()) {
	runtime.LockOSThread()
	for f := range work {
		f()
	}
}

// startProcess starts cmd, whose standard error (and output, unless it is set) go to the log. A process group of its own lets kill reach
// the processes that it forks; a program that is to read from the terminal must share ours.
func startProcess(name string, cmd *exec.Cmd, ownGroup bool) (*process, error) {
	return startProcessOn(nil, nil, name, cmd, ownGroup)
}

// startProcessOn is startProcess for a process that may run on some CPUs only, from its first instruction on: programs look at
// their affinity when they start. more, if it is set, gets all that goes to the log.
func startProcessOn(cpus []int, more io.Writer, name string, cmd *exec.Cmd, ownGroup bool) (*process, error) {
	p := &process{name: name, cmd: cmd, log: newLogBuffer(), exited: make(chan struct{})}
	var log io.Writer = p.log
	if more != nil {
		log = io.MultiWriter(p.log, more)
	}
	if cmd.Stdout == nil {
		cmd.Stdout = log
	}
	if cmd.Stderr == nil {
		cmd.Stderr = log
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig, cmd.SysProcAttr.Setpgid = syscall.SIGKILL, ownGroup
	// A grandchild that holds the output open must not keep Wait from returning.
	cmd.WaitDelay = 2 * time.Second
	started := make(chan error)
	spawner() <- func() { started <- onCPUs(cpus, cmd.Start) }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = cmd.Wait()
		p.log.close()
		close(p.exited)
	}()
	return p, nil
}

// onCPUs calls f while the thread, and so what it forks, may run on these CPUs only; none means that nothing changes.
func onCPUs(cpus []int, f func() error) (err error) {
	if len(cpus) == 0 {
		return f()
	}
	var before, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("ask for the CPUs: %w", err)
	}
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("run on CPUs %v: %w", cpus, err)
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &before)) }()
	return f()
}

// kill ends the process and its group and waits until it is gone.
func (p *process) kill() {
	if p.cmd.SysProcAttr.Setpgid {
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	}
	_ = p.cmd.Process.Kill()
	<-p.exited
}

// wait waits for the process to end by itself; nil means with status 0.
func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.exited:
		if p.err != nil && !errors.Is(p.err, exec.ErrWaitDelay) {
			return fmt.Errorf("%s: %w\n%s", p.name, p.err, p.log)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s has not ended: %w\n%s", p.name, context.Cause(ctx), p.log)
	}
}

// logLimit is how many bytes of a process's output are kept: the last ones.
const logLimit = 256 << 10

// logBuffer keeps the end of what is written to it.
type logBuffer struct {
	mu      sync.Mutex
	b       []byte
	closed  bool
	changed chan struct{} // closed, and replaced, at each write
}

func newLogBuffer() *logBuffer { return &logBuffer{changed: make(chan struct{})} }

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, b...)
	if drop := len(l.b) - logLimit; drop > 0 {
		l.b = append(l.b[:0], l.b[drop:]...)
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return len(b), nil
}

// close says that nothing more will be written.
func (l *logBuffer) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	close(l.changed)
	l.changed = make(chan struct{})
}

// await waits until text has been written.
func (l *logBuffer) await(ctx context.Context, text string) error {
	for {
		l.mu.Lock()
		found, closed, changed := bytes.Contains(l.b, []byte(text)), l.closed, l.changed
		l.mu.Unlock()
		switch {
		case found:
			return nil
		case closed:
			return fmt.Errorf("ended without %q", text)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("no %q: %w", text, context.Cause(ctx))
		}
	}
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}

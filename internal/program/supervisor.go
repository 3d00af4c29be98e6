package program

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// grace is how long a program may take to end by itself.
const grace = 5 * time.Second

// calm is how long the end of a program is not told of, for it may have been asked for.
const calm = 100 * time.Millisecond

// A Supervisor keeps a program running.
type Supervisor struct {
	c    Config
	path string
	line *os.File // the server's end
	ours *os.File // the other one
	wake *sys.FD  // an eventfd: there is something new in ask
	done chan struct{}

	mu       sync.Mutex
	ask      request
	pid      int
	started  time.Time
	starts   uint64
	last     string
	finished bool
}

// request is what is wanted of the supervising thread.
type request struct {
	restart bool // end the program, and start it again without waiting
	stop    bool // end it for good
	kill    bool // do not wait for it to end by itself
}

// Start starts the program and returns when it runs, has failed to, or ctx has ended. Afterwards it is kept running until Stop,
// whatever becomes of ctx.
func Start(ctx context.Context, c Config) (*Supervisor, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Name, err)
	}
	c.Name = cmp.Or(c.Name, c.Args[0])
	if c.Env == nil {
		c.Env = DefaultEnv()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.BufferSize = cmp.Or(c.BufferSize, DefaultBufferSize)
	c.Backoff.First = cmp.Or(c.Backoff.First, 100*time.Millisecond)
	c.Backoff.Max = cmp.Or(c.Backoff.Max, 10*time.Second)
	c.Backoff.Reset = cmp.Or(c.Backoff.Reset, 30*time.Second)
	s := &Supervisor{c: c, done: make(chan struct{})}
	var err error
	if s.path, err = path(c.Args[0], c.Env); err != nil {
		return nil, err
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make an eventfd: %w", err)
	}
	s.wake = sys.NewFD(wake)
	if c.OnStart == nil {
		if s.line, s.ours, err = pair("line of "+c.Name, 0); err != nil {
			return nil, errors.Join(err, s.wake.Close())
		}
	}
	first := make(chan error, 1)
	go s.run(first)
	select {
	case err = <-first:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		_ = s.Stop(ctx)
		if s.line != nil {
			_ = s.line.Close()
		}
		return nil, fmt.Errorf("start %s: %w", c.Name, err)
	}
	return s, nil
}

// Line returns the server's end of the line, for NewLine there. It is the caller's to close; there is one only. It is nil
// with Config.OnStart.
func (s *Supervisor) Line() *os.File { return s.line }

// Restart ends the program and starts it again, without waiting.
func (s *Supervisor) Restart() {
	s.tell(func(r *request) { r.restart = true })
}

// Stop ends the program for good: SIGTERM, and SIGKILL when ctx ends or after 5 s, and returns when nothing of it is left. It may
// be called more than once.
func (s *Supervisor) Stop(ctx context.Context) error {
	s.tell(func(r *request) { r.stop = true })
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
	}
	s.tell(func(r *request) { r.kill = true })
	<-s.done // nothing outlives SIGKILL for long, but for what waits for a dead disk
	return nil
}

func (s *Supervisor) tell(f func(*request)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.ask)
	if !s.finished {
		var one [8]byte
		one[0] = 1
		_, _ = unix.Write(s.wake.Int(), one[:]) // full is as good
	}
}

// asked returns what is wanted, and forgets the wish for a restart.
func (s *Supervisor) asked() request {
	var b [8]byte
	_, _ = unix.Read(s.wake.Int(), b[:])
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.ask
	s.ask.restart = false
	return r
}

// Status is how a program is doing.
type Status struct {
	PID      int           // 0 while it does not run
	Uptime   time.Duration // since it was started, 0 while it does not run
	Restarts uint64        // starts after the first
	Last     string        // how it ended the last time, "" if never
}

// Status returns how the program is doing.
func (s *Supervisor) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{PID: s.pid, Restarts: max(s.starts, 1) - 1, Last: s.last}
	if s.pid != 0 {
		st.Uptime = time.Since(s.started)
	}
	return st
}

// run supervises. It keeps its thread: the kernel ends the program when the thread that started it ends (PR_SET_PDEATHSIG).
func (s *Supervisor) run(first chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer func() {
		s.mu.Lock()
		s.finished = true
		_ = s.wake.Close()
		s.mu.Unlock()
		if s.ours != nil {
			_ = s.ours.Close()
		}
		close(s.done)
	}()
	delay := s.c.Backoff.First
	for {
		began := time.Now()
		p, err := s.start()
		if first != nil {
			first <- err
			first = nil
			if err != nil {
				return
			}
		}
		var r request
		if err == nil {
			r = s.watch(p)
			err = s.ended(p.status())
		} else {
			_ = s.ended(err.Error())
		}
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			delay = time.Hour // nobody will ever use it: what is left is Stop
			s.c.Backoff.Max = delay
		}
		if r.stop {
			return
		}
		if r.restart {
			continue
		}
		if time.Since(began) >= s.c.Backoff.Reset {
			delay = s.c.Backoff.First
		}
		// Who serves may have closed the program's socket on purpose: then the order to stop is on its way.
		soon := min(delay, calm)
		if s.pause(soon) {
			return
		}
		if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			s.c.Log.Warn("program ended, and is started again", "program", s.c.Name, "status", s.Status().Last)
		}
		if s.pause(delay - soon) {
			return
		}
		delay = min(2*delay, s.c.Backoff.Max)
	}
}

// start starts the program and tells who is to speak with it.
func (s *Supervisor) start() (*process, error) {
	near, far, err := pair(s.c.Name, s.c.BufferSize)
	if err != nil {
		return nil, err
	}
	p, err := s.spawn(near, far)
	if err != nil {
		return nil, errors.Join(err, near.Close(), far.Close())
	}
	s.mu.Lock()
	s.pid, s.started = p.cmd.Process.Pid, time.Now()
	s.starts++
	s.mu.Unlock()
	if s.c.OnStart != nil {
		s.c.OnStart(near)
		return p, nil
	}
	if s.c.Serves != nil {
		s.serve(p, near)
		return p, nil
	}
	err = s.say([]byte{lineStarted}, near)
	_ = near.Close()
	if err != nil {
		p.kill()
		s.watch(p)
		s.mu.Lock()
		s.pid = 0
		s.mu.Unlock()
		return nil, err
	}
	return p, nil
}

// serve tells the server when p, which has a socket that nobody speaks over, serves, or ends it.
func (s *Supervisor) serve(p *process, near *os.File) {
	ctx, cancel := context.WithCancel(context.Background())
	pid := p.cmd.Process.Pid
	var told sync.WaitGroup
	told.Go(func() {
		f, err := s.c.Serves(ctx, pid)
		if err == nil {
			err = errors.Join(s.say([]byte{lineStarted}, f), f.Close())
		}
		if err != nil && ctx.Err() == nil {
			s.c.Log.Error("started program is of no use", "program", s.c.Name, "error", err)
			_ = unix.Shutdown(int(near.Fd()), unix.SHUT_RDWR)
		}
	})
	p.gone = func() {
		cancel()
		told.Wait()
		_ = near.Close()
	}
}

// say sends a message over the line. It does not wait for a server that does not listen.
func (s *Supervisor) say(b []byte, socket *os.File) error {
	if s.ours == nil {
		return nil
	}
	var oob []byte
	if socket != nil {
		oob = unix.UnixRights(int(socket.Fd()))
	}
	if err := unix.Sendmsg(int(s.ours.Fd()), b, oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("tell the server of the start of %s: %w", s.c.Name, err)
	}
	return nil
}

// ended notes how the program has ended and tells the server. The error is EPIPE where that has closed its end: then the program has
// ended for want of somebody to speak with.
func (s *Supervisor) ended(status string) error {
	s.mu.Lock()
	s.pid, s.last = 0, status
	s.mu.Unlock()
	// A server that has more to read already than it wants to need not know.
	return s.say(append([]byte{lineEnded}, status[:min(len(status), maxStatus)]...), nil)
}

// pause waits, unless the program is to be started again at once. It reports whether it is to be never again.
func (s *Supervisor) pause(delay time.Duration) (stop bool) {
	for end := time.Now().Add(delay); ; {
		left := time.Until(end)
		if left <= 0 {
			return false
		}
		fds := []unix.PollFd{{Fd: int32(s.wake.Int()), Events: unix.POLLIN}}
		_, _ = unix.Poll(fds, milliseconds(left))
		r := s.asked()
		if r.stop || r.restart {
			return r.stop
		}
	}
}

// watch returns when the program has ended and nothing of it is left, with what was wanted of it.
func (s *Supervisor) watch(p *process) request {
	var total request
	var deadline time.Time
	fds := []unix.PollFd{
		{Fd: int32(p.pidfd), Events: unix.POLLIN},
		{Fd: int32(p.far.Fd()), Events: unix.POLLRDHUP},
		{Fd: int32(s.wake.Int()), Events: unix.POLLIN},
	}
	for {
		timeout := -1
		if !deadline.IsZero() {
			timeout = milliseconds(time.Until(deadline))
		}
		if n, err := unix.Poll(fds, timeout); n == 0 && err == nil {
			p.kill()
			deadline = time.Time{}
		}
		if fds[0].Revents != 0 {
			p.reap()
			return total
		}
		if fds[1].Revents != 0 {
			// Who serves has shut the socket: it is broken, or not wanted.
			p.kill()
			fds[1].Fd = -1
		}
		r := s.asked()
		if r.kill {
			p.kill()
		} else if (r.stop || r.restart) && !total.stop && !total.restart {
			// The first process of a namespace does not get a signal that it does not handle; all see the end of their socket.
			_ = p.cmd.Process.Signal(unix.SIGTERM)
			_ = unix.Shutdown(int(p.far.Fd()), unix.SHUT_RDWR)
			fds[1].Fd = -1
			deadline = time.Now().Add(grace)
		}
		total.stop = total.stop || r.stop
		total.restart = total.restart || r.restart
	}
}

// milliseconds is d for poll(2), rounded up and at least 0.
func milliseconds(d time.Duration) int {
	return int(max(0, (d+time.Millisecond-1)/time.Millisecond))
}

package program

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/ratelog"
)

// process is one run of a program.
type process struct {
	cmd    *exec.Cmd
	pidfd  int
	far    *os.File // the program's end of its socket: by it is seen that the other end was shut
	output *output
	gone   func() // unless nil, called when it has ended
}

// pair makes a pair of connected sockets whose messages may have up to size bytes, as far as is allowed; 0 leaves that as it is.
func pair(name string, size int) (near, far *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a pair of sockets for %s: %w", name, err)
	}
	for _, fd := range fds {
		if size == 0 {
			continue
		}
		// The kernel doubles it, for its own bookkeeping (socket(7)).
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size/2) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, size/2)
		}
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}

// spawn starts the program with far as its socket, and takes far over unless it fails.
func (s *Supervisor) spawn(near, far *os.File) (*process, error) {
	c := &s.c
	ours, theirs, err := pair(c.Name, 0)
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	r, w, err := os.Pipe()
	if err != nil {
		_ = theirs.Close()
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	p := &process{far: far}
	files := append(append([]*os.File{far}, c.Files...), theirs)
	p.cmd = &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{c.Args[0]},
		Env:    []string{fmt.Sprintf("%s=%d", marker, FD+len(files)-1)},
		Stdout: w, Stderr: w, ExtraFiles: files, SysProcAttr: c.attr(&p.pidfd),
	}
	err = s.handOver(ours)
	if err == nil {
		err = p.cmd.Start()
	}
	_, _ = w.Close(), theirs.Close()
	if err != nil {
		_ = r.Close()
		return nil, startError(err)
	}
	if p.pidfd < 0 {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
		_ = r.Close()
		return nil, errors.New("the kernel has no pidfd: expected Linux 5.4 or later")
	}
	p.output = readOutput(r, ratelog.New(c.Log, 100*time.Millisecond, 50), c.Name)
	if err := s.confined(p, ours); err != nil {
		p.kill()
		p.far = nil // the caller's
		p.reap()
		return nil, err
	}
	return p, nil
}

// handOver sends the child what it is to become.
func (s *Supervisor) handOver(ours *os.File) error {
	b, err := json.Marshal(s.c.plan(s.path))
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(int(ours.Fd()), b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("hand arguments over: %w: expected them to fit into a message", err)
	}
	return nil
}

// setupPatience is how long it may take until the child has become the program.
const setupPatience = 30 * time.Second

// confined returns when the child has become the program, which closes the other end of ours, or says why it cannot.
func (s *Supervisor) confined(p *process, ours *os.File) error {
	fds := []unix.PollFd{
		{Fd: int32(ours.Fd()), Events: unix.POLLIN},
		{Fd: int32(s.wake.Int()), Events: unix.POLLIN},
	}
	for end := time.Now().Add(setupPatience); ; {
		n, err := unix.Poll(fds, milliseconds(time.Until(end)))
		switch {
		case err == nil && n == 0:
			return fmt.Errorf("it was not confined within %s", setupPatience)
		case fds[1].Revents != 0:
			s.mu.Lock()
			stop := s.ask.stop
			s.mu.Unlock()
			if stop {
				return errors.New("it was stopped")
			}
			fds[1].Fd = -1 // a wish for a restart can wait until it runs
		}
		if fds[0].Revents == 0 {
			continue
		}
		text := make([]byte, 4096)
		n, _, err = unix.Recvfrom(int(ours.Fd()), text, unix.MSG_DONTWAIT)
		if err != nil {
			return fmt.Errorf("wait until it is confined: %w", err)
		}
		if n > 0 {
			return errors.New(string(text[:n]))
		}
		return nil
	}
}

// startError says what to do about a child that could not be started.
func startError(err error) error {
	hint := ""
	switch root := os.Geteuid() == 0; {
	case root && errors.Is(err, unix.EPERM):
		hint = ": expected the capability sys_admin for namespaces of its own; without it, as in a container, the program can only run unconfined"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		hint = ": expected user namespaces to be allowed for ordinary users (sysctl kernel.unprivileged_userns_clone, " +
			"kernel.apparmor_restrict_unprivileged_userns)"
	case errors.Is(err, unix.ENOSPC):
		hint = ": expected room for more namespaces (sysctl user.max_user_namespaces and the others of user.)"
	}
	return fmt.Errorf("start in namespaces: %w%s", err, hint)
}

// kill ends it and what it has started.
func (p *process) kill() {
	// Its process id is its group's; until it is reaped the number is nobody else's. In a process namespace of its own all go with it.
	_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	_ = p.cmd.Process.Kill()
}

// reap takes away what is left of a program that has ended.
func (p *process) reap() {
	_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	_ = p.cmd.Wait()
	_ = unix.Close(p.pidfd)
	if p.far != nil {
		// Whoever else has it must not keep the server from seeing the end.
		_ = unix.Shutdown(int(p.far.Fd()), unix.SHUT_RDWR)
		_ = p.far.Close()
	}
	p.output.end()
	if p.gone != nil {
		p.gone()
	}
}

// status says how it ended, with its last words.
func (p *process) status() string {
	text := p.cmd.ProcessState.String()
	if last := p.output.last(); last != "" {
		text += ": " + last
	}
	return strings.ToValidUTF8(text[:min(len(text), maxStatus)], "�")
}

// output reads what a program writes.
type output struct {
	r    *os.File
	done chan struct{}
	mu   sync.Mutex
	line string
}

func readOutput(r *os.File, log *ratelog.Logger, name string) *output {
	o := &output{r: r, done: make(chan struct{})}
	go func() {
		defer close(o.done)
		defer r.Close()
		in := bufio.NewReaderSize(r, 1024) // longer lines come in pieces
		for {
			line, _, err := in.ReadLine()
			if text := strings.TrimSpace(string(line)); text != "" {
				o.mu.Lock()
				o.line = text
				o.mu.Unlock()
				log.Warn("program says", "program", name, "text", text)
			}
			if err != nil {
				return
			}
		}
	}()
	return o
}

// last returns the last line.
func (o *output) last() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.line
}

// end returns when what was written before the end has been read. Others may still have the pipe, which nobody waits for.
func (o *output) end() {
	_ = o.r.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	<-o.done
}

// attr is how the child is started.
func (c *Config) attr(pidfd *int) *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, PidFD: pidfd}
	if c.Confine.None {
		return a
	}
	a.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	if !c.Confine.Network {
		a.Cloneflags |= unix.CLONE_NEWNET
	}
	if uid, gid := os.Geteuid(), os.Getegid(); uid != 0 {
		a.Cloneflags |= unix.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}}
		// A user other than 0 loses all capabilities when a program is executed, unless they are ambient.
		for n := range lastCap() + 1 {
			a.AmbientCaps = append(a.AmbientCaps, uintptr(n))
		}
	}
	return a
}

package program

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Messages on a line: the kind, and then for lineEnded the program's status in words.
const (
	lineStarted = 's' // with the socket as its one descriptor
	lineEnded   = 'e'

	maxStatus = 512 // bytes
)

// A Line tells the server when the program that it speaks with has been started, again and again.
type Line struct {
	f *os.File

	next sync.Mutex // held in Next
	mu   sync.Mutex
	s    State
	news chan struct{} // closed when s changes
}

// State is what a line has said so far.
type State struct {
	Running bool   // the program was started, and had not ended
	Starts  uint64 // how often it was started
	Status  string // how it ended the last time, "" if never
}

// ErrLineClosed is Next's error when the supervisor has gone, or Close was called.
var ErrLineClosed = errors.New("the program's supervisor has gone")

// NewLine takes over f, which Supervisor.Line has returned.
func NewLine(f *os.File) *Line {
	_ = unix.SetNonblock(int(f.Fd()), true)
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err == nil {
		// Fd has made f a file without deadlines; as a new one it has them.
		_ = unix.SetNonblock(fd, true)
		_ = f.Close()
		f = os.NewFile(uintptr(fd), "program line")
	}
	return &Line{f: f, news: make(chan struct{})}
}

// Next blocks until the program is started the next time, and returns this end of its socket, which is the caller's to close. To
// shut the socket (shutdown(2), or close) is to say that the program is of no use any more: it is killed and started again.
// Starts that are over already are passed over.
func (l *Line) Next(ctx context.Context) (*os.File, error) {
	l.next.Lock()
	defer l.next.Unlock()
	_ = l.f.SetReadDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { _ = l.f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var current *os.File
	for {
		kind, status, socket, err := l.receive(current != nil)
		switch {
		case err == nil:
		case current != nil && errors.Is(err, unix.EAGAIN):
			return current, nil
		default:
			if current != nil {
				_ = current.Close()
			}
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, err
		}
		if current != nil {
			_ = current.Close()
			current = nil
		}
		l.mu.Lock()
		if kind == lineStarted {
			l.s.Running = true
			l.s.Starts++
			current = socket
		} else {
			l.s.Running = false
			l.s.Status = status
		}
		close(l.news)
		l.news = make(chan struct{})
		l.mu.Unlock()
	}
}

// receive takes a message off the line. With poll it does not wait, and returns EAGAIN.
func (l *Line) receive(poll bool) (kind byte, status string, socket *os.File, err error) {
	conn, err := l.f.SyscallConn()
	if err != nil {
		return 0, "", nil, ErrLineClosed
	}
	buf := make([]byte, 1+maxStatus)
	oob := make([]byte, unix.CmsgSpace(4))
	var n, oobn int
	var errno error
	err = conn.Read(func(fd uintptr) bool {
		for {
			n, oobn, _, _, errno = unix.Recvmsg(int(fd), buf, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			if errno != unix.EINTR {
				break
			}
		}
		return poll || errno != unix.EAGAIN
	})
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, "", nil, ErrLineClosed // by Close; package poll has an error of its own for it
	}
	if err == nil {
		err = errno
	}
	if err != nil {
		return 0, "", nil, err
	}
	if n == 0 {
		return 0, "", nil, ErrLineClosed
	}
	fd, err := oneFD(oob[:oobn])
	if err != nil {
		return 0, "", nil, err
	}
	switch {
	case buf[0] == lineStarted && fd >= 0:
		return buf[0], "", os.NewFile(uintptr(fd), "program"), nil
	case buf[0] == lineEnded && fd < 0:
		return buf[0], string(buf[1:n]), nil, nil
	}
	if fd >= 0 {
		_ = unix.Close(fd)
	}
	return 0, "", nil, fmt.Errorf("message %q on the line: expected a start with a socket, or an end", buf[0])
}

// oneFD returns the descriptor in a control message, or -1 if there is none.
func oneFD(oob []byte) (int, error) {
	if len(oob) == 0 {
		return -1, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1, fmt.Errorf("parse control message: %w", err)
	}
	fd := -1
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, got := range fds {
			if fd >= 0 {
				_ = unix.Close(fd)
			}
			fd = got
		}
	}
	return fd, nil
}

// State returns what the line has said up to the last Next, or to a Next that waits.
func (l *Line) State() State {
	s, _ := l.Watch()
	return s
}

// Watch returns the state, and a channel that is closed when it changes.
func (l *Line) Watch() (State, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.s, l.news
}

// Close ends the line and a Next that waits.
func (l *Line) Close() error { return l.f.Close() }

// SendLimit returns the size of the largest message that may be sent over a socket of a program, in bytes.
func SendLimit(conn syscall.Conn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var errno error
	err = raw.Control(func(fd uintptr) { n, errno = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF) })
	if err = errors.Join(err, errno); err != nil {
		return 0, fmt.Errorf("ask for the size of a socket's buffer: %w", err)
	}
	return n - 32, nil // net/unix/af_unix.c, unix_dgram_sendmsg
}

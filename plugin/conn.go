package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is one end of the socket between the server and a plug-in. One goroutine may receive while others send.
type Conn struct {
	f   *os.File
	raw syscall.RawConn
}

// NewConn takes f over, which is a SOCK_SEQPACKET socket.
func NewConn(f *os.File) (*Conn, error) {
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	// A file made of a descriptor that blocks has no deadlines, and Close would wait for who reads.
	fd := -1
	var errno error
	err = raw.Control(func(own uintptr) {
		if fd, errno = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3); errno == nil {
			errno = unix.SetNonblock(fd, true)
		}
	})
	if err = errors.Join(err, errno); err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return nil, fmt.Errorf("use socket: %w", err)
	}
	c := &Conn{f: os.NewFile(uintptr(fd), "layer plug-in")}
	c.raw, err = c.f.SyscallConn()
	return c, err
}

// Pair returns the two ends of a new socket.
func Pair() (server, plugin *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "layer plug-in"), os.NewFile(uintptr(fds[1]), "sluice"), nil
}

// Close ends the connection; who sends or receives gets an error.
func (c *Conn) Close() error { return c.f.Close() }

// Send sends a message and, unless fd is negative, a descriptor with it, which stays the caller's.
func (c *Conn) Send(b []byte, fd int) error {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	var errno error
	err := c.raw.Write(func(s uintptr) bool {
		errno = unix.Sendmsg(int(s), b, oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		return errno != unix.EAGAIN
	})
	if err = ended(err, errno); err != nil {
		return fmt.Errorf("send %d bytes: %w", len(b), err)
	}
	return nil
}

// Receive receives a message into b and the descriptor that came with it, -1 if none has, which is the caller's to close. A
// message that b has no room for, or with more than one descriptor, is an error. io.EOF is the other side's end.
func (c *Conn) Receive(b []byte) (n, fd int, err error) {
	// Room for two is the least that alignment allows.
	var oob [32]byte
	var oobn, flags int
	var errno error
	err = c.raw.Read(func(s uintptr) bool {
		for {
			n, oobn, flags, _, errno = unix.Recvmsg(int(s), b, oob[:], unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			if errno != unix.EINTR {
				return errno != unix.EAGAIN
			}
		}
	})
	if err = ended(err, errno); err != nil {
		return 0, -1, err
	}
	fds := rights(oob[:oobn])
	switch {
	case len(fds) > 1 || flags&unix.MSG_CTRUNC != 0:
		err = errors.New("more than one descriptor came with a message")
	case flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("a message has more than %d bytes", len(b))
	case n == 0:
		err = io.EOF
	case len(fds) == 1:
		return n, fds[0], nil
	default:
		return n, -1, nil
	}
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
	return 0, -1, err
}

// ended is how a call ended that may have waited for the socket, which package os says of in its own words.
func ended(waiting, errno error) error {
	switch {
	case waiting == nil:
		return errno
	case errors.Is(waiting, os.ErrDeadlineExceeded):
		return waiting
	}
	return os.ErrClosed
}

// rights returns the descriptors in control messages.
func rights(oob []byte) []int {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var all []int
	for i := range messages {
		if fds, err := unix.ParseUnixRights(&messages[i]); err == nil {
			all = append(all, fds...)
		}
	}
	return all
}

// Greet exchanges hellos, as long as ctx lasts.
func (c *Conn) Greet(ctx context.Context, mine *Hello) (*Hello, error) {
	b, err := mine.encode()
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.f.SetDeadline(time.Unix(1, 0)) })
	theirs, err := c.greet(b)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("no hello in time, expected one on descriptor 3 as soon as it starts: %w", ctx.Err())
	}
	return theirs, err
}

func (c *Conn) greet(mine []byte) (*Hello, error) {
	if err := c.Send(mine, -1); err != nil {
		return nil, err
	}
	b := make([]byte, maxHello+1)
	n, fd, err := c.Receive(b)
	if fd >= 0 {
		_ = unix.Close(fd)
		err = errors.New("a descriptor came with it")
	}
	if err != nil {
		return nil, fmt.Errorf("receive hello: %w", err)
	}
	return ParseHello(b[:n])
}

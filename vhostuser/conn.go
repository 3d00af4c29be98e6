package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// maxFDs is SCM_MAX_FD (include/net/scm.h): the kernel lets no message carry more, so room for it means none can be cut off.
const maxFDs = 253

// message is one request as received. payload lies in the conn's buffer until the next recv.
type message struct {
	Header
	payload []byte
	fds     []int // not owned by an FD yet; see takeFD and closeFDs
}

// takeFD gives the message's descriptor, nil if it has none, to the caller. The fd rules let at most one through where it is used.
func (m *message) takeFD() *sys.FD {
	if len(m.fds) == 0 {
		return nil
	}
	fd := sys.NewFD(m.fds[0])
	m.fds = m.fds[1:]
	return fd
}

// closeFDs closes the descriptors that nobody took.
func (m *message) closeFDs() {
	sys.CloseAll(m.fds)
	m.fds = nil
}

// conn frames messages on the front-end's socket. Its buffers are of fixed size, whatever the peer says.
type conn struct {
	sock *net.UnixConn
	in   [MaxPayload]byte
	head [headerSize]byte
	oob  []byte
	out  []byte
}

func newConn(sock *net.UnixConn) *conn {
	return &conn{sock: sock, oob: make([]byte, unix.CmsgSpace(maxFDs*4))}
}

// recv reads the next message. Its error is io.EOF if the front-end disconnected between messages, a *ProtocolError, or the
// socket's. No descriptor stays open with an error.
func (c *conn) recv() (message, error) {
	var m message
	err := c.recvInto(&m)
	if err != nil {
		m.closeFDs()
	}
	return m, err
}

func (c *conn) recvInto(m *message) error {
	n, err := c.read(m, c.head[:])
	if n == 0 && errors.Is(err, io.EOF) {
		return io.EOF
	}
	if err != nil {
		return c.describe(err, 0, n, headerSize, "header")
	}
	m.Header = Decode[Header](c.head[:])
	switch {
	case m.Flags&VersionMask != Version:
		err = fmt.Errorf("its flags %#x have version %d, expected %d", m.Flags, m.Flags&VersionMask, Version)
	case m.Flags&^(VersionMask|FlagNeedReply) != 0:
		err = fmt.Errorf("its flags %#x have bits other than version and NEED_REPLY", m.Flags)
	case m.Size > MaxPayload:
		err = fmt.Errorf("its payload of %d bytes is over the limit of %d", m.Size, MaxPayload)
	}
	if err != nil {
		return &ProtocolError{m.Request, err}
	}
	m.payload = c.in[:m.Size]
	if n, err := c.read(nil, m.payload); err != nil {
		return c.describe(err, m.Request, n, len(m.payload), "payload")
	}
	return nil
}

// errStrayFDs is for descriptors that did not come with a message's first byte.
var errStrayFDs = errors.New("file descriptors came in the middle of a message, expected them on its first byte")

// read fills b and returns how much of it was. Descriptors go to m, if they come with the first byte and m is not nil.
func (c *conn) read(m *message, b []byte) (got int, err error) {
	for got < len(b) {
		n, oobn, flags, _, err := c.sock.ReadMsgUnix(b[got:], c.oob)
		fds, parseErr := rights(c.oob[:max(oobn, 0)])
		if len(fds) > 0 && (m == nil || got > 0) {
			sys.CloseAll(fds)
			return got, &ProtocolError{Err: errStrayFDs}
		}
		if len(fds) > 0 {
			m.fds = fds
		}
		switch {
		case err != nil:
			return got, err
		case parseErr != nil:
			return got, fmt.Errorf("parse control message: %w", parseErr)
		case flags&unix.MSG_CTRUNC != 0:
			return got, &ProtocolError{Err: fmt.Errorf("file descriptors were lost; this process may have reached its limit (RLIMIT_NOFILE)")}
		}
		got += n
	}
	return got, nil
}

// describe makes a *ProtocolError of an end of stream inside a message.
func (c *conn) describe(err error, req Request, got, want int, part string) error {
	var proto *ProtocolError
	switch {
	case errors.As(err, &proto):
		return &ProtocolError{req, proto.Err}
	case errors.Is(err, io.EOF):
		return &ProtocolError{req, fmt.Errorf("connection ended after %d of the %d bytes of its %s: %w", got, want, part, io.ErrUnexpectedEOF)}
	}
	return fmt.Errorf("receive vhost-user message: %w", err)
}

// rights returns the descriptors in a control message (close-on-exec already: package net asks for MSG_CMSG_CLOEXEC).
func rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds []int
	for i := range cmsgs {
		// Other kinds carry no descriptors.
		if got, err := unix.ParseUnixRights(&cmsgs[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds, nil
}

// reply answers req with payload. A peer that is gone is an error, not a SIGPIPE: the Go runtime swallows that for sockets.
func (c *conn) reply(req Request, payload []byte) error {
	c.out = Append(c.out[:0], Header{Request: req, Flags: ReplyFlags, Size: uint32(len(payload))})
	c.out = append(c.out, payload...)
	if _, err := c.sock.Write(c.out); err != nil {
		return fmt.Errorf("reply to vhost-user %v: %w", req, err)
	}
	return nil
}

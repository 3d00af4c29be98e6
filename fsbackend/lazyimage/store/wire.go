package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A message is one packet: a header and a body, little-endian. The server asks, the fetcher answers, in any order, with the
// request's id and operation; opNote and opCancel have no answer. An answer to opLayers or opChunk that is statusOK comes with one
// descriptor, no other message with any.
const (
	wireVersion = 1
	headerSize  = 1 + 1 + 2 + 4 + 8 + 4 + 4 // version, operation, status, layer, id, index, 0
	maxBody     = MaxPath
	maxMessage  = headerSize + maxBody
	maxText     = 1024 // of an error, in bytes
)

// Operations.
const (
	opLayers     = iota + 1 // answer: a sealed memfd with what EncodeMeta has made
	opChunk                 // layer, index; answer: a descriptor
	opStatus                // layer; answer: statusSize bytes and Status.Err
	opPrefetched            // answer: nothing
	opReach                 // answer: nothing
	opNote                  // layer; body: the path
	opCancel                // id: of the request whose answer nobody waits for any more
	opEnd
)

const statusSize = 4 * 8

// Statuses of answers.
const (
	statusOK          = iota
	statusUnavailable // ErrUnavailable
	statusCorrupt     // ErrCorrupt
	statusFailed      // body: why
	statusEnd
)

type header struct {
	op     uint8
	status uint16
	layer  uint32
	id     uint64
	index  uint32
}

func (h *header) append(b []byte) []byte {
	b = append(b, wireVersion, h.op)
	b = le.AppendUint16(b, h.status)
	b = le.AppendUint32(b, h.layer)
	b = le.AppendUint64(b, h.id)
	b = le.AppendUint32(b, h.index)
	return le.AppendUint32(b, 0)
}

// parse returns the body behind the header.
func (h *header) parse(b []byte) ([]byte, error) {
	if len(b) < headerSize {
		return nil, fmt.Errorf("a message of %d bytes: expected at least %d", len(b), headerSize)
	}
	if b[0] != wireVersion {
		return nil, fmt.Errorf("a message of version %d: expected %d (both programs must be of one release)", b[0], wireVersion)
	}
	*h = header{op: b[1], status: le.Uint16(b[2:]), layer: le.Uint32(b[4:]), id: le.Uint64(b[8:]), index: le.Uint32(b[16:])}
	if h.op == 0 || h.op >= opEnd || h.status >= statusEnd || le.Uint32(b[20:]) != 0 {
		return nil, fmt.Errorf("a message with operation %d, status %d", h.op, h.status)
	}
	return b[headerSize:], nil
}

// sendTimeout is how long the other side may not read.
const sendTimeout = 30 * time.Second

// conn is one end of a SOCK_SEQPACKET pair.
type conn struct {
	file *os.File
	raw  syscall.RawConn
	mu   sync.Mutex    // held while a message is sent, so that each has its own time limit
	gone chan struct{} // closed by close
	once sync.Once
}

// newConn takes f over. It works on a duplicate, whose reads and writes can be ended by close, whatever f was opened with.
func newConn(f *os.File) (*conn, error) {
	defer f.Close()
	given, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, dupErr := -1, error(nil)
	if err := given.Control(func(raw uintptr) { fd, dupErr = unix.FcntlInt(raw, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, fmt.Errorf("duplicate a socket: %w", dupErr)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("use a socket: %w", err)
	}
	c := &conn{file: os.NewFile(uintptr(fd), "session"), gone: make(chan struct{})}
	if c.raw, err = c.file.SyscallConn(); err != nil {
		_ = c.file.Close()
		return nil, err
	}
	return c, nil
}

func (c *conn) close() {
	c.once.Do(func() {
		close(c.gone)
		_ = c.file.Close()
	})
}

func (c *conn) isClosed() bool {
	select {
	case <-c.gone:
		return true
	default:
		return false
	}
}

// send sends a message, with a copy of fd unless that is negative.
func (c *conn) send(message []byte, fd int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.file.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	return c.sendAs(message, fd, true)
}

// sendNow is send that does not wait: EAGAIN says that the other side does not read.
func (c *conn) sendNow(message []byte, fd int) error { return c.sendAs(message, fd, false) }

func (c *conn) sendAs(message []byte, fd int, wait bool) error {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	var sent error
	err := c.raw.Write(func(raw uintptr) bool {
		for {
			_, sent = unix.SendmsgN(int(raw), message, oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			if sent != unix.EINTR {
				return !wait || sent != unix.EAGAIN
			}
		}
	})
	if err != nil {
		return err
	}
	return sent
}

// receive returns the next message, in b, and the descriptor that came with it. Where files is not set, none is taken. lost says
// that the process had no room for one that came. io.EOF says that the other side is gone.
func (c *conn) receive(b []byte, files bool) (message []byte, file *os.File, lost bool, err error) {
	return c.receiveAs(b, files, true)
}

// receiveNow is receive that does not wait: EAGAIN says that there is none.
func (c *conn) receiveNow(b []byte, files bool) (message []byte, file *os.File, lost bool, err error) {
	return c.receiveAs(b, files, false)
}

func (c *conn) receiveAs(b []byte, files, wait bool) (message []byte, file *os.File, lost bool, err error) {
	var oob []byte
	if files {
		oob = make([]byte, unix.CmsgSpace(4))
	}
	var n, oobn, flags int
	var failed error
	err = c.raw.Read(func(raw uintptr) bool {
		for {
			n, oobn, flags, _, failed = unix.Recvmsg(int(raw), b, oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
			if failed != unix.EINTR {
				return !wait || failed != unix.EAGAIN
			}
		}
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		if c.isClosed() || err == unix.ECONNRESET {
			err = io.EOF
		}
		return nil, nil, false, err
	}
	fds := parseRights(oob[:oobn])
	if len(fds) == 1 {
		file = os.NewFile(uintptr(fds[0]), "chunk")
	}
	switch {
	case len(fds) > 1: // the padding of a control message leaves room for a second one
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		err = errors.New("a message with more than one descriptor")
	case n == 0: // an empty message looks the same; nobody sends one
		err = io.EOF
	case flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("a message longer than %d bytes", len(b))
	}
	if err != nil {
		if file != nil {
			_ = file.Close()
		}
		return nil, nil, false, err
	}
	return b[:n], file, files && flags&unix.MSG_CTRUNC != 0, nil
}

// parseRights returns the descriptors of what the kernel has written.
func parseRights(oob []byte) []int {
	if len(oob) == 0 {
		return nil
	}
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

// plain makes one short line of what somebody else may have had a say in.
func plain(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// Line is where a client gets its sessions from: one, and another one each time the fetcher has been started anew.
type Line interface {
	// Next waits until there is a session that it has not returned yet, and returns the server's end of it, a SOCK_SEQPACKET socket, which
	// is the caller's to close. An error that is not ctx's says that there will never be one again.
	Next(ctx context.Context) (*os.File, error)
}

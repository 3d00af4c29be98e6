package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
	"github.com/sluicefs/sluice/vhostuser"
)

// tagger stands between User-Mode Linux and a server that has no configuration space, such as the one in C, which leaves that to QEMU:
// it answers for it what the share's tag is, and hands all else on. Requests do not pass through it: they lie in memory that the server
// maps, and their notifications are file descriptors.
type tagger struct {
	listener *net.UnixListener
	server   string // socket
	space    []byte // virtio_fs_config
	done     sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  []*net.UnixConn
}

// startTagger listens at socket for a front-end of the server.
func startTagger(socket, server, tag string) (*tagger, error) {
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("stand before a server without a tag: %w", err)
	}
	// virtio 1.3, 5.11.4: the tag in 36 bytes, the number of request queues, of which the server in C has one
	space := binary.LittleEndian.AppendUint32(append([]byte(tag), make([]byte, 36-len(tag))...), 1)
	t := &tagger{listener: listener, server: server, space: space}
	t.done.Go(t.accept)
	return t, nil
}

// accept waits for the one front-end.
func (t *tagger) accept() {
	front, err := t.listener.AcceptUnix()
	if err != nil {
		return
	}
	defer front.Close()
	back, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: t.server, Net: "unix"})
	if err != nil {
		return
	}
	defer back.Close()
	t.mu.Lock()
	closed := t.closed
	t.conns = append(t.conns, front, back)
	t.mu.Unlock()
	if closed {
		return
	}
	// The end of one side is the other's.
	t.done.Go(func() {
		defer front.Close()
		defer back.Close()
		_ = relay(back, front, func(m *message) bool {
			if m.header.Request == vhostuser.VHOST_USER_GET_PROTOCOL_FEATURES {
				m.changeFeatures(func(f uint64) uint64 { return f | vhostuser.VHOST_USER_PROTOCOL_F_CONFIG })
			}
			return true
		})
	})
	_ = relay(front, back, func(m *message) bool {
		switch m.header.Request {
		case vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES:
			m.changeFeatures(func(f uint64) uint64 { return f &^ vhostuser.VHOST_USER_PROTOCOL_F_CONFIG })
		case vhostuser.VHOST_USER_GET_CONFIG:
			m.readSpace(t.space)
			_ = m.write(front)
			return false
		}
		return true
	})
}

// Close ends it.
func (t *tagger) Close() error {
	err := t.listener.Close()
	t.mu.Lock()
	t.closed = true
	for _, c := range t.conns {
		_ = c.Close() // its relay may have been faster
	}
	t.mu.Unlock()
	t.done.Wait()
	return err
}

// device is what a guest needs to know of an entrant.
func (m *machine) device(e *entrant, needsTag bool) (testguest.Device, error) {
	d := e.Device()
	if !needsTag {
		return d, nil
	}
	socket := filepath.Join(m.scratch, d.Tag+".sock")
	t, err := startTagger(socket, d.Socket, d.Tag)
	if err != nil {
		return d, err
	}
	m.close = append(m.close, t.Close)
	d.Socket = socket
	return d, nil
}

// message is a vhost-user message.
type message struct {
	header  vhostuser.Header
	payload []byte
	fds     []int // its own
}

// relay hands messages on until one side has ended; see may change them, and says whether they are to be handed on.
func relay(from, to *net.UnixConn, see func(*message) bool) error {
	for {
		m, err := readMessage(from)
		if err != nil {
			return err
		}
		if see(m) {
			err = m.write(to)
		}
		for _, fd := range m.fds {
			err = errors.Join(err, unix.Close(fd))
		}
		if err != nil {
			return err
		}
	}
}

// headerSize is the size of a vhostuser.Header.
const headerSize = 12

func readMessage(c *net.UnixConn) (*message, error) {
	m := &message{}
	head, oob := make([]byte, headerSize), make([]byte, unix.CmsgSpace(4*32))
	n, oobn, _, _, err := c.ReadMsgUnix(head, oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	control, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, fmt.Errorf("read a message: %w", err)
	}
	for i := range control {
		fds, err := unix.ParseUnixRights(&control[i])
		if err != nil {
			return nil, fmt.Errorf("read a message: %w", err)
		}
		m.fds = append(m.fds, fds...)
	}
	_, err = io.ReadFull(c, head[n:])
	if err == nil {
		m.header = vhostuser.Decode[vhostuser.Header](head)
		if m.header.Size > vhostuser.MaxPayload {
			err = fmt.Errorf("read a message: %d bytes, expected at most %d", m.header.Size, vhostuser.MaxPayload)
		}
	}
	if err == nil {
		m.payload = make([]byte, m.header.Size)
		_, err = io.ReadFull(c, m.payload)
	}
	if err != nil {
		for _, fd := range m.fds {
			_ = unix.Close(fd)
		}
		return nil, err
	}
	return m, nil
}

func (m *message) write(c *net.UnixConn) error {
	m.header.Size = uint32(len(m.payload))
	var rights []byte
	if len(m.fds) > 0 {
		rights = unix.UnixRights(m.fds...)
	}
	b := append(vhostuser.Append(nil, m.header), m.payload...)
	n, _, err := c.WriteMsgUnix(b, rights, nil)
	if err == nil && n < len(b) {
		err = os.ErrClosed
	}
	return err
}

// changeFeatures changes a payload that is a set of features.
func (m *message) changeFeatures(change func(uint64) uint64) {
	if len(m.payload) == 8 {
		m.payload = vhostuser.Append(nil, change(vhostuser.Decode[uint64](m.payload)))
	}
}

// readSpace makes a GET_CONFIG its answer; what is outside the space is zero.
func (m *message) readSpace(space []byte) {
	m.header.Flags = vhostuser.ReplyFlags
	const windowSize = 12
	if len(m.payload) < windowSize {
		m.payload = nil // the reply that says that it has failed
		return
	}
	window := vhostuser.Decode[vhostuser.ConfigWindow](m.payload)
	clear(m.payload[windowSize:])
	if offset := int(window.Offset); offset < len(space) {
		copy(m.payload[windowSize:], space[offset:])
	}
}

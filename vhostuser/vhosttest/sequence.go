package vhosttest

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/vhostuser"
)

// File is a kind of descriptor that a Step sends.
type File int

// Kinds of descriptor.
const (
	MemoryFile File = iota // the sequence's memory
	EventFile              // an eventfd
	PipeWriter             // the write end of a pipe
	SocketFile             // one end of a socket pair
)

// Step is one message of a Sequence. A front-end does not send what it finds not offered, so a Step says when it is skipped.
type Step struct {
	Request   vhostuser.Request
	Payload   []byte
	Files     []File
	NeedReply bool   // asks for an acknowledgement if REPLY_ACK has been negotiated
	If        uint64 // skipped unless all these protocol features have been negotiated
	Unless    uint64 // skipped if any of these has
	SavedBase bool   // SET_VRING_BASE: send what GET_VRING_BASE last returned
}

// Sequence is what a front-end says from connection to the point of interest. The payload of SET_FEATURES and
// SET_PROTOCOL_FEATURES is what the front-end knows; what is sent is what of that the back-end offered.
type Sequence struct {
	Name       string
	MemorySize int
	Steps      []Step
}

// asks are the requests that have a typed reply.
var asks = map[vhostuser.Request]bool{
	vhostuser.VHOST_USER_GET_FEATURES:          true,
	vhostuser.VHOST_USER_GET_PROTOCOL_FEATURES: true,
	vhostuser.VHOST_USER_GET_QUEUE_NUM:         true,
	vhostuser.VHOST_USER_GET_VRING_BASE:        true,
	vhostuser.VHOST_USER_GET_CONFIG:            true,
	vhostuser.VHOST_USER_GET_MAX_MEM_SLOTS:     true,
	vhostuser.VHOST_USER_GET_STATUS:            true,
}

// Play sends the sequence and checks every answer. Descriptors that a front-end keeps stay open until Close.
func (f *FrontEnd) Play(seq Sequence) error {
	if f.memory == nil && seq.MemorySize > 0 {
		m, err := NewMemory(seq.MemorySize)
		if err != nil {
			return err
		}
		f.memory = m
	}
	for i, step := range seq.Steps {
		if step.If&^f.protocol != 0 || step.Unless&f.protocol != 0 {
			continue
		}
		if err := f.playStep(step); err != nil {
			return fmt.Errorf("%s, step %d: %w", seq.Name, i, err)
		}
	}
	return nil
}

// Memory returns the memory of the sequence played; nil if there is none.
func (f *FrontEnd) Memory() *Memory {
	return f.memory
}

func (f *FrontEnd) playStep(step Step) error {
	payload := step.Payload
	switch step.Request {
	case vhostuser.VHOST_USER_SET_FEATURES:
		payload = U64(vhostuser.Decode[uint64](payload) & f.offered)
	case vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES:
		f.protocol = vhostuser.Decode[uint64](payload) & f.protocolOffered
		payload = U64(f.protocol)
	case vhostuser.VHOST_USER_SET_VRING_BASE:
		if step.SavedBase {
			index := vhostuser.Decode[vhostuser.VringState](payload).Index
			payload = State(index, f.bases[index])
		}
	}
	if asks[step.Request] {
		reply, err := f.Ask(step.Request, payload)
		if err != nil {
			return err
		}
		return f.learn(step, reply)
	}
	fds := make([]int, 0, len(step.Files))
	for _, kind := range step.Files {
		fd, err := f.open(kind)
		if err != nil {
			return err
		}
		fds = append(fds, fd)
	}
	return f.tell(step.Request, payload, step.NeedReply, fds)
}

// learn keeps what later steps depend on.
func (f *FrontEnd) learn(step Step, reply []byte) error {
	want := 8
	if step.Request == vhostuser.VHOST_USER_GET_CONFIG {
		want = len(step.Payload)
	}
	if len(reply) != want {
		return fmt.Errorf("reply to %v has %d bytes, expected %d", step.Request, len(reply), want)
	}
	switch step.Request {
	case vhostuser.VHOST_USER_GET_FEATURES:
		f.offered = vhostuser.Decode[uint64](reply)
	case vhostuser.VHOST_USER_GET_PROTOCOL_FEATURES:
		f.protocolOffered = vhostuser.Decode[uint64](reply)
	case vhostuser.VHOST_USER_GET_VRING_BASE:
		v := vhostuser.Decode[vhostuser.VringState](reply)
		f.bases[v.Index] = v.Num
	}
	return nil
}

// open returns a descriptor to send, and keeps it and its other end open.
func (f *FrontEnd) open(kind File) (int, error) {
	var fds [2]int
	var err error
	switch kind {
	case MemoryFile:
		return f.memory.FD(), nil
	case EventFile:
		fds[0], err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		fds[1] = -1
	case PipeWriter:
		if err = unix.Pipe2(fds[:], unix.O_CLOEXEC); err == nil {
			fds[0], fds[1] = fds[1], fds[0]
		}
	case SocketFile:
		fds, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	}
	if err != nil {
		return -1, fmt.Errorf("open a descriptor to send: %w", err)
	}
	for _, fd := range fds {
		if fd >= 0 {
			f.held = append(f.held, sys.NewFD(fd))
		}
	}
	return fds[0], nil
}

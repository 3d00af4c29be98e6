// Package vhosttest is the other side of vhostuser: a front-end that says what it is told to, for tests and benchmarks, and
// the message sequences of the front-ends in the field.
package vhosttest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/vhostuser"
)

// replyTimeout is how long a front-end waits for any answer: a test must not hang with its back-end.
const replyTimeout = 30 * time.Second

// FrontEnd is one connection to a back-end. It is for one goroutine.
type FrontEnd struct {
	// NeedReply makes the helpers ask for an acknowledgement whenever REPLY_ACK has been negotiated, as Cloud Hypervisor
	// and User-Mode Linux do.
	NeedReply bool

	conn            *net.UnixConn
	offered         uint64 // by the back-end, as last heard
	protocolOffered uint64
	protocol        uint64 // acknowledged
	bases           map[uint32]uint32
	held            []*sys.FD // descriptors that a front-end keeps open while connected
	memory          *Memory   // of the sequence played
}

// New returns a FrontEnd that speaks on conn and owns it.
func New(conn *net.UnixConn) *FrontEnd {
	return &FrontEnd{conn: conn, bases: make(map[uint32]uint32)}
}

// Dial connects to a back-end that listens on the socket at path.
func Dial(path string) (*FrontEnd, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("connect to the back-end: %w", err)
	}
	return New(conn), nil
}

// Pair returns a FrontEnd and the back-end's end of its connection.
func Pair() (*FrontEnd, *net.UnixConn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	front, err := fileConn(fds[0])
	back, backErr := fileConn(fds[1])
	if err := errors.Join(err, backErr); err != nil {
		_ = front.Close()
		_ = back.Close()
		return nil, nil, err
	}
	return New(front), back, nil
}

// fileConn closes fd, of which net.FileConn makes its own.
func fileConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "vhost-user")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("make a connection of fd %d: %w", fd, err)
	}
	return c.(*net.UnixConn), nil
}

// Close disconnects and closes what Play kept open.
func (f *FrontEnd) Close() error {
	for _, fd := range f.held {
		_ = fd.Close()
	}
	f.held = nil
	if f.memory != nil {
		f.memory.Close()
		f.memory = nil
	}
	return f.conn.Close()
}

// CloseWrite ends the stream to the back-end; what it still says can be read.
func (f *FrontEnd) CloseWrite() error {
	return f.conn.CloseWrite()
}

// Discard reads and drops what the back-end says until it disconnects.
func (f *FrontEnd) Discard() {
	_, _ = io.Copy(io.Discard, f.conn)
}

// Write sends bytes as they are, with descriptors on the first: what no front-end should.
func (f *FrontEnd) Write(b []byte, fds ...int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	n, _, err := f.conn.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = f.conn.Write(b[n:])
	}
	return err
}

// Message returns the bytes of a message.
func Message(req vhostuser.Request, flags uint32, payload []byte) []byte {
	return append(vhostuser.Append(nil, vhostuser.Header{Request: req, Flags: flags, Size: uint32(len(payload))}), payload...)
}

// Send sends a message, and does not wait for an answer.
func (f *FrontEnd) Send(req vhostuser.Request, payload []byte, needReply bool, fds ...int) error {
	flags := vhostuser.Version
	if needReply {
		flags |= vhostuser.FlagNeedReply
	}
	if err := f.Write(Message(req, flags, payload), fds...); err != nil {
		return fmt.Errorf("send %v: %w", req, err)
	}
	return nil
}

// Receive returns the payload of the reply to req, which must be the next message and have the flags that QEMU insists on.
func (f *FrontEnd) Receive(req vhostuser.Request) ([]byte, error) {
	_ = f.conn.SetReadDeadline(time.Now().Add(replyTimeout))
	head := make([]byte, len(Message(0, 0, nil)))
	if _, err := io.ReadFull(f.conn, head); err != nil {
		return nil, fmt.Errorf("receive the reply to %v: %w", req, err)
	}
	h := vhostuser.Decode[vhostuser.Header](head)
	if h.Request != req || h.Flags != vhostuser.ReplyFlags || h.Size > vhostuser.MaxPayload {
		return nil, fmt.Errorf("reply to %v has request %v, flags %#x and %d bytes, expected flags %#x", req, h.Request, h.Flags, h.Size, vhostuser.ReplyFlags)
	}
	payload := make([]byte, h.Size)
	if _, err := io.ReadFull(f.conn, payload); err != nil {
		return nil, fmt.Errorf("receive the payload of the reply to %v: %w", req, err)
	}
	return payload, nil
}

// Ask sends a message that has a typed reply and returns its payload.
func (f *FrontEnd) Ask(req vhostuser.Request, payload []byte) ([]byte, error) {
	if err := f.Send(req, payload, false); err != nil {
		return nil, err
	}
	return f.Receive(req)
}

// AckError is an acknowledgement other than 0: the back-end could not do what it was told.
type AckError struct {
	Request vhostuser.Request
	Value   uint64
}

// Error returns the request and the value.
func (e *AckError) Error() string {
	return fmt.Sprintf("back-end refused %v: acknowledged with %d", e.Request, e.Value)
}

// Tell sends a message that has no typed reply, and waits for its acknowledgement if NeedReply and REPLY_ACK say so. A
// refusal is an *AckError.
func (f *FrontEnd) Tell(req vhostuser.Request, payload []byte, fds ...int) error {
	return f.tell(req, payload, f.NeedReply, fds)
}

func (f *FrontEnd) tell(req vhostuser.Request, payload []byte, needReply bool, fds []int) error {
	needReply = needReply && f.protocol&vhostuser.VHOST_USER_PROTOCOL_F_REPLY_ACK != 0
	if err := f.Send(req, payload, needReply, fds...); err != nil || !needReply {
		return err
	}
	ack, err := f.Receive(req)
	if err != nil {
		return err
	}
	if len(ack) != 8 {
		return fmt.Errorf("acknowledgement of %v has %d bytes, expected 8", req, len(ack))
	}
	if v := vhostuser.Decode[uint64](ack); v != 0 {
		return &AckError{req, v}
	}
	return nil
}

// askU64 is for the requests that are answered with one number.
func (f *FrontEnd) askU64(req vhostuser.Request) (uint64, error) {
	b, err := f.Ask(req, nil)
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("reply to %v has %d bytes, expected 8", req, len(b))
	}
	return vhostuser.Decode[uint64](b), nil
}

// GetFeatures returns the virtio features offered. It is also what QEMU waits with until the back-end has read all before.
func (f *FrontEnd) GetFeatures() (uint64, error) {
	v, err := f.askU64(vhostuser.VHOST_USER_GET_FEATURES)
	f.offered = v
	return v, err
}

// SetFeatures acknowledges virtio features.
func (f *FrontEnd) SetFeatures(v uint64) error {
	return f.Tell(vhostuser.VHOST_USER_SET_FEATURES, U64(v))
}

// Negotiate takes all protocol features offered, as QEMU does, and returns them.
func (f *FrontEnd) Negotiate() (uint64, error) {
	v, err := f.askU64(vhostuser.VHOST_USER_GET_PROTOCOL_FEATURES)
	if err != nil {
		return 0, err
	}
	f.protocolOffered = v
	return v, f.SetProtocolFeatures(v)
}

// SetProtocolFeatures acknowledges protocol features. With NeedReply it asks for an acknowledgement of this very
// message if v has REPLY_ACK, as User-Mode Linux does.
func (f *FrontEnd) SetProtocolFeatures(v uint64) error {
	f.protocol = v
	return f.Tell(vhostuser.VHOST_USER_SET_PROTOCOL_FEATURES, U64(v))
}

// GetQueueNum returns the number of queues.
func (f *FrontEnd) GetQueueNum() (uint64, error) {
	return f.askU64(vhostuser.VHOST_USER_GET_QUEUE_NUM)
}

// GetMaxMemSlots returns the number of memory regions that the back-end can hold.
func (f *FrontEnd) GetMaxMemSlots() (uint64, error) {
	return f.askU64(vhostuser.VHOST_USER_GET_MAX_MEM_SLOTS)
}

// GetConfig reads size bytes of the config space at offset. An empty answer is the back-end's refusal.
func (f *FrontEnd) GetConfig(offset, size uint32) ([]byte, error) {
	want := Config(offset, size, 0)
	got, err := f.Ask(vhostuser.VHOST_USER_GET_CONFIG, want)
	if err != nil || len(got) == 0 {
		return nil, err
	}
	if len(got) != len(want) || vhostuser.Decode[vhostuser.ConfigWindow](got) != vhostuser.Decode[vhostuser.ConfigWindow](want) {
		return nil, fmt.Errorf("reply to GET_CONFIG does not echo offset %d, size %d and flags 0: % x", offset, size, got)
	}
	return got[len(got)-int(size):], nil
}

// Region is a region of guest memory and the file that holds it.
type Region struct {
	vhostuser.MemRegion
	FD int
}

// SetMemTable sends all of guest memory.
func (f *FrontEnd) SetMemTable(regions ...Region) error {
	wire := make([]vhostuser.MemRegion, 0, len(regions))
	fds := make([]int, 0, len(regions))
	for _, r := range regions {
		wire = append(wire, r.MemRegion)
		fds = append(fds, r.FD)
	}
	return f.Tell(vhostuser.VHOST_USER_SET_MEM_TABLE, MemTable(wire...), fds...)
}

// AddMemReg adds one region.
func (f *FrontEnd) AddMemReg(r Region) error {
	return f.Tell(vhostuser.VHOST_USER_ADD_MEM_REG, MemReg(r.MemRegion), r.FD)
}

// RemMemReg removes one region.
func (f *FrontEnd) RemMemReg(r vhostuser.MemRegion) error {
	return f.Tell(vhostuser.VHOST_USER_REM_MEM_REG, MemReg(r))
}

// SetVringKick, SetVringCall and SetVringErr set a ring's descriptors; fd -1 says that there is none.
func (f *FrontEnd) SetVringKick(index uint8, fd int) error {
	return f.vringFD(vhostuser.VHOST_USER_SET_VRING_KICK, index, fd)
}

// SetVringCall is as SetVringKick.
func (f *FrontEnd) SetVringCall(index uint8, fd int) error {
	return f.vringFD(vhostuser.VHOST_USER_SET_VRING_CALL, index, fd)
}

// SetVringErr is as SetVringKick.
func (f *FrontEnd) SetVringErr(index uint8, fd int) error {
	return f.vringFD(vhostuser.VHOST_USER_SET_VRING_ERR, index, fd)
}

func (f *FrontEnd) vringFD(req vhostuser.Request, index uint8, fd int) error {
	if fd < 0 {
		return f.Tell(req, U64(uint64(index)|vhostuser.VringNoFD))
	}
	return f.Tell(req, U64(uint64(index)), fd)
}

// SetVringEnable enables or disables a ring.
func (f *FrontEnd) SetVringEnable(index uint32, enabled bool) error {
	num := uint32(0)
	if enabled {
		num = 1
	}
	return f.Tell(vhostuser.VHOST_USER_SET_VRING_ENABLE, State(index, num))
}

// GetVringBase stops a ring and returns its base.
func (f *FrontEnd) GetVringBase(index uint32) (uint32, error) {
	b, err := f.Ask(vhostuser.VHOST_USER_GET_VRING_BASE, State(index, 0))
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("reply to GET_VRING_BASE has %d bytes, expected 8", len(b))
	}
	v := vhostuser.Decode[vhostuser.VringState](b)
	if v.Index != index {
		return 0, fmt.Errorf("reply to GET_VRING_BASE is for ring %d, expected %d", v.Index, index)
	}
	f.bases[index] = v.Num
	return v.Num, nil
}

// Ring describes a ring to SetupRing.
type Ring struct {
	Num  uint32
	Base uint32
	// Addresses in terms of MemRegion.UserAddr.
	Desc, Avail, Used uint64
	Kick, Call        int // -1: none
}

// SetupRing sends all that starts a ring, in QEMU's order; SetVringEnable makes it run.
func (f *FrontEnd) SetupRing(index uint8, r Ring) error {
	i := uint32(index)
	if err := f.Tell(vhostuser.VHOST_USER_SET_VRING_NUM, State(i, r.Num)); err != nil {
		return err
	}
	if err := f.Tell(vhostuser.VHOST_USER_SET_VRING_BASE, State(i, r.Base)); err != nil {
		return err
	}
	addr := vhostuser.VringAddr{Index: i, Desc: r.Desc, Avail: r.Avail, Used: r.Used}
	if err := f.Tell(vhostuser.VHOST_USER_SET_VRING_ADDR, vhostuser.Append(nil, addr)); err != nil {
		return err
	}
	if err := f.SetVringKick(index, r.Kick); err != nil {
		return err
	}
	return f.SetVringCall(index, r.Call)
}

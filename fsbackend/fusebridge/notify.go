package fusebridge

import (
	"structs"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// Notification codes, enum fuse_notify_code.
const (
	notifyPoll       = 1
	notifyInvalInode = 2
	notifyInvalEntry = 3
	notifyStore      = 4
	notifyRetrieve   = 5
	notifyDelete     = 6
	notifyResend     = 7
	notifyIncEpoch   = 8
	notifyPrune      = 9
)

// notification handles what a program says without being asked. virtio-fs cannot carry it on to the guest, so what the guest may
// trust is as the program has said before; what the bridge itself remembers is given up. Codes that ask for something that only a
// kernel has (cached data) are answered, or ignored.
func (c *conn) notification(code int32, payload []byte) {
	switch code {
	case notifyInvalInode:
		if len(payload) == 24 { // nodeid, offset, length
			c.invalidateNode(word(payload))
		}
	case notifyInvalEntry:
		if len(payload) >= 16 { // parent, namelen, flags, name
			c.invalidateEntry(word(payload), payload[16:])
		}
	case notifyDelete:
		if len(payload) >= 24 { // parent, child, namelen, padding, name
			c.invalidateEntry(word(payload), payload[24:])
			c.invalidateNode(word(payload[8:]))
		}
	case notifyRetrieve:
		c.retrieve(payload)
	case notifyIncEpoch, notifyPrune:
		c.invalidateAll()
	case notifyStore, notifyPoll, notifyResend:
	default:
		c.b.log.Warn("FUSE program sends a notification that is not known", "code", code)
	}
}

// word is the 64-bit number that b begins with.
func word(b []byte) (v uint64) {
	decode(b, &v)
	return v
}

// notifyRetrieveOut is fuse_notify_retrieve_out.
type notifyRetrieveOut struct {
	_                            structs.HostLayout
	NotifyUnique, Nodeid, Offset uint64
	Size, Padding                uint32
}

// notifyRetrieveIn is fuse_notify_retrieve_in; the data follow.
type notifyRetrieveIn struct {
	_ structs.HostLayout
	fuseproto.InHeader
	Dummy1, Offset uint64
	Size, Dummy2   uint32
	Dummy3, Dummy4 uint64
}

// retrieve answers that there are no cached data.
func (c *conn) retrieve(payload []byte) {
	var in notifyRetrieveOut
	if len(payload) != sizeOf[notifyRetrieveOut]() {
		return
	}
	decode(payload, &in)
	out := notifyRetrieveIn{Offset: in.Offset}
	out.InHeader = fuseproto.InHeader{
		Length: uint32(sizeOf[notifyRetrieveIn]()), Opcode: uint32(fuseproto.FUSE_NOTIFY_REPLY),
		Unique: in.NotifyUnique, NodeId: in.Nodeid,
	}
	_ = sendTo(c.fd, bytesOf(&out))
}

func (c *conn) invalidateNode(raw uint64) {
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	if n := c.node(raw); n != nil {
		n.changed()
	}
}

// node is the node that the program calls raw. Bridge.mu is held.
func (c *conn) node(raw uint64) *node {
	if raw == fuseproto.FUSE_ROOT_ID {
		return c.b.root
	}
	return c.byRaw[raw]
}

// invalidateEntry gives up what is known of a name, which a NUL ends.
func (c *conn) invalidateEntry(parent uint64, name []byte) {
	if unix.ByteSliceToString(name) == "" {
		return
	}
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	if p := c.node(parent); p != nil {
		p.changed()
		if d := p.children[unix.ByteSliceToString(name)]; d != nil {
			d.until = 0
			d.node.changed()
		}
	}
}

func (c *conn) invalidateAll() {
	c.b.mu.Lock()
	defer c.b.mu.Unlock()
	for _, n := range c.b.nodes {
		n.changed()
		for _, d := range n.children {
			d.until = 0
		}
	}
	for n := c.b.idle.oldest; n != nil; n = n.newer {
		n.changed()
	}
}

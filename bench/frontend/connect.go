package frontend

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// maxData is the most data that a request of any workload carries, in bytes.
const maxData = 1 << 20

// initFlags are those of FUSE_INIT as Linux 6.12's virtio-fs sends them (fs/fuse/inode.c, fuse_send_init), without DAX.
const initFlags = fuseproto.FUSE_ASYNC_READ | fuseproto.FUSE_POSIX_LOCKS | fuseproto.FUSE_ATOMIC_O_TRUNC | fuseproto.FUSE_EXPORT_SUPPORT |
	fuseproto.FUSE_BIG_WRITES | fuseproto.FUSE_DONT_MASK | fuseproto.FUSE_SPLICE_WRITE | fuseproto.FUSE_SPLICE_MOVE | fuseproto.FUSE_SPLICE_READ |
	fuseproto.FUSE_FLOCK_LOCKS | fuseproto.FUSE_HAS_IOCTL_DIR | fuseproto.FUSE_AUTO_INVAL_DATA | fuseproto.FUSE_DO_READDIRPLUS |
	fuseproto.FUSE_READDIRPLUS_AUTO | fuseproto.FUSE_ASYNC_DIO | fuseproto.FUSE_WRITEBACK_CACHE | fuseproto.FUSE_NO_OPEN_SUPPORT |
	fuseproto.FUSE_PARALLEL_DIROPS | fuseproto.FUSE_HANDLE_KILLPRIV | fuseproto.FUSE_POSIX_ACL | fuseproto.FUSE_ABORT_ERROR |
	fuseproto.FUSE_MAX_PAGES | fuseproto.FUSE_CACHE_SYMLINKS | fuseproto.FUSE_NO_OPENDIR_SUPPORT | fuseproto.FUSE_EXPLICIT_INVAL_DATA |
	fuseproto.FUSE_SUBMOUNTS | fuseproto.FUSE_HANDLE_KILLPRIV_V2 | fuseproto.FUSE_SETXATTR_EXT | fuseproto.FUSE_INIT_EXT |
	fuseproto.FUSE_SECURITY_CTX | fuseproto.FUSE_CREATE_SUPP_GROUP | fuseproto.FUSE_HAS_EXPIRE_ONLY | fuseproto.FUSE_DIRECT_IO_ALLOW_MMAP |
	fuseproto.FUSE_PASSTHROUGH | fuseproto.FUSE_NO_EXPORT_SUPPORT | fuseproto.FUSE_HAS_RESEND | fuseproto.FUSE_ALLOW_IDMAP

// FrontEnd is a server's VMM and guest. It is for one goroutine.
type FrontEnd struct {
	config   Config
	conn     *vhosttest.FrontEnd
	mem      *vqtest.Memory
	hiprio   *hiprio
	queues   []*queue
	uid, gid uint32
	init     fuseproto.InitOut
	flags    uint64 // of FUSE_INIT, as negotiated
	seed     uint64 // of what was written last
	broken   error  // why nothing more can be run
}

// Connect brings a device up as QEMU and Linux do: vhost-user, memory, rings, FUSE_INIT. It ends early when ctx is done.
func Connect(ctx context.Context, c Config) (*FrontEnd, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	c = c.withDefaults()
	if c.Depth > c.RingSize {
		return nil, fmt.Errorf("drive a server: depth %d with a ring of %d descriptors, each request takes one", c.Depth, c.RingSize)
	}
	conn, err := vhosttest.Dial(c.Socket)
	if err != nil {
		return nil, fmt.Errorf("drive the server at %s: %w", c.Socket, err)
	}
	f := &FrontEnd{config: c, conn: conn, uid: uint32(os.Getuid()), gid: uint32(os.Getgid())}
	stop := context.AfterFunc(ctx, func() { _ = conn.CloseWrite() })
	defer stop()
	if err := f.connect(); err != nil {
		f.release()
		return nil, fmt.Errorf("drive the server at %s: %w", c.Socket, errors.Join(err, context.Cause(ctx)))
	}
	return f, nil
}

func (c Config) withDefaults() Config {
	c.Queues, c.Depth = max(c.Queues, 1), max(c.Depth, 1)
	if c.RingSize == 0 {
		c.RingSize = 512
	}
	if c.Stall == 0 {
		c.Stall = 10 * time.Second
	}
	return c
}

func (f *FrontEnd) connect() error {
	features, err := f.negotiate()
	if err != nil {
		return err
	}
	// What is never touched takes no memory.
	size := uint64(f.config.Queues)*uint64(f.config.Depth)*(2*maxData) + 64<<20
	region := guestmem.RegionConfig{Size: size, UserAddr: 0x7f12_4000_0000}
	if f.mem, err = vqtest.NewMemory([]guestmem.RegionConfig{region}); err != nil {
		return err
	}
	event := features&virtqueue.VIRTIO_RING_F_EVENT_IDX != 0
	for i := range 1 + f.config.Queues {
		r, err := newRing(i, f.config.RingSize, event, f.mem)
		if err != nil {
			return err
		}
		if i == 0 {
			f.hiprio = newHiprio(f, r)
		} else {
			f.queues = append(f.queues, newQueue(f, r))
		}
	}
	if err := f.start(region); err != nil {
		return err
	}
	return f.initialise()
}

// negotiate takes what QEMU 7.2 and Linux take, and returns the virtio features.
func (f *FrontEnd) negotiate() (uint64, error) {
	const needed = vhostuser.VIRTIO_F_VERSION_1 | vhostuser.VHOST_USER_F_PROTOCOL_FEATURES | virtqueue.VIRTIO_RING_F_INDIRECT_DESC
	offered, err := f.conn.GetFeatures()
	if err != nil {
		return 0, err
	}
	if missing := needed &^ offered; missing != 0 {
		return 0, fmt.Errorf("the server does not offer the features %#x, which are needed", missing)
	}
	// Without PROTOCOL_FEATURES of its own a back-end answers 0.
	protocol, err := f.conn.Ask(vhostuser.VHOST_USER_GET_PROTOCOL_FEATURES, nil)
	if err != nil {
		return 0, err
	}
	if len(protocol) != 8 {
		return 0, fmt.Errorf("reply to GET_PROTOCOL_FEATURES has %d bytes, expected 8", len(protocol))
	}
	taken := vhostuser.Decode[uint64](protocol) & (vhostuser.VHOST_USER_PROTOCOL_F_MQ | vhostuser.VHOST_USER_PROTOCOL_F_REPLY_ACK)
	if err := f.conn.SetProtocolFeatures(taken); err != nil {
		return 0, err
	}
	if taken&vhostuser.VHOST_USER_PROTOCOL_F_MQ != 0 {
		queues, err := f.conn.GetQueueNum()
		if err != nil {
			return 0, err
		}
		if queues < uint64(1+f.config.Queues) {
			return 0, fmt.Errorf("the server has %d queues, hiprio included: %d request queues cannot be driven, tell it to offer more", queues, f.config.Queues)
		}
	}
	if err := f.conn.Tell(vhostuser.VHOST_USER_SET_OWNER, nil); err != nil {
		return 0, err
	}
	features := offered & (needed | virtqueue.VIRTIO_RING_F_EVENT_IDX)
	return features, f.conn.SetFeatures(features)
}

// start sends memory and rings.
func (f *FrontEnd) start(region guestmem.RegionConfig) error {
	f.conn.NeedReply = true // as QEMU for this one message
	err := f.conn.SetMemTable(vhosttest.Region{
		MemRegion: vhostuser.MemRegion{GuestPhysAddr: region.GuestPhysAddr, Size: region.Size, UserAddr: region.UserAddr, MmapOffset: region.MmapOffset},
		FD:        f.mem.FD(),
	})
	f.conn.NeedReply = false
	if err != nil {
		return err
	}
	rings := []*ring{f.hiprio.ring}
	for _, q := range f.queues {
		rings = append(rings, q.ring)
	}
	for i, r := range rings {
		if err := f.conn.SetupRing(uint8(i), vhosttest.Ring{
			Num: uint32(r.num), Desc: r.descAddr, Avail: r.availAddr, Used: r.usedAddr, Kick: r.kick.Int(), Call: r.call.Int(),
		}); err != nil {
			return err
		}
	}
	for i := range rings {
		if err := f.conn.SetVringEnable(uint32(i), true); err != nil {
			return err
		}
	}
	// Its answer says that all before has been done.
	_, err = f.conn.GetFeatures()
	return err
}

// initialise is FUSE_INIT.
func (f *FrontEnd) initialise() error {
	q := f.queues[0]
	c := q.caller(shape{op: fuseproto.FUSE_INIT, in: 64, out: 64})
	in := as[fuseproto.InitIn](c.m.in)
	in.Major, in.Minor = fuseproto.FUSE_KERNEL_VERSION, 41
	in.MaxReadAhead = 128 << 10
	in.Flags, in.Flags2 = uint32(initFlags&0xffff_ffff), uint32(initFlags>>32)
	r, err := c.call()
	if err != nil {
		return err
	}
	if err := c.m.success(r, 64); err != nil {
		return err
	}
	f.init = *as[fuseproto.InitOut](c.m.out[outHeader:])
	f.flags = uint64(f.init.Flags)
	if f.flags&fuseproto.FUSE_INIT_EXT != 0 {
		f.flags |= uint64(f.init.Flags2) << 32
	}
	if f.init.Major != fuseproto.FUSE_KERNEL_VERSION {
		return fmt.Errorf("the server speaks FUSE %d.%d, expected %d", f.init.Major, f.init.Minor, fuseproto.FUSE_KERNEL_VERSION)
	}
	if extra := f.flags &^ initFlags; extra != 0 {
		return fmt.Errorf("the server sets the flags %#x in FUSE_INIT, which were not offered", extra)
	}
	return nil
}

// Negotiated returns the flags of FUSE_INIT that the server has taken, as fuse.h numbers them.
func (f *FrontEnd) Negotiated() uint64 { return f.flags }

// Close says FUSE_DESTROY, as an unmount does, and disconnects. The server's own end is not waited for.
func (f *FrontEnd) Close() error {
	var err error
	if f.broken == nil {
		c := f.queues[0].caller(shape{op: fuseproto.FUSE_DESTROY})
		var r result
		if r, err = c.call(); err == nil && r.errno != syscall.ENOSYS {
			err = c.m.success(r, 0)
		}
	}
	f.release()
	return err
}

func (f *FrontEnd) release() {
	_ = f.conn.Close()
	if f.hiprio != nil {
		f.hiprio.ring.close()
	}
	for _, q := range f.queues {
		q.ring.close()
	}
	if f.mem != nil {
		_ = f.mem.Close()
	}
	f.broken = errors.New("the front-end is closed")
}

// hiprio is the queue of FORGETs, which nobody answers. All queues' threads share it, as a guest's CPUs do.
type hiprio struct {
	f *FrontEnd

	mu       sync.Mutex
	ring     *ring
	messages []*message // by head
	free     []uint16
	sent     uint64 // messages
}

// forgetBatch is how many nodes one message forgets.
const forgetBatch = 250

// hiprioDepth is how many FORGETs can be under way.
const hiprioDepth = 64

func newHiprio(f *FrontEnd, r *ring) *hiprio {
	h := &hiprio{f: f, ring: r}
	r.suppress()
	for i := range min(hiprioDepth, f.config.RingSize) {
		m := newMessage(f.mem, shape{op: fuseproto.FUSE_BATCH_FORGET, in: 8 + 16*forgetBatch, noReply: true}, Contiguous, f.uid, f.gid)
		h.messages = append(h.messages, m)
		h.free = append(h.free, uint16(i))
		// Linux sends header and arguments in one buffer here: a descriptor without a table.
		r.desc[i] = m.table[0]
		r.desc[i].Flags = 0
	}
	return h
}

// Forget is one node and how many lookups of it to take back.
type forget = fuseproto.ForgetOne

// send forgets nodes, at most forgetBatch; one alone as FUSE_FORGET, as Linux does.
func (h *hiprio) send(nodes []forget) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.wait(1); err != nil {
		return err
	}
	head := h.free[len(h.free)-1]
	h.free = h.free[:len(h.free)-1]
	m := h.messages[head]
	hdr := m.header()
	hdr.Unique = h.sent<<1 | 1<<63
	h.sent++
	if len(nodes) == 1 {
		in := as[fuseproto.ForgetIn](m.in)
		hdr.Opcode, hdr.NodeId = uint32(fuseproto.FUSE_FORGET), nodes[0].Nodeid
		in.Nlookup = nodes[0].Nlookup
		hdr.Length = inHeader + 8
	} else {
		in := as[fuseproto.BatchForgetIn](m.in)
		hdr.Opcode, hdr.NodeId = uint32(fuseproto.FUSE_BATCH_FORGET), 0
		in.Count, in.Dummy = uint32(len(nodes)), 0
		for i, n := range nodes {
			*as[forget](m.in[inHeader+8+16*i:]) = n
		}
		hdr.Length = uint32(inHeader + 8 + 16*len(nodes))
	}
	h.ring.desc[head].Len = hdr.Length
	return h.ring.offer(head)
}

// drained waits until the server has taken all.
func (h *hiprio) drained() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.wait(len(h.messages))
}

// wait waits until n messages are free.
func (h *hiprio) wait(n int) error {
	var w spin
	for {
		for {
			head, written, ok := h.ring.reap()
			if !ok {
				break
			}
			if int(head) >= len(h.messages) || written != 0 {
				return fmt.Errorf("the server used head %d of hiprio and wrote %d bytes, expected 0 to %d and 0", head, written, len(h.messages)-1)
			}
			h.free = append(h.free, uint16(head))
		}
		if len(h.free) >= n {
			return nil
		}
		if w.over(h.f.config.Stall) {
			return stallError(h.f.config.Stall, []string{h.ring.state(len(h.messages) - len(h.free))})
		}
	}
}

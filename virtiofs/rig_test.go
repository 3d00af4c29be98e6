package virtiofs

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

const (
	hiprio  = 0
	request = 1
	// patience is how long a test waits for what must come: a failure, never a measure.
	patience = 20 * time.Second

	rigFeatures = vhostuser.VIRTIO_F_VERSION_1 | vhostuser.VHOST_USER_F_PROTOCOL_FEATURES |
		virtqueue.VIRTIO_RING_F_EVENT_IDX | virtqueue.VIRTIO_RING_F_INDIRECT_DESC
)

// rig is a device with a whole front-end and a driver for each queue on the other side.
type rig struct {
	t      testing.TB
	device *Device
	server *fuseserver.Server
	fe     *vhosttest.FrontEnd
	mem    *vqtest.Memory
	queues []*rigQueue
	num    uint16 // size of each ring
	served chan error
	unique uint64
}

// rigQueue is one ring's driver and descriptors.
type rigQueue struct {
	*vqtest.Driver
	kick, call, err *sys.FD
	chains          map[uint16]vqtest.Chain
}

// newMem returns the in-memory backend with a file "file" of 1 MiB, nodeid from LOOKUP.
func newMem(t testing.TB) *mem.FS {
	t.Helper()
	fs, err := mem.New(mem.Config{})
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, 1<<20)
	for i := range content {
		content[i] = byte(i >> 3)
	}
	if err := fs.WriteFile("file", content); err != nil {
		t.Fatal(err)
	}
	return fs
}

func newDevice(t testing.TB, backend fsbackend.Backend, cfg Config) (*Device, *fuseserver.Server) {
	t.Helper()
	server, err := fuseserver.New(fuseserver.Config{Backend: backend, Xattr: true, PosixLock: true, Flock: true, Log: cfg.Log})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Server = server
	if cfg.NumRequestQueues == 0 {
		cfg.NumRequestQueues = 1
	}
	device, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return device, server
}

// newRig serves backend and brings every queue up.
func newRig(t testing.TB, backend fsbackend.Backend, cfg Config) *rig {
	t.Helper()
	return newRigOf(t, 256, backend, cfg)
}

// newRigOf is newRig with rings of num entries.
func newRigOf(t testing.TB, num uint16, backend fsbackend.Backend, cfg Config) *rig {
	t.Helper()
	r := &rig{t: t, num: num}
	r.device, r.server = newDevice(t, backend, cfg)
	t.Cleanup(func() {
		r.disconnect()
		if err := r.device.Close(); err != nil {
			t.Errorf("close the device: %v", err)
		}
	})
	r.connect()
	return r
}

// connect brings a front-end up on the device.
func (r *rig) connect() {
	r.t.Helper()
	fe, back, err := vhosttest.Pair()
	r.check(err)
	r.fe, r.served = fe, make(chan error, 1)
	served := r.served
	go func() {
		defer back.Close()
		served <- r.device.Serve(context.Background(), back)
	}()
	fe.NeedReply = true
	_, err = fe.GetFeatures()
	r.check(err)
	_, err = fe.Negotiate()
	r.check(err)
	r.mem, err = vqtest.NewMemory(vqtest.Regions(32 << 20))
	r.check(err)
	r.check(fe.SetFeatures(rigFeatures))
	for _, m := range r.mem.Regions() {
		r.check(fe.AddMemReg(vhosttest.Region{
			MemRegion: vhostuser.MemRegion{GuestPhysAddr: m.GuestPhysAddr, Size: m.Size, UserAddr: m.UserAddr, MmapOffset: m.MmapOffset},
			FD:        r.mem.FD(),
		}))
	}
	r.queues = nil
	for range r.device.NumQueues() {
		d, err := vqtest.New(vqtest.Config{Num: r.num, Features: rigFeatures, Memory: r.mem})
		r.check(err)
		q := &rigQueue{Driver: d, kick: eventfd(r.t), call: eventfd(r.t), err: eventfd(r.t), chains: make(map[uint16]vqtest.Chain)}
		r.queues = append(r.queues, q)
	}
	r.startRings()
}

func (r *rig) startRings() {
	r.t.Helper()
	for i, q := range r.queues {
		r.start(i, q.kick.Int(), q.call.Int())
	}
}

func (r *rig) start(i, kick, call int) {
	r.t.Helper()
	c := r.queues[i].QueueConfig()
	r.check(r.fe.SetVringErr(uint8(i), r.queues[i].err.Int()))
	r.check(r.fe.SetupRing(uint8(i), vhosttest.Ring{
		Num: uint32(c.Num), Base: uint32(r.queues[i].AvailIdx()),
		Desc: c.DescUserAddr, Avail: c.AvailUserAddr, Used: c.UsedUserAddr,
		Kick: kick, Call: call,
	}))
	r.check(r.fe.SetVringEnable(uint32(i), true))
}

// disconnect ends the session, waits for the device, and returns what Serve said.
func (r *rig) disconnect() error {
	if r.fe == nil {
		return nil
	}
	_ = r.fe.Close()
	r.fe = nil
	var err error
	select {
	case err = <-r.served:
	case <-time.After(patience):
		r.t.Error("the session did not end with its front-end")
	}
	for _, q := range r.queues {
		_, _, _ = q.kick.Close(), q.call.Close(), q.err.Close()
	}
	r.queues = nil
	r.check(r.mem.Close())
	return err
}

func (r *rig) check(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func eventfd(t testing.TB) *sys.FD {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	return sys.NewFD(fd)
}

// body is a request's arguments as a program would fill in fuse.h's struct.
func body(fields ...any) []byte {
	var b []byte
	for _, f := range fields {
		switch v := f.(type) {
		case uint32:
			b = binary.LittleEndian.AppendUint32(b, v)
		case uint64:
			b = binary.LittleEndian.AppendUint64(b, v)
		case string:
			b = append(append(b, v...), 0)
		case []byte:
			b = append(b, v...)
		default:
			panic("body: uint32, uint64, string or []byte")
		}
	}
	return b
}

// call is one request to be sent.
type call struct {
	op      fuseproto.Opcode
	node    uint64
	args    []byte
	data    []byte
	outArgs int
	outData int
	noReply bool
}

// offer puts c on queue i without a kick.
func (r *rig) offer(i int, c call) (head uint16) {
	r.t.Helper()
	r.unique++
	length := 40 + len(c.args) + len(c.data)
	header := body(uint32(length), uint32(c.op), r.unique, c.node, uint32(0), uint32(0), uint32(1), uint32(0))
	chain := r.mem.Build(vqtest.Request{Header: header, Args: c.args, Data: c.data, OutArgs: c.outArgs, OutData: c.outData, NoReply: c.noReply})
	q := r.queues[i]
	head, ok := q.OfferIndirect(chain)
	if !ok {
		r.t.Fatalf("queue %d has no descriptor free", i)
	}
	q.chains[head] = chain
	return head
}

// kick shows the device what was offered.
func (r *rig) kick(i int) {
	r.t.Helper()
	if r.queues[i].Kick() {
		signal(r.t, r.queues[i].kick.Int())
	}
}

func signal(t testing.TB, fd int) {
	t.Helper()
	if _, err := unix.Write(fd, one); err != nil {
		t.Fatal(err)
	}
}

// reply is one used element.
type reply struct {
	head    uint16
	written uint32
	errno   unix.Errno
	unique  uint64
	data    []byte // after the header
}

// next waits for the next used element of queue i, by its call fd.
func (r *rig) next(i int) reply {
	r.t.Helper()
	q := r.queues[i]
	for {
		if head, written, ok := q.Used(); ok {
			return r.parse(q, head, written)
		}
		if !q.EnableInterrupt() {
			awaitFD(r.t, q.call.Int())
		}
	}
}

// awaitFD waits until fd is readable and takes what is there.
func awaitFD(t testing.TB, fd int) uint64 {
	t.Helper()
	if !readable(t, fd, patience) {
		t.Fatal("no notification came")
	}
	var b [8]byte
	if _, err := unix.Read(fd, b[:]); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(b[:])
}

func readable(t testing.TB, fd int, timeout time.Duration) bool {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(max(time.Until(deadline).Milliseconds(), 0)))
		if err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatal(err)
		}
		if err == nil {
			return n > 0
		}
	}
}

func (r *rig) parse(q *rigQueue, head uint16, written uint32) reply {
	r.t.Helper()
	p := reply{head: head, written: written}
	if written == 0 {
		return p
	}
	b := r.mem.Reply(q.chains[head], written)
	if len(b) < 16 || binary.LittleEndian.Uint32(b) != written {
		r.t.Fatalf("used.len is %d and the reply % x: expected out_header.len to be the same", written, b[:min(16, len(b))])
	}
	p.errno = unix.Errno(-int32(binary.LittleEndian.Uint32(b[4:])))
	p.unique = binary.LittleEndian.Uint64(b[8:])
	p.data = b[16:]
	return p
}

// do sends one request on queue i and waits for its reply, which must be the next there.
func (r *rig) do(i int, c call) reply {
	r.t.Helper()
	head := r.offer(i, c)
	unique := r.unique
	r.kick(i)
	p := r.next(i)
	if p.head != head || p.written > 0 && p.unique != unique {
		r.t.Fatalf("reply to head %d, unique %d, expected head %d, unique %d", p.head, p.unique, head, unique)
	}
	return p
}

// must is do for what must succeed.
func (r *rig) must(i int, c call) reply {
	r.t.Helper()
	p := r.do(i, c)
	if p.errno != 0 || p.written == 0 {
		r.t.Fatalf("%v: %v (used.len %d)", c.op, p.errno, p.written)
	}
	return p
}

func initCall() call {
	return call{op: fuseproto.FUSE_INIT, args: body(uint32(7), uint32(45), uint32(1<<20), uint32(0xffffffff), uint32(0xffffffff), make([]byte, 44)), outArgs: 64}
}

// mount sends INIT and opens "file".
func (r *rig) mount() (node, fh uint64) {
	r.t.Helper()
	r.must(request, initCall())
	p := r.must(request, call{op: fuseproto.FUSE_LOOKUP, node: 1, args: body("file"), outArgs: 128})
	node = binary.LittleEndian.Uint64(p.data)
	p = r.must(request, call{op: fuseproto.FUSE_OPEN, node: node, args: body(uint32(unix.O_RDWR), uint32(0)), outArgs: 16})
	return node, binary.LittleEndian.Uint64(p.data)
}

func read(node, fh, off uint64, size int) call {
	return call{
		op: fuseproto.FUSE_READ, node: node, outData: size,
		args: body(fh, off, uint32(size), uint32(0), uint64(0), uint32(0), uint32(0)),
	}
}

func fsync(node, fh uint64) call {
	return call{op: fuseproto.FUSE_FSYNC, node: node, args: body(fh, uint32(0), uint32(0))}
}

func getattr(node uint64) call {
	return call{op: fuseproto.FUSE_GETATTR, node: node, args: body(uint32(0), uint32(0), uint64(0)), outArgs: 104}
}

// openFDs counts the process's descriptors.
func openFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// testLog counts what is logged.
type testLog struct{ lines chan string }

func newTestLog() (*testLog, *slog.Logger) {
	l := &testLog{lines: make(chan string, 1024)}
	return l, slog.New(slog.NewTextHandler(l, nil))
}

func (l *testLog) Write(p []byte) (int, error) {
	select {
	case l.lines <- string(p):
	default:
	}
	return len(p), nil
}

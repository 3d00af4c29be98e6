package virtiofs

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

func TestReadThroughTheWholeDevice(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	node, fh := r.mount()
	for _, size := range []int{1, 100, 4096, 128 << 10, 1 << 20} {
		p := r.must(request, read(node, fh, 0, size))
		if len(p.data) != size || p.data[size-1] != byte((size-1)>>3) {
			t.Errorf("READ of %d bytes gave %d, the last %#x", size, len(p.data), p.data[len(p.data)-1])
		}
	}
	data := bytes.Repeat([]byte("sluice!\n"), 1<<14)
	r.must(request, call{
		op: fuseproto.FUSE_WRITE, node: node, data: data, outArgs: 8,
		args: body(fh, uint64(4096), uint32(len(data)), uint32(0), uint64(0), uint32(0), uint32(0)),
	})
	if p := r.must(request, read(node, fh, 4096, len(data))); !bytes.Equal(p.data, data) {
		t.Error("what was written is not what is read")
	}
}

func TestForgetOnHiprio(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	node, _ := r.mount()
	p := r.do(hiprio, call{op: fuseproto.FUSE_FORGET, node: node, args: body(uint64(1)), noReply: true})
	if p.written != 0 {
		t.Errorf("FORGET has used.len %d, expected 0", p.written)
	}
}

// One avail index covers many requests; the guest is to be notified once for all of them.
func TestBatchNotifiesOnce(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	node, _ := r.mount()
	const n = batch
	q := r.queues[request]
	for _, want := range []int{1, 2, 16, n} {
		r.device.EnableQueue(request, true) // takes the queue's lock: what it has published is counted
		before := r.device.Stats().Queues[request].Notifications
		for range want {
			r.offer(request, getattr(node))
		}
		r.kick(request)
		for done := 0; done < want; {
			awaitFD(t, q.call.Int()) // which may be for what was seen done before
			for {
				head, written, ok := q.Used()
				if !ok {
					break
				}
				r.parse(q, head, written)
				done++
			}
		}
		if got := r.device.Stats().Queues[request].Notifications - before; got != 1 {
			t.Errorf("a batch of %d requests made %d notifications, expected 1", want, got)
		}
	}
}

// However many FORGETs come one by one, the guest is not interrupted for each: but it is, in the end.
func TestForgetsNotifyTogether(t *testing.T) {
	const n = 30 // fewer than hold back too much of the ring
	r := newRig(t, newMem(t), Config{})
	r.mount()
	q := r.queues[hiprio]
	forget := call{op: fuseproto.FUSE_FORGET, node: 2, args: body(uint64(0)), noReply: true}
	r.offer(hiprio, forget)
	r.kick(hiprio)
	r.next(hiprio) // the first of all is notified of whatever it is
	before, began := r.device.Stats().Queues[hiprio].Notifications, time.Now()
	for i := range n {
		at := q.UsedIdx()
		r.offer(hiprio, forget)
		r.kick(hiprio)
		for q.UsedIdx() == at {
			if time.Since(began) > patience {
				t.Fatalf("FORGET %d is not done", i)
			}
			runtime.Gosched()
		}
		q.Used()
		q.EnableInterrupt()
	}
	got, most := r.device.Stats().Queues[hiprio].Notifications-before, uint64(time.Since(began)/hold)+1
	if got > most {
		t.Errorf("%d notifications of %d FORGETs, expected at most %d", got, n, most)
	}
	awaitFD(t, q.call.Int())
}

// watched is the in-memory backend that tells of each GETATTR before it answers.
type watched struct {
	*mem.FS
	getattr func()
}

func (w *watched) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	w.getattr()
	return w.FS.Getattr(c, in, out)
}

// A driver that looks sees what is done of a batch while the rest is served, and offers more.
func TestBatchIsSeenGrowing(t *testing.T) {
	var driver atomic.Pointer[rigQueue]
	seen := make(chan uint16, 3*shown)
	r := newRig(t, &watched{FS: newMem(t), getattr: func() { seen <- driver.Load().UsedIdx() }}, Config{})
	node, _ := r.mount()
	q := r.queues[request]
	before := q.UsedIdx()
	driver.Store(q)
	for range 3 * shown {
		r.offer(request, getattr(node))
	}
	r.kick(request)
	for range 3 * shown {
		r.next(request)
	}
	for i := range 3 * shown {
		if n, want := <-seen-before, uint16(i/shown*shown); n != want {
			t.Errorf("when request %d of a batch is served, %d can be seen done, expected %d", i, n, want)
		}
	}
}

// gate is the in-memory backend whose FSYNC waits.
type gate struct {
	*mem.FS
	entered chan struct{}
	open    chan struct{}
	once    sync.Once
}

func newGate(t *testing.T) *gate {
	g := &gate{FS: newMem(t), entered: make(chan struct{}, 1024), open: make(chan struct{})}
	t.Cleanup(g.release)
	return g
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

func (g *gate) Fsync(c *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	g.entered <- struct{}{}
	<-g.open
	return fsbackend.OK
}

func (g *gate) Fsyncdir(*fsbackend.Context, *fuseproto.FsyncIn) fsbackend.Errno { return fsbackend.OK }

// await waits for n calls to be inside FSYNC.
func (g *gate) await(t *testing.T, n int) {
	t.Helper()
	for range n {
		select {
		case <-g.entered:
		case <-time.After(patience):
			t.Fatal("FSYNC did not get to the backend")
		}
	}
}

func TestSlowRequestHoldsNobodyUp(t *testing.T) {
	g := newGate(t)
	r := newRig(t, g, Config{})
	node, fh := r.mount()
	slow := r.offer(request, fsync(node, fh))
	r.kick(request)
	g.await(t, 1)
	for range 100 {
		r.must(request, getattr(node))
	}
	if p := r.do(hiprio, call{op: fuseproto.FUSE_FORGET, node: node, args: body(uint64(0)), noReply: true}); p.written != 0 {
		t.Errorf("FORGET has used.len %d", p.written)
	}
	g.release()
	if p := r.next(request); p.head != slow || p.errno != 0 || p.written != 16 {
		t.Errorf("FSYNC ended with %+v", p)
	}
}

func TestGetVringBaseDrains(t *testing.T) {
	g := newGate(t)
	r := newRig(t, g, Config{})
	node, fh := r.mount()
	r.offer(request, fsync(node, fh))
	r.kick(request)
	g.await(t, 1)
	base := make(chan uint32)
	go func() {
		b, err := r.fe.GetVringBase(request)
		if err != nil {
			t.Error(err)
		}
		base <- b
	}()
	select {
	case <-base:
		t.Fatal("GET_VRING_BASE did not wait for a request in flight")
	case <-time.After(50 * time.Millisecond): // nothing can be waited for that must not come
	}
	g.release()
	select {
	case b := <-base:
		if b != uint32(r.queues[request].AvailIdx()) {
			t.Errorf("base is %d, expected %d", b, r.queues[request].AvailIdx())
		}
	case <-time.After(patience):
		t.Fatal("GET_VRING_BASE did not return")
	}
	if p := r.next(request); p.written != 16 {
		t.Errorf("the request was not completed before its queue was stopped: %+v", p)
	}
}

// A request that never ends must not hang the VM: QEMU waits for GET_VRING_BASE in its main loop.
func TestGetVringBaseHasADeadline(t *testing.T) {
	g := newGate(t)
	r := newRig(t, g, Config{DrainTimeout: 20 * time.Millisecond})
	node, fh := r.mount()
	r.offer(request, fsync(node, fh))
	r.kick(request)
	g.await(t, 1)
	if _, err := r.fe.GetVringBase(request); err != nil {
		t.Fatal(err)
	}
	if p := r.next(request); p.errno != unix.EIO || p.written != 16 {
		t.Errorf("the request was answered %+v, expected EIO", p)
	}
	// The queue starts again while the call still sleeps, and its late end is nobody's any more.
	q := r.queues[request]
	used := q.UsedIdx()
	r.check(r.fe.SetVringKick(request, q.kick.Int()))
	r.check(r.fe.SetVringCall(request, q.call.Int()))
	r.must(request, getattr(node))
	g.release()
	r.must(request, getattr(node))
	if got := q.UsedIdx() - used; got != 2 {
		t.Errorf("%d requests were completed, expected 2", got)
	}
}

func TestRemovedMemoryWaitsForItsRequests(t *testing.T) {
	g := newGate(t)
	r := newRig(t, g, Config{})
	node, fh := r.mount()
	extra := vhostuser.MemRegion{GuestPhysAddr: 1 << 40, Size: 4096, UserAddr: 1 << 45}
	r.check(r.fe.AddMemReg(vhosttest.Region{MemRegion: extra, FD: r.mem.FD()}))
	r.offer(request, fsync(node, fh))
	r.kick(request)
	g.await(t, 1)
	done := make(chan error)
	go func() { done <- r.fe.RemMemReg(extra) }()
	select {
	case <-done:
		t.Fatal("REM_MEM_REG was acknowledged while a request held the memory")
	case <-time.After(50 * time.Millisecond):
	}
	g.release()
	select {
	case err := <-done:
		r.check(err)
	case <-time.After(patience):
		t.Fatal("REM_MEM_REG was not acknowledged")
	}
	r.next(request)
	r.must(request, getattr(node))
}

func TestRingThatLosesItsMemoryStopsAlone(t *testing.T) {
	r := newRig(t, newMem(t), Config{NumRequestQueues: 2})
	node, _ := r.mount()
	// The second request queue moves to memory of its own.
	region := vhostuser.MemRegion{GuestPhysAddr: 1 << 40, Size: 1 << 20, UserAddr: 1 << 45, MmapOffset: 4096}
	r.check(r.fe.AddMemReg(vhosttest.Region{MemRegion: region, FD: r.mem.FD()}))
	_, err := r.fe.GetVringBase(2)
	r.check(err)
	q := r.queues[2]
	r.check(r.fe.Tell(vhostuser.VHOST_USER_SET_VRING_ADDR, body(uint32(2), uint32(0), region.UserAddr, region.UserAddr+(64<<10), region.UserAddr+(32<<10), uint64(0))))
	r.check(r.fe.SetVringKick(2, q.kick.Int()))
	// Whatever the acknowledgement says, the ring is reported on its err fd and the others go on.
	_ = r.fe.RemMemReg(region)
	awaitFD(t, q.err.Int())
	r.must(request, getattr(node))
	if got := r.device.Stats().RingErrors; got != 1 {
		t.Errorf("%d rings are broken, expected 1", got)
	}
}

func TestTruncatedGuestMemory(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	r.mount()
	kick, errfd := r.queues[request].kick.Int(), r.queues[request].err.Int()
	r.check(r.mem.Truncate(0))
	signal(t, kick)
	awaitFD(t, errfd)
	// The session is whole: the front-end can still talk.
	if _, err := r.fe.GetFeatures(); err != nil {
		t.Errorf("after the guest's memory went: %v", err)
	}
}

// User-Mode Linux passes pipes, and not every one has a reader.
func TestPipesAsKickAndCall(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	var kick, callPipe [2]int
	r.check(unix.Pipe2(kick[:], unix.O_CLOEXEC))
	r.check(unix.Pipe2(callPipe[:], unix.O_CLOEXEC))
	for i := range r.queues {
		_, err := r.fe.GetVringBase(uint32(i))
		r.check(err)
	}
	q := r.queues[request]
	_, _ = q.kick.Close(), q.call.Close()
	q.kick, q.call = sys.NewFD(kick[1]), sys.NewFD(callPipe[0])
	r.start(request, kick[0], callPipe[1])
	r.check(unix.Close(kick[0]))
	r.check(unix.Close(callPipe[1]))
	node, _ := r.mount()
	for range 100 {
		r.must(request, getattr(node))
	}
	// The front-end goes away in part: the kick pipe's end must not make the worker spin, and a full call pipe not block it.
	r.check(q.kick.Close())
	q.kick = eventfd(t)
	r.check(r.fe.SetVringKick(request, q.kick.Int()))
	for range 100 {
		r.must(request, getattr(node))
	}
}

func TestRingWithoutKickIsPolled(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	node, _ := r.mount()
	_, err := r.fe.GetVringBase(request)
	r.check(err)
	r.check(r.fe.SetVringKick(request, -1))
	r.check(r.fe.SetVringCall(request, r.queues[request].call.Int()))
	for range 10 {
		r.offer(request, getattr(node))
		r.queues[request].Kick() // nothing to write to
		if p := r.next(request); p.errno != 0 {
			t.Fatal(p.errno)
		}
	}
}

func TestDisabledQueueFetchesNothing(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	node, _ := r.mount()
	r.check(r.fe.SetVringEnable(request, false))
	r.offer(request, getattr(node))
	r.kick(request)
	// A queue of the same worker answers, after it has seen the kick.
	r.do(hiprio, call{op: fuseproto.FUSE_FORGET, node: node, args: body(uint64(0)), noReply: true})
	if _, _, ok := r.queues[request].Used(); ok {
		t.Error("a disabled queue was served")
	}
	r.check(r.fe.SetVringEnable(request, true))
	if p := r.next(request); p.errno != 0 {
		t.Error(p.errno)
	}
}

func TestRebootsAndReconnectionsLoseNothing(t *testing.T) {
	r := newRig(t, newMem(t), Config{NumRequestQueues: 3})
	r.mount()
	cycle := func(n int) {
		for i := range n {
			switch i % 3 {
			case 0: // QEMU: reset by stopping every ring, RESET_DEVICE any number of times
				for q := range r.queues {
					r.check(r.fe.SetVringEnable(uint32(q), false))
					_, err := r.fe.GetVringBase(uint32(q))
					r.check(err)
				}
				r.check(r.fe.Tell(vhostuser.VHOST_USER_RESET_DEVICE, nil))
				r.check(r.fe.Tell(vhostuser.VHOST_USER_RESET_DEVICE, nil))
				r.check(r.fe.SetFeatures(1<<32 | 1<<30 | 1<<29 | 1<<28))
				r.startRings()
			case 1: // kexec, or another INIT on the same rings
			case 2: // the front-end dies and another comes
				if err := r.disconnect(); err != nil {
					t.Fatalf("an orderly end is reported as %v", err)
				}
				r.connect()
			}
			node, fh := r.mount()
			if p := r.must(request, read(node, fh, 0, 4096)); len(p.data) != 4096 {
				t.Fatalf("READ gave %d bytes", len(p.data))
			}
		}
	}
	cycle(6)
	before := openFDs(t)
	cycle(60)
	if after := openFDs(t); after > before {
		t.Errorf("%d descriptors before 60 reboots and reconnections, %d after", before, after)
	}
}

func TestFrontEndDiesInTheMiddle(t *testing.T) {
	g := newGate(t)
	r := newRig(t, g, Config{DrainTimeout: 20 * time.Millisecond})
	node, fh := r.mount()
	for range 8 {
		r.offer(request, fsync(node, fh))
	}
	r.kick(request)
	g.await(t, 8)
	_ = r.disconnect()
	g.release()
	r.connect()
	node, _ = r.mount()
	r.must(request, getattr(node))
}

// A front-end that fills its own call eventfd makes the next write sleep; its session must end all the same.
func TestFullCallEventfd(t *testing.T) {
	r := newRig(t, newMem(t), Config{DrainTimeout: 20 * time.Millisecond})
	node, _ := r.mount()
	if fd := r.queues[request].call.Int(); readable(t, fd, 0) {
		awaitFD(t, fd)
	}
	var full [8]byte
	binary.LittleEndian.PutUint64(full[:], ^uint64(1))
	if _, err := unix.Write(r.queues[request].call.Int(), full[:]); err != nil {
		t.Fatal(err)
	}
	r.offer(request, getattr(node))
	r.kick(request)
	_ = r.disconnect()
	r.connect()
	r.mount()
}

func TestPoolIsBoundedAndShrinks(t *testing.T) {
	g := newGate(t)
	r := newRig(t, g, Config{PoolThreads: 3})
	node, fh := r.mount()
	for range 20 {
		r.offer(request, fsync(node, fh))
	}
	r.kick(request)
	g.await(t, 3)
	r.must(request, getattr(node))
	if n := len(g.entered); n != 0 {
		t.Errorf("%d more calls run at once than the pool has threads", n)
	}
	g.release()
	for range 20 {
		if p := r.next(request); p.errno != 0 {
			t.Error(p.errno)
		}
	}
}

func TestConfigSpace(t *testing.T) {
	d, _ := newDevice(t, newMem(t), Config{Tag: strings.Repeat("t", TagSize), NumRequestQueues: 3})
	defer d.Close()
	if got := d.ConfigSpace(); len(got) != 40 || binary.LittleEndian.Uint32(got[36:]) != 3 || got[35] != 't' {
		t.Errorf("config space % x", got)
	}
	for _, tag := range []string{strings.Repeat("t", 37), "a\nb", "a\x00b", "\xff"} {
		if err := ValidateTag(tag); err == nil {
			t.Errorf("tag %q is taken", tag)
		}
	}
}

// allocs sends one of queue i's chains again and again and counts the allocations for each.
func (r *rig) allocs(i int) float64 {
	q := r.queues[i]
	counter := make([]byte, 8)
	return testing.AllocsPerRun(200, func() {
		for head := range q.chains {
			q.OfferHead(head)
			break
		}
		if q.Kick() {
			_, _ = unix.Write(q.kick.Int(), one)
		}
		for {
			if _, _, ok := q.Used(); ok {
				return
			}
			if !q.EnableInterrupt() {
				_, _ = unix.Read(q.call.Int(), counter)
			}
		}
	})
}

func TestRequestsDoNotAllocate(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	node, fh := r.mount()
	q := r.queues[request]
	for _, c := range []call{read(node, fh, 0, 4096), read(node, fh, 0, 1<<20), write(node, fh, make([]byte, 4096)), getattr(node)} {
		r.offer(request, c)
		r.kick(request)
		r.next(request)
		if allocs := r.allocs(request); allocs != 0 {
			t.Errorf("%v: %v allocations for each request, expected none", c.op, allocs)
		}
		clear(q.chains)
	}
}

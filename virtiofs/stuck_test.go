package virtiofs

import (
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// slowDisk is a gate whose LOOKUPs and WRITEs wait as well, while it is shut: calls that workers make themselves.
type slowDisk struct {
	*gate
	shut    atomic.Bool
	onPool  atomic.Int32 // of those, on threads that may sleep
	inCalls atomic.Int32
}

func newSlowDisk(t *testing.T) *slowDisk {
	return &slowDisk{gate: newGate(t)}
}

func (d *slowDisk) pass(c *fsbackend.Context) {
	if !d.shut.Load() {
		return
	}
	if c.MayBlock {
		d.onPool.Add(1)
	}
	d.inCalls.Add(1)
	defer d.inCalls.Add(-1)
	d.entered <- struct{}{}
	<-d.open
}

func (d *slowDisk) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	d.pass(c)
	return d.FS.Lookup(c, parent, name, out)
}

func (d *slowDisk) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, fsbackend.Errno) {
	d.pass(c)
	return d.FS.Write(c, in, src)
}

func lookupFile() call {
	return call{op: fuseproto.FUSE_LOOKUP, node: 1, args: body("file"), outArgs: 128}
}

// A call that workers make themselves and that hangs holds neither its queue up nor hiprio, nor do more of its kind.
func TestStuckCallIsRelieved(t *testing.T) {
	d := newSlowDisk(t)
	r := newRig(t, d, Config{})
	node, fh := r.mount()
	d.shut.Store(true)
	first := r.offer(request, write(node, fh, []byte("abc")))
	last := r.offer(request, getattr(node)) // in the same batch, behind it
	r.kick(request)
	d.await(t, 1)
	if p := r.next(request); p.head != last || p.errno != 0 {
		t.Fatalf("behind a WRITE that hangs: %+v", p)
	}
	for range 100 {
		r.must(request, getattr(node))
		r.must(request, read(node, fh, 0, 4096))
	}
	r.do(hiprio, call{op: fuseproto.FUSE_FORGET, node: node, args: body(uint64(0)), noReply: true})
	if s := r.device.Stats(); s.Relieved == 0 || s.SlowOpcodes == 0 || s.Queues[request].Depth != 1 {
		t.Errorf("with a WRITE that hangs: %+v", s)
	}
	// The next ones do not even get to the worker, but for one if it has taken so long until they come.
	heads := []uint16{first}
	for range 10 {
		heads = append(heads, r.offer(request, write(node, fh, []byte("def"))))
	}
	heads = append(heads, r.offer(request, lookupFile())) // which is another opcode
	r.kick(request)
	d.await(t, 11)
	r.must(request, getattr(node))
	s := r.device.Stats()
	if s.Avoided < 9 || d.onPool.Load() < 9 {
		t.Errorf("%d WRITEs went to the pool at once, %d were made there, expected 9 or 10: %+v", s.Avoided, d.onPool.Load(), s)
	}
	d.release()
	for range heads {
		p := r.next(request)
		if i := slices.Index(heads, p.head); i < 0 || p.errno != 0 || p.written == 0 {
			t.Fatalf("after the hang: %+v", p)
		}
	}
	d.shut.Store(false)
	r.must(request, write(node, fh, []byte("x")))
	if !r.device.strays.wait(patience) {
		t.Error("a thread is still astray")
	}
}

// As many threads as the pool may have hang, and no more: then the queue waits.
func TestStraysAreBounded(t *testing.T) {
	d := newSlowDisk(t)
	r := newRig(t, d, Config{PoolThreads: 2})
	node, _ := r.mount()
	d.shut.Store(true)
	const n = 4
	for range n {
		r.offer(request, lookupFile())
	}
	r.offer(request, getattr(node))
	r.kick(request)
	d.await(t, 1)
	r.next(request) // GETATTR overtakes them all: the others are the pool's
	if s := r.device.Stats(); s.Relieved > 2 {
		t.Errorf("%d workers were relieved, expected at most the pool's threads", s.Relieved)
	}
	d.release()
	for range n {
		if p := r.next(request); p.errno != 0 {
			t.Fatalf("after the hang: %+v", p)
		}
	}
}

// A queue that is stopped with a call stuck gives it up: what it says when it returns, the queue's next run does not hear.
func TestStopWhileStuck(t *testing.T) {
	for _, relief := range []bool{true, false} {
		d := newSlowDisk(t)
		r := &rig{t: t, num: 256}
		r.device, r.server = newDevice(t, d, Config{DrainTimeout: 100 * time.Millisecond})
		r.connect()
		node, fh := r.mount()
		d.shut.Store(true)
		r.offer(request, write(node, fh, []byte("abc")))
		r.kick(request)
		d.await(t, 1)
		if relief {
			r.awaitStats("relief", func(s Stats) bool { return s.Relieved == 1 })
		}
		if _, err := r.fe.GetVringBase(request); err != nil {
			t.Fatal(err)
		}
		if n := r.device.Stats().Abandoned; n != 1 {
			t.Errorf("%d requests were given up, expected 1", n)
		}
		q := r.queues[request]
		fresh, err := vqtest.New(vqtest.Config{Num: r.num, Features: rigFeatures, Memory: r.mem})
		r.check(err)
		q.Driver = fresh
		r.start(request, q.kick.Int(), q.call.Int())
		r.must(request, getattr(node))
		d.release()
		for d.inCalls.Load() > 0 {
			time.Sleep(time.Millisecond)
		}
		for range 100 {
			r.must(request, getattr(node)) // and nothing else is answered
		}
		r.disconnect()
		r.check(r.device.Close())
	}
}

// A device is closed though a call hangs: its thread is left behind, and the backend stays open for it.
func TestCloseWhileStuck(t *testing.T) {
	d := newSlowDisk(t)
	r := &rig{t: t, num: 256}
	r.device, r.server = newDevice(t, d, Config{DrainTimeout: 50 * time.Millisecond})
	r.connect()
	node, fh := r.mount()
	d.shut.Store(true)
	r.offer(request, write(node, fh, []byte("abc")))
	r.kick(request)
	d.await(t, 1)
	r.disconnect()
	if err := r.device.Close(); err == nil {
		t.Error("closed, though a call hangs")
	}
	d.release()
	if !r.device.strays.wait(patience) {
		t.Error("the thread did not end with its call")
	}
	r.check(r.server.Close())
}

// One that only takes its time, again and again, is the pool's for a while, and then the worker's again.
func TestSlowOpcode(t *testing.T) {
	var s scores
	slow := func(took time.Duration) bool { return s.note(uint32(fuseproto.FUSE_WRITE), took) }
	if slow(time.Minute) || slow(0) || slow(slowCall) || slow(0) || !slow(slowCall) || slow(slowCall) {
		t.Error("expected the third slow call to make the opcode slow, and not the fourth")
	}
	for range slowScore {
		if slow(0) {
			t.Error("a fast call makes the opcode slow")
		}
	}
	if s.some != 0 || slow(slowCall) {
		t.Error("a slow call is remembered for ever")
	}
	if s.note(opcodes, time.Hour) || s.note(1<<31, time.Hour) {
		t.Error("an opcode that there is not is slow")
	}

	var d slowness
	const op = uint32(fuseproto.FUSE_WRITE)
	if d.avoids(op) || d.avoids(1<<31) {
		t.Error("avoided without a reason")
	}
	for _, never := range []fuseproto.Opcode{fuseproto.FUSE_FORGET, fuseproto.FUSE_BATCH_FORGET, fuseproto.FUSE_INTERRUPT, opcodes, 1 << 31} {
		if d.add(uint32(never)); d.count() != 0 {
			t.Errorf("%v is given to the pool", never)
		}
	}
	for want := minAvoid; want < 2*maxAvoid; want *= 2 {
		d.add(op)
		if !d.avoids(op) || d.avoids(op+1) || d.count() != 1 {
			t.Error("expected this opcode to be avoided, and no other")
		}
		if got := d.span[op]; got != min(want, maxAvoid) {
			t.Errorf("avoided for %v, expected %v", got, min(want, maxAvoid))
		}
		d.until[op] = 0 // over
		if d.avoids(op) || d.count() != 0 {
			t.Error("avoided after its time")
		}
		d.until[op] = fuseserver.Clock()
	}
}

// The watch sleeps while nothing is asked for, and is not woken by each request.
func TestWatchSleeps(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	node, _ := r.mount()
	w := r.device.pool.watch
	for range 3 {
		r.must(request, getattr(node))
		for deadline := time.Now().Add(patience); !w.asleep.Load(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the watch looks for ever with nothing to see")
			}
		}
	}
	if p := r.do(request, call{op: 999}); p.errno != unix.ENOSYS {
		t.Errorf("opcode 999: %v", p.errno)
	}
}

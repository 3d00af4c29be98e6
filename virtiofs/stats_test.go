package virtiofs

import (
	"maps"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
)

// awaitStats waits for the device's counts to be as ok wants them, and returns them.
func (r *rig) awaitStats(what string, ok func(Stats) bool) Stats {
	r.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s := r.device.Stats()
		if ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%s: counts stay at %+v", what, s)
		}
	}
}

// step sends c on queue i and has every signal of it accounted for: of ours, and of the device's, which it returns.
func (r *rig) step(i int, c call, kicks uint64) (p reply, calls uint64) {
	r.t.Helper()
	q := r.queues[i]
	r.offer(i, c)
	if !q.Kick() {
		r.t.Fatal("the device wants no kick, though it has nothing to do")
	}
	signal(r.t, q.kick.Int())
	for {
		if head, written, ok := q.Used(); ok {
			p = r.parse(q, head, written)
			break
		}
		if !q.EnableInterrupt() {
			calls += awaitFD(r.t, q.call.Int())
		}
	}
	r.awaitStats("kicks", func(s Stats) bool { return s.Queues[i].Kicks == kicks })
	// The worker takes the kick before it asks for the next one.
	for q.AvailEvent() != q.AvailIdx() {
		time.Sleep(time.Millisecond)
	}
	return p, calls
}

func TestStats(t *testing.T) {
	g := newGate(t) // for its FSYNC
	g.release()
	r := &rig{t: t, num: 256}
	r.device, r.server = newDevice(t, g, Config{})
	t.Cleanup(func() { r.check(r.device.Close()) })
	if s := r.device.Stats(); s.Connected || s.FrontEnds != 0 || s.Requests.Session || len(s.Queues) != 2 || s.Queues[request].Size != 0 {
		t.Errorf("before the first front-end: %+v", s)
	}
	r.connect()
	connected := r.device.Stats()
	if !connected.Connected || connected.FrontEnds != 1 || connected.Requests.Session || connected.Queues[request].Size != 256 {
		t.Errorf("with a front-end: %+v", connected)
	}

	kicks, calls := uint64(0), uint64(0)
	do := func(c call, want unix.Errno) reply {
		t.Helper()
		kicks++
		p, n := r.step(request, c, kicks)
		calls += n
		if p.errno != want {
			t.Fatalf("%v: %v, expected %v", c.op, p.errno, want)
		}
		return p
	}
	do(initCall(), 0)
	p := do(call{op: fuseproto.FUSE_LOOKUP, node: 1, args: body("file"), outArgs: 128}, 0)
	node := le64(p.data)
	fh := le64(do(call{op: fuseproto.FUSE_OPEN, node: node, args: body(uint32(unix.O_RDWR), uint32(0)), outArgs: 16}, 0).data)
	for range 5 {
		do(read(node, fh, 0, 4096), 0)
	}
	do(read(node, fh, 1<<20-100, 4096), 0) // ends with the file
	do(write(node, fh, []byte("abc")), 0)
	do(call{op: fuseproto.FUSE_LOOKUP, node: 1, args: body("nothing"), outArgs: 128}, unix.ENOENT)
	do(read(node, fh+1, 0, 4096), unix.EBADF)
	do(fsync(node, fh), 0) // by way of the pool
	if p, n := r.step(hiprio, call{op: fuseproto.FUSE_FORGET, node: node, args: body(uint64(0)), noReply: true}, 1); p.written != 0 || n > 1 {
		t.Errorf("FORGET wrote %d bytes and made %d notifications", p.written, n)
	}
	for calls < r.device.Stats().Queues[request].Notifications {
		calls += awaitFD(t, r.queues[request].call.Int())
	}

	s := r.device.Stats()
	if !s.Requests.Session {
		t.Error("no session after INIT")
	}
	q := s.Queues[request]
	if q.Kicks != 13 || q.Notifications != calls || q.Notifications == 0 || q.Depth != 0 {
		t.Errorf("13 requests, %d signals: %+v", calls, q)
	}
	if readable(t, r.queues[request].call.Int(), 0) {
		t.Error("a notification was not counted")
	}
	type want struct {
		count  uint64
		errors map[fuseserver.Errno]uint64
	}
	wants := map[fuseproto.Opcode]want{
		fuseproto.FUSE_INIT:   {1, nil},
		fuseproto.FUSE_LOOKUP: {2, map[fuseserver.Errno]uint64{unix.ENOENT: 1}},
		fuseproto.FUSE_OPEN:   {1, nil},
		fuseproto.FUSE_READ:   {7, map[fuseserver.Errno]uint64{unix.EBADF: 1}},
		fuseproto.FUSE_WRITE:  {1, nil},
		fuseproto.FUSE_FSYNC:  {1, nil},
		fuseproto.FUSE_FORGET: {1, nil},
	}
	for _, op := range s.Requests.Ops {
		if w := wants[op.Opcode]; op.Count != w.count || !maps.Equal(op.Errors, w.errors) || op.Nanoseconds == 0 {
			t.Errorf("%v: %d requests in %d ns, errors %v, expected %+v", op.Opcode, op.Count, op.Nanoseconds, op.Errors, w)
		}
	}
	if len(s.Requests.Ops) != len(wants) {
		t.Errorf("%d opcodes, expected %d", len(s.Requests.Ops), len(wants))
	}
	if s.Requests.BytesRead != 5*4096+100 || s.Requests.BytesWritten != 3 {
		t.Errorf("%d bytes read, %d written, expected %d and 3", s.Requests.BytesRead, s.Requests.BytesWritten, 5*4096+100)
	}

	_ = r.disconnect()
	if s := r.device.Stats(); s.Connected || s.FrontEnds != 1 || s.Requests.Session || s.Queues[request].Size != 0 || s.Queues[request].Kicks != 13 {
		t.Errorf("after the front-end: %+v", s)
	}
}

func TestStatsDepth(t *testing.T) {
	g := newGate(t)
	r := newRig(t, g, Config{})
	node, fh := r.mount()
	const n = 3
	for range n {
		r.offer(request, fsync(node, fh))
	}
	r.kick(request)
	g.await(t, n)
	r.awaitStats("depth", func(s Stats) bool { return s.Queues[request].Depth == n && s.Queues[hiprio].Depth == 0 })
	g.release()
	for range n {
		r.next(request)
	}
	if d := r.device.Stats().Queues[request].Depth; d != 0 {
		t.Errorf("depth %d with nothing to do, expected 0", d)
	}
}

// A ring without a kick fd is looked at again and again; one that has it rests.
func TestStatsPolls(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	node, _ := r.mount()
	r.awaitStats("rest", func(s Stats) bool { // kicks of mount may be on their way
		time.Sleep(20 * time.Millisecond)
		return r.device.Stats().Queues[request] == s.Queues[request]
	})
	if _, err := r.fe.GetVringBase(request); err != nil {
		t.Fatal(err)
	}
	r.start(request, -1, r.queues[request].call.Int())
	before := r.device.Stats().Queues[request]
	after := r.awaitStats("polls", func(s Stats) bool { return s.Queues[request].Polls >= before.Polls+20 }).Queues[request]
	r.offer(request, getattr(node))
	r.queues[request].Kick() // nothing to write to
	r.next(request)
	if after.Kicks != before.Kicks {
		t.Errorf("%d kicks without a kick fd", after.Kicks-before.Kicks)
	}
}

// Snapshots are taken while the queues are at work and sessions come and go.
func TestStatsRace(t *testing.T) {
	r := newRig(t, newMem(t), Config{NumRequestQueues: 2})
	stop := make(chan struct{})
	var watchers sync.WaitGroup
	for range 2 {
		watchers.Go(func() {
			last := uint64(0)
			for {
				select {
				case <-stop:
					return
				default:
				}
				n := getattrs(r.device.Stats())
				if n < last {
					t.Errorf("%d requests after %d", n, last)
				}
				last = n
			}
		})
	}
	const sessions, batches = 2, 5
	for session := range sessions {
		if session > 0 {
			_ = r.disconnect()
			r.connect()
		}
		node, _ := r.mount()
		for range batches {
			for i := range 2 * batch {
				r.offer(request+i%2, getattr(node))
			}
			for i := range 2 {
				r.kick(request + i)
			}
			for i := range 2 * batch {
				r.next(request + i%2)
			}
		}
	}
	close(stop)
	watchers.Wait()
	if n := getattrs(r.device.Stats()); n != sessions*batches*2*batch {
		t.Errorf("%d requests, expected %d", n, sessions*batches*2*batch)
	}
}

// getattrs returns the number of GETATTRs.
func getattrs(s Stats) uint64 {
	for _, op := range s.Requests.Ops {
		if op.Opcode == fuseproto.FUSE_GETATTR {
			return op.Count
		}
	}
	return 0
}

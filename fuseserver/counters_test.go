package fuseserver

import (
	"maps"
	"math"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func TestBucket(t *testing.T) {
	for i, bound := range LatencyBounds {
		for _, tt := range []struct {
			ns   uint64
			want int
		}{{bound - 1, i}, {bound, i}, {bound + 1, i + 1}} {
			if got := bucket(tt.ns); got != tt.want {
				t.Errorf("%d ns are in bucket %d, expected %d", tt.ns, got, tt.want)
			}
		}
	}
	for ns, want := range map[uint64]int{0: 0, 1: 0, 16e9: latencyBuckets - 1, math.MaxUint64: latencyBuckets - 1} {
		if got := bucket(ns); got != want {
			t.Errorf("%d ns are in bucket %d, expected %d", ns, got, want)
		}
	}
}

// ops returns what g's server has counted, by opcode.
func (g *guest) ops() map[fuseproto.Opcode]OpStats {
	found := make(map[fuseproto.Opcode]OpStats)
	for _, op := range g.s.Snapshot().Ops {
		found[op.Opcode] = op
	}
	return found
}

func TestCounters(t *testing.T) {
	g := newGuest(t, Config{})
	if snap := g.s.Snapshot(); snap.Session || len(snap.Ops) != 0 {
		t.Fatalf("before the first request: %+v", snap)
	}
	lookup := message(fuseproto.FUSE_LOOKUP, 1, "name\x00")
	read := message(fuseproto.FUSE_READ, 1, uint64(9), uint64(0), uint32(4096), make([]byte, 20))
	write := message(fuseproto.FUSE_WRITE, 1, uint64(9), uint64(0), uint32(8), make([]byte, 20), "12345678")

	g.fails(lookup, ErrNoSession)
	g.mount(allFlags)
	for range 3 {
		g.fails(lookup, 0)
	}
	for range 2 {
		g.b.errno = syscall.ENOENT
		g.fails(lookup, syscall.ENOENT)
	}
	g.b.errno = 300 // none of Linux's
	g.fails(lookup, 300)
	g.b.errno = errnoMax + 3 // no guest may see it
	g.fails(lookup, syscall.EIO)
	g.b.errno = 0
	g.fails(read, 0)
	g.b.take = 5
	g.fails(write, 0)
	g.b.take = 0
	g.r.Counters = g.s.NewCounters() // go on elsewhere
	g.fails(read, 0)
	g.fails(write, 0)
	g.b.errno = syscall.EIO
	g.fails(read, syscall.EIO)
	g.b.errno = 0
	g.do(message(fuseproto.FUSE_FORGET, 5, uint64(1)))
	g.do(message(fuseproto.FUSE_FORGET, 5)) // malformed, but nobody is told
	g.fails(message(fuseproto.FUSE_BMAP, 1, make([]byte, 16)), syscall.ENOSYS)
	for _, opcode := range []fuseproto.Opcode{7, fuseproto.Opcode(opcodes), fuseproto.CUSE_INIT, math.MaxUint32} {
		g.fails(message(opcode, 1), syscall.ENOSYS)
	}
	g.do([]byte("short"))
	if reply := g.raw(lookup, 8); reply != nil {
		t.Errorf("a reply of %d bytes where there is no room", len(reply))
	}

	if !g.s.Snapshot().Session {
		t.Error("no session after INIT")
	}
	type want struct {
		count  uint64
		errors map[Errno]uint64
	}
	wants := map[fuseproto.Opcode]want{
		0:                     {5, map[Errno]uint64{syscall.ENOSYS: 4}},
		fuseproto.FUSE_INIT:   {1, nil},
		fuseproto.FUSE_LOOKUP: {9, map[Errno]uint64{ErrNoSession: 1, syscall.ENOENT: 2, 0: 1, syscall.EIO: 1}},
		fuseproto.FUSE_READ:   {3, map[Errno]uint64{syscall.EIO: 1}},
		fuseproto.FUSE_WRITE:  {2, nil},
		fuseproto.FUSE_FORGET: {2, nil},
		fuseproto.FUSE_BMAP:   {1, map[Errno]uint64{syscall.ENOSYS: 1}},
	}
	got := g.ops()
	for opcode, w := range wants {
		if op := got[opcode]; op.Count != w.count || !maps.Equal(op.Errors, w.errors) {
			t.Errorf("%v: %d requests, errors %v, expected %d, %v", opcode, op.Count, op.Errors, w.count, w.errors)
		}
	}
	if len(got) != len(wants) {
		t.Errorf("%d opcodes are counted, expected %d: %v", len(got), len(wants), got)
	}
	snap := g.s.Snapshot()
	if n, size := snap.BytesRead, uint64(2*len(g.b.readData)); n != size {
		t.Errorf("%d bytes read, expected %d", n, size)
	}
	if n := snap.BytesWritten; n != 5+8 {
		t.Errorf("%d bytes written, expected 13", n)
	}
	if f := snap.Faults; f.NoSession != 1 || f.NoRoom != 1 || f.Unsupported != 5 || f.Malformed != 2 || f.BadReplies != 1 {
		t.Errorf("faults %+v", f)
	}
	g.s.Reset()
	if g.s.Snapshot().Session {
		t.Error("a session after Reset")
	}
}

// Latency runs from Fetched, and without it from Begin, to the answer.
func TestLatency(t *testing.T) {
	getattr := message(fuseproto.FUSE_GETATTR, 1, make([]byte, 16))
	g := mounted(t, Config{})
	step := func(fetched time.Duration) OpStats {
		t.Helper()
		before := g.ops()[fuseproto.FUSE_GETATTR]
		g.r.Fetched = fetched
		g.fails(getattr, 0)
		after := g.ops()[fuseproto.FUSE_GETATTR]
		after.Nanoseconds -= before.Nanoseconds
		for i := range after.Latency {
			after.Latency[i] -= before.Latency[i]
		}
		return after
	}
	if op := step(Clock() - 100*time.Second); op.Latency[latencyBuckets-1] != 1 || op.Nanoseconds < 100e9 || op.Nanoseconds > 200e9 {
		t.Errorf("a request fetched 100 s ago is counted as %+v", op)
	}
	if op := step(Clock() + time.Hour); op.Latency[0] != 1 || op.Nanoseconds != 0 {
		t.Errorf("a request fetched in the future is counted as %+v", op)
	}
	ended := g.r.Ended
	if op := step(0); op.Nanoseconds == 0 || time.Duration(op.Nanoseconds) > g.r.Ended-ended {
		t.Errorf("a request that was fetched at Begin took %d ns, expected at most %v", op.Nanoseconds, g.r.Ended-ended)
	}
}

// What goes to another thread is counted there, once, with the time that it waited.
func TestLatencyOfWaits(t *testing.T) {
	g := mounted(t, Config{Backend: newStub()})
	g.b.errno = fsbackend.ErrMayBlock
	g.begin(message(fuseproto.FUSE_GETATTR, 1, make([]byte, 16)), 4096)
	if _, done := g.s.Handle(g.r); done {
		t.Fatal("done, though it might sleep")
	}
	if op, ok := g.ops()[fuseproto.FUSE_GETATTR]; ok || g.r.Ended != 0 {
		t.Errorf("counted as %+v, ended at %v, before it is done", op, g.r.Ended)
	}
	const wait = 3 * time.Millisecond
	for begun := Clock(); Clock() < begun+wait; {
	}
	g.b.errno, g.r.MayBlock = 0, true
	if _, done := g.s.Handle(g.r); !done || g.r.Ended == 0 {
		t.Fatalf("done is %v, ended at %v", done, g.r.Ended)
	}
	op := g.ops()[fuseproto.FUSE_GETATTR]
	if op.Count != 1 || op.Nanoseconds < uint64(wait) {
		t.Errorf("%d requests of %d ns, expected 1 of at least %d", op.Count, op.Nanoseconds, wait)
	}
}

func TestAbortIsCountedOnce(t *testing.T) {
	g := mounted(t, Config{})
	g.b.hook = func(string, *fsbackend.Context) { g.r.Abort(syscall.EINTR) }
	g.begin(message(fuseproto.FUSE_GETATTR, 1, make([]byte, 16)), 4096)
	if written, done := g.s.Handle(g.r); written != 0 || !done || g.r.Ended != 0 {
		t.Errorf("Handle wrote %d bytes, done %v, at %v, expected Abort to have answered", written, done, g.r.Ended)
	}
	g.b.hook = nil
	op := g.ops()[fuseproto.FUSE_GETATTR]
	if op.Count != 1 || !maps.Equal(op.Errors, map[Errno]uint64{syscall.EINTR: 1}) {
		t.Errorf("%d requests, errors %v, expected one of EINTR", op.Count, op.Errors)
	}
}

// Threads with counters of their own and with shared ones, which also take snapshots: none is lost, none goes back.
func TestCountersRace(t *testing.T) {
	const threads, requests, every = 4, 20_000, 1000
	b := newStub()
	b.quiet = true
	g := mounted(t, Config{Backend: b})
	msg := message(fuseproto.FUSE_GETATTR, 1, make([]byte, 16))
	var busy sync.WaitGroup
	for i := range threads {
		r := g.s.NewRequest()
		if i%2 == 0 {
			r.Counters = g.s.NewCounters()
		}
		busy.Go(func() {
			readable, _ := vector(msg, onePiece)
			writable, _ := vector(make([]byte, 256), onePiece)
			in, out := make([]unix.Iovec, 1), make([]unix.Iovec, 1)
			var last OpStats
			for i := range requests {
				copy(in, readable)
				copy(out, writable)
				g.s.Begin(r, in, out, uint64(len(msg)), 256)
				if _, done := g.s.Handle(r); !done {
					t.Error("not done")
				}
				if i%every != 0 {
					continue
				}
				op := g.ops()[fuseproto.FUSE_GETATTR]
				if op.Count <= last.Count || op.Nanoseconds <= last.Nanoseconds {
					t.Errorf("%d requests of %d ns after %d of %d", op.Count, op.Nanoseconds, last.Count, last.Nanoseconds)
				}
				last = op
			}
		})
	}
	busy.Wait()
	if n := g.ops()[fuseproto.FUSE_GETATTR].Count; n != threads*requests {
		t.Errorf("%d requests are counted, expected %d", n, threads*requests)
	}
}

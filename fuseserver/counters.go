package fuseserver

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// LatencyBounds are the upper bounds of OpStats.Latency's buckets but the last, in nanoseconds: doubling within thousands.
var LatencyBounds = [24]uint64{
	1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 256_000, 512_000,
	1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000, 64_000_000, 128_000_000, 256_000_000, 512_000_000,
	1_000_000_000, 2_000_000_000, 4_000_000_000, 8_000_000_000,
}

const latencyBuckets = len(LatencyBounds) + 1

// bucket returns the index of the bucket for a latency of ns nanoseconds, without a search: as many doublings of 1, 1,000
// or 1,000,000 microseconds as it takes.
func bucket(ns uint64) int {
	const perUnit = 10 // bounds from one unit to the next
	below := max(ns, 1) - 1
	switch {
	case ns <= LatencyBounds[perUnit-1]:
		return bits.Len64(below / 1e3)
	case ns <= LatencyBounds[2*perUnit-1]:
		return perUnit + bits.Len64(below/1e6)
	default:
		return min(2*perUnit+bits.Len64(below/1e9), latencyBuckets-1)
	}
}

// Clock is the time that latencies are measured by, since an arbitrary moment before. It is monotonic, and half as dear as
// time.Now.
func Clock() time.Duration { return time.Since(start) }

var start = time.Now()

// knownErrnos is one more than the largest errno there is (Linux include/uapi/asm-generic/errno.h: EHWPOISON). A backend can
// make up others up to errnoMax, which are counted together.
const knownErrnos = 134

// Counters are what one thread counts of the requests that it answers: no two threads that are to be fast share them, or a
// cache line of theirs. Room for an opcode is made when its first request comes, so that an idle share has next to none.
type Counters struct {
	shard uint8                               // fsbackend.Context.Shard of its requests
	ops   [opcodes]atomic.Pointer[opCounters] // by opcode; see OpStats.Opcode
}

// opCounters fill four cache lines, and Go's allocator begins each of this size on one. What every request writes is in front.
type opCounters struct {
	nanoseconds atomic.Uint64
	bytes       atomic.Uint64 // of data, for READ and WRITE
	errors      atomic.Pointer[[knownErrnos]atomic.Uint64]
	latency     [latencyBuckets]atomic.Uint64
	_           [32]byte
}

// NewCounters returns counters for one thread's requests; see Request.Counters. They stay the Server's: make them once for
// a thread that lives as long.
func (s *Server) NewCounters() *Counters {
	s.countersMu.Lock()
	defer s.countersMu.Unlock()
	c := &Counters{shard: uint8(len(s.counters))}
	s.counters = append(s.counters, c)
	return c
}

func (c *Counters) op(slot uint16) *opCounters {
	p := &c.ops[slot]
	if o := p.Load(); o != nil {
		return o
	}
	p.CompareAndSwap(nil, new(opCounters))
	return p.Load()
}

func (o *opCounters) addError(errno Errno) {
	e := o.errors.Load()
	if e == nil {
		o.errors.CompareAndSwap(nil, new([knownErrnos]atomic.Uint64))
		e = o.errors.Load()
	}
	if errno >= knownErrnos {
		errno = 0
	}
	e[errno].Add(1)
}

// count counts r, which has just been answered with errno in so many bytes (0: not at all), and returns the time. It is
// called once for a request, by whoever has changed its state.
func (r *Request) count(errno Errno, written uint32) (now time.Duration) {
	now = Clock()
	c := r.Counters
	if c == nil {
		c = r.server.shared
	}
	o := c.op(r.slot)
	ns := uint64(max(now-r.fetched, 0))
	o.latency[bucket(ns)].Add(1)
	o.nanoseconds.Add(ns)
	switch {
	case written == 0:
	case errno != fsbackend.OK:
		o.addError(errno)
	case r.slot == uint16(fuseproto.FUSE_READ):
		o.bytes.Add(uint64(written - headerSize))
	case r.slot == uint16(fuseproto.FUSE_WRITE):
		o.bytes.Add(uint64(out[fuseproto.WriteOut](r).Size))
	}
	return now
}

// Snapshot is what a Server has counted since it was made. What came while it was taken is in it, in part of it, or not.
type Snapshot struct {
	// Session says that there is one: a guest has mounted the file system.
	Session bool
	// Ops are the requests by opcode, of those that have come, in the order of their numbers.
	Ops []OpStats
	// BytesRead and BytesWritten are the data in answers to READ, and taken as answers to WRITE say.
	BytesRead, BytesWritten uint64
	// Faults are the present values of Stats.
	Faults Faults
	// Backend is what the backend holds, if it is a fsbackend.Statser.
	Backend fsbackend.Stats
}

// OpStats are the requests of one opcode that are over.
type OpStats struct {
	// Opcode is 0 for all that are not in fuse.h, for CUSE_INIT, and for requests too short for one.
	Opcode fuseproto.Opcode
	Count  uint64
	// Errors are the answers that were errors; 0 stands for errnos that Linux has not. Requests that have no answer are not
	// in it, whatever came of them.
	Errors map[Errno]uint64
	// Latency counts requests by the time from their being fetched to their being answered: element i those that took at
	// most LatencyBounds[i] and more than the one before, the last those above all.
	Latency [latencyBuckets]uint64
	// Nanoseconds is the sum of these times.
	Nanoseconds uint64
}

// Faults are Stats as values.
type Faults struct {
	Malformed, NoRoom, NoSession, InitRefused, Unsupported, Faults, Aborted, BadReplies, Panics uint64
}

func (s *Stats) load() Faults {
	return Faults{
		Malformed: s.Malformed.Load(), NoRoom: s.NoRoom.Load(), NoSession: s.NoSession.Load(),
		InitRefused: s.InitRefused.Load(), Unsupported: s.Unsupported.Load(), Faults: s.Faults.Load(),
		Aborted: s.Aborted.Load(), BadReplies: s.BadReplies.Load(), Panics: s.Panics.Load(),
	}
}

// Snapshot returns the present counts. It may be called from any thread at any time, and holds up no request.
func (s *Server) Snapshot() Snapshot {
	snap := Snapshot{Session: s.session.Load() != nil, Faults: s.stats.load()}
	if s.backend.Statser != nil {
		snap.Backend = s.backend.Statser.Stats()
	}
	s.countersMu.Lock()
	counters := s.counters
	s.countersMu.Unlock()
	for slot := range opcodes {
		op := OpStats{Opcode: fuseproto.Opcode(slot)}
		bytes := uint64(0)
		for _, c := range counters {
			if o := c.ops[slot].Load(); o != nil {
				op.add(o)
				bytes += o.bytes.Load()
			}
		}
		if op.Count > 0 {
			snap.Ops = append(snap.Ops, op)
		}
		switch op.Opcode {
		case fuseproto.FUSE_READ:
			snap.BytesRead = bytes
		case fuseproto.FUSE_WRITE:
			snap.BytesWritten = bytes
		}
	}
	return snap
}

func (s *OpStats) add(o *opCounters) {
	for i := range o.latency {
		n := o.latency[i].Load()
		s.Latency[i] += n
		s.Count += n
	}
	s.Nanoseconds += o.nanoseconds.Load()
	errors := o.errors.Load()
	if errors == nil {
		return
	}
	for errno := range errors {
		if n := errors[errno].Load(); n > 0 {
			if s.Errors == nil {
				s.Errors = make(map[Errno]uint64)
			}
			s.Errors[Errno(errno)] += n
		}
	}
}

package virtiofs

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
)

const (
	// callTick is how often the watch looks at the workers' calls: one that it meets twice is stuck.
	callTick = 20 * time.Millisecond
	// lateness is how late the watch may come and still believe that a call has had its CPU.
	lateness = callTick / 2
	// slowCall is how long a call takes that has slept, or has lost its CPU.
	slowCall = 2 * time.Millisecond
	// slowScore is what each such call counts, from which each other one takes 1. Three that are close make an opcode slow:
	// with as many threads as want to run on a busy host, two in a row lose their CPU now and then.
	slowScore = 8
	// minAvoid and maxAvoid bound how long the calls of a slow opcode are not made by workers.
	minAvoid = 100 * time.Millisecond
	maxAvoid = 10 * time.Second

	// opcodes is one more than the largest of which this is known.
	opcodes = 64
)

// inline are the opcodes that workers answer however slow they were: they are the session's, or nobody waits for them.
const inline = 1<<fuseproto.FUSE_FORGET | 1<<fuseproto.FUSE_BATCH_FORGET | 1<<fuseproto.FUSE_INTERRUPT |
	1<<fuseproto.FUSE_INIT | 1<<fuseproto.FUSE_DESTROY

// slowness remembers of which opcodes a call has slept on a worker lately, for the next ones to be the pool's at once.
type slowness struct {
	mask    atomic.Uint64 // by opcode
	avoided atomic.Uint64 // requests

	mu    sync.Mutex
	until [opcodes]time.Duration // by fuseserver.Clock
	span  [opcodes]time.Duration // the last one
}

// avoids says that a worker is not to make a call of op. After a while one of them makes one, to see.
func (s *slowness) avoids(op uint32) bool {
	mask := s.mask.Load()
	return mask != 0 && op < opcodes && mask>>op&1 != 0 && s.still(op)
}

func (s *slowness) still(op uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if fuseserver.Clock() >= s.until[op] {
		s.mask.And(^(uint64(1) << op))
		return false
	}
	s.avoided.Add(1)
	return true
}

// add notes that a call of op has slept: for twice as long as the last time, if that is not long over.
func (s *slowness) add(op uint32) {
	if op >= opcodes || inline>>op&1 != 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := fuseserver.Clock()
	span := &s.span[op]
	if now-s.until[op] > *span {
		*span = minAvoid
	} else if now >= s.until[op] { // and not by another worker's call that began before
		*span = min(2**span, maxAvoid)
	}
	s.until[op] = now + *span
	s.mask.Or(uint64(1) << op)
}

// count is how many opcodes are slow.
func (s *slowness) count() int {
	return bits.OnesCount64(s.mask.Load())
}

// scores are how slow the opcodes' calls were on one worker.
type scores struct {
	some uint64 // opcodes whose score is not 0
	of   [opcodes]uint8
}

// note counts a call of op that took so long, and says whether op has become slow.
func (s *scores) note(op uint32, took time.Duration) (slow bool) {
	if op >= opcodes || took < slowCall && s.some>>op&1 == 0 {
		return false
	}
	score := &s.of[op]
	switch {
	case took < slowCall:
		*score--
	case *score > slowScore:
		slow, *score = true, 0
	default:
		*score += slowScore
	}
	if s.some &^= 1 << op; *score > 0 {
		s.some |= 1 << op
	}
	return slow
}

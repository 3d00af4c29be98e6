package frontend

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/virtqueue"
)

// queue drives one request queue, on one thread.
type queue struct {
	f      *FrontEnd
	ring   *ring
	unique uint64
	random uint64

	// Of one Run.
	program  program
	slots    []slot
	underWay int
	left     uint64        // operations that may still begin
	stop     *atomic.Bool  // no more operations begin
	halt     *atomic.Bool  // the thread goes back at once
	progress atomic.Uint64 // requests that have ended, as others see it
	over     atomic.Bool   // the loop has ended
	ops      uint64
	requests uint64
	bytes    uint64
	latency  histogram
	ended    time.Time
}

// slot is one of the requests under way, with whatever its program remembers of the operation that it is a part of.
type slot struct {
	index    int
	messages []*message // by step
	step     int
	began    time.Duration

	file   int // which one of the program's
	node   uint64
	fh     uint64
	offset uint64
	count  int
	sum    int
}

func newQueue(f *FrontEnd, r *ring) *queue {
	r.suppress()
	return &queue{f: f, ring: r, unique: uint64(r.index) << 48, random: 0x9e37_79b9_7f4a_7c15 * uint64(r.index+1)}
}

// rand returns a number below n (xorshift64).
func (q *queue) rand(n int) int {
	q.random ^= q.random << 13
	q.random ^= q.random >> 7
	q.random ^= q.random << 17
	return int(q.random >> 1 % uint64(n))
}

// message returns the one of s's current step.
func (s *slot) message() *message { return s.messages[s.step] }

// post offers m with descriptor head.
func (q *queue) post(head uint16, m *message) error {
	q.unique += 2
	m.header().Unique = q.unique
	m.unique = q.unique
	q.ring.desc[head] = virtqueue.Desc{Addr: m.tableAddr, Len: m.tableLen, Flags: virtqueue.VIRTQ_DESC_F_INDIRECT}
	return q.ring.offer(head)
}

// base is what times count from.
var base = time.Now()

func clock() time.Duration { return time.Since(base) }

// errHalted is what a loop that was told to give up returns.
var errHalted = errors.New("halted")

// batch is how many answers may share one look at the clock.
const batch = 64

// loop keeps depth operations going until none may begin any more.
func (q *queue) loop() error {
	now := clock()
	for i := range q.slots {
		if q.left == 0 {
			break
		}
		if err := q.begin(&q.slots[i], now); err != nil {
			return err
		}
	}
	inBatch := 0
	for q.underWay > 0 {
		head, written, ok := q.ring.reap()
		if !ok {
			inBatch = 0
			if err := q.idle(); err != nil {
				return err
			}
			continue
		}
		if inBatch%batch == 0 {
			now = clock()
			q.progress.Store(q.requests)
		}
		inBatch++
		if int(head) >= len(q.slots) {
			return fmt.Errorf("the server used head %d of queue %d, expected 0 to %d", head, q.ring.index, len(q.slots)-1)
		}
		if err := q.answer(&q.slots[head], written, now); err != nil {
			return err
		}
	}
	return nil
}

// idle is what happens when there is nothing to reap.
func (q *queue) idle() error {
	if q.halt.Load() {
		return errHalted
	}
	if q.f.config.Wait == Poll || q.ring.arm() {
		return nil
	}
	return q.ring.sleep()
}

func (q *queue) begin(s *slot, now time.Duration) error {
	s.step, s.began = 0, now
	q.left--
	q.underWay++
	q.program.begin(q, s)
	return q.post(uint16(s.index), s.message())
}

// answer checks one and goes on: with the operation's next request or with the next operation.
func (q *queue) answer(s *slot, written uint32, now time.Duration) error {
	q.requests++
	r, err := s.message().result(written)
	if err != nil {
		return err
	}
	more, err := q.program.answer(q, s, r)
	switch {
	case err != nil:
		return err
	case more:
		return q.post(uint16(s.index), s.message())
	}
	q.latency.add(now - s.began)
	q.ops++
	q.underWay--
	if q.left == 0 || q.stop.Load() {
		return nil
	}
	return q.begin(s, now)
}

// caller makes single requests while nothing else is under way on its queue.
type caller struct {
	q *queue
	m *message
}

// caller returns a caller for requests of shape s.
func (q *queue) caller(s shape) *caller {
	return &caller{q, newMessage(q.f.mem, s, q.f.config.Layout, q.f.uid, q.f.gid)}
}

// call sends the request and waits for its answer.
func (c *caller) call() (result, error) {
	q := c.q
	if err := q.post(0, c.m); err != nil {
		return result{}, err
	}
	var w spin
	for {
		if _, written, ok := q.ring.reap(); ok {
			return c.m.result(written)
		}
		if w.over(q.f.config.Stall) {
			return result{}, fmt.Errorf("%v: %w", c.m.op, stallError(q.f.config.Stall, []string{q.ring.state(1)}))
		}
	}
}

// spin is a wait that looks again and again, but lets others have the CPU.
type spin struct {
	n     int
	until time.Duration
}

// over counts one look, and says whether they have gone on for longer than d.
func (s *spin) over(d time.Duration) bool {
	s.n++
	if s.n%256 != 0 {
		return false
	}
	_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	if s.until == 0 {
		s.until = clock() + d
	}
	return clock() > s.until
}

// ErrStall is wrapped by the error of a Run in which no request has ended for Config.Stall.
var ErrStall = errors.New("no request has ended")

func stallError(d time.Duration, states []string) error {
	return fmt.Errorf("%w for %v: %s", ErrStall, d, strings.Join(states, "; "))
}

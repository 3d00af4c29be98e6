package virtqueue

import (
	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/internal/sys"
)

// Queue is the device's side of one ring. It is not safe for concurrent use.
//
// Errors that the driver can cause are the Queue's own and allocate nothing: a *ChainError is valid until the next Pop, a
// *RingError until the next Bind. A type switch tells them apart; Pop, Push and the others return them unwrapped.
type Queue struct {
	cfg      Config
	ring     split
	walker   walker // walker.m is the bound Map, nil when the queue is not bound
	inFlight int    // chains popped and not pushed
	stopped  bool   // nothing more is fetched: see ringErr
	faulted  bool   // set by sys.Guard
	chainErr ChainError
	ringErr  RingError
}

// New returns a queue that starts at c.Base and is not bound to memory yet.
func New(c Config) (*Queue, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &Queue{
		cfg:     c,
		ring:    split{num: c.Num, eventIdx: c.Features&VIRTIO_RING_F_EVENT_IDX != 0, next: c.Base},
		walker:  walker{indirect: c.Features&VIRTIO_RING_F_INDIRECT_DESC != 0, limit: max(int(c.Num), minChain)},
		ringErr: RingError{ReasonUnbound},
		stopped: true,
	}, nil
}

// Bind makes the queue work in m, in place of the Map it was bound to, and clears an earlier RingError. The caller holds m
// for as long as the queue is bound to it and chains popped from it are in use, and has published what it pushed. On an
// error, which wraps a *RingError, the queue is not bound.
func (q *Queue) Bind(m *guestmem.Map) (err error) {
	defer q.settle(&err)
	defer sys.Guard(&q.faulted)
	q.fail(ReasonUnbound)
	if err := q.ring.bind(q.cfg, m); err != nil {
		return err
	}
	q.walker.m = m
	q.stopped = false
	return nil
}

// fail ends fetching. What was popped can still be completed, unless the ring's memory cannot be used.
func (q *Queue) fail(r Reason) error {
	q.stopped = true
	switch r {
	case ReasonUnbound, ReasonUnmapped, ReasonAlign, ReasonFault:
		q.walker.m = nil
	}
	q.ringErr.Reason = r
	return &q.ringErr
}

// settle, deferred before sys.Guard, makes a fault an error.
func (q *Queue) settle(err *error) {
	if q.faulted {
		q.faulted = false
		*err = q.fail(ReasonFault)
	}
}

func (q *Queue) bound() bool {
	return q.walker.m != nil
}

// Pop takes the next available chain and describes it in c; ok is false when there is none. On a *ChainError the chain is
// taken, c is empty, and the caller must Push the head with 0. On a *RingError nothing is taken, now or later, until Bind;
// what was popped before can still be pushed and published.
func (q *Queue) Pop(c *Chain) (ok bool, err error) {
	defer q.settle(&err)
	defer sys.Guard(&q.faulted)
	c.reset()
	if q.stopped {
		return false, &q.ringErr
	}
	head, ok, r := q.ring.head()
	if r != reasonNone {
		return false, q.fail(r)
	}
	if !ok {
		return false, nil
	}
	// A chain has a descriptor at least, so a driver that waits for its descriptors never gets here; one that does not
	// would make the device hold requests without end.
	if q.inFlight >= int(q.cfg.Num) {
		return false, q.fail(ReasonInFlight)
	}
	// A fault in here leaves the chain in the ring, with ok still false.
	ok = false
	r = q.walker.walk(c, q.ring.desc, head, 0, false)
	q.ring.next++
	q.inFlight++
	c.Head = head
	if r != reasonNone {
		c.reset()
		q.chainErr = ChainError{Head: head, Reason: r}
		return false, &q.chainErr
	}
	return true, nil
}

// Push stages the completion of a chain from Pop, in any order: written is how many bytes the device has put at the start
// of its writable part. The driver sees it at the next Publish.
func (q *Queue) Push(head uint16, written uint32) (err error) {
	defer q.settle(&err)
	defer sys.Guard(&q.faulted)
	// A chain that the queue's predecessor popped counts for nothing.
	q.inFlight = max(q.inFlight-1, 0)
	if !q.bound() {
		return &q.ringErr
	}
	q.ring.push(head, written)
	return nil
}

// Show lets a driver that polls see the completions staged so far, while others of the same batch are still under way. Publish
// says of them, too, whether a notification is wanted.
func (q *Queue) Show() (err error) {
	defer q.settle(&err)
	defer sys.Guard(&q.faulted)
	if !q.bound() {
		return &q.ringErr
	}
	q.ring.show()
	return nil
}

// Publish shows all staged completions to the driver with one store of the used index, and says whether the driver wants a
// notification for them. The first Publish after New always wants one; without anything staged there is none.
func (q *Queue) Publish() (notify bool, err error) {
	defer q.settle(&err)
	defer sys.Guard(&q.faulted)
	if !q.bound() {
		return false, &q.ringErr
	}
	return q.ring.publish(), nil
}

// Arm asks the driver for a kick at the next chain it makes available and then looks for one: if pending, Pop again, for
// that kick may never come.
func (q *Queue) Arm() (pending bool, err error) {
	defer q.settle(&err)
	defer sys.Guard(&q.faulted)
	if q.stopped {
		return false, &q.ringErr
	}
	pending, r := q.ring.arm()
	if r != reasonNone {
		return false, q.fail(r)
	}
	return pending, nil
}

// Disarm tells the driver that no kick is needed until Arm, while the caller polls. Kicks may still come.
func (q *Queue) Disarm() (err error) {
	defer q.settle(&err)
	defer sys.Guard(&q.faulted)
	if q.stopped {
		return &q.ringErr
	}
	q.ring.disarm()
	return nil
}

// Pending says whether the driver has made chains available that were not popped.
func (q *Queue) Pending() (pending bool, err error) {
	defer q.settle(&err)
	defer sys.Guard(&q.faulted)
	if q.stopped {
		return false, &q.ringErr
	}
	pending, r := q.ring.pending()
	if r != reasonNone {
		return false, q.fail(r)
	}
	return pending, nil
}

// Base returns the next available index to fetch, which VHOST_USER_GET_VRING_BASE reports. It works on an unbound queue.
func (q *Queue) Base() uint16 {
	return q.ring.next
}

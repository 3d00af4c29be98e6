package virtiofs

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/virtqueue"
)

const (
	// batch is the most requests of one queue served before its worker looks at its other queues and publishes.
	batch = 64
	// shown is after how many of them a driver that looks can see what is done. It then offers more while the rest is served, and the
	// worker finds them without having slept; a driver that waits is notified at the batch's end all the same.
	shown = 4
	// batchBytes ends a batch early: small replies should not wait long behind large ones.
	batchBytes = 256 << 10
	// hold is how long a notification of hiprio's may be kept back, for others to go with it: nobody waits for a FORGET's end, and
	// each notification interrupts the guest in what it does next.
	hold = 2 * time.Millisecond
	// holdShare is the part of hiprio's ring that may wait for that.
	holdShare = 4
	// cancelGrace is how long a cancelled request gets to notice.
	cancelGrace = 500 * time.Millisecond
)

// queue is one virtqueue of the device: the state that its worker, the pool and the session share.
type queue struct {
	device *Device
	index  int
	worker *worker

	// mu is held for a few instructions at a time, never across a request.
	mu       sync.Mutex
	vq       *virtqueue.Queue // nil while stopped
	num      int              // entries of its ring
	bound    *guestmem.Map    // what vq translates with; held
	kick     *kick
	run      uint64 // counts starts: a completion of an earlier one is dropped
	enabled  bool
	stopping bool
	broken   bool
	inflight int           // requests popped and not completed
	waiting  int           // those of them that wait for locks
	parked   []*task       // those of them that the pool has and that are not given up
	cancel   chan struct{} // closed when nobody waits for requests in flight any longer
	drained  chan struct{} // closed when inflight gets to 0 while stopping
	call     *notifier
	err      *notifier

	calls  uint64 // made by its worker, inline
	inCall bool   // one has not returned
	seen   uint64 // calls when the watch last looked

	due due

	// Of hiprio.
	held    bool // a notification is: see hold
	holding int  // requests done meanwhile

	// Counters; see QueueStats.
	polls, notifications uint64
	hits, misses         atomic.Uint64 // polls after it was empty that have found a request, and those that have not
	polling              atomic.Uint64 // nanoseconds of them
	kicks                atomic.Uint64 // not under mu: kicks come while a batch is served
	kicked               bool          // since the worker, which alone uses this, last looked at the ring
}

// due is what has to be told once mu is released, for telling takes system calls.
type due struct {
	call  bool
	ring  error
	chain virtqueue.ChainError
	bad   bool // chain is set

	refused *lane // by it
	opcode  fuseproto.Opcode
}

// unlock releases mu and tells what is due.
func (q *queue) unlock() {
	if q.due.ring != nil || q.due.bad || q.due.refused != nil {
		q.unlockAndReport()
		return
	}
	if !q.due.call {
		q.mu.Unlock()
		return
	}
	q.due.call = false
	call := q.notifyLocked()
	q.mu.Unlock()
	call.signal()
}

// notifyLocked returns what the guest is to be notified by, if there is such, and counts that.
func (q *queue) notifyLocked() *notifier {
	if q.call != nil {
		q.notifications++
	}
	return q.call.retain()
}

// unlockAndReport is unlock where the guest or a backend has done wrong; apart, because its copies live on the heap.
func (q *queue) unlockAndReport() {
	due := q.due
	q.due.call, q.due.ring, q.due.bad, q.due.refused = false, nil, false, nil
	var call, errfd *notifier
	if due.call {
		call = q.notifyLocked()
	}
	if due.ring != nil {
		errfd = q.err.retain()
	}
	q.mu.Unlock()
	call.signal()
	errfd.signal()
	if due.ring != nil {
		q.device.log.Warn("guest broke a virtqueue, which stops", "queue", q.index, "error", due.ring)
	}
	if due.bad {
		q.device.log.Warn("guest sent a malformed descriptor chain", "queue", q.index, "error", &due.chain)
	}
	if due.refused != nil {
		due.refused.refused(due.opcode)
	}
}

// runningLocked says whether requests may be fetched.
func (q *queue) runningLocked() bool {
	return q.vq != nil && q.enabled && !q.stopping && !q.broken
}

// readyLocked is runningLocked, but for a full pool. Hiprio's requests do not go there.
func (q *queue) readyLocked() bool {
	return q.runningLocked() && (q.index == 0 || q.device.pool.full.Load() == 0)
}

// setNotifier puts fd in place of *slot, one of q's own.
func (q *queue) setNotifier(slot **notifier, fd *sys.FD) {
	var n *notifier
	if fd != nil {
		n = newNotifier(fd)
	}
	q.mu.Lock()
	old := *slot
	*slot = n
	q.unlock()
	old.retire()
}

func (q *queue) start(vq *virtqueue.Queue, num int, kickFD *sys.FD) error {
	m := q.device.mem.Acquire()
	if err := vq.Bind(m); err != nil {
		m.Release()
		return fmt.Errorf("start queue %d: %w", q.index, err)
	}
	err := q.worker.start()
	var k *kick
	if err == nil {
		k, err = q.worker.watch(q, kickFD)
	}
	if err != nil {
		m.Release()
		return fmt.Errorf("start queue %d: %w", q.index, err)
	}
	q.mu.Lock()
	q.vq, q.num, q.bound, q.kick = vq, num, m, k
	q.run++
	q.stopping, q.broken, q.inflight, q.waiting = false, false, 0, 0
	q.cancel = make(chan struct{})
	q.mu.Unlock()
	// Requests may wait already, and their kick may have gone to an earlier back-end (reference: vhost-user, "Ring states").
	q.worker.poke()
	return nil
}

func (q *queue) enable(enabled bool) {
	q.mu.Lock()
	q.enabled = enabled
	q.unlock()
	q.worker.poke()
}

func (q *queue) stop(timeout time.Duration) (base uint32, err error) {
	q.mu.Lock()
	defer q.unlock()
	if q.vq == nil {
		return 0, nil
	}
	q.stopping = true
	q.endRestsLocked()
	if q.inflight > 0 && !q.waitLocked(timeout) {
		close(q.cancel)
		q.abortLocked()
		if q.inflight > 0 && !q.waitLocked(cancelGrace) {
			q.abortLocked()
		}
		if q.inflight > 0 {
			err = fmt.Errorf("stop queue %d: %d requests did not end within %v and were given up", q.index, q.inflight, timeout)
			q.device.stats.abandoned.Add(uint64(q.inflight))
		}
	}
	q.publishLocked()
	q.releaseLocked()
	base = uint32(q.vq.Base())
	q.worker.unwatch(q.kick)
	q.bound.Release()
	q.vq, q.bound, q.kick, q.parked = nil, nil, nil, nil
	q.run++
	return base, err
}

// abortLocked answers requests that the pool has with EIO, but for those that the kernel may still read or write guest
// memory for: their buffers cannot be given back.
func (q *queue) abortLocked() {
	for i := len(q.parked) - 1; i >= 0; i-- {
		q.giveUpLocked(q.parked[i], unix.EIO)
	}
}

// giveUpLocked answers t, which is parked, with errno and says whether that was possible. Its call goes on, if it has begun,
// without guest memory.
func (q *queue) giveUpLocked(t *task, errno unix.Errno) bool {
	if t.cancel == t.own && !t.cancelled {
		t.cancelled = true
		close(t.own)
	}
	if t.req.TouchesGuestMemory() {
		return false
	}
	written := t.req.Abort(errno)
	if !t.req.Aborted() {
		return false
	}
	q.completeLocked(t.chain.Head, written)
	q.unparkLocked(t)
	return true
}

// giveUpOverdue gives up the requests that have taken longer than their parts may. One that guest memory is being moved
// for is given up next time.
func (q *queue) giveUpOverdue(now time.Time) {
	type loss struct {
		lane   *lane
		opcode fuseproto.Opcode
		after  time.Duration
	}
	var lost []loss
	q.mu.Lock()
	for i := len(q.parked) - 1; i >= 0; i-- {
		t := q.parked[i]
		if t.resting || !t.overdue(now) {
			continue
		}
		l, opcode := t.lane, t.req.Opcode()
		if q.giveUpLocked(t, unix.EIO) {
			l.part.Stats.Timeouts.Add(1)
			lost = append(lost, loss{l, opcode, now.Sub(t.since)})
		}
	}
	q.publishLocked()
	q.unlock()
	for _, l := range lost {
		l.lane.gaveUp(l.opcode, l.after)
	}
}

// parkLocked hands t to the pool and returns the task to go on with: t itself, if its lane refuses it.
func (q *queue) parkLocked(t *task, m *guestmem.Map) *task {
	pool := q.device.pool
	l := pool.lane(t.req.Part())
	if l.refuses(t) {
		l.part.Stats.Refused.Add(1)
		q.due.refused, q.due.opcode = l, t.req.Opcode()
		q.completeLocked(t.chain.Head, t.req.Abort(unix.EIO))
		return t
	}
	t.queue, t.run, t.lane, t.mem, t.slot = q, q.run, l, m.Retain(), len(q.parked)
	t.cancel = q.cancel
	if l.part != nil {
		if t.own == nil || t.cancelled {
			t.own, t.cancelled = make(chan struct{}), false
		}
		t.cancel = t.own
	}
	t.req.Counters = nil // many threads', which have the lane's lock in common already
	q.parked = append(q.parked, t)
	pool.hand(t)
	return pool.get()
}

// unparkLocked forgets t, which the pool has.
func (q *queue) unparkLocked(t *task) {
	last := len(q.parked) - 1
	q.parked[t.slot] = q.parked[last]
	q.parked[t.slot].slot = t.slot
	q.parked[last] = nil
	q.parked = q.parked[:last]
	t.mem.Release()
	t.mem = nil
	if t.waits {
		q.waiting--
	}
}

// rest has t, whose lock is another's, wait without a thread, and says whether it does.
func (q *queue) rest(t *task) bool {
	q.mu.Lock()
	defer q.unlock()
	switch {
	case t.req.Aborted():
		return false
	case q.stopping || !t.waits && q.waiting >= q.num/waitingShare:
		q.giveUpLocked(t, unix.ENOLCK)
		q.publishLocked()
		return false
	}
	if !t.waits {
		t.waits = true
		q.waiting++
	}
	t.resting = true
	return true
}

// retry has t, which has rested, tried again, unless it is given up.
func (q *queue) retry(t *task) {
	q.mu.Lock()
	defer q.unlock()
	t.resting = false
	if t.req.Aborted() {
		q.device.pool.put(t)
		return
	}
	q.device.pool.hand(t)
}

// endRestsLocked ends what waits for locks of others, who may take for ever, with an errno that lockers know.
func (q *queue) endRestsLocked() {
	for i := len(q.parked) - 1; i >= 0; i-- {
		if t := q.parked[i]; t.resting {
			q.giveUpLocked(t, unix.ENOLCK)
		}
	}
}

// finished completes t, which the pool has done.
func (q *queue) finished(t *task, written uint32) {
	q.mu.Lock()
	defer q.unlock()
	switch {
	case t.req.Aborted():
	case q.run != t.run: // given up when the queue was stopped, with guest memory in its hands
		t.mem.Release()
	default:
		q.completeLocked(t.chain.Head, written)
		q.publishLocked()
		q.unparkLocked(t)
	}
}

// waitLocked waits for the requests in flight, mu free meanwhile, and says whether they ended in time.
func (q *queue) waitLocked(timeout time.Duration) bool {
	drained := make(chan struct{})
	q.drained = drained
	q.mu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-drained:
	case <-timer.C:
	}
	q.mu.Lock()
	q.drained = nil
	return q.inflight == 0
}

// rebind moves the queue to the present memory map.
func (q *queue) rebind() {
	m := q.device.mem.Acquire()
	q.mu.Lock()
	if q.vq == nil {
		q.mu.Unlock()
		m.Release()
		return
	}
	q.publishLocked()
	old := q.bound
	q.bound = m
	if err := q.vq.Bind(m); err != nil {
		q.failLocked(err)
	}
	q.unlock()
	old.Release()
}

// failLocked stops a queue whose ring is broken until the front-end starts it anew (virtio 1.3, 2.1: a device never
// recovers such a ring by itself).
func (q *queue) failLocked(err error) {
	if q.broken {
		return
	}
	q.broken = true
	q.device.stats.ringErrors.Add(1)
	if ringErr, ok := err.(*virtqueue.RingError); ok {
		kept := *ringErr // the queue uses its own again
		err = &kept
	}
	q.due.ring = err
}

// popLocked fetches the next request into t. A chain that cannot be one is completed with nothing written, and passed over.
func (q *queue) popLocked(t *task) bool {
	for range batch {
		ok, err := q.vq.Pop(&t.chain)
		if err == nil {
			if ok {
				q.inflight++
			}
			return ok
		}
		chainErr, ok := err.(*virtqueue.ChainError)
		if !ok {
			q.failLocked(err)
			return false
		}
		q.device.stats.chainErrors.Add(1)
		q.due.chain, q.due.bad = *chainErr, true
		if err := q.vq.Push(chainErr.Head, 0); err != nil {
			q.failLocked(err)
			return false
		}
	}
	return false
}

// completeLocked gives a request of the present run back to the guest, which sees it after publishLocked.
func (q *queue) completeLocked(head uint16, written uint32) {
	if err := q.vq.Push(head, written); err != nil {
		q.failLocked(err)
	}
	q.inflight--
	if q.inflight == 0 && q.drained != nil {
		close(q.drained)
		q.drained = nil
	}
}

// showLocked has a driver that polls see what has been completed.
func (q *queue) showLocked() {
	if err := q.vq.Show(); err != nil {
		q.failLocked(err)
	}
}

// publishLocked shows the guest what has been completed, with one notification if it wants one.
func (q *queue) publishLocked() {
	if q.vq == nil {
		return
	}
	notify, err := q.vq.Publish()
	if err != nil {
		q.failLocked(err)
		return
	}
	if notify {
		q.due.call = true
	}
}

// What came of queue.serve.
type outcome int

const (
	idle     outcome = iota
	busy             // there were requests
	relieved         // a call took so long that another thread has the queue
)

// serve handles a batch of requests with t. It returns the task to go on with: t, unless the pool has taken it.
func (q *queue) serve(t *task) (next *task, what outcome) {
	w := q.worker
	q.mu.Lock()
	if !q.readyLocked() {
		q.unlock()
		return t, idle
	}
	if !q.kicked {
		q.polls++
	}
	q.kicked = false
	if err := q.vq.Disarm(); err != nil {
		q.failLocked(err)
	}
	if !q.runningLocked() || !q.popLocked(t) {
		q.publishLocked() // chains that were none
		q.unlock()
		return t, idle
	}
	w.served, w.polled = q, false
	m, run := q.bound.Retain(), q.run
	n := 1
	for bytes := uint64(0); ; n++ {
		if q.bound != m { // rebound since
			m.Release()
			m = q.bound.Retain()
		}
		q.calls++
		call := q.calls
		q.inCall = true
		// From here on another thread may be the worker's.
		t.req.Counters, t.req.Fetched = w.counters, w.now
		q.mu.Unlock()
		bytes += t.chain.ReadableLen + t.chain.WritableLen
		written, done := w.handle(q, t)
		now := t.req.Ended
		if !done {
			now = fuseserver.Clock()
		}
		q.mu.Lock()
		if q.calls != call {
			what = relieved // and what is the thread's alone is another's
		} else {
			if op := w.opcode.Load(); done && w.scores.note(op, now-w.now) {
				q.device.slow.add(op)
			}
			q.inCall, w.now, what = false, now, busy
		}
		switch {
		case q.run != run:
			// Given up while it was handled.
		case done:
			q.completeLocked(t.chain.Head, written)
			if n%shown == 0 {
				q.showLocked()
			}
		default:
			t = q.parkLocked(t, m)
		}
		if what == relieved || n == batch || bytes >= batchBytes || q.run != run || !q.runningLocked() || !q.popLocked(t) {
			break
		}
	}
	q.publishLocked()
	if q.index == 0 && what != relieved {
		q.holdLocked(n)
	}
	q.unlock()
	m.Release()
	return t, what
}

// holdLocked keeps the notification of so many of hiprio's requests back, unless that would keep much of its ring.
func (q *queue) holdLocked(served int) {
	if q.due.call && !q.held {
		q.held = true
		q.worker.held = q.worker.now
	}
	if q.held {
		q.due.call = false
		if q.holding += served; q.holding >= q.num/holdShare {
			q.releaseLocked()
		}
	}
}

// releaseLocked gives the notification that has been kept back.
func (q *queue) releaseLocked() {
	if q.held {
		q.held, q.holding, q.due.call = false, 0, true
	}
}

func (q *queue) release() {
	q.mu.Lock()
	defer q.unlock()
	q.releaseLocked()
}

// calledLocked says whether its worker has made calls since the last look, or is in one.
func (q *queue) calledLocked() bool { return q.inCall || q.calls != q.seen }

// look says whether its worker has made calls since the last look, or is in one: stuck, if it is still the same.
func (q *queue) look() (called, stuck bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	called, stuck = q.calledLocked(), q.inCall && q.calls == q.seen
	q.seen = q.calls
	return called, stuck
}

// relieve has the queue wait no longer for the call that it was in when it was last looked at, and says whether that
// still goes on.
func (q *queue) relieve() bool {
	q.mu.Lock()
	defer q.unlock()
	if !q.inCall || q.calls != q.seen {
		return false
	}
	q.calls++
	q.inCall, q.kicked = false, false
	q.publishLocked() // what was done before it
	return true
}

// pending says whether there is a request, or something that serve has to see to.
func (q *queue) pending() bool {
	if !q.mu.TryLock() {
		return false
	}
	defer q.unlock()
	if !q.readyLocked() {
		return false
	}
	pending, err := q.vq.Pending()
	if err != nil {
		q.failLocked(err)
	}
	return pending
}

// polled counts a poll that has taken so long.
func (q *queue) polled(found bool, took time.Duration) {
	if found {
		q.hits.Add(1)
	} else {
		q.misses.Add(1)
	}
	q.polling.Add(uint64(max(took, 0)))
}

// arm asks the guest for a kick and says whether requests came in before it could have seen that.
func (q *queue) arm() (pending bool) {
	q.mu.Lock()
	defer q.unlock()
	if !q.readyLocked() {
		return false
	}
	pending, err := q.vq.Arm()
	if err != nil {
		q.failLocked(err)
	}
	return pending
}

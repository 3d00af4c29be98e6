package virtiofs

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/internal/sys"
)

// worker serves a fixed set of queues inline, on one locked thread at a time. It has a thread, and descriptors, from its
// first queue's start until the front-end has gone.
type worker struct {
	device   *Device
	queues   []*queue
	counters *fuseserver.Counters // nil before the first start

	mu     sync.Mutex
	thread chan struct{} // closed when the thread has left; nil: the worker is off
	epoll  *sys.FD
	wake   *sys.FD // eventfd: something other than a kick wants attention
	kicks  []*kick // by slot, which epoll hands back

	ending   atomic.Bool  // the thread is to leave
	kickless atomic.Int32 // queues without a kick fd

	opcode atomic.Uint32 // of the last call
	window atomic.Int64  // nanoseconds that it polls for at present; 0: not at all

	// The thread's alone.
	now     time.Duration // fuseserver.Clock when last looked at
	yielded time.Duration // when it last let the scheduler have the thread
	served  *queue        // the last one with requests since the thread slept; nil: none
	polled  bool          // in vain, since then
	held    time.Duration // since when a notification of hiprio's is held back; 0: none is
	poller  poller
	scores  scores
}

// kick is a kick fd under watch: an eventfd or a pipe, or none at all (VHOST_USER_VRING_NOFD_MASK).
type kick struct {
	queue *queue
	fd    int // -1: none, the ring is polled; the session owns it
	slot  int
	pipe  bool
}

const wakeSlot = -1

// yieldInterval is how often a busy thread passes through Go's scheduler. One that does not for 10 ms is taken for stuck by the
// runtime's sysmon, which then looks every 20 µs, and takes the P away, whenever it meets the thread in a system call
// (runtime/proc.go, retake): with everything on one CPU that was 5 % of it.
const yieldInterval = 4 * time.Millisecond

// longSleep is how long a sleep is after which the thread need not pass through the scheduler: with requests that far apart
// the runtime takes the P away sooner for not knowing better, and then leaves everybody alone.
const longSleep = 500 * time.Microsecond

// pollInterval is how often rings without a kick fd are looked at, in milliseconds.
const pollInterval = 1

// start gives the worker a thread, unless it has one.
func (w *worker) start() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ending.Store(false)
	if w.thread != nil && !w.left() {
		return nil
	}
	w.closeLocked() // of a thread that has left late
	if err := w.openLocked(); err != nil {
		w.closeLocked()
		return fmt.Errorf("start a worker: %w", err)
	}
	if w.counters == nil {
		w.counters = w.device.cfg.Server.NewCounters()
	}
	w.device.pool.watch.start()
	w.thread = make(chan struct{})
	go w.run()
	return nil
}

func (w *worker) openLocked() error {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("create epoll: %w", err)
	}
	w.epoll = sys.NewFD(epoll)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("create eventfd: %w", err)
	}
	w.wake = sys.NewFD(wake)
	return w.add(wake, wakeSlot, unix.EPOLLIN|unix.EPOLLET)
}

func (w *worker) closeLocked() {
	for _, fd := range []**sys.FD{&w.epoll, &w.wake} {
		if *fd != nil {
			_ = (*fd).Close()
			*fd = nil
		}
	}
	w.thread = nil
}

// left says whether the thread has.
func (w *worker) left() bool {
	select {
	case <-w.thread:
		return true
	default:
		return false
	}
}

// end has the thread leave, and says whether it does before timeout: one that hangs in a call of the backend may not. Its queues
// are stopped.
func (w *worker) end(timeout time.Duration) bool {
	w.mu.Lock()
	thread := w.thread
	w.mu.Unlock()
	if thread == nil {
		return true
	}
	w.ending.Store(true)
	w.poke()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-thread:
	case <-timer.C:
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closeLocked()
	return true
}

// leaves lets the thread go if it is to, unless it has just been asked to stay.
func (w *worker) leaves() bool {
	if !w.ending.Load() {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ending.Load() {
		return false
	}
	close(w.thread)
	return true
}

// add watches fd. Edge-triggered, an eventfd never has to be read: each write to it is an event of its own, which saves a
// call for every kick, and its description, shared with the front-end, stays as it is.
func (w *worker) add(fd, slot int, events uint32) error {
	event := unix.EpollEvent{Events: events, Fd: int32(slot)}
	if err := unix.EpollCtl(w.epoll.Int(), unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		return fmt.Errorf("watch kick fd %d: %w (expected an eventfd or a pipe)", fd, err)
	}
	return nil
}

// watch makes kicks of q on fd wake the worker; nil has the worker poll instead.
func (w *worker) watch(q *queue, fd *sys.FD) (*kick, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if fd == nil {
		w.kickless.Add(1)
		return &kick{queue: q, fd: -1}, nil
	}
	k := &kick{queue: q, fd: fd.Int(), slot: len(w.kicks)}
	for slot, used := range w.kicks {
		if used == nil {
			k.slot = slot
			break
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(k.fd, &st); err != nil {
		return nil, fmt.Errorf("stat kick fd %d: %w", k.fd, err)
	}
	events := uint32(unix.EPOLLIN | unix.EPOLLET)
	if k.pipe = st.Mode&unix.S_IFMT == unix.S_IFIFO; k.pipe {
		events = unix.EPOLLIN // it has to be emptied
	}
	if err := w.add(k.fd, k.slot, events); err != nil {
		return nil, err
	}
	if k.slot == len(w.kicks) {
		w.kicks = append(w.kicks, nil)
	}
	w.kicks[k.slot] = k
	return k, nil
}

// unwatch ends watch; afterwards the worker does not touch the fd again.
func (w *worker) unwatch(k *kick) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dropLocked(k)
}

func (w *worker) dropLocked(k *kick) {
	if k.fd < 0 {
		w.kickless.Add(-1)
		return
	}
	if w.kicks[k.slot] == k {
		_ = unix.EpollCtl(w.epoll.Int(), unix.EPOLL_CTL_DEL, k.fd, nil)
		w.kicks[k.slot] = nil
	}
}

// poke has the worker look at its queues.
func (w *worker) poke() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wake != nil {
		_, _ = unix.Write(w.wake.Int(), one)
	}
}

func (w *worker) run() {
	// Credentials belong to a thread, and a backend may change them for a call.
	runtime.LockOSThread() // for good: the thread ends with this
	// Guest memory can go at any time; see sys.Guard.
	debug.SetPanicOnFault(true)

	spinners.measure()
	t := w.device.pool.get()
	var events [16]unix.EpollEvent
	w.served = nil
	for !w.leaves() {
		rest := true
		for _, q := range w.queues {
			var what outcome
			t, what = q.serve(t)
			if what == relieved {
				w.device.pool.put(t)
				w.device.strays.leave()
				return
			}
			rest = rest && what == idle
		}
		w.release()
		if w.now-w.yielded > yieldInterval {
			w.yielded = w.now
			runtime.Gosched()
		}
		if !rest || w.poll() {
			continue
		}
		for _, q := range w.queues {
			rest = !q.arm() && rest
		}
		if rest {
			w.sleep(events[:])
		}
	}
}

// handle begins t's request and answers it, if that does not sleep for all that is known. The worker may have another thread by then.
func (w *worker) handle(q *queue, t *task) (written uint32, done bool) {
	d := w.device
	d.pool.watch.rouse()
	t.server.Begin(t.req, t.chain.Readable, t.chain.Writable, t.chain.ReadableLen, t.chain.WritableLen)
	op := uint32(t.req.Opcode())
	if w.opcode.Load() != op {
		w.opcode.Store(op)
	}
	if q.index != 0 && d.slow.avoids(op) {
		return 0, false
	}
	return t.server.Handle(t.req)
}

// look says whether the worker has made calls since the last look. If it has been in one of them since then, another thread
// takes its queues over, unless late says that it may just have had to wait for a CPU.
func (w *worker) look(late bool) (called bool) {
	for _, q := range w.queues {
		c, stuck := q.look()
		called = called || c
		if !stuck || late || !w.device.strays.enter() {
			continue
		}
		op := w.opcode.Load()
		if !q.relieve() {
			w.device.strays.leave()
			continue
		}
		w.device.stats.relieved.Add(1)
		w.device.slow.add(op)
		go w.run()
	}
	return called
}

// calling says whether look would find something.
func (w *worker) calling() bool {
	for _, q := range w.queues {
		q.mu.Lock()
		called := q.calledLocked()
		q.mu.Unlock()
		if called {
			return true
		}
	}
	return false
}

// looks is how many times the rings are looked at for one look at the clock.
const looks = 8

// poll looks at the rings for a while and says whether there is something to do. Kicks stay disarmed meanwhile.
func (w *worker) poll() (found bool) {
	if w.served == nil || w.polled {
		return false
	}
	window := w.poller.window(w.now)
	if w.window.Load() != int64(window) {
		w.window.Store(int64(window))
	}
	if window == 0 || !spinners.enter() {
		return false
	}
	defer spinners.leave()
	begin, last := w.now, time.Duration(0)
	for {
		for range looks {
			if found = w.pending(); found {
				break
			}
			pause()
		}
		w.now = fuseserver.Clock()
		robbed := last != 0 && w.now-last > theft
		last = w.now
		over := w.now-begin >= window
		switch {
		case robbed:
			w.poller.robbed(w.now)
		case found:
			w.poller.found()
		case over:
			w.poller.vain(w.now)
		default:
			continue
		}
		w.polled = !found
		w.served.polled(found, w.now-begin)
		return found
	}
}

// pending says whether a ring has requests, or whether the thread is wanted elsewhere.
func (w *worker) pending() bool {
	for _, q := range w.queues {
		if q.pending() {
			return true
		}
	}
	return w.ending.Load()
}

// release gives a notification that was held back for long enough.
func (w *worker) release() {
	if w.held != 0 && w.now-w.held >= hold {
		w.held = 0
		w.queues[0].release()
	}
}

// sleep waits for a kick.
func (w *worker) sleep(events []unix.EpollEvent) {
	timeout := -1
	if w.kickless.Load() > 0 {
		timeout = pollInterval
	} else if w.held != 0 {
		timeout = int(hold / time.Millisecond)
	}
	began := w.now
	n, err := unix.EpollWait(w.epoll.Int(), events, timeout)
	w.now = fuseserver.Clock()
	if w.now-began > longSleep {
		w.yielded = w.now
	}
	if w.served != nil && !w.polled {
		w.poller.slept(w.now - began)
	}
	w.served, w.polled = nil, false
	if err != nil {
		return // EINTR
	}
	for i := range events[:n] {
		if slot := int(events[i].Fd); slot != wakeSlot {
			w.kicked(slot, events[i].Events)
		}
	}
}

// kicked counts a kick, and takes it out of a pipe; an eventfd keeps it.
func (w *worker) kicked(slot int, events uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if slot >= len(w.kicks) || w.kicks[slot] == nil {
		return
	}
	k := w.kicks[slot]
	if events&unix.EPOLLIN != 0 {
		k.queue.kicks.Add(1)
		k.queue.kicked = true
	}
	if !k.pipe {
		return
	}
	if events&unix.EPOLLIN != 0 {
		var b [512]byte
		// Readable, with no other reader: this does not sleep.
		if n, err := unix.Read(k.fd, b[:]); n > 0 || err == unix.EINTR || err == unix.EAGAIN {
			return
		}
	}
	// The front-end has closed its end, which would be an event for ever.
	_ = unix.EpollCtl(w.epoll.Int(), unix.EPOLL_CTL_DEL, k.fd, nil)
	w.kicks[slot] = nil
}

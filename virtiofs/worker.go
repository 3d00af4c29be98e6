package virtiofs

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/internal/sys"
)

// worker is a locked thread that serves a fixed set of queues inline.
type worker struct {
	device *Device
	queues []*queue
	epoll  *sys.FD
	wake   *sys.FD // eventfd: something other than a kick wants attention
	ending atomic.Bool

	counters *fuseserver.Counters

	mu      sync.Mutex
	kicks   []*kick // by slot, which epoll hands back
	polling int     // queues without a kick fd
}

// kick is a kick fd under watch: an eventfd or a pipe, or none at all (VHOST_USER_VRING_NOFD_MASK).
type kick struct {
	queue *queue
	fd    int // -1: none, the ring is polled; the session owns it
	slot  int
	pipe  bool
}

const wakeSlot = -1

// pollInterval is how often rings without a kick fd are looked at, in milliseconds.
const pollInterval = 1

func newWorker(d *Device, index int) (*worker, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll for worker %d: %w", index, err)
	}
	w := &worker{device: d, epoll: sys.NewFD(epoll), counters: d.cfg.Server.NewCounters()}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = w.epoll.Close()
		return nil, fmt.Errorf("create eventfd for worker %d: %w", index, err)
	}
	w.wake = sys.NewFD(wake)
	if err := w.add(wake, wakeSlot, unix.EPOLLIN|unix.EPOLLET); err != nil {
		w.close()
		return nil, err
	}
	return w, nil
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
		w.polling++
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
		w.polling--
		return
	}
	if w.kicks[k.slot] == k {
		_ = unix.EpollCtl(w.epoll.Int(), unix.EPOLL_CTL_DEL, k.fd, nil)
		w.kicks[k.slot] = nil
	}
}

// poke has the worker look at its queues.
func (w *worker) poke() {
	_, _ = unix.Write(w.wake.Int(), one)
}

func (w *worker) stop() {
	w.ending.Store(true)
	w.poke()
}

func (w *worker) close() {
	_ = w.epoll.Close()
	_ = w.wake.Close()
}

func (w *worker) run() {
	// Credentials belong to a thread, and a backend may change them for a call.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Guest memory can go at any time; see sys.Guard.
	debug.SetPanicOnFault(true)

	t := w.device.pool.get()
	var events [16]unix.EpollEvent
	for !w.ending.Load() {
		busy := false
		for _, q := range w.queues {
			served := false
			t, served = q.serve(t)
			busy = busy || served
		}
		if busy {
			continue
		}
		for _, q := range w.queues {
			busy = q.arm() || busy
		}
		if !busy {
			w.sleep(events[:])
		}
	}
}

// sleep waits for a kick.
func (w *worker) sleep(events []unix.EpollEvent) {
	timeout := -1
	w.mu.Lock()
	if w.polling > 0 {
		timeout = pollInterval
	}
	w.mu.Unlock()
	n, err := unix.EpollWait(w.epoll.Int(), events, timeout)
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

package virtiofs

import (
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/virtqueue"
)

const (
	// maxTasks bounds the requests that the pool holds. A device that has as many fetches no more until one ends.
	maxTasks = 512
	// spareTasks bounds the tasks kept for reuse.
	spareTasks = 32
	// threadIdle is how long a pool thread without work stays.
	threadIdle = 10 * time.Second
)

// task is one request with all that it needs to leave its worker.
type task struct {
	server *fuseserver.Server
	req    *fuseserver.Request
	chain  virtqueue.Chain

	// Set by queue.parkLocked.
	queue  *queue
	run    uint64
	mem    *guestmem.Map
	cancel <-chan struct{}
	slot   int // in queue.parked
}

// begin handles the request as far as it does not sleep.
func (t *task) begin() (written uint32, done bool) {
	t.server.Begin(t.req, t.chain.Readable, t.chain.Writable, t.chain.ReadableLen, t.chain.WritableLen)
	return t.server.Handle(t.req)
}

// finish handles the request to its end and gives it back to the guest.
func (t *task) finish() {
	t.req.MayBlock, t.req.Cancel = true, t.cancel
	written, _ := t.server.Handle(t.req) // done, now that it may sleep
	t.queue.finished(t, written)
	t.mem.Release()
	t.queue, t.mem, t.cancel = nil, nil, nil
}

// pool runs requests that may sleep, each on a locked thread of a bounded, shrinking set.
type pool struct {
	device *Device
	max    int          // threads
	tasks  atomic.Int32 // waiting or running; changed under mu

	mu      sync.Mutex
	waiting []*task
	idle    []chan *task // one for each thread without work
	threads int
	spare   []*task
	closed  bool
	gone    chan struct{} // closed when the last thread has ended after close
}

func newPool(d *Device, threads int) *pool {
	return &pool{device: d, max: threads, gone: make(chan struct{})}
}

// get returns a task to fetch a request into.
func (p *pool) get() *task {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.getLocked()
}

func (p *pool) getLocked() *task {
	if n := len(p.spare); n > 0 {
		t := p.spare[n-1]
		p.spare = p.spare[:n-1]
		return t
	}
	server := p.device.cfg.Server
	return &task{server: server, req: server.NewRequest()}
}

// full says whether no more requests should be fetched.
func (p *pool) full() bool {
	return p.tasks.Load() >= maxTasks
}

// hand takes over t and returns another task for its worker to go on with.
func (p *pool) hand(t *task) *task {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tasks.Add(1)
	switch n := len(p.idle); {
	case n > 0:
		p.idle[n-1] <- t // buffered: it never waits
		p.idle = p.idle[:n-1]
	case p.threads < p.max:
		p.threads++
		go p.thread(t)
	default:
		p.waiting = append(p.waiting, t)
	}
	return p.getLocked()
}

func (p *pool) thread(t *task) {
	runtime.LockOSThread() // see worker.run; a thread whose credentials could not be restored must not outlive this
	debug.SetPanicOnFault(true)
	work := make(chan *task, 1)
	idle := time.NewTimer(threadIdle)
	defer idle.Stop()
	for {
		t.finish()
		if t = p.next(t, work); t != nil {
			continue
		}
		idle.Reset(threadIdle)
		select {
		case t = <-work:
		case <-idle.C:
			t = p.leave(work)
		}
		if t == nil {
			p.exit()
			return
		}
	}
}

// next puts the finished task by and returns a waiting one, or nil after it has enlisted the thread as idle.
func (p *pool) next(finished *task, work chan *task) *task {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tasks.Add(-1) == maxTasks-1 {
		for _, w := range p.device.workers {
			w.poke()
		}
	}
	if len(p.spare) < spareTasks {
		p.spare = append(p.spare, finished)
	}
	if len(p.waiting) > 0 {
		t := p.waiting[0]
		p.waiting[0] = nil
		p.waiting = p.waiting[1:]
		return t
	}
	if p.closed {
		work <- nil
		return nil
	}
	p.idle = append(p.idle, work)
	return nil
}

// leave takes the thread off the idle list, unless a task is on its way to it.
func (p *pool) leave(work chan *task) *task {
	p.mu.Lock()
	for i, c := range p.idle {
		if c == work {
			p.idle = append(p.idle[:i], p.idle[i+1:]...)
			p.mu.Unlock()
			return nil
		}
	}
	p.mu.Unlock()
	return <-work
}

func (p *pool) exit() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.threads--
	if p.closed && p.threads == 0 {
		close(p.gone)
	}
}

// close ends the threads once their requests are done, and says whether they were within timeout.
func (p *pool) close(timeout time.Duration) bool {
	p.mu.Lock()
	p.closed = true
	for _, work := range p.idle {
		work <- nil
	}
	p.idle = nil
	if p.threads == 0 {
		close(p.gone)
	}
	p.mu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-p.gone:
		return true
	case <-timer.C:
		return false
	}
}

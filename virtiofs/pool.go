package virtiofs

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/virtqueue"
)

const (
	// maxTasks bounds the requests that the shared lane holds. A device that has as many fetches no more until one ends.
	maxTasks = 512
	// spareTasks bounds the tasks kept for reuse.
	spareTasks = 32
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

// pool runs requests that may sleep, on the threads of its lanes.
type pool struct {
	device *Device
	shared *lane
	full   atomic.Int32 // lanes that keep the device from fetching

	mu    sync.Mutex
	spare []*task
}

func newPool(d *Device, threads int) *pool {
	p := &pool{device: d}
	p.shared = newLane(p, threads, maxTasks)
	return p
}

// get returns a task to fetch a request into.
func (p *pool) get() *task {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.spare); n > 0 {
		t := p.spare[n-1]
		p.spare = p.spare[:n-1]
		return t
	}
	server := p.device.cfg.Server
	return &task{server: server, req: server.NewRequest()}
}

// put takes back a task that is done with.
func (p *pool) put(t *task) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.spare) < spareTasks {
		p.spare = append(p.spare, t)
	}
}

// hand takes over t and returns another task for its worker to go on with.
func (p *pool) hand(t *task) *task {
	p.shared.hand(t)
	return p.get()
}

// unblock has the workers fetch again.
func (p *pool) unblock() {
	p.full.Add(-1)
	for _, w := range p.device.workers {
		w.poke()
	}
}

// close ends the threads once their requests are done, and says whether they were within timeout.
func (p *pool) close(timeout time.Duration) bool {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	p.shared.close()
	select {
	case <-p.shared.gone:
		return true
	case <-timer.C:
		return false
	}
}

package virtiofs

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/virtqueue"
)

// spareTasks bounds the tasks kept for reuse.
const spareTasks = 32

// task is one request with all that it needs to leave its worker.
type task struct {
	server *fuseserver.Server
	req    *fuseserver.Request // nil: FORGETs of the lane's part (fuseserver.Server.RunForgets)
	chain  virtqueue.Chain

	// Set by queue.parkLocked; mem and cancelled change under queue.mu.
	queue     *queue
	run       uint64
	slot      int           // in queue.parked
	mem       *guestmem.Map // nil once it is released
	cancel    <-chan struct{}
	own       chan struct{} // what cancel is in an isolated lane; used again until it is closed
	cancelled bool          // own is closed

	part  *fsbackend.Part // that FORGETs are of
	lane  *lane
	since time.Time // when it came to an isolated lane
	at    int       // in lane.running
	hung  bool      // it is given up, and its call still runs; under lane.mu

	// Of requests that wait for locks.
	waits   bool          // it is counted in queue.waiting; under queue.mu
	resting bool          // it is in the waitRoom, or on its way; under queue.mu
	delay   time.Duration // of its last rest
	due     time.Time     // when that is over
	hurry   uint64        // waitRoom.hurry before it was last tried
}

// finish handles the request to its end and gives it back to the guest, unless it has to rest.
func (t *task) finish() (rests bool) {
	if t.req == nil {
		t.server.RunForgets(t.part)
		return false
	}
	t.hurry = t.lane.pool.room.hurry.Load()
	t.req.MayBlock, t.req.Cancel = true, t.cancel
	written, done := t.server.Handle(t.req)
	if !done { // though it may sleep: it waits for a lock
		return t.queue.rest(t)
	}
	t.queue.finished(t, written)
	return false
}

// overdue says that the request has taken longer than its part may.
func (t *task) overdue(now time.Time) bool {
	part := t.lane.part
	return part != nil && part.Timeout > 0 && now.Sub(t.since) > part.Timeout
}

// pool runs requests that may sleep, on the threads of its lanes: one for each isolated part of the backend, and one that
// all others share.
type pool struct {
	device  *Device
	threads int // of each lane, at most
	shared  *lane
	room    *waitRoom
	full    atomic.Int32 // lanes that keep the device from fetching

	mu     sync.Mutex
	spare  []*task
	lanes  map[*fsbackend.Part]*lane // of isolated parts, made when first needed
	closed bool                      // no more of them

	// watch ends what takes too long in isolated lanes, and relieves workers.
	watch *watch
	calls atomic.Bool // the workers have made some when it last looked
}

func newPool(d *Device, threads int) *pool {
	p := &pool{device: d, threads: threads, lanes: make(map[*fsbackend.Part]*lane), watch: newWatch()}
	p.watch.look, p.watch.busy, p.watch.tick = p.patrol, p.busy, p.tick
	p.shared = newLane(p, nil)
	p.room = newWaitRoom()
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
	if t.req == nil {
		return
	}
	t.queue, t.mem, t.cancel, t.lane, t.hung = nil, nil, nil, nil, false
	t.waits, t.resting, t.delay = false, false, 0
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.spare) < spareTasks {
		p.spare = append(p.spare, t)
	}
}

// lane returns the lane for requests of part, which may be nil.
func (p *pool) lane(part *fsbackend.Part) *lane {
	if part == nil || !part.Isolated {
		return p.shared
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.lanes[part]
	switch {
	case part.Gone(), l == nil && p.closed:
		return p.shared // no call of it will be made
	case l == nil:
		l = newLane(p, part)
		p.watch.start()
		p.lanes[part] = l
	}
	return l
}

// gone ends the lane of a part that is no more. What is in it goes on to its end, without a call of the part.
func (p *pool) gone(part *fsbackend.Part) {
	p.mu.Lock()
	l := p.lanes[part]
	p.mu.Unlock()
	if l != nil {
		l.close()
	}
}

// dropLane forgets a lane whose threads have ended.
func (p *pool) dropLane(l *lane) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.lanes, l.part)
}

// hand gives t to its lane, or, where that has ended with its part, to the shared one.
func (p *pool) hand(t *task) {
	if l := t.lane; !l.hand(t) && l != p.shared {
		t.lane = p.shared
		p.shared.hand(t)
	}
}

// forgets has FORGETs of part made; nil stands for all that are not isolated.
func (p *pool) forgets(part *fsbackend.Part) {
	p.hand(&task{server: p.device.cfg.Server, lane: p.lane(part), part: part})
}

// unblock has the workers fetch again.
func (p *pool) unblock() {
	p.full.Add(-1)
	for _, w := range p.device.workers {
		w.poke()
	}
}

// patrol looks at everything once and says whether it has to be looked at again.
func (p *pool) patrol(late bool) (busy bool) {
	calls := false
	for _, w := range p.device.workers {
		calls = w.look(late) || calls
	}
	p.calls.Store(calls)
	if !p.lanesBusy() {
		return calls
	}
	now := time.Now()
	for _, q := range p.device.queues {
		q.giveUpOverdue(now)
	}
	for _, l := range p.isolated() {
		l.sweep(now)
	}
	return true
}

func (p *pool) busy() bool {
	return slices.ContainsFunc(p.device.workers, (*worker).calling) || p.lanesBusy()
}

func (p *pool) lanesBusy() bool {
	return slices.ContainsFunc(p.isolated(), (*lane).busy)
}

// tick returns how often the watch has to look.
func (p *pool) tick() time.Duration {
	if p.calls.Load() || !p.lanesBusy() {
		return callTick
	}
	tick := stalled / patrols
	for _, l := range p.isolated() {
		if l.part.Timeout > 0 {
			tick = min(tick, max(l.part.Timeout/patrols, minTick))
		}
	}
	return tick
}

// close ends the threads once their requests are done. After timeout it leaves behind those that are not, and says whose
// they are.
func (p *pool) close(timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.room.close()
	lanes := append(p.isolated(), p.shared)
	for _, l := range lanes {
		l.close()
	}
	var err error
	for _, l := range lanes {
		if !l.awaitGone(ctx) {
			err = errors.Join(err, l.leftBehind())
		}
	}
	p.watch.close()
	return err
}

// isolated returns the lanes but for the shared one.
func (p *pool) isolated() []*lane {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.AppendSeq(make([]*lane, 0, len(p.lanes)+1), maps.Values(p.lanes))
}

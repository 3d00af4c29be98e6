package virtiofs

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/ratelog"
)

const (
	// maxTasks bounds the requests that the shared lane holds. A device that has as many fetches no more until one ends.
	maxTasks = 512
	// maxPartTasks is the same for an isolated lane: a whole ring of QEMU's largest size may wait for a part that hangs
	// without anybody else's noticing.
	maxPartTasks = 1024
	// stalled is how long none of a full isolated lane's calls may end until it stops nobody else any longer, and answers EIO.
	stalled = 2 * time.Second
	// patrols is how often the watch looks while the shortest time that it has to notice goes by.
	patrols = 8
	// minTick bounds that.
	minTick = 10 * time.Millisecond
	// threadIdle is how long a lane's thread without work stays.
	threadIdle = 10 * time.Second
)

// lane runs requests that may sleep, each on a locked thread of a bounded, shrinking set. A lane of an isolated part
// shares with the others nothing that a call could keep, and gives calls up.
type lane struct {
	pool  *pool
	part  *fsbackend.Part // nil: the shared lane
	log   *ratelog.Logger // of part's troubles
	limit int             // tasks: a lane that has as many keeps the device from fetching

	mu       sync.Mutex
	waiting  []*task
	idle     []chan *task // one for each thread without work
	threads  int
	tasks    int  // waiting, or running and not hung
	blocking bool // counted in pool.full
	closed   bool
	gone     chan struct{} // closed when the last thread has ended after close

	// Of isolated lanes only.
	running []*task
	hung    int       // of them, given up
	ended   time.Time // when a call did, or when there was nothing to do
}

func newLane(p *pool, part *fsbackend.Part) *lane {
	l := &lane{pool: p, part: part, limit: maxTasks, gone: make(chan struct{})}
	if part != nil {
		l.limit = maxPartTasks
		l.log = ratelog.New(p.device.cfg.Log, 10*time.Second, 5)
	}
	return l
}

// hand takes over t, unless the lane is closed. The shared one is when requests have ended; FORGETs are lost then.
func (l *lane) hand(t *task) bool {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return false
	}
	if l.part != nil {
		t.since = time.Now()
		if l.tasks == 0 {
			l.ended = t.since
		}
	}
	l.tasks++
	l.fullLocked(t.since)
	switch n := len(l.idle); {
	case n > 0:
		l.startLocked(t)
		l.idle[n-1] <- t // buffered: it never waits
		l.idle = l.idle[:n-1]
	case l.threads < l.pool.threads:
		l.threads++
		l.startLocked(t)
		go l.thread(t)
	default:
		l.waiting = append(l.waiting, t)
	}
	l.mu.Unlock()
	if l.part != nil {
		l.pool.watch.rouse()
	}
	return true
}

// startLocked notes that a thread goes on with t.
func (l *lane) startLocked(t *task) {
	if l.part != nil {
		t.at = len(l.running)
		l.running = append(l.running, t)
	}
}

// fullLocked keeps the device from fetching, or no longer.
func (l *lane) fullLocked(now time.Time) {
	full := l.tasks >= l.limit && !l.stalledLocked(now)
	switch {
	case full && !l.blocking:
		l.pool.full.Add(1)
	case !full && l.blocking:
		l.pool.unblock()
	}
	l.blocking = full
}

func (l *lane) stalledLocked(now time.Time) bool {
	return l.part != nil && now.Sub(l.ended) > stalled
}

// refuses says that t, which hand has not been given, is to be answered EIO at once, for too many calls hang.
func (l *lane) refuses(t *task) bool {
	if l.part == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tasks >= l.limit && l.stalledLocked(time.Now()) {
		return true
	}
	return l.hung >= l.pool.threads && !t.req.Owed()
}

func (l *lane) thread(t *task) {
	runtime.LockOSThread() // see worker.run; a thread whose credentials could not be restored must not outlive this
	debug.SetPanicOnFault(true)
	work := make(chan *task, 1)
	idle := time.NewTimer(threadIdle)
	defer idle.Stop()
	for {
		rests := t.finish()
		if t = l.next(t, rests, work); t != nil {
			continue
		}
		idle.Reset(threadIdle)
		select {
		case t = <-work:
		case <-idle.C:
			t = l.leave(work)
		}
		if t == nil {
			l.exit()
			return
		}
	}
}

// next puts the finished task, or the one that is to rest, by and returns a waiting one, or nil after it has enlisted the thread as idle.
func (l *lane) next(finished *task, rests bool, work chan *task) *task {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.returnedLocked(finished)
	l.fullLocked(now)
	if rests {
		l.pool.room.add(finished)
	} else {
		l.pool.put(finished)
	}
	if len(l.waiting) > 0 {
		t := l.waiting[0]
		l.waiting[0] = nil
		l.waiting = l.waiting[1:]
		l.startLocked(t)
		return t
	}
	if l.closed {
		work <- nil
		return nil
	}
	l.idle = append(l.idle, work)
	return nil
}

// returnedLocked notes that t's call has returned.
func (l *lane) returnedLocked(t *task) (now time.Time) {
	if t.hung {
		l.hung--
	} else {
		l.tasks--
	}
	if l.part != nil {
		last := len(l.running) - 1
		l.running[t.at] = l.running[last]
		l.running[t.at].at = t.at
		l.running[last] = nil
		l.running = l.running[:last]
		now = time.Now()
		l.ended = now
	}
	return now
}

// busy says whether the lane has something that can take too long.
func (l *lane) busy() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tasks > 0
}

// sweep takes given-up requests into account: those that wait go, the threads of those that run are left behind until they
// return.
func (l *lane) sweep(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kept := l.waiting[:0]
	for _, t := range l.waiting {
		if t.req != nil && t.req.Aborted() && !t.req.Owed() {
			l.tasks--
			l.pool.put(t)
			continue
		}
		kept = append(kept, t)
	}
	clear(l.waiting[len(kept):])
	l.waiting = kept
	for _, t := range l.running {
		if t.hung {
			continue
		}
		if t.req == nil && t.overdue(now) {
			l.part.Stats.Timeouts.Add(1)
			l.gaveUp(fuseproto.FUSE_FORGET, now.Sub(t.since))
		} else if t.req == nil || !t.req.Aborted() {
			continue
		}
		t.hung = true
		l.hung++
		l.tasks--
	}
	l.fullLocked(now)
}

// gaveUp logs that a call took too long.
func (l *lane) gaveUp(opcode fuseproto.Opcode, after time.Duration) {
	l.log.Error("backend takes too long; the guest gets EIO", "extension", l.part.Name, "path", l.part.Path,
		"opcode", opcode, "after", after.Round(time.Millisecond))
}

// refused logs that a call was not even made.
func (l *lane) refused(opcode fuseproto.Opcode) {
	l.log.Error("backend hangs with too many requests; the guest gets EIO", "extension", l.part.Name, "path", l.part.Path,
		"opcode", opcode, "refused", l.part.Stats.Refused.Load())
}

// leave takes the thread off the idle list, unless a task is on its way to it.
func (l *lane) leave(work chan *task) *task {
	l.mu.Lock()
	for i, c := range l.idle {
		if c == work {
			l.idle = append(l.idle[:i], l.idle[i+1:]...)
			l.mu.Unlock()
			return nil
		}
	}
	l.mu.Unlock()
	return <-work
}

func (l *lane) exit() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.threads--
	if l.closed && l.threads == 0 {
		l.endLocked()
	}
}

// endLocked is called when the last thread has ended after close.
func (l *lane) endLocked() {
	close(l.gone)
	l.pool.dropLane(l)
}

// close ends the threads once their requests are done. A lane is closed with its part or with the pool.
func (l *lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	for _, work := range l.idle {
		work <- nil
	}
	l.idle = nil
	if l.threads == 0 {
		l.endLocked()
	}
}

// awaitGone waits for the threads to end after close, and says whether they did before ctx.
func (l *lane) awaitGone(ctx context.Context) bool {
	select {
	case <-l.gone:
		return true
	case <-ctx.Done():
	}
	select {
	case <-l.gone:
		return true
	default:
		return false
	}
}

// leftBehind says whose threads do not end: one that a call does not come back to cannot be waited for, and still uses the
// backend.
func (l *lane) leftBehind() error {
	if l.part == nil {
		return errors.New("requests are stuck in the kernel: their threads were left behind")
	}
	return fmt.Errorf("calls of extension %q at %s hang: their threads were left behind", l.part.Name, l.part.Path)
}

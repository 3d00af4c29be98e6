package virtiofs

import (
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

// threadIdle is how long a lane's thread without work stays.
const threadIdle = 10 * time.Second

// lane runs requests that may sleep, each on a locked thread of a bounded, shrinking set.
type lane struct {
	pool  *pool
	max   int // threads
	limit int // tasks: a lane that has as many keeps the device from fetching

	mu       sync.Mutex
	waiting  []*task
	idle     []chan *task // one for each thread without work
	threads  int
	tasks    int  // waiting or running
	blocking bool // counted in pool.full
	closed   bool
	gone     chan struct{} // closed when the last thread has ended after close
}

func newLane(p *pool, threads, limit int) *lane {
	return &lane{pool: p, max: threads, limit: limit, gone: make(chan struct{})}
}

// hand takes over t.
func (l *lane) hand(t *task) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tasks++
	if l.tasks >= l.limit && !l.blocking {
		l.blocking = true
		l.pool.full.Add(1)
	}
	switch n := len(l.idle); {
	case n > 0:
		l.idle[n-1] <- t // buffered: it never waits
		l.idle = l.idle[:n-1]
	case l.threads < l.max:
		l.threads++
		go l.thread(t)
	default:
		l.waiting = append(l.waiting, t)
	}
}

func (l *lane) thread(t *task) {
	runtime.LockOSThread() // see worker.run; a thread whose credentials could not be restored must not outlive this
	debug.SetPanicOnFault(true)
	work := make(chan *task, 1)
	idle := time.NewTimer(threadIdle)
	defer idle.Stop()
	for {
		t.finish()
		if t = l.next(t, work); t != nil {
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

// next puts the finished task by and returns a waiting one, or nil after it has enlisted the thread as idle.
func (l *lane) next(finished *task, work chan *task) *task {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tasks--
	if l.blocking && l.tasks < l.limit {
		l.blocking = false
		l.pool.unblock()
	}
	l.pool.put(finished)
	if len(l.waiting) > 0 {
		t := l.waiting[0]
		l.waiting[0] = nil
		l.waiting = l.waiting[1:]
		return t
	}
	if l.closed {
		work <- nil
		return nil
	}
	l.idle = append(l.idle, work)
	return nil
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
		close(l.gone)
	}
}

// close ends the threads once their requests are done.
func (l *lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, work := range l.idle {
		work <- nil
	}
	l.idle = nil
	if l.threads == 0 {
		close(l.gone)
	}
}

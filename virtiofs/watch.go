package virtiofs

import (
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// watch is a goroutine that looks from time to time at what may take too long, and sleeps while there is nothing.
type watch struct {
	// look sees to everything once and says whether it has to be looked at again. late says that the watch itself has had to
	// wait, as everybody else may have.
	look func(late bool) (busy bool)
	// busy says whether there is something to look at.
	busy func() bool
	// tick is how long to wait before the next look.
	tick func() time.Duration

	once    sync.Once
	asleep  atomic.Bool
	wake    chan struct{} // buffered
	closing chan struct{}
	done    sync.WaitGroup
}

func newWatch() *watch {
	return &watch{wake: make(chan struct{}, 1), closing: make(chan struct{})}
}

// start begins the watch, unless it has begun.
func (w *watch) start() {
	w.once.Do(func() { w.done.Go(w.run) })
}

// rouse has the watch look from now on. Where it does that already this is one load.
func (w *watch) rouse() {
	if w.asleep.Load() && w.asleep.CompareAndSwap(true, false) {
		select {
		case w.wake <- struct{}{}:
		default: // it has yet to see the last one
		}
	}
}

func (w *watch) close() {
	close(w.closing)
	w.done.Wait()
}

func (w *watch) run() {
	debug.SetPanicOnFault(true) // it completes requests
	due := time.Now().Add(w.tick())
	timer := time.NewTimer(time.Until(due))
	defer timer.Stop()
	for {
		busy := true
		select {
		case <-w.closing:
			return
		case <-w.wake: // nothing can have taken too long yet
		case now := <-timer.C:
			busy = w.look(max(now.Sub(due), time.Since(due)) > lateness)
		}
		if !busy {
			w.asleep.Store(true)
			// What came just before has roused nobody; what came since has sent a wake.
			busy = w.busy() && w.asleep.CompareAndSwap(true, false)
		}
		if busy {
			tick := w.tick()
			due = time.Now().Add(tick)
			timer.Reset(tick)
		}
	}
}

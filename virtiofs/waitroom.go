package virtiofs

import (
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// firstDelay and lastDelay are how long a request that waits for a lock rests before it is tried again: twice as long each
	// time. Nothing tells us of locks that other processes give back.
	firstDelay = time.Millisecond
	lastDelay  = 50 * time.Millisecond
	// waitingShare is the part of a ring that may be such requests. Without indirect descriptors each takes three: what gives
	// the lock back must still find room.
	waitingShare = 4
)

// waitRoom holds requests that wait for locks. No thread is theirs but while they are tried, in their lanes.
type waitRoom struct {
	hurry atomic.Uint64 // counts retryAll

	mu      sync.Mutex
	first   time.Duration // firstDelay
	most    time.Duration // lastDelay
	resting []*task
	next    time.Time // when run looks again
	running bool
	closed  bool
	wake    chan struct{} // buffered
	waiter  sync.WaitGroup
}

func newWaitRoom() *waitRoom {
	return &waitRoom{first: firstDelay, most: lastDelay, wake: make(chan struct{}, 1)}
}

// add takes over t until it is to be tried again.
func (w *waitRoom) add(t *task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.delay = min(max(2*t.delay, w.first), w.most)
	if w.closed {
		return // its queue has been stopped
	}
	t.due = time.Now().Add(t.delay)
	w.resting = append(w.resting, t)
	if !w.running {
		w.running = true
		w.waiter.Go(w.run)
		return
	}
	if t.due.Before(w.next) || t.hurry != w.hurry.Load() {
		w.rouse()
	}
}

// retryAll has everything tried at once, also what has not come back from a try yet.
func (w *waitRoom) retryAll() {
	w.hurry.Add(1)
	w.rouse()
}

func (w *waitRoom) rouse() {
	select {
	case w.wake <- struct{}{}:
	default: // it has yet to see the last one
	}
}

func (w *waitRoom) run() {
	debug.SetPanicOnFault(true) // lanes may complete requests at once
	timer := time.NewTimer(lastDelay)
	defer timer.Stop()
	for {
		due, next, more := w.take()
		for _, t := range due {
			t.queue.retry(t)
		}
		if !more {
			return
		}
		timer.Reset(time.Until(next))
		select {
		case <-timer.C:
		case <-w.wake:
		}
	}
}

// take returns what is to be tried now, and when to look again; without more, the goroutine is over.
func (w *waitRoom) take() (due []*task, next time.Time, more bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		w.resting, w.running = nil, false
		return nil, next, false
	}
	now, hurry := time.Now(), w.hurry.Load()
	kept := w.resting[:0]
	for _, t := range w.resting {
		if t.hurry != hurry || !t.due.After(now) {
			due = append(due, t)
			continue
		}
		if len(kept) == 0 || t.due.Before(next) {
			next = t.due
		}
		kept = append(kept, t)
	}
	clear(w.resting[len(kept):])
	w.resting = kept
	w.next, w.running = next, len(kept) > 0
	return due, next, w.running
}

// close ends the goroutine. Every queue has been stopped: nobody waits for an answer.
func (w *waitRoom) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.rouse()
	w.waiter.Wait()
}

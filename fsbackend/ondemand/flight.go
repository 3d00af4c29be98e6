package ondemand

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

// kind is the Materializer's method that a flight is a call of.
type kind bool

const (
	lookup kind = false
	open   kind = true
)

// flights are the Materializer's calls that run, by path.
type flights struct {
	materializer Materializer
	timeout      time.Duration
	slots        chan struct{}
	running      sync.WaitGroup

	mu     sync.Mutex
	byPath map[string]*flight
}

// flight is one call, for all who wait for it.
type flight struct {
	kind    kind
	cancel  context.CancelFunc
	waiters int           // under flights.mu: those who still wait; at 0 the call is cancelled, and nobody joins it any more
	done    chan struct{} // closed after errno and panicked are set
	errno   fsbackend.Errno
	// panicked is what the call panicked with: it is for the thread of a request to do the same, where it is told of and costs that
	// request only.
	panicked any
}

func (f *flights) init(m Materializer, timeout time.Duration, running int) {
	f.materializer, f.timeout = m, timeout
	f.slots = make(chan struct{}, running)
	f.byPath = make(map[string]*flight)
}

// close waits for calls that nobody waits for any more.
func (f *flights) close() { f.running.Wait() }

// wait has the Materializer called for path, or joins a call that runs.
func (f *flights) wait(c *fsbackend.Context, k kind, path string) fsbackend.Errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	limit := time.NewTimer(f.timeout)
	defer limit.Stop()
	for {
		call, joined := f.join(k, path)
		errno := fsbackend.OK
		select {
		case <-call.done:
			if !joined {
				continue // it was another call's: ours may begin now
			}
			if call.panicked != nil {
				panic(call.panicked)
			}
			return call.errno
		case <-c.Cancel:
			errno = unix.EINTR
		case <-limit.C:
			errno = unix.EIO
		}
		if joined {
			f.leave(call)
		}
		return errno
	}
}

// join returns the call for path, and whether it is one to wait for the result of; if not, it is one to wait for the end of.
func (f *flights) join(k kind, path string) (*flight, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if call := f.byPath[path]; call != nil {
		joined := call.kind == k && call.waiters > 0
		if joined {
			call.waiters++
		}
		return call, joined
	}
	ctx, cancel := context.WithTimeout(context.Background(), f.timeout)
	call := &flight{kind: k, cancel: cancel, waiters: 1, done: make(chan struct{})}
	f.byPath[path] = call
	f.running.Go(func() { f.run(ctx, call, path) })
	return call, true
}

// leave is one who waited for call less.
func (f *flights) leave(call *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if call.waiters--; call.waiters == 0 {
		call.cancel()
	}
}

func (f *flights) run(ctx context.Context, call *flight, path string) {
	defer call.cancel()
	defer func() {
		if r := recover(); r != nil {
			call.panicked = fmt.Sprintf("materialise %s: %v\n%s", path, r, debug.Stack())
		}
		f.mu.Lock()
		delete(f.byPath, path)
		f.mu.Unlock()
		close(call.done)
	}()
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	case <-ctx.Done():
		call.errno = unix.EIO
		return
	}
	method := f.materializer.Lookup
	if call.kind == open {
		method = f.materializer.Open
	}
	call.errno = errnoOf(method(ctx, path))
}

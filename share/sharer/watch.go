package sharer

import (
	"context"
	"sync"
)

// watch is the one loop that follows changes.
type watch struct {
	mu      sync.Mutex
	stopped bool
	cancel  context.CancelFunc // nil: no loop
	done    chan struct{}

	// more has a token when there is more to follow.
	more chan struct{}
}

func newWatch() watch { return watch{more: make(chan struct{}, 1)} }

// rearm allows a start again.
func (w *watch) rearm() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = false
}

// again has the loop look for what there is to follow.
func (w *watch) again() {
	select {
	case w.more <- struct{}{}:
	default:
	}
}

// begin says whether to run a loop, and until when. Who does calls end after it.
func (w *watch) begin(ctx context.Context) (_ context.Context, end func(), ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped || w.cancel != nil {
		return nil, nil, false
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	w.cancel, w.done = cancel, done
	return ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		cancel()
		w.cancel = nil
		close(done)
	}, true
}

// stop ends the loop and any later one, and waits for it.
func (w *watch) stop(ctx context.Context) {
	w.mu.Lock()
	w.stopped = true
	cancel, done := w.cancel, w.done
	w.mu.Unlock()
	if cancel == nil {
		return
	}
	cancel()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// StartFileEventWatcher follows changes in watchable volumes. With Grafts it counts what the daemon tells of them: to the guest it
// is the daemon that tells it. With Copy it copies what has changed. With BindMounts there is nothing to do, as Kata's agent polls.
func (s *Sandbox) StartFileEventWatcher(ctx context.Context) error {
	following, end, ok := s.watch.begin(ctx)
	if !ok {
		s.log.Debug("start of the watcher: it runs already, or was stopped")
		return nil
	}
	defer end()
	if err := s.back.follow(following); err != nil {
		return err
	}
	return ctx.Err()
}

// StopFileEventWatcher ends StartFileEventWatcher and waits for it to return.
func (s *Sandbox) StopFileEventWatcher(ctx context.Context) { s.watch.stop(ctx) }

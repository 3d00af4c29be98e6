package imagefetch

import (
	"context"
	"errors"
	"sync"
	"time"
)

// errYield is why a background task ends when something is asked for.
var errYield = errors.New("something was asked for")

// gate lets background tasks run while nothing is asked for.
type gate struct {
	silence time.Duration
	slots   chan struct{}

	mu      sync.Mutex
	asking  int
	last    time.Time // that something was asked for
	changed chan struct{}
	running map[*context.CancelCauseFunc]struct{}
}

func newGate(silence time.Duration, concurrency int) *gate {
	return &gate{
		silence: silence, slots: make(chan struct{}, concurrency),
		changed: make(chan struct{}), running: map[*context.CancelCauseFunc]struct{}{},
	}
}

// ask ends what runs in the background until the function it returns is called, and for the silence after that.
func (g *gate) ask() (done func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asking++
	for cancel := range g.running {
		(*cancel)(errYield)
	}
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.asking--
		g.last = time.Now()
		if g.asking == 0 {
			close(g.changed)
			g.changed = make(chan struct{})
		}
	}
}

// run has f run when it is its turn, with a context that ends when something is asked for, and returns errYield then. It returns
// when f has: what f writes to is not touched after that.
func (g *gate) run(ctx context.Context, f func(ctx context.Context) error) error {
	select {
	case g.slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-g.slots }()
	taskCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := g.enter(ctx, &cancel); err != nil {
		return err
	}
	err := f(taskCtx)
	g.mu.Lock()
	delete(g.running, &cancel)
	g.mu.Unlock()
	if err != nil && errors.Is(context.Cause(taskCtx), errYield) {
		return errYield
	}
	return err
}

// enter waits until it is silent.
func (g *gate) enter(ctx context.Context, cancel *context.CancelCauseFunc) error {
	for {
		g.mu.Lock()
		changed := g.changed
		wait := time.Until(g.last.Add(g.silence))
		if g.asking == 0 && wait <= 0 {
			g.running[cancel] = struct{}{}
			g.mu.Unlock()
			return nil
		}
		var timer <-chan time.Time
		if g.asking == 0 {
			timer, changed = time.After(wait), nil
		}
		g.mu.Unlock()
		select {
		case <-timer:
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// limiter lets so many bytes a second pass.
type limiter struct {
	rate int64

	mu   sync.Mutex
	next time.Time // when the next byte is due
}

// burst is for how long what was not used may be used later: a timer that is late, on a machine that is busy, costs nothing then.
const burst = 100 * time.Millisecond

// batch is how many bytes are asked for at once, of at most so many: what has been asked for comes, as fast as the network has it and
// as far as sockets hold it, whatever is read of it.
func (l *limiter) batch(most int64) int64 {
	if l == nil {
		return most
	}
	return min(most, max(l.rate/16, 1))
}

// wait returns when n more bytes may pass, or hurry is closed.
func (l *limiter) wait(ctx context.Context, n int, hurry <-chan struct{}) error {
	l.mu.Lock()
	now := time.Now()
	if oldest := now.Add(-burst); l.next.Before(oldest) {
		l.next = oldest
	}
	l.next = l.next.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	pause := l.next.Sub(now)
	l.mu.Unlock()
	if pause <= 0 {
		return nil
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-hurry:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

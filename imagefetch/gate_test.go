package imagefetch

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

// TestGate has a background task end when something is asked for, not go on while it is, and be over when run returns.
func TestGate(t *testing.T) {
	const silence = 50 * time.Millisecond
	g := newGate(silence, 2)
	running := make(chan struct{})
	over := false
	result := make(chan error)
	go func() {
		result <- g.run(t.Context(), func(ctx context.Context) error {
			close(running)
			<-ctx.Done()
			time.Sleep(20 * time.Millisecond) // it takes its time to stop
			over = true
			return ctx.Err()
		})
	}()
	<-running
	done := g.ask()
	if err := <-result; !errors.Is(err, errYield) || !over {
		t.Errorf("the task ended with %v, and run returned after it: %v", err, over)
	}
	second := g.ask()
	var began time.Time
	go func() {
		result <- g.run(t.Context(), func(context.Context) error {
			began = time.Now()
			return nil
		})
	}()
	done()
	time.Sleep(2 * silence)
	ended := time.Now()
	second()
	if err := <-result; err != nil {
		t.Error(err)
	}
	if d := began.Sub(ended); d < silence-5*time.Millisecond {
		t.Errorf("the next task began %v after the last question was answered", d)
	}
	// One that waits can be told not to.
	done = g.ask()
	defer done()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.run(ctx, func(context.Context) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("a task that may not wait: %v", err)
	}
}

// TestGateSlots has no more tasks run than may.
func TestGateSlots(t *testing.T) {
	g := newGate(0, 2)
	var mu sync.Mutex
	now, most := 0, 0
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			_ = g.run(t.Context(), func(context.Context) error {
				mu.Lock()
				now++
				most = max(most, now)
				mu.Unlock()
				time.Sleep(5 * time.Millisecond)
				mu.Lock()
				now--
				mu.Unlock()
				return nil
			})
		})
	}
	all.Wait()
	if most != 2 {
		t.Errorf("%d tasks ran at once", most)
	}
}

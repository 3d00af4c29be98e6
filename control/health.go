package control

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

// A health asks the daemon whether it is well, in a goroutine of its own: a daemon that is stuck may not even heed a context.
// There is never more than one, however many ask.
type health struct {
	mu     sync.Mutex
	asking *answer // nil while nobody asks
}

type answer struct {
	done chan struct{} // closed when err is there
	err  error
}

// check returns nil if the daemon answers in time.
func (h *health) check(d Daemon, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	h.mu.Lock()
	a := h.asking
	if a == nil {
		a = &answer{done: make(chan struct{})}
		h.asking = a
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			a.err = api.Errorf(api.CodeInternal, "the daemon panicked")
			defer func() {
				_ = recover()
				h.mu.Lock()
				h.asking = nil
				h.mu.Unlock()
				close(a.done)
			}()
			_, a.err = d.Info(ctx)
		}()
	}
	h.mu.Unlock()
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func getHealth(c *call) error {
	if err := c.server.health.check(c.server.cfg.Daemon, c.server.limits.health); err != nil {
		_, e := c.describe(err)
		return &api.Error{Code: api.CodeUnavailable, Message: "the daemon is not well: " + e.Error()}
	}
	return c.send(http.StatusOK, "text/plain; charset=utf-8", []byte("ok\n"))
}

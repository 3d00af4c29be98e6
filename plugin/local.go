package plugin

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
)

// Local serves a Plugin that is compiled into the program, over a socket as if it was another one: it has the same limits, and
// what goes wrong with it costs its own layers only.
type Local struct {
	plugin Plugin
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc

	mu     sync.Mutex    // held in Next
	served chan struct{} // closed when the last socket is no longer served; nil before the first
}

// NewLocal returns p as a source of sockets. log is told when p panics.
func NewLocal(p Plugin, log *slog.Logger) *Local {
	l := &Local{plugin: p, log: log}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// Next returns the server's end of a new socket, once the one before is no longer served.
func (l *Local) Next(ctx context.Context) (*os.File, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.served != nil {
		select {
		case <-l.served:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if l.ctx.Err() != nil {
		return nil, errors.New("the plug-in was closed")
	}
	server, plugin, err := Pair()
	if err != nil {
		return nil, err
	}
	served := make(chan struct{})
	l.served = served
	go func() {
		defer close(served)
		if err := Serve(l.ctx, plugin, l.plugin, l.log); err != nil && l.log != nil {
			l.log.Warn("layer plug-in ended", "plugin", l.plugin.Name(), "error", err)
		}
	}()
	return server, nil
}

// Close ends the plug-in, and returns when its calls have.
func (l *Local) Close() error {
	l.cancel()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.served != nil {
		<-l.served
	}
	return nil
}

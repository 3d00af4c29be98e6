package overlay

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

// MaxFreeze is how long a Freeze lasts that nobody ends: a guest must not wait for ever for an operator's program that has died.
const MaxFreeze = 5 * time.Minute

// ErrFreezeLost says that changes went on before Thaw: what was copied meanwhile may be of no one moment.
var ErrFreezeLost = fmt.Errorf("the freeze has ended by itself: it lasted longer than %v", MaxFreeze)

// gate is what each change passes. Those under way are counted by the thread's shard, so that threads do not meet.
type gate struct {
	closed atomic.Bool
	passed [16]struct {
		n atomic.Int64
		_ [56]byte
	}

	mu     sync.Mutex
	opened chan struct{} // closed when the gate opens again
	left   chan struct{} // holds a token when a change has ended behind the closed gate
	timer  *time.Timer
}

// begin says that a change begins; end follows if it returns 0.
func (fs *FS) begin(c *fsbackend.Context) errno {
	if fs.upper == nil {
		return unix.EROFS
	}
	g := &fs.gate
	for {
		n := &g.passed[c.Shard%16].n
		n.Add(1)
		if !g.closed.Load() {
			return 0
		}
		n.Add(-1)
		g.tell()
		if !c.MayBlock {
			return fsbackend.ErrMayBlock
		}
		g.mu.Lock()
		opened := g.opened
		g.mu.Unlock()
		if opened == nil {
			continue
		}
		select {
		case <-opened:
		case <-c.Cancel:
			return unix.EINTR
		}
	}
}

func (fs *FS) end(c *fsbackend.Context) {
	g := &fs.gate
	g.passed[c.Shard%16].n.Add(-1)
	if g.closed.Load() {
		g.tell()
	}
}

// tell has Freeze look again.
func (g *gate) tell() {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case g.left <- struct{}{}:
	default: // also where it is nil
	}
}

// Freeze has all changes wait until Thaw, MaxFreeze at most, and returns when none is under way any more, or when ctx ends.
func (fs *FS) Freeze(ctx context.Context) error {
	g := &fs.gate
	g.mu.Lock()
	if g.opened != nil {
		g.mu.Unlock()
		return errors.New("freeze overlay: it is frozen already")
	}
	g.opened, g.left = make(chan struct{}), make(chan struct{}, 1)
	left := g.left
	g.closed.Store(true)
	g.timer = time.AfterFunc(MaxFreeze, func() { _ = fs.thaw() })
	g.mu.Unlock()
	for {
		under := int64(0)
		for i := range g.passed {
			under += g.passed[i].n.Load()
		}
		if under == 0 {
			return nil
		}
		select {
		case <-left:
		case <-ctx.Done():
			_ = fs.thaw()
			return fmt.Errorf("freeze overlay: wait for %d changes under way: %w", under, ctx.Err())
		}
	}
}

// Thaw ends Freeze. ErrFreezeLost says that it had ended before.
func (fs *FS) Thaw() error {
	if !fs.thaw() {
		return ErrFreezeLost
	}
	return nil
}

// thaw says whether the gate was closed. Behind it, lower layers may have been changed too: what the upper one holds is applied to
// them so.
func (fs *FS) thaw() bool {
	fs.lowersChanged()
	return fs.gate.thaw()
}

func (g *gate) thaw() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.opened == nil {
		return false
	}
	g.timer.Stop()
	g.closed.Store(false)
	close(g.opened)
	g.opened, g.left = nil, nil
	return true
}

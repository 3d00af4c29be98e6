package fsbackend

import (
	"sync"
	"sync/atomic"
)

// Gate stands between a Sink or Source and the guest's memory, where somebody else than the call that uses it may have to
// take that memory away: a call that hangs must not write into pages that the guest has got back. The zero value is open.
type Gate struct {
	mu     sync.Mutex // held during a transfer
	closed atomic.Bool
}

// Close lets no further transfer begin, for ever. It does not wait: it reports whether none is under way either; if one is,
// ask again later.
func (g *Gate) Close() bool {
	g.closed.Store(true)
	if !g.mu.TryLock() {
		return false
	}
	g.mu.Unlock()
	return true
}

// Closed says whether a transfer may have been turned away.
func (g *Gate) Closed() bool { return g.closed.Load() }

// enter begins a transfer, unless the gate is closed; leave ends it. No gate lets everything through.
func (g *Gate) enter() bool { return g == nil || g.lock() }

func (g *Gate) lock() bool {
	g.mu.Lock()
	if g.closed.Load() {
		g.mu.Unlock()
		return false
	}
	return true
}

func (g *Gate) leave() {
	if g != nil {
		g.mu.Unlock()
	}
}

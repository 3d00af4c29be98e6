package fsbackend

import (
	"sync/atomic"
	"time"
)

// Divided is a backend that is put together from others, its parts, between which it chooses by nodeid. What goes wrong
// in one part costs the requests of that part alone.
type Divided interface {
	// PartOf returns the part that answers requests for node. It takes no lock and never returns nil: unknown nodes belong to the
	// root's part. INIT, DESTROY and BATCH_FORGET belong to no part.
	PartOf(node uint64) *Part
}

// Part is one of the backends of a Divided one, as those see it who run its calls.
type Part struct {
	// Name is the extension's that serves it, "" for what comes with the daemon; it is for the log.
	Name string
	// Path is where in the share it is, "/" for the root.
	Path string
	// Isolated says that its calls run on threads that serve no other part, and are given up after Timeout. The calls of
	// parts that are not isolated share their threads.
	Isolated bool
	// Slow says that its calls may sleep, as the interface Slow does for a backend. An isolated part that is not Slow
	// has promised never to sleep.
	Slow bool
	// Timeout is how long a call may take until the guest gets EIO; 0 waits for ever. Only for Isolated.
	Timeout time.Duration
	// Enter and Leave, unless nil, are called on the thread of a call before and after it.
	Enter, Leave func()

	// Stats counts what went wrong.
	Stats PartStats

	gone atomic.Bool
}

// PartStats counts what went wrong in a part.
type PartStats struct {
	Panics   atomic.Uint64 // calls that panicked
	Timeouts atomic.Uint64 // calls given up
	Refused  atomic.Uint64 // requests answered EIO without a call, because too many calls hang
	Errors   atomic.Uint64 // calls that returned EIO, and replies that broke the contract
}

// Changing is a Divided whose parts may come and go while it is in use.
type Changing interface {
	Divided
	// OnGone has f called, once for each part that has gone for good: PartOf no longer returns it, no call of it runs, and none
	// will. f must not wait for a call of the backend. Call OnGone before the first request.
	OnGone(f func(*Part))
}

// SetGone says that the part has gone; its owner calls it before what OnGone was given.
func (p *Part) SetGone() { p.gone.Store(true) }

// Gone says whether the part has gone: nothing is to be kept for it any more.
func (p *Part) Gone() bool { return p.gone.Load() }

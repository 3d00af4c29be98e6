package virtiofs

import (
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/fuseserver"
)

type counters struct {
	frontEnds, chainErrors, ringErrors, abandoned, relieved atomic.Uint64

	connected atomic.Int32 // Serve's that run
}

// Stats are counts since the device was made, and gauges of what it is at.
type Stats struct {
	Connected bool   // a front-end is (gauge); whether its guest has mounted, Requests.Session says
	FrontEnds uint64 // that have connected so far
	Queues    []QueueStats

	ChainErrors uint64 // malformed descriptor chains, completed with nothing written
	RingErrors  uint64 // queues stopped because their ring was broken
	Abandoned   uint64 // requests given up when their queue was stopped
	// Relieved counts calls that took so long that another thread has gone on with their queues. SlowOpcodes (gauge) are those
	// whose calls have slept where they were not to, Avoided the requests of theirs that the pool was given at once.
	Relieved    uint64
	SlowOpcodes int
	Avoided     uint64

	Requests fuseserver.Snapshot
}

// QueueStats are one virtqueue's; 0 is hiprio's.
type QueueStats struct {
	Size  int // entries of its ring (gauge), 0 while it is stopped
	Depth int // requests fetched and not completed (gauge)
	// Kicks woke the queue's worker; several before it looks are one. Polls are looks at the ring that no kick came before: at
	// rings without a kick fd, after a batch, and beside another queue of the worker's.
	Kicks, Polls uint64
	// Notifications were sent to the guest: one for a batch, and none without a call fd. A pipe that is full takes none, but
	// they count.
	Notifications uint64

	// PollWindow is how long its worker polls at present before it sleeps (gauge), 0 when it does not. PollHits are polls after
	// this queue was empty that have ended with a request, PollMisses those that have not, PollTime how long all took.
	PollWindow           time.Duration
	PollHits, PollMisses uint64
	PollTime             time.Duration
}

// Stats returns the present values. It may be called from any thread at any time, and holds up no request: each queue's lock
// is taken for a few instructions.
func (d *Device) Stats() Stats {
	s := Stats{
		Connected:   d.stats.connected.Load() > 0,
		FrontEnds:   d.stats.frontEnds.Load(),
		Queues:      make([]QueueStats, len(d.queues)),
		ChainErrors: d.stats.chainErrors.Load(),
		RingErrors:  d.stats.ringErrors.Load(),
		Abandoned:   d.stats.abandoned.Load(),
		Relieved:    d.stats.relieved.Load(),
		SlowOpcodes: d.slow.count(),
		Avoided:     d.slow.avoided.Load(),
		Requests:    d.cfg.Server.Snapshot(),
	}
	for i, q := range d.queues {
		s.Queues[i] = q.stats()
	}
	return s
}

func (q *queue) stats() QueueStats {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := QueueStats{
		Kicks: q.kicks.Load(), Polls: q.polls, Notifications: q.notifications,
		PollHits: q.hits.Load(), PollMisses: q.misses.Load(), PollTime: time.Duration(q.polling.Load()),
	}
	if q.vq != nil {
		s.Size, s.Depth, s.PollWindow = q.num, q.inflight, time.Duration(q.worker.window.Load())
	}
	return s
}

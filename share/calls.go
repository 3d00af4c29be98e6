package share

import (
	"sync"
	"sync/atomic"
)

// calls counts the calls of a part under way, until there are none and none is to begin any more. Each thread counts in a
// shard of its own (fsbackend.Context.Shard): queues that use one graft do not wait for each other's cache lines.
//
// To begin, a call counts itself and then looks at state. Who closes sets state and then adds up: so either they see the
// call, or it sees them, steps back and waits for what they find.
type calls struct {
	shards *[shards]callShard
	state  atomic.Uint32
	mu     sync.Mutex // held while state is closing
	// kept is what keeps them open beside calls: handles. It rises only during a call, so whoever finds no calls, and then
	// nothing here, has not missed any.
	kept atomic.Int64
}

// callShard fills a cache line.
type callShard struct {
	n atomic.Int64 // oneCall and oneChange for each
	_ [56]byte
}

const (
	oneCall   = 1
	oneChange = 1 << 32 // a call that may change something
)

// What calls.state is.
const (
	callsOpen uint32 = iota
	callsClosing
	callsClosed
)

// shards cost a graft 2 KiB.
const shards = 32

func (c *calls) at(shard uint8) *atomic.Int64 {
	return &c.shards[shard%shards].n
}

// enter counts one call as by, unless they are closed.
func (c *calls) enter(shard uint8, by int64) bool {
	n := c.at(shard)
	n.Add(by)
	return c.state.Load() == callsOpen || c.await(n, by)
}

// await is enter while somebody is closing, or has.
func (c *calls) await(n *atomic.Int64, by int64) bool {
	n.Add(-by)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Load() != callsOpen {
		return false
	}
	n.Add(by)
	return true
}

// close lets no further call begin, if there is none and nothing else that is kept. It is true once.
func (c *calls) close() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Load() != callsOpen {
		return false
	}
	c.state.Store(callsClosing)
	if !c.none() {
		c.state.Store(callsOpen)
		return false
	}
	c.state.Store(callsClosed)
	return true
}

func (c *calls) none() bool {
	for i := range c.shards {
		if c.shards[i].n.Load() != 0 {
			return false
		}
	}
	return c.kept.Load() == 0
}

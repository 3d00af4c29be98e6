package share

import (
	"sync"
	"sync/atomic"
)

// calls counts the calls of a part under way, until there are none and none is to begin any more. Each thread counts in a
// shard of its own (fsbackend.Context.Shard): queues that use one graft do not wait for each other's cache lines.
//
// Who closes makes all shards negative in turn, and takes that back where a call is found. A call that comes meanwhile finds
// the same, steps back, and waits for what becomes of it.
type calls struct {
	shards *[shards]callShard
	mu     sync.Mutex // held while closing
	closed bool
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
	closing   = 1 << 62
)

// shards cost a graft 2 KiB.
const shards = 32

func (c *calls) at(shard uint8) *atomic.Int64 {
	return &c.shards[shard%shards].n
}

// enter counts a call, unless they are closed.
func (c *calls) enter(shard uint8) bool {
	return c.at(shard).Add(oneCall) > 0 || c.await(shard)
}

// await is the rest of enter while somebody is closing, or has.
func (c *calls) await(shard uint8) bool {
	n := c.at(shard)
	n.Add(-oneCall)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	n.Add(oneCall)
	return true
}

// changing says whether there are calls in a shard that may change something.
func (c *calls) changing(shard uint8) bool {
	n := c.at(shard).Load()
	if n < 0 {
		n += closing
	}
	return n >= oneChange
}

// close lets no further call begin, if there is none and nothing else that is kept. It is true once.
func (c *calls) close() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	for i := range c.shards {
		if c.shards[i].n.Add(-closing) != -closing {
			c.open(i + 1)
			return false
		}
	}
	if c.kept.Load() != 0 {
		c.open(shards)
		return false
	}
	c.closed = true
	return true
}

// open takes back what close has done to the first shards.
func (c *calls) open(first int) {
	for i := range first {
		c.shards[i].n.Add(closing)
	}
}

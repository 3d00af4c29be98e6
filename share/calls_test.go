package share

import (
	"sync"
	"sync/atomic"
	"testing"
)

// sum is what is counted, of calls that are open or closed.
func (c *calls) sum() (n int64) {
	for i := range c.shards {
		if n += c.shards[i].n.Load(); c.closed {
			n += closing
		}
	}
	return n
}

// TestCalls closes while threads begin calls, some of which leave a handle that another call takes away: nobody is inside
// afterwards, and somebody has closed.
func TestCalls(t *testing.T) {
	for range 300 {
		c := calls{shards: new([shards]callShard)}
		var inside atomic.Int64
		var closed atomic.Int32
		var threads sync.WaitGroup
		end := func() {
			if c.close() {
				if closed.Add(1) != 1 {
					t.Error("closed twice")
				}
				if inside.Load() != 0 || c.kept.Load() != 0 {
					t.Errorf("closed with %d calls under way and %d handles", inside.Load(), c.kept.Load())
				}
			}
		}
		c.kept.Store(1)
		for i := range 4 {
			threads.Go(func() {
				shard := uint8(i + i/3) // two of them meet in one
				call := func(do func()) bool {
					if !c.enter(shard) {
						return false
					}
					inside.Add(1)
					if closed.Load() != 0 {
						t.Error("a call has begun after the end")
					}
					do()
					inside.Add(-1)
					c.at(shard).Add(-oneCall)
					end()
					return true
				}
				for range 50 {
					if !call(func() { c.kept.Add(1) }) {
						return // the other threads have come to their ends
					}
					call(func() { c.kept.Add(-1) })
				}
				if i == 0 {
					call(func() { c.kept.Add(-1) })
				}
			})
		}
		threads.Wait()
		if closed.Load() != 1 || c.enter(0) {
			t.Fatalf("closed %d times, expected once and for all", closed.Load())
		}
		if n := c.sum(); n != 0 {
			t.Fatalf("%d calls are left", n)
		}
	}
}

// BenchmarkCalls has every thread begin and end calls of one part.
func BenchmarkCalls(b *testing.B) {
	for _, tt := range []struct {
		name   string
		spread uint32
	}{{"shared", 0}, {"sharded", 1}} {
		b.Run(tt.name, func(b *testing.B) {
			c := calls{shards: new([shards]callShard)}
			var threads atomic.Uint32
			b.RunParallel(func(pb *testing.PB) {
				shard := uint8(threads.Add(1) * tt.spread)
				for pb.Next() {
					if !c.enter(shard) {
						b.Error("closed")
					}
					c.at(shard).Add(-oneCall)
				}
			})
		})
	}
}

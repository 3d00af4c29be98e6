package imagefetch

import (
	"maps"
	"sync/atomic"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
)

// Stats are what an image counts, for people who watch. Bytes of chunks are those of their content, unpacked.
type Stats struct {
	// Size and Fetched are the bytes of the layers as the registry has them, and how much of that is here: gauges.
	Size    int64 `json:"size"`
	Fetched int64 `json:"fetched"`
	// Requests and Bytes are what was asked for blobs and what came.
	Requests int64 `json:"requests"`
	Bytes    int64 `json:"bytes"`
	// Hits are chunks that were asked for and in the cache, Misses those that were not.
	Hits      int64 `json:"hits"`
	HitBytes  int64 `json:"hit_bytes"`
	Misses    int64 `json:"misses"`
	MissBytes int64 `json:"miss_bytes"`
	// Verified are chunks that came and were what they should be, Corrupt those that were not.
	Verified int64 `json:"verified"`
	Corrupt  int64 `json:"corrupt"`
	// FetchErrors are attempts at a host that came to nothing: see registry.Client.Failures. ReadErrors are chunks that who asked for them
	// did not get: "unavailable" and "corrupt".
	FetchErrors map[string]int64 `json:"fetch_errors,omitempty"`
	ReadErrors  map[string]int64 `json:"read_errors,omitempty"`
	// CacheBytes are what the cache takes, which other images may share, and CacheBudget what it may.
	CacheBytes  int64 `json:"cache_bytes"`
	CacheBudget int64 `json:"cache_budget"`
}

// counts are those of Stats that are no layer's.
type counts struct {
	hits, hitBytes, misses, missBytes, verified, corrupt atomic.Int64
	unavailableReads, corruptReads                       atomic.Int64
}

func (c *counts) hit(chunk *store.Chunk) {
	c.hits.Add(1)
	c.hitBytes.Add(int64(chunk.Size))
}

func (c *counts) miss(chunk *store.Chunk) {
	c.misses.Add(1)
	c.missBytes.Add(int64(chunk.Size))
}

// Stats may be called at any time. Before the layers are known nothing is said of them.
func (m *Image) Stats() Stats {
	m.mu.Lock()
	layers := m.layers
	m.mu.Unlock()
	c := &m.counts
	s := Stats{
		Hits: c.hits.Load(), HitBytes: c.hitBytes.Load(), Misses: c.misses.Load(), MissBytes: c.missBytes.Load(),
		Verified: c.verified.Load(), Corrupt: c.corrupt.Load(), FetchErrors: maps.Collect(m.client.Failures()),
		ReadErrors: map[string]int64{"unavailable": c.unavailableReads.Load(), "corrupt": c.corruptReads.Load()},
		CacheBytes: m.cache.Usage(), CacheBudget: m.cache.Capacity(),
	}
	for _, l := range layers {
		st := l.status()
		s.Size += st.Size
		s.Fetched += st.Fetched
		s.Requests += st.Requests
		s.Bytes += st.Bytes
	}
	return s
}

package imagefetch

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicefs/sluice/imagefetch/registry"
)

// ahead are some of a layer's streams that are fetched before anybody asks for them, in order.
type ahead struct {
	l       *layer
	streams []uint32
}

func (a *ahead) bytes() (n int64) {
	for _, s := range a.streams {
		n += a.l.streams[s].end - a.l.streams[s].off
	}
	return n
}

// prefetchJobs are what is to be fetched at once: what the list has, and then what the layers themselves say.
func (m *Image) prefetchJobs(layers []*layer) (jobs []ahead) {
	if m.cfg.Prefetch.Off {
		return nil
	}
	if m.cfg.Prefetch.List != "" {
		list, err := readList(m.cfg.Prefetch.List)
		if err != nil {
			m.log.Warn("the prefetch list cannot be used", "err", err)
		}
		jobs = m.listed(layers, list)
	}
	for _, l := range layers {
		end := l.landmark
		if end < 0 {
			end = m.cfg.Prefetch.Size
		}
		if end <= 0 || l.plain {
			continue
		}
		a := ahead{l: l}
		for s, st := range l.streams {
			if st.end > end {
				break
			}
			a.streams = append(a.streams, uint32(s))
		}
		jobs = append(jobs, m.batches(a)...)
	}
	return jobs
}

func readList(path string) ([]TraceEntry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return PrefetchList(f)
}

// listed are the streams of files, in the order of the list; those of one layer that follow each other are fetched together.
func (m *Image) listed(layers []*layer, list []TraceEntry) (jobs []ahead) {
	if len(list) == 0 {
		return nil
	}
	type file struct {
		l       *layer
		streams []uint32
	}
	files := map[TraceEntry]file{}
	for _, e := range list {
		files[e] = file{}
	}
	for _, l := range layers {
		for i := range l.entries {
			e := &l.entries[i]
			k := TraceEntry{l.digest, e.Path}
			if _, ok := files[k]; !ok || l.plain || len(e.Chunks) == 0 {
				continue
			}
			f := file{l: l}
			for _, span := range e.Chunks {
				f.streams = append(f.streams, l.at[span.Chunk].stream)
			}
			files[k] = f
		}
	}
	var a ahead
	n, batch := int64(0), m.limit.batch(m.cfg.Background.Batch)
	flush := func() {
		if len(a.streams) > 0 {
			slices.Sort(a.streams)
			a.streams = slices.Compact(a.streams)
			jobs = append(jobs, a)
		}
		a, n = ahead{}, 0
	}
	for _, e := range list {
		f := files[e]
		for _, s := range f.streams {
			if a.l != f.l || n >= batch || len(a.streams) >= registry.MaxRanges {
				flush()
				a.l = f.l
			}
			a.streams = append(a.streams, s)
			n += f.l.streams[s].end - f.l.streams[s].off
		}
	}
	flush()
	return jobs
}

// batches are pieces of a that are fetched with one request each.
func (m *Image) batches(a ahead) (jobs []ahead) {
	batch := m.limit.batch(m.cfg.Background.Batch)
	for len(a.streams) > 0 {
		n, bytes := 0, int64(0)
		for n < len(a.streams) && n < maxBatch {
			st := a.l.streams[a.streams[n]]
			if n > 0 && (bytes+st.end-st.off > batch || a.l.streams[a.streams[n-1]].end != st.off) {
				break
			}
			bytes += st.end - st.off
			n++
		}
		jobs = append(jobs, ahead{a.l, a.streams[:n:n]})
		a.streams = a.streams[n:]
	}
	return jobs
}

// maxBatch is how many streams are fetched with one request.
const maxBatch = 4096

// patientFor says whether Prefetched waits for jobs.
func (m *Image) patientFor(jobs []ahead) bool {
	if m.cfg.Prefetch.AsyncSize == 0 {
		return true
	}
	total := int64(0)
	for i := range jobs {
		total += jobs[i].bytes()
	}
	return total < m.cfg.Prefetch.AsyncSize
}

// fetchAhead does the prefetching and then the background's work.
func (m *Image) fetchAhead(layers []*layer, jobs []ahead) {
	m.prefetch(jobs)
	close(m.prefetched)
	for _, l := range layers {
		for s := range l.streams {
			if m.ctx.Err() != nil {
				return
			}
			l.mark(uint32(s)) // what a process before this one has fetched
		}
	}
	if m.cfg.Background.Off || m.ctx.Err() != nil {
		return
	}
	total := int64(0)
	for _, l := range layers {
		total += l.total
	}
	if limit := m.cache.Capacity(); total > limit {
		m.log.Warn("the image is larger than the cache: it is not fetched in the background", "image", total, "cache", limit)
		return
	}
	for pause := backgroundPause; ; pause = min(2*pause, maxBackgroundPause) {
		again := false
		for _, l := range layers {
			if !l.plain && !m.background(l) {
				again = true
			}
		}
		if !again {
			return
		}
		select {
		case <-time.After(pause):
		case <-m.ctx.Done():
			return
		}
	}
}

// prefetch fetches jobs, several at a time but each begun in its turn. A layer that fails is left to those who read it.
func (m *Image) prefetch(jobs []ahead) {
	var next atomic.Int64
	var failed sync.Map
	var workers sync.WaitGroup
	for range min(m.cfg.Background.Concurrency, len(jobs)) {
		workers.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(jobs) || m.ctx.Err() != nil {
					return
				}
				a := &jobs[i]
				if _, ok := failed.Load(a.l); ok {
					continue
				}
				if err := m.fetchNow(m.ctx, a); err != nil && m.ctx.Err() == nil {
					failed.Store(a.l, true)
					a.l.setErr(err)
				}
			}
		})
	}
	workers.Wait()
}

// fetchNow fetches those of the streams that nobody fetches already, and that are not there.
func (m *Image) fetchNow(ctx context.Context, a *ahead) error {
	hurry, once := make(chan struct{}), new(sync.Once)
	flying := map[uint32]*flight{}
	land := func(s uint32) {
		if fl := flying[s]; fl != nil {
			delete(flying, s)
			m.fetcher.flights.land(a.l.key(s), fl, nil)
		}
	}
	j := fetchJob{landed: land}
	if m.limit != nil {
		j.pace = func(n int) error { return m.limit.wait(ctx, n, hurry) }
	}
	for _, s := range a.streams {
		if a.l.mark(s); a.l.has(s) {
			continue
		}
		if fl, mine := m.fetcher.flights.claim(a.l.key(s), hurry, once); mine {
			flying[s] = fl
			j.streams = append(j.streams, s)
		}
	}
	defer func() {
		for s := range flying {
			land(s)
		}
	}()
	for len(j.streams) > 0 {
		// A request has so many ranges at most, where there are gaps.
		n, ranges := 1, 1
		for n < len(j.streams) {
			if a.l.streams[j.streams[n-1]].end != a.l.streams[j.streams[n]].off {
				if ranges++; ranges > registry.MaxRanges {
					break
				}
			}
			n++
		}
		part := j
		part.streams, j.streams = j.streams[:n], j.streams[n:]
		if err := a.l.fetch(ctx, part); err != nil {
			return err
		}
	}
	return nil
}

// background fetches what is missing of a layer, while nothing is asked for, and says whether nothing failed. What the cache did not keep
// is for those who read it.
func (m *Image) background(l *layer) bool {
	a := ahead{l: l}
	for s := range l.streams {
		if !l.has(uint32(s)) {
			a.streams = append(a.streams, uint32(s))
		}
	}
	jobs := m.batches(a)
	var next atomic.Int64
	var failed, corrupt atomic.Bool
	var workers sync.WaitGroup
	for range min(m.cfg.Background.Concurrency, len(jobs)) {
		workers.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(jobs) || failed.Load() || m.ctx.Err() != nil {
					return
				}
				err := m.fetchQuietly(&jobs[i])
				if errors.Is(err, registry.ErrContent) {
					corrupt.Store(true)
					err = m.oneByOne(&jobs[i])
				}
				if err != nil && m.ctx.Err() == nil {
					l.setErr(err)
					failed.Store(true)
				}
			}
		})
	}
	workers.Wait()
	return !failed.Load() && !corrupt.Load()
}

// fetchQuietly fetches a while nothing is asked for.
func (m *Image) fetchQuietly(a *ahead) error {
	for {
		err := m.gate.run(m.ctx, func(ctx context.Context) error { return m.fetchNow(ctx, a) })
		if !errors.Is(err, errYield) {
			return err
		}
	}
}

// oneByOne fetches what can be of streams of which one at least is not what it should be.
func (m *Image) oneByOne(a *ahead) error {
	for _, s := range a.streams {
		err := m.fetchQuietly(&ahead{a.l, []uint32{s}})
		if errors.Is(err, registry.ErrContent) {
			a.l.setErr(err)
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// backgroundPause is how long the background waits after something has failed, which doubles each time.
const (
	backgroundPause    = time.Second
	maxBackgroundPause = 5 * time.Minute
)

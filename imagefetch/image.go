package imagefetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/imagefetch/cache"
	"github.com/sluicefs/sluice/imagefetch/registry"
	"github.com/sluicefs/sluice/internal/ratelog"
)

// Fetcher opens images, which share caches and what is on its way to them.
type Fetcher struct {
	log     *slog.Logger
	flights flights

	mu     sync.Mutex
	caches map[cacheKey]*sharedCache
}

// cacheKey is a cache by what its directory is, whatever it is called: the name of a descriptor is soon another one's.
type cacheKey struct {
	dev, ino     uint64
	budget, room int64
}

type sharedCache struct {
	*cache.Cache
	key   cacheKey
	users int
}

// NewFetcher makes one. log may be nil.
func NewFetcher(log *slog.Logger) *Fetcher {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Fetcher{log: log, flights: flights{by: map[flightKey]*flight{}}, caches: map[cacheKey]*sharedCache{}}
}

func (f *Fetcher) openCache(cfg CacheConfig) (*sharedCache, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := cacheKey{budget: cfg.Budget, room: cfg.MemoryBudget}
	if cfg.Dir != "" {
		_ = os.Mkdir(cfg.Dir, 0o700)
		if fi, err := os.Stat(cfg.Dir); err == nil {
			st := fi.Sys().(*syscall.Stat_t)
			key.dev, key.ino = st.Dev, st.Ino
		}
	}
	s := f.caches[key]
	if s == nil {
		c, err := cache.Open(cache.Config{Dir: cfg.Dir, Budget: cfg.Budget, MemoryBudget: cfg.MemoryBudget, Log: f.log})
		if err != nil {
			return nil, err
		}
		s = &sharedCache{Cache: c, key: key}
		f.caches[key] = s
	}
	s.users++
	return s, nil
}

func (f *Fetcher) closeCache(s *sharedCache) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.users--; s.users > 0 {
		return nil
	}
	delete(f.caches, s.key)
	return s.Close()
}

// Image is an image that is open. It implements store.Store.
type Image struct {
	cfg     Config
	fetcher *Fetcher
	logger  *slog.Logger
	log     *ratelog.Logger
	ref     registry.Reference
	client  *registry.Client
	cache   *sharedCache
	gate    *gate
	limit   *limiter
	trace   *trace
	counts  counts
	// asking has an element for each chunk that is being fetched because it was asked for: what they take of memory is bounded.
	asking chan struct{}

	// ctx ends with the image; tasks are its goroutines.
	ctx    context.Context
	cancel context.CancelCauseFunc
	tasks  sync.WaitGroup

	prefetched chan struct{} // closed when prefetching has ended
	patient    bool          // whether to wait for that; set before layers are
	closed     sync.Once

	mu      sync.Mutex
	layers  []*layer
	meta    []store.Layer
	pending *attempt
	pinned  registry.Reference // the reference by digest, once a tag has been resolved
	closers []io.Closer
}

var _ store.Store = (*Image)(nil)

// maxAsking is how many that may be.
const maxAsking = 16

// attempt is at opening the layers, or at fetching one whole.
type attempt struct {
	done chan struct{}
	err  error
}

var errClosed = errors.New("the image has been closed")

// Open opens an image, to be closed. The network is not asked before Layers is called.
func (f *Fetcher) Open(cfg Config) (*Image, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	ref, err := registry.ParseReference(cfg.Reference)
	if err != nil {
		return nil, err
	}
	m := &Image{cfg: cfg, fetcher: f, ref: ref, pinned: ref, prefetched: make(chan struct{}), asking: make(chan struct{}, maxAsking)}
	m.logger = f.log.With("image", ref.String())
	m.log = ratelog.New(m.logger, 10*time.Second, 10)
	cfg.Registry.Log = m.logger
	if m.client, err = registry.New(cfg.Registry); err != nil {
		return nil, err
	}
	if cfg.Trace != "" {
		if m.trace, err = openTrace(cfg.Trace); err != nil {
			return nil, err
		}
	}
	if m.cache, err = f.openCache(cfg.Cache); err != nil {
		if m.trace != nil {
			m.trace.f.Close()
		}
		return nil, err
	}
	m.gate = newGate(time.Duration(cfg.Background.Silence), cfg.Background.Concurrency)
	if cfg.Bandwidth > 0 {
		m.limit = &limiter{rate: cfg.Bandwidth}
	}
	m.ctx, m.cancel = context.WithCancelCause(context.Background())
	return m, nil
}

// Close ends all that is being fetched for the image, and waits for it.
func (m *Image) Close() (err error) {
	m.closed.Do(func() {
		m.mu.Lock()
		m.cancel(errClosed)
		m.mu.Unlock()
		m.tasks.Wait()
		m.client.Close()
		err = m.closeFiles()
		if m.trace != nil {
			err = errors.Join(err, m.trace.f.Close())
		}
		err = errors.Join(err, m.fetcher.closeCache(m.cache))
	})
	return err
}

// begin has f run as one of the image's tasks, unless it is closed.
func (m *Image) begin(f func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.beginLocked(f)
}

func (m *Image) beginLocked(f func()) bool {
	if m.ctx.Err() != nil {
		return false
	}
	m.tasks.Go(f)
	return true
}

// Layers implements store.Store. After an error, calling it again tries again.
func (m *Image) Layers(ctx context.Context) ([]store.Layer, error) {
	m.mu.Lock()
	if m.layers != nil {
		defer m.mu.Unlock()
		return m.meta, nil
	}
	a := m.pending
	if a == nil {
		a = &attempt{done: make(chan struct{})}
		if !m.beginLocked(func() { m.attempt(a) }) {
			m.mu.Unlock()
			return nil, errClosed
		}
		m.pending = a
	}
	m.mu.Unlock()
	select {
	case <-a.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if a.err != nil {
		return nil, a.err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.meta, nil
}

func (m *Image) attempt(a *attempt) {
	layers, err := m.open(m.ctx)
	var jobs []ahead
	if err == nil {
		jobs = m.prefetchJobs(layers)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pending = nil
	if err == nil {
		for _, l := range layers {
			m.meta = append(m.meta, l.meta())
		}
		m.layers = layers
		m.patient = m.patientFor(jobs)
		if !m.beginLocked(func() { m.fetchAhead(layers, jobs) }) {
			close(m.prefetched)
		}
	}
	a.err = err
	close(a.done)
}

// open finds the layers and gets their tables of contents.
func (m *Image) open(ctx context.Context) ([]*layer, error) {
	layers, err := m.findLayers(ctx)
	if err != nil {
		return nil, err
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, l := range layers {
		g.Go(func() error { return l.load(ctx) })
	}
	if err := g.Wait(); err != nil {
		return nil, errors.Join(err, m.closeFiles())
	}
	return layers, nil
}

func (m *Image) closeFiles() (err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.closers {
		err = errors.Join(err, c.Close())
	}
	m.closers = nil
	return err
}

// findLayers is what the manifest says, or the one layer that there is.
func (m *Image) findLayers(ctx context.Context) ([]*layer, error) {
	switch {
	case m.ref.URL != nil:
		blob, err := m.client.URLBlob(ctx, m.ref.URL)
		if err != nil {
			return nil, err
		}
		return []*layer{{img: m, digest: m.anonymous(), blob: blob}}, nil
	case m.ref.File != "":
		blob, c, err := registry.OpenFile(m.ref.File)
		if err != nil {
			return nil, err
		}
		m.mu.Lock()
		m.closers = append(m.closers, c)
		m.mu.Unlock()
		return []*layer{{img: m, digest: m.anonymous(), blob: blob}}, nil
	}
	descs, err := m.manifest(ctx, &m.pinned)
	if err != nil {
		return nil, err
	}
	var layers []*layer
	for _, d := range descs {
		if m.cfg.Layer != "" && d.Digest.String() != m.cfg.Layer {
			continue
		}
		layers = append(layers, &layer{
			img: m, digest: d.Digest.String(), annotations: d.Annotations, blob: m.client.Blob(m.ref, d.Digest.String(), d.Size),
		})
		if m.cfg.Layer != "" {
			break
		}
	}
	if len(layers) == 0 {
		return nil, fmt.Errorf("the image %s has no layer %s", m.ref, m.cfg.Layer)
	}
	return layers, nil
}

// anonymous is what stands for the digest of a layer that nobody says the digest of.
func (m *Image) anonymous() string {
	return registry.DigestOf([]byte(m.cfg.Reference + "\n" + m.cfg.TOCDigest))
}

// wait returns a layer, once all are open.
func (m *Image) wait(ctx context.Context, index int) (*layer, error) {
	meta, err := m.Layers(ctx)
	if err != nil {
		return nil, err
	}
	if index < 0 || index >= len(meta) {
		return nil, fmt.Errorf("there is no layer %d, of %d", index, len(meta))
	}
	return m.layers[index], nil
}

// Chunk implements store.Store.
func (m *Image) Chunk(ctx context.Context, index int, chunk uint32) (*os.File, error) {
	// Close waits for those who fetch.
	m.mu.Lock()
	if m.ctx.Err() != nil {
		m.mu.Unlock()
		return nil, store.ErrUnavailable
	}
	m.tasks.Add(1)
	layers := m.layers
	m.mu.Unlock()
	defer m.tasks.Done()
	// Most are in the cache: they need no time limit.
	if index >= 0 && index < len(layers) && uint64(chunk) < uint64(len(layers[index].chunks)) {
		if f := layers[index].fromCache(chunk); f != nil {
			m.counts.hit(&layers[index].chunks[chunk])
			return f, nil
		}
	}
	limited, cancel := context.WithTimeoutCause(ctx, time.Duration(m.cfg.Registry.Timeout), errors.New("gave up waiting for it"))
	defer cancel()
	stop := context.AfterFunc(m.ctx, cancel)
	defer stop()
	l, err := m.wait(limited, index)
	if err == nil && uint64(chunk) >= uint64(len(l.chunks)) {
		err = fmt.Errorf("there is no chunk %d, of %d", chunk, len(l.chunks))
	}
	if err == nil {
		var f *os.File
		if f, err = l.chunk(limited, chunk); err == nil {
			return f, nil
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if l != nil && m.ctx.Err() == nil {
		l.setErr(err)
	}
	if errors.Is(err, registry.ErrContent) {
		m.counts.corruptReads.Add(1)
		return nil, store.ErrCorrupt
	}
	m.counts.unavailableReads.Add(1)
	return nil, store.ErrUnavailable
}

// Status implements store.Store.
func (m *Image) Status(ctx context.Context, index int) (store.Status, error) {
	l, err := m.wait(ctx, index)
	if err != nil {
		return store.Status{}, err
	}
	return l.status(), nil
}

// Prefetched implements store.Store. It waits for at most the time that is configured, and then is content as well.
func (m *Image) Prefetched(ctx context.Context) error {
	if _, err := m.Layers(ctx); err != nil {
		return err
	}
	if !m.patient {
		return nil
	}
	timer := time.NewTimer(time.Duration(m.cfg.Prefetch.Timeout))
	defer timer.Stop()
	select {
	case <-m.prefetched:
	case <-timer.C:
		m.log.Warn("prefetching takes long: it is not waited for")
	case <-m.ctx.Done():
		return errClosed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// Reach implements store.Store. It comes before the background, as reads do.
func (m *Image) Reach(ctx context.Context) error {
	if _, err := m.Layers(ctx); err != nil {
		return err
	}
	defer m.gate.ask()()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(m.ctx, func() { cancel(errClosed) })()
	var g errgroup.Group
	g.SetLimit(8)
	for _, l := range m.layers {
		if l.whole() {
			continue
		}
		g.Go(func() error {
			if _, err := fetchRange(ctx, l.blob, registry.Range{Len: 1}); err != nil {
				return fmt.Errorf("fetch from layer %s: %w", l.digest, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// Note implements store.Store.
func (m *Image) Note(index int, path string) {
	m.mu.Lock()
	layers := m.layers
	m.mu.Unlock()
	if m.trace == nil || index < 0 || index >= len(layers) || m.ctx.Err() != nil {
		return
	}
	if err := m.trace.note(TraceEntry{layers[index].digest, path}); err != nil {
		m.log.Warn("cannot trace", "err", err)
	}
}

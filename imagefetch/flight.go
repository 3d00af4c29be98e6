package imagefetch

import (
	"sync"

	"github.com/sluicefs/sluice/imagefetch/cache"
)

// flights are the streams that are being fetched, so that none is twice.
type flights struct {
	mu sync.Mutex
	by map[flightKey]*flight
}

// flightKey is a stream of a blob, on its way to a cache.
type flightKey struct {
	cache *cache.Cache
	blob  string
	off   int64
}

// flight is one that is being fetched.
type flight struct {
	done chan struct{}
	// err is how it ended, for those who wait, or nil if they should look for themselves.
	err error
	// hurry is closed when somebody waits for it.
	hurry chan struct{}
	once  *sync.Once
}

// claim says whether the stream is the caller's to fetch, and then to land. Otherwise somebody else fetches it.
func (f *flights) claim(k flightKey, hurry chan struct{}, once *sync.Once) (*flight, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl := f.by[k]; fl != nil {
		return fl, false
	}
	fl := &flight{done: make(chan struct{}), hurry: hurry, once: once}
	f.by[k] = fl
	return fl, true
}

// land ends a flight.
func (f *flights) land(k flightKey, fl *flight, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.by, k)
	fl.err = err
	close(fl.done)
}

// await has whoever fetches it make haste.
func (fl *flight) await() <-chan struct{} {
	if fl.once != nil {
		fl.once.Do(func() { close(fl.hurry) })
	}
	return fl.done
}

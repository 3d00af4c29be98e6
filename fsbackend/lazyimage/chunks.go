package lazyimage

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

// cache holds descriptors of chunks, at most as many as it has slots: it is a clock (second chance), so that a use costs two
// atomic operations and no lock.
type cache struct {
	slots []slot
	at    []atomic.Uint32 // by chunk: its slot's number and 1, 0 for none
	open  atomic.Int64

	mu      sync.Mutex // of what follows, and of filling a slot or emptying it
	used    int        // slots from here on have never been used
	free    []uint32
	hand    int
	flights map[uint32]*flight // chunks that are being fetched
	ahead   int                // flights that nobody asked for yet
}

// slot is an open chunk.
type slot struct {
	pins   atomic.Int32 // below 0: it is being filled or emptied
	chunk  uint32       // changes only then, as the rest does
	recent atomic.Bool
	waits  atomic.Bool // it is on a file system that knows no RWF_NOWAIT
	loose  bool        // in no cache, for there was no room: the last to let go of it closes it
	fd     int
	file   *os.File
	_      [16]byte // a slot fills a cache line: neighbours are used by other threads
}

// flight is a chunk that is being fetched. refs are those who wait for it, and who fetches it; they are under cache.mu.
type flight struct {
	done chan struct{}
	refs int
	slot *slot // pinned for the flight
	err  error
}

// busy is in slot.pins while it is filled or emptied.
const busy = -1 << 30

func (c *cache) init(slots, chunks int) {
	c.slots = make([]slot, min(slots, max(chunks, 1)))
	c.at = make([]atomic.Uint32, chunks)
	c.flights = make(map[uint32]*flight)
}

// pin returns the slot of a chunk that is open, nil if it is not. It stays open until it is unpinned.
func (c *cache) pin(chunk uint32) *slot {
	i := c.at[chunk].Load()
	if i == 0 {
		return nil
	}
	s := &c.slots[i-1]
	for {
		n := s.pins.Load()
		if n < 0 {
			return nil
		}
		if s.pins.CompareAndSwap(n, n+1) {
			break
		}
	}
	if s.chunk != chunk { // it has become another one's meanwhile
		c.unpin(s)
		return nil
	}
	if !s.recent.Load() {
		s.recent.Store(true)
	}
	return s
}

func (c *cache) unpin(s *slot) {
	if s.pins.Add(-1) == 0 && s.loose {
		c.open.Add(-1)
		_ = s.file.Close()
	}
}

// put makes f, which it takes over, the chunk's, and returns it pinned.
func (c *cache) put(chunk uint32, f *os.File) *slot {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open.Add(1)
	i, ok := c.room()
	if !ok {
		s := &slot{chunk: chunk, loose: true, fd: int(f.Fd()), file: f}
		s.pins.Store(1)
		return s
	}
	s := &c.slots[i]
	s.chunk, s.file, s.fd = chunk, f, int(f.Fd())
	s.recent.Store(true)
	s.waits.Store(false)
	s.pins.Store(1)
	c.at[chunk].Store(i + 1)
	return s
}

// room returns a slot that nobody uses, and is busy. mu is held.
func (c *cache) room() (uint32, bool) {
	if n := len(c.free); n > 0 {
		i := c.free[n-1]
		c.free = c.free[:n-1]
		return i, true
	}
	if c.used < len(c.slots) {
		c.used++
		c.slots[c.used-1].pins.Store(busy)
		return uint32(c.used - 1), true
	}
	for range 2 * len(c.slots) {
		c.hand = (c.hand + 1) % len(c.slots)
		s := &c.slots[c.hand]
		if s.pins.Load() != 0 || s.recent.Swap(false) || !s.pins.CompareAndSwap(0, busy) {
			continue
		}
		c.empty(s)
		return uint32(c.hand), true
	}
	return 0, false
}

// empty closes the descriptor of a slot that is busy. mu is held.
func (c *cache) empty(s *slot) {
	c.at[s.chunk].Store(0)
	c.open.Add(-1)
	_ = s.file.Close()
	s.file = nil
}

// drop has a chunk that turned out to be none asked for again. The caller has s pinned.
func (c *cache) drop(s *slot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !s.loose && s.pins.CompareAndSwap(1, busy) {
		i := c.at[s.chunk].Load() - 1
		c.empty(s)
		c.free = append(c.free, i)
		return
	}
	c.unpin(s) // others use it: the last one drops it
}

// close closes all. No call is running.
func (c *cache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range c.slots[:c.used] {
		if s := &c.slots[i]; s.file != nil {
			c.empty(s)
		}
	}
}

// maxAhead is how many chunks are fetched at a time that nobody has asked for yet.
const maxAhead = 16

// begin has a chunk fetched, unless it is already, and returns its flight with a reference for the caller. wanted says that
// somebody waits for it: otherwise it may be declined, with nil.
func (f *FS) begin(chunk uint32, wanted bool) *flight {
	c := &f.chunks
	c.mu.Lock()
	defer c.mu.Unlock()
	if fl := c.flights[chunk]; fl != nil {
		if !wanted {
			return nil
		}
		fl.refs++
		return fl
	}
	// It may have arrived between the look without the lock and this one.
	if s := c.pin(chunk); s != nil {
		if !wanted {
			c.unpin(s)
			return nil
		}
		fl := &flight{done: make(chan struct{}), refs: 1, slot: s}
		close(fl.done)
		return fl
	}
	if !wanted && c.ahead >= maxAhead || f.ctx.Err() != nil {
		return nil
	}
	fl := &flight{done: make(chan struct{}), refs: 2}
	if !wanted {
		c.ahead++
	}
	c.flights[chunk] = fl
	f.tasks.Go(func() {
		fl.slot, fl.err = f.fetch(chunk)
		c.mu.Lock()
		delete(c.flights, chunk)
		if !wanted {
			c.ahead--
		}
		c.mu.Unlock()
		close(fl.done)
		f.leave(fl)
	})
	return fl
}

// leave gives a reference back.
func (f *FS) leave(fl *flight) {
	f.chunks.mu.Lock()
	fl.refs--
	last := fl.refs == 0
	f.chunks.mu.Unlock()
	if last && fl.slot != nil {
		f.chunks.unpin(fl.slot)
	}
}

// errShort is a chunk of another size than it should have.
var errShort = errors.New("the chunk has not the size that it should have")

// fetch asks for a chunk.
func (f *FS) fetch(chunk uint32) (*slot, error) {
	layer, index := f.chunkOf(chunk)
	file, err := f.store.Chunk(f.ctx, layer, index)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size() != int64(f.chunkSizes[chunk])) {
		err = errShort
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return f.chunks.put(chunk, file), nil
}

// chunkOf returns a chunk's layer and its number there.
func (t *tree) chunkOf(chunk uint32) (layer int, index uint32) {
	for layer+1 < len(t.chunkBase) && t.chunkBase[layer+1] <= chunk {
		layer++
	}
	return t.firstLayer + layer, chunk - t.chunkBase[layer]
}

// open returns the slot of a chunk, pinned. It may sleep.
func (f *FS) open(chunk uint32, cancel <-chan struct{}) (*slot, error) {
	if s := f.chunks.pin(chunk); s != nil {
		return s, nil
	}
	fl := f.begin(chunk, true)
	if fl == nil {
		return nil, context.Canceled
	}
	defer f.leave(fl)
	select {
	case <-fl.done:
	case <-cancel:
		return nil, unix.EINTR
	}
	if fl.err != nil {
		return nil, fl.err
	}
	fl.slot.pins.Add(1) // the flight's own pin keeps it from being emptied
	return fl.slot, nil
}

// errnoOf is what the guest is told of an error of open: that of the one who does not wait any more, or EIO.
func errnoOf(err error) fsbackend.Errno {
	if err == unix.EINTR || errors.Is(err, context.Canceled) {
		return unix.EINTR
	}
	return unix.EIO
}

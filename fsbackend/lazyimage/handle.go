package lazyimage

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

const (
	pageBits  = 10
	indexBits = 20 // of a handle's number; the rest of its 48 bits tell it from those that had the index before
	genBits   = 28
)

// table is the handles that the guest has. They are found without a lock, and their memory is never given back: a READ that
// meets a RELEASE reads the file, which never changes, and no other.
type table struct {
	limit int // at most 1<<indexBits
	pages [1 << (indexBits - pageBits)]atomic.Pointer[[1 << pageBits]handle]

	mu   sync.Mutex
	used uint32 // indices from here on have never been used
	free []uint32
}

// handle is an open file or directory.
type handle struct {
	id   atomic.Uint64 // 0: not open
	node atomic.Uint64
	text atomic.Pointer[string] // of a file of the state directory, what it holds
	gen  uint64                 // under table.mu

	mu    sync.Mutex // of what follows, of read-ahead
	next  uint64     // where the last READ ended
	run   uint64     // how many bytes have been read in order
	asked uint64     // up to where has been asked ahead
}

// insert makes a handle of node.
func (t *table) insert(node uint64, text *string) (uint64, fsbackend.Errno) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var i uint32
	switch n := len(t.free); {
	case n > 0:
		i = t.free[n-1]
		t.free = t.free[:n-1]
	case int(t.used) < t.limit:
		i = t.used
		t.used++
	default:
		return 0, unix.ENFILE
	}
	page := &t.pages[i>>pageBits]
	if page.Load() == nil {
		page.Store(new([1 << pageBits]handle))
	}
	h := &page.Load()[i&(1<<pageBits-1)]
	h.gen = h.gen%(1<<genBits-1) + 1
	h.mu.Lock()
	h.next, h.run, h.asked = 0, 0, 0
	h.mu.Unlock()
	h.node.Store(node)
	h.text.Store(text)
	id := h.gen<<indexBits | uint64(i)
	h.id.Store(id)
	return id, fsbackend.OK
}

// get returns the handle fh of node, nil if it is none.
func (t *table) get(fh, node uint64) *handle {
	i := fh & (1<<indexBits - 1)
	page := t.pages[i>>pageBits].Load()
	if page == nil || fh == 0 {
		return nil
	}
	h := &page[i&(1<<pageBits-1)]
	if h.id.Load() != fh || h.node.Load() != node {
		return nil
	}
	return h
}

func (t *table) valid(fh, node uint64) bool { return t.get(fh, node) != nil }

// remove takes a handle from the guest.
func (t *table) remove(fh, node uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.get(fh, node); h != nil {
		h.id.Store(0)
		h.text.Store(nil)
		t.free = append(t.free, uint32(fh&(1<<indexBits-1)))
	}
}

// clear takes all handles from the guest.
func (t *table) clear() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.used {
		h := &t.pages[i>>pageBits].Load()[i&(1<<pageBits-1)]
		if h.id.Swap(0) != 0 {
			h.text.Store(nil)
			t.free = append(t.free, i)
		}
	}
}

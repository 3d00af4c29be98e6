package passthrough

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A file handle is, from its low bits up: its index and a generation that is never 0.
const (
	handleIndexBits  = 24
	handleGenBits    = 24
	handleChunkSize  = 128
	maxHandles       = 1 << handleIndexBits
	handlePinMask    = 1<<31 - 1
	handleClosed     = 1 << 31
	handleGenShift   = 32
	handleGenModulus = 1 << handleGenBits
)

// handle is a file or directory that the guest has open.
type handle struct {
	state atomic.Uint64 // generation << 32 | handleClosed | pins; its descriptor is closed by the last to unpin it
	node  uint64
	fd    int32
	index uint32
	flags uint32 // open(2) flags in force on fd
	dir   bool   // and then list is not nil

	// nowait is what is known of RWF_NOWAIT on fd.
	nowait atomic.Uint32

	// next and prev link the handles of one node, as index + 1, guarded by the node's shard lock.
	next, prev uint32

	list *listing // stays with the handle when another file gets it

	_ [8]byte // a handle fills a cache line: threads use them without a lock
}

const (
	nowaitUnknown = iota
	nowaitWorks
	nowaitFails
)

type handleChunk [handleChunkSize]handle

// handleTable finds handles without a lock.
type handleTable struct {
	chunks atomic.Pointer[[]*handleChunk]
	_      [64]byte // what follows changes, and must not take the line of chunks away from other threads

	mu   sync.Mutex
	free []uint32

	kept atomic.Int32 // buffers that listings keep
}

func (t *handleTable) at(index uint32) *handle {
	p := t.chunks.Load()
	if p == nil || int(index/handleChunkSize) >= len(*p) {
		return nil
	}
	return &(*p)[index/handleChunkSize][index%handleChunkSize]
}

// alloc returns a handle that is still closed, nil if there are too many.
func (t *handleTable) alloc() *handle {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.free) == 0 {
		var list []*handleChunk
		if p := t.chunks.Load(); p != nil {
			list = *p
		}
		first := len(list) * handleChunkSize
		if first == maxHandles {
			return nil
		}
		c := new(handleChunk)
		for i := range c {
			c[i].index = uint32(first + i)
			c[i].state.Store(1<<handleGenShift | handleClosed)
		}
		for i := handleChunkSize - 1; i >= 0; i-- {
			t.free = append(t.free, uint32(first+i))
		}
		grown := append(append(make([]*handleChunk, 0, len(list)+1), list...), c)
		t.chunks.Store(&grown)
	}
	index := t.free[len(t.free)-1]
	t.free = t.free[:len(t.free)-1]
	return t.at(index)
}

// open makes h, fresh from alloc, known to guests and returns its number.
func (h *handle) open(node uint64, fd int, flags uint32, dir bool) uint64 {
	h.node, h.fd, h.flags, h.dir = node, int32(fd), flags, dir
	h.nowait.Store(nowaitUnknown)
	if dir {
		if h.list == nil {
			h.list = new(listing)
		}
		h.list.pos = 0
	}
	gen := h.state.Load() >> handleGenShift
	h.state.Store(gen << handleGenShift)
	return gen<<handleIndexBits | uint64(h.index)
}

// get pins the handle fh of node; nil if there is none.
func (t *handleTable) get(fh, node uint64) *handle {
	h := t.at(uint32(fh % maxHandles))
	if h == nil || !h.pin(fh>>handleIndexBits) {
		return nil
	}
	if h.node != node {
		t.put(h)
		return nil
	}
	return h
}

// pin pins h if it is open in this generation.
func (h *handle) pin(gen uint64) bool {
	for {
		s := h.state.Load()
		if s>>handleGenShift != gen || s&handleClosed != 0 {
			return false
		}
		if h.state.CompareAndSwap(s, s+1) {
			return true
		}
	}
}

func (t *handleTable) put(h *handle) {
	if s := h.state.Add(^uint64(0)); s&handleClosed != 0 && s&handlePinMask == 0 {
		t.retire(h)
	}
}

// close closes h, which the caller has pinned, to new uses; it reports false if somebody else has.
func (h *handle) close() bool {
	return h.state.Or(handleClosed)&handleClosed == 0
}

// retire closes the descriptor of a handle that nobody can use any more.
func (t *handleTable) retire(h *handle) {
	_ = unix.Close(int(h.fd))
	if h.dir {
		h.list.rest = nil
		h.list.letGo(t)
	}
	gen := (h.state.Load()>>handleGenShift)%(handleGenModulus-1) + 1
	h.state.Store(gen<<handleGenShift | handleClosed)
	t.mu.Lock()
	t.free = append(t.free, h.index)
	t.mu.Unlock()
}

// giveBack returns a handle that was never opened.
func (t *handleTable) giveBack(h *handle) {
	t.mu.Lock()
	t.free = append(t.free, h.index)
	t.mu.Unlock()
}

// closeAll closes every handle: those in use by running calls when these end.
func (fs *FS) closeHandles() {
	p := fs.handles.chunks.Load()
	if p == nil {
		return
	}
	for _, c := range *p {
		for i := range c {
			h := &c[i]
			if gen := h.state.Load() >> handleGenShift; h.pin(gen) {
				fs.closeHandle(h)
				fs.handles.put(h)
			}
		}
	}
}

// closeHandle closes the pinned h to new uses and takes it off its node.
func (fs *FS) closeHandle(h *handle) {
	if !h.close() {
		return
	}
	if fs.fixed(h.node) {
		return
	}
	s, n := fs.nodes.lock(h.node)
	defer s.mu.Unlock()
	if n == nil {
		return
	}
	if h.prev != 0 {
		fs.handles.at(h.prev - 1).next = h.next
	} else {
		n.handles = h.next
	}
	if h.next != 0 {
		fs.handles.at(h.next - 1).prev = h.prev
	}
}

// openHandle makes a handle for fd, which it takes over, on node: EMFILE and its like become ENFILE, the guest has no
// limit of its own here.
func (fs *FS) openHandle(node uint64, fd int, flags uint32, dir bool) (uint64, errno) {
	h := fs.handles.alloc()
	if h == nil {
		_ = unix.Close(fd)
		return 0, unix.ENFILE
	}
	h.next, h.prev = 0, 0
	if fs.fixed(node) {
		return h.open(node, fd, flags, dir), 0
	}
	s, n := fs.nodes.lock(node)
	if n == nil {
		s.mu.Unlock()
		fs.handles.giveBack(h)
		_ = unix.Close(fd)
		return 0, unix.ESTALE
	}
	if h.next = n.handles; h.next != 0 {
		fs.handles.at(h.next - 1).prev = h.index + 1
	}
	n.handles = h.index + 1
	fh := h.open(node, fd, flags, dir)
	s.mu.Unlock()
	return fh, 0
}

package fusebridge

import (
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// A handle is an open file or directory. rest, at, pins and closed are under Bridge.mu; the others do not change.
type handle struct {
	node      *node
	dir       bool
	flags     uint32 // open(2)'s
	again     bool   // it may be opened again in another run of the program
	stateless bool   // the program opens nothing: it takes 0 everywhere
	direct    bool   // data go past the guest's page cache

	order sync.Mutex // held by calls for data, for a program that takes one at a time; before Bridge.mu

	owners map[uint64]struct{} // of POSIX locks that were set by way of it; under Bridge.mu
	rest   rest                // of its listing
	at     place
	pins   int  // calls that use it
	closed bool // the guest has released it
}

// pinHandle returns the handle fh of node id, for the time of a call.
func (b *Bridge) pinHandle(id, fh uint64, dir bool) (*handle, fsbackend.Errno) {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.handles[fh]
	if h == nil || h.node.id != id || h.dir != dir {
		return nil, unix.EBADF
	}
	h.pins++
	return h, fsbackend.OK
}

// unpinHandle ends a call's use of h.
func (b *Bridge) unpinHandle(h *handle) {
	b.mu.Lock()
	h.pins--
	last := h.closed && h.pins == 0
	b.mu.Unlock()
	if last {
		b.release(h, false) // it may be a queue's own thread
	}
}

// room says whether another handle may be made.
func (b *Bridge) room() fsbackend.Errno {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.handles) >= MaxHandles {
		return unix.ENFILE
	}
	return fsbackend.OK
}

// opened makes a handle of what the program opened on n, which the caller has pinned.
func (b *Bridge) opened(n *node, h *handle) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	n.pins++ // until the program has released the handle
	h.node = n
	b.lastFh++
	b.handles[b.lastFh] = h
	return b.lastFh
}

// close takes fh from the guest; calls that use it end normally. With wait it returns when the program has released it.
func (b *Bridge) close(in *fuseproto.ReleaseIn, dir, wait bool) {
	b.mu.Lock()
	h := b.handles[in.Fh]
	if h == nil || h.node.id != in.NodeId || h.dir != dir {
		b.mu.Unlock()
		return
	}
	delete(b.handles, in.Fh)
	h.closed = true
	b.dropRest(h)
	if h.owners != nil {
		h.node.lockers = slices.DeleteFunc(h.node.lockers, func(o *handle) bool { return o == h })
	}
	last := h.pins == 0
	b.mu.Unlock()
	if last {
		b.releaseAs(h, in, wait)
	}
}

func releaseOf(dir bool) fuseproto.Opcode {
	if dir {
		return fuseproto.FUSE_RELEASEDIR
	}
	return fuseproto.FUSE_RELEASE
}

// release is releaseAs where there is no request of the guest for it.
func (b *Bridge) release(h *handle, wait bool) bool {
	return b.releaseAs(h, &fuseproto.ReleaseIn{Flags: h.flags}, wait)
}

// releaseAs has the program release a closed handle that no call uses. With wait it returns when that is done, and whether it
// could be.
func (b *Bridge) releaseAs(h *handle, in *fuseproto.ReleaseIn, wait bool) bool {
	defer b.unpin(h.node)
	b.mu.Lock()
	at, node := h.at, h.node.at
	b.mu.Unlock()
	if h.node == b.root {
		node = place{at.conn, fuseproto.FUSE_ROOT_ID}
	}
	if h.stateless || at.conn == nil || at.conn != node.conn || !at.conn.use() {
		return true // what it was opened in has ended
	}
	in.Fh = at.raw
	if !wait {
		at.conn.post(releaseOf(h.dir), node.raw, in)
		at.conn.unref()
		return true
	}
	ctx := &fsbackend.Context{MayBlock: true}
	r := at.conn.request(ctx, node.raw)
	defer r.end()
	put(r, releaseOf(h.dir), in)
	return r.call(ctx, 0, false) != unix.EIO
}

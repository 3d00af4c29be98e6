package passthrough

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// noOpenFlags are about OPEN and OPENDIR answered ENOSYS, upon which Linux sends neither of them, nor a release, again: it reads with
// handle 0 (fs/fuse/file.c, fuse_file_open).
const noOpenFlags = fuseproto.FUSE_NO_OPEN_SUPPORT | fuseproto.FUSE_NO_OPENDIR_SUPPORT

// unopened are the handles of what the guest reads without having opened it, oldest first from hand on: never more than there is room
// for.
type unopened struct {
	ring []atomic.Uint64
	hand atomic.Uint32
	root atomic.Uint64 // the root's, which has no node to be found by
}

// init makes room beside a budget of descriptors of inodes.
func (u *unopened) init(maxFDs int) {
	if u.ring == nil {
		u.ring = make([]atomic.Uint64, max(maxFDs/4, MinMaxFDs))
	}
}

// withoutOpen says whether the guest has been told to do without any of flags.
func (fs *FS) withoutOpen(flags uint64) bool {
	return fs.features.Load()&flags != 0
}

// use pins the handle fh of node, or the one that stands for handle 0 where the guest need not open what it reads.
func (fs *FS) use(fh, node uint64) (*handle, errno) {
	if fh == 0 && fs.withoutOpen(noOpenFlags) {
		return fs.useUnopened(node)
	}
	if h := fs.handles.get(fh, node); h != nil {
		return h, 0
	}
	return nil, unix.EBADF
}

// useUnopened pins a handle of node, which it opens if there is none.
func (fs *FS) useUnopened(node uint64) (*handle, errno) {
	dir := node == rootID
	if dir {
		if h := fs.handles.get(fs.unopened.root.Load(), rootID); h != nil {
			return h, 0
		}
	} else {
		s, n := fs.nodes.lock(node)
		if n == nil || n.nlookup == 0 {
			s.mu.Unlock()
			return nil, unix.ESTALE
		}
		h := fs.pinHandle(n)
		dir = n.typ == typeDir
		s.mu.Unlock()
		if h != nil {
			return h, 0
		}
	}
	var fh uint64
	var errno errno
	if dir {
		fh, errno = fs.openDir(node, 0)
	} else {
		fh, errno = fs.openNode(node, unix.O_RDONLY, 0)
	}
	if errno != 0 {
		return nil, errno
	}
	h := fs.handles.get(fh, node)
	if node == rootID {
		fs.unopened.root.Store(fh)
	}
	u := &fs.unopened
	fs.closeUnopened(u.ring[u.hand.Add(1)%uint32(len(u.ring))].Swap(fh))
	if h == nil {
		return nil, unix.ESTALE // the session has ended meanwhile
	}
	return h, 0
}

// closeUnopened closes handle fh if it is still open.
func (fs *FS) closeUnopened(fh uint64) {
	if h := fs.handles.at(uint32(fh % maxHandles)); h != nil && h.pin(fh>>handleIndexBits) {
		fs.closeHandle(h)
		fs.handles.put(h)
	}
}

// forgetUnopened closes what node has open if the guest takes its last lookups back: no release will.
func (fs *FS) forgetUnopened(node, count uint64) {
	for {
		var h *handle
		s, n := fs.nodes.lock(node)
		if n != nil && n.nlookup <= count {
			h = fs.pinHandle(n)
		}
		s.mu.Unlock()
		if h == nil {
			return
		}
		fs.closeHandle(h)
		fs.handles.put(h)
	}
}

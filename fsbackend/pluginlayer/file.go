package pluginlayer

import (
	"math"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/plugin"
)

// handle is a file or directory that the guest has open. pins, ended and listed are under tree.mu.
type handle struct {
	node  *node
	pins  int  // calls that use it
	ended bool // the guest has released it

	// Of a file.
	file   *sys.FD // nil: a directory
	attr   fuseproto.Attr
	memory bool        // its file system is memory, and never sleeps for long
	waits  atomic.Bool // it does not know RWF_NOWAIT

	// Of a directory.
	listing sync.Mutex // of what follows; held while a listing is read
	read    bool       // entries is filled in
	entries []plugin.DirEntry
	listed  int // how many of tree.listed it has: under both locks
}

// pin returns the handle fh of node id, for the time of a call.
func (t *tree) pin(id, fh uint64) (*handle, fsbackend.Errno) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.handles[fh]
	if h == nil || h.node.id != id {
		return nil, unix.EBADF
	}
	h.pins++
	return h, fsbackend.OK
}

// unpin ends a call's use of h.
func (t *tree) unpin(h *handle) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h.pins--; h.ended && h.pins == 0 {
		t.retire(h)
	}
}

// end takes a handle from the guest; calls that use it end normally. mu is held.
func (t *tree) end(fh uint64, h *handle) {
	delete(t.handles, fh)
	h.ended = true
	if h.pins == 0 {
		t.retire(h)
	}
}

// retire returns what a handle holds that nobody uses. mu is held: to close a file that was opened for reading does not sleep.
func (t *tree) retire(h *handle) {
	if h.file != nil {
		t.files--
		_ = h.file.Close()
	}
	t.listed -= h.listed
}

// insert makes h a handle of the guest's.
func (t *tree) insert(h *handle) (uint64, fsbackend.Errno) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h.file != nil {
		if t.files >= t.conn.cfg.MaxFiles {
			return 0, unix.ENFILE
		}
		t.files++
	} else if len(t.handles)-t.files >= t.conn.cfg.MaxFiles {
		return 0, unix.ENFILE
	}
	t.lastFh++
	t.handles[t.lastFh] = h
	return t.lastFh, fsbackend.OK
}

// Open implements fsbackend.Opener.
func (t *tree) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	n, errno := t.node(in.NodeId)
	switch {
	case errno != 0:
		return errno
	case n.typ == unix.S_IFDIR:
		return unix.EISDIR
	case n.typ != unix.S_IFREG:
		return unix.EBADF // a guest's kernel opens these itself
	case fsbackend.OpensForWriting(in.Flags):
		return unix.EROFS
	case !c.MayBlock:
		return fsbackend.ErrMayBlock
	}
	a := t.ask(c, plugin.Request{Op: plugin.OpOpenat, Path: n.path})
	if a.Errno != 0 {
		return stale(a.Errno)
	}
	h := &handle{node: n, file: a.file}
	err := t.attr(n.path, &a.Attr, &h.attr)
	if err == nil {
		h.memory, err = checkFile(a.file, a.Attr.Size)
	}
	switch {
	case err != nil:
		errno = t.broken(n.path, err)
	case h.attr.Mode&unix.S_IFMT != unix.S_IFREG:
		errno = unix.ESTALE
	default:
		out.Fh, errno = t.insert(h)
	}
	if errno != 0 {
		_ = a.file.Close()
	}
	return errno
}

// Release implements fsbackend.Opener.
func (t *tree) Release(_ *fsbackend.Context, in *fuseproto.ReleaseIn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if h := t.handles[in.Fh]; h != nil && h.node.id == in.NodeId {
		t.end(in.Fh, h)
	}
}

// getattr describes an open file: as the plug-in has when it was opened, but for what shows that its contents change.
func (h *handle) getattr(out *fuseproto.Attr) fsbackend.Errno {
	var st unix.Stat_t
	if errno := sys.Fstat(h.file.Int(), &st); errno != 0 {
		return errno
	}
	*out = h.attr
	out.Size = uint64(st.Size)
	return fsbackend.OK
}

// Read implements fsbackend.Reader: from the file that the plug-in has opened, which is not asked.
func (t *tree) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	if in.Offset > math.MaxInt64 {
		return unix.EINVAL
	}
	h, errno := t.pin(in.NodeId, in.Fh)
	if errno != 0 {
		return errno
	}
	defer t.unpin(h)
	if h.file == nil {
		return unix.EISDIR
	}
	nowait := !c.MayBlock && !h.memory
	if nowait && h.waits.Load() {
		return fsbackend.ErrMayBlock
	}
	for off := int64(in.Offset); dst.Len() > 0; {
		flags := 0
		if nowait {
			flags = unix.RWF_NOWAIT
		}
		n, errno := dst.ReadFrom(h.file.Int(), off, dst.Len(), flags)
		off += int64(n)
		switch {
		case errno == 0 && n == 0:
			return fsbackend.OK
		case nowait && errno == unix.EOPNOTSUPP:
			h.waits.Store(true)
			return fsbackend.ErrMayBlock
		case nowait && errno == unix.EAGAIN:
			return fsbackend.ErrMayBlock
		case errno != 0:
			return errno
		}
	}
	return fsbackend.OK
}

package overlay

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// file is an open file of a layer.
type file struct {
	real
	fh uint64
}

// handle is a file or directory that the guest has open.
type handle struct {
	node  *node
	flags uint32 // open(2) flags
	dir   bool
	// cur is what is open in a layer: of a merged directory, nothing.
	cur atomic.Pointer[file]

	mu   sync.Mutex
	old  []*file // what cur was before; calls may still use it
	list *listing
	// reading is the part of a merged directory that was listed last.
	reading *file
	gone    bool // released
}

// maxHandles bounds the files and directories open at once; one more is ENFILE.
const maxHandles = 1 << 20

const handleShards = 32

// handles finds open files.
type handles struct {
	shards [handleShards]handleShard
	last   atomic.Uint64
	count  atomic.Int64
}

type handleShard struct {
	mu sync.RWMutex
	m  map[uint64]*handle
	_  [32]byte
}

func (t *handles) init() {
	for i := range t.shards {
		t.shards[i].m = make(map[uint64]*handle)
	}
}

func (t *handles) get(fh uint64) *handle {
	s := &t.shards[fh%handleShards]
	s.mu.RLock()
	h := s.m[fh]
	s.mu.RUnlock()
	return h
}

// add gives h a number.
func (t *handles) add(fs *FS, epoch uint64, h *handle) (uint64, errno) {
	if t.count.Add(1) > maxHandles {
		t.count.Add(-1)
		return 0, unix.ENFILE
	}
	fh := t.last.Add(1)
	s := &t.shards[fh%handleShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	if fs.epoch.Load() != epoch {
		t.count.Add(-1)
		return 0, unix.ESTALE // the session has ended
	}
	s.m[fh] = h
	return fh, 0
}

// take takes a handle of node out.
func (t *handles) take(fh, node uint64) *handle {
	s := &t.shards[fh%handleShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.m[fh]
	if h == nil || h.node.id != node {
		return nil
	}
	delete(s.m, fh)
	t.count.Add(-1)
	return h
}

func (t *handles) closeAll(fs *FS) {
	c := &fsbackend.Context{MayBlock: true}
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		m := s.m
		s.m = make(map[uint64]*handle)
		t.count.Add(-int64(len(m)))
		s.mu.Unlock()
		for _, h := range m {
			fs.closeHandle(c, h, 0)
		}
	}
}

// closeHandle closes what h has open in layers.
func (fs *FS) closeHandle(c *fsbackend.Context, h *handle, owner uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gone = true
	fs.setListing(h, nil)
	for _, f := range append(h.old, h.cur.Load(), h.reading) {
		f.close(c, h, owner)
	}
	h.old, h.reading = nil, nil
}

func (f *file) close(c *fsbackend.Context, h *handle, owner uint64) {
	if f == nil {
		return
	}
	in := fuseproto.ReleaseIn{InHeader: header(f.node), Fh: f.fh, Flags: h.flags, LockOwner: owner}
	switch {
	case h.dir && f.l.r.DirReader != nil:
		f.l.r.Releasedir(c, &in)
	case !h.dir && f.l.r.Opener != nil:
		f.l.r.Release(c, &in)
	}
}

// current returns what the file h is in a layer. A file that has been copied up since it was opened is opened again: what the
// guest reads, and locks, is what others change.
func (fs *FS) current(c *fsbackend.Context, h *handle) (*file, errno) {
	f := h.cur.Load()
	if f.l == fs.upper || h.node.upper.Load() == 0 {
		return f, 0
	}
	if !c.MayBlock {
		return nil, fsbackend.ErrMayBlock
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if f = h.cur.Load(); f.l == fs.upper {
		return f, 0
	}
	if h.gone {
		return nil, unix.EBADF
	}
	var out fuseproto.OpenOut
	fresh, e := fs.openReal(c, real{fs.upper, h.node.upper.Load()}, h.flags&^unix.O_TRUNC, 0, &out)
	if e != 0 {
		return nil, e
	}
	h.old = append(h.old, f)
	h.cur.Store(fresh)
	return fresh, 0
}

// openReal opens a layer's file.
func (fs *FS) openReal(c *fsbackend.Context, r real, flags, mode uint32, out *fuseproto.OpenOut) (*file, errno) {
	if r.l.r.Opener == nil {
		return &file{real: r}, 0
	}
	if !r.l.may(c) {
		return nil, fsbackend.ErrMayBlock
	}
	in := fuseproto.OpenIn{InHeader: header(r.node), Flags: flags, Mode: mode}
	if e := r.l.r.Open(c, &in, out); e != 0 {
		if e == unix.ENOSYS {
			return &file{real: r}, 0 // it needs no handles
		}
		return nil, e
	}
	return &file{r, out.Fh}, 0
}

// opened makes a handle for what has been opened in a layer.
func (fs *FS) opened(c *fsbackend.Context, epoch uint64, n *node, f *file, flags uint32) (uint64, errno) {
	h := &handle{node: n, flags: flags}
	h.cur.Store(f)
	fh, e := fs.handles.add(fs, epoch, h)
	if e != 0 {
		f.close(c, h, 0)
	}
	return fh, e
}

// Open implements fsbackend.Opener.
func (fs *FS) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	epoch := fs.epoch.Load()
	n, e := fs.node(in.NodeId)
	if e != 0 {
		return e
	}
	switch n.typ {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		return unix.EISDIR
	default:
		return unix.EBADF
	}
	return fs.openNode(c, epoch, n, in.Flags, in.Mode, out)
}

func (fs *FS) openNode(c *fsbackend.Context, epoch uint64, n *node, flags, mode uint32, out *fuseproto.OpenOut) errno {
	if fsbackend.OpensForWriting(flags) {
		if e := fs.begin(c); e != 0 {
			return e
		}
		defer fs.end(c)
	}
	return fs.openChanging(c, epoch, n, flags, mode, out)
}

// openChanging opens a regular file, in a change that has begun if it is for writing.
func (fs *FS) openChanging(c *fsbackend.Context, epoch uint64, n *node, flags, mode uint32, out *fuseproto.OpenOut) errno {
	if fsbackend.OpensForWriting(flags) {
		limit := wholeFile
		if flags&unix.O_TRUNC != 0 {
			limit = 0
		}
		if e := fs.copyUp(c, n, limit); e != 0 {
			return e
		}
	}
	f, e := fs.openReal(c, n.top(fs), flags, mode, out)
	if e != 0 {
		return e
	}
	out.Fh, e = fs.opened(c, epoch, n, f, flags)
	return e
}

// Release implements fsbackend.Opener.
func (fs *FS) Release(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	if h := fs.handles.get(in.Fh); h == nil || h.dir {
		return
	}
	if h := fs.handles.take(in.Fh, in.NodeId); h != nil {
		fs.closeHandle(c, h, in.LockOwner)
	}
}

// use returns the layer's file behind the guest's open file fh of node id.
func (fs *FS) use(c *fsbackend.Context, id, fh uint64) (*file, errno) {
	h := fs.handles.get(fh)
	if h == nil || h.node.id != id || h.dir {
		return nil, unix.EBADF
	}
	f, e := fs.current(c, h)
	if e == 0 && !f.l.may(c) {
		return nil, fsbackend.ErrMayBlock
	}
	return f, e
}

// Read implements fsbackend.Reader.
func (fs *FS) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	f, e := fs.use(c, in.NodeId, in.Fh)
	if e != 0 {
		return e
	}
	if f.l.r.Reader == nil {
		return unix.ENOSYS
	}
	id, fh := in.NodeId, in.Fh
	in.NodeId, in.Fh = f.node, f.fh
	e = f.l.r.Read(c, in, dst)
	in.NodeId, in.Fh = id, fh
	return e
}

// Write implements fsbackend.Writer.
func (fs *FS) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, fsbackend.Errno) {
	f, e := fs.use(c, in.NodeId, in.Fh)
	if e != 0 {
		return 0, e
	}
	if f.l != fs.upper {
		return 0, unix.EBADF // open for reading
	}
	if e := fs.begin(c); e != 0 {
		return 0, e
	}
	id, fh := in.NodeId, in.Fh
	in.NodeId, in.Fh = f.node, f.fh
	n, e := f.l.r.Write(c, in, src)
	in.NodeId, in.Fh = id, fh
	fs.end(c)
	return n, e
}

// Flush implements fsbackend.Flusher. ENOSYS, which ends all FLUSH, is the upper layer's to say where there is one.
func (fs *FS) Flush(c *fsbackend.Context, in *fuseproto.FlushIn) fsbackend.Errno {
	f, e := fs.use(c, in.NodeId, in.Fh)
	if e != 0 {
		return e
	}
	if f.l.r.Flusher == nil {
		e = unix.ENOSYS
	} else {
		id, fh := in.NodeId, in.Fh
		in.NodeId, in.Fh = f.node, f.fh
		e = f.l.r.Flush(c, in)
		in.NodeId, in.Fh = id, fh
	}
	switch {
	case e != unix.ENOSYS:
	case f.l == fs.upper:
		fs.noFlush.Store(true)
	case fs.upper != nil && !fs.noFlush.Load() || fs.upper == nil && len(fs.layers) > 1:
		return 0
	}
	return e
}

// Fsync implements fsbackend.Fsyncer.
func (fs *FS) Fsync(c *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	f, e := fs.use(c, in.NodeId, in.Fh)
	if e != 0 || f.l != fs.upper || fs.cfg.Volatile {
		return e // what no guest can change needs no writing
	}
	if f.l.r.Fsyncer == nil {
		return unix.ENOSYS
	}
	id, fh := in.NodeId, in.Fh
	in.NodeId, in.Fh = f.node, f.fh
	e = f.l.r.Fsync(c, in)
	in.NodeId, in.Fh = id, fh
	return e
}

// Syncfs implements fsbackend.Syncfser.
func (fs *FS) Syncfs(c *fsbackend.Context, id uint64) fsbackend.Errno {
	if _, e := fs.node(id); e != 0 {
		return e
	}
	if fs.upper == nil || fs.cfg.Volatile {
		return 0
	}
	if fs.upper.r.Syncfser == nil {
		return unix.ENOSYS
	}
	return fs.upper.r.Syncfs(c, fs.upper.root)
}

// Fallocate implements fsbackend.Fallocater.
func (fs *FS) Fallocate(c *fsbackend.Context, in *fuseproto.FallocateIn) fsbackend.Errno {
	f, e := fs.use(c, in.NodeId, in.Fh)
	if e != 0 {
		return e
	}
	if f.l != fs.upper {
		return unix.EBADF
	}
	if f.l.r.Fallocater == nil {
		return unix.EOPNOTSUPP
	}
	if e := fs.begin(c); e != 0 {
		return e
	}
	defer fs.end(c)
	id, fh := in.NodeId, in.Fh
	in.NodeId, in.Fh = f.node, f.fh
	e = f.l.r.Fallocate(c, in)
	in.NodeId, in.Fh = id, fh
	return e
}

// Lseek implements fsbackend.Lseeker.
func (fs *FS) Lseek(c *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) fsbackend.Errno {
	f, e := fs.use(c, in.NodeId, in.Fh)
	if e != 0 {
		return e
	}
	if f.l.r.Lseeker == nil {
		return unix.ENOSYS
	}
	id, fh := in.NodeId, in.Fh
	in.NodeId, in.Fh = f.node, f.fh
	e = f.l.r.Lseek(c, in, out)
	in.NodeId, in.Fh = id, fh
	return e
}

// CopyFileRange implements fsbackend.CopyFileRanger. EXDEV has the guest copy between layers that cannot.
func (fs *FS) CopyFileRange(c *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, fsbackend.Errno) {
	from, e := fs.use(c, in.NodeId, in.FhIn)
	if e != 0 {
		return 0, e
	}
	to, e := fs.use(c, in.NodeIdOut, in.FhOut)
	if e != 0 {
		return 0, e
	}
	if to.l != fs.upper {
		return 0, unix.EBADF
	}
	if e := fs.begin(c); e != 0 {
		return 0, e
	}
	defer fs.end(c)
	if from.l.r.Backend == to.l.r.Backend {
		if to.l.r.CopyFileRanger == nil {
			return 0, unix.EOPNOTSUPP
		}
		saved := *in
		in.NodeId, in.FhIn, in.NodeIdOut, in.FhOut = from.node, from.fh, to.node, to.fh
		n, e := to.l.r.CopyFileRange(c, in)
		*in = saved
		return n, e
	}
	if int64(in.OffIn) < 0 || int64(in.OffOut) < 0 || in.Flags != 0 {
		return 0, unix.EINVAL
	}
	var n int
	e = both(from, to, func(fromFD, toFD int) (e errno) {
		n, e = sys.CopyFileRange(fromFD, int64(in.OffIn), toFD, int64(in.OffOut), in.Len, 0)
		return e
	})
	if e == unix.EOPNOTSUPP {
		e = unix.EXDEV
	}
	return uint64(max(n, 0)), e
}

// both calls use with the descriptors of two layers' open files: EOPNOTSUPP if they are not both the host's.
func both(from, to *file, use func(fromFD, toFD int) errno) errno {
	if from.l.r.Filer == nil || to.l.r.Filer == nil {
		return unix.EOPNOTSUPP
	}
	return from.l.r.FileOf(from.node, from.fh, func(fromFD int) errno {
		return to.l.r.FileOf(to.node, to.fh, func(toFD int) errno { return use(fromFD, toFD) })
	})
}

// Ioctl implements fsbackend.Ioctler. What may change something is done to a copy.
func (fs *FS) Ioctl(c *fsbackend.Context, in *fuseproto.IoctlIn, arg []byte, dst *fsbackend.Sink) (int32, fsbackend.Errno) {
	h := fs.handles.get(in.Fh)
	if h == nil || h.node.id != in.NodeId {
		return 0, unix.EBADF
	}
	n := h.node
	if fsbackend.IoctlMayChange(in.Cmd) {
		if fs.upper == nil {
			return 0, unix.ENOTTY
		}
		if fs.upper.r.Ioctler == nil {
			return 0, unix.ENOTTY
		}
		if e := fs.begin(c); e != 0 {
			return 0, e
		}
		defer fs.end(c)
		if e := fs.copyUp(c, n, wholeFile); e != 0 {
			return 0, e
		}
	}
	f := h.cur.Load()
	if h.dir && (f == nil || f.l != n.top(fs).l) {
		d, e := fs.openRealDir(c, n.top(fs))
		if e != 0 {
			return 0, e
		}
		defer d.close(c, h, 0)
		f = d
	} else if !h.dir {
		var e errno
		if f, e = fs.current(c, h); e != 0 {
			return 0, e
		}
	}
	if f.l.r.Ioctler == nil {
		return 0, unix.ENOTTY
	}
	if !f.l.may(c) {
		return 0, fsbackend.ErrMayBlock
	}
	id, fh := in.NodeId, in.Fh
	in.NodeId, in.Fh = f.node, f.fh
	r, e := f.l.r.Ioctl(c, in, arg, dst)
	in.NodeId, in.Fh = id, fh
	return r, e
}

// Readlink implements fsbackend.Readlinker.
func (fs *FS) Readlink(c *fsbackend.Context, id uint64, dst *fsbackend.Sink) fsbackend.Errno {
	n, e := fs.node(id)
	if e != 0 {
		return e
	}
	r := n.top(fs)
	switch {
	case n.typ != unix.S_IFLNK:
		return unix.EINVAL
	case r.l.r.Readlinker == nil:
		return unix.ENOSYS
	case !r.l.may(c):
		return fsbackend.ErrMayBlock
	}
	return r.l.r.Readlink(c, r.node, dst)
}

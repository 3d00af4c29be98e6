package mem

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func readable(flags uint32) bool { return flags&unix.O_ACCMODE != unix.O_WRONLY }

func writable(flags uint32) bool { return flags&unix.O_ACCMODE != unix.O_RDONLY }

// Open implements fsbackend.Opener.
func (f *FS) Open(_ *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	f.mu.RLock()
	n, errno := f.node(in.NodeId)
	f.mu.RUnlock()
	switch {
	case errno != 0:
		return errno
	case n.dir != nil:
		return unix.EISDIR
	case !n.is(unix.S_IFREG):
		return unix.EBADF // virtiofsd's answer; a guest's kernel opens these itself
	}
	if in.Flags&unix.O_TRUNC != 0 {
		if errno := f.setSize(n, 0, in.Mode&fuseproto.FUSE_OPEN_KILL_SUIDGID != 0); errno != 0 {
			return errno
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.nodes[n.id] != n {
		return unix.ESTALE
	}
	out.Fh, errno = f.open(n, in.Flags)
	return errno
}

// Release implements fsbackend.Opener.
func (f *FS) Release(_ *fsbackend.Context, in *fuseproto.ReleaseIn) {
	f.release(in)
}

// Read implements fsbackend.Reader.
func (f *FS) Read(_ *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	h, errno := f.findHandle(in.NodeId, in.Fh)
	switch {
	case errno != 0:
		return errno
	case h.node.dir != nil:
		return unix.EISDIR
	case !readable(h.flags) && !f.writeback.Load():
		return unix.EBADF // with a writeback cache, the guest fills pages that it writes parts of
	case in.Offset > maxSize:
		return unix.EINVAL
	}
	n := h.node
	n.data.mu.RLock()
	defer n.data.mu.RUnlock()
	for off := in.Offset; off < n.size && dst.Len() > 0; {
		p := n.data.page(off / pageSize)
		if p == nil {
			p = &zeroPage
		}
		at := off % pageSize
		part := p[at:min(pageSize, at+n.size-off)]
		part = part[:min(len(part), dst.Len())]
		if dst.Write(part) < len(part) {
			return unix.EFAULT
		}
		off += uint64(len(part))
	}
	return fsbackend.OK
}

// Write implements fsbackend.Writer.
func (f *FS) Write(_ *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, fsbackend.Errno) {
	h, errno := f.findHandle(in.NodeId, in.Fh)
	switch {
	case errno != 0:
		return 0, errno
	case h.node.dir != nil || !writable(h.flags):
		return 0, unix.EBADF
	}
	n := h.node
	n.data.mu.Lock()
	defer n.data.mu.Unlock()
	off := in.Offset
	if in.Flags&unix.O_APPEND != 0 && in.WriteFlags&fuseproto.FUSE_WRITE_CACHE == 0 {
		off = n.size
	}
	if off > maxSize || uint64(src.Len()) > maxSize-off {
		return 0, unix.EFBIG
	}
	if n.data.dead {
		return 0, unix.EBADF
	}
	total, errno := f.store(n, off, src)
	if total > 0 {
		f.written(n, off+uint64(total), in.WriteFlags&fuseproto.FUSE_WRITE_KILL_SUIDGID != 0)
		return uint32(total), fsbackend.OK
	}
	return 0, errno
}

// store copies src into n from off on and returns the bytes before an error. n.data.mu is held for writing.
func (f *FS) store(n *node, off uint64, src *fsbackend.Source) (int, fsbackend.Errno) {
	total := 0
	for src.Len() > 0 {
		p, errno := f.writablePage(n, off/pageSize)
		if errno != 0 {
			return total, errno
		}
		at := off % pageSize
		part := p[at:min(pageSize, at+uint64(src.Len()))]
		got := src.Read(part)
		total += got
		if got < len(part) {
			// The copy that faulted may have left some of its bytes: none may show up beyond the end of the file.
			end := max(n.size, off+uint64(got))
			if end < off+uint64(len(part)) {
				clear(part[end-off:])
			}
			return total, unix.EFAULT
		}
		off += uint64(got)
	}
	return total, fsbackend.OK
}

// writablePage returns page number index of n, filling a hole. n.data.mu is held for writing.
func (f *FS) writablePage(n *node, index uint64) (*page, fsbackend.Errno) {
	if p := n.data.page(index); p != nil {
		return p, fsbackend.OK
	}
	if !f.charge(pageSize) {
		return nil, unix.ENOSPC
	}
	return n.data.fill(index), fsbackend.OK
}

// written notes a change of contents that reaches up to end. n.data.mu is held for writing.
func (f *FS) written(n *node, end uint64, killSuidgid bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n.size = max(n.size, end)
	n.mtime = makeStamp(f.now())
	n.ctime = n.mtime
	f.killPriv(n, killSuidgid)
}

// setSize truncates or extends a regular file.
func (f *FS) setSize(n *node, size uint64, killSuidgid bool) fsbackend.Errno {
	switch {
	case n.dir != nil:
		return unix.EISDIR
	case !n.is(unix.S_IFREG):
		return unix.EINVAL
	case size > maxSize:
		return unix.EFBIG
	}
	n.data.mu.Lock()
	defer n.data.mu.Unlock()
	if n.data.dead {
		return unix.ESTALE
	}
	if size < n.size {
		f.refund(n.data.truncate(size))
	}
	f.mu.Lock()
	n.size = size
	f.mu.Unlock()
	f.written(n, size, killSuidgid)
	return fsbackend.OK
}

// Create implements fsbackend.Creater.
func (f *FS) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	f.mu.Lock()
	existing, errno := f.create(c, in, name, out)
	if existing == nil {
		f.mu.Unlock()
		return errno
	}
	f.entry(existing, &out.EntryOut)
	f.mu.Unlock()

	open := fuseproto.OpenIn{InHeader: in.InHeader, Flags: in.Flags, Mode: in.OpenFlags}
	open.NodeId = existing.id
	if errno := f.Open(c, &open, &out.OpenOut); errno != 0 {
		f.Forget(existing.id, 1)
		return errno
	}
	f.mu.RLock()
	existing.attr(&out.Attr)
	f.mu.RUnlock()
	return fsbackend.OK
}

// create makes and opens name, or returns the file that has it already. mu is held for writing.
func (f *FS) create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) (*node, fsbackend.Errno) {
	parent, errno := f.directory(in.NodeId)
	if errno != 0 {
		return nil, errno
	}
	if e := parent.dir.names[string(name)]; e != nil {
		if in.Flags&unix.O_EXCL != 0 {
			return nil, unix.EEXIST
		}
		return e.node, fsbackend.OK
	}
	if len(f.handles) >= MaxHandles {
		return nil, unix.ENFILE
	}
	n, errno := f.make(c, parent, name, f.mask(in.Mode, in.Umask)&0o7777|unix.S_IFREG, "")
	if errno != 0 {
		return nil, errno
	}
	f.entry(n, &out.EntryOut)
	out.Fh, errno = f.open(n, in.Flags)
	return nil, errno
}

// Tmpfile implements fsbackend.Tmpfiler.
func (f *FS) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) fsbackend.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	parent, errno := f.directory(in.NodeId)
	switch {
	case errno != 0:
		return errno
	case parent.nlink == 0:
		return unix.ENOENT
	case len(f.handles) >= MaxHandles:
		return unix.ENFILE
	}
	n, errno := f.newChild(c, parent, f.mask(in.Mode, in.Umask)&0o7777|unix.S_IFREG)
	if errno != 0 {
		return errno
	}
	n.nlink = 0
	n.linkable = in.Flags&unix.O_EXCL == 0
	f.entry(n, &out.EntryOut)
	out.Fh, errno = f.open(n, in.Flags)
	return errno
}

// Fallocate implements fsbackend.Fallocater.
func (f *FS) Fallocate(_ *fsbackend.Context, in *fuseproto.FallocateIn) fsbackend.Errno {
	h, errno := f.findHandle(in.NodeId, in.Fh)
	switch {
	case errno != 0:
		return errno
	case h.node.dir != nil || !writable(h.flags):
		return unix.EBADF
	case in.Length == 0 || in.Offset > maxSize || in.Length > maxSize:
		return unix.EINVAL
	case in.Length > maxSize-in.Offset:
		return unix.EFBIG
	}
	n := h.node
	n.data.mu.Lock()
	defer n.data.mu.Unlock()
	if n.data.dead {
		return unix.EBADF
	}
	end := in.Offset + in.Length
	size := max(n.size, end)
	if in.Mode&unix.FALLOC_FL_KEEP_SIZE != 0 {
		size = n.size
	}
	switch in.Mode {
	case 0, unix.FALLOC_FL_KEEP_SIZE:
		errno = f.allocate(n, in.Offset, end)
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE:
		f.refund(n.data.zero(in.Offset, end, true))
	case unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
		if errno = f.allocate(n, in.Offset, end); errno == 0 {
			n.data.zero(in.Offset, end, false)
		}
	default:
		errno = unix.EOPNOTSUPP
	}
	if errno == 0 {
		f.written(n, size, false)
	}
	return errno
}

// allocate fills the holes from start to before end, or none of them. n.data.mu is held for writing.
func (f *FS) allocate(n *node, start, end uint64) fsbackend.Errno {
	first, beyond := start/pageSize, (end-1)/pageSize+1
	missing := beyond - first - uint64(n.data.count(first, beyond))
	if missing > uint64(f.maxBytes)/pageSize || !f.charge(int64(missing)*pageSize) {
		return unix.ENOSPC
	}
	for index := first; index < beyond; index++ {
		if n.data.page(index) == nil {
			n.data.fill(index)
		}
	}
	return fsbackend.OK
}

// Lseek implements fsbackend.Lseeker.
func (f *FS) Lseek(_ *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) fsbackend.Errno {
	h, errno := f.findHandle(in.NodeId, in.Fh)
	if errno != 0 {
		return errno
	}
	if h.node.dir != nil || in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return unix.EINVAL
	}
	n := h.node
	n.data.mu.RLock()
	defer n.data.mu.RUnlock()
	if in.Offset >= n.size {
		return unix.ENXIO
	}
	off, ok := n.data.next(in.Offset, n.size, in.Whence == unix.SEEK_HOLE)
	if !ok {
		return unix.ENXIO
	}
	out.Offset = off
	return fsbackend.OK
}

// copyLimit is the most bytes that one call of CopyFileRange copies: a guest asks again for the rest, and holes of any size
// cannot keep a thread busy.
const copyLimit = 64 << 20

// CopyFileRange implements fsbackend.CopyFileRanger.
func (f *FS) CopyFileRange(_ *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, fsbackend.Errno) {
	from, errno := f.findHandle(in.NodeId, in.FhIn)
	if errno != 0 {
		return 0, errno
	}
	to, errno := f.findHandle(in.NodeIdOut, in.FhOut)
	switch {
	case errno != 0:
		return 0, errno
	case in.Flags != 0:
		return 0, unix.EINVAL
	case from.node.dir != nil || to.node.dir != nil:
		return 0, unix.EISDIR
	case !readable(from.flags) && !f.writeback.Load() || !writable(to.flags):
		return 0, unix.EBADF
	case in.OffIn > maxSize || in.Len > maxSize-in.OffIn:
		return 0, unix.EOVERFLOW
	case in.OffOut > maxSize || in.Len > maxSize-in.OffOut:
		return 0, unix.EFBIG
	}
	src, dst := from.node, to.node
	if src == dst {
		if in.OffIn < in.OffOut+in.Len && in.OffOut < in.OffIn+in.Len {
			return 0, unix.EINVAL
		}
		src.data.mu.Lock()
		defer src.data.mu.Unlock()
	} else {
		// Two files are locked by ascending id, so that copies both ways at once cannot wait for each other.
		if src.id < dst.id {
			src.data.mu.RLock()
			defer src.data.mu.RUnlock()
		}
		dst.data.mu.Lock()
		defer dst.data.mu.Unlock()
		if src.id > dst.id {
			src.data.mu.RLock()
			defer src.data.mu.RUnlock()
		}
	}
	if dst.data.dead {
		return 0, unix.EBADF
	}
	if in.OffIn >= src.size {
		return 0, fsbackend.OK
	}
	want := min(in.Len, src.size-in.OffIn, copyLimit)
	total, errno := f.copy(dst, in.OffOut, src, in.OffIn, want)
	if total > 0 {
		f.written(dst, in.OffOut+total, false)
		return total, fsbackend.OK
	}
	return 0, errno
}

// copy copies n bytes and returns those before an error. Both data.mu are held.
func (f *FS) copy(dst *node, to uint64, src *node, from, n uint64) (uint64, fsbackend.Errno) {
	total := uint64(0)
	for total < n {
		part := min(n-total, pageSize-(from+total)%pageSize, pageSize-(to+total)%pageSize)
		p := src.data.page((from + total) / pageSize)
		if p != nil || dst.data.page((to+total)/pageSize) != nil {
			if p == nil {
				p = &zeroPage
			}
			q, errno := f.writablePage(dst, (to+total)/pageSize)
			if errno != 0 {
				return total, errno
			}
			copy(q[(to+total)%pageSize:][:part], p[(from+total)%pageSize:])
		}
		total += part
	}
	return total, fsbackend.OK
}

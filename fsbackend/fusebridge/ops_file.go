package fusebridge

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// openFlags are those of a program's open flags that the guest's kernel is to have: the others need /dev/fuse.
const openFlags = fuseproto.FOPEN_DIRECT_IO | fuseproto.FOPEN_KEEP_CACHE | fuseproto.FOPEN_NONSEEKABLE | fuseproto.FOPEN_CACHE_DIR |
	fuseproto.FOPEN_STREAM | fuseproto.FOPEN_NOFLUSH | fuseproto.FOPEN_PARALLEL_DIRECT_WRITES

// reopenFlags are the open(2) flags that a file is opened with again.
const reopenFlags = unix.O_ACCMODE | unix.O_NOATIME | unix.O_DIRECT

// Open implements fsbackend.Opener.
func (b *Bridge) Open(ctx *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	return b.open(ctx, in, out, false)
}

// Opendir implements fsbackend.DirReader.
func (b *Bridge) Opendir(ctx *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	return b.open(ctx, in, out, true)
}

func (b *Bridge) open(ctx *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut, dir bool) fsbackend.Errno {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	switch {
	case dir && n.typ != unix.S_IFDIR:
		return unix.ENOTDIR
	case !dir && n.typ == unix.S_IFDIR:
		return unix.EISDIR
	case !dir && n.typ != unix.S_IFREG:
		return unix.EBADF // a guest's kernel opens these itself
	}
	if errno := b.room(); errno != 0 {
		return errno
	}
	op, without := fuseproto.FUSE_OPEN, &b.noOpen
	if dir {
		op, without = fuseproto.FUSE_OPENDIR, &b.noOpendir
	}
	h := &handle{dir: dir, flags: in.Flags & reopenFlags, again: dir || in.Flags&unix.O_ACCMODE == unix.O_RDONLY, stateless: without.Load()}
	if h.stateless {
		return b.openStateless(ctx, n, h, in, out)
	}
	r, errno := b.begin(ctx, op, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	req := put(r, op, in)
	req.Flags &^= unix.O_CREAT | unix.O_EXCL | unix.O_NOCTTY
	cut := !dir && in.Flags&unix.O_TRUNC != 0 && r.c.flags&fuseproto.FUSE_ATOMIC_O_TRUNC == 0
	if cut {
		req.Flags &^= unix.O_TRUNC
	}
	if r.c.flags&fuseproto.FUSE_HANDLE_KILLPRIV_V2 == 0 {
		req.Mode &^= fuseproto.FUSE_OPEN_KILL_SUIDGID
	}
	errno = r.call(ctx, sizeOf[fuseproto.OpenOut](), false)
	if in.Flags&unix.O_TRUNC != 0 {
		b.touch(n)
	}
	switch errno {
	case fsbackend.OK:
		decode(r.reply, out)
		h.at = place{r.c, out.Fh}
		h.direct = pastCache(in.Flags, out.OpenFlags)
		out.OpenFlags, out.BackingID = out.OpenFlags&openFlags, 0
	case unix.ENOSYS:
		without.Store(true)
		h.stateless = true
		return b.openStateless(ctx, n, h, in, out)
	default:
		return errno
	}
	out.Fh = b.opened(n, h)
	if !cut {
		return fsbackend.OK
	}
	if errno = b.cut(ctx, in.InHeader, out.Fh, in.Flags, in.Mode, new(fuseproto.AttrOut)); errno != 0 {
		b.close(&fuseproto.ReleaseIn{InHeader: in.InHeader, Fh: out.Fh, Flags: in.Flags}, dir, true)
	}
	return errno
}

// pastCache says whether the data of a file opened with flags, for which the program has answered openFlags, go past the guest's page
// cache.
func pastCache(flags, openFlags uint32) bool {
	return flags&unix.O_DIRECT != 0 || openFlags&fuseproto.FOPEN_DIRECT_IO != 0
}

// cut truncates the file of h, which was opened with flags, for a program that leaves O_TRUNC to SETATTR as without
// FUSE_ATOMIC_O_TRUNC a kernel does (fs/namei.c, handle_truncate).
func (b *Bridge) cut(ctx *fsbackend.Context, h fuseproto.InHeader, fh uint64, flags, openFlags uint32, out *fuseproto.AttrOut) fsbackend.Errno {
	var in fuseproto.SetattrIn
	in.InHeader, in.Valid = h, fuseproto.FATTR_SIZE
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		in.Valid |= fuseproto.FATTR_FH
		in.Fh = fh
	}
	if openFlags&fuseproto.FUSE_OPEN_KILL_SUIDGID != 0 {
		in.Valid |= fuseproto.FATTR_KILL_SUIDGID
	}
	return b.Setattr(begun(ctx), &in, out)
}

// openStateless makes a handle where the program opens nothing: it takes handle 0 in every request, and is not told of the release
// (fs/fuse/file.c, fuse_file_open). What the guest's kernel leaves to its OPEN is done otherwise.
func (b *Bridge) openStateless(ctx *fsbackend.Context, n *node, h *handle, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	if !h.dir && in.Flags&unix.O_TRUNC != 0 {
		if errno := b.cut(ctx, in.InHeader, 0, unix.O_RDONLY, in.Mode, new(fuseproto.AttrOut)); errno != 0 {
			return errno
		}
	}
	*out = fuseproto.OpenOut{OpenFlags: fuseproto.FOPEN_KEEP_CACHE}
	if h.dir {
		out.OpenFlags |= fuseproto.FOPEN_CACHE_DIR
	}
	out.Fh = b.opened(n, h)
	return fsbackend.OK
}

// Release implements fsbackend.Opener.
func (b *Bridge) Release(ctx *fsbackend.Context, in *fuseproto.ReleaseIn) {
	b.close(in, false, ctx.MayBlock)
}

// Releasedir implements fsbackend.DirReader.
func (b *Bridge) Releasedir(ctx *fsbackend.Context, in *fuseproto.ReleaseIn) {
	b.close(in, true, ctx.MayBlock)
}

// Create implements fsbackend.Creater.
func (b *Bridge) Create(ctx *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	return b.create(ctx, fuseproto.FUSE_CREATE, in, name, out)
}

// Tmpfile implements fsbackend.Tmpfiler.
func (b *Bridge) Tmpfile(ctx *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) fsbackend.Errno {
	return b.create(ctx, fuseproto.FUSE_TMPFILE, in, nil, out)
}

// create makes name, or without one a file that has none.
func (b *Bridge) create(ctx *fsbackend.Context, op fuseproto.Opcode, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	p, errno := b.pinDir(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(p)
	if errno := b.room(); errno != 0 {
		return errno
	}
	r, errno := b.begin(ctx, op, p)
	if errno != 0 {
		return errno
	}
	defer r.end()
	p.names.Lock()
	defer p.names.Unlock()
	req := put(r, op, in)
	if op == fuseproto.FUSE_CREATE {
		req.Flags |= unix.O_CREAT
	}
	cut := in.Flags&unix.O_TRUNC != 0 && r.c.flags&fuseproto.FUSE_ATOMIC_O_TRUNC == 0
	if cut {
		req.Flags &^= unix.O_TRUNC
	}
	b.modes(r.c, &req.Mode, &req.Umask)
	if r.c.flags&fuseproto.FUSE_HANDLE_KILLPRIV_V2 == 0 {
		req.OpenFlags &^= fuseproto.FUSE_OPEN_KILL_SUIDGID
	}
	r.name(name)
	errno = r.call(ctx, sizeOf[fuseproto.CreateOut](), false)
	if errno == unix.EEXIST && op == fuseproto.FUSE_CREATE && in.Flags&unix.O_EXCL == 0 {
		// A kernel sends CREATE only for a name that it believes not to be there, and programs rely on that.
		return b.openExisting(ctx, r, p, in, name, out)
	}
	if errno != 0 {
		return errno
	}
	decode(r.reply, out)
	raw, fh := out.NodeId, out.Fh
	b.touch(p)
	if raw == 0 || out.Mode&unix.S_IFMT != unix.S_IFREG {
		r.c.forget(raw, 1)
		return unix.EIO
	}
	parent := p
	if op == fuseproto.FUSE_TMPFILE {
		parent = nil
	}
	n, errno := b.adopt(r.c, &out.EntryOut, parent, name)
	if errno != 0 {
		r.c.undoOpen(fuseproto.FUSE_RELEASE, raw, r.reply[entryOutSize:])
		return errno
	}
	b.touch(n)
	b.keepEntry(n, &out.EntryOut, b.version(n), parent, name, b.version(p))
	h := &handle{flags: in.Flags & reopenFlags, again: in.Flags&unix.O_ACCMODE == unix.O_RDONLY, at: place{r.c, fh}}
	h.direct = pastCache(in.Flags, out.OpenFlags)
	out.Fh = b.opened(n, h)
	out.OpenFlags, out.BackingID = out.OpenFlags&openFlags, 0
	if !cut || out.Size == 0 { // which a new file has
		return fsbackend.OK
	}
	head, attr := in.InHeader, new(fuseproto.AttrOut)
	head.NodeId = n.id
	if errno := b.cut(ctx, head, out.Fh, in.Flags, in.OpenFlags, attr); errno != 0 {
		b.close(&fuseproto.ReleaseIn{InHeader: head, Fh: out.Fh, Flags: in.Flags}, false, true)
		b.Forget(n.id, 1)
		return errno
	}
	out.Attr, out.AttrValid, out.AttrValidNsec = attr.Attr, attr.AttrValid, attr.AttrValidNsec
	return fsbackend.OK
}

// openExisting answers a CREATE with the file that there is. The names of p are locked.
func (b *Bridge) openExisting(ctx *fsbackend.Context, r *request, p *node, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	put(r, fuseproto.FUSE_LOOKUP, &fuseproto.InHeader{})
	r.name(name)
	*out = fuseproto.CreateOut{}
	if errno := r.entry(ctx, &out.EntryOut); errno != 0 {
		return errno
	}
	if out.NodeId == 0 {
		return unix.ENOENT
	}
	n, errno := b.adopt(r.c, &out.EntryOut, p, name)
	if errno != 0 {
		return errno
	}
	b.keepEntry(n, &out.EntryOut, b.version(n), p, name, b.version(p))
	open := fuseproto.OpenIn{InHeader: in.InHeader, Flags: in.Flags &^ (unix.O_CREAT | unix.O_EXCL), Mode: in.OpenFlags}
	open.NodeId = n.id
	if errno := b.open(begun(ctx), &open, &out.OpenOut, false); errno != 0 {
		b.Forget(n.id, 1)
		return errno
	}
	if in.Flags&unix.O_TRUNC != 0 {
		out.Attr.Size, out.Attr.Blocks = 0, 0
		out.AttrValid, out.AttrValidNsec = 0, fsbackend.Stale
	}
	return fsbackend.OK
}

// use is what a call about a handle begins with: a request about its node, and the program's number for it.
func (b *Bridge) use(ctx *fsbackend.Context, op fuseproto.Opcode, h *handle) (r *request, fh uint64, errno fsbackend.Errno) {
	if r, errno = b.begin(ctx, op, h.node); errno != 0 {
		return nil, 0, errno
	}
	if fh, errno = b.findHandle(ctx, r.c, r.raw, h); errno != 0 {
		r.end()
		return nil, 0, errno
	}
	return r, fh, fsbackend.OK
}

// Read implements fsbackend.Reader.
func (b *Bridge) Read(ctx *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	h, errno := b.pinHandle(in.NodeId, in.Fh, false)
	if errno != 0 {
		return errno
	}
	defer b.unpinHandle(h)
	offset := in.Offset
	if offset > math.MaxInt64 {
		return unix.EINVAL
	}
	if n := dst.Len(); !ctx.MayBlock && (n > b.quickData() || dst.Fits(n) < n) {
		return fsbackend.ErrMayBlock
	}
	if b.lacks(fuseproto.FUSE_ASYNC_READ) || h.direct && b.lacks(fuseproto.FUSE_ASYNC_DIO) {
		h.order.Lock()
		defer h.order.Unlock()
	}
	for dst.Len() > 0 && offset < math.MaxInt64 {
		if offset > in.Offset {
			ctx = begun(ctx)
		}
		want, got, errno := b.readSome(ctx, h, in, offset, dst)
		if errno != 0 {
			if offset > in.Offset {
				return fsbackend.OK
			}
			return errno
		}
		if offset += uint64(got); got < want {
			break
		}
	}
	return fsbackend.OK
}

// readSome reads as much as one request may.
func (b *Bridge) readSome(ctx *fsbackend.Context, h *handle, in *fuseproto.ReadIn, offset uint64, dst *fsbackend.Sink) (want, got int, errno fsbackend.Errno) {
	r, fh, errno := b.use(ctx, fuseproto.FUSE_READ, h)
	if errno != 0 {
		return 0, 0, errno
	}
	defer r.end()
	want = dst.Fits(int(min(uint64(dst.Len()), uint64(r.c.maxRead), math.MaxInt64-offset)))
	req := put(r, fuseproto.FUSE_READ, in)
	req.Fh, req.Offset, req.Size = fh, offset, uint32(want)
	r.sink, r.room = dst, want
	errno = r.call(ctx, want, true)
	return want, r.got, errno
}

// Write implements fsbackend.Writer.
func (b *Bridge) Write(ctx *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, fsbackend.Errno) {
	h, errno := b.pinHandle(in.NodeId, in.Fh, false)
	if errno != 0 {
		return 0, errno
	}
	defer b.unpinHandle(h)
	if in.Offset > math.MaxInt64 || uint64(src.Len()) > math.MaxInt64-in.Offset {
		return 0, unix.EFBIG
	}
	if n := src.Len(); !ctx.MayBlock && (n > b.quickData() || src.Fits(n) < n) {
		return 0, fsbackend.ErrMayBlock
	}
	if h.direct && b.lacks(fuseproto.FUSE_ASYNC_DIO) {
		h.order.Lock()
		defer h.order.Unlock()
	}
	defer b.touch(h.node)
	total, limit := 0, LimitMaxWrite
	for src.Len() > 0 {
		if total > 0 {
			ctx = begun(ctx)
		}
		want, put, errno := b.writeSome(ctx, h, in, in.Offset+uint64(total), src, limit)
		total += put
		switch {
		case errno == unix.ENOBUFS && want > pageSize:
			limit = max(want/2&^(pageSize-1), pageSize) // the host has no piece of memory of that size
			continue
		case errno != 0 && total == 0:
			return 0, errno
		case errno != 0 || put < want:
			return uint32(total), fsbackend.OK
		}
	}
	return uint32(total), fsbackend.OK
}

// writeSome writes as much as one request may, and at most limit bytes.
func (b *Bridge) writeSome(ctx *fsbackend.Context, h *handle, in *fuseproto.WriteIn, offset uint64, src *fsbackend.Source, limit int) (want, n int, errno fsbackend.Errno) {
	r, fh, errno := b.use(ctx, fuseproto.FUSE_WRITE, h)
	if errno != 0 {
		return 0, 0, errno
	}
	defer r.end()
	want = src.Fits(min(src.Len(), r.c.maxWrite, limit))
	req := put(r, fuseproto.FUSE_WRITE, in)
	req.Fh, req.Offset, req.Size = fh, offset, uint32(want)
	if r.c.flags&fuseproto.FUSE_HANDLE_KILLPRIV_V2 == 0 {
		req.WriteFlags &^= fuseproto.FUSE_WRITE_KILL_SUIDGID
	}
	if errno := r.exchange(ctx, sizeOf[fuseproto.WriteOut](), false, src, want); errno != 0 {
		return want, 0, errno
	}
	var out fuseproto.WriteOut
	decode(r.reply, &out)
	if int(out.Size) > want {
		return want, 0, unix.EIO
	}
	return want, int(out.Size), fsbackend.OK
}

// Flush implements fsbackend.Flusher. A program that does not know of it has nothing to do.
func (b *Bridge) Flush(ctx *fsbackend.Context, in *fuseproto.FlushIn) fsbackend.Errno {
	h, errno := b.pinHandle(in.NodeId, in.Fh, false)
	if errno != 0 {
		return errno
	}
	defer b.unpinHandle(h)
	if !ctx.MayBlock && b.locked(h.node) {
		return fsbackend.ErrMayBlock // before locks are given back
	}
	defer b.unlockOwner(ctx, h.node, in.LockOwner)
	if b.noFlush.Load() {
		return fsbackend.OK
	}
	r, fh, errno := b.use(ctx, fuseproto.FUSE_FLUSH, h)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, fuseproto.FUSE_FLUSH, in).Fh = fh
	errno = r.call(ctx, 0, false)
	if errno == unix.ENOSYS {
		b.noFlush.Store(true)
		return fsbackend.OK
	}
	if h.flags&unix.O_ACCMODE != unix.O_RDONLY {
		b.touch(h.node) // programs may write only now
	}
	return errno
}

// Fsync implements fsbackend.Fsyncer.
func (b *Bridge) Fsync(ctx *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	return b.fsync(ctx, fuseproto.FUSE_FSYNC, in, false)
}

// Fsyncdir implements fsbackend.Fsyncer.
func (b *Bridge) Fsyncdir(ctx *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	return b.fsync(ctx, fuseproto.FUSE_FSYNCDIR, in, true)
}

func (b *Bridge) fsync(ctx *fsbackend.Context, op fuseproto.Opcode, in *fuseproto.FsyncIn, dir bool) fsbackend.Errno {
	h, errno := b.pinHandle(in.NodeId, in.Fh, dir)
	if errno != 0 {
		return errno
	}
	defer b.unpinHandle(h)
	r, fh, errno := b.use(ctx, op, h)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, op, in).Fh = fh
	return notNeeded(r.call(ctx, 0, false))
}

// notNeeded makes success of ENOSYS, for what a program without it has nothing to do (fs/fuse/file.c, fuse_fsync).
func notNeeded(errno fsbackend.Errno) fsbackend.Errno {
	if errno == unix.ENOSYS {
		return fsbackend.OK
	}
	return errno
}

// Syncfs implements fsbackend.Syncfser. Few programs know of it; what they have been told with FSYNC they have done.
func (b *Bridge) Syncfs(ctx *fsbackend.Context, id uint64) fsbackend.Errno {
	n, errno := b.pin(id)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	r, errno := b.begin(ctx, fuseproto.FUSE_SYNCFS, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, fuseproto.FUSE_SYNCFS, &fuseproto.SyncfsIn{})
	return notNeeded(r.call(ctx, 0, false))
}

// Fallocate implements fsbackend.Fallocater.
func (b *Bridge) Fallocate(ctx *fsbackend.Context, in *fuseproto.FallocateIn) fsbackend.Errno {
	h, errno := b.pinHandle(in.NodeId, in.Fh, false)
	if errno != 0 {
		return errno
	}
	defer b.unpinHandle(h)
	switch {
	case in.Length == 0:
		return unix.EINVAL
	case in.Offset > math.MaxInt64 || in.Length > math.MaxInt64-in.Offset:
		return unix.EFBIG
	}
	r, fh, errno := b.use(ctx, fuseproto.FUSE_FALLOCATE, h)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, fuseproto.FUSE_FALLOCATE, in).Fh = fh
	defer b.touch(h.node)
	return r.call(ctx, 0, false)
}

// Lseek implements fsbackend.Lseeker.
func (b *Bridge) Lseek(ctx *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) fsbackend.Errno {
	h, errno := b.pinHandle(in.NodeId, in.Fh, false)
	if errno != 0 {
		return errno
	}
	defer b.unpinHandle(h)
	switch {
	case in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE:
		return unix.EINVAL
	case in.Offset > math.MaxInt64:
		return unix.ENXIO
	}
	r, fh, errno := b.use(ctx, fuseproto.FUSE_LSEEK, h)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, fuseproto.FUSE_LSEEK, in).Fh = fh
	if errno := r.call(ctx, sizeOf[fuseproto.LseekOut](), false); errno != 0 {
		return errno
	}
	decode(r.reply, out)
	if out.Offset > math.MaxInt64 {
		return unix.EIO
	}
	return fsbackend.OK
}

// CopyFileRange implements fsbackend.CopyFileRanger.
func (b *Bridge) CopyFileRange(ctx *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, fsbackend.Errno) {
	from, errno := b.pinHandle(in.NodeId, in.FhIn, false)
	if errno != 0 {
		return 0, errno
	}
	defer b.unpinHandle(from)
	to, errno := b.pinHandle(in.NodeIdOut, in.FhOut, false)
	if errno != 0 {
		return 0, errno
	}
	defer b.unpinHandle(to)
	if in.OffIn > math.MaxInt64 || in.Len > math.MaxInt64-in.OffIn {
		return 0, unix.EOVERFLOW
	}
	if in.OffOut > math.MaxInt64 || in.Len > math.MaxInt64-in.OffOut {
		return 0, unix.EFBIG
	}
	r, fh, errno := b.use(ctx, fuseproto.FUSE_COPY_FILE_RANGE, from)
	if errno != 0 {
		return 0, errno
	}
	defer r.end()
	raw, errno := b.find(ctx, r.c, to.node, 0)
	if errno != 0 {
		return 0, errno
	}
	fhOut, errno := b.findHandle(ctx, r.c, raw, to)
	if errno != 0 {
		return 0, errno
	}
	req := put(r, fuseproto.FUSE_COPY_FILE_RANGE, in)
	req.FhIn, req.NodeIdOut, req.FhOut = fh, raw, fhOut
	req.Len = min(in.Len, copyLimit)
	defer b.touch(to.node)
	if errno := r.call(ctx, sizeOf[fuseproto.WriteOut](), false); errno != 0 {
		return 0, errno
	}
	var out fuseproto.WriteOut
	decode(r.reply, &out)
	if uint64(out.Size) > req.Len {
		return 0, unix.EIO
	}
	return uint64(out.Size), fsbackend.OK
}

// copyLimit is the most that is copied at once: the reply's count has 32 bits, and the time limit is for all of it.
const copyLimit = 64 << 20

package fusebridge

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// attr sends a request that is answered with attributes of n, asked for at version.
func (b *Bridge) attr(ctx *fsbackend.Context, r *request, n *node, version uint64, out *fuseproto.AttrOut) fsbackend.Errno {
	if errno := r.call(ctx, sizeOf[fuseproto.AttrOut](), false); errno != 0 {
		return errno
	}
	decode(r.reply, out)
	if !checkAttr(&out.Attr, n.id) || out.Mode&unix.S_IFMT != n.typ {
		return unix.EIO
	}
	b.keepAttr(n, &out.Attr, version, &out.AttrValid, &out.AttrValidNsec)
	return fsbackend.OK
}

// Getattr implements fsbackend.Backend.
func (b *Bridge) Getattr(ctx *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	byHandle := in.Flags()&fuseproto.FUSE_GETATTR_FH != 0
	if !byHandle && b.cachedAttr(in.NodeId, out) {
		return fsbackend.OK
	}
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	var h *handle
	if byHandle {
		if h, errno = b.pinAny(in.NodeId, in.Fh()); errno != 0 {
			return errno
		}
		defer b.unpinHandle(h)
	}
	r, errno := b.begin(ctx, fuseproto.FUSE_GETATTR, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	req := fuseproto.GetattrIn{}
	if h != nil && !h.dir && !h.stateless {
		if req.Fh_, errno = b.findHandle(ctx, r.c, r.raw, h); errno != 0 {
			return errno
		}
		req.Flags_ = fuseproto.FUSE_GETATTR_FH
	}
	put(r, fuseproto.FUSE_GETATTR, &req)
	return b.attr(ctx, r, n, b.version(n), out)
}

// pinAny is pinHandle for a file or a directory.
func (b *Bridge) pinAny(id, fh uint64) (*handle, fsbackend.Errno) {
	h, errno := b.pinHandle(id, fh, false)
	if errno != 0 {
		h, errno = b.pinHandle(id, fh, true)
	}
	return h, errno
}

// Setattr implements fsbackend.Setattrer.
func (b *Bridge) Setattr(ctx *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	if in.Valid&fuseproto.FATTR_SIZE != 0 {
		switch {
		case n.typ == unix.S_IFDIR:
			return unix.EISDIR
		case n.typ != unix.S_IFREG:
			return unix.EINVAL
		case in.Size > math.MaxInt64:
			return unix.EFBIG
		}
	}
	var h *handle
	if in.Valid&fuseproto.FATTR_FH != 0 {
		if h, errno = b.pinAny(in.NodeId, in.Fh); errno != 0 {
			return errno
		}
		defer b.unpinHandle(h)
	}
	r, errno := b.begin(ctx, fuseproto.FUSE_SETATTR, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	var fh uint64
	if h != nil && !h.stateless {
		if fh, errno = b.findHandle(ctx, r.c, r.raw, h); errno != 0 {
			return errno
		}
	}
	req := put(r, fuseproto.FUSE_SETATTR, in)
	req.Fh = fh
	if h == nil || h.stateless || h.dir {
		req.Valid &^= fuseproto.FATTR_FH
		req.Fh = 0
	}
	if r.c.flags&fuseproto.FUSE_HANDLE_KILLPRIV_V2 == 0 {
		req.Valid &^= fuseproto.FATTR_KILL_SUIDGID
	}
	b.touch(n)
	errno = b.attr(ctx, r, n, math.MaxUint64, out)
	b.touch(n)
	return errno
}

// Statfs implements fsbackend.StatFSer.
func (b *Bridge) Statfs(ctx *fsbackend.Context, id uint64, out *fuseproto.StatfsOut) fsbackend.Errno {
	n, errno := b.pin(id)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	r, errno := b.begin(ctx, fuseproto.FUSE_STATFS, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, fuseproto.FUSE_STATFS, &fuseproto.InHeader{})
	if errno := r.call(ctx, sizeOf[fuseproto.StatfsOut](), false); errno != 0 {
		return errno
	}
	decode(r.reply, out)
	return fsbackend.OK
}

// Access implements fsbackend.Accesser.
func (b *Bridge) Access(ctx *fsbackend.Context, in *fuseproto.AccessIn) fsbackend.Errno {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	r, errno := b.begin(ctx, fuseproto.FUSE_ACCESS, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, fuseproto.FUSE_ACCESS, in)
	return r.call(ctx, 0, false)
}

// Statx implements fsbackend.Statxer.
func (b *Bridge) Statx(ctx *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) fsbackend.Errno {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	r, errno := b.begin(ctx, fuseproto.FUSE_STATX, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	req := put(r, fuseproto.FUSE_STATX, in)
	req.GetattrFlags, req.Fh = 0, 0
	if in.GetattrFlags&fuseproto.FUSE_GETATTR_FH != 0 {
		h, errno := b.pinAny(in.NodeId, in.Fh)
		if errno != 0 {
			return errno
		}
		defer b.unpinHandle(h)
		if !h.dir && !h.stateless {
			if req.Fh, errno = b.findHandle(ctx, r.c, r.raw, h); errno != 0 {
				return errno
			}
			req.GetattrFlags = fuseproto.FUSE_GETATTR_FH
		}
	}
	if errno := r.call(ctx, sizeOf[fuseproto.StatxOut](), false); errno != 0 {
		return errno
	}
	decode(r.reply, out)
	if uint32(out.Statx.Mode)&unix.S_IFMT != n.typ || out.Statx.Size > math.MaxInt64 {
		return unix.EIO
	}
	if out.Statx.Ino == 0 {
		out.Statx.Ino = n.id
	}
	now := clock()
	setValid(&out.AttrValid, &out.AttrValidNsec, now, until(now, out.AttrValid, out.AttrValidNsec))
	return fsbackend.OK
}

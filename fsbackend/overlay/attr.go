package overlay

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// finish makes attributes that a layer gave for n the overlay's.
func (fs *FS) finish(n *node, a *fuseproto.Attr) {
	a.Ino = n.ino.Load()
	a.Nlink = fs.nlink(n, a.Nlink)
	a.Flags = 0 // submounts are the overlay's own tree
	fs.ids(&a.Uid, &a.Gid)
}

// nlink is what the kernel's overlayfs shows: of a merged directory, nobody counts the subdirectories.
func (fs *FS) nlink(n *node, links uint32) uint32 {
	if n.dir != nil && (fs.cfg.StaticNlink || n.merged()) {
		return 1
	}
	return links
}

// ids translates owners to what the guest sees.
func (fs *FS) ids(uid, gid *uint32) {
	if !fs.mapped {
		return
	}
	*uid = squash(&fs.cfg, fs.cfg.SquashToUID, fs.cfg.UIDMap, *uid)
	*gid = squash(&fs.cfg, fs.cfg.SquashToGID, fs.cfg.GIDMap, *gid)
}

func squash(cfg *Config, to *uint32, m IDMap, id uint32) uint32 {
	switch {
	case to != nil:
		return *to
	case cfg.SquashToRoot:
		return 0
	}
	return m.guest(id)
}

// realAttr asks the uppermost layer that has n.
func (fs *FS) realAttr(c *fsbackend.Context, n *node, out *fuseproto.AttrOut) errno {
	r := n.top(fs)
	if !r.l.may(c) {
		return fsbackend.ErrMayBlock
	}
	in := fuseproto.GetattrIn{InHeader: header(r.node)}
	return r.l.r.Getattr(c, &in, out)
}

// openFile returns what n's open file fh is in the layers: one that can be used for attributes, which is not so when n has been
// copied up since, or is a merged directory.
func (fs *FS) openFile(c *fsbackend.Context, id, fh uint64) (*handle, *file, errno) {
	h := fs.handles.get(fh)
	if h == nil || h.node.id != id {
		return nil, nil, unix.EBADF
	}
	if h.dir {
		return h, nil, 0
	}
	f, e := fs.current(c, h)
	return h, f, e
}

// Getattr implements fsbackend.Backend.
func (fs *FS) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	if in.Flags()&fuseproto.FUSE_GETATTR_FH == 0 {
		n, e := fs.node(in.NodeId)
		if e != 0 {
			return e
		}
		r := n.top(fs)
		if !r.l.may(c) {
			return fsbackend.ErrMayBlock
		}
		in.NodeId = r.node
		e = r.l.r.Getattr(c, in, out)
		if in.NodeId = n.id; e == 0 {
			fs.finish(n, &out.Attr)
		}
		return e
	}
	h, f, e := fs.openFile(c, in.NodeId, in.Fh_)
	if e != 0 {
		return e
	}
	if f == nil {
		e = fs.realAttr(c, h.node, out)
	} else if !f.l.may(c) {
		return fsbackend.ErrMayBlock
	} else {
		id, fh := in.NodeId, in.Fh_
		in.NodeId, in.Fh_ = f.node, f.fh
		e = f.l.r.Getattr(c, in, out)
		in.NodeId, in.Fh_ = id, fh
	}
	if e == 0 {
		fs.finish(h.node, &out.Attr)
	}
	return e
}

// Statx implements fsbackend.Statxer.
func (fs *FS) Statx(c *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) fsbackend.Errno {
	var n *node
	var f *file
	var e errno
	if in.GetattrFlags&fuseproto.FUSE_GETATTR_FH != 0 {
		var h *handle
		if h, f, e = fs.openFile(c, in.NodeId, in.Fh); e == 0 {
			n = h.node
		}
	} else {
		n, e = fs.node(in.NodeId)
	}
	if e != 0 {
		return e
	}
	id, fh, flags := in.NodeId, in.Fh, in.GetattrFlags
	defer func() { in.NodeId, in.Fh, in.GetattrFlags = id, fh, flags }()
	r := n.top(fs)
	if f != nil {
		r, in.Fh = real{f.l, f.node}, f.fh
	} else {
		in.GetattrFlags &^= fuseproto.FUSE_GETATTR_FH
	}
	switch {
	case r.l.r.Statxer == nil:
		return unix.ENOSYS
	case !r.l.may(c):
		return fsbackend.ErrMayBlock
	}
	in.NodeId = r.node
	if e := r.l.r.Statx(c, in, out); e != 0 {
		return e
	}
	sx := &out.Statx
	sx.Ino = n.ino.Load()
	sx.Nlink = fs.nlink(n, sx.Nlink)
	sx.DevMajor, sx.DevMinor = 0, 0
	fs.ids(&sx.Uid, &sx.Gid)
	return 0
}

// Setattr implements fsbackend.Setattrer.
func (fs *FS) Setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	const changes = fuseproto.FATTR_MODE | fuseproto.FATTR_UID | fuseproto.FATTR_GID | fuseproto.FATTR_SIZE | fuseproto.FATTR_ATIME |
		fuseproto.FATTR_MTIME | fuseproto.FATTR_ATIME_NOW | fuseproto.FATTR_MTIME_NOW | fuseproto.FATTR_CTIME
	saved := in.SetAttrInCommon
	defer func() { in.SetAttrInCommon = saved }()
	var n *node
	var h *handle
	var e errno
	if in.Valid&fuseproto.FATTR_FH != 0 {
		if h = fs.handles.get(in.Fh); h == nil || h.node.id != in.NodeId {
			return unix.EBADF
		}
		n = h.node
	} else if n, e = fs.node(in.NodeId); e != 0 {
		return e
	}
	if in.Valid&changes == 0 {
		if e = fs.realAttr(c, n, out); e == 0 {
			fs.finish(n, &out.Attr)
		}
		return e
	}
	if e := fs.begin(c); e != 0 {
		return e
	}
	defer fs.end(c)
	if in.Valid&fuseproto.FATTR_SIZE != 0 && n.typ != unix.S_IFREG {
		if n.dir != nil {
			return unix.EISDIR
		}
		return unix.EINVAL
	}
	var ok bool
	if in.Valid&fuseproto.FATTR_UID != 0 {
		if in.Uid, ok = fs.cfg.UIDMap.host(in.Uid); !ok {
			return eOverflow
		}
	}
	if in.Valid&fuseproto.FATTR_GID != 0 {
		if in.Gid, ok = fs.cfg.GIDMap.host(in.Gid); !ok {
			return eOverflow
		}
	}
	limit := wholeFile
	if in.Valid&fuseproto.FATTR_SIZE != 0 {
		limit = in.Size
	}
	if e := fs.copyUp(c, n, limit); e != 0 {
		return e
	}
	in.NodeId = n.upper.Load()
	in.Valid &^= fuseproto.FATTR_FH
	if h != nil && !h.dir {
		f, e := fs.current(c, h)
		if e != 0 {
			return e
		}
		if f.l == fs.upper {
			in.Valid |= fuseproto.FATTR_FH
			in.NodeId, in.Fh = f.node, f.fh
		}
	}
	if e := fs.upper.r.Setattr(c, in, out); e != 0 {
		return e
	}
	fs.finish(n, &out.Attr)
	return 0
}

// Statfs implements fsbackend.StatFSer: of the layer that takes what is new.
func (fs *FS) Statfs(c *fsbackend.Context, id uint64, out *fuseproto.StatfsOut) fsbackend.Errno {
	n, e := fs.node(id)
	if e != 0 {
		return e
	}
	r := n.top(fs)
	if fs.upper != nil && r.l != fs.upper {
		r = fs.root.top(fs)
	}
	switch {
	case r.l.r.StatFSer == nil:
		*out = fuseproto.StatfsOut{Bsize: 4096, Frsize: 4096, NameLen: unix.NAME_MAX}
	case !r.l.may(c):
		return fsbackend.ErrMayBlock
	default:
		if e := r.l.r.Statfs(c, r.node, out); e != 0 {
			return e
		}
	}
	if out.NameLen > uint32(len(whPrefix)) {
		out.NameLen -= uint32(len(whPrefix)) // room for a whiteout's name
	}
	return 0
}

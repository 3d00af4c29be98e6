package gofuse

import (
	"golang.org/x/sys/unix"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// inDir makes a call that may add an entry to the directory parent, or find one.
func (b *Backend) inDir(op string, parent uint64, out *fuseproto.EntryOut, call func(n *node) fuse.Status) (errno fsbackend.Errno) {
	n, errno := b.pinDir(parent)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	defer b.contain(op, &errno)
	if errno := errnoOf(call(n)); errno != 0 {
		return errno
	}
	if out != nil {
		b.adopt(out, false)
	}
	return fsbackend.OK
}

// Lookup implements fsbackend.Backend.
func (b *Backend) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return b.inDir("LOOKUP", parent, out, func(n *node) fuse.Status {
		h := header(c, n)
		return b.fs.Lookup(c.Cancel, &h, name.String(), out)
	})
}

// Mknod implements fsbackend.Maker.
func (b *Backend) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	req := *in
	switch req.Mode & unix.S_IFMT {
	case 0:
		req.Mode |= unix.S_IFREG
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK:
	case unix.S_IFDIR:
		return unix.EPERM
	default:
		return unix.EINVAL
	}
	return b.inDir("MKNOD", in.NodeId, out, func(n *node) fuse.Status {
		req.InHeader = header(c, n)
		return b.fs.Mknod(c.Cancel, &req, name.String(), out)
	})
}

// Mkdir implements fsbackend.Maker.
func (b *Backend) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return b.inDir("MKDIR", in.NodeId, out, func(n *node) fuse.Status {
		req := *in
		req.InHeader = header(c, n)
		return b.fs.Mkdir(c.Cancel, &req, name.String(), out)
	})
}

// Symlink implements fsbackend.Maker.
func (b *Backend) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return b.inDir("SYMLINK", parent, out, func(n *node) fuse.Status {
		h := header(c, n)
		return b.fs.Symlink(c.Cancel, &h, target.String(), name.String(), out)
	})
}

// Link implements fsbackend.Linker.
func (b *Backend) Link(c *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	old, errno := b.pin(in.Oldnodeid)
	if errno != 0 {
		return errno
	}
	defer b.unpin(old)
	return b.inDir("LINK", in.NodeId, out, func(n *node) fuse.Status {
		if old.typ == unix.S_IFDIR {
			return fuse.EPERM
		}
		return b.fs.Link(c.Cancel, &fuse.LinkIn{InHeader: header(c, n), Oldnodeid: old.raw}, name.String(), out)
	})
}

// Unlink implements fsbackend.Remover.
func (b *Backend) Unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return b.inDir("UNLINK", parent, nil, func(n *node) fuse.Status {
		h := header(c, n)
		return b.fs.Unlink(c.Cancel, &h, name.String())
	})
}

// Rmdir implements fsbackend.Remover.
func (b *Backend) Rmdir(c *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return b.inDir("RMDIR", parent, nil, func(n *node) fuse.Status {
		h := header(c, n)
		return b.fs.Rmdir(c.Cancel, &h, name.String())
	})
}

// Rename implements fsbackend.Renamer.
func (b *Backend) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) fsbackend.Errno {
	const known = unix.RENAME_NOREPLACE | unix.RENAME_EXCHANGE | unix.RENAME_WHITEOUT
	if in.Flags&^known != 0 ||
		in.Flags&unix.RENAME_EXCHANGE != 0 && in.Flags&(unix.RENAME_NOREPLACE|unix.RENAME_WHITEOUT) != 0 {
		return unix.EINVAL
	}
	to, errno := b.pinDir(in.Newdir)
	if errno != 0 {
		return errno
	}
	defer b.unpin(to)
	return b.inDir("RENAME", in.NodeId, nil, func(n *node) fuse.Status {
		req := &fuse.RenameIn{InHeader: header(c, n), Newdir: to.raw, Flags: in.Flags}
		return b.fs.Rename(c.Cancel, req, oldName.String(), newName.String())
	})
}

// Create implements fsbackend.Creater.
func (b *Backend) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	return b.create("CREATE", c, in, out, func(req *fuse.CreateIn) fuse.Status {
		return b.fs.Create(c.Cancel, req, name.String(), out)
	})
}

// Tmpfile implements fsbackend.Tmpfiler.
func (b *Backend) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) fsbackend.Errno {
	return b.create("TMPFILE", c, in, out, func(req *fuse.CreateIn) fuse.Status {
		return b.fs.Tmpfile(c.Cancel, req, out)
	})
}

func (b *Backend) create(op string, c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut, call func(*fuse.CreateIn) fuse.Status) (errno fsbackend.Errno) {
	parent, errno := b.pinDir(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(parent)
	if errno := b.room(); errno != 0 {
		return errno
	}
	defer b.contain(op, &errno)
	req := *in
	req.InHeader = header(c, parent)
	if errno := errnoOf(call(&req)); errno != 0 {
		return errno
	}
	n := b.adopt(&out.EntryOut, true)
	if n == nil {
		return unix.EIO
	}
	defer b.unpin(n)
	out.Fh = b.opened(n, out.Fh, false)
	out.OpenFlags, out.BackingID = guestOpenFlags(out.OpenFlags), 0
	return fsbackend.OK
}

// Readlink implements fsbackend.Readlinker.
func (b *Backend) Readlink(c *fsbackend.Context, id uint64, dst *fsbackend.Sink) (errno fsbackend.Errno) {
	n, errno := b.pin(id)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	if n.typ != unix.S_IFLNK {
		return unix.EINVAL
	}
	defer b.contain("READLINK", &errno)
	h := header(c, n)
	target, status := b.fs.Readlink(c.Cancel, &h)
	if errno := errnoOf(status); errno != 0 {
		return errno
	}
	dst.Write(target)
	return fsbackend.OK
}

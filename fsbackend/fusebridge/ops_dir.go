package fusebridge

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Readdir implements fsbackend.DirReader.
func (b *Bridge) Readdir(ctx *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	h, errno := b.pinHandle(in.NodeId, in.Fh, true)
	if errno != 0 {
		return errno
	}
	defer b.unpinHandle(h)
	return b.readdir(ctx, h, in, out)
}

// readdir lists names, for READDIRPLUS too: an entry without a node is one that the guest has yet to look up.
func (b *Bridge) readdir(ctx *fsbackend.Context, h *handle, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	r, errno := b.list(ctx, fuseproto.FUSE_READDIR, h, in, out)
	if errno != 0 {
		return errno
	}
	defer r.end()
	var d dirent
	add := func() bool { return out.Add(or(d.head.Ino, h.node.id), d.head.Off, d.head.Type&0xf, d.name) }
	if out.Plus {
		add = func() bool {
			return out.AddPlus(&fuseproto.EntryOut{}, or(d.head.Ino, h.node.id), d.head.Off, d.head.Type&0xf, d.name)
		}
	}
	for reply, ok, bad := r.reply, true, false; ok; {
		if reply, ok, bad = d.next(reply, false); bad && out.Written() == 0 {
			return unix.EIO
		}
		if ok && !add() {
			break
		}
	}
	return fsbackend.OK
}

// list sends READDIR or READDIRPLUS.
func (b *Bridge) list(ctx *fsbackend.Context, op fuseproto.Opcode, h *handle, in *fuseproto.ReadIn, out *fsbackend.DirList) (*request, fsbackend.Errno) {
	r, fh, errno := b.use(ctx, h)
	if errno != 0 {
		return nil, errno
	}
	// What the program fits into so many bytes fits into as many of the guest's.
	size := min(out.Len(), r.c.maxRead)
	defer h.node.unlook(h.node.look(r.c))
	req := put(r, op, in)
	req.Fh, req.Size = fh, uint32(size)
	if errno := r.call(ctx, size, true); errno != 0 {
		r.end()
		return nil, errno
	}
	return r, fsbackend.OK
}

// Readdirplus implements fsbackend.DirPlusReader.
func (b *Bridge) Readdirplus(ctx *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	h, errno := b.pinHandle(in.NodeId, in.Fh, true)
	if errno != 0 {
		return errno
	}
	defer b.unpinHandle(h)
	if b.first&fuseproto.FUSE_DO_READDIRPLUS == 0 {
		return b.readdir(ctx, h, in, out)
	}
	before := b.version(h.node)
	r, errno := b.list(ctx, fuseproto.FUSE_READDIRPLUS, h, in, out)
	if errno != 0 {
		return errno
	}
	defer r.end()
	var d dirent
	full := false
	for reply, ok, bad := r.reply, true, false; ok; {
		if reply, ok, bad = d.next(reply, true); bad {
			errno = unix.EIO
			break
		}
		if ok {
			// What does not go to the guest was looked up all the same.
			full = !b.addPlus(r.c, h.node, &d, before, full, out) || full
		}
	}
	if out.Written() > 0 {
		return fsbackend.OK
	}
	return errno
}

// addPlus takes up an entry of READDIRPLUS and adds it, unless the reply is full. It reports false when it does not fit.
func (b *Bridge) addPlus(c *conn, dir *node, d *dirent, version uint64, full bool, out *fsbackend.DirList) bool {
	e := &d.entry
	switch {
	case isDots(d.name):
		*e = fuseproto.EntryOut{} // they are never looked up (fs/fuse/readdir.c, fuse_direntplus_link)
	case e.NodeId != 0:
		full = full || !out.Fits(len(d.name))
		if full {
			c.forget(e.NodeId, 1)
			return false
		}
		n, errno := b.adopt(c, e, dir, d.name)
		if errno != 0 {
			*e = fuseproto.EntryOut{} // the guest looks it up, and gets the error
			break
		}
		b.keepEntry(n, e, b.version(n), dir, d.name, version)
		if !out.AddPlus(e, or(d.head.Ino, n.id), d.head.Off, d.head.Type&0xf, d.name) {
			b.Forget(n.id, 1)
			return false
		}
		return true
	}
	return !full && out.AddPlus(e, or(d.head.Ino, dir.id), d.head.Off, d.head.Type&0xf, d.name)
}

package fusebridge

import (
	"cmp"

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
	r, errno := b.list(ctx, fuseproto.FUSE_READDIR, h, in, out.Len())
	if errno != 0 {
		return errno
	}
	defer r.end()
	var d dirent
	for reply, ok, bad := r.reply, true, false; ok; {
		if reply, ok, bad = d.next(reply, false); bad && out.Written() == 0 {
			return unix.EIO
		}
		if ok && !out.Add(cmp.Or(d.head.Ino, h.node.id), d.head.Off, d.head.Type&0xf, d.name) {
			break
		}
	}
	return fsbackend.OK
}

// list sends READDIR or READDIRPLUS for size bytes.
func (b *Bridge) list(ctx *fsbackend.Context, op fuseproto.Opcode, h *handle, in *fuseproto.ReadIn, size int) (*request, fsbackend.Errno) {
	r, fh, errno := b.use(ctx, op, h)
	if errno != 0 {
		return nil, errno
	}
	// What the program fits into so many bytes fits into as many of the guest's.
	size = min(size, r.c.maxRead)
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
	if !ctx.MayBlock {
		return fsbackend.ErrMayBlock // before what is left over of the last listing is used up
	}
	h, errno := b.pinHandle(in.NodeId, in.Fh, true)
	if errno != 0 {
		return errno
	}
	defer b.unpinHandle(h)
	w := b.newBurst(ctx, h.node, out)
	defer b.bursts.Put(w)
	if b.first&fuseproto.FUSE_DO_READDIRPLUS == 0 || b.current.Load().bare.Load() {
		errno = b.readdirLookups(ctx, h, in, w)
	} else {
		errno = b.readdirplus(ctx, h, in, w)
	}
	if out.Written() > 0 {
		return fsbackend.OK
	}
	return errno
}

// readdirplus has the program list with READDIRPLUS.
func (b *Bridge) readdirplus(ctx *fsbackend.Context, h *handle, in *fuseproto.ReadIn, w *burst) fsbackend.Errno {
	r, errno := b.list(ctx, fuseproto.FUSE_READDIRPLUS, h, in, w.out.Len())
	if errno != 0 {
		return errno
	}
	defer r.end()
	w.plus = r.c
	defer w.flush()
	var d dirent
	names, looked := 0, 0
	for reply, ok, bad := r.reply, true, false; ok; {
		if reply, ok, bad = d.next(reply, true); bad {
			return unix.EIO
		}
		if ok && !isDots(d.name) {
			names++
			if d.entry.NodeId != 0 {
				looked++
			}
		}
		if ok {
			w.add(&d) // what does not go to the guest was looked up all the same
		}
	}
	if names > 0 && looked == 0 {
		r.c.bare.Store(true)
	}
	return fsbackend.OK
}

// readdirLookups has the program, which has no READDIRPLUS or makes no use of it, list with READDIR, of which more names go into a
// message. What is left over stays for the next call.
func (b *Bridge) readdirLookups(ctx *fsbackend.Context, h *handle, in *fuseproto.ReadIn, w *burst) fsbackend.Errno {
	reply := b.takeRest(h, in.Offset, w.version)
	if reply == nil {
		r, errno := b.list(ctx, fuseproto.FUSE_READDIR, h, in, min(w.out.Len(), maxList))
		if errno != 0 {
			return errno
		}
		defer r.end()
		reply = r.reply
	}
	defer w.flush()
	var d dirent
	for offset := in.Offset; ; offset = d.head.Off {
		rest, ok, bad := d.next(reply, false)
		switch {
		case bad:
			return unix.EIO
		case !ok:
			return fsbackend.OK
		}
		if !w.add(&d) {
			b.keepRest(h, reply, offset, w.version)
			return fsbackend.OK
		}
		reply = rest
	}
}

package overlay

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Getlk implements fsbackend.Locker. Locks are on the layer's file: those on a file that is copied up stay behind.
func (fs *FS) Getlk(c *fsbackend.Context, in *fuseproto.LkIn, out *fuseproto.LkOut) fsbackend.Errno {
	return fs.locked(c, in, func(l fsbackend.Locker) errno { return l.Getlk(c, in, out) })
}

// Setlk implements fsbackend.Locker.
func (fs *FS) Setlk(c *fsbackend.Context, in *fuseproto.LkIn) fsbackend.Errno {
	return fs.locked(c, in, func(l fsbackend.Locker) errno { return l.Setlk(c, in) })
}

func (fs *FS) locked(c *fsbackend.Context, in *fuseproto.LkIn, call func(fsbackend.Locker) errno) errno {
	f, e := fs.use(c, in.NodeId, in.Fh)
	if e != 0 {
		return e
	}
	if f.l.r.Locker == nil {
		return unix.ENOSYS
	}
	id, fh := in.NodeId, in.Fh
	in.NodeId, in.Fh = f.node, f.fh
	e = call(f.l.r.Locker)
	in.NodeId, in.Fh = id, fh
	return e
}

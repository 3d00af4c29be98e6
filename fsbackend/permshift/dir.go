package permshift

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

var listings = sync.Pool{New: func() any { return new(fsbackend.Listing) }}

// ListsAll implements fsbackend.Complete: names are the backend's.
func (f *FS) ListsAll(node, fh uint64) bool {
	c, ok := f.Inner.Backend.(fsbackend.Complete)
	return ok && c.ListsAll(node, fh)
}

// Readdir implements fsbackend.DirReader. What a regular file stands for is in its value: the guest is to look.
func (f *FS) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	if !f.format.keepsTypes() {
		return f.Forward.Readdir(c, in, out)
	}
	return f.relist(in, out, func(l *fsbackend.Listing) fsbackend.Errno { return f.Forward.Readdir(c, in, &l.DirList) },
		func(_ *fuseproto.EntryOut, d fuseproto.Dirent, name []byte) bool {
			if d.Type == unix.DT_REG {
				d.Type = unix.DT_UNKNOWN
			}
			return out.Add(d.Ino, d.Off, d.Type, name)
		})
}

// Readdirplus implements fsbackend.DirPlusReader. The guest is to look up an entry whose value cannot be had, and finds out why.
func (f *FS) Readdirplus(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	if f.format == Off {
		return f.Forward.Readdirplus(c, in, out)
	}
	if !c.MayBlock && f.reluctant.Load() {
		return fsbackend.ErrMayBlock
	}
	return f.relist(in, out, func(l *fsbackend.Listing) fsbackend.Errno { return f.Forward.Readdirplus(c, in, &l.DirList) },
		func(e *fuseproto.EntryOut, d fuseproto.Dirent, name []byte) bool {
			node := e.NodeId
			if node == 0 {
				return out.AddPlus(e, d.Ino, d.Off, d.Type, name)
			}
			if f.shift(c, node, &e.Attr) != fsbackend.OK {
				f.Inner.Forget(node, 1)
				e.NodeId, e.Generation, node = 0, 0, 0
			}
			ok := out.AddPlus(e, d.Ino, d.Off, e.Mode&unix.S_IFMT>>12, name)
			if !ok && node != 0 {
				f.Inner.Forget(node, 1)
			}
			return ok
		})
}

// relist has list, which makes the request in of the backend, fill a listing of its own, and add copy its entries, as many as fit in
// out: the backend may hold locks while it lists that a call for a value wants, too.
func (f *FS) relist(in *fuseproto.ReadIn, out *fsbackend.DirList, list func(*fsbackend.Listing) fsbackend.Errno,
	add func(*fuseproto.EntryOut, fuseproto.Dirent, []byte) bool,
) fsbackend.Errno {
	l := listings.Get().(*fsbackend.Listing)
	defer listings.Put(l)
	size := in.Size
	in.Size = l.Begin(out.Plus, out.Len())
	errno := list(l)
	in.Size = size
	full := false // by memory that is gone: what fits in one fits in the other
	if !l.Each(func(e *fuseproto.EntryOut, d fuseproto.Dirent, name []byte) bool {
		if !full {
			full = !add(e, d, name)
		} else if e != nil && e.NodeId != 0 {
			f.Inner.Forget(e.NodeId, 1)
		}
		return true
	}) {
		return unix.EIO
	}
	return errno
}

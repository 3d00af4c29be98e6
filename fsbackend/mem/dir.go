package mem

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// ListsAll implements fsbackend.Complete.
func (f *FS) ListsAll(uint64, uint64) bool { return true }

// Opendir implements fsbackend.DirReader.
func (f *FS) Opendir(_ *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, errno := f.directory(in.NodeId)
	if errno != 0 {
		return errno
	}
	out.Fh, errno = f.open(n, in.Flags)
	return errno
}

// Releasedir implements fsbackend.DirReader.
func (f *FS) Releasedir(_ *fsbackend.Context, in *fuseproto.ReleaseIn) {
	f.release(in)
}

// Readdir implements fsbackend.DirReader.
func (f *FS) Readdir(_ *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return f.list(in, out)
}

// Readdirplus implements fsbackend.DirPlusReader.
func (f *FS) Readdirplus(_ *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return f.list(in, out)
}

// listed is an entry on its way to the guest.
type listed struct {
	name  string
	node  *node
	attr  fuseproto.EntryOut // only its Ino and Mode count for "." and ".."
	after uint64
}

// list copies entries by the batch, so that mu is not held while the guest's memory is written.
func (f *FS) list(in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	var batch [16]listed
	for off := in.Offset; ; {
		entries, errno := f.batch(batch[:0], in, off, out.Plus)
		if errno != 0 || len(entries) == 0 {
			return errno
		}
		for i := range entries {
			e := &entries[i]
			var name [unix.NAME_MAX]byte
			typ := e.attr.Mode & unix.S_IFMT >> 12
			added := false
			if out.Plus {
				added = out.AddPlus(&e.attr, e.attr.Ino, e.after, typ, name[:copy(name[:], e.name)])
			} else {
				added = out.Add(e.attr.Ino, e.after, typ, name[:copy(name[:], e.name)])
			}
			if !added {
				f.unlist(entries[i:])
				return fsbackend.OK
			}
			off = e.after
		}
	}
}

// batch appends entries after off to entries, up to its capacity. With plus, each counts a lookup.
func (f *FS) batch(entries []listed, in *fuseproto.ReadIn, off uint64, plus bool) ([]listed, fsbackend.Errno) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	h, errno := f.handle(in.NodeId, in.Fh)
	if errno != 0 {
		return nil, errno
	}
	d := h.node.dir
	if d == nil {
		return nil, unix.ENOTDIR
	}
	if h.node.nlink == 0 {
		return nil, fsbackend.OK
	}
	for cookie, n := range []*node{nil, h.node, d.parent} {
		if n == nil || uint64(cookie) <= off {
			continue
		}
		e := listed{name: ".", after: uint64(cookie)}
		if cookie == cookieDotDot {
			e.name = ".."
		}
		e.attr.Ino, e.attr.Mode = n.id, n.mode
		entries = append(entries, e)
	}
	for _, e := range d.after(off) {
		if len(entries) == cap(entries) {
			break
		}
		if e.node == nil {
			continue
		}
		l := listed{name: e.name, after: e.cookie}
		if plus {
			l.node = e.node
			f.entry(e.node, &l.attr)
		} else {
			l.attr.Ino, l.attr.Mode = e.node.id, e.node.mode
		}
		entries = append(entries, l)
	}
	return entries, fsbackend.OK
}

// unlist takes back the lookups of entries that did not fit.
func (f *FS) unlist(entries []listed) {
	for i := range entries {
		if n := entries[i].node; n != nil && f.forget(n, 1) {
			f.reap(n)
		}
	}
}

package pluginlayer

import (
	"errors"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/plugin"
)

// Opendir implements fsbackend.DirReader.
func (t *tree) Opendir(_ *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	n, errno := t.directory(in.NodeId)
	if errno != 0 {
		return errno
	}
	out.Fh, errno = t.insert(&handle{node: n})
	return errno
}

// Releasedir implements fsbackend.DirReader.
func (t *tree) Releasedir(c *fsbackend.Context, in *fuseproto.ReleaseIn) { t.Release(c, in) }

// Readdir implements fsbackend.DirReader.
func (t *tree) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return t.readdir(c, in, out)
}

// Readdirplus implements fsbackend.DirPlusReader.
func (t *tree) Readdirplus(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return t.readdir(c, in, out)
}

// dots are the entries "." and "..", which come first.
const dots = 2

func (t *tree) readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	h, errno := t.pin(in.NodeId, in.Fh)
	if errno != 0 {
		return errno
	}
	defer t.unpin(h)
	if h.file != nil {
		return unix.ENOTDIR
	}
	entries, errno := t.list(c, h, in.Offset == 0)
	if errno != 0 {
		return errno
	}
	for off := in.Offset; off < uint64(len(entries))+dots; off++ {
		if !t.addEntry(h.node, entries, off, out) {
			break
		}
	}
	return fsbackend.OK
}

// list returns the listing, made anew for a reader that starts. Offsets count its entries, and stay valid.
func (t *tree) list(c *fsbackend.Context, h *handle, anew bool) ([]plugin.DirEntry, fsbackend.Errno) {
	// Who holds it may sleep.
	if !h.listing.TryLock() {
		if !c.MayBlock {
			return nil, fsbackend.ErrMayBlock
		}
		h.listing.Lock()
	}
	defer h.listing.Unlock()
	switch {
	case h.read && !anew:
		return h.entries, fsbackend.OK
	case !c.MayBlock:
		return nil, fsbackend.ErrMayBlock
	}
	h.entries, h.read = nil, false
	t.charge(h, -h.listed)
	entries, errno := t.fetch(c, h)
	if errno != 0 {
		t.charge(h, -h.listed)
		return nil, stale(errno)
	}
	h.entries, h.read = entries, true
	return entries, fsbackend.OK
}

// charge counts n more names that h lists; it reports false, and counts none, if there are too many.
func (t *tree) charge(h *handle, n int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n > 0 && t.listed+n > t.conn.cfg.MaxListed {
		return false
	}
	t.listed += n
	h.listed += n
	return true
}

// fetch asks the plug-in for all names of h's directory, which may take as long as one request.
func (t *tree) fetch(c *fsbackend.Context, h *handle) ([]plugin.DirEntry, fsbackend.Errno) {
	until := time.Now().Add(t.conn.cfg.Timeout)
	ask := func(q plugin.Request) answer {
		return t.call(q, wait{c.Cancel, max(time.Until(until), 1)})
	}
	open := ask(plugin.Request{Op: plugin.OpOpendir, Path: h.node.path})
	if open.Errno != 0 {
		return nil, open.Errno
	}
	defer ask(plugin.Request{Op: plugin.OpClosedir, Dir: open.Dir})
	var all []plugin.DirEntry
	for cookie := uint64(0); ; {
		a := ask(plugin.Request{Op: plugin.OpReaddir, Dir: open.Dir, Cookie: cookie, Size: plugin.MaxBytes, Flags: plugin.ReaddirPlus})
		if a.Errno != 0 {
			return nil, a.Errno
		}
		if len(a.Entries) == 0 && !a.EOF {
			return nil, t.broken(h.node.path, errors.New("a listing that goes on without a name"))
		}
		if !t.charge(h, len(a.Entries)) {
			return nil, unix.ENOMEM
		}
		for _, e := range a.Entries {
			cookie = e.Cookie
			if e.Name != "." && e.Name != ".." {
				all = append(all, e)
			}
		}
		if a.EOF {
			return all, fsbackend.OK
		}
	}
}

// addEntry adds entry number off to out, if it fits.
func (t *tree) addEntry(n *node, entries []plugin.DirEntry, off uint64, out *fsbackend.DirList) bool {
	e := plugin.DirEntry{Name: ".", Type: unix.DT_DIR}
	p := n.path
	switch off {
	case 0:
	case 1:
		e.Name, p = "..", path.Dir(n.path)
	default:
		e = entries[off-dots]
		p, _ = join(n.path, []byte(e.Name))
	}
	if !out.Fits(len(e.Name)) {
		return false
	}
	ino, typ := e.Ino, uint32(e.Type)<<12&unix.S_IFMT
	if e.Attr != nil {
		ino, typ = e.Attr.Ino, e.Attr.Mode&unix.S_IFMT
	}
	ino = t.inode(p, ino)
	if !out.Plus {
		return out.Add(ino, off+1, typ>>12, []byte(e.Name))
	}
	var entry fuseproto.EntryOut
	if e.Attr == nil || len(p) > plugin.MaxPath || t.entry(p, e.Attr, &entry) != fsbackend.OK {
		// The guest looks it up, if it wants to know.
		entry = fuseproto.EntryOut{}
		entry.Ino, entry.Mode = ino, typ
	}
	return out.AddPlus(&entry, ino, off+1, typ>>12, []byte(e.Name))
}

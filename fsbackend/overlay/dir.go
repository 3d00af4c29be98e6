package overlay

import (
	"bytes"
	"encoding/binary"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// dirent is an entry of a layer's listing; its name is only valid until the next.
type dirent struct {
	ino, off uint64
	typ      uint32 // DT_*
	name     []byte
	entry    fuseproto.EntryOut // of READDIRPLUS
}

// Sizes in a reply (include/uapi/linux/fuse.h, struct fuse_dirent and fuse_entry_out).
const (
	direntHead = 24
	entryHead  = 128
)

// nextDirent takes the first entry off a reply of READDIR, or READDIRPLUS with plus.
func nextDirent(reply []byte, plus bool, d *dirent) (rest []byte, ok bool) {
	at := 0
	if plus {
		if len(reply) < entryHead {
			return nil, false
		}
		copy(entryBytes(&d.entry)[:], reply)
		at = entryHead
	}
	if len(reply) < at+direntHead {
		return nil, false
	}
	d.ino = binary.NativeEndian.Uint64(reply[at:])
	d.off = binary.NativeEndian.Uint64(reply[at+8:])
	size := int(binary.NativeEndian.Uint32(reply[at+16:]))
	d.typ = binary.NativeEndian.Uint32(reply[at+20:])
	at += direntHead
	if size == 0 || size > unix.NAME_MAX || len(reply) < at+size {
		return nil, false
	}
	d.name = reply[at : at+size]
	return reply[min((at+size+7)&^7, len(reply)):], true
}

// each calls do for every entry of a layer's directory, whiteouts among them, but "." and "..", until do returns false. ENOSYS says
// that the layer lists nothing.
func (fs *FS) each(c *fsbackend.Context, dir real, do func(*dirent) bool) errno {
	return fs.readNames(c, nil, dir, nil, nil, do)
}

// eachOf is each for a directory that is open.
func (fs *FS) eachOf(c *fsbackend.Context, f *file, do func(*dirent) bool) errno {
	s := getScratch()
	defer s.put()
	var d dirent
	for off := uint64(0); ; {
		s.list = fsbackend.DirList{}
		s.iov[0] = sys.MakeIovec(s.buf[:])
		s.list.Reset(s.iov[:], 0, uint64(len(s.buf)))
		in := fuseproto.ReadIn{InHeader: header(f.node), Fh: f.fh, Offset: off, Size: uint32(len(s.buf))}
		if e := f.l.r.Readdir(c, &in, &s.list); e != 0 && s.list.Written() == 0 {
			return e
		}
		reply := s.buf[:s.list.Written()]
		if len(reply) == 0 {
			return 0
		}
		for len(reply) > 0 {
			var ok bool
			if reply, ok = nextDirent(reply, false, &d); !ok {
				return unix.EIO
			}
			off = d.off
			if string(d.name) != "." && string(d.name) != ".." && !do(&d) {
				return 0
			}
		}
	}
}

// openRealDir opens a layer's directory.
func (fs *FS) openRealDir(c *fsbackend.Context, r real) (*file, errno) {
	switch {
	case r.l.r.DirReader == nil:
		return nil, unix.ENOSYS
	case !r.l.may(c):
		return nil, fsbackend.ErrMayBlock
	}
	in := fuseproto.OpenIn{InHeader: header(r.node), Flags: unix.O_RDONLY | unix.O_DIRECTORY}
	var out fuseproto.OpenOut
	if e := r.l.r.Opendir(c, &in, &out); e != 0 {
		return nil, e
	}
	return &file{r, out.Fh}, 0
}

// openPart opens a part of a directory for h, which has one of them open at a time. h.mu is held.
func (fs *FS) openPart(c *fsbackend.Context, h *handle, dir real) (*file, errno) {
	if h.reading != nil && h.reading.real == dir {
		return h.reading, 0
	}
	f, e := fs.openRealDir(c, dir)
	if e == 0 {
		h.reading.close(c, h, 0)
		h.reading = f
	}
	return f, e
}

// plain says whether a directory is listed as the one layer that has it lists it: nothing is merged, and no file in it has another
// inode number than there.
func (fs *FS) plain(c *fsbackend.Context, n *node) (bool, errno) {
	if n.merged() {
		return false, 0
	}
	i := 0
	if n.upper.Load() == 0 {
		i = 1
	}
	impure, e := fs.impure(c, n, i)
	return !impure, e
}

// Opendir implements fsbackend.DirReader.
func (fs *FS) Opendir(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	epoch := fs.epoch.Load()
	n, e := fs.directory(in.NodeId)
	if e != 0 {
		return e
	}
	h := &handle{node: n, dir: true}
	plain, e := fs.plain(c, n)
	if e != 0 {
		return e
	}
	if plain {
		f, e := fs.openRealDir(c, n.top(fs))
		if e != 0 {
			return e
		}
		h.cur.Store(f)
	}
	if out.Fh, e = fs.handles.add(fs, epoch, h); e != 0 {
		h.cur.Load().close(c, h, 0)
	}
	return e
}

// Releasedir implements fsbackend.DirReader.
func (fs *FS) Releasedir(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	if h := fs.handles.get(in.Fh); h == nil || !h.dir {
		return
	}
	if h := fs.handles.take(in.Fh, in.NodeId); h != nil {
		fs.closeHandle(c, h, 0)
	}
}

// Fsyncdir implements fsbackend.Fsyncer.
func (fs *FS) Fsyncdir(c *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	h := fs.handles.get(in.Fh)
	if h == nil || h.node.id != in.NodeId || !h.dir {
		return unix.EBADF
	}
	up := h.node.upper.Load()
	if up == 0 || fs.cfg.Volatile {
		return 0
	}
	if fs.upper.r.Fsyncer == nil {
		return unix.ENOSYS
	}
	f := h.cur.Load()
	if f == nil || f.l != fs.upper {
		d, e := fs.openRealDir(c, real{fs.upper, up})
		if e != 0 {
			return e
		}
		defer d.close(c, h, 0)
		f = d
	}
	id, fh := in.NodeId, in.Fh
	in.NodeId, in.Fh = f.node, f.fh
	e := f.l.r.Fsyncdir(c, in)
	in.NodeId, in.Fh = id, fh
	return e
}

// Readdir implements fsbackend.DirReader.
func (fs *FS) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return fs.readdir(c, in, out)
}

// Readdirplus implements fsbackend.DirPlusReader.
func (fs *FS) Readdirplus(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return fs.readdir(c, in, out)
}

func (fs *FS) readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) errno {
	epoch := fs.epoch.Load()
	h := fs.handles.get(in.Fh)
	if h == nil || h.node.id != in.NodeId {
		return unix.EBADF
	}
	if !h.dir {
		return unix.ENOTDIR
	}
	n := h.node
	if e := n.rlock(c); e != 0 {
		return e
	}
	defer n.runlock()
	if c.MayBlock {
		h.mu.Lock()
	} else if !h.mu.TryLock() {
		return fsbackend.ErrMayBlock
	}
	defer h.mu.Unlock()
	if h.gone {
		return unix.EBADF
	}
	if n.gone.Load() {
		return 0
	}
	if in.Offset == 0 {
		if e := fs.rewind(c, h); e != 0 {
			return e
		}
	}
	if f := h.cur.Load(); f != nil {
		return fs.listPlain(c, epoch, h, f, in, out)
	}
	if h.list == nil {
		if e := fs.rewind(c, h); e != 0 {
			return e
		}
	}
	return fs.listMerged(c, epoch, h, in.Offset, out)
}

// rewind has a listing that starts anew see the directory as it is now. h.mu and the directory's lock are held.
func (fs *FS) rewind(c *fsbackend.Context, h *handle) errno {
	n := h.node
	plain, e := fs.plain(c, n)
	if e != 0 {
		return e
	}
	f := h.cur.Load()
	if plain && (f != nil && f.real == n.top(fs)) {
		return 0
	}
	if plain && h.list == nil {
		fresh, e := fs.openRealDir(c, n.top(fs))
		if e != 0 {
			return e
		}
		if f != nil {
			h.old = append(h.old, f)
		}
		h.cur.Store(fresh)
		return 0
	}
	if h.list != nil && h.list.version == n.dir.version.Load() {
		return 0
	}
	list, e := fs.merge(c, n, h)
	if e != 0 {
		return e
	}
	if !fs.setListing(h, list) {
		return unix.ENOMEM
	}
	if f != nil {
		h.old = append(h.old, f)
		h.cur.Store(nil)
	}
	return 0
}

// listPlain lists what one layer has: as many entries as fit in the reply are asked for, so that it is asked no more often than
// it would be by the guest.
func (fs *FS) listPlain(c *fsbackend.Context, epoch uint64, h *handle, f *file, in *fuseproto.ReadIn, out *fsbackend.DirList) errno {
	if !f.l.may(c) {
		return fsbackend.ErrMayBlock
	}
	plus := out.Plus && f.l.r.DirPlusReader != nil
	s := getScratch()
	defer s.put()
	off := in.Offset
	for {
		s.list = fsbackend.DirList{Plus: plus}
		room := min(out.Len(), len(s.buf))
		if room == 0 {
			return 0
		}
		s.iov[0] = sys.MakeIovec(s.buf[:room])
		s.list.Reset(s.iov[:], 0, uint64(room))
		req := fuseproto.ReadIn{InHeader: in.InHeader, Fh: f.fh, Offset: off, Size: uint32(room)}
		req.NodeId = f.node
		var e errno
		if plus {
			e = f.l.r.Readdirplus(c, &req, &s.list)
		} else {
			e = f.l.r.Readdir(c, &req, &s.list)
		}
		reply := s.buf[:s.list.Written()]
		if len(reply) == 0 {
			return e
		}
		before, full := out.Written(), false
		var d dirent
		for len(reply) > 0 {
			var ok bool
			if reply, ok = nextDirent(reply, plus, &d); !ok {
				return unix.EIO
			}
			if full {
				fs.unlook(f.l, &d, plus)
				continue
			}
			added, e := fs.addPlain(c, epoch, h.node, f.l, &d, plus, out)
			if e != 0 {
				return e
			}
			if full = !added; !full {
				off = d.off
			}
		}
		if full || out.Written() > before {
			return 0
		}
	}
}

// unlook gives back the lookup of an entry that is not passed on.
func (fs *FS) unlook(l *layer, d *dirent, plus bool) {
	if plus && d.entry.NodeId != 0 {
		l.r.Forget(d.entry.NodeId, 1)
	}
}

// addPlain adds an entry of the one layer that has the directory n. It reports false if it does not fit.
func (fs *FS) addPlain(c *fsbackend.Context, epoch uint64, n *node, l *layer, d *dirent, plus bool, out *fsbackend.DirList) (bool, errno) {
	if string(d.name) == "." || string(d.name) == ".." {
		return fs.addDot(n, d.off, d.name, out), 0
	}
	if bytes.HasPrefix(d.name, []byte(whPrefix)) {
		fs.unlook(l, d, plus)
		return true, 0
	}
	if !out.Fits(len(d.name)) {
		fs.unlook(l, d, plus)
		return false, 0
	}
	if plus && d.entry.NodeId != 0 {
		if isWhiteout(&d.entry.Attr) {
			fs.unlook(l, d, plus)
			return true, 0
		}
		f := found{attr: d.entry.Attr, ino: l.ino(d.entry.Ino)}
		if l == fs.upper {
			f.upper = d.entry.NodeId
		} else {
			f.lowers = append(f.room[:0], real{l, d.entry.NodeId})
		}
		var entry fuseproto.EntryOut
		child, e := fs.enter(epoch, n, d.name, &f, &entry)
		if e == unix.ENFILE {
			return fs.addUnknown(l.ino(d.ino), d, out), 0
		}
		if e != 0 {
			return false, 0
		}
		if !out.AddPlus(&entry, entry.Ino, d.off, child.typ>>12, d.name) {
			fs.Forget(child.id, 1)
			return false, 0
		}
		return true, 0
	}
	if d.typ == unix.DT_CHR || d.typ == unix.DT_UNKNOWN {
		var entry fuseproto.EntryOut
		e := l.lookup(c, n.top(fs).node, fsbackend.MakeName(string(d.name)), &entry)
		if e == 0 {
			l.r.Forget(entry.NodeId, 1)
			d.typ = entry.Mode & unix.S_IFMT >> 12
		}
		if e == unix.ENOENT || e == 0 && isWhiteout(&entry.Attr) {
			return true, 0
		}
	}
	if out.Plus {
		return fs.addUnknown(l.ino(d.ino), d, out), 0
	}
	return out.Add(l.ino(d.ino), d.off, d.typ, d.name), 0
}

// addUnknown adds an entry to a READDIRPLUS without a lookup.
func (fs *FS) addUnknown(ino uint64, d *dirent, out *fsbackend.DirList) bool {
	var entry fuseproto.EntryOut
	entry.Attr.Ino, entry.Attr.Mode = ino, d.typ<<12
	return out.AddPlus(&entry, ino, d.off, d.typ, d.name)
}

// addDot adds "." or "..".
func (fs *FS) addDot(n *node, off uint64, name []byte, out *fsbackend.DirList) bool {
	ino := n.ino.Load()
	if len(name) == 2 {
		fs.mu.RLock()
		if n.parent != nil {
			ino = n.parent.ino.Load()
		}
		fs.mu.RUnlock()
	}
	if !out.Plus {
		return out.Add(ino, off, unix.DT_DIR, name)
	}
	return out.Fits(len(name)) && fs.addUnknown(ino, &dirent{off: off, typ: unix.DT_DIR, name: name}, out)
}

// listing is a merged directory as it was when its reading began.
type listing struct {
	entries []listed // by cookie
	version uint64
	last    uint64 // cookie given out
}

// listed is an entry of it. Cookies are offsets: a name keeps its own for as long as the directory is open.
type listed struct {
	name   string
	cookie uint64
	ino    uint64
	// part is the uppermost part of the directory that has the name, and before the offset in it of what is listed before.
	before uint64
	part   uint16
	typ    uint8
}

// Cookies of the entries that every directory has.
const (
	cookieDot    = 1
	cookieDotDot = 2
)

// maxListed bounds the entries that listings of open directories hold; ENOMEM answers beyond.
const maxListed = 1 << 22

// setListing gives h another listing; false says that there are too many entries already. h.mu is held.
func (fs *FS) setListing(h *handle, list *listing) bool {
	was, is := 0, 0
	if h.list != nil {
		was = len(h.list.entries)
	}
	if list != nil {
		is = len(list.entries)
	}
	if fs.listed.Add(int64(is-was)) > maxListed && is > was {
		fs.listed.Add(int64(was - is))
		return false
	}
	h.list = list
	return true
}

// merge lists all parts of n: what is in one hides what is in those below. h has the listing, or is nil.
func (fs *FS) merge(c *fsbackend.Context, n *node, h *handle) (*listing, errno) {
	list := &listing{version: n.dir.version.Load(), last: cookieDotDot}
	var cookies map[string]uint64
	if h != nil && h.list != nil {
		list.last = h.list.last
		cookies = make(map[string]uint64, len(h.list.entries))
		for i := range h.list.entries {
			cookies[h.list.entries[i].name] = h.list.entries[i].cookie
		}
	}
	names := make(map[string]struct{}) // that are not to be taken from further parts
	var doubtful []int                 // entries whose number may be another layer's
	for i := 0; i <= len(n.lowers); i++ {
		dir, ok := n.part(fs, i)
		if !ok {
			continue
		}
		impure, e := fs.impure(c, n, i)
		if e != 0 {
			return nil, e
		}
		var hidden []string
		var failed errno
		before := uint64(0)
		e = fs.eachIn(c, n, i, h, func(d *dirent) bool {
			start := before
			before = d.off
			if target, ok := bytes.CutPrefix(d.name, []byte(whPrefix)); ok {
				hidden = append(hidden, string(target))
				return true
			}
			if _, ok := names[string(d.name)]; ok {
				return true
			}
			if len(list.entries) >= maxListed {
				failed = unix.ENOMEM
				return false
			}
			name := string(d.name)
			typ := d.typ
			if typ == unix.DT_CHR || typ == unix.DT_UNKNOWN {
				var entry fuseproto.EntryOut
				switch e := dir.l.lookup(c, dir.node, fsbackend.MakeName(name), &entry); e {
				case 0:
					dir.l.r.Forget(entry.NodeId, 1)
					typ = entry.Mode & unix.S_IFMT >> 12
				case unix.ENOENT:
					return true
				default:
					failed = e
					return false
				}
				if isWhiteout(&entry.Attr) {
					names[name] = struct{}{}
					return true
				}
			}
			if impure || typ == unix.DT_DIR && dir.l == fs.upper {
				doubtful = append(doubtful, len(list.entries))
			}
			if i < len(n.lowers) {
				names[name] = struct{}{}
			}
			cookie := cookies[name]
			if cookie == 0 {
				list.last++
				cookie = list.last
			}
			list.entries = append(list.entries, listed{
				name: name, cookie: cookie, ino: dir.l.ino(d.ino), before: start, part: uint16(i), typ: uint8(typ),
			})
			return true
		})
		if e == 0 {
			e = failed
		}
		if e != 0 && e != unix.ENOSYS {
			return nil, e
		}
		for _, name := range hidden {
			names[name] = struct{}{}
		}
	}
	gone := false
	for _, at := range doubtful {
		l := &list.entries[at]
		switch e := fs.trueIno(c, n, l); e {
		case 0:
		case unix.ENOENT:
			l.name, gone = "", true // a whiteout that looks like a file
		default:
			return nil, e
		}
	}
	if gone {
		list.entries = slices.DeleteFunc(list.entries, func(l listed) bool { return l.name == "" })
	}
	if cookies != nil {
		sort.Slice(list.entries, func(i, j int) bool { return list.entries[i].cookie < list.entries[j].cookie })
	}
	return list, 0
}

// trueIno gives an entry of n's listing the inode number that a lookup of it gives.
func (fs *FS) trueIno(c *fsbackend.Context, n *node, l *listed) errno {
	if child := fs.at(n, []byte(l.name)); child != nil {
		l.ino = child.ino.Load()
		return 0
	}
	var f found
	switch e := fs.find(c, n, fsbackend.MakeName(l.name), &f); e {
	case 0:
		l.ino = f.ino
		fs.release(&f)
	case unix.EIO: // what cannot be read keeps the number that it was listed with
	default:
		return e
	}
	return 0
}

// listMerged adds entries of h.list from the one after off on.
func (fs *FS) listMerged(c *fsbackend.Context, epoch uint64, h *handle, off uint64, out *fsbackend.DirList) errno {
	n := h.node
	if off < cookieDot && !fs.addDot(n, cookieDot, []byte("."), out) {
		return 0
	}
	if off < cookieDotDot && !fs.addDot(n, cookieDotDot, []byte(".."), out) {
		return 0
	}
	entries := h.list.entries
	i := sort.Search(len(entries), func(i int) bool { return entries[i].cookie > off })
	var room [unix.NAME_MAX]byte
	var a ahead
	defer a.end(fs)
	for ; i < len(entries); i++ {
		l := &entries[i]
		name := room[:copy(room[:], l.name)]
		if !out.Plus {
			if !out.Add(l.ino, l.cookie, uint32(l.typ), name) {
				return 0
			}
			continue
		}
		if !out.Fits(len(name)) {
			return 0
		}
		var f found
		var entry fuseproto.EntryOut
		e := fs.findListed(c, n, h, entries[i:], &a, out.Len(), &f)
		if e == unix.ENOENT {
			continue
		}
		var child *node
		if e == 0 {
			child, e = fs.enter(epoch, n, name, &f, &entry)
		}
		switch {
		case e == fsbackend.ErrMayBlock || e == unix.ESTALE:
			if out.Written() > 0 {
				return 0
			}
			return e
		case e != 0:
			d := dirent{off: l.cookie, typ: uint32(l.typ), name: name}
			if !fs.addUnknown(l.ino, &d, out) {
				return 0
			}
			continue
		}
		if !out.AddPlus(&entry, entry.Ino, l.cookie, child.typ>>12, name) {
			fs.Forget(child.id, 1)
			return 0
		}
	}
	return 0
}

// minRun is how many entries of one part are to follow each other so that it is worth while to ask for them together.
const minRun = 4

// findListed is find for the first of what is still to be listed.
func (fs *FS) findListed(c *fsbackend.Context, n *node, h *handle, entries []listed, a *ahead, room int, f *found) errno {
	l := &entries[0]
	name, part := fsbackend.MakeName(l.name), int(l.part)
	if part > 0 && h.list.version != n.dir.version.Load() {
		return fs.find(c, n, name, f) // the parts above may have it by now
	}
	var given *fuseproto.EntryOut
	if len(a.rest) > 0 || len(entries) >= minRun && entries[minRun-1].part == l.part {
		var e errno
		if given, e = a.of(fs, c, n, h, l, room); e != 0 {
			return e
		}
	}
	return fs.findFrom(c, n, part, name, given, f)
}

// empty says whether a directory has no entry that the guest sees.
func (fs *FS) empty(c *fsbackend.Context, n *node) (bool, errno) {
	list, e := fs.merge(c, n, nil)
	if e != 0 {
		return false, e
	}
	return len(list.entries) == 0, 0
}

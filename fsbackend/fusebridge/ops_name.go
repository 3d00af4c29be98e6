package fusebridge

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// entry sends a request that is answered with an entry.
func (r *request) entry(ctx *fsbackend.Context, e *fuseproto.EntryOut) fsbackend.Errno {
	if errno := r.call(ctx, entryOutSize, false); errno != 0 {
		return errno
	}
	decode(r.reply, e)
	return fsbackend.OK
}

// Lookup implements fsbackend.Backend.
func (b *Bridge) Lookup(ctx *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if b.cachedEntry(parent, name, out) {
		return fsbackend.OK
	}
	p, errno := b.pinDir(parent)
	if errno != 0 {
		return errno
	}
	defer b.unpin(p)
	r, errno := b.begin(ctx, fuseproto.FUSE_LOOKUP, p)
	if errno != 0 {
		return errno
	}
	defer r.end()
	defer p.unlook(p.look(r.c))
	var l lookup
	began := time.Now()
	if errno := l.start(ctx, b, r, p, name); errno != 0 {
		return errno
	}
	errno = l.finish(b, out)
	r.c.answered(fuseproto.FUSE_LOOKUP, time.Since(began), errno)
	return errno
}

// A lookup is a LOOKUP that the program has been sent. The names of the directory are locked (node.look) until it is finished.
type lookup struct {
	r              *request
	p              *node
	name           fsbackend.Name
	known          *node // what the name was known to be
	version, names uint64
}

// start sends r, which is for p, as a LOOKUP of name.
func (l *lookup) start(ctx *fsbackend.Context, b *Bridge, r *request, p *node, name fsbackend.Name) fsbackend.Errno {
	l.r, l.p, l.name = r, p, name
	l.known, l.version, l.names = b.child(p, name)
	put(r, fuseproto.FUSE_LOOKUP, &fuseproto.InHeader{})
	r.name(name)
	return r.start(ctx, entryOutSize, nil, 0)
}

// finish takes up the answer, and counts the guest's lookup.
func (l *lookup) finish(b *Bridge, out *fuseproto.EntryOut) fsbackend.Errno {
	if errno := l.r.finish(false); errno != 0 {
		if errno == unix.ENOENT {
			b.lost(l.p, l.name)
		}
		return errno
	}
	decode(l.r.reply, out)
	if out.NodeId == 0 { // and for how long it is known not to be there
		b.lost(l.p, l.name)
		now := clock()
		setValid(&out.EntryValid, &out.EntryValidNsec, now, until(now, out.EntryValid, out.EntryValidNsec))
		return fsbackend.OK
	}
	n, errno := b.adopt(l.r.c, out, l.p, l.name)
	if errno != 0 {
		return errno
	}
	version := l.version
	if n != l.known {
		version = b.version(n)
	}
	b.keepEntry(n, out, version, l.p, l.name, l.names)
	return fsbackend.OK
}

// look locks the names of directory n against changes and, unless c's program can look at several at once, against that too. It
// returns what unlook is to be told.
func (n *node) look(c *conn) (shared bool) {
	if shared = c.flags&fuseproto.FUSE_PARALLEL_DIROPS != 0; shared {
		n.names.RLock()
	} else {
		n.names.Lock()
	}
	return shared
}

func (n *node) unlook(shared bool) {
	if shared {
		n.names.RUnlock()
	} else {
		n.names.Unlock()
	}
}

// child returns the node that name in p is known to be, its version and p's.
func (b *Bridge) child(p *node, name fsbackend.Name) (n *node, version, names uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if d := p.children[string(name)]; d != nil {
		return d.node, d.node.version, p.version
	}
	return nil, 0, p.version
}

// lost notes that name in p is gone.
func (b *Bridge) lost(p *node, name fsbackend.Name) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unlink(p, name)
}

// make sends a request that makes name in parent, whose struct and names fill has appended.
func (b *Bridge) makeEntry(ctx *fsbackend.Context, op fuseproto.Opcode, parent uint64, name fsbackend.Name, typ uint32, out *fuseproto.EntryOut, fill func(*request)) fsbackend.Errno {
	p, errno := b.pinDir(parent)
	if errno != 0 {
		return errno
	}
	defer b.unpin(p)
	r, errno := b.begin(ctx, op, p)
	if errno != 0 {
		return errno
	}
	defer r.end()
	p.names.Lock()
	defer p.names.Unlock()
	fill(r)
	if errno := r.entry(ctx, out); errno != 0 {
		return errno
	}
	return b.made(r.c, p, name, typ, out)
}

// made takes up the entry of what was made, which must be of the type that was asked for (fs/fuse/dir.c, create_new_entry).
func (b *Bridge) made(c *conn, p *node, name fsbackend.Name, typ uint32, out *fuseproto.EntryOut) fsbackend.Errno {
	b.touch(p)
	if out.NodeId == 0 || typ != 0 && out.Mode&unix.S_IFMT != typ {
		c.forget(out.NodeId, 1)
		return unix.EIO
	}
	n, errno := b.adopt(c, out, p, name)
	if errno != 0 {
		return errno
	}
	b.touch(n)
	b.keepEntry(n, out, b.version(n), p, name, b.version(p))
	return fsbackend.OK
}

// modes applies the caller's umask where the guest has left that to the file system, and the program has not taken it over.
func (b *Bridge) modes(c *conn, mode, umask *uint32) {
	guest := b.guest.Load()&fuseproto.FUSE_DONT_MASK != 0
	program := c.flags&fuseproto.FUSE_DONT_MASK != 0
	if guest && !program {
		*mode &^= *umask & 0o777
	}
	if !guest {
		*umask = 0 // it is applied already
	}
}

// Mknod implements fsbackend.Maker.
func (b *Bridge) Mknod(ctx *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	typ := in.Mode & unix.S_IFMT
	if typ == 0 {
		typ = unix.S_IFREG
	}
	return b.makeEntry(ctx, fuseproto.FUSE_MKNOD, in.NodeId, name, typ, out, func(r *request) {
		req := put(r, fuseproto.FUSE_MKNOD, in)
		b.modes(r.c, &req.Mode, &req.Umask)
		r.name(name)
	})
}

// Mkdir implements fsbackend.Maker.
func (b *Bridge) Mkdir(ctx *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return b.makeEntry(ctx, fuseproto.FUSE_MKDIR, in.NodeId, name, unix.S_IFDIR, out, func(r *request) {
		req := put(r, fuseproto.FUSE_MKDIR, in)
		b.modes(r.c, &req.Mode, &req.Umask)
		r.name(name)
	})
}

// Symlink implements fsbackend.Maker.
func (b *Bridge) Symlink(ctx *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return b.makeEntry(ctx, fuseproto.FUSE_SYMLINK, parent, name, unix.S_IFLNK, out, func(r *request) {
		put(r, fuseproto.FUSE_SYMLINK, &fuseproto.InHeader{})
		r.name(name)
		r.name(target)
	})
}

// Link implements fsbackend.Linker.
func (b *Bridge) Link(ctx *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	old, errno := b.pin(in.Oldnodeid)
	if errno != 0 {
		return errno
	}
	defer b.unpin(old)
	p, errno := b.pinDir(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(p)
	r, errno := b.begin(ctx, fuseproto.FUSE_LINK, p)
	if errno != 0 {
		return errno
	}
	defer r.end()
	raw, errno := b.find(ctx, r.c, old, 0)
	if errno != 0 {
		return errno
	}
	if old.typ == unix.S_IFDIR {
		return unix.EPERM
	}
	p.names.Lock()
	defer p.names.Unlock()
	put(r, fuseproto.FUSE_LINK, in).Oldnodeid = raw
	r.name(name)
	errno = r.entry(ctx, out)
	b.touch(old)
	if errno != 0 {
		return errno
	}
	return b.made(r.c, p, name, old.typ, out)
}

// Unlink implements fsbackend.Remover.
func (b *Bridge) Unlink(ctx *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return b.remove(ctx, fuseproto.FUSE_UNLINK, parent, name)
}

// Rmdir implements fsbackend.Remover.
func (b *Bridge) Rmdir(ctx *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return b.remove(ctx, fuseproto.FUSE_RMDIR, parent, name)
}

func (b *Bridge) remove(ctx *fsbackend.Context, op fuseproto.Opcode, parent uint64, name fsbackend.Name) fsbackend.Errno {
	p, errno := b.pinDir(parent)
	if errno != 0 {
		return errno
	}
	defer b.unpin(p)
	r, errno := b.begin(ctx, op, p)
	if errno != 0 {
		return errno
	}
	defer r.end()
	p.names.Lock()
	defer p.names.Unlock()
	// The types of what is removed and renamed a program leaves to the kernel's checks.
	victim, errno := b.peek(ctx, r, p, name)
	switch {
	case errno != 0:
		return errno
	case victim == nil:
		return unix.ENOENT
	}
	defer b.unpin(victim)
	switch isDir := victim.typ == unix.S_IFDIR; {
	case isDir && op == fuseproto.FUSE_UNLINK:
		return unix.EISDIR
	case !isDir && op == fuseproto.FUSE_RMDIR:
		return unix.ENOTDIR
	}
	put(r, op, &fuseproto.InHeader{})
	r.name(name)
	errno = r.call(ctx, 0, false)
	b.mu.Lock()
	defer b.mu.Unlock()
	p.changed()
	if errno == 0 {
		b.unlink(p, name)
	} else if d := p.children[string(name)]; d != nil {
		d.until = 0
	}
	return errno
}

// Rename implements fsbackend.Renamer.
func (b *Bridge) Rename(ctx *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) fsbackend.Errno {
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE|unix.RENAME_WHITEOUT) != 0 {
		return unix.EINVAL
	}
	op := fuseproto.FUSE_RENAME
	if in.Flags != 0 {
		op = fuseproto.FUSE_RENAME2
	}
	from, errno := b.pinDir(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(from)
	to, errno := b.pinDir(in.Newdir)
	if errno != 0 {
		return errno
	}
	defer b.unpin(to)
	r, errno := b.begin(ctx, op, from)
	if errno != 0 {
		return errno
	}
	defer r.end()
	raw, errno := b.find(ctx, r.c, to, 0)
	if errno != 0 {
		return errno
	}
	defer lockBoth(from, to)()
	same, errno := b.mayRename(ctx, r, in.Flags, from, to, raw, oldName, newName)
	if errno != 0 || same {
		return errno
	}
	if in.Flags == 0 {
		put(r, fuseproto.FUSE_RENAME, &fuseproto.RenameIn{Newdir: raw})
	} else {
		if r.c.minor < 23 {
			return unix.EINVAL
		}
		put(r, fuseproto.FUSE_RENAME2, in).Newdir = raw
	}
	r.name(oldName)
	r.name(newName)
	errno = r.call(ctx, 0, false)
	if errno == unix.ENOSYS && in.Flags != 0 {
		errno = unix.EINVAL
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	from.changed()
	to.changed()
	if errno != 0 {
		for _, d := range []*dentry{from.children[string(oldName)], to.children[string(newName)]} {
			if d != nil {
				d.until = 0
			}
		}
		return errno
	}
	moved := b.unlink(from, oldName)
	other := b.unlink(to, newName)
	if moved != nil {
		b.link(moved, to, newName)
	}
	if in.Flags&unix.RENAME_EXCHANGE != 0 && other != nil && other != moved {
		b.link(other, from, oldName)
	}
	return fsbackend.OK
}

// lockBoth locks the names of two directories, which may be one.
func lockBoth(a, b *node) (unlock func()) {
	if a == b {
		a.names.Lock()
		return a.names.Unlock
	}
	if a.id > b.id {
		a, b = b, a
	}
	a.names.Lock()
	b.names.Lock()
	return func() {
		b.names.Unlock()
		a.names.Unlock()
	}
}

// mayRename makes the checks that a program leaves to the kernel (fs/namei.c, do_renameat2 and vfs_rename). same says that there is
// nothing to do. toRaw is what the program calls to; the names of both directories are locked.
func (b *Bridge) mayRename(ctx *fsbackend.Context, r *request, flags uint32, from, to *node, toRaw uint64, oldName, newName fsbackend.Name) (same bool, errno fsbackend.Errno) {
	source, errno := b.peek(ctx, r, from, oldName)
	if errno != 0 {
		return false, errno
	}
	if source == nil {
		return false, unix.ENOENT
	}
	defer b.unpin(source)
	fromRaw := r.raw
	r.raw = toRaw
	target, errno := b.peek(ctx, r, to, newName)
	r.raw = fromRaw
	if errno != 0 {
		return false, errno
	}
	if target != nil {
		defer b.unpin(target)
	}
	exchange := flags&unix.RENAME_EXCHANGE != 0
	if exchange && flags&^unix.RENAME_EXCHANGE != 0 {
		return false, unix.EINVAL
	}
	if b.within(to, source) {
		return false, unix.EINVAL
	}
	if target == nil {
		if exchange {
			return false, unix.ENOENT
		}
		return false, fsbackend.OK
	}
	sourceDir, targetDir := source.typ == unix.S_IFDIR, target.typ == unix.S_IFDIR
	switch {
	case flags&unix.RENAME_NOREPLACE != 0:
		return false, unix.EEXIST
	case source == target:
		return true, fsbackend.OK
	case exchange && b.within(from, target):
		return false, unix.EINVAL
	case b.within(from, target):
		return false, unix.ENOTEMPTY
	case exchange:
	case sourceDir && !targetDir:
		return false, unix.ENOTDIR
	case !sourceDir && targetDir:
		return false, unix.EISDIR
	}
	return false, fsbackend.OK
}

// within says whether n is dir, or below it, as far as is known.
func (b *Bridge) within(n, dir *node) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for depth := 0; n != nil && depth < maxDepth; depth++ {
		if n == dir {
			return true
		}
		n = n.parent
	}
	return false
}

// peek returns what name in p is, pinned, or nil if there is no such name. It asks the program where that is not known: r, which is
// for p, is as good for another request afterwards.
func (b *Bridge) peek(ctx *fsbackend.Context, r *request, p *node, name fsbackend.Name) (*node, fsbackend.Errno) {
	b.mu.Lock()
	if d := p.children[string(name)]; d != nil && b.nodes[d.node.id] == d.node && d.node.at.conn == r.c {
		d.node.pins++
		b.mu.Unlock()
		return d.node, fsbackend.OK
	}
	b.mu.Unlock()
	put(r, fuseproto.FUSE_LOOKUP, &fuseproto.InHeader{})
	r.name(name)
	var e fuseproto.EntryOut
	switch errno := r.entry(ctx, &e); {
	case errno == unix.ENOENT || errno == 0 && e.NodeId == 0:
		return nil, fsbackend.OK
	case errno != 0:
		return nil, errno
	}
	n, errno := b.adopt(r.c, &e, p, name)
	if errno != 0 {
		return nil, errno
	}
	b.mu.Lock()
	n.pins++
	n.count-- // it is not the guest's
	b.mu.Unlock()
	return n, fsbackend.OK
}

// Readlink implements fsbackend.Readlinker.
func (b *Bridge) Readlink(ctx *fsbackend.Context, id uint64, dst *fsbackend.Sink) fsbackend.Errno {
	n, errno := b.pin(id)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	if n.typ != unix.S_IFLNK {
		return unix.EINVAL
	}
	r, errno := b.begin(ctx, fuseproto.FUSE_READLINK, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, fuseproto.FUSE_READLINK, &fuseproto.InHeader{})
	if errno := r.call(ctx, unix.PathMax-1, true); errno != 0 {
		return errno
	}
	if len(r.reply) == 0 {
		return unix.EIO // fs/fuse/dir.c, fuse_readlink_page
	}
	dst.Write(r.reply[:min(len(r.reply), dst.Len())])
	return fsbackend.OK
}

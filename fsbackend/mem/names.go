package mem

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Lookup implements fsbackend.Backend.
func (f *FS) Lookup(_ *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	f.mu.RLock()
	defer f.mu.RUnlock()
	d, errno := f.directory(parent)
	if errno != 0 {
		return errno
	}
	e := d.dir.names[string(name)]
	if e == nil {
		return unix.ENOENT
	}
	f.entry(e.node, out)
	return fsbackend.OK
}

// Readlink implements fsbackend.Readlinker.
func (f *FS) Readlink(_ *fsbackend.Context, id uint64, dst *fsbackend.Sink) fsbackend.Errno {
	f.mu.RLock()
	n, errno := f.node(id)
	f.mu.RUnlock()
	if errno != 0 {
		return errno
	}
	if !n.is(unix.S_IFLNK) {
		return unix.EINVAL
	}
	dst.Write([]byte(n.target))
	return fsbackend.OK
}

// Mknod implements fsbackend.Maker.
func (f *FS) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	typ, rdev := in.Mode&unix.S_IFMT, uint32(0)
	switch typ {
	case 0:
		typ = unix.S_IFREG
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
	case unix.S_IFCHR, unix.S_IFBLK:
		rdev = in.Rdev
	case unix.S_IFDIR:
		return unix.EPERM
	default:
		return unix.EINVAL
	}
	return f.enter(c, in.NodeId, name, typ|f.mask(in.Mode, in.Umask)&0o7777, "", rdev, out)
}

// Mkdir implements fsbackend.Maker.
func (f *FS) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return f.enter(c, in.NodeId, name, unix.S_IFDIR|f.mask(in.Mode, in.Umask)&0o1777, "", 0, out)
}

// Symlink implements fsbackend.Maker.
func (f *FS) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return f.enter(c, parent, name, unix.S_IFLNK|0o777, target.String(), 0, out)
}

// mask applies the caller's umask where the guest's kernel has left that to us.
func (f *FS) mask(mode, umask uint32) uint32 {
	if f.dontMask.Load() {
		mode &^= umask & 0o777
	}
	return mode
}

// enter makes a file and counts its lookup.
func (f *FS) enter(c *fsbackend.Context, parent uint64, name fsbackend.Name, mode uint32, target string, rdev uint32, out *fuseproto.EntryOut) fsbackend.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, errno := f.directory(parent)
	if errno != 0 {
		return errno
	}
	n, errno := f.make(c, d, name, mode, target)
	if errno != 0 {
		return errno
	}
	n.rdev = rdev
	f.entry(n, out)
	return fsbackend.OK
}

// make makes a file named name. mu is held for writing.
func (f *FS) make(c *fsbackend.Context, parent *node, name fsbackend.Name, mode uint32, target string) (*node, fsbackend.Errno) {
	if errno := vacant(parent, name); errno != 0 {
		return nil, errno
	}
	isDir := mode&unix.S_IFMT == unix.S_IFDIR
	if isDir && parent.nlink >= MaxLinks {
		return nil, unix.EMLINK
	}
	cost := entryCost + int64(len(name)+len(target))
	if !f.charge(cost) {
		return nil, unix.ENOSPC
	}
	n, errno := f.newChild(c, parent, mode)
	if errno != 0 {
		f.refund(cost)
		return nil, errno
	}
	n.target = target
	if isDir {
		n.dir.parent = parent
		parent.nlink++
	}
	parent.dir.insert(name.String(), n)
	f.touch(parent)
	return n, fsbackend.OK
}

// vacant says whether a new name may be made in parent.
func vacant(parent *node, name fsbackend.Name) fsbackend.Errno {
	switch {
	case parent.nlink == 0:
		return unix.ENOENT
	case len(name) > unix.NAME_MAX:
		return unix.ENAMETOOLONG
	case parent.dir.names[string(name)] != nil:
		return unix.EEXIST
	}
	return fsbackend.OK
}

// newChild makes a file as a process in the guest makes it in parent (inode_init_owner in Linux fs/inode.c). mu is held for
// writing.
func (f *FS) newChild(c *fsbackend.Context, parent *node, mode uint32) (*node, fsbackend.Errno) {
	uid, gid := c.Caller.Uid, c.Caller.Gid
	if parent.mode&unix.S_ISGID != 0 {
		gid = parent.gid
		if mode&unix.S_IFMT == unix.S_IFDIR {
			mode |= unix.S_ISGID
		} else if mode&(unix.S_ISGID|unix.S_IXGRP) == unix.S_ISGID|unix.S_IXGRP &&
			uid != 0 && c.Caller.Gid != gid && !slices.Contains(c.SuppGroups, gid) {
			mode &^= unix.S_ISGID
		}
	}
	n, errno := f.newNode(mode, uid, gid)
	if errno != 0 {
		return nil, errno
	}
	for _, s := range c.Secctx {
		if errno := f.setXattr(n, s.Name, s.Value, 0); errno != 0 {
			f.discard(n)
			return nil, errno
		}
	}
	return n, fsbackend.OK
}

// touch notes a change of directories. mu is held for writing.
func (f *FS) touch(dirs ...*node) {
	now := makeStamp(f.now())
	for _, d := range dirs {
		d.mtime, d.ctime = now, now
	}
}

// Link implements fsbackend.Linker.
func (f *FS) Link(_ *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, errno := f.node(in.Oldnodeid)
	if errno != 0 {
		return errno
	}
	parent, errno := f.directory(in.NodeId)
	if errno == 0 {
		errno = vacant(parent, name)
	}
	switch {
	case errno != 0:
		return errno
	case n.dir != nil:
		return unix.EPERM
	case n.nlink == 0 && !n.linkable:
		return unix.ENOENT
	case n.nlink >= MaxLinks:
		return unix.EMLINK
	case !f.charge(entryCost + int64(len(name))):
		return unix.ENOSPC
	}
	parent.dir.insert(name.String(), n)
	n.nlink++
	n.linkable = false
	f.touch(parent)
	n.ctime = parent.ctime
	f.entry(n, out)
	return fsbackend.OK
}

// Unlink implements fsbackend.Remover.
func (f *FS) Unlink(_ *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return f.remove(parent, name, false)
}

// Rmdir implements fsbackend.Remover.
func (f *FS) Rmdir(_ *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return f.remove(parent, name, true)
}

func (f *FS) remove(id uint64, name fsbackend.Name, isDir bool) fsbackend.Errno {
	f.mu.Lock()
	var n *node
	parent, errno := f.directory(id)
	if errno == 0 {
		e := parent.dir.names[string(name)]
		if errno = removable(e, isDir); errno == 0 {
			n = e.node
			f.unlink(parent, e)
			f.touch(parent)
		}
	}
	dead := n != nil && f.drop(n)
	f.mu.Unlock()
	if dead {
		f.free(n)
	}
	return errno
}

// removable says whether an entry may be removed as a directory, or as something else (may_delete in Linux fs/namei.c).
func removable(e *entry, isDir bool) fsbackend.Errno {
	switch {
	case e == nil:
		return unix.ENOENT
	case isDir && e.node.dir == nil:
		return unix.ENOTDIR
	case !isDir && e.node.dir != nil:
		return unix.EISDIR
	case isDir && len(e.node.dir.names) > 0:
		return unix.ENOTEMPTY
	}
	return fsbackend.OK
}

// unlink takes an entry out of its directory; the caller drops the node. mu is held for writing.
func (f *FS) unlink(parent *node, e *entry) {
	n := e.node
	parent.dir.remove(e)
	f.refund(entryCost + int64(len(e.name)))
	f.unlinked(parent, n)
}

// unlinked notes that parent has one entry less for n. mu is held for writing.
func (f *FS) unlinked(parent, n *node) {
	n.nlink--
	if n.dir != nil {
		n.nlink = 0
		parent.nlink--
	}
	n.ctime = makeStamp(f.now())
}

// Rename implements fsbackend.Renamer.
func (f *FS) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) fsbackend.Errno {
	const known = unix.RENAME_NOREPLACE | unix.RENAME_EXCHANGE | unix.RENAME_WHITEOUT
	if in.Flags&^known != 0 ||
		in.Flags&unix.RENAME_EXCHANGE != 0 && in.Flags&(unix.RENAME_NOREPLACE|unix.RENAME_WHITEOUT) != 0 {
		return unix.EINVAL
	}
	f.mu.Lock()
	replaced, errno := f.rename(c, in, oldName, newName)
	dead := replaced != nil && f.drop(replaced)
	f.mu.Unlock()
	if dead {
		f.free(replaced)
	}
	return errno
}

// rename returns what lost its name. Its checks come in the order of do_renameat2 and vfs_rename in Linux fs/namei.c. mu is
// held for writing.
func (f *FS) rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) (*node, fsbackend.Errno) {
	from, errno := f.directory(in.NodeId)
	if errno != 0 {
		return nil, errno
	}
	to, errno := f.directory(in.Newdir)
	if errno != 0 {
		return nil, errno
	}
	exchange := in.Flags&unix.RENAME_EXCHANGE != 0
	source, target := from.dir.names[string(oldName)], to.dir.names[string(newName)]
	switch {
	case source == nil:
		return nil, unix.ENOENT
	case target != nil && in.Flags&unix.RENAME_NOREPLACE != 0:
		return nil, unix.EEXIST
	case target == nil && exchange:
		return nil, unix.ENOENT
	case isAncestor(source.node, to):
		return nil, unix.EINVAL
	case target != nil && isAncestor(target.node, from):
		if exchange {
			return nil, unix.EINVAL
		}
		return nil, unix.ENOTEMPTY
	case target != nil && target.node == source.node:
		return nil, fsbackend.OK
	}
	switch {
	case exchange:
		return nil, f.exchange(from, source, to, target)
	case target == nil:
		if errno := vacant(to, newName); errno != 0 {
			return nil, errno
		}
		if source.node.dir != nil && from != to && to.nlink >= MaxLinks {
			return nil, unix.EMLINK
		}
	default:
		if errno := removable(target, source.node.dir != nil); errno != 0 {
			return nil, errno
		}
	}
	return f.move(c, from, source, to, target, newName, in.Flags&unix.RENAME_WHITEOUT != 0)
}

// move gives source the name newName, which target has if there is one, and returns what lost it. mu is held for writing.
func (f *FS) move(c *fsbackend.Context, from *node, source *entry, to *node, target *entry, newName fsbackend.Name, whiteout bool) (*node, fsbackend.Errno) {
	cost := int64(0)
	if target == nil {
		cost = entryCost + int64(len(newName))
	}
	if !f.charge(cost) {
		return nil, unix.ENOSPC
	}
	var white *node
	if whiteout {
		var errno fsbackend.Errno
		// overlayfs knows a whiteout as character device 0:0 (WHITEOUT_MODE in Linux include/linux/fs.h).
		if white, errno = f.newChild(c, from, unix.S_IFCHR); errno != 0 {
			f.refund(cost)
			return nil, errno
		}
	}
	n := source.node
	if white != nil {
		source.node = white
	} else {
		from.dir.remove(source)
		f.refund(entryCost + int64(len(source.name)))
	}
	var replaced *node
	if target != nil {
		replaced = target.node
		target.node = n
		f.unlinked(to, replaced)
	} else {
		to.dir.insert(newName.String(), n)
	}
	if n.dir != nil {
		from.nlink--
		to.nlink++
		n.dir.parent = to
	}
	f.touch(from, to)
	n.ctime = to.ctime
	return replaced, fsbackend.OK
}

// exchange swaps the files of two entries. mu is held for writing.
func (f *FS) exchange(from *node, source *entry, to *node, target *entry) fsbackend.Errno {
	a, b := source.node, target.node
	if from != to {
		switch {
		case a.dir != nil && b.dir == nil && to.nlink >= MaxLinks, b.dir != nil && a.dir == nil && from.nlink >= MaxLinks:
			return unix.EMLINK
		}
	}
	source.node, target.node = b, a
	if a.dir != nil {
		from.nlink--
		to.nlink++
		a.dir.parent = to
	}
	if b.dir != nil {
		to.nlink--
		from.nlink++
		b.dir.parent = from
	}
	f.touch(from, to)
	a.ctime, b.ctime = to.ctime, to.ctime
	return fsbackend.OK
}

// isAncestor says whether n is d or a directory above it.
func isAncestor(n, d *node) bool {
	if n.dir == nil {
		return false
	}
	for {
		if n == d {
			return true
		}
		if d.dir.parent == d {
			return false
		}
		d = d.dir.parent
	}
}

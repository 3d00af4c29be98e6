package permshift

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// owner says who a file made in parent with this mode and umask belongs to, and with which mode (inode_init_owner in Linux
// fs/inode.c).
func (f *FS) owner(c *fsbackend.Context, parent uint64, mode, umask uint32) (Stat, fsbackend.Errno) {
	if f.features.Load()&fuseproto.FUSE_DONT_MASK != 0 {
		mode &^= umask & 0o777
	}
	st := Stat{UID: c.Caller.Uid, GID: c.Caller.Gid, Mode: mode}
	if st.UID == invalidID || st.GID == invalidID {
		return Stat{}, unix.EOVERFLOW
	}
	r := rooms.Get().(*room)
	defer rooms.Put(r)
	r.get, r.attr = fuseproto.GetattrIn{}, fuseproto.AttrOut{}
	r.get.NodeId, r.get.Caller = parent, c.Caller
	errno := f.Inner.Getattr(c, &r.get, &r.attr)
	if errno == fsbackend.OK {
		errno = f.shift(c, parent, &r.attr.Attr)
	}
	if errno != fsbackend.OK || r.attr.Mode&unix.S_ISGID == 0 || r.attr.Mode&unix.S_IFMT != unix.S_IFDIR {
		return st, errno
	}
	st.GID = r.attr.Gid
	switch {
	case mode&unix.S_IFMT == unix.S_IFDIR:
		st.Mode |= unix.S_ISGID
	case mode&(unix.S_ISGID|unix.S_IXGRP) == unix.S_ISGID|unix.S_IXGRP && st.UID != 0 && !groupsHave(c, st.GID):
		st.Mode &^= unix.S_ISGID
	}
	return st, fsbackend.OK
}

// mayMake says whether a call that makes something, and then gives it a value, may begin: between the two it cannot be put off.
func (f *FS) mayMake(c *fsbackend.Context) fsbackend.Errno {
	if !c.MayBlock && f.reluctant.Load() {
		return fsbackend.ErrMayBlock
	}
	for i := range c.Secctx {
		if hidden(c.Secctx[i].Name) {
			return unix.EPERM
		}
	}
	return fsbackend.OK
}

// asDaemon makes c a request of the storage's user, until the function that it returns is called.
func asDaemon(c *fsbackend.Context) (back caller) {
	back = caller{c.Caller, c.SuppGroups}
	c.Caller.Uid, c.Caller.Gid, c.SuppGroups = 0, 0, nil
	return back
}

// caller is who has made a request.
type caller struct {
	fuseproto.Caller
	groups []uint32
}

func (b caller) restore(c *fsbackend.Context) { c.Caller, c.SuppGroups = b.Caller, b.groups }

// made gives the file that a call has just made its value. A file that cannot have it is removed again, by name. Of a directory or
// node a backend may know no more than what has its name afterwards: what has a value already, or is of another kind, is somebody
// else's, who has been quicker.
func (f *FS) made(c *fsbackend.Context, parent uint64, name fsbackend.Name, st Stat, out *fuseproto.EntryOut) fsbackend.Errno {
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	errno := unix.EEXIST
	if host := out.Mode & unix.S_IFMT; isDir == (host == unix.S_IFDIR) && carries(host) {
		errno = insist(c, func() fsbackend.Errno { return f.store(c, out.NodeId, st, unix.XATTR_CREATE) })
	}
	switch {
	case errno == fsbackend.OK:
		errno = f.apply(&out.Attr, st)
	case errno == unix.EEXIST:
		errno = unix.ESTALE // the guest looks again
	case len(name) == 0:
	case isDir:
		_ = f.Forward.Rmdir(c, parent, name)
	default:
		_ = f.Forward.Unlink(c, parent, name)
	}
	return f.found(out, errno)
}

// insist makes a call that can be put off no more, because another one has had its effect. The first time that a backend wants to,
// this thread sleeps; later ones ask before (mayMake).
func insist(c *fsbackend.Context, call func() fsbackend.Errno) fsbackend.Errno {
	errno := call()
	if errno == fsbackend.ErrMayBlock && !c.MayBlock {
		c.MayBlock = true
		errno = call()
		c.MayBlock = false
	}
	return errno
}

// Mknod implements fsbackend.Maker.
func (f *FS) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if f.format == Off {
		return f.Forward.Mknod(c, in, name, out)
	}
	if errno := f.mayMake(c); errno != fsbackend.OK {
		return errno
	}
	mode := in.Mode & (unix.S_IFMT | 0o7777)
	switch mode & unix.S_IFMT {
	case 0:
		mode |= unix.S_IFREG
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK:
	case unix.S_IFDIR:
		return unix.EPERM
	default:
		return unix.EINVAL
	}
	st, errno := f.owner(c, in.NodeId, mode, in.Umask)
	if errno != fsbackend.OK {
		return errno
	}
	given := *in
	defer func() { *in = given }()
	in.Umask = 0
	if mode&unix.S_IFMT != unix.S_IFREG && !f.format.keepsTypes() {
		in.Mode = st.Mode
		return f.makeHost(c, st, out, func() fsbackend.Errno { return f.Forward.Mknod(c, in, name, out) })
	}
	if typ := mode & unix.S_IFMT; typ == unix.S_IFBLK || typ == unix.S_IFCHR {
		st.Major, st.Minor = unix.Major(uint64(in.Rdev)), unix.Minor(uint64(in.Rdev))
	}
	in.Mode, in.Rdev = unix.S_IFREG|f.hostMode, 0
	was := asDaemon(c)
	defer was.restore(c)
	if errno := f.Forward.Mknod(c, in, name, out); errno != fsbackend.OK {
		return errno
	}
	return f.made(c, given.NodeId, name, st, out)
}

// makeHost makes a file that can carry no value, and gives it to whom it belongs where the host lets the storage's user do so.
func (f *FS) makeHost(c *fsbackend.Context, st Stat, out *fuseproto.EntryOut, call func() fsbackend.Errno) fsbackend.Errno {
	was := asDaemon(c)
	defer was.restore(c)
	errno := call()
	if errno != fsbackend.OK || out.Uid == st.UID && out.Gid == st.GID {
		return errno
	}
	var in fuseproto.SetattrIn
	var attr fuseproto.AttrOut
	in.NodeId, in.Caller = out.NodeId, c.Caller
	in.Valid, in.Uid, in.Gid = fuseproto.FATTR_UID|fuseproto.FATTR_GID, st.UID, st.GID
	if f.Forward.Setattr(c, &in, &attr) == fsbackend.OK {
		out.Attr = attr.Attr
	}
	return fsbackend.OK
}

// Mkdir implements fsbackend.Maker.
func (f *FS) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if f.format == Off {
		return f.Forward.Mkdir(c, in, name, out)
	}
	if errno := f.mayMake(c); errno != fsbackend.OK {
		return errno
	}
	// mkdir(2) makes no set-ID bits but by inheritance (vfs_mkdir in Linux fs/namei.c).
	st, errno := f.owner(c, in.NodeId, unix.S_IFDIR|in.Mode&0o1777, in.Umask)
	if errno != fsbackend.OK {
		return errno
	}
	mode, umask := in.Mode, in.Umask
	in.Mode, in.Umask = f.hostMode, 0
	was := asDaemon(c)
	errno = f.Forward.Mkdir(c, in, name, out)
	if errno == fsbackend.OK {
		errno = f.made(c, in.NodeId, name, st, out)
	}
	was.restore(c)
	in.Mode, in.Umask = mode, umask
	return errno
}

// Symlink implements fsbackend.Maker.
func (f *FS) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if f.format == Off {
		return f.Forward.Symlink(c, parent, name, target, out)
	}
	if errno := f.mayMake(c); errno != fsbackend.OK {
		return errno
	}
	st, errno := f.owner(c, parent, unix.S_IFLNK|0o777, 0)
	if errno != fsbackend.OK {
		return errno
	}
	return f.makeHost(c, st, out, func() fsbackend.Errno { return f.Forward.Symlink(c, parent, name, target, out) })
}

// Link implements fsbackend.Linker.
func (f *FS) Link(c *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if errno := f.mayMake(c); errno != fsbackend.OK {
		return errno
	}
	errno := f.Forward.Link(c, in, name, out)
	if errno != fsbackend.OK {
		return errno
	}
	return f.found(out, insist(c, func() fsbackend.Errno { return f.shift(c, out.NodeId, &out.Attr) }))
}

// Create implements fsbackend.Creater.
func (f *FS) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	if f.format == Off {
		return f.Forward.Create(c, in, name, out)
	}
	if errno := f.mayMake(c); errno != fsbackend.OK {
		return errno
	}
	st, errno := f.owner(c, in.NodeId, unix.S_IFREG|in.Mode&0o7777, in.Umask)
	if errno != fsbackend.OK {
		return errno
	}
	// What exists keeps its value, so it has to be known which it was. It may go, and come, in between.
	for range 8 {
		errno = f.createNew(c, in, name, st, out)
		if errno != unix.EEXIST || in.Flags&unix.O_EXCL != 0 {
			return errno
		}
		errno = f.openExisting(c, in, name, out)
		if errno != unix.ENOENT && errno != unix.ESTALE {
			return errno
		}
	}
	return errno
}

// createNew creates a file that must not exist.
func (f *FS) createNew(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, st Stat, out *fuseproto.CreateOut) fsbackend.Errno {
	flags, mode, umask := in.Flags, in.Mode, in.Umask
	in.Flags, in.Mode, in.Umask = flags|unix.O_EXCL, unix.S_IFREG|f.hostMode, 0
	was := asDaemon(c)
	errno := f.Forward.Create(c, in, name, out)
	if errno == fsbackend.OK {
		errno = f.created(c, in, name, st, out)
	}
	was.restore(c)
	in.Flags, in.Mode, in.Umask = flags, mode, umask
	return errno
}

// created is made for a file that is open, too.
func (f *FS) created(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, st Stat, out *fuseproto.CreateOut) fsbackend.Errno {
	node := out.NodeId
	errno := f.made(c, in.NodeId, name, st, &out.EntryOut)
	if errno != fsbackend.OK {
		rel := fuseproto.ReleaseIn{Fh: out.Fh}
		rel.NodeId, rel.Caller = node, c.Caller
		f.Forward.Release(c, &rel)
	}
	return errno
}

// openExisting opens the file that CREATE has found to exist.
func (f *FS) openExisting(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	if errno := f.Lookup(c, in.NodeId, name, &out.EntryOut); errno != fsbackend.OK {
		return errno
	}
	if out.NodeId == 0 {
		return unix.ENOENT
	}
	open := fuseproto.OpenIn{InHeader: in.InHeader, Flags: in.Flags &^ (unix.O_CREAT | unix.O_EXCL | unix.O_NOCTTY), Mode: in.OpenFlags}
	open.NodeId = out.NodeId
	errno := f.Open(c, &open, &out.OpenOut)
	if errno != fsbackend.OK {
		f.Inner.Forget(out.NodeId, 1)
		out.EntryOut = fuseproto.EntryOut{}
	}
	return errno
}

// Tmpfile implements fsbackend.Tmpfiler.
func (f *FS) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) fsbackend.Errno {
	if f.format == Off {
		return f.Forward.Tmpfile(c, in, out)
	}
	if errno := f.mayMake(c); errno != fsbackend.OK {
		return errno
	}
	st, errno := f.owner(c, in.NodeId, unix.S_IFREG|in.Mode&0o7777, in.Umask)
	if errno != fsbackend.OK {
		return errno
	}
	mode, umask := in.Mode, in.Umask
	in.Mode, in.Umask = unix.S_IFREG|f.hostMode, 0
	was := asDaemon(c)
	errno = f.Forward.Tmpfile(c, in, out)
	if errno == fsbackend.OK {
		errno = f.created(c, in, nil, st, out)
	}
	was.restore(c)
	in.Mode, in.Umask = mode, umask
	return errno
}

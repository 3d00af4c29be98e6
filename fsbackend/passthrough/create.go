package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

const permBits = 0o7777

// masked applies the guest's umask where that is left to us (FUSE_DONT_MASK): a directory with a default ACL has the
// kernel derive modes from that instead.
func (fs *FS) masked(p *ref, mode, umask uint32) uint32 {
	if umask&0o777 == 0 || !fs.has(fuseproto.FUSE_DONT_MASK) {
		return mode
	}
	if fs.has(fuseproto.FUSE_POSIX_ACL) {
		if _, errno := fs.xattr.Get(p.fd, &defaultACL[0], nil); errno == 0 {
			return mode
		}
	}
	return mode &^ (umask & 0o777)
}

// made looks at what a call has just made as name and labels it; what cannot be labelled is removed again.
func (fs *FS) made(c *fsbackend.Context, p *ref, parent uint64, name fsbackend.Name, rmFlags int, out *fuseproto.EntryOut) errno {
	errno := fs.lookup(p, parent, name, out)
	if errno != 0 || len(c.Secctx) == 0 {
		return errno
	}
	fs.letGo(p)
	var r ref
	if errno = fs.resolve2(parent, out.NodeId, p, &r); errno == 0 {
		if errno = fs.label(c, r.fd); errno != 0 {
			_ = sys.Unlinkat(p.fd, name.CString(), rmFlags)
		}
		fs.put(&r)
	} else {
		*p = noRef
	}
	if errno != 0 {
		fs.Forget(out.NodeId, 1)
		*out = fuseproto.EntryOut{}
	}
	return errno
}

// label sets the security attributes that the guest wants on a new file.
func (fs *FS) label(c *fsbackend.Context, fd int) errno {
	for i := range c.Secctx {
		if errno := fs.xattr.Set(fd, c.Secctx[i].Name.CString(), c.Secctx[i].Value, 0); errno != 0 {
			return errno
		}
	}
	return 0
}

// Mknod implements fsbackend.Maker.
func (fs *FS) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	var p ref
	if errno := fs.useDir(in.NodeId, name, &p); errno != 0 {
		return errno
	}
	defer fs.put(&p)
	mode := fs.masked(&p, in.Mode&(unix.S_IFMT|permBits), in.Umask)
	var d disguise
	errno := fs.actAs(c, &d)
	if errno == 0 {
		errno = fs.stopActing(&d, sys.Mknodat(p.fd, name.CString(), mode, in.Rdev))
	}
	if errno != 0 {
		return errno
	}
	return fs.made(c, &p, in.NodeId, name, 0, out)
}

// Mkdir implements fsbackend.Maker.
func (fs *FS) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	var p ref
	if errno := fs.useDir(in.NodeId, name, &p); errno != 0 {
		return errno
	}
	defer fs.put(&p)
	mode := fs.masked(&p, in.Mode&permBits, in.Umask)
	var d disguise
	errno := fs.actAs(c, &d)
	if errno == 0 {
		errno = fs.stopActing(&d, sys.Mkdirat(p.fd, name.CString(), mode))
	}
	if errno != 0 {
		return errno
	}
	return fs.made(c, &p, in.NodeId, name, unix.AT_REMOVEDIR, out)
}

// Symlink implements fsbackend.Maker.
func (fs *FS) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if len(target) == 0 {
		return unix.ENOENT
	}
	var p ref
	if errno := fs.useDir(parent, name, &p); errno != 0 {
		return errno
	}
	defer fs.put(&p)
	var d disguise
	errno := fs.actAs(c, &d)
	if errno == 0 {
		errno = fs.stopActing(&d, sys.Symlinkat(target.CString(), p.fd, name.CString()))
	}
	if errno != 0 {
		return errno
	}
	return fs.made(c, &p, parent, name, 0, out)
}

// Link implements fsbackend.Linker. A link belongs to nobody, and the guest's kernel has checked that it may be made: the
// daemon makes it.
func (fs *FS) Link(_ *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if errno := checkName(name); errno != 0 {
		return errno
	}
	var old, dir ref
	if errno := fs.resolve2(in.Oldnodeid, in.NodeId, &old, &dir); errno != 0 {
		return errno
	}
	defer fs.put(&dir)
	defer fs.put(&old)
	if dir.typ != typeDir {
		return unix.ENOTDIR
	}
	if old.typ == typeDir {
		return unix.EPERM
	}
	if errno := sys.LinkFD(fs.procfd.Int(), old.fd, dir.fd, name.CString()); errno != 0 {
		return errno
	}
	var st unix.Statx_t
	if errno := sys.Statx(old.fd, nil, statxFlags, statxMask, &st); errno != 0 {
		return errno
	}
	return fs.enter(&dir, in.NodeId, name, &st, -1, -1, out)
}

// Unlink implements fsbackend.Remover.
func (fs *FS) Unlink(_ *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return fs.unlink(parent, name, 0)
}

// Rmdir implements fsbackend.Remover.
func (fs *FS) Rmdir(_ *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return fs.unlink(parent, name, unix.AT_REMOVEDIR)
}

func (fs *FS) unlink(parent uint64, name fsbackend.Name, flags int) errno {
	var p ref
	if errno := fs.useDir(parent, name, &p); errno != 0 {
		return errno
	}
	defer fs.put(&p)
	if fs.mountedOn(p.fd, name) {
		return unix.EBUSY
	}
	if errno := sys.Unlinkat(p.fd, name.CString(), flags); errno != 0 {
		return errno
	}
	fs.nodes.moved(parent, name, 0, nil)
	return 0
}

// mountedOn says whether something is mounted on name. The kernel refuses to remove such a name only where the mount is in our own
// namespace; else it takes the mount away, the host's too (Linux fs/namei.c, is_local_mountpoint and detach_mounts). A tree that
// we were handed a descriptor of may be in none.
func (fs *FS) mountedOn(dirfd int, name fsbackend.Name) bool {
	if fs.cfg.DirFD == 0 {
		return false
	}
	var st unix.Statx_t
	return sys.Statx(dirfd, name.CString(), statxFlags, 0, &st) == 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// Rename implements fsbackend.Renamer.
func (fs *FS) Rename(_ *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) fsbackend.Errno {
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE|unix.RENAME_WHITEOUT) != 0 {
		return unix.EINVAL
	}
	if errno := checkName(oldName); errno != 0 {
		return errno
	}
	if errno := checkName(newName); errno != 0 {
		return errno
	}
	var from, to ref
	if errno := fs.resolve2(in.NodeId, in.Newdir, &from, &to); errno != 0 {
		return errno
	}
	defer fs.put(&to)
	defer fs.put(&from)
	if from.typ != typeDir || to.typ != typeDir {
		return unix.ENOTDIR
	}
	if fs.mountedOn(from.fd, oldName) || fs.mountedOn(to.fd, newName) {
		return unix.EBUSY
	}
	if errno := sys.Renameat2(from.fd, oldName.CString(), to.fd, newName.CString(), in.Flags); errno != 0 {
		return errno
	}
	if in.Flags&unix.RENAME_EXCHANGE != 0 {
		fs.nodes.exchanged(in.NodeId, oldName, in.Newdir, newName)
		return 0
	}
	if in.NodeId != in.Newdir || string(oldName) != string(newName) {
		fs.nodes.moved(in.Newdir, newName, 0, nil)
		fs.nodes.moved(in.NodeId, oldName, in.Newdir, newName)
	}
	return 0
}

// Create implements fsbackend.Creater.
func (fs *FS) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	var p ref
	if errno := fs.useDir(in.NodeId, name, &p); errno != 0 {
		return errno
	}
	defer fs.put(&p)
	flags := fs.openFlags(in.Flags)
	mode := fs.masked(&p, in.Mode&permBits, in.Umask)
	// What exists may vanish before it is opened, and what does not may come: then it starts over.
	for range 8 {
		var d disguise
		if errno := fs.actAs(c, &d); errno != 0 {
			return errno
		}
		fd, errno := sys.Openat2(p.fd, name.CString(), uint64(flags|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW), mode, resolveFlags)
		if errno = fs.stopActing(&d, errno); errno == 0 {
			if errno = fs.label(c, fd); errno != 0 {
				_ = sys.Unlinkat(p.fd, name.CString(), 0)
				_ = unix.Close(fd)
				return errno
			}
			return fs.created(&p, in.NodeId, name, fd, flags, out)
		}
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		switch {
		case moving(errno):
			continue
		case errno != unix.EEXIST || in.Flags&unix.O_EXCL != 0:
			return limit(errno)
		}
		errno = fs.openExisting(&p, in, name, out)
		if errno != unix.ENOENT && errno != unix.ESTALE {
			return errno
		}
		if errno := fs.resolve(in.NodeId, &p); errno != 0 {
			p = noRef
			return errno
		}
	}
	return unix.ENOENT
}

// created makes a node and a handle of the file just created: its descriptor is the handle's, and serves as the node's
// while it is open.
func (fs *FS) created(p *ref, parent uint64, name []byte, fd, flags int, out *fuseproto.CreateOut) errno {
	var st unix.Statx_t
	errno := sys.Statx(fd, nil, statxFlags, statxMask, &st)
	if errno == 0 {
		errno = fs.enter(p, parent, name, &st, -1, -1, &out.EntryOut)
	}
	if errno != 0 {
		_ = unix.Close(fd)
		return errno
	}
	if out.Fh, errno = fs.openHandle(out.NodeId, fd, uint32(flags), false); errno != 0 {
		fs.Forget(out.NodeId, 1)
	}
	return errno
}

// openExisting opens a file that CREATE found to exist, as the daemon, like OPEN. It lets go of p.
func (fs *FS) openExisting(p *ref, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) errno {
	errno := fs.lookup(p, in.NodeId, name, &out.EntryOut)
	fs.letGo(p)
	if errno != 0 {
		return errno
	}
	fh, errno := fs.openNode(out.NodeId, in.Flags, in.OpenFlags)
	if errno != 0 {
		fs.Forget(out.NodeId, 1)
		out.EntryOut = fuseproto.EntryOut{}
		return errno
	}
	out.Fh = fh
	return 0
}

// Tmpfile implements fsbackend.Tmpfiler.
func (fs *FS) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) fsbackend.Errno {
	var p ref
	if errno := fs.resolve(in.NodeId, &p); errno != 0 {
		return errno
	}
	defer fs.put(&p)
	if p.typ != typeDir {
		return unix.ENOTDIR
	}
	flags := fs.openFlags(in.Flags) &^ unix.O_TRUNC
	if in.Flags&unix.O_EXCL != 0 {
		flags |= unix.O_EXCL // never to be linked
	}
	mode := fs.masked(&p, in.Mode&permBits, in.Umask)
	var d disguise
	if errno := fs.actAs(c, &d); errno != 0 {
		return errno
	}
	fd, errno := sys.OpenTmpfile(p.fd, flags|unix.O_TMPFILE, mode)
	if errno = fs.stopActing(&d, errno); errno == 0 {
		errno = fs.label(c, fd)
	}
	if errno != 0 {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return limit(errno)
	}
	return fs.created(&p, in.NodeId, nil, fd, flags, out)
}

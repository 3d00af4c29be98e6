package passthrough

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

const (
	statxMask  = unix.STATX_BASIC_STATS | unix.STATX_BTIME | unix.STATX_MNT_ID
	statxFlags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_STATX_SYNC_AS_STAT

	statxSyncType = unix.AT_STATX_FORCE_SYNC | unix.AT_STATX_DONT_SYNC

	privBits = unix.S_ISUID | unix.S_ISGID
)

// fillAttr translates st; rdev is the kernel's 32-bit form.
func fillAttr(a *fuseproto.Attr, st *unix.Statx_t) {
	*a = fuseproto.Attr{
		Ino: st.Ino, Size: st.Size, Blocks: st.Blocks,
		Atime: uint64(st.Atime.Sec), Atimensec: st.Atime.Nsec,
		Mtime: uint64(st.Mtime.Sec), Mtimensec: st.Mtime.Nsec,
		Ctime: uint64(st.Ctime.Sec), Ctimensec: st.Ctime.Nsec,
		Mode: uint32(st.Mode), Nlink: st.Nlink,
		Rdev:    uint32(unix.Mkdev(st.Rdev_major, st.Rdev_minor)),
		Blksize: st.Blksize,
	}
	a.Uid, a.Gid = st.Uid, st.Gid
}

// fillStat is fillAttr for a file that is open: what identifies it is known, and fstat(2) costs less than statx(2). The kernel gives
// st.Rdev in its 32-bit form.
func fillStat(a *fuseproto.Attr, st *unix.Stat_t) {
	*a = fuseproto.Attr{
		Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks),
		Atime: uint64(st.Atim.Sec), Atimensec: uint32(st.Atim.Nsec),
		Mtime: uint64(st.Mtim.Sec), Mtimensec: uint32(st.Mtim.Nsec),
		Ctime: uint64(st.Ctim.Sec), Ctimensec: uint32(st.Ctim.Nsec),
		Mode: st.Mode, Nlink: uint32(st.Nlink),
		Rdev:    uint32(st.Rdev),
		Blksize: uint32(st.Blksize),
	}
	a.Uid, a.Gid = st.Uid, st.Gid
}

// useFile returns a descriptor of node: of its handle fh where there is one.
func (fs *FS) useFile(node, fh uint64, hasFh bool, r *ref) errno {
	if !hasFh || fh == 0 && fs.withoutOpen(noOpenFlags) {
		return fs.resolve(node, r)
	}
	h := fs.handles.get(fh, node)
	if h == nil {
		return unix.EBADF
	}
	*r = ref{fd: int(h.fd), slot: -1, h: h, typ: typeRegular, privs: privSet}
	if !fs.fixed(node) {
		s, n := fs.nodes.lock(node)
		if n != nil {
			r.mount, r.privs = n.mount, n.privs
		}
		s.mu.Unlock()
	}
	if h.dir {
		r.typ = typeDir
	}
	return 0
}

// stat looks at the file behind r, a descriptor of node.
func (fs *FS) stat(r *ref, node uint64, st *unix.Stat_t) errno {
	var errno errno
	if fs.mounts.at(r.mount).local.Load() {
		errno = sys.FstatAtOnce(r.fd, st)
	} else {
		errno = sys.Fstat(r.fd, st)
	}
	if errno == 0 && (st.Mode&privBits != 0) != r.privs.set() {
		if st.Mode&privBits == 0 {
			fs.privsGone(node, r.privs)
		} else {
			s, n := fs.nodes.lock(node)
			if n != nil {
				n.privs.seen(st.Mode)
			}
			s.mu.Unlock()
		}
	}
	return errno
}

// privs says whether a node had bits that a write has to clear when it was last seen. A look that began before they were set may
// end after, and must not make them forgotten: the bits above the lowest count the beginnings and ends of calls that set some.
type privs uint8

const (
	privSet   privs = 1
	privCount privs = 2
)

func (p privs) set() bool { return p&privSet != 0 }

// seen notes the bits in mode, if it has any.
func (p *privs) seen(mode uint32) {
	if mode&privBits != 0 {
		*p |= privSet
	}
}

// privsOf returns those of node: nobody but the guest sets such a bit without that the guest sees it soon, and a look at each write
// would cost as much again.
func (fs *FS) privsOf(node uint64) privs {
	s, n := fs.nodes.lock(node)
	defer s.mu.Unlock()
	if n == nil {
		return privSet
	}
	return n.privs
}

// privsGone notes that node had no such bits after since, unless some may have been set meanwhile.
func (fs *FS) privsGone(node uint64, since privs) {
	s, n := fs.nodes.lock(node)
	if n != nil && n.privs&^privSet == since&^privSet {
		n.privs &^= privSet
	}
	s.mu.Unlock()
}

// setsPrivs is called before and after a call that may set such bits on node.
func (fs *FS) setsPrivs(node uint64) {
	s, n := fs.nodes.lock(node)
	if n != nil {
		n.privs = (n.privs + privCount) | privSet
	}
	s.mu.Unlock()
}

// Getattr implements fsbackend.Backend.
func (fs *FS) Getattr(_ *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	var r ref
	if errno := fs.useFile(in.NodeId, in.Fh(), in.Flags()&fuseproto.FUSE_GETATTR_FH != 0, &r); errno != 0 {
		return errno
	}
	defer fs.put(&r)
	var st unix.Stat_t
	if errno := fs.stat(&r, in.NodeId, &st); errno != 0 {
		return errno
	}
	fillStat(&out.Attr, &st)
	return fsbackend.OK
}

// Statx implements fsbackend.Statxer.
func (fs *FS) Statx(_ *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) fsbackend.Errno {
	var r ref
	if errno := fs.useFile(in.NodeId, in.Fh, in.GetattrFlags&fuseproto.FUSE_GETATTR_FH != 0, &r); errno != 0 {
		return errno
	}
	defer fs.put(&r)
	var st unix.Statx_t
	// The basic attributes always come along: a guest refreshes its inode from them only where it has them all.
	flags := statxFlags | int(in.SxFlags)&statxSyncType
	if errno := sys.Statx(r.fd, nil, flags, statxMask, &st); errno != 0 {
		return errno
	}
	// What concerns the host's mounts says nothing to the guest.
	const attributes = unix.STATX_ATTR_COMPRESSED | unix.STATX_ATTR_IMMUTABLE | unix.STATX_ATTR_APPEND |
		unix.STATX_ATTR_NODUMP | unix.STATX_ATTR_ENCRYPTED | unix.STATX_ATTR_VERITY
	o := &out.Statx
	o.Mask = st.Mask & (unix.STATX_BASIC_STATS | unix.STATX_BTIME)
	o.Blksize, o.Nlink, o.Mode = st.Blksize, st.Nlink, st.Mode
	o.Uid, o.Gid = st.Uid, st.Gid
	o.Ino, o.Size, o.Blocks = st.Ino, st.Size, st.Blocks
	o.Attributes, o.AttributesMask = st.Attributes&attributes, st.Attributes_mask&attributes
	setTime(&o.Atime.Sec, &o.Atime.Nsec, &st.Atime)
	setTime(&o.Btime.Sec, &o.Btime.Nsec, &st.Btime)
	setTime(&o.Ctime.Sec, &o.Ctime.Nsec, &st.Ctime)
	setTime(&o.Mtime.Sec, &o.Mtime.Nsec, &st.Mtime)
	o.RdevMajor, o.RdevMinor = st.Rdev_major, st.Rdev_minor
	o.DevMajor, o.DevMinor = st.Dev_major, st.Dev_minor
	return fsbackend.OK
}

func setTime(sec *uint64, nsec *uint32, t *unix.StatxTimestamp) {
	*sec, *nsec = uint64(t.Sec), t.Nsec
}

// Setattr implements fsbackend.Setattrer. The order is mode, owner, size, times; an error leaves what came before it.
func (fs *FS) Setattr(_ *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	hasFh := in.Valid&fuseproto.FATTR_FH != 0
	var r ref
	if errno := fs.useFile(in.NodeId, in.Fh, hasFh, &r); errno != 0 {
		return errno
	}
	defer fs.put(&r)
	procfd := fs.procfd.Int()
	if in.Valid&fuseproto.FATTR_MODE != 0 {
		if in.Mode&privBits != 0 {
			fs.setsPrivs(in.NodeId)
		}
		errno := sys.ChmodFD(procfd, r.fd, in.Mode&0o7777)
		if in.Mode&privBits != 0 {
			fs.setsPrivs(in.NodeId)
		}
		if errno != 0 {
			return errno
		}
	}
	if in.Valid&(fuseproto.FATTR_UID|fuseproto.FATTR_GID) != 0 {
		uid, gid := invalidID, invalidID
		if in.Valid&fuseproto.FATTR_UID != 0 {
			uid = in.Uid
		}
		if in.Valid&fuseproto.FATTR_GID != 0 {
			gid = in.Gid
		}
		if errno := sys.ChownFD(r.fd, uid, gid); errno != 0 {
			return errno
		}
	}
	if in.Valid&fuseproto.FATTR_SIZE != 0 {
		var errno errno
		if in.Valid&fuseproto.FATTR_KILL_SUIDGID != 0 {
			errno = withoutFsetid(func() syscall.Errno { return fs.truncate(&r, in.Size) })
		} else {
			errno = fs.truncate(&r, in.Size)
		}
		if errno != 0 {
			return errno
		}
	}
	if in.Valid&(fuseproto.FATTR_ATIME|fuseproto.FATTR_MTIME) != 0 {
		times := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
		setUtime(&times[0], in.Valid, fuseproto.FATTR_ATIME, fuseproto.FATTR_ATIME_NOW, in.Atime, in.Atimensec)
		setUtime(&times[1], in.Valid, fuseproto.FATTR_MTIME, fuseproto.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec)
		if errno := sys.UtimensFD(procfd, r.fd, &times); errno != 0 {
			return errno
		}
	}
	var st unix.Stat_t
	if errno := fs.stat(&r, in.NodeId, &st); errno != 0 {
		return errno
	}
	fillStat(&out.Attr, &st)
	return fsbackend.OK
}

func setUtime(ts *unix.Timespec, valid, set, now uint32, sec uint64, nsec uint32) {
	switch {
	case valid&now != 0:
		ts.Nsec = unix.UTIME_NOW
	case valid&set != 0:
		ts.Sec, ts.Nsec = int64(sec), int64(nsec)
	}
}

// truncate sets the size of the file behind r, whose descriptor may be no good for it.
func (fs *FS) truncate(r *ref, size uint64) errno {
	if r.typ == typeDir {
		return unix.EISDIR
	}
	if r.typ != typeRegular || int64(size) < 0 {
		return unix.EINVAL
	}
	if r.h != nil && r.h.flags&unix.O_ACCMODE != unix.O_RDONLY {
		return sys.Ftruncate(r.fd, int64(size))
	}
	fd, errno := sys.Reopen(fs.procfd.Int(), r.fd, unix.O_WRONLY|unix.O_CLOEXEC)
	if errno != 0 {
		return limit(errno)
	}
	errno = sys.Ftruncate(fd, int64(size))
	_ = unix.Close(fd)
	return errno
}

// Statfs implements fsbackend.StatFSer.
func (fs *FS) Statfs(_ *fsbackend.Context, node uint64, out *fuseproto.StatfsOut) fsbackend.Errno {
	var r ref
	if errno := fs.resolve(node, &r); errno != 0 {
		return errno
	}
	defer fs.put(&r)
	var st unix.Statfs_t
	if err := unix.Fstatfs(r.fd, &st); err != nil {
		return toErrno(err)
	}
	*out = fuseproto.StatfsOut{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), NameLen: uint32(st.Namelen), Frsize: uint32(st.Frsize),
	}
	return fsbackend.OK
}

// toErrno returns the errno that err is.
func toErrno(err error) errno {
	if e, ok := err.(errno); ok {
		return e
	}
	return unix.EIO
}

// Access implements fsbackend.Accesser: by the mode bits and the caller's ids. Linux never asks (default_permissions).
func (fs *FS) Access(c *fsbackend.Context, in *fuseproto.AccessIn) fsbackend.Errno {
	var r ref
	if errno := fs.resolve(in.NodeId, &r); errno != 0 {
		return errno
	}
	defer fs.put(&r)
	var st unix.Stat_t
	if errno := fs.stat(&r, in.NodeId, &st); errno != 0 {
		return errno
	}
	const readWriteExec = unix.R_OK | unix.W_OK | unix.X_OK
	want := in.Mask & readWriteExec
	mode := st.Mode
	if c.Caller.Uid == 0 {
		// Root may everything but execute what nobody may.
		if want&unix.X_OK != 0 && mode&0o111 == 0 && r.typ != typeDir {
			return unix.EACCES
		}
		return fsbackend.OK
	}
	have := mode
	switch {
	case c.Caller.Uid == st.Uid:
		have = mode >> 6
	case c.Caller.Gid == st.Gid || containsID(c.SuppGroups, st.Gid):
		have = mode >> 3
	}
	if want&^have != 0 {
		return unix.EACCES
	}
	return fsbackend.OK
}

func containsID(ids []uint32, id uint32) bool {
	for _, have := range ids {
		if have == id {
			return true
		}
	}
	return false
}

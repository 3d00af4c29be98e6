package share

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Getattr implements fsbackend.Backend.
func (s *Share) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	if r := s.replay.Load(); r != nil {
		return r.getattr(c, in, out)
	}
	return s.getattr(c, in, out)
}

// getattr is Getattr of what is not part of a replay.
func (s *Share) getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	p, errno := s.at(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	fh := in.Fh_
	if in.Flags_&fuseproto.FUSE_GETATTR_FH != 0 {
		if fh>>indexShift != in.NodeId>>indexShift {
			return unix.EBADF
		}
		in.Fh_ &= numberMask
	}
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.Getattr(c, in, out)
	p.leave(c, &in.InHeader, &v)
	in.Fh_ = fh
	return p.attrs(in.NodeId, out, errno)
}

// attrs makes the guest's attributes of those that a call has answered errno with.
func (p *part) attrs(node uint64, out *fuseproto.AttrOut, errno Errno) Errno {
	if errno != fsbackend.OK {
		return errno
	}
	p.attr(&out.Attr)
	p.policy.Load().fill(&out.AttrValid, &out.AttrValidNsec)
	if p.info.Isolated && node&numberMask == fuseproto.FUSE_ROOT_ID {
		p.seen.Lock()
		p.seen.Attr = out.Attr
		p.seen.Unlock()
	}
	return fsbackend.OK
}

// Setattr implements fsbackend.Setattrer.
func (s *Share) Setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) Errno {
	if errno, ok := s.replay.Load().setattr(c, in, out); ok {
		return errno
	}
	p, errno := s.atToChange(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	fh := in.Fh
	if in.Valid&fuseproto.FATTR_FH != 0 && fh>>indexShift != in.NodeId>>indexShift {
		return unix.EBADF
	}
	if p.Setattrer == nil {
		return s.lacks(unix.EPERM)
	}
	owner, mode := in.Owner, in.Mode
	if p.mapped {
		uid, hasUID := p.uids.host(owner.Uid)
		gid, hasGID := p.gids.host(owner.Gid)
		if in.Valid&fuseproto.FATTR_UID != 0 && !hasUID || in.Valid&fuseproto.FATTR_GID != 0 && !hasGID {
			return unix.EOVERFLOW
		}
		in.Owner.Uid, in.Owner.Gid = uid, gid
	}
	r := s.replay.Load()
	kinds := ownContent
	if in.Valid&fuseproto.FATTR_SIZE == 0 {
		kinds = ownAttrs | r.ownBefore(c, in.NodeId)
	}
	if in.Valid&fuseproto.FATTR_FH != 0 {
		in.Fh &= numberMask
	}
	var v visit
	p.enter(c, &in.InHeader, &v)
	if errno = p.chmod(c, in); errno == fsbackend.OK {
		errno = p.setattr(c, in, out)
	}
	p.leave(c, &in.InHeader, &v)
	in.Fh, in.Owner, in.Mode = fh, owner, mode
	return r.ownChanged(c, in.NodeId, kinds, p.attrs(in.NodeId, out, s.known(errno, unix.EPERM)))
}

// setattr is the backend's; only what changes the size is metered.
func (p *part) setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) Errno {
	if in.Valid&fuseproto.FATTR_SIZE == 0 {
		return p.Setattr(c, in, out)
	}
	f := file{in.NodeId, in.Fh, in.Valid&fuseproto.FATTR_FH != 0}
	return p.change(c, f, nothing, func() Errno { return p.Setattr(c, in, out) })
}

// chmod makes the mode in a SETATTR the backend's: the guest can neither see nor change the execute bits of a graft without.
// What has its bits hidden by NoSUID, and is given a mode, has them no longer, as with any chmod that does not name them.
func (p *part) chmod(c *fsbackend.Context, in *fuseproto.SetattrIn) Errno {
	policy := p.policy.Load()
	if in.Valid&fuseproto.FATTR_MODE == 0 || !policy.NoExec && !p.noSUID(policy) {
		return fsbackend.OK
	}
	var out fuseproto.AttrOut
	if errno := p.Getattr(c, &fuseproto.GetattrIn{InHeader: in.InHeader}, &out); errno != fsbackend.OK {
		return errno
	}
	typ := out.Mode & unix.S_IFMT
	in.Mode = p.created(in.Mode, typ)
	if policy.NoExec && typ == unix.S_IFREG {
		in.Mode |= out.Mode & execBits
	}
	return fsbackend.OK
}

// Statx implements fsbackend.Statxer.
func (s *Share) Statx(c *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) Errno {
	p, errno := s.at(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	fh, hasFh := in.Fh, in.GetattrFlags&fuseproto.FUSE_GETATTR_FH != 0
	if hasFh && fh>>indexShift != in.NodeId>>indexShift {
		return unix.EBADF
	}
	if p.Statxer == nil {
		if s.alone {
			return unix.ENOSYS
		}
		return s.statx(c, in, out)
	}
	if hasFh {
		in.Fh &= numberMask
	}
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.Statx(c, in, out)
	p.leave(c, &in.InHeader, &v)
	in.Fh = fh
	if errno == unix.ENOSYS && !s.alone {
		return s.statx(c, in, out)
	}
	if errno != fsbackend.OK {
		return errno
	}
	out.Ino = p.ino(out.Ino)
	if p.mapped {
		out.Uid, out.Gid = p.uids.guest(out.Uid), p.gids.guest(out.Gid)
	}
	policy := p.policy.Load()
	policy.fill(&out.AttrValid, &out.AttrValidNsec)
	mode := uint32(out.Mode)
	out.Mode = uint16(p.shownMode(mode))
	if policy.NoDev && isDevice(mode, unixDev(out.RdevMajor, out.RdevMinor)) {
		out.RdevMajor, out.RdevMinor = 0, noDevice
	}
	return fsbackend.OK
}

// statx makes a STATX of a GETATTR: there is no birth time in it.
func (s *Share) statx(c *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) Errno {
	var o fuseproto.AttrOut
	errno := s.Getattr(c, &fuseproto.GetattrIn{InHeader: in.InHeader, Flags_: in.GetattrFlags, Fh_: in.Fh}, &o)
	if errno != fsbackend.OK {
		return errno
	}
	out.AttrValid, out.AttrValidNsec = o.AttrValid, o.AttrValidNsec
	a, x := &o.Attr, &out.Statx
	x.Mask = unix.STATX_BASIC_STATS
	x.Blksize, x.Nlink, x.Mode, x.Uid, x.Gid = a.Blksize, a.Nlink, uint16(a.Mode), a.Uid, a.Gid
	x.Ino, x.Size, x.Blocks = a.Ino, a.Size, a.Blocks
	x.Atime.Sec, x.Atime.Nsec = a.Atime, a.Atimensec
	x.Mtime.Sec, x.Mtime.Nsec = a.Mtime, a.Mtimensec
	x.Ctime.Sec, x.Ctime.Nsec = a.Ctime, a.Ctimensec
	x.RdevMajor, x.RdevMinor = unix.Major(uint64(a.Rdev)), unix.Minor(uint64(a.Rdev))
	return fsbackend.OK
}

// Statfs implements fsbackend.StatFSer.
func (s *Share) Statfs(c *fsbackend.Context, node uint64, out *fuseproto.StatfsOut) Errno {
	p, errno := s.at(c, node)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	q := p.metered()
	if p.StatFSer == nil {
		out.Bsize, out.Frsize, out.NameLen = 4096, 4096, unix.NAME_MAX
	} else {
		var v visit
		p.enterNode(c, &v)
		errno = p.Statfs(c, node&numberMask, out)
		p.leaveNode(c, &v)
	}
	if errno == fsbackend.OK && q != nil {
		q.statfs(out, p.StatFSer != nil)
	}
	return errno
}

// Access implements fsbackend.Accesser.
func (s *Share) Access(c *fsbackend.Context, in *fuseproto.AccessIn) Errno {
	p, errno := s.at(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	if p.Accesser == nil && s.alone {
		return unix.ENOSYS
	}
	if p.policy.Load().ReadOnly && in.Mask&unix.W_OK != 0 {
		return unix.EROFS
	}
	if p.Accesser == nil {
		return fsbackend.OK
	}
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.Access(c, in)
	p.leave(c, &in.InHeader, &v)
	return s.known(errno, fsbackend.OK)
}

// Readlink implements fsbackend.Readlinker.
func (s *Share) Readlink(c *fsbackend.Context, node uint64, dst *fsbackend.Sink) Errno {
	p, errno := s.at(c, node)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	if p.Readlinker == nil {
		return s.lacks(unix.EINVAL)
	}
	if p.policy.Load().NoSymfollow {
		return unix.ELOOP
	}
	var v visit
	p.enterNode(c, &v)
	errno = p.Readlink(c, node&numberMask, dst)
	p.leaveNode(c, &v)
	return s.known(errno, unix.EINVAL)
}

// unixDev is a device number as fuse_attr has it, as far as isDevice needs it.
func unixDev(major, minor uint32) uint32 { return major | minor }

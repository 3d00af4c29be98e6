package share

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// makeIn returns the part of the directory that name is to be made in; part.doneChange ends the call.
func (s *Share) makeIn(c *fsbackend.Context, dir uint64, name fsbackend.Name) (*part, Errno) {
	p, errno := s.directoryToChange(c, dir)
	switch {
	case errno != fsbackend.OK:
		return nil, errno
	case p.onWay(dir, name) != nil:
		errno = unix.EEXIST
	default:
		errno = p.mayCreate(c)
	}
	if errno != fsbackend.OK {
		p.doneChange(c)
		return nil, errno
	}
	return p, fsbackend.OK
}

// Mknod implements fsbackend.Maker.
func (s *Share) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	if errno, ok := s.replay.Load().mknod(c, in, name, out); ok {
		return errno
	}
	p, errno := s.makeIn(c, in.NodeId, name)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	if p.Maker == nil {
		return s.lacks(unix.EPERM)
	}
	if p.policy.Load().NoDev && isDevice(in.Mode, in.Rdev) {
		return unix.EPERM
	}
	mode := in.Mode
	if mode&unix.S_IFMT == unix.S_IFREG || mode&unix.S_IFMT == 0 {
		in.Mode = p.created(mode, unix.S_IFREG)
	}
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.create(c, in.NodeId, name, 0, out, func() Errno { return p.Mknod(c, in, name, out) })
	p.leave(c, &in.InHeader, &v)
	in.Mode = mode
	return s.replay.Load().ownMade(in.NodeId, name, out, s.entry(p, out, s.known(errno, unix.EPERM)))
}

// Mkdir implements fsbackend.Maker.
func (s *Share) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	if errno, ok := s.replay.Load().make(c, in.NodeId, name, unix.S_IFDIR, out); ok {
		return errno
	}
	p, errno := s.makeIn(c, in.NodeId, name)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	if p.Maker == nil {
		return s.lacks(unix.EPERM)
	}
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.create(c, in.NodeId, name, 0, out, func() Errno { return p.Mkdir(c, in, name, out) })
	p.leave(c, &in.InHeader, &v)
	return s.replay.Load().ownMade(in.NodeId, name, out, s.entry(p, out, s.known(errno, unix.EPERM)))
}

// Symlink implements fsbackend.Maker.
func (s *Share) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) Errno {
	if errno, ok := s.replay.Load().make(c, parent, name, unix.S_IFLNK, out); ok {
		return errno
	}
	p, errno := s.makeIn(c, parent, name)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	if p.Maker == nil {
		return s.lacks(unix.EPERM)
	}
	var v visit
	p.enterNode(c, &v)
	errno = p.create(c, parent&numberMask, name, blockSize, out, func() Errno { return p.Symlink(c, parent&numberMask, name, target, out) })
	p.leaveNode(c, &v)
	return s.replay.Load().ownMade(parent, name, out, s.entry(p, out, s.known(errno, unix.EPERM)))
}

// Link implements fsbackend.Linker.
func (s *Share) Link(c *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	if errno := s.exists((*Share).at, in.Oldnodeid); errno != fsbackend.OK {
		return errno
	}
	if errno := s.exists((*Share).at, in.NodeId); errno != fsbackend.OK {
		return errno
	}
	if in.Oldnodeid>>indexShift != in.NodeId>>indexShift {
		return unix.EXDEV
	}
	p, errno := s.makeIn(c, in.NodeId, name)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	if p.Linker == nil {
		return s.lacks(unix.EPERM)
	}
	old, r := in.Oldnodeid, s.replay.Load()
	kinds := r.ownBefore(c, old)
	in.Oldnodeid &= numberMask
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.link(c, in.Oldnodeid, func() Errno { return p.Link(c, in, name, out) })
	p.leave(c, &in.InHeader, &v)
	in.Oldnodeid = old
	r.ownChanged(c, old, kinds, errno)
	return r.ownMade(in.NodeId, name, out, s.entry(p, out, s.known(errno, unix.EPERM)))
}

// removeFrom returns the part of the directory that name is to be removed from; part.doneChange ends the call.
func (s *Share) removeFrom(c *fsbackend.Context, dir uint64, name fsbackend.Name) (*part, Errno) {
	p, errno := s.directoryToChange(c, dir)
	switch {
	case errno != fsbackend.OK:
		return nil, errno
	case p.onWay(dir, name) != nil:
		errno = unix.EBUSY
	case p.Remover == nil:
		errno = s.lacks(unix.EPERM)
	default:
		return p, fsbackend.OK
	}
	p.doneChange(c)
	return nil, errno
}

// Unlink implements fsbackend.Remover.
func (s *Share) Unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name) Errno {
	if errno, ok := s.replay.Load().remove(c, parent, name); ok {
		return errno
	}
	p, errno := s.removeFrom(c, parent, name)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	r := s.replay.Load()
	other := r.ownLinked(parent, name) // if it has another name
	kinds := r.ownBefore(c, other)
	var v visit
	p.enterNode(c, &v)
	errno = p.unlink(c, parent&numberMask, name, func() Errno { return p.Unlink(c, parent&numberMask, name) })
	p.leaveNode(c, &v)
	r.ownChanged(c, other, kinds, errno)
	return r.ownRemoved(parent, name, s.known(errno, unix.EPERM))
}

// Rmdir implements fsbackend.Remover.
func (s *Share) Rmdir(c *fsbackend.Context, parent uint64, name fsbackend.Name) Errno {
	if errno, ok := s.replay.Load().remove(c, parent, name); ok {
		return errno
	}
	p, errno := s.removeFrom(c, parent, name)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	var v visit
	p.enterNode(c, &v)
	errno = p.unlink(c, parent&numberMask, name, func() Errno { return p.Rmdir(c, parent&numberMask, name) })
	p.leaveNode(c, &v)
	return s.replay.Load().ownRemoved(parent, name, s.known(errno, unix.EPERM))
}

// rename is the backend's; it may be the end of what newName was, and makes a file of its own with RENAME_WHITEOUT.
func (p *part) rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) Errno {
	rename := func() Errno { return p.Rename(c, in, oldName, newName) }
	q := p.metered()
	if q == nil {
		return rename()
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	q.names.Lock()
	defer q.names.Unlock()
	over := func() Errno { return q.unlink(c, in.Newdir, newName, rename) }
	switch {
	case in.Flags&unix.RENAME_EXCHANGE != 0:
		return rename()
	case in.Flags&unix.RENAME_WHITEOUT != 0:
		return q.create(0, nil, false, over)
	}
	return over()
}

// Rename implements fsbackend.Renamer.
func (s *Share) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) Errno {
	if errno, ok := s.replay.Load().rename(c, in, oldName, newName); ok {
		return errno
	}
	p, errno := s.directory(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	if errno := s.exists((*Share).directory, in.Newdir); errno != fsbackend.OK {
		return errno
	}
	switch {
	case in.NodeId>>indexShift != in.Newdir>>indexShift:
		return unix.EXDEV
	case !p.beginChange(c):
		return unix.EROFS
	}
	defer p.endChange(c)
	switch {
	case p.onWay(in.NodeId, oldName) != nil:
		return unix.EBUSY
	case p.onWay(in.Newdir, newName) != nil:
		if in.Flags&unix.RENAME_NOREPLACE != 0 {
			return unix.EEXIST
		}
		return unix.EBUSY
	case p.Renamer == nil:
		return s.lacks(unix.EPERM)
	}
	if in.Flags&unix.RENAME_WHITEOUT != 0 {
		if errno := p.mayCreate(c); errno != fsbackend.OK {
			return errno
		}
	}
	newdir, r := in.Newdir, s.replay.Load()
	moved := r.ownLinked(in.NodeId, oldName)
	kinds := r.ownBefore(c, moved)
	in.Newdir &= numberMask
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.rename(c, in, oldName, newName)
	p.leave(c, &in.InHeader, &v)
	in.Newdir = newdir
	r.ownChanged(c, moved, kinds, errno)
	r.ownMoved(in, oldName, newName, errno)
	if in.Flags != 0 {
		return s.known(errno, unix.EINVAL) // as Linux makes of ENOSYS (fs/fuse/dir.c, fuse_rename2)
	}
	return s.known(errno, unix.EPERM)
}

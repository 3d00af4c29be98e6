package share

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Open implements fsbackend.Opener.
func (s *Share) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	if errno, ok := s.replay.Load().open(c, in, out); ok {
		return errno
	}
	p, errno := s.named(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	switch {
	case p.Opener == nil && s.noOpen.Load():
		return unix.ENOSYS // agreed on only where there is nothing but the root
	case fsbackend.OpensForWriting(in.Flags):
		if !p.beginChange(c) {
			return unix.EROFS
		}
		defer p.endChange(c)
	}
	policy := p.policy.Load()
	errno = fsbackend.OK
	if p.Opener != nil {
		var v visit
		p.enter(c, &in.InHeader, &v)
		if errno = p.refuseDevice(c, policy, in); errno == fsbackend.OK {
			errno = s.known(p.open(c, in, out), fsbackend.OK)
		}
		p.leave(c, &in.InHeader, &v)
	}
	if errno = s.handle(p, &out.Fh, errno); errno == fsbackend.OK {
		p.opened(in.NodeId & numberMask)
		policy.open(out, fsbackend.CachePolicy.FileFlags)
		if in.Flags&unix.O_TRUNC != 0 {
			s.replay.Load().ownChanged(c, in.NodeId, ownContent, errno)
		}
	}
	return errno
}

// open is the backend's; what makes the file empty is metered.
func (p *part) open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	if in.Flags&unix.O_TRUNC == 0 {
		return p.Open(c, in, out)
	}
	return p.change(c, file{node: in.NodeId}, nothing, func() Errno { return p.Open(c, in, out) })
}

// refuseDevice answers EACCES to OPEN of a device where there are to be none. Linux does not ask: it opens its own.
func (p *part) refuseDevice(c *fsbackend.Context, policy *Policy, in *fuseproto.OpenIn) Errno {
	if !policy.NoDev {
		return fsbackend.OK
	}
	var out fuseproto.AttrOut
	errno := p.Getattr(c, &fuseproto.GetattrIn{InHeader: in.InHeader}, &out)
	if errno == fsbackend.OK && isDevice(out.Mode, out.Rdev) {
		return unix.EACCES
	}
	return errno
}

// Release implements fsbackend.Opener.
func (s *Share) Release(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return
	}
	defer p.done(c)
	defer func() {
		p.released(in.NodeId & numberMask)
		if q := p.metered(); q != nil {
			q.reap(in.NodeId & numberMask)
		}
	}()
	if p.Opener == nil {
		return
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	p.release(c, in)
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
}

// release is the backend's. File systems give back then what they have set aside for more writes.
func (p *part) release(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	q := p.metered()
	if q == nil || !c.MayBlock {
		p.Release(c, in)
		return
	}
	f := file{in.NodeId, in.Fh, true}
	if _, errno := q.begin(c, f, nothing); errno != fsbackend.OK {
		p.Release(c, in)
		return
	}
	defer q.end(c, file{node: in.NodeId}, 0)
	p.Release(c, in)
}

// Create implements fsbackend.Creater.
func (s *Share) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) Errno {
	if errno, ok := s.replay.Load().create(c, in, name, out); ok {
		return errno
	}
	p, errno := s.directoryToChange(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	if pos := p.onWay(in.NodeId, name); pos != nil {
		return s.createPosition(c, in, pos, out)
	}
	if errno := p.mayCreate(c); errno != fsbackend.OK {
		return errno
	}
	if p.Creater == nil {
		if s.alone {
			return unix.ENOSYS
		}
		return s.make(c, in, name, out)
	}
	mode := in.Mode
	in.Mode = p.created(mode, unix.S_IFREG)
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.create(c, in.NodeId, name, 0, &out.EntryOut, func() Errno { return p.Create(c, in, name, out) })
	p.leave(c, &in.InHeader, &v)
	in.Mode = mode
	if errno == unix.ENOSYS && !s.alone {
		return s.make(c, in, name, out)
	}
	return s.replay.Load().ownMade(in.NodeId, name, &out.EntryOut, s.created(p, out, errno))
}

// created makes the guest's numbers of those that a call has answered errno with.
func (s *Share) created(p *part, out *fuseproto.CreateOut, errno Errno) Errno {
	if errno = s.entry(p, &out.EntryOut, errno); errno != fsbackend.OK {
		return errno
	}
	if errno = s.handle(p, &out.Fh, errno); errno == fsbackend.OK {
		p.opened(out.NodeId & numberMask)
		p.policy.Load().open(&out.OpenOut, fsbackend.CachePolicy.FileFlags)
	}
	return errno
}

// createPosition is CREATE of a name that is taken by pos: at most, a file is opened. It is what a guest asks that has
// not seen the file, when it was not there yet.
func (s *Share) createPosition(c *fsbackend.Context, in *fuseproto.CreateIn, pos *position, out *fuseproto.CreateOut) Errno {
	g := pos.graft.Load()
	switch {
	case in.Flags&unix.O_EXCL != 0:
		return unix.EEXIST
	case g == nil || g.file == nil:
		return unix.EISDIR
	case !g.enterCall(c):
		return g.absence()
	}
	defer g.done(c)
	switch {
	case g.leaving.Load():
		return g.absence()
	case g.dead.Load():
		return unix.EIO
	case g.policy.Load().ReadOnly && fsbackend.OpensForWriting(in.Flags):
		return unix.EROFS
	case !c.MayBlock:
		return fsbackend.ErrMayBlock // two calls cannot both be without effect
	}
	if !g.info.Isolated {
		g.begin()
		defer g.end()
		defer func(p *fsbackend.Part) { c.Part = p }(c.Part)
		c.Part = nil // this part is another one
		return s.openFile(c, g, in, out)
	}
	own, opened := *in, new(fuseproto.CreateOut)
	errno := s.across(c, g, func(c *fsbackend.Context) Errno {
		return s.openFile(c, g, &own, opened)
	}, func() {
		s.Release(new(fsbackend.Context), &fuseproto.ReleaseIn{InHeader: fuseproto.InHeader{NodeId: opened.NodeId}, Fh: opened.Fh})
		s.Forget(opened.NodeId, 1)
	})
	if errno == fsbackend.OK {
		*out = *opened
	}
	return errno
}

// openFile looks the one file of g up and opens it.
func (s *Share) openFile(c *fsbackend.Context, g *part, in *fuseproto.CreateIn, out *fuseproto.CreateOut) Errno {
	errno := s.entry(g, &out.EntryOut, g.findFile(c, &out.EntryOut))
	if errno != fsbackend.OK {
		return errno
	}
	if out.NodeId == 0 {
		return unix.ENOENT
	}
	return s.openFound(c, in, out)
}

// openFound opens what a call has found and counted a lookup of, or takes that back.
func (s *Share) openFound(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) Errno {
	open := &fuseproto.OpenIn{InHeader: in.InHeader, Flags: in.Flags &^ (unix.O_CREAT | unix.O_EXCL | unix.O_NOCTTY), Mode: in.OpenFlags}
	open.NodeId = out.NodeId
	errno := s.Open(c, open, &out.OpenOut)
	if errno != fsbackend.OK {
		s.Forget(out.NodeId, 1)
		out.EntryOut = fuseproto.EntryOut{}
	}
	return errno
}

// make is CREATE for a part without a Creater.
func (s *Share) make(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) Errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock // two calls cannot both be without effect
	}
	mknod := &fuseproto.MknodIn{InHeader: in.InHeader, Mode: in.Mode&^unix.S_IFMT | unix.S_IFREG, Umask: in.Umask}
	errno := s.Mknod(c, mknod, name, &out.EntryOut)
	if errno == unix.EEXIST && in.Flags&unix.O_EXCL == 0 {
		if errno = s.Lookup(c, in.NodeId, name, &out.EntryOut); errno != fsbackend.OK {
			return errno
		}
		switch {
		case out.NodeId == 0:
			return unix.ENOENT
		case out.Mode&unix.S_IFMT == unix.S_IFDIR:
			s.Forget(out.NodeId, 1)
			return unix.EISDIR
		}
		return s.openFound(c, in, out)
	}
	if errno != fsbackend.OK {
		return errno
	}
	if errno = s.openFound(c, in, out); errno != fsbackend.OK {
		_ = s.Unlink(c, in.NodeId, name)
	}
	return errno
}

// Tmpfile implements fsbackend.Tmpfiler.
func (s *Share) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) Errno {
	p, errno := s.directoryToChange(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	if p.Tmpfiler == nil {
		return s.lacks(unix.EOPNOTSUPP)
	}
	if errno := p.mayCreate(c); errno != fsbackend.OK {
		return errno
	}
	mode := in.Mode
	in.Mode = p.created(mode, unix.S_IFREG)
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.create(c, in.NodeId, nil, 0, &out.EntryOut, func() Errno { return p.Tmpfile(c, in, out) })
	p.leave(c, &in.InHeader, &v)
	in.Mode = mode
	return s.created(p, out, s.known(errno, unix.EOPNOTSUPP))
}

// Read implements fsbackend.Reader.
func (s *Share) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) Errno {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	if p.Reader == nil {
		return s.lacks(unix.EINVAL)
	}
	fh := in.Fh
	in.Fh &= numberMask
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.Read(c, in, dst)
	p.leave(c, &in.InHeader, &v)
	in.Fh = fh
	return s.known(errno, unix.EINVAL)
}

// Write implements fsbackend.Writer.
func (s *Share) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, Errno) {
	p, errno := s.openedToChange(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return 0, errno
	}
	defer p.doneChange(c)
	if p.Writer == nil {
		return 0, s.lacks(unix.EINVAL)
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	var n uint32
	errno = p.change(c, file{in.NodeId, in.Fh, true}, func(a *fuseproto.Attr) int64 {
		off := in.Offset
		if in.Flags&unix.O_APPEND != 0 {
			off = max(off, a.Size)
		}
		return growth(a, off, uint64(in.Size))
	}, func() (errno Errno) {
		n, errno = p.Write(c, in, src)
		return errno
	})
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
	return n, s.replay.Load().ownChanged(c, in.NodeId, ownContent, s.known(errno, unix.EINVAL))
}

// Flush implements fsbackend.Flusher.
func (s *Share) Flush(c *fsbackend.Context, in *fuseproto.FlushIn) Errno {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	if p.Flusher == nil {
		return s.lacks(fsbackend.OK)
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	errno = p.Flush(c, in)
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
	return s.known(errno, fsbackend.OK)
}

// Fsync implements fsbackend.Fsyncer.
func (s *Share) Fsync(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	return s.fsync(c, in, fsbackend.Fsyncer.Fsync)
}

// Fsyncdir implements fsbackend.Fsyncer.
func (s *Share) Fsyncdir(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	return s.fsync(c, in, fsbackend.Fsyncer.Fsyncdir)
}

func (s *Share) fsync(c *fsbackend.Context, in *fuseproto.FsyncIn, call func(fsbackend.Fsyncer, *fsbackend.Context, *fuseproto.FsyncIn) Errno) Errno {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	if p.Fsyncer == nil {
		return s.lacks(fsbackend.OK)
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	errno = call(p.Fsyncer, c, in)
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
	return s.known(errno, fsbackend.OK)
}

// Syncfs implements fsbackend.Syncfser. A guest that knows nothing of submounts has but one file system to write.
func (s *Share) Syncfs(c *fsbackend.Context, node uint64) Errno {
	p, errno := s.at(c, node)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	errno = s.syncfs(c, p, node)
	if node != fuseproto.FUSE_ROOT_ID || s.submounts.Load() {
		return errno
	}
	for _, other := range s.snapshot()[1:] {
		var one Errno
		if !other.enterCall(c) {
			continue
		}
		switch {
		case other.info.Isolated:
			one = s.across(c, other, func(c *fsbackend.Context) Errno {
				return s.syncfs(c, other, fuseproto.FUSE_ROOT_ID)
			}, func() {})
		case other.dead.Load():
			one = unix.EIO
		default:
			other.begin()
			one = s.syncfs(c, other, fuseproto.FUSE_ROOT_ID)
			other.end()
		}
		other.done(c)
		if errno == fsbackend.OK {
			errno = one
		}
	}
	return errno
}

func (s *Share) syncfs(c *fsbackend.Context, p *part, node uint64) Errno {
	if p.Syncfser == nil {
		return s.lacks(fsbackend.OK)
	}
	var v visit
	p.enterNode(c, &v)
	errno := p.Syncfs(c, node&numberMask)
	p.leaveNode(c, &v)
	return s.known(errno, fsbackend.OK)
}

// Fallocate implements fsbackend.Fallocater.
func (s *Share) Fallocate(c *fsbackend.Context, in *fuseproto.FallocateIn) Errno {
	p, errno := s.openedToChange(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	if p.Fallocater == nil {
		return s.lacks(unix.EOPNOTSUPP)
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	errno = p.change(c, file{in.NodeId, in.Fh, true}, func(a *fuseproto.Attr) int64 {
		if in.Mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_COLLAPSE_RANGE|unix.FALLOC_FL_INSERT_RANGE) != 0 {
			return 0
		}
		if in.Offset > math.MaxInt64 || in.Length > math.MaxInt64-in.Offset {
			return 0 // what is wrong with it, the backend says
		}
		return growth(a, in.Offset, in.Length)
	}, func() Errno { return p.Fallocate(c, in) })
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
	return s.replay.Load().ownChanged(c, in.NodeId, ownContent, s.known(errno, unix.EOPNOTSUPP))
}

// Lseek implements fsbackend.Lseeker.
func (s *Share) Lseek(c *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) Errno {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	if p.Lseeker == nil {
		if s.alone {
			return unix.ENOSYS
		}
		return s.seek(c, in, out)
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	errno = p.Lseek(c, in, out)
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
	if errno == unix.ENOSYS && !s.alone {
		return s.seek(c, in, out)
	}
	return errno
}

// seek is LSEEK for a part that knows of no holes: all is data, but for the hole that every file ends with.
func (s *Share) seek(c *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) Errno {
	var attr fuseproto.AttrOut
	errno := s.Getattr(c, &fuseproto.GetattrIn{InHeader: in.InHeader, Flags_: fuseproto.FUSE_GETATTR_FH, Fh_: in.Fh}, &attr)
	switch {
	case errno != fsbackend.OK:
		return errno
	case in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE:
		return unix.EINVAL
	case in.Offset >= attr.Size:
		return unix.ENXIO
	}
	out.Offset = in.Offset
	if in.Whence == unix.SEEK_HOLE {
		out.Offset = attr.Size
	}
	return fsbackend.OK
}

// CopyFileRange implements fsbackend.CopyFileRanger.
func (s *Share) CopyFileRange(c *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, Errno) {
	p, errno := s.opened(c, in.NodeId, in.FhIn)
	if errno != fsbackend.OK {
		return 0, errno
	}
	defer p.done(c)
	switch {
	case in.FhOut>>indexShift != in.NodeIdOut>>indexShift:
		return 0, unix.EBADF
	case in.NodeId>>indexShift != in.NodeIdOut>>indexShift:
		if errno := s.exists((*Share).find, in.NodeIdOut); errno != fsbackend.OK {
			return 0, errno
		}
		return 0, unix.EXDEV
	case !p.beginChange(c):
		return 0, unix.EROFS
	}
	defer p.endChange(c)
	if p.CopyFileRanger == nil {
		return 0, s.lacks(unix.EOPNOTSUPP)
	}
	fhIn, node, fhOut := in.FhIn, in.NodeIdOut, in.FhOut
	in.FhIn, in.NodeIdOut, in.FhOut = fhIn&numberMask, node&numberMask, fhOut&numberMask
	var v visit
	p.enter(c, &in.InHeader, &v)
	var n uint64
	errno = p.change(c, file{in.NodeIdOut, in.FhOut, true}, func(a *fuseproto.Attr) int64 {
		length := in.Len
		if from, errno := p.look(c, file{in.NodeId, in.FhIn, true}); errno == fsbackend.OK {
			length = min(length, from.Size-min(from.Size, in.OffIn))
		}
		return growth(a, in.OffOut, length)
	}, func() (errno Errno) {
		n, errno = p.CopyFileRange(c, in)
		return errno
	})
	p.leave(c, &in.InHeader, &v)
	in.FhIn, in.NodeIdOut, in.FhOut = fhIn, node, fhOut
	return n, s.replay.Load().ownChanged(c, in.NodeIdOut, ownContent, s.known(errno, unix.EOPNOTSUPP))
}

// Ioctl implements fsbackend.Ioctler. On a read-only part only those go that are declared to return something and take
// nothing.
func (s *Share) Ioctl(c *fsbackend.Context, in *fuseproto.IoctlIn, arg []byte, dst *fsbackend.Sink) (int32, Errno) {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return 0, errno
	}
	defer p.done(c)
	switch {
	case fsbackend.IoctlMayChange(in.Cmd):
		if !p.beginChange(c) {
			return 0, unix.EROFS
		}
		defer p.endChange(c)
	}
	if p.Ioctler == nil {
		return 0, s.lacks(unix.ENOTTY)
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	result, errno := p.Ioctl(c, in, arg, dst)
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
	return result, s.known(errno, unix.ENOTTY)
}

// Getlk implements fsbackend.Locker.
func (s *Share) Getlk(c *fsbackend.Context, in *fuseproto.LkIn, out *fuseproto.LkOut) Errno {
	return s.lock(c, in, func(l fsbackend.Locker) Errno { return l.Getlk(c, in, out) })
}

// Setlk implements fsbackend.Locker. A lock changes nothing: read-only parts have them too.
func (s *Share) Setlk(c *fsbackend.Context, in *fuseproto.LkIn) Errno {
	return s.lock(c, in, func(l fsbackend.Locker) Errno { return l.Setlk(c, in) })
}

// lock makes a call about locks. A part that has none to give says so in the word that programs know from file systems like it.
func (s *Share) lock(c *fsbackend.Context, in *fuseproto.LkIn, call func(fsbackend.Locker) Errno) Errno {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	switch {
	case p.Locker == nil:
		return s.lacks(unix.ENOLCK)
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	errno = call(p)
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
	return s.known(errno, unix.ENOLCK)
}

package share

import (
	"encoding/binary"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Offsets from madeUpOffset on are those of names that the share adds to a directory, behind all that its backend has.
// Backends' own are below, but for what some give to a last entry (ext4: 1<<63 - 1), which becomes madeUpOffset.
const madeUpOffset = 0x7fff_ffff_0000_0000

// Opendir implements fsbackend.DirReader.
func (s *Share) Opendir(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	p, errno := s.directory(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	onWay := p.dir(in.NodeId&numberMask) != nil
	switch {
	case p.DirReader != nil:
		var v visit
		p.enter(c, &in.InHeader, &v)
		errno = p.Opendir(c, in, out)
		p.leave(c, &in.InHeader, &v)
	case !onWay:
		return s.lacks(unix.EOPNOTSUPP)
	}
	// Without the backend, what the share adds can be listed.
	if errno = s.handle(p, &out.Fh, s.known(errno, fsbackend.OK)); errno != fsbackend.OK {
		return errno
	}
	p.opened(in.NodeId & numberMask)
	if onWay && s.dynamic {
		out.OpenFlags = out.OpenFlags&^fsbackend.CacheFlags | fsbackend.CacheDecided // what is in it may change at any time
	}
	p.policy.Load().open(out, fsbackend.CachePolicy.DirFlags)
	return fsbackend.OK
}

// Releasedir implements fsbackend.DirReader.
func (s *Share) Releasedir(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return
	}
	defer p.done(c)
	defer p.released(in.NodeId & numberMask)
	if p.DirReader == nil {
		return
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	p.Releasedir(c, in)
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
}

// Readdir implements fsbackend.DirReader.
func (s *Share) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	if pos := p.dir(in.NodeId & numberMask); pos != nil {
		return s.listWay(c, p, pos, in, out)
	}
	if p.DirReader == nil {
		return s.lacks(unix.EOPNOTSUPP)
	}
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	errno = p.Readdir(c, in, out)
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
	return s.known(errno, unix.EOPNOTSUPP)
}

// Readdirplus implements fsbackend.DirPlusReader.
func (s *Share) Readdirplus(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	p, errno := s.opened(c, in.NodeId, in.Fh)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	pos := p.dir(in.NodeId & numberMask)
	switch {
	case pos != nil:
		return s.listWay(c, p, pos, in, out)
	case p.DirPlusReader != nil:
	case s.alone:
		return unix.ENOSYS
	case p.DirReader == nil:
		return unix.EOPNOTSUPP
	default:
		_, errno := s.listNames(c, p, nil, in, out)
		return errno
	}
	out.Translate = nil // of another request that ended in a panic
	policy := p.policy.Load()
	if p.base != 0 || p.mapped || p.noSUID(policy) || policy.masks() {
		out.Translate = p.edit
	}
	if policy.Cache != nil {
		out.EntryValid, out.AttrValid = policy.Cache.Valid(), policy.Cache.Valid()
	}
	looked := out.Looked
	var v visit
	p.enterFile(c, &in.InHeader, &in.Fh, &v)
	errno = p.Readdirplus(c, in, out)
	p.leaveFile(c, &in.InHeader, &in.Fh, &v)
	p.looked(out.Looked - looked)
	out.Translate = nil
	if errno == unix.ENOSYS && !s.alone && p.DirReader != nil {
		_, errno = s.listNames(c, p, nil, in, out)
	}
	return errno
}

// listWay lists a directory on the way: what its backend has, then the positions in it.
func (s *Share) listWay(c *fsbackend.Context, p *part, pos *position, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	if in.Offset < madeUpOffset && p.DirReader != nil {
		if end, errno := s.listNames(c, p, pos, in, out); !end {
			return errno
		}
	}
	first := uint64(0)
	if in.Offset > madeUpOffset {
		first = in.Offset - madeUpOffset
	}
	var slots []*position
	if kids := pos.children.Load(); kids != nil {
		slots = kids.slots
	}
	for i := first; i < uint64(len(slots)); i++ {
		child := slots[i]
		if child == nil {
			continue
		}
		s.learn(c, child)
		if !addName(out, child.ino.Load(), madeUpOffset+1+i, child.typ.Load(), []byte(child.name)) {
			break
		}
	}
	return fsbackend.OK
}

// learn finds out what a mount point is to be listed with that nobody has looked up yet, where it is cheap.
func (s *Share) learn(c *fsbackend.Context, pos *position) {
	g := pos.graft.Load()
	if g == nil || g.file != nil || g.info.Isolated || g.info.Slow || pos.ino.Load() != g.base|rootID || !g.enterCall(c) {
		return
	}
	defer g.done(c)
	var out fuseproto.EntryOut
	if s.lookupMount(c, g, &out) == fsbackend.OK {
		g.unlooked(1) // the guest is not given the node
		pos.ino.Store(out.Ino)
	}
}

// addName adds an entry that the guest has to look up.
func addName(out *fsbackend.DirList, ino, off uint64, typ uint32, name []byte) bool {
	if !out.Plus {
		return out.Add(ino, off, typ, name)
	}
	var entry fuseproto.EntryOut
	entry.Ino, entry.Mode = ino, typ<<12
	return out.AddPlus(&entry, ino, off, typ, name)
}

// listing is room for a backend's entries on their way to the guest.
type listing struct {
	fsbackend.DirList
	iov [1]unix.Iovec
	buf [32 << 10]byte
}

var listings = sync.Pool{New: func() any { return new(listing) }}

// listNames copies the entries that p's READDIR gives from offset in.Offset on, without those that are positions in pos,
// and reports whether there are no more.
func (s *Share) listNames(c *fsbackend.Context, p *part, pos *position, in *fuseproto.ReadIn, out *fsbackend.DirList) (end bool, errno Errno) {
	l := listings.Get().(*listing)
	defer listings.Put(l)
	given := *in
	defer func() { *in = given }()
	in.Fh &= numberMask
	for out.Fits(1) {
		// Not much more than will fit: what does not is read again. An entry of READDIRPLUS is about four times as long.
		size := out.Len()
		if out.Plus {
			size /= 4
		}
		size = min(max(size, direntMax), len(l.buf))
		l.iov[0] = unix.Iovec{Base: &l.buf[0]}
		l.iov[0].SetLen(size)
		l.Reset(l.iov[:], 0, uint64(size))
		in.Size = uint32(size)
		from := in.Offset
		var v visit
		p.enter(c, &in.InHeader, &v)
		errno = p.Readdir(c, in, &l.DirList)
		p.leave(c, &in.InHeader, &v)
		if l.Written() == 0 {
			return errno == fsbackend.OK, s.known(errno, unix.EOPNOTSUPP)
		}
		if !copyNames(pos, l.buf[:l.Written()], in, out) {
			return false, fsbackend.OK
		}
		switch {
		case pos != nil && in.Offset >= madeUpOffset:
			return true, fsbackend.OK
		case errno != fsbackend.OK:
			return false, errno
		case in.Offset == from:
			return false, s.broken(p, "offset of a directory entry, again", from)
		}
	}
	return false, fsbackend.OK
}

const (
	direntHeader = 24                               // fuse_dirent
	direntMax    = direntHeader + unix.NAME_MAX + 1 // 280, a multiple of 8
)

// copyNames copies the fuse_dirents in buf, leaves in in.Offset where the next ones start, and reports false at the first
// that does not fit. What is no fuse_dirent, because a backend has used the list's Sink itself, ends it.
func copyNames(pos *position, buf []byte, in *fuseproto.ReadIn, out *fsbackend.DirList) bool {
	for len(buf) >= direntHeader {
		ino, off := binary.NativeEndian.Uint64(buf), binary.NativeEndian.Uint64(buf[8:])
		length, typ := binary.NativeEndian.Uint32(buf[16:]), binary.NativeEndian.Uint32(buf[20:])
		if length > unix.NAME_MAX || len(buf) < (direntHeader+int(length)+7)&^7 {
			return true
		}
		name := buf[direntHeader : direntHeader+length]
		buf = buf[(direntHeader+length+7)&^7:]
		if pos != nil {
			off = min(off, madeUpOffset)
			if child := pos.child(string(name)); child != nil {
				if child.graft.Load() == nil && typ == unix.DT_DIR {
					child.ino.Store(ino)
				}
				in.Offset = off
				continue
			}
		}
		if !addName(out, ino, off, typ, name) {
			return false
		}
		in.Offset = off
	}
	return true
}

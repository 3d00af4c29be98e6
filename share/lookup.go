package share

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Lookup implements fsbackend.Backend.
func (s *Share) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	if r := s.replay.Load(); r != nil {
		return r.lookup(c, parent, name, out)
	}
	return s.find(c, parent, name, out)
}

// find is Lookup, of a name that is not part of a replay.
func (s *Share) find(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	p, errno := s.directory(parent)
	if errno != fsbackend.OK {
		return errno
	}
	if pos := p.onWay(parent, name); pos != nil {
		return s.lookupPosition(c, p, parent, name, pos, out)
	}
	return s.entry(p, out, p.lookup(c, parent, name, out))
}

// lookup is the backend's.
func (p *part) lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	var v visit
	p.enterNode(c, &v)
	errno := p.Lookup(c, parent&numberMask, name, out)
	p.leaveNode(c, &v)
	return errno
}

// lookupPosition looks pos up, which is name in the directory parent of p.
func (s *Share) lookupPosition(c *fsbackend.Context, p *part, parent uint64, name fsbackend.Name, pos *position, out *fuseproto.EntryOut) Errno {
	var errno Errno
	switch g := pos.graft; {
	case g == nil:
		errno = s.lookupWay(c, p, parent, name, pos, out)
	case g.file == nil:
		errno = s.lookupMount(c, g, out)
	default:
		errno = s.lookupFile(c, g, out)
	}
	if errno == fsbackend.OK && out.NodeId != 0 {
		pos.ino.Store(out.Ino)
		pos.typ.Store(out.Mode & unix.S_IFMT >> 12)
	}
	return errno
}

// lookupWay finds a directory on the way in its backend, and records its number if that has changed; where it is none,
// it is made up.
func (s *Share) lookupWay(c *fsbackend.Context, p *part, parent uint64, name fsbackend.Name, pos *position, out *fuseproto.EntryOut) Errno {
	for range 3 {
		epoch := s.epoch.Load()
		errno := p.lookup(c, parent, name, out)
		switch {
		case errno == unix.ENOENT, errno == fsbackend.OK && out.NodeId == 0:
			return s.lookupMadeUp(p, pos, epoch, out)
		case errno != fsbackend.OK:
			return errno
		case out.NodeId > numberMask || out.NodeId == fuseproto.FUSE_ROOT_ID:
			return s.broken(p, "nodeid of a directory", out.NodeId)
		case out.Mode&unix.S_IFMT != unix.S_IFDIR:
			p.Forget(out.NodeId, 1)
			return s.lookupMadeUp(p, pos, epoch, out)
		}
		number := out.NodeId
		if pos.node.Load() == number {
			return s.entry(p, out, fsbackend.OK)
		}
		// The share's own lookup.
		held := new(fuseproto.EntryOut)
		errno = p.lookup(c, parent, name, held)
		if errno == fsbackend.OK && held.NodeId == number {
			if !s.record(pos, number, epoch) {
				p.Forget(number, 1) // the session that asks is over
			}
			return s.entry(p, out, fsbackend.OK)
		}
		// The host has just put another one there.
		p.Forget(number, 1)
		*out = fuseproto.EntryOut{}
		if errno != fsbackend.OK && errno != unix.ENOENT {
			return errno
		}
		if errno == fsbackend.OK && held.NodeId != 0 {
			p.Forget(held.NodeId, 1)
		}
	}
	return unix.ESTALE // the guest tries once more
}

// lookupMadeUp answers with the directory that stands in for pos.
func (s *Share) lookupMadeUp(p *part, pos *position, epoch uint64, out *fuseproto.EntryOut) Errno {
	if pos.node.Load() != 0 && p == pos.home {
		s.record(pos, 0, epoch)
	}
	*out = fuseproto.EntryOut{NodeId: s.parts[len(s.shown)].base | pos.madeUp, Attr: s.madeUp.dirs[pos.madeUp]}
	return fsbackend.OK
}

// rootCalls are for GETATTRs of roots, so that they cost no allocation.
var rootCalls = sync.Pool{New: func() any { return new(rootCall) }}

type rootCall struct {
	in  fuseproto.GetattrIn
	out fuseproto.AttrOut
}

// lookupMount answers with the root of g. An isolated part is not asked: it could hang, and not only its own requests
// would wait. What it said last has to do, and the guest asks the part itself at once, because that is no longer valid.
func (s *Share) lookupMount(c *fsbackend.Context, g *part, out *fuseproto.EntryOut) Errno {
	if g.dead.Load() {
		return unix.EIO
	}
	if g.info.Isolated {
		g.seen.Lock()
		*out = fuseproto.EntryOut{Attr: g.seen.Attr, AttrValidNsec: 1}
		g.seen.Unlock()
	} else {
		if g.info.Slow && !c.MayBlock {
			return fsbackend.ErrMayBlock
		}
		call := rootCalls.Get().(*rootCall)
		defer rootCalls.Put(call)
		*call = rootCall{}
		call.in.NodeId, call.in.Caller = fuseproto.FUSE_ROOT_ID, c.Caller
		g.begin()
		defer g.end()
		var v visit
		g.enter(c, &call.in.InHeader, &v)
		errno := g.Getattr(c, &call.in, &call.out)
		g.leave(c, &call.in.InHeader, &v)
		if errno != fsbackend.OK {
			return errno
		}
		g.attr(&call.out.Attr)
		*out = fuseproto.EntryOut{Attr: call.out.Attr, AttrValid: call.out.AttrValid, AttrValidNsec: call.out.AttrValidNsec}
	}
	out.NodeId = g.base | fuseproto.FUSE_ROOT_ID
	if s.submounts.Load() {
		out.Attr.Flags |= fuseproto.FUSE_ATTR_SUBMOUNT
	}
	return fsbackend.OK
}

// lookupFile looks the one file of g up, so that what the guest sees follows its name.
func (s *Share) lookupFile(c *fsbackend.Context, g *part, out *fuseproto.EntryOut) Errno {
	if !g.info.Isolated {
		if g.dead.Load() {
			return unix.EIO
		}
		if g.info.Slow && !c.MayBlock {
			return fsbackend.ErrMayBlock
		}
		g.begin()
		defer g.end()
		return s.entry(g, out, g.findFile(c, out))
	}
	found := new(fuseproto.EntryOut)
	errno := s.across(c, g, func(c *fsbackend.Context) Errno {
		return g.findFile(c, found)
	}, func() {
		if found.NodeId != 0 {
			g.Forget(found.NodeId, 1)
		}
	})
	if errno != fsbackend.OK {
		return errno
	}
	*out = *found
	return s.entry(g, out, fsbackend.OK)
}

// findFile looks the one file up in the backend. A directory of that name is none.
func (p *part) findFile(c *fsbackend.Context, out *fuseproto.EntryOut) Errno {
	errno := p.lookup(c, fuseproto.FUSE_ROOT_ID, p.file, out)
	if errno != fsbackend.OK || out.NodeId == 0 {
		return errno
	}
	if out.Mode&unix.S_IFMT == unix.S_IFDIR || out.NodeId == fuseproto.FUSE_ROOT_ID {
		p.Forget(out.NodeId, 1)
		*out = fuseproto.EntryOut{}
		return unix.ENOENT
	}
	return fsbackend.OK
}

// Forget implements fsbackend.Backend.
func (s *Share) Forget(node, n uint64) {
	if node&numberMask == fuseproto.FUSE_ROOT_ID {
		return
	}
	if n = s.replay.Load().forget(node, n); n == 0 {
		return
	}
	if p, errno := s.at(node); errno == fsbackend.OK {
		p.Forget(node&numberMask, n)
	}
}

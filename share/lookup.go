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
	return s.lookUp(c, parent, name, out)
}

// lookUp is Lookup, of a name that is not part of a replay.
func (s *Share) lookUp(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	p, errno := s.directory(c, parent)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.done(c)
	if pos := p.onWay(parent, name); pos != nil {
		return s.lookupPosition(c, p, parent, name, pos, out)
	}
	return s.lookupName(c, p, parent, name, out)
}

// lookupName looks up what is no position. Where one may come, that there is nothing now must not be remembered.
func (s *Share) lookupName(c *fsbackend.Context, p *part, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	errno := p.lookup(c, parent, name, out)
	if errno == unix.ENOENT || s.dynamic && errno == fsbackend.OK && out.NodeId == 0 {
		return p.absence() // another graft may have taken p's place since, and what was below it
	}
	return s.entry(p, out, errno)
}

// lookup is the backend's.
func (p *part) lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	var v visit
	p.enterNode(c, &v)
	errno := p.Lookup(c, parent&numberMask, name, out)
	p.leaveNode(c, &v)
	return errno
}

// lookupPosition looks pos up, which is name in the directory parent of p. Where grafts come and go, the guest has to ask
// each time.
func (s *Share) lookupPosition(c *fsbackend.Context, p *part, parent uint64, name fsbackend.Name, pos *position, out *fuseproto.EntryOut) Errno {
	var errno Errno
	for again := true; again; {
		switch g := pos.graft.Load(); {
		case pos.gone.Load():
			return s.lookupName(c, p, parent, name, out)
		case g == nil:
			errno, again = s.lookupWay(c, p, parent, name, pos, out), false
		default:
			errno, again = s.lookupGraft(c, g, out)
		}
	}
	if errno == fsbackend.OK && out.NodeId != 0 {
		pos.ino.Store(out.Ino)
		pos.typ.Store(out.Mode & unix.S_IFMT >> 12)
		if s.dynamic {
			out.EntryValid, out.EntryValidNsec = 0, 1
		}
	}
	return errno
}

// lookupGraft looks up what g shows the guest, unless g has been replaced or removed since: look at the position again then.
func (s *Share) lookupGraft(c *fsbackend.Context, g *part, out *fuseproto.EntryOut) (errno Errno, again bool) {
	if !g.enterCall(c) {
		return 0, true
	}
	defer g.done(c)
	switch {
	case g.leaving.Load():
		return 0, true
	case g.file == nil:
		return s.lookupMount(c, g, out), false
	}
	errno = s.lookupFile(c, g, out)
	if out.NodeId != 0 {
		out.EntryValid, out.EntryValidNsec = 0, 1 // the host may put another one there at any time
	}
	return errno, false
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
			if !s.record(pos, p, number, epoch) {
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
	if pos.node.Load() != 0 && p == pos.home.Load() {
		s.record(pos, p, 0, epoch)
	}
	m := s.nobody.Backend.(*madeUp)
	*out = fuseproto.EntryOut{NodeId: s.nobody.base | pos.madeUp, Attr: m.attr(pos, pos.madeUp)}
	if s.dynamic {
		out.AttrValidNsec = 1
	}
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
	g.looked(1)
	out.NodeId = g.base | rootID
	g.policy.Load().entry(out)
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

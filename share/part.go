package share

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const rootID = fuseproto.FUSE_ROOT_ID

// part is a backend with what the share adds to it.
//
// Every request reads the first cache line of it, and the Server above the second, each after a system call that has put
// others in their place: so what is read for every request is there (TestLayout).
type part struct {
	*fsbackend.Resolved
	shown *fsbackend.Part // info, or the root's for directories made up
	life
	info    fsbackend.Part
	share   *Share
	handles handles
	lookups atomic.Uint64
	base    uint64 // the index where it is in a number
	policy  atomic.Pointer[Policy]
	quota   atomic.Pointer[quota] // nil: nothing is counted
	unsafe  atomic.Bool           // the session leaves to the backend what it cannot do: to clear set-id bits
	uids    IDMap
	gids    IDMap
	file    fsbackend.Name // Graft.File, nil for a directory
	madeUp  bool           // its backend is a madeUp
	edit    func(*fuseproto.EntryOut)
	onClose func()

	// dirs are the positions in this part by the number of their directory; nil if there are none.
	dirs atomic.Pointer[map[uint64]*position]

	hung    atomic.Bool  // and is still running
	overdue atomic.Int32 // calls given up that have not come back
	waiting atomic.Int32 // calls under way that another part's requests wait for

	// seen are the root's attributes as of the last GETATTR of an isolated part, which is not asked on behalf of others.
	seen struct {
		sync.Mutex
		fuseproto.Attr
	}
}

func (s *Share) newPart(g *Graft) *part {
	p := &part{
		Resolved: fsbackend.Resolve(g.Backend),
		share:    s,
		life:     life{counted: s.dynamic, leaves: s.dynamic && g.Path != "/", mapped: len(g.UIDMap)+len(g.GIDMap) > 0},
		uids:     g.UIDMap, gids: g.GIDMap,
	}
	if g.File != "" {
		p.picky = true
		p.file = fsbackend.MakeName(g.File)
	}
	policy := g.own()
	p.policy.Store(policy)
	if policy.limited() {
		p.counted = true
		p.quota.Store(newQuota(p))
	}
	if p.counted {
		p.calls.shards = new([shards]callShard)
	}
	p.shown = &p.info
	p.info.Name, p.info.Path = g.Extension, g.Path
	p.info.Isolated, p.info.Slow, p.info.Timeout = g.Isolated, g.Slow || p.Resolved.Slow, g.Timeout
	p.info.Enter, p.info.Leave = g.Enter, g.Leave
	p.onClose = g.OnClose
	p.edit = p.listed
	p.seen.Mode, p.seen.Nlink = unix.S_IFDIR|0o755, 2
	return p
}

// Close closes the backend.
func (p *part) Close() error { return closeBackend(p.Resolved, p.onClose) }

func (p *part) setIndex(index uint16) {
	p.base = uint64(index) << indexShift
	p.seen.Ino = p.base | rootID
}

// visit is what enter has changed in a request.
type visit struct {
	node   uint64
	fh     uint64 // of enterFile
	ctx    fuseproto.Caller
	header fuseproto.Caller
	groups []uint32
}

// enter makes the numbers and ids of a request the backend's own. leave puts them back: a call that ends in ErrMayBlock is
// made again.
func (p *part) enter(c *fsbackend.Context, h *fuseproto.InHeader, v *visit) {
	v.node = h.NodeId
	h.NodeId &= numberMask
	if p.mapped {
		p.disguise(c, h, v)
	}
}

func (p *part) leave(c *fsbackend.Context, h *fuseproto.InHeader, v *visit) {
	h.NodeId = v.node
	if p.mapped {
		p.leaveNode(c, v)
		h.Caller = v.header
	}
}

// enterFile is enter for a request that carries a file handle; leaveFile goes with it.
func (p *part) enterFile(c *fsbackend.Context, h *fuseproto.InHeader, fh *uint64, v *visit) {
	v.fh = *fh
	*fh &= numberMask
	p.enter(c, h, v)
}

func (p *part) leaveFile(c *fsbackend.Context, h *fuseproto.InHeader, fh *uint64, v *visit) {
	p.leave(c, h, v)
	*fh = v.fh
}

// enterNode is enter for a call without an In struct.
func (p *part) enterNode(c *fsbackend.Context, v *visit) {
	if p.mapped {
		p.disguise(c, nil, v)
	}
}

func (p *part) leaveNode(c *fsbackend.Context, v *visit) {
	if p.mapped {
		c.Caller, c.SuppGroups = v.ctx, v.groups
	}
}

// disguise translates the ids in c and, unless nil, h.
func (p *part) disguise(c *fsbackend.Context, h *fuseproto.InHeader, v *visit) {
	v.ctx, v.groups = c.Caller, c.SuppGroups
	p.translate(&c.Caller)
	c.SuppGroups = p.groups(c.SuppGroups)
	if h != nil {
		v.header = h.Caller
		p.translate(&h.Caller)
	}
}

// translate makes a caller the backend's; one without an id here acts with OverflowID, and mayCreate keeps it from leaving
// that anywhere.
func (p *part) translate(c *fuseproto.Caller) {
	c.Uid, _ = p.uids.host(c.Uid)
	c.Gid, _ = p.gids.host(c.Gid)
}

// groups translates supplementary groups, without those that are none here.
func (p *part) groups(guest []uint32) []uint32 {
	if len(guest) == 0 || len(p.gids) == 0 {
		return guest
	}
	host := make([]uint32, 0, len(guest))
	for _, id := range guest {
		if h, ok := p.gids.host(id); ok {
			host = append(host, h)
		}
	}
	return host
}

// mayCreate answers EOVERFLOW to a caller without an id in this part (Linux fs/namei.c, may_create).
func (p *part) mayCreate(c *fsbackend.Context) Errno {
	if p.mapped {
		_, uid := p.uids.host(c.Caller.Uid)
		_, gid := p.gids.host(c.Caller.Gid)
		if !uid || !gid {
			return unix.EOVERFLOW
		}
	}
	return fsbackend.OK
}

// noSUID says whether set-id bits and file capabilities are hidden: also where nobody would clear them.
func (p *part) noSUID(policy *Policy) bool { return policy.NoSUID || p.unsafe.Load() }

// shownMode makes the mode that the guest sees of the backend's.
func (p *part) shownMode(mode uint32) uint32 {
	policy := p.policy.Load()
	return mask(mode, p.noSUID(policy), policy.NoExec)
}

// created makes the mode that the backend is given of the one that the guest wants for a file of type typ (S_IF*).
func (p *part) created(mode, typ uint32) uint32 {
	return mode&unix.S_IFMT | p.shownMode(mode&^unix.S_IFMT|typ)&^unix.S_IFMT
}

// ino makes a file's inode number differ from those of the directory that it is shown in, whose device number it has.
func (p *part) ino(ino uint64) uint64 {
	if p.file != nil && ino != p.base {
		ino ^= p.base
	}
	return ino
}

// attr makes the guest's attributes of the backend's.
func (p *part) attr(a *fuseproto.Attr) {
	a.Ino = p.ino(a.Ino)
	if policy := p.policy.Load(); p.noSUID(policy) || policy.masks() {
		a.Rdev = policy.device(a.Mode, a.Rdev)
		a.Mode = p.shownMode(a.Mode)
	}
	if p.mapped {
		a.Uid, a.Gid = p.uids.guest(a.Uid), p.gids.guest(a.Gid)
	}
}

// entry makes the guest's entry of one that a call has answered errno with.
func (s *Share) entry(p *part, out *fuseproto.EntryOut, errno Errno) Errno {
	if errno != fsbackend.OK || out.NodeId == 0 {
		return errno
	}
	if out.NodeId > numberMask {
		return s.broken(p, "nodeid", out.NodeId)
	}
	p.looked(1)
	p.policy.Load().entry(out)
	out.NodeId |= p.base
	p.attr(&out.Attr)
	return fsbackend.OK
}

// handle makes the guest's handle of one that a call has answered errno with.
func (s *Share) handle(p *part, fh *uint64, errno Errno) Errno {
	if errno != fsbackend.OK {
		return errno
	}
	if *fh > numberMask {
		return s.broken(p, "file handle", *fh)
	}
	*fh |= p.base
	return fsbackend.OK
}

// broken logs a reply that breaks the contract and would lead to another part. What it stands for in the backend is lost.
func (s *Share) broken(p *part, what string, value uint64) Errno {
	s.bugs.Error("backend broke its contract; the guest gets EIO: expected a number below 1<<48",
		"extension", p.info.Name, "path", p.info.Path, "what", what, "value", value)
	return unix.EIO
}

// listed is a DirList's Translate.
func (p *part) listed(e *fuseproto.EntryOut) {
	if e.NodeId > numberMask {
		e.NodeId = 0 // the guest looks the name up, and broken says what is wrong
		p.info.Stats.Errors.Add(1)
	}
	if e.NodeId != 0 {
		e.NodeId |= p.base
	}
	p.attr(&e.Attr)
}

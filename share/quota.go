package share

import (
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// quota is what is stored in a graft with Policy.MaxBytes or MaxInodes, by the backend's own account: the blocks of all that is
// no directory, and the number of files but for the root. It is counted once by a walk (count.go), and then kept by looking
// at what a request changes before and after it. What the host changes is noticed by the next Share.Recount.
//
// Requests of the same file overlap. So what one is found to have changed is the difference to what was last known of the
// file, and only counts if nobody has looked later: each look has a number, drawn after the change that it is for, and the one
// with the highest sees every change whose look has a lower one. Until it has looked, a request holds what it may have taken.
//
// A file without a name goes on to count until the guest neither has it open nor knows its node: only then does the
// backend give its blocks back.
//
// What names lead to is found out before and after a change of theirs, so those are made one at a time.
type quota struct {
	p     *part
	names sync.Mutex // held during changes of names, which all may sleep

	mu            sync.Mutex
	bytes, inodes int64 // used
	holdBytes     int64 // by requests under way
	holdInodes    int64
	changing      map[uint64]*changed // by number
	orphans       map[uint64]*orphan  // without a name, by number
	counting      bool
	counted       bool                // once, to the end
	seen          map[uint64]struct{} // inodes that the walk under way need not count
}

// changed is a file that requests are changing.
type changed struct {
	active        int
	known         bool
	ino           uint64
	bytes         int64  // as last seen
	looks, latest uint64 // numbers drawn, and that of the look that bytes are from
}

type orphan struct {
	ino   uint64
	bytes int64
}

const blockSize = 4096

func newQuota(p *part) *quota {
	return &quota{p: p, changing: make(map[uint64]*changed), orphans: make(map[uint64]*orphan)}
}

// limited says whether the policy has something for a quota to do.
func (p *Policy) limited() bool { return p.MaxBytes > 0 || p.MaxInodes > 0 }

// metered returns the part's quota, nil if it has none.
func (p *part) metered() *quota { return p.quota.Load() }

// stored is how many bytes a file counts with.
func stored(a *fuseproto.Attr) int64 {
	if a.Mode&unix.S_IFMT == unix.S_IFDIR {
		return 0
	}
	return int64(min(a.Blocks, math.MaxInt64/1024)) * 512
}

// file says which file of the backend a request is for.
type file struct {
	node, fh uint64 // the backend's
	byHandle bool
}

func (p *part) look(c *fsbackend.Context, f file) (fuseproto.Attr, Errno) {
	in := fuseproto.GetattrIn{InHeader: fuseproto.InHeader{NodeId: f.node, Caller: c.Caller}}
	if f.byHandle {
		in.Flags_, in.Fh_ = fuseproto.FUSE_GETATTR_FH, f.fh
	}
	var out fuseproto.AttrOut
	errno := p.Getattr(c, &in, &out)
	return out.Attr, errno
}

// fits holds bytes and inodes, unless that is more than the graft may have. q.mu is held.
func (q *quota) fits(bytes, inodes int64) bool {
	policy := q.p.policy.Load()
	if bytes > 0 && policy.MaxBytes > 0 && uint64(max(q.bytes, 0)+q.holdBytes+bytes) > policy.MaxBytes {
		return false
	}
	if inodes > 0 && policy.MaxInodes > 0 && uint64(max(q.inodes, 0)+q.holdInodes+inodes) > policy.MaxInodes {
		return false
	}
	q.holdBytes += bytes
	q.holdInodes += inodes
	return true
}

// see counts a file that the walk under way has not come to yet. q.mu is held.
func (q *quota) see(a *fuseproto.Attr) {
	if !q.counting {
		return
	}
	if _, ok := q.seen[a.Ino]; !ok {
		q.seen[a.Ino] = struct{}{}
		q.bytes += stored(a)
		q.inodes++
	}
}

// growth is by how many bytes a file can grow when length bytes at off are written; a hole in it may be anywhere.
func growth(a *fuseproto.Attr, off, length uint64) int64 {
	has := uint64(stored(a))
	end := off + length
	most := min((off%blockSize+length+blockSize-1)&^(blockSize-1), math.MaxInt64/4) // lengths come up to 1<<63 - 1
	if has < a.Size {
		return int64(most)
	}
	end = (end + blockSize - 1) &^ (blockSize - 1)
	if end <= has {
		return 0
	}
	return int64(min(most, end-has))
}

// begin looks at f before a request changes it, which may make it grow by what grow says, and holds that. Then end is due.
func (q *quota) begin(c *fsbackend.Context, f file, grow func(*fuseproto.Attr) int64) (held int64, errno Errno) {
	if !c.MayBlock {
		return 0, fsbackend.ErrMayBlock // there are several calls to be made
	}
	q.mu.Lock()
	n := q.changing[f.node]
	if n == nil {
		n = new(changed)
		q.changing[f.node] = n
	}
	n.active++ // from now on nobody forgets what is known of the file
	q.mu.Unlock()
	a, errno := q.p.look(c, f)
	if errno == fsbackend.OK {
		held = grow(&a)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if errno == fsbackend.OK && !n.known {
		n.known, n.ino, n.bytes = true, a.Ino, stored(&a)
		q.see(&a)
	}
	if errno == fsbackend.OK && !q.fits(held, 0) {
		errno = unix.ENOSPC
	}
	if errno != fsbackend.OK {
		q.leave(f.node, n)
		return 0, errno
	}
	return held, fsbackend.OK
}

// leave is called with q.mu held.
func (q *quota) leave(node uint64, n *changed) {
	if n.active--; n.active == 0 {
		delete(q.changing, node)
	}
}

// end looks at f after it.
func (q *quota) end(c *fsbackend.Context, f file, held int64) {
	q.mu.Lock()
	n := q.changing[f.node]
	n.looks++
	number := n.looks
	q.mu.Unlock()
	a, errno := q.p.look(c, f)
	q.mu.Lock()
	defer q.mu.Unlock()
	if errno == fsbackend.OK && number > n.latest {
		n.latest = number
		by := stored(&a) - n.bytes
		n.bytes += by
		q.bytes += by
		if o := q.orphans[f.node]; o != nil {
			o.bytes += by
		}
	}
	q.holdBytes -= held
	q.leave(f.node, n)
}

func (q *quota) isCounted() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.counted
}

// nothing is the growth of what makes files smaller, or holes.
func nothing(*fuseproto.Attr) int64 { return 0 }

// change makes a call that changes f.
func (p *part) change(c *fsbackend.Context, f file, grow func(*fuseproto.Attr) int64, call func() Errno) Errno {
	q := p.metered()
	if q == nil {
		return call()
	}
	held, errno := q.begin(c, f, grow)
	if errno != fsbackend.OK {
		return errno
	}
	defer q.end(c, f, held)
	return call()
}

// create makes a call that makes a file with a name, or without one if name is nil, and leaves it in out, which is nil for a whiteout.
func (p *part) create(c *fsbackend.Context, parent uint64, name fsbackend.Name, bytes int64, out *fuseproto.EntryOut, call func() Errno) Errno {
	q := p.metered()
	if q == nil {
		return call()
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	q.names.Lock()
	defer q.names.Unlock()
	if name != nil {
		// CREATE may open what is there already.
		var old fuseproto.EntryOut
		if p.Lookup(c, parent, name, &old) == fsbackend.OK && old.NodeId != 0 {
			defer q.unlook(old.NodeId)
			return p.change(c, file{node: old.NodeId}, nothing, call)
		}
	}
	return q.create(bytes, out, name == nil, call)
}

// create is part.create for what is not there. q.names is held.
func (q *quota) create(bytes int64, out *fuseproto.EntryOut, nameless bool, call func() Errno) Errno {
	q.mu.Lock()
	ok := q.fits(bytes, 1)
	q.mu.Unlock()
	if !ok {
		return unix.ENOSPC
	}
	defer func() {
		q.mu.Lock()
		q.holdBytes -= bytes
		q.holdInodes--
		q.mu.Unlock()
	}()
	errno := call()
	if errno == fsbackend.OK {
		q.mu.Lock()
		defer q.mu.Unlock()
		switch {
		case out == nil:
			q.inodes++
			return fsbackend.OK
		case q.counting:
			q.see(&out.Attr) // the walk may have come across it already
		default:
			q.inodes++
			q.bytes += stored(&out.Attr)
		}
		if nameless {
			q.orphans[out.NodeId] = &orphan{out.Ino, stored(&out.Attr)}
		}
	}
	return errno
}

// unlink makes a call after which name in the directory parent may be another file than before, or none.
func (p *part) unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name, call func() Errno) Errno {
	q := p.metered()
	if q == nil {
		return call()
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	q.names.Lock()
	defer q.names.Unlock()
	return q.unlink(c, parent, name, call)
}

// unlink is part.unlink. q.names is held.
func (q *quota) unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name, call func() Errno) Errno {
	p := q.p
	var old fuseproto.EntryOut
	if p.Lookup(c, parent, name, &old) != fsbackend.OK || old.NodeId == 0 {
		return call()
	}
	defer q.unlook(old.NodeId) // that may be the last lookup
	f := file{node: old.NodeId}
	if _, errno := q.begin(c, f, nothing); errno != fsbackend.OK {
		return errno
	}
	defer q.end(c, f, 0)
	errno := call()
	if errno != fsbackend.OK {
		return errno
	}
	var now fuseproto.EntryOut
	if p.Lookup(c, parent, name, &now) == fsbackend.OK && now.NodeId != 0 {
		q.unlook(now.NodeId)
		if now.NodeId == old.NodeId {
			return fsbackend.OK // it is still there
		}
	}
	a, errno := p.look(c, file{node: old.NodeId})
	switch {
	case errno != fsbackend.OK:
		if a = old.Attr; a.Nlink > 1 && a.Mode&unix.S_IFMT != unix.S_IFDIR {
			return fsbackend.OK
		}
	case a.Nlink > 0 && a.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fsbackend.OK // by another name
	}
	q.mu.Lock()
	if q.orphans[old.NodeId] == nil {
		q.orphans[old.NodeId] = &orphan{old.Ino, q.changing[old.NodeId].bytes}
	}
	q.mu.Unlock()
	return fsbackend.OK
}

// link makes a call that gives node a name.
func (p *part) link(c *fsbackend.Context, node uint64, call func() Errno) Errno {
	q := p.metered()
	if q == nil {
		return call()
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	q.names.Lock()
	defer q.names.Unlock()
	errno := call()
	if errno == fsbackend.OK {
		q.mu.Lock()
		delete(q.orphans, node)
		q.mu.Unlock()
	}
	return errno
}

// unlook gives a lookup back that was not the guest's.
func (q *quota) unlook(node uint64) {
	q.p.Forget(node, 1)
	q.reap(node)
}

// reap no longer counts node if it has no name and the backend does not know it any more.
func (q *quota) reap(node uint64) {
	q.mu.Lock()
	o := q.orphans[node]
	q.mu.Unlock()
	if o == nil || q.p.handles.has(node) {
		return
	}
	c := fsbackend.Context{MayBlock: true}
	if a, errno := q.p.look(&c, file{node: node}); errno == fsbackend.OK && a.Ino == o.ino || errno == fsbackend.ErrMayBlock {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.orphans[node] == o {
		delete(q.orphans, node)
		q.bytes -= o.bytes
		q.inodes--
		delete(q.seen, o.ino) // its number may be another file's soon
	}
}

// lose is called after a session, which has closed and forgotten everything.
func (q *quota) lose() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, o := range q.orphans {
		q.bytes -= o.bytes
		q.inodes--
	}
	clear(q.orphans)
}

// statfs makes the graft as large as it may be, and as free as it and the backend are.
func (q *quota) statfs(out *fuseproto.StatfsOut, known bool) {
	policy := q.p.policy.Load()
	q.mu.Lock()
	bytes, inodes := uint64(max(q.bytes, 0)), uint64(max(q.inodes, 0))
	q.mu.Unlock()
	if out.Frsize == 0 {
		out.Frsize = blockSize
	}
	if out.Bsize == 0 {
		out.Bsize = out.Frsize
	}
	rest := func(most, used, free uint64, limited bool) uint64 {
		left := most - min(used, most)
		if limited {
			return min(left, free)
		}
		return left
	}
	if policy.MaxBytes > 0 {
		unit := uint64(out.Frsize)
		has := known && out.Blocks > 0
		out.Bavail = rest(policy.MaxBytes/unit, (bytes+unit-1)/unit, out.Bavail, has)
		out.Bfree = rest(policy.MaxBytes/unit, (bytes+unit-1)/unit, out.Bfree, has)
		out.Blocks = policy.MaxBytes / unit
	}
	if policy.MaxInodes > 0 {
		out.Ffree = rest(policy.MaxInodes, inodes, out.Ffree, known && out.Files > 0)
		out.Files = policy.MaxInodes
	}
}

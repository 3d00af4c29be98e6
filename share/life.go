package share

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

// life counts what keeps a part that may leave: its calls under way, and its handles. Shares that never change do not count,
// and the root's calls need it only where they may change something.
type life struct {
	calls   calls
	leaving atomic.Bool // it was removed or replaced: names are gone, open files go on
	dead    atomic.Bool // Init or Reset failed: every request is EIO
	counted bool        // changes and handles are
	leaves  bool        // it may leave, so all calls are counted: all but the root

	// Here for their place in memory.
	mapped bool // ids are translated
	picky  bool // not all of its nodes are the guest's: see Share.find

	replaced atomic.Bool // it leaves, and there is another one in its place
}

// absence is the answer to names in a part that leaves. Of one that was replaced it is ESTALE, upon which Linux looks up the whole
// path once more (retry_estale) and finds what is there now: between two looks there is never nothing.
func (l *life) absence() Errno {
	if l.replaced.Load() {
		return unix.ESTALE
	}
	return unix.ENOENT
}

// ghost is a part that has gone, of which the guest still has something.
type ghost struct {
	lookups uint64 // that the guest has to give back
	absence Errno  // the answer to what it asks for there
}

// enterCall says whether a call may begin; done ends it. c is the same.
func (p *part) enterCall(c *fsbackend.Context) bool {
	return !p.leaves || p.calls.enter(c.Shard)
}

func (p *part) done(c *fsbackend.Context) {
	if p.leaves {
		p.calls.at(c.Shard).Add(-oneCall)
		if p.leaving.Load() {
			p.left()
		}
	}
}

// left ends p if it leaves and the call that is over was what kept it.
func (p *part) left() {
	if p.leaving.Load() && p.calls.kept.Load() == 0 {
		p.share.retire(p)
	}
}

// beginChange makes a call one that may change something, and fails in a graft that is read-only. What it has let begin is
// waited for by Share.Change, so it counts before it looks; and it looks before it counts, so that who is refused again and
// again keeps nobody waiting.
func (p *part) beginChange(c *fsbackend.Context) bool {
	switch {
	case p.policy.Load().ReadOnly:
		return false
	case !p.counted:
		return true
	}
	n := p.calls.at(c.Shard)
	n.Add(oneChange)
	if p.policy.Load().ReadOnly {
		n.Add(-oneChange)
		return false
	}
	return true
}

func (p *part) endChange(c *fsbackend.Context) {
	if p.counted {
		p.calls.at(c.Shard).Add(-oneChange)
	}
}

// toChange goes on from what at and its like have answered: for a call that may change something from its beginning to its
// end, which doneChange is.
func (p *part) toChange(c *fsbackend.Context, errno Errno) (*part, Errno) {
	switch {
	case errno != fsbackend.OK:
		return nil, errno
	case !p.beginChange(c):
		p.done(c)
		return nil, unix.EROFS
	case p.leaves:
		p.calls.at(c.Shard).Add(-oneCall)
	}
	return p, fsbackend.OK
}

func (p *part) doneChange(c *fsbackend.Context) {
	if p.counted {
		p.calls.at(c.Shard).Add(-oneChange)
		p.left()
	}
}

// finish says whether p has gone: nothing keeps it, and nothing begins any more. It is true once.
func (p *part) finish() bool { return p.calls.close() }

// awaitFinish is finish for who may wait for calls that end soon.
func (p *part) awaitFinish(deadline time.Time) bool {
	return !p.counted || waitFor(p.finish, deadline)
}

// waitFor asks done again and again until it is, or the deadline has passed.
func waitFor(done func() bool, deadline time.Time) bool {
	for wait := 50 * time.Microsecond; !done(); wait = min(2*wait, 20*time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(wait)
	}
	return true
}

// looked counts lookups of the guest, which it has to give back.
func (p *part) looked(n uint64) {
	if p.leaves && n > 0 {
		p.lookups.Add(n)
	}
}

// unlooked takes back at most as many as there are.
func (p *part) unlooked(n uint64) {
	if !p.leaves {
		return
	}
	for {
		old := p.lookups.Load()
		if p.lookups.CompareAndSwap(old, old-min(old, n)) {
			return
		}
	}
}

// handles are what the guest has open, by node. What it releases without having it does not count.
type handles struct {
	mu    sync.Mutex
	nodes map[uint64]int
}

func (h *handles) has(node uint64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.nodes[node] > 0
}

// opened counts a handle, within a call.
func (p *part) opened(node uint64) {
	if !p.counted {
		return
	}
	h := &p.handles
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.nodes == nil {
		h.nodes = make(map[uint64]int)
	}
	h.nodes[node]++
	p.calls.kept.Add(1)
}

// released ends a handle, within a call.
func (p *part) released(node uint64) {
	if !p.counted {
		return
	}
	h := &p.handles
	h.mu.Lock()
	defer h.mu.Unlock()
	switch h.nodes[node] {
	case 0:
		return
	case 1:
		delete(h.nodes, node)
	default:
		h.nodes[node]--
	}
	p.calls.kept.Add(-1)
}

// lose ends what a session has: its lookups and handles.
func (p *part) lose() {
	p.lookups.Store(0)
	h := &p.handles
	h.mu.Lock()
	h.nodes = nil
	p.calls.kept.Store(0)
	h.mu.Unlock()
	if p.leaving.Load() {
		p.share.retire(p)
	}
	if q := p.metered(); q != nil {
		q.lose()
	}
}

// burial is the end of a part that has gone.
type burial struct {
	p    *part
	done chan struct{} // closed when its Close and Config.OnRemoved have returned
}

// retire ends p if nothing keeps it any more after it was removed or replaced.
func (s *Share) retire(p *part) {
	s.mu.Lock()
	if !p.leaving.Load() || !p.finish() {
		s.mu.Unlock()
		return
	}
	index := uint16(p.base >> indexShift)
	s.parts.set(index, nil)
	if n := p.lookups.Load(); n > 0 {
		s.ghosts[index] = ghost{n, p.absence()}
	}
	s.list = without(s.list, p)
	b := &burial{p, make(chan struct{})}
	s.closing = append(s.closing, b)
	s.mu.Unlock()
	go s.bury(b)
}

// without returns list without one, which is in it once at most; list stays as it is.
func without[T comparable](list []T, one T) []T {
	kept := make([]T, 0, len(list))
	for _, e := range list {
		if e != one {
			kept = append(kept, e)
		}
	}
	return kept
}

// bury has everybody forget a part that has gone, and closes its backend.
func (s *Share) bury(b *burial) {
	p := b.p
	p.info.SetGone()
	s.onGone(&p.info)
	var err error
	if !<-s.aside(p, "Close", func() { err = p.Close() }) {
		err = errors.New("the backend panicked")
	}
	// Somebody may have the part in hand for long; no call reads these any more.
	p.Resolved = nil
	p.dirs.Store(nil)
	p.quota.Store(nil)
	if err != nil {
		s.log.Warn("close of a removed graft failed", "extension", p.info.Name, "path", p.info.Path, "error", err)
	}
	if s.onRemoved != nil {
		s.onRemoved(&p.info, err)
	}
	s.mu.Lock()
	s.closing = without(s.closing, b)
	s.mu.Unlock()
	close(b.done)
}

// Forget implements fsbackend.Backend.
func (s *Share) Forget(node, n uint64) {
	if n = s.replay.Load().forget(node, n); n > 0 {
		s.forget(node, n)
	}
}

// forget is Forget of what a lookUp of the share's own, of which the guest has not heard, has counted.
func (s *Share) forget(node, n uint64) {
	index, number := node>>indexShift, node&numberMask
	p := s.parts.get(index)
	if p == nil || !p.enterCall(&nobodysContext) {
		s.forgetGhost(uint16(index), n)
		return
	}
	defer p.done(&nobodysContext)
	p.unlooked(n)
	if p.dead.Load() || number == rootID {
		return // the root's lookup is the share's own answer
	}
	p.Forget(number, n)
	if q := p.metered(); q != nil {
		q.reap(number)
	}
}

// forgetGhost counts a FORGET of a part that has gone; with the last, its index is free.
func (s *Share) forgetGhost(index uint16, n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if left := s.ghosts[index]; n < left.lookups {
		left.lookups -= n
		s.ghosts[index] = left
	} else {
		delete(s.ghosts, index)
	}
}

// drop gives back the lookups that the share itself held of directories that are no longer on the way. Call it without mu.
func (s *Share) drop() {
	s.mu.Lock()
	holds := s.holds
	s.holds = nil
	s.mu.Unlock()
	for _, h := range holds {
		if !h.p.enterCall(&nobodysContext) {
			continue
		}
		forget := func() {
			defer h.p.done(&nobodysContext)
			h.p.Forget(h.number, 1)
		}
		if h.p.info.Isolated {
			s.aside(h.p, "Forget", forget)
		} else {
			s.contained(h.p, "Forget", forget)
		}
	}
}

// hold is a lookup that the share has of a directory.
type hold struct {
	p      *part
	number uint64
}

var _ fsbackend.Changing = (*Share)(nil)

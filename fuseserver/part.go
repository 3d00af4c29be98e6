package fuseserver

import (
	"log/slog"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/ratelog"
)

// bugs is the log of what one backend does, apart from what a guest does, so that no guest can drown it, and apart from
// other backends'.
type bugs struct {
	*ratelog.Logger
	stacked sync.Once // the stack of the first panic has been logged
}

func newBugs(log *slog.Logger) *bugs {
	return &bugs{Logger: ratelog.New(log, 10*time.Second, 5)}
}

// partState is what a Server keeps for one part.
type partState struct {
	part *fsbackend.Part
	bugs *bugs

	// mu is held for a few instructions at a time.
	mu      sync.Mutex
	forgets []fuseproto.ForgetOne // not yet made, in any order: counts are sums
	session *session              // that forgets are of
	running bool                  // RunForgets has been asked for, and will look again before it returns
}

// state returns p's state; nil stands for all parts that are not isolated.
func (s *Server) state(p *fsbackend.Part) *partState {
	if v, ok := s.parts.Load(p); ok {
		return v.(*partState)
	}
	v, _ := s.parts.LoadOrStore(p, &partState{part: p, bugs: newBugs(s.cfg.Log)})
	if p != nil && p.Gone() {
		s.parts.Delete(p) // gone may have been here before
	}
	return v.(*partState)
}

// OnGone has f called when one of the backend's parts has gone for good (fsbackend.Changing). Call it before the first
// request.
func (s *Server) OnGone(f func(*fsbackend.Part)) {
	s.onGone = f
}

// gone forgets p. FORGETs that it did not live to hear of are for the backend to know all the same: it counts them.
func (s *Server) gone(p *fsbackend.Part) {
	if v, ok := s.parts.LoadAndDelete(p); ok {
		st := v.(*partState)
		st.mu.Lock()
		left, session := st.forgets, st.session
		st.forgets = nil
		st.mu.Unlock()
		if session == s.session.Load() {
			for _, one := range left {
				s.forgetNow(nil, one.Nodeid, one.Nlookup)
			}
		}
	}
	s.onGone(p)
}

// bugsOf returns the log for p's bugs and what says there whose they are; nil is the whole backend.
func (s *Server) bugsOf(p *fsbackend.Part) (*bugs, []any) {
	if p == nil {
		return s.bugs, nil
	}
	return s.state(p).bugs, []any{"extension", p.Name, "path", p.Path}
}

// assign finds out which part r is for, and puts a gate between an isolated one and guest memory.
func (s *Server) assign(r *Request) {
	if len(r.args) >= inHeaderSize && r.op.flags&partless == 0 {
		r.part = s.divided.PartOf(r.header().NodeId)
	}
	var gate *fsbackend.Gate
	if r.isolated() {
		r.gate = fsbackend.Gate{}
		gate = &r.gate
	} else if !r.gated {
		return
	}
	r.gated = gate != nil
	r.dst.SetGate(gate)
	r.src.SetGate(gate)
}

func (r *Request) isolated() bool {
	return r.part != nil && r.part.Isolated
}

// Part returns the part that the request is for: nil where the backend is not Divided, and for what is for none or all.
func (r *Request) Part() *fsbackend.Part { return r.part }

// Owed says that Handle makes the call even if Abort has answered: a handle that is not released would stay for ever. It
// is so for isolated parts alone.
func (r *Request) Owed() bool {
	return r.op.flags&owed != 0 && r.isolated()
}

// over says that r's session is, whose nodes and handles its call would be for. A call may have waited for long for others
// of its part that hang, or for a lock.
func (r *Request) over() bool {
	return (r.part != nil || r.op.flags&waits != 0) && r.MayBlock && r.session != r.server.session.Load()
}

// slow says whether r's call may sleep whatever it does. FORGETs of slow parts do not: they are kept.
func (s *Server) slow(r *Request) bool {
	if s.divided == nil {
		return s.backend.Slow
	}
	return r.part != nil && r.part.Slow
}

func enter(p *fsbackend.Part) {
	if p != nil && p.Enter != nil {
		p.Enter()
	}
}

func leave(p *fsbackend.Part) {
	if p != nil && p.Leave != nil {
		p.Leave()
	}
}

// callPart runs the handler for the backend's part.
func (s *Server) callPart(r *Request) Errno {
	enter(r.part)
	defer leave(r.part)
	errno := r.op.handle(s, r)
	// Once it is given up, EIO is what we have told it.
	if errno == syscall.EIO && r.part.Isolated && r.state.Load() == pending && !r.gate.Closed() {
		r.part.Stats.Errors.Add(1)
		log, who := s.bugsOf(r.part)
		log.Warn("backend answers EIO", append(who, "opcode", r.Opcode())...)
	}
	return errno
}

// caught is deferred around what has no answer that could be EIO.
func (s *Server) caught(p *fsbackend.Part, opcode fuseproto.Opcode) {
	if cause := recover(); cause != nil {
		s.panicked(p, opcode, cause)
	}
}

// panicked counts and logs a panic; it is called while that unwinds.
func (s *Server) panicked(p *fsbackend.Part, opcode fuseproto.Opcode, cause any) {
	s.stats.Panics.Add(1)
	if p != nil {
		p.Stats.Panics.Add(1)
	}
	log, about := s.bugsOf(p)
	about = append(about, "opcode", opcode, "panic", cause)
	log.stacked.Do(func() { about = append(about, "stack", string(debug.Stack())) })
	log.Error("backend panicked; the guest gets EIO: please report this bug", about...)
}

// maxKept bounds the FORGETs kept for one part: 1 MiB of entries. Linux sends one for each inode it drops.
const maxKept = 1 << 16

// OnForgets has run called when there are FORGETs to be made, by RunForgets with the same argument, on a thread that may
// sleep: those of an isolated part on one of that part's threads, with nil those of the others. A Server that is not told
// makes them where the request is. Call it before the first request.
func (s *Server) OnForgets(run func(p *fsbackend.Part)) {
	s.later = run
}

// forgetPart makes a FORGET of one of the backend's parts, or keeps it. Nobody waits for its end, and it must not wait in a
// ring for a part that hangs: the ring is other parts' too.
func (s *Server) forgetPart(p *fsbackend.Part, node, n uint64) {
	if !p.Slow {
		s.forgetNow(p, node, n)
		return
	}
	key := p
	if !p.Isolated {
		key = nil
	}
	kept, wake := s.state(key).keep(s.session.Load(), fuseproto.ForgetOne{Nodeid: node, Nlookup: n})
	switch {
	case !kept && key != nil && key.Gone():
		s.forgetNow(nil, node, n)
	case !kept:
		p.Stats.Refused.Add(1)
		log, who := s.bugsOf(p)
		log.Warn("backend does not keep up with FORGETs, some are dropped: its nodes stay until the session ends", who...)
	case wake:
		s.later(key)
	}
}

func (s *Server) forgetNow(p *fsbackend.Part, node, n uint64) {
	defer s.caught(p, fuseproto.FUSE_FORGET)
	enter(p)
	defer leave(p)
	s.backend.Forget(node, n)
}

// keep says whether there was room for one, and whether RunForgets is to be asked for.
func (st *partState) keep(session *session, one fuseproto.ForgetOne) (kept, wake bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.part != nil && st.part.Gone() {
		return false, false
	}
	if st.session != session {
		st.session, st.forgets = session, st.forgets[:0]
	}
	if len(st.forgets) >= maxKept {
		return false, false
	}
	st.forgets = append(st.forgets, one)
	wake, st.running = !st.running, true
	return true, wake
}

// take moves forgets to chunk and returns how many; at 0, RunForgets is over.
func (st *partState) take(chunk []fuseproto.ForgetOne) (n int, session *session) {
	st.mu.Lock()
	defer st.mu.Unlock()
	left := max(len(st.forgets)-len(chunk), 0)
	n = copy(chunk, st.forgets[left:])
	st.forgets = st.forgets[:left]
	st.running = n > 0
	return n, st.session
}

// RunForgets makes the FORGETs that OnForgets has announced. The part's code runs: it may hang.
func (s *Server) RunForgets(p *fsbackend.Part) {
	st := s.state(p)
	var chunk [64]fuseproto.ForgetOne
	for {
		n, session := st.take(chunk[:])
		if n == 0 {
			return
		}
		for _, one := range chunk[:n] {
			if s.session.Load() != session {
				break // the backend has forgotten everything
			}
			at := s.divided.PartOf(one.Nodeid)
			if at != p && at.Isolated {
				if p == nil || !p.Gone() {
					continue // the index is another part's by now, whose threads these are not: the guest has lied
				}
				at = nil // there is only a count left to be kept
			}
			s.forgetNow(at, one.Nodeid, one.Nlookup)
		}
	}
}

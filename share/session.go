package share

import (
	"errors"
	"fmt"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const readdirplusFlags = fuseproto.FUSE_DO_READDIRPLUS | fuseproto.FUSE_READDIRPLUS_AUTO

// adaptable are flags that a Share makes up for where a backend cannot do them: it hides what could not be kept clean (see
// part.adapt), writes READDIRPLUS itself, refuses locks, and leaves what groups decide to the backend.
const adaptable = fuseproto.FUSE_HANDLE_KILLPRIV_V2 | fuseproto.FUSE_CREATE_SUPP_GROUP | fuseproto.FUSE_SUBMOUNTS | readdirplusFlags |
	fuseproto.FUSE_POSIX_LOCKS | fuseproto.FUSE_FLOCK_LOCKS

// wants are the flags that p's backend wants.
func (p *part) wants(defaults uint64) uint64 {
	if p.Wanter == nil {
		return defaults
	}
	return p.WantFlags(defaults)
}

// WantFlags implements fsbackend.Wanter: what every part wants, for a flag holds for all of them. For locks it is enough that
// one part has them: the others refuse (see lock). Where grafts come and go, it is what any later one can live with.
func (s *Share) WantFlags(defaults uint64) uint64 {
	grafts := s.snapshot()
	if s.dynamic {
		want := defaults &^ (fuseproto.FUSE_NO_OPEN_SUPPORT | fuseproto.FUSE_NO_OPENDIR_SUPPORT | fuseproto.FUSE_CACHE_SYMLINKS)
		lost := uint64(0)
		for _, p := range grafts {
			if !p.enterCall(&nobodysContext) {
				continue // it has gone since
			}
			flags := p.wants(defaults)
			p.done(&nobodysContext)
			want &= flags | adaptable
			lost |= flags &^ defaults
		}
		s.warnLost(lost)
		s.mu.Lock()
		s.wanted = want
		s.mu.Unlock()
		return want
	}
	want, some := ^uint64(0), uint64(0)
	plus, locks := false, false
	for _, p := range grafts {
		flags := p.wants(defaults)
		some |= flags
		locks = locks || p.Locker != nil
		if p.DirPlusReader != nil {
			plus = plus || flags&readdirplusFlags != 0
			want &= flags
		} else {
			want &= flags | readdirplusFlags // the share makes READDIRPLUS of its READDIR
		}
	}
	if !plus {
		want &^= readdirplusFlags
	}
	if !locks {
		want &^= fuseproto.FUSE_POSIX_LOCKS | fuseproto.FUSE_FLOCK_LOCKS
	}
	if !s.alone {
		want |= defaults & fuseproto.FUSE_SUBMOUNTS
		// Both are about an ENOSYS that is never given.
		want &^= fuseproto.FUSE_NO_OPEN_SUPPORT | fuseproto.FUSE_NO_OPENDIR_SUPPORT
	}
	for _, p := range grafts {
		if p.mapped {
			// A guest that checks access lists itself would find the backend's ids in them.
			want &^= fuseproto.FUSE_POSIX_ACL
		}
	}
	s.warnLost(some &^ defaults &^ want)
	return want
}

func (s *Share) warnLost(lost uint64) {
	if lost &= fuseproto.FUSE_POSIX_ACL | fuseproto.FUSE_SECURITY_CTX; lost != 0 {
		s.log.Warn("access lists or security labels are off for the whole share: not every part can do them, or there will be others",
			"posix_acl", lost&fuseproto.FUSE_POSIX_ACL != 0, "security_ctx", lost&fuseproto.FUSE_SECURITY_CTX != 0)
	}
}

// ErrUnfit says that a backend cannot live with what the share has agreed on with its guest.
var ErrUnfit = errors.New("the backend cannot do what the share has agreed on with the guest")

// adapt finds out how p lives with flags that are in force.
func (p *part) adapt(flags uint64) error {
	lacks := flags &^ p.wants(flags)
	p.unsafe.Store(lacks&fuseproto.FUSE_HANDLE_KILLPRIV_V2 != 0)
	switch lacks &^= adaptable; {
	case lacks == 0:
		return nil
	case lacks&fuseproto.FUSE_WRITEBACK_CACHE != 0:
		return fmt.Errorf("%w: writeback caching; serve it in a share without", ErrUnfit)
	}
	return fmt.Errorf("%w: INIT flags %#x; serve it as a share of its own", ErrUnfit, lacks)
}

// Init implements fsbackend.Initer.
func (s *Share) Init(f fsbackend.Features) {
	s.submounts.Store(f.Has(fuseproto.FUSE_SUBMOUNTS))
	s.noOpen.Store(f.Has(fuseproto.FUSE_NO_OPEN_SUPPORT))
	s.writeback.Store(f.Has(fuseproto.FUSE_WRITEBACK_CACHE))
	s.mu.Lock()
	s.sessions++
	s.features = &f
	parts := s.list
	s.mu.Unlock()
	s.all(parts, "Init", false, func(p *part) { p.init(f) })
	for _, p := range parts {
		if q := p.metered(); q != nil && !q.isCounted() && !p.dead.Load() {
			s.startCount(p)
		}
	}
}

// init tells p of a session.
func (p *part) init(f fsbackend.Features) {
	if p.share.dynamic {
		_ = p.adapt(f.Flags) // it fits: WantFlags has asked, or join
	}
	if p.Initer != nil {
		p.Init(f)
	}
}

// Reset implements fsbackend.Backend.
func (s *Share) Reset() {
	s.mu.Lock()
	s.sessions++
	s.features = nil
	parts := s.list
	s.mu.Unlock()
	s.loseNodes()
	s.all(parts, "Reset", false, func(p *part) { p.Reset() })
	s.replay.Load().reset()
	s.loseNodes() // what was found meanwhile, the backends may have forgotten
	s.mu.Lock()
	clear(s.ghosts)
	s.mu.Unlock()
	for _, p := range parts {
		p.lose()
	}
}

// Close implements fsbackend.Backend. A part whose Reset never ended is left as it is.
func (s *Share) Close() error {
	s.mu.Lock()
	s.sessions++ // ends what counts files
	s.features = nil
	s.mu.Unlock()
	for _, p := range s.snapshot() {
		p.lose()
	}
	return errors.Join(s.closeAll()...)
}

package share

import (
	"errors"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const readdirplusFlags = fuseproto.FUSE_DO_READDIRPLUS | fuseproto.FUSE_READDIRPLUS_AUTO

// WantFlags implements fsbackend.Wanter: what every part wants, for a flag holds for all of them. For locks it is enough that
// one part has them: the others refuse (see lock).
func (s *Share) WantFlags(defaults uint64) uint64 {
	grafts := s.parts[:len(s.shown)]
	want, some := ^uint64(0), uint64(0)
	plus, locks := false, false
	for _, p := range grafts {
		flags := defaults
		if p.Wanter != nil {
			flags = p.WantFlags(defaults)
		}
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
	if lost := some &^ defaults &^ want & (fuseproto.FUSE_POSIX_ACL | fuseproto.FUSE_SECURITY_CTX); lost != 0 {
		s.log.Warn("access lists or security labels are off for the whole share: not every part can do them",
			"posix_acl", lost&fuseproto.FUSE_POSIX_ACL != 0, "security_ctx", lost&fuseproto.FUSE_SECURITY_CTX != 0)
	}
	return want
}

// Init implements fsbackend.Initer.
func (s *Share) Init(f fsbackend.Features) {
	s.submounts.Store(f.Has(fuseproto.FUSE_SUBMOUNTS))
	s.noOpen.Store(f.Has(fuseproto.FUSE_NO_OPEN_SUPPORT))
	s.writeback.Store(f.Has(fuseproto.FUSE_WRITEBACK_CACHE))
	s.all("Init", false, func(p *part) {
		if p.Initer != nil {
			p.Init(f)
		}
	})
}

// Reset implements fsbackend.Backend.
func (s *Share) Reset() {
	s.loseNodes()
	s.all("Reset", false, func(p *part) { p.Reset() })
	s.replay.Load().reset()
	s.loseNodes() // what was found meanwhile, the backends may have forgotten
}

// Close implements fsbackend.Backend. A part whose Reset never ended is left as it is.
func (s *Share) Close() error {
	return errors.Join(s.closeAll()...)
}

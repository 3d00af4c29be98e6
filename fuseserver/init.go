package fuseserver

import (
	"syscall"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// minMinor is the oldest protocol served: virtio-fs came with 7.31 (Linux 5.4).
const minMinor = 31

// session is what one INIT agreed on. It never changes.
type session struct {
	fsbackend.Features
}

// Flags that a session has where the guest offers them, unless the backend says otherwise (fsbackend.Wanter).
const defaultFlags = fuseproto.FUSE_ASYNC_READ |
	fuseproto.FUSE_ATOMIC_O_TRUNC |
	fuseproto.FUSE_BIG_WRITES |
	fuseproto.FUSE_HAS_IOCTL_DIR |
	fuseproto.FUSE_AUTO_INVAL_DATA |
	fuseproto.FUSE_ASYNC_DIO |
	fuseproto.FUSE_PARALLEL_DIROPS |
	fuseproto.FUSE_MAX_PAGES |
	fuseproto.FUSE_SUBMOUNTS |
	fuseproto.FUSE_HANDLE_KILLPRIV_V2 |
	fuseproto.FUSE_SETXATTR_EXT |
	fuseproto.FUSE_INIT_EXT |
	fuseproto.FUSE_CREATE_SUPP_GROUP

const readdirplusFlags = fuseproto.FUSE_DO_READDIRPLUS | fuseproto.FUSE_READDIRPLUS_AUTO

// servable are the flags whose obligations this package and a willing backend can meet. The others never are: NFS
// export has no ops here; PASSTHROUGH, OVER_IO_URING and HAS_RESEND need /dev/fuse; MAP_ALIGNMENT and HAS_INODE_DAX a
// DAX window; REQUEST_TIMEOUT makes a guest give its file system up. ALLOW_IDMAP is left to backends: guests are reported
// to refuse it without POSIX_ACL.
const servable = defaultFlags | readdirplusFlags |
	lockFlags |
	fuseproto.FUSE_DONT_MASK |
	fuseproto.FUSE_WRITEBACK_CACHE |
	fuseproto.FUSE_NO_OPEN_SUPPORT |
	fuseproto.FUSE_HANDLE_KILLPRIV |
	fuseproto.FUSE_POSIX_ACL |
	fuseproto.FUSE_ABORT_ERROR |
	fuseproto.FUSE_CACHE_SYMLINKS |
	fuseproto.FUSE_NO_OPENDIR_SUPPORT |
	fuseproto.FUSE_EXPLICIT_INVAL_DATA |
	fuseproto.FUSE_SECURITY_CTX |
	fuseproto.FUSE_DIRECT_IO_ALLOW_MMAP |
	fuseproto.FUSE_NO_EXPORT_SUPPORT |
	fuseproto.FUSE_ALLOW_IDMAP

// Limits in INIT's reply.
const (
	maxBackground       = 1<<16 - 1
	congestionThreshold = maxBackground / 4 * 3
	pageSize            = 4096
)

// wantFlags returns the INIT flags to accept where the guest offers them.
func (s *Server) wantFlags() uint64 {
	flags := defaultFlags
	if s.backend.DirPlusReader != nil && !s.cfg.NoReaddirplus && s.cfg.Cache != CacheNever {
		flags |= readdirplusFlags
	}
	if s.cfg.Cache == CacheAlways {
		flags |= fuseproto.FUSE_CACHE_SYMLINKS
	}
	if s.cfg.Writeback {
		flags |= fuseproto.FUSE_WRITEBACK_CACHE
	}
	if s.cfg.AllowMmap {
		flags |= fuseproto.FUSE_DIRECT_IO_ALLOW_MMAP
	}
	locks := s.wantLocks()
	flags |= locks
	if s.backend.Wanter != nil {
		flags = s.backend.WantFlags(flags)
	}
	return flags & servable &^ (lockFlags &^ locks)
}

// wantLocks returns those of lockFlags that are both asked for and possible.
func (s *Server) wantLocks() (flags uint64) {
	if s.backend.Locker == nil {
		return 0
	}
	if s.cfg.PosixLock {
		flags |= fuseproto.FUSE_POSIX_LOCKS
	}
	if s.cfg.Flock {
		flags |= fuseproto.FUSE_FLOCK_LOCKS
	}
	return flags
}

// opInit begins a session, ending one that the guest has left without DESTROY.
func opInit(s *Server, r *Request) Errno {
	in := in[fuseproto.InitIn](r)
	o := out[fuseproto.InitOut](r)
	o.Major, o.Minor = fuseproto.FUSE_KERNEL_VERSION, fuseproto.FUSE_KERNEL_MINOR_VERSION
	if in.Major > fuseproto.FUSE_KERNEL_VERSION {
		// The guest is to send another INIT of this version.
		r.outSize = 8
		return fsbackend.OK
	}
	if in.Major < fuseproto.FUSE_KERNEL_VERSION || in.Minor < minMinor {
		s.stats.InitRefused.Add(1)
		s.log.Warn("guest speaks a FUSE version that is too old: expected 7.31 (Linux 5.4) or later", "major", in.Major, "minor", in.Minor)
		return syscall.EPROTO
	}
	offered := uint64(in.Flags)
	if in.Flags&uint32(fuseproto.FUSE_INIT_EXT) != 0 && len(r.args) >= inHeaderSize+initInExtSize {
		offered |= uint64(in.Flags2) << 32
	} else {
		offered &^= fuseproto.FUSE_INIT_EXT
	}
	f := fsbackend.Features{Minor: min(in.Minor, fuseproto.FUSE_KERNEL_MINOR_VERSION), Flags: offered & s.want}

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrNoSession
	}
	s.end()
	if s.backend.Initer != nil {
		s.backend.Init(f)
	}
	s.session.Store(&session{f})

	o.Minor = f.Minor
	o.MaxReadAhead = in.MaxReadAhead
	o.Flags, o.Flags2 = uint32(f.Flags), uint32(f.Flags>>32)
	o.MaxBackground, o.CongestionThreshold = maxBackground, congestionThreshold
	o.MaxPages = s.cfg.MaxPages
	o.MaxWrite = uint32(s.cfg.MaxPages) * pageSize
	o.TimeGran = 1
	return fsbackend.OK
}

// initInExtSize is how long fuse_init_in is from 7.36 on; before, it ended after flags.
const initInExtSize = 64

// opDestroy ends the session.
func opDestroy(s *Server, _ *Request) Errno {
	s.Reset()
	return fsbackend.OK
}

// end ends the session, if there is one. s.mu is held.
func (s *Server) end() {
	if s.session.Swap(nil) != nil {
		defer s.caught(nil, fuseproto.FUSE_DESTROY)
		s.locks.forgetEarly()
		defer s.unlocked()
		s.backend.Reset()
	}
}

// opOtherEndian refuses a guest whose INIT has its bytes swapped.
func opOtherEndian(s *Server, _ *Request) Errno {
	s.stats.InitRefused.Add(1)
	s.log.Warn("guest has the other endianness: expected one of the host's own")
	return syscall.EPROTO
}

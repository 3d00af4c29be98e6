// Package fuseserver answers FUSE requests: one at a time it decodes, checks, calls the backend and replies.
//
//	Begin: copy header and arguments out of guest memory, once, find the row of ops
//	Handle: session? room? names, extensions → handler in ops_*.go → fsbackend → reply, its header last
//
// A Server serves one file system to one guest. Requests are handled on as many threads as the caller likes, each with a
// Request of its own, without a lock between them: what they share is the session, an immutable value behind an atomic
// pointer that INIT, DESTROY and Reset replace. A request that began in one session and ends in the next is harmless: it
// may get ESTALE, or leave a lookup or handle that the next Reset takes back.
//
// Everything a guest sends is hostile until checked. What it gets wrong is answered with an errno and counted (Stats), and
// where it is worth a line, logged at a bounded rate.
package fuseserver

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/internal/ratelog"
	"github.com/sluicefs/sluice/internal/sys"
)

// Errno is what a guest sees.
type Errno = fsbackend.Errno

// ErrNoSession answers requests before INIT and after DESTROY or Reset (virtiofsd: EBADF).
const ErrNoSession = syscall.ENOTCONN

// DefaultMaxPages is what Config.MaxPages 0 means: 1 MiB in one READ or WRITE, what a ring of 260 entries or more carries
// (Linux fs/fuse/virtio_fs.c, virtio_fs_get_tree).
const DefaultMaxPages = 256

// Config describes a Server.
type Config struct {
	Backend fsbackend.Backend
	Log     *slog.Logger // nil: none

	ReadOnly      bool        // what would change a file or a name is EROFS
	Writeback     bool        // accept FUSE_WRITEBACK_CACHE: the guest collects writes and owns size and mtime
	Xattr         bool        // serve extended attributes; off, they are ENOSYS and the guest stops asking
	NoReaddirplus bool        // do not offer FUSE_DO_READDIRPLUS
	AllowMmap     bool        // accept FUSE_DIRECT_IO_ALLOW_MMAP: shared mmap of files that are not cached
	PosixLock     bool        // accept FUSE_POSIX_LOCKS, if the backend is a fsbackend.Locker: locks of fcntl(2) are not the guest's alone
	Flock         bool        // accept FUSE_FLOCK_LOCKS likewise: those of flock(2)
	AllowDirectIO bool        // let O_DIRECT through to the backend
	Cache         CachePolicy // CacheAuto is the zero value
	MaxPages      uint16      // 4 KiB pages in one READ or WRITE; 0: DefaultMaxPages
}

// Validate says what is wrong with c.
func (c Config) Validate() error {
	if c.Backend == nil {
		return errors.New("configure FUSE server: no backend")
	}
	if err := c.Cache.Validate(); err != nil {
		return fmt.Errorf("configure FUSE server: %w", err)
	}
	return nil
}

// Stats counts what went wrong (Snapshot has what was done, too); a guest can drive every one of them but Panics and BadReplies.
type Stats struct {
	Malformed   atomic.Uint64 // requests cut short, with bad names, counts or extensions
	NoRoom      atomic.Uint64 // no room for the reply: none or a bare EIO given
	NoSession   atomic.Uint64 // before INIT or after DESTROY
	InitRefused atomic.Uint64 // INITs of a version or endianness that is not served
	Unsupported atomic.Uint64 // opcodes that are not in the table
	Faults      atomic.Uint64 // guest memory was gone
	Aborted     atomic.Uint64 // answered by Abort
	BadReplies  atomic.Uint64 // a backend broke its contract: an errno or a size no guest must see
	Panics      atomic.Uint64 // a backend panicked
}

// Server answers one guest's FUSE requests from one backend.
type Server struct {
	cfg     Config
	backend *fsbackend.Resolved
	log     *ratelog.Logger // of what a guest does
	bugs    *bugs
	valid   uint64 // seconds that names and attributes are valid by default
	missing uint64 // seconds that the absence of names is, 0 for not at all
	want    uint64 // INIT flags
	stats   Stats

	divided fsbackend.Divided          // nil where the backend is not
	parts   sync.Map                   // *fsbackend.Part → *partState
	later   func(part *fsbackend.Part) // see OnForgets
	onGone  func(*fsbackend.Part)

	// counters are everyone's, shared the one that those without their own use.
	countersMu sync.Mutex
	counters   []*Counters
	shared     *Counters

	locks lockTable
	retry func() // see OnUnlock

	session atomic.Pointer[session] // nil without one

	// mu orders the beginnings and ends of sessions.
	mu     sync.Mutex
	closed bool
}

// New returns a Server that waits for the guest's INIT.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.MaxPages == 0 {
		cfg.MaxPages = DefaultMaxPages
	}
	s := &Server{
		cfg:     cfg,
		backend: fsbackend.Resolve(cfg.Backend),
		log:     ratelog.New(cfg.Log, 10*time.Second, 5),
		bugs:    newBugs(cfg.Log),
		valid:   cfg.Cache.Valid(),
		missing: cfg.Cache.Missing(),
	}
	s.want = s.wantFlags()
	s.shared = s.NewCounters()
	s.divided, _ = cfg.Backend.(fsbackend.Divided)
	if c, ok := cfg.Backend.(fsbackend.Changing); ok {
		c.OnGone(s.gone)
		s.missing = 0 // a part may bring the name at any time
	}
	s.onGone = func(*fsbackend.Part) {}
	s.later = s.RunForgets
	s.retry = func() {}
	return s, nil
}

// Stats returns the Server's counters, which go on counting.
func (s *Server) Stats() *Stats { return &s.stats }

// Handle answers r, which Begin has prepared. With done, the request is over: written is the reply's length in bytes, which
// is used.len and its out_header.len, or 0 if there is none. Without, the call may sleep: call Handle again with
// r.MayBlock set, from a thread that may; where it was set, the request is Waiting. If Abort has answered r meanwhile, it returns 0 and true.
func (s *Server) Handle(r *Request) (written uint32, done bool) {
	if r.state.Load() != pending && !(r.MayBlock && r.Owed()) {
		return 0, true
	}
	errno := r.errno
	r.waiting = false
	if errno == fsbackend.OK {
		errno = s.dispatch(r)
	}
	if errno == fsbackend.ErrMayBlock && (!r.MayBlock || r.waiting) {
		return 0, false
	}
	if r.op.flags&waits != 0 {
		s.locks.remove(r)
	}
	return s.answer(r, errno), true
}

// dispatch calls the handler of r's opcode once everything that the table knows about it holds.
func (s *Server) dispatch(r *Request) Errno {
	op := r.op
	switch {
	case op.flags&anytime == 0 && (r.session == nil || r.over()):
		s.stats.NoSession.Add(1)
		return ErrNoSession
	case op.flags&noReply == 0 && r.writable < headerSize+uint64(op.out):
		// Known before the call, so that nothing is done whose outcome the guest would never learn.
		s.stats.NoRoom.Add(1)
		return syscall.EIO
	case op.flags&modifies != 0 && s.cfg.ReadOnly:
		return syscall.EROFS
	}
	if errno := r.decode(); errno != fsbackend.OK {
		// A name of 256 bytes is nothing wrong: fuse lets longer ones through (Linux fs/fuse/fuse_i.h, FUSE_NAME_MAX).
		if errno != syscall.ENAMETOOLONG {
			s.malformed(r, errno)
		}
		return errno
	}
	if !r.MayBlock && (op.flags&mayBlock != 0 || op.flags&inline == 0 && s.slow(r)) {
		return fsbackend.ErrMayBlock
	}
	r.ctx.MayBlock = r.MayBlock
	if r.MayBlock {
		r.ctx.Cancel = r.Cancel
	}
	if r.Counters != nil {
		r.ctx.Shard = r.Counters.shard
	}
	r.outSize = int(op.out)
	clear(r.out.body[:(op.out+7)/8])
	return s.call(r)
}

// call runs the handler, which runs the backend: its bugs end the request, not the process.
func (s *Server) call(r *Request) (errno Errno) {
	defer s.recovered(r, &errno)
	defer sys.Guard(&r.faulted)
	if p := r.part; p == nil || !p.Isolated && p.Enter == nil && p.Leave == nil {
		errno = r.op.handle(s, r)
	} else {
		errno = s.callPart(r)
	}
	if errno == errCounted {
		return syscall.EIO
	}
	return errno
}

// errCounted is EIO that the backend has not answered, or that is counted and logged already. It does not leave call.
const errCounted = fsbackend.ErrMayBlock << 1

// recovered is deferred. It makes EIO of a fault in guest memory and of any other panic.
func (s *Server) recovered(r *Request, errno *Errno) {
	if r.faulted {
		r.faulted = false
		s.stats.Faults.Add(1)
		*errno = syscall.EIO
		if r.part != nil {
			s.panicked(r.part, r.Opcode(), "memory fault") // guest memory that is gone ends a Sink's or Source's method, not the call
		}
		return
	}
	cause := recover()
	if cause == nil {
		return
	}
	*errno = syscall.EIO
	s.panicked(r.part, r.Opcode(), cause)
}

// malformed counts and logs a request that breaks the protocol.
func (s *Server) malformed(r *Request, errno Errno) {
	s.stats.Malformed.Add(1)
	s.log.Warn("guest sent a malformed FUSE request", "opcode", r.Opcode(), "unique", r.Unique(), "answer", errno)
}

// broken counts and logs a reply of the backend that breaks its contract, and returns what the guest gets instead.
func (s *Server) broken(r *Request, what string, value any) Errno {
	s.stats.BadReplies.Add(1)
	if r.isolated() {
		r.part.Stats.Errors.Add(1)
	}
	log, about := s.bugsOf(r.part)
	about = append(about, "opcode", r.Opcode(), "what", what, "value", value)
	log.Error("backend broke its contract; the guest gets EIO: please report this bug", about...)
	return errCounted
}

// Reset ends the session, as when the device is reset or the front-end is gone: the backend forgets every lookup and
// handle, and the next INIT starts anew. Without a session it does nothing.
func (s *Server) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end()
}

// Close ends the session and closes the backend. No request may be running or follow. Closing twice does nothing.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.end()
	if err := s.backend.Close(); err != nil {
		return fmt.Errorf("close backend: %w", err)
	}
	return nil
}

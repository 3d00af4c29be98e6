package fuseserver

import (
	"math"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const lockFlags = fuseproto.FUSE_POSIX_LOCKS | fuseproto.FUSE_FLOCK_LOCKS

// checkLock says what is wrong with a request for a lock. Kinds that have not been agreed on are the guest's own business.
func checkLock(s *Server, r *Request, in *fuseproto.LkIn) Errno {
	kind := fuseproto.FUSE_POSIX_LOCKS
	if in.LkFlags&fuseproto.FUSE_LK_FLOCK != 0 {
		kind = fuseproto.FUSE_FLOCK_LOCKS
	}
	if s.backend.Locker == nil || !r.session.Has(kind) {
		return syscall.ENOSYS
	}
	switch in.Lk.Typ {
	case unix.F_RDLCK, unix.F_WRLCK, unix.F_UNLCK:
	default:
		return syscall.EINVAL
	}
	if in.Lk.Start > in.Lk.End || in.Lk.End > math.MaxInt64 {
		return syscall.EINVAL
	}
	return fsbackend.OK
}

func opGetlk(s *Server, r *Request) Errno {
	in := in[fuseproto.LkIn](r)
	if errno := checkLock(s, r, in); errno != fsbackend.OK {
		return errno
	}
	if in.LkFlags&fuseproto.FUSE_LK_FLOCK != 0 || in.Lk.Typ == unix.F_UNLCK {
		return syscall.EINVAL
	}
	return s.backend.Getlk(&r.ctx, in, out[fuseproto.LkOut](r))
}

func opSetlk(s *Server, r *Request) Errno {
	in := in[fuseproto.LkIn](r)
	if errno := checkLock(s, r, in); errno != fsbackend.OK {
		return errno
	}
	errno := s.backend.Setlk(&r.ctx, in)
	if errno == fsbackend.OK && in.Lk.Typ != unix.F_WRLCK {
		s.unlocked() // a read lock may have taken the place of a write lock
	}
	return errno
}

// opSetlkw is SETLK as often as it takes, in calls of Handle that end without being done.
func opSetlkw(s *Server, r *Request) Errno {
	if s.locks.isInterrupted(r) {
		return syscall.EINTR
	}
	errno := opSetlk(s, r)
	if errno != syscall.EAGAIN {
		return errno
	}
	if !r.MayBlock {
		return fsbackend.ErrMayBlock
	}
	return s.locks.wait(r)
}

// opInterrupt has a request for a lock give up its wait. All others end without that. Linux does not send it over virtio-fs
// up to 7.2 (fs/fuse/virtio_fs.c, virtio_fs_send_interrupt): there even a process that is killed waits on until it has the
// lock, and gives it back as it ends.
func opInterrupt(s *Server, r *Request) Errno {
	if r.session != nil && r.session.Flags&lockFlags != 0 && s.locks.interrupt(in[fuseproto.InterruptIn](r).Unique) {
		s.retry()
	}
	return fsbackend.OK
}

// OnUnlock has retry called when a request whose Handle has said Waiting may get on: a lock has been given back, a guest's
// process was interrupted, or the session is over. It must not wait for anything. Call it before the first request.
func (s *Server) OnUnlock(retry func()) {
	s.retry = retry
}

// unlocked is called when a lock may have been given back.
func (s *Server) unlocked() {
	if s.locks.n.Load() > 0 {
		s.retry()
	}
}

// MaxWaiting is how many requests may wait for locks at a time; ENOLCK answers more.
const MaxWaiting = 256

// maxEarly bounds the interruptions kept that have come before what they interrupt. hiprio is not ordered with the other
// queues.
const maxEarly = 32

// lockTable knows the requests that wait for locks.
type lockTable struct {
	n atomic.Int32 // len(waiting)

	// mu is held for a few instructions at a time.
	mu        sync.Mutex
	waiting   map[uint64]*Request // by unique
	early     [maxEarly]uint64    // uniques interrupted that did not wait; 0: none
	nextEarly int
}

// wait has r wait, unless it must not.
func (t *lockTable) wait(r *Request) Errno {
	t.mu.Lock()
	defer t.mu.Unlock()
	unique := r.Unique()
	for i, early := range t.early {
		if early == unique && unique != 0 {
			t.early[i] = 0
			return syscall.EINTR
		}
	}
	other := t.waiting[unique]
	switch {
	case r.state.Load() != pending:
		return syscall.EINTR // Abort has answered already
	case other == r && r.interrupted:
		return syscall.EINTR
	case other == r:
	case other != nil || len(t.waiting) >= MaxWaiting:
		return syscall.ENOLCK
	default:
		if t.waiting == nil {
			t.waiting = make(map[uint64]*Request)
		}
		r.interrupted = false
		t.waiting[unique] = r
		t.n.Store(int32(len(t.waiting)))
	}
	r.waiting = true
	return fsbackend.ErrMayBlock
}

// remove ends r's wait, if it does.
func (t *lockTable) remove(r *Request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if unique := r.Unique(); t.waiting[unique] == r {
		delete(t.waiting, unique)
		t.n.Store(int32(len(t.waiting)))
	}
}

func (t *lockTable) isInterrupted(r *Request) bool {
	if t.n.Load() == 0 {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.waiting[r.Unique()] == r && r.interrupted
}

// interrupt says whether a request of this number waits. If not, it may be on its way.
func (t *lockTable) interrupt(unique uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r := t.waiting[unique]; r != nil {
		r.interrupted = true
		return true
	}
	t.early[t.nextEarly] = unique
	t.nextEarly = (t.nextEarly + 1) % maxEarly
	return false
}

// forgetEarly is called between sessions, which number their requests anew.
func (t *lockTable) forgetEarly() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.early[:])
}

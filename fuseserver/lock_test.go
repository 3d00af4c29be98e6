package fuseserver

import (
	"math"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// setlk is a request for a lock on bytes 1 to 2.
func setlk(opcode fuseproto.Opcode, unique uint64, typ, flags uint32) []byte {
	msg := message(opcode, 3, uint64(9), uint64(77), uint64(1), uint64(2), typ, uint32(11), flags, uint32(0))
	copy(msg[8:], cat(unique))
	return msg
}

func interrupt(unique uint64) []byte { return message(fuseproto.FUSE_INTERRUPT, 0, unique) }

// lockable is a guest whose backend's locks are all taken until free is set, and a count of OnUnlock's calls.
func lockable(t *testing.T) (g *guest, free *atomic.Bool, retries *atomic.Int32) {
	b := newStub()
	free, retries = new(atomic.Bool), new(atomic.Int32)
	b.setlk = func() Errno {
		if free.Load() {
			return 0
		}
		return syscall.EAGAIN
	}
	g = newGuest(t, Config{Backend: b, PosixLock: true, Flock: true})
	g.s.OnUnlock(func() { retries.Add(1) })
	g.mount(allFlags)
	return g, free, retries
}

// wait has another request begin to wait, and returns it and its reply's room.
func (g *guest) wait(unique uint64) (*Request, func() []byte) {
	g.t.Helper()
	own := *g
	own.r = g.s.NewRequest()
	room := own.begin(setlk(fuseproto.FUSE_SETLKW, unique, unix.F_WRLCK, 0), 16)
	if _, done := g.s.Handle(own.r); done {
		g.t.Fatal("SETLKW of a lock that is taken is done on a thread that may not sleep")
	}
	own.r.MayBlock = true
	if _, done := g.s.Handle(own.r); done || !own.r.Waiting() {
		g.t.Fatal("SETLKW of a lock that is taken does not wait")
	}
	return own.r, room
}

// ends makes r's call again, which must end it with errno.
func (g *guest) ends(r *Request, room func() []byte, errno Errno) {
	g.t.Helper()
	written, done := g.s.Handle(r)
	if !done || r.Waiting() || written != 16 {
		g.t.Fatalf("Handle: %d bytes, done %v, waiting %v", written, done, r.Waiting())
	}
	if got := room()[4:8]; string(got) != string(cat(-int32(errno))) {
		g.t.Fatalf("answered %x, expected %v", got, errno)
	}
	if n := g.s.locks.n.Load(); n != 0 || len(g.s.locks.waiting) != 0 {
		g.t.Fatalf("%d requests are kept as waiting", n)
	}
}

func TestLockRequestsAreChecked(t *testing.T) {
	lock := func(opcode fuseproto.Opcode, start, end uint64, typ, flags uint32) []byte {
		return message(opcode, 3, uint64(9), uint64(77), start, end, typ, uint32(11), flags, uint32(0))
	}
	posix, flock := Config{PosixLock: true}, Config{Flock: true}
	tests := []struct {
		name  string
		cfg   Config
		msg   []byte
		errno Errno
	}{
		{"type 3", posix, lock(fuseproto.FUSE_SETLK, 0, 1, 3, 0), syscall.EINVAL},
		{"end before start", posix, lock(fuseproto.FUSE_SETLK, 2, 1, 0, 0), syscall.EINVAL},
		{"end at 2^63", posix, lock(fuseproto.FUSE_SETLKW, 0, 1<<63, 0, 0), syscall.EINVAL},
		{"GETLK of F_UNLCK", posix, lock(fuseproto.FUSE_GETLK, 0, 1, unix.F_UNLCK, 0), syscall.EINVAL},
		{"GETLK of flock", flock, lock(fuseproto.FUSE_GETLK, 0, 1, unix.F_RDLCK, 1), syscall.EINVAL},
		{"flock where fcntl's are shared", posix, lock(fuseproto.FUSE_SETLK, 0, math.MaxInt64, 0, 1), syscall.ENOSYS},
		{"fcntl where flock's are shared", flock, lock(fuseproto.FUSE_SETLKW, 0, 1, 0, 0), syscall.ENOSYS},
		{"GETLK where flock's are shared", flock, lock(fuseproto.FUSE_GETLK, 0, 1, 0, 0), syscall.ENOSYS},
		{"where none are", Config{}, lock(fuseproto.FUSE_SETLK, 0, 1, 0, 0), syscall.ENOSYS},
		{"read-only", Config{PosixLock: true, ReadOnly: true}, lock(fuseproto.FUSE_SETLK, 0, 1, 0, 0), 0},
	}
	for _, tt := range tests {
		g := newGuest(t, tt.cfg)
		g.mount(allFlags)
		g.fails(tt.msg, tt.errno)
		if calls := g.b.taken(); (len(calls) > 0) != (tt.errno == 0) {
			t.Errorf("%s: backend is asked %q", tt.name, calls)
		}
	}
}

func TestWaitForLock(t *testing.T) {
	g, free, retries := lockable(t)
	g.fails(setlk(fuseproto.FUSE_SETLK, 1, unix.F_WRLCK, 0), syscall.EAGAIN)
	r, room := g.wait(2)
	if retries.Load() != 0 {
		t.Error("woken by nothing")
	}
	free.Store(true)
	for i, msg := range [][]byte{
		setlk(fuseproto.FUSE_SETLK, 3, unix.F_UNLCK, 0), setlk(fuseproto.FUSE_SETLK, 3, unix.F_RDLCK, 0),
		message(fuseproto.FUSE_FLUSH, 3, uint64(9), uint64(0), uint64(77)), message(fuseproto.FUSE_RELEASE, 3, uint64(9), uint64(0), uint64(0)),
	} {
		if g.do(msg); int(retries.Load()) != i+1 {
			t.Errorf("what may free a lock, request %d, has woken %d times in all", i, retries.Load())
		}
	}
	g.ends(r, room, 0)
	if g.do(setlk(fuseproto.FUSE_SETLK, 3, unix.F_UNLCK, 0)); retries.Load() != 4 {
		t.Error("OnUnlock's function is called though nobody waits")
	}
}

func TestInterrupt(t *testing.T) {
	g, _, retries := lockable(t)
	r, room := g.wait(2)
	g.do(interrupt(3)) // comes before the request
	if _, done := g.s.Handle(r); done || retries.Load() != 0 {
		t.Fatal("interrupted by another request's INTERRUPT")
	}
	g.do(interrupt(2))
	if retries.Load() != 1 {
		t.Error("INTERRUPT wakes nobody")
	}
	g.ends(r, room, syscall.EINTR)

	room = g.begin(setlk(fuseproto.FUSE_SETLKW, 3, unix.F_WRLCK, 0), 16)
	g.s.Handle(g.r)
	g.r.MayBlock = true
	g.ends(g.r, room, syscall.EINTR)
	// An INTERRUPT is for one request, and those of a session go with it.
	r, room = g.wait(3)
	g.do(interrupt(3))
	g.ends(r, room, syscall.EINTR)
	g.do(interrupt(4))
	g.mount(allFlags)
	r, room = g.wait(4)
	g.s.Reset()
	g.ends(r, room, ErrNoSession)
}

func TestWaitEnds(t *testing.T) {
	g, free, retries := lockable(t)
	r, _ := g.wait(2)
	if r.Abort(syscall.ENOLCK) != 16 {
		t.Fatal("Abort has not answered")
	}
	free.Store(true)
	g.b.taken()
	if _, done := g.s.Handle(r); !done || len(g.b.taken()) > 0 {
		t.Error("the lock is taken though nobody waits any more")
	}
	free.Store(false)
	r, room := g.wait(3)
	g.s.Reset()
	if retries.Load() != 1 {
		t.Error("the end of the session wakes nobody")
	}
	g.ends(r, room, ErrNoSession)
}

func TestTooManyWait(t *testing.T) {
	g, _, _ := lockable(t)
	var first *Request
	for i := range MaxWaiting {
		r, _ := g.wait(uint64(i + 10))
		if i == 0 {
			first = r
		}
	}
	g.fails(setlk(fuseproto.FUSE_SETLKW, 5, unix.F_WRLCK, 0), syscall.ENOLCK)
	first.Abort(syscall.EIO)
	g.fails(setlk(fuseproto.FUSE_SETLKW, 11, unix.F_WRLCK, 0), syscall.ENOLCK) // two of one unique
	g.wait(5)
}

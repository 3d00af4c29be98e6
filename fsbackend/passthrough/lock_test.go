package passthrough

import (
	"io"
	"math"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// locker is a guest that has "file" of a directory open, in a session that shares its locks.
type locker struct {
	*fsbackendtest.Client
	t        *testing.T
	fs       *FS
	node, fh uint64
}

func newLocker(t *testing.T, dir string) *locker {
	t.Helper()
	fs, err := New(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fs.Close(); err != nil {
			t.Error(err)
		}
	})
	l := &locker{Client: &fsbackendtest.Client{R: fsbackend.Resolve(fs)}, t: t, fs: fs}
	l.mount()
	return l
}

func (l *locker) mount() {
	l.t.Helper()
	l.fs.Init(fsbackend.Features{Flags: fuseproto.FUSE_POSIX_LOCKS | fuseproto.FUSE_FLOCK_LOCKS})
	e, errno := l.Lookup(fsbackendtest.Root, "file")
	l.is(errno, 0, "LOOKUP")
	l.node = e.NodeId
	l.fh = l.open(unix.O_RDWR)
}

func (l *locker) open(flags uint32) uint64 {
	l.t.Helper()
	fh, errno := l.Open(l.node, flags)
	l.is(errno, 0, "OPEN")
	return fh
}

func (l *locker) is(errno, want errno, what string) {
	l.t.Helper()
	if errno != want {
		l.t.Fatalf("%s: %v, expected %v", what, errno, want)
	}
}

func (l *locker) in(owner uint64, typ uint32, start, end uint64) *fuseproto.LkIn {
	in := &fuseproto.LkIn{Fh: l.fh, Owner: owner, Lk: fuseproto.FileLock{Start: start, End: end, Typ: typ, Pid: uint32(100 + owner)}}
	in.NodeId = l.node
	return in
}

func (l *locker) set(owner uint64, typ uint32, start, end uint64) errno {
	return l.fs.Setlk(&fsbackend.Context{}, l.in(owner, typ, start, end))
}

func (l *locker) flock(fh uint64, typ uint32) errno {
	in := l.in(fh, typ, 0, math.MaxInt64)
	in.Fh, in.LkFlags = fh, fuseproto.FUSE_LK_FLOCK
	return l.fs.Setlk(&fsbackend.Context{}, in)
}

func (l *locker) get(owner uint64, typ uint32, start, end uint64) fuseproto.FileLock {
	l.t.Helper()
	var out fuseproto.LkOut
	l.is(l.fs.Getlk(&fsbackend.Context{}, l.in(owner, typ, start, end), &out), 0, "GETLK")
	return out.Lk
}

func (l *locker) flush(owner uint64) {
	l.t.Helper()
	in := &fuseproto.FlushIn{Fh: l.fh, LockOwner: owner}
	in.NodeId = l.node
	l.is(l.fs.Flush(&fsbackend.Context{}, in), 0, "FLUSH")
}

const (
	shared    = unix.F_RDLCK
	exclusive = unix.F_WRLCK
	none      = unix.F_UNLCK
	toEnd     = math.MaxInt64
)

func lockDir(t *testing.T) (dir string, host *os.File) {
	t.Helper()
	dir = t.TempDir()
	host, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	return dir, host
}

// Two daemons on one directory, and two processes of one guest, conflict as processes of the host do.
func TestLocksConflict(t *testing.T) {
	dir, _ := lockDir(t)
	a, b := newLocker(t, dir), newLocker(t, dir)
	for _, other := range []struct {
		name string
		*locker
		owner uint64
	}{{"another daemon's guest", b, 1}, {"another process", a, 2}} {
		t.Run(other.name, func(t *testing.T) {
			o := other.owner
			a.is(a.set(1, exclusive, 10, 19), 0, "lock 10-19")
			a.is(other.set(o, exclusive, 19, 30), unix.EAGAIN, "lock across its end")
			a.is(other.set(o, shared, 0, toEnd), unix.EAGAIN, "read lock of all")
			a.is(other.set(o, exclusive, 20, toEnd), 0, "lock behind it")
			a.is(a.set(1, shared, 10, 14), 0, "half of it a read lock")
			a.is(other.set(o, shared, 12, 14), 0, "read lock beside it")
			a.is(a.set(1, exclusive, 10, 14), unix.EAGAIN, "upgrade across a read lock")
			a.is(a.set(1, none, 0, 16), 0, "unlock the front")
			a.is(other.set(o, exclusive, 10, 16), 0, "lock what is free")
			a.is(other.set(o, exclusive, 17, 17), unix.EAGAIN, "lock what is not")
			other.flush(o)
			a.is(a.set(1, exclusive, 0, toEnd), 0, "lock all after the other's FLUSH")
			a.flush(1)
			a.is(other.set(o, exclusive, 0, toEnd), 0, "the other way round")
			other.flush(o)
		})
	}
}

// What a program of the host has locked the guest does not get, and the other way round.
func TestLocksOfTheHost(t *testing.T) {
	dir, host := lockDir(t)
	g := newLocker(t, dir)
	fl := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: 5, Len: 5}
	for name, cmd := range map[string]int{"fcntl": unix.F_SETLK, "OFD": unix.F_OFD_SETLK} {
		set := func(typ int16) error {
			own := fl
			own.Type = typ
			return unix.FcntlFlock(host.Fd(), cmd, &own)
		}
		if err := set(unix.F_WRLCK); err != nil {
			t.Fatal(err)
		}
		g.is(g.set(1, shared, 9, 9), unix.EAGAIN, name+": lock what the host has")
		if got, want := g.get(1, shared, 0, toEnd), (fuseproto.FileLock{Start: 5, End: 9, Typ: unix.F_WRLCK}); got != want {
			t.Errorf("%s: GETLK finds %+v, expected %+v", name, got, want)
		}
		if err := set(unix.F_UNLCK); err != nil {
			t.Fatal(err)
		}
		g.is(g.set(1, exclusive, 9, 9), 0, name+": lock what the host had")
		if err := set(unix.F_WRLCK); err != unix.EAGAIN {
			t.Errorf("%s: the host locks what the guest has: %v", name, err)
		}
		g.flush(1)
		if err := set(unix.F_WRLCK); err != nil {
			t.Errorf("%s: the host locks what the guest had: %v", name, err)
		}
		if err := set(unix.F_UNLCK); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Flock(int(host.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	g.is(g.flock(g.fh, shared), unix.EAGAIN, "flock what the host has")
	g.is(g.set(1, exclusive, 0, toEnd), 0, "fcntl beside flock")
	if err := unix.Flock(int(host.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	g.is(g.flock(g.fh, shared), 0, "flock")
	if err := unix.Flock(int(host.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EAGAIN {
		t.Errorf("the host flocks what the guest has: %v", err)
	}
	g.is(g.flock(g.fh, none), 0, "flock: unlock")
	if err := unix.Flock(int(host.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the host flocks what the guest had: %v", err)
	}
}

// Locks end with FLUSH, RELEASE and the session, and nothing else ends them.
func TestLocksEnd(t *testing.T) {
	dir, _ := lockDir(t)
	a, b := newLocker(t, dir), newLocker(t, dir)
	taken := func(what string, want errno) {
		t.Helper()
		a.is(b.set(1, exclusive, 0, toEnd), want, what)
		if want == 0 {
			b.flush(1)
		}
	}
	second := a.open(unix.O_RDWR)
	a.is(a.set(7, exclusive, 0, 1), 0, "lock")
	a.flush(8)
	taken("after another owner's FLUSH", unix.EAGAIN)
	a.Release(a.node, second)
	taken("after another handle's RELEASE", unix.EAGAIN)
	a.flush(7)
	taken("after FLUSH", 0)

	// The guest's F_OFD_SETLK has an owner that never comes with a FLUSH.
	a.is(a.set(9, exclusive, 0, 1), 0, "lock")
	a.Release(a.node, a.fh)
	taken("after RELEASE", 0)
	a.fh = a.open(unix.O_RDWR)

	a.is(a.flock(a.fh, exclusive), 0, "flock")
	a.is(b.flock(b.fh, exclusive), unix.EAGAIN, "the other's flock")
	a.flush(a.fh)
	a.is(b.flock(b.fh, exclusive), unix.EAGAIN, "the other's flock after FLUSH")
	a.Release(a.node, a.fh)
	a.is(b.flock(b.fh, exclusive), 0, "the other's flock after RELEASE")
	a.is(b.flock(b.fh, none), 0, "its unlock")

	a.fh = a.open(unix.O_RDWR)
	a.is(a.set(7, exclusive, 0, 1), 0, "lock")
	a.is(a.flock(a.fh, exclusive), 0, "flock")
	a.fs.Reset()
	taken("after Reset", 0)
	a.is(b.flock(b.fh, exclusive), 0, "the other's flock after Reset")
	a.is(a.set(7, exclusive, 0, 1), unix.EBADF, "lock with a handle of the last session")
	a.mount()
	if n := a.fs.locks.count; n != 0 || len(a.fs.locks.files) != 0 {
		t.Errorf("%d files are kept for locks", n)
	}
}

func TestGetlk(t *testing.T) {
	dir, _ := lockDir(t)
	a, b := newLocker(t, dir), newLocker(t, dir)
	free := fuseproto.FileLock{Start: 3, End: 8, Typ: none}
	if got := a.get(1, exclusive, 3, 8); got != free {
		t.Errorf("GETLK of an unlocked file: %+v", got)
	}
	a.is(a.set(1, exclusive, 5, toEnd), 0, "lock")
	if got := a.get(1, exclusive, 3, 8); got != free {
		t.Errorf("GETLK finds the owner's own lock: %+v", got)
	}
	if got, want := a.get(2, shared, 3, 8), (fuseproto.FileLock{Start: 5, End: toEnd, Typ: exclusive, Pid: 101}); got != want {
		t.Errorf("GETLK by another process finds %+v, expected %+v", got, want)
	}
	a.is(a.set(2, shared, 0, 1), 0, "another's lock")
	if got, want := a.get(3, shared, 3, 8), (fuseproto.FileLock{Start: 5, End: toEnd, Typ: exclusive, Pid: 101}); got != want {
		t.Errorf("GETLK with a second owner finds %+v, expected %+v", got, want)
	}
	if got, want := b.get(1, shared, 3, 8), (fuseproto.FileLock{Start: 5, End: toEnd, Typ: exclusive}); got != want {
		t.Errorf("GETLK by another guest finds %+v, expected %+v", got, want)
	}
}

// A file that the daemon may not write has read locks. A handle for reading does for a lock, and makes way for later ones.
func TestLocksForReading(t *testing.T) {
	dir, _ := lockDir(t)
	g := newLocker(t, dir)
	writer := g.fh
	g.fh = g.open(unix.O_RDONLY)
	g.is(g.set(1, shared, 0, 9), 0, "read lock")
	g.fh = writer
	g.is(g.set(1, exclusive, 0, 9), 0, "upgrade by way of another handle")
	g.flush(1)

	dirHandle, errno := g.Opendir(fsbackendtest.Root)
	g.is(errno, 0, "OPENDIR")
	in := g.in(1, shared, 0, 9)
	in.NodeId, in.Fh = fsbackendtest.Root, dirHandle
	g.is(g.fs.Setlk(&fsbackend.Context{}, in), unix.EBADF, "lock of a directory")
	g.Releasedir(fsbackendtest.Root, dirHandle)
}

func TestLockFilesAreBounded(t *testing.T) {
	dir, _ := lockDir(t)
	g := newLocker(t, dir)
	g.fs.locks.count = maxLockFiles - 1
	g.is(g.set(1, shared, 0, 9), 0, "the last lock")
	g.is(g.set(2, shared, 0, 9), unix.ENOLCK, "one too many")
	g.is(g.set(1, shared, 20, 29), 0, "another of the last's")
	g.flush(1)
	g.is(g.set(2, shared, 0, 9), 0, "in its place")
}

// Without POSIX locks FLUSH has nothing to do, and the guest is to stop sending it.
func TestFlushForLocks(t *testing.T) {
	dir, _ := lockDir(t)
	g := newLocker(t, dir)
	if g.fs.remote {
		t.Fatal("the directory for tests is on a network's file system: expected a local one in TMPDIR")
	}
	g.is(g.Flush(g.node, g.fh), 0, "FLUSH with locks")
	g.fs.Init(fsbackend.Features{})
	g.is(g.Flush(g.node, g.fh), unix.ENOSYS, "FLUSH without")
}

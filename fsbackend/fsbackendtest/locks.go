package fsbackendtest

import (
	"math"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const lockFlags = fuseproto.FUSE_POSIX_LOCKS | fuseproto.FUSE_FLOCK_LOCKS

// testLocks sets locks of two owners and two handles against each other.
func testLocks(t *testing.T, s *suite) {
	if s.features.Flags&lockFlags != lockFlags {
		t.Fatal("the backend is a Locker, but WantFlags takes its locks away")
	}
	f, errno := s.Create(Root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	fh, errno := s.Open(f.NodeId, unix.O_RDWR)
	want(t, errno, "OPEN", fsbackend.OK)
	in := func(fh, owner uint64, typ uint32, start, end uint64) *fuseproto.LkIn {
		return &fuseproto.LkIn{
			InHeader: s.header(f.NodeId), Fh: fh, Owner: owner,
			Lk: fuseproto.FileLock{Start: start, End: end, Typ: typ, Pid: uint32(owner)},
		}
	}
	is := func(what string, in *fuseproto.LkIn, expected fsbackend.Errno) {
		t.Helper()
		want(t, s.do(func(c *fsbackend.Context) fsbackend.Errno { return s.R.Setlk(c, in) }), what, expected)
	}
	flock := func(fh uint64, typ uint32) *fuseproto.LkIn {
		in := in(fh, 1000+fh, typ, 0, math.MaxInt64)
		in.LkFlags = fuseproto.FUSE_LK_FLOCK
		return in
	}
	flush := func(owner uint64) {
		t.Helper()
		want(t, s.do(func(c *fsbackend.Context) fsbackend.Errno {
			return s.R.Flush(c, &fuseproto.FlushIn{InHeader: s.header(f.NodeId), Fh: f.Fh, LockOwner: owner})
		}), "FLUSH", fsbackend.OK)
	}

	is("write lock", in(f.Fh, 1, unix.F_WRLCK, 10, 19), fsbackend.OK)
	is("lock across its end", in(fh, 2, unix.F_WRLCK, 19, 30), unix.EAGAIN)
	is("lock behind it", in(fh, 2, unix.F_WRLCK, 20, math.MaxInt64), fsbackend.OK)
	var out fuseproto.LkOut
	want(t, s.do(func(c *fsbackend.Context) fsbackend.Errno {
		return s.R.Getlk(c, in(fh, 2, unix.F_RDLCK, 0, math.MaxInt64), &out)
	}), "GETLK", fsbackend.OK)
	if lk := out.Lk; lk.Start != 10 || lk.End != 19 || lk.Typ != unix.F_WRLCK || lk.Pid != 0 && lk.Pid != 1 {
		t.Errorf("GETLK finds %+v, expected the write lock on 10 to 19 of pid 1, or 0", lk)
	}
	is("half of it a read lock", in(f.Fh, 1, unix.F_RDLCK, 10, 14), fsbackend.OK)
	is("read lock beside it", in(fh, 2, unix.F_RDLCK, 12, 14), fsbackend.OK)
	is("upgrade", in(f.Fh, 1, unix.F_WRLCK, 10, 14), unix.EAGAIN)
	flush(3)
	is("after another's FLUSH", in(fh, 3, unix.F_RDLCK, 15, 15), unix.EAGAIN)
	flush(2)
	is("upgrade after FLUSH", in(f.Fh, 1, unix.F_WRLCK, 0, math.MaxInt64), fsbackend.OK)
	is("unlock", in(f.Fh, 1, unix.F_UNLCK, 0, math.MaxInt64), fsbackend.OK)
	is("of what is unlocked", in(fh, 2, unix.F_WRLCK, 0, 9), fsbackend.OK)

	is("flock", flock(f.Fh, unix.F_WRLCK), fsbackend.OK)
	is("flock of another handle", flock(fh, unix.F_RDLCK), unix.EAGAIN)
	s.Release(f.NodeId, f.Fh)
	is("flock after RELEASE", flock(fh, unix.F_RDLCK), fsbackend.OK)
	is("lock with a handle that is released", in(f.Fh, 1, unix.F_RDLCK, 50, 50), unix.EBADF)

	s.reset()
	e := s.lookup(t, Root, "f")
	f.NodeId = e.NodeId
	f.Fh, errno = s.Open(e.NodeId, unix.O_RDWR)
	want(t, errno, "OPEN", fsbackend.OK)
	is("lock after Reset", in(f.Fh, 1, unix.F_WRLCK, 0, math.MaxInt64), fsbackend.OK)
	is("flock after Reset", flock(f.Fh, unix.F_WRLCK), fsbackend.OK)
	s.Release(f.NodeId, f.Fh)
}

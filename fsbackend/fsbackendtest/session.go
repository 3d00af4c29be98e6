package fsbackendtest

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// testMayBlock makes calls that change something where they may not sleep: ErrMayBlock must leave no trace.
func testMayBlock(t *testing.T, s *suite) {
	if s.R.Slow {
		return
	}
	ctx := &fsbackend.Context{Caller: s.Caller}
	f, errno := s.Create(Root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	defer s.Release(f.NodeId, f.Fh)
	_, errno = s.Write(f.NodeId, f.Fh, 0, []byte("before"), unix.O_RDWR)
	want(t, errno, "WRITE", fsbackend.OK)

	src := NewSource([]byte("AFTER"), 2)
	write := &fuseproto.WriteIn{InHeader: s.header(f.NodeId), Fh: f.Fh, Size: 5}
	if _, errno := s.R.Write(ctx, write, src); errno == fsbackend.ErrMayBlock {
		if got := s.contents(t, f.NodeId); got != "before" || src.Len() != 5 {
			t.Errorf("WRITE answered ErrMayBlock, but the file holds %q and %d of 5 bytes were left", got, src.Len())
		}
	}
	dst := NewSink(make([]byte, 10), 3)
	read := &fuseproto.ReadIn{InHeader: s.header(f.NodeId), Fh: f.Fh, Size: 10}
	if errno := s.R.Read(ctx, read, dst); errno == fsbackend.ErrMayBlock && dst.Written() > 0 {
		t.Errorf("READ answered ErrMayBlock after %d bytes", dst.Written())
	}
	absent := func(what, name string, errno fsbackend.Errno) {
		t.Helper()
		want(t, errno, what, fsbackend.OK, fsbackend.ErrMayBlock)
		if errno == fsbackend.ErrMayBlock {
			if out, errno := s.Lookup(Root, name); errno == 0 && out.NodeId != 0 {
				t.Errorf("%s answered ErrMayBlock, but LOOKUP finds %s", what, name)
			}
		}
	}
	var entry fuseproto.EntryOut
	mkdir := &fuseproto.MkdirIn{InHeader: s.header(Root), Mode: 0o755}
	absent("MKDIR", "d", s.R.Mkdir(ctx, mkdir, fsbackend.MakeName("d"), &entry))
	create := &fuseproto.CreateIn{InHeader: s.header(Root), Flags: unix.O_RDWR | unix.O_EXCL, Mode: unix.S_IFREG | 0o644}
	var created fuseproto.CreateOut
	absent("CREATE", "g", s.R.Create(ctx, create, fsbackend.MakeName("g"), &created))
	if created.NodeId != 0 {
		s.Release(created.NodeId, created.Fh)
	}
	switch errno := s.R.Unlink(ctx, Root, fsbackend.MakeName("f")); errno {
	case fsbackend.ErrMayBlock:
		s.lookup(t, Root, "f")
	default:
		want(t, errno, "UNLINK", fsbackend.OK)
	}
}

func testReset(t *testing.T, s *suite) {
	f := s.file(t, Root, "f", "stays")
	gone := s.file(t, Root, "gone", "")
	d := s.mkdir(t, Root, "d")
	fh, errno := s.Open(f.NodeId, unix.O_RDWR)
	want(t, errno, "OPEN", fsbackend.OK)
	ghost, errno := s.Open(gone.NodeId, unix.O_RDWR)
	want(t, errno, "OPEN", fsbackend.OK)
	dh, errno := s.Opendir(d.NodeId)
	want(t, errno, "OPENDIR", fsbackend.OK)
	want(t, s.Unlink(Root, "gone"), "UNLINK", fsbackend.OK)
	s.reset()
	_, errno = s.Read(f.NodeId, fh, 0, 10)
	want(t, errno, "READ with a handle from before Reset", unix.EBADF, unix.ESTALE)
	_, errno = s.Read(gone.NodeId, ghost, 0, 10)
	want(t, errno, "READ of an unlinked file after Reset", unix.EBADF, unix.ESTALE)
	_, errno = s.Readdir(d.NodeId, dh, 0, 1000, false)
	want(t, errno, "READDIR with a handle from before Reset", unix.EBADF, unix.ESTALE)
	_, errno = s.Getattr(gone.NodeId)
	want(t, errno, "GETATTR of an unlinked file after Reset", unix.ESTALE)
	s.Release(f.NodeId, fh)
	s.R.Forget(f.NodeId, 1)
	if got := s.contents(t, s.lookup(t, Root, "f").NodeId); got != "stays" {
		t.Errorf("the file holds %q after Reset", got)
	}
	s.reset()
	s.reset()
	s.lookup(t, Root, "d")
	// Handles still open at Close are Close's to end.
	again := s.lookup(t, Root, "f")
	_, errno = s.Open(again.NodeId, unix.O_RDWR)
	want(t, errno, "OPEN", fsbackend.OK)
	_, errno = s.Opendir(Root)
	want(t, errno, "OPENDIR", fsbackend.OK)
}

// hammer runs random operations on a few names, so that they meet, and fails on an answer that no order of them explains.
func (s *suite) hammer(seed uint64, n int) error {
	rnd := rand.New(rand.NewPCG(seed, 1))
	name := func() string { return fmt.Sprintf("n%d", rnd.IntN(6)) }
	dirs := []uint64{Root}
	if out, errno := s.Mkdir(Root, "dir", 0o755); errno == 0 {
		dirs = append(dirs, out.NodeId)
	} else if out, errno := s.Lookup(Root, "dir"); errno == 0 && out.NodeId != 0 {
		dirs = append(dirs, out.NodeId)
	}
	for range n {
		dir, other := dirs[rnd.IntN(len(dirs))], dirs[rnd.IntN(len(dirs))]
		var errno fsbackend.Errno
		what := ""
		switch rnd.IntN(9) {
		case 0:
			what = "CREATE"
			var out fuseproto.CreateOut
			if out, errno = s.Create(dir, name(), unix.O_RDWR, 0o644); errno == 0 {
				if _, errno := s.Write(out.NodeId, out.Fh, uint64(rnd.IntN(20_000)), []byte(strings.Repeat("w", rnd.IntN(9000))), unix.O_RDWR); !s.tolerable(errno) {
					return fmt.Errorf("WRITE: %s", errnoName(errno))
				}
				if _, errno := s.Read(out.NodeId, out.Fh, 0, 5000); !s.tolerable(errno) {
					return fmt.Errorf("READ: %s", errnoName(errno))
				}
				s.Release(out.NodeId, out.Fh)
				s.R.Forget(out.NodeId, 1)
			}
		case 1:
			what = "MKDIR"
			var out fuseproto.EntryOut
			if out, errno = s.Mkdir(dir, name(), 0o755); errno == 0 {
				s.R.Forget(out.NodeId, 1)
			}
		case 2:
			what = "UNLINK"
			errno = s.Unlink(dir, name())
		case 3:
			what = "RMDIR"
			errno = s.Rmdir(dir, name())
		case 4:
			what = "RENAME"
			errno = s.Rename(dir, name(), other, name(), 0)
		case 5:
			what = "READDIR"
			var fh uint64
			if fh, errno = s.Opendir(dir); errno == 0 {
				plus := s.R.DirPlusReader != nil && rnd.IntN(2) == 0
				var entries []Dirent
				entries, errno = s.Readdir(dir, fh, 0, 2000, plus)
				for _, e := range entries {
					if e.Entry.NodeId != 0 {
						s.R.Forget(e.Entry.NodeId, 1)
					}
				}
				s.Releasedir(dir, fh)
			}
		case 6:
			what = "RENAME_EXCHANGE"
			if !s.cfg.NoExchange {
				errno = s.Rename(dir, name(), other, name(), unix.RENAME_EXCHANGE)
			}
		case 7:
			what = "LINK"
			if s.cfg.NoHardLinks {
				continue
			}
			var out fuseproto.EntryOut
			if out, errno = s.Lookup(dir, name()); errno == 0 && out.NodeId != 0 {
				if _, errno = s.Link(out.NodeId, other, name()); errno == 0 {
					s.R.Forget(out.NodeId, 1)
				}
				s.R.Forget(out.NodeId, 1)
			}
		default:
			what = "LOOKUP"
			var out fuseproto.EntryOut
			if out, errno = s.Lookup(dir, name()); errno == 0 && out.NodeId != 0 {
				_, errno = s.Getattr(out.NodeId)
				s.R.Forget(out.NodeId, 1)
			}
		}
		if !s.tolerable(errno) {
			return fmt.Errorf("%s: %s", what, errnoName(errno))
		}
	}
	return nil
}

// tolerable says whether others that work on the same names can be the reason for errno.
func (s *suite) tolerable(errno fsbackend.Errno) bool {
	switch errno {
	case unix.EIO, unix.EXDEV:
		return s.cfg.NoRaces
	case fsbackend.OK, unix.ENOENT, unix.EEXIST, unix.ENOTEMPTY, unix.EISDIR, unix.ENOTDIR, unix.EINVAL, unix.EPERM,
		unix.ESTALE, unix.EBADF, unix.EBUSY, unix.ENOTSUP:
		return true
	}
	return false
}

func (s *suite) hammers(t *testing.T, n int, meanwhile func(done <-chan struct{})) {
	t.Helper()
	var group sync.WaitGroup
	errs := make(chan error, 8)
	for i := range 8 {
		group.Go(func() {
			if err := s.hammer(uint64(i), n); err != nil {
				errs <- err
			}
		})
	}
	done := make(chan struct{})
	go func() {
		group.Wait()
		close(done)
	}()
	meanwhile(done)
	<-done
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}

// checkTree walks the tree and compares what LOOKUP, READDIR and the link counts say.
func (s *suite) checkTree(t *testing.T, node uint64, path string) {
	t.Helper()
	for _, name := range s.List(t, node, 4096) {
		e, errno := s.Lookup(node, name)
		if errno != 0 || e.NodeId == 0 {
			t.Errorf("%s/%s is listed, but LOOKUP: %s", path, name, errnoName(errno))
			continue
		}
		checkEntry(t, path+"/"+name, &e)
		if e.Mode&unix.S_IFMT == unix.S_IFDIR {
			s.checkTree(t, e.NodeId, path+"/"+name)
		}
		s.R.Forget(e.NodeId, 1)
	}
}

func testConcurrent(t *testing.T, s *suite) {
	s.hammers(t, 300, func(<-chan struct{}) {})
	s.checkTree(t, Root, "")
}

func testResetBusy(t *testing.T, s *suite) {
	s.hammers(t, 200, func(done <-chan struct{}) {
		for range 50 {
			select {
			case <-done:
				return
			default:
				s.R.Reset()
			}
		}
	})
	s.reset()
	s.checkTree(t, Root, "")
	s.reset()
}

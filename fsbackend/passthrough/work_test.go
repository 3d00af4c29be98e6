package passthrough

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// openDirFD opens a directory for the length of the test.
func openDirFD(t *testing.T, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// TestWorkNode makes a file in the work directory, moves it into the tree, and finds it again when its descriptor has gone.
func TestWorkNode(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		work := t.TempDir()
		cfg.WorkDirFD, cfg.MaxFDs = openDirFD(t, work), MinMaxFDs
		g := newGuest(t, cfg)
		node := g.fs.WorkNode()
		if _, e := g.getattr(node); e != fsbackend.OK || node == rootID {
			t.Fatalf("GETATTR of work node %d: %v", node, e)
		}
		made := g.create(node, "made")
		g.put(made.NodeId, made.Fh, 0, "moved", 0, 0)
		g.release(made.NodeId, made.Fh)
		stays := g.create(node, "stays")
		g.release(stays.NodeId, stays.Fh)
		for i := range 4 * MinMaxFDs {
			f := g.create(rootID, string(rune('a'+i)))
			g.release(f.NodeId, f.Fh)
			g.lookup(string(rune('a' + i)))
		}
		g.ok("RENAME", g.rename(node, "made", rootID, "there", 0))
		if found := g.lookup("there"); found.NodeId != made.NodeId {
			t.Errorf("node %d became %d by a move out of the work directory", made.NodeId, found.NodeId)
		}
		g.open(stays.NodeId, unix.O_RDONLY)
		fh := g.opendir(node)
		if list, e := g.readdirAt(node, fh, 0, true, 4096); e != fsbackend.OK || len(list) != 3 {
			t.Errorf("the work directory lists %v, %v, expected one file", list, e)
		}
		g.fs.Reset()
		g.fs.Init(fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION})
		if _, e := g.tryLookup(g.fs.WorkNode(), "stays"); e != fsbackend.OK {
			t.Errorf("LOOKUP in the work directory after Reset: %v", e)
		}
	})
}

func TestWorkNodeElsewhere(t *testing.T) {
	if _, err := New(Config{Dir: t.TempDir(), WorkDirFD: openDirFD(t, "/proc")}); err == nil {
		t.Error("a work directory on another mount was taken")
	}
	fs, err := New(Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer fs.Close()
	if fs.WorkNode() != 0 {
		t.Error("there is a work node without a work directory")
	}
	var out fuseproto.AttrOut
	in := fuseproto.GetattrIn{}
	in.NodeId = workID
	if e := fs.Getattr(new(fsbackend.Context), &in, &out); e != unix.ESTALE {
		t.Errorf("GETATTR of the number of a work node that there is not: %v, expected ESTALE", e)
	}
}

func TestFileOf(t *testing.T) {
	g := newGuest(t, Config{})
	f := g.create(rootID, "f")
	var here unix.Stat_t
	e := g.fs.FileOf(f.NodeId, f.Fh, func(fd int) fsbackend.Errno {
		if err := unix.Fstat(fd, &here); err != nil {
			t.Fatal(err)
		}
		return unix.EXDEV
	})
	if e != unix.EXDEV || here.Ino != f.Ino {
		t.Errorf("FileOf: %v, inode %d, expected EXDEV and %d", e, here.Ino, f.Ino)
	}
	g.release(f.NodeId, f.Fh)
	if e := g.fs.FileOf(f.NodeId, f.Fh, nil); e != unix.EBADF {
		t.Errorf("FileOf of a released handle: %v, expected EBADF", e)
	}
}

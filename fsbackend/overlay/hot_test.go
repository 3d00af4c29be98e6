package overlay

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// TestReadWriteDoNotAllocate: READ and WRITE cost what they cost in the layer.
func TestReadWriteDoNotAllocate(t *testing.T) {
	s := newStack(t, 1)
	put(t, s.lowers[0], 0, "lower")
	o := newOurTree(newOverlay(t, s.config(t)))
	defer o.fs.Close()
	upper, e := o.Create(root, "upper", unix.O_RDWR, 0o644)
	if e != 0 {
		t.Fatal(e)
	}
	lower, _ := o.Lookup(root, "lower")
	fh, e := o.Open(lower.NodeId, unix.O_RDONLY)
	if e != 0 {
		t.Fatal(e)
	}
	c := fsbackend.Context{MayBlock: true}
	buf := make([]byte, 16)
	iov := make([]unix.Iovec, 1)
	var sink fsbackend.Sink
	var src fsbackend.Source
	read := func(node, fh uint64) func() errno {
		in := fuseproto.ReadIn{InHeader: header(node), Fh: fh, Size: 16}
		return func() errno {
			iov[0] = sys.MakeIovec(buf)
			sink.Reset(iov, 0, 16)
			return o.fs.Read(&c, &in, &sink)
		}
	}
	write := fuseproto.WriteIn{InHeader: header(upper.NodeId), Fh: upper.Fh, Size: 16}
	var attr fuseproto.AttrOut
	var entry fuseproto.EntryOut
	get := fuseproto.GetattrIn{InHeader: header(upper.NodeId)}
	name := fsbackend.MakeName("upper")
	for what, call := range map[string]func() errno{
		"READ of a lower file": read(lower.NodeId, fh),
		"READ":                 read(upper.NodeId, upper.Fh),
		"WRITE": func() errno {
			iov[0] = sys.MakeIovec(buf)
			src.Reset(iov, 0, 16)
			_, e := o.fs.Write(&c, &write, &src)
			return e
		},
		"GETATTR": func() errno { return o.fs.Getattr(&c, &get, &attr) },
	} {
		if n := testing.AllocsPerRun(100, func() {
			if e := call(); e != 0 {
				t.Fatal(e)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations, expected none", what, n)
		}
	}
	if n := testing.AllocsPerRun(100, func() { _ = o.fs.Lookup(&c, root, name, &entry) }); n > 2 {
		t.Errorf("LOOKUP: %v allocations, expected 2 at most", n)
	}
}

// callsEnv makes the test binary the process whose system calls are counted.
const callsEnv = "SLUICE_TEST_OVERLAY_COUNTED"

// counted are the operations whose system calls are counted on passthrough alone and on an overlay of it.
var counted = []struct {
	name string
	run  func(g *countedGuest)
	// merged is how many there are at most in a merged directory, if that is more than half as many again as on passthrough.
	merged int
}{
	{"LOOKUP of an unknown file", func(g *countedGuest) { g.a = g.look("a") }, 0},
	{"LOOKUP of a known file", func(g *countedGuest) { g.look("a") }, 0},
	// What files .wh.NAME there are is read once of the upper part, and the names of the lower one when it has been asked in vain.
	{"LOOKUP of nothing, the first", func(g *countedGuest) { _, _ = g.Lookup(g.dir, "nothing") }, 6},
	{"LOOKUP of nothing, the second", func(g *countedGuest) { _, _ = g.Lookup(g.dir, "neither") }, 7},
	{"LOOKUP of nothing", func(g *countedGuest) { _, _ = g.Lookup(g.dir, "nothing") }, 0},
	{"LOOKUP of an unknown directory", func(g *countedGuest) { g.look("sub") }, 0},
	{"GETATTR", func(g *countedGuest) { _, e := g.Getattr(g.a.NodeId); g.ok(e) }, 0},
	{"OPEN", func(g *countedGuest) { fh, e := g.Open(g.a.NodeId, unix.O_RDWR); g.ok(e); g.fh = fh }, 0},
	{"WRITE", func(g *countedGuest) { _, e := g.Write(g.a.NodeId, g.fh, 0, []byte("data"), unix.O_RDWR); g.ok(e) }, 0},
	{"READ", func(g *countedGuest) { _, e := g.Read(g.a.NodeId, g.fh, 0, 4); g.ok(e) }, 0},
	{"RELEASE", func(g *countedGuest) { g.Release(g.a.NodeId, g.fh) }, 0},
	{"CREATE", func(g *countedGuest) {
		out, e := g.Create(g.dir, "new", unix.O_RDWR|unix.O_EXCL, 0o644)
		g.ok(e)
		g.fh, g.b = out.Fh, out.NodeId
	}, 0},
	{"RELEASE of a new file", func(g *countedGuest) { g.Release(g.b, g.fh) }, 0},
	{"MKDIR", func(g *countedGuest) { _, e := g.Mkdir(g.dir, "dir", 0o755); g.ok(e) }, 0},
	{"SYMLINK", func(g *countedGuest) { _, e := g.Symlink(g.dir, "sym", "a"); g.ok(e) }, 0},
	{"LINK", func(g *countedGuest) { _, e := g.Link(g.a.NodeId, g.dir, "hard"); g.ok(e) }, 0},
	{"RENAME", func(g *countedGuest) { g.ok(g.Rename(g.dir, "new", g.dir, "newer", 0)) }, 0},
	{"SETATTR", func(g *countedGuest) { _, e := g.Chmod(g.a.NodeId, 0o600); g.ok(e) }, 0},
	{"UNLINK", func(g *countedGuest) { g.ok(g.Unlink(g.dir, "newer")) }, 0},
	{"RMDIR", func(g *countedGuest) { g.ok(g.Rmdir(g.dir, "dir")) }, 0},
	{"OPENDIR", func(g *countedGuest) { fh, e := g.Opendir(g.dir); g.ok(e); g.fh = fh }, 0},
	// Of it, the part in the upper layer is opened here, and read once more for its attributes: with OPENDIR and RELEASEDIR it is less than
	// half as much again.
	{"READDIRPLUS", func(g *countedGuest) { _, e := g.Readdir(g.dir, g.fh, 0, 1<<15, true); g.ok(e) }, 15},
	{"RELEASEDIR", func(g *countedGuest) { g.Releasedir(g.dir, g.fh) }, 0},
	// What is below has to be hidden by a device that is made and, where there is a copy, moved over that: the kernel's overlayfs does so, too.
	{"LOOKUP of a file below", func(g *countedGuest) { g.look("below") }, 0},
	{"UNLINK of a file below", func(g *countedGuest) { g.ok(g.Unlink(g.dir, "below")) }, 4},
	{"UNLINK of a copy", func(g *countedGuest) { g.ok(g.Unlink(g.dir, "copy")) }, 5},
	{"STATFS", func(g *countedGuest) { _, e := g.Statfs(g.dir); g.ok(e) }, 0},
}

type countedGuest struct {
	*fsbackendtest.Client
	dir, b, fh uint64
	a          fuseproto.EntryOut
}

func (g *countedGuest) ok(e fsbackend.Errno) {
	if e != 0 {
		panic(e)
	}
}

func (g *countedGuest) look(name string) fuseproto.EntryOut {
	out, e := g.Lookup(g.dir, name)
	g.ok(e)
	return out
}

// countedMain runs every operation three times: on passthrough, in a directory that only the upper layer has, and in a merged one.
func countedMain() {
	runtime.LockOSThread()
	dir := os.Getenv(callsEnv)
	open := func(cfg passthrough.Config) *passthrough.FS {
		fs, err := passthrough.New(cfg)
		if err != nil {
			panic(err)
		}
		return fs
	}
	work, err := unix.Open(dir+"/work", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	alone := open(passthrough.Config{Dir: dir + "/alone"})
	merged, err := New(Config{
		Upper:  open(passthrough.Config{Dir: dir + "/upper", WorkDirFD: work}),
		Lowers: []Layer{{Backend: open(passthrough.Config{Dir: dir + "/lower"})}},
	})
	if err != nil {
		panic(err)
	}
	for run, b := range []fsbackend.Backend{alone, merged, merged} {
		g := &countedGuest{Client: &fsbackendtest.Client{R: fsbackend.Resolve(b)}, dir: root}
		g.R.Init(fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION})
		name := "pure"
		if run == 2 {
			name = "merged"
		}
		g.dir = g.look(name).NodeId
		// What is found out of a directory once is not an operation's.
		g.look("known")
		fh, e := g.Opendir(g.dir)
		g.ok(e)
		g.Releasedir(g.dir, fh)
		for i, op := range counted {
			fsbackendtest.MarkCalls(run*len(counted) + i)
			op.run(g)
			fsbackendtest.MarkCalls(3 * len(counted))
		}
	}
}

// TestSystemCalls compares with passthrough: nothing more in a directory of the upper layer's own, but for what a new directory is
// asked once, and half as much again in a merged one, but for what that is asked once.
func TestSystemCalls(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for _, d := range []string{"work", "alone/pure/sub", "upper/pure/sub", "upper/merged/sub", "lower/merged"} {
		if err := os.MkdirAll(dir+"/"+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"alone/pure", "upper/pure", "upper/merged"} {
		put(t, dir+"/"+f, 0, "a", "known", "listed", "copy")
	}
	for _, f := range []string{"alone/pure", "upper/pure", "lower/merged"} {
		put(t, dir+"/"+f, 0, "below")
	}
	put(t, dir+"/lower/merged", 0, "copy")
	calls := fsbackendtest.CountCalls(t, 3*len(counted), callsEnv+"="+dir)
	for i, op := range counted {
		var made [3]int
		for run := range made {
			made[run] = len(calls[run*len(counted)+i])
		}
		t.Logf("%-32s passthrough %d, upper %d, merged %d", op.name, made[0], made[1], made[2])
		if made[0] == 0 || made[1] > made[0] {
			t.Errorf("%s: %d system calls in a directory of the upper layer's own, passthrough makes %d", op.name, made[1], made[0])
		}
		if made[2] > max(op.merged, 3*made[0]/2) {
			t.Errorf("%s: %d system calls in a merged directory, passthrough makes %d", op.name, made[2], made[0])
		}
	}
}

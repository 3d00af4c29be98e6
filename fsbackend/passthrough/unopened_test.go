package passthrough

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// newReader is a guest that has been told to read without opening.
func newReader(t *testing.T, cfg Config) *guest {
	cfg.NoOpen = true
	g := newGuest(t, cfg)
	g.fs.Init(fsbackend.Features{Minor: 45, Flags: sessionFlags | noOpenFlags})
	return g
}

func TestNoOpenFlags(t *testing.T) {
	const defaults = fuseproto.FUSE_ATOMIC_O_TRUNC | fuseproto.FUSE_POSIX_LOCKS | fuseproto.FUSE_FLOCK_LOCKS | fuseproto.FUSE_MAX_PAGES
	if got := newReader(t, Config{}).fs.WantFlags(defaults); got != fuseproto.FUSE_MAX_PAGES|noOpenFlags {
		t.Errorf("flags %#x with NoOpen", got)
	}
	if got := newGuest(t, Config{}).fs.WantFlags(defaults); got != defaults {
		t.Errorf("flags %#x without NoOpen, expected the defaults, %#x", got, uint64(defaults))
	}
}

func TestReadWithoutOpen(t *testing.T) {
	g := newReader(t, Config{})
	g.write("a", "first")
	if err := os.Mkdir(g.path("dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	g.write("dir/b", "")
	a, dir := g.lookup("a").NodeId, g.lookup("dir").NodeId
	_, e := g.tryOpen(a, unix.O_RDONLY)
	g.fails("OPEN", e, unix.ENOSYS)
	var in fuseproto.OpenIn
	in.NodeId = dir
	g.fails("OPENDIR", g.fs.Opendir(&g.ctx, &in, new(fuseproto.OpenOut)), unix.ENOSYS)
	flush := new(fuseproto.FlushIn)
	flush.NodeId = a
	g.fails("FLUSH", g.fs.Flush(&g.ctx, flush), unix.ENOSYS)

	// What the guest has looked up stays the file that it was, whatever the host does to its name.
	g.write("new", "second")
	if err := os.Rename(g.path("new"), g.path("a")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := g.read(a, 0); got != "first" {
			t.Fatalf("READ: %q, expected what was there at LOOKUP", got)
		}
	}
	var get fuseproto.GetattrIn
	get.NodeId, get.Flags_ = a, fuseproto.FUSE_GETATTR_FH
	var attr fuseproto.AttrOut
	g.ok("GETATTR with handle 0", g.fs.Getattr(&g.ctx, &get, &attr))
	if attr.Size != uint64(len("first")) {
		t.Errorf("GETATTR with handle 0: %d bytes", attr.Size)
	}
	var seek fuseproto.LseekIn
	seek.NodeId, seek.Whence = a, unix.SEEK_HOLE
	var at fuseproto.LseekOut
	if g.ok("LSEEK", g.fs.Lseek(&g.ctx, &seek, &at)); at.Offset != uint64(len("first")) {
		t.Errorf("LSEEK: a hole at %d", at.Offset)
	}
	var sync fuseproto.FsyncIn
	sync.NodeId = a
	g.ok("FSYNC", g.fs.Fsync(&g.ctx, &sync))
	_, e = g.put(a, 0, 0, "x", 0, 0)
	g.fails("WRITE", e, unix.EBADF)

	for node, want := range map[uint64]int{rootID: 4, dir: 3} {
		for _, plus := range []bool{false, true} {
			for range 2 { // again from the start
				list, e := g.readdirAt(node, 0, 0, plus, 4096)
				g.ok("READDIR", e)
				if len(list) != want {
					t.Errorf("READDIR: %d entries, expected %d", len(list), want)
				}
			}
		}
	}
	_, e = g.tryRead(dir, 0, 0, 10)
	g.fails("READ of a directory", e, unix.EBADF)
	_, e = g.tryRead(a+1<<30, 0, 0, 10)
	g.fails("READ of no node", e, unix.ESTALE)
}

// TestUnopenedAreBounded has many threads read more files than there may be descriptors of.
func TestUnopenedAreBounded(t *testing.T) {
	g := newReader(t, Config{MaxFDs: 4 * MinMaxFDs})
	const files = 100
	var nodes [files]uint64
	for i := range nodes {
		g.write(fmt.Sprint("f", i), fmt.Sprint(i))
		nodes[i] = g.lookup(fmt.Sprint("f", i)).NodeId
	}
	var all sync.WaitGroup
	for w := range 4 {
		all.Go(func() {
			for i := range 2 * files {
				n := (i*7 + w*13) % files
				if got, e := g.tryRead(nodes[n], 0, 0, 100); e != fsbackend.OK || got != fmt.Sprint(n) {
					t.Errorf("READ of file %d: %q, %v", n, got, e)
				}
			}
		})
	}
	all.Wait()
	if n := g.fs.handles.inUse(); n == 0 || n > MinMaxFDs {
		t.Errorf("%d handles are open, expected 1 to %d", n, MinMaxFDs)
	}
	for _, n := range nodes {
		g.fs.Forget(n, 1)
	}
	if n := g.fs.handles.inUse(); n != 0 {
		t.Errorf("%d handles are open of files that the guest has forgotten", n)
	}
	if err := g.fs.check(); err != nil {
		t.Error(err)
	}
}

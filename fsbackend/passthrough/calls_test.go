package passthrough

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// counted are the operations whose system calls are counted, in the order in which they run, and the calls each may make.
var counted = []struct {
	name string
	max  int
	run  func(c *countedGuest)
}{
	{"LOOKUP of an unknown name", 2, func(c *countedGuest) { c.a = c.lookup("a") }},
	{"LOOKUP of a known name", 1, func(c *countedGuest) { c.lookup("a") }},
	{"LOOKUP of nothing", 1, func(c *countedGuest) { _, e := c.tryLookup(rootID, "nothing"); c.fails("LOOKUP", e, unix.ENOENT) }},
	{"GETATTR", 1, func(c *countedGuest) { _, e := c.getattr(c.a.NodeId); c.ok("GETATTR", e) }},
	{"OPEN", 1, func(c *countedGuest) { c.fh = c.open(c.a.NodeId, unix.O_RDWR) }},
	{"WRITE", 1, func(c *countedGuest) {
		_, e := c.put(c.a.NodeId, c.fh, 0, strings.Repeat("x", 5000), 0, 0)
		c.ok("WRITE", e)
	}},
	{"WRITE that clears nothing", 1, func(c *countedGuest) {
		_, e := c.put(c.a.NodeId, c.fh, 0, "x", 0, fuseproto.FUSE_WRITE_KILL_SUIDGID)
		c.ok("WRITE", e)
	}},
	{"READ", 1, func(c *countedGuest) { _, e := c.tryRead(c.a.NodeId, c.fh, 0, 4096); c.ok("READ", e) }},
	{"READ of a small file's end", 1, func(c *countedGuest) {
		// As a queue's own thread reads: it learns that the file is read through the page cache.
		inline := *c.guest
		inline.ctx.MayBlock = false
		for {
			data, e := inline.tryRead(c.a.NodeId, c.fh, 1, 1<<16)
			if e == fsbackend.ErrMayBlock {
				runtime.Gosched() // it is cached: said spuriously
				continue
			}
			c.ok("READ", e)
			if len(data) != 4999 {
				c.Fatalf("READ: %d bytes", len(data))
			}
			return
		}
	}},
	{"RELEASE", 1, func(c *countedGuest) { c.release(c.a.NodeId, c.fh) }},
	{"OPEN for the second time", 2, func(c *countedGuest) { c.fh = c.open(c.a.NodeId, unix.O_RDWR) }},
	{"OPEN from then on", 1, func(c *countedGuest) { c.fh = c.open(c.a.NodeId, unix.O_RDWR) }},
	{"CREATE", 2, func(c *countedGuest) { c.created = c.create(rootID, "new") }},
	{"GETATTR of what is open", 1, func(c *countedGuest) { _, e := c.getattr(c.created.NodeId); c.ok("GETATTR", e) }},
	{"CREATE by a user", 6, func(c *countedGuest) { c.as(1000, 1000).create(c.open777, "user") }},
	{"MKDIR", 3, func(c *countedGuest) { c.mkdir(rootID, "dir") }},
	{"SYMLINK", 3, func(c *countedGuest) { _, e := c.symlink(rootID, "sym", "a"); c.ok("SYMLINK", e) }},
	{"LINK", 2, func(c *countedGuest) { _, e := c.link(c.a.NodeId, rootID, "hard"); c.ok("LINK", e) }},
	{"RENAME", 1, func(c *countedGuest) { c.ok("RENAME", c.rename(rootID, "new", rootID, "newer", 0)) }},
	{"UNLINK", 1, func(c *countedGuest) { c.ok("UNLINK", c.unlink(rootID, "newer")) }},
	{"RMDIR", 1, func(c *countedGuest) { c.ok("RMDIR", c.fs.Rmdir(&c.ctx, rootID, fsbackend.MakeName("dir"))) }},
	{"SETATTR of the mode", 2, func(c *countedGuest) {
		_, e := c.setattr(c.a.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Mode = fuseproto.FATTR_MODE, 0o600 })
		c.ok("SETATTR", e)
	}},
	{"SETATTR of the size", 4, func(c *countedGuest) {
		_, e := c.setattr(c.a.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Size = fuseproto.FATTR_SIZE, 10 })
		c.ok("SETATTR", e)
	}},
	{"OPENDIR", 1, func(c *countedGuest) { c.fh = c.opendir(rootID) }},
	{"READDIRPLUS of 8 entries", 1 + 6, func(c *countedGuest) {
		list, e := c.readdirAt(rootID, c.fh, 0, true, 32<<10)
		c.ok("READDIRPLUS", e)
		for _, d := range list {
			if d.name == "listed" {
				c.listed = d.entry
			}
		}
		if len(list) != 8 {
			c.Fatalf("READDIRPLUS: %d entries", len(list))
		}
	}},
	{"OPEN of what was only listed", 3, func(c *countedGuest) { c.open(c.listed.NodeId, unix.O_RDONLY) }},
	{"FORGET of what has a descriptor", 1, func(c *countedGuest) { c.fs.Forget(c.lookupNew, 2) }},
	{"LOOKUP that evicts", 4, func(c *countedGuest) { c.small.lookup("c0") }},
	{"OPEN by file handle", 1, func(c *countedGuest) { c.small.open(c.evicted, unix.O_RDONLY) }},
	{"STATFS", 1, func(c *countedGuest) { var out fuseproto.StatfsOut; c.ok("STATFS", c.fs.Statfs(&c.ctx, rootID, &out)) }},
}

// countedGuest is the guest of the counted process: every check of it that fails ends the process.
type countedGuest struct {
	*guest
	a, listed fuseproto.EntryOut
	created   fuseproto.CreateOut
	fh        uint64
	open777   uint64
	lookupNew uint64
	small     *guest // has a share of its own, and its descriptors are used up
	evicted   uint64 // one of its nodes, which has none any more
}

// fatal is a testing.TB for a process without tests.
type fatal struct{ testing.TB }

func (fatal) Helper()                   {}
func (fatal) Fatal(args ...any)         { panic(fmt.Sprint(args...)) }
func (fatal) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }
func (fatal) Cleanup(func())            {}

// countedMain runs every operation of counted between marks.
func countedMain() {
	runtime.LockOSThread()
	dir := os.Getenv(callsEnv)
	c := &countedGuest{guest: newGuest(fatal{}, Config{Dir: dir + "/big"})}
	c.open777 = c.lookup("open777").NodeId
	c.lookupNew = c.lookup("b").NodeId
	c.small = newGuest(fatal{}, Config{Dir: dir + "/small", MaxFDs: MinMaxFDs})
	c.small.lookup("b0")
	c.evicted = c.small.lookup("a0").NodeId
	for i := range MinMaxFDs {
		c.small.lookup(fmt.Sprint("a", i)) // the last evicts a0: the clock's hand comes to it first
	}
	for i, op := range counted {
		fsbackendtest.MarkCalls(i)
		op.run(c)
		fsbackendtest.MarkCalls(len(counted))
	}
}

func TestSystemCalls(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for _, name := range []string{"big/a", "big/b", "big/listed", "big/open777/x"} {
		writeAt(t, dir+"/"+name)
	}
	if err := os.Chmod(dir+"/big/open777", 0o777); err != nil {
		t.Fatal(err)
	}
	for i := range MinMaxFDs {
		writeAt(t, fmt.Sprintf("%s/small/a%d", dir, i))
	}
	writeAt(t, dir+"/small/b0")
	writeAt(t, dir+"/small/c0")

	calls := fsbackendtest.CountCalls(t, len(counted), callsEnv+"="+dir)
	for i, op := range counted {
		made := calls[i]
		t.Logf("%-34s %d calls %v", op.name, len(made), made)
		if len(made) == 0 || len(made) > op.max {
			t.Errorf("%s: %d system calls %v, expected 1 to %d", op.name, len(made), made, op.max)
		}
	}
}

func writeAt(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(path[:strings.LastIndexByte(path, '/')], 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(path), 0o644); err != nil {
		t.Fatal(err)
	}
}

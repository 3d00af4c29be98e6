package pluginlayer

import (
	"bytes"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/plugin"
)

func TestConformance(t *testing.T) {
	p := &files{FS: suiteTree()}
	c := dial(t, Config{Name: "files", Source: local(p)})
	fsbackendtest.RunReadOnly(t, fsbackendtest.ReadOnlyConfig{
		New: func(t *testing.T) fsbackend.Backend { return first(t, c) },
		Check: func(b fsbackend.Backend) error {
			l := b.(*tree)
			l.mu.Lock()
			defer l.mu.Unlock()
			if len(l.handles) == 0 && (l.files != 0 || l.listed != 0) {
				return fmt.Errorf("%d files and %d names without a handle", l.files, l.listed)
			}
			return nil
		},
		Strict: true,
	})
	if n, m := p.counted("load"), p.counted("close"); n == 0 || n != m {
		t.Errorf("%d loads and %d ends of layers, expected as many", n, m)
	}
}

// TestBareListing lists a directory of which the plug-in says no more than names and types.
func TestBareListing(t *testing.T) {
	c := dial(t, Config{Name: "files", Source: local(&files{FS: suiteTree(), bare: true})})
	_, client := open(t, c, 0)
	fh, _ := client.Opendir(fsbackendtest.Root)
	entries, errno := client.Readdir(fsbackendtest.Root, fh, 0, 1<<16, true)
	if errno != 0 || len(entries) != 8 {
		t.Fatalf("READDIRPLUS gives %d entries, %v, expected 8", len(entries), errno)
	}
	for _, e := range entries {
		if e.Entry.NodeId != 0 || e.Ino == 0 || e.Type != unix.DT_DIR && e.Type != unix.DT_REG {
			t.Errorf("entry %+v, expected it without a lookup", e)
		}
	}
	e, errno := client.Lookup(fsbackendtest.Root, entries[2].Name)
	if errno != 0 || e.Ino != entries[2].Ino {
		t.Errorf("LOOKUP gives inode number %d, %v, READDIR %d", e.Ino, errno, entries[2].Ino)
	}
}

// TestShared is row B7: backends of one layer share it, and have the same inode numbers; other layers have others.
func TestShared(t *testing.T) {
	p := &files{FS: suiteTree()}
	c := dial(t, Config{Name: "files", Source: local(p)})
	one, a := open(t, c, 0)
	two, b := open(t, c, 0)
	other, o := open(t, c, 1)
	if n := p.counted("load"); n != 2 {
		t.Errorf("%d loads of two layers with three backends", n)
	}
	x, _ := a.Lookup(fsbackendtest.Root, "small")
	y, _ := b.Lookup(fsbackendtest.Root, "small")
	z, _ := o.Lookup(fsbackendtest.Root, "small")
	if x.Ino != y.Ino || x.Ino == z.Ino || x.Ino == 0 {
		t.Errorf("inode numbers %d, %d and, of another layer, %d", x.Ino, y.Ino, z.Ino)
	}
	if one.Dev() != two.Dev() || one.Dev() == other.Dev() || one.ACL() {
		t.Errorf("devices %d, %d and, of another layer, %d; ACLs: %v", one.Dev(), two.Dev(), other.Dev(), one.ACL())
	}
}

// TestInfo has the plug-in say what it is otherwise made up.
func TestInfo(t *testing.T) {
	p := &files{FS: suiteTree(), info: plugin.Info{ACL: true, StableIno: true, Dev: 99}}
	c := dial(t, Config{Name: "files", Source: local(p)})
	l, client := open(t, c, 0)
	e, errno := client.Lookup(fsbackendtest.Root, "small")
	if l.Dev() != 99 || !l.ACL() || errno != 0 || e.Ino != 5004 {
		t.Errorf("device %d, ACLs %v, inode number %d, %v, expected those of the plug-in", l.Dev(), l.ACL(), e.Ino, errno)
	}
	if flags := client.R.WantFlags(0); flags != fuseproto.FUSE_POSIX_ACL {
		t.Errorf("it wants flags %#x, expected FUSE_POSIX_ACL", flags)
	}
	names, _, errno := client.Listxattr(e.NodeId, 1000)
	if want := "user.one\x00system.posix_acl_access\x00trusted.overlay.opaque\x00"; string(names) != want || errno != 0 {
		t.Errorf("extended attributes %q, %v, expected %q", names, errno, want)
	}
}

func TestXattr(t *testing.T) {
	c := dial(t, Config{Name: "files", Source: local(&files{FS: suiteTree()})})
	_, client := open(t, c, 0)
	e, _ := client.Lookup(fsbackendtest.Root, "small")
	names, n, errno := client.Listxattr(e.NodeId, 1000)
	if want := "user.one\x00trusted.overlay.opaque\x00"; string(names) != want || errno != 0 || int(n) != len(want) {
		t.Errorf("extended attributes %q, %d, %v, expected %q: the layer has no ACLs", names, n, errno, want)
	}
	if _, n, errno := client.Listxattr(e.NodeId, 0); n != 32 || errno != 0 {
		t.Errorf("the list has %d bytes, %v, expected 32", n, errno)
	}
	value, _, errno := client.Getxattr(e.NodeId, "user.one", 100)
	if string(value) != "value of user.one" || errno != 0 {
		t.Errorf("value %q, %v", value, errno)
	}
	for name, want := range map[string]fsbackend.Errno{
		"user.none": unix.ENODATA, "system.posix_acl_access": unix.EOPNOTSUPP, "user.one": unix.ERANGE,
	} {
		if _, _, errno := client.Getxattr(e.NodeId, name, 3); errno != want {
			t.Errorf("%s in 3 bytes: %v, expected %v", name, errno, want)
		}
	}
}

// TestWhiteouts is the layers' side of row B3: one entry is three layers, each shown as it is, a device 0:0 among its files.
func TestWhiteouts(t *testing.T) {
	layer := fstest.MapFS{"hidden": {Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600}, ".wh.other": {}}
	c := dial(t, Config{Name: "files", Source: local(&files{FS: layer})})
	layers, err := c.Layers(t.Context(), "", "x")
	if err != nil || layers.Len() != 3 {
		t.Fatalf("%v layers, %v, expected 3", layers, err)
	}
	if _, err := layers.Open(t.Context(), 3); err == nil {
		t.Error("a fourth layer opens")
	}
	_, client := open(t, c, 2)
	e, errno := client.Lookup(fsbackendtest.Root, "hidden")
	if errno != 0 || e.Mode&unix.S_IFMT != unix.S_IFCHR || e.Rdev != 0 {
		t.Errorf("the whiteout has mode %#o and device %#x, %v", e.Mode, e.Rdev, errno)
	}
	if _, errno := client.Open(e.NodeId, unix.O_RDONLY); errno != unix.EBADF {
		t.Errorf("OPEN of a device: %v, expected EBADF", errno)
	}
	if names := client.List(t, fsbackendtest.Root, 4096); len(names) != 2 {
		t.Errorf("the layer lists %q", names)
	}
	if _, err := c.Layers(t.Context(), "", strings.Repeat("x", 5000)); err == nil {
		t.Error("a path of 5000 bytes passes")
	}
	missing, err := c.Layers(t.Context(), "", "missing")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := missing.Open(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "//files//missing#0: load: no such file") {
		t.Errorf("a layer that is not there: %v", err)
	}
}

// TestReadAllocs sees that READ costs no allocation.
func TestReadAllocs(t *testing.T) {
	c := dial(t, Config{Name: "files", Source: local(&files{FS: suiteTree()})})
	l, client := open(t, c, 0)
	node, fh := mustOpen(t, client, "page")
	buf := make([]byte, 8192)
	iov := []unix.Iovec{sys.MakeIovec(buf)}
	in := &fuseproto.ReadIn{InHeader: fuseproto.InHeader{NodeId: node}, Fh: fh}
	ctx := &fsbackend.Context{}
	var dst fsbackend.Sink
	r := l.(*tree)
	n := testing.AllocsPerRun(100, func() {
		iov[0] = sys.MakeIovec(buf)
		dst.Reset(iov, 0, 4096)
		if errno := r.Read(ctx, in, &dst); errno != 0 || dst.Written() != 4096 {
			t.Fatalf("READ: %v, %d bytes", errno, dst.Written())
		}
	})
	if n != 0 {
		t.Errorf("READ allocates %v times", n)
	}
}

// TestRestart is row B12: the plug-in is killed with a request in flight. That is EIO, what is open goes on, another plug-in's
// layers do not notice, and when it has been started again all works.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("contents"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, unharmed := open(t, dial(t, Config{Name: "files", Source: local(&files{FS: suiteTree()})}), 0)
	source := &process{env: []string{pluginEnv + "=" + dir}}
	c := dial(t, Config{Name: "files", Source: source})
	_, client := open(t, c, 0)
	node, fh := mustOpen(t, client, "file")

	gone := source.running()
	// Stopped, it leaves the request unanswered.
	if err := gone.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "that the plug-in stands still", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", gone.Pid))
		return err != nil || bytes.Contains(stat, []byte(") T "))
	})
	result := make(chan fsbackend.Errno, 1)
	go func() {
		_, errno := client.Lookup(fsbackendtest.Root, "file")
		result <- errno
	}()
	c.mu.Lock()
	link := c.current
	c.mu.Unlock()
	eventually(t, "a request in flight", func() bool {
		link.mu.Lock()
		defer link.mu.Unlock()
		return len(link.pending) == 1
	})
	if err := gone.Kill(); err != nil {
		t.Fatal(err)
	}
	if errno := <-result; errno != unix.EIO {
		t.Errorf("LOOKUP when the plug-in is killed: %v, expected EIO", errno)
	}
	if b, errno := client.Read(node, fh, 0, 100); string(b) != "contents" || errno != 0 {
		t.Errorf("READ of an open file without the plug-in: %q, %v", b, errno)
	}
	if a, errno := client.GetattrFh(node, fh); a.Size != 8 || errno != 0 {
		t.Errorf("GETATTR of an open file without the plug-in: %+v, %v", a, errno)
	}
	if _, errno := unharmed.Lookup(fsbackendtest.Root, "small"); errno != 0 {
		t.Errorf("LOOKUP in another plug-in's layer: %v", errno)
	}
	eventually(t, "the second start", func() bool { return c.Starts() == 2 })
	eventually(t, "the layer", func() bool { _, errno := client.Lookup(fsbackendtest.Root, "file"); return errno == 0 })
	again, fh2 := mustOpen(t, client, "file")
	if b, errno := client.Read(again, fh2, 0, 100); string(b) != "contents" || errno != 0 || again != node {
		t.Errorf("READ after the restart: %q, %v, node %d, expected %d", b, errno, again, node)
	}
	if b, errno := client.Read(node, fh, 0, 100); string(b) != "contents" || errno != 0 {
		t.Errorf("READ of the file opened before: %q, %v", b, errno)
	}
}

// TestCancel sees that the plug-in is told when nobody waits any more, and that the guest does not wait for what takes too long.
func TestCancel(t *testing.T) {
	p := &files{FS: suiteTree(), hold: make(chan struct{})}
	c := dial(t, Config{Name: "files", Source: local(p)})
	l, client := open(t, c, 0)
	cancel := make(chan struct{})
	result := make(chan fsbackend.Errno)
	go func() {
		var out fuseproto.EntryOut
		result <- l.Lookup(&fsbackend.Context{MayBlock: true, Cancel: cancel}, fsbackendtest.Root, fsbackend.MakeName("wait"), &out)
	}()
	eventually(t, "the request", func() bool { return p.counted("held") == 1 })
	close(cancel)
	if errno := <-result; errno != unix.EINTR {
		t.Errorf("LOOKUP that was cancelled: %v, expected EINTR", errno)
	}
	eventually(t, "the cancellation", func() bool { return p.counted("cancelled") == 1 })
	if _, errno := client.Lookup(fsbackendtest.Root, "small"); errno != 0 {
		t.Errorf("LOOKUP after that: %v", errno)
	}
}

func TestTimeout(t *testing.T) {
	p := &files{FS: suiteTree(), hold: make(chan struct{})}
	c := dial(t, Config{Name: "files", Source: local(p), Timeout: 500 * time.Millisecond})
	_, client := open(t, c, 0)
	if _, errno := client.Lookup(fsbackendtest.Root, "wait"); errno != unix.EIO {
		t.Errorf("LOOKUP that takes too long: %v, expected EIO", errno)
	}
	if c.Starts() != 1 {
		t.Error("one request that takes too long ended the plug-in")
	}
	close(p.hold)
}

// TestLimits sees that a guest cannot have a layer hold any number of things.
func TestLimits(t *testing.T) {
	c := dial(t, Config{Name: "files", Source: local(&files{FS: suiteTree()}), MaxInodes: 2, MaxFiles: 2, MaxListed: 110})
	_, client := open(t, c, 0)
	node, _ := mustOpen(t, client, "small")
	d, errno := client.Lookup(fsbackendtest.Root, "many")
	if errno != 0 {
		t.Fatal(errno)
	}
	if _, errno := client.Lookup(fsbackendtest.Root, "page"); errno != unix.ENFILE {
		t.Errorf("a third inode: %v, expected ENFILE", errno)
	}
	fh, _ := client.Open(node, unix.O_RDONLY)
	if _, errno := client.Open(node, unix.O_RDONLY); errno != unix.ENFILE {
		t.Errorf("a third open file: %v, expected ENFILE", errno)
	}
	client.Release(node, fh)
	if _, errno := client.Open(node, unix.O_RDONLY); errno != 0 {
		t.Errorf("OPEN after RELEASE: %v", errno)
	}
	first, _ := client.Opendir(d.NodeId)
	second, errno := client.Opendir(d.NodeId)
	if _, more := client.Opendir(d.NodeId); errno != 0 || more != unix.ENFILE {
		t.Errorf("a third open directory: %v, expected ENFILE; the second: %v", more, errno)
	}
	for range 2 { // reading anew takes the place of what was read before
		if _, errno := client.Readdir(d.NodeId, first, 0, 4096, false); errno != 0 {
			t.Errorf("READDIR of 102 names: %v", errno)
		}
	}
	if _, errno := client.Readdir(d.NodeId, second, 0, 4096, false); errno != unix.ENOMEM {
		t.Errorf("READDIR of 102 more names: %v, expected ENOMEM", errno)
	}
	client.Releasedir(d.NodeId, first)
	if _, errno := client.Readdir(d.NodeId, second, 0, 4096, false); errno != 0 {
		t.Errorf("READDIR after RELEASEDIR of the other: %v", errno)
	}
	deep := d
	for range 20 {
		if deep, errno = client.Lookup(deep.NodeId, strings.Repeat("n", 255)); errno != 0 {
			break
		}
	}
	if _, errno := client.Lookup(math.MaxUint64, "x"); errno != unix.ESTALE {
		t.Errorf("LOOKUP in an unknown node: %v", errno)
	}
}

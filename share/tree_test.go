package share

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fuseproto"
)

const root = fsbackendtest.Root

// guest is a guest of a Share.
type guest struct {
	*fsbackendtest.Client
	t testing.TB
	s *Share
}

// mount begins a session of a Share, which ends with the test.
func mount(t testing.TB, flags uint64, grafts ...Graft) *guest {
	t.Helper()
	s := newShare(t, grafts...)
	s.Init(fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION, Flags: flags})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &guest{&fsbackendtest.Client{R: fsbackend.Resolve(s)}, t, s}
}

func (g *guest) want(errno Errno, what string, expected Errno) {
	g.t.Helper()
	if errno != expected {
		g.t.Errorf("%s: %v, expected %v", what, errno, expected)
	}
}

// walk looks path up.
func (g *guest) walk(path string) fuseproto.EntryOut {
	g.t.Helper()
	e := fuseproto.EntryOut{NodeId: root}
	for _, name := range components(path) {
		var errno Errno
		if e, errno = g.Lookup(e.NodeId, name); errno != 0 || e.NodeId == 0 {
			g.t.Fatalf("LOOKUP %s of %s: %v", name, path, errno)
		}
	}
	return e
}

// put makes a file and returns its node.
func (g *guest) put(parent uint64, name, contents string) uint64 {
	g.t.Helper()
	f, errno := g.Create(parent, name, unix.O_RDWR, 0o644)
	g.want(errno, "CREATE "+name, fsbackend.OK)
	_, errno = g.Write(f.NodeId, f.Fh, 0, []byte(contents), unix.O_RDWR)
	g.want(errno, "WRITE "+name, fsbackend.OK)
	g.Release(f.NodeId, f.Fh)
	return f.NodeId
}

func (g *guest) contents(node uint64) string {
	g.t.Helper()
	fh, errno := g.Open(node, unix.O_RDONLY)
	g.want(errno, "OPEN", fsbackend.OK)
	defer g.Release(node, fh)
	b, errno := g.Read(node, fh, 0, 4096)
	g.want(errno, "READ", fsbackend.OK)
	return string(b)
}

// list lists a directory, size bytes at a time, and checks that all agrees.
func (g *guest) list(node uint64, size int, plus bool) []string {
	g.t.Helper()
	fh, errno := g.Opendir(node)
	g.want(errno, "OPENDIR", fsbackend.OK)
	defer g.Releasedir(node, fh)
	var names []string
	for off, rounds := uint64(0), 0; ; rounds++ {
		entries, errno := g.Readdir(node, fh, off, size, plus)
		g.want(errno, "READDIR", fsbackend.OK)
		if len(entries) == 0 || rounds > 1000 {
			slices.Sort(names)
			return names
		}
		for _, e := range entries {
			off = e.Off
			if e.Name == "." || e.Name == ".." {
				continue
			}
			names = append(names, e.Name)
			l, errno := g.Lookup(node, e.Name)
			g.want(errno, "LOOKUP "+e.Name, fsbackend.OK)
			if e.Ino != l.Ino || e.Type != l.Mode>>12 && e.Type != unix.DT_UNKNOWN {
				g.t.Errorf("%s is listed with inode %#x, type %d, but looked up with %#x, %d", e.Name, e.Ino, e.Type, l.Ino, l.Mode>>12)
			}
		}
	}
}

func write(t testing.TB, path, contents string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(contents), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestTree walks a tree of everything: a host directory with a tree in memory on one of its directories, one below where
// there is nothing, one within another, and a file.
func TestTree(t *testing.T) {
	host, single := t.TempDir(), t.TempDir()
	write(t, host+"/plain", "of the host")
	write(t, host+"/data/covered", "of the host")
	write(t, host+"/real/beside", "of the host")
	write(t, host+"/blocked", "no directory")
	write(t, single+"/conf", "version 1")
	write(t, single+"/secret", "not to be seen")
	data, made, nested, inReal, overFile := newMem(t), newMem(t), newMem(t), newMem(t), newMem(t)
	g := mount(t, fuseproto.FUSE_SUBMOUNTS,
		Graft{Path: "/data", Backend: data},
		Graft{Path: "/made/up/here", Backend: made},
		Graft{Path: "/data/in/side", Backend: nested, Extension: "nest"},
		Graft{Path: "/", Backend: newPassthrough(t, host)},
		Graft{Path: "/real/mount", Backend: inReal},
		Graft{Path: "/blocked/mount", Backend: overFile},
		Graft{Path: "/etc/conf", Backend: newPassthrough(t, single), File: "conf", Policy: Policy{ReadOnly: true}},
	)

	// Each graft is where it belongs.
	for path, want := range map[string]uint64{
		"/": 0, "/data": 1, "/made/up/here": 2, "/data/in/side": 3, "/real/mount": 4, "/blocked/mount": 5, "/etc/conf": 6,
		"/plain": 0, "/real": 0, "/real/beside": 0, "/data/in": madeUpIndex, "/made": madeUpIndex, "/made/up": madeUpIndex, "/blocked": madeUpIndex, "/etc": madeUpIndex,
	} {
		e := g.walk(path)
		if e.NodeId>>indexShift != want {
			t.Errorf("%s is node %#x, expected one of index %d", path, e.NodeId, want)
		}
		if path == "/" {
			continue
		}
		mounted := want >= 1 && want <= 5
		if mounted != (e.Attr.Flags&fuseproto.FUSE_ATTR_SUBMOUNT != 0) {
			t.Errorf("%s has attribute flags %#x", path, e.Attr.Flags)
		}
		if mounted && e.NodeId&numberMask != root {
			t.Errorf("%s is node %#x, expected a root", path, e.NodeId)
		}
		attr, errno := g.Getattr(e.NodeId)
		g.want(errno, "GETATTR "+path, fsbackend.OK)
		if e.Attr.Flags = 0; attr != e.Attr {
			t.Errorf("LOOKUP %s gives %+v, GETATTR %+v", path, e.Attr, attr)
		}
	}
	if p := g.s.PartOf(g.walk("/data/in/side").NodeId); p.Path != "/data/in/side" || p.Name != "nest" {
		t.Errorf("node of /data/in/side belongs to part %q of %q", p.Path, p.Name)
	}
	if p := g.s.PartOf(g.walk("/made/up").NodeId); p.Path != "/" {
		t.Errorf("a directory made up belongs to part %q", p.Path)
	}

	// What is written goes to the right backend.
	g.put(g.walk("/data").NodeId, "f", "in data")
	g.put(g.walk("/data/in/side").NodeId, "f", "in side")
	g.put(g.walk("/real").NodeId, "f", "in real")
	for path, want := range map[string]string{
		"/data/f": "in data", "/data/in/side/f": "in side", "/real/f": "in real", "/plain": "of the host", "/etc/conf": "version 1",
	} {
		if got := g.contents(g.walk(path).NodeId); got != want {
			t.Errorf("%s holds %q, expected %q", path, got, want)
		}
	}
	if b, err := os.ReadFile(host + "/real/f"); err != nil || string(b) != "in real" {
		t.Errorf("the host has %q, %v", b, err)
	}
	if _, errno := g.Lookup(g.walk("/data").NodeId, "covered"); errno != unix.ENOENT {
		t.Errorf("what a graft covers is found: %v", errno)
	}

	// Listings have each name once, whatever fits into one of them.
	for path, want := range map[string][]string{
		"/":              {"blocked", "data", "etc", "made", "plain", "real"},
		"/data":          {"f", "in"},
		"/data/in":       {"side"},
		"/real":          {"beside", "f", "mount"},
		"/made":          {"up"},
		"/made/up":       {"here"},
		"/blocked":       {"mount"},
		"/etc":           {"conf"},
		"/data/in/side":  {"f"},
		"/made/up/here":  nil,
		"/real/mount":    nil,
		"/blocked/mount": nil,
	} {
		node := g.walk(path).NodeId
		for _, size := range []int{200, 300, 700, 4096, 1 << 20} {
			for _, plus := range []bool{false, true} {
				if got := g.list(node, size, plus); !slices.Equal(got, want) {
					t.Errorf("%s lists %q, %d bytes at a time (plus %v), expected %q", path, got, size, plus, want)
				}
			}
		}
	}
}

func TestSubmountsNeedTheGuest(t *testing.T) {
	g := mount(t, 0, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/m", Backend: newMem(t)})
	if e := g.walk("/m"); e.Attr.Flags != 0 {
		t.Errorf("attribute flags are %#x without FUSE_SUBMOUNTS", e.Attr.Flags)
	}
}

// TestProtectedNames tries to do away with the way to mount points.
func TestProtectedNames(t *testing.T) {
	m := newMem(t)
	single := newMem(t)
	put(t, single, "file", "the file")
	g := mount(t, 0, Graft{Path: "/", Backend: m}, Graft{Path: "/a/b/c", Backend: newMem(t)}, Graft{Path: "/a/file", Backend: single, File: "file"})
	_, errno := g.Mkdir(root, "other", 0o755)
	g.want(errno, "MKDIR", fsbackend.OK)
	a, other := g.walk("/a").NodeId, g.walk("/other").NodeId
	if a>>indexShift != madeUpIndex {
		t.Fatalf("/a is node %#x, expected one made up", a)
	}
	g.want(g.Rmdir(a, "b"), "RMDIR in a directory made up", unix.EROFS)
	_, errno = g.Mkdir(a, "new", 0o755)
	g.want(errno, "MKDIR in a directory made up", unix.EROFS)
	_, errno = g.Create(a, "file", unix.O_RDWR, 0o644)
	g.want(errno, "CREATE in a directory made up", unix.EROFS)

	// The host makes the way real.
	makeDirs(t, m, "a", "b", "c")
	for _, dir := range []struct{ path, name string }{{"/", "a"}, {"/a", "b"}, {"/a/b", "c"}, {"/a", "file"}} {
		n := g.walk(dir.path).NodeId
		if n>>indexShift != 0 {
			t.Fatalf("%s is node %#x, expected the backend's", dir.path, n)
		}
		g.want(g.Rmdir(n, dir.name), "RMDIR", unix.EBUSY)
		g.want(g.Unlink(n, dir.name), "UNLINK", unix.EBUSY)
		for _, flags := range []uint32{0, unix.RENAME_EXCHANGE, unix.RENAME_NOREPLACE} {
			g.want(g.Rename(n, dir.name, root, "moved", flags), "RENAME away", unix.EBUSY)
			want := unix.EBUSY
			if flags == unix.RENAME_NOREPLACE {
				want = unix.EEXIST
			}
			g.want(g.Rename(root, "other", n, dir.name, flags), "RENAME over", want)
		}
		_, errno = g.Mkdir(n, dir.name, 0o755)
		g.want(errno, "MKDIR", unix.EEXIST)
		_, errno = g.Mknod(n, dir.name, unix.S_IFREG, 0)
		g.want(errno, "MKNOD", unix.EEXIST)
		_, errno = g.Symlink(n, dir.name, "target")
		g.want(errno, "SYMLINK", unix.EEXIST)
		_, errno = g.Link(other, n, dir.name)
		g.want(errno, "LINK", unix.EEXIST)
		_, errno = g.Create(n, dir.name, unix.O_RDWR|unix.O_EXCL, 0o644)
		g.want(errno, "CREATE with O_EXCL", unix.EEXIST)
		created, errno := g.Create(n, dir.name, unix.O_RDWR, 0o644)
		if dir.name == "file" {
			g.want(errno, "CREATE of the file", fsbackend.OK)
			if got := g.contents(created.NodeId); got != "the file" {
				t.Errorf("CREATE of the file opens %q", got)
			}
			g.Release(created.NodeId, created.Fh)
		} else {
			g.want(errno, "CREATE", unix.EISDIR)
		}
	}
	// Names beside them are free.
	g.want(g.Rename(root, "other", a, "x", 0), "RENAME to where nothing is", unix.EXDEV)
	realA := g.walk("/a").NodeId
	g.want(g.Rename(root, "other", realA, "x", 0), "RENAME", fsbackend.OK)
	g.want(g.Rmdir(realA, "x"), "RMDIR", fsbackend.OK)
	// Between grafts.
	f := g.put(root, "f", "")
	c := g.walk("/a/b/c").NodeId
	_, errno = g.Link(f, c, "f")
	g.want(errno, "LINK between grafts", unix.EXDEV)
	g.want(g.Rename(root, "f", c, "f", 0), "RENAME between grafts", unix.EXDEV)
}

// put makes a file in a backend itself, as its host does.
func put(t testing.TB, b fsbackend.Backend, name, contents string) {
	t.Helper()
	g := &guest{&fsbackendtest.Client{R: fsbackend.Resolve(b)}, t, nil}
	g.R.Forget(g.put(root, name, contents), 1)
}

// makeDirs makes a directory in a backend itself.
func makeDirs(t testing.TB, b fsbackend.Backend, names ...string) {
	t.Helper()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	at := uint64(root)
	for _, name := range names {
		e, errno := c.Mkdir(at, name, 0o755)
		if errno != 0 {
			t.Fatalf("MKDIR %s: %v", name, errno)
		}
		at = e.NodeId
	}
}

// TestWayMoves has the host replace a directory on the way, take it away and bring it back.
func TestWayMoves(t *testing.T) {
	host := t.TempDir()
	write(t, host+"/way/first", "")
	graft := newMem(t)
	put(t, graft, "treasure", "")
	g := mount(t, 0, Graft{Path: "/", Backend: newPassthrough(t, host)}, Graft{Path: "/way/to/it", Backend: graft}, Graft{Path: "/away", Backend: newMem(t)})
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(host+"/"+from, host+"/"+to); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want ...string) uint64 {
		t.Helper()
		if got := g.list(g.walk("/way").NodeId, 4096, false); !slices.Equal(got, want) {
			t.Errorf("/way lists %q, expected %q", got, want)
		}
		if got := g.list(g.walk("/way/to/it").NodeId, 4096, false); !slices.Equal(got, []string{"treasure"}) {
			t.Errorf("the graft lists %q", got)
		}
		return g.walk("/way").NodeId
	}
	first := check("first", "to")
	rename("way", "old")
	if n := check("to"); n>>indexShift == 0 {
		t.Errorf("/way is node %#x, though the host has none", n)
	}
	if got := g.list(first, 4096, false); !slices.Equal(got, []string{"first"}) {
		t.Errorf("what was /way lists %q, expected what the host has in it", got)
	}
	write(t, host+"/way/second", "")
	if second := check("second", "to"); second == first {
		t.Errorf("the new /way has the node of the old one, %#x", first)
	}
	if err := os.RemoveAll(host + "/way"); err != nil {
		t.Fatal(err)
	}
	rename("old", "way")
	check("first", "to")
	write(t, host+"/way/to/deeper", "")
	if got := g.list(g.walk("/way/to").NodeId, 4096, false); !slices.Equal(got, []string{"deeper", "it"}) {
		t.Errorf("/way/to lists %q", got)
	}
}

// TestWaySwaps has two positions change places, so that a number is no longer that of the position it was recorded for.
func TestWaySwaps(t *testing.T) {
	host := t.TempDir()
	write(t, host+"/a/of a", "")
	write(t, host+"/b/of b", "")
	g := mount(t, 0, Graft{Path: "/", Backend: newPassthrough(t, host)}, Graft{Path: "/a/1", Backend: newMem(t)}, Graft{Path: "/b/2", Backend: newMem(t)})
	for i := range 4 {
		want := map[string][]string{"/a": {"1", "of a"}, "/b": {"2", "of b"}}
		if i%2 == 1 {
			want = map[string][]string{"/a": {"1", "of b"}, "/b": {"2", "of a"}}
		}
		for _, path := range []string{"/a", "/b"} {
			if got := g.list(g.walk(path).NodeId, 4096, false); !slices.Equal(got, want[path]) {
				t.Errorf("%s lists %q after %d swaps, expected %q", path, got, i, want[path])
			}
		}
		if err := unix.Renameat2(unix.AT_FDCWD, host+"/a", unix.AT_FDCWD, host+"/b", unix.RENAME_EXCHANGE); err != nil {
			t.Fatal(err)
		}
	}
}

// counts is an in-memory tree that counts lookups.
type counts struct {
	*mem.FS
	mu    sync.Mutex
	held  map[uint64]int
	hook  func() // runs before each LOOKUP
	reset func() // runs before each Reset
}

func (b *counts) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	if b.hook != nil {
		b.hook()
	}
	errno := b.FS.Lookup(c, parent, name, out)
	if errno == 0 {
		b.mu.Lock()
		b.held[out.NodeId]++
		b.mu.Unlock()
	}
	return errno
}

func (b *counts) Forget(node, n uint64) {
	b.mu.Lock()
	b.held[node] -= int(n)
	b.mu.Unlock()
	b.FS.Forget(node, n)
}

func (b *counts) Reset() {
	if b.reset != nil {
		b.reset()
	}
	b.mu.Lock()
	clear(b.held)
	b.mu.Unlock()
	b.FS.Reset()
}

// left checks how many lookups there are of each node that has any.
func (b *counts) left(t testing.TB, want ...int) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var got []int
	for _, n := range b.held {
		if n != 0 {
			got = append(got, n)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("lookups held are %v, expected %v", got, want)
	}
}

func newCounts(t testing.TB) *counts {
	return &counts{FS: newMem(t), held: make(map[uint64]int)}
}

// TestSwapsAreCounted has the host swap two positions, whose lookups are then held for the other one.
func TestSwapsAreCounted(t *testing.T) {
	b := newCounts(t)
	makeDirs(t, b, "a")
	makeDirs(t, b, "b")
	g := mount(t, 0, Graft{Path: "/", Backend: b}, Graft{Path: "/a/1", Backend: newMem(t)}, Graft{Path: "/b/2", Backend: newMem(t)})
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b.FS)}
	for range 3 {
		for _, path := range []string{"/a", "/b", "/a"} {
			g.s.Forget(g.walk(path).NodeId, 1)
		}
		b.left(t, 1, 1)
		for path, name := range map[string]string{"/a": "1", "/b": "2"} {
			if got := g.list(g.walk(path).NodeId, 4096, false); !slices.Equal(got, []string{name}) {
				t.Errorf("%s lists %q", path, got)
			}
			g.s.Forget(g.walk(path).NodeId, 2)
		}
		b.left(t, 1, 1)
		if errno := c.Rename(root, "a", root, "b", unix.RENAME_EXCHANGE); errno != 0 {
			t.Fatal(errno)
		}
	}
}

// TestSessionEndsMeanwhile has a session end in the midst of a LOOKUP, and a LOOKUP come in the midst of a Reset: what they
// found is not recorded, since the backend no longer holds it.
func TestSessionEndsMeanwhile(t *testing.T) {
	b := newCounts(t)
	makeDirs(t, b, "way")
	g := mount(t, 0, Graft{Path: "/", Backend: b}, Graft{Path: "/way/x", Backend: newMem(t)})
	way := g.s.top.child("way")
	n := 0
	b.hook = func() {
		if n++; n == 2 { // the one that is to be held
			g.s.Reset()
		}
	}
	g.walk("/way")
	b.hook = nil
	b.left(t)
	if number := way.node.Load(); number != 0 {
		t.Errorf("a session that ended has recorded node %d", number)
	}
	b.reset = func() {
		b.reset = nil
		g.walk("/way")
	}
	g.s.Reset()
	if number := way.node.Load(); number != 0 {
		t.Errorf("node %d is recorded, of which Reset took all lookups", number)
	}
	g.s.Forget(g.walk("/way").NodeId, 1)
	b.left(t, 1)
}

// TestWayThatNeverRests has a directory on the way be another one at each LOOKUP.
func TestWayThatNeverRests(t *testing.T) {
	b := &spy{node: 100, mode: unix.S_IFDIR | 0o755}
	b.hook = func(call string) {
		if call == "Lookup" {
			b.node++
		}
	}
	s := newShare(t, Graft{Path: "/", Backend: b}, Graft{Path: "/way/x", Backend: newMem(t)})
	c := &fsbackendtest.Client{R: fsbackend.Resolve(s)}
	if _, errno := c.Lookup(root, "way"); errno != unix.ESTALE {
		t.Errorf("LOOKUP: %v, expected ESTALE, after which a guest tries again", errno)
	}
	lookups, forgets := 0, 0
	for _, a := range b.taken() {
		switch a.call {
		case "Lookup":
			lookups++
		case "Forget":
			forgets++
		}
	}
	if lookups == 0 || lookups != forgets {
		t.Errorf("%d lookups, of which %d were given back", lookups, forgets)
	}
}

// TestLookupsAreCounted gives every lookup back and looks what is left: one for each position in use, and no other.
func TestLookupsAreCounted(t *testing.T) {
	b, single := newCounts(t), newCounts(t)
	makeDirs(t, b, "way")
	b.FS.Reset()
	makeDirs(t, single, "conf")
	g := mount(t, 0, Graft{Path: "/", Backend: b}, Graft{Path: "/way/x", Backend: newMem(t)}, Graft{Path: "/conf", Backend: single, File: "conf"})
	left := func(b *counts, want ...int) {
		t.Helper()
		b.left(t, want...)
	}
	for range 3 {
		e := g.walk("/way")
		left(b, 2)
		g.s.Forget(e.NodeId, 1)
		left(b, 1)
	}
	way := g.walk("/way").NodeId
	g.s.Forget(way, 1)
	if _, errno := g.Getattr(way); errno != 0 {
		t.Errorf("a position's node is gone: %v", errno)
	}
	// The host replaces it.
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b.FS)}
	for i := range 3 {
		if errno := c.Rename(root, "way", root, fmt.Sprint("old", i), 0); errno != 0 {
			t.Fatal(errno)
		}
		e, errno := c.Mkdir(root, "way", 0o755)
		if errno != 0 {
			t.Fatal(errno)
		}
		b.FS.Forget(e.NodeId, 1)
		n := g.walk("/way").NodeId
		g.s.Forget(n, 1)
		left(b, 1)
	}
	if errno := c.Rmdir(root, "way"); errno != 0 {
		t.Fatal(errno)
	}
	g.walk("/way")
	left(b)
	// A directory where a file should be is given back too.
	if _, errno := g.Lookup(root, "conf"); errno != unix.ENOENT {
		t.Errorf("LOOKUP of a file that is a directory: %v", errno)
	}
	left(single)
	// A Reset ends what is held.
	makeDirs(t, b, "way")
	g.walk("/way")
	g.s.Reset()
	left(b)
	if n := g.walk("/way").NodeId; n>>indexShift != 0 {
		t.Errorf("/way is node %#x after Reset", n)
	}
	left(b, 2)
}

// TestFile shares one file of a directory.
func TestFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/conf", "version 1")
	write(t, dir+"/secret", "not to be seen")
	g := mount(t, fuseproto.FUSE_SUBMOUNTS, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/conf", Backend: newPassthrough(t, dir), File: "conf"})
	e := g.walk("/conf")
	var st unix.Stat_t
	if err := unix.Stat(dir+"/conf", &st); err != nil {
		t.Fatal(err)
	}
	if e.Ino != st.Ino^second || e.Attr.Flags != 0 {
		t.Errorf("the file has inode %#x, flags %#x, expected %#x and none", e.Ino, e.Attr.Flags, st.Ino^second)
	}
	if p := g.s.parts.get(1); p.ino(second) == 0 {
		t.Error("an inode number becomes 0")
	}
	x, errno := g.Statx(e.NodeId)
	g.want(errno, "STATX", fsbackend.OK)
	if x.Ino != e.Ino {
		t.Errorf("STATX gives inode %#x, LOOKUP %#x", x.Ino, e.Ino)
	}
	// Its directory is out of reach by every op.
	for name, o := range ops {
		r := in()
		r.node, r.name = second|root, "secret"
		r.node2 = second | root
		errno := o.call(g.s, r)
		if name != "Release" && name != "Releasedir" && errno != unix.ESTALE {
			t.Errorf("%s of the file's directory: %v, expected ESTALE", name, errno)
		}
		// And the file is no directory.
		r = in()
		r.node, r.node2, r.name, r.flags = e.NodeId, e.NodeId, "secret", unix.O_RDWR
		switch name {
		case "Lookup", "Mknod", "Mkdir", "Symlink", "Link", "Unlink", "Rmdir", "Rename", "Create", "Tmpfile", "Opendir":
			if errno := o.call(g.s, r); errno != unix.ENOTDIR {
				t.Errorf("%s in the file: %v, expected ENOTDIR", name, errno)
			}
		}
	}
	for n := range uint64(64) {
		if n == e.NodeId&numberMask {
			continue
		}
		if _, errno := g.Getattr(second | n); errno != unix.ESTALE {
			t.Errorf("GETATTR of node %d of the file's backend: %v", n, errno)
		}
	}
	// The host replaces it.
	write(t, dir+"/new", "version 2")
	if err := os.Rename(dir+"/new", dir+"/conf"); err != nil {
		t.Fatal(err)
	}
	if got := g.contents(g.walk("/conf").NodeId); got != "version 2" {
		t.Errorf("the file holds %q after it was replaced", got)
	}
	if err := os.Remove(dir + "/conf"); err != nil {
		t.Fatal(err)
	}
	if _, errno := g.Lookup(root, "conf"); errno != unix.ENOENT {
		t.Errorf("LOOKUP of the file, which is gone: %v", errno)
	}
	if _, errno := g.Create(root, "conf", unix.O_RDWR, 0o644); errno != unix.ENOENT {
		t.Errorf("CREATE of the file, which is gone: %v", errno)
	}
	if err := os.Symlink("secret", dir+"/conf"); err != nil {
		t.Fatal(err)
	}
	if target, errno := g.Readlink(g.walk("/conf").NodeId); errno != 0 || target != "secret" {
		t.Errorf("the file is a link to %q, %v", target, errno)
	}
}

// last is a tree whose last entry in a listing has the offset that ext4 gives it.
type last struct{ *mem.FS }

func (b last) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	names := []string{"x", "way", "y"}
	offs := []uint64{5, 1 << 62, 1<<63 - 1}
	for i, name := range names {
		if in.Offset < offs[i] && !out.Add(uint64(i)+100, offs[i], unix.DT_DIR, []byte(name)) {
			break
		}
	}
	return fsbackend.OK
}

func TestOffsets(t *testing.T) {
	b := last{newMem(t)}
	makeDirs(t, b, "x")
	makeDirs(t, b, "y")
	g := mount(t, 0, Graft{Path: "/", Backend: b}, Graft{Path: "/way/m", Backend: newMem(t)}, Graft{Path: "/z", Backend: newMem(t)})
	fh, errno := g.Opendir(root)
	g.want(errno, "OPENDIR", fsbackend.OK)
	all, errno := g.Readdir(root, fh, 0, 4096, false)
	g.want(errno, "READDIR", fsbackend.OK)
	var names []string
	for i, e := range all {
		names = append(names, e.Name)
		if e.Off > 1<<63-1 {
			t.Errorf("%s has offset %#x, which a guest takes for a negative number", e.Name, e.Off)
		}
		rest, errno := g.Readdir(root, fh, e.Off, 4096, false)
		g.want(errno, "READDIR", fsbackend.OK)
		if !slices.Equal(rest, all[i+1:]) {
			t.Errorf("after %s come %v, expected %v", e.Name, rest, all[i+1:])
		}
	}
	if !slices.Equal(names, []string{"x", "y", "way", "z"}) {
		t.Errorf("the root lists %q", names)
	}
	for _, off := range []uint64{1<<63 - 1, 1 << 63, ^uint64(0)} {
		if rest, errno := g.Readdir(root, fh, off, 4096, false); errno != 0 || len(rest) > 0 {
			t.Errorf("READDIR from %#x gives %v, %v", off, rest, errno)
		}
	}
}

// slowly lists one entry at a time.
type slowly struct{ last }

func (b slowly) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	buf := make([]byte, direntMax)
	l := new(fsbackend.DirList)
	l.Reset([]unix.Iovec{{Base: &buf[0], Len: 32}}, 0, 32)
	errno := b.last.Readdir(c, in, l)
	if n := l.Written(); n > 0 {
		out.Write(buf[:n]) // not what a backend should do
	}
	return errno
}

func TestListsOneByOne(t *testing.T) {
	b := slowly{last{newMem(t)}}
	makeDirs(t, b, "x")
	makeDirs(t, b, "y")
	g := mount(t, 0, Graft{Path: "/", Backend: b}, Graft{Path: "/way/m", Backend: newMem(t)})
	if got := g.List(t, root, 4096); !slices.Equal(got, []string{"x", "y", "way"}) {
		t.Errorf("the root lists %q", got)
	}
}

// circle lists without an end.
type circle struct{ *mem.FS }

func (b circle) Readdir(_ *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	out.Add(100, max(in.Offset, 1), unix.DT_DIR, []byte("way"))
	return fsbackend.OK
}

func TestListsWithoutEnd(t *testing.T) {
	g := mount(t, 0, Graft{Path: "/", Backend: circle{newMem(t)}}, Graft{Path: "/way/m", Backend: newMem(t)})
	fh, errno := g.Opendir(root)
	g.want(errno, "OPENDIR", fsbackend.OK)
	if _, errno := g.Readdir(root, fh, 0, 4096, false); errno != unix.EIO {
		t.Errorf("READDIR: %v, expected EIO", errno)
	}
}

// TestForeignListing copies what is no listing.
func TestForeignListing(t *testing.T) {
	dirent := make([]byte, 32)
	for name, damage := range map[string]func([]byte) []byte{
		"short":       func(b []byte) []byte { return b[:20] },
		"longer name": func(b []byte) []byte { b[16] = 200; return b },
		"huge name":   func(b []byte) []byte { b[18], b[19] = 255, 255; return b },
	} {
		out := new(fsbackend.DirList)
		buf := make([]byte, 100)
		out.Reset([]unix.Iovec{{Base: &buf[0], Len: 100}}, 0, 100)
		if !copyNames(nil, damage(slices.Clone(dirent)), new(fuseproto.ReadIn), out) || out.Written() > 0 {
			t.Errorf("%s: %d bytes were listed", name, out.Written())
		}
	}
}

func TestValidate(t *testing.T) {
	var none *mem.FS
	m := newMem(t)
	at := func(paths ...string) []Graft {
		var g []Graft
		for _, p := range paths {
			g = append(g, Graft{Path: p, Backend: m})
		}
		return g
	}
	file := func(path, name string) Graft { return Graft{Path: path, Backend: m, File: name} }
	var crowd []string
	for i := range maxGrafts {
		crowd = append(crowd, fmt.Sprint("/many/", i))
	}
	for _, tt := range []struct {
		name   string
		grafts []Graft
		want   string
	}{
		{"root alone", at("/"), ""},
		{"nested", at("/", "/a", "/a/b/c"), ""},
		{"a file", append(at("/"), file("/a/f", "f")), ""},
		{"no root", at("/a"), "no graft at /"},
		{"two at a path", at("/", "/a", "/a"), "two at this path"},
		{"two roots", at("/", "/"), "two at this path"},
		{"relative", at("/", "a"), "absolute path"},
		{"empty", at("/", ""), "absolute path"},
		{"not clean", at("/", "/a/../b"), "absolute path"},
		{"slash at the end", at("/", "/a/"), "absolute path"},
		{"NUL", at("/", "/a\x00b"), "NUL"},
		{"long name", at("/", "/"+strings.Repeat("n", 256)), "at most 255"},
		{"no backend", append(at("/"), Graft{Path: "/a"}), "no backend"},
		{"nil in an interface", append(at("/"), Graft{Path: "/a", Backend: none}), "no backend"},
		{"root is a file", []Graft{file("/", "f")}, "expected a directory"},
		{"below a file", append(at("/", "/f/x/y"), file("/f", "f")), "which is a file"},
		{"file is a path", append(at("/"), file("/f", "a/b")), "expected one component"},
		{"file is ..", append(at("/"), file("/f", "..")), "expected one component"},
		{"bad user ids", append(at("/"), Graft{Path: "/a", Backend: m, UIDMap: IDMap{{0, 0, 0}}}), "user ids"},
		{"bad group ids", append(at("/"), Graft{Path: "/a", Backend: m, GIDMap: IDMap{{0, 0, 0}}}), "group ids"},
		{"too many", at(append(crowd, "/")...), "expected at most 65534"},
	} {
		_, err := New(Config{Grafts: tt.grafts})
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, expected an error with %q", tt.name, err, tt.want)
		}
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

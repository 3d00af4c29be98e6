package share

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
)

// changing begins a session of a Dynamic share.
func changing(t testing.TB, grafts ...Graft) *guest {
	t.Helper()
	return changingWith(t, Config{Grafts: grafts})
}

func changingWith(t testing.TB, cfg Config) *guest {
	t.Helper()
	cfg.Dynamic = true
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.Init(fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION, Flags: fuseproto.FUSE_SUBMOUNTS})
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &guest{&fsbackendtest.Client{R: fsbackend.Resolve(s)}, t, s}
}

func (g *guest) add(graft Graft) {
	g.t.Helper()
	if err := g.s.Add(graft); err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) remove(path string) {
	g.t.Helper()
	if err := g.s.Remove(path); err != nil {
		g.t.Fatal(err)
	}
}

// missing checks that the last component of path is not there.
func (g *guest) missing(path string) {
	g.t.Helper()
	names := components(path)
	dir := "/" + strings.Join(names[:len(names)-1], "/")
	e, errno := g.Lookup(g.walk(dir).NodeId, names[len(names)-1])
	if errno != unix.ENOENT {
		g.t.Errorf("LOOKUP %s: %v, node %#x, expected ENOENT", path, errno, e.NodeId)
	}
}

// ends is a backend that says when it is closed, and finds calls after that.
type ends struct {
	fsbackend.Backend
	t      testing.TB
	closed atomic.Int32
	gone   chan struct{}
}

func newEnds(t testing.TB, b fsbackend.Backend) *ends {
	return &ends{Backend: b, t: t, gone: make(chan struct{})}
}

func (b *ends) Close() error {
	if b.closed.Add(1) > 1 {
		b.t.Error("a backend is closed twice")
		return nil
	}
	close(b.gone)
	return b.Backend.Close()
}

func (b *ends) open(t testing.TB) {
	t.Helper()
	if b.closed.Load() != 0 {
		t.Error("the backend is closed")
	}
}

func (b *ends) wait(t testing.TB) {
	t.Helper()
	select {
	case <-b.gone:
	case <-time.After(10 * time.Second):
		t.Fatal("the backend is not closed")
	}
}

// endingMem is an in-memory tree whose Close is watched.
type endingMem struct {
	*mem.FS
	e *ends
}

func (b endingMem) Close() error { return b.e.Close() }

// memEnds is a graft of one, with a file.
func memEnds(t testing.TB) (*ends, Graft) {
	m := newMem(t)
	put(t, m, "file", "contents")
	e := newEnds(t, m)
	return e, Graft{Backend: endingMem{m, e}}
}

// TestAddRemove has a graft come, be used, and go while a file of it is open.
func TestAddRemove(t *testing.T) {
	g := changing(t)
	if got := g.list(root, 4096, false); len(got) > 0 {
		t.Errorf("the root of an empty share lists %q", got)
	}
	_, errno := g.Mkdir(root, "x", 0o755)
	g.want(errno, "MKDIR in an empty share", unix.EROFS)
	before, errno := g.Getattr(root)
	g.want(errno, "GETATTR", 0)

	b, graft := memEnds(t)
	graft.Path = "/way/there"
	g.add(graft)
	if err := g.s.Add(graft); !errors.Is(err, ErrExists) {
		t.Errorf("Add where a graft is: %v", err)
	}
	if after, _ := g.Getattr(root); after.Nlink != before.Nlink+1 || after.Mtime == before.Mtime && after.Mtimensec == before.Mtimensec {
		t.Errorf("attributes of the root are %+v, before %+v", after, before)
	}
	if got := g.list(root, 4096, true); !slices.Equal(got, []string{"way"}) {
		t.Errorf("the root lists %q", got)
	}
	e := g.walk("/way/there")
	if e.EntryValid != 0 || e.EntryValidNsec != 1 || e.Attr.Flags&fuseproto.FUSE_ATTR_SUBMOUNT == 0 {
		t.Errorf("the mount point's entry is %+v, expected one at once stale", e)
	}
	if w := g.walk("/way"); w.EntryValid != 0 || w.EntryValidNsec != 1 || w.AttrValidNsec != 1 {
		t.Errorf("the entry on the way is %+v, expected one at once stale", w)
	}
	file := g.walk("/way/there/file").NodeId
	fh, errno := g.Open(file, unix.O_RDWR)
	g.want(errno, "OPEN", 0)
	dirfh, errno := g.Opendir(e.NodeId)
	g.want(errno, "OPENDIR", 0)
	st := g.s.Grafts()
	if len(st) != 1 || st[0].Path != "/way/there" || st[0].OpenFiles != 2 || st[0].Leaving {
		t.Errorf("grafts are %+v", st)
	}

	g.remove("/way/there")
	g.missing("/way")
	if err := g.s.Remove("/way/there"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Remove of what is gone: %v", err)
	}
	if st := g.s.Grafts(); len(st) != 1 || !st[0].Leaving || st[0].OpenFiles != 2 {
		t.Errorf("grafts are %+v", st)
	}
	_, errno = g.Lookup(e.NodeId, "file")
	g.want(errno, "LOOKUP in a graft that was removed", unix.ENOENT)
	_, errno = g.Open(file, unix.O_RDONLY)
	g.want(errno, "OPEN in a graft that was removed", unix.ENOENT)
	_, errno = g.Create(e.NodeId, "new", unix.O_RDWR, 0o644)
	g.want(errno, "CREATE in a graft that was removed", unix.ENOENT)
	got, errno := g.Read(file, fh, 0, 100)
	if g.want(errno, "READ", 0); string(got) != "contents" {
		t.Errorf("READ gives %q", got)
	}
	_, errno = g.Write(file, fh, 8, []byte(" more"), unix.O_RDWR)
	g.want(errno, "WRITE", 0)
	if a, errno := g.Getattr(file); errno != 0 || a.Size != 13 {
		t.Errorf("GETATTR of an open file: %v, %d bytes", errno, a.Size)
	}
	entries, errno := g.Readdir(e.NodeId, dirfh, 0, 4096, false)
	if g.want(errno, "READDIR", 0); len(entries) != 3 {
		t.Errorf("READDIR gives %+v", entries)
	}
	g.Release(file, fh)
	_, errno = g.Getattr(file)
	g.want(errno, "GETATTR of what is no longer open", unix.ENOENT)
	b.open(t)
	for range 3 { // of what it does not have
		g.Release(file, fh)
		g.Releasedir(file, dirfh)
	}
	b.open(t)
	g.Releasedir(e.NodeId, dirfh)
	b.wait(t)
	_, errno = g.Getattr(file)
	g.want(errno, "GETATTR in what has gone", unix.ENOENT)
	if st := g.s.Grafts(); len(st) > 0 {
		t.Errorf("grafts are %+v", st)
	}

	// The same place again is another node, though it is the same path.
	_, graft = memEnds(t)
	graft.Path = "/way/there"
	g.add(graft)
	if n := g.walk("/way/there").NodeId; n == e.NodeId {
		t.Errorf("the new graft has the node of the old one, %#x", n)
	}
	if n := g.walk("/way").NodeId; n>>indexShift != madeUpIndex {
		t.Errorf("/way is node %#x", n)
	}
}

// TestRefusals are calls that must not change anything.
func TestRefusals(t *testing.T) {
	m := newMem(t)
	put(t, m, "f", "")
	g := changing(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/a/b", Backend: newMem(t)}, Graft{Path: "/a/b/c", Backend: newMem(t)},
		Graft{Path: "/f", Backend: m, File: "f"})
	spare := newMem(t)
	for _, tt := range []struct {
		name string
		err  error
		want error
	}{
		{"Add at the root", g.s.Add(Graft{Path: "/", Backend: spare}), ErrRoot},
		{"Replace the root", g.s.Replace(Graft{Path: "/", Backend: spare}), ErrRoot},
		{"Remove the root", g.s.Remove("/"), ErrRoot},
		{"Add below a file", g.s.Add(Graft{Path: "/f/x", Backend: spare}), ErrNotDir},
		{"Add a file above others", g.s.Add(Graft{Path: "/a", Backend: spare, File: "f"}), ErrBusy},
		{"Remove above others", g.s.Remove("/a/b"), ErrBusy},
		{"Remove what is on the way", g.s.Remove("/a"), ErrNotFound},
		{"Remove nothing", g.s.Remove("/x"), ErrNotFound},
		{"Remove no path", g.s.Remove("x"), ErrNotFound},
		{"Change nothing", g.s.Change("/x", Change{}), ErrNotFound},
		{"Add in a static share", newShare(t, Graft{Path: "/", Backend: newMem(t)}).Add(Graft{Path: "/x", Backend: spare}), ErrFixed},
	} {
		if !errors.Is(tt.err, tt.want) {
			t.Errorf("%s: %v, expected %v", tt.name, tt.err, tt.want)
		}
	}
	if err := g.s.Remove("/a/b"); !strings.Contains(err.Error(), "/a/b/c") {
		t.Errorf("Remove above others: %v, expected their names", err)
	}
	if err := g.s.Add(Graft{Path: "rel", Backend: spare}); err == nil {
		t.Error("Add of a relative path succeeds")
	}
	g.walk("/f")
	if got := g.list(root, 4096, false); !slices.Equal(got, []string{"a", "f"}) {
		t.Errorf("the root lists %q", got)
	}
}

// TestReplace exchanges a graft, with another below it, while guests walk: they never find nothing.
func TestReplace(t *testing.T) {
	g := changing(t)
	old, graft := memEnds(t)
	graft.Path = "/m"
	g.add(graft)
	_, nested := memEnds(t)
	nested.Path = "/m/in/side"
	g.add(nested)
	done := make(chan struct{})
	var guests sync.WaitGroup
	for range 2 {
		guests.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				for _, path := range []string{"/m", "/m/in", "/m/in/side/file"} {
					at := uint64(root)
					for _, name := range components(path) {
						e, errno := g.Lookup(at, name)
						if errno != 0 && !(errno == unix.ESTALE && at != root) { // of a graft that was replaced since
							t.Errorf("LOOKUP %s of %s: %v", name, path, errno)
						}
						if at = e.NodeId; errno != 0 {
							break
						}
					}
				}
			}
		})
	}
	file := g.walk("/m/file").NodeId
	fh, errno := g.Open(file, unix.O_RDONLY)
	g.want(errno, "OPEN", 0)
	var olds []*ends
	for range 50 {
		b, graft := memEnds(t)
		graft.Path = "/m"
		if err := g.s.Replace(graft); err != nil {
			t.Fatal(err)
		}
		olds = append(olds, b)
	}
	close(done)
	guests.Wait()
	for _, b := range olds[:len(olds)-1] {
		b.wait(t)
	}
	old.open(t)
	if got, errno := g.Read(file, fh, 0, 100); errno != 0 || string(got) != "contents" {
		t.Errorf("READ of what was open: %v, %q", errno, got)
	}
	g.Release(file, fh)
	old.wait(t)
	if got := g.list(g.walk("/m").NodeId, 4096, false); !slices.Equal(got, []string{"file", "in"}) {
		t.Errorf("/m lists %q", got)
	}
}

// TestAddBeside adds grafts where a guest has directories and listings open.
func TestAddBeside(t *testing.T) {
	host := t.TempDir()
	write(t, host+"/dir/plain", "")
	g := changing(t, Graft{Path: "/", Backend: newPassthrough(t, host)})
	dir := g.walk("/dir").NodeId
	fh, errno := g.Opendir(dir)
	g.want(errno, "OPENDIR", 0)
	for i := range 5 {
		g.add(Graft{Path: fmt.Sprint("/dir/g", i), Backend: newMem(t)})
	}
	// The node that the guest knows has them, without another LOOKUP of it.
	if e, errno := g.Lookup(dir, "g3"); errno != 0 || e.NodeId>>indexShift == 0 {
		t.Errorf("LOOKUP in a directory known before: %v, node %#x", errno, e.NodeId)
	}
	all := func(after uint64) (names []string, offs map[string]uint64) {
		entries, errno := g.Readdir(dir, fh, after, 4096, false)
		g.want(errno, "READDIR", 0)
		offs = make(map[string]uint64)
		for _, e := range entries {
			if offs[e.Name] = e.Off; e.Name[0] != '.' {
				names = append(names, e.Name)
			}
		}
		return names, offs
	}
	names, offs := all(0)
	if slices.Sort(names); !slices.Equal(names, []string{"g0", "g1", "g2", "g3", "g4", "plain"}) {
		t.Errorf("the directory lists %q", names)
	}
	g.remove("/dir/g1")
	g.remove("/dir/g3")
	if names, _ := all(offs["g2"]); !slices.Equal(names, []string{"g4"}) {
		t.Errorf("after g2 come %q", names)
	}
	g.add(Graft{Path: "/dir/new", Backend: newMem(t)}) // where g1 was
	if names, _ := all(offs["g2"]); !slices.Equal(names, []string{"g4"}) {
		t.Errorf("after g2 come %q", names)
	}
	if names, _ := all(offs["g0"]); !slices.Equal(names, []string{"new", "g2", "g4"}) {
		t.Errorf("after g0 come %q", names)
	}
	// A graft above others, and one within.
	g.add(Graft{Path: "/dir/new/deep/er", Backend: newMem(t)})
	g.add(Graft{Path: "/dir", Backend: newMem(t)})
	if n := g.walk("/dir/new/deep/er").NodeId; n&numberMask != root {
		t.Errorf("the graft within is node %#x", n)
	}
	if got := g.list(g.walk("/dir").NodeId, 4096, false); !slices.Equal(got, []string{"g0", "g2", "g4", "new"}) {
		t.Errorf("/dir lists %q", got)
	}
	for _, path := range []string{"/dir/new/deep/er", "/dir/new", "/dir/g0", "/dir/g2", "/dir/g4", "/dir"} {
		g.remove(path)
	}
	if got := g.list(g.walk("/dir").NodeId, 4096, false); !slices.Equal(got, []string{"plain"}) {
		t.Errorf("/dir lists %q", got)
	}
	g.Releasedir(dir, fh)
}

// TestWayIsGivenBack counts the lookups that the share itself holds.
func TestWayIsGivenBack(t *testing.T) {
	b := newCounts(t)
	makeDirs(t, b, "a", "b")
	g := changing(t, Graft{Path: "/", Backend: b})
	b.left(t)
	g.add(Graft{Path: "/a/b/c", Backend: newMem(t)})
	b.left(t, 1, 1)
	g.add(Graft{Path: "/a/b/d", Backend: newMem(t)})
	b.left(t, 1, 1)
	g.remove("/a/b/c")
	b.left(t, 1, 1)
	g.add(Graft{Path: "/a/b", Backend: newMem(t)})
	b.left(t, 1)
	g.remove("/a/b/d")
	g.remove("/a/b")
	b.left(t)
	// A graft above another: the way is in it from then on.
	g.add(Graft{Path: "/a/b/c", Backend: newMem(t)})
	b.left(t, 1, 1)
	above := newCounts(t)
	makeDirs(t, above, "b")
	g.add(Graft{Path: "/a", Backend: above})
	b.left(t)
	e := g.walk("/a/b")
	if p := g.s.PartOf(e.NodeId); p.Path != "/a" {
		t.Errorf("/a/b is of part %s", p.Path)
	}
	if n := g.walk("/a/b/c").NodeId; n&numberMask != root {
		t.Errorf("/a/b/c is node %#x", n)
	}
	g.remove("/a/b/c")
	if got := g.list(e.NodeId, 4096, false); len(got) > 0 {
		t.Errorf("/a/b lists %q", got)
	}
}

// TestIndexes has a guest keep lookups of what is removed: nobody else gets their index until they are given back, or the
// session ends.
func TestIndexes(t *testing.T) {
	g := changing(t)
	add := func() uint64 {
		t.Helper()
		b, graft := memEnds(t)
		graft.Path = "/g"
		g.add(graft)
		dir := g.walk("/g").NodeId
		file := g.walk("/g/file").NodeId // looks /g up once more
		g.remove("/g")
		b.wait(t)
		_, errno := g.Getattr(file)
		g.want(errno, "GETATTR in what has gone", unix.ENOENT)
		return dir &^ numberMask
	}
	held := map[uint64]bool{}
	for range 20 {
		base := add()
		if held[base] {
			t.Fatalf("index %#x is given again while the guest has lookups of it", base)
		}
		held[base] = true
	}
	if n := len(g.s.ghosts); n != 20 {
		t.Errorf("%d indexes are kept, expected 20", n)
	}
	// All but the last are used up.
	var last uint64
	for base := range held {
		last = base
	}
	g.s.mu.Lock()
	for i := range uint16(madeUpIndex) {
		if g.s.ghosts[i].lookups == 0 {
			g.s.ghosts[i] = ghost{lookups: 1}
		}
	}
	g.s.mu.Unlock()
	b := newMem(t)
	if err := g.s.Add(Graft{Path: "/full", Backend: b}); !errors.Is(err, ErrFull) {
		t.Errorf("Add without a free index: %v", err)
	}
	g.missing("/full")
	g.s.Forget(last|root, 2)
	g.s.Forget(last|2, 1<<63) // more than there are
	g.add(Graft{Path: "/full", Backend: b})
	if n := g.walk("/full").NodeId; n != last|root {
		t.Errorf("the graft is node %#x, expected the index that was given back, %#x", n, last)
	}
	_, errno := g.Getattr(last | 2)
	g.want(errno, "GETATTR with the node of another graft", unix.ESTALE)
	_, errno = g.Read(last|2, last|1, 0, 10)
	g.want(errno, "READ with the handle of another graft", unix.EBADF)
	g.s.Reset()
	if n := len(g.s.ghosts); n != 0 {
		t.Errorf("%d indexes are kept after the session, expected none", n)
	}
}

// TestSessionEndsWhileLeaving has a session end with files of removed grafts open.
func TestSessionEndsWhileLeaving(t *testing.T) {
	g := changing(t)
	b, graft := memEnds(t)
	graft.Path = "/g"
	g.add(graft)
	_, errno := g.Open(g.walk("/g/file").NodeId, unix.O_RDONLY)
	g.want(errno, "OPEN", 0)
	g.remove("/g")
	b.open(t)
	g.s.Reset()
	b.wait(t)

	// And with the share.
	g = changing(t)
	b, graft = memEnds(t)
	graft.Path = "/g"
	g.add(graft)
	_, errno = g.Open(g.walk("/g/file").NodeId, unix.O_RDONLY)
	g.want(errno, "OPEN", 0)
	g.remove("/g")
	if err := g.s.Close(); err != nil {
		t.Error(err)
	}
	if b.closed.Load() != 1 {
		t.Error("the backend is not closed with the share")
	}
	g.s.list = nil // closed
}

// TestCallKeeps removes a graft while a call of it runs.
func TestCallKeeps(t *testing.T) {
	b := new(spy)
	entered, release := make(chan struct{}), make(chan struct{})
	b.hook = func(call string) {
		if call == "Getattr" {
			close(entered)
			<-release
		}
	}
	removed := make(chan string, 1)
	g := changingWith(t, Config{OnRemoved: func(p *fsbackend.Part, err error) { removed <- fmt.Sprint(p.Path, err, p.Gone()) }})
	gone := make(chan *fsbackend.Part, 1)
	g.s.OnGone(func(p *fsbackend.Part) { gone <- p })
	g.add(Graft{Path: "/g", Backend: b})
	part := g.s.PartOf(second | 5)
	done := make(chan Errno)
	go func() {
		_, errno := g.Getattr(second | 5)
		done <- errno
	}()
	<-entered
	g.remove("/g")
	if slices.ContainsFunc(b.taken(), func(a asked) bool { return a.call == "Close" }) {
		t.Error("the backend is closed while a call runs")
	}
	if g.s.PartOf(second|5) != part || part.Gone() {
		t.Error("the part has gone while a call runs")
	}
	close(release)
	if errno := <-done; errno != 0 {
		t.Errorf("GETATTR that was under way: %v", errno)
	}
	if p := <-gone; p != part || !p.Gone() {
		t.Error("another part has gone")
	}
	if got := <-removed; got != "/g<nil> true" {
		t.Errorf("OnRemoved is given %s", got)
	}
	if log := b.taken(); len(log) != 1 || log[0].call != "Close" {
		t.Errorf("the backend was asked %+v, expected Close", log)
	}
	if g.s.PartOf(second|5) != g.s.PartOf(root) {
		t.Error("what has gone has a part")
	}
}

// TestWrongPart has a request's node be of another part by the time it is made.
func TestWrongPart(t *testing.T) {
	each(t, Graft{}, func(t *testing.T, s *Share, b *spy, name string, o op) {
		r := in()
		r.c.Part = s.PartOf(root)
		want := unix.ESTALE
		if name == "Release" || name == "Releasedir" {
			want = 0
		}
		if errno := o.call(s, r); errno != want {
			t.Errorf("%s: %v, expected %v", name, errno, want)
		}
		if log := b.taken(); len(log) > 0 {
			t.Errorf("the backend was asked %+v", log)
		}
	})
}

// TestUnfit adds backends to sessions that they cannot do.
func TestUnfit(t *testing.T) {
	const defaults = fuseproto.FUSE_WRITEBACK_CACHE | fuseproto.FUSE_HANDLE_KILLPRIV_V2 | fuseproto.FUSE_SUBMOUNTS | fuseproto.FUSE_NO_OPEN_SUPPORT
	s, err := New(Config{Dynamic: true})
	if err != nil {
		t.Fatal(err)
	}
	flags := s.WantFlags(defaults)
	if want := defaults &^ fuseproto.FUSE_NO_OPEN_SUPPORT; flags != want {
		t.Errorf("flags are %#x, expected %#x", flags, want)
	}
	without := func(not uint64) func(uint64) uint64 { return func(f uint64) uint64 { return f &^ not } }
	for _, inSession := range []bool{false, true} {
		if inSession {
			s.Init(fsbackend.Features{Flags: flags})
		}
		b := &spy{want: without(fuseproto.FUSE_WRITEBACK_CACHE)}
		if err := s.Add(Graft{Path: "/w", Backend: b}); !errors.Is(err, ErrUnfit) || !strings.Contains(err.Error(), "writeback") {
			t.Errorf("Add of a backend that cannot do writeback: %v", err)
		}
		if log := b.taken(); len(log) > 0 {
			t.Errorf("it was asked %+v", log)
		}
		b = &spy{want: without(fuseproto.FUSE_HANDLE_KILLPRIV_V2), mode: unix.S_IFREG | 0o6755}
		if err := s.Add(Graft{Path: fmt.Sprint("/k", inSession), Backend: b}); err != nil {
			t.Fatal(err)
		}
		if !inSession {
			s.Init(fsbackend.Features{Flags: flags})
		}
		if b.features.Flags != flags {
			t.Errorf("the backend is told of flags %#x", b.features.Flags)
		}
		index := uint64(1)
		if inSession {
			index = 2
		}
		c := &fsbackendtest.Client{R: fsbackend.Resolve(s)}
		if a, errno := c.Getattr(index<<indexShift | 5); errno != 0 || a.Mode != unix.S_IFREG|0o755 {
			t.Errorf("GETATTR: %v, mode %o, expected no set-id bits where nobody clears them", errno, a.Mode)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestChurn adds and removes a graft that guests read: nothing is left of any.
func TestChurn(t *testing.T) {
	host := t.TempDir()
	write(t, host+"/file", "contents")
	g := changing(t, Graft{Path: "/", Backend: newPassthrough(t, t.TempDir())})
	fds := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	var stop atomic.Bool
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for !stop.Load() {
				e, errno := g.Lookup(root, "g")
				if errno != 0 {
					continue
				}
				f, errno := g.Lookup(e.NodeId, "file")
				if errno == 0 && f.NodeId != 0 {
					if fh, errno := g.Open(f.NodeId, unix.O_RDONLY); errno == 0 {
						if b, errno := g.Read(f.NodeId, fh, 0, 100); errno != 0 || string(b) != "contents" {
							t.Errorf("READ: %v, %q", errno, b)
						}
						g.Release(f.NodeId, fh)
					}
					g.s.Forget(f.NodeId, 1)
				}
				g.s.Forget(e.NodeId, 1)
			}
		})
	}
	var fds0, goroutines int
	var heap uint64
	for i := range 550 {
		fs := newPassthrough(t, host)
		b := newEnds(t, fs)
		graft := Graft{Path: "/g", Backend: endingPassthrough{fs, b}}
		if i%2 == 1 {
			graft.Isolated, graft.Timeout = true, time.Second
		}
		g.add(graft)
		g.remove("/g")
		b.wait(t)
		if i == 49 || i == 549 {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			if i == 49 {
				fds0, goroutines, heap = fds(), runtime.NumGoroutine(), m.HeapAlloc
				continue
			}
			stop.Store(true)
			readers.Wait()
			runtime.GC()
			runtime.ReadMemStats(&m)
			if n := fds(); n > fds0+4 {
				t.Errorf("%d fds, %d before", n, fds0)
			}
			if n := runtime.NumGoroutine(); n > goroutines {
				t.Errorf("%d goroutines, %d before", n, goroutines)
			}
			if m.HeapAlloc > heap+1<<20 {
				t.Errorf("%d bytes of heap, %d before", m.HeapAlloc, heap)
			}
		}
	}
	if n := len(g.s.ghosts); n > 0 {
		t.Errorf("%d indexes are kept by a guest that has forgotten everything", n)
	}
}

// endingPassthrough is a host directory whose Close is watched.
type endingPassthrough struct {
	*passthrough.FS
	e *ends
}

func (b endingPassthrough) Close() error { return b.e.Close() }

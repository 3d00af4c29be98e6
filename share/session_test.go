package share

import (
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// hang makes b's calls of a name wait until the function returned is called.
func hang(b *spy, name string) (release func()) {
	gate := make(chan struct{})
	b.hook = func(call string) {
		if call == name {
			<-gate
		}
	}
	return sync.OnceFunc(func() { close(gate) })
}

func newLog() (*slog.Logger, *strings.Builder) {
	var b strings.Builder
	return slog.New(slog.NewTextHandler(&b, nil)), &b
}

func logged(t testing.TB, cfg Config) (*Share, *strings.Builder) {
	t.Helper()
	log, text := newLog()
	cfg.Log = log
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s, text
}

func TestWantFlags(t *testing.T) {
	const (
		acl  = fuseproto.FUSE_POSIX_ACL
		kill = fuseproto.FUSE_HANDLE_KILLPRIV_V2
		sub  = fuseproto.FUSE_SUBMOUNTS
		open = fuseproto.FUSE_NO_OPEN_SUPPORT
	)
	plus := func(flags uint64) func(uint64) uint64 { return func(d uint64) uint64 { return d | flags } }
	minus := func(flags uint64) func(uint64) uint64 { return func(d uint64) uint64 { return d &^ flags } }
	root := func(want func(uint64) uint64) Graft { return Graft{Path: "/", Backend: &spy{want: want}} }
	sub1 := func(want func(uint64) uint64) Graft { return Graft{Path: "/g", Backend: &spy{want: want}} }
	const all = kill | sub | readdirplusFlags
	for _, tt := range []struct {
		name   string
		grafts []Graft
		want   uint64
	}{
		{"alone", []Graft{root(plus(acl | open))}, all | acl | open},
		{"both", []Graft{root(plus(acl)), sub1(plus(acl))}, all | acl},
		{"only the root", []Graft{root(plus(acl)), sub1(nil)}, all},
		{"only the other", []Graft{root(nil), sub1(plus(acl))}, all},
		{"one cannot", []Graft{root(nil), sub1(minus(kill))}, all &^ kill},
		{"without a Wanter", []Graft{root(plus(acl)), {Path: "/g", Backend: bare{new(spy)}}}, all},
		{"submounts are the share's", []Graft{root(minus(sub)), sub1(nil)}, all},
		{"nobody may say ENOSYS", []Graft{root(plus(open)), sub1(plus(open))}, all},
		{"no READDIRPLUS at all", []Graft{{Path: "/", Backend: bare{new(spy)}}}, all &^ readdirplusFlags},
		{"READDIRPLUS in one", []Graft{{Path: "/", Backend: bare{new(spy)}}, sub1(nil)}, all},
		{"lists with ids", []Graft{root(plus(acl)), {Path: "/g", Backend: &spy{want: plus(acl)}, UIDMap: IDMap{{0, 1, 1}}}}, all},
	} {
		if got := newShare(t, tt.grafts...).WantFlags(all); got != tt.want {
			t.Errorf("%s: wants %#x, expected %#x", tt.name, got, tt.want)
		}
	}
}

func TestSessionReachesAll(t *testing.T) {
	a, b, c := new(spy), new(spy), new(spy)
	s := newShare(t, Graft{Path: "/", Backend: a}, Graft{Path: "/b", Backend: b}, Graft{Path: "/c", Backend: c, Isolated: true})
	f := fsbackend.Features{Minor: 45, Flags: fuseproto.FUSE_POSIX_ACL}
	s.Init(f)
	s.Reset()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	for i, p := range []*spy{a, b, c} {
		var calls []string
		for _, l := range p.taken() {
			calls = append(calls, l.call)
		}
		if !slices.Equal(calls, []string{"Init", "Reset", "Close"}) || p.features != f {
			t.Errorf("part %d was asked %q with features %+v", i, calls, p.features)
		}
	}
}

// TestHungPart has each call of a session hang in an isolated part.
func TestHungPart(t *testing.T) {
	for _, call := range []string{"Init", "Reset", "Close"} {
		synctest.Test(t, func(t *testing.T) {
			b := new(spy)
			release := hang(b, call)
			root := new(spy)
			s, log := logged(t, Config{Grafts: []Graft{{Path: "/", Backend: root}, {Path: "/g", Backend: b, Isolated: true, Slow: true, Extension: "sloth"}}})
			begun := time.Now()
			s.Init(fsbackend.Features{})
			s.Reset()
			s.Init(fsbackend.Features{})
			if took := time.Since(begun); call != "Close" && took != patience {
				t.Errorf("%s that hangs took %v, expected %v once", call, took, patience)
			}
			r := in()
			want := unix.EIO
			if call == "Close" {
				want = fsbackend.OK
			}
			if errno := ops["Getattr"].call(s, r); errno != want {
				t.Errorf("GETATTR after %s hung: %v, expected %v", call, errno, want)
			}
			if _, errno := (&fsbackendtest.Client{R: fsbackend.Resolve(s)}).Lookup(fsbackendtest.Root, "g"); errno != want {
				t.Errorf("LOOKUP after %s hung: %v, expected %v", call, errno, want)
			}
			r.node, r.fh = 5, 6
			if errno := ops["Getattr"].call(s, r); errno != fsbackend.OK {
				t.Errorf("GETATTR of the root's part: %v", errno)
			}
			err := s.Close()
			if err == nil || !strings.Contains(err.Error(), "sloth") {
				t.Errorf("Close: %v, expected an error that names the extension", err)
			}
			if !strings.Contains(log.String(), "sloth") || !strings.Contains(log.String(), call) {
				t.Errorf("log does not name extension and call: %s", log)
			}
			if n := s.Parts()[1].Stats.Timeouts.Load(); n != 1 {
				t.Errorf("%d calls were given up, expected 1", n)
			}
			release()
		})
	}
}

// TestPanics has each call of a session panic, in an isolated part and in the root's.
func TestPanics(t *testing.T) {
	for _, call := range []string{"Init", "Reset", "Close"} {
		for _, index := range []int{0, 1} {
			bad := new(spy)
			bad.hook = func(c string) {
				if c == call {
					panic("boom")
				}
			}
			backends := []*spy{new(spy), new(spy)}
			backends[index] = bad
			s, log := logged(t, Config{Grafts: []Graft{
				{Path: "/", Backend: backends[0], Extension: "rooted"},
				{Path: "/g", Backend: backends[1], Isolated: true, Extension: "apart"},
			}})
			s.Init(fsbackend.Features{})
			s.Reset()
			err := s.Close()
			name := []string{"rooted", "apart"}[index]
			if !strings.Contains(log.String(), "boom") || !strings.Contains(log.String(), name) {
				t.Errorf("%s: log does not name the extension: %s", call, log)
			}
			if (err != nil) != (call == "Close") {
				t.Errorf("%s panics, then Close: %v", call, err)
			}
			closed := slices.ContainsFunc(bad.taken(), func(a asked) bool { return a.call == "Close" })
			if !closed {
				t.Errorf("%s panicked, and the part was never closed", call)
			}
			if n := s.Parts()[index].Stats.Panics.Load(); n != 1 {
				t.Errorf("%s: %d panics counted, expected 1", call, n)
			}
			if errno := ops["Read"].call(s, &request{node: uint64(index)<<indexShift | 5, fh: uint64(index)<<indexShift | 6}); errno != unix.EIO {
				t.Errorf("READ after a panic in %s: %v, expected EIO", call, errno)
			}
		}
	}
}

// TestIsolatedMountPoint looks the root of a part up that hangs: nobody asks it.
func TestIsolatedMountPoint(t *testing.T) {
	b := &spy{mode: unix.S_IFDIR | 0o700}
	s := newShare(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/g", Backend: b, Isolated: true, Slow: true, UIDMap: IDMap{{3, spyUID, 1}}})
	c := &fsbackend.Context{}
	var out fuseproto.EntryOut
	if errno := s.Lookup(c, fsbackendtest.Root, fsbackend.MakeName("g"), &out); errno != 0 || out.Mode != unix.S_IFDIR|0o755 || out.AttrValid != 0 || out.AttrValidNsec != 1 {
		t.Errorf("LOOKUP: %v, %+v, expected a directory whose attributes are stale at once", errno, out)
	}
	if log := b.taken(); len(log) > 0 {
		t.Errorf("the part was asked %+v", log)
	}
	getattr := &fuseproto.GetattrIn{}
	getattr.NodeId = out.NodeId
	var attr fuseproto.AttrOut
	if errno := s.Getattr(c, getattr, &attr); errno != 0 {
		t.Fatal(errno)
	}
	out = fuseproto.EntryOut{}
	if errno := s.Lookup(c, fsbackendtest.Root, fsbackend.MakeName("g"), &out); errno != 0 || out.Attr != attr.Attr || out.Uid != 3 {
		t.Errorf("LOOKUP: %v, %+v, expected what GETATTR has said: %+v", errno, out.Attr, attr.Attr)
	}
}

// TestSlowMountPoint looks up what another part serves, from a thread that may not sleep.
func TestSlowMountPoint(t *testing.T) {
	for _, g := range []Graft{{}, {File: "f"}, {File: "f", Isolated: true}} {
		b := &spy{slow: true}
		g.Path, g.Backend = "/g", b
		s := newShare(t, Graft{Path: "/", Backend: newMem(t)}, g)
		if s.Slow() || s.PartOf(fsbackendtest.Root).Slow || !s.PartOf(second|1).Slow {
			t.Error("the part is slow, and nothing else")
		}
		c := &fsbackend.Context{}
		var out fuseproto.EntryOut
		if errno := s.Lookup(c, fsbackendtest.Root, fsbackend.MakeName("g"), &out); errno != fsbackend.ErrMayBlock {
			t.Errorf("LOOKUP: %v, expected ErrMayBlock", errno)
		}
		if log := b.taken(); len(log) > 0 {
			t.Errorf("the part was asked %+v", log)
		}
		c.MayBlock = true
		if errno := s.Lookup(c, fsbackendtest.Root, fsbackend.MakeName("g"), &out); errno != 0 || out.NodeId>>indexShift != 1 {
			t.Errorf("LOOKUP that may sleep: %v, node %#x", errno, out.NodeId)
		}
	}
}

// TestIsolatedFile looks the file of a part up that hangs: the request is given up, and no more wait until it comes back.
func TestIsolatedFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := new(spy)
		release := hang(b, "Lookup")
		s := newShare(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/f", Backend: b, File: "f", Isolated: true, Timeout: time.Second})
		c := &fsbackendtest.Client{R: fsbackend.Resolve(s)}
		begun := time.Now()
		for range 3 {
			if _, errno := c.Lookup(fsbackendtest.Root, "f"); errno != unix.EIO {
				t.Errorf("LOOKUP: %v, expected EIO", errno)
			}
			if _, errno := c.Create(fsbackendtest.Root, "f", unix.O_RDWR, 0o644); errno != unix.EIO {
				t.Errorf("CREATE: %v, expected EIO", errno)
			}
		}
		if took := time.Since(begun); took != time.Second {
			t.Errorf("six requests took %v, expected the part's timeout, once", took)
		}
		st := &s.Parts()[1].Stats
		if st.Timeouts.Load() != 1 || st.Refused.Load() != 5 {
			t.Errorf("%d calls were given up, %d refused, expected 1 and 5", st.Timeouts.Load(), st.Refused.Load())
		}
		b.taken()
		release()
		synctest.Wait()
		if log := b.taken(); len(log) != 1 || log[0].call != "Forget" || !slices.Equal(log[0].nodes, []uint64{spyNode, 1}) {
			t.Errorf("after the call came back: %+v, expected that its lookup is given back", log)
		}
		if e, errno := c.Lookup(fsbackendtest.Root, "f"); errno != 0 || e.NodeId != second|spyNode {
			t.Errorf("LOOKUP: %v, node %#x", errno, e.NodeId)
		}
		if o, errno := c.Create(fsbackendtest.Root, "f", unix.O_RDWR, 0o644); errno != 0 || o.NodeId != second|spyNode || o.Fh != second|spyFh {
			t.Errorf("CREATE: %v, node %#x, handle %#x", errno, o.NodeId, o.Fh)
		}
		b.hook = func(string) { panic("boom") }
		if _, errno := c.Lookup(fsbackendtest.Root, "f"); errno != unix.EIO || st.Panics.Load() != 1 {
			t.Errorf("LOOKUP that panics: %v, %d panics counted", errno, st.Panics.Load())
		}
	})
}

// TestManyWait has more requests wait for a part that hangs than may.
func TestManyWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := new(spy)
		release := hang(b, "Lookup")
		s := newShare(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/f", Backend: b, File: "f", Isolated: true})
		begun := time.Now()
		var group sync.WaitGroup
		for range maxWaiting + 2 {
			group.Go(func() {
				c := &fsbackendtest.Client{R: fsbackend.Resolve(s)}
				if _, errno := c.Lookup(fsbackendtest.Root, "f"); errno != unix.EIO {
					t.Errorf("LOOKUP: %v, expected EIO", errno)
				}
			})
		}
		group.Wait()
		if took := time.Since(begun); took != patience {
			t.Errorf("the requests took %v, expected %v", took, patience)
		}
		if st := &s.Parts()[1].Stats; st.Timeouts.Load() != maxWaiting || st.Refused.Load() != 2 {
			t.Errorf("%d calls were given up, %d refused, expected %d and 2", st.Timeouts.Load(), st.Refused.Load(), maxWaiting)
		}
		release()
	})
}

// TestEnterLeave counts the hooks around calls that the share makes on its own account.
func TestEnterLeave(t *testing.T) {
	for _, isolated := range []bool{false, true} {
		var mu sync.Mutex
		inside, entered := 0, 0
		b := new(spy)
		b.hook = func(call string) {
			mu.Lock()
			defer mu.Unlock()
			if inside != 1 {
				t.Errorf("isolated %v: %s is called with %d Enters ahead of their Leave, expected 1", isolated, call, inside)
			}
		}
		hook := func(n int) func() {
			return func() {
				mu.Lock()
				defer mu.Unlock()
				inside += n
				entered += max(n, 0)
			}
		}
		s := newShare(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/f", Backend: b, File: "f", Isolated: isolated, Enter: hook(1), Leave: hook(-1)})
		s.Init(fsbackend.Features{})
		c := &fsbackendtest.Client{R: fsbackend.Resolve(s)}
		if _, errno := c.Lookup(fsbackendtest.Root, "f"); errno != 0 {
			t.Error(errno)
		}
		if _, errno := c.Create(fsbackendtest.Root, "f", 0, 0o644); errno != 0 {
			t.Error(errno)
		}
		s.Reset()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if inside != 0 || entered != 5 {
			t.Errorf("isolated %v: %d Enters, %d more than Leaves, expected 5 and none", isolated, entered, inside)
		}
	}
}

// TestSyncfs writes all parts where the guest takes them for one file system.
func TestSyncfs(t *testing.T) {
	for _, flags := range []uint64{0, fuseproto.FUSE_SUBMOUNTS} {
		spies := []*spy{new(spy), new(spy), new(spy), new(spy)}
		s := newShare(t, Graft{Path: "/", Backend: spies[0]}, Graft{Path: "/g", Backend: spies[1]},
			Graft{Path: "/f", Backend: spies[2], File: "f"}, Graft{Path: "/i", Backend: spies[3], Isolated: true})
		s.Init(fsbackend.Features{Flags: flags})
		sync := func(node uint64, want ...bool) {
			t.Helper()
			for _, b := range spies {
				b.taken()
			}
			if errno := s.Syncfs(&fsbackend.Context{MayBlock: true}, node); errno != 0 {
				t.Error(errno)
			}
			for i, b := range spies {
				log := b.taken()
				if got := len(log) == 1 && log[0].nodes[0] == fsbackendtest.Root; got != want[i] {
					t.Errorf("flags %#x, SYNCFS of %#x: part %d was asked %+v, expected %v", flags, node, i, log, want[i])
				}
			}
		}
		one := flags == 0
		sync(fsbackendtest.Root, true, one, one, one)
		sync(second|fsbackendtest.Root, false, true, false, false)
	}
}

// maker can make files, but not create them open.
type maker struct {
	fsbackend.Backend
	fsbackend.Maker
	fsbackend.Opener
	fsbackend.Remover
	fsbackend.Reader
	fsbackend.Writer
	fsbackend.DirReader
	fsbackend.Setattrer
	fsbackend.Renamer
}

// TestCreateIsMade has CREATE made of MKNOD and OPEN.
func TestCreateIsMade(t *testing.T) {
	m := newMem(t)
	g := mount(t, 0, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/g", Backend: maker{m, m, m, m, m, m, m, m, m}})
	dir := g.walk("/g").NodeId
	n := g.put(dir, "f", "contents")
	if got := g.contents(n); got != "contents" {
		t.Errorf("the file holds %q", got)
	}
	_, errno := g.Create(dir, "f", unix.O_RDWR|unix.O_EXCL, 0o644)
	g.want(errno, "CREATE with O_EXCL", unix.EEXIST)
	again, errno := g.Create(dir, "f", unix.O_RDWR, 0o644)
	g.want(errno, "CREATE of a file that is there", fsbackend.OK)
	if again.NodeId != n {
		t.Errorf("CREATE of a file that is there gives node %#x, expected %#x", again.NodeId, n)
	}
	_, errno = g.Mkdir(dir, "d", 0o755)
	g.want(errno, "MKDIR", fsbackend.OK)
	_, errno = g.Create(dir, "d", unix.O_RDWR, 0o644)
	g.want(errno, "CREATE of a directory", unix.EISDIR)
	// Lists of a part without READDIRPLUS have nothing that counts a lookup.
	fh, errno := g.Opendir(dir)
	g.want(errno, "OPENDIR", fsbackend.OK)
	entries, errno := g.Readdir(dir, fh, 0, 4096, true)
	g.want(errno, "READDIRPLUS", fsbackend.OK)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name)
		if e.Entry.NodeId != 0 || e.Entry.Mode>>12 != e.Type {
			t.Errorf("READDIRPLUS gives %+v", e)
		}
	}
	if want := []string{".", "..", "f", "d"}; !slices.Equal(names, want) {
		t.Errorf("READDIRPLUS lists %q, expected %q", names, want)
	}

	// Two calls are made only where both may sleep.
	single := new(spy)
	for _, tt := range []struct {
		graft Graft
		dir   uint64
	}{
		{Graft{Path: "/g", Backend: maker{single, single, single, single, single, single, single, single, single}}, second | 5},
		{Graft{Path: "/name", Backend: single, File: "f"}, fsbackendtest.Root},
	} {
		r := &request{node: tt.dir}
		if errno := ops["Create"].call(newShare(t, Graft{Path: "/", Backend: newMem(t)}, tt.graft), r); errno != fsbackend.ErrMayBlock {
			t.Errorf("CREATE where nothing may sleep: %v, expected ErrMayBlock", errno)
		}
		if log := single.taken(); len(log) > 0 {
			t.Errorf("the backend was asked %+v", log)
		}
	}

	// What cannot be opened is not left behind.
	b := new(spy)
	b.hook = func(call string) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.errno = fsbackend.OK
		if call == "Mknod" {
			b.errno = unix.ENFILE
		}
	}
	s := newShare(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/g", Backend: maker{b, b, b, b, b, b, b, b, b}})
	r := in()
	if errno := ops["Create"].call(s, r); errno != unix.ENFILE {
		t.Errorf("CREATE that cannot open: %v", errno)
	}
	var calls []string
	for _, a := range b.taken() {
		calls = append(calls, a.call)
	}
	if !slices.Equal(calls, []string{"Mknod", "Open", "Forget", "Unlink"}) {
		t.Errorf("the backend was asked %q", calls)
	}
}

// TestListedWithoutLists shows mount points in a directory whose backend has no lists.
func TestListedWithoutLists(t *testing.T) {
	g := mount(t, 0, Graft{Path: "/", Backend: bare{newMem(t)}}, Graft{Path: "/a/b", Backend: newMem(t)}, Graft{Path: "/c", Backend: newMem(t)})
	if got := g.list(fsbackendtest.Root, 4096, false); !slices.Equal(got, []string{"a", "c"}) {
		t.Errorf("the root lists %q", got)
	}
}

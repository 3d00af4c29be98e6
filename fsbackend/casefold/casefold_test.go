package casefold

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

const root = fsbackendtest.Root

func TestMain(m *testing.M) {
	unix.Umask(0) // as the daemon does
	os.Exit(m.Run())
}

func newMem(t testing.TB, now func() time.Time) fsbackend.Backend {
	t.Helper()
	b, err := mem.New(mem.Config{Now: now})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newPassthrough(t testing.TB, dir string) fsbackend.Backend {
	t.Helper()
	b, err := passthrough.New(passthrough.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestConformance(t *testing.T) {
	for name, newBackend := range map[string]func(testing.TB) fsbackend.Backend{
		"mem":         func(t testing.TB) fsbackend.Backend { return newMem(t, nil) },
		"passthrough": func(t testing.TB) fsbackend.Backend { return newPassthrough(t, t.TempDir()) },
	} {
		for _, maxNames := range []int{0, 3} {
			if name == "passthrough" && maxNames > 0 {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", name, maxNames), func(t *testing.T) {
				fsbackendtest.Run(t, fsbackendtest.Config{
					New: func(t *testing.T) fsbackend.Backend {
						return over(t, newBackend(t), Config{MaxNames: maxNames})
					},
					Check:       func(b fsbackend.Backend) error { return b.(*FS).check() },
					AsRoot:      name == "mem" || os.Getuid() == 0,
					SparseBlock: 4096,
				})
			})
		}
	}
}

// check says what of the indexes is wrong.
func (f *FS) check() error {
	k := &f.cache
	total := 0
	for dir, x := range k.dirs {
		size := len(x.first)
		for key, more := range x.more {
			if len(more) == 0 || x.first[key] >= more[0] || !slices.IsSorted(more) {
				return fmt.Errorf("index of %#x: names %q and %q", dir, x.first[key], more)
			}
			size += len(more)
		}
		if size != x.size || x.dir != dir {
			return fmt.Errorf("index of %#x: %d names, counted %d", dir, size, x.size)
		}
		total += x.cost()
	}
	if total != k.names || k.used.Len() != len(k.dirs) || total > k.maxNames {
		return fmt.Errorf("%d names in %d indexes, counted %d in %d, at most %d", total, len(k.dirs), k.names, k.used.Len(), k.maxNames)
	}
	return nil
}

func over(t testing.TB, b fsbackend.Backend, cfg Config) *FS {
	t.Helper()
	f, err := New(b, cfg)
	if err != nil {
		_ = b.Close()
		t.Fatal(err)
	}
	return f
}

func clientOf(t testing.TB, f *FS) *fsbackendtest.Client {
	t.Helper()
	t.Cleanup(func() {
		if err := f.check(); err != nil {
			t.Error(err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return &fsbackendtest.Client{R: fsbackend.Resolve(f)}
}

func want(t testing.TB, errno fsbackend.Errno, what string, expected fsbackend.Errno) {
	t.Helper()
	if errno != expected {
		t.Fatalf("%s: %v, expected %v", what, errno, expected)
	}
}

func create(t testing.TB, c *fsbackendtest.Client, parent uint64, name string) uint64 {
	t.Helper()
	f, errno := c.Create(parent, name, unix.O_RDWR|unix.O_EXCL, 0o644)
	want(t, errno, "CREATE "+name, fsbackend.OK)
	c.Release(f.NodeId, f.Fh)
	return f.NodeId
}

// lookup returns the node of a name, 0 if there is none.
func lookup(t testing.TB, c *fsbackendtest.Client, parent uint64, name string) uint64 {
	t.Helper()
	e, errno := c.Lookup(parent, name)
	if errno == unix.ENOENT {
		return 0
	}
	want(t, errno, "LOOKUP "+name, fsbackend.OK)
	if e.NodeId == 0 && (e.EntryValid != 0 || e.EntryValidNsec != fsbackend.Stale) {
		t.Errorf("that %q is missing is said to be valid for %d s, %d ns, expected not at all", name, e.EntryValid, e.EntryValidNsec)
	}
	return e.NodeId
}

func sorted(names []string) []string {
	slices.Sort(names)
	return names
}

// TestNames is the life of names over both backends.
func TestNames(t *testing.T) {
	for name, b := range map[string]fsbackend.Backend{"mem": newMem(t, nil), "passthrough": newPassthrough(t, t.TempDir())} {
		t.Run(name, func(t *testing.T) {
			c := clientOf(t, over(t, b, Config{}))
			node := create(t, c, root, "Readme.TXT")
			for _, other := range []string{"Readme.TXT", "readme.txt", "README.txt"} {
				if got := lookup(t, c, root, other); got != node {
					t.Errorf("LOOKUP %s gave node %d, expected %d", other, got, node)
				}
			}
			if e, errno := c.Lookup(root, "README.txt"); errno != fsbackend.OK || e.EntryValid != 0 || e.EntryValidNsec != fsbackend.Stale {
				t.Errorf("another case is valid for %d s, %d ns, %v, expected not at all", e.EntryValid, e.EntryValidNsec, errno)
			}
			if e, errno := c.Lookup(root, "Readme.TXT"); errno != fsbackend.OK || e.EntryValidNsec == fsbackend.Stale {
				t.Errorf("the name itself is not to be remembered (%v)", errno)
			}
			if lookup(t, c, root, "other") != 0 {
				t.Error("a name that is missing was found")
			}
			for what, call := range map[string]func() fsbackend.Errno{
				"CREATE": func() fsbackend.Errno {
					_, errno := c.Create(root, "readme.txt", unix.O_RDWR|unix.O_EXCL, 0o644)
					return errno
				},
				"MKNOD":   func() fsbackend.Errno { _, errno := c.Mknod(root, "readme.txt", unix.S_IFREG|0o644, 0); return errno },
				"MKDIR":   func() fsbackend.Errno { _, errno := c.Mkdir(root, "README.TXT", 0o755); return errno },
				"SYMLINK": func() fsbackend.Errno { _, errno := c.Symlink(root, "readme.txt", "x"); return errno },
				"LINK":    func() fsbackend.Errno { _, errno := c.Link(node, root, "README.TXT"); return errno },
			} {
				want(t, call(), what+" of what is the same", unix.EEXIST)
			}
			opened, errno := c.Create(root, "README.TXT", unix.O_RDWR, 0o644)
			want(t, errno, "CREATE without O_EXCL", fsbackend.OK)
			if opened.NodeId != node {
				t.Errorf("CREATE opened node %d, expected %d", opened.NodeId, node)
			}
			c.Release(opened.NodeId, opened.Fh)
			if names := c.List(t, root, 4096); !slices.Equal(names, []string{"Readme.TXT"}) {
				t.Errorf("%q is listed", names)
			}
			want(t, c.Rename(root, "README.txt", root, "readme.txt", unix.RENAME_NOREPLACE), "RENAME of the case", fsbackend.OK)
			if names := c.List(t, root, 4096); !slices.Equal(names, []string{"readme.txt"}) || lookup(t, c, root, "Readme.TXT") != node {
				t.Errorf("after RENAME of the case %q is listed", names)
			}
			// Onto another: its name stays.
			two := create(t, c, root, "Two")
			want(t, c.Rename(root, "README.TXT", root, "TWO", unix.RENAME_NOREPLACE), "RENAME_NOREPLACE", unix.EEXIST)
			want(t, c.Rename(root, "README.TXT", root, "TWO", 0), "RENAME onto another", fsbackend.OK)
			if names := c.List(t, root, 4096); !slices.Equal(names, []string{"Two"}) || lookup(t, c, root, "two") != node || node == two {
				t.Errorf("after RENAME onto another %q is listed", names)
			}
			d, errno := c.Mkdir(root, "Dir", 0o755)
			want(t, errno, "MKDIR", fsbackend.OK)
			want(t, c.Rename(root, "two", d.NodeId, "Moved", 0), "RENAME into a directory", fsbackend.OK)
			if lookup(t, c, d.NodeId, "mOVED") != node || lookup(t, c, root, "two") != 0 {
				t.Error("the file is not where it was moved to")
			}
			create(t, c, root, "b")
			want(t, c.Rename(root, "B", d.NodeId, "MOVED", unix.RENAME_EXCHANGE), "RENAME_EXCHANGE", fsbackend.OK)
			if lookup(t, c, root, "B") != node {
				t.Error("the file is not where it was exchanged to")
			}
			want(t, c.Unlink(root, "none"), "UNLINK of nothing", unix.ENOENT)
			want(t, c.Rename(root, "none", root, "more", 0), "RENAME of nothing", unix.ENOENT)
			want(t, c.Rmdir(root, "DIR"), "RMDIR", unix.ENOTEMPTY)
			want(t, c.Unlink(root, "B"), "UNLINK", fsbackend.OK)
			want(t, c.Unlink(d.NodeId, "MOVED"), "UNLINK", fsbackend.OK)
			want(t, c.Rmdir(root, "DIR"), "RMDIR", fsbackend.OK)
			if names := c.List(t, root, 4096); len(names) > 0 {
				t.Errorf("%q are left", names)
			}
			for _, gone := range []string{"b", "B", "dir", "Dir"} {
				if lookup(t, c, root, gone) != 0 {
					t.Errorf("%s is found after it was removed", gone)
				}
			}
		})
	}
}

// TestAlike: of names that are the same, each is found by itself, and the first otherwise.
func TestAlike(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"foo", "FOO", "Foo", "\xff", "a\xfe", "A\xfe"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c := clientOf(t, over(t, newPassthrough(t, dir), Config{}))
	read := func(name string) string {
		e, errno := c.Lookup(root, name)
		want(t, errno, "LOOKUP "+name, fsbackend.OK)
		fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
		want(t, errno, "OPEN "+name, fsbackend.OK)
		defer c.Release(e.NodeId, fh)
		b, errno := c.Read(e.NodeId, fh, 0, 100)
		want(t, errno, "READ "+name, fsbackend.OK)
		return string(b)
	}
	for name, file := range map[string]string{"foo": "foo", "FOO": "FOO", "Foo": "Foo", "fOO": "FOO", "a\xfe": "a\xfe", "A\xfe": "A\xfe"} {
		if got := read(name); got != file {
			t.Errorf("%q is found as %q, expected %q", name, got, file)
		}
	}
	if names := sorted(c.List(t, root, 4096)); len(names) != 6 {
		t.Errorf("%q are listed, expected all 6", names)
	}
	want(t, c.Unlink(root, "fOo"), "UNLINK", fsbackend.OK)
	if got := read("fOO"); got != "Foo" {
		t.Errorf("after UNLINK of the first, %q is found, expected the next", got)
	}
	want(t, c.Rename(root, "foo", root, "FOO", 0), "RENAME of the case beside others", fsbackend.OK)
	if names := sorted(c.List(t, root, 4096)); !slices.Equal(names[2:], []string{"a\xfe", "\xff"}) || len(names) != 4 {
		t.Errorf("%q are listed: expected FOO onto Foo, which keeps its name", names)
	}
	if got := read("foo"); got != "foo" {
		t.Errorf("%q is found", got)
	}
}

// TestNormalize: with nfc, what looks the same is the same, and listed as it was made.
func TestNormalize(t *testing.T) {
	const composed, decomposed = "caf\u00e9", "CAFE\u0301"
	for n, same := range map[Normalize]bool{NormalizeNone: false, NormalizeNFC: true} {
		c := clientOf(t, over(t, newMem(t, nil), Config{Normalize: n}))
		node := create(t, c, root, decomposed)
		if got := lookup(t, c, root, composed); (got == node) != same {
			t.Errorf("%v: node %d is found, expected it is %d: %v", n, got, node, same)
		}
		if names := c.List(t, root, 4096); !slices.Equal(names, []string{decomposed}) {
			t.Errorf("%v: %q is listed", n, names)
		}
	}
}

// counting counts listings, and changes things between calls.
type counting struct {
	fsbackend.Forward
	lists, gets, lookups atomic.Int64
	onGetattr            func()
}

func (b *counting) Opendir(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	b.lists.Add(1)
	return b.Forward.Opendir(c, in, out)
}

func (b *counting) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	b.gets.Add(1)
	if f := b.onGetattr; f != nil {
		f()
	}
	return b.Forward.Getattr(c, in, out)
}

func (b *counting) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	b.lookups.Add(1)
	return b.Forward.Lookup(c, parent, name, out)
}

// clock is a clock that stands until it is set.
type clock struct{ at atomic.Int64 }

func (k *clock) now() time.Time          { return time.Unix(0, k.at.Load()) }
func (k *clock) advance(d time.Duration) { k.at.Add(int64(d)) }

// TestIndex: a directory is read when a name is missed, and again only when it may have changed otherwise than by this layer.
func TestIndex(t *testing.T) {
	var k clock
	k.advance(time.Hour)
	tree := newMem(t, k.now)
	b := &counting{Forward: fsbackend.Forward{Inner: fsbackend.Resolve(tree)}}
	host := &fsbackendtest.Client{R: b.Inner} // changes the tree behind the layer's back
	c := clientOf(t, over(t, b, Config{Now: k.now}))
	d, errno := host.Mkdir(root, "d", 0o755)
	want(t, errno, "MKDIR", fsbackend.OK)
	for i := range 2000 {
		create(t, host, d.NodeId, fmt.Sprintf("File%d", i))
	}
	k.advance(time.Hour)
	lists := func(what string, expected int64) {
		t.Helper()
		if n := b.lists.Swap(0); n != expected {
			t.Errorf("%s: the directory was listed %d times, expected %d", what, n, expected)
		}
	}
	missed := func(name string, found bool) {
		t.Helper()
		if got := lookup(t, c, d.NodeId, name) != 0; got != found {
			t.Errorf("%s is found: %v, expected %v", name, got, found)
		}
	}
	b.lookups.Store(0)
	missed("File7", true)
	if gets, lookups := b.gets.Load(), b.lookups.Load(); gets != 0 || lookups != 1 {
		t.Errorf("LOOKUP of a name itself took %d LOOKUP and %d GETATTR, expected 1 and none", lookups, gets)
	}
	missed("12345", false)
	lists("names that are found by themselves, or have no case", 0)
	missed("FILE1999", true)
	missed("file0", true)
	missed("none", false)
	lists("three names that are missed", 1)
	k.advance(time.Hour)
	missed("file0", true)
	lists("much later", 0)

	// What the layer changes goes into the index.
	for i := range 100 {
		create(t, c, d.NodeId, fmt.Sprintf("New%d", i))
	}
	missed("NEW99", true)
	want(t, c.Unlink(d.NodeId, "NEW99"), "UNLINK", fsbackend.OK)
	missed("NEW99", false)
	lists("100 files made and one removed", 1) // the index had been read long ago: once more before the first is used
	k.advance(assumedFor / 2)
	missed("NEW98", true)
	lists("soon after", 0)
	want(t, c.Rename(d.NodeId, "new97", d.NodeId, "Renamed", 0), "RENAME", fsbackend.OK)
	missed("NEW97", false)
	missed("RENAMED", true)
	lists("a file renamed", 0)
	k.advance(assumedFor)
	missed("NEW98", true)
	lists("later than changes of our own are trusted", 1)
	k.advance(time.Hour)
	missed("NEW98", true)
	lists("when the directory has rested", 1)
	k.advance(time.Hour)
	missed("NEW98", true)
	lists("then", 0)

	// What the host changes is seen.
	create(t, host, d.NodeId, "Foreign")
	missed("FOREIGN", true)
	lists("a foreign file", 1)
	want(t, host.Unlink(d.NodeId, "Foreign"), "UNLINK", fsbackend.OK)
	missed("FOREIGN", false) // though the clock stands: its name leads nowhere
	lists("a foreign UNLINK in the same tick", 1)
	create(t, host, d.NodeId, "Same")
	missed("SAME", false)
	k.advance(assumedFor)
	missed("SAME", true)
	lists("a foreign file in the same tick", 1)

	// A foreign change in the middle of one of ours is missed for no longer than that.
	k.advance(time.Hour)
	missed("SAME", true)
	b.lists.Store(0)
	calls := 0
	b.onGetattr = func() {
		if calls++; calls == 3 { // of resolve, of begin, and now of end
			b.onGetattr = nil
			create(t, host, d.NodeId, "Between")
		}
	}
	create(t, c, d.NodeId, "ours")
	k.advance(assumedFor)
	missed("BETWEEN", true)
	lists("a foreign file beside one of ours", 1)
}

// TestIndexModel holds an index to what a plain set of names says.
func TestIndexModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	x := &index{first: make(map[string]string), more: make(map[string][]string)}
	model := make(map[string]bool)
	names := []string{"abc", "ABC", "Abc", "aBc", "x", "X", "1"}
	for range 5000 {
		name := names[rnd.IntN(len(names))]
		key := strings.ToUpper(name)
		if rnd.IntN(2) == 0 {
			x.add(key, name)
			model[name] = true
		} else {
			x.remove(key, name)
			delete(model, name)
		}
		if x.size != len(model) {
			t.Fatalf("%d names, expected %d", x.size, len(model))
		}
		for _, name := range append(names, "abC") {
			want, expected := "", false
			if model[name] {
				want, expected = name, true
			} else {
				for _, other := range sorted(slices.Collect(maps.Keys(model))) {
					if strings.EqualFold(other, name) {
						want, expected = other, true
						break
					}
				}
			}
			if got, found := x.find(strings.ToUpper(name), name); got != want || found != expected {
				t.Fatalf("%q stands for %q, %v, expected %q, %v of %v", name, got, found, want, expected, model)
			}
		}
	}
}

// TestApply: changes go only into an index that is of the directory as it was before them.
func TestApply(t *testing.T) {
	var k cache
	k.init(10, time.Now)
	fresh := func() {
		k.put(&index{dir: 7, stamp: stamp{ctime: 1}, first: make(map[string]string), more: make(map[string][]string)})
	}
	fresh()
	k.apply(7, stamp{ctime: 1}, stamp{ctime: 2}, []change{{key: "A", name: "a"}})
	k.dirs[7].read = time.Now()
	if host, found, known := k.find(7, stamp{ctime: 2}, "A", "A"); !known || !found || host != "a" {
		t.Errorf("after a change: %q, %v, %v", host, found, known)
	}
	fresh()
	k.apply(7, stamp{ctime: 2}, stamp{ctime: 3}, []change{{key: "A", name: "a"}})
	if k.has(7) || k.names != 0 {
		t.Errorf("an index was changed that was not of the directory before")
	}
	k.apply(8, stamp{}, stamp{}, nil)
}

// TestBound: no more names are kept than may be, and larger directories are searched all the same.
func TestBound(t *testing.T) {
	var k clock
	k.advance(time.Hour)
	b := &counting{Forward: fsbackend.Forward{Inner: fsbackend.Resolve(newMem(t, k.now))}}
	f := over(t, b, Config{Now: k.now, MaxNames: 50})
	c := clientOf(t, f)
	var dirs []uint64
	for i := range 4 {
		d, errno := c.Mkdir(root, fmt.Sprint(i), 0o755)
		want(t, errno, "MKDIR", fsbackend.OK)
		dirs = append(dirs, d.NodeId)
		for j := range 10 + 30*i {
			create(t, &fsbackendtest.Client{R: b.Inner}, d.NodeId, fmt.Sprintf("F%d", j))
		}
	}
	k.advance(time.Hour)
	for range 2 {
		for i, d := range dirs {
			for _, j := range []int{0, 9 + 30*i} {
				if lookup(t, c, d, fmt.Sprintf("f%d", j)) == 0 {
					t.Errorf("f%d in directory %d is not found", j, i)
				}
				if err := f.check(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	// 2 directories fit, one at a time; 2 do not, and each miss reads them.
	if n := b.lists.Load(); n != 2*(1+1+2+2) {
		t.Errorf("directories were listed %d times, expected 12", n)
	}
	for i := range 60 {
		create(t, c, dirs[0], fmt.Sprintf("more%d", i))
	}
	if lookup(t, c, dirs[0], "MORE59") == 0 {
		t.Error("a file made last is not found")
	}
}

// TestSleep: a directory is read only where the thread may sleep, and not for somebody who has gone.
func TestSleep(t *testing.T) {
	c := clientOf(t, over(t, newMem(t, nil), Config{}))
	create(t, c, root, "File")
	c.R.Reset()
	var out fuseproto.EntryOut
	name := fsbackend.MakeName("FILE")
	want(t, c.R.Lookup(&fsbackend.Context{}, root, name, &out), "LOOKUP where it may not sleep", fsbackend.ErrMayBlock)
	in := &fuseproto.MkdirIn{Mode: 0o755}
	in.NodeId = root
	want(t, c.R.Mkdir(&fsbackend.Context{}, in, name, &out), "MKDIR where it may not sleep", fsbackend.ErrMayBlock)
	cancel := make(chan struct{})
	close(cancel)
	want(t, c.R.Lookup(&fsbackend.Context{MayBlock: true, Cancel: cancel}, root, name, &out), "LOOKUP that nobody waits for", unix.EINTR)
	want(t, c.R.Lookup(&fsbackend.Context{MayBlock: true}, root, name, &out), "LOOKUP", fsbackend.OK)
	if out.NodeId == 0 {
		t.Error("the file is not found")
	}
	c.R.Forget(out.NodeId, 1)
	want(t, c.R.Lookup(&fsbackend.Context{}, root, name, &out), "LOOKUP in an index", fsbackend.OK)
}

// nameless is a backend that lists nothing.
type nameless struct{ fsbackend.Backend }

// looping is one whose list has no end.
type looping struct{ fsbackend.Forward }

func (l looping) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	out.Add(1, max(in.Offset, 1), unix.DT_REG, []byte("again"))
	return fsbackend.OK
}

// garbling is one that writes what is no entry.
type garbling struct{ fsbackend.Forward }

func (g garbling) Readdir(_ *fsbackend.Context, _ *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	out.Write(slices.Repeat([]byte{0xff}, 100))
	return fsbackend.OK
}

func TestBadBackends(t *testing.T) {
	tree := newMem(t, nil)
	defer func() { _ = tree.Close() }()
	if _, err := New(nameless{tree}, Config{}); err == nil {
		t.Error("a backend that lists nothing was accepted")
	}
	for _, cfg := range []Config{{Normalize: 7}, {Normalize: -1}, {MaxNames: -1}} {
		if _, err := New(tree, cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
	forward := fsbackend.Forward{Inner: fsbackend.Resolve(tree)}
	for _, b := range []fsbackend.Backend{looping{forward}, garbling{forward}} {
		f := over(t, b, Config{})
		c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
		if _, errno := c.Lookup(root, "Name"); errno != unix.EIO {
			t.Errorf("%T: LOOKUP: %v, expected EIO", b, errno)
		}
	}
}

// TestExactAllocatesNothing: a name that is found by itself costs nothing here.
func TestExactAllocatesNothing(t *testing.T) {
	c := clientOf(t, over(t, newPassthrough(t, t.TempDir()), Config{}))
	create(t, c, root, "File")
	var ctx fsbackend.Context
	var out fuseproto.EntryOut
	name := fsbackend.MakeName("File")
	if n := testing.AllocsPerRun(200, func() {
		if errno := c.R.Lookup(&ctx, root, name, &out); errno != fsbackend.OK {
			t.Fatal(errno)
		}
		c.R.Forget(out.NodeId, 1)
	}); n != 0 {
		t.Errorf("LOOKUP allocates %v times, expected never", n)
	}
}

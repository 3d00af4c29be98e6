package overlay

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fuseproto"
)

// asked is a lower layer that counts what it is asked, and does what some layers do.
type asked struct {
	*mem.FS
	lookups, opened, read atomic.Int64
	fail                  atomic.Int64 // READDIR's errno
	late                  int64        // READDIR fails from this call on
	open                  errno        // OPENDIR's
	unknown               bool         // lists no types
	folds                 bool         // finds names in other letters, too
	ghost                 string       // is found, but not listed
	incomplete            bool
}

func (l *asked) ListsAll(uint64, uint64) bool { return !l.incomplete }

func (l *asked) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) errno {
	l.lookups.Add(1)
	e := l.FS.Lookup(c, parent, name, out)
	if e == unix.ENOENT && l.folds {
		e = l.FS.Lookup(c, parent, fsbackend.MakeName(strings.ToLower(name.String())), out)
	}
	if e == unix.ENOENT && l.ghost != "" && name.String() == l.ghost {
		e = l.FS.Lookup(c, root, fsbackend.MakeName("elsewhere"), out)
	}
	return e
}

func (l *asked) Opendir(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) errno {
	l.opened.Add(1)
	if l.open != 0 {
		return l.open
	}
	return l.FS.Opendir(c, in, out)
}

func (l *asked) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) errno {
	if n := l.read.Add(1); n > l.late && l.fail.Load() != 0 {
		return errno(l.fail.Load())
	}
	if !l.unknown {
		return l.FS.Readdir(c, in, out)
	}
	list, req := new(fsbackend.Listing), *in
	req.Size = list.Begin(false, out.Len())
	e := l.FS.Readdir(c, &req, &list.DirList)
	list.Each(func(_ *fuseproto.EntryOut, d fuseproto.Dirent, name []byte) bool {
		return out.Add(d.Ino, d.Off, unix.DT_UNKNOWN, name)
	})
	return e
}

// newAsked returns an overlay of an empty upper layer, with an empty directory d, and of one in which d holds names.
func newAsked(t *testing.T, l *asked, cfg Config, names ...string) *ourTree {
	t.Helper()
	upper := newMem(t)
	l.FS = newMem(t)
	for _, name := range append(names, "elsewhere", "d/a") {
		if err := l.WriteFile(name, []byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	cfg.Upper, cfg.Lowers = upper, []Layer{{Backend: l}}
	o := newOurTree(newOverlay(t, cfg))
	t.Cleanup(func() {
		if err := o.fs.check(); err != nil {
			t.Error(err)
		}
		_ = o.fs.Close()
	})
	if err := o.mkdir("d/sub", 0o755); err != nil { // d is in the upper layer then
		t.Fatal(err)
	}
	return o
}

// dir returns d, which stays known.
func (o *ourTree) dir(t *testing.T) uint64 {
	t.Helper()
	d, err := o.walk("d")
	if err != nil {
		t.Fatal(err)
	}
	return d.NodeId
}

// nothing looks for names that are not there.
func (o *ourTree) nothing(t *testing.T, dir uint64, n int) {
	t.Helper()
	for i := range n {
		if _, e := o.Lookup(dir, fmt.Sprintf("nothing%d", i)); e != unix.ENOENT {
			t.Fatalf("LOOKUP of nothing: %v", e)
		}
	}
}

// TestNames finds all names of a directory that is known, and no others.
func TestNames(t *testing.T) {
	for _, size := range []int{0, 1, 2, 3, 100, 5000} {
		x := new(names)
		name := func(i int) []byte { return []byte(strings.Repeat("n", i%200) + fmt.Sprint(i)) }
		for i := range size {
			x.add(&dirent{ino: uint64(i), off: uint64(i + 1), typ: uint32(i % 15), name: name(i)})
		}
		x.add(&dirent{name: []byte(".wh.n5")})
		x.finish()
		for i := range size + 100 {
			e := x.find(name(i))
			if i >= size {
				if e != nil {
					t.Fatalf("name %d of %d is found", i, size)
				}
				continue
			}
			if e == nil || e.ino != uint64(i) || e.off != uint64(i+1) || int(e.typ) != i%15 {
				t.Fatalf("name %d of %d is found as %+v", i, size, e)
			}
		}
		if !x.hides([]byte("n5")) || x.hides([]byte("n")) || x.hides(nil) {
			t.Error("n5 alone is hidden")
		}
		if limit := int64(512 + size*(24+12+200)); x.size() > 2*limit {
			t.Errorf("%d names take %d bytes", size, x.size())
		}
	}
}

// TestKnownNames has a lower layer not be asked for what it does not have.
func TestKnownNames(t *testing.T) {
	l := new(asked)
	o := newAsked(t, l, Config{}, "e/b")
	d := o.dir(t)
	o.nothing(t, d, 2)
	before, read := l.lookups.Load(), l.read.Load()
	o.nothing(t, d, 100)
	for _, err := range []error{
		o.create("d/f", 0o644), o.mkdir("d/g", 0o755), o.symlink("f", "d/s"), o.link("d/f", "d/l"), o.rename("d/f", "d/h", 0),
		o.rename("d/l", "d/h", 0), o.unlink("d/s"), o.rmdir("d/g"), o.rename("d/sub", "d/dir", 0),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if got := l.lookups.Load() - before - 9; got > 9 { // d itself is looked up in the root each time
		t.Errorf("the lower layer was asked %d times", got)
	}
	if got := l.read.Load() - read; got > 8 {
		t.Errorf("a directory was read %d times", got)
	}
	if got := o.names(t); !slices.Equal(got, []string{"d/", "d/a", "d/dir/", "d/h", "d/l", "e/", "e/b", "elsewhere"}) {
		t.Errorf("the tree has %q", got)
	}
	if _, err := o.walk("d/h"); err != nil {
		t.Fatal(err)
	}
	if e := o.Rename(d, "h", d, "a", unix.RENAME_NOREPLACE); e != unix.EEXIST {
		t.Errorf("RENAME_NOREPLACE to what the lower layer has: %v, expected EEXIST", e)
	}
	if e := o.Unlink(d, "a"); e != 0 {
		t.Error(e)
	}
	if _, e := o.Lookup(d, "a"); e != unix.ENOENT {
		t.Errorf("what was removed from the lower layer: %v", e)
	}
	// Into a directory that the upper layer does not have yet.
	e, err := o.walk("e")
	if err != nil {
		t.Fatal(err)
	}
	o.nothing(t, e.NodeId, 3)
	if got := o.Rename(d, "h", e.NodeId, "new", 0); got != 0 {
		t.Errorf("RENAME into a directory of the lower layer: %v", got)
	}
	if got := o.names(t); !slices.Equal(got, []string{"d/", "d/dir/", "d/l", "e/", "e/b", "e/new", "elsewhere"}) {
		t.Errorf("the tree has %q", got)
	}
}

// TestAskedLayers has layers be asked that do not list all that they have, or not byte by byte, or do not say its type, or fail.
func TestAskedLayers(t *testing.T) {
	for _, row := range []struct {
		what string
		l    *asked
		find string // in d, though it is not in the listing
	}{
		{"a name that no listing has", &asked{ghost: "ghost", incomplete: true}, "ghost"},
		{"a name in other letters", &asked{folds: true}, "A"},
		{"unknown types", &asked{unknown: true}, "a"},
		{"no listings", &asked{open: unix.ENOSYS}, "a"},
		{"an error of OPENDIR", &asked{open: unix.EACCES}, "a"},
		{"an error", &asked{late: 0}, "a"},
		{"an error after some names", &asked{late: 1}, "a"},
	} {
		t.Run(row.what, func(t *testing.T) {
			o := newAsked(t, row.l, Config{})
			if strings.HasPrefix(row.what, "an error") {
				row.l.fail.Store(int64(unix.EINTR))
				row.l.read.Store(0)
			}
			d := o.dir(t)
			o.nothing(t, d, 70)
			if _, e := o.Lookup(d, row.find); e != 0 {
				t.Errorf("LOOKUP of %s: %v", row.find, e)
			}
			for _, err := range []error{o.create("d/new", 0o644), o.unlink("d/new"), o.unlink("d/a")} {
				if err != nil {
					t.Error(err)
				}
			}
			if _, e := o.Lookup(d, "a"); e != unix.ENOENT {
				t.Errorf("what was removed from the lower layer: %v", e)
			}
			if row.l.opened.Load() > 20 {
				t.Errorf("a directory that cannot be known was opened %d times", row.l.opened.Load())
			}
			row.l.fail.Store(0)
		})
	}
}

// TestLargeDirectory has a directory be read only when it was asked often, by a thread that may sleep, and not if it is too large.
func TestLargeDirectory(t *testing.T) {
	const many = 3*inlineNames + 1
	var names []string
	for i := range many {
		names = append(names, fmt.Sprintf("d/%d", i))
	}
	l := new(asked)
	o := newAsked(t, l, Config{}, names...)
	d := o.dir(t)
	c := &fsbackend.Context{} // which may not sleep
	var out fuseproto.EntryOut
	opened := l.opened.Load()
	for i := range 400 {
		e := o.fs.Lookup(c, d, fsbackend.MakeName(fmt.Sprintf("nothing%d", i)), &out)
		if e == fsbackend.ErrMayBlock && i == 0 || e != fsbackend.ErrMayBlock && e != unix.ENOENT {
			t.Fatalf("LOOKUP %d: %v", i, e)
		}
		if e == fsbackend.ErrMayBlock {
			o.nothing(t, d, 1)
		}
	}
	if got := l.opened.Load() - opened; got > 6 {
		t.Errorf("it was opened %d times", got)
	}
	lookups := l.lookups.Load()
	o.nothing(t, d, 10)
	if l.lookups.Load() != lookups {
		t.Error("the lower layer is asked after 400 questions")
	}

	l = new(asked)
	o = newAsked(t, l, Config{MaxNames: 64 << 10}, names...)
	d = o.dir(t)
	opened = l.opened.Load()
	o.nothing(t, d, 1000)
	if got := l.opened.Load() - opened; got != 1 || o.fs.indexes.size != 0 {
		t.Errorf("it was opened %d times and takes %d bytes: expected that it is given up", got, o.fs.indexes.size)
	}
	if entries := o.List(t, d, 1<<16); len(entries) != many+2 {
		t.Errorf("%d names are listed, expected %d", len(entries), many+2)
	}
}

// TestNamesBudget has many directories be known, of which some have to go, and none stay that a guest has forgotten.
func TestNamesBudget(t *testing.T) {
	const dirs, most = 100, 32 << 10
	var names []string
	for i := range dirs {
		for j := range 20 {
			names = append(names, fmt.Sprintf("d%d/some_name_%d", i, j))
		}
	}
	o := newAsked(t, new(asked), Config{MaxNames: most}, names...)
	var nodes []uint64
	for i := range dirs {
		d, err := o.walk(fmt.Sprintf("d%d", i))
		if err == nil {
			err = o.mkdir(fmt.Sprintf("d%d/new", i), 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, d.NodeId)
		o.nothing(t, d.NodeId, 3)
		if err := o.fs.check(); err != nil {
			t.Fatal(err)
		}
	}
	if size := o.fs.indexes.size; size < most/2 || size > most {
		t.Errorf("names take %d bytes, %d may be", size, most)
	}
	for _, n := range nodes {
		o.nothing(t, n, 3)
		o.fs.Forget(n, 1)
	}
	if err := o.fs.check(); err != nil {
		t.Error(err)
	}
	if n := len(o.fs.indexes.all); n > 2 {
		t.Errorf("%d directories are known that are forgotten", n)
	}
	o.nothing(t, root, 2)
	o.fs.Reset()
	if o.fs.indexes.size != 0 || len(o.fs.indexes.all) != 0 {
		t.Errorf("names of %d directories are kept after the session, %d bytes", len(o.fs.indexes.all), o.fs.indexes.size)
	}
	off := newAsked(t, new(asked), Config{MaxNames: -1})
	off.nothing(t, off.dir(t), 10)
	if len(off.fs.indexes.all) != 0 {
		t.Error("names are kept, expected none")
	}
}

// TestLowerChanges has somebody change a lower layer that is in use, which is not allowed: what was there may be seen as it was, but
// no file is taken for another; and after a freeze, in which changes are applied to it, all is seen.
func TestLowerChanges(t *testing.T) {
	s := newStack(t, 1)
	lower := s.lowers[0]
	put(t, lower, 0, "d/", "d/file", "d/gone", "d/dir/", "d/dir/x", "d/becomes")
	put(t, s.upper, 0, "d/")
	o := s.open(t)
	defer o.fs.Close()
	d := o.dir(t)
	o.nothing(t, d, 3)
	for _, name := range []string{"own", "both"} {
		if err := o.create("d/"+name, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// The guest has it in its caches, and that nothing is below is known with it.
	if _, e := o.Mknod(d, "applied", unix.S_IFREG|0o644, 0); e != 0 {
		t.Fatal(e)
	}
	for _, err := range []error{
		os.Remove(lower + "/d/gone"), os.Remove(lower + "/d/becomes"), os.Mkdir(lower+"/d/becomes", 0o755),
		os.RemoveAll(lower + "/d/dir"), os.WriteFile(lower+"/d/dir", []byte("file"), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	put(t, lower, 0, "d/new", "d/both", "d/becomes/y")
	if _, e := o.Lookup(d, "gone"); e != unix.ENOENT {
		t.Errorf("LOOKUP of what is gone: %v", e)
	}
	for _, err := range []error{o.write("d/dir", 0, "x"), o.create("d/becomes/z", 0o644), o.unlink("d/own"), o.create("d/gone", 0o644), o.unlink("d/gone")} {
		if err != nil {
			t.Error(err)
		}
	}
	_, _ = o.Lookup(d, "new") // it may be there or not
	_, _ = o.snapshot()

	if err := o.fs.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	put(t, lower, 0, "d/applied", "d/late")
	if _, e := o.Lookup(d, "late"); e != 0 {
		t.Errorf("LOOKUP of what has come during a freeze: %v", e)
	}
	if err := o.fs.Thaw(); err != nil {
		t.Fatal(err)
	}
	got := o.names(t)
	for _, name := range []string{"d/new", "d/late", "d/both", "d/becomes/y", "d/becomes/z"} {
		if !slices.Contains(got, name) {
			t.Errorf("after the freeze, %s is missing in %q", name, got)
		}
	}
	for _, name := range []string{"applied", "both"} {
		if err := o.unlink("d/" + name); err != nil {
			t.Error(err)
		}
		if _, e := o.Lookup(d, name); e != unix.ENOENT {
			t.Errorf("%s, which was applied and then removed: %v, expected ENOENT", name, e)
		}
	}
	if err := o.fs.check(); err != nil {
		t.Error(err)
	}
}

// TestListedAhead has files be changed, renamed and removed while a directory is listed with attributes: what is listed after that has them as
// they are then.
func TestListedAhead(t *testing.T) {
	s := newStack(t, 2)
	for i := range 60 {
		put(t, s.lowers[i%2], 0, "d/", fmt.Sprintf("d/file%d", i), fmt.Sprintf("d/dir%d/", i))
	}
	for i := range 15 { // some are hidden
		put(t, s.lowers[1], 1, fmt.Sprintf("d/file%d", 4*i))
		put(t, s.upper, 12345, "d/", fmt.Sprintf("d/file%d", 4*i+2))
	}
	put(t, s.upper, 0, "d/own1", "d/own2", "d/own3")
	o := s.open(t)
	defer o.fs.Close()
	d := o.dir(t)
	fh, e := o.Opendir(d)
	if e != 0 {
		t.Fatal(e)
	}
	nodes := make(map[string]fuseproto.EntryOut)
	gone := make(map[string]bool)
	rnd := rand.New(rand.NewPCG(1, 1))
	for round, off := 0, uint64(0); ; round++ {
		entries, e := o.Readdir(d, fh, off, 700, true)
		if e != 0 {
			t.Fatal(e)
		}
		if len(entries) == 0 {
			break
		}
		for _, x := range entries {
			off = x.Off
			if x.Entry.NodeId == 0 {
				continue
			}
			now, e := o.Lookup(d, x.Name)
			if e != 0 || now.NodeId != x.Entry.NodeId || now.Size != x.Entry.Size || now.Ino != x.Ino {
				t.Errorf("%s is listed as %+v, and is %+v, %v", x.Name, x.Entry, now, e)
			}
			if _, ok := nodes[x.Name]; ok || gone[x.Name] {
				t.Errorf("%s is listed again, or has gone", x.Name)
			}
			nodes[x.Name] = x.Entry
			o.fs.Forget(x.Entry.NodeId, 2)
		}
		for range 3 {
			if round < 12 {
				break // as long as nothing changes, the parts below are listed ahead, too
			}
			name := fmt.Sprintf("file%d", rnd.IntN(60))
			err := o.write("d/"+name, 0, strings.Repeat("x", 100+round))
			if round%5 == 0 {
				err = errors.Join(err, o.unlink("d/"+name))
				gone[name] = true
			}
			if err != nil && !errors.Is(err, unix.ENOENT) {
				t.Error(err)
			}
		}
	}
	o.Releasedir(d, fh)
	if len(nodes)+len(gone) < 123 {
		t.Errorf("%d files are listed, %d have gone, expected 123 of them", len(nodes), len(gone))
	}
	o.fs.Forget(d, 1)
	for _, l := range o.fs.layers {
		if got := l.r.Stats(); got.Inodes != 1 || got.FDs.Open != 0 {
			t.Errorf("layer %s holds %+v, expected its root alone", l.name, got)
		}
	}
}

// TestKnownNamesStress has threads look up, list, make, rename and remove in directories that are known, while they are forgotten,
// there is no room for all of them, and the overlay is frozen: what each has made, it finds, and what nobody has made, nobody.
func TestKnownNamesStress(t *testing.T) {
	const dirs, size = 8, 40
	s := newStack(t, 2)
	for i, lower := range s.lowers {
		for d := range dirs {
			put(t, lower, i, fmt.Sprintf("d%d/", d))
			for f := range size {
				if f%(i+2) == 0 {
					put(t, lower, i, fmt.Sprintf("d%d/file%d", d, f))
				}
			}
		}
	}
	cfg := s.config(t)
	cfg.MaxNames = 16 << 10
	o := newOurTree(newOverlay(t, cfg))
	var group sync.WaitGroup
	var stop atomic.Bool
	for i := range 4 {
		group.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 9))
			for range 60 {
				dir := fmt.Sprintf("d%d", rnd.IntN(dirs))
				own, moved := fmt.Sprintf("%s/own%d", dir, i), fmt.Sprintf("d%d/moved%d", rnd.IntN(dirs), i)
				d, err := o.walk(dir)
				if err != nil {
					t.Error(err)
					return
				}
				if err := o.create(own, 0o644); err != nil {
					t.Errorf("create %s: %v", own, err)
				}
				if err := o.rename(own, moved, 0); err != nil {
					t.Errorf("rename %s to %s: %v", own, moved, err)
				}
				if _, err := o.walk(own); !errors.Is(err, unix.ENOENT) {
					t.Errorf("%s, which has moved: %v", own, err)
				}
				for f := range size {
					_, e := o.Lookup(d.NodeId, fmt.Sprintf("file%d", f))
					if there := f%2 == 0 || f%3 == 0; there != (e == 0) {
						t.Errorf("file%d: %v", f, e)
					}
				}
				if rnd.IntN(4) == 0 {
					listed := o.List(t, d.NodeId, 4096)
					if n := len(slices.DeleteFunc(listed, func(n string) bool { return !strings.HasPrefix(n, "file") })); n != 27 {
						t.Errorf("%d files of the lower layers are listed, expected 27", n)
					}
				}
				if err := o.unlink(moved); err != nil {
					t.Errorf("unlink %s: %v", moved, err)
				}
				o.fs.Forget(d.NodeId, 1)
			}
		})
	}
	var freezes sync.WaitGroup
	freezes.Go(func() {
		for !stop.Load() {
			if err := o.fs.Freeze(t.Context()); err != nil {
				t.Error(err)
			}
			if err := o.fs.Thaw(); err != nil {
				t.Error(err)
			}
		}
	})
	group.Wait()
	stop.Store(true)
	freezes.Wait()
	if err := o.fs.check(); err != nil {
		t.Error(err)
	}
	o.fs.Reset()
	if err := o.fs.check(); err != nil || o.fs.indexes.size != 0 {
		t.Errorf("%v, names take %d bytes after the session", err, o.fs.indexes.size)
	}
	if err := o.fs.Close(); err != nil {
		t.Error(err)
	}
}

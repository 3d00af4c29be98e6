package upperdir

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// randomUppers is how many uppers TestKernelUppers tries; 250 have been, too.
const randomUppers = 12

// TestKernelUppers has the kernel write uppers, and takes its word for what they mean.
func TestKernelUppers(t *testing.T) {
	needRoot(t)
	for seed := range uint64(randomUppers) {
		oneUpper(t, seed)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func oneUpper(t *testing.T, seed uint64) {
	o := mountOverlay(t, seed)
	before := o.dir + "/before"
	flatten(t, o.merged, before)
	lowers := []map[string]string{snapshot(t, o.lower, true, true), snapshot(t, o.lower2, true, true)}
	below := snapshot(t, before, false, true)
	work(t, o.merged, seed+2000)
	after := snapshot(t, o.merged, false, true)
	must(t, unix.Unmount(o.merged, 0))

	s := openStore(t)
	u := s.given(t, o.dir)
	tree := s.lowersOf(t, o.lower, o.lower2)

	// A checkpoint is the same upper, and what is restored of it, too.
	upper := snapshot(t, o.upper, true, true)
	_, err := s.Checkpoint(t.Context(), u, "one")
	must(t, err)
	r, err := s.Restore(t.Context(), "one", "")
	must(t, err)
	sameTrees(t, "restored upper", snapshot(t, r.Path(), true, true), upper)
	o.mount(t, r.Path())
	sameTrees(t, "overlay over the restored upper", snapshot(t, o.merged, false, true), after)
	must(t, unix.Unmount(o.merged, 0))
	must(t, r.Close())

	// The lowers read as one are what the kernel showed.
	root, err := tree.Root(t.Context())
	must(t, err)
	sameNames(t, root, "", below)
	root.Close()

	var changes []Change
	must(t, u.Diff(t.Context(), tree, func(c *Change) error {
		changes = append(changes, *c)
		return nil
	}))
	checkDiff(t, changes, below, after)

	// Applied to what was below, it is what was seen. A dry run before that changes nothing, and says the same.
	target := o.dir + "/target"
	flatten(t, before, target)
	var dry, done []Change
	must(t, u.Apply(t.Context(), target, ApplyOptions{Below: tree, DryRun: true}, func(c *Change) error { dry = append(dry, *c); return nil }))
	sameTrees(t, "target after a dry run", snapshot(t, target, false, true), below)
	must(t, u.Apply(t.Context(), target, ApplyOptions{Below: tree}, func(c *Change) error { done = append(done, *c); return nil }))
	sameTrees(t, "target", dropLinks(snapshot(t, target, true, true)), dropLinks(after))
	if len(dry) < len(changes)/2 || len(done) < len(changes)/2 {
		t.Errorf("%d changes in a dry run, %d applied, %d in the diff", len(dry), len(done), len(changes))
	}

	var archive bytes.Buffer
	_, err = u.Export(t.Context(), &archive, tree, 0)
	must(t, err)
	layer := archive.Bytes()
	unpacked := o.dir + "/unpacked"
	flatten(t, before, unpacked)
	unpack(t, &archive, unpacked)
	got, want := dropLinks(snapshot(t, unpacked, true, true)), dropLinks(after)
	delete(got, ".")
	delete(want, ".")
	sameTrees(t, "layer unpacked", got, want)

	for i, dir := range []string{o.lower, o.lower2} {
		sameTrees(t, "lower afterwards", snapshot(t, dir, true, true), lowers[i])
	}
	sameTrees(t, "upper afterwards", snapshot(t, o.upper, true, true), upper)

	// Marks that are files mean the same.
	marksAsFiles(t, o.upper)
	marksAsFiles(t, o.lower)
	var again []Change
	must(t, u.Diff(t.Context(), tree, func(c *Change) error {
		again = append(again, *c)
		return nil
	}))
	if !reflect.DeepEqual(again, changes) {
		t.Errorf("with marks that are files, the changes are %+v, expected %+v", again, changes)
	}
	var sameLayer bytes.Buffer
	_, err = u.Export(t.Context(), &sameLayer, tree, 0)
	must(t, err)
	if !bytes.Equal(sameLayer.Bytes(), layer) {
		t.Error("with marks that are files, the layer is another")
	}
	target = o.dir + "/target2"
	flatten(t, before, target)
	must(t, u.Apply(t.Context(), target, ApplyOptions{Below: tree}, nil))
	sameTrees(t, "target, by marks that are files", dropLinks(snapshot(t, target, true, true)), dropLinks(after))
}

// marksAsFiles replaces whiteouts and opaque marks of the kernel's in a layer by files, as fuse-overlayfs makes them.
func marksAsFiles(t *testing.T, dir string) {
	t.Helper()
	times := make(map[string][]unix.Timespec) // of directories, which are not to show it
	must(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		switch {
		case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0:
			return errors.Join(os.Remove(path), os.WriteFile(filepath.Join(filepath.Dir(path), whPrefix+filepath.Base(path)), nil, 0o600))
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			times[path] = []unix.Timespec{st.Atim, st.Mtim}
			if unix.Lremovexattr(path, "trusted.overlay.opaque") == nil {
				return os.WriteFile(filepath.Join(path, whOpaque), nil, 0o600)
			}
		}
		return nil
	}))
	for path, ts := range times {
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, 0))
	}
}

// dropLinks takes out which files are one: hard links part where only one name was copied up.
func dropLinks(tree map[string]string) map[string]string {
	tree = maps.Clone(tree)
	for path, line := range tree {
		if i := strings.Index(line, " link of "); i >= 0 {
			rest := line[i+len(" link of "):]
			if j := strings.IndexByte(rest, ' '); j >= 0 {
				tree[path] = line[:i] + rest[j:]
			} else {
				tree[path] = line[:i]
			}
		}
	}
	return tree
}

func sameNames(t *testing.T, f File, path string, want map[string]string) {
	t.Helper()
	names, err := f.Names(t.Context())
	must(t, err)
	var expected []string
	for p := range want {
		if p != "." && strings.Trim(filepath.Dir(p), ".") == path {
			expected = append(expected, filepath.Base(p))
		}
	}
	slices.Sort(expected)
	if !slices.Equal(names, expected) {
		t.Errorf("%q holds %q, expected %q", path, names, expected)
	}
	for _, name := range names {
		g, err := f.Lookup(t.Context(), name)
		must(t, err)
		i, err := g.Info(t.Context())
		must(t, err)
		if !strings.HasPrefix(want[join(path, name)], "0"+octal(i.Mode)+" ") {
			t.Errorf("%s has mode %#o, expected %s", join(path, name), i.Mode, want[join(path, name)])
		}
		if i.Mode&unix.S_IFMT == unix.S_IFDIR {
			sameNames(t, g, join(path, name), want)
		}
		g.Close()
	}
}

func octal(n uint32) string {
	s := ""
	for ; n > 0; n /= 8 {
		s = string(rune('0'+n%8)) + s
	}
	return s
}

// checkDiff makes the changes of a listing in a copy of the names below, and expects what was seen.
func checkDiff(t *testing.T, changes []Change, below, after map[string]string) {
	t.Helper()
	was, is := dropLinks(below), dropLinks(after)
	said := make(map[string]Kind)
	moved := make(map[string]string) // path → path before, for all that came with a directory
	for i, c := range changes {
		if i > 0 && slices.Compare(strings.Split(changes[i-1].Path, "/"), strings.Split(c.Path, "/")) >= 0 {
			t.Errorf("%q comes after %q in the list", c.Path, changes[i-1].Path)
		}
		said[c.Path] = c.Kind
		if c.From != "" {
			moved[c.Path] = c.From
		}
	}
	origin := func(path string) string { // where what is at path was
		for dir, rest := path, ""; dir != "."; dir, rest = filepath.Dir(dir), filepath.Join(filepath.Base(dir), rest) {
			if from, ok := moved[dir]; ok {
				return filepath.Join(from, rest)
			}
			if k := said[dir]; (k == Added || k == Modified) && dir != path {
				return ""
			}
		}
		return path
	}
	for path, line := range is {
		from := origin(path)
		old, existed := was[from]
		kind, listed := said[path]
		dir := strings.HasPrefix(line, "04")
		switch {
		case kind == Deleted:
			t.Errorf("%s is listed as deleted, and there", path)
		case moved[path] != "":
		case !existed && !listed:
			t.Errorf("%s is new (from %q), and not listed", path, from)
		case existed && !listed && old != line:
			t.Errorf("%s was %q, is %q, and not listed", path, old, line)
		case existed && listed && old == line && kind == Metadata && path != ".": // the root is the upper's from the start
			t.Errorf("%s is listed as %s, but as it was: %s", path, kind, line)
		case kind == Metadata && (!existed || dir != strings.HasPrefix(old, "04")):
			t.Errorf("%s is listed as %s: was %q, is %q", path, kind, old, line)
		}
	}
	for path := range was {
		if _, there := is[path]; there {
			continue
		}
		covered := false
		for dir := path; dir != "."; dir = filepath.Dir(dir) {
			k, ok := said[dir]
			covered = covered || ok && (k == Deleted || dir != path && k == Modified)
		}
		if !covered {
			t.Errorf("%s is gone, and neither it nor a directory above it listed as deleted", path)
		}
	}
}

// unpack puts a layer over dir, as container engines do.
func unpack(t *testing.T, r io.Reader, dir string) {
	t.Helper()
	fresh := make(map[string]bool) // of this layer
	times := make(map[string]*tar.Header)
	for a := tar.NewReader(r); ; {
		h, err := a.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		path := filepath.Join(dir, h.Name)
		name := filepath.Base(path)
		if name == whOpaque {
			entries, err := os.ReadDir(filepath.Dir(path))
			must(t, err)
			for _, e := range entries {
				if p := filepath.Join(filepath.Dir(path), e.Name()); !fresh[p] {
					must(t, os.RemoveAll(p))
				}
			}
			continue
		}
		if hidden, ok := strings.CutPrefix(name, whPrefix); ok {
			must(t, os.RemoveAll(filepath.Join(filepath.Dir(path), hidden)))
			continue
		}
		fresh[path] = true
		if st, err := os.Lstat(path); err == nil && !(st.IsDir() && h.Typeflag == tar.TypeDir) {
			must(t, os.RemoveAll(path))
		}
		switch h.Typeflag {
		case tar.TypeDir:
			if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
				t.Fatal(err)
			}
			names := make([]byte, 4096)
			n, err := unix.Llistxattr(path, names)
			must(t, err)
			for _, name := range strings.FieldsFunc(string(names[:n]), func(r rune) bool { return r == 0 }) {
				must(t, unix.Removexattr(path, name))
			}
		case tar.TypeReg:
			f, err := os.Create(path)
			must(t, err)
			_, err = io.Copy(f, a)
			must(t, errors.Join(err, f.Close()))
		case tar.TypeSymlink:
			must(t, os.Symlink(h.Linkname, path))
		case tar.TypeLink:
			must(t, os.Link(filepath.Join(dir, h.Linkname), path))
			continue
		case tar.TypeFifo:
			must(t, unix.Mkfifo(path, 0o600))
		default:
			t.Fatalf("%s has type %c", h.Name, h.Typeflag)
		}
		must(t, os.Lchown(path, h.Uid, h.Gid))
		for k, v := range h.PAXRecords {
			if x, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
				must(t, unix.Lsetxattr(path, x, []byte(v), 0))
			}
		}
		if h.Typeflag != tar.TypeSymlink {
			must(t, unix.Fchmodat(unix.AT_FDCWD, path, uint32(h.Mode), 0))
		}
		times[path] = h
	}
	for path, h := range times {
		ts := unix.NsecToTimespec(h.ModTime.UnixNano())
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

package overlay

import (
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestLayerRoots has two layers be directories of one backend, also after a session.
func TestLayerRoots(t *testing.T) {
	m := newMem(t)
	for _, name := range []string{"one/a", "one/d/x", "two/b", "two/d/y"} {
		if err := m.WriteFile(name, []byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	var layers []Layer
	for _, name := range []string{"one", "two"} {
		var out fuseproto.EntryOut
		if e := m.Lookup(new(fsbackend.Context), root, fsbackend.MakeName(name), &out); e != 0 {
			t.Fatal(e)
		}
		layers = append(layers, Layer{Backend: m, Root: out.NodeId, Name: name})
	}
	o := newOurTree(newOverlay(t, Config{Lowers: layers}))
	defer o.fs.Close()
	expected := []string{"a", "b", "d/", "d/x", "d/y"}
	for range 2 {
		if got := o.names(t); !slices.Equal(got, expected) {
			t.Errorf("the tree has %q, expected %q", got, expected)
		}
		_, _ = o.Lookup(root, "a")
		o.fs.Reset()
		if got := m.Stats().Inodes; got != 3 {
			t.Errorf("the backend knows %d files after Reset, expected its root and the layers'", got)
		}
	}
}

// TestWithoutUpper has every change be EROFS, and reading go on.
func TestWithoutUpper(t *testing.T) {
	m := newMem(t)
	if err := m.WriteFile("d/f", []byte("data")); err != nil {
		t.Fatal(err)
	}
	o := newOurTree(newOverlay(t, Config{Lowers: []Layer{{Backend: m}}}))
	defer o.fs.Close()
	for what, err := range map[string]error{
		"mkdir": o.mkdir("d/n", 0o755), "create": o.create("d/n", 0o644), "write": o.write("d/f", 0, "x"), "truncate": o.truncate("d/f", 0),
		"symlink": o.symlink("f", "d/n"), "mknod": o.mknod("d/n", unix.S_IFIFO, 0), "link": o.link("d/f", "d/n"), "unlink": o.unlink("d/f"),
		"rmdir": o.rmdir("d"), "rename": o.rename("d/f", "g", 0), "chmod": o.chmod("d/f", 0), "chown": o.chown("d/f", 1, 1),
		"setxattr": o.setxattr("d/f", "user.x", "y"), "removexattr": o.removexattr("d/f", "user.x"),
	} {
		if err != unix.EROFS {
			t.Errorf("%s: %v, expected EROFS", what, err)
		}
	}
	if got := o.names(t); !slices.Equal(got, []string{"d/", "d/f"}) {
		t.Errorf("the tree has %q", got)
	}
}

// TestMarksAreHidden has the guest see no marks, and set none.
func TestMarksAreHidden(t *testing.T) {
	s := newStack(t, 1)
	put(t, s.lowers[0], 0, "d/", "d/f")
	cfg := s.config(t)
	cfg.Format = FormatUser
	o := newOurTree(newOverlay(t, cfg))
	defer o.fs.Close()
	for _, err := range []error{o.write("d/f", 0, "x"), o.setxattr("d/f", "user.own", "1"), o.rename("d", "e", 0)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 1000)
	if n, err := unix.Listxattr(s.upper+"/e/f", buf); err != nil || !strings.Contains(string(buf[:n]), "user.overlay.") {
		t.Fatalf("the copy has the attributes %q, %v, expected marks among them", buf[:max(n, 0)], err)
	}
	for _, path := range []string{"e", "e/f"} {
		if err := o.on(path, func(n *fuseproto.EntryOut) fsbackend.Errno {
			list, size, e := o.Listxattr(n.NodeId, 1000)
			_, asked, _ := o.Listxattr(n.NodeId, 0)
			if strings.Contains(string(list), "overlay") || int(size) != len(list) || asked != size {
				t.Errorf("%s has the attributes %q, of %d and %d bytes", path, list, size, asked)
			}
			for _, name := range []string{"user.overlay.opaque", "trusted.overlay.redirect", "user.fuseoverlayfs.opaque"} {
				_, _, got := o.Getxattr(n.NodeId, name, 100)
				if set, rm := o.Setxattr(n.NodeId, name, []byte("y"), 0), o.Removexattr(n.NodeId, name); got != unix.EOPNOTSUPP || set != got || rm != got {
					t.Errorf("%s of %s: get %v, set %v, remove %v, expected ENOTSUP", name, path, got, set, rm)
				}
			}
			return e
		}); err != nil {
			t.Fatal(err)
		}
	}
	if out, e := o.Statfs(root); e != 0 || out.NameLen != 251 {
		t.Errorf("STATFS says that names have up to %d bytes, %v, expected 251", out.NameLen, e)
	}
	if e := asErrno(o.mknod("dev", unix.S_IFCHR, 0)); e != unix.EPERM {
		t.Errorf("MKNOD of device 0:0: %v, expected EPERM", e)
	}
}

func asErrno(err error) errno {
	e, _ := err.(errno)
	return e
}

// TestTmpfileInLower makes a file without a name in a directory of a lower layer, and gives it one over a whiteout.
func TestTmpfileInLower(t *testing.T) {
	s := newStack(t, 1)
	put(t, s.lowers[0], 0, "d/", "d/f")
	o := newOurTree(newOverlay(t, s.config(t)))
	defer o.fs.Close()
	if err := o.unlink("d/f"); err != nil {
		t.Fatal(err)
	}
	d, err := o.walk("d")
	if err != nil {
		t.Fatal(err)
	}
	f, e := o.Tmpfile(d.NodeId, unix.O_RDWR, 0o600)
	if e != 0 {
		t.Fatal(e)
	}
	if _, e := o.Write(f.NodeId, f.Fh, 0, []byte("tmp"), unix.O_RDWR); e != 0 {
		t.Fatal(e)
	}
	l, e := o.Link(f.NodeId, d.NodeId, "f")
	if e != 0 || l.NodeId != f.NodeId || l.Nlink != 1 {
		t.Errorf("LINK gave node %d with %d links, %v, expected %d with 1", l.NodeId, l.Nlink, e, f.NodeId)
	}
	o.Release(f.NodeId, f.Fh)
	if data, err := os.ReadFile(s.upper + "/d/f"); err != nil || string(data) != "tmp" {
		t.Errorf("the upper layer has %q, %v", data, err)
	}
}

// TestStaticNlink has all directories have one link.
func TestStaticNlink(t *testing.T) {
	m := newMem(t)
	if err := m.WriteFile("d/e/f", nil); err != nil {
		t.Fatal(err)
	}
	o := newOurTree(newOverlay(t, Config{StaticNlink: true, Lowers: []Layer{{Backend: m}}}))
	defer o.fs.Close()
	if d, e := o.Lookup(root, "d"); e != 0 || d.Nlink != 1 {
		t.Errorf("a directory has %d links, %v, expected 1", d.Nlink, e)
	}
}

// TestListingKeepsOffsets lists a merged directory while names in it come and go, and from the start again.
func TestListingKeepsOffsets(t *testing.T) {
	s := newStack(t, 1)
	put(t, s.lowers[0], 0, "d/", "d/a", "d/b", "d/c")
	put(t, s.upper, 0, "d/", "d/x", "d/y")
	o := newOurTree(newOverlay(t, s.config(t)))
	defer o.fs.Close()
	d, _ := o.Lookup(root, "d")
	fh, e := o.Opendir(d.NodeId)
	if e != 0 {
		t.Fatal(e)
	}
	defer o.Releasedir(d.NodeId, fh)
	offsets := func() map[string]uint64 {
		all := make(map[string]uint64)
		entries, e := o.Readdir(d.NodeId, fh, 0, 4096, false)
		if e != 0 {
			t.Fatal(e)
		}
		for _, d := range entries {
			all[d.Name] = d.Off
		}
		return all
	}
	before := offsets()
	for _, err := range []error{o.unlink("d/b"), o.unlink("d/x"), o.create("d/new", 0o644), o.write("d/a", 0, "A")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	rest, e := o.Readdir(d.NodeId, fh, before[".."], 4096, false)
	if e != 0 || len(rest) != len(before)-2 {
		t.Errorf("READDIR from the offset behind \"..\": %v, %v, expected what was there when the reading began", rest, e)
	}
	after := offsets()
	for _, name := range []string{".", "..", "a", "c", "y"} {
		if after[name] == 0 || after[name] != before[name] {
			t.Errorf("%s has offset %d, then %d", name, before[name], after[name])
		}
	}
	if after["b"] != 0 || after["x"] != 0 || after["new"] == 0 {
		t.Errorf("from the start again, the directory has %v", after)
	}
	seen := make(map[uint64]bool)
	for name, off := range after {
		if seen[off] {
			t.Errorf("%s shares its offset", name)
		}
		seen[off] = true
	}
}

package overlay

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
)

const root = fsbackendtest.Root

// put makes files below dir: "name/" is a directory, "name" a file that holds its layer's number, "name>target" a symbolic link,
// "name!" a device 0:0, "name%" an empty file with the mark of a whiteout, "name=mark" sets the mark of a directory that is there.
func put(t testing.TB, dir string, layer int, files ...string) {
	t.Helper()
	for _, f := range files {
		var err error
		if path, ok := strings.CutSuffix(f, "/"); ok {
			err = os.MkdirAll(dir+"/"+path, 0o755)
		} else if path, ok := strings.CutSuffix(f, "!"); ok {
			err = unix.Mknod(dir+"/"+path, unix.S_IFCHR, 0)
		} else if path, ok := strings.CutSuffix(f, "%"); ok {
			if err = os.WriteFile(dir+"/"+path, nil, 0o644); err == nil {
				err = unix.Lsetxattr(dir+"/"+path, "trusted.overlay.whiteout", nil, 0)
			}
		} else if path, target, ok := strings.Cut(f, ">"); ok {
			err = os.Symlink(target, dir+"/"+path)
		} else if path, mark, ok := strings.Cut(f, "="); ok {
			name, value, _ := strings.Cut(mark, ":")
			err = unix.Lsetxattr(dir+"/"+path, name, []byte(value), 0)
		} else {
			err = os.WriteFile(dir+"/"+f, fmt.Appendf(nil, "%s of %d", f, layer), 0o644)
		}
		if err != nil {
			t.Fatalf("%s in layer %d: %v", f, layer, err)
		}
	}
}

// names lists a tree: paths of files, and of directories with "/", sorted.
func (o *ourTree) names(t *testing.T) []string {
	t.Helper()
	all := snap(t, "names", o)
	var names []string
	for path, what := range all {
		if path == "." {
			continue
		}
		if strings.HasPrefix(what, "004") {
			path += "/"
		}
		names = append(names, path)
	}
	slices.Sort(names)
	return names
}

// TestMarks is row B8: whiteouts of both kinds and all marks of opaque directories, over two layers.
func TestMarks(t *testing.T) {
	needRoot(t)
	for _, row := range []struct {
		what     string
		upper    []string // of two lower layers
		lower    []string
		expected []string
	}{
		{"nothing", nil, []string{"d/", "d/f", "f"}, []string{"d/", "d/f", "f"}},
		{"merge", []string{"d/", "d/g"}, []string{"d/", "d/f"}, []string{"d/", "d/f", "d/g"}},
		{"whiteout device", []string{"f!", "d/", "d/f!"}, []string{"f", "g", "d/", "d/f", "d/g"}, []string{"d/", "d/g", "g"}},
		{"whiteout device over a directory", []string{"d!"}, []string{"d/", "d/f"}, nil},
		{"whiteout file", []string{".wh.f", "d/", "d/.wh.f"}, []string{"f", "g", "d/", "d/f", "d/g"}, []string{"d/", "d/g", "g"}},
		{"whiteout file over a directory", []string{".wh.d"}, []string{"d/", "d/f"}, nil},
		{"whiteout file and a directory", []string{".wh.d", "d/", "d/g"}, []string{"d/", "d/f"}, []string{"d/", "d/g"}},
		{"whiteout file and a file", []string{".wh.f", "f"}, []string{"f"}, []string{"f"}},
		{"whiteouts of nothing", []string{"f!", ".wh.g"}, []string{"h"}, []string{"h"}},
		{"opaque file", []string{"d/", "d/.wh..wh..opq", "d/g"}, []string{"d/", "d/f"}, []string{"d/", "d/g"}},
		{"trusted.overlay.opaque", []string{"d/", "d/g", "d=trusted.overlay.opaque:y"}, []string{"d/", "d/f"}, []string{"d/", "d/g"}},
		{"user.overlay.opaque", []string{"d/", "d/g", "d=user.overlay.opaque:y"}, []string{"d/", "d/f"}, []string{"d/", "d/g"}},
		{"user.fuseoverlayfs.opaque", []string{"d/", "d/g", "d=user.fuseoverlayfs.opaque:y"}, []string{"d/", "d/f"}, []string{"d/", "d/g"}},
		{"opaque, but not y", []string{"d/", "d/g", "d=user.overlay.opaque:n"}, []string{"d/", "d/f"}, []string{"d/", "d/f", "d/g"}},
		{"whiteout by mark", []string{"d/", "d=trusted.overlay.opaque:x", "d/f%", "d/g"}, []string{"d/", "d/f", "d/h"}, []string{"d/", "d/g", "d/h"}},
		{"file over a directory", []string{"d"}, []string{"d/", "d/f"}, []string{"d"}},
		{"directory over a file", []string{"f/", "f/g"}, []string{"f"}, []string{"f/", "f/g"}},
		{"redirect by name", []string{"new/", "old!", "new=trusted.overlay.redirect:old"}, []string{"old/", "old/f"}, []string{"new/", "new/f"}},
		{"redirect by path", []string{"a/", "a/new/", "a=trusted.overlay.impure:y", "a/new=user.overlay.redirect:/b/old"}, []string{"b/", "b/old/", "b/old/f"}, []string{"a/", "a/new/", "a/new/f", "b/", "b/old/", "b/old/f"}},
		{"redirect to nothing", []string{"new/", "new=trusted.overlay.redirect:old"}, []string{"f"}, []string{"f", "new/"}},
	} {
		for _, withUpper := range []bool{false, true} {
			t.Run(fmt.Sprint(row.what, " ", withUpper), func(t *testing.T) {
				s := newStack(t, 2)
				put(t, s.lowers[0], 0, row.upper...)
				put(t, s.lowers[1], 1, row.lower...)
				cfg := s.config(t)
				if !withUpper {
					_ = cfg.Upper.Close()
					cfg.Upper = nil
				}
				o := newOurTree(newOverlay(t, cfg))
				defer o.fs.Close()
				if got := o.names(t); !slices.Equal(got, row.expected) {
					t.Errorf("the tree has %q, expected %q", got, row.expected)
				}
				for _, hidden := range []string{".wh.f", ".wh..wh..opq"} {
					if _, e := o.Lookup(root, hidden); e != unix.EINVAL {
						t.Errorf("LOOKUP of %s: %v, expected EINVAL", hidden, e)
					}
					_, e := o.Mkdir(root, hidden, 0o755)
					if e != unix.EINVAL {
						t.Errorf("MKDIR of %s: %v, expected EINVAL", hidden, e)
					}
				}
				if _, e := o.Mkdir(root, "new dir", 0o755); withUpper != (e == 0) || !withUpper && e != unix.EROFS {
					t.Errorf("MKDIR: %v", e)
				}
				if err := o.fs.check(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestReadOnly is the suite for trees that nobody changes, spread over three layers.
func TestReadOnly(t *testing.T) {
	fsbackendtest.RunReadOnly(t, fsbackendtest.ReadOnlyConfig{
		New: func(t *testing.T) fsbackend.Backend {
			dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
			writeTree(t, fsbackendtest.Tree(), func(i int) string { return dirs[i%3] })
			cfg := Config{}
			for _, dir := range dirs {
				cfg.Lowers = append(cfg.Lowers, Layer{Backend: newPassthrough(t, dir, ""), Name: dir})
			}
			return newOverlay(t, cfg)
		},
		Check:  atRest,
		Strict: true,
	})
}

// writeTree writes files, the i-th to dir(i).
func writeTree(t *testing.T, tree fs.FS, dir func(i int) string) {
	t.Helper()
	i := 0
	err := fs.WalkDir(tree, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		i++
		to := dir(i) + "/" + path
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		data, err := fs.ReadFile(tree, path)
		if d.Type() == fs.ModeSymlink {
			target, err := fs.ReadLink(tree, path)
			if err != nil {
				return err
			}
			return os.Symlink(target, to)
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(to, data, info.Mode().Perm()); err != nil {
			return err
		}
		return os.Chtimes(to, info.ModTime(), info.ModTime())
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestInodeNumbers is row B9: a file keeps its number over being copied up, being forgotten, and a new start, and is listed with
// it; and so for directories (fuse-overlayfs #391).
func TestInodeNumbers(t *testing.T) {
	s := newStack(t, 2)
	put(t, s.lowers[0], 0, "d/", "d/f", "d/sub/", "top")
	put(t, s.lowers[1], 1, "d/", "d/g", "d/sub/", "d/sub/deep", "e/", "e/x", "l>d")
	cfg := s.config(t)
	cfg.Format = FormatUser
	o := newOurTree(newOverlay(t, cfg))
	paths := []string{"d", "d/f", "d/g", "d/sub", "d/sub/deep", "e", "e/x", "top", "l"}
	inos := func(o *ourTree) map[string]uint64 {
		_ = snap(t, "inodes", o) // which compares listings with lookups
		all := make(map[string]uint64)
		for _, p := range paths {
			n, err := o.walk(p)
			if err != nil {
				t.Fatalf("%s: %v", p, err)
			}
			all[p] = n.Ino
			o.fs.Forget(n.NodeId, 1)
		}
		return all
	}
	same := func(when string, got, expected map[string]uint64) {
		t.Helper()
		for p, ino := range expected {
			if got[p] != ino {
				t.Errorf("%s: %s has inode number %d, expected %d", when, p, got[p], ino)
			}
		}
	}
	before := inos(o)
	for _, p := range paths {
		if p == "l" {
			continue // no user.* attribute can be set on it, as the kernel cannot
		}
		if err := o.on(p, func(n *fuseproto.EntryOut) fsbackend.Errno {
			in := fuseproto.SetattrIn{}
			in.Valid, in.Mtime = fuseproto.FATTR_MTIME, 12345
			attr, e := o.Setattr(n.NodeId, in)
			if attr.Ino != before[p] {
				t.Errorf("SETATTR of %s gave inode number %d, expected %d", p, attr.Ino, before[p])
			}
			return e
		}); err != nil {
			t.Fatal(err)
		}
	}
	same("copied up", inos(o), before)
	if err := o.rename("d/g", "e/moved", 0); err != nil {
		t.Fatal(err)
	}
	if err := o.link("d/f", "linked"); err != nil {
		t.Fatal(err)
	}
	if err := o.rename("d/sub", "e/sub", 0); err != nil {
		t.Fatal(err)
	}
	paths = []string{"d", "d/f", "linked", "e/moved", "e/sub", "e/sub/deep", "e", "e/x", "top"}
	expected := map[string]uint64{
		"d": before["d"], "d/f": before["d/f"], "linked": before["d/f"], "e/moved": before["d/g"],
		"e/sub": before["d/sub"], "e/sub/deep": before["d/sub/deep"], "e": before["e"], "e/x": before["e/x"], "top": before["top"],
	}
	same("moved", inos(o), expected)
	if err := o.fs.Close(); err != nil {
		t.Fatal(err)
	}
	again := newOurTree(newOverlay(t, s.config(t)))
	defer again.fs.Close()
	same("opened again", inos(again), expected)
}

// TestXino has layers of different file systems not share inode numbers.
func TestXino(t *testing.T) {
	for _, row := range []struct {
		xino   Xino
		unique bool
	}{{XinoAuto, true}, {XinoOn, true}, {XinoOff, false}} {
		a, b := newMem(t), newMem(t)
		for name, m := range map[string]interface{ WriteFile(string, []byte) error }{"a": a, "b": b} {
			if err := m.WriteFile(name, nil); err != nil {
				t.Fatal(err)
			}
		}
		o := newOurTree(newOverlay(t, Config{Xino: row.xino, Lowers: []Layer{{Backend: a, StableIno: true}, {Backend: b, StableIno: true}}}))
		x, _ := o.Lookup(root, "a")
		y, _ := o.Lookup(root, "b")
		if (x.Ino != y.Ino) != row.unique || x.Ino == 0 || y.Ino == 0 {
			t.Errorf("xino %d: inode numbers are %#x and %#x", row.xino, x.Ino, y.Ino)
		}
		_ = o.fs.Close()
	}
	m := newMem(t)
	if _, err := New(Config{Xino: XinoOn, Lowers: []Layer{{Backend: m}}}); err == nil {
		t.Error("xino=on was taken with a layer whose numbers are not stable")
	}
}

// TestLinkCounts is row B9's nlink (fuse-overlayfs #435, #192): a file's does not depend on who asks, and a copy of one of
// several names is a file of its own.
func TestLinkCounts(t *testing.T) {
	s := newStack(t, 1)
	put(t, s.lowers[0], 0, "f", "d/", "d/sub/")
	if err := os.Link(s.lowers[0]+"/f", s.lowers[0]+"/g"); err != nil {
		t.Fatal(err)
	}
	o := newOurTree(newOverlay(t, s.config(t)))
	defer o.fs.Close()
	links := func(path string, expected uint32) uint64 {
		t.Helper()
		n, err := o.walk(path)
		if err != nil {
			t.Fatal(err)
		}
		defer o.fs.Forget(n.NodeId, 1)
		attr, _ := o.Getattr(n.NodeId)
		sx, _ := o.Statx(n.NodeId)
		if n.Nlink != expected || attr.Nlink != expected || sx.Nlink != expected || sx.Ino != n.Ino {
			t.Errorf("%s has %d, %d and %d links, expected %d", path, n.Nlink, attr.Nlink, sx.Nlink, expected)
		}
		return n.Ino
	}
	if links("f", 2) != links("g", 2) {
		t.Error("two names of a file have different inode numbers")
	}
	links("d", 3)
	if err := o.write("f", 0, "own"); err != nil {
		t.Fatal(err)
	}
	if links("f", 1) == links("g", 2) {
		t.Error("a copy has its former other name's inode number")
	}
	if err := o.chmod("g", 0o600); err != nil {
		t.Fatal(err)
	}
	links("g", 1)
	if err := o.mkdir("d/new", 0o755); err != nil {
		t.Fatal(err)
	}
	links("d", 1) // merged: nobody counts
}

// TestACL is row B10: one layer without access control lists switches them off for all, and the log names it.
func TestACL(t *testing.T) {
	with := func(t *testing.T) fsbackend.Backend {
		fs, err := passthrough.New(passthrough.Config{Dir: t.TempDir(), PosixACL: true})
		if err != nil {
			t.Fatal(err)
		}
		return fs
	}
	for _, row := range []struct {
		what   string
		layers []Layer
		cfg    Config
		acl    bool
		log    string
	}{
		{"all have them", []Layer{{Name: "one", Backend: with(t)}, {Name: "two", Backend: with(t)}}, Config{}, true, ""},
		{"one says that it has none", []Layer{{Name: "one", Backend: with(t)}, {Name: "two", Backend: with(t), NoACL: true}}, Config{}, false, "two"},
		{"one cannot", []Layer{{Name: "one", Backend: newMem(t)}, {Name: "two", Backend: with(t)}}, Config{}, false, "one"},
		{"noacl", []Layer{{Name: "one", Backend: with(t)}}, Config{NoACL: true}, false, ""},
		{"owners are translated", []Layer{{Name: "one", Backend: with(t)}}, Config{SquashToRoot: true}, false, ""},
	} {
		t.Run(row.what, func(t *testing.T) {
			var log bytes.Buffer
			row.cfg.Lowers, row.cfg.Log = row.layers, slog.New(slog.NewTextHandler(&log, nil))
			fs := newOverlay(t, row.cfg)
			defer fs.Close()
			if got := fs.WantFlags(0)&fuseproto.FUSE_POSIX_ACL != 0; got != row.acl {
				t.Errorf("access control lists are wanted: %v, expected %v", got, row.acl)
			}
			if named := strings.Contains(log.String(), "layer="+row.log); row.log != "" && !named || row.log == "" && log.Len() > 0 {
				t.Errorf("log is %q, expected one line that names %q", log.String(), row.log)
			}
			o := newOurTree(fs)
			fs.Init(fsbackend.Features{})
			if e := o.Setxattr(root, "system.posix_acl_access", []byte("x"), 0); e != unix.EOPNOTSUPP {
				t.Errorf("SETXATTR of an access control list in a session without them: %v, expected ENOTSUP", e)
			}
		})
	}
}

// acl is an access control list as an extended attribute has it (include/uapi/linux/posix_acl_xattr.h): the owner and user 1000 may
// read and write, others read.
func acl() []byte {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range [][3]uint32{{1, 6, ^uint32(0)}, {2, 6, 1000}, {4, 4, ^uint32(0)}, {0x10, 6, ^uint32(0)}, {0x20, 4, ^uint32(0)}} {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

// TestACLKept has copies keep their access control lists also where the guest has none, and what is made over a whiteout inherit its
// directory's.
func TestACLKept(t *testing.T) {
	s := newStack(t, 1)
	put(t, s.lowers[0], 0, "f", "d/", "d/x", "d/y")
	for path, name := range map[string]string{"f": "system.posix_acl_access", "d": "system.posix_acl_default"} {
		if err := unix.Setxattr(s.lowers[0]+"/"+path, name, acl(), 0); err != nil {
			t.Fatal(err)
		}
	}
	cfg := s.config(t)
	_ = cfg.Upper.Close()
	_ = cfg.Lowers[0].Backend.Close()
	work, err := unix.Open(s.work, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(work)
	open := func(cfg passthrough.Config) fsbackend.Backend {
		cfg.PosixACL = true
		fs, err := passthrough.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return fs
	}
	cfg.Upper, cfg.Lowers[0].Backend = open(passthrough.Config{Dir: s.upper, WorkDirFD: work}), open(passthrough.Config{Dir: s.lowers[0]})
	o := newOurTree(newOverlay(t, cfg))
	defer o.fs.Close()
	o.fs.Init(fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION})
	for _, err := range []error{o.write("f", 0, "F"), o.unlink("d/x"), o.create("d/x", 0o666), o.unlink("d/y"), o.mkdir("d/y", 0o777)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 100)
	for path, name := range map[string]string{"f": "system.posix_acl_access", "d": "system.posix_acl_default", "d/x": "system.posix_acl_access", "d/y": "system.posix_acl_default"} {
		n, err := unix.Getxattr(s.upper+"/"+path, name, buf)
		if err != nil || path != "d/x" && !bytes.Equal(buf[:n], acl()) {
			t.Errorf("%s of %s in the upper layer is %x, %v", name, path, buf[:max(n, 0)], err)
		}
	}
}

// TestOwners is row B11: the numbers of fuse-overlayfs' manual page, uidmapping=0:10:100:100:10000:2000, and squash_to_*.
func TestOwners(t *testing.T) {
	needRoot(t)
	ids := IDMap{{Guest: 10, Host: 0, Count: 100}, {Guest: 10000, Host: 100, Count: 2000}}
	seven, eight := uint32(7), uint32(8)
	for _, row := range []struct {
		what     string
		cfg      Config
		host     [2]int
		expected [2]uint32
	}{
		{"as they are", Config{}, [2]int{5, 6}, [2]uint32{5, 6}},
		{"first range", Config{UIDMap: ids, GIDMap: ids}, [2]int{0, 99}, [2]uint32{10, 109}},
		{"second range", Config{UIDMap: ids, GIDMap: ids}, [2]int{100, 2099}, [2]uint32{10000, 11999}},
		{"outside", Config{UIDMap: ids}, [2]int{2100, 6}, [2]uint32{65534, 6}},
		{"squash to root", Config{SquashToRoot: true}, [2]int{5, 6}, [2]uint32{0, 0}},
		{"squash to ids", Config{SquashToUID: &seven, SquashToGID: &eight, SquashToRoot: true, UIDMap: ids}, [2]int{5, 6}, [2]uint32{7, 8}},
		{"squash one", Config{SquashToUID: &seven}, [2]int{5, 6}, [2]uint32{7, 6}},
	} {
		t.Run(row.what, func(t *testing.T) {
			s := newStack(t, 1)
			put(t, s.lowers[0], 0, "f")
			if err := os.Chown(s.lowers[0]+"/f", row.host[0], row.host[1]); err != nil {
				t.Fatal(err)
			}
			cfg := s.config(t)
			cfg.UIDMap, cfg.GIDMap = row.cfg.UIDMap, row.cfg.GIDMap
			cfg.SquashToRoot, cfg.SquashToUID, cfg.SquashToGID = row.cfg.SquashToRoot, row.cfg.SquashToUID, row.cfg.SquashToGID
			o := newOurTree(newOverlay(t, cfg))
			defer o.fs.Close()
			f, e := o.Lookup(root, "f")
			attr, e2 := o.Chmod(f.NodeId, 0o600) // copies it up
			sx, e3 := o.Statx(f.NodeId)
			for _, got := range [][2]uint32{{f.Uid, f.Gid}, {attr.Uid, attr.Gid}, {sx.Uid, sx.Gid}} {
				if e != 0 || e2 != 0 || e3 != 0 || got != row.expected {
					t.Errorf("%v is shown as %v (%v, %v, %v), expected %v", row.host, got, e, e2, e3, row.expected)
				}
			}
			var st unix.Stat_t
			if err := unix.Stat(s.upper+"/f", &st); err != nil || [2]int{int(st.Uid), int(st.Gid)} != row.host {
				t.Errorf("the copy belongs to %d:%d, %v, expected %v", st.Uid, st.Gid, err, row.host)
			}
			if len(row.cfg.UIDMap) == 0 || len(row.cfg.GIDMap) == 0 {
				return
			}
			made, e := o.As(12, 10001).Mkdir(root, "made", 0o755)
			if err := unix.Stat(s.upper+"/made", &st); e != 0 || err != nil || st.Uid != 2 || st.Gid != 101 || made.Uid != 12 || made.Gid != 10001 {
				t.Errorf("a directory made by 12:10001 belongs to %d:%d, shown as %d:%d, %v, %v, expected 2:101", st.Uid, st.Gid, made.Uid, made.Gid, e, err)
			}
			if _, e := o.As(1, 1).Mkdir(root, "no", 0o755); e != unix.EOVERFLOW {
				t.Errorf("MKDIR by an id without a counterpart: %v, expected EOVERFLOW", e)
			}
		})
	}
}

// TestOpenBeforeCopyUp has a file that was opened for reading before another changes it read what was changed, also when it has
// no name any more.
func TestOpenBeforeCopyUp(t *testing.T) {
	s := newStack(t, 1)
	put(t, s.lowers[0], 0, "f", "g")
	o := newOurTree(newOverlay(t, s.config(t)))
	defer o.fs.Close()
	f, _ := o.Lookup(root, "f")
	fh, e := o.Open(f.NodeId, unix.O_RDONLY)
	if e != 0 {
		t.Fatal(e)
	}
	read := func(expected string) {
		t.Helper()
		if got, e := o.Read(f.NodeId, fh, 0, 100); e != 0 || string(got) != expected {
			t.Errorf("READ gave %q, %v, expected %q", got, e, expected)
		}
	}
	read("f of 0")
	if err := o.write("f", 0, "F"); err != nil {
		t.Fatal(err)
	}
	read("F of 0")
	if e := o.Unlink(root, "f"); e != 0 {
		t.Fatal(e)
	}
	read("F of 0")
	o.Release(f.NodeId, fh)

	g, _ := o.Lookup(root, "g")
	if fh, e = o.Open(g.NodeId, unix.O_RDONLY); e != 0 {
		t.Fatal(e)
	}
	f = g
	if e := o.Unlink(root, "g"); e != 0 {
		t.Fatal(e)
	}
	read("g of 0")
	if e := o.Truncate(g.NodeId, 1); e != 0 {
		t.Errorf("truncate a removed file that was never copied up: %v", e)
	}
	read("g")
	o.Release(g.NodeId, fh)
	o.fs.Forget(g.NodeId, 1)
	if names := o.names(t); len(names) > 0 {
		t.Errorf("the tree has %q", names)
	}
	if left, err := os.ReadDir(s.work); err != nil || len(left) > 0 {
		t.Errorf("the work directory has %v, %v", left, err)
	}
}

// TestConcurrentCopyUp has many open one file for writing at once: there is one copy.
func TestConcurrentCopyUp(t *testing.T) {
	s := newStack(t, 1)
	put(t, s.lowers[0], 0, "d/", "d/e/", "d/e/f")
	o := newOurTree(newOverlay(t, s.config(t)))
	defer o.fs.Close()
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			if err := o.write("d/e/f", int64(100*(i+1)), "written"); err != nil {
				t.Errorf("write: %v", err)
			}
		})
	}
	group.Wait()
	data, err := os.ReadFile(s.upper + "/d/e/f")
	if err != nil || !bytes.HasPrefix(data, []byte("d/e/f of 0")) || bytes.Count(data, []byte("written")) != 8 {
		t.Errorf("the copy holds %q, %v", data, err)
	}
	if err := o.fs.check(); err != nil {
		t.Error(err)
	}
}

// TestCopyData copies files with holes, of layers that can be asked for descriptors and those that cannot.
func TestCopyData(t *testing.T) {
	pattern := bytes.Repeat([]byte("0123456789abcdef"), 8<<10)
	lower := t.TempDir()
	f, err := os.Create(lower + "/f")
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{0, 1 << 20, 8<<20 - 100} {
		if _, err := f.WriteAt(pattern, off); err != nil {
			t.Fatal(err)
		}
	}
	size := int64(20 << 20)
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	if err := os.WriteFile(lower+"/dense", pattern, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		what  string
		upper func(t *testing.T) fsbackend.Backend
	}{
		{"passthrough", func(t *testing.T) fsbackend.Backend { return newPassthrough(t, t.TempDir(), t.TempDir()) }},
		{"mem", func(t *testing.T) fsbackend.Backend { return newMem(t) }},
	} {
		t.Run(row.what, func(t *testing.T) {
			o := newOurTree(newOverlay(t, Config{Upper: row.upper(t), Lowers: []Layer{{Backend: newPassthrough(t, lower, "")}}}))
			defer o.fs.Close()
			for _, name := range []string{"f", "dense"} {
				want, err := os.ReadFile(lower + "/" + name)
				if err != nil {
					t.Fatal(err)
				}
				n, e := o.Lookup(root, name)
				if e != 0 {
					t.Fatal(e)
				}
				attr, e := o.Chmod(n.NodeId, 0o640)
				if e != 0 || attr.Size != uint64(len(want)) || name == "f" && attr.Blocks*512 > 2<<20 {
					t.Errorf("the copy of %s has %d bytes in %d blocks, %v, expected %d and its holes", name, attr.Size, attr.Blocks, e, len(want))
				}
				fh, e := o.Open(n.NodeId, unix.O_RDONLY)
				if e != 0 {
					t.Fatal(e)
				}
				got := make([]byte, 0, len(want))
				for len(got) < len(want) {
					b, e := o.Read(n.NodeId, fh, uint64(len(got)), 1<<20)
					if e != 0 || len(b) == 0 {
						t.Fatalf("READ: %d bytes, %v", len(b), e)
					}
					got = append(got, b...)
				}
				o.Release(n.NodeId, fh)
				if !bytes.Equal(got, want) {
					t.Errorf("the copy of %s differs", name)
				}
			}
		})
	}
}

// TestNoLeaks gives all lookups back: no layer has anything left.
func TestNoLeaks(t *testing.T) {
	needRoot(t)
	s := newStack(t, 2)
	put(t, s.lowers[0], 0, "d/", "d/f", "x!", "e/", "y")
	put(t, s.lowers[1], 1, "d/", "d/g", "x", "e/", "e/z", "y")
	o := s.open(t)
	defer o.fs.Close()
	for range 2 {
		_ = o.names(t)
		for _, err := range []error{
			o.write("d/g", 0, "w"), o.rename("d", "moved", 0), o.mkdir("d", 0o755), o.rename("e/z", "z", 0), o.rmdir("e"), o.unlink("z"),
			o.link("y", "d/y"), o.rename("d/y", "y", unix.RENAME_EXCHANGE), o.create("x", 0o600), o.unlink("y"), o.unlink("d/y"), o.rmdir("d"),
		} {
			if err != nil {
				t.Log(err) // the second time
			}
		}
		fh, e := o.Opendir(root)
		if e != 0 {
			t.Fatal(e)
		}
		entries, e := o.Readdir(root, fh, 0, 4096, true)
		if e != 0 || len(entries) < 3 {
			t.Fatalf("READDIRPLUS: %v, %v", entries, e)
		}
		for _, d := range entries {
			o.fs.Forget(d.Entry.NodeId, 1)
		}
		o.Releasedir(root, fh)
	}
	if got := o.fs.Stats(); got.Inodes != 1 || got.FDs.Open != 0 {
		t.Errorf("the overlay holds %+v", got)
	}
	for _, l := range o.fs.layers {
		if got := l.r.Stats(); got.Inodes != 1 || got.FDs.Open != 0 {
			t.Errorf("layer %s holds %+v, expected its root alone", l.name, got)
		}
	}
}

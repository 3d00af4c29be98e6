package permshift

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

const root = fsbackendtest.Root

// serve returns a client of the layer over a directory of the host.
func serve(t testing.TB, dir string, cfg Config) *fsbackendtest.Client {
	t.Helper()
	return clientOf(t, over(t, newPassthrough(t, dir), cfg))
}

func clientOf(t testing.TB, f *FS) *fsbackendtest.Client {
	t.Helper()
	t.Cleanup(func() {
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

// hostValue is the attribute of a file of the host, "" if it has none.
func hostValue(t testing.TB, path string, format Format) string {
	t.Helper()
	buf := make([]byte, 256)
	n, err := unix.Lgetxattr(path, format.Xattr(), buf)
	if err == unix.ENODATA {
		return ""
	}
	if err != nil {
		t.Fatalf("getxattr of %s: %v", path, err)
	}
	return string(buf[:n])
}

// setHost sets the attribute of a file of the host.
func setHost(t testing.TB, path string, format Format, value string) {
	t.Helper()
	if err := unix.Lsetxattr(path, format.Xattr(), []byte(value), 0); err != nil {
		t.Fatalf("setxattr of %s: %v", path, err)
	}
}

func hostMode(t testing.TB, path string) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Mode
}

// line is what ls -ln shows of a file.
func line(name string, a *fuseproto.Attr) string {
	return fmt.Sprintf("%06o %d %d:%d %d %d.%09d %s", a.Mode, a.Nlink, a.Uid, a.Gid, a.Size, int64(a.Mtime), a.Mtimensec, name)
}

// listHost is ls -ln of a directory of the host.
func listHost(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, e := range entries {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, e.Name()), &st); err != nil {
			t.Fatal(err)
		}
		a := fuseproto.Attr{Mode: st.Mode, Nlink: uint32(st.Nlink), Size: uint64(st.Size), Mtime: uint64(st.Mtim.Sec), Mtimensec: uint32(st.Mtim.Nsec)}
		a.Uid, a.Gid = st.Uid, st.Gid
		lines = append(lines, line(e.Name(), &a))
	}
	slices.Sort(lines)
	return lines
}

// listServed is ls -ln of a directory that is served, in one of four ways.
func listServed(t testing.TB, c *fsbackendtest.Client, node uint64, way string) []string {
	t.Helper()
	var lines []string
	if way == "READDIRPLUS" {
		fh, errno := c.Opendir(node)
		want(t, errno, "OPENDIR", fsbackend.OK)
		defer c.Releasedir(node, fh)
		for off := uint64(0); ; {
			entries, errno := c.Readdir(node, fh, off, 4096, true)
			want(t, errno, "READDIRPLUS", fsbackend.OK)
			if len(entries) == 0 {
				break
			}
			for _, e := range entries {
				off = e.Off
				if e.Name == "." || e.Name == ".." {
					continue
				}
				if e.Type != e.Entry.Mode>>12 {
					t.Errorf("%s is listed with type %d and mode %#o", e.Name, e.Type, e.Entry.Mode)
				}
				lines = append(lines, line(e.Name, &e.Entry.Attr))
				c.R.Forget(e.Entry.NodeId, 1)
			}
		}
		slices.Sort(lines)
		return lines
	}
	for _, name := range c.List(t, node, 4096) {
		e, errno := c.Lookup(node, name)
		want(t, errno, "LOOKUP "+name, fsbackend.OK)
		a := e.Attr
		switch way {
		case "GETATTR":
			if a, errno = c.Getattr(e.NodeId); errno != fsbackend.OK {
				t.Fatal(errno)
			}
		case "STATX":
			x, errno := c.Statx(e.NodeId)
			want(t, errno, "STATX", fsbackend.OK)
			a = fuseproto.Attr{Mode: uint32(x.Mode), Nlink: x.Nlink, Size: x.Size, Mtime: x.Mtime.Sec, Mtimensec: x.Mtime.Nsec}
			a.Uid, a.Gid = x.Uid, x.Gid
		}
		lines = append(lines, line(name, &a))
		c.R.Forget(e.NodeId, 1)
	}
	slices.Sort(lines)
	return lines
}

var ways = []string{"LOOKUP", "GETATTR", "STATX", "READDIRPLUS"}

// TestConvert is what fuse-overlayfs has its plug-in go through (tests/plugin/test-plugin.sh): what a listing shows before a tree is
// converted is what it shows where the converted tree is served, for every format and every way to look.
func TestConvert(t *testing.T) {
	for _, format := range detected {
		if format == SecurityOverride && os.Getuid() != 0 {
			continue
		}
		t.Run(format.String(), func(t *testing.T) {
			dir := t.TempDir()
			files := 0
			for _, i := range "0124" {
				for _, j := range "01357" {
					for _, k := range "026" {
						for _, l := range "037" {
							name := filepath.Join(dir, "f"+string([]rune{i, j, k, l}))
							makeFile(t, name, uint32(i-'0')<<9|uint32(j-'0')<<6|uint32(k-'0')<<3|uint32(l-'0'), files)
							files++
						}
					}
				}
			}
			sub := filepath.Join(dir, "sub")
			if err := os.Mkdir(sub, 0o700); err != nil {
				t.Fatal(err)
			}
			makeFile(t, filepath.Join(sub, "deep"), 0o4711, 7)
			for _, err := range []error{
				os.Symlink("f0700", filepath.Join(dir, "link")),
				unix.Mkfifo(filepath.Join(dir, "pipe"), 0o640),
				os.Link(filepath.Join(dir, "f0700"), filepath.Join(dir, "hard")),
				unix.Chmod(sub, 0o2750),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			before, deep := listHost(t, dir), listHost(t, sub)
			done, err := convert(t, dir, format, 0)
			if err != nil {
				t.Fatal(err)
			}
			// The root, sub, what is in it; the hard link is met twice.
			if done.Files != files+3 || done.Already != 1 || done.Left != 2 {
				t.Errorf("converted %+v, expected %d files, 1 already, 2 left", done, files+3)
			}
			for _, name := range append(globs(t, dir), globs(t, sub)...) {
				mode := hostMode(t, name)
				if typ := mode & unix.S_IFMT; (typ == unix.S_IFREG || typ == unix.S_IFDIR) && mode&0o7777 != 0o755 {
					t.Errorf("%s has mode %#o on the host, expected 0755", name, mode)
				}
			}
			if after := listHost(t, dir); slices.Equal(before, after) {
				t.Error("the tree was not converted")
			}
			again, err := convert(t, dir, format, 0)
			if err != nil || again.Files != 0 || again.Already != done.Files+done.Already {
				t.Errorf("converted again: %+v, %v", again, err)
			}
			c := serve(t, dir, Config{Format: Auto, ReadOnly: true})
			for _, way := range ways {
				if got := listServed(t, c, root, way); !slices.Equal(got, before) {
					t.Errorf("by %s the guest sees\n%s\nexpected\n%s", way, strings.Join(got, "\n"), strings.Join(before, "\n"))
				}
				e, errno := c.Lookup(root, "sub")
				want(t, errno, "LOOKUP sub", fsbackend.OK)
				if got := listServed(t, c, e.NodeId, way); !slices.Equal(got, deep) {
					t.Errorf("by %s the guest sees in sub\n%s\nexpected\n%s", way, got, deep)
				}
			}
		})
	}
}

// makeFile makes a file that belongs, where that is possible, to a user and a group of its own.
func makeFile(t testing.TB, path string, mode uint32, n int) {
	t.Helper()
	if err := os.WriteFile(path, bytes.Repeat([]byte{'x'}, n), 0o600); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 {
		if err := os.Chown(path, n, 1000+n); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func globs(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(dir + "/*")
	if err != nil || len(names) == 0 {
		t.Fatalf("nothing in %s: %v", dir, err)
	}
	return names
}

func convert(t testing.TB, dir string, format Format, mask uint32) (Converted, error) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	return Convert(t.Context(), fd, format, mask)
}

func TestConvertRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, row := range []struct {
		format Format
		mask   uint32
	}{{Auto, 0}, {Off, 0}, {ContainersOverride, 0o1777}, {ContainersOverride, 0o055}} {
		if done, err := convert(t, dir, row.format, row.mask); err == nil || done != (Converted{}) {
			t.Errorf("convert to %v, %#o: %+v, %v, expected an error", row.format, row.mask, done, err)
		}
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(file, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := Convert(t.Context(), fd, ContainersOverride, 0); err == nil || hostValue(t, file, ContainersOverride) != "" {
		t.Errorf("convert a file: %v, expected an error and no value", err)
	}
}

// TestStored: what a guest makes has its owner and mode in the value, and another mode on the host, where it belongs to the daemon.
func TestStored(t *testing.T) {
	dir := t.TempDir()
	c := serve(t, dir, Config{Format: ContainersOverride, ForceMask: 0o700})
	if got := hostValue(t, dir, ContainersOverride); !strings.HasSuffix(got, ":dir") {
		t.Errorf("the root is marked %q, expected a directory's value", got)
	}
	_, errno := c.Chmod(root, 0o1777)
	want(t, errno, "SETATTR of the root", fsbackend.OK)
	user := c.As(1000, 1001)
	f, errno := user.Create(root, "file", unix.O_RDWR, 0o4640)
	want(t, errno, "CREATE", fsbackend.OK)
	user.Release(f.NodeId, f.Fh)
	if again, errno := user.Create(root, "file", unix.O_RDWR, 0o777); errno != fsbackend.OK || again.Mode != unix.S_IFREG|0o4640 {
		t.Errorf("CREATE of what exists: mode %#o, %v", again.Mode, errno)
	}
	for name, make := range map[string]func() (fuseproto.EntryOut, fsbackend.Errno){
		"dir":  func() (fuseproto.EntryOut, fsbackend.Errno) { return user.Mkdir(root, "dir", 0o2751) },
		"pipe": func() (fuseproto.EntryOut, fsbackend.Errno) { return user.Mknod(root, "pipe", unix.S_IFIFO|0o620, 0) },
		"socket": func() (fuseproto.EntryOut, fsbackend.Errno) {
			return user.Mknod(root, "socket", unix.S_IFSOCK|0o600, 0)
		},
		"char": func() (fuseproto.EntryOut, fsbackend.Errno) {
			return c.Mknod(root, "char", unix.S_IFCHR|0o666, uint32(unix.Mkdev(1, 3)))
		},
		"block": func() (fuseproto.EntryOut, fsbackend.Errno) {
			return c.Mknod(root, "block", unix.S_IFBLK|0o600, uint32(unix.Mkdev(259, 77777)))
		},
		"plain": func() (fuseproto.EntryOut, fsbackend.Errno) { return c.Mknod(root, "plain", unix.S_IFREG|0o600, 0) },
	} {
		if out, errno := make(); errno != fsbackend.OK || out.NodeId == 0 {
			t.Errorf("%s: %v", name, errno)
		}
	}
	for name, value := range map[string]string{
		"":       "0:0:1777:dir",
		"file":   "1000:1001:4640:file",
		"dir":    "1000:1001:0751:dir", // mkdir(2) makes no set-ID bits
		"pipe":   "1000:1001:0620:pipe",
		"socket": "1000:1001:0600:socket",
		"char":   "0:0:0666:char-1-3",
		"block":  "0:0:0600:block-259-77777",
		"plain":  "0:0:0600:file",
	} {
		path := filepath.Join(dir, name)
		if got := hostValue(t, path, ContainersOverride); name != "" && got != value || name == "" && !strings.HasSuffix(got, ":1777:dir") {
			t.Errorf("%q has the value %q, expected %q", name, got, value)
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Fatal(err)
		}
		typ := uint32(unix.S_IFREG)
		if name == "dir" || name == "" {
			typ = unix.S_IFDIR
		}
		if int(st.Uid) != os.Getuid() || name != "" && st.Mode != typ|0o700 {
			t.Errorf("%q belongs to %d on the host, mode %#o, expected %d, %#o", name, st.Uid, st.Mode, os.Getuid(), typ|0o700)
		}
		if name == "" {
			continue
		}
		e, errno := c.Lookup(root, name)
		want(t, errno, "LOOKUP "+name, fsbackend.OK)
		st2, ok := ContainersOverride.Parse([]byte(value))
		if !ok || e.Mode != st2.Mode || e.Uid != st2.UID || e.Gid != st2.GID || e.Rdev != uint32(unix.Mkdev(st2.Major, st2.Minor)) {
			t.Errorf("%q is shown with mode %#o, %d:%d, device %#x, expected %+v", name, e.Mode, e.Uid, e.Gid, e.Rdev, st2)
		}
	}
	// A listing alone must not say that a pipe is a file.
	fh, errno := c.Opendir(root)
	want(t, errno, "OPENDIR", fsbackend.OK)
	defer c.Releasedir(root, fh)
	entries, errno := c.Readdir(root, fh, 0, 4096, false)
	want(t, errno, "READDIR", fsbackend.OK)
	for _, e := range entries {
		if e.Type == unix.DT_REG {
			t.Errorf("%s is listed as a regular file, expected an unknown type", e.Name)
		}
	}
	// Owners and modes change in the value alone.
	e, errno := c.Lookup(root, "pipe")
	want(t, errno, "LOOKUP", fsbackend.OK)
	in := fuseproto.SetattrIn{}
	in.Valid, in.Uid, in.Gid, in.Mode = fuseproto.FATTR_UID|fuseproto.FATTR_GID|fuseproto.FATTR_MODE, 5, 6, 0o666
	attr, errno := c.Setattr(e.NodeId, in)
	want(t, errno, "SETATTR", fsbackend.OK)
	if attr.Mode != unix.S_IFIFO|0o666 || attr.Uid != 5 || attr.Gid != 6 {
		t.Errorf("SETATTR answered mode %#o, %d:%d", attr.Mode, attr.Uid, attr.Gid)
	}
	if got := hostValue(t, filepath.Join(dir, "pipe"), ContainersOverride); got != "5:6:0666:pipe" {
		t.Errorf("the value is %q", got)
	}
	in.Uid = invalidID
	if _, errno := c.Setattr(e.NodeId, in); errno != unix.EINVAL {
		t.Errorf("SETATTR of an owner that is none: %v", errno)
	}
}

// TestSymlinks: a guest's links are the host's; one that a regular file stands for is read from it.
func TestSymlinks(t *testing.T) {
	dir := t.TempDir()
	c := serve(t, dir, Config{Format: UserOverride})
	e, errno := c.Symlink(root, "link", "target")
	want(t, errno, "SYMLINK", fsbackend.OK)
	if target, err := os.Readlink(filepath.Join(dir, "link")); err != nil || target != "target" {
		t.Errorf("on the host: %q, %v", target, err)
	}
	if target, errno := c.Readlink(e.NodeId); errno != fsbackend.OK || target != "target" {
		t.Errorf("READLINK: %q, %v", target, errno)
	}
	in := fuseproto.SetattrIn{}
	in.Valid, in.Uid, in.Gid = fuseproto.FATTR_UID|fuseproto.FATTR_GID, 1000, 1001
	attr, errno := c.Setattr(e.NodeId, in)
	want(t, errno, "lchown", fsbackend.OK) // also where the host does not allow it
	if os.Getuid() == 0 && (attr.Uid != 1000 || attr.Gid != 1001) {
		t.Errorf("link belongs to %d:%d", attr.Uid, attr.Gid)
	}
	path := filepath.Join(dir, "asfile")
	if err := os.WriteFile(path, []byte("some/where"), 0o755); err != nil {
		t.Fatal(err)
	}
	setHost(t, path, UserOverride, "7:8:0777:symlink")
	e, errno = c.Lookup(root, "asfile")
	want(t, errno, "LOOKUP", fsbackend.OK)
	if e.Mode != unix.S_IFLNK|0o777 || e.Uid != 7 || e.Size != 10 {
		t.Errorf("link is shown with mode %#o, owner %d, size %d", e.Mode, e.Uid, e.Size)
	}
	if target, errno := c.Readlink(e.NodeId); errno != fsbackend.OK || target != "some/where" {
		t.Errorf("READLINK of a file that stands for a link: %q, %v", target, errno)
	}
	setHost(t, path, UserOverride, "7:8:0777:file")
	if _, errno := c.Readlink(e.NodeId); errno != unix.EINVAL {
		t.Errorf("READLINK of a file: %v, expected EINVAL", errno)
	}
}

// TestOriginalPermissions: special files are the host's, and set-ID bits that are left on it count until they are changed.
func TestOriginalPermissions(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "old")
	makeFile(t, path, 0o4755, 0)
	setHost(t, path, OriginalPermissions, "640:7:8\x00")
	c := serve(t, dir, Config{Format: OriginalPermissions})
	e, errno := c.Lookup(root, "old")
	want(t, errno, "LOOKUP", fsbackend.OK)
	if e.Mode != unix.S_IFREG|0o4640 || e.Uid != 7 || e.Gid != 8 {
		t.Errorf("mode %#o, %d:%d, expected 0104640, 7:8", e.Mode, e.Uid, e.Gid)
	}
	attr, errno := c.Chmod(e.NodeId, 0o2600)
	want(t, errno, "SETATTR", fsbackend.OK)
	if got := hostValue(t, path, OriginalPermissions); got != "2600:7:8\x00" || hostMode(t, path) != unix.S_IFREG|0o755 || attr.Mode != unix.S_IFREG|0o2600 {
		t.Errorf("value %q, mode %#o on the host, %#o shown", got, hostMode(t, path), attr.Mode)
	}
	p, errno := c.Mknod(root, "pipe", unix.S_IFIFO|0o620, 0)
	want(t, errno, "MKNOD", fsbackend.OK)
	if p.Mode != unix.S_IFIFO|0o620 || hostMode(t, filepath.Join(dir, "pipe")) != unix.S_IFIFO|0o620 {
		t.Errorf("a pipe has mode %#o, %#o on the host", p.Mode, hostMode(t, filepath.Join(dir, "pipe")))
	}
}

// TestMalformed: a value that is none, or none of such a file, is EINVAL, and takes nothing else with it.
func TestMalformed(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bad", "good"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	setHost(t, filepath.Join(dir, "good"), ContainersOverride, "1:2:0644:file")
	c := serve(t, dir, Config{Format: ContainersOverride})
	for name, values := range map[string][]string{
		"bad": {"", "x", "1:2:0644:dir", "1:2:0644:other", strings.Repeat("1", 200)},
		"dir": {"1:2:0644:file", "1:2:0644:pipe", "1:2:0644:symlink", "1:2:0100644"},
	} {
		for _, value := range values {
			setHost(t, filepath.Join(dir, name), ContainersOverride, value)
			if out, errno := c.Lookup(root, name); errno != unix.EINVAL || out.NodeId != 0 {
				t.Errorf("LOOKUP of %s with value %q: %v, node %d, expected EINVAL", name, value, errno, out.NodeId)
			}
			fh, errno := c.Opendir(root)
			want(t, errno, "OPENDIR", fsbackend.OK)
			entries, errno := c.Readdir(root, fh, 0, 4096, true)
			want(t, errno, "READDIRPLUS", fsbackend.OK)
			c.Releasedir(root, fh)
			for _, e := range entries {
				if e.Name == name && e.Entry.NodeId != 0 || e.Name == "good" && (e.Entry.NodeId == 0 || e.Entry.Uid != 1) {
					t.Errorf("READDIRPLUS beside value %q gives %s node %d, owner %d", value, e.Name, e.Entry.NodeId, e.Entry.Uid)
				}
				c.R.Forget(e.Entry.NodeId, 1)
			}
			if n := c.R.Stats().Inodes; n != 1 {
				t.Fatalf("the guest knows %d inodes after it has forgotten all it was given, expected the root alone", n)
			}
		}
	}
	setHost(t, dir, ContainersOverride, "x")
	b := newPassthrough(t, dir)
	defer func() { _ = b.Close() }()
	for _, format := range []Format{Auto, ContainersOverride} {
		if _, err := New(b, Config{Format: format}); err == nil {
			t.Errorf("%v: a root with a bad value was accepted", format)
		}
	}
}

// TestHidden: a guest neither sees nor sets the attributes, of whatever format.
func TestHidden(t *testing.T) {
	for _, format := range []Format{Off, OriginalPermissions, ContainersOverride} {
		dir := t.TempDir()
		c := serve(t, dir, Config{Format: format})
		f, errno := c.Create(root, "f", unix.O_RDWR, 0o644)
		want(t, errno, "CREATE", fsbackend.OK)
		c.Release(f.NodeId, f.Fh)
		want(t, c.Setxattr(f.NodeId, "user.mine", []byte("m"), 0), "SETXATTR", fsbackend.OK)
		path := filepath.Join(dir, "f")
		setHost(t, path, UserOverride, "1:2:0644")
		value := hostValue(t, path, ContainersOverride)
		for _, hide := range detected {
			name := hide.Xattr()
			if _, _, errno := c.Getxattr(f.NodeId, name, 100); errno != unix.ENODATA {
				t.Errorf("%v: GETXATTR of %s: %v, expected ENODATA", format, name, errno)
			}
			if errno := c.Setxattr(f.NodeId, name, []byte("0:0:4755"), 0); errno != unix.EPERM {
				t.Errorf("%v: SETXATTR of %s: %v, expected EPERM", format, name, errno)
			}
			if errno := c.Removexattr(f.NodeId, name); errno != unix.ENODATA {
				t.Errorf("%v: REMOVEXATTR of %s: %v, expected ENODATA", format, name, errno)
			}
			if format == Off {
				continue
			}
			label := fsbackend.Secctx{Name: fsbackend.MakeName(name), Value: []byte("0:0:4755")}
			ctx := &fsbackend.Context{MayBlock: true, Secctx: []fsbackend.Secctx{label}}
			in, out := &fuseproto.MkdirIn{Mode: 0o755}, new(fuseproto.EntryOut)
			in.NodeId = root
			if errno := c.R.Mkdir(ctx, in, fsbackend.MakeName("labelled"), out); errno != unix.EPERM {
				t.Errorf("%v: MKDIR labelled with %s: %v, expected EPERM", format, name, errno)
			}
		}
		list, n, errno := c.Listxattr(f.NodeId, 1000)
		if errno != fsbackend.OK || !strings.Contains(string(list), "user.mine\x00") || strings.Contains(string(list), "override") || strings.Contains(string(list), "original") {
			t.Errorf("%v: LISTXATTR: %q, %v", format, list, errno)
		}
		if _, size, errno := c.Listxattr(f.NodeId, 0); errno != fsbackend.OK || size != n {
			t.Errorf("%v: LISTXATTR of the size: %d, %v, expected %d", format, size, errno, n)
		}
		if _, _, errno := c.Listxattr(f.NodeId, 3); errno != unix.ERANGE {
			t.Errorf("%v: LISTXATTR with too little room: %v", format, errno)
		}
		if got := hostValue(t, path, ContainersOverride); got != value {
			t.Errorf("%v: the value has become %q", format, got)
		}
	}
}

// TestDetect: the root decides the format, in fuse-overlayfs' order.
func TestDetect(t *testing.T) {
	dir := t.TempDir()
	b := newPassthrough(t, dir)
	defer func() { _ = b.Close() }()
	if _, err := New(b, Config{}); err == nil || !strings.Contains(err.Error(), "user.containers.override_stat") {
		t.Errorf("a root that carries nothing: %v, expected an error that names the attributes", err)
	}
	for _, format := range slices.Backward(detected[:]) {
		if format == SecurityOverride && os.Getuid() != 0 {
			continue
		}
		setHost(t, dir, format, string(format.Append(nil, Stat{UID: 1, GID: 2, Mode: unix.S_IFDIR | 0o700})))
		f, err := New(b, Config{})
		if err != nil {
			t.Fatalf("%v: %v", format, err)
		}
		if f.Format() != format {
			t.Errorf("format %v was found, expected %v", f.Format(), format)
		}
	}
	for _, cfg := range []Config{{Format: 99}, {Format: -1}, {ForceMask: 0o4755}, {ForceMask: 0o555}} {
		if _, err := New(b, cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}

// counting counts the calls of a backend about extended attributes.
type counting struct {
	fsbackend.Forward
	gets, sets atomic.Int64
}

func (b *counting) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	b.gets.Add(1)
	return b.Forward.Getxattr(c, in, name, dst)
}

func (b *counting) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	b.sets.Add(1)
	return b.Forward.Setxattr(c, in, name, value)
}

// TestCalls: attributes cost one more call, and none where the layer is off; data costs none.
func TestCalls(t *testing.T) {
	for format, cost := range map[Format]int64{Off: 0, ContainersOverride: 1} {
		b := &counting{Forward: fsbackend.Forward{Inner: fsbackend.Resolve(newMem(t))}}
		c := clientOf(t, over(t, b, Config{Format: format}))
		f, errno := c.Create(root, "f", unix.O_RDWR, 0o644)
		want(t, errno, "CREATE", fsbackend.OK)
		fh, errno := c.Opendir(root)
		want(t, errno, "OPENDIR", fsbackend.OK)
		for _, row := range []struct {
			what       string
			gets, sets int64
			call       func() fsbackend.Errno
		}{
			{"LOOKUP", cost, 0, func() fsbackend.Errno { _, errno := c.Lookup(root, "f"); return errno }},
			{"GETATTR", cost, 0, func() fsbackend.Errno { _, errno := c.Getattr(f.NodeId); return errno }},
			{"STATX", cost, 0, func() fsbackend.Errno { _, errno := c.Statx(f.NodeId); return errno }},
			{"READDIRPLUS", cost, 0, func() fsbackend.Errno { _, errno := c.Readdir(root, fh, 0, 4096, true); return errno }},
			{"SETATTR of the size", cost, 0, func() fsbackend.Errno { return c.Truncate(f.NodeId, 5) }},
			{"SETATTR of the mode", cost, cost, func() fsbackend.Errno { _, errno := c.Chmod(f.NodeId, 0o600); return errno }},
			{"CREATE", cost, cost, func() fsbackend.Errno { _, errno := c.Create(root, "g", unix.O_RDWR|unix.O_EXCL, 0o644); return errno }},
			{"OPEN", 0, 0, func() fsbackend.Errno { _, errno := c.Open(f.NodeId, unix.O_RDWR); return errno }},
			{"READ", 0, 0, func() fsbackend.Errno { _, errno := c.Read(f.NodeId, f.Fh, 0, 10); return errno }},
			{"WRITE", 0, 0, func() fsbackend.Errno { _, errno := c.Write(f.NodeId, f.Fh, 0, []byte("x"), 0); return errno }},
		} {
			b.gets.Store(0)
			b.sets.Store(0)
			want(t, row.call(), row.what, fsbackend.OK)
			if gets, sets := b.gets.Load(), b.sets.Load(); gets != row.gets || sets != row.sets {
				t.Errorf("%v: %s took %d GETXATTR and %d SETXATTR, expected %d and %d", format, row.what, gets, sets, row.gets, row.sets)
			}
		}
	}
}

// TestHostChanges: what the host makes of a value is seen at once.
func TestHostChanges(t *testing.T) {
	dir := t.TempDir()
	c := serve(t, dir, Config{Format: ContainersOverride})
	f, errno := c.Create(root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	path := filepath.Join(dir, "f")
	setHost(t, path, ContainersOverride, "5:6:0751:file")
	if errno := c.R.Access(&fsbackend.Context{}, &fuseproto.AccessIn{}); errno != unix.ENOSYS {
		t.Errorf("ACCESS: %v, expected ENOSYS: what the host would say is about other owners", errno)
	}
	if a, errno := c.Getattr(f.NodeId); errno != fsbackend.OK || a.Uid != 5 || a.Gid != 6 || a.Mode != unix.S_IFREG|0o751 {
		t.Errorf("after the host has changed the value: %+v, %v", a, errno)
	}
	if err := unix.Lremovexattr(path, ContainersOverride.Xattr()); err != nil {
		t.Fatal(err)
	}
	if a, errno := c.Getattr(f.NodeId); errno != fsbackend.OK || a.Mode != unix.S_IFREG|0o755 || int(a.Uid) != os.Getuid() {
		t.Errorf("without a value: mode %#o, owner %d, %v, expected the host's", a.Mode, a.Uid, errno)
	}
}

// TestKillPriv: set-ID bits in a value end with a change of contents by who may not keep them, however many files have some.
func TestKillPriv(t *testing.T) {
	f := over(t, newMem(t), Config{Format: ContainersOverride})
	c := clientOf(t, f)
	for round := range 2 {
		for what, change := range map[string]func(node, fh uint64) fsbackend.Errno{
			"OPEN with O_TRUNC": func(node, _ uint64) fsbackend.Errno {
				in, out := &fuseproto.OpenIn{Flags: unix.O_WRONLY | unix.O_TRUNC, Mode: fuseproto.FUSE_OPEN_KILL_SUIDGID}, new(fuseproto.OpenOut)
				in.NodeId = node
				return c.R.Open(&fsbackend.Context{MayBlock: true}, in, out)
			},
			"SETATTR of the size": func(node, _ uint64) fsbackend.Errno {
				in := fuseproto.SetattrIn{}
				in.Valid = fuseproto.FATTR_SIZE | fuseproto.FATTR_KILL_SUIDGID
				_, errno := c.Setattr(node, in)
				return errno
			},
			"WRITE": func(node, fh uint64) fsbackend.Errno {
				in := &fuseproto.WriteIn{Fh: fh, Size: 1, WriteFlags: fuseproto.FUSE_WRITE_KILL_SUIDGID}
				in.NodeId = node
				_, errno := c.R.Write(&fsbackend.Context{MayBlock: true}, in, fsbackendtest.NewSource([]byte("x"), 0))
				return errno
			},
		} {
			name := fmt.Sprintf("%s%d", what, round)
			out, errno := c.Create(root, name, unix.O_RDWR, 0o6755)
			want(t, errno, "CREATE", fsbackend.OK)
			want(t, change(out.NodeId, out.Fh), what, fsbackend.OK)
			if a, errno := c.Getattr(out.NodeId); errno != fsbackend.OK || a.Mode != unix.S_IFREG|0o755 {
				t.Errorf("after %s the mode is %#o, %v, expected 0755", name, a.Mode, errno)
			}
		}
		// In the second round, not all of them can be told from others.
		for node := range uint64(maxMarked + 10) {
			f.privs.add(1<<40 + node)
		}
	}
	if !f.privs.full || len(f.privs.nodes) > maxMarked {
		t.Errorf("%d nodes are remembered, expected at most %d", len(f.privs.nodes), maxMarked)
	}
	f.Reset()
	if f.privs.has(1 << 40) {
		t.Error("a node is remembered after Reset")
	}
}

// TestFailedValue: what cannot have its value is not left behind without.
func TestFailedValue(t *testing.T) {
	b := &failing{Forward: fsbackend.Forward{Inner: fsbackend.Resolve(newMem(t))}}
	c := clientOf(t, over(t, b, Config{Format: ContainersOverride}))
	b.errno = unix.ENOSPC
	for what, call := range map[string]func() fsbackend.Errno{
		"CREATE":  func() fsbackend.Errno { _, errno := c.Create(root, "f", unix.O_RDWR, 0o644); return errno },
		"MKDIR":   func() fsbackend.Errno { _, errno := c.Mkdir(root, "d", 0o755); return errno },
		"MKNOD":   func() fsbackend.Errno { _, errno := c.Mknod(root, "p", unix.S_IFIFO|0o644, 0); return errno },
		"TMPFILE": func() fsbackend.Errno { _, errno := c.Tmpfile(root, unix.O_RDWR, 0o644); return errno },
		"SETATTR": func() fsbackend.Errno { _, errno := c.Chmod(root, 0o700); return errno },
	} {
		want(t, call(), what, unix.ENOSPC)
	}
	if names := c.List(t, root, 4096); len(names) > 0 {
		t.Errorf("%q were left behind", names)
	}
	if n := c.R.Stats().Inodes; n != 1 {
		t.Errorf("the guest knows %d inodes, expected the root alone", n)
	}
	if b.open != 0 {
		t.Errorf("%d files were left open", b.open)
	}
}

// failing is a backend that cannot set attributes.
type failing struct {
	fsbackend.Forward
	errno fsbackend.Errno
	open  int
}

func (b *failing) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	b.open++
	return b.Forward.Create(c, in, name, out)
}

func (b *failing) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) fsbackend.Errno {
	b.open++
	return b.Forward.Tmpfile(c, in, out)
}

func (b *failing) Release(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	b.open--
	b.Forward.Release(c, in)
}

func (b *failing) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	if b.errno != 0 {
		return b.errno
	}
	return b.Forward.Setxattr(c, in, name, value)
}

// TestFirstReluctance: a backend that wants a thread that may sleep for the first time in the middle of a call has that one wait.
func TestFirstReluctance(t *testing.T) {
	b := &shy{Forward: fsbackend.Forward{Inner: fsbackend.Resolve(newMem(t))}}
	f := over(t, b, Config{Format: ContainersOverride})
	c := clientOf(t, f)
	b.shy.Store(true)
	ctx := &fsbackend.Context{}
	in, out := &fuseproto.MkdirIn{Mode: 0o700}, new(fuseproto.EntryOut)
	in.NodeId = root
	want(t, c.R.Mkdir(ctx, in, fsbackend.MakeName("d"), out), "MKDIR", fsbackend.OK)
	if out.Mode != unix.S_IFDIR|0o700 || ctx.MayBlock {
		t.Errorf("mode %#o, thread may sleep %v", out.Mode, ctx.MayBlock)
	}
	want(t, c.R.Mkdir(ctx, in, fsbackend.MakeName("e"), out), "MKDIR", fsbackend.ErrMayBlock)
	if _, errno := c.Lookup(root, "e"); errno != unix.ENOENT {
		t.Errorf("LOOKUP of what was put off: %v", errno)
	}
}

// shy is a backend that comes to sleep where it sets attributes.
type shy struct {
	fsbackend.Forward
	shy atomic.Bool
}

func (b *shy) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	if b.shy.Load() && !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	return b.Forward.Setxattr(c, in, name, value)
}

func TestAllocatesNothing(t *testing.T) {
	c := serve(t, t.TempDir(), Config{Format: ContainersOverride})
	f, errno := c.Create(root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	var (
		ctx    fsbackend.Context
		get    fuseproto.GetattrIn
		attr   fuseproto.AttrOut
		entry  fuseproto.EntryOut
		set    fuseproto.SetattrIn
		create fuseproto.CreateIn
		made   fuseproto.CreateOut
		rel    fuseproto.ReleaseIn
		name   = fsbackend.MakeName("f")
		fresh  = fsbackend.MakeName("fresh")
	)
	get.NodeId, set.NodeId = f.NodeId, f.NodeId
	set.Valid, set.Mode = fuseproto.FATTR_MODE, 0o640
	create.NodeId, create.Flags, create.Mode = root, unix.O_RDWR, 0o644
	for what, call := range map[string]func() fsbackend.Errno{
		"LOOKUP": func() fsbackend.Errno {
			errno := c.R.Lookup(&ctx, root, name, &entry)
			c.R.Forget(entry.NodeId, 1)
			return errno
		},
		"GETATTR": func() fsbackend.Errno { return c.R.Getattr(&ctx, &get, &attr) },
		"SETATTR": func() fsbackend.Errno { return c.R.Setattr(&ctx, &set, &attr) },
		"CREATE": func() fsbackend.Errno {
			errno := c.R.Create(&ctx, &create, fresh, &made)
			rel.NodeId, rel.Fh = made.NodeId, made.Fh
			c.R.Release(&ctx, &rel)
			_ = c.R.Unlink(&ctx, root, fresh)
			c.R.Forget(made.NodeId, 1)
			return errno
		},
	} {
		if n := testing.AllocsPerRun(200, func() {
			if errno := call(); errno != fsbackend.OK {
				t.Fatal(errno)
			}
		}); n != 0 && !raceEnabled { // with which a sync.Pool forgets
			t.Errorf("%s allocates %v times, expected never", what, n)
		}
	}
}

// TestQuicker: where somebody else has put another file in the place of what was made, that one keeps its value.
func TestQuicker(t *testing.T) {
	b := &replaced{Forward: fsbackend.Forward{Inner: fsbackend.Resolve(newMem(t))}}
	c := clientOf(t, over(t, b, Config{Format: ContainersOverride}))
	for _, name := range []string{"file", "dir"} {
		b.by = nil
		if name == "file" {
			_, errno := c.Mknod(root, name, unix.S_IFREG|0o600, 0)
			want(t, errno, "MKNOD", fsbackend.OK)
		} else {
			_, errno := c.Mkdir(root, name, 0o700)
			want(t, errno, "MKDIR", fsbackend.OK)
		}
		b.by = fsbackend.MakeName(name)
		if _, errno := c.As(1000, 1000).Mkdir(root, "mine"+name, 0o755); errno != unix.ESTALE {
			t.Errorf("MKDIR replaced by %s: %v, expected ESTALE", name, errno)
		}
		if e, errno := c.Lookup(root, name); errno != fsbackend.OK || e.Uid != 0 {
			t.Errorf("%s: %v, now belongs to %d", name, errno, e.Uid)
		}
	}
}

// replaced is a backend whose MKDIR finds something else in the place of what it has made.
type replaced struct {
	fsbackend.Forward
	by fsbackend.Name
}

func (b *replaced) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	errno := b.Forward.Mkdir(c, in, name, out)
	if errno != fsbackend.OK || b.by == nil {
		return errno
	}
	b.Inner.Forget(out.NodeId, 1)
	return b.Forward.Lookup(c, in.NodeId, b.by, out)
}

// TestListGate: entries that the guest never gets are not counted as looked up.
func TestListGate(t *testing.T) {
	c := clientOf(t, over(t, newMem(t), Config{Format: ContainersOverride}))
	for _, name := range []string{"a", "b", "c"} {
		d, errno := c.Mkdir(root, name, 0o700)
		want(t, errno, "MKDIR", fsbackend.OK)
		c.R.Forget(d.NodeId, 1)
	}
	fh, errno := c.Opendir(root)
	want(t, errno, "OPENDIR", fsbackend.OK)
	in := &fuseproto.ReadIn{Fh: fh, Size: 4096}
	in.NodeId = root
	list := &fsbackend.DirList{Plus: true}
	list.Sink = *fsbackendtest.NewSink(make([]byte, 4096), 0)
	gate := new(fsbackend.Gate)
	list.SetGate(gate)
	gate.Close()
	want(t, c.R.Readdirplus(&fsbackend.Context{}, in, list), "READDIRPLUS behind a closed gate", fsbackend.OK)
	if n := c.R.Stats().Inodes; n != 1 || list.Written() != 0 || in.Size != 4096 {
		t.Errorf("the guest is said to know %d inodes, expected the root alone; %d bytes were written", n, list.Written())
	}
}

// TestUmask: where the guest leaves its umask to us, the value has it applied.
func TestUmask(t *testing.T) {
	c := clientOf(t, over(t, newMem(t), Config{Format: ContainersOverride}))
	for flags, mode := range map[uint64]uint32{0: 0o777, fuseproto.FUSE_DONT_MASK: 0o750} {
		c.R.Init(fsbackend.Features{Flags: flags})
		in, out := &fuseproto.MkdirIn{Mode: 0o777, Umask: 0o027}, new(fuseproto.EntryOut)
		in.NodeId = root
		want(t, c.R.Mkdir(&fsbackend.Context{}, in, fsbackend.MakeName(fmt.Sprint("d", flags)), out), "MKDIR", fsbackend.OK)
		if out.Mode&0o7777 != mode || in.Umask != 0o027 || in.Mode != 0o777 {
			t.Errorf("flags %#x: mode %#o, expected %#o; the request says %#o, %#o", flags, out.Mode, mode, in.Mode, in.Umask)
		}
	}
	if flags := c.R.WantFlags(fuseproto.FUSE_POSIX_ACL | fuseproto.FUSE_BIG_WRITES); flags != fuseproto.FUSE_BIG_WRITES {
		t.Errorf("flags %#x are wanted, expected no access lists", flags)
	}
}

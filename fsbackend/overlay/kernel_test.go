package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// tree is what a test does to a merged tree, whoever merges it. Paths are relative, "" is the root.
type tree interface {
	mkdir(path string, mode uint32) error
	create(path string, mode uint32) error
	write(path string, off int64, data string) error
	truncate(path string, size int64) error
	symlink(target, path string) error
	mknod(path string, mode uint32, dev int) error
	link(old, path string) error
	unlink(path string) error
	rmdir(path string) error
	rename(old, path string, flags uint) error
	chmod(path string, mode uint32) error
	chown(path string, uid, gid int) error
	setxattr(path, name, value string) error
	removexattr(path, name string) error
	snapshot() (map[string]string, error)
}

// needRoot says whether a test of what only root can do is to run.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("a test of what root does")
	}
}

// kernelTree is a tree that the kernel has mounted.
type kernelTree string

func (k kernelTree) at(path string) string { return string(k) + "/" + path }

func (k kernelTree) mkdir(path string, mode uint32) error { return unix.Mkdir(k.at(path), mode) }

func (k kernelTree) create(path string, mode uint32) error {
	fd, err := unix.Open(k.at(path), unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, mode)
	if err == nil {
		err = unix.Close(fd)
	}
	return err
}

// regular refuses what is no regular file: what comes of opening it is not the file system's business.
func (k kernelTree) regular(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(k.at(path), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.EINVAL
	}
	return nil
}

func (k kernelTree) write(path string, off int64, data string) error {
	if err := k.regular(path); err != nil {
		return err
	}
	fd, err := unix.Open(k.at(path), unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Pwrite(fd, []byte(data), off)
	return err
}

func (k kernelTree) truncate(path string, size int64) error {
	if err := k.regular(path); err != nil {
		return err
	}
	return unix.Truncate(k.at(path), size)
}

func (k kernelTree) symlink(target, path string) error { return unix.Symlink(target, k.at(path)) }

func (k kernelTree) mknod(path string, mode uint32, dev int) error {
	return unix.Mknod(k.at(path), mode, dev)
}

func (k kernelTree) link(old, path string) error {
	return unix.Linkat(unix.AT_FDCWD, k.at(old), unix.AT_FDCWD, k.at(path), 0)
}
func (k kernelTree) unlink(path string) error { return unix.Unlink(k.at(path)) }
func (k kernelTree) rmdir(path string) error  { return unix.Rmdir(k.at(path)) }

func (k kernelTree) rename(old, path string, flags uint) error {
	return unix.Renameat2(unix.AT_FDCWD, k.at(old), unix.AT_FDCWD, k.at(path), flags)
}

func (k kernelTree) chmod(path string, mode uint32) error {
	if err := k.regular(path); err != nil {
		return err
	}
	return unix.Chmod(k.at(path), mode)
}

func (k kernelTree) chown(path string, uid, gid int) error {
	return unix.Lchown(k.at(path), uid, gid)
}

func (k kernelTree) setxattr(path, name, value string) error {
	return unix.Lsetxattr(k.at(path), name, []byte(value), 0)
}

func (k kernelTree) removexattr(path, name string) error {
	return unix.Lremovexattr(k.at(path), name)
}

func (k kernelTree) snapshot() (map[string]string, error) {
	all := make(map[string]string)
	return all, filepath.Walk(string(k), func(path string, _ os.FileInfo, err error) error {
		if errors.Is(err, unix.ENOENT) {
			return nil // a whiteout with nothing below, which the kernel lists
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		var extra string
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			extra = string(data)
		case unix.S_IFLNK:
			if extra, err = os.Readlink(path); err != nil {
				return err
			}
		}
		buf := make([]byte, 4096)
		n, err := unix.Llistxattr(path, buf)
		if err != nil {
			return err
		}
		attrs := make(map[string]string)
		for _, name := range strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
			if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
				continue
			}
			value := make([]byte, 256)
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			attrs[name] = string(value[:n])
		}
		rel, _ := filepath.Rel(string(k), path)
		all[rel] = describe(st.Mode, st.Uid, st.Gid, uint64(st.Size), uint32(st.Nlink), uint32(st.Rdev), st.Mtim.Sec, extra, attrs)
		return nil
	})
}

// describe is what two trees are compared by.
func describe(mode, uid, gid uint32, size uint64, nlink, rdev uint32, mtime int64, extra string, attrs map[string]string) string {
	if mode&unix.S_IFMT == unix.S_IFDIR {
		size = 0
	}
	if mtime > 1_700_000_000 {
		mtime = -1 // of this test's run
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(attrs)) {
		list = append(list, fmt.Sprintf("%s=%q", name, attrs[name]))
	}
	return fmt.Sprintf("%07o %d:%d size %d nlink %d rdev %x mtime %d %q %v", mode, uid, gid, size, nlink, rdev, mtime, extra, list)
}

// ourTree is a tree of ours.
type ourTree struct {
	*fsbackendtest.Client
	fs *FS
}

func newOurTree(fs *FS) *ourTree {
	return &ourTree{&fsbackendtest.Client{R: fsbackend.Resolve(fs)}, fs}
}

// walk returns the node at path with a lookup.
func (o *ourTree) walk(path string) (fuseproto.EntryOut, error) {
	at := fuseproto.EntryOut{NodeId: fsbackendtest.Root}
	if path == "" {
		attr, e := o.Getattr(at.NodeId)
		at.Attr = attr
		return at, asError(e)
	}
	for name := range strings.SplitSeq(path, "/") {
		if at.Mode&unix.S_IFMT == unix.S_IFLNK {
			o.fs.Forget(at.NodeId, 1)
			return at, unix.ENOENT // none of them leads anywhere
		}
		next, e := o.Lookup(at.NodeId, name)
		o.fs.Forget(at.NodeId, 1)
		if e != 0 {
			return next, e
		}
		at = next
	}
	return at, nil
}

func asError(e fsbackend.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

// in calls do with the directory that path is in, and the last component.
func (o *ourTree) in(path string, do func(dir uint64, name string) fsbackend.Errno) error {
	dir, name := "", path
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		dir, name = path[:i], path[i+1:]
	}
	p, err := o.walk(dir)
	if err != nil {
		return err
	}
	if p.Mode&unix.S_IFMT == unix.S_IFLNK {
		o.fs.Forget(p.NodeId, 1)
		return unix.ENOENT
	}
	if p.Mode&unix.S_IFMT != unix.S_IFDIR {
		o.fs.Forget(p.NodeId, 1)
		return unix.ENOTDIR
	}
	defer o.fs.Forget(p.NodeId, 1)
	return asError(do(p.NodeId, name))
}

// on calls do with the node at path.
func (o *ourTree) on(path string, do func(n *fuseproto.EntryOut) fsbackend.Errno) error {
	n, err := o.walk(path)
	if err != nil {
		return err
	}
	defer o.fs.Forget(n.NodeId, 1)
	return asError(do(&n))
}

func (o *ourTree) onRegular(path string, do func(n *fuseproto.EntryOut) fsbackend.Errno) error {
	return o.on(path, func(n *fuseproto.EntryOut) fsbackend.Errno {
		if n.Mode&unix.S_IFMT != unix.S_IFREG {
			return unix.EINVAL
		}
		return do(n)
	})
}

func (o *ourTree) entry(out fuseproto.EntryOut, e fsbackend.Errno) fsbackend.Errno {
	if e == 0 {
		o.fs.Forget(out.NodeId, 1)
	}
	return e
}

func (o *ourTree) mkdir(path string, mode uint32) error {
	return o.in(path, func(dir uint64, name string) fsbackend.Errno { return o.entry(o.Mkdir(dir, name, mode)) })
}

func (o *ourTree) create(path string, mode uint32) error {
	return o.in(path, func(dir uint64, name string) fsbackend.Errno {
		out, e := o.Create(dir, name, unix.O_RDWR|unix.O_EXCL, mode)
		if e == 0 {
			o.Release(out.NodeId, out.Fh)
			o.fs.Forget(out.NodeId, 1)
		}
		return e
	})
}

func (o *ourTree) write(path string, off int64, data string) error {
	return o.onRegular(path, func(n *fuseproto.EntryOut) fsbackend.Errno {
		fh, e := o.Open(n.NodeId, unix.O_RDWR)
		if e != 0 {
			return e
		}
		defer o.Release(n.NodeId, fh)
		_, e = o.Write(n.NodeId, fh, uint64(off), []byte(data), unix.O_RDWR)
		return e
	})
}

func (o *ourTree) truncate(path string, size int64) error {
	return o.onRegular(path, func(n *fuseproto.EntryOut) fsbackend.Errno { return o.Truncate(n.NodeId, uint64(size)) })
}

func (o *ourTree) symlink(target, path string) error {
	return o.in(path, func(dir uint64, name string) fsbackend.Errno { return o.entry(o.Symlink(dir, name, target)) })
}

func (o *ourTree) mknod(path string, mode uint32, dev int) error {
	return o.in(path, func(d uint64, name string) fsbackend.Errno { return o.entry(o.Mknod(d, name, mode, uint32(dev))) })
}

func (o *ourTree) link(old, path string) error {
	return o.on(old, func(n *fuseproto.EntryOut) fsbackend.Errno {
		err := o.in(path, func(dir uint64, name string) fsbackend.Errno {
			if out, e := o.Lookup(dir, name); e == 0 { // as the guest's kernel does first
				o.fs.Forget(out.NodeId, 1)
				return unix.EEXIST
			}
			return o.entry(o.Link(n.NodeId, dir, name))
		})
		e, _ := err.(fsbackend.Errno)
		return e
	})
}

func (o *ourTree) unlink(path string) error {
	return o.in(path, func(dir uint64, name string) fsbackend.Errno { return o.Unlink(dir, name) })
}

func (o *ourTree) rmdir(path string) error {
	return o.in(path, func(dir uint64, name string) fsbackend.Errno { return o.Rmdir(dir, name) })
}

func (o *ourTree) rename(old, path string, flags uint) error {
	return o.in(old, func(from uint64, oldName string) fsbackend.Errno {
		err := o.in(path, func(to uint64, name string) fsbackend.Errno { return o.Rename(from, oldName, to, name, uint32(flags)) })
		e, _ := err.(fsbackend.Errno)
		return e
	})
}

func (o *ourTree) setattr(path string, in fuseproto.SetattrIn) error {
	return o.on(path, func(n *fuseproto.EntryOut) fsbackend.Errno {
		_, e := o.Setattr(n.NodeId, in)
		return e
	})
}

func (o *ourTree) chmod(path string, mode uint32) error {
	in := fuseproto.SetattrIn{}
	in.Valid, in.Mode = fuseproto.FATTR_MODE, mode
	return o.onRegular(path, func(n *fuseproto.EntryOut) fsbackend.Errno {
		_, e := o.Setattr(n.NodeId, in)
		return e
	})
}

func (o *ourTree) chown(path string, uid, gid int) error {
	in := fuseproto.SetattrIn{}
	in.Valid, in.Uid, in.Gid = fuseproto.FATTR_UID|fuseproto.FATTR_GID, uint32(uid), uint32(gid)
	return o.setattr(path, in)
}

func (o *ourTree) setxattr(path, name, value string) error {
	return o.on(path, func(n *fuseproto.EntryOut) fsbackend.Errno { return o.Setxattr(n.NodeId, name, []byte(value), 0) })
}

func (o *ourTree) removexattr(path, name string) error {
	return o.on(path, func(n *fuseproto.EntryOut) fsbackend.Errno { return o.Removexattr(n.NodeId, name) })
}

// snapshot also checks that listings and lookups say the same.
func (o *ourTree) snapshot() (map[string]string, error) {
	all := make(map[string]string)
	var errs []error
	var visit func(path string, n fuseproto.EntryOut)
	visit = func(path string, n fuseproto.EntryOut) {
		a := n.Attr
		var extra string
		switch a.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			fh, e := o.Open(n.NodeId, unix.O_RDONLY)
			if e != 0 {
				errs = append(errs, fmt.Errorf("open %s: %w", path, e))
				return
			}
			data, e := o.Read(n.NodeId, fh, 0, 1<<16)
			o.Release(n.NodeId, fh)
			if e != 0 {
				errs = append(errs, fmt.Errorf("read %s: %w", path, e))
			}
			extra = string(data)
		case unix.S_IFLNK:
			extra, _ = o.Readlink(n.NodeId)
		}
		attrs := make(map[string]string)
		list, _, e := o.Listxattr(n.NodeId, 4096)
		if e != 0 {
			errs = append(errs, fmt.Errorf("list attributes of %s: %w", path, e))
		}
		for name := range bytes.SplitSeq(list, []byte{0}) {
			if len(name) == 0 {
				continue
			}
			value, _, e := o.Getxattr(n.NodeId, string(name), 256)
			if e != 0 {
				errs = append(errs, fmt.Errorf("attribute %s of %s: %w", name, path, e))
			}
			attrs[string(name)] = string(value)
		}
		key := path
		if key == "" {
			key = "."
		}
		all[key] = describe(a.Mode, a.Uid, a.Gid, a.Size, a.Nlink, a.Rdev, int64(a.Mtime), extra, attrs)
		if a.Mode&unix.S_IFMT != unix.S_IFDIR {
			return
		}
		fh, e := o.Opendir(n.NodeId)
		if e != 0 {
			errs = append(errs, fmt.Errorf("open directory %s: %w", path, e))
			return
		}
		defer o.Releasedir(n.NodeId, fh)
		var entries []fsbackendtest.Dirent
		for off := uint64(0); ; {
			more, e := o.Readdir(n.NodeId, fh, off, 1<<16, false)
			if e != 0 {
				errs = append(errs, fmt.Errorf("list %s: %w", path, e))
			}
			if len(more) == 0 {
				break
			}
			entries, off = append(entries, more...), more[len(more)-1].Off
		}
		for _, d := range entries {
			if d.Name == "." || d.Name == ".." {
				continue
			}
			child, e := o.Lookup(n.NodeId, d.Name)
			if e != 0 {
				errs = append(errs, fmt.Errorf("%s/%s is listed, but: %w", path, d.Name, e))
				continue
			}
			if child.Ino != d.Ino || child.Mode>>12 != d.Type {
				errs = append(errs, fmt.Errorf("%s/%s is listed with inode %d, type %d, and has %d, %d", path, d.Name, d.Ino, d.Type, child.Ino, child.Mode>>12))
			}
			visit(strings.TrimPrefix(path+"/"+d.Name, "/"), child)
			o.fs.Forget(child.NodeId, 1)
		}
	}
	root, err := o.walk("")
	if err != nil {
		return nil, err
	}
	visit("", root)
	return all, errors.Join(errs...)
}

// stack is an overlay's directories on the host.
type stack struct {
	lowers      []string // the uppermost first
	upper, work string
}

func newStack(t *testing.T, lowers int) *stack {
	t.Helper()
	dir := t.TempDir()
	s := &stack{upper: dir + "/upper", work: dir + "/work"}
	for i := range lowers {
		s.lowers = append(s.lowers, fmt.Sprintf("%s/lower%d", dir, i))
	}
	for _, d := range append(s.lowers, s.upper, s.work) {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// mount has the kernel merge the stack until the test's end.
func (s *stack) mount(t *testing.T) kernelTree {
	t.Helper()
	at := t.TempDir()
	data := "lowerdir=" + strings.Join(s.lowers, ":") + ",upperdir=" + s.upper + ",workdir=" + s.work + ",redirect_dir=on,metacopy=off,index=off"
	if err := unix.Mount("overlay", at, "overlay", 0, data); err != nil {
		t.Fatalf("mount -t overlay -o %s: %v", data, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	return kernelTree(at)
}

func (s *stack) config(t testing.TB) Config {
	t.Helper()
	cfg := Config{Upper: newPassthrough(t, s.upper, s.work), Format: FormatTrusted, Volatile: true}
	for _, dir := range s.lowers {
		cfg.Lowers = append(cfg.Lowers, Layer{Backend: newPassthrough(t, dir, ""), Name: dir, StableIno: true})
	}
	return cfg
}

// open merges the stack with ours.
func (s *stack) open(t *testing.T) *ourTree {
	t.Helper()
	o := newOurTree(newOverlay(t, s.config(t)))
	o.fs.Init(fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION})
	return o
}

// act is a random change of a tree: it returns what it did and what came of it.
func act(rnd *rand.Rand, tr tree) string {
	names := []string{"a", "b", "c", "d", "e"}
	path := func() string {
		p := names[rnd.IntN(len(names))]
		for rnd.IntN(5) < 2 {
			p += "/" + names[rnd.IntN(len(names))]
		}
		return p
	}
	p, q, n := path(), path(), rnd.IntN(1000)
	var what string
	var err error
	switch rnd.IntN(20) {
	case 0, 1, 2:
		what, err = "mkdir "+p, tr.mkdir(p, 0o700+uint32(n%64))
	case 3, 4:
		what, err = "create "+p, tr.create(p, 0o600+uint32(n%64))
	case 5, 6:
		what, err = fmt.Sprintf("write %s at %d", p, n), tr.write(p, int64(n), fmt.Sprint("written ", n))
	case 7:
		what, err = fmt.Sprintf("truncate %s to %d", p, n%20), tr.truncate(p, int64(n%20))
	case 8:
		what, err = "symlink "+p, tr.symlink("to/"+q, p)
	case 9:
		what, err = "mknod "+p, tr.mknod(p, unix.S_IFIFO|0o644, 0)
	case 10:
		what, err = "link "+q+" "+p, tr.link(q, p)
	case 11, 12:
		what, err = "unlink "+p, tr.unlink(p)
	case 13, 14:
		what, err = "rmdir "+p, tr.rmdir(p)
	case 15, 16, 17:
		flags := []uint{0, 0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[n%5]
		what, err = fmt.Sprintf("rename %s %s %d", q, p, flags), tr.rename(q, p, flags)
	case 18:
		switch n % 2 {
		case 0:
			what, err = "chmod "+p, tr.chmod(p, uint32(0o640+n%8))
		default:
			what, err = "chown "+p, tr.chown(p, n, n+1)
		}
	default:
		if n%3 == 0 {
			what, err = "removexattr "+p, tr.removexattr(p, "trusted.x")
		} else {
			what, err = "setxattr "+p, tr.setxattr(p, "trusted.x", fmt.Sprint(n))
		}
	}
	return fmt.Sprintf("%s: %v", what, err)
}

// fill makes a layer's contents: some random changes of it alone, old, and whiteouts, of which the kernel knows only devices.
func fill(t *testing.T, rnd *rand.Rand, dir string, n int) {
	t.Helper()
	for range n {
		act(rnd, kernelTree(dir))
	}
	if err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		old := []unix.Timespec{{Sec: 1_600_000_000}, {Sec: 1_600_000_000 + int64(len(path))}}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, old, unix.AT_SYMLINK_NOFOLLOW)
	}); err != nil {
		t.Fatal(err)
	}
}

// differences compares two trees.
func differences(t *testing.T, what string, got, expected map[string]string) {
	t.Helper()
	for _, path := range slices.Sorted(maps.Keys(expected)) {
		if g, ok := got[path]; !ok {
			t.Errorf("%s: %s is missing, expected %s", what, path, expected[path])
		} else if g != expected[path] {
			t.Errorf("%s: %s is\n %s, expected\n %s", what, path, g, expected[path])
		}
	}
	for _, path := range slices.Sorted(maps.Keys(got)) {
		if _, ok := expected[path]; !ok {
			t.Errorf("%s: %s is there, expected nothing: %s", what, path, got[path])
		}
	}
}

func snap(t *testing.T, what string, tr tree) map[string]string {
	t.Helper()
	all, err := tr.snapshot()
	if err != nil {
		t.Errorf("%s: %v", what, err)
	}
	return all
}

// TestAsTheKernel makes the same random changes to an overlay of ours and one of the kernel's, whose layers hold the same, and
// compares answers, trees, and what each makes of the other's upper layer.
func TestAsTheKernel(t *testing.T) {
	needRoot(t)
	rounds := uint64(12)
	for seed := range rounds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			compareWithKernel(t, seed)
		})
	}
}

func compareWithKernel(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 2))
	a, b := newStack(t, 1+int(seed%3)), newStack(t, 1+int(seed%3))
	for i := range a.lowers {
		s := rnd.Uint64()
		for _, dir := range []string{a.lowers[i], b.lowers[i]} {
			fill(t, rand.New(rand.NewPCG(s, 3)), dir, 60)
		}
		if i < len(a.lowers)-1 {
			// Whiteouts and opaque directories, as an upper layer has them that became a lower one.
			for _, dir := range []string{a.lowers[i], b.lowers[i]} {
				for _, name := range []string{"a", "c", "a/b", "d/e", "b/b"} {
					if s%3 > 0 {
						_ = unix.Mknod(dir+"/"+name, unix.S_IFCHR, 0)
					}
				}
				for _, name := range []string{"b", "d", "a/a", "e"} {
					if s%2 > 0 {
						if st, err := os.Lstat(dir + "/" + name); err == nil && st.IsDir() {
							_ = unix.Lsetxattr(dir+"/"+name, "trusted.overlay.opaque", []byte("y"), 0)
						}
					}
				}
			}
		}
	}
	kernel, ours := a.mount(t), b.open(t)
	differences(t, "fresh", snap(t, "ours, fresh", ours), snap(t, "kernel, fresh", kernel))
	var log []string
	for range 150 {
		s := rnd.Uint64()
		k := act(rand.New(rand.NewPCG(s, 4)), kernel)
		o := act(rand.New(rand.NewPCG(s, 4)), ours)
		log = append(log, k)
		if k != o {
			t.Errorf("kernel: %s\nours: %s", k, o)
		}
		if t.Failed() {
			break
		}
	}
	kernelTree, ourTree := snap(t, "kernel", kernel), snap(t, "ours", ours)
	differences(t, "after changes", ourTree, kernelTree)
	if err := ours.fs.check(); err != nil {
		t.Error(err)
	}
	if err := ours.fs.Close(); err != nil {
		t.Error(err)
	}
	if names, err := os.ReadDir(b.work); err != nil || len(names) > 0 {
		t.Errorf("the work directory has %v, %v", names, err)
	}
	again := b.open(t)
	differences(t, "opened again", snap(t, "opened again", again), kernelTree)
	if err := again.fs.Close(); err != nil {
		t.Error(err)
	}
	differences(t, "our upper layer, mounted by the kernel", snap(t, "mounted by the kernel", b.mount(t)), kernelTree)
	_ = unix.Unmount(string(kernel), 0)
	theirs := a.open(t)
	differences(t, "the kernel's upper layer", snap(t, "the kernel's upper layer", theirs), kernelTree)
	if err := theirs.fs.Close(); err != nil {
		t.Error(err)
	}
	if t.Failed() {
		t.Log(strings.Join(log, "\n"))
	}
}

package passthrough

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	file := dir + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		cfg  Config
		want string
	}{
		{Config{}, "expected its path"},
		{Config{Dir: dir + "/absent"}, "no such file"},
		{Config{Dir: file}, "not a directory"},
		{Config{Dir: dir, MaxFDs: 7}, "expected 0 or 8"},
		{Config{Dir: dir, MaxInodes: -1}, "expected 0 to"},
	} {
		fs, err := New(test.cfg)
		if err == nil {
			_ = fs.Close()
			t.Errorf("%+v: no error", test.cfg)
		} else if !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %q, expected something with %q", test.cfg, err, test.want)
		}
	}
}

// TestEscape tries every call with names that lead elsewhere. The outside is next to the share.
func TestEscape(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		outer := t.TempDir()
		cfg.Dir = outer + "/share"
		for _, dir := range []string{"/share/d", "/outside"} {
			if err := os.MkdirAll(outer+dir, 0o777); err != nil {
				t.Fatal(err)
			}
		}
		secret := outer + "/outside/secret"
		if err := os.WriteFile(secret, []byte("secret"), 0o666); err != nil {
			t.Fatal(err)
		}
		g := newGuest(t, cfg)
		d := g.lookup("d").NodeId
		f := g.create(d, "f")
		for _, name := range []string{"..", ".", "../outside", "../outside/secret", "/", "/etc", secret, "f/..", "d/f", "", strings.Repeat("n", 256)} {
			for _, parent := range []uint64{rootID, d} {
				if out, e := g.tryLookup(parent, name); e == 0 {
					t.Errorf("LOOKUP %q: node %#x", name, out.NodeId)
				}
				if _, e := g.tryCreate(parent, name, unix.O_RDWR, 0o666); e == 0 {
					t.Errorf("CREATE %q worked", name)
				}
				if _, e := g.tryMkdir(parent, name, 0o777); e == 0 {
					t.Errorf("MKDIR %q worked", name)
				}
				if _, e := g.tryMknod(parent, name, unix.S_IFREG|0o666, 0); e == 0 {
					t.Errorf("MKNOD %q worked", name)
				}
				if _, e := g.symlink(parent, name, "x"); e == 0 {
					t.Errorf("SYMLINK %q worked", name)
				}
				if _, e := g.link(f.NodeId, parent, name); e == 0 {
					t.Errorf("LINK %q worked", name)
				}
				if e := g.unlink(parent, name); e == 0 {
					t.Errorf("UNLINK %q worked", name)
				}
				if e := g.fs.Rmdir(&g.ctx, parent, fsbackend.MakeName(name)); e == 0 {
					t.Errorf("RMDIR %q worked", name)
				}
				if e := g.rename(parent, name, rootID, "in", 0); e == 0 {
					t.Errorf("RENAME of %q worked", name)
				}
				if e := g.rename(d, "f", parent, name, 0); e == 0 {
					t.Errorf("RENAME to %q worked", name)
				}
			}
		}
		// Links are the guest's to follow, never ours.
		link, e := g.symlink(rootID, "link", "../outside")
		g.ok("SYMLINK", e)
		_, e = g.tryLookup(link.NodeId, "secret")
		g.fails("LOOKUP through a link", e, unix.ENOTDIR)
		_, e = g.tryCreate(link.NodeId, "new", unix.O_RDWR, 0o666)
		g.fails("CREATE through a link", e, unix.ENOTDIR)
		_, e = g.symlink(rootID, "flink", secret)
		g.ok("SYMLINK", e)
		_, e = g.tryCreate(rootID, "flink", unix.O_RDWR|unix.O_TRUNC, 0o666)
		g.fails("CREATE of a link's name", e, unix.EBADF)
		_, e = g.tryOpen(g.lookup("flink").NodeId, unix.O_RDONLY)
		g.fails("OPEN of a link", e, unix.EBADF)

		// A directory known by name only is not followed to where a link in its place leads.
		inner := g.mkdir(d, "inner")
		in := g.create(inner.NodeId, "secret")
		g.release(in.NodeId, in.Fh)
		for i := range 3 * MinMaxFDs {
			g.write(fmt.Sprint("other", i), "")
			g.lookup(fmt.Sprint("other", i))
		}
		if err := os.Rename(g.path("d/inner"), outer+"/taken"); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(outer+"/outside", g.path("d/inner")); err != nil {
			t.Fatal(err)
		}
		if fh, e := g.tryOpen(in.NodeId, unix.O_RDONLY); e == 0 {
			if data := g.read(in.NodeId, fh); data == "secret" {
				t.Error("a link in a directory's place led outside")
			}
		} else if cfg.NoFileHandles {
			g.fails("OPEN of what moved away", e, unix.ESTALE)
		}
		if data, err := os.ReadFile(secret); err != nil || string(data) != "secret" {
			t.Errorf("the outside has changed: %q, %v", data, err)
		}
		if entries, err := os.ReadDir(outer + "/outside"); err != nil || len(entries) != 1 {
			t.Errorf("the outside has changed: %v, %v", entries, err)
		}
	})
}

// TestEscapeWithoutNameChecks takes the check of names away: the call itself must not leave the directory.
func TestEscapeWithoutNameChecks(t *testing.T) {
	g := newGuest(t, Config{})
	g.mkdirHost("d")
	if err := os.Symlink("/proc/self/fd", g.path("magic")); err != nil {
		t.Fatal(err)
	}
	dir, err := unix.Open(g.path("d"), unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dir)
	for _, name := range []string{"..", "../d", "/", "/etc", "../magic/1"} {
		fd, errno := openPath(dir, fsbackend.MakeName(name).CString())
		if errno != unix.EXDEV {
			t.Errorf("open %q: descriptor %d, %v, expected EXDEV", name, fd, errno)
			_ = unix.Close(fd)
		}
	}
}

func TestSetattr(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		f := g.create(rootID, "f")
		g.put(f.NodeId, f.Fh, 0, "0123456789", 0, 0)
		ro := g.open(f.NodeId, unix.O_RDONLY)
		for _, fh := range []uint64{f.Fh, ro} {
			a, e := g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) {
				in.Valid, in.Fh, in.Size = fuseproto.FATTR_SIZE|fuseproto.FATTR_FH, fh, 4+fh%2
			})
			g.ok("SETATTR of the size by handle", e)
			if a.Size != 4+fh%2 {
				t.Errorf("size %d", a.Size)
			}
		}
		a, e := g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) {
			in.Valid = fuseproto.FATTR_MTIME | fuseproto.FATTR_ATIME | fuseproto.FATTR_ATIME_NOW | fuseproto.FATTR_MODE
			in.Mtime, in.Mtimensec, in.Mode = 1234567890, 123456789, 0o640
		})
		g.ok("SETATTR of times and mode", e)
		if a.Mtime != 1234567890 || a.Mtimensec != 123456789 || time.Since(time.Unix(int64(a.Atime), 0)) > time.Minute || a.Mode != unix.S_IFREG|0o640 {
			t.Errorf("attributes %+v", a)
		}
		was := a
		a, e = g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Atime = fuseproto.FATTR_ATIME, 99 })
		g.ok("SETATTR of the access time", e)
		if a.Atime != 99 || a.Mtime != was.Mtime || a.Mtimensec != was.Mtimensec {
			t.Errorf("attributes %+v, had %+v", a, was)
		}
		_, e = g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Mtime, in.Mtimensec = fuseproto.FATTR_MTIME, 1, 2e9 })
		g.fails("SETATTR of impossible nanoseconds", e, unix.EINVAL)
		_, e = g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Size = fuseproto.FATTR_SIZE, 1<<63 })
		g.fails("SETATTR of an impossible size", e, unix.EINVAL)
		d := g.mkdir(rootID, "d")
		_, e = g.setattr(d.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Size = fuseproto.FATTR_SIZE, 0 })
		g.fails("SETATTR of a directory's size", e, unix.EISDIR)
		_, e = g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Fh = fuseproto.FATTR_FH, 1<<40 })
		g.fails("SETATTR by an unknown handle", e, unix.EBADF)

		link, e := g.symlink(rootID, "link", "f")
		g.ok("SYMLINK", e)
		a, e = g.setattr(link.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Mtime = fuseproto.FATTR_MTIME, 77 })
		g.ok("SETATTR of a link's time", e)
		if a.Mtime != 77 || a.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Errorf("link's attributes %+v", a)
		}
		if target, _ := g.getattr(f.NodeId); target.Mtime != was.Mtime {
			t.Error("SETATTR of a link changed its target")
		}
		_, e = g.setattr(link.NodeId, func(in *fuseproto.SetattrIn) { in.Valid = fuseproto.FATTR_GID; in.Gid = uint32(os.Getgid()) })
		g.ok("SETATTR of a link's group", e)
		_, e = g.setattr(link.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Size = fuseproto.FATTR_SIZE, 0 })
		g.fails("SETATTR of a link's size", e, unix.EINVAL)
	})
}

func (g *guest) setxattr(node uint64, name, value string) fsbackend.Errno {
	var in fuseproto.SetxattrIn
	in.NodeId = node
	return g.fs.Setxattr(&g.ctx, &in, fsbackend.MakeName(name), []byte(value))
}

func (g *guest) getxattr(node uint64, name string, room int) (string, uint32, fsbackend.Errno) {
	in := fuseproto.GetxattrIn{Size: uint32(room)}
	in.NodeId = node
	buf := make([]byte, max(room, 1))
	dst := sinkOf(buf)
	if room == 0 {
		dst = new(fsbackend.Sink)
	}
	n, e := g.fs.Getxattr(&g.ctx, &in, fsbackend.MakeName(name), dst)
	return string(buf[:dst.Written()]), n, e
}

func (g *guest) listxattr(node uint64, room int) (string, uint32, fsbackend.Errno) {
	in := fuseproto.GetxattrIn{Size: uint32(room)}
	in.NodeId = node
	buf := make([]byte, max(room, 1))
	dst := sinkOf(buf)
	n, e := g.fs.Listxattr(&g.ctx, &in, dst)
	return string(buf[:dst.Written()]), n, e
}

func TestXattr(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		f := g.create(rootID, "f")
		d := g.mkdir(rootID, "d")
		for _, node := range []uint64{f.NodeId, d.NodeId, rootID} {
			g.ok("SETXATTR", g.setxattr(node, "user.key", "value"))
			got, _, e := g.getxattr(node, "user.key", 100)
			if g.ok("GETXATTR", e); got != "value" {
				t.Errorf("GETXATTR: %q", got)
			}
			_, n, e := g.getxattr(node, "user.key", 0)
			if g.ok("GETXATTR of the size", e); n != 5 {
				t.Errorf("GETXATTR of the size: %d", n)
			}
			_, _, e = g.getxattr(node, "user.key", 4)
			g.fails("GETXATTR with too little room", e, unix.ERANGE)
			_, _, e = g.getxattr(node, "user.none", 4)
			g.fails("GETXATTR of nothing", e, unix.ENODATA)
			list, _, e := g.listxattr(node, 1000)
			if g.ok("LISTXATTR", e); !strings.Contains(list, "user.key\x00") {
				t.Errorf("LISTXATTR: %q", list)
			}
			_, n, e = g.listxattr(node, 0)
			if g.ok("LISTXATTR of the size", e); int(n) != len(list) {
				t.Errorf("LISTXATTR of the size: %d, expected %d", n, len(list))
			}
			_, _, e = g.listxattr(node, 3)
			g.fails("LISTXATTR with too little room", e, unix.ERANGE)
			g.ok("REMOVEXATTR", g.fs.Removexattr(&g.ctx, node, fsbackend.MakeName("user.key")))
			g.fails("REMOVEXATTR of nothing", g.fs.Removexattr(&g.ctx, node, fsbackend.MakeName("user.key")), unix.ENODATA)
		}
		g.fails("SETXATTR of an ACL", g.setxattr(f.NodeId, accessACL, "x"), unix.EOPNOTSUPP)
		_, _, e := g.getxattr(f.NodeId, defaultACLStr, 10)
		g.fails("GETXATTR of an ACL", e, unix.EOPNOTSUPP)
		link, e := g.symlink(rootID, "link", "f")
		g.ok("SYMLINK", e)
		g.fails("SETXATTR of a user's attribute on a link", g.setxattr(link.NodeId, "user.key", "v"), unix.EPERM)
		if os.Getuid() == 0 {
			g.ok("SETXATTR on a link", g.setxattr(link.NodeId, "trusted.key", "link's"))
			got, _, e := g.getxattr(link.NodeId, "trusted.key", 100)
			if g.ok("GETXATTR of a link", e); got != "link's" {
				t.Errorf("GETXATTR of a link: %q", got)
			}
			_, _, e = g.getxattr(f.NodeId, "trusted.key", 100)
			g.fails("GETXATTR of its target", e, unix.ENODATA)
		}
	})
}

func TestXattrHidesACLs(t *testing.T) {
	g := newGuest(t, Config{})
	list := []byte("user.a\x00system.posix_acl_access\x00user.b\x00system.posix_acl_default\x00")
	if got := string(list[:g.fs.dropHidden(list)]); got != "user.a\x00user.b\x00" {
		t.Errorf("left of the list: %q", got)
	}
	g.fs.Init(fsbackend.Features{Flags: fuseproto.FUSE_POSIX_ACL})
	list = []byte("system.posix_acl_access\x00user.b\x00")
	if n := g.fs.dropHidden(list); n != len(list) {
		t.Errorf("%d bytes left of the list, expected all", n)
	}
}

// TestSpecialFiles makes sure that nothing but regular files and directories is ever opened on the host: opening a FIFO
// would wait for its other end.
func TestSpecialFiles(t *testing.T) {
	g := newGuest(t, Config{})
	for _, typ := range []uint32{unix.S_IFIFO, unix.S_IFSOCK} {
		name := fmt.Sprint("node", typ)
		n, e := g.tryMknod(rootID, name, typ|0o666, 0)
		g.ok("MKNOD", e)
		_, e = g.tryOpen(n.NodeId, unix.O_RDONLY)
		g.fails("OPEN", e, unix.EBADF)
		_, e = g.tryCreate(rootID, name, unix.O_WRONLY, 0o666)
		g.fails("CREATE of what exists", e, unix.EBADF)
		_, e = g.setattr(n.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Size = fuseproto.FATTR_SIZE, 0 })
		g.fails("SETATTR of the size", e, unix.EINVAL)
		g.fails("SYNCFS", g.fs.Syncfs(&g.ctx, n.NodeId), unix.EBADF)
		l, e := g.link(n.NodeId, rootID, name+"l")
		g.ok("LINK", e)
		if l.NodeId != n.NodeId || l.Attr.Nlink != 2 {
			t.Errorf("link %+v of node %#x", l, n.NodeId)
		}
	}
	_, e := g.tryOpen(rootID, unix.O_RDONLY)
	g.fails("OPEN of a directory", e, unix.EISDIR)
}

// TestReadsWithoutSleeping reads what is not in the page cache on a thread that must not sleep.
func TestReadsWithoutSleeping(t *testing.T) {
	g := newGuest(t, Config{})
	const size = 64 * pageSize
	g.write("f", strings.Repeat("d", size))
	entry := g.lookup("f")
	fh := g.open(entry.NodeId, unix.O_RDONLY)
	uncache := func(off, n int64) {
		f, err := os.Open(g.path("f"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Fadvise(int(f.Fd()), off, n, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
	}
	inline := *g
	inline.ctx.MayBlock = false
	uncache(0, 0)
	_, e := inline.tryRead(entry.NodeId, fh, 0, size)
	g.fails("READ of what is not cached", e, fsbackend.ErrMayBlock)
	data, e := g.tryRead(entry.NodeId, fh, 0, size)
	if g.ok("READ that may sleep", e); len(data) != size {
		t.Fatalf("READ that may sleep: %d bytes", len(data))
	}
	// What is cached in part is read to its end all the same: data has come already.
	uncache(size/2, 0)
	data, e = inline.tryRead(entry.NodeId, fh, 0, size)
	if e == fsbackend.OK && len(data) != size {
		t.Errorf("READ of what is half cached: %d bytes, expected %d", len(data), size)
	} else if e != fsbackend.OK && e != fsbackend.ErrMayBlock {
		t.Error(e)
	}
	fh = g.open(entry.NodeId, unix.O_RDWR|unix.O_DSYNC)
	_, e = inline.put(entry.NodeId, fh, 0, "x", 0, 0)
	g.fails("WRITE through to the disk", e, fsbackend.ErrMayBlock)
	for _, off := range []uint64{1 << 63, ^uint64(0)} {
		_, e = g.tryRead(entry.NodeId, fh, off, 1)
		g.fails("READ at an impossible offset", e, unix.EINVAL)
		_, e = g.put(entry.NodeId, fh, off, "x", 0, 0)
		g.fails("WRITE at an impossible offset", e, unix.EINVAL)
	}
}

func TestAppendAndWriteback(t *testing.T) {
	g := newGuest(t, Config{})
	f := g.create(rootID, "f")
	g.put(f.NodeId, f.Fh, 0, "abc", 0, 0)
	g.put(f.NodeId, f.Fh, 0, "def", unix.O_APPEND, 0)
	g.put(f.NodeId, f.Fh, 1, "X", unix.O_APPEND, fuseproto.FUSE_WRITE_CACHE)
	if got := g.read(f.NodeId, f.Fh); got != "aXcdef" {
		t.Errorf("file has %q, expected %q", got, "aXcdef")
	}
	fh := g.open(f.NodeId, unix.O_WRONLY|unix.O_APPEND)
	_, e := g.tryRead(f.NodeId, fh, 0, 1)
	g.fails("READ of a handle for writing", e, unix.EBADF)
	g.fs.Init(fsbackend.Features{Flags: fuseproto.FUSE_WRITEBACK_CACHE})
	fh = g.open(f.NodeId, unix.O_WRONLY|unix.O_APPEND)
	if got := g.read(f.NodeId, fh); got != "aXcdef" {
		t.Errorf("READ with a write-back cache: %q", got)
	}
}

func TestTmpfile(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		tmp := func(flags uint32) fuseproto.CreateOut {
			in := fuseproto.CreateIn{Flags: unix.O_RDWR | flags, Mode: 0o600}
			in.NodeId = rootID
			var out fuseproto.CreateOut
			g.ok("TMPFILE", g.fs.Tmpfile(&g.ctx, &in, &out))
			return out
		}
		f := tmp(0)
		g.put(f.NodeId, f.Fh, 0, "data", 0, 0)
		l, e := g.link(f.NodeId, rootID, "named")
		g.ok("LINK", e)
		if l.NodeId != f.NodeId || l.Attr.Nlink != 1 {
			t.Errorf("linked as %+v", l)
		}
		g.release(f.NodeId, f.Fh)
		fh := g.open(f.NodeId, unix.O_RDONLY)
		if got := g.read(f.NodeId, fh); got != "data" {
			t.Errorf("READ: %q", got)
		}
		_, e = g.link(tmp(unix.O_EXCL).NodeId, rootID, "never")
		g.fails("LINK of a file with O_EXCL", e, unix.ENOENT)
	})
}

func TestLabels(t *testing.T) {
	g := newGuest(t, Config{SecurityLabel: true})
	if g.fs.WantFlags(0)&fuseproto.FUSE_SECURITY_CTX == 0 {
		t.Error("labels are not wanted")
	}
	labelled := *g
	labelled.ctx.Secctx = []fsbackend.Secctx{{Name: fsbackend.MakeName("user.label"), Value: []byte("l")}}
	f := labelled.create(rootID, "f")
	d := labelled.mkdir(rootID, "d")
	for _, node := range []uint64{f.NodeId, d.NodeId} {
		if got, _, e := g.getxattr(node, "user.label", 10); e != 0 || got != "l" {
			t.Errorf("label %q, %v", got, e)
		}
	}
	labelled.ctx.Secctx[0].Name = fsbackend.MakeName("nonsense")
	before := g.fs.nodes.count.Load()
	_, e := labelled.tryCreate(rootID, "f2", unix.O_RDWR, 0o600)
	g.fails("CREATE with a label that cannot be", e, unix.EOPNOTSUPP)
	_, e = labelled.tryMkdir(rootID, "d2", 0o700)
	g.fails("MKDIR with a label that cannot be", e, unix.EOPNOTSUPP)
	_, e = labelled.symlink(rootID, "s2", "x")
	g.fails("SYMLINK with a label that cannot be", e, unix.EOPNOTSUPP)
	for _, name := range []string{"f2", "d2", "s2"} {
		if _, err := os.Lstat(g.path(name)); !os.IsNotExist(err) {
			t.Errorf("%s was left behind", name)
		}
	}
	if after := g.fs.nodes.count.Load(); after != before {
		t.Errorf("%d nodes, %d before", after, before)
	}
}

func (g *guest) ioctl(node, fh uint64, cmd uint32, arg []byte, room int) ([]byte, fsbackend.Errno) {
	in := fuseproto.IoctlIn{Fh: fh, Cmd: cmd, InSize: uint32(len(arg)), OutSize: uint32(room)}
	in.NodeId = node
	buf := make([]byte, room+1)
	dst := sinkOf(buf[:room+1])
	dst.Reset(nil, 0, 0)
	if room > 0 {
		dst = sinkOf(buf[:room])
	}
	_, e := g.fs.Ioctl(&g.ctx, &in, arg, dst)
	return buf[:dst.Written()], e
}

func TestIoctl(t *testing.T) {
	needRoot(t)
	g := newGuest(t, Config{})
	f := g.create(rootID, "f")
	flags, e := g.ioctl(f.NodeId, f.Fh, fsIocGetflags, nil, 4)
	g.ok("FS_IOC_GETFLAGS", e)
	const nodump = 0x40
	flags[0] |= nodump
	_, e = g.ioctl(f.NodeId, f.Fh, fsIocSetflags, flags, 0)
	g.ok("FS_IOC_SETFLAGS", e)
	got, e := g.ioctl(f.NodeId, f.Fh, fsIocGetflags, nil, 4)
	if g.ok("FS_IOC_GETFLAGS", e); !bytes.Equal(got, flags) {
		t.Errorf("flags %x, expected %x", got, flags)
	}
	xattr, e := g.ioctl(f.NodeId, f.Fh, fsIocFsgetxattr, nil, fsxattrSize)
	if g.ok("FS_IOC_FSGETXATTR", e); len(xattr) != fsxattrSize {
		t.Errorf("%d bytes", len(xattr))
	}
	_, e = g.ioctl(f.NodeId, f.Fh, fsIocFssetxattr, xattr, 0)
	g.ok("FS_IOC_FSSETXATTR", e)
	_, e = g.ioctl(f.NodeId, f.Fh, 2, nil, 4)
	g.fails("another ioctl", e, unix.ENOTTY)
	_, e = g.ioctl(f.NodeId, f.Fh, fsIocSetflags, nil, 0)
	g.fails("FS_IOC_SETFLAGS without flags", e, unix.EINVAL)
	_, e = g.ioctl(f.NodeId, f.Fh, fsIocGetflags, nil, 0)
	g.fails("FS_IOC_GETFLAGS without room", e, unix.EINVAL)
}

func TestStatxHasBirthTime(t *testing.T) {
	g := newGuest(t, Config{})
	f := g.create(rootID, "f")
	in := fuseproto.StatxIn{SxMask: unix.STATX_BTIME}
	in.NodeId = f.NodeId
	var out fuseproto.StatxOut
	g.ok("STATX", g.fs.Statx(&g.ctx, &in, &out))
	if out.Statx.Mask&unix.STATX_BTIME == 0 || time.Since(time.Unix(int64(out.Statx.Btime.Sec), 0)).Abs() > time.Minute {
		t.Errorf("born %+v with mask %#x", out.Statx.Btime, out.Statx.Mask)
	}
	if out.Statx.Ino != f.Attr.Ino || out.Statx.Mode != unix.S_IFREG|0o644 {
		t.Errorf("STATX: %+v", out.Statx)
	}
}

// TestInodeNumberReused replaces a file by one with its inode number: another file is another node.
func TestInodeNumberReused(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		seen := map[uint64]uint64{} // nodeid by inode number
		reused := false
		for range 200 {
			g.write("f", "")
			entry := g.lookup("f")
			if node, ok := seen[entry.Attr.Ino]; ok {
				reused = true
				if node == entry.NodeId {
					t.Fatalf("node %#x is two files", node)
				}
			}
			seen[entry.Attr.Ino] = entry.NodeId
			for i := range 2 * MinMaxFDs { // its descriptor goes, and with it what kept the number
				g.mkdirHost(fmt.Sprint("other", i))
				g.lookup(fmt.Sprint("other", i))
			}
			if err := os.Remove(g.path("f")); err != nil {
				t.Fatal(err)
			}
		}
		if !reused {
			t.Error("the host's file system did not reuse an inode number: this test needs one that does")
		}
	})
}

// TestReplacedBehindTheGuest makes sure that a node is never another file of its name.
func TestReplacedBehindTheGuest(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		g.write("f", "old")
		old := g.lookup("f").NodeId
		listed := g.readdir(rootID, true, 4096)
		g.fs.fds.forgetAll(g.fs)
		g.write("new", "new")
		if err := os.Rename(g.path("new"), g.path("f")); err != nil {
			t.Fatal(err)
		}
		_, e := g.tryOpen(old, unix.O_RDONLY)
		g.fails("OPEN of what was replaced", e, unix.ESTALE)
		_, e = g.getattr(old)
		g.fails("GETATTR of what was replaced", e, unix.ESTALE)
		_, e = g.setattr(old, func(in *fuseproto.SetattrIn) { in.Valid, in.Size = fuseproto.FATTR_SIZE, 0 })
		g.fails("SETATTR of what was replaced", e, unix.ESTALE)
		entry := g.lookup("f")
		if entry.NodeId == old || len(listed) != 3 {
			t.Errorf("LOOKUP gave the old node, or a wrong listing: %+v", listed)
		}
		if got := g.read(entry.NodeId, g.open(entry.NodeId, unix.O_RDONLY)); got != "new" {
			t.Errorf("READ: %q", got)
		}
	})
}

func (g *guest) mkdirHost(name string) {
	g.Helper()
	if err := os.MkdirAll(g.path(name), 0o755); err != nil {
		g.Fatal(err)
	}
}

// TestRenamedByTheGuest moves nodes that are known by name only: no LOOKUP tells where they went.
func TestRenamedByTheGuest(t *testing.T) {
	g := newGuest(t, Config{MaxFDs: MinMaxFDs, NoFileHandles: true})
	for _, name := range []string{"d1/a", "d1/b", "d2/c"} {
		g.mkdirHost(name[:2])
		g.write(name, name)
	}
	nodes := map[string]uint64{}
	var list func(dir uint64, prefix string)
	list = func(dir uint64, prefix string) {
		for _, d := range g.readdir(dir, true, 4096) {
			if d.name != "." && d.name != ".." {
				nodes[prefix+d.name] = d.entry.NodeId
				if d.typ == typeDir {
					list(d.entry.NodeId, prefix+d.name+"/")
				}
			}
		}
	}
	list(rootID, "")
	d1, d2 := nodes["d1"], nodes["d2"]
	g.ok("RENAME", g.rename(d1, "a", d2, strings.Repeat("long", 20), 0))
	g.ok("RENAME_EXCHANGE", g.rename(d1, "b", d2, "c", unix.RENAME_EXCHANGE))
	g.ok("RENAME of a directory", g.rename(rootID, "d2", d1, "sub", 0))
	for range 3 {
		for _, name := range []string{"d1/a", "d1/b", "d2/c"} {
			for i := range 2 * MinMaxFDs { // out of the cache
				g.mkdirHost(fmt.Sprint("other", i))
				g.lookup(fmt.Sprint("other", i))
			}
			fh := g.open(nodes[name], unix.O_RDONLY)
			if got := g.read(nodes[name], fh); got != name {
				t.Errorf("node of %s reads %q", name, got)
			}
			g.release(nodes[name], fh)
		}
	}
	// What the host moves is stale until it is looked up.
	if err := os.Rename(g.path("d1"), g.path("moved")); err != nil {
		t.Fatal(err)
	}
	g.fs.fds.forgetAll(g.fs)
	_, e := g.getattr(nodes["d1/a"])
	g.fails("GETATTR of what the host moved", e, unix.ESTALE)
	if entry := g.lookup("moved"); entry.NodeId != d1 {
		t.Errorf("LOOKUP of the moved directory: node %#x, expected %#x", entry.NodeId, d1)
	}
	if a, e := g.getattr(nodes["d1/a"]); e != fsbackend.OK || a.Size != 4 {
		t.Errorf("GETATTR after LOOKUP: %+v, %v", a, e)
	}
}

// forgetAll evicts every descriptor.
func (c *fdCache) forgetAll(fs *FS) {
	for i := range c.slots {
		if id := c.slots[i].node.Load(); id != 0 && fs.evict(int32(i), id) {
			c.putBack(int32(i))
		}
	}
}

func TestMaxInodes(t *testing.T) {
	var log bytes.Buffer
	g := newGuest(t, Config{MaxInodes: 5, Log: slog.New(slog.NewTextHandler(&log, nil))})
	for i := range 8 {
		g.write(fmt.Sprint("f", i), "")
	}
	var known []uint64
	for i := range 5 {
		known = append(known, g.lookup(fmt.Sprint("f", i)).NodeId)
	}
	for range 3 {
		_, e := g.tryLookup(rootID, "f5")
		g.fails("LOOKUP of one too many", e, unix.ENFILE)
	}
	_, e := g.tryCreate(rootID, "new", unix.O_RDWR, 0o600)
	g.fails("CREATE of one too many", e, unix.ENFILE)
	g.lookup("f3")
	if n := len(g.readdir(rootID, true, 4096)); n != 2+9 {
		t.Errorf("READDIRPLUS lists %d entries, expected 11", n)
	}
	if n := strings.Count(log.String(), "too many inodes"); n != 1 {
		t.Errorf("said so %d times", n)
	}
	g.fs.Forget(known[0], 1<<40)
	g.lookup("f5")
	g.fs.Forget(rootID, 1<<40)
	if _, e := g.getattr(rootID); e != fsbackend.OK {
		t.Errorf("the root went: %v", e)
	}
	if err := g.fs.check(); err != nil {
		t.Error(err)
	}
}

func TestHandles(t *testing.T) {
	g := newGuest(t, Config{})
	a, b := g.create(rootID, "a"), g.create(rootID, "b")
	_, e := g.tryRead(a.NodeId, b.Fh, 0, 1)
	g.fails("READ by another node's handle", e, unix.EBADF)
	g.release(a.NodeId, b.Fh)
	_, e = g.tryRead(b.NodeId, b.Fh, 0, 1)
	g.ok("READ after RELEASE by another node", e)
	g.release(b.NodeId, b.Fh)
	g.release(b.NodeId, b.Fh)
	again := g.open(b.NodeId, unix.O_RDONLY)
	if again == b.Fh {
		t.Error("a handle's number was used again at once")
	}
	dir := g.opendir(rootID)
	_, e = g.tryRead(rootID, dir, 0, 1)
	g.fails("READ of a directory's handle", e, unix.EBADF)
	_, e = g.readdirAt(a.NodeId, a.Fh, 0, false, 100)
	g.fails("READDIR of a file's handle", e, unix.ENOTDIR)
	var flush fuseproto.FlushIn
	flush.NodeId, flush.Fh = a.NodeId, a.Fh
	g.fails("FLUSH on a local file system", g.fs.Flush(&g.ctx, &flush), unix.ENOSYS)
	if g.fs.Slow() {
		t.Error("a local file system is slow")
	}
	g.fs.remote = true
	if !g.fs.Slow() {
		t.Error("a remote file system is not slow: a dead server would hold up its queue")
	}
	g.ok("FLUSH on a remote one", g.fs.Flush(&g.ctx, &flush))
	flush.Fh = 1 << 47
	g.fails("FLUSH of an unknown handle", g.fs.Flush(&g.ctx, &flush), unix.EBADF)
	for _, fh := range []uint64{0, 5 << 24, 1<<48 - 1, 1<<48 + 1<<24, ^uint64(0)} {
		_, e = g.tryRead(a.NodeId, fh, 0, 1)
		g.fails("READ by an unknown handle", e, unix.EBADF)
	}
	g.fs.Reset()
	_, e = g.tryRead(a.NodeId, a.Fh, 0, 1)
	g.fails("READ after Reset", e, unix.EBADF)
	_, e = g.getattr(a.NodeId)
	g.fails("GETATTR after Reset", e, unix.ESTALE)
}

// TestListingWhileItChanges lists a directory in which others come and go: what stays is listed, and listed once.
func TestListingWhileItChanges(t *testing.T) {
	g := newGuest(t, Config{})
	const stay = 200
	for i := range stay {
		g.write(fmt.Sprint("stay", i), "")
	}
	var stop atomic.Bool
	done := make(chan error, 1)
	go func() {
		for i := 0; !stop.Load(); i++ {
			name := g.path(fmt.Sprint("go", i%300))
			if err := os.WriteFile(name, nil, 0o600); err != nil {
				done <- err
				return
			}
			if err := os.Remove(g.path(fmt.Sprint("go", (i+1)%300))); err != nil && !os.IsNotExist(err) {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for i := range 150 {
		found := map[string]int{}
		for _, d := range g.readdir(rootID, i%2 == 0, 3000) {
			found[d.name]++
			if i%2 == 0 && d.entry.NodeId == 0 && d.name[0] != '.' {
				t.Errorf("%q is listed and not looked up", d.name)
			}
			g.fs.Forget(d.entry.NodeId, 1)
		}
		for j := range stay {
			if name := fmt.Sprint("stay", j); found[name] != 1 {
				t.Errorf("%s listed %d times", name, found[name])
			}
		}
	}
	stop.Store(true)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := g.fs.nodes.count.Load(); n != 0 {
		t.Errorf("%d nodes left", n)
	}
}

func TestRootsParentIsItself(t *testing.T) {
	g := newGuest(t, Config{})
	a, e := g.getattr(rootID)
	g.ok("GETATTR", e)
	for _, plus := range []bool{false, true} {
		for _, d := range g.readdir(rootID, plus, 4096) {
			if d.ino != a.Ino {
				t.Errorf("%q has inode number %d, expected the root's %d", d.name, d.ino, a.Ino)
			}
		}
	}
}

func TestSubmounts(t *testing.T) {
	needRoot(t)
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		g.mkdirHost("sub")
		g.mkdirHost("plain")
		if err := unix.Mount("tmpfs", g.path("sub"), "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(g.path("sub"), unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		g.mkdirHost("sub/inner")
		g.write("sub/inner/f", "on the submount")
		flags := func(a fuseproto.Attr) bool { return a.Flags&fuseproto.FUSE_ATTR_SUBMOUNT != 0 }
		sub := g.lookup("sub")
		if !flags(sub.Attr) || flags(g.lookup("plain").Attr) || flags(g.lookup("sub/inner").Attr) {
			t.Error("LOOKUP marks other directories than the submount's root")
		}
		for _, d := range g.readdir(rootID, true, 4096) {
			if d.name != "." && d.name != ".." && flags(d.entry.Attr) != (d.name == "sub") {
				t.Errorf("READDIRPLUS: %q marked %v", d.name, flags(d.entry.Attr))
			}
		}
		for _, d := range g.readdir(sub.NodeId, true, 4096) {
			if flags(d.entry.Attr) {
				t.Errorf("READDIRPLUS in the submount: %q marked", d.name)
			}
		}
		f := g.lookup("sub/inner/f")
		for range 3 {
			g.fs.fds.forgetAll(g.fs)
			fh := g.open(f.NodeId, unix.O_RDONLY)
			if got := g.read(f.NodeId, fh); got != "on the submount" {
				t.Errorf("READ: %q", got)
			}
			g.release(f.NodeId, fh)
		}
		var root, there fuseproto.StatfsOut
		g.ok("STATFS", g.fs.Statfs(&g.ctx, rootID, &root))
		g.ok("STATFS", g.fs.Statfs(&g.ctx, sub.NodeId, &there))
		if root.Blocks == there.Blocks {
			t.Error("STATFS of the submount is the root's")
		}
		g.ok("SYNCFS", g.fs.Syncfs(&g.ctx, f.NodeId))
		g.fs.Init(fsbackend.Features{})
		if flags(g.lookup("sub").Attr) {
			t.Error("a guest without FUSE_SUBMOUNTS got the mark")
		}
	})
}

func TestAccess(t *testing.T) {
	g := newGuest(t, Config{})
	f, e := g.tryCreate(rootID, "f", unix.O_RDWR, 0o640)
	g.ok("CREATE", e)
	access := func(uid, gid, mask uint32) fsbackend.Errno {
		in := fuseproto.AccessIn{Mask: mask}
		in.NodeId = f.NodeId
		return g.fs.Access(&g.as(uid, gid).ctx, &in)
	}
	uid, gid := uint32(os.Getuid()), uint32(os.Getgid())
	g.ok("root reads", access(0, 0, unix.R_OK|unix.W_OK))
	g.fails("root executes what nobody may", access(0, 0, unix.X_OK), unix.EACCES)
	g.ok("the group reads", access(uid+1, gid, unix.R_OK))
	g.fails("the group writes", access(uid+1, gid, unix.W_OK), unix.EACCES)
	g.fails("others read", access(uid+1, gid+1, unix.R_OK), unix.EACCES)
	g.ok("others ask whether it exists", access(uid+1, gid+1, unix.F_OK))
}

// TestRealTreeReturnsMemory looks 100,000 files up and forgets them.
func TestRealTreeReturnsMemory(t *testing.T) {
	g := newGuest(t, Config{Dir: fastDir(t), MaxFDs: 256})
	const files = 1000
	dirs := 100
	if raceEnabled { // which memory is not measured under
		dirs = 20
	}
	for d := range dirs {
		g.mkdirHost(fmt.Sprint("d", d))
		for f := range files {
			fd, err := unix.Open(g.path(fmt.Sprintf("d%d/f%d", d, f)), unix.O_CREAT|unix.O_WRONLY, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			_ = unix.Close(fd)
		}
	}
	base := residentBytes(t)
	nodes := make([]uint64, 0, dirs*files+dirs)
	for d := range dirs {
		dir := g.lookup(fmt.Sprint("d", d)).NodeId
		nodes = append(nodes, dir)
		for f := range files {
			entry, e := g.tryLookup(dir, fmt.Sprint("f", f))
			g.ok("LOOKUP", e)
			nodes = append(nodes, entry.NodeId)
		}
	}
	full := residentBytes(t)
	each := (full - base - 8*len(nodes)) / len(nodes)
	if !raceEnabled && each > 300 {
		t.Errorf("%d bytes for each inode, expected at most 300", each)
	}
	if n := inodeFDs(t, g.dir) - 1; n > 256 {
		t.Errorf("%d inode descriptors, expected at most 256", n)
	}
	for _, node := range nodes {
		g.fs.Forget(node, 1)
	}
	g.fs.trims.Wait()
	after := rssNow(t)
	t.Logf("%d bytes for each inode; %d KiB before, %d full, %d after", each, base>>10, full>>10, after>>10)
	if !raceEnabled && after > base+8<<20 {
		t.Errorf("%d KiB resident after the FORGETs, %d before", after>>10, base>>10)
	}
	if n := inodeFDs(t, g.dir); n != 1 {
		t.Errorf("%d inode descriptors left", n-1)
	}
}

package share

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
)

func newMem(t testing.TB) *mem.FS {
	t.Helper()
	f, err := mem.New(mem.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func newPassthrough(t testing.TB, dir string) *passthrough.FS {
	t.Helper()
	f, err := passthrough.New(passthrough.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func newShare(t testing.TB, grafts ...Graft) *Share {
	t.Helper()
	s, err := New(Config{Grafts: grafts})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// below shows a backend the tree of a Share's graft as if it were all there is: its numbers lose their index, and 1 is the
// graft's root. The suite then walks through the Share into the graft with every request.
type below struct {
	*Share
	base uint64
}

func (b below) up(n uint64) uint64 { return n | b.base }

func (b below) down(e *fuseproto.EntryOut, errno Errno) Errno {
	e.NodeId &^= b.base
	return errno
}

func (b below) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	return b.down(out, b.Share.Lookup(c, b.up(parent), name, out))
}

func (b below) Forget(node, n uint64) { b.Share.Forget(b.up(node), n) }

func (b below) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	own := *in
	own.NodeId, own.Fh_ = b.up(in.NodeId), b.up(in.Fh_)
	return b.Share.Getattr(c, &own, out)
}

func (b below) Setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Setattr(c, &own, out)
}

func (b below) Statx(c *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Statx(c, &own, out)
}

func (b below) Statfs(c *fsbackend.Context, node uint64, out *fuseproto.StatfsOut) Errno {
	return b.Share.Statfs(c, b.up(node), out)
}

func (b below) Access(c *fsbackend.Context, in *fuseproto.AccessIn) Errno {
	own := *in
	own.NodeId = b.up(in.NodeId)
	return b.Share.Access(c, &own)
}

func (b below) Readlink(c *fsbackend.Context, node uint64, dst *fsbackend.Sink) Errno {
	return b.Share.Readlink(c, b.up(node), dst)
}

func (b below) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	own := *in
	own.NodeId = b.up(in.NodeId)
	return b.down(out, b.Share.Mknod(c, &own, name, out))
}

func (b below) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	own := *in
	own.NodeId = b.up(in.NodeId)
	return b.down(out, b.Share.Mkdir(c, &own, name, out))
}

func (b below) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) Errno {
	return b.down(out, b.Share.Symlink(c, b.up(parent), name, target, out))
}

func (b below) Link(c *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	own := *in
	own.NodeId, own.Oldnodeid = b.up(in.NodeId), b.up(in.Oldnodeid)
	return b.down(out, b.Share.Link(c, &own, name, out))
}

func (b below) Unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name) Errno {
	return b.Share.Unlink(c, b.up(parent), name)
}

func (b below) Rmdir(c *fsbackend.Context, parent uint64, name fsbackend.Name) Errno {
	return b.Share.Rmdir(c, b.up(parent), name)
}

func (b below) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) Errno {
	own := *in
	own.NodeId, own.Newdir = b.up(in.NodeId), b.up(in.Newdir)
	return b.Share.Rename(c, &own, oldName, newName)
}

func (b below) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	own := *in
	own.NodeId = b.up(in.NodeId)
	errno := b.Share.Open(c, &own, out)
	out.Fh &^= b.base
	return errno
}

func (b below) Release(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	b.Share.Release(c, &own)
}

func (b below) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) Errno {
	own := *in
	own.NodeId = b.up(in.NodeId)
	errno := b.Share.Create(c, &own, name, out)
	out.Fh &^= b.base
	return b.down(&out.EntryOut, errno)
}

func (b below) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) Errno {
	own := *in
	own.NodeId = b.up(in.NodeId)
	errno := b.Share.Tmpfile(c, &own, out)
	out.Fh &^= b.base
	return b.down(&out.EntryOut, errno)
}

func (b below) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Read(c, &own, dst)
}

func (b below) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, Errno) {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Write(c, &own, src)
}

func (b below) Fsync(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Fsync(c, &own)
}

func (b below) Fsyncdir(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Fsyncdir(c, &own)
}

func (b below) Flush(c *fsbackend.Context, in *fuseproto.FlushIn) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Flush(c, &own)
}

func (b below) Fallocate(c *fsbackend.Context, in *fuseproto.FallocateIn) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Fallocate(c, &own)
}

func (b below) Lseek(c *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Lseek(c, &own, out)
}

func (b below) CopyFileRange(c *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, Errno) {
	own := *in
	own.NodeId, own.FhIn = b.up(in.NodeId), b.up(in.FhIn)
	own.NodeIdOut, own.FhOut = b.up(in.NodeIdOut), b.up(in.FhOut)
	return b.Share.CopyFileRange(c, &own)
}

func (b below) Getlk(c *fsbackend.Context, in *fuseproto.LkIn, out *fuseproto.LkOut) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Getlk(c, &own, out)
}

func (b below) Setlk(c *fsbackend.Context, in *fuseproto.LkIn) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Setlk(c, &own)
}

func (b below) Ioctl(c *fsbackend.Context, in *fuseproto.IoctlIn, arg []byte, dst *fsbackend.Sink) (int32, Errno) {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return b.Share.Ioctl(c, &own, arg, dst)
}

func (b below) Opendir(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	own := *in
	own.NodeId = b.up(in.NodeId)
	errno := b.Share.Opendir(c, &own, out)
	out.Fh &^= b.base
	return errno
}

func (b below) Releasedir(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	b.Share.Releasedir(c, &own)
}

func (b below) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	return quiet{b.Share}.Readdir(c, &own, out)
}

func (b below) Readdirplus(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	own := *in
	own.NodeId, own.Fh = b.up(in.NodeId), b.up(in.Fh)
	entries, errno := listed(out, func(l *fsbackend.DirList) Errno { return b.Share.Readdirplus(c, &own, l) })
	for _, e := range entries {
		e.Entry.NodeId &^= b.base
		out.AddPlus(&e.Entry, e.Ino, e.Off, e.Type, []byte(e.Name))
	}
	return errno
}

// listed returns what list adds to a list of the size of out.
func listed(out *fsbackend.DirList, list func(*fsbackend.DirList) Errno) ([]fsbackendtest.Dirent, Errno) {
	buf := make([]byte, out.Len()+1)
	l := &fsbackend.DirList{Plus: out.Plus}
	l.Reset([]unix.Iovec{{Base: &buf[0], Len: uint64(out.Len())}}, 0, uint64(out.Len()))
	errno := list(l)
	return fsbackendtest.ParseDirents(buf[:l.Written()], out.Plus), errno
}

func (b below) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, Errno) {
	own := *in
	own.NodeId = b.up(in.NodeId)
	return b.Share.Getxattr(c, &own, name, dst)
}

func (b below) Listxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, Errno) {
	own := *in
	own.NodeId = b.up(in.NodeId)
	return b.Share.Listxattr(c, &own, dst)
}

func (b below) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) Errno {
	own := *in
	own.NodeId = b.up(in.NodeId)
	return b.Share.Setxattr(c, &own, name, value)
}

func (b below) Removexattr(c *fsbackend.Context, node uint64, name fsbackend.Name) Errno {
	return b.Share.Removexattr(c, b.up(node), name)
}

func (b below) Syncfs(c *fsbackend.Context, node uint64) Errno {
	return b.Share.Syncfs(c, b.up(node))
}

// quiet leaves the way to the grafts out of the root's listing, where the suite takes everything for its own.
type quiet struct{ *Share }

func (q quiet) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	entries, errno := listed(out, func(l *fsbackend.DirList) Errno { return q.Share.Readdir(c, in, l) })
	for _, e := range entries {
		if e.Name != grafted {
			out.Add(e.Ino, e.Off, e.Type, []byte(e.Name))
		}
	}
	return errno
}

const grafted = ".grafted"

// synced is an in-memory tree that has something to say to FLUSH and FSYNC, as the suite wants it of who answers them.
type synced struct{ *mem.FS }

func (b synced) check(c *fsbackend.Context, node, fh uint64) Errno {
	in := fuseproto.GetattrIn{Flags_: fuseproto.FUSE_GETATTR_FH, Fh_: fh}
	in.NodeId = node
	return b.Getattr(c, &in, new(fuseproto.AttrOut))
}

func (b synced) Flush(c *fsbackend.Context, in *fuseproto.FlushIn) Errno {
	return b.check(c, in.NodeId, in.Fh)
}

func (b synced) Fsync(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	return b.check(c, in.NodeId, in.Fh)
}

func (b synced) Fsyncdir(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	return b.check(c, in.NodeId, in.Fh)
}

var _ fsbackend.Divided = (*Share)(nil)

func TestConformance(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	run := func(name string, locks bool, newBackend func(t *testing.T) fsbackend.Backend) {
		t.Run(name, func(t *testing.T) {
			fsbackendtest.Run(t, fsbackendtest.Config{New: newBackend, AsRoot: os.Getuid() == 0, SparseBlock: 4096, NoLocks: !locks})
		})
	}
	run("root", false, func(t *testing.T) fsbackend.Backend {
		return newShare(t, Graft{Path: "/", Backend: newMem(t)})
	})
	run("root with grafts", true, func(t *testing.T) fsbackend.Backend {
		return quiet{newShare(t, Graft{Path: "/", Backend: newPassthrough(t, t.TempDir())},
			Graft{Path: "/" + grafted + "/a/b", Backend: newMem(t)}, Graft{Path: "/" + grafted + "/mem", Backend: newMem(t)})}
	})
	run("graft", false, func(t *testing.T) fsbackend.Backend {
		return below{newShare(t, Graft{Path: "/", Backend: newPassthrough(t, t.TempDir())}, Graft{Path: "/sub", Backend: synced{newMem(t)}}), 1 << indexShift}
	})
	run("passthrough graft with another below", true, func(t *testing.T) fsbackend.Backend {
		return below{newShare(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/sub", Backend: newPassthrough(t, t.TempDir())},
			Graft{Path: "/sub/" + grafted + "/mem", Backend: newMem(t)}), 1 << indexShift}
	})
	dynamic := func(t *testing.T, grafts ...Graft) *Share {
		s, err := New(Config{Grafts: grafts, Dynamic: true})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	run("dynamic root", true, func(t *testing.T) fsbackend.Backend {
		return dynamic(t, Graft{Path: "/", Backend: newPassthrough(t, t.TempDir())})
	})
	run("dynamic graft", false, func(t *testing.T) fsbackend.Backend {
		return below{dynamic(t, Graft{Path: "/sub", Backend: synced{newMem(t)}}), 1 << indexShift}
	})
	run("dynamic graft with a quota", true, func(t *testing.T) fsbackend.Backend {
		return below{dynamic(t, Graft{Path: "/sub", Backend: newPassthrough(t, t.TempDir()), Policy: Policy{MaxBytes: 1 << 40, MaxInodes: 1 << 30}}), 1 << indexShift}
	})
}

package passthrough

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

var (
	_ fsbackend.Backend        = (*FS)(nil)
	_ fsbackend.Initer         = (*FS)(nil)
	_ fsbackend.Wanter         = (*FS)(nil)
	_ fsbackend.Readlinker     = (*FS)(nil)
	_ fsbackend.Maker          = (*FS)(nil)
	_ fsbackend.Linker         = (*FS)(nil)
	_ fsbackend.Remover        = (*FS)(nil)
	_ fsbackend.Renamer        = (*FS)(nil)
	_ fsbackend.Setattrer      = (*FS)(nil)
	_ fsbackend.Opener         = (*FS)(nil)
	_ fsbackend.Creater        = (*FS)(nil)
	_ fsbackend.Tmpfiler       = (*FS)(nil)
	_ fsbackend.Reader         = (*FS)(nil)
	_ fsbackend.Writer         = (*FS)(nil)
	_ fsbackend.Flusher        = (*FS)(nil)
	_ fsbackend.Fsyncer        = (*FS)(nil)
	_ fsbackend.Syncfser       = (*FS)(nil)
	_ fsbackend.DirReader      = (*FS)(nil)
	_ fsbackend.DirPlusReader  = (*FS)(nil)
	_ fsbackend.StatFSer       = (*FS)(nil)
	_ fsbackend.XattrReader    = (*FS)(nil)
	_ fsbackend.XattrWriter    = (*FS)(nil)
	_ fsbackend.Accesser       = (*FS)(nil)
	_ fsbackend.Fallocater     = (*FS)(nil)
	_ fsbackend.Lseeker        = (*FS)(nil)
	_ fsbackend.CopyFileRanger = (*FS)(nil)
	_ fsbackend.Statxer        = (*FS)(nil)
	_ fsbackend.Ioctler        = (*FS)(nil)
	_ fsbackend.Locker         = (*FS)(nil)
)

// guest calls a backend as a guest's kernel does, a thread of it each.
type guest struct {
	testing.TB
	fs  *FS
	dir string // the share on the host
	ctx fsbackend.Context
}

const sessionFlags = fuseproto.FUSE_SUBMOUNTS | fuseproto.FUSE_HANDLE_KILLPRIV_V2 | fuseproto.FUSE_CREATE_SUPP_GROUP | fuseproto.FUSE_SETXATTR_EXT

// newGuest serves cfg.Dir, a new directory if empty, until the test ends.
func newGuest(t testing.TB, cfg Config) *guest {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = t.TempDir()
	}
	fs, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fs.Close(); err != nil {
			t.Error(err)
		}
	})
	fs.Init(fsbackend.Features{Minor: 45, Flags: sessionFlags})
	return &guest{TB: t, fs: fs, dir: cfg.Dir, ctx: fsbackend.Context{MayBlock: true}}
}

// as returns a guest process with these ids.
func (g *guest) as(uid, gid uint32, groups ...uint32) *guest {
	other := *g
	other.ctx.Caller.Uid, other.ctx.Caller.Gid = uid, gid
	other.ctx.SuppGroups = groups
	return &other
}

func (g *guest) path(name string) string { return filepath.Join(g.dir, name) }

// write makes a file on the host.
func (g *guest) write(name, data string) {
	g.Helper()
	if err := os.WriteFile(g.path(name), []byte(data), 0o644); err != nil {
		g.Fatal(err)
	}
}

// ok ends the test where a call that has to succeed does not.
func (g *guest) ok(what string, e fsbackend.Errno) {
	g.Helper()
	if e != fsbackend.OK {
		g.Fatalf("%s: %v (%d)", what, e, int(e))
	}
}

// fails ends the test where a call does not fail as expected.
func (g *guest) fails(what string, got, want fsbackend.Errno) {
	g.Helper()
	if got != want {
		g.Fatalf("%s: got %v (%d), expected %v", what, got, int(got), want)
	}
}

func (g *guest) tryLookup(parent uint64, name string) (fuseproto.EntryOut, fsbackend.Errno) {
	var out fuseproto.EntryOut
	e := g.fs.Lookup(&g.ctx, parent, fsbackend.MakeName(name), &out)
	return out, e
}

// lookup walks a path from the root.
func (g *guest) lookup(path string) fuseproto.EntryOut {
	g.Helper()
	entry := fuseproto.EntryOut{NodeId: rootID}
	for name := range strings.SplitSeq(path, "/") {
		out, e := g.tryLookup(entry.NodeId, name)
		g.ok("LOOKUP "+path, e)
		entry = out
	}
	return entry
}

func (g *guest) getattr(node uint64) (fuseproto.Attr, fsbackend.Errno) {
	var in fuseproto.GetattrIn
	in.NodeId = node
	var out fuseproto.AttrOut
	e := g.fs.Getattr(&g.ctx, &in, &out)
	return out.Attr, e
}

func (g *guest) tryOpen(node uint64, flags uint32) (uint64, fsbackend.Errno) {
	var in fuseproto.OpenIn
	in.NodeId, in.Flags = node, flags
	var out fuseproto.OpenOut
	e := g.fs.Open(&g.ctx, &in, &out)
	return out.Fh, e
}

func (g *guest) open(node uint64, flags uint32) uint64 {
	g.Helper()
	fh, e := g.tryOpen(node, flags)
	g.ok("OPEN", e)
	return fh
}

func (g *guest) release(node, fh uint64) {
	var in fuseproto.ReleaseIn
	in.NodeId, in.Fh = node, fh
	g.fs.Release(&g.ctx, &in)
}

func sinkOf(b []byte) *fsbackend.Sink {
	s := new(fsbackend.Sink)
	s.Reset([]unix.Iovec{sys.MakeIovec(b)}, 0, uint64(len(b)))
	return s
}

func (g *guest) tryRead(node, fh, off uint64, size int) (string, fsbackend.Errno) {
	buf := make([]byte, size)
	var in fuseproto.ReadIn
	in.NodeId, in.Fh, in.Offset, in.Size = node, fh, off, uint32(size)
	dst := sinkOf(buf)
	e := g.fs.Read(&g.ctx, &in, dst)
	return string(buf[:dst.Written()]), e
}

func (g *guest) read(node, fh uint64) string {
	g.Helper()
	data, e := g.tryRead(node, fh, 0, 1<<16)
	g.ok("READ", e)
	return data
}

// put writes data with the given open(2) and FUSE_WRITE_* flags.
func (g *guest) put(node, fh, off uint64, data string, flags, writeFlags uint32) (uint32, fsbackend.Errno) {
	b := []byte(data)
	var src fsbackend.Source
	src.Reset([]unix.Iovec{sys.MakeIovec(b)}, 0, uint64(len(b)))
	var in fuseproto.WriteIn
	in.NodeId, in.Fh, in.Offset, in.Size, in.Flags, in.WriteFlags = node, fh, off, uint32(len(b)), flags, writeFlags
	return g.fs.Write(&g.ctx, &in, &src)
}

func (g *guest) tryCreate(parent uint64, name string, flags, mode uint32) (fuseproto.CreateOut, fsbackend.Errno) {
	var in fuseproto.CreateIn
	in.NodeId, in.Flags, in.Mode = parent, flags, mode
	var out fuseproto.CreateOut
	e := g.fs.Create(&g.ctx, &in, fsbackend.MakeName(name), &out)
	return out, e
}

func (g *guest) create(parent uint64, name string) fuseproto.CreateOut {
	g.Helper()
	out, e := g.tryCreate(parent, name, unix.O_RDWR|unix.O_EXCL, 0o644)
	g.ok("CREATE "+name, e)
	return out
}

func (g *guest) mkdir(parent uint64, name string) fuseproto.EntryOut {
	g.Helper()
	out, e := g.tryMkdir(parent, name, 0o755)
	g.ok("MKDIR "+name, e)
	return out
}

func (g *guest) tryMkdir(parent uint64, name string, mode uint32) (fuseproto.EntryOut, fsbackend.Errno) {
	var in fuseproto.MkdirIn
	in.NodeId, in.Mode = parent, mode
	var out fuseproto.EntryOut
	e := g.fs.Mkdir(&g.ctx, &in, fsbackend.MakeName(name), &out)
	return out, e
}

func (g *guest) tryMknod(parent uint64, name string, mode, rdev uint32) (fuseproto.EntryOut, fsbackend.Errno) {
	var in fuseproto.MknodIn
	in.NodeId, in.Mode, in.Rdev = parent, mode, rdev
	var out fuseproto.EntryOut
	e := g.fs.Mknod(&g.ctx, &in, fsbackend.MakeName(name), &out)
	return out, e
}

func (g *guest) symlink(parent uint64, name, target string) (fuseproto.EntryOut, fsbackend.Errno) {
	var out fuseproto.EntryOut
	e := g.fs.Symlink(&g.ctx, parent, fsbackend.MakeName(name), fsbackend.MakeName(target), &out)
	return out, e
}

func (g *guest) link(node, parent uint64, name string) (fuseproto.EntryOut, fsbackend.Errno) {
	var in fuseproto.LinkIn
	in.NodeId, in.Oldnodeid = parent, node
	var out fuseproto.EntryOut
	e := g.fs.Link(&g.ctx, &in, fsbackend.MakeName(name), &out)
	return out, e
}

func (g *guest) unlink(parent uint64, name string) fsbackend.Errno {
	return g.fs.Unlink(&g.ctx, parent, fsbackend.MakeName(name))
}

func (g *guest) rename(parent uint64, name string, newParent uint64, newName string, flags uint32) fsbackend.Errno {
	var in fuseproto.Rename2In
	in.NodeId, in.Newdir, in.Flags = parent, newParent, flags
	return g.fs.Rename(&g.ctx, &in, fsbackend.MakeName(name), fsbackend.MakeName(newName))
}

func (g *guest) setattr(node uint64, change func(in *fuseproto.SetattrIn)) (fuseproto.Attr, fsbackend.Errno) {
	var in fuseproto.SetattrIn
	in.NodeId = node
	change(&in)
	var out fuseproto.AttrOut
	e := g.fs.Setattr(&g.ctx, &in, &out)
	return out.Attr, e
}

func (g *guest) opendir(node uint64) uint64 {
	g.Helper()
	var in fuseproto.OpenIn
	in.NodeId = node
	var out fuseproto.OpenOut
	g.ok("OPENDIR", g.fs.Opendir(&g.ctx, &in, &out))
	return out.Fh
}

func (g *guest) releasedir(node, fh uint64) {
	var in fuseproto.ReleaseIn
	in.NodeId, in.Fh = node, fh
	g.fs.Releasedir(&g.ctx, &in)
}

type dirent struct {
	name  string
	ino   uint64
	off   uint64
	typ   uint32
	entry fuseproto.EntryOut
}

// readdirAt makes one READDIR or READDIRPLUS request with room for size bytes.
func (g *guest) readdirAt(node, fh, off uint64, plus bool, size int) ([]dirent, fsbackend.Errno) {
	buf := make([]byte, size)
	out := fsbackend.DirList{Plus: plus}
	out.Reset([]unix.Iovec{sys.MakeIovec(buf)}, 0, uint64(size))
	var in fuseproto.ReadIn
	in.NodeId, in.Fh, in.Offset, in.Size = node, fh, off, uint32(size)
	var e fsbackend.Errno
	if plus {
		e = g.fs.Readdirplus(&g.ctx, &in, &out)
	} else {
		e = g.fs.Readdir(&g.ctx, &in, &out)
	}
	return parseDirents(buf[:out.Written()], plus), e
}

// readdir lists a directory in requests of size bytes.
func (g *guest) readdir(node uint64, plus bool, size int) []dirent {
	g.Helper()
	fh := g.opendir(node)
	defer g.releasedir(node, fh)
	var all []dirent
	off := uint64(0)
	for {
		list, e := g.readdirAt(node, fh, off, plus, size)
		g.ok("READDIR", e)
		if len(list) == 0 {
			return all
		}
		all = append(all, list...)
		off = list[len(list)-1].off
	}
}

// fastDir is a directory in memory where there is one: making many files on a disk would take most of a test's time.
func fastDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "sluice-test")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// inodeFDs counts the process's O_PATH descriptors below dir. The FS's root is one.
func inodeFDs(t testing.TB, dir string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, entry := range entries {
		target, err := os.Readlink("/proc/self/fd/" + entry.Name())
		if errors.Is(err, os.ErrNotExist) || target != dir && !strings.HasPrefix(target, dir+"/") {
			continue
		}
		info, err := os.ReadFile("/proc/self/fdinfo/" + entry.Name())
		if err != nil {
			continue
		}
		_, flags, _ := strings.Cut(string(info), "flags:\t")
		flags, _, _ = strings.Cut(flags, "\n")
		if bits, err := strconv.ParseUint(flags, 8, 64); err == nil && bits&unix.O_PATH != 0 {
			n++
		}
	}
	return n
}

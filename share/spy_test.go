package share

import (
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// What a spy hands out.
const (
	spyNode = 7
	spyFh   = 9
	spyUID  = 1000
	spyGID  = 2000
)

// owner is who a file belongs to.
type owner struct{ Uid, Gid uint32 }

// asked is what a spy was asked.
type asked struct {
	call   string
	nodes  []uint64
	fhs    []uint64
	caller fuseproto.Caller // in the Context
	header fuseproto.Caller // in the In struct, the Context's where there is none
	groups []uint32
	owner  owner // SETATTR's
}

// spy implements every interface of fsbackend, and writes down what it is asked.
type spy struct {
	mu    sync.Mutex
	log   []asked
	errno Errno  // what every call answers
	node  uint64 // what LOOKUP and its like find, 0: spyNode
	fh    uint64 // likewise
	mode  uint32 // likewise
	slow  bool
	quiet bool // write nothing down
	want  func(uint64) uint64
	hook  func(call string)

	features fsbackend.Features
}

func (b *spy) note(call string, c *fsbackend.Context, h *fuseproto.InHeader, nodes []uint64, fhs ...uint64) Errno {
	a := asked{call: call, nodes: nodes, fhs: fhs}
	if c != nil {
		a.caller, a.header, a.groups = c.Caller, c.Caller, slices.Clone(c.SuppGroups)
	}
	if h != nil {
		a.header = h.Caller
	}
	b.mu.Lock()
	b.log = append(b.log, a)
	errno, hook := b.errno, b.hook
	b.mu.Unlock()
	if hook != nil {
		hook(call)
	}
	return errno
}

// taken returns what was asked and forgets it.
func (b *spy) taken() []asked {
	b.mu.Lock()
	defer b.mu.Unlock()
	log := b.log
	b.log = nil
	return log
}

func (b *spy) attr(a *fuseproto.Attr) {
	a.Ino, a.Size, a.Mode, a.Nlink, a.Uid, a.Gid = spyNode, 16, unix.S_IFREG|0o644, 1, spyUID, spyGID
	if b.mode != 0 {
		a.Mode = b.mode
	}
}

func (b *spy) entry(e *fuseproto.EntryOut) {
	e.NodeId = spyNode
	if b.node != 0 {
		e.NodeId = b.node
	}
	b.attr(&e.Attr)
}

func (b *spy) handle(fh *uint64) {
	*fh = spyFh
	if b.fh != 0 {
		*fh = b.fh
	}
}

func one(node uint64) []uint64 { return []uint64{node} }

func (b *spy) Lookup(c *fsbackend.Context, parent uint64, _ fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	if b.quiet {
		return fsbackend.OK
	}
	return b.note("Lookup", c, nil, one(parent))
}

func (b *spy) Forget(node, n uint64) { b.note("Forget", nil, nil, []uint64{node, n}) }

func (b *spy) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	b.attr(&out.Attr)
	if b.quiet {
		return fsbackend.OK
	}
	return b.note("Getattr", c, &in.InHeader, one(in.NodeId), in.Fh_)
}

func (b *spy) Reset() { b.note("Reset", nil, nil, nil) }

func (b *spy) Close() error {
	b.note("Close", nil, nil, nil)
	return nil
}

func (b *spy) Init(f fsbackend.Features) {
	b.mu.Lock()
	b.features = f
	b.mu.Unlock()
	b.note("Init", nil, nil, nil)
}

func (b *spy) WantFlags(defaults uint64) uint64 {
	if b.want == nil {
		return defaults
	}
	return b.want(defaults)
}

func (b *spy) Slow() bool { return b.slow }

func (b *spy) Readlink(c *fsbackend.Context, node uint64, _ *fsbackend.Sink) Errno {
	return b.note("Readlink", c, nil, one(node))
}

func (b *spy) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, _ fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	return b.note("Mknod", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, _ fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	return b.note("Mkdir", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Symlink(c *fsbackend.Context, parent uint64, _, _ fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	return b.note("Symlink", c, nil, one(parent))
}

func (b *spy) Link(c *fsbackend.Context, in *fuseproto.LinkIn, _ fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	return b.note("Link", c, &in.InHeader, []uint64{in.NodeId, in.Oldnodeid})
}

func (b *spy) Unlink(c *fsbackend.Context, parent uint64, _ fsbackend.Name) Errno {
	return b.note("Unlink", c, nil, one(parent))
}

func (b *spy) Rmdir(c *fsbackend.Context, parent uint64, _ fsbackend.Name) Errno {
	return b.note("Rmdir", c, nil, one(parent))
}

func (b *spy) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, _, _ fsbackend.Name) Errno {
	return b.note("Rename", c, &in.InHeader, []uint64{in.NodeId, in.Newdir})
}

func (b *spy) Setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) Errno {
	b.attr(&out.Attr)
	errno := b.note("Setattr", c, &in.InHeader, one(in.NodeId), in.Fh)
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.log); n > 0 {
		b.log[n-1].owner = owner(in.Owner)
	}
	return errno
}

func (b *spy) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	b.handle(&out.Fh)
	return b.note("Open", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Release(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	b.note("Release", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Create(c *fsbackend.Context, in *fuseproto.CreateIn, _ fsbackend.Name, out *fuseproto.CreateOut) Errno {
	b.entry(&out.EntryOut)
	b.handle(&out.Fh)
	return b.note("Create", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) Errno {
	b.entry(&out.EntryOut)
	b.handle(&out.Fh)
	return b.note("Tmpfile", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Read(c *fsbackend.Context, in *fuseproto.ReadIn, _ *fsbackend.Sink) Errno {
	if b.quiet {
		return fsbackend.OK
	}
	return b.note("Read", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Write(c *fsbackend.Context, in *fuseproto.WriteIn, _ *fsbackend.Source) (uint32, Errno) {
	if b.quiet {
		return 0, fsbackend.OK
	}
	return 0, b.note("Write", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Flush(c *fsbackend.Context, in *fuseproto.FlushIn) Errno {
	return b.note("Flush", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Fsync(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	return b.note("Fsync", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Fsyncdir(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	return b.note("Fsyncdir", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Syncfs(c *fsbackend.Context, node uint64) Errno {
	return b.note("Syncfs", c, nil, one(node))
}

func (b *spy) Opendir(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	b.handle(&out.Fh)
	return b.note("Opendir", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	if in.Offset == 0 {
		out.Add(spyNode, 1, unix.DT_REG, []byte("entry"))
	}
	return b.note("Readdir", c, &in.InHeader, one(in.NodeId), in.Fh)
}

var spyEntry = []byte("entry")

func (b *spy) Readdirplus(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	var e fuseproto.EntryOut
	b.entry(&e)
	out.AddPlus(&e, spyNode, 1, unix.DT_REG, spyEntry)
	if b.quiet {
		return fsbackend.OK
	}
	return b.note("Readdirplus", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Releasedir(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	b.note("Releasedir", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Statfs(c *fsbackend.Context, node uint64, _ *fuseproto.StatfsOut) Errno {
	return b.note("Statfs", c, nil, one(node))
}

func (b *spy) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, _ fsbackend.Name, _ *fsbackend.Sink) (uint32, Errno) {
	return 0, b.note("Getxattr", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Listxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, _ *fsbackend.Sink) (uint32, Errno) {
	return 0, b.note("Listxattr", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, _ fsbackend.Name, _ []byte) Errno {
	return b.note("Setxattr", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Removexattr(c *fsbackend.Context, node uint64, _ fsbackend.Name) Errno {
	return b.note("Removexattr", c, nil, one(node))
}

func (b *spy) Access(c *fsbackend.Context, in *fuseproto.AccessIn) Errno {
	return b.note("Access", c, &in.InHeader, one(in.NodeId))
}

func (b *spy) Fallocate(c *fsbackend.Context, in *fuseproto.FallocateIn) Errno {
	return b.note("Fallocate", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Lseek(c *fsbackend.Context, in *fuseproto.LseekIn, _ *fuseproto.LseekOut) Errno {
	return b.note("Lseek", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) CopyFileRange(c *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, Errno) {
	return 0, b.note("CopyFileRange", c, &in.InHeader, []uint64{in.NodeId, in.NodeIdOut}, in.FhIn, in.FhOut)
}

func (b *spy) Statx(c *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) Errno {
	out.Ino, out.Uid, out.Gid = spyNode, spyUID, spyGID
	return b.note("Statx", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Ioctl(c *fsbackend.Context, in *fuseproto.IoctlIn, _ []byte, _ *fsbackend.Sink) (int32, Errno) {
	return 0, b.note("Ioctl", c, &in.InHeader, one(in.NodeId), in.Fh)
}

// bare is a backend without any optional interface.
type bare struct{ fsbackend.Backend }

func (b *spy) Getlk(c *fsbackend.Context, in *fuseproto.LkIn, _ *fuseproto.LkOut) Errno {
	return b.note("Getlk", c, &in.InHeader, one(in.NodeId), in.Fh)
}

func (b *spy) Setlk(c *fsbackend.Context, in *fuseproto.LkIn) Errno {
	return b.note("Setlk", c, &in.InHeader, one(in.NodeId), in.Fh)
}

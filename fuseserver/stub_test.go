package fuseserver

import (
	"fmt"
	"sync"
	"syscall"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// stub implements every interface of fsbackend. It answers with fixed values and writes down what it was asked.
type stub struct {
	quiet bool                                  // write nothing down
	errno Errno                                 // what every call answers
	hook  func(op string, c *fsbackend.Context) // runs in every call
	want  func(uint64) uint64                   // WantFlags
	slow  bool
	setlk func() Errno // what Setlk answers

	mu    sync.Mutex
	calls []string

	readData []byte // what READ finds at offset 0
	nodeid   uint64 // what LOOKUP and its like find
	written  []byte // what WRITE got
	take     int    // WRITE takes no more than this, if not 0
	features fsbackend.Features
}

func newStub() *stub {
	return &stub{nodeid: 7, readData: []byte("data of the file")}
}

func (b *stub) note(c *fsbackend.Context, op string, args ...any) Errno {
	if !b.quiet {
		b.mu.Lock()
		s := op
		for _, a := range args {
			s += fmt.Sprint(" ", a)
		}
		b.calls = append(b.calls, s)
		b.mu.Unlock()
	}
	if b.hook != nil {
		b.hook(op, c)
	}
	return b.errno
}

// taken returns what was written down and forgets it.
func (b *stub) taken() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	calls := b.calls
	b.calls = nil
	return calls
}

func (b *stub) entry(e *fuseproto.EntryOut) {
	e.NodeId, e.Generation = b.nodeid, 1
	b.attr(&e.Attr)
}

func (b *stub) attr(a *fuseproto.Attr) {
	a.Ino, a.Size, a.Mode, a.Nlink = 7, 16, syscall.S_IFREG|0o644, 1
}

func (b *stub) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	if b.quiet {
		return b.errno
	}
	return b.note(c, "Lookup", parent, name)
}

func (b *stub) Forget(node, n uint64) {
	if !b.quiet {
		b.note(nil, "Forget", node, n)
	}
}

func (b *stub) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	b.attr(&out.Attr)
	if b.quiet {
		return b.errno
	}
	return b.note(c, "Getattr", in.NodeId, in.Flags(), in.Fh())
}

func (b *stub) Reset()       { b.note(nil, "Reset") }
func (b *stub) Close() error { b.note(nil, "Close"); return nil }
func (b *stub) Slow() bool   { return b.slow }

func (b *stub) Init(f fsbackend.Features) {
	b.mu.Lock()
	b.features = f
	b.mu.Unlock()
	b.note(nil, "Init")
}

func (b *stub) WantFlags(defaults uint64) uint64 {
	if b.want == nil {
		return defaults
	}
	return b.want(defaults)
}

func (b *stub) Readlink(c *fsbackend.Context, node uint64, dst *fsbackend.Sink) Errno {
	dst.Write([]byte("a/target"))
	return b.note(c, "Readlink", node)
}

func (b *stub) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	return b.note(c, "Mknod", in.NodeId, name, in.Mode, in.Rdev, in.Umask)
}

func (b *stub) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	return b.note(c, "Mkdir", in.NodeId, name, in.Mode, in.Umask)
}

func (b *stub) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	return b.note(c, "Symlink", parent, name, target)
}

func (b *stub) Link(c *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	b.entry(out)
	return b.note(c, "Link", in.NodeId, name, in.Oldnodeid)
}

func (b *stub) Unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name) Errno {
	return b.note(c, "Unlink", parent, name)
}

func (b *stub) Rmdir(c *fsbackend.Context, parent uint64, name fsbackend.Name) Errno {
	return b.note(c, "Rmdir", parent, name)
}

func (b *stub) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) Errno {
	return b.note(c, "Rename", in.NodeId, oldName, in.Newdir, newName, in.Flags)
}

func (b *stub) Setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) Errno {
	b.attr(&out.Attr)
	return b.note(c, "Setattr", in.NodeId, in.Valid, in.Fh, in.Size, in.Mode, in.Uid, in.Gid)
}

func (b *stub) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	out.Fh = 9
	if b.quiet {
		return b.errno
	}
	return b.note(c, "Open", in.NodeId, in.Flags, in.Mode)
}

func (b *stub) Release(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	if !b.quiet {
		b.note(c, "Release", in.NodeId, in.Fh, in.Flags, in.ReleaseFlags, in.LockOwner)
	}
}

func (b *stub) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) Errno {
	b.entry(&out.EntryOut)
	out.Fh = 9
	return b.note(c, "Create", in.NodeId, name, in.Flags, in.Mode, in.Umask, in.OpenFlags)
}

func (b *stub) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) Errno {
	b.entry(&out.EntryOut)
	out.Fh = 9
	return b.note(c, "Tmpfile", in.NodeId, in.Flags, in.Mode, in.Umask, in.OpenFlags)
}

func (b *stub) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) Errno {
	if in.Offset < uint64(len(b.readData)) {
		dst.Write(b.readData[in.Offset:])
	}
	if b.quiet {
		return b.errno
	}
	return b.note(c, "Read", in.NodeId, in.Fh, in.Offset, in.Size, in.Flags)
}

func (b *stub) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, Errno) {
	if b.quiet {
		return uint32(src.Len()), b.errno
	}
	n := src.Len()
	if b.take > 0 {
		n = min(n, b.take)
	}
	p := make([]byte, n)
	n = src.Read(p)
	b.written = append(b.written, p[:n]...)
	return uint32(n), b.note(c, "Write", in.NodeId, in.Fh, in.Offset, in.Size, in.WriteFlags, in.Flags)
}

func (b *stub) Flush(c *fsbackend.Context, in *fuseproto.FlushIn) Errno {
	return b.note(c, "Flush", in.NodeId, in.Fh, in.LockOwner)
}

func (b *stub) Fsync(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	return b.note(c, "Fsync", in.NodeId, in.Fh, in.FsyncFlags)
}

func (b *stub) Fsyncdir(c *fsbackend.Context, in *fuseproto.FsyncIn) Errno {
	return b.note(c, "Fsyncdir", in.NodeId, in.Fh, in.FsyncFlags)
}

func (b *stub) Syncfs(c *fsbackend.Context, node uint64) Errno {
	return b.note(c, "Syncfs", node)
}

func (b *stub) Opendir(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	out.Fh = 9
	return b.note(c, "Opendir", in.NodeId, in.Flags)
}

var (
	stubName  = []byte("an entry")
	stubEntry = fuseproto.EntryOut{NodeId: 7, Generation: 1}
)

func (b *stub) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	out.Add(7, in.Offset+1, syscall.DT_REG, stubName)
	if b.quiet {
		return b.errno
	}
	return b.note(c, "Readdir", in.NodeId, in.Fh, in.Offset, in.Size)
}

func (b *stub) Readdirplus(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) Errno {
	out.AddPlus(&stubEntry, 7, in.Offset+1, syscall.DT_REG, stubName)
	if b.quiet {
		return b.errno
	}
	return b.note(c, "Readdirplus", in.NodeId, in.Fh, in.Offset, in.Size)
}

func (b *stub) Releasedir(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	b.note(c, "Releasedir", in.NodeId, in.Fh)
}

func (b *stub) Statfs(c *fsbackend.Context, node uint64, out *fuseproto.StatfsOut) Errno {
	out.Blocks, out.Bsize = 100, 4096
	if b.quiet {
		return b.errno
	}
	return b.note(c, "Statfs", node)
}

func (b *stub) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, Errno) {
	if b.quiet {
		return 5, b.errno
	}
	errno := b.note(c, "Getxattr", in.NodeId, name, in.Size)
	if dst.Len() == 0 {
		return 5, errno
	}
	if dst.Len() < 5 {
		return 0, syscall.ERANGE
	}
	dst.Write([]byte("value"))
	return 5, errno
}

func (b *stub) Listxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, Errno) {
	errno := b.note(c, "Listxattr", in.NodeId, in.Size)
	if dst.Len() == 0 {
		return 7, errno
	}
	dst.Write([]byte("user.a\x00"))
	return 7, errno
}

func (b *stub) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) Errno {
	return b.note(c, "Setxattr", in.NodeId, name, in.Size, in.Flags, in.SetXAttrFlags, len(value))
}

func (b *stub) Removexattr(c *fsbackend.Context, node uint64, name fsbackend.Name) Errno {
	return b.note(c, "Removexattr", node, name)
}

func (b *stub) Access(c *fsbackend.Context, in *fuseproto.AccessIn) Errno {
	return b.note(c, "Access", in.NodeId, in.Mask)
}

func (b *stub) Fallocate(c *fsbackend.Context, in *fuseproto.FallocateIn) Errno {
	return b.note(c, "Fallocate", in.NodeId, in.Fh, in.Offset, in.Length, in.Mode)
}

func (b *stub) Lseek(c *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) Errno {
	out.Offset = in.Offset + 1
	return b.note(c, "Lseek", in.NodeId, in.Fh, in.Offset, in.Whence)
}

func (b *stub) CopyFileRange(c *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, Errno) {
	return in.Len, b.note(c, "CopyFileRange", in.NodeId, in.FhIn, in.OffIn, in.NodeIdOut, in.FhOut, in.OffOut, in.Len)
}

func (b *stub) Statx(c *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) Errno {
	out.Mask, out.Ino = in.SxMask, 7
	return b.note(c, "Statx", in.NodeId, in.GetattrFlags, in.Fh, in.SxFlags, in.SxMask)
}

func (b *stub) Ioctl(c *fsbackend.Context, in *fuseproto.IoctlIn, arg []byte, dst *fsbackend.Sink) (int32, Errno) {
	dst.Write([]byte("result"))
	return 3, b.note(c, "Ioctl", in.NodeId, in.Fh, in.Cmd, string(arg), in.OutSize)
}

func (b *stub) Getlk(c *fsbackend.Context, in *fuseproto.LkIn, out *fuseproto.LkOut) Errno {
	out.Lk = fuseproto.FileLock{Start: 5, End: 6, Typ: syscall.F_WRLCK, Pid: 42}
	return b.note(c, "Getlk", in.NodeId, in.Fh, in.Owner, in.Lk.Start, in.Lk.End, in.Lk.Typ, in.LkFlags)
}

func (b *stub) Setlk(c *fsbackend.Context, in *fuseproto.LkIn) Errno {
	errno := b.note(c, "Setlk", in.NodeId, in.Fh, in.Owner, in.Lk.Start, in.Lk.End, in.Lk.Typ, in.LkFlags)
	if b.setlk != nil && in.Lk.Typ == syscall.F_WRLCK {
		return b.setlk()
	}
	return errno
}

// bare is a backend that can do nothing beyond Backend.
type bare struct{ fsbackend.Backend }

package fsbackend

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// Wrapper is a backend around another one, most of whose calls it passes on. Of the optional interfaces it has those that the
// other one has, whatever methods it has itself: Resolve leaves the others out.
type Wrapper interface {
	Wraps() *Resolved
}

// Forward passes every call on to Inner. A backend that changes what a few calls do embeds it and has those methods itself:
//
//	type upper struct{ fsbackend.Forward }
//
//	func (u *upper) Lookup(…) fsbackend.Errno { … u.Inner.Lookup(…) … }
//
// Without it the wrapper would have to repeat each of the optional interfaces, or lose it. What Inner lacks answers as if it was
// not there: ENOSYS, or what the interface says; only who calls Forward without Resolve gets to see that.
type Forward struct {
	Inner *Resolved
}

// Wraps implements Wrapper.
func (f Forward) Wraps() *Resolved { return f.Inner }

// Lookup implements Backend.
func (f Forward) Lookup(c *Context, parent uint64, name Name, out *fuseproto.EntryOut) Errno {
	return f.Inner.Lookup(c, parent, name, out)
}

// Forget implements Backend.
func (f Forward) Forget(node, n uint64) { f.Inner.Forget(node, n) }

// Getattr implements Backend.
func (f Forward) Getattr(c *Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	return f.Inner.Getattr(c, in, out)
}

// Reset implements Backend.
func (f Forward) Reset() { f.Inner.Reset() }

// Close implements Backend: Inner is the wrapper's.
func (f Forward) Close() error { return f.Inner.Close() }

// Init implements Initer.
func (f Forward) Init(features Features) {
	if f.Inner.Initer != nil {
		f.Inner.Init(features)
	}
}

// WantFlags implements Wanter.
func (f Forward) WantFlags(defaults uint64) uint64 {
	if f.Inner.Wanter == nil {
		return defaults
	}
	return f.Inner.WantFlags(defaults)
}

// Slow says whether every call may sleep, as the interface Slow.
func (f Forward) Slow() bool { return f.Inner.Slow }

// Readlink implements Readlinker.
func (f Forward) Readlink(c *Context, node uint64, dst *Sink) Errno {
	if f.Inner.Readlinker == nil {
		return unix.ENOSYS
	}
	return f.Inner.Readlink(c, node, dst)
}

// Mknod implements Maker.
func (f Forward) Mknod(c *Context, in *fuseproto.MknodIn, name Name, out *fuseproto.EntryOut) Errno {
	if f.Inner.Maker == nil {
		return unix.ENOSYS
	}
	return f.Inner.Mknod(c, in, name, out)
}

// Mkdir implements Maker.
func (f Forward) Mkdir(c *Context, in *fuseproto.MkdirIn, name Name, out *fuseproto.EntryOut) Errno {
	if f.Inner.Maker == nil {
		return unix.ENOSYS
	}
	return f.Inner.Mkdir(c, in, name, out)
}

// Symlink implements Maker.
func (f Forward) Symlink(c *Context, parent uint64, name, target Name, out *fuseproto.EntryOut) Errno {
	if f.Inner.Maker == nil {
		return unix.ENOSYS
	}
	return f.Inner.Symlink(c, parent, name, target, out)
}

// Link implements Linker.
func (f Forward) Link(c *Context, in *fuseproto.LinkIn, name Name, out *fuseproto.EntryOut) Errno {
	if f.Inner.Linker == nil {
		return unix.ENOSYS
	}
	return f.Inner.Link(c, in, name, out)
}

// Unlink implements Remover.
func (f Forward) Unlink(c *Context, parent uint64, name Name) Errno {
	if f.Inner.Remover == nil {
		return unix.ENOSYS
	}
	return f.Inner.Unlink(c, parent, name)
}

// Rmdir implements Remover.
func (f Forward) Rmdir(c *Context, parent uint64, name Name) Errno {
	if f.Inner.Remover == nil {
		return unix.ENOSYS
	}
	return f.Inner.Rmdir(c, parent, name)
}

// Rename implements Renamer.
func (f Forward) Rename(c *Context, in *fuseproto.Rename2In, oldName, newName Name) Errno {
	if f.Inner.Renamer == nil {
		return unix.ENOSYS
	}
	return f.Inner.Rename(c, in, oldName, newName)
}

// Setattr implements Setattrer.
func (f Forward) Setattr(c *Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) Errno {
	if f.Inner.Setattrer == nil {
		return unix.ENOSYS
	}
	return f.Inner.Setattr(c, in, out)
}

// Open implements Opener: where Inner is stateless, the handle is 0.
func (f Forward) Open(c *Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	if f.Inner.Opener == nil {
		return OK
	}
	return f.Inner.Open(c, in, out)
}

// Release implements Opener.
func (f Forward) Release(c *Context, in *fuseproto.ReleaseIn) {
	if f.Inner.Opener != nil {
		f.Inner.Release(c, in)
	}
}

// Create implements Creater.
func (f Forward) Create(c *Context, in *fuseproto.CreateIn, name Name, out *fuseproto.CreateOut) Errno {
	if f.Inner.Creater == nil {
		return unix.ENOSYS
	}
	return f.Inner.Create(c, in, name, out)
}

// Tmpfile implements Tmpfiler.
func (f Forward) Tmpfile(c *Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) Errno {
	if f.Inner.Tmpfiler == nil {
		return unix.ENOSYS
	}
	return f.Inner.Tmpfile(c, in, out)
}

// Read implements Reader.
func (f Forward) Read(c *Context, in *fuseproto.ReadIn, dst *Sink) Errno {
	if f.Inner.Reader == nil {
		return unix.ENOSYS
	}
	return f.Inner.Read(c, in, dst)
}

// Write implements Writer.
func (f Forward) Write(c *Context, in *fuseproto.WriteIn, src *Source) (uint32, Errno) {
	if f.Inner.Writer == nil {
		return 0, unix.ENOSYS
	}
	return f.Inner.Write(c, in, src)
}

// Flush implements Flusher.
func (f Forward) Flush(c *Context, in *fuseproto.FlushIn) Errno {
	if f.Inner.Flusher == nil {
		return unix.ENOSYS
	}
	return f.Inner.Flush(c, in)
}

// Fsync implements Fsyncer.
func (f Forward) Fsync(c *Context, in *fuseproto.FsyncIn) Errno {
	if f.Inner.Fsyncer == nil {
		return unix.ENOSYS
	}
	return f.Inner.Fsync(c, in)
}

// Fsyncdir implements Fsyncer.
func (f Forward) Fsyncdir(c *Context, in *fuseproto.FsyncIn) Errno {
	if f.Inner.Fsyncer == nil {
		return unix.ENOSYS
	}
	return f.Inner.Fsyncdir(c, in)
}

// Syncfs implements Syncfser.
func (f Forward) Syncfs(c *Context, node uint64) Errno {
	if f.Inner.Syncfser == nil {
		return unix.ENOSYS
	}
	return f.Inner.Syncfs(c, node)
}

// Opendir implements DirReader.
func (f Forward) Opendir(c *Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	if f.Inner.DirReader == nil {
		return unix.ENOSYS
	}
	return f.Inner.Opendir(c, in, out)
}

// Readdir implements DirReader.
func (f Forward) Readdir(c *Context, in *fuseproto.ReadIn, out *DirList) Errno {
	if f.Inner.DirReader == nil {
		return unix.ENOSYS
	}
	return f.Inner.Readdir(c, in, out)
}

// Releasedir implements DirReader.
func (f Forward) Releasedir(c *Context, in *fuseproto.ReleaseIn) {
	if f.Inner.DirReader != nil {
		f.Inner.Releasedir(c, in)
	}
}

// Readdirplus implements DirPlusReader.
func (f Forward) Readdirplus(c *Context, in *fuseproto.ReadIn, out *DirList) Errno {
	if f.Inner.DirPlusReader == nil {
		return unix.ENOSYS
	}
	return f.Inner.Readdirplus(c, in, out)
}

// Statfs implements StatFSer: without one, the file system has no blocks.
func (f Forward) Statfs(c *Context, node uint64, out *fuseproto.StatfsOut) Errno {
	if f.Inner.StatFSer == nil {
		*out = fuseproto.StatfsOut{Bsize: 4096, Frsize: 4096, NameLen: unix.NAME_MAX}
		return OK
	}
	return f.Inner.Statfs(c, node, out)
}

// Getxattr implements XattrReader.
func (f Forward) Getxattr(c *Context, in *fuseproto.GetxattrIn, name Name, dst *Sink) (uint32, Errno) {
	if f.Inner.XattrReader == nil {
		return 0, unix.ENOSYS
	}
	return f.Inner.Getxattr(c, in, name, dst)
}

// Listxattr implements XattrReader.
func (f Forward) Listxattr(c *Context, in *fuseproto.GetxattrIn, dst *Sink) (uint32, Errno) {
	if f.Inner.XattrReader == nil {
		return 0, unix.ENOSYS
	}
	return f.Inner.Listxattr(c, in, dst)
}

// Setxattr implements XattrWriter.
func (f Forward) Setxattr(c *Context, in *fuseproto.SetxattrIn, name Name, value []byte) Errno {
	if f.Inner.XattrWriter == nil {
		return unix.ENOSYS
	}
	return f.Inner.Setxattr(c, in, name, value)
}

// Removexattr implements XattrWriter.
func (f Forward) Removexattr(c *Context, node uint64, name Name) Errno {
	if f.Inner.XattrWriter == nil {
		return unix.ENOSYS
	}
	return f.Inner.Removexattr(c, node, name)
}

// Access implements Accesser.
func (f Forward) Access(c *Context, in *fuseproto.AccessIn) Errno {
	if f.Inner.Accesser == nil {
		return unix.ENOSYS
	}
	return f.Inner.Access(c, in)
}

// Fallocate implements Fallocater.
func (f Forward) Fallocate(c *Context, in *fuseproto.FallocateIn) Errno {
	if f.Inner.Fallocater == nil {
		return unix.ENOSYS
	}
	return f.Inner.Fallocate(c, in)
}

// Lseek implements Lseeker.
func (f Forward) Lseek(c *Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) Errno {
	if f.Inner.Lseeker == nil {
		return unix.ENOSYS
	}
	return f.Inner.Lseek(c, in, out)
}

// CopyFileRange implements CopyFileRanger.
func (f Forward) CopyFileRange(c *Context, in *fuseproto.CopyFileRangeIn) (uint64, Errno) {
	if f.Inner.CopyFileRanger == nil {
		return 0, unix.ENOSYS
	}
	return f.Inner.CopyFileRange(c, in)
}

// FileOf implements Filer.
func (f Forward) FileOf(node, fh uint64, use func(fd int) Errno) Errno {
	if f.Inner.Filer == nil {
		return unix.EOPNOTSUPP
	}
	return f.Inner.FileOf(node, fh, use)
}

// Statx implements Statxer.
func (f Forward) Statx(c *Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) Errno {
	if f.Inner.Statxer == nil {
		return unix.ENOSYS
	}
	return f.Inner.Statx(c, in, out)
}

// Ioctl implements Ioctler.
func (f Forward) Ioctl(c *Context, in *fuseproto.IoctlIn, arg []byte, dst *Sink) (int32, Errno) {
	if f.Inner.Ioctler == nil {
		return 0, unix.ENOSYS
	}
	return f.Inner.Ioctl(c, in, arg, dst)
}

// Getlk implements Locker.
func (f Forward) Getlk(c *Context, in *fuseproto.LkIn, out *fuseproto.LkOut) Errno {
	if f.Inner.Locker == nil {
		return unix.ENOSYS
	}
	return f.Inner.Getlk(c, in, out)
}

// Setlk implements Locker.
func (f Forward) Setlk(c *Context, in *fuseproto.LkIn) Errno {
	if f.Inner.Locker == nil {
		return unix.ENOSYS
	}
	return f.Inner.Setlk(c, in)
}

// Stats implements Statser.
func (f Forward) Stats() Stats {
	if f.Inner.Statser == nil {
		return Stats{}
	}
	return f.Inner.Stats()
}

// WorkNode returns the nodeid of a directory for what is on its way into the tree, if Inner has one; 0 if not.
func (f Forward) WorkNode() uint64 {
	if w, ok := f.Inner.Backend.(interface{ WorkNode() uint64 }); ok {
		return w.WorkNode()
	}
	return 0
}

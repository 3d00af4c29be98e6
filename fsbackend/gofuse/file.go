package gofuse

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// guestOpenFlags leaves out what needs /dev/fuse.
func guestOpenFlags(flags uint32) uint32 {
	return flags &^ fuse.FOPEN_PASSTHROUGH
}

// Open implements fsbackend.Opener.
func (b *Backend) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	return b.open("OPEN", c, in, out, b.fs.Open, false)
}

// Opendir implements fsbackend.DirReader.
func (b *Backend) Opendir(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	return b.open("OPENDIR", c, in, out, b.fs.OpenDir, true)
}

func (b *Backend) open(op string, c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut, call func(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status, dir bool) (errno fsbackend.Errno) {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	switch {
	case dir && n.typ != unix.S_IFDIR:
		return unix.ENOTDIR
	case !dir && n.typ == unix.S_IFDIR:
		return unix.EISDIR
	case !dir && n.typ != unix.S_IFREG:
		return unix.EBADF // a guest's kernel opens these itself, and a fifo would block
	}
	if errno := b.room(); errno != 0 {
		return errno
	}
	defer b.contain(op, &errno)
	req := *in
	req.InHeader = header(c, n)
	errno = errnoOf(call(c.Cancel, &req, out))
	if errno == unix.ENOSYS {
		// A stateless file system takes handle 0 in every request.
		*out, errno = fuseproto.OpenOut{}, fsbackend.OK
	}
	if errno != 0 {
		return errno
	}
	out.Fh = b.opened(n, out.Fh, dir)
	out.OpenFlags, out.BackingID = guestOpenFlags(out.OpenFlags), 0
	return fsbackend.OK
}

// Release implements fsbackend.Opener.
func (b *Backend) Release(_ *fsbackend.Context, in *fuseproto.ReleaseIn) { b.close(in, false) }

// Releasedir implements fsbackend.DirReader.
func (b *Backend) Releasedir(_ *fsbackend.Context, in *fuseproto.ReleaseIn) { b.close(in, true) }

// inFile makes a call that uses the handle fh.
func (b *Backend) inFile(op string, id, fh uint64, dir bool, call func(h *handle) fsbackend.Errno) (errno fsbackend.Errno) {
	h, errno := b.pinHandle(id, fh, dir)
	if errno != 0 {
		return errno
	}
	defer b.unpinHandle(h)
	defer b.contain(op, &errno)
	return call(h)
}

// seekable is a fuse.ReadResult whose data are in a file; off -1 is the file's own position.
type seekable interface {
	Seekable() (fd uintptr, off int64, size int)
}

// Read implements fsbackend.Reader.
func (b *Backend) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	return b.inFile("READ", in.NodeId, in.Fh, false, func(h *handle) fsbackend.Errno {
		if in.Offset > math.MaxInt64 {
			return unix.EINVAL
		}
		p := b.buffer(dst.Len())
		defer b.buffers.Put(p)
		req := *in
		req.InHeader, req.Fh, req.Size = header(c, h.node), h.raw, uint32(len(*p))
		result, status := b.fs.Read(c.Cancel, &req, *p)
		if result != nil {
			defer result.Done()
		}
		if errno := errnoOf(status); errno != 0 || result == nil {
			return errno
		}
		if r, ok := result.(seekable); ok {
			fd, off, size := r.Seekable()
			n, errno := dst.ReadFrom(int(fd), off, min(size, dst.Len()), 0)
			if n > 0 {
				return fsbackend.OK
			}
			return errno
		}
		data, status := result.Bytes(*p)
		if errno := errnoOf(status); errno != 0 {
			return errno
		}
		data = data[:min(len(data), dst.Len())]
		if dst.Write(data) < len(data) {
			return unix.EFAULT
		}
		return fsbackend.OK
	})
}

// grow says whether a file may grow to off+n bytes.
func (b *Backend) grow(off, n uint64) fsbackend.Errno {
	if off > b.maxSize || n > b.maxSize-off {
		return unix.EFBIG
	}
	return fsbackend.OK
}

// Write implements fsbackend.Writer.
func (b *Backend) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (n uint32, errno fsbackend.Errno) {
	errno = b.inFile("WRITE", in.NodeId, in.Fh, false, func(h *handle) fsbackend.Errno {
		if errno := b.grow(in.Offset, uint64(src.Len())); errno != 0 {
			return errno
		}
		p := b.buffer(src.Len())
		defer b.buffers.Put(p)
		if src.Read(*p) < len(*p) {
			return unix.EFAULT
		}
		req := *in
		req.InHeader, req.Fh, req.Size = header(c, h.node), h.raw, uint32(len(*p))
		written, status := b.fs.Writev(c.Cancel, &req, [][]byte{*p})
		if status == fuse.ENOSYS {
			written, status = b.fs.Write(c.Cancel, &req, *p)
		}
		n = min(written, uint32(len(*p)))
		return errnoOf(status)
	})
	if errno != 0 {
		return 0, errno
	}
	return n, fsbackend.OK
}

// Flush implements fsbackend.Flusher.
func (b *Backend) Flush(c *fsbackend.Context, in *fuseproto.FlushIn) fsbackend.Errno {
	return b.inFile("FLUSH", in.NodeId, in.Fh, false, func(h *handle) fsbackend.Errno {
		req := *in
		req.InHeader, req.Fh = header(c, h.node), h.raw
		return errnoOf(b.fs.Flush(c.Cancel, &req))
	})
}

// Fsync implements fsbackend.Fsyncer.
func (b *Backend) Fsync(c *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	return b.fsync("FSYNC", c, in, false, b.fs.Fsync)
}

// Fsyncdir implements fsbackend.Fsyncer.
func (b *Backend) Fsyncdir(c *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	return b.fsync("FSYNCDIR", c, in, true, b.fs.FsyncDir)
}

func (b *Backend) fsync(op string, c *fsbackend.Context, in *fuseproto.FsyncIn, dir bool, call func(<-chan struct{}, *fuse.FsyncIn) fuse.Status) fsbackend.Errno {
	return b.inFile(op, in.NodeId, in.Fh, dir, func(h *handle) fsbackend.Errno {
		req := *in
		req.InHeader, req.Fh = header(c, h.node), h.raw
		return errnoOf(call(c.Cancel, &req))
	})
}

// Fallocate implements fsbackend.Fallocater.
func (b *Backend) Fallocate(c *fsbackend.Context, in *fuseproto.FallocateIn) fsbackend.Errno {
	return b.inFile("FALLOCATE", in.NodeId, in.Fh, false, func(h *handle) fsbackend.Errno {
		if in.Length == 0 {
			return unix.EINVAL
		}
		if errno := b.grow(in.Offset, in.Length); errno != 0 {
			return errno
		}
		req := *in
		req.InHeader, req.Fh = header(c, h.node), h.raw
		return errnoOf(b.fs.Fallocate(c.Cancel, &req))
	})
}

// Lseek implements fsbackend.Lseeker.
func (b *Backend) Lseek(c *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) fsbackend.Errno {
	return b.inFile("LSEEK", in.NodeId, in.Fh, false, func(h *handle) fsbackend.Errno {
		switch {
		case in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE:
			return unix.EINVAL
		case in.Offset > math.MaxInt64:
			return unix.ENXIO
		}
		req := *in
		req.InHeader, req.Fh = header(c, h.node), h.raw
		return errnoOf(b.fs.Lseek(c.Cancel, &req, out))
	})
}

// CopyFileRange implements fsbackend.CopyFileRanger.
func (b *Backend) CopyFileRange(c *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (n uint64, errno fsbackend.Errno) {
	errno = b.inFile("COPY_FILE_RANGE", in.NodeId, in.FhIn, false, func(from *handle) fsbackend.Errno {
		to, errno := b.pinHandle(in.NodeIdOut, in.FhOut, false)
		if errno != 0 {
			return errno
		}
		defer b.unpinHandle(to)
		if in.OffIn > math.MaxInt64 || in.Len > math.MaxInt64-in.OffIn {
			return unix.EOVERFLOW
		}
		req := *in
		req.Len = min(in.Len, copyLimit) // go-fuse counts in 32 bits
		if errno := b.grow(in.OffOut, req.Len); errno != 0 {
			return errno
		}
		req.InHeader = header(c, from.node)
		req.FhIn, req.NodeIdOut, req.FhOut = from.raw, to.node.raw, to.raw
		copied, status := b.fs.CopyFileRange(c.Cancel, &req)
		n = min(uint64(copied), req.Len)
		return errnoOf(status)
	})
	if errno != 0 {
		return 0, errno
	}
	return n, fsbackend.OK
}

const copyLimit = 1 << 30

// FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR of include/uapi/linux/fs.h, which x/sys lacks.
const (
	fsIocFsgetxattr = 0x801c581f // struct fsxattr
	fsIocFssetxattr = 0x401c5820
)

// Ioctl implements fsbackend.Ioctler for the commands that a guest's kernel sends to read and change file attributes. Others
// are ENOTTY: a file system that hands them to the host would have the guest's word for what they read and write.
func (b *Backend) Ioctl(c *fsbackend.Context, in *fuseproto.IoctlIn, arg []byte, dst *fsbackend.Sink) (result int32, errno fsbackend.Errno) {
	t, errno := b.pinTarget(in.NodeId, in.Fh, true)
	if errno != 0 {
		return 0, errno
	}
	defer b.unpinTarget(t)
	defer b.contain("IOCTL", &errno)
	const sizeShift, sizeMask, write, read = 16, 1<<14 - 1, 1 << 30, 1 << 31 // include/uapi/asm-generic/ioctl.h
	switch in.Cmd {
	case unix.FS_IOC_GETFLAGS, unix.FS_IOC_SETFLAGS, fsIocFsgetxattr, fsIocFssetxattr:
	default:
		return 0, unix.ENOTTY
	}
	size := int(in.Cmd >> sizeShift & sizeMask)
	if in.Cmd&write != 0 && len(arg) < size || in.Cmd&read != 0 && dst.Len() < size {
		return 0, unix.EINVAL
	}
	var buf []byte
	if in.Cmd&read != 0 {
		buf = make([]byte, size)
	}
	req := *in
	req.InHeader, req.Fh, req.Arg = header(c, t.node), t.raw(), 0
	req.InSize, req.OutSize = uint32(len(arg)), uint32(len(buf))
	var out fuse.IoctlOut
	if errno := errnoOf(b.fs.Ioctl(c.Cancel, &req, arg, &out, buf)); errno != 0 {
		return 0, errno
	}
	if dst.Write(buf) < len(buf) {
		return 0, unix.EFAULT
	}
	return out.Result, fsbackend.OK
}

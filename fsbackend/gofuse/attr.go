package gofuse

import (
	"golang.org/x/sys/unix"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// target is the node of a request, and the handle if it has one.
type target struct {
	node   *node
	handle *handle
}

// raw returns the file system's handle, 0 if the request has none.
func (t *target) raw() uint64 {
	if t.handle == nil {
		return 0
	}
	return t.handle.raw
}

// pinTarget pins what a request that may have a handle is about.
func (b *Backend) pinTarget(id, fh uint64, hasHandle bool) (target, fsbackend.Errno) {
	if !hasHandle {
		n, errno := b.pin(id)
		return target{node: n}, errno
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.handles[fh]
	if h == nil || h.node.id != id {
		return target{}, unix.EBADF
	}
	h.pins++
	return target{h.node, h}, fsbackend.OK
}

func (b *Backend) unpinTarget(t target) {
	if t.handle != nil {
		b.unpinHandle(t.handle)
	} else {
		b.unpin(t.node)
	}
}

// Getattr implements fsbackend.Backend.
func (b *Backend) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) (errno fsbackend.Errno) {
	t, errno := b.pinTarget(in.NodeId, in.Fh(), in.Flags()&fuseproto.FUSE_GETATTR_FH != 0)
	if errno != 0 {
		return errno
	}
	defer b.unpinTarget(t)
	defer b.contain("GETATTR", &errno)
	return b.getattr(c, t, out)
}

func (b *Backend) getattr(c *fsbackend.Context, t target, out *fuseproto.AttrOut) fsbackend.Errno {
	req := &fuse.GetAttrIn{InHeader: header(c, t.node), Fh_: t.raw()}
	if t.handle != nil {
		req.Flags_ = fuse.FUSE_GETATTR_FH
	}
	if errno := errnoOf(b.fs.GetAttr(c.Cancel, req, out)); errno != 0 {
		return errno
	}
	t.node.complete(&out.Attr)
	return fsbackend.OK
}

// Setattr implements fsbackend.Setattrer.
func (b *Backend) Setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) (errno fsbackend.Errno) {
	t, errno := b.pinTarget(in.NodeId, in.Fh, in.Valid&fuseproto.FATTR_FH != 0)
	if errno != 0 {
		return errno
	}
	defer b.unpinTarget(t)
	switch {
	case in.Valid&fuseproto.FATTR_SIZE != 0 && t.node.typ == unix.S_IFDIR:
		return unix.EISDIR
	case in.Valid&fuseproto.FATTR_SIZE != 0 && t.node.typ != unix.S_IFREG:
		return unix.EINVAL
	case in.Valid&fuseproto.FATTR_SIZE != 0 && in.Size > b.maxSize:
		return unix.EFBIG
	case in.Valid&fuseproto.FATTR_MODE != 0 && t.node.typ == unix.S_IFLNK:
		return unix.EOPNOTSUPP // and the link is not to be followed
	}
	defer b.contain("SETATTR", &errno)
	req := *in
	req.InHeader, req.Fh = header(c, t.node), t.raw()
	if errno := errnoOf(b.fs.SetAttr(c.Cancel, &req, out)); errno != 0 {
		return errno
	}
	if out.Ino == 0 {
		return b.getattr(c, t, out)
	}
	t.node.complete(&out.Attr)
	return fsbackend.OK
}

// Statx implements fsbackend.Statxer.
func (b *Backend) Statx(c *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) (errno fsbackend.Errno) {
	t, errno := b.pinTarget(in.NodeId, in.Fh, in.GetattrFlags&fuseproto.FUSE_GETATTR_FH != 0)
	if errno != 0 {
		return errno
	}
	defer b.unpinTarget(t)
	defer b.contain("STATX", &errno)
	req := *in
	req.InHeader, req.Fh = header(c, t.node), t.raw()
	// go-fuse's loopback hands these to statx(2) as they are: a node is meant, never what a symbolic link points to.
	req.SxFlags = in.SxFlags&(unix.AT_STATX_FORCE_SYNC|unix.AT_STATX_DONT_SYNC) | unix.AT_SYMLINK_NOFOLLOW | unix.AT_EMPTY_PATH
	return errnoOf(b.fs.Statx(c.Cancel, &req, out))
}

// Statfs implements fsbackend.StatFSer.
func (b *Backend) Statfs(c *fsbackend.Context, id uint64, out *fuseproto.StatfsOut) (errno fsbackend.Errno) {
	n, errno := b.pin(id)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	defer b.contain("STATFS", &errno)
	h := header(c, n)
	return errnoOf(b.fs.StatFs(c.Cancel, &h, out))
}

// Access implements fsbackend.Accesser.
func (b *Backend) Access(c *fsbackend.Context, in *fuseproto.AccessIn) (errno fsbackend.Errno) {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	defer b.contain("ACCESS", &errno)
	req := *in
	req.InHeader = header(c, n)
	return errnoOf(b.fs.Access(c.Cancel, &req))
}

// xattrMax is Linux's XATTR_SIZE_MAX and XATTR_LIST_MAX (include/uapi/linux/limits.h).
const xattrMax = 65536

// Getxattr implements fsbackend.XattrReader.
func (b *Backend) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	return b.getxattr("GETXATTR", c, in, dst, func(h *fuse.InHeader, buf []byte) (uint32, fuse.Status) {
		return b.fs.GetXAttr(c.Cancel, h, name.String(), buf)
	})
}

// Listxattr implements fsbackend.XattrReader.
func (b *Backend) Listxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	return b.getxattr("LISTXATTR", c, in, dst, func(h *fuse.InHeader, buf []byte) (uint32, fuse.Status) {
		return b.fs.ListXAttr(c.Cancel, h, buf)
	})
}

func (b *Backend) getxattr(op string, c *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink, call func(*fuse.InHeader, []byte) (uint32, fuse.Status)) (size uint32, errno fsbackend.Errno) {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return 0, errno
	}
	defer b.unpin(n)
	defer b.contain(op, &errno)
	var buf []byte
	if in.Size > 0 {
		p := b.buffer(min(dst.Len(), xattrMax))
		defer b.buffers.Put(p)
		buf = *p
	}
	h := header(c, n)
	size, status := call(&h, buf)
	switch errno := errnoOf(status); {
	case in.Size == 0 && errno == unix.ERANGE: // the size is known nonetheless
		return size, fsbackend.OK
	case errno != 0:
		return 0, errno
	case in.Size == 0:
		return size, fsbackend.OK
	case int64(size) > int64(len(buf)):
		return 0, unix.ERANGE
	}
	if dst.Write(buf[:size]) < int(size) {
		return 0, unix.EFAULT
	}
	return size, fsbackend.OK
}

// Setxattr implements fsbackend.XattrWriter.
func (b *Backend) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) (errno fsbackend.Errno) {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	defer b.contain("SETXATTR", &errno)
	req := *in
	req.InHeader, req.Size = header(c, n), uint32(len(value))
	return errnoOf(b.fs.SetXAttr(c.Cancel, &req, name.String(), value))
}

// Removexattr implements fsbackend.XattrWriter.
func (b *Backend) Removexattr(c *fsbackend.Context, id uint64, name fsbackend.Name) (errno fsbackend.Errno) {
	n, errno := b.pin(id)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	defer b.contain("REMOVEXATTR", &errno)
	h := header(c, n)
	return errnoOf(b.fs.RemoveXAttr(c.Cancel, &h, name.String()))
}

package fusebridge

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const (
	xattrSizeMax = 65536 // XATTR_SIZE_MAX and XATTR_LIST_MAX, include/uapi/linux/limits.h
	// setxattrOldSize is how much of SetxattrIn is sent without FUSE_SETXATTR_EXT.
	setxattrOldSize = 8
)

// Getxattr implements fsbackend.XattrReader.
func (b *Bridge) Getxattr(ctx *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	return b.xattr(ctx, fuseproto.FUSE_GETXATTR, in, name, dst)
}

// Listxattr implements fsbackend.XattrReader.
func (b *Bridge) Listxattr(ctx *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	return b.xattr(ctx, fuseproto.FUSE_LISTXATTR, in, nil, dst)
}

func (b *Bridge) xattr(ctx *fsbackend.Context, op fuseproto.Opcode, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return 0, errno
	}
	defer b.unpin(n)
	r, errno := b.begin(ctx, op, n)
	if errno != 0 {
		return 0, errno
	}
	defer r.end()
	req := put(r, op, in)
	size := min(dst.Len(), xattrSizeMax)
	req.Size = uint32(size)
	if name != nil {
		r.name(name)
	}
	if size == 0 {
		if errno := r.call(ctx, sizeOf[fuseproto.GetxattrOut](), false); errno != 0 {
			return 0, errno
		}
		var out fuseproto.GetxattrOut
		decode(r.reply, &out)
		if out.Size > xattrSizeMax {
			return 0, unix.EIO
		}
		return out.Size, fsbackend.OK
	}
	if errno := r.call(ctx, size, true); errno != 0 {
		return 0, errno
	}
	if op == fuseproto.FUSE_LISTXATTR && len(r.reply) > 0 && r.reply[len(r.reply)-1] != 0 {
		return 0, unix.EIO // fs/fuse/xattr.c, fuse_verify_xattr_list
	}
	if dst.Write(r.reply) < len(r.reply) {
		return 0, unix.EFAULT
	}
	return uint32(len(r.reply)), fsbackend.OK
}

// Setxattr implements fsbackend.XattrWriter.
func (b *Bridge) Setxattr(ctx *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	n, errno := b.pin(in.NodeId)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	if len(value) > xattrSizeMax {
		return unix.E2BIG
	}
	r, errno := b.begin(ctx, fuseproto.FUSE_SETXATTR, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, fuseproto.FUSE_SETXATTR, in).Size = uint32(len(value))
	if r.c.flags&fuseproto.FUSE_SETXATTR_EXT == 0 {
		r.buf = r.buf[:inHeaderSize+setxattrOldSize]
	}
	r.name(name)
	r.buf = append(r.buf, value...)
	defer b.touch(n)
	return r.call(ctx, 0, false)
}

// Removexattr implements fsbackend.XattrWriter.
func (b *Bridge) Removexattr(ctx *fsbackend.Context, id uint64, name fsbackend.Name) fsbackend.Errno {
	n, errno := b.pin(id)
	if errno != 0 {
		return errno
	}
	defer b.unpin(n)
	r, errno := b.begin(ctx, fuseproto.FUSE_REMOVEXATTR, n)
	if errno != 0 {
		return errno
	}
	defer r.end()
	put(r, fuseproto.FUSE_REMOVEXATTR, &fuseproto.InHeader{})
	r.name(name)
	defer b.touch(n)
	return r.call(ctx, 0, false)
}

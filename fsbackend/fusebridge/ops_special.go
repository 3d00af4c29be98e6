package fusebridge

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Getlk implements fsbackend.Locker.
func (b *Bridge) Getlk(ctx *fsbackend.Context, in *fuseproto.LkIn, out *fuseproto.LkOut) fsbackend.Errno {
	r, done, errno := b.lock(ctx, fuseproto.FUSE_GETLK, in)
	if errno != 0 {
		return errno
	}
	defer done()
	if errno := r.call(ctx, sizeOf[fuseproto.LkOut](), false); errno != 0 {
		return errno
	}
	decode(r.reply, out)
	out.Lk.Pid = 0 // it would be one of the host, or what the program makes of it
	switch out.Lk.Typ {
	case unix.F_RDLCK, unix.F_WRLCK, unix.F_UNLCK:
		return fsbackend.OK
	}
	return unix.EIO
}

// Setlk implements fsbackend.Locker.
func (b *Bridge) Setlk(ctx *fsbackend.Context, in *fuseproto.LkIn) fsbackend.Errno {
	r, done, errno := b.lock(ctx, fuseproto.FUSE_SETLK, in)
	if errno != 0 {
		return errno
	}
	defer done()
	if b.lockers(in) > maxOwners {
		return unix.ENOLCK
	}
	if errno := r.call(ctx, 0, false); errno != 0 {
		return errno
	}
	if in.LkFlags&fuseproto.FUSE_LK_FLOCK == 0 && in.Lk.Typ != unix.F_UNLCK {
		b.mu.Lock()
		defer b.mu.Unlock()
		if h := b.handles[in.Fh]; h != nil {
			if h.owners == nil {
				h.owners = map[uint64]struct{}{}
				h.node.lockers = append(h.node.lockers, h)
			}
			h.owners[in.Owner] = struct{}{}
		}
	}
	return fsbackend.OK
}

// maxOwners is by how many owners there may be POSIX locks by way of one handle.
const maxOwners = 1024

// lockers is by how many owners there are locks by way of in's handle.
func (b *Bridge) lockers(in *fuseproto.LkIn) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.handles[in.Fh]
	if h == nil {
		return 0
	}
	return len(h.owners)
}

// locked says whether there may be POSIX locks of n.
func (b *Bridge) locked(n *node) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(n.lockers) > 0
}

// unlockOwner takes away what owner has locked of n, by way of whatever handle: a program need not do so on FLUSH, where it keeps
// locks by handle.
func (b *Bridge) unlockOwner(ctx *fsbackend.Context, n *node, owner uint64) {
	var locks []*handle
	b.mu.Lock()
	for _, h := range n.lockers {
		if _, ok := h.owners[owner]; ok {
			delete(h.owners, owner)
			h.pins++
			locks = append(locks, h)
		}
	}
	b.mu.Unlock()
	if len(locks) > 0 {
		ctx = begun(ctx)
	}
	for _, h := range locks {
		if r, fh, errno := b.use(ctx, fuseproto.FUSE_SETLK, h); errno == 0 {
			put(r, fuseproto.FUSE_SETLK, &fuseproto.LkIn{Fh: fh, Owner: owner, Lk: fuseproto.FileLock{End: math.MaxInt64, Typ: unix.F_UNLCK}})
			_ = r.call(ctx, 0, false)
			r.end()
		}
		b.unpinHandle(h)
	}
}

// lock begins a request about a lock. A lock of a handle of a program that has ended is gone.
func (b *Bridge) lock(ctx *fsbackend.Context, op fuseproto.Opcode, in *fuseproto.LkIn) (*request, func(), fsbackend.Errno) {
	h, errno := b.pinHandle(in.NodeId, in.Fh, false)
	if errno != 0 {
		return nil, nil, errno
	}
	r, fh, errno := b.use(ctx, op, h)
	if errno != 0 {
		b.unpinHandle(h)
		return nil, nil, errno
	}
	put(r, op, in).Fh = fh
	return r, func() {
		r.end()
		b.unpinHandle(h)
	}, fsbackend.OK
}

// FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR of include/uapi/linux/fs.h, which x/sys lacks.
const (
	fsIocFsgetxattr = 0x801c581f // struct fsxattr
	fsIocFssetxattr = 0x401c5820
)

// Ioctl implements fsbackend.Ioctler for the commands with which a guest's kernel reads and changes file attributes.
func (b *Bridge) Ioctl(ctx *fsbackend.Context, in *fuseproto.IoctlIn, arg []byte, dst *fsbackend.Sink) (int32, fsbackend.Errno) {
	const sizeShift, sizeMask, write, read = 16, 1<<14 - 1, 1 << 30, 1 << 31 // include/uapi/asm-generic/iocth
	switch in.Cmd {
	case unix.FS_IOC_GETFLAGS, unix.FS_IOC_SETFLAGS, fsIocFsgetxattr, fsIocFssetxattr:
	default:
		return 0, unix.ENOTTY
	}
	h, errno := b.pinAny(in.NodeId, in.Fh)
	if errno != 0 {
		return 0, errno
	}
	defer b.unpinHandle(h)
	size := int(in.Cmd >> sizeShift & sizeMask)
	if in.Cmd&write != 0 && len(arg) < size || in.Cmd&read != 0 && dst.Len() < size {
		return 0, unix.EINVAL
	}
	r, fh, errno := b.use(ctx, fuseproto.FUSE_IOCTL, h)
	if errno != 0 {
		return 0, errno
	}
	defer r.end()
	req := put(r, fuseproto.FUSE_IOCTL, in)
	req.Fh, req.Arg, req.InSize, req.OutSize = fh, 0, uint32(len(arg)), 0
	req.Flags &= fuseproto.FUSE_IOCTL_DIR
	if in.Cmd&read != 0 {
		req.OutSize = uint32(size)
	}
	r.buf = append(r.buf, arg...)
	fixed := sizeOf[fuseproto.IoctlOut]()
	if errno := r.call(ctx, fixed+int(req.OutSize), true); errno != 0 {
		if errno == unix.ENOSYS {
			errno = unix.ENOTTY
		}
		return 0, errno
	}
	var out fuseproto.IoctlOut
	if len(r.reply) < fixed {
		return 0, unix.EIO
	}
	decode(r.reply, &out)
	if in.Cmd&write != 0 {
		b.touch(h.node)
	}
	data := r.reply[fixed:]
	if dst.Write(data) < len(data) {
		return 0, unix.EFAULT
	}
	return out.Result, fsbackend.OK
}

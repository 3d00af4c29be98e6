package passthrough

import (
	"math"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// openFlags are the flags to open a file with on the host. O_APPEND is the WRITE request's business. With a write-back
// cache the guest reads to fill pages that it writes to, whatever its program asked for.
func (fs *FS) openFlags(guest uint32) int {
	pass := uint32(unix.O_ACCMODE | unix.O_TRUNC | unix.O_DIRECT | unix.O_SYNC | unix.O_DSYNC)
	if fs.cfg.PreserveNoatime {
		pass |= unix.O_NOATIME
	}
	flags := int(guest&pass) | unix.O_CLOEXEC
	if fs.has(fuseproto.FUSE_WRITEBACK_CACHE) && flags&unix.O_ACCMODE == unix.O_WRONLY {
		flags = flags&^unix.O_ACCMODE | unix.O_RDWR
	}
	return flags
}

// Open implements fsbackend.Opener.
func (fs *FS) Open(_ *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	if fs.withoutOpen(fuseproto.FUSE_NO_OPEN_SUPPORT) {
		return unix.ENOSYS
	}
	fh, errno := fs.openNode(in.NodeId, in.Flags, in.Mode)
	out.Fh = fh
	if in.Flags&unix.O_ACCMODE == unix.O_RDONLY && !fs.has(fuseproto.FUSE_POSIX_LOCKS) {
		// There is nothing of its own to flush, not even by way of a mapping.
		out.OpenFlags |= fuseproto.FOPEN_NOFLUSH
	}
	return errno
}

// openNode opens a regular file: nothing else is ever opened on the host, where opening may mean something.
func (fs *FS) openNode(node uint64, guestFlags, fuseFlags uint32) (uint64, errno) {
	flags := fs.openFlags(guestFlags)
	var fd int
	var errno errno
	if fuseFlags&fuseproto.FUSE_OPEN_KILL_SUIDGID != 0 && flags&unix.O_TRUNC != 0 {
		errno = withoutFsetid(func() syscall.Errno {
			var errno syscall.Errno
			fd, errno = fs.openFile(node, flags)
			return errno
		})
	} else {
		fd, errno = fs.openFile(node, flags)
	}
	if errno != 0 {
		return 0, limit(errno)
	}
	return fs.openHandle(node, fd, uint32(flags), false)
}

// openFile opens node's file: in one call where it has a descriptor or a file handle.
func (fs *FS) openFile(node uint64, flags int) (int, errno) {
	if fs.fixed(node) {
		return -1, unix.EISDIR
	}
	s, n := fs.nodes.lock(node)
	if n == nil || n.nlookup == 0 {
		s.mu.Unlock()
		return -1, unix.ESTALE
	}
	switch n.typ {
	case typeRegular:
	case typeDir:
		s.mu.Unlock()
		return -1, unix.EISDIR
	default:
		s.mu.Unlock()
		return -1, unix.EBADF
	}
	var r ref
	hot := fs.pinHot(n, &r)
	if !hot && n.handleLen == 0 {
		s.mu.Unlock()
		if errno := fs.resolve(node, &r); errno != 0 {
			return -1, errno
		}
		defer fs.put(&r)
		return sys.Reopen(fs.procfd.Int(), r.fd, flags)
	}
	again := n.opened
	n.opened = true
	var h sys.FileHandle
	_, slot, _ := splitID(node)
	s.handleOf(slot, n, &h)
	mount := n.mount
	s.mu.Unlock()
	if !hot {
		return fs.openByHandle(mount, &h, flags)
	}
	defer fs.put(&r)
	if again {
		if fd, errno := fs.openAgain(node, &r, &h, flags); errno != unix.ESTALE {
			return fd, errno
		}
	}
	return sys.Reopen(fs.procfd.Int(), r.fd, flags)
}

// openAgain opens the file behind r by its handle, which a local file system does in four fifths of the time that the way through
// /proc takes, once it is known. ESTALE is for where there is none, or it does not lead to the file any more.
func (fs *FS) openAgain(node uint64, r *ref, h *sys.FileHandle, flags int) (int, errno) {
	if !fs.mounts.at(r.mount).local.Load() || h.Bytes == 0 && !fs.takeHandle(node, r.fd, r.mount, r.typ, h) {
		return -1, unix.ESTALE
	}
	return fs.openByHandle(r.mount, h, flags)
}

// Release implements fsbackend.Opener.
func (fs *FS) Release(_ *fsbackend.Context, in *fuseproto.ReleaseIn) {
	fs.release(in)
}

func (fs *FS) release(in *fuseproto.ReleaseIn) {
	if h := fs.handles.get(in.Fh, in.NodeId); h != nil {
		fs.closeHandle(h)
		fs.handles.put(h)
		if fs.has(fuseproto.FUSE_POSIX_LOCKS) {
			fs.unlockHandle(in.NodeId, in.Fh)
		}
	}
}

// useHandle returns a file's handle; EBADF for a directory's.
func (fs *FS) useHandle(fh, node uint64) (*handle, errno) {
	h, errno := fs.use(fh, node)
	if errno != 0 {
		return nil, errno
	}
	if h.dir {
		fs.handles.put(h)
		return nil, unix.EBADF
	}
	return h, 0
}

// pageSize is the least that the kernel's page cache keeps of a file.
const pageSize = 4096

// Read implements fsbackend.Reader.
func (fs *FS) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	if in.Offset > math.MaxInt64 {
		return unix.EINVAL
	}
	h, errno := fs.useHandle(in.Fh, in.NodeId)
	if errno != 0 {
		return errno
	}
	defer fs.handles.put(h)
	var (
		fd   = int(h.fd)
		off  = int64(in.Offset)
		want = min(int(in.Size), dst.Len())
		done = 0
		// A file that knows RWF_NOWAIT is read through the page cache, where a short read inside a page is the file's end.
		cached = h.nowait.Load() == nowaitWorks
		nowait = !c.MayBlock && h.nowait.Load() != nowaitFails
	)
	for done < want {
		flags := 0
		if nowait {
			flags = unix.RWF_NOWAIT
		}
		n, errno := dst.ReadFrom(fd, off+int64(done), want-done, flags)
		done += n
		switch {
		case errno == 0:
			if nowait && !cached {
				h.nowait.Store(nowaitWorks)
				cached = true
			}
			if n == 0 || done == want || cached && (off+int64(done))%pageSize != 0 {
				return fsbackend.OK
			}
		case nowait && errno == unix.EOPNOTSUPP:
			h.nowait.Store(nowaitFails)
			nowait = false
		case nowait && errno == unix.EAGAIN:
			if done == 0 {
				return fsbackend.ErrMayBlock
			}
			nowait = false // what has been read cannot be taken back
		default:
			// Even after some data: a reply that is short of it would say that the file ends there.
			return errno
		}
	}
	return fsbackend.OK
}

// Write implements fsbackend.Writer.
func (fs *FS) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, fsbackend.Errno) {
	if in.Offset > math.MaxInt64 {
		return 0, unix.EINVAL
	}
	h, errno := fs.useHandle(in.Fh, in.NodeId)
	if errno != 0 {
		return 0, errno
	}
	defer fs.handles.put(h)
	if !c.MayBlock && h.flags&(unix.O_DIRECT|unix.O_DSYNC) != 0 {
		return 0, fsbackend.ErrMayBlock // O_SYNC has O_DSYNC's bit, too
	}
	flags := 0
	if in.Flags&unix.O_APPEND != 0 && in.WriteFlags&fuseproto.FUSE_WRITE_CACHE == 0 {
		flags = unix.RWF_APPEND
	}
	if in.WriteFlags&fuseproto.FUSE_WRITE_KILL_SUIDGID == 0 {
		return write(h, in, src, flags)
	}
	since := fs.privsOf(in.NodeId)
	if !since.set() {
		return write(h, in, src, flags)
	}
	var n uint32
	errno = withoutFsetid(func() (errno syscall.Errno) {
		n, errno = write(h, in, src, flags)
		return errno
	})
	if errno == 0 {
		fs.privsGone(in.NodeId, since)
	}
	return n, errno
}

func write(h *handle, in *fuseproto.WriteIn, src *fsbackend.Source, flags int) (uint32, errno) {
	want := src.Len()
	done := 0
	for done < want {
		n, errno := src.WriteTo(int(h.fd), int64(in.Offset)+int64(done), want-done, flags)
		done += n
		if errno != 0 && done == 0 {
			return 0, errno
		}
		if errno != 0 || n == 0 {
			break
		}
	}
	return uint32(done), 0
}

// Flush implements fsbackend.Flusher. It costs the guest a request for each close(2), so that it is answered ENOSYS, after
// which none is sent any more, unless the share lies on a file system that first learns at close(2) that what was written
// is lost: a network's, or another FUSE server's; or it ends POSIX locks.
func (fs *FS) Flush(_ *fsbackend.Context, in *fuseproto.FlushIn) fsbackend.Errno {
	if fs.withoutOpen(fuseproto.FUSE_NO_OPEN_SUPPORT) {
		return unix.ENOSYS // nothing is written
	}
	h, errno := fs.useHandle(in.Fh, in.NodeId)
	if errno != 0 {
		return errno
	}
	defer fs.handles.put(h)
	locks := fs.has(fuseproto.FUSE_POSIX_LOCKS)
	if locks {
		fs.unlockOwner(in.NodeId, in.LockOwner)
	}
	if !fs.remote && !locks {
		return unix.ENOSYS
	}
	if !fs.remote {
		return fsbackend.OK
	}
	fd, err := unix.FcntlInt(uintptr(h.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return limit(toErrno(err))
	}
	if err := unix.Close(fd); err != nil {
		return toErrno(err)
	}
	return fsbackend.OK
}

// remoteFS says whether a file system with this magic number (statfs(2)) may report a write's failure at close(2).
func remoteFS(magic int64) bool {
	switch magic {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC,
		unix.CEPH_SUPER_MAGIC, unix.V9FS_MAGIC, unix.AFS_SUPER_MAGIC, unix.AFS_FS_MAGIC, unix.CODA_SUPER_MAGIC,
		unix.NCP_SUPER_MAGIC, unix.OCFS2_SUPER_MAGIC:
		return true
	}
	return false
}

// ListsAll implements fsbackend.Complete: true of file systems that are known to list what they have. Others have directories that are in no
// listing (.zfs, .snapshot), make what is looked up (autofs), or are a program's.
func (fs *FS) ListsAll(node, fh uint64) bool {
	h, errno := fs.use(fh, node)
	if errno != 0 {
		return false
	}
	defer fs.handles.put(h)
	var sfs unix.Statfs_t
	if unix.Fstatfs(int(h.fd), &sfs) != nil {
		return false
	}
	switch int64(sfs.Type) {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.RAMFS_MAGIC,
		unix.OVERLAYFS_SUPER_MAGIC, unix.SQUASHFS_MAGIC, unix.EROFS_SUPER_MAGIC_V1:
		return true
	}
	return false
}

// Fsync implements fsbackend.Fsyncer.
func (fs *FS) Fsync(_ *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	return fs.fsync(in)
}

// Fsyncdir implements fsbackend.Fsyncer.
func (fs *FS) Fsyncdir(_ *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	return fs.fsync(in)
}

func (fs *FS) fsync(in *fuseproto.FsyncIn) errno {
	h, errno := fs.use(in.Fh, in.NodeId)
	if errno != 0 {
		return errno
	}
	defer fs.handles.put(h)
	var err error
	if in.FsyncFlags&fuseproto.FUSE_FSYNC_FDATASYNC != 0 {
		err = unix.Fdatasync(int(h.fd))
	} else {
		err = unix.Fsync(int(h.fd))
	}
	if err != nil {
		return toErrno(err)
	}
	return 0
}

// Syncfs implements fsbackend.Syncfser.
func (fs *FS) Syncfs(_ *fsbackend.Context, node uint64) fsbackend.Errno {
	var r ref
	if errno := fs.resolve(node, &r); errno != 0 {
		return errno
	}
	defer fs.put(&r)
	if r.typ != typeDir && r.typ != typeRegular {
		return unix.EBADF
	}
	fd, errno := sys.Reopen(fs.procfd.Int(), r.fd, unix.O_RDONLY|unix.O_CLOEXEC)
	if errno != 0 {
		return limit(errno)
	}
	err := unix.Syncfs(fd)
	_ = unix.Close(fd)
	if err != nil {
		return toErrno(err)
	}
	return fsbackend.OK
}

// Fallocate implements fsbackend.Fallocater.
func (fs *FS) Fallocate(_ *fsbackend.Context, in *fuseproto.FallocateIn) fsbackend.Errno {
	if in.Offset > math.MaxInt64 || in.Length > math.MaxInt64 {
		return unix.EINVAL
	}
	h, errno := fs.useHandle(in.Fh, in.NodeId)
	if errno != 0 {
		return errno
	}
	defer fs.handles.put(h)
	return sys.Fallocate(int(h.fd), in.Mode, int64(in.Offset), int64(in.Length))
}

// Lseek implements fsbackend.Lseeker. It moves the descriptor's own offset, which nothing else uses.
func (fs *FS) Lseek(_ *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) fsbackend.Errno {
	if in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return unix.EINVAL
	}
	if in.Offset > math.MaxInt64 {
		return unix.ENXIO
	}
	h, errno := fs.useHandle(in.Fh, in.NodeId)
	if errno != 0 {
		return errno
	}
	defer fs.handles.put(h)
	n, errno := sys.Lseek(int(h.fd), int64(in.Offset), int(in.Whence))
	if errno == 0 {
		out.Offset = uint64(n)
	}
	return errno
}

// CopyFileRange implements fsbackend.CopyFileRanger.
func (fs *FS) CopyFileRange(_ *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, fsbackend.Errno) {
	if in.OffIn > math.MaxInt64 || in.OffOut > math.MaxInt64 || in.Flags != 0 {
		return 0, unix.EINVAL
	}
	from, errno := fs.useHandle(in.FhIn, in.NodeId)
	if errno != 0 {
		return 0, errno
	}
	defer fs.handles.put(from)
	to, errno := fs.useHandle(in.FhOut, in.NodeIdOut)
	if errno != 0 {
		return 0, errno
	}
	defer fs.handles.put(to)
	n, errno := sys.CopyFileRange(int(from.fd), int64(in.OffIn), int(to.fd), int64(in.OffOut), in.Len, 0)
	if errno != 0 {
		return 0, errno
	}
	return uint64(n), 0
}

// FileOf implements fsbackend.Filer.
func (fs *FS) FileOf(node, fh uint64, use func(fd int) fsbackend.Errno) fsbackend.Errno {
	h, errno := fs.useHandle(fh, node)
	if errno != 0 {
		return errno
	}
	defer fs.handles.put(h)
	return use(int(h.fd))
}

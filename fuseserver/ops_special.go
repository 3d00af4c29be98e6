package fuseserver

import (
	"syscall"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func opSyncfs(s *Server, r *Request) Errno {
	if s.backend.Syncfser == nil {
		return syscall.ENOSYS
	}
	return s.backend.Syncfs(&r.ctx, r.header().NodeId)
}

// opIoctl passes restricted ioctls on; from ENOSYS the guest makes ENOTTY. On a read-only tree only those go that are
// declared to return something and take nothing.
func opIoctl(s *Server, r *Request) Errno {
	if s.backend.Ioctler == nil {
		return syscall.ENOSYS
	}
	in := in[fuseproto.IoctlIn](r)
	switch {
	case in.Flags&fuseproto.FUSE_IOCTL_UNRESTRICTED != 0:
		return syscall.ENOTTY // only CUSE's
	case s.cfg.ReadOnly && fsbackend.IoctlMayChange(in.Cmd):
		return syscall.EROFS
	case uint64(in.InSize) > uint64(len(r.tail)):
		s.malformed(r, syscall.EINVAL)
		return syscall.EINVAL
	case uint64(in.OutSize) > r.room():
		s.stats.NoRoom.Add(1)
		return errCounted
	}
	result, errno := s.backend.Ioctl(&r.ctx, in, r.tail[:in.InSize], r.dataSink(uint64(in.OutSize)))
	out[fuseproto.IoctlOut](r).Result = result
	return s.filled(r, errno)
}

// opInterrupt ignores INTERRUPT, which Linux does not send over virtio-fs (fs/fuse/virtio_fs.c, virtio_fs_send_interrupt).
func opInterrupt(*Server, *Request) Errno {
	return fsbackend.OK
}

package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// ioctl numbers of linux/fs.h. The direction and size in FS_IOC_GETFLAGS and SETFLAGS are those of a long, but the kernel
// moves an int.
const (
	fsIocGetflags   = unix.FS_IOC_GETFLAGS
	fsIocSetflags   = unix.FS_IOC_SETFLAGS
	fsIocFsgetxattr = 0x801c581f
	fsIocFssetxattr = 0x401c5820

	flagsSize   = 4  // int
	fsxattrSize = 28 // struct fsxattr
)

// Ioctl implements fsbackend.Ioctler: attributes of files as lsattr(1) and chattr(1) have them, and nothing else.
func (fs *FS) Ioctl(_ *fsbackend.Context, in *fuseproto.IoctlIn, arg []byte, dst *fsbackend.Sink) (int32, fsbackend.Errno) {
	size, set := 0, false
	switch in.Cmd {
	case fsIocGetflags:
		size = flagsSize
	case fsIocSetflags:
		size, set = flagsSize, true
	case fsIocFsgetxattr:
		size = fsxattrSize
	case fsIocFssetxattr:
		size, set = fsxattrSize, true
	default:
		return 0, unix.ENOTTY
	}
	h, errno := fs.use(in.Fh, in.NodeId)
	if errno != 0 {
		return 0, errno
	}
	defer fs.handles.put(h)
	buf := getBuffer()
	defer putBuffer(buf)
	b := buf[:fsxattrSize]
	clear(b)
	if set {
		if len(arg) < size {
			return 0, unix.EINVAL
		}
		copy(b, arg[:size])
	} else if dst.Len() < size {
		return 0, unix.EINVAL
	}
	if _, errno := sys.Ioctl(int(h.fd), in.Cmd, b); errno != 0 {
		return 0, errno
	}
	if !set {
		dst.Write(b[:size])
	}
	return 0, 0
}

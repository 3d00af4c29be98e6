package permshift

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Readlink implements fsbackend.Readlinker. The target of a link that a regular file stands for is what is in the file.
func (f *FS) Readlink(c *fsbackend.Context, node uint64, dst *fsbackend.Sink) fsbackend.Errno {
	errno := f.Forward.Readlink(c, node, dst)
	if errno != unix.EINVAL || !f.format.keepsTypes() {
		return errno
	}
	st, found, errno := f.value(c, node)
	switch {
	case errno != fsbackend.OK:
		return errno
	case !found || st.Mode&unix.S_IFMT != unix.S_IFLNK:
		return unix.EINVAL
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock // three calls cannot all be put off
	}
	var open fuseproto.OpenIn
	var opened fuseproto.OpenOut
	open.NodeId, open.Caller, open.Flags = node, c.Caller, unix.O_RDONLY
	if errno := f.Forward.Open(c, &open, &opened); errno != fsbackend.OK {
		return errno
	}
	var read fuseproto.ReadIn
	read.NodeId, read.Caller, read.Fh, read.Size = node, c.Caller, opened.Fh, uint32(dst.Len())
	errno = f.Forward.Read(c, &read, dst)
	var release fuseproto.ReleaseIn
	release.NodeId, release.Caller, release.Fh = node, c.Caller, opened.Fh
	f.Forward.Release(c, &release)
	if errno == fsbackend.OK && dst.Written() == 0 {
		return unix.EINVAL
	}
	return errno
}

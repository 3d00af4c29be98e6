package passthrough

import (
	"bytes"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

const (
	accessACL     = "system.posix_acl_access"
	defaultACLStr = "system.posix_acl_default"
)

var defaultACL = []byte(defaultACLStr + "\x00")

// hidden says whether an attribute is kept from the guest: without FUSE_POSIX_ACL its kernel would not honour ACLs.
func (fs *FS) hidden(name []byte) bool {
	if string(name) != accessACL && string(name) != defaultACLStr {
		return false
	}
	return !fs.has(fuseproto.FUSE_POSIX_ACL)
}

// Getxattr implements fsbackend.XattrReader.
func (fs *FS) Getxattr(_ *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	if fs.hidden(name) {
		return 0, unix.EOPNOTSUPP
	}
	var r ref
	if errno := fs.resolve(in.NodeId, &r); errno != 0 {
		return 0, errno
	}
	defer fs.put(&r)
	if in.Size == 0 {
		n, errno := fs.xattr.Get(r.fd, name.CString(), nil)
		return sizeOf(n, errno)
	}
	buf := getBuffer()
	defer putBuffer(buf)
	// The kernel clears as much memory as it is given room, whatever the value takes.
	n, errno := fs.xattr.Get(r.fd, name.CString(), buf[:min(uint64(in.Size), uint64(len(buf)))])
	return copyOut(dst, in.Size, buf, n, errno)
}

// Listxattr implements fsbackend.XattrReader.
func (fs *FS) Listxattr(_ *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	var r ref
	if errno := fs.resolve(in.NodeId, &r); errno != 0 {
		return 0, errno
	}
	defer fs.put(&r)
	buf := getBuffer()
	defer putBuffer(buf)
	n, errno := fs.xattr.List(r.fd, buf[:])
	if errno == 0 {
		n = fs.dropHidden(buf[:n])
	}
	if in.Size == 0 {
		return sizeOf(n, errno)
	}
	return copyOut(dst, in.Size, buf, n, errno)
}

// dropHidden takes the names that the guest is not to see out of a list and returns what is left of its length.
func (fs *FS) dropHidden(list []byte) int {
	kept := 0
	for len(list) > kept {
		rest := list[kept:]
		end := bytes.IndexByte(rest, 0)
		if end < 0 {
			break
		}
		if !fs.hidden(rest[:end]) {
			kept += end + 1
			continue
		}
		copy(rest, rest[end+1:])
		list = list[:len(list)-end-1]
	}
	return kept
}

func sizeOf(n int, e errno) (uint32, errno) {
	if e != 0 {
		return 0, e
	}
	return uint32(n), 0
}

func copyOut(dst *fsbackend.Sink, size uint32, buf *buffer, n int, e errno) (uint32, errno) {
	if e != 0 {
		return 0, e
	}
	if n > dst.Len() || uint64(n) > uint64(size) {
		return 0, unix.ERANGE
	}
	dst.Write(buf[:n])
	return uint32(n), 0
}

// Setxattr implements fsbackend.XattrWriter.
func (fs *FS) Setxattr(_ *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	if fs.hidden(name) {
		return unix.EOPNOTSUPP
	}
	var r ref
	if errno := fs.resolve(in.NodeId, &r); errno != 0 {
		return errno
	}
	defer fs.put(&r)
	if in.SetXAttrFlags&fuseproto.FUSE_SETXATTR_ACL_KILL_SGID != 0 && fs.has(fuseproto.FUSE_SETXATTR_EXT) && string(name) == accessACL {
		var st unix.Stat_t
		if errno := fs.stat(&r, in.NodeId, &st); errno != 0 {
			return errno
		}
		if st.Mode&unix.S_ISGID != 0 {
			if errno := sys.ChmodFD(fs.procfd.Int(), r.fd, st.Mode&permBits&^unix.S_ISGID); errno != 0 {
				return errno
			}
		}
	}
	return fs.xattr.Set(r.fd, name.CString(), value, in.Flags)
}

// Removexattr implements fsbackend.XattrWriter.
func (fs *FS) Removexattr(_ *fsbackend.Context, node uint64, name fsbackend.Name) fsbackend.Errno {
	if fs.hidden(name) {
		return unix.EOPNOTSUPP
	}
	var r ref
	if errno := fs.resolve(node, &r); errno != 0 {
		return errno
	}
	defer fs.put(&r)
	return fs.xattr.Remove(r.fd, name.CString())
}

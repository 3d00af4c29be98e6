package mem

import (
	"bytes"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Linux's limits (include/uapi/linux/limits.h): XATTR_SIZE_MAX and XATTR_LIST_MAX.
const (
	xattrSizeMax = 65536
	xattrListMax = 65536
)

func xattrCost(name string, value []byte) int64 {
	return entryCost + int64(len(name)+len(value))
}

// Getxattr implements fsbackend.XattrReader.
func (f *FS) Getxattr(_ *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	f.mu.RLock()
	n, errno := f.node(in.NodeId)
	var value []byte
	found := false
	if errno == 0 {
		value, found = n.xattrs[string(name)]
	}
	f.mu.RUnlock()
	if errno == 0 && !found {
		errno = unix.ENODATA
		if !xattrSpace(name) {
			errno = unix.EOPNOTSUPP
		}
	}
	if errno != 0 {
		return 0, errno
	}
	return putXattr(in, value, dst) // values are replaced, never changed
}

// Listxattr implements fsbackend.XattrReader.
func (f *FS) Listxattr(_ *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	f.mu.RLock()
	n, errno := f.node(in.NodeId)
	if errno != 0 {
		f.mu.RUnlock()
		return 0, errno
	}
	names := slices.Sorted(maps.Keys(n.xattrs))
	f.mu.RUnlock()
	var list []byte
	for _, name := range names {
		list = append(append(list, name...), 0)
	}
	return putXattr(in, list, dst)
}

func putXattr(in *fuseproto.GetxattrIn, value []byte, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	if in.Size == 0 {
		return uint32(len(value)), fsbackend.OK
	}
	if len(value) > dst.Len() {
		return 0, unix.ERANGE
	}
	if dst.Write(value) < len(value) {
		return 0, unix.EFAULT
	}
	return uint32(len(value)), fsbackend.OK
}

// xattrSpace says whether name is in a name space that the tree keeps: all of Linux's but system, whose ACLs would have to
// be acted on.
func xattrSpace(name fsbackend.Name) bool {
	space, _, ok := strings.Cut(string(name), ".")
	return ok && (space == "user" || space == "trusted" || space == "security")
}

// Setxattr implements fsbackend.XattrWriter.
func (f *FS) Setxattr(_ *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, errno := f.node(in.NodeId)
	if errno == 0 {
		errno = f.setXattr(n, name, value, in.Flags)
	}
	if errno == 0 {
		n.ctime = makeStamp(f.now())
	}
	return errno
}

// setXattr sets name to a copy of value. mu is held for writing.
func (f *FS) setXattr(n *node, name fsbackend.Name, value []byte, flags uint32) fsbackend.Errno {
	old, exists := n.xattrs[string(name)]
	switch {
	case !xattrSpace(name):
		return unix.EOPNOTSUPP
	case flags&^(unix.XATTR_CREATE|unix.XATTR_REPLACE) != 0:
		return unix.EINVAL
	case len(name) > unix.NAME_MAX:
		return unix.ERANGE
	case len(value) > xattrSizeMax:
		return unix.E2BIG
	case bytes.HasPrefix(name, []byte("user.")) && !n.is(unix.S_IFREG) && !n.is(unix.S_IFDIR):
		return unix.EPERM
	case exists && flags&unix.XATTR_CREATE != 0:
		return unix.EEXIST
	case !exists && flags&unix.XATTR_REPLACE != 0:
		return unix.ENODATA
	}
	cost := xattrCost(string(name), value)
	if exists {
		cost -= xattrCost(string(name), old)
	} else if n.xattrNames()+len(name)+1 > xattrListMax {
		return unix.ENOSPC
	}
	if !f.charge(cost) {
		return unix.ENOSPC
	}
	if n.xattrs == nil {
		n.xattrs = make(map[string][]byte)
	}
	n.xattrs[string(name)] = bytes.Clone(value)
	return fsbackend.OK
}

// xattrNames is the length of the list of names.
func (n *node) xattrNames() int {
	total := 0
	for name := range n.xattrs {
		total += len(name) + 1
	}
	return total
}

// Removexattr implements fsbackend.XattrWriter.
func (f *FS) Removexattr(_ *fsbackend.Context, id uint64, name fsbackend.Name) fsbackend.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, errno := f.node(id)
	if errno != 0 {
		return errno
	}
	value, ok := n.xattrs[string(name)]
	switch {
	case !xattrSpace(name):
		return unix.EOPNOTSUPP
	case !ok:
		return unix.ENODATA
	}
	f.refund(xattrCost(string(name), value))
	delete(n.xattrs, string(name))
	n.ctime = makeStamp(f.now())
	return fsbackend.OK
}

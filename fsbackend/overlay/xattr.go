package overlay

import (
	"bytes"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// refused says whether an attribute is not for the guest: marks, and access control lists where it has agreed on none.
func (fs *FS) refused(name []byte) bool {
	if string(name) == "system.posix_acl_access" || string(name) == "system.posix_acl_default" {
		return !fs.has(fuseproto.FUSE_POSIX_ACL)
	}
	return isMark(name)
}

// Getxattr implements fsbackend.XattrReader.
func (fs *FS) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	n, e := fs.node(in.NodeId)
	if e != 0 {
		return 0, e
	}
	r := n.top(fs)
	switch {
	case fs.refused(name), r.l.r.XattrReader == nil:
		return 0, unix.EOPNOTSUPP
	case !r.l.may(c):
		return 0, fsbackend.ErrMayBlock
	}
	in.NodeId = r.node
	size, e := r.l.r.Getxattr(c, in, name, dst)
	in.NodeId = n.id
	return size, e
}

// Listxattr implements fsbackend.XattrReader.
func (fs *FS) Listxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	n, e := fs.node(in.NodeId)
	if e != 0 {
		return 0, e
	}
	s := getScratch()
	defer s.put()
	r := n.top(fs)
	list, e := r.l.listxattr(c, r.node, s)
	if e != 0 {
		return 0, e
	}
	kept := 0
	for rest := list; ; {
		end := bytes.IndexByte(rest, 0)
		if end < 0 {
			break
		}
		if !fs.refused(rest[:end]) {
			kept += copy(list[kept:], rest[:end+1])
		}
		rest = rest[end+1:]
	}
	switch {
	case in.Size == 0:
		return uint32(kept), 0
	case kept > dst.Len():
		return 0, unix.ERANGE
	}
	dst.Write(list[:kept])
	return uint32(kept), 0
}

// Setxattr implements fsbackend.XattrWriter.
func (fs *FS) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	return fs.changeXattr(c, in.NodeId, name, func(w fsbackend.XattrWriter, upper uint64) errno {
		id := in.NodeId
		in.NodeId = upper
		e := w.Setxattr(c, in, name, value)
		in.NodeId = id
		return e
	})
}

// Removexattr implements fsbackend.XattrWriter.
func (fs *FS) Removexattr(c *fsbackend.Context, id uint64, name fsbackend.Name) fsbackend.Errno {
	if n, e := fs.node(id); e == 0 && fs.upper != nil && n.upper.Load() == 0 {
		// What is not there is not copied up to be removed.
		in := fuseproto.GetxattrIn{InHeader: header(id)}
		s := getScratch()
		_, e = fs.Getxattr(c, &in, name, s.into(1))
		s.put()
		if e != 0 {
			return e
		}
	}
	return fs.changeXattr(c, id, name, func(w fsbackend.XattrWriter, upper uint64) errno {
		return w.Removexattr(c, upper, name)
	})
}

func (fs *FS) changeXattr(c *fsbackend.Context, id uint64, name fsbackend.Name, change func(w fsbackend.XattrWriter, upper uint64) errno) errno {
	n, e := fs.node(id)
	switch {
	case e != 0:
		return e
	case fs.refused(name):
		return unix.EOPNOTSUPP
	}
	if e := fs.begin(c); e != 0 {
		return e
	}
	defer fs.end(c)
	if fs.upper.r.XattrWriter == nil {
		return unix.EOPNOTSUPP
	}
	if e := fs.copyUp(c, n, wholeFile); e != 0 {
		return e
	}
	return change(fs.upper.r.XattrWriter, n.upper.Load())
}

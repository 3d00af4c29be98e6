package share

import (
	"bytes"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// holdsIDs says whether the values of an extended attribute hold ids, which an id map would have to translate: access
// lists do, and are out of reach in such a part.
func (p *part) holdsIDs(name []byte) bool {
	return p.mapped && strings.HasPrefix(string(name), "system.posix_acl_")
}

// capability is the attribute that file capabilities are in.
const capability = "security.capability"

// Getxattr implements fsbackend.XattrReader.
func (s *Share) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, Errno) {
	p, errno := s.at(c, in.NodeId)
	if errno != fsbackend.OK {
		return 0, errno
	}
	defer p.done(c)
	switch {
	case p.XattrReader == nil:
		return 0, s.lacks(unix.EOPNOTSUPP)
	case p.holdsIDs(name):
		return 0, unix.EOPNOTSUPP
	case p.noSUID(p.policy.Load()) && string(name) == capability:
		return 0, unix.ENODATA
	}
	var v visit
	p.enter(c, &in.InHeader, &v)
	size, errno := p.Getxattr(c, in, name, dst)
	p.leave(c, &in.InHeader, &v)
	return size, s.known(errno, unix.EOPNOTSUPP)
}

// Listxattr implements fsbackend.XattrReader.
func (s *Share) Listxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, Errno) {
	p, errno := s.at(c, in.NodeId)
	if errno != fsbackend.OK {
		return 0, errno
	}
	defer p.done(c)
	if p.XattrReader == nil {
		return 0, s.lacks(unix.EOPNOTSUPP)
	}
	list := p.Listxattr
	if p.mapped || p.noSUID(p.policy.Load()) {
		list = p.listShown
	}
	var v visit
	p.enter(c, &in.InHeader, &v)
	size, errno := list(c, in, dst)
	p.leave(c, &in.InHeader, &v)
	return size, s.known(errno, unix.EOPNOTSUPP)
}

// nameList is room for the longest list there is (Linux include/uapi/linux/limits.h, XATTR_LIST_MAX).
type nameList struct {
	sink fsbackend.Sink
	iov  [1]unix.Iovec
	buf  [64 << 10]byte
}

var nameLists = sync.Pool{New: func() any { return new(nameList) }}

// listShown lists the attributes that can be read: see Getxattr.
func (p *part) listShown(c *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, Errno) {
	l := nameLists.Get().(*nameList)
	defer nameLists.Put(l)
	l.iov[0] = unix.Iovec{Base: &l.buf[0]}
	l.iov[0].SetLen(len(l.buf))
	l.sink.Reset(l.iov[:], 0, uint64(len(l.buf)))
	given := in.Size
	in.Size = uint32(len(l.buf))
	_, errno := p.Listxattr(c, in, &l.sink)
	in.Size = given
	if errno != fsbackend.OK {
		return 0, errno
	}
	noSUID := p.noSUID(p.policy.Load())
	shown := l.buf[:0]
	for rest := l.buf[:l.sink.Written()]; ; {
		name, behind, whole := bytes.Cut(rest, []byte{0})
		if !whole {
			break
		}
		if !p.holdsIDs(name) && !(noSUID && string(name) == capability) {
			shown = append(shown, rest[:len(name)+1]...)
		}
		rest = behind
	}
	if dst.Len() > 0 {
		if len(shown) > dst.Len() {
			return 0, unix.ERANGE
		}
		dst.Write(shown)
	}
	return uint32(len(shown)), fsbackend.OK
}

// Setxattr implements fsbackend.XattrWriter.
func (s *Share) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) Errno {
	p, errno := s.atToChange(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	switch {
	case p.XattrWriter == nil:
		return s.lacks(unix.EOPNOTSUPP)
	case p.holdsIDs(name):
		return unix.EOPNOTSUPP
	case p.noSUID(p.policy.Load()) && string(name) == capability:
		return unix.EPERM
	}
	r := s.replay.Load()
	kinds := ownAttrs | r.ownBefore(c, in.NodeId)
	var v visit
	p.enter(c, &in.InHeader, &v)
	errno = p.change(c, file{node: in.NodeId}, func(*fuseproto.Attr) int64 {
		return int64(len(name)+len(value)+2*blockSize-1) &^ (blockSize - 1)
	}, func() Errno { return p.Setxattr(c, in, name, value) })
	p.leave(c, &in.InHeader, &v)
	return r.ownChanged(c, in.NodeId, kinds, s.known(errno, unix.EOPNOTSUPP))
}

// Removexattr implements fsbackend.XattrWriter.
func (s *Share) Removexattr(c *fsbackend.Context, node uint64, name fsbackend.Name) Errno {
	p, errno := s.atToChange(c, node)
	if errno != fsbackend.OK {
		return errno
	}
	defer p.doneChange(c)
	switch {
	case p.XattrWriter == nil:
		return s.lacks(unix.EOPNOTSUPP)
	case p.holdsIDs(name):
		return unix.EOPNOTSUPP
	}
	r := s.replay.Load()
	kinds := ownAttrs | r.ownBefore(c, node)
	var v visit
	p.enterNode(c, &v)
	errno = p.change(c, file{node: node & numberMask}, nothing, func() Errno { return p.Removexattr(c, node&numberMask, name) })
	p.leaveNode(c, &v)
	return r.ownChanged(c, node, kinds, s.known(errno, unix.EOPNOTSUPP))
}

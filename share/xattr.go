package share

import (
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// holdsIDs says whether the values of an extended attribute hold ids, which an id map would have to translate: access
// lists do, and are out of reach in such a part.
func (p *part) holdsIDs(name fsbackend.Name) bool {
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
	var v visit
	p.enter(c, &in.InHeader, &v)
	size, errno := p.Listxattr(c, in, dst)
	p.leave(c, &in.InHeader, &v)
	return size, s.known(errno, unix.EOPNOTSUPP)
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

package fuseserver

import (
	"syscall"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func opGetxattr(s *Server, r *Request) Errno {
	if !s.cfg.Xattr || s.backend.XattrReader == nil {
		return syscall.ENOSYS
	}
	in := in[fuseproto.GetxattrIn](r)
	dst, errno := s.xattrSink(r, in)
	if errno != fsbackend.OK {
		return errno
	}
	size, errno := s.backend.Getxattr(&r.ctx, in, r.names[0], dst)
	return s.xattr(r, in, size, errno)
}

func opListxattr(s *Server, r *Request) Errno {
	if !s.cfg.Xattr || s.backend.XattrReader == nil {
		return syscall.ENOSYS
	}
	in := in[fuseproto.GetxattrIn](r)
	dst, errno := s.xattrSink(r, in)
	if errno != fsbackend.OK {
		return errno
	}
	size, errno := s.backend.Listxattr(&r.ctx, in, dst)
	return s.xattr(r, in, size, errno)
}

// xattrSink returns the room for a value. A request for its size alone (in.Size 0) gets a Sink without room, and then
// needs some for fuse_getxattr_out.
func (s *Server) xattrSink(r *Request, in *fuseproto.GetxattrIn) (*fsbackend.Sink, Errno) {
	least := uint64(getxattrOut)
	if in.Size > 0 {
		least = 1 // else the backend would take it for the other kind
	}
	if r.room() < least {
		s.stats.NoRoom.Add(1)
		return nil, errCounted
	}
	in.Size = uint32(min(uint64(in.Size), r.room()))
	if in.Size == 0 {
		return &r.nowhere, fsbackend.OK
	}
	return r.dataSink(uint64(in.Size)), fsbackend.OK
}

const getxattrOut = 8

// xattr completes a reply: the value is in place, its size alone goes there now.
func (s *Server) xattr(r *Request, in *fuseproto.GetxattrIn, size uint32, errno Errno) Errno {
	if in.Size > 0 {
		return s.filled(r, errno)
	}
	if errno == fsbackend.OK && r.dataSink(getxattrOut).Write(outBytes(&fuseproto.GetxattrOut{Size: size})) != getxattrOut {
		s.stats.Faults.Add(1)
		return errCounted
	}
	return errno
}

func opSetxattr(s *Server, r *Request) Errno {
	if !s.cfg.Xattr || s.backend.XattrWriter == nil {
		return syscall.ENOSYS
	}
	wire := in[fuseproto.SetxattrIn](r)
	in := &r.setxattr
	*in = fuseproto.SetxattrIn{InHeader: wire.InHeader, Size: wire.Size, Flags: wire.Flags}
	if r.inSize() > int(r.op.in) {
		in.SetXAttrFlags = wire.SetXAttrFlags
	}
	if in.Size > xattrSizeMax {
		return syscall.E2BIG
	}
	if int(in.Size) > len(r.tail) {
		s.malformed(r, syscall.EINVAL)
		return syscall.EINVAL
	}
	return s.backend.Setxattr(&r.ctx, in, r.names[0], r.tail[:in.Size])
}

func opRemovexattr(s *Server, r *Request) Errno {
	if !s.cfg.Xattr || s.backend.XattrWriter == nil {
		return syscall.ENOSYS
	}
	return s.backend.Removexattr(&r.ctx, r.header().NodeId, r.names[0])
}

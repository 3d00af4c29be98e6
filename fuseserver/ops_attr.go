package fuseserver

import (
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func opGetattr(s *Server, r *Request) Errno {
	o := out[fuseproto.AttrOut](r)
	errno := s.backend.Getattr(&r.ctx, in[fuseproto.GetattrIn](r), o)
	fsbackend.FillValid(&o.AttrValid, &o.AttrValidNsec, s.valid)
	return errno
}

func opSetattr(s *Server, r *Request) Errno {
	if s.backend.Setattrer == nil {
		return syscall.ENOSYS
	}
	o := out[fuseproto.AttrOut](r)
	errno := s.backend.Setattr(&r.ctx, in[fuseproto.SetattrIn](r), o)
	fsbackend.FillValid(&o.AttrValid, &o.AttrValidNsec, s.valid)
	return errno
}

func opStatx(s *Server, r *Request) Errno {
	if s.backend.Statxer == nil {
		return syscall.ENOSYS
	}
	o := out[fuseproto.StatxOut](r)
	errno := s.backend.Statx(&r.ctx, in[fuseproto.StatxIn](r), o)
	fsbackend.FillValid(&o.AttrValid, &o.AttrValidNsec, s.valid)
	return errno
}

func opAccess(s *Server, r *Request) Errno {
	in := in[fuseproto.AccessIn](r)
	if s.backend.Accesser == nil {
		return syscall.ENOSYS
	}
	if s.cfg.ReadOnly && in.Mask&unix.W_OK != 0 {
		return syscall.EROFS
	}
	return s.backend.Access(&r.ctx, in)
}

func opStatfs(s *Server, r *Request) Errno {
	o := out[fuseproto.StatfsOut](r)
	if s.backend.StatFSer == nil {
		o.Bsize, o.Frsize, o.NameLen = pageSize, pageSize, nameMax
		return fsbackend.OK
	}
	return s.backend.Statfs(&r.ctx, r.header().NodeId, o)
}

func opReadlink(s *Server, r *Request) Errno {
	if s.backend.Readlinker == nil {
		return syscall.ENOSYS
	}
	// Linux gives a page of room: a longer target cannot be.
	return s.filled(r, s.backend.Readlink(&r.ctx, r.header().NodeId, r.dataSink(pathMax-1)))
}

// filled checks that a call that is to be made again has put nothing in, where it could not go on from there.
func (s *Server) filled(r *Request, errno Errno) Errno {
	if errno == fsbackend.ErrMayBlock && r.dst.Written() > 0 {
		return s.broken(r, "bytes of a reply before ErrMayBlock", r.dst.Written())
	}
	return errno
}

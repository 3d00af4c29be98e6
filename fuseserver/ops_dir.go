package fuseserver

import (
	"syscall"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func opOpendir(s *Server, r *Request) Errno {
	if s.backend.DirReader == nil {
		return syscall.ENOSYS
	}
	o := out[fuseproto.OpenOut](r)
	errno := s.backend.Opendir(&r.ctx, in[fuseproto.OpenIn](r), o)
	fillOpen(o, s.cfg.Cache.DirFlags())
	return errno
}

func undoOpendir(s *Server, r *Request) {
	s.backend.Releasedir(&r.ctx, &fuseproto.ReleaseIn{
		InHeader: fuseproto.InHeader{NodeId: r.header().NodeId, Caller: r.ctx.Caller},
		Fh:       out[fuseproto.OpenOut](r).Fh,
	})
}

func opReaddir(s *Server, r *Request) Errno {
	if s.backend.DirReader == nil {
		return syscall.ENOSYS
	}
	in := in[fuseproto.ReadIn](r)
	return r.listed(s.backend.Readdir(&r.ctx, in, s.list(r, in, false)))
}

func opReaddirplus(s *Server, r *Request) Errno {
	if s.backend.DirPlusReader == nil {
		return syscall.ENOSYS
	}
	in := in[fuseproto.ReadIn](r)
	return r.listed(s.backend.Readdirplus(&r.ctx, in, s.list(r, in, true)))
}

// undoReaddirplus takes back the lookups that the entries counted.
func undoReaddirplus(s *Server, r *Request) {
	for _, node := range r.dst.Lookups {
		s.unlook(node)
	}
}

// list returns the reply's room as a list.
func (s *Server) list(r *Request, in *fuseproto.ReadIn, plus bool) *fsbackend.DirList {
	r.dst.Plus, r.dst.EntryValid, r.dst.AttrValid = plus, s.valid, s.valid
	r.dataSink(uint64(in.Size))
	in.Size = uint32(r.dst.Len())
	return &r.dst
}

// listed returns the outcome of a list: what is in it counts, since each entry of READDIRPLUS is a lookup, and what ended
// it early meets the guest's next READDIR, which goes on after it.
func (r *Request) listed(errno Errno) Errno {
	if r.dst.Written() > 0 {
		return fsbackend.OK
	}
	return errno
}

func opReleasedir(s *Server, r *Request) Errno {
	if s.backend.DirReader != nil {
		s.backend.Releasedir(&r.ctx, in[fuseproto.ReleaseIn](r))
	}
	return fsbackend.OK
}

func opFsyncdir(s *Server, r *Request) Errno {
	if s.backend.Fsyncer == nil {
		return syscall.ENOSYS
	}
	return s.backend.Fsyncdir(&r.ctx, in[fuseproto.FsyncIn](r))
}

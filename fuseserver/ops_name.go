package fuseserver

import (
	"syscall"

	"github.com/sluicefs/sluice/fuseproto"
)

func opMknod(s *Server, r *Request) Errno {
	if s.backend.Maker == nil {
		return syscall.ENOSYS
	}
	e := out[fuseproto.EntryOut](r)
	return s.entry(r, e, s.backend.Mknod(&r.ctx, in[fuseproto.MknodIn](r), r.names[0], e))
}

func opMkdir(s *Server, r *Request) Errno {
	if s.backend.Maker == nil {
		return syscall.ENOSYS
	}
	e := out[fuseproto.EntryOut](r)
	return s.entry(r, e, s.backend.Mkdir(&r.ctx, in[fuseproto.MkdirIn](r), r.names[0], e))
}

func opSymlink(s *Server, r *Request) Errno {
	if s.backend.Maker == nil {
		return syscall.ENOSYS
	}
	e := out[fuseproto.EntryOut](r)
	return s.entry(r, e, s.backend.Symlink(&r.ctx, r.header().NodeId, r.names[0], r.names[1], e))
}

func opLink(s *Server, r *Request) Errno {
	if s.backend.Linker == nil {
		return syscall.ENOSYS
	}
	e := out[fuseproto.EntryOut](r)
	return s.entry(r, e, s.backend.Link(&r.ctx, in[fuseproto.LinkIn](r), r.names[0], e))
}

func opUnlink(s *Server, r *Request) Errno {
	if s.backend.Remover == nil {
		return syscall.ENOSYS
	}
	return s.backend.Unlink(&r.ctx, r.header().NodeId, r.names[0])
}

func opRmdir(s *Server, r *Request) Errno {
	if s.backend.Remover == nil {
		return syscall.ENOSYS
	}
	return s.backend.Rmdir(&r.ctx, r.header().NodeId, r.names[0])
}

// opRename is RENAME, a RENAME2 without flags.
func opRename(s *Server, r *Request) Errno {
	in := in[fuseproto.RenameIn](r)
	r.rename = fuseproto.Rename2In{InHeader: in.InHeader, Newdir: in.Newdir}
	return s.rename(r, &r.rename)
}

func opRename2(s *Server, r *Request) Errno {
	return s.rename(r, in[fuseproto.Rename2In](r))
}

func (s *Server) rename(r *Request, in *fuseproto.Rename2In) Errno {
	if s.backend.Renamer == nil {
		return syscall.ENOSYS
	}
	return s.backend.Rename(&r.ctx, in, r.names[0], r.names[1])
}

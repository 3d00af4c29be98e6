package fuseserver

import (
	"math"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// openFlags returns the open(2) flags that the backend sees.
func (s *Server) openFlags(flags uint32) uint32 {
	if !s.cfg.AllowDirectIO {
		flags &^= unix.O_DIRECT
	}
	return flags
}

func opOpen(s *Server, r *Request) Errno {
	in := in[fuseproto.OpenIn](r)
	if s.cfg.ReadOnly && fsbackend.OpensForWriting(in.Flags) {
		return syscall.EROFS
	}
	o := out[fuseproto.OpenOut](r)
	if s.backend.Opener == nil {
		if r.session.Has(fuseproto.FUSE_NO_OPEN_SUPPORT) {
			return syscall.ENOSYS
		}
		fillOpen(o, s.cfg.Cache.FileFlags())
		return fsbackend.OK
	}
	in.Flags = s.openFlags(in.Flags) &^ (unix.O_CREAT | unix.O_EXCL | unix.O_NOCTTY)
	errno := s.backend.Open(&r.ctx, in, o)
	fillOpen(o, s.cfg.Cache.FileFlags())
	return errno
}

func undoOpen(s *Server, r *Request) {
	s.release(r, r.header().NodeId, out[fuseproto.OpenOut](r).Fh)
}

// release closes a handle that the guest never got.
func (s *Server) release(r *Request, node, fh uint64) {
	if s.backend.Opener != nil {
		s.backend.Release(&r.ctx, &fuseproto.ReleaseIn{InHeader: fuseproto.InHeader{NodeId: node, Caller: r.ctx.Caller}, Fh: fh})
	}
}

func opCreate(s *Server, r *Request) Errno {
	if s.backend.Creater == nil {
		return syscall.ENOSYS
	}
	in, o := in[fuseproto.CreateIn](r), out[fuseproto.CreateOut](r)
	in.Flags = s.openFlags(in.Flags)
	return s.created(r, o, s.backend.Create(&r.ctx, in, r.names[0], o))
}

func opTmpfile(s *Server, r *Request) Errno {
	if s.backend.Tmpfiler == nil {
		return syscall.ENOSYS
	}
	in, o := in[fuseproto.CreateIn](r), out[fuseproto.CreateOut](r)
	in.Flags = s.openFlags(in.Flags)
	return s.created(r, o, s.backend.Tmpfile(&r.ctx, in, o))
}

func (s *Server) created(r *Request, o *fuseproto.CreateOut, errno Errno) Errno {
	fillOpen(&o.OpenOut, s.cfg.Cache.FileFlags())
	return s.entry(r, &o.EntryOut, errno)
}

func undoCreate(s *Server, r *Request) {
	o := out[fuseproto.CreateOut](r)
	s.release(r, o.NodeId, o.Fh)
	s.unlook(o.NodeId)
}

func opRead(s *Server, r *Request) Errno {
	if s.backend.Reader == nil {
		return syscall.ENOSYS
	}
	in := in[fuseproto.ReadIn](r)
	if !r.started {
		if in.Offset > math.MaxInt64 {
			return syscall.EINVAL
		}
		in.Size = uint32(min(uint64(in.Size), r.room(), math.MaxInt64-in.Offset))
	}
	dst := r.dataSink(uint64(in.Size))
	errno := s.backend.Read(&r.ctx, in, dst)
	if errno == fsbackend.ErrMayBlock {
		// What was cached is in place: the call made again is one for the rest.
		n := uint32(dst.Commit())
		r.moved, in.Size, in.Offset = r.moved+n, in.Size-n, in.Offset+uint64(n)
	}
	return errno
}

func opWrite(s *Server, r *Request) Errno {
	if s.backend.Writer == nil {
		return syscall.ENOSYS
	}
	in := in[fuseproto.WriteIn](r)
	if !r.started {
		if in.Offset > math.MaxInt64-uint64(in.Size) {
			return syscall.EINVAL
		}
		if in.Size > in.Length-writeInEnd {
			s.malformed(r, syscall.EINVAL)
			return syscall.EINVAL
		}
		r.src.Reset(r.readable, writeInEnd, uint64(in.Size))
		r.started = true
	}
	n, errno := s.backend.Write(&r.ctx, in, &r.src)
	if n > in.Size {
		return s.broken(r, "bytes written beyond those there were", n)
	}
	if errno == fsbackend.ErrMayBlock && !r.MayBlock {
		taken := in.Size - uint32(r.src.Len())
		r.moved, in.Size, in.Offset = r.moved+taken, in.Size-taken, in.Offset+uint64(taken)
		return errno
	}
	n += r.moved
	out[fuseproto.WriteOut](r).Size = n
	if n > 0 {
		return fsbackend.OK // an error that is still there meets the guest's next WRITE
	}
	return errno
}

const writeInEnd = inHeaderSize + 40

func opFlush(s *Server, r *Request) Errno {
	if s.backend.Flusher == nil {
		return syscall.ENOSYS
	}
	errno := s.backend.Flush(&r.ctx, in[fuseproto.FlushIn](r))
	s.unlocked()
	return errno
}

func opRelease(s *Server, r *Request) Errno {
	if s.backend.Opener != nil {
		s.backend.Release(&r.ctx, in[fuseproto.ReleaseIn](r))
		s.unlocked()
	}
	return fsbackend.OK
}

func opFsync(s *Server, r *Request) Errno {
	if s.backend.Fsyncer == nil {
		return syscall.ENOSYS
	}
	return s.backend.Fsync(&r.ctx, in[fuseproto.FsyncIn](r))
}

func opFallocate(s *Server, r *Request) Errno {
	if s.backend.Fallocater == nil {
		return syscall.ENOSYS
	}
	in := in[fuseproto.FallocateIn](r)
	if in.Offset > math.MaxInt64 || in.Length > math.MaxInt64 || in.Length == 0 {
		return syscall.EINVAL
	}
	if in.Offset+in.Length > math.MaxInt64 {
		return syscall.EFBIG
	}
	return s.backend.Fallocate(&r.ctx, in)
}

func opLseek(s *Server, r *Request) Errno {
	if s.backend.Lseeker == nil {
		return syscall.ENOSYS
	}
	in := in[fuseproto.LseekIn](r)
	if in.Offset > math.MaxInt64 || in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return syscall.EINVAL
	}
	return s.backend.Lseek(&r.ctx, in, out[fuseproto.LseekOut](r))
}

// opCopyFileRange answers in 32 bits, so it copies no more than they hold; the guest asks again for the rest.
func opCopyFileRange(s *Server, r *Request) Errno {
	n, errno := s.copyFileRange(r, math.MaxUint32&^(pageSize-1))
	out[fuseproto.WriteOut](r).Size = uint32(n)
	return errno
}

func opCopyFileRange64(s *Server, r *Request) Errno {
	n, errno := s.copyFileRange(r, math.MaxInt64)
	out[fuseproto.CopyFileRangeOut](r).BytesCopied = n
	return errno
}

func (s *Server) copyFileRange(r *Request, most uint64) (uint64, Errno) {
	if s.backend.CopyFileRanger == nil {
		return 0, syscall.ENOSYS
	}
	in := in[fuseproto.CopyFileRangeIn](r)
	if in.OffIn > math.MaxInt64 || in.OffOut > math.MaxInt64 || in.Flags != 0 {
		return 0, syscall.EINVAL
	}
	in.Len = min(in.Len, most, math.MaxInt64-max(in.OffIn, in.OffOut))
	n, errno := s.backend.CopyFileRange(&r.ctx, in)
	if n > in.Len {
		return 0, s.broken(r, "bytes copied beyond those asked for", n)
	}
	return n, errno
}

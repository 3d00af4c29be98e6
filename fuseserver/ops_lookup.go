package fuseserver

import (
	"syscall"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func opLookup(s *Server, r *Request) Errno {
	e := out[fuseproto.EntryOut](r)
	errno := s.backend.Lookup(&r.ctx, r.header().NodeId, r.names[0], e)
	switch {
	case errno == syscall.ENOENT && s.missing != 0:
		*e = fuseproto.EntryOut{EntryValid: s.missing}
	case errno != fsbackend.OK:
		return errno
	}
	if e.NodeId == 0 {
		if e.EntryValid == 0 && e.EntryValidNsec <= fsbackend.Stale {
			return syscall.ENOENT
		}
		return fsbackend.OK // the backend knows that the name will not exist for that long
	}
	s.fillEntry(e)
	return fsbackend.OK
}

// entry completes the reply to what creates a directory entry.
func (s *Server) entry(r *Request, e *fuseproto.EntryOut, errno Errno) Errno {
	if errno != fsbackend.OK {
		return errno
	}
	if e.NodeId == 0 {
		return s.broken(r, "nodeid of what was created", 0)
	}
	s.fillEntry(e)
	return fsbackend.OK
}

// undoEntry takes back the lookup that an EntryOut at the reply's start counted.
func undoEntry(s *Server, r *Request) {
	s.unlook(out[fuseproto.EntryOut](r).NodeId)
}

// unlook takes back a lookup that the guest never learns of.
func (s *Server) unlook(node uint64) {
	if node > fuseproto.FUSE_ROOT_ID {
		s.backend.Forget(node, 1)
	}
}

func opForget(s *Server, r *Request) Errno {
	in := in[fuseproto.ForgetIn](r)
	s.forget(in.NodeId, in.Nlookup)
	return fsbackend.OK
}

// forget passes a FORGET on. The root is never forgotten: virtiofsd obeys, and then serves EBADF for ever.
func (s *Server) forget(node, n uint64) {
	switch {
	case node <= fuseproto.FUSE_ROOT_ID || n == 0:
	case s.divided == nil:
		s.backend.Forget(node, n)
	default:
		s.forgetPart(s.divided.PartOf(node), node, n)
	}
}

// maxForget bounds what one BATCH_FORGET can keep a thread busy with: 1 MiB of entries, as in virtiofsd.
const maxForget = 1 << 16

const forgetOneSize = 16

func opBatchForget(s *Server, r *Request) Errno {
	in := in[fuseproto.BatchForgetIn](r)
	list := uint64(in.Count) * forgetOneSize
	if in.Count > maxForget || uint64(in.Length)-batchForgetInEnd < list {
		s.malformed(r, syscall.EINVAL)
		return syscall.EINVAL
	}
	r.src.Reset(r.readable, batchForgetInEnd, list)
	var chunk [64]fuseproto.ForgetOne
	for r.src.Len() > 0 {
		n := r.src.Read(forgetBytes(chunk[:]))
		for _, one := range chunk[:n/forgetOneSize] {
			s.forget(one.Nodeid, one.Nlookup)
		}
		if n < forgetOneSize {
			s.stats.Faults.Add(1)
			return syscall.EFAULT
		}
	}
	return fsbackend.OK
}

const batchForgetInEnd = inHeaderSize + 8

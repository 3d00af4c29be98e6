package fuseserver

import (
	"math/bits"
	"syscall"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// errnoMax is where errnos end that user space may see (Linux include/linux/errno.h: ERESTARTSYS). virtio-fs, unlike
// /dev/fuse, hands any number on to the guest's programs.
const errnoMax = 512

// answer ends r: it writes the reply, whose length it returns, 0 if there is none, and counts it.
func (s *Server) answer(r *Request, errno Errno) uint32 {
	if errno >= errnoMax {
		s.broken(r, "errno", int(errno))
		errno = syscall.EIO
	}
	if errno == fsbackend.OK && r.isolated() && r.gate.Closed() {
		// An Abort that has not come about yet may have kept data from where it belongs.
		s.undo(r, errno)
		errno = syscall.EIO
	}
	if !r.state.CompareAndSwap(pending, answered) {
		s.undo(r, errno)
		return 0
	}
	written := s.reply(r, errno)
	r.Ended = r.count(errno, written)
	return written
}

// reply writes the reply and returns its length, 0 if there is none.
func (s *Server) reply(r *Request, errno Errno) uint32 {
	if r.op.flags&noReply != 0 || r.writable < headerSize {
		return 0
	}
	staged, size := headerSize, headerSize
	if errno == fsbackend.OK {
		staged += r.outSize
		size = staged
		if r.op.flags&data != 0 {
			size += int(r.moved) + r.dst.Written()
		}
	}
	r.out.header = fuseproto.OutHeader{Length: uint32(size), Status: -int32(errno), Unique: r.Unique()}
	if r.op == &otherEndian {
		r.out.header.Length = bits.ReverseBytes32(r.out.header.Length)
		r.out.header.Status = int32(bits.ReverseBytes32(uint32(r.out.header.Status)))
	}
	r.sink.Reset(r.head, 0, uint64(staged))
	if r.sink.Write(r.out.bytes()[:staged]) != staged {
		s.stats.Faults.Add(1)
		s.undo(r, errno)
		return 0
	}
	return uint32(size)
}

// undo takes back what a call did whose reply never reaches the guest.
func (s *Server) undo(r *Request, errno Errno) {
	if errno != fsbackend.OK || r.op.undo == nil || r.session != s.session.Load() {
		return // what another session began, the backend has forgotten
	}
	defer s.caught(r.part, r.Opcode())
	enter(r.part)
	defer leave(r.part)
	r.ctx.Part = nil // what the call has found may be in another part
	r.op.undo(s, r)
}

// Abort answers r with errno instead of Handle, for which nobody can wait any longer, and returns the reply's length, 0
// where there is none. It may be called while Handle runs elsewhere: one of the two answers, Aborted says which, and what
// Handle does after that no longer reaches the guest. Where TouchesGuestMemory, call it only while Handle is not running.
// Where an isolated part is moving guest memory at this moment, Abort answers nothing and may be called again later; no
// further move begins, and Handle's own answer is EIO. Once it has answered, Handle does not touch guest memory. r is free for the next Begin when Handle has returned.
func (r *Request) Abort(errno Errno) (written uint32) {
	if r.isolated() && r.op.flags&(data|source) != 0 && !r.gate.Close() {
		return 0
	}
	if !r.state.CompareAndSwap(pending, aborted) {
		return 0
	}
	r.server.stats.Aborted.Add(1)
	if r.op.flags&waits != 0 {
		r.server.locks.remove(r)
	}
	if errno == fsbackend.OK || errno >= errnoMax {
		errno = syscall.EIO
	}
	written = r.refuse(errno)
	r.count(errno, written)
	return written
}

// refuse writes a reply that is an errno, beside a Handle that may be running, and returns its length.
func (r *Request) refuse(errno Errno) uint32 {
	if r.op.flags&noReply != 0 || r.writable < headerSize {
		return 0
	}
	header := fuseproto.OutHeader{Length: headerSize, Status: -int32(errno), Unique: r.Unique()}
	var sink fsbackend.Sink
	sink.Reset(r.head, 0, headerSize)
	if sink.Write(outBytes(&header)) != headerSize {
		r.server.stats.Faults.Add(1)
		return 0
	}
	return headerSize
}

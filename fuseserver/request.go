package fuseserver

import (
	"math"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

const (
	inHeaderSize = 40 // fuse_in_header
	headerSize   = 16 // fuse_out_header

	// argsSize is what a Request's own buffer holds: two paths of 4096 bytes, the largest struct before them and
	// extensions after them.
	argsSize = 9 << 10
	// maxArgs bounds what is ever copied: an extended attribute's value of XATTR_SIZE_MAX beside the above.
	maxArgs = xattrSizeMax + argsSize
)

// Who has answered a Request.
const (
	pending uint32 = iota
	answered
	aborted
)

// Request is one request's state, with all the buffers it needs: make one for each request that can be under way at once
// and use it again and again. Its methods may be called from Begin until the next Begin.
type Request struct {
	// MayBlock says that Handle is called from a thread that may sleep. Begin clears it.
	MayBlock bool
	// Cancel is closed when nobody waits for the answer any more; used only with MayBlock. Begin clears it.
	Cancel <-chan struct{}
	// Counters are those of the thread that handles the request; nil are some that all others share. They may be exchanged
	// between Begin and Handle.
	Counters *Counters
	// Fetched is when the request came, by Clock: set before Begin, which clears it and looks at the clock if it is 0.
	Fetched time.Duration
	// Ended is when Handle had answered, and 0 until then: near enough to when the next one of a batch is fetched, which
	// then costs one look at the clock and not two.
	Ended time.Duration

	server   *Server
	op       *op
	slot     uint16        // where it is counted: its opcode or 0
	fetched  time.Duration // what Fetched was
	part     *fsbackend.Part
	session  *session
	state    atomic.Uint32 // pending, answered or aborted: whoever changes it writes the reply
	errno    Errno         // what Begin found, answered without a call
	waiting  bool          // what Waiting says
	faulted  bool          // guest memory was gone while it was copied
	readable []unix.Iovec  // the request as the guest has it
	writable uint64        // bytes of room for the reply

	args  []byte // private copy of header and arguments: all of the request, but only up to the struct where data follows
	words []uint64
	names [2]fsbackend.Name
	tail  []byte // what follows the names
	ctx   fsbackend.Context

	groups [maxGroups]uint32
	secctx [1]fsbackend.Secctx

	// The reply: out is staged here, then copied to head, which is all of the room or, where data goes straight to guest
	// memory, the part before it; that is body.
	out     reply
	outSize int // bytes of out.body in use
	head    []unix.Iovec
	pieces  [headerSize + maxDataOut]unix.Iovec // of head, where it is only a part: at worst one byte each
	body    []unix.Iovec
	sink    fsbackend.Sink // over head

	dst     fsbackend.DirList // over body
	src     fsbackend.Source  // over readable, behind args
	gate    fsbackend.Gate    // before dst and src, where part is isolated
	gated   bool              // it is
	nowhere fsbackend.Sink    // no room at all
	started bool              // dst or src is set up: a call made again goes on from there
	moved   uint32            // bytes of READ or WRITE moved by calls that ended in ErrMayBlock

	interrupted bool // by an INTERRUPT while it waits for a lock; lockTable.mu is held

	// In structs put together from more than one wire format.
	rename   fuseproto.Rename2In
	setxattr fuseproto.SetxattrIn
}

// NewRequest returns a Request for use with s.
func (s *Server) NewRequest() *Request {
	return &Request{server: s, words: make([]uint64, argsSize/8), op: &unknown}
}

// Opcode returns the request's opcode, 0 if it is too short to have one.
func (r *Request) Opcode() fuseproto.Opcode {
	if len(r.args) < inHeaderSize {
		return 0
	}
	return fuseproto.Opcode(r.header().Opcode)
}

// Unique returns the request's number, 0 if it is too short to have one.
func (r *Request) Unique() uint64 {
	if len(r.args) < inHeaderSize {
		return 0
	}
	return r.header().Unique
}

// TouchesGuestMemory says that the backend's call has guest memory in its hands: the chain must not be given back before
// Handle has returned. An isolated part's call can have it taken away, by Abort.
func (r *Request) TouchesGuestMemory() bool {
	return r.op.flags&(data|source) != 0 && !r.isolated()
}

// Waiting says that Handle, called with MayBlock set, was not done because the request waits for a lock that is another's:
// call Handle again after a while, and when OnUnlock says so, until it is done or Abort has answered.
func (r *Request) Waiting() bool {
	return r.waiting
}

// Aborted says that Abort, and not Handle, has answered.
func (r *Request) Aborted() bool {
	return r.state.Load() == aborted
}

// Begin takes over a new request: the driver's readable and writable memory with their lengths in bytes, whose iovecs it
// changes and keeps until the next Begin. It copies header and arguments out of guest memory, once; only the data of WRITE
// and the list of BATCH_FORGET stay there.
func (s *Server) Begin(r *Request, readable, writable []unix.Iovec, readableLen, writableLen uint64) {
	r.MayBlock, r.Cancel = false, nil
	r.fetched, r.Fetched, r.Ended, r.slot = r.Fetched, 0, 0, 0
	if r.fetched == 0 {
		r.fetched = Clock()
	}
	r.session = s.session.Load()
	r.state.Store(pending)
	r.op, r.part, r.errno, r.faulted, r.waiting, r.started, r.moved = &unknown, nil, fsbackend.OK, false, false, false, 0
	r.readable = readable
	r.writable = min(writableLen, math.MaxUint32)
	r.names, r.tail = [2]fsbackend.Name{}, nil
	r.args = r.private(0)

	r.errno = r.fetch(readableLen)
	switch {
	case r.faulted:
		r.faulted = false
		s.stats.Faults.Add(1)
		r.errno = syscall.EIO
	case r.errno != fsbackend.OK:
		s.malformed(r, r.errno)
	}
	if len(r.args) < inHeaderSize {
		// Without a unique there is nothing to reply to.
		r.writable = 0
	}
	if s.divided != nil {
		s.assign(r)
	}

	if r.op.flags&data != 0 {
		r.split(writable)
	} else {
		r.head, r.body = writable, nil
	}
	r.ctx = fsbackend.Context{Part: r.part}
	if len(r.args) >= inHeaderSize {
		r.ctx.Caller = r.header().Caller
	}
}

// fetch copies header and arguments, and finds the row of ops.
func (r *Request) fetch(readable uint64) (errno Errno) {
	defer sys.Guard(&r.faulted)
	if readable < inHeaderSize || !gather(r.private(inHeaderSize), r.readable, 0) {
		return syscall.EINVAL
	}
	r.args = r.private(inHeaderSize)
	h := r.header()
	if fuseproto.Opcode(h.Opcode) == fuseproto.FUSE_INIT_BSWAP_RESERVED {
		r.op = &otherEndian
		return fsbackend.OK
	}
	if h.Opcode < opcodes && ops[h.Opcode].handle != nil {
		r.op, r.slot = &ops[h.Opcode], uint16(h.Opcode)
	} else if _, known := notImplemented[fuseproto.Opcode(h.Opcode)]; known && h.Opcode < opcodes {
		r.slot = uint16(h.Opcode)
	}
	if uint64(h.Length) > readable || uint64(h.Length) < inHeaderSize+uint64(r.op.in) {
		return syscall.EINVAL
	}
	want := h.Length
	if r.op.flags&source != 0 || r.op.flags&whole == 0 {
		want = inHeaderSize + uint32(r.op.in)
	}
	if want > maxArgs {
		return syscall.E2BIG
	}
	if int(want) > len(r.words)*8 {
		words := make([]uint64, maxArgs/8)
		copy(words, r.words[:inHeaderSize/8])
		r.words = words
	}
	r.args = r.private(int(want))
	if !gather(r.args[inHeaderSize:], r.readable, inHeaderSize) {
		return syscall.EINVAL
	}
	return fsbackend.OK
}

// gather fills dst from byte skip of iov on, which it leaves as it is, and says whether there was enough.
func gather(dst []byte, iov []unix.Iovec, skip uint64) bool {
	for i := range iov {
		if len(dst) == 0 {
			break
		}
		if skip >= iov[i].Len {
			skip -= iov[i].Len
			continue
		}
		dst = dst[copy(dst, sys.Bytes(&iov[i])[skip:]):]
		skip = 0
	}
	return len(dst) == 0
}

// split makes head of the front of writable, and body of what is behind it.
func (r *Request) split(writable []unix.Iovec) {
	left := headerSize + uint64(r.op.out)
	n := 0
	for left > 0 && len(writable) > 0 {
		v := &writable[0]
		if v.Len > left {
			r.pieces[n] = unix.Iovec{Base: v.Base, Len: left}
			n++
			sys.Advance(v, left)
			break
		}
		if v.Len > 0 {
			r.pieces[n] = *v
			n++
			left -= v.Len
		}
		writable = writable[1:]
	}
	r.head, r.body = r.pieces[:n], writable
}

// dataSink returns the room behind the header and the struct for at most limit bytes of data. When a call is made again
// it is as that call left it.
func (r *Request) dataSink(limit uint64) *fsbackend.Sink {
	if !r.started {
		r.started = true
		r.dst.Lookups = r.dst.Lookups[:0]
		r.dst.Reset(r.body, 0, min(limit, r.room()))
	}
	return &r.dst.Sink
}

// room returns how many bytes of data fit behind the header and the struct.
func (r *Request) room() uint64 {
	return r.writable - headerSize - uint64(r.op.out)
}

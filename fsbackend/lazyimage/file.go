package lazyimage

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const (
	// defaultReadAhead is Config.ReadAhead's, in bytes.
	defaultReadAhead = 16 << 20
	// disorder is how far from where it is expected a READ may be of a guest that reads in order, in bytes: it sends several at once.
	disorder = 1 << 20
	// maxLook is how many pieces one READ looks at for read-ahead.
	maxLook = 64
	// longWalk is how many pieces a call may look at where it may not sleep.
	longWalk = 1 << 12
)

// Open implements fsbackend.Opener. The guest may keep what it has read for ever, and has nothing to flush.
func (f *FS) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) (errno fsbackend.Errno) {
	n := f.at(in.NodeId)
	switch {
	case f.isState(in.NodeId):
		return f.openState(c, in, out)
	case n == nil:
		return unix.ESTALE
	case n.is(unix.S_IFDIR):
		return unix.EISDIR
	case !n.is(unix.S_IFREG):
		return unix.EBADF // a guest's kernel opens these itself
	case fsbackend.OpensForWriting(in.Flags):
		return unix.EROFS
	}
	out.OpenFlags = fuseproto.FOPEN_KEEP_CACHE | fuseproto.FOPEN_NOFLUSH
	if out.Fh, errno = f.handles.insert(in.NodeId, nil); errno != 0 {
		return errno
	}
	number := uint32(in.NodeId - 1)
	if word, bit := &f.noted[number/32], uint32(1)<<(number%32); word.Load()&bit == 0 && word.Or(bit)&bit == 0 {
		f.store.Note(int(n.layer), f.path(number))
	}
	return fsbackend.OK
}

// Release implements fsbackend.Opener.
func (f *FS) Release(_ *fsbackend.Context, in *fuseproto.ReleaseIn) {
	f.handles.remove(in.Fh, in.NodeId)
}

// Read implements fsbackend.Reader. What is here is read at once; where a chunk is not, the call is made again from a thread that
// may wait for it.
func (f *FS) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	h := f.handles.get(in.Fh, in.NodeId)
	switch {
	case h == nil:
		return unix.EBADF
	case in.Offset > math.MaxInt64:
		return unix.EINVAL
	case f.isState(in.NodeId):
		return readState(h, in, dst)
	}
	n := f.at(in.NodeId)
	if n == nil || !n.is(unix.S_IFREG) {
		return unix.EISDIR
	}
	if in.Offset >= n.size {
		return fsbackend.OK
	}
	off := in.Offset
	end := off + min(uint64(in.Size), uint64(dst.Len()), n.size-off)
	f.lookAhead(h, n, off, end)
	for i := f.span(n, off); off < end; {
		start, length, chunk := n.size, uint64(0), uint32(0)
		if i < n.count {
			at := n.first + i
			start, chunk = f.spanOff[at], f.spanChunk[at]
			length = uint64(f.chunkSizes[chunk])
		}
		if off < start {
			hole := int(min(start, end) - off)
			if got, _ := dst.ReadExtents([]fsbackend.Extent{{FD: -1, Len: hole}}, 0); got < hole {
				return unix.EFAULT
			}
			off += uint64(hole)
			continue
		}
		part := min(start+length, end) - off
		if errno := f.readChunk(c, uint32(in.NodeId-1), chunk, off-start, part, dst); errno != 0 {
			return errno
		}
		off += part
		i++
	}
	return fsbackend.OK
}

// readChunk reads n bytes of a chunk of a node from byte off on.
func (f *FS) readChunk(c *fsbackend.Context, number, chunk uint32, off, n uint64, dst *fsbackend.Sink) fsbackend.Errno {
	s := f.chunks.pin(chunk)
	if s == nil {
		if !c.MayBlock {
			return fsbackend.ErrMayBlock
		}
		var err error
		if s, err = f.open(chunk, c.Cancel); err != nil {
			errno := errnoOf(err)
			if errno == unix.EIO {
				f.report(number, err)
			}
			return errno
		}
	}
	for n > 0 {
		flags := 0
		if !c.MayBlock && !s.waits.Load() {
			flags = unix.RWF_NOWAIT
		}
		got, errno := dst.ReadFrom(s.fd, int64(off), int(n), flags)
		off, n = off+uint64(got), n-uint64(got)
		switch {
		case errno == unix.EOPNOTSUPP && flags != 0:
			s.waits.Store(true)
		case errno == unix.EAGAIN && flags != 0:
			f.chunks.unpin(s)
			return fsbackend.ErrMayBlock
		case errno != 0:
			f.chunks.unpin(s)
			return errno
		case got == 0 && n > 0: // somebody has made it shorter
			f.chunks.drop(s)
			f.report(number, errShort)
			return unix.EIO
		}
	}
	f.chunks.unpin(s)
	return fsbackend.OK
}

// lookAhead has the chunks fetched that come next, where a file is read in order: the more of it has been, the more.
func (f *FS) lookAhead(h *handle, n *node, off, end uint64) {
	if f.readAhead == 0 || n.count < 2 || !h.mu.TryLock() {
		return
	}
	defer h.mu.Unlock()
	switch {
	case end == h.next: // the call is made again
		return
	case h.next == 0 || off > h.next+disorder || off+disorder < h.next:
		h.next, h.run, h.asked = end, 0, 0
		return
	}
	h.run += end - off
	h.next = max(h.next, end)
	to := h.next + min(2*h.run, uint64(f.readAhead))
	from := max(h.next, h.asked)
	i := f.span(n, from)
	for range maxLook {
		if i == n.count {
			h.asked = n.size
			return
		}
		at := n.first + i
		start, chunk := f.spanOff[at], f.spanChunk[at]
		if start >= to {
			break
		}
		if start >= from && f.chunks.at[chunk].Load() == 0 {
			if fl := f.begin(chunk, false); fl != nil {
				f.leave(fl)
			} else if f.full() {
				return
			}
		}
		h.asked = max(h.asked, start+1)
		i++
	}
}

// full says whether no more may be fetched ahead for now.
func (f *FS) full() bool {
	f.chunks.mu.Lock()
	defer f.chunks.mu.Unlock()
	return f.chunks.ahead >= maxAhead
}

// Lseek implements fsbackend.Lseeker.
func (f *FS) Lseek(c *fsbackend.Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) fsbackend.Errno {
	n := f.at(in.NodeId)
	switch {
	case !f.handles.valid(in.Fh, in.NodeId):
		return unix.EBADF
	case n == nil || !n.is(unix.S_IFREG) || in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE:
		return unix.EINVAL
	case in.Offset >= n.size:
		return unix.ENXIO
	case !n.sparse && in.Whence == unix.SEEK_DATA:
		out.Offset = in.Offset
		return fsbackend.OK
	case !n.sparse:
		out.Offset = n.size
		return fsbackend.OK
	}
	i := f.span(n, in.Offset)
	if in.Whence == unix.SEEK_DATA {
		if i == n.count {
			return unix.ENXIO
		}
		out.Offset = max(in.Offset, f.spanOff[n.first+i])
		return fsbackend.OK
	}
	if !c.MayBlock && n.count-i > longWalk {
		return fsbackend.ErrMayBlock
	}
	end := in.Offset
	for ; i < n.count; i++ {
		at := n.first + i
		if f.spanOff[at] > end {
			break
		}
		end = f.spanOff[at] + uint64(f.chunkSizes[f.spanChunk[at]])
	}
	out.Offset = end
	return fsbackend.OK
}

package fsbackend

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// vector is memory in pieces, used up from its front.
type vector struct {
	iov  []unix.Iovec // the pieces not used up
	left int          // bytes in iov
	done int          // bytes used up
}

// reset takes iov, whose elements it changes: the first skip bytes are left out, and what is beyond limit more.
func (v *vector) reset(iov []unix.Iovec, skip, limit uint64) {
	for len(iov) > 0 && skip >= iov[0].Len {
		skip -= iov[0].Len
		iov = iov[1:]
	}
	if len(iov) > 0 {
		sys.Advance(&iov[0], skip)
	}
	v.left, v.done = 0, 0
	n := 0
	for ; n < len(iov) && limit > 0; n++ {
		iov[n].Len = min(iov[n].Len, limit)
		limit -= iov[n].Len
		v.left += int(iov[n].Len)
	}
	v.iov = iov[:n]
}

func (v *vector) advance(n int) {
	v.left -= n
	v.done += n
	for len(v.iov) > 0 && uint64(n) >= v.iov[0].Len {
		n -= int(v.iov[0].Len)
		v.iov = v.iov[1:]
	}
	if n > 0 {
		sys.Advance(&v.iov[0], uint64(n))
	}
}

// move hands up to n bytes of the front pieces to transfer, in one call where they are at most sys.IOVMax, and uses up
// what it took. It ends at the first short transfer.
func (v *vector) move(transfer func(int, []unix.Iovec, int64, int) (int, unix.Errno), fd int, off int64, n, flags int) (int, Errno) {
	if off < 0 {
		return 0, unix.EINVAL // preadv2 would take -1 for the file's own position
	}
	n = min(n, v.left)
	total := 0
	for total < n {
		pieces, size := 0, 0
		for pieces < len(v.iov) && pieces < sys.IOVMax && size < n-total {
			size += int(v.iov[pieces].Len)
			pieces++
		}
		beyond := max(size-(n-total), 0)
		last := &v.iov[pieces-1]
		last.Len -= uint64(beyond)
		got, errno := transfer(fd, v.iov[:pieces], off+int64(total), flags)
		last.Len += uint64(beyond)
		if errno != 0 {
			return total, errno
		}
		v.advance(got)
		total += got
		if got < size-beyond {
			break
		}
	}
	return total, OK
}

// copy copies p to the front pieces, or those to p, until either is used up or the memory is gone.
func (v *vector) copy(p []byte, in bool) int {
	total := 0
	for len(p) > 0 && v.left > 0 {
		dst, src := p, sys.Bytes(&v.iov[0])
		if in {
			dst, src = src, dst
		}
		n := sys.Copy(dst, src)
		if n == 0 {
			break
		}
		v.advance(n)
		p = p[n:]
		total += n
	}
	return total
}

// Sink is room in the guest's memory for a reply's data. What a backend puts in lands there directly.
type Sink struct {
	v    vector
	gate *Gate
}

// SetGate has all that is put in go through g, until the next SetGate; nil is none. Behind a closed gate there is no room.
func (s *Sink) SetGate(g *Gate) { s.gate = g }

// Reset makes the Sink write to iov, whose elements it changes, from byte skip on and at most limit bytes.
func (s *Sink) Reset(iov []unix.Iovec, skip, limit uint64) {
	s.v.reset(iov, skip, limit)
}

// Len returns how many bytes still fit.
func (s *Sink) Len() int { return s.v.left }

// Written returns how many bytes have been put in.
func (s *Sink) Written() int { return s.v.done }

// Commit makes what has been put in final, so that Written counts from 0 behind it again, and returns how many bytes that
// were: a READ that came to a point where it might sleep goes on from there.
func (s *Sink) Commit() int {
	n := s.v.done
	s.v.done = 0
	return n
}

// ReadFrom reads up to n bytes of fd at byte off into the Sink with RWF_* flags: one preadv2 for up to 1024 pieces of
// guest memory. It returns the bytes read before a short read or an error.
func (s *Sink) ReadFrom(fd int, off int64, n, flags int) (int, Errno) {
	if !s.gate.enter() {
		return 0, unix.EIO
	}
	got, errno := s.v.move(sys.Preadv2, fd, off, n, flags)
	s.gate.leave()
	return got, errno
}

// Write copies p in and returns how many bytes of it fitted. Memory that is gone (sys.Guard) ends it.
func (s *Sink) Write(p []byte) int {
	if !s.gate.enter() {
		return 0
	}
	n := s.v.copy(p, true)
	s.gate.leave()
	return n
}

// ReceiveMsg receives one message of the socket fd with MSG_* flags: its first bytes to head, and up to n of what follows into the
// Sink, as far as m has room for pieces. It returns the length of the message, as it was received, and the flags that it came with:
// with MSG_TRUNC it was longer. Behind a closed gate it is EIO, and nothing is received.
func (s *Sink) ReceiveMsg(m *sys.Message, fd int, head []byte, n, flags int) (got, received int, errno Errno) {
	if !s.gate.enter() {
		return 0, 0, unix.EIO
	}
	m.Reset(head)
	m.Add(s.v.iov, n)
	got, received, errno = m.Receive(fd, flags)
	if got > len(head) {
		s.v.advance(got - len(head))
	}
	s.gate.leave()
	return got, received, errno
}

// Extent is a run of bytes in a file: where data of a backend lies that keeps it in other files.
type Extent struct {
	FD  int   // -1: zeros
	Off int64 // bytes
	Len int   // bytes
}

// ReadExtents fills the Sink from extents in turn and returns the bytes read; a short read ends it.
func (s *Sink) ReadExtents(extents []Extent, flags int) (int, Errno) {
	total := 0
	for _, e := range extents {
		n := min(e.Len, s.v.left)
		if e.FD < 0 {
			total += s.zero(n)
			continue
		}
		got, errno := s.ReadFrom(e.FD, e.Off, n, flags)
		total += got
		if errno != 0 || got < n {
			return total, errno
		}
	}
	return total, OK
}

var zeros [4096]byte

func (s *Sink) zero(n int) int {
	total := 0
	for n > 0 {
		got := s.Write(zeros[:min(n, len(zeros))])
		if got == 0 {
			break
		}
		total, n = total+got, n-got
	}
	return total
}

// Source is a request's data in the guest's memory, which the guest may change at any time: take each byte once.
type Source struct {
	v    vector
	gate *Gate
}

// SetGate has all that is taken go through g, until the next SetGate; nil is none. Behind a closed gate there is nothing.
func (s *Source) SetGate(g *Gate) { s.gate = g }

// Reset makes the Source read from iov, whose elements it changes, from byte skip on and at most limit bytes.
func (s *Source) Reset(iov []unix.Iovec, skip, limit uint64) {
	s.v.reset(iov, skip, limit)
}

// Len returns how many bytes have not been taken.
func (s *Source) Len() int { return s.v.left }

// WriteTo writes up to n bytes to fd at byte off with RWF_* flags: one pwritev2 for up to 1024 pieces of guest memory. It
// returns the bytes written before a short write or an error.
func (s *Source) WriteTo(fd int, off int64, n, flags int) (int, Errno) {
	if !s.gate.enter() {
		return 0, unix.EIO
	}
	put, errno := s.v.move(sys.Pwritev2, fd, off, n, flags)
	s.gate.leave()
	return put, errno
}

// SendMsg sends one message over the socket fd with MSG_* flags: head and the next n bytes, which are taken if it could be sent.
// Fewer than n, because m has no room for more pieces, are EMSGSIZE, and behind a closed gate it is EIO.
func (s *Source) SendMsg(m *sys.Message, fd int, head []byte, n, flags int) Errno {
	if !s.gate.enter() {
		return unix.EIO
	}
	defer s.gate.leave()
	m.Reset(head)
	if m.Add(s.v.iov, n) < n {
		return unix.EMSGSIZE
	}
	if _, errno := m.Send(fd, flags); errno != 0 {
		return errno
	}
	s.v.advance(n)
	return OK
}

// fits returns how many of the next n bytes are in at most pieces pieces of memory.
func (v *vector) fits(n, pieces int) int {
	total := 0
	for i := 0; i < len(v.iov) && i < pieces && total < n; i++ {
		total += int(v.iov[i].Len)
	}
	return min(total, n)
}

// Fits returns how many of n bytes of room go into one ReceiveMsg.
func (s *Sink) Fits(n int) int { return s.v.fits(n, sys.IOVMax-1) }

// Fits returns how many of the next n bytes go into one SendMsg.
func (s *Source) Fits(n int) int { return s.v.fits(n, sys.IOVMax-1) }

// Read copies the next bytes to p and returns how many there were.
func (s *Source) Read(p []byte) int {
	if !s.gate.enter() {
		return 0
	}
	n := s.v.copy(p, false)
	s.gate.leave()
	return n
}

// DirList is the reply to READDIR or READDIRPLUS that a backend adds entries to.
type DirList struct {
	Sink
	Plus       bool   // READDIRPLUS: entries are added with AddPlus
	EntryValid uint64 // seconds, for entries that leave theirs 0
	AttrValid  uint64 // seconds, likewise
	// Translate, unless nil, changes each entry of READDIRPLUS before it is written: a share's nodeids and owners are not
	// those of its parts.
	Translate func(*fuseproto.EntryOut)

	// Lookups are the nodeids that entries count a lookup of, kept only behind a Gate: the reply may never be seen.
	Lookups []uint64
	// Looked counts the entries that have been added with a nodeid, ever.
	Looked uint64

	raw   bool               // validities stay as they are
	entry fuseproto.EntryOut // of the entry being added, here so that Translate costs no allocation
	buf   [direntplusSize + 256 + 8]byte
}

const (
	direntSize     = 24
	direntplusSize = 152
)

func (l *DirList) size(nameLen int) int {
	n := direntSize
	if l.Plus {
		n = direntplusSize
	}
	return (n + nameLen + 7) &^ 7
}

// Fits says whether an entry with a name of nameLen bytes still fits.
func (l *DirList) Fits(nameLen int) bool {
	return l.size(nameLen) <= l.Len()
}

// Add adds an entry to a READDIR reply: typ is DT_*, off where a READDIR that goes on after it starts (never 0). It reports
// false, and adds nothing, when the entry does not fit or its name is not 1 to 255 bytes.
func (l *DirList) Add(ino, off uint64, typ uint32, name []byte) bool {
	return l.add(nil, ino, off, typ, name)
}

// AddPlus is Add for READDIRPLUS, with the entry's lookup.
func (l *DirList) AddPlus(entry *fuseproto.EntryOut, ino, off uint64, typ uint32, name []byte) bool {
	return l.add(entry, ino, off, typ, name)
}

func (l *DirList) add(entry *fuseproto.EntryOut, ino, off uint64, typ uint32, name []byte) bool {
	size := l.size(len(name))
	if len(name) == 0 || len(name) > 255 || size > l.Len() || l.Plus != (entry != nil) {
		return false
	}
	b := l.buf[:size]
	clear(b)
	at, node := 0, uint64(0)
	if entry != nil {
		e := &l.entry
		*e = *entry
		if l.Translate != nil {
			l.Translate(e)
		}
		if e.NodeId != 0 && !l.raw {
			FillValid(&e.EntryValid, &e.EntryValidNsec, l.EntryValid)
		}
		if !l.raw {
			FillValid(&e.AttrValid, &e.AttrValidNsec, l.AttrValid)
		}
		at, node = copy(b, entryBytes(e)), e.NodeId
	}
	at += copy(b[at:], direntBytes(&fuseproto.Dirent{Ino: ino, Off: off, Namelen: uint32(len(name)), Type: typ}))
	copy(b[at:], name)
	if n := l.Write(b); l.gate != nil {
		if n == 0 {
			return false // closed: the entry is not there, and its lookup not the guest's
		}
		if node != 0 {
			l.Lookups = append(l.Lookups, node)
		}
	}
	if node != 0 {
		l.Looked++
	}
	return true
}

package iofs

import (
	"errors"
	"io"
	"io/fs"
	"math"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const (
	// readSize is the most that a file is asked for at once, in bytes: one READ, by default.
	readSize = 1 << 20
	// keepSize is how much is kept of what was read in order, in bytes: more than a guest's read-ahead is out of order by.
	keepSize = 1 << 20
	// stepSize is how much is read in order at a time, in bytes.
	stepSize = 64 << 10
	// bufferSize is what a file of which something is kept is charged for.
	bufferSize = 2 * keepSize
)

// handle is what open files and directories have in common. pins and ended are under FS.mu.
type handle struct {
	node  *node
	pins  int  // calls that use it
	ended bool // the guest has released it
}

func (h *handle) common() *handle { return h }

// end says that the guest is done with h, and whether nobody else uses it. FS.mu is held.
func (h *handle) end() bool {
	h.ended = true
	return h.pins == 0
}

// closer is a *file or *dir.
type closer interface {
	io.Closer
	common() *handle
}

// pin returns the handle fh of node id from table, for the time of a call.
func pin[H closer](f *FS, table map[uint64]H, id, fh uint64) (H, fsbackend.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h, ok := table[fh]
	if !ok || h.common().node.id != id {
		return h, unix.EBADF
	}
	h.common().pins++
	return h, fsbackend.OK
}

// unpin ends a call's use of h.
func unpin[H closer](f *FS, h H) {
	f.mu.Lock()
	c := h.common()
	c.pins--
	last := c.ended && c.pins == 0
	f.mu.Unlock()
	if last {
		_ = h.Close()
	}
}

// insert makes h a handle of the guest's.
func insert[H closer](f *FS, table map[uint64]H, h H) (uint64, fsbackend.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.files)+len(f.dirs) >= f.cfg.MaxHandles {
		return 0, unix.ENFILE
	}
	f.lastFh++
	table[f.lastFh] = h
	return f.lastFh, fsbackend.OK
}

// release takes a handle from the guest; calls that use it end normally.
func release[H closer](f *FS, table map[uint64]H, in *fuseproto.ReleaseIn) {
	f.mu.Lock()
	h, ok := table[in.Fh]
	if !ok || h.common().node.id != in.NodeId {
		f.mu.Unlock()
		return
	}
	delete(table, in.Fh)
	last := h.common().end()
	f.mu.Unlock()
	if last {
		_ = h.Close()
	}
}

// file is an open file.
type file struct {
	handle
	fs *FS
	at io.ReaderAt // not nil: reads need no lock

	mu   sync.Mutex // of what follows, unless at is not nil
	file fs.File
	seek io.Seeker // nil: it can only be read in order
	// pos is how far it has been read, and buf what came right before.
	pos  int64
	buf  []byte
	keep bool // buf is charged for
}

// Open implements fsbackend.Opener.
func (f *FS) Open(_ *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	n, errno := f.node(in.NodeId)
	switch {
	case errno != 0:
		return errno
	case n.typ == unix.S_IFDIR:
		return unix.EISDIR
	case n.typ != unix.S_IFREG:
		return unix.EBADF // a guest's kernel opens these itself, and a fifo would block
	case in.Flags&unix.O_ACCMODE != unix.O_RDONLY || in.Flags&unix.O_TRUNC != 0:
		return unix.EROFS
	}
	opened, err := f.cfg.FS.Open(n.path)
	if err != nil {
		return staleErrnoOf(err)
	}
	h := &file{handle: handle{node: n}, fs: f, file: opened}
	if errno := h.check(); errno != 0 {
		_ = h.Close()
		return errno
	}
	h.at, _ = opened.(io.ReaderAt)
	h.seek, _ = opened.(io.Seeker)
	if h.at == nil && h.seek == nil {
		h.keep = f.kept.take(bufferSize)
	}
	if out.Fh, errno = insert(f, f.files, h); errno != 0 {
		_ = h.Close()
	}
	return errno
}

// check says whether what was opened is what the guest knows: another file may have come to the path.
func (h *file) check() fsbackend.Errno {
	info, err := h.file.Stat()
	if err != nil {
		return errnoOf(err)
	}
	if !info.Mode().IsRegular() {
		return unix.ESTALE
	}
	return fsbackend.OK
}

// Release implements fsbackend.Opener.
func (f *FS) Release(_ *fsbackend.Context, in *fuseproto.ReleaseIn) { release(f, f.files, in) }

// Close closes the file, which nobody uses any more.
func (h *file) Close() error {
	if h.keep {
		h.fs.kept.give(bufferSize)
	}
	return h.file.Close()
}

func (h *file) stat() (fs.FileInfo, error) {
	if h.at == nil {
		h.mu.Lock()
		defer h.mu.Unlock()
	}
	return h.file.Stat()
}

// Read implements fsbackend.Reader.
func (f *FS) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	h, errno := pin(f, f.files, in.NodeId, in.Fh)
	if errno != 0 {
		return errno
	}
	defer unpin(f, h)
	if in.Offset > math.MaxInt64 {
		return unix.EINVAL
	}
	off := int64(in.Offset)
	if h.at == nil && h.seek == nil {
		return errnoOf(h.readInOrder(off, dst, c.Cancel))
	}
	p := f.buffers.Get().(*[]byte)
	defer f.buffers.Put(p)
	for dst.Len() > 0 && off <= math.MaxInt64-readSize {
		b := (*p)[:min(len(*p), dst.Len())]
		n, err := h.readAt(b, off)
		if err != nil {
			return errnoOf(err)
		}
		if dst.Write(b[:n]) < n {
			return unix.EFAULT
		}
		if n < len(b) {
			break
		}
		off += int64(n)
	}
	return fsbackend.OK
}

// readAt fills b from byte off on, but for what is past the end of the file.
func (h *file) readAt(b []byte, off int64) (int, error) {
	n, err := h.readFrom(b, off)
	if err != nil && errors.Is(err, fs.ErrInvalid) {
		// embed and fstest.MapFS find nothing past the end and call that invalid.
		if info, statErr := h.stat(); statErr == nil && off >= info.Size() {
			return 0, nil
		}
	}
	return n, err
}

func (h *file) readFrom(b []byte, off int64) (int, error) {
	if h.at != nil {
		return readFull(io.NewSectionReader(h.at, off, int64(len(b))), b)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, err := h.seek.Seek(off, io.SeekStart); err != nil {
		return 0, err
	}
	return readFull(h.file, b)
}

// readFull fills b but for what is past the end of r.
func readFull(r io.Reader, b []byte) (int, error) {
	n, stuck := 0, 0
	for n < len(b) {
		got, err := r.Read(b[n:])
		if got < 0 || got > len(b)-n {
			return 0, errors.New("read: a reader claims more than it had room for")
		}
		n += got
		switch {
		case err == io.EOF:
			return n, nil
		case err != nil:
			return 0, err
		case got > 0:
			stuck = 0
		default:
			if stuck++; stuck == 100 {
				return 0, io.ErrNoProgress
			}
		}
	}
	return n, nil
}

// readInOrder fills dst from byte off on, reading the file from where it is, or from its start again if that is too far.
func (h *file) readInOrder(off int64, dst *fsbackend.Sink, cancel <-chan struct{}) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for dst.Len() > 0 {
		start := h.pos - int64(len(h.buf))
		if off < start {
			if err := h.rewind(); err != nil {
				return err
			}
			continue
		}
		if off < h.pos {
			b := h.buf[off-start:]
			n := dst.Write(b)
			if n < len(b) && dst.Len() > 0 {
				return unix.EFAULT
			}
			off += int64(n)
			continue
		}
		select {
		case <-cancel:
			return unix.EINTR
		default:
		}
		more, err := h.step()
		if err != nil {
			return err
		}
		if !more {
			return nil
		}
	}
	return nil
}

// step reads the next bytes into buf, and drops what is not to be kept. It reports false at the end of the file.
func (h *file) step() (bool, error) {
	limit := 0
	if h.keep {
		limit = keepSize
	}
	if len(h.buf)+stepSize > limit+keepSize || limit == 0 {
		h.buf = append(h.buf[:0], h.buf[max(len(h.buf)-limit, 0):]...)
	}
	h.buf = slices.Grow(h.buf, stepSize)
	n, err := readFull(h.file, h.buf[len(h.buf):len(h.buf)+stepSize])
	if err != nil {
		// How far the file has been read is not known any more.
		h.buf, h.pos = h.buf[:0], math.MaxInt64
		return false, err
	}
	h.buf = h.buf[:len(h.buf)+n]
	h.pos += int64(n)
	return n > 0, nil
}

// rewind opens the file anew.
func (h *file) rewind() error {
	again, err := h.fs.cfg.FS.Open(h.node.path)
	if err != nil {
		return &fs.PathError{Op: "open", Path: h.node.path, Err: staleErrnoOf(err)}
	}
	_ = h.file.Close()
	h.file, h.buf, h.pos = again, h.buf[:0], 0
	if errno := h.check(); errno != 0 {
		h.pos = math.MaxInt64
		return errno
	}
	return nil
}

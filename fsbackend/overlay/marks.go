package overlay

import (
	"bytes"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// Marks are extended attributes: a prefix and one of these (fs/overlayfs/overlayfs.h, OVL_XATTR_*). The last two are the overlay's
// own: the kernel's origin holds a file handle, which no backend can be asked for, and where the kernel finds none it takes its own
// mark of an impure directory away.
const (
	markOpaque   = "opaque"
	markRedirect = "redirect"
	markImpure   = "impure"
	markMetacopy = "metacopy"
	markOrigin   = "origin"
	markWhiteout = "whiteout"
	markIno      = "sluice.ino"
	markOurs     = "sluice.impure"
)

// Names that are marks (fuse-overlayfs, and the OCI image specification's "layer.md", whiteouts).
const (
	whPrefix = ".wh."
	whOpaque = ".wh..wh..opq"
	// tempPrefix begins what is made in a directory of the upper layer and renamed at once; nobody sees it.
	tempPrefix = ".wh..wh.sluice."
)

var opaqueFile = fsbackend.MakeName(whOpaque)

// isMark says whether an attribute is the overlay's and none of the guest's.
func isMark(name []byte) bool {
	for _, prefix := range formats {
		if bytes.HasPrefix(name, []byte(prefix)) {
			return true
		}
	}
	return false
}

// scratch is room for what the overlay asks of layers for itself.
type scratch struct {
	buf  [1 << 16]byte
	iov  [1]unix.Iovec
	sink fsbackend.Sink
	src  fsbackend.Source
	list fsbackend.DirList
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

func getScratch() *scratch { return scratches.Get().(*scratch) }

func (s *scratch) put() { scratches.Put(s) }

// into makes the sink write to the first n bytes of the buffer.
func (s *scratch) into(n int) *fsbackend.Sink {
	s.iov[0] = sys.MakeIovec(s.buf[:n])
	s.sink.Reset(s.iov[:], 0, uint64(n))
	return &s.sink
}

// from makes the source read a part of the buffer.
func (s *scratch) from(start, end int) *fsbackend.Source {
	s.iov[0] = sys.MakeIovec(s.buf[start:end])
	s.src.Reset(s.iov[:], 0, uint64(end-start))
	return &s.src
}

// listxattr returns the names, in s.buf: none where the layer has no attributes.
func (l *layer) listxattr(c *fsbackend.Context, id uint64, s *scratch) ([]byte, errno) {
	if l.r.XattrReader == nil {
		return nil, 0
	}
	if !l.may(c) {
		return nil, fsbackend.ErrMayBlock
	}
	dst := s.into(len(s.buf))
	in := fuseproto.GetxattrIn{InHeader: header(id), Size: uint32(len(s.buf))}
	_, e := l.r.Listxattr(c, &in, dst)
	switch e {
	case 0:
		return s.buf[:dst.Written()], 0
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.ENODATA, unix.EPERM, unix.EACCES:
		return nil, 0
	}
	return nil, e
}

// getxattr returns an attribute's value, in s.buf.
func (l *layer) getxattr(c *fsbackend.Context, id uint64, name fsbackend.Name, s *scratch) ([]byte, errno) {
	dst := s.into(len(s.buf))
	in := fuseproto.GetxattrIn{InHeader: header(id), Size: uint32(len(s.buf))}
	_, e := l.r.Getxattr(c, &in, name, dst)
	return s.buf[:dst.Written()], e
}

// marks are what the marks of a file say.
type marks struct {
	opaque, impure, metacopy bool
	// whiteout says that the file stands for none, as a layer has it that could not have devices.
	whiteout bool
	// origin says that the file was copied up, by the kernel too.
	origin   bool
	redirect string
	ino      uint64 // 0: the file was made where it is
}

// marks reads those of a layer's file: one call where it has no attributes.
func (fs *FS) marks(c *fsbackend.Context, l *layer, id uint64) (m marks, e errno) {
	s := getScratch()
	defer s.put()
	list, e := l.listxattr(c, id, s)
	if e != 0 || len(list) == 0 {
		return m, e
	}
	var names []string
	for name := range bytes.SplitSeq(list, []byte{0}) {
		if isMark(name) {
			names = append(names, string(name))
		}
	}
	for _, name := range names {
		suffix := name
		for _, prefix := range formats {
			suffix = strings.TrimPrefix(suffix, prefix)
		}
		if suffix == markMetacopy {
			m.metacopy = true
			continue
		}
		if suffix == markOrigin {
			m.origin = true
			continue
		}
		if suffix == markWhiteout {
			m.whiteout = true
			continue
		}
		if suffix != markOpaque && suffix != markRedirect && suffix != markImpure && suffix != markIno && suffix != markOurs {
			continue
		}
		value, e := l.getxattr(c, id, fsbackend.MakeName(name), s)
		if e == unix.ENODATA {
			continue
		}
		if e != 0 {
			return m, e
		}
		yes := len(value) == 1 && value[0] == 'y'
		switch suffix {
		case markOpaque:
			m.opaque = m.opaque || yes
			// An "x" announces whiteouts that are files with a mark (fs/overlayfs/namei.c, ovl_lookup_single): they are looked for in
			// the same way.
			m.impure = m.impure || len(value) == 1 && value[0] == 'x'
		case markImpure, markOurs:
			m.impure = m.impure || yes
		case markRedirect:
			m.redirect = string(value)
		case markIno:
			m.ino, _ = strconv.ParseUint(string(value), 16, 64)
			m.origin = m.origin || m.ino != 0
		}
	}
	return m, 0
}

// mark sets a mark on a file of the upper layer.
func (fs *FS) mark(c *fsbackend.Context, id uint64, suffix, value string) errno {
	w := fs.upper.r.XattrWriter
	if w == nil {
		return unix.EOPNOTSUPP
	}
	in := fuseproto.SetxattrIn{InHeader: header(id), Size: uint32(len(value))}
	return w.Setxattr(c, &in, fsbackend.MakeName(formats[fs.cfg.Format]+suffix), []byte(value))
}

// markOpaqueDir has a directory of the upper layer hide all that is below: by a file where attributes cannot be set.
func (fs *FS) markOpaqueDir(c *fsbackend.Context, id uint64) errno {
	e := fs.mark(c, id, markOpaque, "y")
	if e != unix.EOPNOTSUPP && e != unix.ENOSYS {
		return e
	}
	return fs.makeFile(c, id, opaqueFile)
}

// makeFile makes an empty file in a directory of the upper layer.
func (fs *FS) makeFile(c *fsbackend.Context, dir uint64, name fsbackend.Name) errno {
	in := fuseproto.MknodIn{InHeader: header(dir), Mode: unix.S_IFREG | 0o644}
	var out fuseproto.EntryOut
	e := fs.upper.r.Mknod(c, &in, name, &out)
	if e == 0 {
		fs.upper.r.Forget(out.NodeId, 1)
	}
	if e == unix.EEXIST {
		return 0
	}
	return e
}

// markImpure says of a directory that files with marks are in it. Its lock is held.
func (fs *FS) markImpureDir(c *fsbackend.Context, n *node) errno {
	known := &n.dir.parts[0].impure
	if known.Load() == impureYes {
		return 0
	}
	if e := fs.mark(c, n.upper.Load(), markOurs, "y"); e != 0 && e != unix.EOPNOTSUPP && e != unix.ENOSYS {
		return e
	}
	known.Store(impureYes)
	return 0
}

// impure says whether files with marks may be in part i of the directory p.
func (fs *FS) impure(c *fsbackend.Context, p *node, i int) (bool, errno) {
	known := &p.dir.parts[i].impure
	if known.Load() == impureUnknown {
		r, ok := p.part(fs, i)
		if !ok {
			return false, 0
		}
		m, e := fs.marks(c, r.l, r.node)
		if e != 0 {
			return false, e
		}
		known.CompareAndSwap(impureUnknown, impureOf(m))
	}
	return known.Load() == impureYes, 0
}

func impureOf(m marks) uint32 {
	if m.impure {
		return impureYes
	}
	return impureNot
}

// hides are the names that files .wh.NAME in a directory of a layer hide in the layers below.
type hides struct {
	names map[string]struct{}
	// partial says that the directory is too large to have been listed: each name has to be asked for.
	partial bool
}

// maxHidesListed is how many entries of a directory are listed to find those.
const maxHidesListed = 4096

// hidden says whether part i of p hides name from the layers below by a file.
func (fs *FS) hidden(c *fsbackend.Context, p *node, i int, name []byte) (bool, errno) {
	r, ok := p.part(fs, i)
	if !ok {
		return false, 0
	}
	known := &p.dir.parts[i].hides
	h := known.Load()
	if h == nil {
		p.missed(i)
		if x, e := fs.namesOf(c, p, i); e != 0 || x != nil {
			return x != nil && x.hides(name), e
		}
		h = new(hides)
		n := 0
		e := fs.each(c, r, func(e *dirent) bool {
			if n++; n > maxHidesListed {
				h.partial = true
				return false
			}
			if target, ok := bytes.CutPrefix(e.name, []byte(whPrefix)); ok {
				if h.names == nil {
					h.names = make(map[string]struct{})
				}
				h.names[string(target)] = struct{}{}
			}
			return true
		})
		if e == unix.ENOSYS {
			h.partial, e = true, 0
		}
		if e != 0 {
			return false, e
		}
		known.Store(h)
	}
	if !h.partial {
		_, ok := h.names[string(name)]
		return ok, 0
	}
	return fs.hasFile(c, r, fsbackend.MakeName(whPrefix+string(name)))
}

// hasFile says whether name is in a layer's directory.
func (fs *FS) hasFile(c *fsbackend.Context, dir real, name fsbackend.Name) (bool, errno) {
	var out fuseproto.EntryOut
	switch e := dir.l.lookup(c, dir.node, name, &out); e {
	case 0:
		dir.l.r.Forget(out.NodeId, 1)
		return true, 0
	case unix.ENOENT:
		return false, 0
	default:
		return false, e
	}
}

// hide notes that the upper part of p has, or has no more, a file .wh.NAME. p's lock is held for writing.
func (p *node) hide(name []byte, there bool) {
	known := &p.dir.parts[0].hides
	h := known.Load()
	if h == nil || h.partial {
		return
	}
	names := make(map[string]struct{}, len(h.names)+1)
	for n := range h.names {
		names[n] = struct{}{}
	}
	if there {
		names[string(name)] = struct{}{}
	} else {
		delete(names, string(name))
	}
	known.Store(&hides{names: names})
}

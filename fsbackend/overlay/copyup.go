package overlay

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// wholeFile is the limit of a copy that is to have all of a file's data.
const wholeFile uint64 = math.MaxUint64

// copyUp has n in the upper layer, and all directories above it: of its data, what lies before limit. A node that is there costs
// nothing. No lock is held.
func (fs *FS) copyUp(c *fsbackend.Context, n *node, limit uint64) errno {
	if n.upper.Load() != 0 {
		return 0
	}
	if fs.upper == nil {
		return unix.EROFS
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	// A rename may move the file elsewhere meanwhile, where more has to be copied.
	for range 16 {
		var chain []*node
		fs.mu.RLock()
		for a := n; a != nil && a.upper.Load() == 0; a = a.parent {
			chain = append(chain, a)
		}
		fs.mu.RUnlock()
		again := false
		for i := len(chain) - 1; i >= 0; i-- {
			part := wholeFile
			if i == 0 {
				part = limit
			}
			e := fs.copyOne(own(c), chain[i], part)
			if e == errMoved {
				again = true
				break
			}
			if e != 0 {
				return e
			}
		}
		if !again {
			return 0
		}
	}
	return unix.EBUSY
}

// errMoved never leaves this package: the file is elsewhere by now.
const errMoved errno = 1<<20 + 1

// copyOne copies n up into its directory, which is in the upper layer.
func (fs *FS) copyOne(c *fsbackend.Context, n *node, limit uint64) errno {
	n.copyMu.Lock()
	defer n.copyMu.Unlock()
	if n.upper.Load() != 0 {
		return 0
	}
	if n.gone.Load() && n.dir != nil {
		return unix.ENOENT
	}
	src := n.lowers[0]
	var attr fuseproto.AttrOut
	in := fuseproto.GetattrIn{InHeader: header(src.node)}
	if e := src.l.r.Getattr(c, &in, &attr); e != 0 {
		return e
	}
	made, e := fs.makeCopy(c, n, src, &attr.Attr, limit)
	if e == 0 {
		e = fs.publish(c, n, &made)
	}
	if e != 0 {
		fs.discard(c, &made)
	}
	if made.fh != 0 {
		f := file{real{fs.upper, made.node}, made.fh}
		f.close(c, &handle{}, 0)
	}
	return e
}

// made is a copy on its way to its place: a file without a name, or one in the work directory.
type made struct {
	node uint64 // with a lookup; 0: there is none
	name fsbackend.Name
	fh   uint64 // open, 0 if not
	dir  bool
}

// tempName is a new name in the work directory.
func (fs *FS) tempName() fsbackend.Name {
	return fsbackend.MakeName("#" + strconv.FormatUint(fs.temp.Add(1), 16))
}

// makeCopy makes a copy of src.
func (fs *FS) makeCopy(c *fsbackend.Context, n *node, src real, attr *fuseproto.Attr, limit uint64) (m made, e errno) {
	r := fs.upper.r
	var out fuseproto.EntryOut
	switch n.typ {
	case unix.S_IFREG:
		if m, e = fs.createTemp(c, &out); e == 0 {
			e = fs.copyData(c, src, file{real{fs.upper, m.node}, m.fh}, min(attr.Size, limit))
		}
	case unix.S_IFDIR:
		m.name, m.dir = fs.tempName(), true
		e = r.Mkdir(c, &fuseproto.MkdirIn{InHeader: header(fs.work), Mode: 0o700}, m.name, &out)
	case unix.S_IFLNK:
		var target fsbackend.Name
		if target, e = fs.readlink(c, src); e == 0 {
			m.name = fs.tempName()
			e = r.Symlink(c, fs.work, m.name, target, &out)
		}
	default:
		m.name = fs.tempName()
		in := fuseproto.MknodIn{InHeader: header(fs.work), Mode: n.typ | 0o600, Rdev: attr.Rdev}
		e = r.Mknod(c, &in, m.name, &out)
	}
	if e != 0 {
		return m, e
	}
	m.node = out.NodeId
	return m, fs.copyAttr(c, n, src, m.node, attr, &out.Attr)
}

// createTemp makes and opens an empty regular file.
func (fs *FS) createTemp(c *fsbackend.Context, entry *fuseproto.EntryOut) (m made, e errno) {
	r := fs.upper.r
	in := fuseproto.CreateIn{InHeader: header(fs.work), Flags: unix.O_RDWR, Mode: unix.S_IFREG | 0o600}
	var out fuseproto.CreateOut
	e = unix.EOPNOTSUPP
	if r.Tmpfiler != nil && r.Linker != nil && !fs.noTmpfile.Load() {
		if e = r.Tmpfile(c, &in, &out); cannot(e) {
			fs.noTmpfile.Store(true)
			e = unix.EOPNOTSUPP
		}
	}
	if e == unix.EOPNOTSUPP {
		m.name = fs.tempName()
		in.Flags |= unix.O_CREAT | unix.O_EXCL
		e = r.Create(c, &in, m.name, &out)
	}
	if e != 0 {
		return made{}, e
	}
	m.node, m.fh = out.NodeId, out.Fh
	*entry = out.EntryOut
	return m, 0
}

// cannot says whether e is that a file system does not have files without a name, or cannot give them one.
func cannot(e errno) bool {
	switch e {
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.EISDIR, unix.EINVAL, unix.ENOENT, unix.EPERM, unix.EXDEV:
		return true
	}
	return false
}

func (fs *FS) readlink(c *fsbackend.Context, r real) (fsbackend.Name, errno) {
	if r.l.r.Readlinker == nil {
		return nil, unix.ENOSYS
	}
	s := getScratch()
	defer s.put()
	dst := s.into(unix.PathMax)
	if e := r.l.r.Readlink(c, r.node, dst); e != 0 {
		return nil, e
	}
	return fsbackend.MakeName(string(s.buf[:dst.Written()])), 0
}

// copyData copies the first size bytes of src to dst, holes left out.
func (fs *FS) copyData(c *fsbackend.Context, src real, dst file, size uint64) errno {
	if size == 0 {
		return 0
	}
	var out fuseproto.OpenOut
	from, e := fs.openReal(c, src, unix.O_RDONLY, 0, &out)
	if e != 0 {
		return e
	}
	defer from.close(c, &handle{}, 0)
	e = both(from, &dst, func(fromFD, toFD int) errno {
		if unix.IoctlFileClone(toFD, fromFD) == nil {
			return fs.trim(c, &dst, size)
		}
		return unix.EOPNOTSUPP
	})
	if e != unix.EOPNOTSUPP {
		return fs.sync(c, &dst, e)
	}
	byRange := true
	for off := uint64(0); off < size; {
		start, end := nextData(c, from, off, size)
		for off = start; off < end; {
			if stopped(c) {
				return unix.EINTR
			}
			var n uint64
			if byRange {
				n, e = copyRange(from, &dst, off, end-off)
				if e != 0 {
					byRange = false // whatever it was: the other way says so, too
					continue
				}
			} else if n, e = copyPiece(c, from, &dst, off, end-off); e != 0 {
				return e
			}
			if n == 0 {
				end = off // the file has become shorter
				size = off
				break
			}
			off += n
		}
		off = max(off, end)
	}
	return fs.sync(c, &dst, fs.trim(c, &dst, size))
}

// sync writes a copy to its medium: a name must not come to lead to a file without its data.
func (fs *FS) sync(c *fsbackend.Context, f *file, e errno) errno {
	if e != 0 || fs.cfg.Volatile || fs.upper.r.Fsyncer == nil {
		return e
	}
	e = fs.upper.r.Fsync(c, &fuseproto.FsyncIn{InHeader: header(f.node), Fh: f.fh})
	if e == unix.ENOSYS || e == unix.EOPNOTSUPP || e == unix.EINVAL {
		return 0
	}
	return e
}

// trim gives a copy its size.
func (fs *FS) trim(c *fsbackend.Context, f *file, size uint64) errno {
	in := fuseproto.SetattrIn{}
	in.InHeader = header(f.node)
	in.Valid, in.Fh, in.Size = fuseproto.FATTR_SIZE|fuseproto.FATTR_FH, f.fh, size
	var out fuseproto.AttrOut
	return fs.upper.r.Setattr(c, &in, &out)
}

func stopped(c *fsbackend.Context) bool {
	select {
	case <-c.Cancel:
		return true
	default:
		return false
	}
}

// nextData returns the next run of data from off on, all that is left where the layer does not know.
func nextData(c *fsbackend.Context, f *file, off, size uint64) (start, end uint64) {
	if f.l.r.Lseeker == nil {
		return off, size
	}
	in := fuseproto.LseekIn{InHeader: header(f.node), Fh: f.fh, Offset: off, Whence: unix.SEEK_DATA}
	var out fuseproto.LseekOut
	switch f.l.r.Lseek(c, &in, &out) {
	case 0:
	case unix.ENXIO:
		return size, size
	default:
		return off, size
	}
	start = min(max(out.Offset, off), size)
	in.Offset, in.Whence = start, unix.SEEK_HOLE
	if f.l.r.Lseek(c, &in, &out) != 0 || out.Offset <= start {
		return start, size
	}
	return start, min(out.Offset, size)
}

// copyStep is how much is copied between looks at whether anybody still waits.
const copyStep = 16 << 20

func copyRange(from, to *file, off, n uint64) (copied uint64, e errno) {
	e = both(from, to, func(fromFD, toFD int) errno {
		got, e := sys.CopyFileRange(fromFD, int64(off), toFD, int64(off), min(n, copyStep), 0)
		copied = uint64(max(got, 0))
		return e
	})
	return copied, e
}

// copyPiece copies up to a buffer's worth through memory.
func copyPiece(c *fsbackend.Context, from, to *file, off, n uint64) (uint64, errno) {
	s := getScratch()
	defer s.put()
	want := int(min(n, uint64(len(s.buf))))
	dst := s.into(want)
	if from.l.r.Reader == nil {
		return 0, unix.ENOSYS
	}
	in := fuseproto.ReadIn{InHeader: header(from.node), Fh: from.fh, Offset: off, Size: uint32(want)}
	if e := from.l.r.Read(c, &in, dst); e != 0 {
		return 0, e
	}
	got := dst.Written()
	if got == 0 {
		return 0, 0
	}
	for done := 0; done < got; {
		w := fuseproto.WriteIn{InHeader: header(to.node), Fh: to.fh, Offset: off + uint64(done), Size: uint32(got - done)}
		put, e := to.l.r.Write(c, &w, s.from(done, got))
		if e == 0 && put == 0 {
			e = unix.ENOSPC
		}
		if e != 0 {
			return 0, e
		}
		done += int(put)
	}
	return uint64(got), 0
}

// copyAttr gives the copy to the owner, extended attributes, mode and times of src, in this order: a change of the owner takes
// set-id bits and capabilities away.
func (fs *FS) copyAttr(c *fsbackend.Context, n *node, src real, to uint64, attr, has *fuseproto.Attr) errno {
	in := fuseproto.SetattrIn{}
	var out fuseproto.AttrOut
	in.InHeader = header(to)
	if attr.Uid != has.Uid {
		in.Valid |= fuseproto.FATTR_UID
	}
	if attr.Gid != has.Gid {
		in.Valid |= fuseproto.FATTR_GID
	}
	in.Uid, in.Gid = attr.Uid, attr.Gid
	if in.Valid != 0 {
		if e := fs.upper.r.Setattr(c, &in, &out); e != 0 {
			return e
		}
	}
	if e := fs.copyXattrs(c, src, to); e != 0 {
		return e
	}
	if n.dir == nil && !n.linked {
		// Where the mark cannot be set the file gets another inode number when it is looked up next.
		_ = fs.mark(c, to, markIno, strconv.FormatUint(n.ino.Load(), 16))
	}
	in.Valid = fuseproto.FATTR_ATIME | fuseproto.FATTR_MTIME
	if n.typ != unix.S_IFLNK {
		in.Valid |= fuseproto.FATTR_MODE
	}
	in.Mode = attr.Mode
	in.Atime, in.Atimensec, in.Mtime, in.Mtimensec = attr.Atime, attr.Atimensec, attr.Mtime, attr.Mtimensec
	return fs.upper.r.Setattr(c, &in, &out)
}

// copyXattrs copies all extended attributes but marks.
func (fs *FS) copyXattrs(c *fsbackend.Context, src real, to uint64) errno {
	s := getScratch()
	defer s.put()
	list, e := src.l.listxattr(c, src.node, s)
	if e != 0 || len(list) == 0 {
		return e
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		if isMark([]byte(name)) {
			continue
		}
		cname := fsbackend.MakeName(name)
		value, e := src.l.getxattr(c, src.node, cname, s)
		if e == unix.ENODATA {
			continue
		}
		if e != 0 {
			return e
		}
		if fs.upper.r.XattrWriter == nil {
			return unix.EOPNOTSUPP
		}
		in := fuseproto.SetxattrIn{InHeader: header(to), Size: uint32(len(value))}
		e = fs.upper.r.Setxattr(c, &in, cname, value)
		// What the upper layer's file system has no place for is lost, unless it says who may do what.
		if e == unix.EOPNOTSUPP && !vital(name) {
			continue
		}
		if e != 0 {
			return e
		}
	}
	return 0
}

// vital says whether a file must not lose an attribute (fs/overlayfs/copy_up.c, ovl_must_copy_xattr).
func vital(name string) bool {
	return name == "system.posix_acl_access" || name == "system.posix_acl_default" || len(name) > 9 && name[:9] == "security."
}

// publish gives n its copy and puts that in place.
func (fs *FS) publish(c *fsbackend.Context, n *node, m *made) errno {
	fs.mu.RLock()
	p, name := n.parent, n.name
	fs.mu.RUnlock()
	if p == nil {
		// It has no name any more, nor does its copy get one.
		if m.name != nil {
			if e := fs.upper.r.Unlink(c, fs.work, m.name); e != 0 {
				return e
			}
			m.name = nil
		}
		e := fs.adopt(c, n, m)
		if e == 0 && m.fh != 0 {
			fs.mu.Lock()
			if n.dead {
				e = unix.ESTALE
			} else {
				n.anchor, m.fh = &file{real{fs.upper, m.node}, m.fh}, 0
			}
			fs.mu.Unlock()
		}
		return e
	}
	up := p.upper.Load()
	if up == 0 {
		return errMoved
	}
	if e := p.lock(c); e != 0 {
		return e
	}
	defer p.unlock()
	fs.mu.RLock()
	stays := n.parent == p && n.name == name
	fs.mu.RUnlock()
	if !stays {
		return errMoved
	}
	// The directory is not to look changed.
	var attr fuseproto.AttrOut
	get := fuseproto.GetattrIn{InHeader: header(up)}
	if e := fs.upper.r.Getattr(c, &get, &attr); e != 0 {
		return e
	}
	// Where it cannot be marked, the copy gets another inode number when it is looked up next.
	if e := fs.markImpureDir(c, p); e != 0 && e != unix.EPERM && e != unix.EACCES {
		return e
	}
	if e := fs.putInPlace(c, m, up, fsbackend.MakeName(name)); e != 0 {
		return e
	}
	in := fuseproto.SetattrIn{}
	in.InHeader = header(up)
	in.Valid = fuseproto.FATTR_ATIME | fuseproto.FATTR_MTIME
	in.Atime, in.Atimensec, in.Mtime, in.Mtimensec = attr.Atime, attr.Atimensec, attr.Mtime, attr.Mtimensec
	var out fuseproto.AttrOut
	_ = fs.upper.r.Setattr(c, &in, &out)
	p.dir.version.Add(1)
	fs.noteBelow(n, belowSomething)
	return fs.adopt(c, n, m)
}

// putInPlace gives a copy the name where its original is seen.
func (fs *FS) putInPlace(c *fsbackend.Context, m *made, dir uint64, name fsbackend.Name) errno {
	if m.name != nil {
		in := fuseproto.Rename2In{InHeader: header(fs.work), Newdir: dir}
		if e := fs.upper.r.Rename(c, &in, m.name, name); e != 0 {
			return e
		}
		m.name = nil
		return 0
	}
	in := fuseproto.LinkIn{InHeader: header(dir), Oldnodeid: m.node}
	var out fuseproto.EntryOut
	e := fs.upper.r.Link(c, &in, name, &out)
	if e == 0 {
		fs.upper.r.Forget(out.NodeId, 1)
	} else if cannot(e) {
		fs.noTmpfile.Store(true)
		e = errMoved // once more, with a name
	}
	return e
}

// adopt makes the copy n's file.
func (fs *FS) adopt(c *fsbackend.Context, n *node, m *made) errno {
	if n.linked {
		// The number stays its other names': they are another file now.
		var attr fuseproto.AttrOut
		in := fuseproto.GetattrIn{InHeader: header(m.node)}
		if e := fs.upper.r.Getattr(c, &in, &attr); e == 0 {
			n.ino.Store(fs.upper.ino(attr.Ino))
		}
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if n.dead {
		return unix.ESTALE
	}
	n.upper.Store(m.node)
	n.origin.Store(true)
	fs.byUpper[m.node] = n
	if n.dir != nil {
		n.dir.parts[0].impure.Store(impureNot)
		n.dir.version.Add(1)
	}
	return 0
}

// discard takes a copy away that did not come to its place.
func (fs *FS) discard(c *fsbackend.Context, m *made) {
	if m.name != nil && m.node != 0 {
		if m.dir {
			_ = fs.upper.r.Rmdir(c, fs.work, m.name)
		} else {
			_ = fs.upper.r.Unlink(c, fs.work, m.name)
		}
	}
	if m.node != 0 {
		fs.upper.r.Forget(m.node, 1)
	}
}

// cleanWork takes out of the work directory what a crash has left there: what was being made, and directories on their way out.
func (fs *FS) cleanWork() error {
	c := &fsbackend.Context{MayBlock: true}
	if e := fs.purge(c, fs.work, 0); e != 0 {
		return fmt.Errorf("clean the work directory: %w", e)
	}
	return nil
}

// maxPurge bounds how deep purge goes: the overlay itself leaves directories of whiteouts alone.
const maxPurge = 8

// purge removes all that is in a directory of the upper layer.
func (fs *FS) purge(c *fsbackend.Context, dir uint64, depth int) errno {
	type child struct {
		name string
		dir  bool
	}
	var children []child
	if e := fs.each(c, real{fs.upper, dir}, func(d *dirent) bool {
		if depth == 0 && d.name[0] != '#' {
			return true // not the overlay's: somebody gave it a directory that is in use
		}
		children = append(children, child{string(d.name), d.typ == unix.DT_DIR})
		return true
	}); e != 0 {
		return e
	}
	r := fs.upper.r
	for _, x := range children {
		name := fsbackend.MakeName(x.name)
		var e errno
		if x.dir && depth < maxPurge {
			var out fuseproto.EntryOut
			if e = fs.upper.lookup(c, dir, name, &out); e == 0 {
				e = fs.purge(c, out.NodeId, depth+1)
				r.Forget(out.NodeId, 1)
			}
			if e == 0 {
				e = r.Rmdir(c, dir, name)
			}
		} else {
			e = r.Unlink(c, dir, name)
		}
		if e != 0 && e != unix.ENOENT {
			return e
		}
	}
	return 0
}

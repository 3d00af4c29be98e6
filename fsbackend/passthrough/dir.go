package passthrough

import (
	"bytes"
	"encoding/binary"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// Opendir implements fsbackend.DirReader.
func (fs *FS) Opendir(_ *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	if fs.withoutOpen(fuseproto.FUSE_NO_OPENDIR_SUPPORT) {
		return unix.ENOSYS
	}
	fh, errno := fs.openDir(in.NodeId, in.Flags)
	out.Fh = fh
	return errno
}

// openDir opens a directory for the guest.
func (fs *FS) openDir(node uint64, guestFlags uint32) (uint64, errno) {
	var r ref
	if errno := fs.resolve(node, &r); errno != 0 {
		return 0, errno
	}
	defer fs.put(&r)
	if r.typ != typeDir {
		return 0, unix.ENOTDIR
	}
	flags := unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	if fs.cfg.PreserveNoatime {
		flags |= int(guestFlags) & unix.O_NOATIME
	}
	fd, errno := sys.OpenDot(r.fd, flags)
	if errno != 0 {
		return 0, limit(errno)
	}
	return fs.openHandle(node, fd, uint32(flags), true)
}

// Releasedir implements fsbackend.DirReader.
func (fs *FS) Releasedir(_ *fsbackend.Context, in *fuseproto.ReleaseIn) {
	fs.release(in)
}

// Readdir implements fsbackend.DirReader.
func (fs *FS) Readdir(_ *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return fs.list(in, out)
}

// Readdirplus implements fsbackend.DirPlusReader.
func (fs *FS) Readdirplus(_ *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return fs.list(in, out)
}

// Sizes of struct linux_dirent64: an entry's fixed part, and the most that one takes.
const (
	direntHeader = 19
	direntMax    = 280
)

// list adds entries from offset in.Offset on until the reply is full or the directory at its end. The offsets are the
// host's own.
func (fs *FS) list(in *fuseproto.ReadIn, out *fsbackend.DirList) errno {
	if in.Offset > math.MaxInt64 {
		return unix.EINVAL
	}
	h, errno := fs.use(in.Fh, in.NodeId)
	if errno != 0 {
		return errno
	}
	defer fs.handles.put(h)
	if !h.dir {
		return unix.ENOTDIR
	}
	var mount uint16
	if !fs.fixed(in.NodeId) && out.Plus {
		s, n := fs.nodes.lock(in.NodeId)
		if n != nil {
			mount = n.mount
		}
		s.mu.Unlock()
	}
	dir := ref{fd: int(h.fd), mount: mount, typ: typeDir}

	l := h.list
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.letGo(&fs.handles)
	if l.pos != int64(in.Offset) {
		l.rest = nil
		if _, errno := sys.Lseek(int(h.fd), int64(in.Offset), unix.SEEK_SET); errno != 0 {
			return errno
		}
		l.pos = int64(in.Offset)
	}
	for atEnd := false; out.Fits(1); {
		if len(l.rest) == 0 {
			if atEnd && out.Written() > 0 {
				return 0 // most likely; the guest asks again to be sure
			}
			size := l.room(&fs.handles, out)
			n, errno := sys.Getdents64(int(h.fd), l.buf[:size])
			if errno != 0 {
				l.pos = -1
				if out.Written() > 0 {
					return 0
				}
				return errno
			}
			if n == 0 {
				return 0
			}
			l.rest, atEnd = l.buf[:n], size-n >= direntMax
		}
		if !fs.listEntries(l, &dir, in.NodeId, out) {
			return 0
		}
	}
	return 0
}

// listing is where the reading of a directory is. mu is held while it goes on: there is one offset, the descriptor's.
type listing struct {
	mu   sync.Mutex
	pos  int64   // offset of the first entry of rest or, if there are none, the descriptor's; -1: unknown
	rest []byte  // what has been read into buf and not been listed
	buf  *buffer // nil: none
	kept bool    // buf may stay while rest is not empty
}

// Buffers that stay with directories: a guest has as many of those open as it likes. One is not larger than a C library's.
const (
	maxKept  = 64
	keptSize = 32 << 10
)

// room gets l a buffer and returns how much of it to read to. What does not fit in the reply waits for the next where it may: to come
// back to the middle of a directory is dear. Where it may not, little more is read than will fit: it is read again.
func (l *listing) room(t *handleTable, out *fsbackend.DirList) int {
	if l.buf == nil {
		l.buf = getBuffer()
		if l.kept = t.kept.Add(1) <= maxKept; !l.kept {
			t.kept.Add(-1)
		}
	}
	if l.kept {
		return keptSize
	}
	size := out.Len()
	if out.Plus {
		size /= 4 // an entry of READDIRPLUS is about four times as long
	}
	return min(max(size, direntMax), len(l.buf))
}

// letGo gives the buffer back unless something in it is to stay.
func (l *listing) letGo(t *handleTable) {
	if l.buf == nil || l.kept && len(l.rest) > 0 {
		return
	}
	if len(l.rest) > 0 {
		l.rest, l.pos = nil, -1 // the descriptor is further on than the reply
	}
	if l.kept {
		t.kept.Add(-1)
	}
	putBuffer(l.buf)
	l.buf, l.kept = nil, false
}

// listEntries adds the linux_dirent64 records in l.rest and takes those away from it that it has added. It reports false at the
// first that does not fit.
func (fs *FS) listEntries(l *listing, dir *ref, node uint64, out *fsbackend.DirList) bool {
	for len(l.rest) >= direntHeader {
		ino := binary.NativeEndian.Uint64(l.rest)
		off := binary.NativeEndian.Uint64(l.rest[8:])
		size := int(binary.NativeEndian.Uint16(l.rest[16:]))
		typ := uint32(l.rest[18])
		if size < direntHeader || size > len(l.rest) {
			break
		}
		name := l.rest[direntHeader:size]
		if end := bytes.IndexByte(name, 0); end >= 0 && end < len(name) {
			name = name[:end+1]
		}
		if len(name) >= 2 && !fs.listEntry(dir, node, ino, off, typ, name, out) {
			return false
		}
		l.rest, l.pos = l.rest[size:], int64(off)
	}
	l.rest = nil
	return true
}

// listEntry adds one entry, whose name has its NUL, and reports whether it fitted. An entry that is gone is left out; one
// that cannot be looked at is listed without its attributes.
func (fs *FS) listEntry(dir *ref, node, ino, off uint64, typ uint32, cname []byte, out *fsbackend.DirList) bool {
	name := cname[:len(cname)-1]
	if !out.Fits(len(name)) {
		return false
	}
	dotdot := string(name) == ".."
	if dotdot {
		ino = fs.parentIno(node)
	}
	if !out.Plus {
		return out.Add(ino, off, typ, name)
	}
	var entry fuseproto.EntryOut
	if dotdot || string(name) == "." {
		entry.Attr.Ino, entry.Attr.Mode = ino, typ<<12
		return out.AddPlus(&entry, ino, off, typ, name)
	}
	var st unix.Statx_t
	errno := sys.Statx(dir.fd, &cname[0], statxFlags, statxMask, &st)
	if errno == unix.ENOENT {
		return true
	}
	if errno == 0 && fs.enter(dir, node, name, &st, -1, -1, &entry) == 0 {
		ino, typ = st.Ino, uint32(st.Mode>>12)
	} else {
		entry = fuseproto.EntryOut{}
		entry.Attr.Ino, entry.Attr.Mode = ino, typ<<12
	}
	return out.AddPlus(&entry, ino, off, typ, name)
}

// parentIno is the inode number of the directory that the guest has node in, node's own if there is none that it knows: what is above
// the share is not its business, nor above where a mount has come from, or where the host has moved a directory to.
func (fs *FS) parentIno(node uint64) uint64 {
	if node == rootID {
		return fs.rootIno
	}
	ino, parent := fs.locate(node)
	if parent == rootID {
		return fs.rootIno
	}
	if above, _ := fs.locate(parent); above != 0 {
		return above
	}
	return ino
}

// locate returns a node's inode number and the nodeid of the directory that it was last seen in, 0 and 0 if there is no such node.
func (fs *FS) locate(id uint64) (ino, parent uint64) {
	s, n := fs.nodes.lock(id)
	defer s.mu.Unlock()
	if n == nil {
		return 0, 0
	}
	return n.ino, n.parent
}

package share

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// madeUp is the backend of directories on the way to a mount point that no backend has. They are empty: what is in them is
// positions, which the share adds as it does to any directory. Every position on the way has one here, used or not. One of its
// own is the root of a share without a graft there.
type madeUp struct{ part *part }

func (s *Share) newMadeUp() *part {
	m := new(madeUp)
	m.part = s.newPart(&Graft{Path: "/", Backend: m, Policy: Policy{ReadOnly: true}})
	m.part.counted, m.part.madeUp = false, true
	return m.part
}

// attr are the attributes of the directory made up for pos.
func (m *madeUp) attr(pos *position, number uint64) fuseproto.Attr {
	dirs := uint32(0)
	if in := pos.children.Load(); in != nil {
		dirs = uint32(in.dirs)
	}
	changed := time.Unix(0, pos.changed.Load())
	sec, nsec := uint64(changed.Unix()), uint32(changed.Nanosecond())
	return fuseproto.Attr{
		// Inode numbers of backends that share a device number with this one do not reach so high.
		Ino: m.part.base | number, Mode: unix.S_IFDIR | 0o755, Nlink: 2 + dirs, Blksize: 4096,
		Atime: sec, Mtime: sec, Ctime: sec, Atimensec: nsec, Mtimensec: nsec, Ctimensec: nsec,
	}
}

// Lookup implements fsbackend.Backend.
func (m *madeUp) Lookup(*fsbackend.Context, uint64, fsbackend.Name, *fuseproto.EntryOut) Errno {
	return unix.ENOENT
}

// Getattr implements fsbackend.Backend. Numbers are never used again in a session.
func (m *madeUp) Getattr(_ *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	pos := m.part.dir(in.NodeId)
	if pos == nil {
		return unix.ESTALE
	}
	out.Attr = m.attr(pos, in.NodeId)
	if m.part.share.dynamic {
		out.AttrValidNsec = 1 // at once stale
	}
	return fsbackend.OK
}

// Opendir implements fsbackend.DirReader.
func (m *madeUp) Opendir(_ *fsbackend.Context, in *fuseproto.OpenIn, _ *fuseproto.OpenOut) Errno {
	if m.part.dir(in.NodeId) == nil {
		return unix.ESTALE
	}
	return fsbackend.OK
}

// Readdir implements fsbackend.DirReader.
func (m *madeUp) Readdir(*fsbackend.Context, *fuseproto.ReadIn, *fsbackend.DirList) Errno {
	return fsbackend.OK
}

// Releasedir implements fsbackend.DirReader.
func (m *madeUp) Releasedir(*fsbackend.Context, *fuseproto.ReleaseIn) {}

// Forget implements fsbackend.Backend.
func (m *madeUp) Forget(uint64, uint64) {}

// Reset implements fsbackend.Backend.
func (m *madeUp) Reset() {}

// Close implements fsbackend.Backend.
func (m *madeUp) Close() error { return nil }

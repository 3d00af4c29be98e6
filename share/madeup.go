package share

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// madeUp is the backend of directories on the way to a mount point that no backend has. They are empty: what is in them is
// positions, which the share adds as it does to any directory. Every position has one here, used or not.
type madeUp struct {
	since time.Time
	dirs  []fuseproto.Attr // by number
}

// add makes a directory with n directories in it and returns its number. index is the part's.
func (m *madeUp) add(index uint64, n int) uint64 {
	if m.dirs == nil {
		m.since = time.Now()
		m.dirs = make([]fuseproto.Attr, fuseproto.FUSE_ROOT_ID+1) // neither is a position
	}
	number := uint64(len(m.dirs))
	sec, nsec := uint64(m.since.Unix()), uint32(m.since.Nanosecond())
	m.dirs = append(m.dirs, fuseproto.Attr{
		// Inode numbers of backends that share a device number with this one do not reach so high.
		Ino: index<<indexShift | number, Mode: unix.S_IFDIR | 0o755, Nlink: 2 + uint32(n), Blksize: 4096,
		Atime: sec, Mtime: sec, Ctime: sec, Atimensec: nsec, Mtimensec: nsec, Ctimensec: nsec,
	})
	return number
}

// Lookup implements fsbackend.Backend.
func (m *madeUp) Lookup(*fsbackend.Context, uint64, fsbackend.Name, *fuseproto.EntryOut) Errno {
	return unix.ENOENT
}

// Getattr implements fsbackend.Backend.
func (m *madeUp) Getattr(_ *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	if in.NodeId >= uint64(len(m.dirs)) || m.dirs[in.NodeId].Mode == 0 {
		return unix.ESTALE
	}
	out.Attr = m.dirs[in.NodeId]
	return fsbackend.OK
}

// Forget implements fsbackend.Backend.
func (m *madeUp) Forget(uint64, uint64) {}

// Reset implements fsbackend.Backend.
func (m *madeUp) Reset() {}

// Close implements fsbackend.Backend.
func (m *madeUp) Close() error { return nil }

package lazyimage

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// dots are the entries "." and "..", which come first. An entry's offset is its number and 1, and stays it.
const dots = 2

// Opendir implements fsbackend.DirReader.
func (f *FS) Opendir(_ *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) (errno fsbackend.Errno) {
	switch n := f.at(in.NodeId); {
	case f.isState(in.NodeId) && in.NodeId == f.stateRoot():
	case f.isState(in.NodeId):
		return unix.ENOTDIR
	case n == nil:
		return unix.ESTALE
	case !n.is(unix.S_IFDIR):
		return unix.ENOTDIR
	}
	out.Fh, errno = f.handles.insert(in.NodeId, nil)
	return errno
}

// Releasedir implements fsbackend.DirReader.
func (f *FS) Releasedir(_ *fsbackend.Context, in *fuseproto.ReleaseIn) {
	f.handles.remove(in.Fh, in.NodeId)
}

// Readdir implements fsbackend.DirReader.
func (f *FS) Readdir(_ *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return f.readdir(in, out)
}

// Readdirplus implements fsbackend.DirPlusReader.
func (f *FS) Readdirplus(_ *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	return f.readdir(in, out)
}

func (f *FS) readdir(in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	if !f.handles.valid(in.Fh, in.NodeId) {
		return unix.EBADF
	}
	if f.isState(in.NodeId) {
		return f.readdirState(in, out)
	}
	dir := f.at(in.NodeId)
	if dir == nil || !dir.is(unix.S_IFDIR) {
		return unix.ENOTDIR
	}
	var plus fuseproto.EntryOut
	for off := in.Offset; off < uint64(dir.count)+dots; off++ {
		if off < dots {
			parent := in.NodeId
			if off == 1 && in.NodeId != fuseproto.FUSE_ROOT_ID {
				parent = uint64(f.entries[dir.entry].parent) + 1
			}
			if !addDot(off, parent, out) {
				break
			}
			continue
		}
		e := &f.entries[dir.first+uint32(off-dots)]
		typ := uint32(f.nodes[e.node].mode&unix.S_IFMT) >> 12
		if !out.Plus {
			if !out.Add(uint64(e.node)+1, off+1, typ, f.name(e)) {
				break
			}
			continue
		}
		f.entryOut(e.node, &plus)
		if !out.AddPlus(&plus, plus.Ino, off+1, typ, f.name(e)) {
			break
		}
	}
	return fsbackend.OK
}

var dotNames = [dots][]byte{[]byte("."), []byte("..")}

// addDot adds entry number off, "." or "..", which is the directory with inode number ino.
func addDot(off, ino uint64, out *fsbackend.DirList) bool {
	if !out.Plus {
		return out.Add(ino, off+1, unix.DT_DIR, dotNames[off])
	}
	var entry fuseproto.EntryOut
	entry.Ino, entry.Mode = ino, unix.S_IFDIR
	return out.AddPlus(&entry, ino, off+1, unix.DT_DIR, dotNames[off])
}

package lazyimage

import (
	"bytes"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// node is a file. Node number i has the nodeid and inode number i+1: it follows from the image alone, so that it is the same after
// a restart.
type node struct {
	size      uint64
	mtime     int64
	mtimeNsec uint32
	uid, gid  uint32
	nlink     uint32
	// first and count are a directory's entries in tree.entries, a regular file's pieces in tree.spanOff, or a symbolic link's target
	// in tree.text; first is a device's number.
	first, count uint32
	xattrs       uint32 // in tree.xattrSets; 0 is none
	entry        uint32 // its first name, in tree.entries; the root has none
	layer        uint16 // that it comes from
	mode         uint16
	sparse       bool // it has holes, see tree.blocks
}

// entry is a name in a directory. Those of a directory stand together, in order.
type entry struct {
	name    uint32 // in tree.text
	nameLen uint8
	node    uint32
	parent  uint32
}

// tree is the image's files, in arrays without pointers, so that the garbage collector has nothing to look at.
type tree struct {
	nodes   []node
	entries []entry
	text    []byte

	// spanOff and spanChunk are where pieces of files begin, and which chunks they are.
	spanOff   []uint64
	spanChunk []uint32

	// chunkSizes are of all layers' chunks; those of layer i begin at chunkBase[i-firstLayer].
	chunkSizes []uint32
	chunkBase  []uint32
	firstLayer int

	xattrSets [][]xattr         // the first is empty
	blocks    map[uint32]uint64 // of 512 bytes, for nodes that have holes
	bytes     uint64            // of contents
}

// xattr is an extended attribute. Its name has a NUL behind it.
type xattr struct{ name, value []byte }

// validity is how long a guest may trust attributes, in seconds: the tree never changes. Names are up to the share, which may be told to
// put something else in their place.
const validity = 86400

// at returns the node that the guest calls id, nil if there is none in the tree.
func (t *tree) at(id uint64) *node {
	if id == 0 || id > uint64(len(t.nodes)) {
		return nil
	}
	return &t.nodes[id-1]
}

func (n *node) is(typ uint16) bool { return n.mode&unix.S_IFMT == typ }

// find returns the node of a directory's entry, and false if there is none.
func (t *tree) find(dir *node, name []byte) (uint32, bool) {
	lo, hi := dir.first, dir.first+dir.count
	for lo < hi {
		mid := lo + (hi-lo)/2
		e := &t.entries[mid]
		switch c := bytes.Compare(t.text[e.name:e.name+uint32(e.nameLen)], name); {
		case c == 0:
			return e.node, true
		case c < 0:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return 0, false
}

func (t *tree) name(e *entry) []byte { return t.text[e.name : e.name+uint32(e.nameLen)] }

// path returns the path of the node's first name, "" for the root.
func (t *tree) path(i uint32) string {
	var names [][]byte
	for i != 0 {
		e := &t.entries[t.nodes[i].entry]
		names = append(names, t.name(e))
		i = e.parent
	}
	for a, b := 0, len(names)-1; a < b; a, b = a+1, b-1 {
		names[a], names[b] = names[b], names[a]
	}
	return string(bytes.Join(names, []byte("/")))
}

// blockSize is what st_blksize says, and the size of a directory.
const blockSize = 4096

// attr fills out with the attributes of node number i.
func (t *tree) attr(i uint32, out *fuseproto.Attr) {
	n := &t.nodes[i]
	sec := uint64(n.mtime)
	*out = fuseproto.Attr{
		Ino: uint64(i) + 1, Mode: uint32(n.mode), Nlink: n.nlink, Size: n.size, Blksize: blockSize, Blocks: (n.size + 511) / 512,
		Atime: sec, Mtime: sec, Ctime: sec, Atimensec: n.mtimeNsec, Mtimensec: n.mtimeNsec, Ctimensec: n.mtimeNsec,
	}
	out.Uid, out.Gid = n.uid, n.gid
	switch {
	case n.is(unix.S_IFLNK):
		out.Blocks = 0
	case n.sparse:
		out.Blocks = t.blocks[i]
	case n.is(unix.S_IFCHR), n.is(unix.S_IFBLK):
		out.Rdev = n.first
	}
}

// entryOut fills out with node number i.
func (t *tree) entryOut(i uint32, out *fuseproto.EntryOut) {
	out.NodeId, out.AttrValid = uint64(i)+1, validity
	t.attr(i, &out.Attr)
}

// span returns the number of the first of n's pieces that ends behind off, relative to n.first; n.count if there is none.
func (t *tree) span(n *node, off uint64) uint32 {
	return uint32(sort.Search(int(n.count), func(i int) bool {
		at := n.first + uint32(i)
		return t.spanOff[at]+uint64(t.chunkSizes[t.spanChunk[at]]) > off
	}))
}

// Lookup implements fsbackend.Backend.
func (f *FS) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if f.isState(parent) || parent == fuseproto.FUSE_ROOT_ID && string(name) == stateName {
		return f.lookupState(c, parent, name, out)
	}
	dir := f.at(parent)
	switch {
	case dir == nil:
		return unix.ESTALE
	case !dir.is(unix.S_IFDIR):
		return unix.ENOTDIR
	}
	i, ok := f.find(dir, name)
	if !ok {
		return unix.ENOENT
	}
	f.entryOut(i, out)
	return fsbackend.OK
}

// Getattr implements fsbackend.Backend.
func (f *FS) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	if in.Flags()&fuseproto.FUSE_GETATTR_FH != 0 && !f.handles.valid(in.Fh(), in.NodeId) {
		return unix.EBADF
	}
	if f.isState(in.NodeId) {
		return f.getattrState(c, in, out)
	}
	if f.at(in.NodeId) == nil {
		return unix.ESTALE
	}
	out.AttrValid = validity
	f.attr(uint32(in.NodeId-1), &out.Attr)
	return fsbackend.OK
}

// Readlink implements fsbackend.Readlinker.
func (f *FS) Readlink(_ *fsbackend.Context, id uint64, dst *fsbackend.Sink) fsbackend.Errno {
	n := f.at(id)
	switch {
	case f.isState(id):
		return unix.EINVAL
	case n == nil:
		return unix.ESTALE
	case !n.is(unix.S_IFLNK):
		return unix.EINVAL
	}
	if target := f.text[n.first : n.first+n.count]; dst.Write(target) < len(target) {
		return unix.EIO
	}
	return fsbackend.OK
}

// Getxattr implements fsbackend.XattrReader.
func (f *FS) Getxattr(_ *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	set, errno := f.xattrsOf(in.NodeId)
	if errno != 0 {
		return 0, errno
	}
	for i := range set {
		if a := &set[i]; string(a.name[:len(a.name)-1]) == string(name) {
			return give(in.Size, dst, len(a.value), func() bool { return dst.Write(a.value) == len(a.value) })
		}
	}
	return 0, unix.ENODATA
}

// Listxattr implements fsbackend.XattrReader.
func (f *FS) Listxattr(_ *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	set, errno := f.xattrsOf(in.NodeId)
	if errno != 0 {
		return 0, errno
	}
	size := 0
	for i := range set {
		size += len(set[i].name)
	}
	return give(in.Size, dst, size, func() bool {
		for i := range set {
			if dst.Write(set[i].name) < len(set[i].name) {
				return false
			}
		}
		return true
	})
}

func (f *FS) xattrsOf(id uint64) ([]xattr, fsbackend.Errno) {
	if f.isState(id) {
		return nil, fsbackend.OK
	}
	n := f.at(id)
	if n == nil {
		return nil, unix.ESTALE
	}
	return f.xattrSets[n.xattrs], fsbackend.OK
}

// give answers with size bytes that write puts in, or, where the guest has room for nothing, with their number alone.
func give(room uint32, dst *fsbackend.Sink, size int, write func() bool) (uint32, fsbackend.Errno) {
	switch {
	case room == 0:
	case size > dst.Len():
		return 0, unix.ERANGE
	case !write():
		return 0, unix.EFAULT
	}
	return uint32(size), fsbackend.OK
}

// Statfs implements fsbackend.StatFSer: a file system that is full.
func (f *FS) Statfs(_ *fsbackend.Context, id uint64, out *fuseproto.StatfsOut) fsbackend.Errno {
	if f.at(id) == nil && !f.isState(id) {
		return unix.ESTALE
	}
	out.Bsize, out.Frsize, out.NameLen = blockSize, blockSize, unix.NAME_MAX
	out.Blocks, out.Files = (f.bytes+blockSize-1)/blockSize, uint64(len(f.nodes))
	return fsbackend.OK
}

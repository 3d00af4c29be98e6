package pluginlayer

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/plugin"
)

// tree is a backend of a layer whose files the plug-in describes and opens. A node is a path.
type tree struct {
	*layer
	conn *Conn

	mu       sync.Mutex // never held across a call
	nodes    map[uint64]*node
	byPath   map[string]*node
	handles  map[uint64]*handle
	lastNode uint64
	lastFh   uint64
	files    int // of handles
	listed   int // names that listings have
}

// node is a path that the guest knows. All but lookups never changes; that is under tree.mu.
type node struct {
	id      uint64
	path    string
	typ     uint32 // S_IFMT bits
	lookups uint64
}

func newTree(c *Conn, l *layer) *tree {
	t := &tree{layer: l, conn: c, nodes: make(map[uint64]*node), byPath: make(map[string]*node), handles: make(map[uint64]*handle)}
	root := &node{id: fuseproto.FUSE_ROOT_ID, path: ".", typ: unix.S_IFDIR}
	t.nodes[root.id], t.byPath[root.path], t.lastNode = root, root, root.id
	return t
}

// node returns what the guest calls id.
func (t *tree) node(id uint64) (*node, fsbackend.Errno) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[id]
	if n == nil {
		return nil, unix.ESTALE
	}
	return n, fsbackend.OK
}

// directory is node for a directory.
func (t *tree) directory(id uint64) (*node, fsbackend.Errno) {
	n, errno := t.node(id)
	if errno == 0 && n.typ != unix.S_IFDIR {
		return nil, unix.ENOTDIR
	}
	return n, errno
}

// adopt counts a lookup of the file at path.
func (t *tree) adopt(path string, typ uint32) (uint64, fsbackend.Errno) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.byPath[path]
	if n == nil || n.typ != typ {
		if len(t.nodes) > t.conn.cfg.MaxInodes {
			return 0, unix.ENFILE
		}
		t.lastNode++
		n = &node{id: t.lastNode, path: path, typ: typ}
		t.nodes[n.id] = n
		t.byPath[path] = n // in place of one of another type, which is stale from here on
	}
	n.lookups++
	return n.id, fsbackend.OK
}

// WantFlags implements fsbackend.Wanter.
func (t *tree) WantFlags(defaults uint64) uint64 {
	if t.ACL() {
		defaults |= fuseproto.FUSE_POSIX_ACL
	}
	return defaults
}

// Forget implements fsbackend.Backend.
func (t *tree) Forget(id, count uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.nodes[id]; n != nil {
		n.lookups -= min(count, n.lookups)
		t.drop(n)
	}
}

// drop takes a node out of the tables that the guest does not know any more. mu is held.
func (t *tree) drop(n *node) {
	if n.id == fuseproto.FUSE_ROOT_ID || n.lookups > 0 {
		return
	}
	delete(t.nodes, n.id)
	if t.byPath[n.path] == n {
		delete(t.byPath, n.path)
	}
}

// Reset implements fsbackend.Backend.
func (t *tree) Reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for fh, h := range t.handles {
		t.end(fh, h)
	}
	for _, n := range t.nodes {
		n.lookups = 0
		t.drop(n)
	}
}

// Close implements fsbackend.Backend.
func (t *tree) Close() error {
	t.Reset()
	t.conn.giveUp(t.layer)
	return nil
}

// Stats implements fsbackend.Statser.
func (t *tree) Stats() fsbackend.Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	return fsbackend.Stats{
		Inodes: uint64(len(t.nodes)), Tiers: fsbackend.InodeTiers{Name: uint64(len(t.nodes))}, FDs: fsbackend.FDs{Open: uint64(t.files)},
	}
}

// ask asks the plug-in something of a path, where that may sleep.
func (t *tree) ask(c *fsbackend.Context, q plugin.Request) answer {
	return t.call(q, wait{c.Cancel, t.conn.cfg.Timeout})
}

// broken logs that the plug-in says what cannot be, which the guest gets EIO for.
func (t *tree) broken(path string, err error) fsbackend.Errno {
	t.conn.log.Warn("layer plug-in answers what cannot be", "layer", t.text, "path", path, "error", err)
	return unix.EIO
}

// join is the path of name in the directory dir; false if that is too long.
func join(dir string, name []byte) (string, bool) {
	if dir == "." {
		return string(name), true
	}
	p := dir + "/" + string(name)
	return p, len(p) <= plugin.MaxPath
}

// inode is the inode number of the file at path, which the plug-in says to be ino: the same in every session.
func (t *tree) inode(path string, ino uint64) uint64 {
	switch {
	case t.flags&plugin.LayerStableIno != 0 && ino != 0:
		return ino
	case path == ".":
		return fuseproto.FUSE_ROOT_ID
	}
	return hash(t.text + "\x00" + path)
}

// attr fills out with what the plug-in says of the file at path, if that can be.
func (t *tree) attr(path string, a *plugin.Attr, out *fuseproto.Attr) error {
	const most = 1 << 12 // of majors; minors have 20 bits
	typ := a.Mode & unix.S_IFMT
	*out = fuseproto.Attr{
		Ino: t.inode(path, a.Ino), Size: a.Size, Blocks: a.Blocks, Mode: a.Mode, Nlink: max(a.Nlink, 1), Blksize: 4096,
		Atime: uint64(a.Atime.Sec), Mtime: uint64(a.Mtime.Sec), Ctime: uint64(a.Ctime.Sec),
		Atimensec: a.Atime.Nsec, Mtimensec: a.Mtime.Nsec, Ctimensec: a.Ctime.Nsec,
	}
	out.Uid, out.Gid = a.UID, a.GID
	switch typ {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFIFO, unix.S_IFSOCK:
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.RdevMajor >= most || a.RdevMinor >= 1<<20 {
			return fmt.Errorf("device %d:%d, expected numbers below %d and %d", a.RdevMajor, a.RdevMinor, most, 1<<20)
		}
		out.Rdev = a.RdevMinor&0xff | a.RdevMajor<<8 | a.RdevMinor&^0xff<<12 // new_encode_dev, include/linux/kdev_t.h
	default:
		return fmt.Errorf("mode %#o, expected a type of file in it", a.Mode)
	}
	switch {
	case a.Mode&^(unix.S_IFMT|0o7777) != 0:
		return fmt.Errorf("mode %#o, expected no more than a type and permissions", a.Mode)
	case a.Size > math.MaxInt64:
		return fmt.Errorf("size %d, expected less than 2^63", a.Size)
	case a.Atime.Nsec >= 1e9 || a.Mtime.Nsec >= 1e9 || a.Ctime.Nsec >= 1e9:
		return errors.New("times with 1e9 nanoseconds or more")
	case a.Ino == 0 && t.flags&plugin.LayerStableIno != 0:
		return errors.New("inode number 0 in a layer with stable ones")
	case path == "." && typ != unix.S_IFDIR:
		return fmt.Errorf("mode %#o of the root, expected a directory's", a.Mode)
	}
	return nil
}

// entry fills out with what the plug-in says of the file at path, and counts a lookup.
func (t *tree) entry(path string, a *plugin.Attr, out *fuseproto.EntryOut) fsbackend.Errno {
	if err := t.attr(path, a, &out.Attr); err != nil {
		return t.broken(path, err)
	}
	var errno fsbackend.Errno
	out.NodeId, errno = t.adopt(path, out.Mode&unix.S_IFMT)
	return errno
}

// Lookup implements fsbackend.Backend.
func (t *tree) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	n, errno := t.directory(parent)
	if errno != 0 {
		return errno
	}
	path, ok := join(n.path, name)
	if !ok {
		return unix.ENAMETOOLONG
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	a := t.ask(c, plugin.Request{Op: plugin.OpStatat, Path: path})
	if a.Errno != 0 {
		return a.Errno
	}
	return t.entry(path, &a.Attr, out)
}

// stale is what a call on a node answers where its path has gone: the guest's kernel then looks it up again.
func stale(errno fsbackend.Errno) fsbackend.Errno {
	if errno == unix.ENOENT || errno == unix.ENOTDIR {
		return unix.ESTALE
	}
	return errno
}

// Getattr implements fsbackend.Backend. A file that is open is described without the plug-in.
func (t *tree) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	if in.Flags()&fuseproto.FUSE_GETATTR_FH != 0 {
		h, errno := t.pin(in.NodeId, in.Fh())
		if errno != 0 {
			return errno
		}
		defer t.unpin(h)
		if h.file != nil {
			return h.getattr(&out.Attr)
		}
	}
	n, errno := t.node(in.NodeId)
	if errno != 0 {
		return errno
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	a := t.ask(c, plugin.Request{Op: plugin.OpStatat, Path: n.path})
	if a.Errno != 0 {
		return stale(a.Errno)
	}
	if err := t.attr(n.path, &a.Attr, &out.Attr); err != nil {
		return t.broken(n.path, err)
	}
	if out.Mode&unix.S_IFMT != n.typ {
		return unix.ESTALE
	}
	return fsbackend.OK
}

// Readlink implements fsbackend.Readlinker.
func (t *tree) Readlink(c *fsbackend.Context, id uint64, dst *fsbackend.Sink) fsbackend.Errno {
	n, errno := t.node(id)
	switch {
	case errno != 0:
		return errno
	case n.typ != unix.S_IFLNK:
		return unix.EINVAL
	case !c.MayBlock:
		return fsbackend.ErrMayBlock
	}
	a := t.ask(c, plugin.Request{Op: plugin.OpReadlinkat, Path: n.path})
	switch {
	case a.Errno != 0:
		return stale(a.Errno)
	case len(a.Bytes) == 0 || len(a.Bytes) >= unix.PathMax || bytes.IndexByte(a.Bytes, 0) >= 0:
		return t.broken(n.path, fmt.Errorf("a target of %d bytes, expected 1 to %d, without a NUL", len(a.Bytes), unix.PathMax-1))
	}
	dst.Write(a.Bytes)
	return fsbackend.OK
}

// aclPrefix is what the names of POSIX ACLs begin with.
var aclPrefix = []byte("system.posix_acl_")

// Getxattr implements fsbackend.XattrReader.
func (t *tree) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	if t.flags&plugin.LayerXattr == 0 || !t.ACL() && bytes.HasPrefix(name, aclPrefix) {
		return 0, unix.EOPNOTSUPP
	}
	return t.xattr(c, in, plugin.Request{Op: plugin.OpGetxattr, Name: name.String()}, dst)
}

// Listxattr implements fsbackend.XattrReader.
func (t *tree) Listxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	if t.flags&plugin.LayerXattr == 0 {
		return 0, fsbackend.OK
	}
	return t.xattr(c, in, plugin.Request{Op: plugin.OpListxattr}, dst)
}

func (t *tree) xattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, q plugin.Request, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	n, errno := t.node(in.NodeId)
	if errno != 0 {
		return 0, errno
	}
	if !c.MayBlock {
		return 0, fsbackend.ErrMayBlock
	}
	q.Path = n.path
	a := t.ask(c, q)
	if a.Errno != 0 {
		return 0, stale(a.Errno)
	}
	b := a.Bytes
	if q.Op == plugin.OpListxattr {
		var err error
		if b, err = t.names(b); err != nil {
			return 0, t.broken(n.path, err)
		}
	}
	switch {
	case in.Size == 0:
	case len(b) > dst.Len():
		return 0, unix.ERANGE
	default:
		dst.Write(b)
	}
	return uint32(len(b)), fsbackend.OK
}

// names checks a list of names of extended attributes, and leaves out those that the layer does not have.
func (t *tree) names(list []byte) ([]byte, error) {
	out := list[:0]
	for len(list) > 0 {
		end := bytes.IndexByte(list, 0)
		if end < 1 || end > plugin.MaxName {
			return nil, fmt.Errorf("a name of an extended attribute of %d bytes, expected 1 to %d and a NUL", max(end, 0), plugin.MaxName)
		}
		if name := list[:end+1]; t.ACL() || !bytes.HasPrefix(name, aclPrefix) {
			out = append(out, name...)
		}
		list = list[end+1:]
	}
	return out, nil
}

// checkFile sees that f can be read as the file that the plug-in says it is, and whether its file system is memory.
func checkFile(f *sys.FD, size uint64) (memory bool, err error) {
	var st unix.Stat_t
	var fs unix.Statfs_t
	if f == nil {
		return false, errors.New("no descriptor came with an opened file")
	}
	flags, err := unix.FcntlInt(uintptr(f.Int()), unix.F_GETFL, 0)
	switch {
	case err != nil:
		return false, err
	case sys.Fstat(f.Int(), &st) != 0 || st.Mode&unix.S_IFMT != unix.S_IFREG:
		return false, errors.New("the descriptor of an opened file is not a regular file's")
	case uint64(st.Size) != size:
		return false, fmt.Errorf("the descriptor of an opened file has %d bytes, expected %d as its attributes say", st.Size, size)
	case flags&unix.O_ACCMODE == unix.O_WRONLY || flags&(unix.O_PATH|unix.O_DIRECT) != 0:
		return false, fmt.Errorf("the descriptor of an opened file has flags %#x, expected one for reading, without O_DIRECT", flags)
	}
	if err := unix.Fstatfs(f.Int(), &fs); err != nil {
		return false, err
	}
	return fs.Type == unix.TMPFS_MAGIC, nil
}

package fsbackendtest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// Root is the nodeid that every tree starts from.
const Root = fuseproto.FUSE_ROOT_ID

// NewSink returns a Sink over b, cut into pieces of at most piece bytes (0: one piece), as guest memory is.
func NewSink(b []byte, piece int) *fsbackend.Sink {
	s := new(fsbackend.Sink)
	s.Reset(iovecs(b, piece), 0, uint64(len(b)))
	return s
}

// NewSource returns a Source over b, cut as NewSink's.
func NewSource(b []byte, piece int) *fsbackend.Source {
	s := new(fsbackend.Source)
	s.Reset(iovecs(b, piece), 0, uint64(len(b)))
	return s
}

func iovecs(b []byte, piece int) []unix.Iovec {
	if piece == 0 {
		piece = len(b)
	}
	var iov []unix.Iovec
	for len(b) > 0 {
		n := min(piece, len(b))
		iov = append(iov, sys.MakeIovec(b[:n]))
		b = b[n:]
	}
	return iov
}

// Dirent is an entry of a listing.
type Dirent struct {
	Name  string
	Ino   uint64
	Off   uint64
	Type  uint32             // DT_*
	Entry fuseproto.EntryOut // READDIRPLUS only
}

// Client makes requests of a backend as a guest does. It keeps the rule about sleeping: each call is first made where it
// may not sleep, and again where it may if that is what the backend answers. Its methods may be called from several
// goroutines.
type Client struct {
	R      *fsbackend.Resolved
	Caller fuseproto.Caller
	// Piece cuts data and replies into pieces of this many bytes; 0 leaves them whole.
	Piece int
}

// As returns a Client whose requests come from another process of the guest.
func (c *Client) As(uid, gid uint32) *Client {
	d := *c
	d.Caller.Uid, d.Caller.Gid = uid, gid
	return &d
}

// do makes a call as the contract on ErrMayBlock has it.
func (c *Client) do(call func(*fsbackend.Context) fsbackend.Errno) fsbackend.Errno {
	if !c.R.Slow {
		if errno := call(&fsbackend.Context{Caller: c.Caller}); errno != fsbackend.ErrMayBlock {
			return errno
		}
	}
	return c.doBlocking(call)
}

// doBlocking makes a call that is only made where it may sleep.
func (c *Client) doBlocking(call func(*fsbackend.Context) fsbackend.Errno) fsbackend.Errno {
	return call(&fsbackend.Context{Caller: c.Caller, MayBlock: true, Cancel: make(chan struct{})})
}

func (c *Client) header(node uint64) fuseproto.InHeader {
	return fuseproto.InHeader{NodeId: node, Caller: c.Caller}
}

// Lookup finds name in parent.
func (c *Client) Lookup(parent uint64, name string) (out fuseproto.EntryOut, errno fsbackend.Errno) {
	errno = c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		out = fuseproto.EntryOut{}
		return c.R.Lookup(ctx, parent, fsbackend.MakeName(name), &out)
	})
	return out, errno
}

// Getattr returns the attributes of node.
func (c *Client) Getattr(node uint64) (fuseproto.Attr, fsbackend.Errno) {
	return c.getattr(&fuseproto.GetattrIn{InHeader: c.header(node)})
}

// GetattrFh returns the attributes of an open file.
func (c *Client) GetattrFh(node, fh uint64) (fuseproto.Attr, fsbackend.Errno) {
	return c.getattr(&fuseproto.GetattrIn{InHeader: c.header(node), Flags_: fuseproto.FUSE_GETATTR_FH, Fh_: fh})
}

func (c *Client) getattr(in *fuseproto.GetattrIn) (fuseproto.Attr, fsbackend.Errno) {
	var out fuseproto.AttrOut
	errno := c.do(func(ctx *fsbackend.Context) fsbackend.Errno { return c.R.Getattr(ctx, in, &out) })
	return out.Attr, errno
}

// Setattr changes what in.Valid says of node.
func (c *Client) Setattr(node uint64, in fuseproto.SetattrIn) (fuseproto.Attr, fsbackend.Errno) {
	in.InHeader = c.header(node)
	var out fuseproto.AttrOut
	errno := c.do(func(ctx *fsbackend.Context) fsbackend.Errno { return c.R.Setattr(ctx, &in, &out) })
	return out.Attr, errno
}

// Truncate sets the size of node.
func (c *Client) Truncate(node, size uint64) fsbackend.Errno {
	in := fuseproto.SetattrIn{}
	in.Valid, in.Size = fuseproto.FATTR_SIZE, size
	_, errno := c.Setattr(node, in)
	return errno
}

// Chmod sets the permission bits of node.
func (c *Client) Chmod(node uint64, mode uint32) (fuseproto.Attr, fsbackend.Errno) {
	in := fuseproto.SetattrIn{}
	in.Valid, in.Mode = fuseproto.FATTR_MODE, mode
	return c.Setattr(node, in)
}

func (c *Client) entry(call func(*fsbackend.Context, *fuseproto.EntryOut) fsbackend.Errno) (out fuseproto.EntryOut, errno fsbackend.Errno) {
	errno = c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		out = fuseproto.EntryOut{}
		return call(ctx, &out)
	})
	return out, errno
}

// Mkdir makes a directory.
func (c *Client) Mkdir(parent uint64, name string, mode uint32) (fuseproto.EntryOut, fsbackend.Errno) {
	return c.entry(func(ctx *fsbackend.Context, out *fuseproto.EntryOut) fsbackend.Errno {
		return c.R.Mkdir(ctx, &fuseproto.MkdirIn{InHeader: c.header(parent), Mode: mode}, fsbackend.MakeName(name), out)
	})
}

// Mknod makes a file of the type in mode.
func (c *Client) Mknod(parent uint64, name string, mode, rdev uint32) (fuseproto.EntryOut, fsbackend.Errno) {
	return c.entry(func(ctx *fsbackend.Context, out *fuseproto.EntryOut) fsbackend.Errno {
		in := &fuseproto.MknodIn{InHeader: c.header(parent), Mode: mode, Rdev: rdev}
		return c.R.Mknod(ctx, in, fsbackend.MakeName(name), out)
	})
}

// Symlink makes name point to target.
func (c *Client) Symlink(parent uint64, name, target string) (fuseproto.EntryOut, fsbackend.Errno) {
	return c.entry(func(ctx *fsbackend.Context, out *fuseproto.EntryOut) fsbackend.Errno {
		return c.R.Symlink(ctx, parent, fsbackend.MakeName(name), fsbackend.MakeName(target), out)
	})
}

// Link makes name another name of node.
func (c *Client) Link(node, parent uint64, name string) (fuseproto.EntryOut, fsbackend.Errno) {
	return c.entry(func(ctx *fsbackend.Context, out *fuseproto.EntryOut) fsbackend.Errno {
		in := &fuseproto.LinkIn{InHeader: c.header(parent), Oldnodeid: node}
		return c.R.Link(ctx, in, fsbackend.MakeName(name), out)
	})
}

// Readlink returns the target of a symbolic link.
func (c *Client) Readlink(node uint64) (string, fsbackend.Errno) {
	buf := make([]byte, 4096)
	var dst *fsbackend.Sink
	errno := c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		dst = NewSink(buf, c.Piece)
		return c.R.Readlink(ctx, node, dst)
	})
	return string(buf[:dst.Written()]), errno
}

// Unlink removes a name of anything but a directory.
func (c *Client) Unlink(parent uint64, name string) fsbackend.Errno {
	return c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		return c.R.Unlink(ctx, parent, fsbackend.MakeName(name))
	})
}

// Rmdir removes a directory.
func (c *Client) Rmdir(parent uint64, name string) fsbackend.Errno {
	return c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		return c.R.Rmdir(ctx, parent, fsbackend.MakeName(name))
	})
}

// Rename renames with RENAME_* flags.
func (c *Client) Rename(from uint64, oldName string, to uint64, newName string, flags uint32) fsbackend.Errno {
	return c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		in := &fuseproto.Rename2In{InHeader: c.header(from), Newdir: to, Flags: flags}
		return c.R.Rename(ctx, in, fsbackend.MakeName(oldName), fsbackend.MakeName(newName))
	})
}

// Create makes and opens a file with open(2) flags.
func (c *Client) Create(parent uint64, name string, flags, mode uint32) (out fuseproto.CreateOut, errno fsbackend.Errno) {
	errno = c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		out = fuseproto.CreateOut{}
		in := &fuseproto.CreateIn{InHeader: c.header(parent), Flags: flags | unix.O_CREAT, Mode: mode | unix.S_IFREG}
		return c.R.Create(ctx, in, fsbackend.MakeName(name), &out)
	})
	return out, errno
}

// Tmpfile makes and opens a file without a name.
func (c *Client) Tmpfile(parent uint64, flags, mode uint32) (out fuseproto.CreateOut, errno fsbackend.Errno) {
	errno = c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		out = fuseproto.CreateOut{}
		in := &fuseproto.CreateIn{InHeader: c.header(parent), Flags: flags, Mode: mode | unix.S_IFREG}
		return c.R.Tmpfile(ctx, in, &out)
	})
	return out, errno
}

// Open opens a file and returns its handle.
func (c *Client) Open(node uint64, flags uint32) (uint64, fsbackend.Errno) {
	var out fuseproto.OpenOut
	errno := c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		return c.R.Open(ctx, &fuseproto.OpenIn{InHeader: c.header(node), Flags: flags}, &out)
	})
	return out.Fh, errno
}

// Release closes a file's handle.
func (c *Client) Release(node, fh uint64) {
	_ = c.doBlocking(func(ctx *fsbackend.Context) fsbackend.Errno {
		c.R.Release(ctx, &fuseproto.ReleaseIn{InHeader: c.header(node), Fh: fh})
		return fsbackend.OK
	})
}

// Read reads up to n bytes at off.
func (c *Client) Read(node, fh, off uint64, n int) ([]byte, fsbackend.Errno) {
	buf := make([]byte, n)
	var dst *fsbackend.Sink
	errno := c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		dst = NewSink(buf, c.Piece)
		return c.R.Read(ctx, &fuseproto.ReadIn{InHeader: c.header(node), Fh: fh, Offset: off, Size: uint32(n)}, dst)
	})
	return buf[:dst.Written()], errno
}

// Write writes data at off; flags are those that the file is open with.
func (c *Client) Write(node, fh, off uint64, data []byte, flags uint32) (uint32, fsbackend.Errno) {
	var n uint32
	errno := c.do(func(ctx *fsbackend.Context) (errno fsbackend.Errno) {
		in := &fuseproto.WriteIn{InHeader: c.header(node), Fh: fh, Offset: off, Size: uint32(len(data)), Flags: flags}
		n, errno = c.R.Write(ctx, in, NewSource(data, c.Piece))
		return errno
	})
	return n, errno
}

// Fallocate changes the space of an open file; mode is FALLOC_FL_*.
func (c *Client) Fallocate(node, fh, off, length uint64, mode uint32) fsbackend.Errno {
	return c.doBlocking(func(ctx *fsbackend.Context) fsbackend.Errno {
		in := &fuseproto.FallocateIn{InHeader: c.header(node), Fh: fh, Offset: off, Length: length, Mode: mode}
		return c.R.Fallocate(ctx, in)
	})
}

// Lseek finds data or a hole from off on.
func (c *Client) Lseek(node, fh, off uint64, whence uint32) (uint64, fsbackend.Errno) {
	var out fuseproto.LseekOut
	errno := c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		in := &fuseproto.LseekIn{InHeader: c.header(node), Fh: fh, Offset: off, Whence: whence}
		return c.R.Lseek(ctx, in, &out)
	})
	return out.Offset, errno
}

// CopyFileRange makes the request in; its header is the Client's to fill in beyond NodeId.
func (c *Client) CopyFileRange(in fuseproto.CopyFileRangeIn) (uint64, fsbackend.Errno) {
	in.InHeader = c.header(in.NodeId)
	var n uint64
	errno := c.doBlocking(func(ctx *fsbackend.Context) (errno fsbackend.Errno) {
		n, errno = c.R.CopyFileRange(ctx, &in)
		return errno
	})
	return n, errno
}

// Opendir opens a directory and returns its handle.
func (c *Client) Opendir(node uint64) (uint64, fsbackend.Errno) {
	var out fuseproto.OpenOut
	errno := c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		in := &fuseproto.OpenIn{InHeader: c.header(node), Flags: unix.O_DIRECTORY}
		return c.R.Opendir(ctx, in, &out)
	})
	return out.Fh, errno
}

// Releasedir closes a directory's handle.
func (c *Client) Releasedir(node, fh uint64) {
	_ = c.doBlocking(func(ctx *fsbackend.Context) fsbackend.Errno {
		c.R.Releasedir(ctx, &fuseproto.ReleaseIn{InHeader: c.header(node), Fh: fh})
		return fsbackend.OK
	})
}

// Readdir lists what fits into size bytes after off; plus makes it a READDIRPLUS.
func (c *Client) Readdir(node, fh, off uint64, size int, plus bool) ([]Dirent, fsbackend.Errno) {
	buf := make([]byte, size)
	out := &fsbackend.DirList{Plus: plus}
	errno := c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		out.Reset(iovecs(buf, c.Piece), 0, uint64(size))
		in := &fuseproto.ReadIn{InHeader: c.header(node), Fh: fh, Offset: off, Size: uint32(size)}
		if plus {
			return c.R.Readdirplus(ctx, in, out)
		}
		return c.R.Readdir(ctx, in, out)
	})
	if errno != 0 {
		return nil, errno
	}
	return ParseDirents(buf[:out.Written()], plus), fsbackend.OK
}

// ParseDirents takes a reply to READDIR, or READDIRPLUS with plus, apart. It panics on a reply that is none.
func ParseDirents(reply []byte, plus bool) []Dirent {
	var entries []Dirent
	for len(reply) > 0 {
		var d fuseproto.Direntplus
		head := 0
		if plus {
			head = decode(reply, &d.EntryOut)
		}
		head += decode(reply[head:], &d.Dirent)
		end := head + int(d.Namelen)
		padded := (end + 7) &^ 7
		if d.Namelen == 0 || d.Namelen > unix.NAME_MAX || padded > len(reply) {
			panic(fmt.Sprintf("directory entry of %d bytes with a name of %d in %d bytes", padded, d.Namelen, len(reply)))
		}
		if pad := reply[end:padded]; !bytes.Equal(pad, make([]byte, len(pad))) {
			panic(fmt.Sprintf("directory entry padded with %x", pad))
		}
		entries = append(entries, Dirent{string(reply[head:end]), d.Dirent.Ino, d.Off, d.Type, d.EntryOut})
		reply = reply[padded:]
	}
	return entries
}

// decode fills the struct that v points to from the front of b and returns its size.
func decode(b []byte, v any) int {
	n, err := binary.Decode(b, binary.NativeEndian, v)
	if err != nil {
		panic(err)
	}
	return n
}

// List returns all names of a directory but "." and "..", read size bytes at a time.
func (c *Client) List(t testing.TB, node uint64, size int) []string {
	t.Helper()
	fh, errno := c.Opendir(node)
	want(t, errno, "OPENDIR", fsbackend.OK)
	defer c.Releasedir(node, fh)
	var names []string
	for off := uint64(0); ; {
		entries, errno := c.Readdir(node, fh, off, size, false)
		want(t, errno, "READDIR", fsbackend.OK)
		if len(entries) == 0 {
			return names
		}
		for _, e := range entries {
			if e.Name != "." && e.Name != ".." {
				names = append(names, e.Name)
			}
			off = e.Off
		}
	}
}

// Getxattr returns an extended attribute; size is the room for it, and 0 asks for the length alone.
func (c *Client) Getxattr(node uint64, name string, size int) ([]byte, uint32, fsbackend.Errno) {
	return c.xattr(size, func(ctx *fsbackend.Context, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
		in := &fuseproto.GetxattrIn{InHeader: c.header(node), Size: uint32(size)}
		return c.R.Getxattr(ctx, in, fsbackend.MakeName(name), dst)
	})
}

// Listxattr returns the names, as Getxattr a value.
func (c *Client) Listxattr(node uint64, size int) ([]byte, uint32, fsbackend.Errno) {
	return c.xattr(size, func(ctx *fsbackend.Context, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
		return c.R.Listxattr(ctx, &fuseproto.GetxattrIn{InHeader: c.header(node), Size: uint32(size)}, dst)
	})
}

func (c *Client) xattr(size int, call func(*fsbackend.Context, *fsbackend.Sink) (uint32, fsbackend.Errno)) ([]byte, uint32, fsbackend.Errno) {
	buf := make([]byte, size)
	var dst *fsbackend.Sink
	var n uint32
	errno := c.do(func(ctx *fsbackend.Context) (errno fsbackend.Errno) {
		dst = NewSink(buf, c.Piece)
		n, errno = call(ctx, dst)
		return errno
	})
	return buf[:dst.Written()], n, errno
}

// Setxattr sets an extended attribute; flags are XATTR_*.
func (c *Client) Setxattr(node uint64, name string, value []byte, flags uint32) fsbackend.Errno {
	return c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		in := &fuseproto.SetxattrIn{InHeader: c.header(node), Size: uint32(len(value)), Flags: flags}
		return c.R.Setxattr(ctx, in, fsbackend.MakeName(name), value)
	})
}

// Removexattr removes an extended attribute.
func (c *Client) Removexattr(node uint64, name string) fsbackend.Errno {
	return c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		return c.R.Removexattr(ctx, node, fsbackend.MakeName(name))
	})
}

// Statfs describes the file system of node.
func (c *Client) Statfs(node uint64) (out fuseproto.StatfsOut, errno fsbackend.Errno) {
	errno = c.do(func(ctx *fsbackend.Context) fsbackend.Errno { return c.R.Statfs(ctx, node, &out) })
	return out, errno
}

// Statx returns what statx(2) does.
func (c *Client) Statx(node uint64) (out fuseproto.StatxOut, errno fsbackend.Errno) {
	errno = c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		in := &fuseproto.StatxIn{InHeader: c.header(node), SxMask: unix.STATX_BASIC_STATS | unix.STATX_BTIME}
		return c.R.Statx(ctx, in, &out)
	})
	return out, errno
}

// Flush tells the backend of a close(2) of a file's handle.
func (c *Client) Flush(node, fh uint64) fsbackend.Errno {
	return c.do(func(ctx *fsbackend.Context) fsbackend.Errno {
		return c.R.Flush(ctx, &fuseproto.FlushIn{InHeader: c.header(node), Fh: fh})
	})
}

// Fsync writes an open file, or directory with dir, to its medium.
func (c *Client) Fsync(node, fh uint64, dir bool) fsbackend.Errno {
	return c.doBlocking(func(ctx *fsbackend.Context) fsbackend.Errno {
		in := &fuseproto.FsyncIn{InHeader: c.header(node), Fh: fh}
		if dir {
			return c.R.Fsyncdir(ctx, in)
		}
		return c.R.Fsync(ctx, in)
	})
}

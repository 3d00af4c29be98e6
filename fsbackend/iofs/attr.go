package iofs

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// errnoOf is what the guest sees of an error of the file system.
func errnoOf(err error) fsbackend.Errno {
	const maxErrno = 511 // those above are the kernel's own (include/linux/errno.h)
	var errno fsbackend.Errno
	switch {
	case err == nil:
		return fsbackend.OK
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return unix.ETIMEDOUT
	case errors.Is(err, context.Canceled):
		return unix.EINTR
	case errors.As(err, &errno):
		if errno == 0 || errno > maxErrno || errno == unix.ENOSYS { // that one would end such requests for good
			return unix.EIO
		}
		return errno
	case errors.Is(err, fs.ErrNotExist):
		return unix.ENOENT
	case errors.Is(err, fs.ErrPermission):
		return unix.EACCES
	}
	return unix.EIO
}

// staleErrnoOf is errnoOf for a call on a node: ESTALE has the guest's kernel look its path up again.
func staleErrnoOf(err error) fsbackend.Errno {
	errno := errnoOf(err)
	if errno == unix.ENOENT || errno == unix.ENOTDIR {
		return unix.ESTALE
	}
	return errno
}

// typeOf is the type in mode as S_IFMT bits; false if a guest has no such type.
func typeOf(mode fs.FileMode) (uint32, bool) {
	switch mode.Type() {
	case 0:
		return unix.S_IFREG, true
	case fs.ModeDir:
		return unix.S_IFDIR, true
	case fs.ModeSymlink:
		return unix.S_IFLNK, true
	case fs.ModeNamedPipe:
		return unix.S_IFIFO, true
	case fs.ModeSocket:
		return unix.S_IFSOCK, true
	case fs.ModeDevice:
		return unix.S_IFBLK, true
	case fs.ModeDevice | fs.ModeCharDevice, fs.ModeCharDevice:
		return unix.S_IFCHR, true
	}
	return 0, false
}

// attr fills out with what info says of the file at p. Devices have the number 0, for io/fs has none.
func (f *FS) attr(p string, info fs.FileInfo, out *fuseproto.Attr) fsbackend.Errno {
	mode := info.Mode()
	typ, ok := typeOf(mode)
	if !ok {
		return unix.EIO
	}
	*out = fuseproto.Attr{Ino: inode(p), Mode: typ | uint32(mode.Perm()), Nlink: 1, Blksize: 4096}
	out.Uid, out.Gid = f.cfg.UID, f.cfg.GID
	for bit, s := range map[fs.FileMode]uint32{fs.ModeSetuid: unix.S_ISUID, fs.ModeSetgid: unix.S_ISGID, fs.ModeSticky: unix.S_ISVTX} {
		if mode&bit != 0 {
			out.Mode |= s
		}
	}
	if size := info.Size(); size > 0 {
		out.Size = uint64(size)
		out.Blocks = (out.Size + 511) / 512
	}
	if t := info.ModTime(); !t.IsZero() {
		sec, nsec := uint64(t.Unix()), uint32(t.Nanosecond())
		out.Atime, out.Mtime, out.Ctime = sec, sec, sec
		out.Atimensec, out.Mtimensec, out.Ctimensec = nsec, nsec, nsec
	}
	return fsbackend.OK
}

// entry fills out with what info says of the file at p, and counts a lookup.
func (f *FS) entry(p string, info fs.FileInfo, out *fuseproto.EntryOut) fsbackend.Errno {
	errno := f.attr(p, info, &out.Attr)
	if errno == 0 {
		out.NodeId, errno = f.adopt(p, out.Mode&unix.S_IFMT)
	}
	return errno
}

// Lookup implements fsbackend.Backend.
func (f *FS) Lookup(_ *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	n, errno := f.directory(parent)
	if errno != 0 {
		return errno
	}
	child := name.String()
	if !servable(child) {
		return unix.ENOENT
	}
	p := path.Join(n.path, child)
	info, err := fs.Lstat(f.cfg.FS, p)
	if err != nil {
		return errnoOf(err)
	}
	return f.entry(p, info, out)
}

// Getattr implements fsbackend.Backend.
func (f *FS) Getattr(_ *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	if in.Flags()&fuseproto.FUSE_GETATTR_FH != 0 {
		return f.getattrHandle(in, out)
	}
	n, errno := f.node(in.NodeId)
	if errno != 0 {
		return errno
	}
	info, err := fs.Lstat(f.cfg.FS, n.path)
	if err != nil {
		return staleErrnoOf(err)
	}
	return f.nodeAttr(n, info, out)
}

// getattrHandle is Getattr by handle: an open file has attributes even when its name is gone.
func (f *FS) getattrHandle(in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	h, errno := pin(f, f.files, in.NodeId, in.Fh())
	if errno != 0 {
		d, errno := pin(f, f.dirs, in.NodeId, in.Fh())
		if errno != 0 {
			return errno
		}
		defer unpin(f, d)
		info, err := fs.Lstat(f.cfg.FS, d.node.path)
		if err != nil {
			return staleErrnoOf(err)
		}
		return f.nodeAttr(d.node, info, out)
	}
	defer unpin(f, h)
	info, err := h.stat()
	if err != nil {
		return errnoOf(err)
	}
	return f.nodeAttr(h.node, info, out)
}

// nodeAttr is attr for a node, whose type must be what it was.
func (f *FS) nodeAttr(n *node, info fs.FileInfo, out *fuseproto.AttrOut) fsbackend.Errno {
	errno := f.attr(n.path, info, &out.Attr)
	if errno == 0 && out.Mode&unix.S_IFMT != n.typ {
		return unix.ESTALE
	}
	return errno
}

// Readlink implements fsbackend.Readlinker. Where the file system has symbolic links but does not read them, their targets
// are their contents, as in archives.
func (f *FS) Readlink(_ *fsbackend.Context, id uint64, dst *fsbackend.Sink) fsbackend.Errno {
	n, errno := f.node(id)
	if errno != 0 {
		return errno
	}
	if n.typ != unix.S_IFLNK {
		return unix.EINVAL
	}
	read := f.readLinkFile
	if f.links {
		read = f.cfg.FS.(fs.ReadLinkFS).ReadLink
	}
	target, err := read(n.path)
	if err != nil {
		return staleErrnoOf(err)
	}
	if target == "" || len(target) >= unix.PathMax || strings.ContainsRune(target, 0) {
		return unix.EIO
	}
	if dst.Write([]byte(target)) < len(target) {
		return unix.EIO
	}
	return fsbackend.OK
}

func (f *FS) readLinkFile(p string) (string, error) {
	file, err := f.cfg.FS.Open(p)
	if err != nil {
		return "", err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", err
	}
	if info.Mode().Type() != fs.ModeSymlink {
		return "", &fs.PathError{Op: "readlink", Path: p, Err: unix.ESTALE}
	}
	b, err := io.ReadAll(io.LimitReader(file, unix.PathMax))
	return string(b), err
}

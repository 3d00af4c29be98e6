// Package sectorfs is go-fuse's loopback with files whose contents are sealed on the host: a directory of the host, in
// which each file is a row of sectors of up to 4096 bytes, each sealed on its own by an AEAD that takes its nonces from
// itself (cipher.NewGCMWithRandomNonce). A sector is sealed together with its number in the file. One that is all zeros is
// a hole, and reads as zeros.
//
// What whoever has the host's directory learns: names, sizes, owners, times, symbolic links, extended attributes, where
// files have holes, and which sectors change when. What they can do without being found out: put an older state back, of a
// whole file or of one sector; put a sector into another file at the same place; replace a sector by zeros; cut a file off
// between two sectors. Everything else that they change makes the sector unreadable (EIO). A crash in the midst of a write
// can do that as well, to the sectors being written and the last one of the file: the guest's fsync does not help, for
// there is no journal. With AES-GCM, a key is good for 2^32 sectors written, 16 TiB.
//
// Like the loopback, it works with paths and trusts that nobody on the host renames things under it.
package sectorfs

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// MaxFileSize is what a file may grow to, in bytes.
const MaxFileSize = 1 << 50

// tree is what the nodes have in common.
type tree struct {
	aead cipher.AEAD
	// locks are of a file's contents, by inode number: a change of part of a sector is a change of all of it.
	locks [64]sync.RWMutex
}

// node is a file of any type.
type node struct {
	*fs.LoopbackNode
	tree *tree
}

// New returns the root of a tree that keeps its files, sealed, in dir.
func New(dir string, aead cipher.AEAD) (fs.InodeEmbedder, error) {
	if aead.NonceSize() != 0 {
		return nil, fmt.Errorf("seal sectors: a cipher with nonces of %d bytes, expected one that makes its own", aead.NonceSize())
	}
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		return nil, fmt.Errorf("seal %s: %w", dir, err)
	}
	data := &fs.LoopbackRoot{Path: dir, Dev: st.Dev}
	root := &node{&fs.LoopbackNode{RootData: data}, &tree{aead: aead}}
	data.RootNode = root
	return root, nil
}

// WrapChild implements fs.NodeWrapChilder.
func (n *node) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &node{ops.(*fs.LoopbackNode), n.tree}
}

// AESGCM makes an AEAD that New takes of a key of 32 bytes.
func AESGCM(key []byte) (cipher.AEAD, error) {
	if len(key) != 32 {
		return nil, fmt.Errorf("seal sectors: a key of %d bytes, expected 32", len(key))
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// ReadKey makes an AEAD that New takes of the key in a file that nobody else may read.
func ReadKey(name string) (cipher.AEAD, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file: expected one of 32 bytes, the key", name)
	case info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("others may use the key %s (mode %#o): expected `chmod 600 %[1]s`", name, info.Mode().Perm())
	}
	key, err := io.ReadAll(io.LimitReader(f, 33))
	if err != nil {
		return nil, err
	}
	if len(key) != 32 {
		return nil, fmt.Errorf("the key %s has %d bytes: expected 32, as `head -c 32 /dev/urandom` makes them", name, info.Size())
	}
	return AESGCM(key)
}

// clear has out say how large the file is to the guest.
func (n *node) clear(out *fuse.Attr) {
	if out.Mode&unix.S_IFMT == unix.S_IFREG {
		out.Size = uint64(n.tree.plainSize(int64(out.Size)))
	}
}

// Lookup implements fs.NodeLookuper.
func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	child, errno := n.LoopbackNode.Lookup(ctx, name, out)
	n.clear(&out.Attr)
	return child, errno
}

// Link implements fs.NodeLinker.
func (n *node) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	child, errno := n.LoopbackNode.Link(ctx, target, name, out)
	n.clear(&out.Attr)
	return child, errno
}

// Getattr implements fs.NodeGetattrer.
func (n *node) Getattr(ctx context.Context, f fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	errno := n.LoopbackNode.Getattr(ctx, inner(f), out)
	n.clear(&out.Attr)
	return errno
}

// Statx implements fs.NodeStatxer.
func (n *node) Statx(ctx context.Context, f fs.FileHandle, flags, mask uint32, out *fuse.StatxOut) syscall.Errno {
	errno := n.LoopbackNode.Statx(ctx, inner(f), flags, mask|unix.STATX_TYPE, out)
	if out.Mode&unix.S_IFMT == unix.S_IFREG {
		out.Size = uint64(n.tree.plainSize(int64(out.Size)))
	}
	return errno
}

// Setattr implements fs.NodeSetattrer.
func (n *node) Setattr(ctx context.Context, f fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok {
		h, ok := f.(*file)
		if !ok {
			opened, _, errno := n.Open(ctx, unix.O_RDWR)
			if errno != 0 {
				return errno
			}
			h = opened.(*file)
			defer h.Release(ctx)
		}
		if errno := h.truncate(int64(size)); errno != 0 {
			return errno
		}
		rest := *in
		rest.Valid &^= fuse.FATTR_SIZE
		in = &rest
	}
	errno := n.LoopbackNode.Setattr(ctx, inner(f), in, out)
	n.clear(&out.Attr)
	return errno
}

// CopyFileRange implements fs.NodeCopyFileRanger: the guest is to read and write instead.
func (n *node) CopyFileRange(context.Context, fs.FileHandle, uint64, *fs.Inode, fs.FileHandle, uint64, uint64, uint64) (uint32, syscall.Errno) {
	return 0, syscall.ENOTSUP
}

// hostFlags are flags to open a file with on the host: whoever changes part of a sector has to read it.
func hostFlags(flags uint32) uint32 {
	if flags&unix.O_ACCMODE == unix.O_WRONLY {
		flags = flags&^unix.O_ACCMODE | unix.O_RDWR
	}
	return flags &^ (unix.O_TRUNC | unix.O_DIRECT)
}

// Open implements fs.NodeOpener.
func (n *node) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	h, fuseFlags, errno := n.LoopbackNode.Open(ctx, hostFlags(flags))
	if errno != 0 {
		return nil, 0, errno
	}
	f, errno := n.opened(ctx, h, flags)
	return f, fuseFlags, errno
}

// Create implements fs.NodeCreater.
func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	child, h, fuseFlags, errno := n.LoopbackNode.Create(ctx, name, hostFlags(flags), mode, out)
	if errno != 0 {
		return nil, nil, 0, errno
	}
	f, errno := n.opened(ctx, h, flags)
	if flags&unix.O_TRUNC != 0 {
		out.Size = 0
	}
	n.clear(&out.Attr)
	return child, f, fuseFlags, errno
}

// Tmpfile implements fs.NodeTmpfiler.
func (n *node) Tmpfile(ctx context.Context, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	child, h, fuseFlags, errno := n.LoopbackNode.Tmpfile(ctx, hostFlags(flags), mode, out)
	if errno != 0 {
		return nil, nil, 0, errno
	}
	f, errno := n.opened(ctx, h, flags)
	return child, f, fuseFlags, errno
}

// opened makes a file of what the loopback has opened.
func (n *node) opened(ctx context.Context, h fs.FileHandle, flags uint32) (fs.FileHandle, syscall.Errno) {
	host := h.(*fs.LoopbackFile)
	f := &file{host: host, tree: n.tree}
	var st syscall.Stat_t
	f.fd, _ = host.PassthroughFd() // stays valid until Release
	err := syscall.Fstat(f.fd, &st)
	f.lock = &n.tree.locks[st.Ino%uint64(len(n.tree.locks))]
	errno := fs.ToErrno(err)
	if errno == 0 && flags&unix.O_TRUNC != 0 && flags&unix.O_ACCMODE != unix.O_RDONLY {
		errno = f.truncate(0)
	}
	if errno != 0 {
		_ = host.Release(ctx)
		return nil, errno
	}
	return f, 0
}

// inner is the loopback's handle in f.
func inner(f fs.FileHandle) fs.FileHandle {
	if f, ok := f.(*file); ok {
		return f.host
	}
	return f
}

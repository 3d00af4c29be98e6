// Package hostfiles is a tree of go-fuse nodes: one directory of files that are read anew whenever somebody reads them.
package hostfiles

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// New returns the directory of files, each by the last part of its name. They stay open.
func New(files []*os.File) fs.InodeEmbedder { return &root{files: files} }

type root struct {
	fs.Inode
	files []*os.File
}

var _ fs.NodeOnAdder = (*root)(nil)

// OnAdd implements fs.NodeOnAdder.
func (r *root) OnAdd(ctx context.Context) {
	for _, f := range r.files {
		r.AddChild(filepath.Base(f.Name()), r.NewPersistentInode(ctx, &file{host: f}, fs.StableAttr{}), true)
	}
}

// file is one of them.
type file struct {
	fs.Inode
	host *os.File
}

var (
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeReader    = (*file)(nil)
)

// Getattr implements fs.NodeGetattrer.
func (*file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = 0o444
	return 0
}

// Open implements fs.NodeOpener. Nobody knows the size of such a file before it is read: direct I/O has the guest not ask.
func (*file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

// Read implements fs.NodeReader.
func (f *file) Read(_ context.Context, _ fs.FileHandle, dst []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := f.host.ReadAt(dst, off)
	if err != nil && err != io.EOF {
		return nil, fs.ToErrno(err)
	}
	return fuse.ReadResultData(dst[:n]), 0
}

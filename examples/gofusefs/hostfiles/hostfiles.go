// Package hostfiles is a tree of go-fuse nodes: one directory of files that are read anew whenever somebody reads them.
package hostfiles

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Open opens the files of these names, which must be regular ones, and each of another last part.
func Open(names []string) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
		}
	}()
	taken := map[string]string{}
	for _, name := range names {
		base := filepath.Base(name)
		if other, ok := taken[base]; ok {
			return files, fmt.Errorf("%s and %s are both to be %s: expected names of different last parts", other, name, base)
		}
		taken[base] = name
		// O_NONBLOCK: a pipe must not hold us up.
		f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			return files, err
		}
		files = append(files, f)
		if info, err := f.Stat(); err != nil {
			return files, err
		} else if !info.Mode().IsRegular() {
			return files, fmt.Errorf("%s is not a regular file: expected one to serve", name)
		}
	}
	return files, nil
}

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

// Getattr implements fs.NodeGetattrer. Direct I/O would do without a size, but sendfile(2), with which busybox's cat reads,
// ends at the size, and goes past the guest's page cache only if the file has changed since.
func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	size, err := f.size()
	if err != nil {
		return fs.ToErrno(err)
	}
	now := time.Now()
	out.Mode, out.Size = 0o444, uint64(size)
	out.SetTimes(nil, &now, &now)
	return 0
}

// size is how much there is to read at the moment. Files of /proc say 0.
func (f *file) size() (int64, error) {
	info, err := f.host.Stat()
	if err != nil {
		return 0, err
	}
	if info.Size() > 0 {
		return info.Size(), nil
	}
	return io.Copy(io.Discard, io.NewSectionReader(f.host, 0, 1<<20))
}

// Open implements fs.NodeOpener. Direct I/O: what is read may be longer than the size was a moment ago.
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

package overlay

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/internal/upperdir"
)

// Layers that are no directories of the host, an image's, are only to be seen inside. The half outside asks for them file by file.

const tellTree = "tree" // treeQuestion → treeAnswer

// treeQuestion asks for a file of the layers below, by its path in them, "" for the root. Names, targets and values need not be UTF-8,
// and strings of JSON have to be: they go as bytes.
type treeQuestion struct {
	Path []byte `json:"path"`
	// List asks for the names in a directory, Read for up to readPiece bytes from Off on, instead of what it is.
	List bool  `json:"list,omitempty"`
	Read bool  `json:"read,omitempty"`
	Off  int64 `json:"off,omitempty"`
}

type treeAnswer struct {
	Missing bool      `json:"missing,omitempty"`
	Info    *treeInfo `json:"info,omitempty"`
	Names   [][]byte  `json:"names,omitempty"`
	Data    []byte    `json:"data,omitempty"`
}

// treeInfo is upperdir.Info, on its way.
type treeInfo struct {
	upperdir.Info
	Link   []byte
	Xattrs []treeXattr
}

type treeXattr struct{ Name, Value []byte }

func packInfo(i *upperdir.Info) *treeInfo {
	t := &treeInfo{Info: *i, Link: []byte(i.Link)}
	t.Info.Link, t.Info.Xattrs = "", nil
	for name, value := range i.Xattrs {
		t.Xattrs = append(t.Xattrs, treeXattr{[]byte(name), []byte(value)})
	}
	return t
}

func (t *treeInfo) unpack() *upperdir.Info {
	i := t.Info
	i.Link, i.Xattrs = string(t.Link), make(map[string]string, len(t.Xattrs))
	for _, x := range t.Xattrs {
		i.Xattrs[string(x.Name)] = string(x.Value)
	}
	return &i
}

const readPiece = 1 << 20

// tree implements upperdir.Tree.
type tree struct {
	tell func(ctx context.Context, method string, arg any, files ...*os.File) (json.RawMessage, error)
}

func (t *tree) ask(ctx context.Context, q treeQuestion) (a treeAnswer, err error) {
	text, err := t.tell(ctx, tellTree, q)
	if err == nil {
		err = json.Unmarshal(text, &a)
	}
	if err == nil && a.Missing {
		err = fs.ErrNotExist
	}
	return a, err
}

// Root implements upperdir.Tree.
func (t *tree) Root(ctx context.Context) (upperdir.File, error) { return t.file(ctx, "") }

// Redirected implements upperdir.Tree.
func (t *tree) Redirected(ctx context.Context, p string) (upperdir.File, error) {
	return t.file(ctx, strings.TrimPrefix(path.Clean("/"+p), "/"))
}

func (t *tree) file(ctx context.Context, p string) (upperdir.File, error) {
	a, err := t.ask(ctx, treeQuestion{Path: []byte(p)})
	if err != nil {
		return nil, err
	}
	if a.Info == nil {
		return nil, errors.New("the half inside does not say what a file is")
	}
	return &treeFile{t: t, path: p, info: a.Info.unpack()}, nil
}

// treeFile implements upperdir.File.
type treeFile struct {
	t    *tree
	path string
	info *upperdir.Info
}

// ID implements upperdir.File: it is asked of directories, which have one path.
func (f *treeFile) ID() string { return f.path }

func (f *treeFile) Info(context.Context) (*upperdir.Info, error) { return f.info, nil }

func (f *treeFile) Lookup(ctx context.Context, name string) (upperdir.File, error) {
	return f.t.file(ctx, path.Join(f.path, name))
}

func (f *treeFile) Names(ctx context.Context) ([]string, error) {
	a, err := f.t.ask(ctx, treeQuestion{Path: []byte(f.path), List: true})
	names := make([]string, 0, len(a.Names))
	for _, name := range a.Names {
		// Who serves guests says so, and need not be trusted: a name is to lead no further than one step down.
		if n := string(name); n == "" || n == "." || n == ".." || strings.ContainsAny(n, "/\x00") {
			return nil, fmt.Errorf("the half inside says that directory %q has a file %q", f.path, n)
		}
		names = append(names, string(name))
	}
	slices.Sort(names)
	return slices.Compact(names), err
}

func (f *treeFile) Open(ctx context.Context) (io.ReadCloser, error) {
	return &treeReader{ctx: ctx, f: f}, nil
}

func (f *treeFile) Close() {}

// treeReader reads a file in pieces.
type treeReader struct {
	ctx  context.Context
	f    *treeFile
	off  int64
	rest bytes.Reader
}

func (r *treeReader) Read(p []byte) (int, error) {
	if r.rest.Len() == 0 {
		a, err := r.f.t.ask(r.ctx, treeQuestion{Path: []byte(r.f.path), Read: true, Off: r.off})
		if err != nil {
			return 0, err
		}
		if len(a.Data) == 0 {
			return 0, io.EOF
		}
		r.off += int64(len(a.Data))
		r.rest.Reset(a.Data)
	}
	return r.rest.Read(p)
}

func (r *treeReader) Close() error { return nil }

// tree answers a question about the layers below.
func (i *inside) tree(arg json.RawMessage) (a treeAnswer, err error) {
	var q treeQuestion
	if err := json.Unmarshal(arg, &q); err != nil {
		return a, err
	}
	b := i.below
	if b == nil {
		return a, errors.New("several layers, of which some are no directories of the host, cannot be compared with: expected one, or directories")
	}
	c := &fsbackend.Context{MayBlock: true}
	node, errno := uint64(fuseproto.FUSE_ROOT_ID), fsbackend.OK
	var held []uint64
	defer func() {
		for _, n := range held {
			b.Forget(n, 1)
		}
	}()
	for name := range strings.SplitSeq(string(q.Path), "/") {
		if name == "" {
			continue
		}
		var out fuseproto.EntryOut
		if errno = b.Lookup(c, node, fsbackend.MakeName(name), &out); errno == fsbackend.OK && out.NodeId == 0 {
			errno = unix.ENOENT
		}
		if errno == unix.ENOENT || errno == unix.ENOTDIR {
			return treeAnswer{Missing: true}, nil
		}
		if errno != fsbackend.OK {
			return a, errno
		}
		node = out.NodeId
		held = append(held, node)
	}
	r := reader{c: c, b: b, node: node}
	switch {
	case q.List:
		a.Names, err = r.names()
	case q.Read:
		a.Data, err = r.data(q.Off)
	default:
		var info *upperdir.Info
		if info, err = r.info(); err == nil {
			a.Info = packInfo(info)
		}
	}
	return a, err
}

// reader looks at a node.
type reader struct {
	c    *fsbackend.Context
	b    *fsbackend.Resolved
	node uint64
}

func asError(errno fsbackend.Errno) error {
	if errno == fsbackend.OK {
		return nil
	}
	return errno
}

func (r *reader) info() (*upperdir.Info, error) {
	in := fuseproto.GetattrIn{}
	in.NodeId = r.node
	var out fuseproto.AttrOut
	if errno := r.b.Getattr(r.c, &in, &out); errno != fsbackend.OK {
		return nil, errno
	}
	at := &out.Attr
	info := &upperdir.Info{
		Mode: at.Mode, UID: at.Uid, GID: at.Gid, Mtime: int64(at.Mtime)*1e9 + int64(at.Mtimensec),
		// new_encode_dev() of the kernel, which is what FUSE has.
		Rdev: unix.Mkdev(at.Rdev>>8&0xfff, at.Rdev&0xff|at.Rdev>>12&0xfff00),
	}
	var err error
	switch at.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		info.Size = int64(at.Size)
	case unix.S_IFLNK:
		info.Link, err = r.link()
	}
	if err == nil {
		info.Xattrs, err = r.xattrs()
	}
	return info, err
}

// sink is room of n bytes, and what has been put in.
func sink(n int) (*fsbackend.Sink, func() []byte) {
	buf := make([]byte, n)
	s := &fsbackend.Sink{}
	s.Reset([]unix.Iovec{sys.MakeIovec(buf)}, 0, uint64(n))
	return s, func() []byte { return buf[:s.Written()] }
}

func (r *reader) link() (string, error) {
	if r.b.Readlinker == nil {
		return "", unix.ENOSYS
	}
	s, got := sink(unix.PathMax)
	errno := r.b.Readlink(r.c, r.node, s)
	return string(got()), asError(errno)
}

func (r *reader) xattrs() (map[string]string, error) {
	if r.b.XattrReader == nil {
		return nil, nil
	}
	in := fuseproto.GetxattrIn{Size: 64 << 10}
	in.NodeId = r.node
	s, got := sink(int(in.Size))
	if _, errno := r.b.Listxattr(r.c, &in, s); errno == unix.ENOSYS || errno == unix.ENOTSUP {
		return nil, nil
	} else if errno != fsbackend.OK {
		return nil, errno
	}
	all := make(map[string]string)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(got()), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		s, got := sink(int(in.Size))
		if _, errno := r.b.Getxattr(r.c, &in, fsbackend.MakeName(name), s); errno != fsbackend.OK && errno != unix.ENODATA {
			return nil, errno
		}
		all[name] = string(got())
	}
	return all, nil
}

func (r *reader) names() ([][]byte, error) {
	if r.b.DirReader == nil {
		return nil, unix.ENOTDIR
	}
	open := fuseproto.OpenIn{}
	open.NodeId = r.node
	var opened fuseproto.OpenOut
	if errno := r.b.Opendir(r.c, &open, &opened); errno != fsbackend.OK {
		return nil, errno
	}
	release := fuseproto.ReleaseIn{Fh: opened.Fh}
	release.NodeId = r.node
	defer r.b.Releasedir(r.c, &release)
	var names [][]byte
	in := fuseproto.ReadIn{Fh: opened.Fh}
	in.NodeId = r.node
	list := new(fsbackend.Listing)
	for {
		in.Size = list.Begin(false, math.MaxInt)
		if errno := r.b.Readdir(r.c, &in, &list.DirList); errno != fsbackend.OK {
			return nil, errno
		}
		if list.Written() == 0 {
			return names, nil
		}
		if !list.Each(func(_ *fuseproto.EntryOut, d fuseproto.Dirent, name []byte) bool {
			if s := string(name); s != "." && s != ".." {
				names = append(names, []byte(s))
			}
			in.Offset = d.Off
			return true
		}) {
			return nil, errors.New("a layer lists what is no entry")
		}
	}
}

func (r *reader) data(off int64) ([]byte, error) {
	if r.b.Reader == nil {
		return nil, unix.ENOSYS
	}
	var fh uint64
	if r.b.Opener != nil {
		open := fuseproto.OpenIn{}
		open.NodeId = r.node
		var opened fuseproto.OpenOut
		if errno := r.b.Opener.Open(r.c, &open, &opened); errno != fsbackend.OK {
			return nil, errno
		}
		fh = opened.Fh
		release := fuseproto.ReleaseIn{Fh: fh}
		release.NodeId = r.node
		defer r.b.Release(r.c, &release)
	}
	in := fuseproto.ReadIn{Fh: fh, Offset: uint64(off), Size: readPiece}
	in.NodeId = r.node
	s, got := sink(readPiece)
	errno := r.b.Reader.Read(r.c, &in, s)
	return got(), asError(errno)
}

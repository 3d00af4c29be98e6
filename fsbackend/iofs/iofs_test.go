package iofs

import (
	"archive/zip"
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

//go:embed testdata/embedded
var embedded embed.FS

// check says what of the tables of a backend at rest is wrong.
func check(backend fsbackend.Backend) error {
	f := backend.(*FS)
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, n := range f.nodes {
		if n.id != id || n.lookups == 0 && id != fsbackendtest.Root {
			return fmt.Errorf("node %d is under %d, with %d lookups", n.id, id, n.lookups)
		}
	}
	for p, n := range f.byPath {
		if n.path != p || f.nodes[n.id] != n {
			return fmt.Errorf("node %d of %s is under %s", n.id, n.path, p)
		}
	}
	listed, buffers := 0, 0
	for fh, d := range f.dirs {
		if d.pins != 0 || d.ended {
			return fmt.Errorf("directory handle %d: %d pins, ended %v", fh, d.pins, d.ended)
		}
		listed += len(d.entries)
	}
	for fh, h := range f.files {
		if h.pins != 0 || h.ended {
			return fmt.Errorf("file handle %d: %d pins, ended %v", fh, h.pins, h.ended)
		}
		if h.keep {
			buffers += bufferSize
		}
	}
	if left := f.listed.left.Load(); left != int64(f.cfg.MaxListed-listed) {
		return fmt.Errorf("%d entries are listed, but %d of %d are free", listed, left, f.cfg.MaxListed)
	}
	if left := f.kept.left.Load(); left != int64(f.cfg.MaxBuffers-buffers) {
		return fmt.Errorf("%d bytes are kept, but %d of %d are free", buffers, left, f.cfg.MaxBuffers)
	}
	return nil
}

func newFS(t testing.TB, cfg Config) *FS {
	t.Helper()
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func newClient(t testing.TB, cfg Config) *fsbackendtest.Client {
	t.Helper()
	return &fsbackendtest.Client{R: fsbackend.Resolve(newFS(t, cfg))}
}

// only hides what a file system can do beyond Open, and its files beyond what hide leaves.
type only struct {
	fs   fs.FS
	hide func(fs.File) fs.File
}

func (o only) Open(name string) (fs.File, error) {
	f, err := o.fs.Open(name)
	if err != nil {
		return nil, err
	}
	if _, isDir := f.(fs.ReadDirFile); isDir {
		return f, nil
	}
	return o.hide(f), nil
}

func plain(f fs.File) fs.File { return struct{ fs.File }{f} }

func seekable(f fs.File) fs.File {
	return struct {
		fs.File
		io.Seeker
	}{f, f.(io.Seeker)}
}

// zipped is the tree in a zip file.
func zipped(t *testing.T, tree fstest.MapFS) *zip.Reader {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for p, f := range tree {
		h := &zip.FileHeader{Name: p, Method: zip.Deflate, Modified: f.ModTime}
		h.SetMode(f.Mode)
		out, err := w.CreateHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := out.Write(f.Data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := zip.NewReader(bytes.NewReader(b.Bytes()), int64(b.Len()))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// unpack writes the tree to a directory.
func unpack(t *testing.T, tree fstest.MapFS) string {
	t.Helper()
	dir := t.TempDir()
	for p, f := range tree {
		at := filepath.Join(dir, p)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if f.Mode.Type() == fs.ModeSymlink {
			if err := os.Symlink(string(f.Data), at); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := errors.Join(os.WriteFile(at, f.Data, f.Mode), os.Chmod(at, f.Mode), os.Chtimes(at, f.ModTime, f.ModTime)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func noLinks(tree fstest.MapFS) fstest.MapFS {
	for p, f := range tree {
		if f.Mode.Type() == fs.ModeSymlink {
			delete(tree, p)
		}
	}
	return tree
}

func TestSuite(t *testing.T) {
	tree := fsbackendtest.Tree()
	archive := zipped(t, tree)
	for _, test := range []struct {
		name       string
		fs         func(t *testing.T) fs.FS
		noSymlinks bool
	}{
		{"MapFS", func(*testing.T) fs.FS { return tree }, false},
		{"os.DirFS", func(t *testing.T) fs.FS { return os.DirFS(unpack(t, tree)) }, false},
		{"os.Root", func(t *testing.T) fs.FS {
			root, err := os.OpenRoot(unpack(t, tree))
			if err != nil {
				t.Fatal(err)
			}
			return rootFS{root.FS(), root}
		}, false},
		{"zip", func(*testing.T) fs.FS { return archive }, false},
		{"Tree", func(t *testing.T) fs.FS {
			files := make(map[string]File)
			for p, f := range noLinks(fsbackendtest.Tree()) {
				files[p] = File{Size: int64(len(f.Data)), Mode: f.Mode, ModTime: f.ModTime, Data: bytes.NewReader(f.Data)}
			}
			made, err := Tree(files)
			if err != nil {
				t.Fatal(err)
			}
			return made
		}, true},
		{"Open alone", func(*testing.T) fs.FS { return only{noLinks(fsbackendtest.Tree()), plain} }, true},
		{"Seek", func(*testing.T) fs.FS { return only{noLinks(fsbackendtest.Tree()), seekable} }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			fsbackendtest.RunReadOnly(t, fsbackendtest.ReadOnlyConfig{
				New:        func(t *testing.T) fsbackend.Backend { return newFS(t, Config{FS: test.fs(t)}) },
				Check:      check,
				NoSymlinks: test.noSymlinks,
				Strict:     true,
			})
		})
	}
	t.Run("no buffers", func(t *testing.T) {
		fsbackendtest.RunReadOnly(t, fsbackendtest.ReadOnlyConfig{
			New:   func(t *testing.T) fsbackend.Backend { return newFS(t, Config{FS: archive, MaxBuffers: 1}) },
			Check: check,
		})
	})
}

// rootFS is an os.Root's file system that Close closes with it.
type rootFS struct {
	fs.FS
	io.Closer
}

func (r rootFS) ReadLink(name string) (string, error) { return r.FS.(fs.ReadLinkFS).ReadLink(name) }

func (r rootFS) Lstat(name string) (fs.FileInfo, error)     { return r.FS.(fs.ReadLinkFS).Lstat(name) }
func (r rootFS) ReadDir(name string) ([]fs.DirEntry, error) { return fs.ReadDir(r.FS, name) }

func TestTreeFS(t *testing.T) {
	data := func(s string) File { return File{Size: int64(len(s)), Data: strings.NewReader(s)} }
	made, err := Tree(map[string]File{"a": data("x"), "b/c": data("yy"), "b/d/e": data("")})
	if err != nil {
		t.Fatal(err)
	}
	if err := fstest.TestFS(made, "a", "b/c", "b/d/e"); err != nil {
		t.Error(err)
	}
	for what, files := range map[string]map[string]File{
		"absolute":           {"/a": data("")},
		"empty":              {"": data("")},
		"root":               {".": data("")},
		"upwards":            {"../a": data("")},
		"file and directory": {"a": data(""), "a/b": data("")},
		"no data":            {"a": {}},
		"negative size":      {"a": {Size: -1, Data: strings.NewReader("")}},
		"directory":          {"a": {Mode: fs.ModeDir, Data: strings.NewReader("")}},
	} {
		if _, err := Tree(files); err == nil {
			t.Errorf("Tree of a list with a path or file that is wrong (%s) succeeds", what)
		}
	}
}

func TestEmbed(t *testing.T) {
	sub, err := fs.Sub(embedded, "testdata/embedded")
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, Config{FS: sub, UID: 7, GID: 8})
	if names := c.List(t, fsbackendtest.Root, 4096); len(names) != 2 {
		t.Errorf("the root lists %q, expected dir and file", names)
	}
	d, _ := c.Lookup(fsbackendtest.Root, "dir")
	e, errno := c.Lookup(d.NodeId, "deep")
	if errno != 0 || e.Mode != unix.S_IFREG|0o444 || e.Uid != 7 || e.Gid != 8 || e.Mtime != 0 {
		t.Fatalf("LOOKUP: %v, mode %#o, owner %d:%d, changed %d; expected 0444, 7:8, never", errno, e.Mode, e.Uid, e.Gid, e.Mtime)
	}
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	if b, errno := c.Read(e.NodeId, fh, 1, 2); string(b) != "ee" || errno != 0 {
		t.Errorf("READ gave %q, %v, expected %q", b, errno, "ee")
	}
}

// failing is a file system whose every file fails with an error of its choice.
type failing struct{ err error }

func (f failing) Open(name string) (fs.File, error) {
	if name == "." {
		return fstest.MapFS{}.Open(".")
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: f.err}
}

type timeout struct{ error }

func (timeout) Is(target error) bool { return target == context.DeadlineExceeded }

func TestErrnos(t *testing.T) {
	for _, row := range []struct {
		err      error
		expected fsbackend.Errno
	}{
		{fs.ErrNotExist, unix.ENOENT},
		{fs.ErrPermission, unix.EACCES},
		{unix.ENOENT, unix.ENOENT},
		{unix.ELOOP, unix.ELOOP},
		{os.NewSyscallError("read", unix.ENODATA), unix.ENODATA},
		{fmt.Errorf("far away: %w", unix.ECONNREFUSED), unix.ECONNREFUSED},
		{context.DeadlineExceeded, unix.ETIMEDOUT},
		{os.ErrDeadlineExceeded, unix.ETIMEDOUT},
		{&url.Error{Op: "Get", URL: "x", Err: timeout{errors.New("slow")}}, unix.ETIMEDOUT},
		{context.Canceled, unix.EINTR},
		{unix.ENOSYS, unix.EIO},
		{fsbackend.ErrMayBlock, unix.EIO},
		{unix.Errno(0), unix.EIO},
		{io.ErrUnexpectedEOF, unix.EIO},
		{errors.New("unheard of"), unix.EIO},
	} {
		c := newClient(t, Config{FS: failing{row.err}})
		if _, errno := c.Lookup(fsbackendtest.Root, "f"); errno != row.expected {
			t.Errorf("LOOKUP with %v: %v, expected %v", row.err, errno, row.expected)
		}
	}
}

// TestChangingTree has files vanish and change their type under the guest.
func TestChangingTree(t *testing.T) {
	tree := fstest.MapFS{"f": {Data: []byte("file"), Mode: 0o644}, "g": {Data: []byte("gone")}}
	c := newClient(t, Config{FS: tree})
	f, errno := c.Lookup(fsbackendtest.Root, "f")
	if errno != 0 {
		t.Fatal(errno)
	}
	fh, errno := c.Open(f.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	g, _ := c.Lookup(fsbackendtest.Root, "g")
	delete(tree, "g")
	if _, errno := c.Getattr(g.NodeId); errno != unix.ESTALE {
		t.Errorf("GETATTR of a file that is gone: %v, expected ESTALE", errno)
	}
	if _, errno := c.Open(g.NodeId, unix.O_RDONLY); errno != unix.ESTALE {
		t.Errorf("OPEN of a file that is gone: %v, expected ESTALE", errno)
	}
	delete(tree, "f")
	tree["f/inside"] = &fstest.MapFile{}
	if attr, errno := c.GetattrFh(f.NodeId, fh); errno != 0 || attr.Size != 4 {
		t.Errorf("GETATTR of an open file that is gone: %v, %d bytes, expected 4", errno, attr.Size)
	}
	if _, errno := c.Getattr(f.NodeId); errno != unix.ESTALE {
		t.Errorf("GETATTR of a file that became a directory: %v, expected ESTALE", errno)
	}
	if _, errno := c.Open(f.NodeId, unix.O_RDONLY); errno != unix.ESTALE {
		t.Errorf("OPEN of a file that became a directory: %v, expected ESTALE", errno)
	}
	d, errno := c.Lookup(fsbackendtest.Root, "f")
	if errno != 0 || d.NodeId == f.NodeId || d.Ino != f.Ino {
		t.Errorf("LOOKUP of a file that became a directory: %v, node %d, inode %d, expected another node than %d, inode %d", errno, d.NodeId, d.Ino, f.NodeId, f.Ino)
	}
	if names := c.List(t, d.NodeId, 4096); len(names) != 1 {
		t.Errorf("it lists %q, expected inside", names)
	}
	c.R.Forget(f.NodeId, 1)
	c.R.Forget(g.NodeId, 1)
	if again, _ := c.Lookup(fsbackendtest.Root, "f"); again.NodeId != d.NodeId {
		t.Errorf("the old node's FORGET took the new one: node %d became %d", d.NodeId, again.NodeId)
	}
}

// TestListingAnew rewinds a listing: what came meanwhile is there, and offsets go on where they were until then.
func TestListingAnew(t *testing.T) {
	tree := fstest.MapFS{"b": {}, "d": {}}
	c := newClient(t, Config{FS: tree})
	fh, errno := c.Opendir(fsbackendtest.Root)
	if errno != 0 {
		t.Fatal(errno)
	}
	names := func(off uint64) string {
		entries, errno := c.Readdir(fsbackendtest.Root, fh, off, 4096, false)
		if errno != 0 {
			t.Fatal(errno)
		}
		var out []string
		for _, e := range entries {
			out = append(out, e.Name)
		}
		return strings.Join(out, " ")
	}
	if got := names(0); got != ". .. b d" {
		t.Errorf("first listing: %s", got)
	}
	tree["a"], tree["c"] = &fstest.MapFile{}, &fstest.MapFile{}
	if got := names(3); got != "d" {
		t.Errorf("rest of the first listing: %q, expected d", got)
	}
	if got := names(0); got != ". .. a b c d" {
		t.Errorf("listing from the start again: %s", got)
	}
	if got := names(1 << 40); got != "" {
		t.Errorf("listing from far beyond its end: %s", got)
	}
}

func TestLimits(t *testing.T) {
	tree := fstest.MapFS{"a": {}, "b": {}, "c": {}}
	c := newClient(t, Config{FS: tree, MaxInodes: 3, MaxHandles: 2, MaxListed: 4})
	a, _ := c.Lookup(fsbackendtest.Root, "a")
	if _, errno := c.Lookup(fsbackendtest.Root, "b"); errno != 0 {
		t.Fatal(errno)
	}
	if _, errno := c.Lookup(fsbackendtest.Root, "c"); errno != unix.ENFILE {
		t.Errorf("LOOKUP of one file more than MaxInodes: %v, expected ENFILE", errno)
	}
	fh, errno := c.Opendir(fsbackendtest.Root)
	if errno != 0 {
		t.Fatal(errno)
	}
	entries, errno := c.Readdir(fsbackendtest.Root, fh, 0, 4096, true)
	if errno != 0 || len(entries) != 5 || entries[4].Entry.NodeId != 0 || entries[3].Entry.NodeId == 0 {
		t.Errorf("READDIRPLUS beyond MaxInodes: %v, %d entries, expected all, the last without a node", errno, len(entries))
	}
	other, errno := c.Opendir(fsbackendtest.Root)
	if errno != 0 {
		t.Fatal(errno)
	}
	if _, errno := c.Readdir(fsbackendtest.Root, other, 0, 4096, false); errno != unix.ENOMEM {
		t.Errorf("READDIR beyond MaxListed: %v, expected ENOMEM", errno)
	}
	if _, errno := c.Open(a.NodeId, unix.O_RDONLY); errno != unix.ENFILE {
		t.Errorf("OPEN beyond MaxHandles: %v, expected ENFILE", errno)
	}
	c.Releasedir(fsbackendtest.Root, fh)
	if _, errno := c.Readdir(fsbackendtest.Root, other, 0, 4096, false); errno != 0 {
		t.Errorf("READDIR after another listing was closed: %v", errno)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("a backend without a file system can be made")
	}
	if _, err := New(Config{FS: tree, MaxHandles: -1}); err == nil {
		t.Error("a backend with a negative limit can be made")
	}
}

// counted counts how often files are opened and closed.
type counted struct {
	fs           fs.FS
	opens, close atomic.Int32
}

func (c *counted) Open(name string) (fs.File, error) {
	f, err := c.fs.Open(name)
	if err == nil && name != "." {
		c.opens.Add(1)
		f = &countedFile{f, c}
	}
	return f, err
}

type countedFile struct {
	fs.File
	c *counted
}

func (f *countedFile) Close() error {
	f.c.close.Add(1)
	return f.File.Close()
}

// TestInOrder counts what reading a file costs that can only be read in order.
func TestInOrder(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdefg"), 3<<20/17+1)
	for _, row := range []struct {
		buffers int
		reads   []int // offsets, of 128 KiB each
		opens   int32
	}{
		{0, []int{0, 256 << 10, 128 << 10, 512 << 10, 384 << 10}, 1},
		{0, []int{2 << 20, 1<<20 + 128<<10, 0, 128 << 10}, 2},
		{1, []int{0, 128 << 10, 256 << 10}, 1},
		{1, []int{256 << 10, 128 << 10}, 2},
	} {
		tree := &counted{fs: fstest.MapFS{"f": {Data: data}}}
		b := newFS(t, Config{FS: tree, MaxBuffers: row.buffers})
		c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
		e, _ := c.Lookup(fsbackendtest.Root, "f")
		before := tree.opens.Load()
		fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
		if errno != 0 {
			t.Fatal(errno)
		}
		for _, off := range row.reads {
			if got, errno := c.Read(e.NodeId, fh, uint64(off), 128<<10); errno != 0 || !bytes.Equal(got, data[off:off+128<<10]) {
				t.Fatalf("READ at %d: %v, %d bytes", off, errno, len(got))
			}
		}
		if n := tree.opens.Load() - before; n != row.opens {
			t.Errorf("reads at %d with %d bytes for buffers opened the file %d times, expected %d", row.reads, row.buffers, n, row.opens)
		}
		if size := cap(b.files[fh].buf); size > bufferSize+stepSize {
			t.Errorf("%d bytes are kept, expected %d at most", size, bufferSize)
		}
		c.Release(e.NodeId, fh)
		if opens, closes := tree.opens.Load(), tree.close.Load(); opens != closes {
			t.Errorf("opened %d times and closed %d times", opens, closes)
		}
	}
}

// wayward is a file whose Read fails, stands still or lies.
type wayward struct {
	fs.File
	read func([]byte) (int, error)
}

func (w wayward) Read(b []byte) (int, error) { return w.read(b) }

func TestWaywardReaders(t *testing.T) {
	for what, read := range map[string]func([]byte) (int, error){
		"fails after a part": func(b []byte) (int, error) { return min(3, len(b)), errors.New("broken") },
		"stands still":       func([]byte) (int, error) { return 0, nil },
		"claims too much":    func(b []byte) (int, error) { return len(b) + 1, nil },
		"claims less than 0": func([]byte) (int, error) { return -1, nil },
	} {
		tree := only{fstest.MapFS{"f": {Data: []byte("data")}}, func(f fs.File) fs.File { return wayward{f, read} }}
		c := newClient(t, Config{FS: tree})
		e, _ := c.Lookup(fsbackendtest.Root, "f")
		fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
		if errno != 0 {
			t.Fatal(errno)
		}
		for range 2 {
			if b, errno := c.Read(e.NodeId, fh, 0, 4096); errno != unix.EIO || len(b) > 0 {
				t.Errorf("READ of a file that %s gave %q, %v, expected EIO", what, b, errno)
			}
		}
	}
}

// TestCancel ends a read that has far to go when nobody waits for it.
func TestCancel(t *testing.T) {
	endless := func(b []byte) (int, error) { return len(b), nil }
	b := newFS(t, Config{FS: only{fstest.MapFS{"f": {}}, func(f fs.File) fs.File { return wayward{f, endless} }}})
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	e, _ := c.Lookup(fsbackendtest.Root, "f")
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	h := b.files[fh]
	cancel := make(chan struct{})
	time.AfterFunc(10*time.Millisecond, func() { close(cancel) })
	if err := h.readInOrder(1<<62, fsbackendtest.NewSink(make([]byte, 10), 0), cancel); !errors.Is(err, unix.EINTR) {
		t.Errorf("READ that was cancelled: %v, expected EINTR", err)
	}
}

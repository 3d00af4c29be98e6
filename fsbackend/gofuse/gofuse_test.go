package gofuse

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

// check says what of the tables of a backend at rest is wrong.
func check(backend fsbackend.Backend) error {
	b := backend.(*Backend)
	b.mu.Lock()
	defer b.mu.Unlock()
	pins := make(map[*node]int)
	for fh, h := range b.handles {
		if h.pins != 0 || h.closed {
			return fmt.Errorf("handle %d: %d pins, closed %v", fh, h.pins, h.closed)
		}
		pins[h.node]++
	}
	for raw, n := range b.byRaw {
		if n.raw != raw || n.pins != pins[n] || n.count > 0 && b.nodes[n.id] != n {
			return fmt.Errorf("node %d (%d): %d pins, %d lookups, %d handles", n.id, raw, n.pins, n.count, pins[n])
		}
	}
	for id, n := range b.nodes {
		if n.id != id || b.byRaw[n.raw] != n {
			return fmt.Errorf("node %d is under %d", n.id, id)
		}
	}
	return nil
}

func TestLoopback(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	fsbackendtest.Run(t, fsbackendtest.Config{
		New: func(t *testing.T) fsbackend.Backend {
			root, err := fs.NewLoopbackRoot(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			b, err := NewFromRoot(root, nil, Config{})
			if err != nil {
				t.Fatal(err)
			}
			return b
		},
		Check:         check,
		AsRoot:        os.Getuid() == 0,
		SparseBlock:   4096,
		NoSetgid:      true, // it chowns what it makes to the caller, group and all
		NoTmpfileLink: true, // it has no path to link from
		NoAppend:      true, // it strips O_APPEND and takes the guest's offset
		NoUnlinked:    true, // it works with paths
		NoRaces:       true, // it looks at the path again after it has made something
		// CREATE always registers a new node.
		NewNodeOnCreate: true,
	})
}

// memFile is go-fuse's in-memory file, which returns its live buffer to READ and leaves O_TRUNC to the guest.
type memFile struct {
	fs.MemRegularFile
	mu sync.Mutex
}

func (f *memFile) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&unix.O_TRUNC != 0 {
		in := &fuse.SetAttrIn{}
		in.Valid = fuse.FATTR_SIZE
		if errno := f.Setattr(ctx, nil, in, new(fuse.AttrOut)); errno != 0 {
			return nil, 0, errno
		}
	}
	return f.MemRegularFile.Open(ctx, flags)
}

func (f *memFile) Setattr(ctx context.Context, fh fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	f.mu.Lock()
	defer f.mu.Unlock()
	if size, ok := in.GetSize(); ok && size < uint64(len(f.Data)) {
		clear(f.Data[size:]) // it may grow into them again
	}
	return f.MemRegularFile.Setattr(ctx, fh, in, out)
}

func (f *memFile) Read(ctx context.Context, fh fs.FileHandle, dst []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	live, errno := f.MemRegularFile.Read(ctx, fh, dst, off)
	if errno != 0 {
		return nil, errno
	}
	data, status := live.Bytes(nil)
	return fuse.ReadResultData(dst[:copy(dst, data)]), syscall.Errno(status)
}

func (f *memFile) Write(ctx context.Context, fh fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.MemRegularFile.Write(ctx, fh, data, off)
}

// memDir is a directory of go-fuse's in-memory nodes.
type memDir struct {
	fs.Inode
	mode uint32
}

func (d *memDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = d.mode
	return 0
}

func (d *memDir) add(ctx context.Context, name string, child fs.InodeEmbedder, mode uint32) (*fs.Inode, syscall.Errno) {
	inode := d.NewPersistentInode(ctx, child, fs.StableAttr{Mode: mode & unix.S_IFMT})
	if !d.AddChild(name, inode, false) {
		inode.ForgetPersistent()
		return nil, unix.EEXIST
	}
	return inode, 0
}

func (d *memDir) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	out.Mode = mode&0o7777 | unix.S_IFDIR
	return d.add(ctx, name, &memDir{mode: out.Mode}, out.Mode)
}

func (d *memDir) Create(ctx context.Context, name string, flags, _ uint32, _ *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	if old := d.GetChild(name); old != nil && flags&unix.O_EXCL == 0 {
		file, ok := old.Operations().(*memFile)
		if !ok {
			return nil, nil, 0, unix.EISDIR
		}
		fh, fuseFlags, errno := file.Open(ctx, flags)
		return old, fh, fuseFlags, errno
	}
	inode, errno := d.add(ctx, name, new(memFile), unix.S_IFREG)
	return inode, nil, 0, errno
}

func (d *memDir) Symlink(ctx context.Context, target, name string, _ *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return d.add(ctx, name, &fs.MemSymlink{Data: []byte(target)}, unix.S_IFLNK)
}

func (d *memDir) Unlink(_ context.Context, name string) syscall.Errno {
	switch child := d.GetChild(name); {
	case child == nil:
		return unix.ENOENT
	case child.IsDir():
		return unix.EISDIR
	}
	return 0
}

func (d *memDir) Rmdir(_ context.Context, name string) syscall.Errno {
	switch child := d.GetChild(name); {
	case child == nil:
		return unix.ENOENT
	case !child.IsDir():
		return unix.ENOTDIR
	case len(child.Children()) > 0:
		return unix.ENOTEMPTY
	}
	return 0
}

func (d *memDir) Rename(_ context.Context, name string, _ fs.InodeEmbedder, _ string, _ uint32) syscall.Errno {
	if d.GetChild(name) == nil {
		return unix.ENOENT
	}
	return 0
}

func TestInMemoryNodes(t *testing.T) {
	fsbackendtest.Run(t, fsbackendtest.Config{
		New: func(t *testing.T) fsbackend.Backend {
			b, err := NewFromRoot(&memDir{mode: 0o755}, nil, Config{MaxFileSize: 1 << 20, Fast: true})
			if err != nil {
				t.Fatal(err)
			}
			return b
		},
		Check:           check,
		NoHardLinks:     true,
		NoNodes:         true,
		NoXattr:         true,
		NoTmpfile:       true,
		NoExchange:      true,
		NoNoreplace:     true,
		NoWhiteout:      true,
		NoAttrs:         true,
		NoAppend:        true,
		NoPunch:         true,
		NoCopy:          true,
		NoStatx:         true,
		NoNodeChecks:    true,
		NewNodeOnCreate: true,
	})
}

// stranger is a file system that misbehaves.
type stranger struct {
	fuse.RawFileSystem
	nodeid  uint64
	forgets map[uint64]uint64
}

func (s *stranger) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name == "panic" {
		panic("stranger panics")
	}
	out.NodeId = s.nodeid
	return fuse.OK
}

func (s *stranger) Forget(nodeid, n uint64) { s.forgets[nodeid] += n }

func (s *stranger) GetAttr(<-chan struct{}, *fuse.GetAttrIn, *fuse.AttrOut) fuse.Status { return -5 }

func (s *stranger) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

func (s *stranger) Read(_ <-chan struct{}, in *fuse.ReadIn, _ []byte) (fuse.ReadResult, fuse.Status) {
	return fuse.ReadResultData([]byte(strings.Repeat("much", 1000))), fuse.OK
}

func (s *stranger) GetXAttr(<-chan struct{}, *fuse.InHeader, string, []byte) (uint32, fuse.Status) {
	return math.MaxUint32, fuse.OK
}

func TestStranger(t *testing.T) {
	var log bytes.Buffer
	raw := &stranger{fuse.NewDefaultRawFileSystem(), math.MaxUint64, make(map[uint64]uint64)}
	b, err := New(Config{FS: raw, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	for range 3 {
		if _, errno := c.Lookup(fsbackendtest.Root, "panic"); errno != unix.EIO {
			t.Errorf("LOOKUP that panics: %v, expected EIO", errno)
		}
	}
	if n := strings.Count(log.String(), "stranger panics"); n != 1 {
		t.Errorf("three panics in a row were logged %d times, expected once", n)
	}
	e, errno := c.Lookup(fsbackendtest.Root, "f")
	if errno != 0 || e.NodeId >= 1<<48 || e.Nlink == 0 || e.Ino == 0 || e.Mode&unix.S_IFMT == 0 {
		t.Errorf("LOOKUP of node 2^64-1 gave %+v, %v, expected a number below 2^48 and attributes filled in", e, errno)
	}
	if _, errno := c.Getattr(e.NodeId); errno != unix.EIO {
		t.Errorf("GETATTR with status -5: %v, expected EIO", errno)
	}
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatalf("OPEN of a stateless file system: %v", errno)
	}
	if data, errno := c.Read(e.NodeId, fh, 0, 10); errno != 0 || string(data) != "muchmuchmu" {
		t.Errorf("READ of 10 bytes where the file system has more: %q, %v", data, errno)
	}
	if _, _, errno := c.Getxattr(e.NodeId, "user.x", 10); errno != unix.ERANGE {
		t.Errorf("GETXATTR of an absurd size: %v, expected ERANGE", errno)
	}
	// The file is open: the node lives on until RELEASE.
	b.Forget(e.NodeId, 1)
	if len(raw.forgets) > 0 {
		t.Errorf("forgotten while a handle is open: %v", raw.forgets)
	}
	c.Release(e.NodeId, fh)
	if raw.forgets[math.MaxUint64] != 1 {
		t.Errorf("forgotten after RELEASE: %v, expected node 2^64-1 once", raw.forgets)
	}
	for range 3 {
		_, _ = c.Lookup(fsbackendtest.Root, "f")
	}
	b.Reset()
	if raw.forgets[math.MaxUint64] != 4 {
		t.Errorf("forgotten after three more lookups and Reset: %v, expected 4 times", raw.forgets)
	}
	if err := check(b); err != nil {
		t.Error(err)
	}
}

func (s *stranger) Ioctl(_ <-chan struct{}, in *fuse.IoctlIn, arg []byte, out *fuse.IoctlOut, buf []byte) fuse.Status {
	if in.Arg != 0 || len(arg)+len(buf) == 0 {
		return fuse.EINVAL
	}
	copy(buf, "flags")
	return fuse.OK
}

// TestIoctl holds the adapter to its list, and to the sizes that the commands themselves state: a file system may hand them
// to the host's kernel, which goes by those.
func TestIoctl(t *testing.T) {
	b, err := New(Config{FS: &stranger{fuse.NewDefaultRawFileSystem(), 2, make(map[uint64]uint64)}})
	if err != nil {
		t.Fatal(err)
	}
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	e, _ := c.Lookup(fsbackendtest.Root, "f")
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	for _, row := range []struct {
		what     string
		cmd      uint32
		arg, dst int
		expected fsbackend.Errno
	}{
		{"FS_IOC_GETFLAGS", unix.FS_IOC_GETFLAGS, 0, 8, 0},
		{"FS_IOC_GETFLAGS with too little room", unix.FS_IOC_GETFLAGS, 0, 7, unix.EINVAL},
		{"FS_IOC_SETFLAGS", unix.FS_IOC_SETFLAGS, 8, 0, 0},
		{"FS_IOC_SETFLAGS with too little", unix.FS_IOC_SETFLAGS, 4, 0, unix.EINVAL},
		{"FS_IOC_FSGETXATTR with too little room", fsIocFsgetxattr, 0, 27, unix.EINVAL},
		{"FS_IOC_FSSETXATTR", fsIocFssetxattr, 28, 0, 0},
		{"FICLONE", unix.FICLONE, 8, 8, unix.ENOTTY},
		{"FS_IOC_GETFLAGS that says it is larger", 0xbfff6601, 100, 100, unix.ENOTTY},
	} {
		in := &fuse.IoctlIn{Fh: fh, Cmd: row.cmd, Arg: 0xffff}
		in.NodeId = e.NodeId
		dst := fsbackendtest.NewSink(make([]byte, row.dst), 3)
		_, errno := b.Ioctl(&fsbackend.Context{MayBlock: true}, in, make([]byte, row.arg), dst)
		if errno != row.expected {
			t.Errorf("%s: %v, expected %v", row.what, errno, row.expected)
		}
		if read := row.cmd>>31 != 0; (dst.Written() > 0) != (read && errno == 0) {
			t.Errorf("%s: %v, and %d bytes of result", row.what, errno, dst.Written())
		}
	}
}

// patient is a file system whose READ waits.
type patient struct {
	fuse.RawFileSystem
	reading, proceed chan struct{}
	events           chan string
}

func (p *patient) Lookup(_ <-chan struct{}, _ *fuse.InHeader, _ string, out *fuse.EntryOut) fuse.Status {
	out.NodeId = 2
	return fuse.OK
}

func (p *patient) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.Fh = 7
	return fuse.OK
}

func (p *patient) Read(<-chan struct{}, *fuse.ReadIn, []byte) (fuse.ReadResult, fuse.Status) {
	close(p.reading)
	<-p.proceed
	p.events <- "read"
	return fuse.ReadResultData([]byte("data")), fuse.OK
}

func (p *patient) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	p.events <- fmt.Sprintf("release %d of %d", in.Fh, in.NodeId)
}

func (p *patient) Forget(nodeid, n uint64) { p.events <- fmt.Sprintf("forget %d of %d", n, nodeid) }

// TestReleaseWaitsForCalls takes away a handle and its node while a READ uses them: the descriptor behind it may be another
// file's as soon as the file system has closed it.
func TestReleaseWaitsForCalls(t *testing.T) {
	for what, takeAway := range map[string]func(b *Backend, c *fsbackendtest.Client, node, fh uint64){
		"FORGET and RELEASE": func(b *Backend, c *fsbackendtest.Client, node, fh uint64) {
			b.Forget(node, 1)
			c.Release(node, fh)
		},
		"Reset": func(b *Backend, _ *fsbackendtest.Client, _, _ uint64) { b.Reset() },
	} {
		p := &patient{fuse.NewDefaultRawFileSystem(), make(chan struct{}), make(chan struct{}), make(chan string, 10)}
		b, err := New(Config{FS: p})
		if err != nil {
			t.Fatal(err)
		}
		c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
		e, _ := c.Lookup(fsbackendtest.Root, "f")
		fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
		if errno != 0 {
			t.Fatal(errno)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if data, errno := c.Read(e.NodeId, fh, 0, 10); errno != 0 || string(data) != "data" {
				t.Errorf("READ during %s: %q, %v, expected the data", what, data, errno)
			}
		}()
		<-p.reading
		takeAway(b, c, e.NodeId, fh)
		if _, errno := c.Read(e.NodeId, fh, 0, 10); errno != unix.EBADF {
			t.Errorf("another READ after %s: %v, expected EBADF", what, errno)
		}
		close(p.proceed)
		<-done
		close(p.events)
		var events []string
		for event := range p.events {
			events = append(events, event)
		}
		if expected := []string{"read", "release 7 of 2", "forget 1 of 2"}; !slices.Equal(events, expected) {
			t.Errorf("%s: the file system saw %q, expected %q", what, events, expected)
		}
		if err := check(b); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

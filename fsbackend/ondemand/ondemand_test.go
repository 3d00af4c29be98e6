package ondemand_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/ondemand"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
)

// suiteTree is the conformance suite's tree, which takes long to make.
var suiteTree = sync.OnceValue(fsbackendtest.Tree)

func TestMain(m *testing.M) {
	unix.Umask(0)
	goleak.VerifyTestMain(m)
}

// copier is a Materializer that takes files from a file system of Go's to a directory of the host.
type copier struct {
	from fs.FS
	dir  string

	mu    sync.Mutex
	calls map[string]int // by method and path
	// gate, unless nil, is received from in each Open of a file, and failing what its next Opens return.
	gate    chan error
	stuck   chan string // told of each Open that waits
	ignores bool        // the gate is waited for also when the context ends
}

func newCopier(t *testing.T, from fs.FS) *copier {
	return &copier{from: from, dir: t.TempDir(), calls: make(map[string]int)}
}

func (m *copier) count(what string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.calls[what]
}

func (m *copier) called(what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls[what]++
}

// Lookup makes a file of the right size with nothing in it.
func (m *copier) Lookup(_ context.Context, p string) error {
	m.called("lookup " + p)
	return m.place(p)
}

func (m *copier) place(p string) error {
	info, err := fs.Lstat(m.from, p)
	if err != nil {
		return err
	}
	at := filepath.Join(m.dir, p)
	if _, err := os.Lstat(at); err == nil {
		return nil
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		err = os.MkdirAll(at, 0o755)
	case fs.ModeSymlink:
		var target string
		if target, err = fs.ReadLink(m.from, p); err == nil {
			err = os.Symlink(target, at)
		}
	default:
		var f *os.File
		if f, err = os.OpenFile(at, os.O_CREATE|os.O_EXCL|os.O_WRONLY, info.Mode().Perm()); err == nil {
			err = errors.Join(f.Truncate(info.Size()), f.Close(), os.Chtimes(at, info.ModTime(), info.ModTime()))
		}
	}
	if errors.Is(err, fs.ErrExist) { // another path's call was faster
		return nil
	}
	return err
}

func (m *copier) Open(ctx context.Context, p string) error {
	m.called("open " + p)
	info, err := fs.Lstat(m.from, p)
	if err != nil {
		return err
	}
	if info.IsDir() {
		entries, err := fs.ReadDir(m.from, p)
		for _, e := range entries {
			err = errors.Join(err, m.place(path.Join(p, e.Name())))
		}
		return err
	}
	if m.gate != nil {
		m.stuck <- p
		done := ctx.Done()
		if m.ignores {
			done = nil
		}
		select {
		case err := <-m.gate:
			if err != nil {
				return err
			}
		case <-done:
			return ctx.Err()
		}
	}
	if info.Mode().Type() != 0 || m.count("filled "+p) > 0 {
		return nil
	}
	data, err := fs.ReadFile(m.from, p)
	if err != nil {
		return err
	}
	at := filepath.Join(m.dir, p)
	f, err := os.OpenFile(at, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	m.called("filled " + p)
	return errors.Join(err, f.Close(), os.Chtimes(at, info.ModTime(), info.ModTime()))
}

func serve(t *testing.T, m *copier, timeout time.Duration) *ondemand.FS {
	t.Helper()
	inner, err := passthrough.New(passthrough.Config{Dir: m.dir, NoOpen: true})
	if err != nil {
		t.Fatal(err)
	}
	f, err := ondemand.New(ondemand.Config{Backend: inner, Materializer: m, Timeout: timeout})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestConformance(t *testing.T) {
	fsbackendtest.RunReadOnly(t, fsbackendtest.ReadOnlyConfig{
		New:    func(t *testing.T) fsbackend.Backend { return serve(t, newCopier(t, suiteTree()), 0) },
		Strict: true,
	})
}

// TestOnDemand is row B4: a listing takes no file's contents, the first open of a file takes them, the second nothing; the
// file is in the host's directory then.
func TestOnDemand(t *testing.T) {
	m := newCopier(t, suiteTree())
	f := serve(t, m, 0)
	defer f.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	d, errno := c.Lookup(fsbackendtest.Root, "many")
	if errno != 0 {
		t.Fatal(errno)
	}
	if left, _ := os.ReadDir(filepath.Join(m.dir, "many")); len(left) != 0 {
		t.Errorf("%d files are in a directory that nobody has listed", len(left))
	}
	names := c.List(t, d.NodeId, 4096)
	e, errno := c.Lookup(d.NodeId, "file50")
	if len(names) != 100 || errno != 0 || e.Size != 50 {
		t.Errorf("%d names, %v, size %d, expected 100 and 50", len(names), errno, e.Size)
	}
	if n := m.count("open many/file50") + m.count("filled many/file50"); n != 0 {
		t.Errorf("the listing asked %d times for a file's contents", n)
	}
	for range 2 {
		fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
		if errno != 0 {
			t.Fatal(errno)
		}
		if b, errno := c.Read(e.NodeId, fh, 0, 100); string(b) != strings.Repeat("x", 50) {
			t.Errorf("the file reads %q, %v", b, errno)
		}
		c.Release(e.NodeId, fh)
	}
	if n := m.count("filled many/file50"); n != 1 {
		t.Errorf("the contents came %d times, expected once", n)
	}
	if b, err := os.ReadFile(filepath.Join(m.dir, "many/file50")); string(b) != strings.Repeat("x", 50) {
		t.Errorf("the host has %q, %v", b, err)
	}
}

// TestReadOnly sees that nothing that changes the tree is offered, nor what would pass the Materializer by.
func TestReadOnly(t *testing.T) {
	f := serve(t, newCopier(t, suiteTree()), 0)
	defer f.Close()
	r := fsbackend.Resolve(f)
	if r.Maker != nil || r.Creater != nil || r.Writer != nil || r.Renamer != nil || r.XattrWriter != nil || r.DirPlusReader != nil {
		t.Error("it offers what changes the tree, or READDIRPLUS")
	}
	if r.XattrReader == nil || r.StatFSer == nil || r.Statxer == nil {
		t.Error("it does not offer what passthrough has")
	}
	if flags := r.WantFlags(0); flags&(fuseproto.FUSE_NO_OPEN_SUPPORT|fuseproto.FUSE_NO_OPENDIR_SUPPORT) != 0 {
		t.Errorf("it wants no OPEN (%#x)", flags)
	}
	if _, err := ondemand.New(ondemand.Config{Backend: bare{f}, Materializer: newCopier(t, nil)}); err == nil || !strings.Contains(err.Error(), "opens files") {
		t.Errorf("a backend that opens nothing: %v", err)
	}
	if _, err := ondemand.New(ondemand.Config{}); err == nil {
		t.Error("nothing at all passes")
	}
}

type bare struct{ fsbackend.Backend }

// TestErrors sees what a guest gets of a Materializer's errors.
func TestErrors(t *testing.T) {
	m := newCopier(t, suiteTree())
	m.gate, m.stuck = make(chan error, 1), make(chan string, 1)
	f := serve(t, m, 0)
	defer f.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	if _, errno := c.Lookup(fsbackendtest.Root, "missing"); errno != unix.ENOENT {
		t.Errorf("LOOKUP of what is not there: %v, expected ENOENT", errno)
	}
	e, _ := c.Lookup(fsbackendtest.Root, "small")
	for want, err := range map[fsbackend.Errno]error{
		unix.EIO:    errors.New("origin is gone"),
		unix.ENOSPC: &fs.PathError{Op: "write", Path: "small", Err: unix.ENOSPC},
		unix.EACCES: fs.ErrPermission,
		unix.ENOENT: fs.ErrNotExist,
	} {
		m.gate <- err
		if _, errno := c.Open(e.NodeId, unix.O_RDONLY); errno != want {
			t.Errorf("OPEN after %v: %v, expected %v", err, errno, want)
		}
		<-m.stuck
	}
	m.gate <- unix.ENOSYS
	if _, errno := c.Open(e.NodeId, unix.O_RDONLY); errno != unix.EIO {
		t.Errorf("OPEN after ENOSYS: %v, expected EIO: the guest would never ask again", errno)
	}
	<-m.stuck
	if _, errno := c.Open(77, unix.O_RDONLY); errno != unix.ESTALE {
		t.Errorf("OPEN of an unknown node: %v", errno)
	}
}

// TestOneAtATime has many open one file: the Materializer is called once.
func TestOneAtATime(t *testing.T) {
	m := newCopier(t, suiteTree())
	m.gate, m.stuck = make(chan error), make(chan string, 100)
	f := serve(t, m, 0)
	defer f.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	e, _ := c.Lookup(fsbackendtest.Root, "large")
	var opens sync.WaitGroup
	open := func() {
		if _, errno := c.Open(e.NodeId, unix.O_RDONLY); errno != 0 {
			t.Errorf("OPEN: %v", errno)
		}
	}
	opens.Go(open)
	<-m.stuck
	for range 9 {
		opens.Go(open)
	}
	// A LOOKUP of the same path waits for its turn.
	looked := make(chan struct{})
	go func() {
		defer close(looked)
		if _, errno := c.Lookup(fsbackendtest.Root, "large"); errno != 0 {
			t.Errorf("LOOKUP: %v", errno)
		}
	}()
	// Another path does not.
	if _, errno := c.Lookup(fsbackendtest.Root, "page"); errno != 0 {
		t.Errorf("LOOKUP of another path: %v", errno)
	}
	if n := m.count("lookup large"); n != 1 {
		t.Errorf("%d lookups of the path while it is opened, expected that one waits", n)
	}
	stop := make(chan struct{})
	feeder := make(chan struct{})
	go func() { // those that come too late to join call again
		defer close(feeder)
		for {
			select {
			case m.gate <- nil:
			case <-stop:
				return
			}
		}
	}()
	opens.Wait()
	<-looked
	close(stop)
	<-feeder
	if n := m.count("filled large"); n != 1 {
		t.Errorf("the contents came %d times, expected once", n)
	}
}

// TestCancel sees that a call ends with the last who waits for it, and at its time.
func TestCancel(t *testing.T) {
	m := newCopier(t, suiteTree())
	m.gate, m.stuck = make(chan error), make(chan string, 1)
	f := serve(t, m, 0)
	defer f.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	e, _ := c.Lookup(fsbackendtest.Root, "small")
	open := func(cancel <-chan struct{}, result chan<- fsbackend.Errno) {
		var out fuseproto.OpenOut
		in := &fuseproto.OpenIn{InHeader: fuseproto.InHeader{NodeId: e.NodeId}}
		result <- f.Open(&fsbackend.Context{MayBlock: true, Cancel: cancel}, in, &out)
	}
	first, second := make(chan struct{}), make(chan struct{})
	result := make(chan fsbackend.Errno, 2)
	go open(first, result)
	<-m.stuck
	go open(second, result)
	close(first)
	if errno := <-result; errno != unix.EINTR {
		t.Errorf("OPEN that was cancelled: %v, expected EINTR", errno)
	}
	close(second)
	if errno := <-result; errno != unix.EINTR {
		t.Errorf("the second OPEN that was cancelled: %v, expected EINTR", errno)
	}
	// The next one is a call of its own.
	go open(nil, result)
	<-m.stuck
	m.gate <- nil
	if errno := <-result; errno != 0 {
		t.Errorf("OPEN after that: %v", errno)
	}
}

func TestTimeout(t *testing.T) {
	m := newCopier(t, suiteTree())
	m.gate, m.stuck, m.ignores = make(chan error), make(chan string, 1), true
	f := serve(t, m, 300*time.Millisecond)
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	e, errno := c.Lookup(fsbackendtest.Root, "small")
	if errno != 0 {
		t.Fatal(errno)
	}
	for range 2 {
		if _, errno := c.Open(e.NodeId, unix.O_RDONLY); errno != unix.EIO {
			t.Errorf("OPEN that takes too long: %v, expected EIO", errno)
		}
	}
	if n := m.count("open small"); n != 1 {
		t.Errorf("%d calls for a path at a time", n)
	}
	m.gate <- nil
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

type panicking struct{ *copier }

func (panicking) Open(context.Context, string) error { panic("on purpose") }

// TestPanic has a panic reach the thread of the request, whose server contains it.
func TestPanic(t *testing.T) {
	m := newCopier(t, suiteTree())
	inner, err := passthrough.New(passthrough.Config{Dir: m.dir})
	if err != nil {
		t.Fatal(err)
	}
	f, err := ondemand.New(ondemand.Config{Backend: inner, Materializer: panicking{m}})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	e, _ := c.Lookup(fsbackendtest.Root, "small")
	defer func() {
		if r, ok := recover().(string); !ok || !strings.Contains(r, "materialise small: on purpose") || !strings.Contains(r, "goroutine") {
			t.Errorf("OPEN panicked with %q", r)
		}
	}()
	_, errno := c.Open(e.NodeId, unix.O_RDONLY)
	t.Errorf("OPEN returned %v", errno)
}

// TestMaxInodes sees that a guest cannot make the table grow for ever.
func TestMaxInodes(t *testing.T) {
	m := newCopier(t, suiteTree())
	inner, err := passthrough.New(passthrough.Config{Dir: m.dir})
	if err != nil {
		t.Fatal(err)
	}
	f, err := ondemand.New(ondemand.Config{Backend: inner, Materializer: m, MaxInodes: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	small, _ := c.Lookup(fsbackendtest.Root, "small")
	c.Lookup(fsbackendtest.Root, "page")
	if _, errno := c.Lookup(fsbackendtest.Root, "large"); errno != unix.ENFILE {
		t.Errorf("LOOKUP of a third file: %v, expected ENFILE", errno)
	}
	f.Forget(small.NodeId, 1)
	if _, errno := c.Lookup(fsbackendtest.Root, "large"); errno != 0 {
		t.Errorf("LOOKUP after FORGET: %v", errno)
	}
}

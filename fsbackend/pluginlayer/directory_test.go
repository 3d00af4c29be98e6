package pluginlayer

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

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/plugin"
)

// filling is a Plugin with one layer: a directory that fills with the files of from.
type filling struct {
	from fs.FS
	path string

	mu     sync.Mutex
	dir    *os.File
	filled map[string]int
	hold   bool // Open waits for its context's end
}

func (*filling) Name() string                                           { return "filling" }
func (*filling) NumLayers(context.Context, string, string) (int, error) { return 1, nil }
func (*filling) Info() plugin.Info                                      { return plugin.Info{} }

func (p *filling) Dir() *os.File {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dir
}

func (p *filling) Close() error { return p.Dir().Close() }

func (p *filling) Load(context.Context, string, string, int) (plugin.Layer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var err error
	p.dir, err = os.Open(p.path)
	return p, err
}

func (p *filling) Lookup(_ context.Context, name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.place(name)
}

// place makes a file of the right size with nothing in it.
func (p *filling) place(name string) error {
	info, err := fs.Lstat(p.from, name)
	at := filepath.Join(p.path, name)
	if _, there := os.Lstat(at); err != nil || there == nil {
		return err
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		return os.MkdirAll(at, 0o755)
	case fs.ModeSymlink:
		target, err := fs.ReadLink(p.from, name)
		return errors.Join(err, os.Symlink(target, at))
	}
	return errors.Join(os.WriteFile(at, nil, info.Mode().Perm()), os.Truncate(at, info.Size()), os.Chtimes(at, info.ModTime(), info.ModTime()))
}

func (p *filling) Open(ctx context.Context, name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hold {
		<-ctx.Done()
		return ctx.Err()
	}
	info, err := fs.Lstat(p.from, name)
	if err != nil {
		return err
	}
	if info.IsDir() {
		entries, err := fs.ReadDir(p.from, name)
		for _, e := range entries {
			err = errors.Join(err, p.place(path.Join(name, e.Name())))
		}
		return err
	}
	if p.filled[name] > 0 {
		return nil
	}
	data, err := fs.ReadFile(p.from, name)
	at := filepath.Join(p.path, name)
	p.filled[name]++
	return errors.Join(err, os.WriteFile(at, data, 0), os.Chtimes(at, info.ModTime(), info.ModTime()))
}

// contents returns how many files' contents have come, and how often those of "small" have.
func (p *filling) contents() (files, small int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.filled), p.filled["small"]
}

func newFilling(t *testing.T) *filling {
	return &filling{from: suiteTree(), path: t.TempDir(), filled: make(map[string]int)}
}

// fresh is filling with a new directory for each that is loaded.
type fresh struct {
	*filling
	t *testing.T
}

func (f fresh) Load(ctx context.Context, data, path string, n int) (plugin.Layer, error) {
	return newFilling(f.t).Load(ctx, data, path, n)
}

func TestDirectoryConformance(t *testing.T) {
	c := dial(t, Config{Name: "filling", Source: local(fresh{newFilling(t), t})})
	fsbackendtest.RunReadOnly(t, fsbackendtest.ReadOnlyConfig{New: func(t *testing.T) fsbackend.Backend { return first(t, c) }, Strict: true})
}

// TestDirectory is row B4 with a plug-in: `ls` asks for no contents, `cat` for one file's, a second `cat` for none.
func TestDirectory(t *testing.T) {
	p := newFilling(t)
	c := dial(t, Config{Name: "filling", Source: local(p)})
	_, client := open(t, c, 0)
	if names := client.List(t, fsbackendtest.Root, 4096); len(names) != 6 {
		t.Errorf("the root lists %q", names)
	}
	if _, errno := client.Lookup(fsbackendtest.Root, "nothing"); errno != unix.ENOENT {
		t.Errorf("LOOKUP of what is not there: %v", errno)
	}
	if n, _ := p.contents(); n != 0 {
		t.Errorf("a listing brought the contents of %d files", n)
	}
	for range 2 {
		node, fh := mustOpen(t, client, "small")
		if b, errno := client.Read(node, fh, 0, 10); string(b) != "four" || errno != 0 {
			t.Errorf("READ: %q, %v", b, errno)
		}
		client.Release(node, fh)
	}
	if n, small := p.contents(); n != 1 || small != 1 {
		t.Errorf("two opens brought the contents of %d files, %d times, expected of one, once", n, small)
	}
	if b, err := os.ReadFile(filepath.Join(p.path, "small")); string(b) != "four" {
		t.Errorf("the host has %q, %v", b, err)
	}
}

// TestDirectoryRestart sees that a directory that the plug-in has filled goes on to be served when it has been started again, and
// that another directory does not take its place.
func TestDirectoryRestart(t *testing.T) {
	p := newFilling(t)
	c := dial(t, Config{Name: "filling", Source: local(p), OnDemandTimeout: time.Minute})
	_, client := open(t, c, 0)
	node, fh := mustOpen(t, client, "small")
	end := func() {
		t.Helper()
		starts := c.Starts()
		c.mu.Lock()
		l := c.current
		c.mu.Unlock()
		l.fail(errors.New("on purpose"))
		eventually(t, "another start", func() bool { return c.Starts() == starts+1 })
	}
	end()
	if b, errno := client.Read(node, fh, 0, 10); string(b) != "four" || errno != 0 {
		t.Errorf("READ: %q, %v", b, errno)
	}
	eventually(t, "the layer", func() bool { _, errno := client.Lookup(fsbackendtest.Root, "page"); return errno == 0 })
	p.mu.Lock()
	p.path = t.TempDir()
	p.mu.Unlock()
	end()
	eventually(t, "its use", c.inUse)
	if _, errno := client.Lookup(fsbackendtest.Root, "page"); errno != unix.EIO {
		t.Errorf("LOOKUP in another directory: %v, expected EIO", errno)
	}
}

// TestDirectoryTimeout sees that what takes too long to come is EIO, and that the plug-in is told.
func TestDirectoryTimeout(t *testing.T) {
	p := newFilling(t)
	p.hold = true
	c := dial(t, Config{Name: "filling", Source: local(p), OnDemandTimeout: 500 * time.Millisecond})
	_, client := open(t, c, 0)
	e, errno := client.Lookup(fsbackendtest.Root, "small")
	if errno != 0 {
		t.Fatal(errno)
	}
	if _, errno := client.Open(e.NodeId, unix.O_RDONLY); errno != unix.EIO {
		t.Errorf("OPEN that takes too long: %v, expected EIO", errno)
	}
	// The plug-in's lock is free again only if it was told.
	if _, errno := client.Lookup(fsbackendtest.Root, "page"); errno != 0 {
		t.Errorf("LOOKUP after that: %v", errno)
	}
}

// TestForeignDirectory sees that a plug-in has no use of what this process may read and it may not.
func TestForeignDirectory(t *testing.T) {
	for want, answer := range map[string]func(*puppet, plugin.Request){
		"belongs to user 0, expected 12345": func(p *puppet, q plugin.Request) { p.send("/etc", q) },
		"is not a directory's":              func(p *puppet, q plugin.Request) { p.send("/etc/passwd", q) },
		"no descriptor came with":           func(p *puppet, q plugin.Request) { p.send("", q) },
	} {
		t.Run(want, func(t *testing.T) {
			s := &script{hello: hello(), answer: func(p *puppet, q plugin.Request) {
				if q.Op == plugin.OpLoad {
					answer(p, q)
				} else {
					sane(p, q)
				}
			}}
			c := dial(t, Config{Name: "hostile", Source: s, UID: 12345})
			layers, err := c.Layers(t.Context(), "", "")
			if err != nil {
				t.Fatal(err)
			}
			if l, err := layers.Open(t.Context(), 0); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("the layer %v opens, %v, expected %q", l, err, want)
			}
		})
	}
}

// send answers a request to load a layer with a directory.
func (p *puppet) send(dir string, q plugin.Request) {
	fd := -1
	if dir != "" {
		fd, _ = unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		defer unix.Close(fd)
	}
	p.reply(plugin.Reply{Op: q.Op, ID: q.ID, Flags: plugin.LayerDirectory}, fd)
}

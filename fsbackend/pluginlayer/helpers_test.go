package pluginlayer

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/plugin"
)

// suiteTree is the conformance suite's tree, which takes long to make.
var suiteTree = sync.OnceValue(fsbackendtest.Tree)

// pluginEnv makes the test binary a plug-in with the files below the directory that it names.
const pluginEnv = "SLUICE_TEST_LAYER_PLUGIN"

func TestMain(m *testing.M) {
	unix.Umask(0)
	if dir := os.Getenv(pluginEnv); dir != "" {
		if err := plugin.Main(&files{FS: os.DirFS(dir).(fs.ReadLinkFS), disk: dir}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// files is a Plugin whose layers are all the files of FS.
type files struct {
	FS   fs.ReadLinkFS
	disk string // opened files are this directory's; "": copies in memory
	info plugin.Info
	bare bool // listings have no attributes

	mu    sync.Mutex
	calls map[string]int
	hold  chan struct{} // unless nil, Stat of "wait" waits for it to be closed
}

func (*files) Name() string { return "files" }

func (p *files) NumLayers(context.Context, string, string) (int, error) { return 3, nil }

func (p *files) Load(_ context.Context, _, path string, _ int) (plugin.Layer, error) {
	if path == "missing" {
		return nil, fs.ErrNotExist
	}
	p.count("load")
	return p, nil
}

func (p *files) Info() plugin.Info { return p.info }
func (p *files) Close() error      { p.count("close"); return nil }

func (p *files) count(call string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.calls == nil {
		p.calls = make(map[string]int)
	}
	p.calls[call]++
}

func (p *files) counted(call string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls[call]
}

func attrOf(info fs.FileInfo) plugin.Attr {
	a := plugin.Attr{Size: uint64(info.Size()), Mode: uint32(info.Mode().Perm()), Nlink: 1, Ino: 5000 + uint64(info.Size())}
	a.Blocks = (a.Size + 511) / 512
	if t := info.ModTime(); !t.IsZero() {
		a.Mtime = plugin.Time{Sec: t.Unix(), Nsec: uint32(t.Nanosecond())}
	}
	switch info.Mode().Type() {
	case 0:
		a.Mode |= unix.S_IFREG
	case fs.ModeDir:
		a.Mode |= unix.S_IFDIR
	case fs.ModeSymlink:
		a.Mode |= unix.S_IFLNK
	case fs.ModeDevice | fs.ModeCharDevice:
		a.Mode |= unix.S_IFCHR
	}
	return a
}

func (p *files) Stat(ctx context.Context, path string) (plugin.Attr, error) {
	p.count("stat")
	if path == "wait" && p.hold != nil {
		p.count("held")
		select {
		case <-p.hold:
		case <-ctx.Done():
			p.count("cancelled")
			return plugin.Attr{}, ctx.Err()
		}
	}
	info, err := p.FS.Lstat(path)
	if err != nil {
		return plugin.Attr{}, err
	}
	return attrOf(info), nil
}

func (p *files) ReadDir(_ context.Context, dir string) ([]plugin.DirEntry, error) {
	p.count("readdir")
	entries, err := fs.ReadDir(p.FS, dir)
	all := []plugin.DirEntry{{Name: ".", Type: unix.DT_DIR}, {Name: ".."}}
	for _, e := range entries {
		info, err := p.FS.Lstat(path.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		a := attrOf(info)
		out := plugin.DirEntry{Name: e.Name(), Ino: a.Ino, Type: uint8(a.Mode & unix.S_IFMT >> 12)}
		if !p.bare {
			out.Attr = &a
		}
		all = append(all, out)
	}
	return all, err
}

func (p *files) Readlink(_ context.Context, path string) (string, error) { return p.FS.ReadLink(path) }

func (p *files) Open(_ context.Context, name string) (*os.File, error) {
	p.count("open")
	if p.disk != "" {
		return os.Open(path.Join(p.disk, name))
	}
	data, err := fs.ReadFile(p.FS, name)
	if err != nil {
		return nil, err
	}
	return memory(data)
}

func memory(data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("layer", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "layer")
	_, err = f.Write(data)
	return f, err
}

func (p *files) Listxattr(context.Context, string) ([]string, error) {
	return []string{"user.one", "system.posix_acl_access", "trusted.overlay.opaque"}, nil
}

func (p *files) Getxattr(_ context.Context, _, name string) ([]byte, error) {
	if name == "user.none" {
		return nil, unix.ENODATA
	}
	return []byte("value of " + name), nil
}

// process is a Source that runs this test's binary as a plug-in.
type process struct {
	env  []string
	args []string // another program; nil is this one

	mu  sync.Mutex
	cmd *exec.Cmd
}

func (s *process) Next(ctx context.Context) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		_ = s.cmd.Wait()
		s.cmd = nil
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	server, end, err := plugin.Pair()
	if err != nil {
		return nil, err
	}
	defer end.Close()
	args := s.args
	if args == nil {
		args = []string{"/proc/self/exe"}
	}
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Env = append(os.Environ(), s.env...)
	s.cmd.ExtraFiles = []*os.File{end}
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		_ = server.Close()
		s.cmd = nil
		return nil, err
	}
	return server, nil
}

// running returns the process, which the caller may look at and kill.
func (s *process) running() *os.Process { return s.cmd.Process }

// watchFDs sees that as many descriptors are open at the end as now.
func watchFDs(t *testing.T) {
	t.Helper()
	count := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(d)
	}
	before := count()
	t.Cleanup(func() {
		if after := count(); after != before {
			t.Errorf("%d descriptors are open, %d were before", after, before)
		}
	})
}

// dial uses the plug-in until the test ends.
func dial(t *testing.T, cfg Config) *Conn {
	t.Helper()
	watchFDs(t)
	c, err := Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		switch s := cfg.Source.(type) {
		case *plugin.Local:
			_ = s.Close()
		case *script:
			s.served.Wait()
		case *process:
			if s.cmd != nil {
				_ = s.cmd.Wait()
			}
		}
	})
	return c
}

// open opens layer i until the test ends.
func open(t *testing.T, c *Conn, i int) (Layer, *fsbackendtest.Client) {
	t.Helper()
	layers, err := c.Layers(t.Context(), "ZGF0YQ==", "/path")
	if err != nil {
		t.Fatal(err)
	}
	l, err := layers.Open(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, &fsbackendtest.Client{R: fsbackend.Resolve(l)}
}

// first opens layer 0, which the caller closes.
func first(t *testing.T, c *Conn) Layer {
	t.Helper()
	layers, err := c.Layers(t.Context(), "", "/")
	if err != nil {
		t.Fatal(err)
	}
	l, err := layers.Open(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func local(p plugin.Plugin) *plugin.Local { return plugin.NewLocal(p, nil) }

// eventually waits for what happens in another process, or in goroutines that nobody else can wait for.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s does not come about", what)
		}
	}
}

// inUse says whether a run of the plug-in is in use: its layers have been loaded, or could not be.
func (c *Conn) inUse() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.current != nil
}

func mustOpen(t *testing.T, c *fsbackendtest.Client, name string) (node, fh uint64) {
	t.Helper()
	e, errno := c.Lookup(fsbackendtest.Root, name)
	if errno != 0 {
		t.Fatalf("LOOKUP %s: %v", name, errno)
	}
	fh, errno = c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatalf("OPEN %s: %v", name, errno)
	}
	return e.NodeId, fh
}

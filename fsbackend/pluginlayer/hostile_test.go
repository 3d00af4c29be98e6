package pluginlayer

import (
	"bytes"
	"context"
	"os"
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

// script is a Source of plug-ins that do as a function says.
type script struct {
	hello plugin.Hello
	// answer is called for each request, of which it may send what it likes.
	answer func(p *puppet, q plugin.Request)

	served sync.WaitGroup
}

// puppet is a script's end of a connection.
type puppet struct {
	conn *plugin.Conn
	raw  *os.File // the same socket, for what conn would not send
}

func (s *script) Next(ctx context.Context) (*os.File, error) {
	s.served.Wait()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	server, end, err := plugin.Pair()
	if err != nil {
		return nil, err
	}
	fd, err := unix.Dup(int(end.Fd()))
	if err != nil {
		return nil, err
	}
	p := &puppet{raw: os.NewFile(uintptr(fd), "raw")}
	if p.conn, err = plugin.NewConn(end); err != nil {
		return nil, err
	}
	s.served.Go(func() {
		defer p.raw.Close()
		defer p.conn.Close()
		hello := s.hello
		if _, err := p.conn.Greet(context.Background(), &hello); err != nil {
			return
		}
		b := make([]byte, plugin.MaxMessage)
		for {
			n, _, err := p.conn.Receive(b)
			if err != nil {
				return
			}
			if q, err := plugin.ParseRequest(b[:n]); err == nil {
				s.answer(p, q)
			}
		}
	})
	return server, nil
}

func (p *puppet) reply(a plugin.Reply, fd int) {
	b, err := a.Append(nil)
	if err == nil {
		_ = p.conn.Send(b, fd)
	}
}

var allOps = func() (names []string) {
	for op := plugin.OpNumLayers; op <= plugin.OpRelease; op++ {
		names = append(names, op.String())
	}
	return names
}()

func hello() plugin.Hello { return plugin.Hello{Proto: plugin.Proto, Name: "hostile", Ops: allOps} }

// sane answers what every test needs as it should be: a layer with one file, and with all that a file can have.
func sane(p *puppet, q plugin.Request) {
	a := plugin.Reply{Op: q.Op, ID: q.ID}
	fd := -1
	switch q.Op {
	case plugin.OpNumLayers:
		a.Layers = 1
	case plugin.OpLoad:
		a.Flags = plugin.LayerXattr
	case plugin.OpStatat:
		a.Attr = plugin.Attr{Mode: unix.S_IFREG | 0o644, Size: 4, Nlink: 1}
		switch q.Path {
		case ".", "dir":
			a.Attr = plugin.Attr{Mode: unix.S_IFDIR | 0o755}
		case "link":
			a.Attr.Mode = unix.S_IFLNK | 0o777
		}
	case plugin.OpOpenat:
		a.Attr = plugin.Attr{Mode: unix.S_IFREG | 0o644, Size: 4}
		f, err := memory([]byte("four"))
		if err != nil {
			panic(err)
		}
		defer f.Close()
		fd = int(f.Fd())
	case plugin.OpOpendir:
		a.Dir = 1
	case plugin.OpReaddir:
		a.EOF, a.Entries = true, []plugin.DirEntry{{Name: "file", Cookie: 1}}
	case plugin.OpReadlinkat, plugin.OpGetxattr:
		a.Bytes = []byte("target")
	case plugin.OpListxattr:
		a.Bytes = []byte("user.x\x00")
	case plugin.OpCancel:
		return
	}
	p.reply(a, fd)
}

// hostile uses a plug-in that answers with answer, or else as sane does.
func hostile(t *testing.T, cfg Config, answer func(p *puppet, q plugin.Request) bool) (*Conn, *fsbackendtest.Client) {
	t.Helper()
	s := &script{hello: hello(), answer: func(p *puppet, q plugin.Request) {
		if !answer(p, q) {
			sane(p, q)
		}
	}}
	cfg.Name, cfg.Source = "hostile", s
	c := dial(t, cfg)
	_, client := open(t, c, 0)
	return c, client
}

// use does with a layer what a guest does, and returns the first errno.
func use(c *fsbackendtest.Client) fsbackend.Errno {
	e, errno := c.Lookup(fsbackendtest.Root, "file")
	if errno != 0 {
		return errno
	}
	defer c.R.Forget(e.NodeId, 1)
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		return errno
	}
	defer c.Release(e.NodeId, fh)
	if b, errno := c.Read(e.NodeId, fh, 0, 10); errno != 0 || string(b) != "four" {
		return errno
	}
	l, errno := c.Lookup(fsbackendtest.Root, "link")
	if errno != 0 {
		return errno
	}
	defer c.R.Forget(l.NodeId, 1)
	if _, errno := c.Readlink(l.NodeId); errno != 0 {
		return errno
	}
	if _, _, errno := c.Listxattr(e.NodeId, 100); errno != 0 {
		return errno
	}
	if _, _, errno := c.Getxattr(e.NodeId, "user.x", 100); errno != 0 {
		return errno
	}
	dh, errno := c.Opendir(fsbackendtest.Root)
	if errno != 0 {
		return errno
	}
	defer c.Releasedir(fsbackendtest.Root, dh)
	entries, errno := c.Readdir(fsbackendtest.Root, dh, 0, 4096, true)
	for _, e := range entries {
		if e.Entry.NodeId != 0 {
			c.R.Forget(e.Entry.NodeId, 1)
		}
	}
	return errno
}

// TestWrongAnswers has a plug-in say what cannot be: that costs the request, not the plug-in.
func TestWrongAnswers(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "four")
	if err := os.WriteFile(disk, []byte("four"), 0o644); err != nil {
		t.Fatal(err)
	}
	attr := func(change func(*plugin.Attr)) func(*puppet, plugin.Request) bool {
		return func(p *puppet, q plugin.Request) bool {
			if q.Op != plugin.OpStatat || q.Path != "file" {
				return false
			}
			a := plugin.Attr{Mode: unix.S_IFREG | 0o644, Size: 4, Nlink: 1}
			change(&a)
			p.reply(plugin.Reply{Op: q.Op, ID: q.ID, Attr: a}, -1)
			return true
		}
	}
	file := func(flags int, path string, size uint64) func(*puppet, plugin.Request) bool {
		return func(p *puppet, q plugin.Request) bool {
			if q.Op != plugin.OpOpenat {
				return false
			}
			fd := -1
			if path != "" {
				fd, _ = unix.Open(path, flags|unix.O_CLOEXEC, 0)
				defer unix.Close(fd)
			}
			p.reply(plugin.Reply{Op: q.Op, ID: q.ID, Attr: plugin.Attr{Mode: unix.S_IFREG, Size: size}}, fd)
			return true
		}
	}
	data := func(op plugin.Op, b string) func(*puppet, plugin.Request) bool {
		return func(p *puppet, q plugin.Request) bool {
			if q.Op == op {
				p.reply(plugin.Reply{Op: q.Op, ID: q.ID, Bytes: []byte(b)}, -1)
			}
			return q.Op == op
		}
	}
	errno := func(op plugin.Op, errno fsbackend.Errno) func(*puppet, plugin.Request) bool {
		return func(p *puppet, q plugin.Request) bool {
			if q.Op == op {
				p.reply(plugin.Reply{Op: q.Op, ID: q.ID, Errno: errno}, -1)
			}
			return q.Op == op
		}
	}
	listing := func(cookie func(uint64) uint64, names ...string) func(*puppet, plugin.Request) bool {
		return func(p *puppet, q plugin.Request) bool {
			if q.Op != plugin.OpReaddir {
				return false
			}
			a := plugin.Reply{Op: q.Op, ID: q.ID}
			for _, name := range names {
				a.Entries = append(a.Entries, plugin.DirEntry{Name: name, Cookie: cookie(q.Cookie)})
			}
			p.reply(a, -1)
			return true
		}
	}
	for _, tt := range []struct {
		name   string
		answer func(*puppet, plugin.Request) bool
		want   fsbackend.Errno
	}{
		{"nothing wrong", func(*puppet, plugin.Request) bool { return false }, 0},
		{"no type", attr(func(a *plugin.Attr) { a.Mode = 0o644 }), unix.EIO},
		{"unknown type", attr(func(a *plugin.Attr) { a.Mode |= 0o170000 }), unix.EIO},
		{"more than a mode", attr(func(a *plugin.Attr) { a.Mode |= 1 << 20 }), unix.EIO},
		{"negative size", attr(func(a *plugin.Attr) { a.Size = 1 << 63 }), unix.EIO},
		{"nanoseconds", attr(func(a *plugin.Attr) { a.Mtime.Nsec = 1e9 }), unix.EIO},
		{"major", attr(func(a *plugin.Attr) { a.Mode = unix.S_IFBLK; a.RdevMajor = 4096 }), unix.EIO},
		{"minor", attr(func(a *plugin.Attr) { a.Mode = unix.S_IFCHR; a.RdevMinor = 1 << 20 }), unix.EIO},
		{"no links", attr(func(a *plugin.Attr) { a.Nlink = 0 }), 0},
		{"no file", file(0, "", 4), unix.EIO},
		{"directory as a file", file(unix.O_RDONLY, "/", 4), unix.EIO},
		{"device as a file", file(unix.O_RDONLY, "/dev/null", 0), unix.EIO},
		{"file for writing", file(unix.O_WRONLY, disk, 4), unix.EIO},
		{"O_PATH", file(unix.O_PATH, disk, 4), unix.EIO},
		{"other size", file(unix.O_RDONLY, disk, 5), unix.EIO},
		{"file for reading and writing", file(unix.O_RDWR, disk, 4), 0},
		{"empty target", data(plugin.OpReadlinkat, ""), unix.EIO},
		{"target with a NUL", data(plugin.OpReadlinkat, "a\x00b"), unix.EIO},
		{"long target", data(plugin.OpReadlinkat, strings.Repeat("x", unix.PathMax)), unix.EIO},
		{"attribute without a name", data(plugin.OpListxattr, "user.x\x00\x00"), unix.EIO},
		{"attribute without an end", data(plugin.OpListxattr, "user.x"), unix.EIO},
		{"long attribute name", data(plugin.OpListxattr, strings.Repeat("x", 256)+"\x00"), unix.EIO},
		{"listing without progress", listing(nil), unix.EIO},
		{"listing without end", listing(func(c uint64) uint64 { return c + 1 }, "a"), unix.ENOMEM},
		{"listing in a circle", listing(func(uint64) uint64 { return 1 }, "a"), unix.ENOMEM},
		{"ENOSYS", errno(plugin.OpStatat, unix.ENOSYS), unix.EOPNOTSUPP},
		{"strange errno", errno(plugin.OpStatat, plugin.MaxErrno), plugin.MaxErrno},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, client := hostile(t, Config{MaxListed: 1000}, tt.answer)
			for range 2 {
				if errno := use(client); errno != tt.want {
					t.Errorf("its use ends with %v, expected %v", errno, tt.want)
				}
			}
			if c.Starts() != 1 {
				t.Errorf("the plug-in was started %d times", c.Starts())
			}
		})
	}
}

// TestBrokenPlugins has plug-ins break the protocol: they are hung up on, and started again.
func TestBrokenPlugins(t *testing.T) {
	packet := func(b []byte, fds ...int) func(*puppet, plugin.Request) {
		return func(p *puppet, _ plugin.Request) {
			_ = unix.Sendmsg(int(p.raw.Fd()), b, unix.UnixRights(fds...), nil, unix.MSG_DONTWAIT)
		}
	}
	for _, tt := range []struct {
		name   string
		answer func(*puppet, plugin.Request)
	}{
		{"end", func(p *puppet, _ plugin.Request) { _ = unix.Shutdown(int(p.raw.Fd()), unix.SHUT_RDWR) }},
		{"rubbish", packet([]byte("rubbish"))},
		{"long message", packet(make([]byte, plugin.MaxMessage+1))},
		{"descriptors", packet(make([]byte, 100), 0, 1, 2, 0, 1, 2)},
		{"unknown request", func(p *puppet, q plugin.Request) { p.reply(plugin.Reply{Op: q.Op, ID: q.ID + 99}, -1) }},
		{"two replies", func(p *puppet, q plugin.Request) {
			sane(p, q)
			sane(p, q)
		}},
		{"another operation", func(p *puppet, q plugin.Request) { p.reply(plugin.Reply{Op: plugin.OpOpen, ID: q.ID}, -1) }},
		{"unwanted descriptor", func(p *puppet, q plugin.Request) { p.reply(plugin.Reply{Op: q.Op, ID: q.ID}, 0) }},
		{"descriptor with an errno", func(p *puppet, q plugin.Request) {
			p.reply(plugin.Reply{Op: q.Op, ID: q.ID, Errno: unix.EIO}, 0)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var once sync.Once
			c, client := hostile(t, Config{}, func(p *puppet, q plugin.Request) bool {
				broken := false
				if q.Op == plugin.OpStatat {
					once.Do(func() {
						tt.answer(p, q)
						broken = true
					})
				}
				return broken
			})
			if errno := use(client); errno != unix.EIO && tt.name != "two replies" {
				t.Errorf("its use ends with %v, expected EIO", errno)
			}
			eventually(t, "another start", func() bool { return c.Starts() == 2 })
			eventually(t, "the layer", func() bool { return use(client) == 0 })
		})
	}
}

// TestBrokenHellos sees that what cannot be used is not, and why is said.
func TestBrokenHellos(t *testing.T) {
	for want, change := range map[string]func(*plugin.Hello){
		"calls itself other, expected hostile":  func(h *plugin.Hello) { h.Name = "other" },
		"does not answer statat: expected it":   func(h *plugin.Hello) { h.Ops = []string{"num_of_layers", "load_data_source"} },
		"ask for the number of layers: operat":  func(h *plugin.Hello) { h.Ops = nil },
		"no hello in time":                      nil,
		"version 2 of the protocol, expected 1": func(h *plugin.Hello) { h.Proto = 2 },
	} {
		t.Run(want, func(t *testing.T) {
			watchFDs(t)
			s := &script{hello: hello(), answer: sane}
			defer s.served.Wait()
			cfg := Config{Name: "hostile", Source: s, Timeout: time.Minute}
			switch {
			case change == nil:
				cfg.Source, cfg.Timeout = silent{t}, 20*time.Millisecond
			case strings.Contains(want, "version"):
				cfg.Source = other{t}
			default:
				change(&s.hello)
			}
			c, err := Dial(t.Context(), cfg)
			if err == nil {
				defer c.Close()
				var layers *Layers
				if layers, err = c.Layers(t.Context(), "", ""); err == nil {
					_, err = layers.Open(t.Context(), 0)
				}
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("using it gives %v, expected %q", err, want)
			}
		})
	}
	if _, err := Dial(t.Context(), Config{Name: "a/b", Source: silent{t}}); err == nil {
		t.Error("the name a/b passes")
	}
	if _, err := Dial(t.Context(), Config{Name: "a"}); err == nil {
		t.Error("a plug-in without a source passes")
	}
}

// silent is a Source of plug-ins that say nothing, other of such that speak another version.
type (
	silent struct{ t *testing.T }
	other  struct{ t *testing.T }
)

func (s silent) Next(context.Context) (*os.File, error) {
	server, end, err := plugin.Pair()
	s.t.Cleanup(func() { _ = end.Close() })
	return server, err
}

func (o other) Next(context.Context) (*os.File, error) {
	server, end, err := plugin.Pair()
	if err == nil {
		_, err = end.Write([]byte(`{"proto":2,"name":"hostile"}`))
		o.t.Cleanup(func() { _ = end.Close() })
	}
	return server, err
}

// TestNoAnswers sees that a plug-in that answers nothing any more is given up in the end, whoever may have waited for it.
func TestNoAnswers(t *testing.T) {
	var mute sync.Once
	muted := false // written by the first run's goroutine only
	c, client := hostile(t, Config{Timeout: 500 * time.Millisecond}, func(_ *puppet, q plugin.Request) bool {
		if q.Op == plugin.OpStatat {
			mute.Do(func() { muted = true })
		} else if q.Op == plugin.OpLoad {
			muted = false
		}
		return muted
	})
	var requests sync.WaitGroup
	for range plugin.MaxRequests + 10 {
		requests.Go(func() {
			if _, errno := client.Lookup(fsbackendtest.Root, "file"); errno != unix.EIO && errno != 0 {
				t.Errorf("LOOKUP: %v, expected EIO", errno)
			}
		})
	}
	requests.Wait()
	eventually(t, "another start", func() bool { return c.Starts() == 2 })
	eventually(t, "the layer", func() bool { return use(client) == 0 })
}

// TestRelease sees that a plug-in is told of what is not used any more, and in the end of its own end.
func TestRelease(t *testing.T) {
	var told []string // written by the plug-in's goroutine, which has ended when it is read
	s := &script{hello: hello(), answer: func(p *puppet, q plugin.Request) {
		if q.Op != plugin.OpStatat {
			told = append(told, q.Op.String())
		}
		sane(p, q)
	}}
	watchFDs(t)
	c, err := Dial(t.Context(), Config{Name: "hostile", Source: s})
	if err != nil {
		t.Fatal(err)
	}
	one, two := first(t, c), first(t, c)
	if err := one.Close(); err != nil {
		t.Error(err)
	}
	if _, errno := (&fsbackendtest.Client{R: fsbackend.Resolve(two)}).Lookup(fsbackendtest.Root, "file"); errno != 0 {
		t.Errorf("LOOKUP after the end of another backend of the layer: %v", errno)
	}
	if err := two.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	s.served.Wait()
	want := "num_of_layers load_data_source num_of_layers cleanup release"
	if got := strings.Join(told, " "); got != want {
		t.Errorf("the plug-in was asked %s, expected %s", got, want)
	}
}

// TestLateAnswer sees that an answer that nobody waits for any more is dropped, with the descriptor that comes with it.
func TestLateAnswer(t *testing.T) {
	var late plugin.Request // of the plug-in's goroutine only
	answered := make(chan struct{})
	c, client := hostile(t, Config{Timeout: 500 * time.Millisecond}, func(p *puppet, q plugin.Request) bool {
		switch {
		case q.Op == plugin.OpOpenat && late.ID == 0:
			late = q
			return true
		case q.Op == plugin.OpCancel && q.Target == late.ID:
			sane(p, late)
			close(answered)
		}
		return false
	})
	if errno := use(client); errno != unix.EIO {
		t.Errorf("its use ends with %v, expected EIO", errno)
	}
	<-answered
	if errno := use(client); errno != 0 || c.Starts() != 1 {
		t.Errorf("after the late answer its use ends with %v, after %d starts", errno, c.Starts())
	}
}

// TestAnotherLayer sees that a layer that has become another one is not mixed up with what the guest knows.
func TestAnotherLayer(t *testing.T) {
	loads := 0
	c, client := hostile(t, Config{}, func(p *puppet, q plugin.Request) bool {
		switch {
		case q.Op == plugin.OpLoad:
			loads++
			p.reply(plugin.Reply{Op: q.Op, ID: q.ID, Flags: plugin.LayerXattr, Dev: uint64(loads)}, -1)
			return true
		case q.Op == plugin.OpStatat && q.Path == "end":
			_ = unix.Shutdown(int(p.raw.Fd()), unix.SHUT_RDWR)
			return true
		}
		return false
	})
	if errno := use(client); errno != 0 {
		t.Fatal(errno)
	}
	client.Lookup(fsbackendtest.Root, "end")
	eventually(t, "another start", func() bool { return c.Starts() == 2 })
	eventually(t, "its use", c.inUse)
	if errno := use(client); errno != unix.EIO {
		t.Errorf("its use ends with %v, expected EIO", errno)
	}
}

// FuzzAnswers has a plug-in answer anything in messages that are right as such.
func FuzzAnswers(f *testing.F) {
	for _, a := range []plugin.Reply{
		{Op: plugin.OpStatat, Attr: plugin.Attr{Mode: unix.S_IFREG | 0o644, Size: 4}},
		{Op: plugin.OpOpenat, Attr: plugin.Attr{Mode: unix.S_IFREG | 0o644, Size: 4}},
		{Op: plugin.OpReaddir, EOF: true, Entries: []plugin.DirEntry{{Name: "x", Cookie: 1, Attr: &plugin.Attr{Mode: unix.S_IFDIR}}}},
		{Op: plugin.OpReadlinkat, Bytes: []byte("x")},
		{Op: plugin.OpListxattr, Bytes: []byte("x\x00")},
		{Op: plugin.OpGetxattr, Errno: unix.ENODATA},
	} {
		b, _ := a.Append(nil)
		f.Add(b, uint8(a.Op))
	}
	var mu sync.Mutex
	var message []byte
	var op plugin.Op
	s := &script{hello: hello(), answer: func(p *puppet, q plugin.Request) {
		mu.Lock()
		b, wrong := bytes.Clone(message), q.Op == op
		mu.Unlock()
		if !wrong {
			sane(p, q)
			return
		}
		// The header is made right, so that what is in it counts.
		b = append(b, make([]byte, max(24-len(b), 0))...)
		head, _ := (&plugin.Reply{Op: q.Op, ID: q.ID}).Append(nil)
		copy(b[4:16], head[4:16])
		b[0], b[1], b[2], b[3] = byte(len(b)), byte(len(b)>>8), byte(len(b)>>16), 0
		_ = p.conn.Send(b, -1)
	}}
	c, err := Dial(f.Context(), Config{Name: "hostile", Source: s, Timeout: 5 * time.Second, MaxListed: 1000})
	if err != nil {
		f.Fatal(err)
	}
	defer s.served.Wait()
	defer c.Close()
	layers, err := c.Layers(f.Context(), "", "")
	if err != nil {
		f.Fatal(err)
	}
	l, err := layers.Open(f.Context(), 0)
	if err != nil {
		f.Fatal(err)
	}
	defer l.Close()
	client := &fsbackendtest.Client{R: fsbackend.Resolve(l)}
	f.Fuzz(func(t *testing.T, b []byte, o uint8) {
		if len(b) > plugin.MaxMessage || plugin.Op(o) < plugin.OpStatat || plugin.Op(o) > plugin.OpReadlinkat {
			return
		}
		mu.Lock()
		message, op = b, plugin.Op(o)
		mu.Unlock()
		use(client)
		mu.Lock()
		op = 0
		mu.Unlock()
		eventually(t, "the layer", func() bool { return use(client) == 0 })
		e, errno := client.Lookup(fsbackendtest.Root, "file")
		if errno != 0 || e.Mode&unix.S_IFMT == 0 || e.Ino == 0 || e.Nlink == 0 {
			t.Errorf("LOOKUP gives %+v, %v", e, errno)
		}
		client.R.Forget(e.NodeId, 1)
		tr := l.(*tree)
		tr.mu.Lock()
		defer tr.mu.Unlock()
		if len(tr.nodes) != 1 || len(tr.handles) != 0 || tr.files != 0 || tr.listed != 0 {
			t.Errorf("%d nodes, %d handles, %d files and %d names are left", len(tr.nodes), len(tr.handles), tr.files, tr.listed)
		}
	})
}

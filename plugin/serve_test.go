package plugin

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a Plugin with one layer, which is itself.
type fixture struct {
	mu       sync.Mutex
	loaded   int
	released bool
	started  chan struct{} // told of each Stat of "wait"
}

func (*fixture) Name() string { return "fixture" }
func (*fixture) Needs() Needs { return Needs{Network: true} }

func (*fixture) NumLayers(_ context.Context, data, _ string) (int, error) {
	if data == "none" {
		return 0, nil
	}
	return 2, nil
}

func (p *fixture) Load(_ context.Context, _, path string, n int) (Layer, error) {
	if path == "missing" {
		return nil, &fs.PathError{Op: "load", Path: path, Err: fs.ErrNotExist}
	}
	p.mu.Lock()
	p.loaded++
	p.mu.Unlock()
	if path == "directory" {
		dir, err := os.Open("/")
		return &directory{p, dir}, err
	}
	return p, nil
}

func (p *fixture) Release() { p.released = true }
func (*fixture) Info() Info { return Info{ACL: true, Dev: 5} }

func (p *fixture) Close() error {
	p.mu.Lock()
	p.loaded--
	p.mu.Unlock()
	return nil
}

func (p *fixture) Stat(ctx context.Context, path string) (Attr, error) {
	switch path {
	case "wait":
		p.started <- struct{}{}
		<-ctx.Done()
		return Attr{}, ctx.Err()
	case "panic":
		panic("on purpose")
	case "odd":
		return Attr{}, errors.New("odd")
	case "file":
		return Attr{Mode: unix.S_IFREG | 0o644, Size: 4}, nil
	}
	return Attr{}, fs.ErrNotExist
}

func (*fixture) ReadDir(_ context.Context, path string) ([]DirEntry, error) {
	if path == "bad" {
		return []DirEntry{{Name: ""}}, nil
	}
	if path == "empty" {
		return nil, nil
	}
	var all []DirEntry
	for i := range 2000 {
		all = append(all, DirEntry{Name: strings.Repeat("x", 1+i%MaxName), Type: unix.DT_REG, Attr: &Attr{Mode: unix.S_IFREG}})
	}
	return all, nil
}

func (*fixture) Readlink(context.Context, string) (string, error) {
	return strings.Repeat("x", MaxBytes+1), nil
}

func (*fixture) Open(context.Context, string) (*os.File, error) {
	fd, err := unix.MemfdCreate("file", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "file")
	_, err = f.WriteString("four")
	return f, err
}

type directory struct {
	p   *fixture
	dir *os.File
}

func (*directory) Info() Info                           { return Info{} }
func (d *directory) Close() error                       { return errors.Join(d.dir.Close(), d.p.Close()) }
func (d *directory) Dir() *os.File                      { return d.dir }
func (*directory) Lookup(context.Context, string) error { return fs.ErrPermission }
func (*directory) Open(context.Context, string) error   { return unix.ENOSPC }

// session is the server's side of a connection to a fixture.
type session struct {
	t    *testing.T
	p    *fixture
	conn *Conn
	done chan error
}

func newSession(t *testing.T) *session {
	before := openFiles(t)
	server, plugin, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	s := &session{t: t, p: &fixture{started: make(chan struct{}, MaxRequests)}, done: make(chan error, 1)}
	go func() { s.done <- Serve(t.Context(), plugin, s.p, nil) }()
	if s.conn, err = NewConn(server); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.conn.Close()
		if s.done != nil {
			s.end("")
		}
		if s.p.loaded != 0 || !s.p.released {
			t.Errorf("%d layers are loaded, released: %v, expected none, and that it is", s.p.loaded, s.p.released)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%d descriptors are open, %d were before", after, before)
		}
	})
	return s
}

func openFiles(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// end waits for Serve to return with an error that contains want, "" for none.
func (s *session) end(want string) {
	s.t.Helper()
	select {
	case err := <-s.done:
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			s.t.Errorf("Serve ended with %v, expected %q", err, want)
		}
	case <-time.After(20 * time.Second):
		s.t.Error("Serve goes on")
	}
	s.done = nil
}

func (s *session) greet() *session {
	s.t.Helper()
	h, err := s.conn.Greet(s.t.Context(), &Hello{Proto: Proto, Name: "sluice"})
	if err != nil || h.Name != "fixture" || !h.Has(OpOpenat) || !h.Needs.Network {
		s.t.Fatalf("hello %+v, %v", h, err)
	}
	return s
}

func (s *session) send(q Request, fd int) {
	s.t.Helper()
	b, err := q.Append(nil)
	if err == nil {
		err = s.conn.Send(b, fd)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *session) receive() (Reply, int) {
	s.t.Helper()
	b := make([]byte, MaxMessage)
	n, fd, err := s.conn.Receive(b)
	if err != nil {
		s.t.Fatal(err)
	}
	a, err := ParseReply(b[:n])
	if err != nil {
		s.t.Fatal(err)
	}
	return a, fd
}

func (s *session) ask(q Request) (Reply, int) {
	s.t.Helper()
	s.send(q, -1)
	return s.receive()
}

func (s *session) wantErrno(q Request, want syscall.Errno) {
	s.t.Helper()
	if a, _ := s.ask(q); a.Errno != want || a.ID != q.ID || a.Op != q.Op {
		s.t.Errorf("%+v is answered %+v, expected errno %d", q, a, want)
	}
}

func TestServe(t *testing.T) {
	s := newSession(t).greet()
	if a, _ := s.ask(Request{Op: OpNumLayers, ID: 1}); a.Layers != 2 {
		t.Errorf("number of layers: %+v, expected 2", a)
	}
	s.wantErrno(Request{Op: OpNumLayers, ID: 2, Data: "none"}, unix.EIO)
	s.wantErrno(Request{Op: OpLoad, ID: 3, Path: "missing"}, unix.ENOENT)
	s.wantErrno(Request{Op: OpStatat, ID: 4, Layer: 1, Path: "file"}, unix.ESTALE)
	if a, fd := s.ask(Request{Op: OpLoad, ID: 5, Layer: 1}); a.Errno != 0 || a.Flags != LayerACL || a.Dev != 5 || fd != -1 {
		t.Errorf("load: %+v with descriptor %d", a, fd)
	}
	s.wantErrno(Request{Op: OpLoad, ID: 6, Layer: 1}, unix.EEXIST)
	for path, want := range map[string]syscall.Errno{"file": 0, "no": unix.ENOENT, "odd": unix.EIO, "panic": unix.EIO} {
		s.wantErrno(Request{Op: OpStatat, ID: 7, Layer: 1, Path: path}, want)
	}
	s.wantErrno(Request{Op: OpReadlinkat, ID: 8, Layer: 1, Path: "link"}, unix.E2BIG)
	s.wantErrno(Request{Op: OpOpendir, ID: 8, Layer: 1, Path: "bad"}, unix.EIO)
	s.wantErrno(Request{Op: OpListxattr, ID: 9, Layer: 1, Path: "file"}, unix.EOPNOTSUPP)
	s.wantErrno(Request{Op: OpLookup, ID: 9, Layer: 1, Path: "file"}, unix.EOPNOTSUPP)
	s.wantErrno(Request{Op: OpOpenat, ID: 9, Layer: 1, Path: "file", Flags: unix.O_RDWR}, unix.EROFS)

	a, fd := s.ask(Request{Op: OpOpenat, ID: 10, Layer: 1, Path: "file"})
	if a.Errno != 0 || a.Attr.Size != 4 || fd < 0 {
		t.Fatalf("open: %+v with descriptor %d", a, fd)
	}
	b := make([]byte, 10)
	if n, err := unix.Pread(fd, b, 0); err != nil || string(b[:n]) != "four" {
		t.Errorf("the descriptor reads %q, %v", b[:n], err)
	}
	_ = unix.Close(fd)

	if a, fd := s.ask(Request{Op: OpLoad, ID: 12, Layer: 2, Path: "directory"}); a.Flags != LayerDirectory || fd < 0 {
		t.Errorf("load of a directory: %+v with descriptor %d", a, fd)
	} else {
		_ = unix.Close(fd)
	}
	s.wantErrno(Request{Op: OpLookup, ID: 13, Layer: 2, Path: "x"}, unix.EACCES)
	s.wantErrno(Request{Op: OpOpen, ID: 14, Layer: 2, Path: "x"}, unix.ENOSPC)
	s.wantErrno(Request{Op: OpStatat, ID: 15, Layer: 2, Path: "x"}, unix.EOPNOTSUPP)
	s.wantErrno(Request{Op: OpCleanup, ID: 16, Layer: 2}, 0)
	s.wantErrno(Request{Op: OpCleanup, ID: 17, Layer: 2}, unix.ESTALE)
	s.wantErrno(Request{Op: OpRelease, ID: 18}, 0)
	s.end("")
}

// TestListing reads a directory in batches, with attributes and without.
func TestListing(t *testing.T) {
	s := newSession(t).greet()
	s.ask(Request{Op: OpLoad, ID: 1, Layer: 1})
	for _, flags := range []uint32{0, ReaddirPlus} {
		open, _ := s.ask(Request{Op: OpOpendir, ID: 2, Layer: 1, Path: "."})
		names, batches, cookie := 0, 0, uint64(0)
		for {
			a, _ := s.ask(Request{Op: OpReaddir, ID: 3, Layer: 1, Dir: open.Dir, Cookie: cookie, Size: 4096, Flags: flags})
			if a.Errno != 0 || len(a.Entries) == 0 && !a.EOF {
				t.Fatalf("readdir: %+v", a)
			}
			for _, e := range a.Entries {
				if (e.Attr != nil) != (flags != 0) || len(e.Name) != 1+names%MaxName {
					t.Fatalf("entry %d is %+v", names, e)
				}
				names++
				cookie = e.Cookie
			}
			batches++
			if a.EOF {
				break
			}
		}
		if names != 2000 || batches < 70 {
			t.Errorf("%d names in %d batches, expected 2000 in many", names, batches)
		}
		s.wantErrno(Request{Op: OpReaddir, ID: 3, Layer: 2, Dir: open.Dir, Size: 4096}, unix.ESTALE)
		s.wantErrno(Request{Op: OpClosedir, ID: 4, Layer: 1, Dir: open.Dir}, 0)
		s.wantErrno(Request{Op: OpReaddir, ID: 5, Layer: 1, Dir: open.Dir, Size: 4096}, unix.EBADF)
	}
	for range maxListings {
		s.wantErrno(Request{Op: OpOpendir, ID: 6, Layer: 1, Path: "empty"}, 0)
	}
	s.wantErrno(Request{Op: OpOpendir, ID: 6, Layer: 1, Path: "empty"}, unix.ENFILE)
}

// TestCancel has requests overtake one another, and one ended.
func TestCancel(t *testing.T) {
	s := newSession(t).greet()
	s.ask(Request{Op: OpLoad, ID: 1, Layer: 1})
	s.send(Request{Op: OpStatat, ID: 2, Layer: 1, Path: "wait"}, -1)
	<-s.p.started
	s.wantErrno(Request{Op: OpStatat, ID: 3, Layer: 1, Path: "file"}, 0)
	s.send(Request{Op: OpCancel, Target: 77}, -1)
	s.send(Request{Op: OpCancel, Target: 2}, -1)
	if a, _ := s.receive(); a.ID != 2 || a.Errno != unix.EINTR {
		t.Errorf("the cancelled request is answered %+v, expected EINTR", a)
	}
	// The end does not wait for those that do.
	s.send(Request{Op: OpStatat, ID: 4, Layer: 1, Path: "wait"}, -1)
	<-s.p.started
	s.send(Request{Op: OpRelease, ID: 5}, -1)
	if a, _ := s.receive(); a.ID != 4 || a.Errno != unix.EINTR {
		t.Errorf("the request that waits at the end is answered %+v, expected EINTR", a)
	}
	if a, _ := s.receive(); a.ID != 5 || a.Op != OpRelease {
		t.Errorf("the end is answered %+v", a)
	}
	s.end("")
}

// TestBrokenServer does what a server must not.
func TestBrokenServer(t *testing.T) {
	stat := Request{Op: OpStatat, ID: 1, Layer: 1, Path: "file"}
	for _, tt := range []struct {
		name, want string
		run        func(s *session)
	}{
		{"no hello", "its name is", func(s *session) { _ = s.conn.Send([]byte(`{"proto":1}`), -1) }},
		{"other version", "version 7", func(s *session) { _ = s.conn.Send([]byte(`{"proto":7,"name":"sluice"}`), -1) }},
		{"long hello", "more than 16385 bytes", func(s *session) { _ = s.conn.Send(make([]byte, maxHello+2), -1) }},
		{"hello with a descriptor", "came with it", func(s *session) { _ = s.conn.Send([]byte(`{"proto":1,"name":"sluice"}`), 0) }},
		{"rubbish", "ends early", func(s *session) { _ = s.greet().conn.Send([]byte("rubbish"), -1) }},
		{"long message", "more than 65536", func(s *session) { _ = s.greet().conn.Send(make([]byte, MaxMessage+1), -1) }},
		{"descriptor", "a descriptor came with request statat", func(s *session) { s.greet().send(stat, 0) }},
		{"two descriptors", "more than one descriptor", func(s *session) {
			b, _ := stat.Append(nil)
			_ = s.greet().conn.raw.Control(func(fd uintptr) { _ = unix.Sendmsg(int(fd), b, unix.UnixRights(0, 1), nil, 0) })
		}},
		{"many descriptors", "more than one descriptor", func(s *session) {
			b, _ := stat.Append(nil)
			_ = s.greet().conn.raw.Control(func(fd uintptr) { _ = unix.Sendmsg(int(fd), b, unix.UnixRights(0, 1, 2, 0, 1, 2), nil, 0) })
		}},
		{"too many requests", "64 others wait", func(s *session) {
			s.greet().ask(Request{Op: OpLoad, ID: 1, Layer: 1})
			for i := range MaxRequests + 1 {
				s.send(Request{Op: OpStatat, ID: uint64(i), Layer: 1, Path: "wait"}, -1)
			}
		}},
		{"same number", "numbers of their own", func(s *session) {
			s.greet().ask(Request{Op: OpLoad, ID: 1, Layer: 1})
			for range 2 {
				s.send(Request{Op: OpStatat, ID: 7, Layer: 1, Path: "wait"}, -1)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSession(t)
			tt.run(s)
			s.end(tt.want)
		})
	}
	t.Run("silence", func(t *testing.T) {
		// A server that takes no replies does not keep the end from coming.
		s := newSession(t).greet()
		s.ask(Request{Op: OpLoad, ID: 1, Layer: 1})
		for i := range MaxRequests {
			s.send(Request{Op: OpOpendir, ID: uint64(i), Layer: 1, Path: "."}, -1)
		}
		_ = s.conn.Close()
		s.end("")
	})
}

func TestLocal(t *testing.T) {
	p := &fixture{started: make(chan struct{}, 1)}
	l := NewLocal(p, slog.New(slog.DiscardHandler))
	for range 2 {
		f, err := l.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conn, err := NewConn(f)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Greet(t.Context(), &Hello{Proto: Proto, Name: "sluice"}); err != nil {
			t.Error(err)
		}
		short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		if _, err := l.Next(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a second socket while the first is served: %v", err)
		}
		cancel()
		_ = conn.Close()
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := l.Next(t.Context()); err == nil {
		t.Error("a closed plug-in is served")
	}
}

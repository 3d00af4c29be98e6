package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/link"
	"github.com/sluicefs/sluice/internal/sandbox"
	"github.com/sluicefs/sluice/seccomp"
)

// A rig is a keeper and a server in one process, without a sandbox, whose questions a test can have fail.
type rig struct {
	*keeper
	in    *inside
	dir   string // where the sockets are
	files string // what can be grafted: a, b (directories) and f (a file)

	mu    sync.Mutex
	asked []string
	fail  func(n int, method string) error // of the nth question, from 1 on
}

func newRig(t *testing.T, exts ...extensions.Extension) *rig {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	fds := openFDs(t)
	registry, err := extensions.NewRegistry(exts...)
	if err != nil {
		t.Fatal(err)
	}
	box, err := sandbox.New(sandbox.None)
	if err != nil {
		t.Fatal(err)
	}
	proc, err := os.OpenFile("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	mine, theirs, err := link.Pair()
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	ctx, cancel := context.WithCancel(context.Background())
	r := &rig{
		dir: t.TempDir(), files: t.TempDir(),
		in: &inside{
			program: &program{newServer: newServer}, cfg: config.Default(), registry: registry, procFD: int(proc.Fd()),
			marks: &seccomp.Marks{}, log: log, ctx: ctx, shares: make(map[string]*served),
			hosted: make(map[uint64]*hostedInside),
		},
	}
	for _, name := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(r.files, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(r.files, "f"), []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	r.keeper = &keeper{log: log, shares: make(map[string]*kept), control: filepath.Join(r.dir, "control"), server: os.Getpid(), registry: registry}
	if r.line, err = link.NewKeeper(mine); err != nil {
		t.Fatal(err)
	}
	if err := r.journal.open(journalOf(r.control), log); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- link.Serve(theirs, r.handle) }()
	t.Cleanup(func() {
		ctx, stop := context.WithTimeout(context.Background(), patience)
		defer stop()
		if err := errors.Join(ignoreClosed(r.line.Close()), <-served, r.close(ctx)); err != nil {
			t.Error(err)
		}
		cancel()
		if err := errors.Join(r.in.close(), proc.Close(), box.Close()); err != nil {
			t.Error(err)
		}
		if names := entries(t, r.dir); len(names) > 0 {
			t.Errorf("%q are left", names)
		}
		if err := goleak.Find(leaks); err != nil {
			t.Error(err)
		}
		if n := openFDs(t); n > fds {
			t.Errorf("%d descriptors, and %d before", n, fds)
		}
	})
	return r
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (r *rig) handle(method string, body json.RawMessage, files []*os.File) (any, error) {
	r.mu.Lock()
	r.asked = append(r.asked, method)
	fail, n := r.fail, len(r.asked)
	r.mu.Unlock()
	if fail != nil {
		if err := fail(n, method); err != nil {
			closeFiles(files)
			return nil, err
		}
	}
	return r.in.handle(method, body, files)
}

// failing has questions fail from now on, counted anew.
func (r *rig) failing(f func(n int, method string) error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked, r.fail = nil, f
}

func (r *rig) path(name string) string { return filepath.Join(r.files, name) }

// spec is a share with a graft of every kind.
func (r *rig) spec(tag string) api.ShareSpec {
	return api.ShareSpec{Tag: tag, Grafts: []api.GraftSpec{
		{Path: "/m", Backend: api.BackendMem, MaxBytes: 1 << 20},
		{Path: "/", Source: r.path("a"), Watch: true},
		{Path: "/d/b", Source: r.path("b"), Watch: true, FollowMounts: true},
		{Path: "/f", Source: r.path("f"), ReadOnly: true, Watch: true},
	}}
}

// add adds a share, which must be possible.
func (r *rig) add(t *testing.T, spec api.ShareSpec) {
	t.Helper()
	if _, err := r.AddShare(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) paths(t *testing.T, tag string) (paths []string) {
	t.Helper()
	grafts, err := r.Grafts(t.Context(), tag)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range grafts {
		paths = append(paths, g.Path)
	}
	return paths
}

// watched are the paths that the statistics say are watched.
func (r *rig) watched(t *testing.T) (paths []string) {
	t.Helper()
	stats, err := r.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range stats.Events {
		paths = append(paths, s.Path)
	}
	return paths
}

// openFDs counts descriptors. One that another test had may be closed later.
func openFDs(t *testing.T) int {
	t.Helper()
	return len(entries(t, "/proc/self/fd"))
}

func entries(t *testing.T, dir string) (names []string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// wantCode checks that err has this code and says want.
func wantCode(t *testing.T, err error, code, want string) {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, expected code %s and %q", err, code, want)
	}
}

func TestKeeper(t *testing.T) {
	r := newRig(t)
	r.add(t, r.spec("one"))
	for _, err := range []error{
		r.RemoveGraft(t.Context(), "one", "/d/b"),
		func() error {
			_, err := r.ChangeGraft(t.Context(), "one", "/", api.GraftChange{ReadOnly: new(true)})
			return err
		}(),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	g, err := r.AddGraft(t.Context(), "one", api.GraftSpec{Path: "/f", Source: r.path("b")}, true)
	if err != nil || g.File || g.Source != r.path("b") {
		t.Errorf("replaced by %+v, %v", g, err)
	}
	if got := r.paths(t, "one"); !slices.Equal(got, []string{"/", "/f", "/m"}) {
		t.Errorf("grafts at %q", got)
	}
	if got := r.watched(t); !slices.Equal(got, []string{"/"}) {
		t.Errorf("%q are watched", got)
	}
	shares, err := r.Shares(t.Context())
	if err != nil || len(shares) != 1 || len(shares[0].Grafts) != 3 || !shares[0].Grafts[0].ReadOnly || shares[0].State != api.StateWaiting {
		t.Errorf("shares %+v, %v", shares, err)
	}
	socket := filepath.Join(r.dir, "one.sock")
	if got := entries(t, r.dir); !slices.Equal(got, []string{"control.shares", "one.sock", "one.sock.pid"}) || shares[0].Socket != socket {
		t.Errorf("%q, and the socket %s", got, shares[0].Socket)
	}
	if noted, err := readJournal(r.control + ".shares"); err != nil || !slices.Equal(noted, []string{socket}) {
		t.Errorf("the journal has %q, %v", noted, err)
	}

	for _, tt := range []struct {
		name, code, want string
		do               func(context.Context) error
	}{
		{"share again", api.CodeExists, `there is a share "one" already`, func(ctx context.Context) error {
			_, err := r.AddShare(ctx, api.ShareSpec{Tag: "one", Socket: filepath.Join(r.dir, "other")})
			return err
		}},
		{"its socket", api.CodeExists, `is that of share "one"`, func(ctx context.Context) error {
			_, err := r.AddShare(ctx, api.ShareSpec{Tag: "two", Socket: socket})
			return err
		}},
		{"its socket by another path", api.CodeExists, "one socket path serves one daemon", func(ctx context.Context) error {
			_, err := r.AddShare(ctx, api.ShareSpec{Tag: "two", Socket: r.dir + "/../" + filepath.Base(r.dir) + "/one.sock"})
			return err
		}},
		{"socket nowhere", api.CodeInvalid, "make its directory first", func(ctx context.Context) error {
			_, err := r.AddShare(ctx, api.ShareSpec{Tag: "two", Socket: r.dir + "/nowhere/s"})
			return err
		}},
		{"socket too long", api.CodeInvalid, "too long for a Unix socket", func(ctx context.Context) error {
			r.control = "/" + strings.Repeat("long/", 20) + "control"
			defer func() { r.control = filepath.Join(r.dir, "control") }()
			_, err := r.AddShare(ctx, api.ShareSpec{Tag: "two-that-is-long"})
			return err
		}},
		{"socket is a file", api.CodeInvalid, "is not a socket", func(ctx context.Context) error {
			_, err := r.AddShare(ctx, api.ShareSpec{Tag: "two", Socket: r.path("f")})
			return err
		}},
		{"no group", api.CodeInvalid, "find the group", func(ctx context.Context) error {
			_, err := r.AddShare(ctx, api.ShareSpec{Tag: "two", SocketGroup: "no-such-group"})
			return err
		}},
		{"no share", api.CodeNotFound, "sluicectl share ls", func(ctx context.Context) error { return r.RemoveShare(ctx, "two", false) }},
		{"graft in no share", api.CodeNotFound, `there is no share "two"`, func(ctx context.Context) error {
			_, err := r.AddGraft(ctx, "two", api.GraftSpec{Path: "/x", Source: r.path("a")}, false)
			return err
		}},
		{"grafts of no share", api.CodeNotFound, `there is no share "two"`, func(ctx context.Context) error {
			_, err := r.Grafts(ctx, "two")
			return err
		}},
		{"events of no share", api.CodeNotFound, `there is no share "two"`, func(ctx context.Context) error { return r.Events(ctx, "two", 0, nil) }},
		{"graft again", api.CodeExists, "/m", func(ctx context.Context) error {
			_, err := r.AddGraft(ctx, "one", api.GraftSpec{Path: "/m", Source: r.path("a")}, false)
			return err
		}},
		{"graft of the root", api.CodeInvalid, "the root", func(ctx context.Context) error {
			_, err := r.AddGraft(ctx, "one", api.GraftSpec{Path: "/", Source: r.path("a")}, true)
			return err
		}},
		{"no source", api.CodeInvalid, "expected a directory or a file of the host", func(ctx context.Context) error {
			_, err := r.AddGraft(ctx, "one", api.GraftSpec{Path: "/x", Source: r.path("none")}, false)
			return err
		}},
		{"root is a file", api.CodeInvalid, "is not a directory", func(ctx context.Context) error {
			_, err := r.AddShare(ctx, api.ShareSpec{Tag: "two", Grafts: []api.GraftSpec{{Path: "/", Source: r.path("f")}}})
			return err
		}},
		{"a field", api.CodeInvalid, "path: \"x\" is relative", func(ctx context.Context) error {
			_, err := r.AddGraft(ctx, "one", api.GraftSpec{Path: "x"}, false)
			return err
		}},
		{"no backend", api.CodeInvalid, `none named "nobody"`, func(ctx context.Context) error {
			_, err := r.AddGraft(ctx, "one", api.GraftSpec{Path: "/x", Backend: "nobody"}, false)
			return err
		}},
		{"no graft to remove", api.CodeNotFound, "/x", func(ctx context.Context) error { return r.RemoveGraft(ctx, "one", "/x") }},
		{"no graft to change", api.CodeNotFound, "/x", func(ctx context.Context) error {
			_, err := r.ChangeGraft(ctx, "one", "/x", api.GraftChange{ReadOnly: new(true)})
			return err
		}},
		{"nothing to watch", api.CodeInvalid, "watch", func(ctx context.Context) error {
			_, err := r.AddGraft(ctx, "one", api.GraftSpec{Path: "/x", Type: "other", Source: "/x", Watch: true}, false)
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) { wantCode(t, tt.do(t.Context()), tt.code, tt.want) })
	}
	if got := entries(t, r.dir); !slices.Equal(got, []string{"control.shares", "one.sock", "one.sock.pid"}) {
		t.Errorf("afterwards %q", got)
	}
	if err := r.RemoveShare(t.Context(), "one", false); err != nil {
		t.Error(err)
	}
	if got := entries(t, r.dir); !slices.Equal(got, []string{"control.shares"}) {
		t.Errorf("at last %q", got)
	}
}

// TestRollback has each question of AddShare fail in turn.
func TestRollback(t *testing.T) {
	r := newRig(t)
	injected := errors.New("injected")
	for step := 1; ; step++ {
		leaks, fds := goleak.IgnoreCurrent(), openFDs(t)
		r.failing(func(n int, method string) error {
			if n == step && method != askRemoveShare {
				return fmt.Errorf("%w: %s", injected, method)
			}
			return nil
		})
		_, err := r.AddShare(t.Context(), r.spec("one"))
		if err == nil {
			if want := 9; step != want {
				t.Errorf("AddShare has %d questions, expected %d: %q", step-1, want-1, r.asked)
			}
			break
		}
		if !strings.Contains(err.Error(), injected.Error()) {
			t.Errorf("step %d: %v", step, err)
		}
		r.failing(nil)
		if shares, err := r.Shares(t.Context()); err != nil || len(shares) != 0 {
			t.Errorf("step %d: shares %+v, %v", step, shares, err)
		}
		if n := len(r.in.states()); n != 0 {
			t.Errorf("step %d: the server has %d shares", step, n)
		}
		if names := entries(t, r.dir); !slices.Equal(names, []string{"control.shares"}) {
			t.Errorf("step %d: %q are left", step, names)
		}
		if noted, err := readJournal(r.control + ".shares"); err != nil || len(noted) != 0 {
			t.Errorf("step %d: the journal has %q, %v", step, noted, err)
		}
		if err := goleak.Find(leaks); err != nil {
			t.Errorf("step %d: %v", step, err)
		}
		if n := openFDs(t); n > fds {
			t.Errorf("step %d: %d descriptors, and %d before", step, n, fds)
		}
	}
}

// TestRollbackGraft has each question of a graft that takes another's place fail in turn: the other stays, and is watched.
func TestRollbackGraft(t *testing.T) {
	r := newRig(t)
	r.add(t, r.spec("one"))
	for _, method := range []string{askReplay, askAddGraft} {
		fds := openFDs(t)
		r.failing(func(_ int, asked string) error {
			if asked == method {
				return errors.New("injected")
			}
			return nil
		})
		if _, err := r.AddGraft(t.Context(), "one", api.GraftSpec{Path: "/f", Source: r.path("b"), Watch: true}, true); err == nil {
			t.Errorf("%s failed, and AddGraft did not", method)
		}
		r.failing(nil)
		shares, err := r.Shares(t.Context())
		if err != nil || shares[0].Grafts[2].Source != r.path("f") {
			t.Errorf("%s: shares %+v, %v", method, shares, err)
		}
		if got := r.watched(t); !slices.Equal(got, []string{"/", "/d/b", "/f"}) {
			t.Errorf("%s: %q are watched", method, got)
		}
		if n := openFDs(t); n > fds {
			t.Errorf("%s: %d descriptors, and %d before", method, n, fds)
		}
	}
}

// TestAddTogether adds shares with one tag, and then with one socket, at a time.
func TestAddTogether(t *testing.T) {
	r := newRig(t)
	for _, tt := range []struct {
		name string
		spec func(i int) api.ShareSpec
	}{
		{"tag", func(i int) api.ShareSpec {
			return api.ShareSpec{Tag: "one", Socket: filepath.Join(r.dir, fmt.Sprint(i))}
		}},
		{"socket", func(i int) api.ShareSpec {
			return api.ShareSpec{Tag: fmt.Sprint(i), Socket: filepath.Join(r.dir, "s")}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var all sync.WaitGroup
			failed := make([]error, 8)
			for i := range failed {
				all.Go(func() { _, failed[i] = r.AddShare(t.Context(), tt.spec(i)) })
			}
			all.Wait()
			added := 0
			for _, err := range failed {
				if err == nil {
					added++
					continue
				}
				wantCode(t, err, api.CodeExists, "")
			}
			shares, err := r.Shares(t.Context())
			if added != 1 || len(shares) != 1 || err != nil {
				t.Fatalf("%d were added, %d are there, %v", added, len(shares), err)
			}
			if names := entries(t, r.dir); len(names) != 3 {
				t.Errorf("%q are there", names)
			}
			if err := r.RemoveShare(t.Context(), shares[0].Tag, false); err != nil {
				t.Error(err)
			}
		})
	}
}

// hangs is an extension that answers only when it may.
type hangs struct{ asked, release chan struct{} }

func (*hangs) Name() string                { return "hangs" }
func (*hangs) SeccompRules() seccomp.Rules { return nil }

func (h *hangs) TryHandleMount(_ *specs.Spec, m *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	if m == nil || m.Type != "hangs" {
		if m != nil && m.Type == "panics" {
			panic("made to")
		}
		return nil, extensions.Options{}, nil
	}
	h.asked <- struct{}{}
	<-h.release
	b, err := mem.New(mem.Config{})
	return b, extensions.Options{}, err
}

// TestHang has one share's graft hang: what is asked about it is answered, other shares go on, and the graft comes to its end.
func TestHang(t *testing.T) {
	h := &hangs{asked: make(chan struct{}, 1), release: make(chan struct{})}
	r := newRig(t, h)
	r.add(t, api.ShareSpec{Tag: "one"})
	r.add(t, api.ShareSpec{Tag: "two"})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := r.AddGraft(ctx, "one", api.GraftSpec{Path: "/x", Type: "hangs"}, false)
		done <- err
	}()
	<-h.asked
	if shares, err := r.Shares(t.Context()); err != nil || len(shares) != 2 {
		t.Errorf("shares %+v, %v", shares, err)
	}
	if got := r.paths(t, "one"); len(got) != 0 {
		t.Errorf("grafts at %q", got)
	}
	if _, err := r.Stats(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := r.AddGraft(t.Context(), "two", api.GraftSpec{Path: "/x", Source: r.path("a")}, false); err != nil {
		t.Error(err)
	}
	if err := r.RemoveShare(t.Context(), "two", false); err != nil {
		t.Error(err)
	}
	// Who waits for the same share leaves with his context, and has done nothing.
	short, stop := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer stop()
	if err := r.RemoveShare(short, "one", false); err == nil {
		t.Error("the share was removed in the middle of a change")
	}
	cancel()
	wantCode(t, <-done, api.CodeUnavailable, "may be yet")
	close(h.release)
	if _, err := r.AddGraft(t.Context(), "one", api.GraftSpec{Path: "/y", Type: "panics"}, false); err == nil || !strings.Contains(err.Error(), "panic") {
		t.Errorf("an extension that panics: %v", err)
	}
	if got := r.paths(t, "one"); !slices.Equal(got, []string{"/x"}) {
		t.Errorf("grafts at %q, and what hung was to come about", got)
	}
}

// TestCancelled does nothing for who has gone.
func TestCancelled(t *testing.T) {
	r := newRig(t)
	r.add(t, r.spec("one"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.failing(func(_ int, method string) error { t.Errorf("the server is asked to %s", method); return nil })
	for name, do := range map[string]func() error{
		"AddShare":    func() error { _, err := r.AddShare(ctx, api.ShareSpec{Tag: "two"}); return err },
		"RemoveShare": func() error { return r.RemoveShare(ctx, "one", true) },
		"AddGraft": func() error {
			_, err := r.AddGraft(ctx, "one", api.GraftSpec{Path: "/x", Source: r.path("a")}, false)
			return err
		},
		"ChangeGraft": func() error {
			_, err := r.ChangeGraft(ctx, "one", "/", api.GraftChange{ReadOnly: new(true)})
			return err
		},
		"RemoveGraft": func() error { return r.RemoveGraft(ctx, "one", "/m") },
	} {
		if err := do(); err == nil {
			t.Errorf("%s: done", name)
		}
	}
	r.failing(nil)
}

// TestServerGone adds a share to a server that ends in the middle.
func TestServerGone(t *testing.T) {
	r := newRig(t)
	r.failing(func(n int, _ string) error {
		if n == 3 {
			_ = r.line.Close()
		}
		return nil
	})
	_, err := r.AddShare(t.Context(), r.spec("one"))
	wantCode(t, err, api.CodeUnavailable, "the daemon is ending")
	if n := strings.Count(err.Error(), "the daemon is ending"); n != 1 || !errors.Is(err, link.ErrClosed) {
		t.Errorf("%v", err)
	}
	if names := entries(t, r.dir); !slices.Equal(names, []string{"control.shares"}) {
		t.Errorf("%q are left", names)
	}
	_, err = r.Shares(t.Context())
	wantCode(t, err, api.CodeUnavailable, "the daemon is ending")
}

// TestRemoveConnected removes shares while front-ends come.
func TestRemoveConnected(t *testing.T) {
	r := newRig(t)
	for range 20 {
		r.add(t, api.ShareSpec{Tag: "one"})
		connected := make(chan struct{})
		go func() {
			defer close(connected)
			if c, err := net.Dial("unix", filepath.Join(r.dir, "one.sock")); err == nil {
				_, _ = io.Copy(io.Discard, c) // until the share is gone
				_ = c.Close()
			}
		}()
		if err := r.RemoveShare(t.Context(), "one", true); err != nil {
			t.Fatal(err)
		}
		<-connected
	}
	r.add(t, api.ShareSpec{Tag: "one"})
	c, err := net.Dial("unix", filepath.Join(r.dir, "one.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for {
		shares, err := r.Shares(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if shares[0].State == api.StateConnected {
			break
		}
	}
	wantCode(t, r.RemoveShare(t.Context(), "one", false), api.CodeBusy, "or force it")
	if info, err := r.Info(t.Context()); err != nil || info.State != "RUNNING" || info.Shares != 1 {
		t.Errorf("%+v, %v", info, err)
	}
}

package client_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/sluicefs/sluice/control"
	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/control/controltest"
)

var _ control.Daemon = (*client.Client)(nil)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// connect serves d and returns its client, and what ends the server.
func connect(t *testing.T, d control.Daemon) (c *client.Client, stop func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "c.sock")
	s, err := control.New(control.Config{Daemon: d, Unix: control.UnixListener{Path: socket}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return open(t, client.Config{Socket: socket}), stop
}

func open(t *testing.T, cfg client.Config) *client.Client {
	t.Helper()
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func code(err error) string {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// TestCalls compares what the client says with what the daemon says itself, call by call.
func TestCalls(t *testing.T) {
	ctx := t.Context()
	d := controltest.New()
	d.SetStats(api.Stats{Shares: []api.ShareStats{{Tag: "a b", BytesRead: 1 << 60, FDs: map[string]uint64{"opath": 3}}}, Threads: 7})
	c, _ := connect(t, d)

	const tag = "a%b c?d" // everything that a path of a URL could misunderstand
	spec := api.ShareSpec{Tag: tag, Cache: "never", Writeback: true, RequestQueues: 3, Grafts: []api.GraftSpec{{Path: "/x", Source: "/srv/x", UIDMap: []api.IDRange{{Guest: 1, Host: 2, Count: 3}}}}}
	share, err := c.AddShare(ctx, spec)
	if err != nil || share.Tag != tag || share.State != api.StateWaiting || share.RequestQueues != 3 {
		t.Errorf("add a share: %+v, %v", share, err)
	}
	if g, err := c.AddGraft(ctx, tag, api.GraftSpec{Path: "/y &=", Source: "/srv/y"}, false); err != nil || g.Source != "/srv/y" {
		t.Errorf("add a graft: %+v, %v", g, err)
	}
	if g, err := c.AddGraft(ctx, tag, api.GraftSpec{Path: "/y &=", Source: "/srv/z"}, true); err != nil || g.Source != "/srv/z" {
		t.Errorf("replace a graft: %+v, %v", g, err)
	}
	yes, limit := true, uint64(1<<40)
	if g, err := c.ChangeGraft(ctx, tag, "/y &=", api.GraftChange{ReadOnly: &yes, MaxBytes: &limit}); err != nil || !g.ReadOnly || g.MaxBytes != limit {
		t.Errorf("change a graft: %+v, %v", g, err)
	}

	same := func(what string, got, want any, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v (%v), want %+v", what, got, err, want)
		}
	}
	wantInfo, _ := d.Info(ctx)
	info, err := c.Info(ctx)
	same("info", info, wantInfo, err)
	wantShares, _ := d.Shares(ctx)
	shares, err := c.Shares(ctx)
	same("shares", shares, wantShares, err)
	wantGrafts, _ := d.Grafts(ctx, tag)
	grafts, err := c.Grafts(ctx, tag)
	same("grafts", grafts, wantGrafts, err)
	if len(grafts) != 3 {
		t.Errorf("%d grafts, want 3", len(grafts))
	}
	wantStats, _ := d.Stats(ctx)
	stats, err := c.Stats(ctx)
	same("stats", stats, wantStats, err)

	if err := c.RemoveGraft(ctx, tag, "/y &="); err != nil {
		t.Errorf("remove a graft: %v", err)
	}
	d.Connect(tag)
	if err := c.RemoveShare(ctx, tag, false); code(err) != api.CodeBusy {
		t.Errorf("remove a share in use: %v", err)
	}
	if err := c.RemoveShare(ctx, tag, true); err != nil {
		t.Errorf("remove a share by force: %v", err)
	}
	want := []string{
		"AddShare " + tag, "AddGraft " + tag + " /y &=", "AddGraft " + tag + " /y &= replace", "ChangeGraft " + tag + " /y &=",
		"RemoveGraft " + tag + " /y &=", "RemoveShare " + tag, "RemoveShare " + tag + " force",
	}
	if got := d.Calls(); !slices.Equal(got, want) {
		t.Errorf("the daemon was asked %q, want %q", got, want)
	}
}

func TestRefusals(t *testing.T) {
	ctx := t.Context()
	d := controltest.New()
	c, _ := connect(t, d)
	said := &api.Error{Code: api.CodeUnsupported, Message: "cannot", Hint: "do otherwise"}
	d.Fail("AddShare", said)
	_, err := c.AddShare(ctx, api.ShareSpec{Tag: "t"})
	var e *api.Error
	if !errors.As(err, &e) || *e != *said {
		t.Errorf("the daemon said %+v, the client %+v", said, err)
	}
	if _, err := c.Grafts(ctx, "none"); code(err) != api.CodeNotFound {
		t.Errorf("grafts of no share: %v", err)
	}
	send := func(api.Event) error { return errors.New("there is no event") }
	if err := c.Events(ctx, "none", 0, send); code(err) != api.CodeNotFound {
		t.Errorf("events of no share: %v", err)
	}
	for _, tag := range []string{"", ".", ".."} {
		_, errs1 := c.Grafts(ctx, tag)
		_, errs2 := c.AddGraft(ctx, tag, api.GraftSpec{Path: "/"}, true)
		_, errs3 := c.ChangeGraft(ctx, tag, "/", api.GraftChange{})
		for i, err := range []error{errs1, errs2, errs3, c.RemoveGraft(ctx, tag, "/"), c.RemoveShare(ctx, tag, true), c.Events(ctx, tag, 0, send)} {
			if code(err) != api.CodeInvalid {
				t.Errorf("tag %q, call %d: %v", tag, i, err)
			}
		}
	}
	if calls := d.Calls(); len(calls) != 1 {
		t.Errorf("the daemon was asked for a share without a name: %q", calls)
	}
}

func TestEvents(t *testing.T) {
	d := controltest.New()
	c, _ := connect(t, d)
	if _, err := c.AddShare(t.Context(), api.ShareSpec{Tag: "data"}); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"/1", "/2", "/3"} {
		d.Emit("data", api.Event{Kind: api.EventModify, Path: p})
	}

	// What send refuses ends it, while the daemon goes on.
	enough := errors.New("enough")
	var got []string
	err := c.Events(t.Context(), "data", 1, func(e api.Event) error {
		if got = append(got, e.Kind+e.Path); len(got) == 3 {
			return enough
		}
		return nil
	})
	if want := []string{"hello", "modify/2", "modify/3"}; !errors.Is(err, enough) || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}

	// The context does, while there is nothing to read.
	ctx, cancel := context.WithCancel(t.Context())
	if err := c.Events(ctx, "data", 0, func(api.Event) error { cancel(); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}

	// And the end of the share, which is none of a daemon.
	err = c.Events(t.Context(), "data", 0, func(api.Event) error { return d.RemoveShare(t.Context(), "data", true) })
	if err != nil {
		t.Errorf("removed: %v", err)
	}
}

func TestContext(t *testing.T) {
	d := controltest.New()
	defer d.Hang("Info")()
	c, _ := connect(t, d)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() {
		_, err := c.Info(ctx)
		result <- err
	}()
	cancel()
	err := <-result
	if e := (*client.UnreachableError)(nil); !errors.Is(err, context.Canceled) || errors.As(err, &e) {
		t.Errorf("%v, want context.Canceled and nothing else", err)
	}
}

// TestConnections counts descriptors before and after many calls.
func TestConnections(t *testing.T) {
	d := controltest.New()
	c, stop := connect(t, d)
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	call := func() {
		if _, err := c.Info(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Grafts(t.Context(), "none"); code(err) != api.CodeNotFound {
			t.Fatal(err)
		}
		if err := c.Events(t.Context(), "none", 0, nil); code(err) != api.CodeNotFound {
			t.Fatal(err)
		}
	}
	call()
	before := count()
	for range 50 {
		call()
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors became %d", before, after)
	}
	stop()
	if _, err := c.Info(t.Context()); err == nil {
		t.Error("a daemon that has ended answers")
	}
}

func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	file, dead := filepath.Join(dir, "file"), filepath.Join(dir, "dead")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close()
	dial := func(err error) client.Config {
		return client.Config{Socket: "vsock:2:1024", Dial: func(context.Context) (net.Conn, error) { return nil, err }}
	}
	for _, tt := range []struct {
		cfg  client.Config
		want string
	}{
		{client.Config{Socket: filepath.Join(dir, "none")}, "sluiced is not running at " + dir + "/none: start it with --control-socket"},
		{client.Config{Socket: file}, "nothing listens at " + file},
		{client.Config{Socket: dead}, "nothing listens at " + dead},
		{dial(os.ErrPermission), "no permission to connect to vsock:2:1024: "},
		{dial(errors.New("no such guest")), "connect to sluiced at vsock:2:1024: no such guest"},
	} {
		_, err := open(t, tt.cfg).Info(t.Context())
		var e *client.UnreachableError
		if !errors.As(err, &e) || e.Connected || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%q, want %q", err, tt.want)
		}
	}
}

// TestForeign has the answers of what is not sluiced, or another.
func TestForeign(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer func(w http.ResponseWriter)
		want   string
		lost   bool
	}{
		{"an error that is no api.Error", func(w http.ResponseWriter) { http.Error(w, "404 page not found", http.StatusNotFound) }, `answers "404 Not Found" to GET /v1/info`, false},
		{"JSON that is no api.Error", func(w http.ResponseWriter) { w.WriteHeader(500); _, _ = io.WriteString(w, "{}") }, `answers "500 Internal`, false},
		{"a redirection", func(w http.ResponseWriter) { w.Header().Set("Location", "/v1/other"); w.WriteHeader(307) }, `answers "307 `, false},
		{"no JSON", func(w http.ResponseWriter) { _, _ = io.WriteString(w, "<html>") }, "does not answer in the control API's JSON", false},
		{"another type", func(w http.ResponseWriter) { _, _ = io.WriteString(w, `{"pid":"one"}`) }, "does not answer in the control API's JSON", false},
		{"half an answer", func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, `{"id":`)
			panic(http.ErrAbortHandler)
		}, "went away before it had answered", true},
		{"no answer", func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, "went away before it had answered", true},
		{"an endless error", func(w http.ResponseWriter) {
			w.WriteHeader(500)
			for {
				if _, err := w.Write(make([]byte, 1<<10)); err != nil {
					return
				}
			}
		}, `answers "500 Internal`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			ln, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/v1/info" {
					t.Errorf("asked for %s", r.URL)
				}
				tt.answer(w)
			})}
			ended := make(chan struct{})
			go func() { defer close(ended); _ = srv.Serve(ln) }()
			defer func() { _ = srv.Close(); <-ended }()
			_, err = open(t, client.Config{Socket: socket}).Info(t.Context())
			var e *client.UnreachableError
			if err == nil || !strings.Contains(err.Error(), tt.want) || errors.As(err, &e) != tt.lost || tt.lost && !e.Connected {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	for _, cfg := range []client.Config{{}, {Socket: strings.Repeat("s", 108)}} {
		if _, err := client.New(cfg); err == nil {
			t.Errorf("%d bytes of socket are taken", len(cfg.Socket))
		}
	}
	if err := (client.Config{Socket: strings.Repeat("s", 107)}).Validate(); err != nil {
		t.Error(err)
	}
}

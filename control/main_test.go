package control

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"go.uber.org/goleak"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/controltest"
)

// TestMain fails the package on a goroutine, or a file descriptor, that is left over.
func TestMain(m *testing.M) {
	// The poller's own descriptors stay: have them opened before counting.
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	_ = r.Close()
	_ = w.Close()
	before := openFDs()
	code := m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		println(err.Error())
		code = 1
	}
	if after := openFDs(); after != before && code == 0 {
		println("file descriptors before and after:", before, after)
		code = 1
	}
	os.Exit(code)
}

func openFDs() int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		panic(err)
	}
	return len(entries)
}

// A logBuffer is a log that a test reads.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// A rig is a server with a daemon in memory, on a Unix socket.
type rig struct {
	t      *testing.T
	daemon *controltest.Daemon
	server *Server
	socket string
	log    *logBuffer
	client *http.Client
	stop   func() error // ends Serve, and returns what it returned
}

// newRig starts a server; edit, if any, changes how.
func newRig(t *testing.T, edit func(*Config, *limits)) *rig {
	t.Helper()
	r := &rig{t: t, daemon: controltest.New(), log: new(logBuffer), socket: filepath.Join(t.TempDir(), "control.sock")}
	cfg := Config{
		Daemon: r.daemon,
		Log:    slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Unix:   UnixListener{Path: r.socket},
	}
	lim := defaultLimits
	if edit != nil {
		edit(&cfg, &lim)
	}
	server, err := newServer(cfg, lim)
	if err != nil {
		t.Fatal(err)
	}
	r.server = server
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx) }()
	r.stop = sync.OnceValue(func() error {
		cancel()
		return <-served
	})
	r.client = clientOf(func() (net.Conn, error) { return net.Dial("unix", r.socket) })
	t.Cleanup(func() {
		r.client.CloseIdleConnections()
		if err := r.stop(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return r
}

func clientOf(dial func() (net.Conn, error)) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:        func(context.Context, string, string) (net.Conn, error) { return dial() },
		DisableCompression: true,
	}}
}

// do sends a request and returns the whole answer.
func do(t *testing.T, client *http.Client, method, path, body string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, "http://sluice"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp, string(text)
}

// expect sends a request and decodes the answer into out, if there is one to be.
func (r *rig) expect(method, path, body string, status int, out any) {
	r.t.Helper()
	expect(r.t, r.client, method, path, body, status, out)
}

func expect(t *testing.T, client *http.Client, method, path, body string, status int, out any) {
	t.Helper()
	resp, text := do(t, client, method, path, body)
	if resp.StatusCode != status {
		t.Fatalf("%s %s %s: %d %s, expected %d", method, path, body, resp.StatusCode, text, status)
	}
	if out == nil {
		return
	}
	dec := json.NewDecoder(strings.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(out); err != nil {
		t.Fatalf("%s %s: %s: %v", method, path, text, err)
	}
}

// addShare adds one behind the server's back.
func (r *rig) addShare(tag string, grafts ...api.GraftSpec) {
	r.t.Helper()
	if _, err := r.daemon.AddShare(context.Background(), api.ShareSpec{Tag: tag, Grafts: grafts}); err != nil {
		r.t.Fatal(err)
	}
}

// A memListener is a listener whose connections come from where dial says.
type memListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newMemListener() *memListener {
	return &memListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *memListener) Addr() net.Addr { return &vsock.Addr{ContextID: 2, Port: 7000} }

// dial connects from a guest.
func (l *memListener) dial(cid uint32) (net.Conn, error) {
	return l.dialFrom(&vsock.Addr{ContextID: cid, Port: 1})
}

func (l *memListener) dialFrom(addr net.Addr) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case l.conns <- fromAddr{there, addr}:
		return here, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

type fromAddr struct {
	net.Conn
	addr net.Addr
}

func (c fromAddr) RemoteAddr() net.Addr { return c.addr }

// within fails the test if done is not closed soon.
func within(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatalf("waited 20 s for %s", what)
	}
}

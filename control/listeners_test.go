package control

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/controltest"
)

func TestUnixSocket(t *testing.T) {
	r := newRig(t, nil)
	info, err := os.Lstat(r.socket)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket is %v, %v", info.Mode(), err)
	}
	if s, err := New(Config{Daemon: r.daemon, Unix: UnixListener{Path: r.socket}}); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("a second server on one path: %v", err)
		if err == nil {
			_ = s.Close()
		}
	}
	r.expect("GET", "/healthz", "", 200, nil)
	if !strings.Contains(r.log.String(), "level=DEBUG") || !strings.Contains(r.log.String(), "uid=") {
		t.Errorf("who connects is not in the log: %s", r.log.String())
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	if names, err := os.ReadDir(filepath.Dir(r.socket)); err != nil || len(names) != 0 {
		t.Errorf("the server left %v behind, %v", names, err)
	}
}

func TestUnixSocketOfAGroup(t *testing.T) {
	self, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	group, err := user.LookupGroupId(self.Gid)
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, func(cfg *Config, _ *limits) { cfg.Unix.Group = group.Name })
	if info, err := os.Lstat(r.socket); err != nil || info.Mode() != os.ModeSocket|0o660 {
		t.Errorf("the socket is %v, %v", info.Mode(), err)
	}
}

func TestUnixSocketStale(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: stale})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	s, err := New(Config{Daemon: controltest.New(), Unix: UnixListener{Path: stale}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := New(Config{Daemon: controltest.New(), Unix: UnixListener{Path: file}}); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file at the socket's path: %v", err)
		if err == nil {
			_ = s.Close()
		}
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "precious" {
		t.Errorf("the file is %q, %v", text, err)
	}
}

// TestHybrid is what Cloud Hypervisor and Firecracker do with a guest's connection to port 7000 of the host.
func TestHybrid(t *testing.T) {
	vmm := filepath.Join(t.TempDir(), "vm.vsock")
	r := newRig(t, func(cfg *Config, _ *limits) {
		cfg.Hybrid = []HybridListener{
			{Path: vmm, Port: 7000, Allow: Allow{Operations: []string{"getHealth"}}},
			{Path: vmm, Port: 7001, Allow: Allow{Operations: []string{"getShare"}, Shares: []string{"a"}}},
		}
	})
	r.addShare("a")
	for port, status := range map[string]map[string]int{
		"7000": {"/healthz": 200, "/v1/shares/a": 403},
		"7001": {"/healthz": 403, "/v1/shares/a": 200},
	} {
		guest := clientOf(func() (net.Conn, error) { return net.Dial("unix", vmm+"_"+port) })
		for path, want := range status {
			expect(t, guest, "GET", path, "", want, nil)
		}
		guest.CloseIdleConnections()
	}
	if info, err := os.Lstat(vmm + "_7000"); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket is %v, %v", info.Mode(), err)
	}
}

// TestVsock opens a port as a daemon does; nobody can connect without a guest. One port has several guests' rules.
func TestVsock(t *testing.T) {
	allow := func(cid uint32) Allow {
		return Allow{Operations: []string{"getHealth"}, CIDs: []uint32{cid}}
	}
	const port = 0x51c30001
	r := newRig(t, func(cfg *Config, _ *limits) { cfg.Vsock = []VsockListener{{port, allow(3)}, {port, allow(4)}} })
	if n := len(r.server.listeners); n != 2 {
		t.Errorf("there are %d listeners, expected those of the Unix socket and the port", n)
	}
	l := r.server.listeners[1]
	if addr, ok := l.Addr().(*vsock.Addr); !ok || addr.Port != port {
		t.Errorf("the listener is on %v", l.Addr())
	}
	for cid, want := range map[uint32]bool{3: true, 4: true, 5: false} {
		if got := l.peer(cid, true) != nil; got != want {
			t.Errorf("guest %d may connect: %v", cid, got)
		}
	}
	if s, err := New(Config{Daemon: r.daemon, Vsock: []VsockListener{{port, allow(3)}}}); err == nil || !strings.Contains(err.Error(), "vsock port") {
		t.Errorf("a second server on one port: %v", err)
		if err == nil {
			_ = s.Close()
		}
	}
}

func TestServeAndClose(t *testing.T) {
	// Closed without having served.
	socket := filepath.Join(t.TempDir(), "s")
	s, err := New(Config{Daemon: controltest.New(), Unix: UnixListener{Path: socket}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	if err := s.Serve(t.Context()); err != nil {
		t.Errorf("Serve after Close: %v", err)
	}

	// Closed while it serves.
	r := newRig(t, nil)
	r.expect("GET", "/healthz", "", 200, nil)
	if err := r.server.Close(); err != nil {
		t.Error(err)
	}
	if err := r.stop(); err != nil {
		t.Errorf("Serve after Close: %v", err)
	}
}

// entered is a daemon that says when a share is about to be added.
type entered struct {
	Daemon
	in chan struct{}
}

func (e entered) AddShare(ctx context.Context, spec api.ShareSpec) (api.Share, error) {
	close(e.in)
	return e.Daemon.AddShare(ctx, spec)
}

// TestServeEndsGracefully: what was begun is answered.
func TestServeEndsGracefully(t *testing.T) {
	in := make(chan struct{})
	r := newRig(t, func(cfg *Config, _ *limits) { cfg.Daemon = entered{cfg.Daemon, in} })
	release := r.daemon.Hang("AddShare")
	type result struct {
		status int
		err    error
	}
	done := make(chan result, 1)
	go func() {
		resp, err := r.client.Post("http://sluice/v1/shares", "", strings.NewReader(`{"tag":"x"}`))
		if err != nil {
			done <- result{err: err}
			return
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		done <- result{resp.StatusCode, err}
	}()
	within(t, "the request", in)
	ended := make(chan struct{})
	go func() {
		_ = r.stop()
		close(ended)
	}()
	within(t, "the end to have begun", r.server.ending.Done())
	release()
	if res := <-done; res.err != nil || res.status != http.StatusCreated {
		t.Errorf("the request in flight got %d, %v", res.status, res.err)
	}
	within(t, "the end", ended)
}

// TestServeEndsWithoutAsked has a client that has asked nothing yet, for which there is nothing to wait.
func TestServeEndsWithoutAsked(t *testing.T) {
	for _, early := range []bool{true, false} {
		lim := defaultLimits
		lim.end = time.Hour
		path := filepath.Join(t.TempDir(), "control")
		s, err := newServer(Config{Daemon: controltest.New(), Unix: UnixListener{Path: path}}, lim)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- s.Serve(ctx) }()
		if early {
			for {
				s.fresh.mu.Lock()
				n := len(s.fresh.conns)
				s.fresh.mu.Unlock()
				if n == 1 {
					break
				}
				time.Sleep(time.Millisecond)
			}
		}
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(3 * time.Second):
			t.Error("Serve waits for a connection on which nothing was asked")
			_ = s.Close()
			<-ended
		}
	}
}

// TestFailingListener: one that fails ends Serve, which says so.
func TestFailingListener(t *testing.T) {
	l := newMemListener()
	s, err := New(Config{Daemon: controltest.New(), Listeners: []Listener{{Listener: l}}})
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if err := s.Serve(t.Context()); err == nil || !strings.Contains(err.Error(), "serve the control API") {
		t.Errorf("Serve: %v", err)
	}
}

// shortOfFDs is a listener that has no descriptor for its first connection.
type shortOfFDs struct {
	net.Listener
	err error
}

func (l *shortOfFDs) Accept() (net.Conn, error) {
	if err := l.err; err != nil {
		l.err = nil
		return nil, err
	}
	return l.Listener.Accept()
}

func TestServeWithoutDescriptors(t *testing.T) {
	for _, err := range []error{
		fmt.Errorf("accept: %w", &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", unix.EMFILE)}),
		&net.OpError{Op: "accept", Err: unix.ENFILE},
	} {
		l := newMemListener()
		newRig(t, func(cfg *Config, _ *limits) {
			cfg.Listeners = []Listener{{Listener: &shortOfFDs{l, err}}}
		})
		client := clientOf(func() (net.Conn, error) { return l.dial(2) })
		expect(t, client, "GET", "/healthz", "", 200, nil)
		client.CloseIdleConnections()
	}
}

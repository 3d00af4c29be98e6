package control

import (
	"errors"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/sluicefs/sluice/control/api"
)

// guestRig is a rig whose guest 3 may do operations on the shares a and c, on a listener in memory.
func guestRig(t *testing.T, operations ...string) (*rig, *memListener, *http.Client) {
	t.Helper()
	l := newMemListener()
	r := newRig(t, func(cfg *Config, _ *limits) {
		cfg.Listeners = []Listener{{l, []Allow{
			{Operations: operations, Shares: []string{"a", "c"}, CIDs: []uint32{3}},
			{Operations: []string{"getShare"}, Shares: []string{"b"}, CIDs: []uint32{4}},
		}}}
	})
	r.addShare("a", api.GraftSpec{
		Path: "/x", Source: "/srv/secret/x", Options: []string{"secret"},
		UIDMap: []api.IDRange{{Guest: 0, Host: 77777, Count: 1}},
	})
	r.addShare("b", api.GraftSpec{Path: "/y", Source: "/srv/secret/y"})
	client := clientOf(func() (net.Conn, error) { return l.dial(3) })
	t.Cleanup(client.CloseIdleConnections)
	return r, l, client
}

func TestGuestMayDoNothingUnnamed(t *testing.T) {
	r, _, guest := guestRig(t, "getHealth")
	before := len(r.daemon.Calls())
	for _, rt := range routes {
		if rt.operation == "getHealth" {
			continue
		}
		path := strings.ReplaceAll(rt.pattern, "{tag}", "a")
		resp, text := do(t, guest, rt.method, path+"?path=/x&mountpoint=/x", `{"path":"/z","source":"/etc","tag":"z"}`)
		if resp.StatusCode != http.StatusForbidden || !strings.Contains(text, rt.operation) {
			t.Errorf("%s: %d %s", rt.operation, resp.StatusCode, text)
		}
	}
	expect(t, guest, "GET", "/healthz", "", 200, nil)
	if calls := r.daemon.Calls(); len(calls) != before {
		t.Errorf("the daemon was called with %q", calls[before:])
	}
}

func TestGuestSeesItsSharesOnly(t *testing.T) {
	r, l, guest := guestRig(t, allowable()...)
	r.daemon.SetStats(api.Stats{
		Shares:     []api.ShareStats{{Tag: "a", BytesRead: 1}, {Tag: "b", BytesRead: 2}},
		Events:     []api.EventStats{{Tag: "a", Path: "/x"}, {Tag: "b", Path: "/y"}},
		Images:     []api.ImageStats{{Tag: "a", Path: "/x", CacheBytes: 77777}, {Tag: "b", Path: "/y"}},
		Goroutines: 5, SeccompViolations: 6,
	})
	for _, tt := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/v1/info", "", 200},
		{"GET", "/v1/shares", "", 200},
		{"GET", "/v1/shares/a", "", 200},
		{"GET", "/v1/shares/b", "", 404},
		{"GET", "/v1/shares/c", "", 404}, // may be seen, and is not there
		{"GET", "/v1/shares/a/grafts", "", 200},
		{"GET", "/v1/shares/b/grafts", "", 404},
		{"GET", "/v1/shares/b/events", "", 404},
		{"PATCH", "/v1/shares/a/grafts?path=/x", `{"read_only":true}`, 200},
		{"PATCH", "/v1/shares/b/grafts?path=/y", `{"read_only":true}`, 404},
		{"DELETE", "/v1/shares/b/grafts?path=/y", "", 404},
		{"DELETE", "/v1/shares/b?force=true", "", 404},
		{"DELETE", "/api/v1/mount?mountpoint=/y&tag=b", "", 404},
		{"DELETE", "/api/v1/mount?mountpoint=/y", "", 404}, // a is the only one
		{"GET", "/v1/stats", "", 200},
		{"GET", "/metrics", "", 200},
	} {
		resp, text := do(t, guest, tt.method, tt.path, tt.body)
		if resp.StatusCode != tt.status {
			t.Errorf("%s %s: %d %s, expected %d", tt.method, tt.path, resp.StatusCode, text, tt.status)
		}
		for _, secret := range []string{"secret", "/run", "77777", `"b"`, "seccomp_violations_total", "go_", "process_", `"goroutines":5`} {
			if strings.Contains(text, secret) && resp.StatusCode == 200 {
				t.Errorf("%s %s: the answer has %s in it: %s", tt.method, tt.path, secret, text)
			}
		}
	}
	var info api.Info
	expect(t, guest, "GET", "/v1/info", "", 200, &info)
	if info.Shares != 1 {
		t.Errorf("the guest is told of %d shares", info.Shares)
	}
	// A share that is not named and one that does not exist look the same.
	_, hidden := do(t, guest, "GET", "/v1/shares/b/grafts", "")
	_, missing := do(t, guest, "GET", "/v1/shares/c/grafts", "")
	if strings.ReplaceAll(hidden, `\"b\"`, `\"c\"`) != missing {
		t.Errorf("%s and %s differ", hidden, missing)
	}
	next, resp := events(t, guest, "/v1/shares/a/events")
	if e := next(); e.Kind != api.EventHello {
		t.Errorf("the first event is %+v", e)
	}
	_ = resp.Body.Close()

	other := clientOf(func() (net.Conn, error) { return l.dial(4) })
	defer other.CloseIdleConnections()
	expect(t, other, "GET", "/v1/shares/b", "", 200, nil)
	expect(t, other, "GET", "/v1/shares/a", "", 404, nil)
	expect(t, other, "GET", "/healthz", "", 403, nil)

	r.daemon.Fail("Grafts", errors.New("open /srv/secret: permission denied"))
	if _, text := do(t, guest, "GET", "/v1/shares/a/grafts", ""); strings.Contains(text, "/srv") || !strings.Contains(text, api.CodeInternal) {
		t.Errorf("an error of the host is told as %s", text)
	}
}

func TestGuestThatMayNotConnect(t *testing.T) {
	r, l, _ := guestRig(t, "getHealth")
	for _, addr := range []net.Addr{&vsock.Addr{ContextID: 5, Port: 1}, &vsock.Addr{ContextID: 2, Port: 1}, &net.UnixAddr{}} {
		c, err := l.dialFrom(addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v: read %d, %v", addr, n, err)
		}
		_ = c.Close()
	}
	if n := strings.Count(r.log.String(), "may not connect"); n != 3 {
		t.Errorf("%d refusals are logged, expected 3", n)
	}
}

func TestConfigRefusals(t *testing.T) {
	ok := Allow{Operations: []string{"getEvents"}, Shares: []string{"a"}}
	with := func(f func(*Allow)) Allow {
		a := ok
		f(&a)
		return a
	}
	withCID := with(func(a *Allow) { a.CIDs = []uint32{3} })
	vsockPort := func(a Allow) Config { return Config{Vsock: []VsockListener{{Port: 7000, Allow: a}}} }
	for _, tt := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"no guest", vsockPort(ok), "expected the CIDs of some, or 4294967295 for all"},
		{"no operation", vsockPort(with(func(a *Allow) { a.CIDs, a.Operations = []uint32{3}, nil })), "expected some of getInfo"},
		{"unknown operation", vsockPort(with(func(a *Allow) { a.CIDs, a.Operations = []uint32{3}, []string{"getevents"} })), `no operation "getevents"`},
		{"bad share", vsockPort(with(func(a *Allow) { a.CIDs, a.Shares = []uint32{3}, []string{""} })), "tag: it is empty"},
		{"no port", Config{Vsock: []VsockListener{{Allow: withCID}}}, "expected a port"},
		{"guest twice", Config{Vsock: []VsockListener{{7000, withCID}, {7000, withCID}}}, "guest 3 is there twice"},
		{"hybrid without path", Config{Hybrid: []HybridListener{{Port: 7000, Allow: ok}}}, "expected the path"},
		{"hybrid without port", Config{Hybrid: []HybridListener{{Path: "x", Allow: ok}}}, "expected a port"},
		{"hybrid with CIDs", Config{Hybrid: []HybridListener{{Path: "x", Port: 7000, Allow: withCID}}}, "one guest"},
		{"nil listener", Config{Listeners: []Listener{{}}}, "is nil"},
		{"bad nydus share", Config{NydusShare: "a\n"}, "control character"},
	} {
		tt.cfg.Daemon = panicky{}
		if s, err := New(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, expected it to say %q", tt.name, err, tt.want)
			if err == nil {
				_ = s.Close()
			}
		}
	}
	for _, operation := range []string{"addShare", "addGraft", "putGraft", "nydusMount", "nydusRemount"} {
		for _, cfg := range []Config{
			vsockPort(Allow{Operations: []string{operation}, CIDs: []uint32{3}}),
			{Hybrid: []HybridListener{{Path: "x", Port: 7000, Allow: Allow{Operations: []string{operation}}}}},
			{Listeners: []Listener{{newMemListener(), []Allow{{Operations: []string{operation}}}}}},
		} {
			cfg.Daemon = panicky{}
			if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "cannot be allowed to a guest: it takes paths of the host") {
				t.Errorf("%s: %v", operation, err)
			}
		}
	}
	if err := (&Config{}).Validate(); err == nil {
		t.Error("a configuration without a daemon passes")
	}
}

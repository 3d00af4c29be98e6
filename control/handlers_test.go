package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

func TestShares(t *testing.T) {
	r := newRig(t, nil)
	var shares []api.Share
	r.expect("GET", "/v1/shares", "", 200, &shares)
	if shares == nil || len(shares) != 0 {
		t.Errorf("no shares are %#v, expected an empty list", shares)
	}

	var share api.Share
	spec := api.ShareSpec{Tag: "a?b c", Cache: "always", Grafts: []api.GraftSpec{{Path: "/", Source: "/srv"}}}
	body, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	r.expect("POST", "/v1/shares", string(body), 201, &share)
	if share.Tag != spec.Tag || share.Cache != "always" || share.State != api.StateWaiting || share.Socket == "" {
		t.Errorf("share added is %+v", share)
	}
	var same api.Share
	r.expect("GET", "/v1/shares/a%3Fb%20c", "", 200, &same)
	if !reflect.DeepEqual(same, share) {
		t.Errorf("share is %+v, was added as %+v", same, share)
	}
	r.expect("GET", "/v1/shares", "", 200, &shares)
	if len(shares) != 1 || shares[0].Tag != spec.Tag {
		t.Errorf("shares are %+v", shares)
	}
	var info api.Info
	r.expect("GET", "/v1/info", "", 200, &info)
	if info.Shares != 1 || info.ID != "test" {
		t.Errorf("info is %+v", info)
	}

	r.daemon.Connect(spec.Tag)
	r.expect("DELETE", "/v1/shares/a%3Fb%20c", "", 409, nil)
	r.expect("DELETE", "/v1/shares/a%3Fb%20c?force=false", "", 409, nil)
	r.expect("DELETE", "/v1/shares/a%3Fb%20c?force=true", "", 204, nil)
	r.expect("DELETE", "/v1/shares/a%3Fb%20c", "", 404, nil)
}

func TestGrafts(t *testing.T) {
	r := newRig(t, nil)
	r.addShare("data")
	var g api.Graft
	r.expect("POST", "/v1/shares/data/grafts", `{"path":"/x","source":"/srv/x","read_only":true}`, 201, &g)
	if g.Path != "/x" || !g.ReadOnly {
		t.Errorf("graft added is %+v", g)
	}
	r.expect("POST", "/v1/shares/data/grafts", `{"path":"/x","source":"/srv/y"}`, 409, nil)
	r.expect("PUT", "/v1/shares/data/grafts", `{"path":"/x","source":"/srv/y"}`, 200, &g)
	r.expect("PUT", "/v1/shares/data/grafts", `{"path":"/with space&more","source":"/srv/z"}`, 200, nil)
	g = api.Graft{}
	r.expect("PATCH", "/v1/shares/data/grafts?path=/x", `{"read_only":true,"max_bytes":4096}`, 200, &g)
	if !g.ReadOnly || g.MaxBytes != 4096 || g.Source != "/srv/y" {
		t.Errorf("graft changed is %+v", g)
	}
	var grafts []api.Graft
	r.expect("GET", "/v1/shares/data/grafts", "", 200, &grafts)
	var paths []string
	for _, g := range grafts {
		paths = append(paths, g.Path)
	}
	if want := []string{"/", "/with space&more", "/x"}; !slices.Equal(paths, want) {
		t.Errorf("grafts are at %q, expected %q", paths, want)
	}
	r.expect("DELETE", "/v1/shares/data/grafts?path=/with%20space%26more", "", 204, nil)
	r.expect("DELETE", "/v1/shares/data/grafts?path=/with+space%26more", "", 404, nil)
	r.expect("DELETE", "/v1/shares/none/grafts?path=/x", "", 404, nil)

	want := []string{"AddShare data", "AddGraft data /x", "AddGraft data /x", "AddGraft data /x replace", "AddGraft data /with space&more replace", "ChangeGraft data /x"}
	if got := r.daemon.Calls()[:len(want)]; !slices.Equal(got, want) {
		t.Errorf("the daemon was called with %q, expected %q", got, want)
	}
}

func TestRefusals(t *testing.T) {
	r := newRig(t, nil)
	r.addShare("data")
	before := len(r.daemon.Calls())
	for _, tt := range []struct {
		method, path, body string
		status             int
		message            string // part of message or hint
	}{
		{"GET", "/", "", 404, "/v1/openapi.yaml"},
		{"GET", "/v1/shares/", "", 404, "no path"},
		{"GET", "/v1//shares", "", 404, "no path"},
		{"GET", "/v1/shares/../info", "", 404, "no path"},
		{"GET", "/v2/info", "", 404, "no path"},
		{"GET", "/v1/shares/data/grafts/", "", 404, "no path"},
		{"GET", "/v1/shares/none", "", 404, `no share "none"`},
		{"PUT", "/v1/shares", "", 405, "GET, HEAD, POST"},
		{"POST", "/v1/shares/data/events", "", 405, "expected GET"},
		{"HEAD", "/v1/shares/data/events", "", 405, ""},
		{"OPTIONS", "/v1/info", "", 405, "expected GET, HEAD"},
		{"GET", "/v1/info?x=1", "", 400, `no parameter "x" here: expected none`},
		{"GET", "/v1/info?%zz", "", 400, "query"},
		{"DELETE", "/v1/shares/data?force=yes", "", 400, "expected true or false"},
		{"DELETE", "/v1/shares/data?Force=true", "", 400, "expected force"},
		{"DELETE", "/v1/shares/data?force=true&force=false", "", 400, "2 times"},
		{"GET", "/v1/shares/data/events?since=-1", "", 400, "expected an event's id"},
		{"DELETE", "/v1/shares/data/grafts", "", 400, "?path="},
		{"DELETE", "/v1/shares/data/grafts?path=", "", 400, "path: it is empty"},
		{"DELETE", "/v1/shares/data/grafts?path=x", "", 400, "relative"},
		{"DELETE", "/v1/shares/data/grafts?path=/x/../y", "", 400, `expected "/y"`},
		{"DELETE", "/v1/shares/data/grafts?path=/x%00", "", 400, "NUL"},
		{"DELETE", "/v1/shares/data/grafts?path=/%ff", "", 400, "UTF-8"},
		{"DELETE", "/v1/shares/data/grafts?path=/" + strings.Repeat("x", 256), "", 400, "256 bytes"},
		{"POST", "/v1/shares", "", 400, "body is empty"},
		{"POST", "/v1/shares", "{", 400, "body ends"},
		{"POST", "/v1/shares", "{]", 400, "not JSON"},
		{"POST", "/v1/shares", "[]", 400, "expected an object"},
		{"POST", "/v1/shares", `{"tag":1}`, 400, `field "tag"`},
		{"POST", "/v1/shares", `{"tag":"x"}{}`, 400, "more behind"},
		{"POST", "/v1/shares", `{"tag":"x","colour":"red"}`, 400, `no field "colour"`},
		{"POST", "/v1/shares", `{"tag":"x","grafts":[{"path":"/","sauce":"/srv"}]}`, 400, `no field "sauce"`},
		{"POST", "/v1/shares", `{"tag":""}`, 400, "tag: it is empty"},
		{"POST", "/v1/shares", `{"tag":"` + strings.Repeat("x", 37) + `"}`, 400, "37 bytes"},
		{"POST", "/v1/shares", `{"tag":"x","grafts":[{"path":"y"}]}`, 400, "relative"},
		{"POST", "/v1/shares", strings.Repeat("[", 20000), 400, "body"},
		{"POST", "/v1/shares", strings.Repeat(" ", maxBody+1), 413, "at most 1048576"},
		{"GET", "/v1/info", strings.Repeat(" ", maxBody+1), 413, "at most 1048576"},
		{"PATCH", "/v1/shares/data/grafts?path=/", `{"source":"/etc"}`, 400, `no field "source"`},
		{"POST", "/v1/shares/data/grafts", `{"path":"/x/"}`, 400, `expected "/x"`},
	} {
		resp, text := do(t, r.client, tt.method, tt.path, tt.body)
		name := fmt.Sprintf("%s %.60s %.60s", tt.method, tt.path, tt.body)
		if resp.StatusCode != tt.status {
			t.Errorf("%s: %d %s, expected %d", name, resp.StatusCode, text, tt.status)
			continue
		}
		if (resp.Header.Get("Allow") != "") != (tt.status == 405) {
			t.Errorf("%s: Allow is %q", name, resp.Header.Get("Allow"))
		}
		if tt.method == "HEAD" {
			continue
		}
		var e api.Error
		if err := json.Unmarshal([]byte(text), &e); err != nil || e.Code == "" || !strings.Contains(e.Error(), tt.message) {
			t.Errorf("%s: %s (%v), expected it to say %q", name, text, err, tt.message)
		}
	}
	if calls := r.daemon.Calls(); len(calls) != before {
		t.Errorf("what was refused reached the daemon: %q", calls[before:])
	}
	if log := r.log.String(); strings.Contains(log, "level=ERROR") || strings.Contains(log, "level=WARN") {
		t.Errorf("mistakes of a client are logged: %s", log)
	}
}

func TestErrorsOfTheDaemon(t *testing.T) {
	r := newRig(t, nil)
	for _, tt := range []struct {
		err    error
		status int
		code   string
	}{
		{api.Errorf(api.CodeInvalid, "x"), 400, api.CodeInvalid},
		{api.Errorf(api.CodeForbidden, "x"), 403, api.CodeForbidden},
		{fmt.Errorf("around: %w", api.Errorf(api.CodeNotFound, "x")), 404, api.CodeNotFound},
		{api.Errorf(api.CodeExists, "x"), 409, api.CodeExists},
		{api.Errorf(api.CodeBusy, "x"), 409, api.CodeBusy},
		{api.Errorf(api.CodeUnsupported, "x"), 501, api.CodeUnsupported},
		{api.Errorf(api.CodeUnavailable, "x"), 503, api.CodeUnavailable},
		{errors.New("x"), 500, api.CodeInternal},
		{context.DeadlineExceeded, 503, api.CodeUnavailable},
		{context.Canceled, 503, api.CodeUnavailable},
	} {
		r.daemon.Fail("AddShare", tt.err)
		var e api.Error
		r.expect("POST", "/v1/shares", `{"tag":"x"}`, tt.status, &e)
		if e.Code != tt.code {
			t.Errorf("%v: code %q, expected %q", tt.err, e.Code, tt.code)
		}
	}
	if n := strings.Count(r.log.String(), "level=ERROR"); n != 1 {
		t.Errorf("%d errors are logged, expected the internal one", n)
	}
}

// panicky is a daemon with a bug.
type panicky struct{ Daemon }

func (panicky) Stats(context.Context) (api.Stats, error) { panic("as the test wants it") }
func (panicky) Info(context.Context) (api.Info, error)   { panic("as the test wants it") }

func (panicky) Events(_ context.Context, _ string, _ uint64, send func(api.Event) error) error {
	_ = send(api.Event{Kind: api.EventHello})
	panic("as the test wants it")
}

func TestPanicIsOneRequests(t *testing.T) {
	r := newRig(t, func(cfg *Config, _ *limits) { cfg.Daemon = panicky{cfg.Daemon} })
	for _, path := range []string{"/v1/stats", "/v1/info", "/metrics", "/api/v1/daemon"} {
		var e api.Error
		r.expect("GET", path, "", 500, &e)
		if e.Code != api.CodeInternal || strings.Contains(e.Message, "as the test") {
			t.Errorf("%s: %+v", path, e)
		}
	}
	r.expect("GET", "/healthz", "", 503, nil)
	r.expect("GET", "/v1/shares", "", 200, nil)
	if !strings.Contains(r.log.String(), "as the test wants it") {
		t.Errorf("the panic is not logged: %s", r.log.String())
	}

	// Half a stream must not end like a whole one.
	resp, err := r.client.Get("http://sluice/v1/shares/x/events")
	if err == nil {
		defer resp.Body.Close()
		buf := make([]byte, 1<<16)
		for err == nil {
			_, err = resp.Body.Read(buf)
		}
	}
	if err == nil || err.Error() == "EOF" {
		t.Errorf("a stream whose daemon panicked ends with %v", err)
	}
}

func TestTimeLimits(t *testing.T) {
	r := newRig(t, func(_ *Config, lim *limits) { lim.look, lim.change = 50*time.Millisecond, 50*time.Millisecond })
	for _, tt := range []struct{ daemon, method, path, body string }{
		{"Info", "GET", "/v1/info", ""},
		{"AddShare", "POST", "/v1/shares", `{"tag":"x"}`},
		{"Grafts", "GET", "/v1/shares/x/grafts", ""},
	} {
		release := r.daemon.Hang(tt.daemon)
		var e api.Error
		r.expect(tt.method, tt.path, tt.body, 503, &e)
		if e.Code != api.CodeUnavailable {
			t.Errorf("%s: %+v", tt.path, e)
		}
		release()
	}
}

// TestDaemonMayTakeLongerThanTheBody: the limit of reading a request is not that of the daemon's work on it.
func TestDaemonMayTakeLongerThanTheBody(t *testing.T) {
	r := newRig(t, func(_ *Config, lim *limits) { lim.read, lim.header = 100*time.Millisecond, 100*time.Millisecond })
	release := r.daemon.Hang("AddShare")
	time.AfterFunc(300*time.Millisecond, release)
	r.expect("POST", "/v1/shares", `{"tag":"x"}`, 201, nil)
}

// deaf is a daemon that does not heed contexts.
type deaf struct {
	Daemon
	asked, release chan struct{}
}

func (d deaf) Info(context.Context) (api.Info, error) {
	d.asked <- struct{}{}
	<-d.release
	return api.Info{}, nil
}

func TestHealth(t *testing.T) {
	r := newRig(t, nil)
	resp, text := do(t, r.client, "GET", "/healthz", "")
	if resp.StatusCode != 200 || text != "ok\n" {
		t.Errorf("%d %q", resp.StatusCode, text)
	}
	r.daemon.Fail("Info", errors.New("broken"))
	r.expect("GET", "/healthz", "", 503, nil)
	r.expect("GET", "/healthz", "", 200, nil)

	d := deaf{asked: make(chan struct{}, 10), release: make(chan struct{})}
	r = newRig(t, func(cfg *Config, lim *limits) {
		d.Daemon = cfg.Daemon
		cfg.Daemon = d
		lim.health = 50 * time.Millisecond
	})
	for range 3 {
		r.expect("GET", "/healthz", "", 503, nil)
	}
	if n := len(d.asked); n != 1 {
		t.Errorf("a daemon that is stuck was asked %d times at once", n)
	}
	close(d.release)
	for deadline := time.Now().Add(10 * time.Second); ; {
		if resp, _ := do(t, r.client, "GET", "/healthz", ""); resp.StatusCode == http.StatusOK {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a daemon that answers again is not well")
		}
	}
}

func TestHead(t *testing.T) {
	r := newRig(t, nil)
	resp, text := do(t, r.client, "HEAD", "/healthz", "")
	if resp.StatusCode != 200 || text != "" || resp.ContentLength != 3 {
		t.Errorf("%d %q of %d bytes", resp.StatusCode, text, resp.ContentLength)
	}
}

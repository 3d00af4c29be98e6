package control

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/controltest"
	"github.com/sluicefs/sluice/internal/ratelog"
)

// FuzzQuery: what comes out of a query is what the daemon may be called with.
func FuzzQuery(f *testing.F) {
	for _, q := range []string{
		"", "path=/x", "path=%2Fx%2fy", "path=/x&path=/y", "path=/x/../y", "path=//", "path=/%00", "path=/%ff", "path=x", "path=%zz",
		"force=true", "force=1", "since=1", "since=18446744073709551616", "since=-0", ";", "&&&", "=", "path", "path=/" + strings.Repeat("x", 300),
	} {
		f.Add(q)
	}
	f.Fuzz(func(t *testing.T, q string) {
		if p, err := parseGraftPath(q); err == nil && api.CheckPath(p) != nil {
			t.Errorf("%q gives the path %q", q, p)
		}
		if force, err := parseForce(q); err == nil && force && !strings.Contains(q, "=") {
			t.Errorf("%q is force", q)
		}
		if n, err := parseSince(q); err == nil && n != 0 && !strings.Contains(q, "=") {
			t.Errorf("%q is since %d", q, n)
		}
	})
}

// FuzzFind: a path has a route, or says which methods it has, or is none; and a tag comes out of the place it is in.
func FuzzFind(f *testing.F) {
	for _, r := range routes {
		f.Add(r.method, strings.ReplaceAll(r.pattern, "{tag}", "a%2Fb"))
	}
	for _, p := range []string{"", "/", "*", "//", "/v1/shares/", "/v1/shares/%zz/grafts", "/v1/shares//grafts", "/v1/shares/{tag}", "v1/info", "/v1/shares/%2e%2e"} {
		f.Add("GET", p)
	}
	f.Fuzz(func(t *testing.T, method, path string) {
		r, tag, allowed := find(method, path)
		switch {
		case r != nil && (len(allowed) != 0 || (tag != "") != strings.Contains(r.pattern, "{tag}")):
			t.Errorf("%q %q: %s with tag %q, allowed %q", method, path, r.operation, tag, allowed)
		case r == nil && slices.Contains(allowed, method):
			t.Errorf("%q %q: refused and allowed %q", method, path, allowed)
		case r != nil && strings.Count(path, "/") != strings.Count(r.pattern, "/"):
			t.Errorf("%q %q is %s", method, path, r.pattern)
		}
	})
}

// brief is a daemon whose streams end at once.
type brief struct{ *controltest.Daemon }

func (b brief) Events(ctx context.Context, tag string, _ uint64, send func(api.Event) error) error {
	if _, err := b.Grafts(ctx, tag); err != nil {
		return err
	}
	return send(api.Event{Kind: api.EventHello})
}

// deadlines is a ResponseRecorder that takes deadlines like a connection.
type deadlines struct{ *httptest.ResponseRecorder }

func (deadlines) SetWriteDeadline(time.Time) error { return nil }

// FuzzRequest has bytes as a request of an operator and of a guest. No answer is a panic's, errors are api.Errors, and what
// a guest sends never adds anything.
func FuzzRequest(f *testing.F) {
	for _, r := range routes {
		path := strings.ReplaceAll(r.pattern, "{tag}", "a")
		for _, query := range []string{"", "?path=/x", "?mountpoint=/x", "?force=true", "?since=1"} {
			for _, body := range []string{"", `{"path":"/z","source":"/srv"}`, `{"tag":"z"}`, `{"read_only":true}`, `{"fs_type":"passthrough_fs","source":"/srv"}`} {
				f.Add([]byte(r.method + " " + path + query + " HTTP/1.1\r\nHost: x\r\n\r\n" + body))
			}
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		header, body, _ := strings.Cut(string(raw), "\r\n\r\n")
		for _, allow := range []*Allow{nil, {Operations: allowable(), Shares: []string{"a"}}} {
			req, err := http.ReadRequest(bufio.NewReader(strings.NewReader(header + "\r\n\r\n")))
			if err != nil {
				return
			}
			req.Body = io.NopCloser(strings.NewReader(body))
			d := controltest.New()
			for _, tag := range []string{"a", "b"} {
				if _, err := d.AddShare(t.Context(), api.ShareSpec{Tag: tag, Grafts: []api.GraftSpec{{Path: "/x", Source: "/host"}}}); err != nil {
					t.Fatal(err)
				}
			}
			before := len(d.Calls())
			s := &Server{cfg: Config{Daemon: brief{d}}, limits: defaultLimits, own: newOwnMetrics(), ending: t.Context()}
			p := &peer{allow: allow, log: ratelog.New(nil, logEvery, logBurst)}
			w := deadlines{httptest.NewRecorder()}
			s.handle(w, req.WithContext(context.WithValue(t.Context(), peerKey{}, p)))

			answer := w.Body.String()
			if w.Code == http.StatusInternalServerError {
				t.Errorf("%q: %s", raw, answer)
			}
			var e api.Error
			if w.Code >= 400 && (json.Unmarshal([]byte(answer), &e) != nil || e.Code == "" || e.Message == "") {
				t.Errorf("%q: %d %s", raw, w.Code, answer)
			}
			if allow == nil {
				continue
			}
			if strings.Contains(answer, "/host") {
				t.Errorf("%q: a guest is told %s", raw, answer)
			}
			for _, call := range d.Calls()[before:] {
				if strings.HasPrefix(call, "Add") || strings.Contains(call, " b") {
					t.Errorf("%q: a guest has the daemon do %q", raw, call)
				}
			}
		}
	})
}

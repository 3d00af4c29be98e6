package main

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

func TestParseAddress(t *testing.T) {
	for _, text := range []string{"vsock:2:1024", "vsock:1:4294967295", "unix:/run/events", "stdin"} {
		if a, err := parseAddress(text); err != nil || a.String() != text {
			t.Errorf("%s is %v: %v", text, a, err)
		}
	}
	for _, text := range []string{"", "vsock", "vsock:2", "vsock:2:", "vsock::1", "vsock:2:x", "vsock:2:4294967296", "unix:", "tcp:1:2", "stdin:"} {
		if a, err := parseAddress(text); err == nil {
			t.Errorf("%q is %v", text, a)
		}
	}
}

func TestRequest(t *testing.T) {
	r, err := http.ReadRequest(newStream(strings.NewReader(request("a tag/#1", 7))).r)
	if err != nil {
		t.Fatal(err)
	}
	if r.URL.Path != "/v1/shares/a tag/#1/events" || r.URL.Query().Get("since") != "7" || r.ProtoMajor != 1 || r.ProtoMinor != 0 {
		t.Errorf("asks for %v by %s", r.URL, r.Proto)
	}
}

// TestHead reads answers' heads.
func TestHead(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"HTTP/1.0 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n", ""},
		{"HTTP/1.1 200\n\n", ""},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "chunked"},
		{"SSH-2.0-x\r\n", "is this the control API?"},
		{"HTTP/1.0 abc\r\n\r\n", "expected HTTP/1.x and a status"},
		{"HTTP/1.0 200 OK\r\n", "EOF"},
		{"", "EOF"},
		{"HTTP/1.0 404 Not Found\r\n\r\n" + `{"code":"not_found","message":"no share \"x\"","hint":"see sluicectl share ls"}`, `no share "x": see sluicectl share ls (not_found)`},
		{"HTTP/1.0 502 Bad\r\n\r\n<html>", `status 502: "<html>"`},
		{"HTTP/1.0 200 OK\r\n" + strings.Repeat("A: b\r\n", maxHead+1), "does not end"},
		{"HTTP/1.0 200 OK\r\nA: " + strings.Repeat("x", maxLine), "more than"},
	} {
		err := newStream(strings.NewReader(tt.text)).head()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%.60q: %v, want %q", tt.text, err, tt.want)
		}
	}
}

func TestNext(t *testing.T) {
	s := newStream(strings.NewReader("\n" + `{"kind":"hello"}` + "\r\n\n" + `{"id":3,"kind":"rename","path":"/a","to":"/b"}` + "\n" + `{"id":4,"ki`))
	for _, want := range []api.Event{{Kind: "hello"}, {ID: 3, Kind: "rename", Path: "/a", To: "/b"}} {
		if e, err := s.next(); err != nil || e != want {
			t.Errorf("reads %+v: %v, want %+v", e, err, want)
		}
	}
	if e, err := s.next(); err != io.EOF {
		t.Errorf("reads %+v of half a line: %v", e, err)
	}
	for _, text := range []string{"x\n", "[1]\n", `{"id":-1}` + "\n", `{"id":"1"}` + "\n", strings.Repeat(" ", maxLine) + "\n"} {
		if e, err := newStream(strings.NewReader(text)).next(); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%.20q is %+v: %v", text, e, err)
		}
	}
}

// TestFollow has a server of events, which a second time is asked for what comes after the last.
func TestFollow(t *testing.T) {
	dir, err := os.MkdirTemp("", "sluice-agent-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var asked []string
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.String())
		if len(asked) > 2 {
			w.WriteHeader(http.StatusNotFound)
			_ = json.NewEncoder(w).Encode(&api.Error{Code: api.CodeNotFound, Message: "gone"})
			return
		}
		e := json.NewEncoder(w)
		_ = e.Encode(&api.Event{Kind: api.EventHello, Token: strings.Repeat("0a", 16), Time: time.Unix(5, 0)})
		w.(http.Flusher).Flush()
		_ = e.Encode(&api.Event{ID: uint64(len(asked)), Kind: "of a later version", Path: "/x"})
		_ = e.Encode(&api.Event{Kind: api.EventLimit, Path: "/x"})
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()

	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var log strings.Builder
	a := &agent{options: options{tag: "t"}, log: &limited{to: &log, now: time.Now}, r: &replayer{root: int(root.Fd())}}
	address, err := parseAddress("unix:" + socket)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := a.follow(address); err != nil {
			t.Fatal(err)
		}
	}
	if want := "/v1/shares/t/events?since=0 /v1/shares/t/events?since=1"; strings.Join(asked, " ") != want {
		t.Errorf("asks for %q, want %q", asked, want)
	}
	if a.counts.skipped != 2 || a.last != 2 {
		t.Errorf("%+v, the last is %d", a.counts, a.last)
	}
	if !strings.Contains(log.String(), "/x is beyond a limit") {
		t.Errorf("says %q", &log)
	}
	if err := a.follow(address); err == nil || !strings.Contains(err.Error(), "gone (not_found)") {
		t.Errorf("of an error of the API: %v", err)
	}
	server.Close()
	if err := a.follow(address); err == nil || !strings.Contains(err.Error(), "connect to unix:") {
		t.Errorf("without a server: %v", err)
	}
}

// TestEventsOfNoUse has streams that cannot be followed.
func TestEventsOfNoUse(t *testing.T) {
	for _, e := range []api.Event{
		{Kind: api.EventHello, Token: "x"},
		{Kind: api.EventHello, Token: strings.Repeat("0", 31) + "/"},
		{Kind: api.EventModify, ID: 1, Path: "/x"},
	} {
		a := &agent{r: &replayer{root: -1}, log: &limited{to: io.Discard, now: time.Now}}
		if err := a.event(&e); err == nil {
			t.Errorf("%+v is taken", e)
		}
	}
	a := &agent{r: &replayer{root: -1}, log: &limited{to: io.Discard, now: time.Now}}
	if err := a.event(&api.Event{Kind: api.EventHello, ID: 7}); err != nil || a.last != 7 {
		t.Errorf("hello of a share where nothing is watched: %v, the last event is %d", err, a.last)
	}
	// What is wrong with one event is no reason to give up the others.
	r := &replayer{root: -1, token: strings.Repeat("0", 32)}
	for _, p := range []string{"", "x", "/a/../b", "/a//b", "/a/", "/a\x00b", "/" + strings.Repeat("a", 1<<17)} {
		if err := r.replay(&api.Event{ID: 1, Kind: api.EventDelete, Path: p}); err == nil || !strings.Contains(err.Error(), "clean") {
			t.Errorf("path %.20q: %v", p, err)
		}
		if err := r.replay(&api.Event{ID: 1, Kind: api.EventRename, Path: "/a", To: p}); err == nil || !strings.Contains(err.Error(), "clean") {
			t.Errorf("to %.20q: %v", p, err)
		}
	}
}

func TestLimitedLog(t *testing.T) {
	var out strings.Builder
	now := time.Unix(1000, 0)
	l := &limited{to: &out, now: func() time.Time { return now }}
	for range 1000 {
		l.printf("line")
	}
	if n := strings.Count(out.String(), "\n"); n != linesPerSpell {
		t.Errorf("%d lines, want %d", n, linesPerSpell)
	}
	now = now.Add(spell)
	l.printf("last")
	if want := "sluice-agent: 980 lines left out\nsluice-agent: last\n"; !strings.HasSuffix(out.String(), want) {
		t.Errorf("ends with %q, want %q", out.String()[out.Len()-len(want):], want)
	}
}

// FuzzStream reads anything: it ends, within bounds, without a panic.
func FuzzStream(f *testing.F) {
	f.Add([]byte("HTTP/1.0 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n{\"kind\":\"hello\",\"token\":\"00\"}\n\n{\"id\":1,\"kind\":\"rescan\",\"path\":\"/\"}\n"))
	f.Add([]byte("HTTP/1.1 404 Not Found\n\n{\"code\":\"not_found\",\"message\":\"m\",\"hint\":\"h\"}"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n"))
	f.Add([]byte("HTTP/1.0 -1\n\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		a := &agent{r: &replayer{root: -1}, log: &limited{to: io.Discard, now: time.Now}}
		s := newStream(strings.NewReader(string(data)))
		if s.head() != nil {
			return
		}
		for range len(data) + 1 {
			e, err := s.next()
			if err != nil {
				return
			}
			_ = a.event(&e)
		}
		t.Error("there are more events than bytes")
	})
}

// TestState is of agents that come after each other.
func TestState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	for _, content := range []string{"", "x", strings.Repeat("x", 42), "1 2\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			s, err := openState(path)
			if err != nil {
				t.Fatal(err)
			}
			last, at := s.load()
			if last != 0 || !at.IsZero() {
				t.Errorf("%q is %d at %v", content, last, at)
			}
			s.close()
		}
		s, err := openState(path)
		if err != nil {
			t.Fatal(err)
		}
		want := time.Unix(1, 2)
		if err := s.store(1<<64-1, want); err != nil {
			t.Fatal(err)
		}
		a := &agent{saved: s, log: &limited{to: io.Discard, now: time.Now}, behind: true}
		a.reached(&api.Event{ID: 5}) // this one is not to be relied on
		s.close()
		if s, err = openState(path); err != nil {
			t.Fatal(err)
		}
		if last, at := s.load(); last != 1<<64-1 || !at.Equal(want) {
			t.Errorf("what was stored is %d at %v", last, at)
		}
		s.close()
	}
	if _, err := openState(filepath.Join(path, "below")); err == nil {
		t.Error("a file in a file is opened")
	}
}

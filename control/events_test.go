package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

// events opens a stream and returns a function that reads the next event.
func events(t *testing.T, client *http.Client, path string) (next func() api.Event, resp *http.Response) {
	t.Helper()
	resp, err := client.Get("http://sluice" + path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/x-ndjson" {
		t.Fatalf("%s: %d %s", path, resp.StatusCode, resp.Header.Get("Content-Type"))
	}
	lines := bufio.NewScanner(resp.Body)
	return func() (e api.Event) {
		t.Helper()
		if !lines.Scan() {
			t.Fatalf("%s: the stream ends: %v", path, lines.Err())
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		return e
	}, resp
}

func TestEventsStream(t *testing.T) {
	// A stream outlives every limit that a request has.
	r := newRig(t, func(_ *Config, lim *limits) {
		lim.read, lim.header, lim.write, lim.event = 50*time.Millisecond, 50*time.Millisecond, 50*time.Millisecond, 5*time.Second
	})
	r.addShare("data")
	next, _ := events(t, r.client, "/v1/shares/data/events")
	if e := next(); e.Kind != api.EventHello || e.Token == "" {
		t.Errorf("the first event is %+v", e)
	}
	// Each is flushed: the next is not emitted until it has been read.
	for i := range 3 {
		r.daemon.Emit("data", api.Event{Kind: api.EventModify, Path: "/f"})
		if e := next(); e.ID != uint64(i+1) || e.Kind != api.EventModify {
			t.Errorf("event %d is %+v", i+1, e)
		}
	}
	time.Sleep(100 * time.Millisecond) // past the limits of other requests
	r.daemon.Emit("data", api.Event{Kind: api.EventDelete, Path: "/f"})
	if e := next(); e.ID != 4 {
		t.Errorf("after a while there is %+v", e)
	}

	again, _ := events(t, r.client, "/v1/shares/data/events?since=2")
	if e := again(); e.Kind != api.EventHello {
		t.Errorf("the first event is %+v", e)
	}
	for id := uint64(3); id <= 4; id++ {
		if e := again(); e.ID != id {
			t.Errorf("event %d is %+v", id, e)
		}
	}
}

func TestEventsEndWithTheShare(t *testing.T) {
	r := newRig(t, func(_ *Config, lim *limits) { lim.event = 100 * time.Millisecond })
	r.addShare("data")
	next, resp := events(t, r.client, "/v1/shares/data/events")
	next()
	time.Sleep(150 * time.Millisecond) // the time for hello is over, and must not be that of the end
	r.expect("DELETE", "/v1/shares/data", "", 204, nil)
	if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) != 0 {
		t.Errorf("the stream ends with %q, %v", rest, err)
	}
	r.expect("GET", "/v1/shares/data/events", "", 404, nil)
}

// breaking is a daemon whose streams break off.
type breaking struct{ Daemon }

func (breaking) Events(_ context.Context, _ string, _ uint64, send func(api.Event) error) error {
	if err := send(api.Event{Kind: api.EventHello}); err != nil {
		return err
	}
	return errors.New("the server is gone")
}

// TestEventsThatBreakOff: what is not the end does not look like it.
func TestEventsThatBreakOff(t *testing.T) {
	r := newRig(t, func(cfg *Config, _ *limits) { cfg.Daemon = breaking{cfg.Daemon} })
	resp, err := r.client.Get("http://sluice/v1/shares/data/events")
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		_ = resp.Body.Close()
	}
	if err == nil {
		t.Error("a stream that broke off ends as if it were whole")
	}
	if !strings.Contains(r.log.String(), "the server is gone") {
		t.Error("why is not in the log")
	}
}

func TestEventsEndWithTheServer(t *testing.T) {
	r := newRig(t, nil)
	r.addShare("data")
	next, resp := events(t, r.client, "/v1/shares/data/events")
	next()
	begun := time.Now()
	if err := r.stop(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := io.ReadAll(resp.Body); err != nil {
		t.Errorf("the stream is cut: %v", err)
	}
	if d := time.Since(begun); d > defaultLimits.end/2 {
		t.Errorf("ending with a stream took %v", d)
	}
}

// watched is a daemon that says when a stream has ended, and with what.
type watched struct {
	Daemon
	ended chan error
}

func (w watched) Events(ctx context.Context, tag string, since uint64, send func(api.Event) error) error {
	err := w.Daemon.Events(ctx, tag, since, send)
	w.ended <- err
	return err
}

func TestEventsEndWithTheClient(t *testing.T) {
	ended := make(chan error, 1)
	r := newRig(t, func(cfg *Config, _ *limits) { cfg.Daemon = watched{cfg.Daemon, ended} })
	r.addShare("data")
	next, resp := events(t, r.client, "/v1/shares/data/events")
	next()
	_ = resp.Body.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the daemon's stream ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the daemon still streams to a client that is gone")
	}
}

func TestEventsOfHTTP10(t *testing.T) {
	r := newRig(t, nil)
	r.addShare("data")
	c, err := net.Dial("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET /v1/shares/data/events HTTP/1.0\r\n\r\n")
	in := bufio.NewReader(c)
	header := ""
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if line == "\r\n" {
			break
		}
		header += line
	}
	if !strings.HasPrefix(header, "HTTP/1.0 200") || strings.Contains(header, "chunked") {
		t.Errorf("the header is %q", header)
	}
	for _, kind := range []string{api.EventHello, api.EventModify} {
		var e api.Event
		line, err := in.ReadBytes('\n')
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(line, &e); err != nil || e.Kind != kind {
			t.Errorf("%q is no %s: %v", line, kind, err)
		}
		r.daemon.Emit("data", api.Event{Kind: api.EventModify, Path: "/f"})
	}
}

// TestSlowReaderOfEvents: a client that does not read is cut off, and the daemon and other clients go on meanwhile.
func TestSlowReaderOfEvents(t *testing.T) {
	ended := make(chan error, 2)
	r := newRig(t, func(cfg *Config, lim *limits) {
		cfg.Daemon = watched{cfg.Daemon, ended}
		lim.event = 500 * time.Millisecond
	})
	r.addShare("data")
	slow, err := net.Dial("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	fmt.Fprint(slow, "GET /v1/shares/data/events HTTP/1.1\r\nHost: x\r\n\r\n")
	// It has begun when something can be read; nothing is.
	if _, err := io.ReadFull(slow, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	next, _ := events(t, r.client, "/v1/shares/data/events")
	next()
	name := "/" + strings.Repeat("x", 200)
	deadline := time.Now().Add(20 * time.Second)
	for {
		id := r.daemon.Emit("data", api.Event{Kind: api.EventModify, Path: strings.Repeat(name, 20)})
		if e := next(); e.ID != id {
			t.Fatalf("event %d is %+v", id, e)
		}
		select {
		case err := <-ended:
			if !errors.Is(err, errClient) && !errors.Is(err, context.Canceled) {
				t.Errorf("the stream ended with %v", err)
			}
			return
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %d events the client that does not read is still there", id)
		}
	}
}

// TestEventsAreBatched: what is there together goes out with few writes.
func TestEventsAreBatched(t *testing.T) {
	r := newRig(t, nil)
	r.addShare("data")
	w := &countingWriter{header: make(http.Header), first: make(chan struct{}), gate: make(chan struct{})}
	s := newEventStream(w, time.Second, func() {})
	if err := s.send(api.Event{Kind: api.EventHello}); err != nil {
		t.Fatal(err)
	}
	within(t, "the first write", w.first)
	for i := range 100 {
		if err := s.send(api.Event{ID: uint64(i + 1), Kind: api.EventModify}); err != nil {
			t.Fatal(err)
		}
	}
	close(w.gate)
	if !s.end() {
		t.Error("the stream has not begun")
	}
	if w.writes != 2 || w.lines != 101 {
		t.Errorf("%d lines in %d writes, expected 101 in 2", w.lines, w.writes)
	}
}

type countingWriter struct {
	header        http.Header
	writes, lines int
	first, gate   chan struct{}
}

func (w *countingWriter) Header() http.Header              { return w.header }
func (w *countingWriter) WriteHeader(int)                  {}
func (w *countingWriter) SetWriteDeadline(time.Time) error { return nil }
func (w *countingWriter) Flush()                           {}

func (w *countingWriter) Write(p []byte) (int, error) {
	w.writes++
	w.lines += strings.Count(string(p), "\n")
	if w.writes == 1 {
		close(w.first)
		<-w.gate
	}
	return len(p), nil
}

package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/control/controltest"
)

// buffer is a bytes.Buffer that is written and read at once.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// clock is time that passes when a test says so.
type clock struct {
	mu    sync.Mutex
	time  time.Time
	asked chan chan time.Time
}

func newClock() *clock {
	return &clock{time: time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local), asked: make(chan chan time.Time)}
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.time
}

func (c *clock) after(time.Duration) <-chan time.Time {
	ch := make(chan time.Time, 1)
	c.asked <- ch
	return ch
}

// waits returns when somebody waits for time to pass, and what they wait for.
func (c *clock) waits(t *testing.T) chan<- time.Time {
	t.Helper()
	select {
	case ch := <-c.asked:
		return ch
	case <-time.After(forever):
		t.Fatal("nobody waits")
		return nil
	}
}

// pass has them see d pass.
func (c *clock) pass(ch chan<- time.Time, d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.time = c.time.Add(d)
	ch <- c.time
}

// live is a sluicectl in this process.
type live struct {
	*controltest.Daemon
	out, err *buffer
	clock    *clock
	program  program
	cancel   context.CancelFunc
	status   chan int
}

// newLive returns one with a daemon to ask.
func newLive(t *testing.T) *live {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "c.sock")
	d, stop, err := serve(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	l := &live{Daemon: d, out: new(buffer), err: new(buffer), clock: newClock(), status: make(chan int, 1)}
	l.program = program{
		out: l.out, err: l.err, now: l.clock.now, after: l.clock.after,
		getenv: func(name string) string { return map[string]string{"SLUICE_SOCKET": socket}[name] },
	}
	return l
}

// start runs args until end.
func (l *live) start(t *testing.T, args ...string) {
	ctx, cancel := context.WithCancel(t.Context())
	l.cancel = cancel
	go func() { l.status <- l.program.run(ctx, args) }()
}

// end waits for the end with this status.
func (l *live) end(t *testing.T, want int) {
	t.Helper()
	select {
	case got := <-l.status:
		if got != want {
			t.Errorf("exit status %d, want %d: %s", got, want, l.err)
		}
	case <-time.After(forever):
		t.Fatal("it does not end")
	}
	l.cancel()
}

func (l *live) set(shares ...api.ShareStats) { l.SetStats(api.Stats{Shares: shares}) }

// TestStatScreen is stat on a terminal: one table over the other, as wide and high as there is room.
func TestStatScreen(t *testing.T) {
	l := newLive(t)
	l.program.screen = func() extent { return extent{72, 5} }
	tag := strings.Repeat("long", 9)
	l.set(shareStats("data", 100, 10, 50), shareStats(tag, 0, 0, 0))
	l.start(t, "stat")
	tick := l.clock.waits(t)
	l.set(shareStats("data", 300, 14, 150), shareStats(tag, 0, 0, 2000))
	l.clock.pass(tick, 2*time.Second)
	tick = l.clock.waits(t)
	l.set(shareStats("data", 300, 14, 150), shareStats(tag, 0, 0, 2000), shareStats("more", 0, 0, 0), shareStats("most", 0, 0, 0))
	l.clock.pass(tick, time.Second)
	l.clock.waits(t)
	l.cancel()
	l.end(t, exitOK)
	want := "\r\x1b[J" +
		"SHARE     OPS/S    P50    P99  READ/S  WRITE/S  ERR/S  DEPTH  INODES  F…\n" +
		"data          0      -      -       0        0      0      3    1.5k   …\n" +
		"longlon…      0      -      -       0        0      0      3    1.5k   …\n" +
		"\x1b[3A\r\x1b[J" +
		"SHARE     OPS/S    P50    P99  READ/S  WRITE/S  ERR/S  DEPTH  INODES  F…\n" +
		"data        150  1.8µs  7.9µs    200K        0      2      3    1.5k   …\n" +
		"longlon…     1k    6µs  8.0µs    3.9M        0      0      3    1.5k   …\n" +
		"\x1b[3A\r\x1b[J" +
		"SHARE     OPS/S    P50    P99  READ/S  WRITE/S  ERR/S  DEPTH  INODES  F…\n" +
		"data          0      -      -       0        0      0      3    1.5k   …\n" +
		"longlon…      0      -      -       0        0      0      3    1.5k   …\n" +
		"… 2 more\n"
	if got := l.out.String(); got != want {
		t.Errorf("the terminal gets\n%q\nwant\n%q", got, want)
	}
	if l.err.String() != "" {
		t.Errorf("standard error: %s", l.err)
	}
}

// TestStatPlain is stat where there is no terminal: lines that can be kept, and lines of JSON.
func TestStatPlain(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"stat"}, `TIME      SHARE     OPS/S       P50       P99    READ/S   WRITE/S     ERR/S     DEPTH    INODES    FAULTS
03:04:07  data        150     1.8µs     7.9µs      200K         0         2         3      1.5k         2
03:04:08  data          0         -         -         0         0         0         3      1.5k         2
`},
		{[]string{"stat", "data", "--ops"}, `TIME      SHARE  OP         OPS/S       P50       P99    READ/S   WRITE/S     ERR/S  ERRORS
03:04:07  data   LOOKUP       100     1.5µs     2.0µs         0         0         2  ENOENT 4
03:04:07  data   READ          50       6µs     8.0µs      200K         0         0  -
`},
	} {
		l := newLive(t)
		l.set(shareStats("data", 100, 10, 50))
		l.start(t, tt.args...)
		tick := l.clock.waits(t)
		l.set(shareStats("data", 300, 14, 150))
		l.clock.pass(tick, 2*time.Second)
		l.clock.pass(l.clock.waits(t), time.Second)
		l.clock.waits(t)
		l.cancel()
		l.end(t, exitOK)
		if got := l.out.String(); got != tt.want {
			t.Errorf("%q:\n%s\nwant\n%s", tt.args, got, tt.want)
		}
	}

	l := newLive(t)
	l.set(shareStats("data", 100, 10, 50))
	l.start(t, "stat", "--json")
	tick := l.clock.waits(t)
	l.set(shareStats("data", 300, 14, 150))
	l.clock.pass(tick, 2*time.Second)
	l.clock.waits(t)
	l.cancel()
	l.end(t, exitOK)
	const rates = `,"interval":2,"rates":[{"tag":"data","ops_per_second":150,"errors_per_second":2,"p50_ns":1750,"p99_ns":7880,"bytes_read_per_second":204800,"bytes_written_per_second":0}],"stats":{"shares":[{"tag":"data",`
	if got := l.out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, rates) {
		t.Errorf("%s\nwant one line with\n%s", got, rates)
	}
}

// TestStatEnds has the daemon go, and the share.
func TestStatEnds(t *testing.T) {
	l := newLive(t)
	l.set(shareStats("data", 100, 10, 50))
	l.start(t, "stat", "data")
	tick := l.clock.waits(t)
	l.set()
	l.clock.pass(tick, time.Second)
	l.end(t, exitFailed)
	if got, want := l.err.String(), "sluicectl: no share \"data\": sluicectl share ls lists those there are\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestWaiting has a terminal told of a call that takes long, and Ctrl-C end it.
func TestWaiting(t *testing.T) {
	l := newLive(t)
	l.program.patient = true
	release := l.Hang("AddShare")
	l.start(t, "share", "add", "data")
	l.clock.pass(l.clock.waits(t), time.Second)
	l.clock.pass(l.clock.waits(t), time.Second)
	l.clock.waits(t)
	release()
	l.end(t, exitOK)
	const line = "\r\x1b[Kwaiting for the daemon to add the share data … "
	if got, want := l.err.String(), line+"1s"+line+"2s\r\x1b[K"; got != want {
		t.Errorf("%q, want %q", got, want)
	}

	l = newLive(t)
	l.program.patient = true
	defer l.Hang("RemoveShare")()
	l.start(t, "share", "rm", "data")
	l.clock.waits(t)
	l.cancel()
	l.end(t, exitInterrupted)
	if got, want := l.err.String(), "sluicectl: interrupted: what was asked for may have been done or not; sluicectl status shows what is there\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestEventsInterrupted has Ctrl-C end events in good order.
func TestEventsInterrupted(t *testing.T) {
	l := newLive(t)
	if _, err := l.AddShare(t.Context(), api.ShareSpec{Tag: "data"}); err != nil {
		t.Fatal(err)
	}
	read, write := io.Pipe()
	l.program.out = write
	l.start(t, "events", "data", "--json")
	if _, err := read.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, read) }()
	l.cancel()
	l.end(t, exitOK)
	_ = write.Close()
	if l.err.String() != "" {
		t.Errorf("standard error: %s", l.err)
	}
}

func TestSockets(t *testing.T) {
	for _, tt := range []struct {
		uid                  int
		env, runtime, expect string
	}{
		{0, "", "/run/user/0", systemSocket},
		{1000, "", "", systemSocket},
		{1000, "", "/run/user/1000", systemSocket + " /run/user/1000/sluice/control.sock"},
		{1000, "/x", "/run/user/1000", "/x"},
	} {
		p := program{uid: tt.uid, getenv: func(name string) string {
			return map[string]string{"SLUICE_SOCKET": tt.env, "XDG_RUNTIME_DIR": tt.runtime}[name]
		}}
		if got := strings.Join(p.sockets(), " "); got != tt.expect {
			t.Errorf("%+v: %q", tt, got)
		}
	}
	p := program{uid: 1000, getenv: func(name string) string { return map[string]string{"XDG_RUNTIME_DIR": "/run/user/1000"}[name] }}
	const want = "sluiced is not running at /run/sluice/control.sock or /run/user/1000/sluice/control.sock: start it with --control-socket, or give --socket"
	if got := p.explain(&client.UnreachableError{Socket: systemSocket, Err: os.ErrNotExist}); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestTexts(t *testing.T) {
	for got, want := range map[string]string{
		name("/a/b"): "/a/b", name(""): "-", name("a b"): `"a b"`, name("a\x1b[2J"): `"a\x1b[2J"`, name("\xff"): `"\xff"`, name("\u202egpj.exe"): `"\u202egpj.exe"`, name("größe"): "größe",
		oneLine("a\nb\x1b[0m"): "a b\ufffd[0m",
		bytesText(0):           "0", bytesText(999): "999", bytesText(1023): "1.0K", bytesText(1024): "1K", bytesText(10 << 30): "10G", bytesText(1.5 * (1 << 20)): "1.5M",
		countText(0.25): "0.2", countText(999): "999", countText(1000): "1k", countText(999.6): "1.0k", countText(12345678): "12M",
		latencyText(0): "-", latencyText(500): "0.5µs", latencyText(999 * time.Microsecond): "999µs", latencyText(999600): "1.0ms", latencyText(2500 * time.Millisecond): "2.5s",
		agoText(59 * time.Second): "59s", agoText(61 * time.Second): "1m1s", agoText(25*time.Hour + time.Minute): "1d1h", agoText(-time.Second): "0s",
		fit("abcdef", 4): "abc…", fit("abcd", 4): "abcd", fit("日本語", 4): "日…", fit("e\u0301e\u0301", 2): "e\u0301e\u0301", fit("anything", 0): "anything",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestWrites has every table fit the terminal.
func TestWrites(t *testing.T) {
	var out bytes.Buffer
	p := program{out: &out, now: time.Now, screen: func() extent { return extent{40, 24} }}
	long := strings.Repeat("/long", 30)
	g := api.Graft{GraftSpec: api.GraftSpec{Path: long, Source: long, MaxBytes: 1 << 30}, UsedBytes: 5 << 20, Panics: 1, Refused: 2}
	s := api.Share{ShareSpec: api.ShareSpec{Tag: "data", Socket: long}}
	if err := p.writeGrafts([]api.Graft{g}); err != nil {
		t.Fatal(err)
	}
	if err := p.writeShares([]api.Share{s}); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out.String()) {
		if n := cells(strings.TrimSuffix(line, "\n")); n > 40 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	out.Reset()
	p.screen = nil
	g.Path, g.Source = "/x", "/s"
	if err := p.writeGrafts([]api.Graft{g}); err != nil {
		t.Fatal(err)
	}
	const want = "PATH  STATE    OPEN  USED  TROUBLE              SOURCE  OPTIONS\n/x    grafted     0    5M  1 panics, 2 refused  /s      max-bytes=1G\n"
	if out.String() != want {
		t.Errorf("%s, want %s", out.String(), want)
	}
}

// TestGenerated compares what go generate makes with what is checked in.
func TestGenerated(t *testing.T) {
	for _, tt := range []struct {
		path string
		args []string
	}{
		{"../../docs/man/sluicectl.1", []string{"man"}},
		{"../../contrib/completions/sluicectl.bash", []string{"completion", "bash"}},
		{"../../contrib/completions/_sluicectl", []string{"completion", "zsh"}},
		{"../../contrib/completions/sluicectl.fish", []string{"completion", "fish"}},
	} {
		want, err := os.ReadFile(tt.path)
		if err != nil {
			t.Error(err)
			continue
		}
		var out, errOut bytes.Buffer
		p := program{out: &out, err: &errOut}
		if status := p.run(t.Context(), tt.args); status != exitOK {
			t.Errorf("%q: exit status %d: %s", tt.args, status, errOut.String())
		}
		if !bytes.Equal(out.Bytes(), want) {
			t.Errorf("%s is not what the commands say: run go generate ./cmd/sluicectl", tt.path)
		}
	}
}

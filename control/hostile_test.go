package control

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

// shortLimits are for guests that try the server's patience.
func shortLimits(_ *Config, lim *limits) {
	lim.header, lim.read, lim.write, lim.idle = 500*time.Millisecond, 500*time.Millisecond, time.Second, 500*time.Millisecond
	lim.guests, lim.eachGuest = 64, 64 // tests that wait for these times do so at once
}

// hostileRig is a rig with short limits and a listener in memory that guests 3 and 4 may ask for health and events.
func hostileRig(t *testing.T) (*rig, *memListener) {
	t.Helper()
	l := newMemListener()
	r := newRig(t, func(cfg *Config, lim *limits) {
		shortLimits(cfg, lim)
		cfg.Listeners = []Listener{{l, []Allow{{Operations: []string{"getHealth", "getEvents"}, Shares: []string{"a"}, CIDs: []uint32{3, 4}}}}}
	})
	r.addShare("a")
	return r, l
}

// guestConn connects; what it does not do in time fails the test.
func guestConn(t *testing.T, l *memListener, cid uint32) net.Conn {
	t.Helper()
	c, err := l.dial(cid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	return c
}

// closed waits for the server to close c, whatever it says before.
func closed(t *testing.T, what string, c net.Conn) (said string) {
	t.Helper()
	text, err := io.ReadAll(c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: the connection is still open", what)
	}
	return string(text)
}

func TestSlowGuests(t *testing.T) {
	_, l := hostileRig(t)
	for name, begin := range map[string]string{
		"nothing":           "",
		"half a line":       "GET /hea",
		"half a header":     "GET /healthz HTTP/1.1\r\nHost: x\r\n",
		"half a body":       "GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345",
		"half a chunk":      "GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n12345",
		"expects a body":    "GET /healthz HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n",
		"idles":             "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
		"half a second one": "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /hea",
		"events and a body": "GET /v1/shares/a/events HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := guestConn(t, l, 3)
			if _, err := io.WriteString(c, begin); err != nil {
				t.Fatal(err)
			}
			closed(t, name, c)
		})
	}
	t.Run("does not read", func(t *testing.T) {
		t.Parallel()
		c := guestConn(t, l, 3)
		// A pipe has no buffer: the answer waits for the reader.
		if _, err := io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Time{})
		deadline := time.Now().Add(30 * time.Second)
		for {
			// The server has given up when it takes nothing any more.
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			if _, err := c.Write([]byte("x")); errors.Is(err, io.ErrClosedPipe) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("a guest that does not read still has its connection")
			}
		}
	})
	// Bytes that drop in one by one do not make the time longer.
	t.Run("drop by drop", func(t *testing.T) {
		t.Parallel()
		c := guestConn(t, l, 3)
		for _, b := range []byte("GET /healthz HTTP/1.1\r\nX: " + strings.Repeat("x", 1000)) {
			if _, err := c.Write([]byte{b}); err != nil {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Error("the connection was open for ten times as long as a header may take")
	})
}

func TestGarbageFromGuests(t *testing.T) {
	r, l := hostileRig(t)
	t.Run("guests", func(t *testing.T) { sendGarbage(t, l) })
	if strings.Contains(r.log.String(), "panic") {
		t.Errorf("there was a panic: %s", r.log.String())
	}
	expect(t, r.client, "GET", "/healthz", "", 200, nil)
}

func sendGarbage(t *testing.T, l *memListener) {
	for name, text := range map[string]string{
		"garbage":             "\x00\xff\x16\x03\x01\r\n\r\n",
		"TLS":                 "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"HTTP/2":              "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"huge line":           "GET /" + strings.Repeat("x", 64<<10) + " HTTP/1.1\r\n\r\n",
		"huge header":         "GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n",
		"many headers":        "GET /healthz HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: y\r\n", 10000) + "\r\n",
		"two lengths":         "GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
		"huge length":         "GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
		"negative length":     "GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
		"bad chunk":           "GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
		"huge chunk":          "GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
		"no host":             "GET /healthz HTTP/1.1\r\n\r\n",
		"no path":             "GET  HTTP/1.1\r\nHost: x\r\n\r\n",
		"asterisk":            "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
		"connect":             "CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
		"odd method":          "\x7fGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
		"bad escape":          "GET /v1/shares/%zz HTTP/1.1\r\nHost: x\r\n\r\n",
		"upgrade":             "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"path of a host file": "GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := guestConn(t, l, 3)
			go func() { _, _ = io.WriteString(c, text) }()
			said := closed(t, name, c)
			if name == "upgrade" {
				if !strings.HasPrefix(said, "HTTP/1.1 200") {
					t.Errorf("the server says %.100q", said)
				}
			} else if said != "" && !strings.HasPrefix(said, "HTTP/1.1 4") && !strings.HasPrefix(said, "HTTP/1.1 5") {
				t.Errorf("the server says %.100q", said)
			}
		})
	}
}

// TestHalfClosed: who has sent a request and says that nothing more will come is answered or dropped, and does not stay.
func TestHalfClosed(t *testing.T) {
	r := newRig(t, shortLimits)
	r.addShare("a")
	for _, path := range []string{"/healthz", "/v1/shares/a/events", "/v1/shares"} {
		c, err := net.Dial("unix", r.socket)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
		if err := c.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		closed(t, path, c)
		_ = c.Close()
	}
}

// TestFloodOfConnections: a guest gets as many as it may have; another guest and the operator do not notice.
func TestFloodOfConnections(t *testing.T) {
	l := newMemListener()
	r := newRig(t, func(cfg *Config, lim *limits) {
		cfg.Listeners = []Listener{{l, []Allow{{Operations: []string{"getHealth"}, CIDs: []uint32{AnyCID}}}}}
		lim.guests, lim.eachGuest = 10, 4
	})
	before := runtime.NumGoroutine()
	var held []net.Conn
	for i := range 500 {
		c := guestConn(t, l, 3)
		if i < 4 {
			held = append(held, c)
		} else {
			closed(t, "one too many", c)
		}
	}
	if n := runtime.NumGoroutine() - before; n > 20 {
		t.Errorf("a flood left %d goroutines more", n)
	}
	if n := strings.Count(r.log.String(), "too many"); n == 0 || n > logBurst+2 {
		t.Errorf("a flood is logged with %d lines", n)
	}

	for _, cid := range []uint32{4, 5} {
		other := clientOf(func() (net.Conn, error) { return l.dial(cid) })
		expect(t, other, "GET", "/healthz", "", 200, nil)
		defer other.CloseIdleConnections()
	}
	r.expect("GET", "/healthz", "", 200, nil)

	// The listener has room for 10, whoever they are.
	for cid := uint32(100); cid < 104; cid++ {
		held = append(held, guestConn(t, l, cid))
	}
	begun := time.Now()
	closed(t, "the eleventh", guestConn(t, l, 200))
	if d := time.Since(begun); d > defaultLimits.header/2 {
		t.Errorf("one more than there is room for was closed after %v: not for want of room", d)
	}

	// What is closed makes room.
	for _, c := range held {
		_ = c.Close()
	}
	for deadline := time.Now().Add(30 * time.Second); ; {
		c := guestConn(t, l, 3)
		go func() { _, _ = io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") }()
		if strings.HasPrefix(closed(t, "after the flood", c), "HTTP/1.1 200") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("connections that were closed still count")
		}
	}
}

// TestOneTooManyIsTold: on a real socket there is an answer for who finds no room.
func TestOneTooManyIsTold(t *testing.T) {
	r := newRig(t, func(_ *Config, lim *limits) { lim.host = 1 })
	r.expect("GET", "/healthz", "", 200, nil) // and the client keeps its connection
	c, err := net.Dial("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 503 || !strings.Contains(string(text), api.CodeUnavailable) {
		t.Errorf("%d %s, %v", resp.StatusCode, text, err)
	}
}

// TestLogOfGuestsIsBounded: neither garbage nor errors fill the log, and one guest's do not use up the operator's.
func TestLogOfGuestsIsBounded(t *testing.T) {
	l := newMemListener()
	r := newRig(t, func(cfg *Config, _ *limits) {
		cfg.Listeners = []Listener{{l, []Allow{{Operations: []string{"listGrafts"}, Shares: []string{"a"}, CIDs: []uint32{3}}}}}
	})
	r.addShare("a")
	guest := clientOf(func() (net.Conn, error) { return l.dial(3) })
	defer guest.CloseIdleConnections()
	for range 100 {
		r.daemon.Fail("Grafts", errors.New("the guest's"))
		expect(t, guest, "GET", "/v1/shares/a/grafts", "", 500, nil)
	}
	if n := strings.Count(r.log.String(), "the guest's"); n == 0 || n > logBurst+1 {
		t.Errorf("a guest's errors are logged with %d lines", n)
	}
	r.daemon.Fail("Grafts", errors.New("the operator's"))
	r.expect("GET", "/v1/shares/a/grafts", "", 500, nil)
	if !strings.Contains(r.log.String(), "the operator's") {
		t.Error("the operator's error is not logged")
	}
}

package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair returns both ends of a session.
func pair(t testing.TB) (server, fetcher *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "server"), os.NewFile(uintptr(fds[1]), "fetcher")
}

// checkFDs says at the test's end whether descriptors are left.
func checkFDs(t testing.TB) {
	t.Helper()
	r, w, err := os.Pipe() // Go's poller has descriptors of its own from the first use on
	if err != nil {
		t.Fatal(err)
	}
	_, _ = r.Close(), w.Close()
	before := countFDs(t)
	t.Cleanup(func() {
		if after := countFDs(t); after != before {
			t.Errorf("%d descriptors, there were %d", after, before)
		}
	})
}

func countFDs(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// chanLine is a Line of what is sent over it; closed, it is at its end.
type chanLine chan *os.File

func (l chanLine) Next(ctx context.Context) (*os.File, error) {
	select {
	case f, ok := <-l:
		if !ok {
			return nil, errors.New("no more")
		}
		return f, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// fake is a Store whose chunk i of layer l says so.
type fake struct {
	layers []Layer
	err    error
	chunk  func(ctx context.Context, layer int, index uint32) (*os.File, error)

	mu    sync.Mutex
	notes []string
	noted chan struct{}
}

func (f *fake) Layers(context.Context) ([]Layer, error) { return f.layers, f.err }

func content(layer int, index uint32) []byte {
	return fmt.Appendf(nil, "chunk %d of layer %d", index, layer)
}

func (f *fake) Chunk(ctx context.Context, layer int, index uint32) (*os.File, error) {
	if f.chunk != nil {
		return f.chunk(ctx, layer, index)
	}
	return sealed("chunk", content(layer, index))
}

func (f *fake) Status(_ context.Context, layer int) (Status, error) {
	return Status{Size: 100, Fetched: int64(layer), Err: "a\nb", Requests: 3, Bytes: 4}, f.err
}

func (f *fake) Reach(context.Context) error { return f.err }

func (f *fake) Prefetched(ctx context.Context) error {
	if f.err != nil {
		return f.err
	}
	<-ctx.Done()
	return ctx.Err()
}

func (f *fake) Note(layer int, path string) {
	f.mu.Lock()
	f.notes = append(f.notes, fmt.Sprint(layer, " ", path))
	f.mu.Unlock()
	if f.noted != nil {
		f.noted <- struct{}{}
	}
}

func (f *fake) Close() error { return nil }

// start has a client use s, and returns what a restart of the fetcher is: the end of one session and the begin of the next.
func start(t testing.TB, s Store, timeout time.Duration) (*Client, func()) {
	t.Helper()
	line := make(chanLine)
	served := make(chan error, 1)
	begin := func() {
		server, fetcher := pair(t)
		go func() { served <- Serve(fetcher, s) }()
		line <- server
	}
	c := NewClient(ClientConfig{Line: line, Timeout: timeout})
	begin()
	stop := func() {
		c.mu.Lock()
		for c.conn == nil {
			c.changed.Wait()
		}
		conn := c.conn
		c.mu.Unlock()
		conn.close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return c, func() { stop(); begin() }
}

func readAll(t testing.TB, f *os.File) []byte {
	t.Helper()
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSession(t *testing.T) {
	checkFDs(t)
	s := &fake{layers: sample(), noted: make(chan struct{}, 10)}
	c, _ := start(t, s, 0)
	ctx := context.Background()
	for range 2 {
		layers, err := c.Layers(ctx)
		want, _ := EncodeMeta(sample())
		got, encodeErr := EncodeMeta(layers)
		if err != nil || encodeErr != nil || !bytes.Equal(got, want) {
			t.Errorf("layers %+v, %v", layers, err)
		}
	}
	var group sync.WaitGroup
	for i := range 200 {
		group.Go(func() {
			f, err := c.Chunk(ctx, i%3, uint32(i))
			if err != nil {
				t.Error(err)
				return
			}
			if got := readAll(t, f); !bytes.Equal(got, content(i%3, uint32(i))) {
				t.Errorf("chunk %d is %q", i, got)
			}
		})
	}
	group.Wait()
	st, err := c.Status(ctx, 7)
	if want := (Status{Size: 100, Fetched: 7, Err: "a b", Requests: 3, Bytes: 4}); st != want || err != nil {
		t.Errorf("status %+v, %v, expected %+v", st, err, want)
	}
	c.Note(1, "usr/bin/a")
	c.Note(0, "b")
	<-s.noted
	<-s.noted
	if want := []string{"1 usr/bin/a", "0 b"}; !slices.Equal(s.notes, want) {
		t.Errorf("notes %q, expected %q", s.notes, want)
	}
	if _, err := c.Chunk(ctx, MaxLayers, 0); err == nil {
		t.Error("a layer that cannot be is asked for")
	}
}

func TestSessionErrors(t *testing.T) {
	checkFDs(t)
	s := &fake{err: errors.New("401 for\x1b[31m sha256:…"), chunk: func(_ context.Context, _ int, index uint32) (*os.File, error) {
		given := []error{ErrCorrupt, fmt.Errorf("it: %w", ErrCorrupt), ErrUnavailable, io.EOF}
		if int(index) < len(given) {
			return nil, given[index]
		}
		r, w, err := os.Pipe()
		_ = w.Close()
		return r, err
	}}
	c, _ := start(t, s, 0)
	ctx := context.Background()
	for i, want := range []error{ErrCorrupt, ErrCorrupt, ErrUnavailable, ErrUnavailable, ErrUnavailable} {
		if f, err := c.Chunk(ctx, 0, uint32(i)); f != nil || err != want {
			t.Errorf("chunk %d: %v, expected %v", i, err, want)
		}
	}
	if _, err := c.Layers(ctx); err == nil || !strings.Contains(err.Error(), "401 for [31m sha256:…") {
		t.Errorf("layers: %v", err)
	}
	if _, err := c.Status(ctx, 0); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("status: %v", err)
	}
	if err := c.Prefetched(ctx); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("prefetched: %v", err)
	}
	if err := c.Reach(ctx); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("reach: %v", err)
	}
}

// Who does not wait any more is let go at once, and the fetcher is told.
func TestGivenUp(t *testing.T) {
	checkFDs(t)
	ended := make(chan error, 1)
	s := &fake{chunk: func(ctx context.Context, _ int, _ uint32) (*os.File, error) {
		<-ctx.Done()
		ended <- ctx.Err()
		return nil, ctx.Err()
	}}
	c, _ := start(t, s, 50*time.Millisecond)
	if _, err := c.Chunk(context.Background(), 0, 0); err != ErrUnavailable {
		t.Errorf("after its time: %v", err)
	}
	<-ended
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.Chunk(ctx, 0, 0); err != context.Canceled {
		t.Errorf("cancelled: %v", err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	if err := c.Prefetched(ctx); err != context.DeadlineExceeded {
		t.Errorf("prefetched in no time: %v", err)
	}
}

// A request outlives one end of the fetcher, and no second one.
func TestRestart(t *testing.T) {
	checkFDs(t)
	asked := make(chan uint32, 10)
	calls := make(map[uint32]int)
	var mu sync.Mutex
	s := &fake{chunk: func(ctx context.Context, layer int, index uint32) (*os.File, error) {
		mu.Lock()
		calls[index]++
		n := calls[index]
		mu.Unlock()
		asked <- index
		if index == 1 && n == 2 {
			return sealed("chunk", content(layer, index))
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	c, restart := start(t, s, 0)
	type result struct {
		file *os.File
		err  error
	}
	results := make([]chan result, 3)
	for i := range results {
		results[i] = make(chan result, 1)
		go func() {
			f, err := c.Chunk(context.Background(), 0, uint32(i))
			results[i] <- result{f, err}
		}()
		<-asked
	}
	restart()
	again := []uint32{<-asked, <-asked, <-asked}
	slices.Sort(again)
	if !slices.Equal(again, []uint32{0, 1, 2}) {
		t.Errorf("asked again for %d", again)
	}
	r := <-results[1]
	if r.err != nil || !bytes.Equal(readAll(t, r.file), content(0, 1)) {
		t.Errorf("after a restart: %v", r.err)
	}
	restart()
	for _, i := range []int{0, 2} {
		if r := <-results[i]; r.err != ErrUnavailable {
			t.Errorf("after two restarts: %v", r.err)
		}
	}
}

// What is asked before there is a session waits for it.
func TestNoSession(t *testing.T) {
	checkFDs(t)
	line := make(chanLine)
	c := NewClient(ClientConfig{Line: line, Timeout: 20 * time.Millisecond})
	defer c.Close()
	if _, err := c.Chunk(context.Background(), 0, 0); err != ErrUnavailable {
		t.Errorf("without a session: %v", err)
	}
	c.Note(0, "early")
	server, fetcher := pair(t)
	s := &fake{noted: make(chan struct{}, 1)}
	served := make(chan error)
	go func() { served <- Serve(fetcher, s) }()
	line <- server
	<-s.noted
	close(line)
	_ = c.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestLineEnds(t *testing.T) {
	line := make(chanLine)
	c := NewClient(ClientConfig{Line: line})
	defer c.Close()
	done := make(chan error)
	go func() {
		_, err := c.Layers(context.Background())
		done <- err
	}()
	close(line)
	if err := <-done; !errors.Is(err, ErrUnavailable) {
		t.Errorf("layers of nobody: %v", err)
	}
	if _, err := c.Chunk(context.Background(), 0, 0); err != ErrUnavailable {
		t.Errorf("a chunk of nobody: %v", err)
	}
}

// packets are messages in one slice: each after its length, of which the upper bit of the second byte adds a descriptor.
func packets(messages ...[]byte) []byte {
	var all []byte
	for _, m := range messages {
		all = append(le.AppendUint16(all, uint16(len(m))), m...)
	}
	return all
}

// sendAll sends what packets has made, and a descriptor with each message that says so.
func sendAll(t testing.TB, f *os.File, all []byte) {
	t.Helper()
	c, err := newConn(f)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	for len(all) >= 2 {
		n, fd := int(le.Uint16(all)&0x7fff), -1
		if le.Uint16(all)&0x8000 != 0 {
			fd = int(zero.Fd())
		}
		all = all[2:]
		n = min(n, len(all))
		if c.send(all[:n], fd) != nil {
			return
		}
		all = all[n:]
	}
}

var zero = func() *os.File {
	f, err := sealed("zero", nil)
	if err != nil {
		panic(err)
	}
	return f
}()

// serveHostile serves a session in which somebody sends these packets and then reads what comes.
func serveHostile(t testing.TB, all []byte) error {
	server, fetcher := pair(t)
	served := make(chan error, 1)
	go func() { served <- Serve(fetcher, &fake{layers: sample()[1:], err: nil}) }()
	drained, err := newConn(server)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(fdOf(drained))
	if err != nil {
		t.Fatal(err)
	}
	sendAll(t, os.NewFile(uintptr(fd), "hostile"), all)
	drained.close()
	return <-served
}

func fdOf(c *conn) (fd int) {
	_ = c.raw.Control(func(raw uintptr) { fd = int(raw) })
	return fd
}

func message(h header, body string) []byte { return append(h.append(nil), body...) }

func TestServeHostile(t *testing.T) {
	checkFDs(t)
	ok := header{op: opPrefetched, id: 1}
	odd := message(header{op: opChunk}, "")
	odd[0] = 9
	for name, all := range map[string][]byte{
		"short":          packets([]byte{wireVersion, opChunk}),
		"version":        packets(odd),
		"operation":      packets(message(header{op: opEnd}, "")),
		"operation 0":    packets(message(header{}, "")),
		"status":         packets(message(header{op: opChunk, status: 1}, "")),
		"body":           packets(message(header{op: opChunk}, "x")),
		"layer":          packets(message(header{op: opChunk, layer: MaxLayers}, "")),
		"note's layer":   packets(message(header{op: opNote, layer: 1 << 31}, "a")),
		"note's path":    packets(message(header{op: opNote}, "../a")),
		"same id":        packets(message(ok, ""), message(ok, "")),
		"over-long note": packets(message(header{op: opNote}, strings.Repeat("n/", 3000)+"n")),
	} {
		if err := serveHostile(t, all); err == nil {
			t.Errorf("%s: the session goes on", name)
		}
	}
	// These are not wrong.
	for name, all := range map[string][]byte{
		"nothing":            nil,
		"cancel of nothing":  packets(message(header{op: opCancel, id: 5}, "")),
		"unread answers":     slices.Repeat(packets(message(header{op: opNote}, "a")), 1000),
		"a descriptor of no": {0x18, 0x80, 1, opCancel, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
	} {
		if err := serveHostile(t, all); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzServe(f *testing.F) {
	f.Add(packets(message(header{op: opLayers, id: 1}, ""), message(header{op: opStatus, id: 2, layer: 3}, "")))
	f.Add(packets(message(header{op: opChunk, id: 1}, ""), message(header{op: opCancel, id: 1}, ""), message(header{op: opNote}, "a/b")))
	f.Fuzz(func(t *testing.T, all []byte) { _ = serveHostile(t, all) })
}

// clientHostile has a client ask for one thing of each kind, of somebody who sends these packets for an answer, and be done.
func clientHostile(t testing.TB, all []byte) {
	line := make(chanLine, 1)
	server, fetcher := pair(t)
	line <- server
	close(line)
	c := newClient(ClientConfig{Line: line}, 0)
	ctx := context.Background()
	var group sync.WaitGroup
	group.Go(func() {
		if layers, err := c.Layers(ctx); err == nil {
			if _, err := EncodeMeta(layers); err != nil {
				t.Error(err)
			}
		}
	})
	group.Go(func() {
		f, err := c.Chunk(ctx, 0, 0)
		if err == nil {
			_ = f.Close()
		} else if err != ErrCorrupt && err != ErrUnavailable {
			t.Errorf("Chunk: %v", err)
		}
	})
	group.Go(func() {
		if st, err := c.Status(ctx, 0); err == nil && (st.Size < 0 || len(st.Err) > maxText) {
			t.Errorf("status %+v", st)
		}
	})
	sendAll(t, fetcher, all)
	group.Wait()
	_ = c.Close()
}

func TestClientHostile(t *testing.T) {
	checkFDs(t)
	var answers [][]byte
	withFile := func(b []byte) []byte {
		p := packets(b)
		p[1] |= 0x80
		return p
	}
	for id := range uint64(5) {
		for op := range uint8(opEnd + 1) {
			for status := range uint16(statusEnd + 1) {
				for _, body := range []string{"", "x", strings.Repeat("y", statusSize), strings.Repeat("\xff", maxBody)} {
					h := header{op: op, status: status, id: id}
					answers = append(answers, packets(message(h, body)), withFile(message(h, body)))
				}
			}
		}
	}
	for _, a := range answers {
		clientHostile(t, a)
	}
	clientHostile(t, slices.Concat(answers[:200]...))
}

// Two descriptors fit where one is expected; neither stays.
func TestTwoDescriptors(t *testing.T) {
	checkFDs(t)
	server, fetcher := pair(t)
	defer fetcher.Close()
	c, err := newConn(server)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	raw := int(fetcher.Fd())
	if err := unix.Sendmsg(raw, []byte("message"), unix.UnixRights(raw, raw), nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, f, _, err := c.receive(make([]byte, 100), true); err == nil || f != nil {
		t.Errorf("two descriptors are taken: %v", err)
	}
	if err := unix.Sendmsg(raw, make([]byte, 200), unix.UnixRights(raw), nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, f, _, err := c.receive(make([]byte, 100), true); err == nil || f != nil {
		t.Errorf("half a message is taken: %v", err)
	}
}

func FuzzClient(f *testing.F) {
	for _, h := range []header{{op: opLayers, id: 1}, {op: opChunk, id: 2}, {op: opStatus, id: 3}} {
		b := packets(message(h, ""))
		f.Add(b)
		f.Add(append([]byte{b[0], b[1] | 0x80}, b[2:]...))
	}
	f.Fuzz(func(t *testing.T, all []byte) { clientHostile(t, all) })
}

func TestPlain(t *testing.T) {
	if got := plain("a\x1b\xff\u00fc\n" + strings.Repeat("x", 2000)); len(got) > maxText+2 || !strings.HasPrefix(got, "a ?\u00fc x") {
		t.Errorf("%q", got)
	}
	if !reflect.DeepEqual(plain(""), "") {
		t.Error("something of nothing")
	}
}

// A chunk that comes when nobody waits for it any more is closed at once.
func TestLateAnswer(t *testing.T) {
	line := make(chanLine, 1)
	server, fetcher := pair(t)
	line <- server
	c := NewClient(ClientConfig{Line: line})
	defer c.Close()
	conn, err := newConn(fetcher)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.close()
	status := func(late int) {
		t.Helper()
		done := make(chan error)
		go func() {
			_, err := c.Status(context.Background(), 0)
			done <- err
		}()
		var h header
		b, _, _, err := conn.receive(make([]byte, maxMessage), false)
		if err == nil {
			_, err = h.parse(b)
		}
		if err != nil {
			t.Fatal(err)
		}
		for range late {
			if err := conn.send(message(header{op: opChunk, id: 1000}, ""), int(zero.Fd())); err != nil {
				t.Fatal(err)
			}
		}
		if err := conn.send(message(h, strings.Repeat("\x00", statusSize)), -1); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // which closes files, too, in its own time
	status(0)
	before := countFDs(t)
	status(20)
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors, there were %d", after, before)
	}
}

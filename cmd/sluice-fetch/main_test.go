package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/imagefetch"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func pair(t *testing.T) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
}

func send(t *testing.T, line *os.File, message []byte, files ...*os.File) {
	t.Helper()
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	if err := unix.Sendmsg(int(line.Fd()), message, unix.UnixRights(fds...), nil, 0); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		f.Close()
	}
}

// start runs the program on a control line, and returns the other end and its exit status.
func start(ctx context.Context, t *testing.T, stderr io.Writer) (line *os.File, status chan int) {
	t.Helper()
	line, theirs := pair(t)
	// The program takes the descriptor over.
	fd, err := unix.Dup(int(theirs.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	status = make(chan int, 1)
	go func() {
		status <- run(ctx, []string{"--control-fd", itoa(fd), "--log-format=json"}, nil, io.Discard, stderr)
	}()
	t.Cleanup(func() { line.Close() })
	return line, status
}

func itoa(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}

func config(t *testing.T, cfg imagefetch.Config) []byte {
	t.Helper()
	b, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// line gives one session.
type line chan *os.File

func oneSession(f *os.File) line {
	l := make(line, 1)
	l <- f
	return l
}

func (l line) Next(ctx context.Context) (*os.File, error) {
	select {
	case f := <-l:
		return f, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

var files = []imagetest.File{{Name: "etc/"}, {Name: "etc/hostname", Data: []byte("box\n")}, {Name: "big", Data: bytes.Repeat([]byte("0123456789"), 20_000)}}

// TestServe opens images as the keeper does and reads from them as the server does.
func TestServe(t *testing.T) {
	img := imagetest.New(t, files)
	var log bytes.Buffer
	line, status := start(t.Context(), t, &log)
	dir := t.TempDir()
	cacheDir, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	cfg := imagefetch.Config{Reference: img.Ref, Platform: "linux/amd64", Background: imagefetch.BackgroundConfig{Off: true}}
	cfg.Registry.DockerConfig = dir
	ours, theirs := pair(t)
	send(t, line, config(t, cfg), theirs, cacheDir)
	client := store.NewClient(store.ClientConfig{Line: oneSession(ours)})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	layers, err := client.Layers(ctx)
	if err != nil || len(layers) != 1 || len(layers[0].Entries) != len(files) {
		t.Fatalf("the layers are %+v, %v", layers, err)
	}
	for _, e := range layers[0].Entries {
		if e.Path != "big" {
			continue
		}
		var got []byte
		for _, s := range e.Chunks {
			f, err := client.Chunk(ctx, 0, s.Chunk)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(io.NewSectionReader(f, 0, int64(s.Len)))
			f.Close()
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, b...)
		}
		if !bytes.Equal(got, files[2].Data) {
			t.Error("big has other content")
		}
	}
	if err := client.Prefetched(ctx); err != nil {
		t.Error(err)
	}
	if st, err := client.Status(ctx, 0); err != nil || st.Requests == 0 || st.Fetched == 0 {
		t.Errorf("the status is %+v, %v", st, err)
	}
	if list, _ := filepath.Glob(dir + "/chunks/*/*"); len(list) == 0 {
		t.Error("the directory that was handed over is empty")
	}

	// What is wrong with an image is told to whoever wants to use it.
	for text, says := range map[string]string{
		`{"reference":"Not A Reference"}`: "is no reference",
		`{`:                               "configuration",
		string(config(t, imagefetch.Config{Reference: img.Tag + "x", Registry: cfg.Registry})): "status 404",
	} {
		a, b := pair(t)
		send(t, line, []byte(text), b)
		broken := store.NewClient(store.ClientConfig{Line: oneSession(a)})
		if _, err := broken.Layers(ctx); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, expected %q", text, err, says)
		}
		if err := broken.Close(); err != nil {
			t.Error(err)
		}
	}
	// Without a session there is nobody to tell.
	send(t, line, []byte(`{}`))
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	line.Close()
	if got := <-status; got != 0 {
		t.Errorf("the exit status is %d: %s", got, &log)
	}
	if !strings.Contains(log.String(), "without a session") {
		t.Errorf("the log is %s", &log)
	}
}

// TestControlLine is of lines that are none, or say too much.
func TestControlLine(t *testing.T) {
	var log bytes.Buffer
	if got := run(t.Context(), []string{"--control-fd", "9999"}, nil, io.Discard, &log); got != 1 || !strings.Contains(log.String(), "SOCK_SEQPACKET") {
		t.Errorf("no socket: %d, %s", got, &log)
	}
	log.Reset()
	line, status := start(t.Context(), t, &log)
	if err := unix.SetsockoptInt(int(line.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20); err != nil {
		t.Fatal(err)
	}
	send(t, line, make([]byte, maxConfig+1))
	if got := <-status; got != 1 || !strings.Contains(log.String(), "longer than") {
		t.Errorf("a message that is too long: %d, %s", got, &log)
	}
	log.Reset()
	line, status = start(t.Context(), t, &log)
	var many []*os.File
	for range 4 {
		a, b := pair(t)
		many = append(many, a, b)
	}
	send(t, line, []byte(`{}`), many...)
	if got := <-status; got != 1 || !strings.Contains(log.String(), "descriptors") {
		t.Errorf("a message with too many descriptors: %d, %s", got, &log)
	}
}

// TestSignal ends the program with its context, as a signal does.
func TestSignal(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var log bytes.Buffer
	_, status := start(ctx, t, &log)
	cancel()
	if got := <-status; got != 0 {
		t.Errorf("the exit status is %d: %s", got, &log)
	}
}

// TestManual compares what go generate makes with what is checked in.
func TestManual(t *testing.T) {
	want, err := os.ReadFile("../../docs/man/sluice-fetch.1")
	if err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if got := run(t.Context(), []string{"man"}, nil, &out, &errs); got != 0 {
		t.Fatalf("man ends with %d: %s", got, &errs)
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Error("docs/man/sluice-fetch.1 is not what the commands say: run go generate ./cmd/sluice-fetch")
	}
}

func TestStat(t *testing.T) {
	s := imagetest.NewServer(t)
	img := s.Push(t, "a/b", imagetest.Build(t, files, imagetest.Options{}), imagetest.Build(t, files, imagetest.Options{Format: imagetest.PlainGzip}))
	dir := t.TempDir()
	var out, errs bytes.Buffer
	args := []string{"stat", img.Ref, "--platform=linux/amd64", "--docker-config", dir}
	if got := run(t.Context(), args, nil, &out, &errs); got != 0 {
		t.Fatalf("stat ends with %d: %s", got, &errs)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 || !strings.HasPrefix(lines[1], img.Layers[0].Digest) || !strings.Contains(lines[1], "eStargz") || !strings.Contains(lines[2], "no: ") {
		t.Errorf("stat prints\n%s", &out)
	}
	out.Reset()
	if got := run(t.Context(), append(args, "--json", "--layer", img.Layers[0].Digest), nil, &out, &errs); got != 0 {
		t.Fatalf("stat ends with %d: %s", got, &errs)
	}
	var infos []imagefetch.LayerInfo
	if err := json.Unmarshal(out.Bytes(), &infos); err != nil || len(infos) != 1 || !infos[0].Lazy || infos[0].Files != 3 || infos[0].Unpacked != 200_004 || infos[0].Prefetch != 0 {
		t.Errorf("stat --json prints %s: %v", &out, err)
	}
	given := filepath.Join(dir, "image.json")
	if err := os.WriteFile(given, config(t, imagefetch.Config{Layer: img.Layers[1].Digest}), 0o600); err != nil {
		t.Fatal(err)
	}
	out.Reset()
	if got := run(t.Context(), append(args, "--config", given), nil, &out, &errs); got != 0 || strings.Count(out.String(), "sha256:") != 1 {
		t.Errorf("stat --config ends with %d: %s%s", got, &out, &errs)
	}
	for _, bad := range [][]string{{"stat"}, {"stat", img.Ref, "--nonsense"}, {"--log-level=loud"}, {"--log-format=xml"}, {"extra"}} {
		if got := run(t.Context(), bad, nil, io.Discard, io.Discard); got != 2 {
			t.Errorf("%v ends with %d", bad, got)
		}
	}
	errs.Reset()
	if got := run(t.Context(), []string{"stat", s.Host() + "/none:x", "--docker-config", dir}, nil, io.Discard, &errs); got != 1 || !strings.Contains(errs.String(), "status 404") {
		t.Errorf("an image that is not there: %d, %s", got, &errs)
	}
}

func TestPrefetchList(t *testing.T) {
	sum := "sha256:" + strings.Repeat("1", 64)
	trace := `{"layer":"` + sum + `","path":"b"}` + "\n\n" + `{"layer":"` + sum + `","path":"a & b"}` + "\n" + `{"layer":"` + sum + `","path":"b"}` + "\n"
	name := filepath.Join(t.TempDir(), "trace")
	if err := os.WriteFile(name, []byte(trace), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	want := `{"layer":"` + sum + `","path":"b"}` + "\n" + `{"layer":"` + sum + `","path":"a & b"}` + "\n"
	if got := run(t.Context(), []string{"prefetch-list", name, "-"}, strings.NewReader(trace), &out, &errs); got != 0 || out.String() != want {
		t.Errorf("it ends with %d and prints %s%s", got, &out, &errs)
	}
	out.Reset()
	if got := run(t.Context(), []string{"prefetch-list", "--paths", name}, nil, &out, &errs); got != 0 || out.String() != "b\na & b\n" {
		t.Errorf("it ends with %d and prints %s%s", got, &out, &errs)
	}
	for _, in := range []string{"x", `{"layer":"1","path":"x"}`, strings.Repeat("y", 70<<10)} {
		if got := run(t.Context(), []string{"prefetch-list", "-"}, strings.NewReader(in), io.Discard, &errs); got != 1 {
			t.Errorf("%.20q ends with %d", in, got)
		}
	}
}

package lazyimage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/extensions/extensionstest"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/imagefetch"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/internal/program"
)

// fetch is the program, built for these tests.
var fetch string

func TestMain(m *testing.M) {
	program.MaybeConfine()
	if data, ok := os.LookupEnv(role); ok {
		if err := inside(data); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	dir, err := os.MkdirTemp("", "lazyimage")
	if err != nil {
		panic(err)
	}
	fetch = filepath.Join(dir, programName)
	if b, err := exec.Command("go", "build", "-o", fetch, "github.com/sluicefs/sluice/cmd/sluice-fetch").CombinedOutput(); err != nil {
		panic(fmt.Sprintf("build %s: %v\n%s", programName, err, b))
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// lines is a log that tests read.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func host(t *testing.T) (*extensionstest.Host, *Extension) {
	t.Helper()
	log := new(lines)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(log)
		}
	})
	e := &Extension{program: fetch}
	return &extensionstest.Host{Extensions: []extensions.Hosted{e}, Log: slog.New(slog.NewTextHandler(log, nil))}, e
}

func mount(options ...string) extensions.Mount {
	return extensions.Mount{Backend: Name, Options: options, ReadOnly: true}
}

// tryOpen is h.Open without a look at descriptors, of which the registry has some until it notices that the fetcher is gone.
func tryOpen(t *testing.T, h *extensionstest.Host, m extensions.Mount) *extensionstest.Graft {
	t.Helper()
	g, err := h.TryOpen(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

func cat(t *testing.T, c *fsbackendtest.Client, p string) string {
	t.Helper()
	b, errno := read(c, p)
	if errno != 0 {
		t.Fatalf("read %s: %v", p, errno)
	}
	return b
}

func read(c *fsbackendtest.Client, p string) (string, fsbackend.Errno) {
	node := uint64(fsbackendtest.Root)
	for name := range strings.SplitSeq(p, "/") {
		out, errno := c.Lookup(node, name)
		if errno == 0 && out.NodeId == 0 {
			errno = unix.ENOENT
		}
		if errno != 0 {
			return "", errno
		}
		node = out.NodeId
	}
	fh, errno := c.Open(node, unix.O_RDONLY)
	if errno != 0 {
		return "", errno
	}
	defer c.Release(node, fh)
	b, errno := c.Read(node, fh, 0, 1<<20)
	return string(b), errno
}

var files = [][]imagetest.File{
	{{Name: "etc/"}, {Name: "etc/hostname", Data: []byte("lower")}, {Name: "etc/gone", Data: []byte("gone")}, {Name: "bin/"}, {Name: "bin/tool", Data: bytes.Repeat([]byte("tool"), 50_000), Mode: 0o755}},
	{{Name: "etc/"}, {Name: "etc/hostname", Data: []byte("upper")}, {Name: "etc/.wh.gone"}},
}

// An image from a registry, merged; and again from the cache, with the registry gone, which check says.
func TestImage(t *testing.T) {
	image := imagetest.New(t, files...)
	h, _ := host(t)
	cache := filepath.Join(t.TempDir(), "cache")
	trace := filepath.Join(t.TempDir(), "trace")
	m := mount("image="+image.Ref, "cache-dir="+cache, "cache-bytes=64M", "background=off", "trace="+trace)
	look := func(h *extensionstest.Host, reached bool) {
		g, err := h.TryOpen(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		if o := (extensions.Options{ReadOnly: true, Inline: true, Timeout: time.Minute}); g.Options != o {
			t.Errorf("options are %+v", g.Options)
		}
		c := g.Client()
		if got := cat(t, c, "etc/hostname"); got != "upper" {
			t.Errorf("hostname is %q", got)
		}
		if _, errno := read(c, "etc/gone"); errno != unix.ENOENT {
			t.Errorf("what is gone: %v", errno)
		}
		if got := cat(t, c, "bin/tool"); got != string(files[0][4].Data) {
			t.Errorf("the tool is of %d bytes", len(got))
		}
		b, err := g.Act(t.Context(), "check", nil)
		var p struct {
			Prefetched bool
			Layers     []struct{ Digest string }
		}
		if !reached {
			if err == nil || !strings.Contains(err.Error(), image.Server.Host()) {
				t.Errorf("check says %s, %v, expected that the registry cannot be reached", b, err)
			}
		} else if err := errors.Join(err, json.Unmarshal(b, &p)); err != nil || !p.Prefetched || len(p.Layers) != 2 || p.Layers[0].Digest != image.Layers[0].Digest {
			t.Errorf("check says %s, %v", b, err)
		}
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	look(h, true)
	if b, err := os.ReadFile(trace); err != nil || !bytes.Contains(b, []byte("etc/hostname")) {
		t.Errorf("the trace is %q, %v", b, err)
	}
	image.Server.Close()
	again, _ := host(t)
	look(again, false)
}

// A layer by itself shows what it hides.
func TestLayer(t *testing.T) {
	image := imagetest.New(t, files...)
	h, _ := host(t)
	c := h.Open(t, mount("image="+image.Ref, "layer="+image.Layers[1].Digest, "prefetch=off")).Client()
	etc, _ := c.Lookup(fsbackendtest.Root, "etc")
	if out, errno := c.Lookup(etc.NodeId, "gone"); errno != 0 || out.Mode != unix.S_IFCHR {
		t.Errorf("the whiteout is %+v, %v", out.Attr, errno)
	}
	if _, errno := read(c, "bin/tool"); errno != unix.ENOENT {
		t.Errorf("what another layer has: %v", errno)
	}
}

// A layer in a file, below /tmp even.
func TestFile(t *testing.T) {
	l := imagetest.Build(t, files[0], imagetest.Options{})
	p := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(p, l.Blob, 0o600); err != nil {
		t.Fatal(err)
	}
	h, _ := host(t)
	c := h.Open(t, mount("file="+p, "toc-digest="+l.TOCDigest)).Client()
	if got := cat(t, c, "etc/hostname"); got != "lower" {
		t.Errorf("hostname is %q", got)
	}
}

// Two grafts have one fetcher; it ends with the last. Killed, it is started again, and nobody notices.
func TestFetcherIsKilled(t *testing.T) {
	image := imagetest.New(t, files...)
	h, e := host(t)
	m := mount("image="+image.Ref, "prefetch=off", "background=off")
	first, second := tryOpen(t, h, m), tryOpen(t, h, m)
	pid := e.fetcher.supervisor.Status().PID
	if got := cat(t, second.Client(), "etc/hostname"); got != "upper" {
		t.Errorf("hostname is %q", got)
	}
	// In the middle of a request: the registry holds it until the program is dead.
	asked, dead := make(chan struct{}), make(chan struct{})
	var once sync.Once
	image.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Range") != "" {
			once.Do(func() {
				close(asked)
				<-dead
			})
		}
		next.ServeHTTP(w, r)
	})
	result := make(chan string)
	go func() {
		b, errno := read(first.Client(), "bin/tool")
		result <- fmt.Sprint(len(b), errno)
	}()
	<-asked
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	close(dead)
	if got := <-result; got != fmt.Sprint(len(files[0][4].Data), fsbackend.OK) {
		t.Errorf("the reader who waited got %s", got)
	}
	if now := e.fetcher.supervisor.Status().PID; now == pid || now == 0 {
		t.Errorf("process %d was %d", now, pid)
	}
	if got := cat(t, second.Client(), "bin/tool"); got != string(files[0][4].Data) {
		t.Errorf("the tool is of %d bytes", len(got))
	}
}

// What the fetcher counts comes by graft, and begins anew with it.
func TestImageStats(t *testing.T) {
	image := imagetest.New(t, files...)
	h, e := host(t)
	if s, err := e.ImageStats(t.Context()); err != nil || len(s) != 0 {
		t.Errorf("without images: %+v, %v", s, err)
	}
	budget := filepath.Join(t.TempDir(), "cache")
	m := mount("image="+image.Ref, "prefetch=off", "background=off", "cache-dir="+budget, "cache-bytes=64M")
	m.Share, m.Path = "root", "/"
	first := tryOpen(t, h, m)
	m.Path = "/other"
	tryOpen(t, h, m)
	stats := func() api.ImageStats {
		t.Helper()
		all, err := e.ImageStats(t.Context())
		if err != nil || len(all) != 2 {
			t.Fatalf("%+v, %v", all, err)
		}
		if all[0].Path != "/" {
			all[0], all[1] = all[1], all[0]
		}
		if all[0].Tag != "root" || all[0].Path != "/" || all[1].Tag != "root" || all[1].Path != "/other" || all[1].Misses != 0 {
			t.Errorf("the images are %+v", all)
		}
		return all[0]
	}
	if s := stats(); s.Hits+s.Misses != 0 || s.Size != uint64(len(image.Layers[0].Blob)+len(image.Layers[1].Blob)) {
		t.Errorf("before anything is read: %+v", s)
	}
	cat(t, first.Client(), "bin/tool")
	if s := stats(); s.Misses == 0 || s.HitBytes+s.MissBytes != 200_000 || s.Verified != s.Misses || s.Bytes == 0 || s.Fetched == 0 || s.CacheBytes < s.MissBytes ||
		s.CacheBudget != 64<<20 || len(s.ReadErrors) != 2 || len(s.FetchErrors) != 7 {
		t.Errorf("after 200,000 bytes were read: %+v", s)
	}
	pid := e.fetcher.supervisor.Status().PID
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// It may take a moment until it has been started again and has had the images opened.
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		all, err := e.ImageStats(t.Context())
		if err == nil && len(all) == 2 && all[0].Misses == 0 && all[1].Misses == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("after a new start: %+v, %v", all, err)
		}
	}
}

// A fetcher that does not answer is not waited for.
func TestImageStatsHang(t *testing.T) {
	image := imagetest.New(t, files...)
	h, e := host(t)
	tryOpen(t, h, mount("image="+image.Ref, "prefetch=off", "background=off"))
	pid := e.fetcher.supervisor.Status().PID
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer unix.Kill(pid, unix.SIGCONT)
	for stopped := false; !stopped; time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		stopped = bytes.Contains(b, []byte(") T "))
	}
	start := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if s, err := e.ImageStats(ctx); err == nil || time.Since(start) > statsLimit {
		t.Errorf("%+v, %v after %v", s, err, time.Since(start))
	}
}

func TestOpenFails(t *testing.T) {
	image := imagetest.New(t, files...)
	plain := image.Server.Push(t, "test/plain", imagetest.Build(t, files[0], imagetest.Options{Format: imagetest.PlainGzip}))
	for what, m := range map[string]extensions.Mount{
		"expected sha256: and 64":        mount("image="+image.Ref, "layer=sha256:0"),
		"expected one of image=":         mount(),
		"is not known: expected some of": mount("image="+image.Ref, "imgae=x"),
		"directory":                      {Backend: Name, Source: "/tmp", Options: []string{"image=" + image.Ref}},
		"no table of contents":           mount("image=" + plain.Ref),
		"no/such":                        mount("image=" + image.Server.Host() + "/no/such:tag"),
	} {
		h, e := host(t)
		err := h.OpenFails(t, m)
		if !strings.Contains(err.Error(), what) {
			t.Errorf("%v: %v, expected it to say %q", m.Options, err, what)
		}
		if e.fetcher.supervisor != nil {
			t.Error("the program goes on")
		}
	}
	h, e := host(t)
	e.program = "/no/such/program"
	if err := h.OpenFails(t, mount("image="+image.Ref)); !strings.Contains(err.Error(), "/no/such/program") {
		t.Error(err)
	}
	e.program = "sluice-fetch"
	if err := h.OpenFails(t, mount("image="+image.Ref)); !strings.Contains(err.Error(), "absolute path") {
		t.Error(err)
	}
}

// Every option is one that the fetcher knows, and means there what it should.
func TestOptions(t *testing.T) {
	hex := strings.Repeat("a1", 32)
	all := []string{
		"image=r.example/a/b@sha256:" + hex, "layer=sha256:" + hex, "platform=linux/arm64", "skip-verify", "fallback=pull", "opaque=user", "read-ahead=2M",
		"docker-config=/etc/docker", "mirror=r.example=m.example:5000", "mirror=r.example=http://n.example/", "plain-http=p.example", "insecure=r.example",
		"header=r.example=X-A: b:c", "tries=3", "timeout=1m30s", "stall=5s", "single-range", "cache-dir=/var/cache/x/", "cache-bytes=10G", "cache-memory=1024",
		"prefetch=64K", "prefetch-list=/etc/list", "prefetch-timeout=3s", "prefetch-async=1M", "background=on", "background-concurrency=4",
		"background-silence=2s", "background-batch=4M", "bandwidth=100M", "trace=/var/log/x/trace", "ro", "ro",
	}
	o, err := parse(all)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(o.fetch)
	if err != nil {
		t.Fatal(err)
	}
	var got imagefetch.Config
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatalf("the fetcher does not read %s: %v", b, err)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
	back, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"reference":"r.example/a/b@sha256:HEX","layer":"sha256:HEX","platform":"linux/arm64","skip_verify":true,"fallback":"pull",` +
		`"registry":{"hosts":{"p.example":{"plain_http":true},"r.example":{"mirrors":[{"host":"m.example:5000"},{"host":"n.example","plain_http":true}],"insecure":true,"headers":{"X-A":"b:c"}}},` +
		`"docker_config":"/etc/docker","tries":3,"timeout":"1m30s","stall":"5s","single_range":true},"cache":{"budget":10737418240,"memory_budget":1024},` +
		`"prefetch":{"size":65536,"list":"/etc/list","timeout":"3s","async_size":1048576},"background":{"concurrency":4,"silence":"2s","batch":4194304},"bandwidth":104857600,"trace":"/var/log/x/trace"}`
	want = strings.ReplaceAll(want, "HEX", hex)
	for _, b := range []string{string(b), string(back)} {
		if same, err := sameJSON(b, want); err != nil || !same {
			t.Errorf("the fetcher is told\n%s, expected\n%s", b, want)
		}
	}
	if o.inside.Merge || o.inside.Opaque != 2 || o.inside.ReadAhead != 2<<20 || o.inside.Timeout != 90*time.Second || o.cacheDir != "/var/cache/x" || fmt.Sprint(o.writable, o.visible) != "[/var/log/x] [/etc/docker /etc/list]" {
		t.Errorf("inside %+v, %q, %q, %q", o.inside, o.cacheDir, o.writable, o.visible)
	}
	o, err = parse([]string{"url=https://h.example/l", "prefetch=off", "background=off", "read-ahead=0", "toc-digest=sha256:" + hex})
	if err != nil || o.inside.Merge || o.inside.ReadAhead != -1 || o.inside.Timeout != timeout || o.fetch.Registry.Timeout != "45s" || !o.fetch.Prefetch.Off || !o.fetch.Background.Off || o.fetch.Reference != "https://h.example/l" {
		t.Errorf("%+v, %v", o, err)
	}
	if o, err := parse([]string{"image=x"}); err != nil || !o.inside.Merge {
		t.Errorf("%+v, %v", o, err)
	}
}

func sameJSON(a, b string) (bool, error) {
	var x, y any
	if err := errors.Join(json.Unmarshal([]byte(a), &x), json.Unmarshal([]byte(b), &y)); err != nil {
		return false, err
	}
	return fmt.Sprint(x) == fmt.Sprint(y), nil
}

func TestBadOptions(t *testing.T) {
	for option, want := range map[string]string{
		"image":                  "has no value",
		"ro=1":                   "expected none",
		"platform=a\x00b":        "NUL",
		"image=y":                "given twice",
		"url=https://h.example/": "2 images",
		"layer=sha256:x":         "64 hexadecimal",
		"toc-digest=sha256:" + strings.Repeat("0", 64): "no manifest",
		"fallback=x":               "expected pull",
		"opaque=all":               "one layer",
		"opaque=x":                 "all, trusted or user",
		"read-ahead=x":             "number of bytes",
		"docker-config=x":          "absolute",
		"mirror=x":                 "HOST=MIRROR",
		"mirror=x=":                "mirror",
		"mirror=a/b=x":             "no registry's host",
		"plain-http=http://x":      "no registry's host",
		"header=x=y":               "NAME:VALUE",
		"tries=0":                  "1 to 1000",
		"timeout=-1s":              "duration",
		"timeout=5":                "duration",
		"cache-dir=x":              "absolute",
		"cache-memory=8E":          "number of bytes",
		"cache-memory=9999999999G": "number of bytes",
		"prefetch=all":             "or off",
		"background=x":             "on or off",
		"trace=x":                  "absolute",
		"trace=/":                  "absolute",
		"file=x":                   "absolute",
	} {
		if _, err := parse([]string{"image=x", option}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, expected it to say %q", option, err, want)
		}
	}
	for _, list := range [][]string{{"prefetch=off", "prefetch-list=/x"}, {"background=off", "background-batch=1"}} {
		if _, err := parse(append(list, "image=x")); err == nil || !strings.Contains(err.Error(), "the one or the other") {
			t.Errorf("%q: %v", list, err)
		}
	}
	for _, option := range []string{"image=https://x", "image=file=/x", "url=ftp://x", "url=x"} {
		if _, err := parse([]string{option}); err == nil || !strings.Contains(err.Error(), "expected") {
			t.Errorf("%q: %v", option, err)
		}
	}
}

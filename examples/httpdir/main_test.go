package main

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/examples/httpdir/filldir"
	"github.com/sluicefs/sluice/examples/httpfs/webtree"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/ondemand"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fsbackend/pluginlayer"
	"github.com/sluicefs/sluice/plugin"
)

// origin is a web server that counts the bodies it gives.
type origin struct {
	*httptest.Server
	large []byte

	mu     sync.Mutex
	bodies map[string]int
	broken bool // bodies end after 100 bytes
}

func newOrigin(t *testing.T) *origin {
	o := &origin{large: bytes.Repeat([]byte("0123456789abcdef"), 160<<10), bodies: make(map[string]int)}
	files := map[string][]byte{"/index.txt": []byte("dir/large\ndir/small\ntop\n"), "/dir/large": o.large, "/dir/small": []byte("four"), "/top": nil}
	o.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := files[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		o.mu.Lock()
		broken := o.broken && r.Method == http.MethodGet
		if r.Method == http.MethodGet {
			o.bodies[r.URL.Path]++
		}
		o.mu.Unlock()
		if broken {
			w.Header().Set("Content-Range", strings.Replace(r.Header.Get("Range"), "=", " ", 1)+fmt.Sprintf("/%d", len(data)))
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(data[:100])
			return
		}
		http.ServeContent(w, r, "", time.Unix(1_700_000_000, 0), bytes.NewReader(data))
	}))
	t.Cleanup(o.Close)
	return o
}

func (o *origin) counted(path string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.bodies[path]
}

func (o *origin) breaks(broken bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.broken = broken
}

// inProcess serves the directory as a program that is sluiced with an extension does.
func inProcess(t *testing.T, o *origin, dir string) fsbackend.Backend {
	tree, err := webtree.New(o.Client(), o.URL)
	if err != nil {
		t.Fatal(err)
	}
	d, err := filldir.New(tree, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	inner, err := passthrough.New(passthrough.Config{Dir: filepath.Join(dir, "files")})
	if err != nil {
		t.Fatal(err)
	}
	b, err := ondemand.New(ondemand.Config{Backend: inner, Materializer: d})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// asPlugin serves it as a layer of a plug-in.
func asPlugin(t *testing.T, o *origin, dir string) fsbackend.Backend {
	source := plugin.NewLocal(web{}, nil)
	t.Cleanup(func() { _ = source.Close() })
	c, err := pluginlayer.Dial(t.Context(), pluginlayer.Config{Name: "http", Source: source})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	layers, err := c.Layers(t.Context(), base64.URLEncoding.EncodeToString([]byte(o.URL)), strings.TrimPrefix(dir, "/"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := layers.Open(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestOnDemand is row B4 over HTTP ranges: `ls` costs no body, `cat` one, a second `cat` none, and then the host has the file.
func TestOnDemand(t *testing.T) {
	for name, serve := range map[string]func(*testing.T, *origin, string) fsbackend.Backend{"in process": inProcess, "plug-in": asPlugin} {
		t.Run(name, func(t *testing.T) {
			o, dir := newOrigin(t), t.TempDir()
			b := serve(t, o, dir)
			c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
			d, errno := c.Lookup(fsbackendtest.Root, "dir")
			if errno != 0 {
				t.Fatal(errno)
			}
			names := c.List(t, d.NodeId, 4096)
			e, errno := c.Lookup(d.NodeId, "large")
			if len(names) != 2 || errno != 0 || e.Size != uint64(len(o.large)) {
				t.Fatalf("the directory lists %q, its file has %d bytes, %v", names, e.Size, errno)
			}
			if n := o.counted("/dir/large") + o.counted("/dir/small"); n != 0 {
				t.Errorf("ls cost %d bodies", n)
			}
			o.breaks(true)
			if _, errno := c.Open(e.NodeId, unix.O_RDONLY); errno != unix.EIO {
				t.Errorf("OPEN while the server breaks off: %v, expected EIO", errno)
			}
			o.breaks(false)
			broken := o.counted("/dir/large")
			for range 2 {
				fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
				if errno != 0 {
					t.Fatal(errno)
				}
				if got, errno := c.Read(e.NodeId, fh, 0, len(o.large)+1); !bytes.Equal(got, o.large) || errno != 0 {
					t.Errorf("READ: %d bytes, %v, expected the file", len(got), errno)
				}
				c.Release(e.NodeId, fh)
			}
			if n := o.counted("/dir/large") - broken; n != 3 {
				t.Errorf("two times cat cost %d requests for ranges, expected 3 for 2.5 MiB, once", n)
			}
			if n := o.counted("/dir/small"); n != 0 {
				t.Errorf("cat of one file cost %d bodies of another", n)
			}
			if got, err := os.ReadFile(filepath.Join(dir, "files/dir/large")); !bytes.Equal(got, o.large) {
				t.Errorf("the host has %d bytes, %v", len(got), err)
			}
			if _, errno := c.Lookup(d.NodeId, "nothing"); errno != unix.ENOENT {
				t.Errorf("LOOKUP of what is not there: %v", errno)
			}
			if err := b.Close(); err != nil {
				t.Error(err)
			}

			// The next one finds what there is.
			b = serve(t, o, dir)
			defer b.Close()
			c = &fsbackendtest.Client{R: fsbackend.Resolve(b)}
			before := o.counted("/dir/large")
			d, _ = c.Lookup(fsbackendtest.Root, "dir")
			e, _ = c.Lookup(d.NodeId, "large")
			if _, errno := c.Open(e.NodeId, unix.O_RDONLY); errno != 0 {
				t.Error(errno)
			}
			if n := o.counted("/dir/large") - before; n != 0 {
				t.Errorf("a second server asked for %d ranges of what is on the disk", n)
			}
		})
	}
}

func TestLoadErrors(t *testing.T) {
	for data, want := range map[string]string{"%%%": "base64", base64.URLEncoding.EncodeToString([]byte("ftp://x")): "expected a URL"} {
		if _, err := (web{}).Load(t.Context(), data, "tmp/x", 0); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, expected %q", data, err, want)
		}
	}
}

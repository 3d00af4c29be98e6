package imagefetch

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quick is a configuration whose limits a test can wait for.
func quick(img *imagetest.Image) Config {
	return Config{
		Reference: img.Ref,
		Platform:  "linux/amd64",
		Registry: registry.Config{
			DockerConfig: "/nonexistent",
			Tries:        3, Backoff: registry.Duration(time.Millisecond), MaxBackoff: registry.Duration(5 * time.Millisecond),
			Timeout: registry.Duration(30 * time.Second), Stall: registry.Duration(10 * time.Second),
		},
		Background: BackgroundConfig{Off: true},
	}
}

// open opens an image with a fetcher of its own, until the test ends.
func open(t *testing.T, cfg Config) *Image {
	t.Helper()
	m, err := NewFetcher(slog.New(slog.NewTextHandler(testWriter{t}, nil))).Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shut(t, m) })
	return m
}

func shut(t *testing.T, m *Image) {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSuffix(p, []byte("\n")))
	return len(p), nil
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func layersOf(t *testing.T, m *Image) []store.Layer {
	t.Helper()
	layers, err := m.Layers(within(t))
	if err != nil {
		t.Fatal(err)
	}
	return layers
}

func entryOf(t *testing.T, m *Image, layer int, path string) store.Entry {
	t.Helper()
	l := layersOf(t, m)[layer]
	i := slices.IndexFunc(l.Entries, func(e store.Entry) bool { return e.Path == path })
	if i < 0 {
		t.Fatalf("layer %d has no %s", layer, path)
	}
	e := l.Entries[i]
	if e.Hardlink {
		return entryOf(t, m, layer, e.Target)
	}
	return e
}

// read reads a file as the serving side does.
func read(t *testing.T, m *Image, layer int, path string) ([]byte, error) {
	t.Helper()
	e := entryOf(t, m, layer, path)
	b := make([]byte, e.Size)
	for _, s := range e.Chunks {
		f, err := m.Chunk(within(t), layer, s.Chunk)
		if err != nil {
			return nil, err
		}
		_, err = io.ReadFull(io.NewSectionReader(f, 0, int64(s.Len)+1), b[s.Off:s.Off+s.Len])
		if fi, statErr := f.Stat(); statErr != nil || fi.Size() != int64(s.Len) {
			t.Errorf("chunk %d of %s has not %d bytes: %v, %v", s.Chunk, path, s.Len, fi, statErr)
		}
		f.Close()
		if err != nil {
			return nil, err
		}
	}
	return b, nil
}

// check reads all files of an image and compares.
func check(t *testing.T, m *Image, img *imagetest.Image) {
	t.Helper()
	for i, l := range img.Layers {
		for _, f := range l.Files {
			if f.Type != 0 || strings.HasSuffix(f.Name, "/") {
				continue
			}
			b, err := read(t, m, i, f.Name)
			if err != nil {
				t.Errorf("%s: %v", f.Name, err)
			} else if !bytes.Equal(b, f.Data) {
				t.Errorf("%s has other content", f.Name)
			}
		}
	}
}

// noise is content that cannot be packed.
func noise(seed uint64, n int) []byte {
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	b := make([]byte, n)
	_, _ = r.Read(b)
	return b
}

// someFiles are a small one, ones of several chunks, and many of few bytes.
func someFiles() []imagetest.File {
	files := []imagetest.File{
		{Name: "etc/"},
		{Name: "etc/hostname", Data: []byte("box\n")},
		{Name: "big", Data: noise(1, 200<<10)},
		{Name: "empty"},
		{Name: "small/"},
	}
	for i := range 20 {
		files = append(files, imagetest.File{Name: fmt.Sprintf("small/%02d", i), Data: noise(uint64(100+i), 500+i)})
	}
	return append(files, imagetest.File{Name: "last", Data: noise(2, 70<<10)})
}

// someLayer is of someFiles, built by the first test that wants it.
var someLayer struct {
	sync.Mutex
	imagetest.Layer
}

// someImage is of that layer, in a registry of its own.
func someImage(t *testing.T) *imagetest.Image {
	t.Helper()
	someLayer.Lock()
	if someLayer.Blob == nil {
		someLayer.Layer = imagetest.Build(t, someFiles(), imagetest.Options{})
	}
	someLayer.Unlock()
	return imagetest.NewServer(t).Push(t, "test/image", someLayer.Layer)
}

func cacheDir(t *testing.T) CacheConfig {
	return CacheConfig{Dir: t.TempDir() + "/cache"}
}

func openFDs(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

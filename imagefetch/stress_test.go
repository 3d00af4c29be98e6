package imagefetch

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

// TestStress has several readers read, while the background fetches, two caches share a directory that is too small, and the registry
// does everything wrong now and then. What is read is right, or an error.
func TestStress(t *testing.T) {
	img := imagetest.NewServer(t).Push(t, "a/b", imagetest.Build(t, someFiles(), imagetest.Options{MinChunkSize: 3000, Prioritized: []string{"big"}}))
	files := img.Layers[0].Files
	cfg := quick(img)
	cfg.Registry.Stall = registry.Duration(100 * time.Millisecond)
	cfg.Cache = cacheDir(t)
	cfg.Cache.Budget, cfg.Cache.MemoryBudget = 450<<10, 64<<10
	cfg.Background = BackgroundConfig{Silence: registry.Duration(time.Millisecond), Batch: 20 << 10}
	images := []*Image{open(t, cfg), open(t, cfg)}
	for _, m := range images {
		layersOf(t, m)
	}
	img.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		body := rec.Body.Bytes()
		switch rand.N(10) {
		case 0:
			rec.Code, body = http.StatusInternalServerError, nil
		case 1:
			rec.Header().Del("Content-Length")
			body = body[:len(body)/2]
		case 2:
			if len(body) > 0 {
				body[rand.N(len(body))] ^= 1 << rand.N(8)
			}
		case 3:
			rec.Header().Set("Content-Range", "bytes 0-99/100")
		case 4:
			panic(http.ErrAbortHandler)
		}
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		_, _ = w.Write(body)
	})
	good, failed := 0, 0
	var mu sync.Mutex
	var all sync.WaitGroup
	for g := range 6 {
		all.Go(func() {
			for range 40 {
				f := files[rand.N(len(files))]
				if strings.HasSuffix(f.Name, "/") {
					continue
				}
				b, err := read(t, images[g%2], 0, f.Name)
				mu.Lock()
				switch {
				case err == nil && bytes.Equal(b, f.Data):
					good++
				case errors.Is(err, store.ErrCorrupt) || errors.Is(err, store.ErrUnavailable):
					failed++
				default:
					t.Errorf("%s: %v, or other content", f.Name, err)
				}
				mu.Unlock()
			}
		})
	}
	all.Wait()
	if good < 50 {
		t.Errorf("%d reads were good, %d failed", good, failed)
	}
	img.Server.SetFault(nil)
	for _, m := range images {
		check(t, m, img)
	}
}

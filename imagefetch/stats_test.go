package imagefetch

import (
	"bytes"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

// only are the counts that are not 0.
func only(m map[string]int64) map[string]int64 {
	m = maps.Clone(m)
	maps.DeleteFunc(m, func(_ string, n int64) bool { return n == 0 })
	return m
}

func TestStats(t *testing.T) {
	img := someImage(t)
	cfg := quick(img)
	cfg.Cache = cacheDir(t)
	cfg.Cache.Budget = 10 << 20
	m := open(t, cfg)
	if s := m.Stats(); s.Size != 0 || s.CacheBudget != 10<<20 {
		t.Errorf("before it is open: %+v", s)
	}
	layersOf(t, m)
	for range 3 {
		if _, err := read(t, m, 0, "last"); err != nil { // two chunks, of 70 KiB
			t.Fatal(err)
		}
	}
	gets, sent := img.Server.Blobs()
	s := m.Stats()
	if s.Size != int64(len(img.Layers[0].Blob)) || s.Fetched < 70<<10 || s.Fetched >= s.Size || s.Requests != int64(gets) || s.Bytes != sent {
		t.Errorf("of the layers: %+v, and the registry has had %d requests of %d bytes", s, gets, sent)
	}
	if s.Misses != 2 || s.MissBytes != 70<<10 || s.Hits != 4 || s.HitBytes != 140<<10 || s.Verified != 2 || s.Corrupt != 0 {
		t.Errorf("of chunks: %+v", s)
	}
	if s.CacheBytes < 70<<10 || s.CacheBytes > s.CacheBudget || len(only(s.FetchErrors)) != 0 || len(only(s.ReadErrors)) != 0 {
		t.Errorf("of the cache and of errors: %+v", s)
	}

	// In memory it is the same.
	cfg.Cache = CacheConfig{MemoryBudget: 1 << 20}
	memory := open(t, cfg)
	if _, err := read(t, memory, 0, "last"); err != nil {
		t.Fatal(err)
	}
	if s := memory.Stats(); s.CacheBytes < 70<<10 || s.CacheBudget != 1<<20 {
		t.Errorf("in memory: %+v", s)
	}

	// A layer that is fetched whole.
	cfg.Reference, cfg.Fallback = img.Server.Push(t, "plain/image", imagetest.Build(t, someFiles(), imagetest.Options{Format: imagetest.PlainGzip})).Ref, "pull"
	plain := open(t, cfg)
	layersOf(t, plain)
	if s := plain.Stats(); s.Verified == 0 || s.Corrupt != 0 || s.Fetched != s.Size {
		t.Errorf("of a layer that is fetched whole: %+v", s)
	}
}

// TestFailureCounts is of attempts that come to nothing, by why.
func TestFailureCounts(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fault fault
		want  map[string]int64
		read  error
	}{
		{"404", ofBlobs(-1, status(404)), map[string]int64{"status_4xx": 1}, store.ErrUnavailable},
		{"500 twice", ofBlobs(2, status(500)), map[string]int64{"status_5xx": 2}, nil},
		{"reset", ofBlobs(1, reset), map[string]int64{"network": 1}, nil},
		{"stall", ofBlobs(1, hang), map[string]int64{"stalled": 1}, nil},
		{"another range", ofBlobs(1, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			r.Header.Set("Range", "bytes=0-1000")
			next.ServeHTTP(w, r)
		}), map[string]int64{"protocol": 1}, nil},
		{"another content", ofBlobs(-1, changed(func(rec *httptest.ResponseRecorder) { clear(rec.Body.Bytes()) })), map[string]int64{"content": 1}, store.ErrCorrupt},
		{"slow", ofBlobs(-1, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			w.Header().Set("Content-Range", r.Header.Get("Range"))
			<-r.Context().Done()
		}), map[string]int64{"timeout": 1}, store.ErrUnavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			img := someImage(t)
			cfg := quick(img)
			cfg.Registry.Stall = registry.Duration(300 * time.Millisecond)
			if tt.name == "slow" {
				cfg.Registry.Timeout, cfg.Registry.Stall = registry.Duration(300*time.Millisecond), registry.Duration(10*time.Second)
			}
			m := open(t, cfg)
			e := entryOf(t, m, 0, "last")
			img.Server.SetFault(tt.fault)
			f, err := m.Chunk(within(t), 0, e.Chunks[0].Chunk)
			if err == nil {
				f.Close()
			}
			if !errors.Is(err, tt.read) {
				t.Errorf("the chunk is %v, expected %v", err, tt.read)
			}
			s := m.Stats()
			if got := only(s.FetchErrors); !maps.Equal(got, tt.want) {
				t.Errorf("it counts %v, expected %v", got, tt.want)
			}
			want := map[error]map[string]int64{nil: {}, store.ErrCorrupt: {"corrupt": 1}, store.ErrUnavailable: {"unavailable": 1}}[tt.read]
			if got := only(s.ReadErrors); !maps.Equal(got, want) {
				t.Errorf("of reads it counts %v, expected %v", got, want)
			}
		})
	}
	// What the background gives up for somebody is none.
	img := someImage(t)
	cfg := quick(img)
	cfg.Background = BackgroundConfig{Silence: registry.Duration(time.Millisecond), Batch: 1}
	asked := make(chan struct{}, 100)
	img.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		asked <- struct{}{}
		select {
		case <-r.Context().Done():
		case <-time.After(20 * time.Millisecond):
			next.ServeHTTP(w, r)
		}
	})
	m := open(t, cfg)
	layersOf(t, m)
	<-asked
	if b, err := read(t, m, 0, "last"); err != nil || !bytes.Equal(b, img.Layers[0].Files[len(img.Layers[0].Files)-1].Data) {
		t.Error(err)
	}
	if s := m.Stats(); len(only(s.FetchErrors)) > 0 {
		t.Errorf("it counts %v", s.FetchErrors)
	}
}

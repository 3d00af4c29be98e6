package imagefetch

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

// TestPrefetch is T-D5: what the landmark says is fetched at once, and no more.
func TestPrefetch(t *testing.T) {
	prioritized := []string{"etc/hostname", "big", "small/07"}
	for _, tt := range []struct {
		name string
		o    imagetest.Options
		cfg  PrefetchConfig
		want func(l *layer) int64 // bytes that are fetched at once
		free []string             // files that cost nothing after that
	}{
		{"landmark", imagetest.Options{Prioritized: prioritized}, PrefetchConfig{}, func(l *layer) int64 { return l.landmark - l.streams[0].off }, prioritized},
		{"landmark, and another size", imagetest.Options{Prioritized: prioritized}, PrefetchConfig{Size: 1}, func(l *layer) int64 { return l.landmark - l.streams[0].off }, prioritized},
		{"landmark, off", imagetest.Options{Prioritized: prioritized}, PrefetchConfig{Off: true}, func(*layer) int64 { return 0 }, nil},
		{"against it", imagetest.Options{}, PrefetchConfig{Size: 1 << 20}, func(*layer) int64 { return 0 }, nil},
		{"no landmark", imagetest.Options{NoLandmark: true}, PrefetchConfig{}, func(*layer) int64 { return 0 }, nil},
		{"size", imagetest.Options{NoLandmark: true}, PrefetchConfig{Size: 150 << 10}, func(l *layer) int64 {
			n := int64(0)
			for _, s := range l.streams {
				if s.end <= 150<<10 {
					n += s.end - s.off
				}
			}
			return n
		}, []string{"etc/hostname"}},
		{"size of more than there is", imagetest.Options{NoLandmark: true}, PrefetchConfig{Size: 1 << 30}, func(l *layer) int64 {
			return l.streams[len(l.streams)-1].end - l.streams[0].off
		}, prioritized},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := imagetest.NewServer(t).Push(t, "a/b", imagetest.Build(t, someFiles(), tt.o))
			cfg := quick(img)
			cfg.Prefetch = tt.cfg
			m := open(t, cfg)
			if err := m.Prefetched(within(t)); err != nil {
				t.Fatal(err)
			}
			<-m.prefetched
			fetched := int64(0)
			for _, r := range img.Server.Requests()[3:] { // after the manifest, the footer and the table of contents
				fetched += r.Bytes
			}
			if want := tt.want(m.layers[0]); fetched != want {
				t.Errorf("%d bytes were fetched at once, expected %d", fetched, want)
			}
			img.Server.Reset()
			for _, name := range tt.free {
				if _, err := read(t, m, 0, name); err != nil {
					t.Error(err)
				}
			}
			if n := len(img.Server.Requests()); n != 0 {
				t.Errorf("what was prefetched took %d requests", n)
			}
			check(t, m, img)
		})
	}
}

// TestPrefetchedWaits is the rest of T-D5: for how long it is waited.
func TestPrefetchedWaits(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cfg   PrefetchConfig
		waits bool
	}{
		{"until it is done", PrefetchConfig{}, true},
		{"for a time", PrefetchConfig{Timeout: registry.Duration(20 * time.Millisecond)}, false},
		{"not for much", PrefetchConfig{AsyncSize: 1000}, false},
		{"for little", PrefetchConfig{AsyncSize: 1 << 30}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := imagetest.NewServer(t).Push(t, "a/b", imagetest.Build(t, someFiles(), imagetest.Options{Prioritized: []string{"big"}}))
			cfg := quick(img)
			cfg.Registry.Stall = registry.Duration(5 * time.Second)
			cfg.Prefetch = tt.cfg
			m := open(t, cfg)
			release := make(chan struct{})
			var count atomic.Int64
			img.Server.SetFault(ofBlobs(-1, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if count.Add(1) > 2 {
					<-release
				}
				next.ServeHTTP(w, r)
			}))
			done := make(chan error, 1)
			go func() { done <- m.Prefetched(context.Background()) }()
			if tt.waits {
				select {
				case err := <-done:
					t.Errorf("it was not waited for: %v", err)
				case <-time.After(50 * time.Millisecond):
				}
				close(release)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if !tt.waits {
				select {
				case <-m.prefetched:
					t.Error("it was waited for")
				default:
				}
				close(release)
			}
		})
	}
}

// throttled makes blobs come slowly, and notes when they are asked for.
type throttled struct {
	mu     sync.Mutex
	starts []time.Time
}

func (th *throttled) fault(w http.ResponseWriter, r *http.Request, next http.Handler) {
	if strings.Contains(r.URL.Path, "/blobs/") {
		th.mu.Lock()
		th.starts = append(th.starts, time.Now())
		th.mu.Unlock()
		select {
		case <-time.After(10 * time.Millisecond):
		case <-r.Context().Done():
		}
	}
	next.ServeHTTP(w, r)
}

// TestBackgroundYields is T-D6: nothing is fetched in the background while something is asked for, nor for a time after.
func TestBackgroundYields(t *testing.T) {
	const silence = 150 * time.Millisecond
	files := []imagetest.File{}
	for i := range 40 {
		files = append(files, imagetest.File{Name: fmt.Sprintf("f%02d", i), Data: noise(uint64(i), 30<<10)})
	}
	img := imagetest.New(t, files)
	cfg := quick(img)
	cfg.Cache = cacheDir(t)
	cfg.Background = BackgroundConfig{Silence: registry.Duration(silence), Batch: 32 << 10}
	var th throttled
	img.Server.SetFault(th.fault)
	m := open(t, cfg)
	layersOf(t, m)
	waitFor(t, func() bool { st, _ := m.Status(within(t), 0); return st.Fetched > 60<<10 })

	// Read what is not there, from the end.
	var ended time.Time
	th.mu.Lock()
	th.starts = nil
	th.mu.Unlock()
	reads := 0
	for i := 39; i > 34; i-- {
		if _, err := read(t, m, 0, fmt.Sprintf("f%02d", i)); err != nil {
			t.Fatal(err)
		}
		reads++
		ended = time.Now()
	}
	th.mu.Lock()
	during := len(th.starts)
	th.mu.Unlock()
	// One that had begun when the first read came may still have been counted.
	if during > reads+cfg.withDefaults().Background.Concurrency {
		t.Errorf("while there were %d reads, blobs were asked for %d times", reads, during)
	}
	waitFor(t, func() bool { st, _ := m.Status(within(t), 0); return st.Fetched == st.Size })
	th.mu.Lock()
	defer th.mu.Unlock()
	for _, s := range th.starts {
		if d := s.Sub(ended); d > 0 && d < silence-5*time.Millisecond {
			t.Errorf("the background asked %v after the last read", d)
		}
	}
	if len(th.starts) <= during {
		t.Error("the background did not go on")
	}
	img.Server.Close() // T-D8: everything is here
	check(t, m, img)
}

// waitFor waits until something is so.
func waitFor(t *testing.T, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it did not come to that in a minute")
		}
	}
}

// TestBackgroundMonotonic has the status rise to all of it while corrupt and failing requests come between.
func TestBackgroundMonotonic(t *testing.T) {
	img := someImage(t)
	cfg := quick(img)
	cfg.Background = BackgroundConfig{Silence: registry.Duration(time.Millisecond), Batch: 32 << 10}
	var n atomic.Int64
	img.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if strings.Contains(r.URL.Path, "/blobs/") && n.Add(1)%3 == 0 {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		next.ServeHTTP(w, r)
	})
	m := open(t, cfg)
	last := int64(0)
	waitFor(t, func() bool {
		st, err := m.Status(within(t), 0)
		if err != nil {
			return false // the table of contents may need another try, too
		}
		if st.Fetched < last {
			t.Fatalf("fetched fell from %d to %d", last, st.Fetched)
		}
		last = st.Fetched
		return st.Fetched == st.Size
	})
	check(t, m, img)
}

// TestBackgroundGoesOn has a chunk that is always wrong: all others come, of its layer and of the next.
func TestBackgroundGoesOn(t *testing.T) {
	l := imagetest.Build(t, someFiles(), imagetest.Options{})
	next := imagetest.Build(t, []imagetest.File{{Name: "other", Data: noise(9, 100<<10)}}, imagetest.Options{})
	img := imagetest.NewServer(t).Push(t, "a/b", l, next)
	cfg := quick(img)
	m := open(t, cfg)
	st := m.layers0(t).streams[m.layers0(t).at[entryOf(t, m, 0, "big").Chunks[1].Chunk].stream]
	bad := bytes.Clone(l.Blob)
	bad[(st.off+st.end)/2] ^= 1
	img.Server.SetBlob(l.Digest, bad)
	cfg.Background = BackgroundConfig{Silence: registry.Duration(time.Millisecond)}
	m = open(t, cfg)
	waitFor(t, func() bool {
		first, err := m.Status(within(t), 0)
		second, err2 := m.Status(within(t), 1)
		return err == nil && err2 == nil && second.Fetched == second.Size && first.Err != "" && m.layers[0].lacks() == 1
	})
}

func (l *layer) lacks() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.missing
}

// TestBandwidth has prefetching and the background, several tasks each, take what they may together: within 10 % in every two seconds
// of the fake clock, from the first on, and in sum.
func TestBandwidth(t *testing.T) {
	// A file's bytes come at once, so that the cap is all that takes time.
	l := imagetest.Build(t, []imagetest.File{{Name: "first", Data: noise(5, 3<<20)}, {Name: "second", Data: noise(6, 5<<20)}}, imagetest.Options{
		Prioritized: []string{"first"},
	})
	blob := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(blob, l.Blob, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		rate        int64
		concurrency int
	}{{1 << 20, 1}, {1 << 20, 2}, {700_000, 8}, {300 << 10, 2}, {40 << 10, 3}} {
		t.Run(fmt.Sprintf("%d bytes by %d", tt.rate, tt.concurrency), func(t *testing.T) {
			dir := cacheDir(t)
			synctest.Test(t, func(t *testing.T) {
				m := open(t, Config{
					Reference: "file=" + blob, TOCDigest: l.TOCDigest, Cache: dir, Bandwidth: tt.rate,
					Background: BackgroundConfig{Concurrency: tt.concurrency},
				})
				layersOf(t, m)
				start := time.Now()
				counts := []int64{0}
				for {
					time.Sleep(2 * time.Second)
					synctest.Wait()
					st, err := m.Status(t.Context(), 0)
					if err != nil {
						t.Fatal(err)
					}
					if st.Fetched == st.Size {
						break
					}
					counts = append(counts, st.Fetched)
				}
				// A chunk counts when all of it is there.
				slack := float64(tt.concurrency * (64<<10 + 1<<10))
				for i, n := range counts[1:] {
					if got, want := float64(n-counts[i]), 2*float64(tt.rate); got > 1.1*want+slack || got < 0.9*want-slack {
						t.Errorf("%.0f bytes came in the seconds %d and %d, expected %.0f", got, 2*i, 2*i+1, want)
					}
				}
				last := counts[len(counts)-1]
				if got := float64(last) / (2 * float64(len(counts)-1)); got > 1.02*float64(tt.rate) || got < 0.98*float64(tt.rate)-slack/2/float64(len(counts)-1) {
					t.Errorf("%.0f bytes a second came in %v, expected %d", got, time.Since(start), tt.rate)
				}
			})
		})
	}
}

// TestBandwidthOfRegistry is the same with a network and a real clock: what a registry sends, not what is read of it.
func TestBandwidthOfRegistry(t *testing.T) {
	t.Parallel()
	img := imagetest.New(t, []imagetest.File{{Name: "big", Data: noise(5, 3<<20)}})
	cfg := quick(img)
	cfg.Bandwidth = 1 << 20
	cfg.Background = BackgroundConfig{Silence: registry.Duration(time.Millisecond)}
	m := open(t, cfg)
	layersOf(t, m)
	img.Server.Reset()
	start := time.Now()
	time.Sleep(1500 * time.Millisecond)
	_, n := img.Server.Blobs()
	took := time.Since(start)
	// How much less comes is the machine's matter, and on a busy one the clock of who sends is not this one.
	if rate := float64(n) / took.Seconds(); rate > 1.3*float64(cfg.Bandwidth) || n == 0 {
		t.Errorf("%.0f bytes a second came, expected %d at most", rate, cfg.Bandwidth)
	}
}

// TestBatches has what lies side by side in a layer be asked for at once, at most so much of it, by prefetching and by the background, and
// by as many at once as may.
func TestBatches(t *testing.T) {
	const batch = 1 << 20 // the default
	for _, prefetch := range []int64{0, 1 << 30} {
		t.Run(fmt.Sprintf("prefetch %d", prefetch), func(t *testing.T) {
			img := imagetest.New(t, []imagetest.File{{Name: "big", Data: noise(5, 5<<20)}, {Name: "more", Data: noise(6, 500<<10)}})
			if prefetch > 0 {
				img = img.Server.Push(t, "a/b", imagetest.Build(t, img.Layers[0].Files, imagetest.Options{NoLandmark: true}))
			}
			cfg := quick(img)
			cfg.Prefetch.Size = prefetch
			cfg.Background = BackgroundConfig{Off: prefetch > 0, Concurrency: 3}
			var now, most atomic.Int64
			img.Server.SetFault(ofBlobs(-1, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				n := now.Add(1)
				for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
				}
				time.Sleep(5 * time.Millisecond) // the others could come now
				next.ServeHTTP(w, r)
				now.Add(-1)
			}))
			m := open(t, cfg)
			l := m.layers0(t)
			waitFor(t, func() bool { return l.lacks() == 0 })
			// Each begins where the one before ends, and ends where the next chunk would be too much.
			at, requests := l.streams[0].off, img.Server.Requests()[3:]
			slices.SortFunc(requests, func(a, b imagetest.Request) int { return int(rangeOf(t, a).Off - rangeOf(t, b).Off) })
			for _, r := range requests {
				got, end := rangeOf(t, r), at
				for _, s := range l.streams {
					if s.off >= at && s.end-at <= batch {
						end = s.end
					}
				}
				if got.Off != at || got.Off+got.Len != end {
					t.Errorf("%d bytes at %d were asked for, expected %d at %d", got.Len, got.Off, end-at, at)
				}
				at = got.Off + got.Len
			}
			if end := l.streams[len(l.streams)-1].end; at != end {
				t.Errorf("requests end at %d, expected %d", at, end)
			}
			if n := most.Load(); n != 3 {
				t.Errorf("there were %d requests at once, expected 3", n)
			}
		})
	}
}

// rangeOf is the one range of a request.
func rangeOf(t *testing.T, r imagetest.Request) registry.Range {
	t.Helper()
	var first, last int64
	if _, err := fmt.Sscanf(r.Range, "bytes=%d-%d", &first, &last); err != nil || strings.Contains(r.Range, ",") {
		t.Fatalf("the range %q: %v", r.Range, err)
	}
	return registry.Range{Off: first, Len: last + 1 - first}
}

// TestLimiter is of the cap alone: the first bytes are as slow as the others, what was not used is lost but for a moment's, a timer
// that is late costs nothing, and who is waited for does not wait.
func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := limiter{rate: 1 << 20}
		pass := func(bytes int) time.Duration {
			start := time.Now()
			for ; bytes > 0; bytes -= 16 << 10 {
				if err := l.wait(t.Context(), 16<<10, nil); err != nil {
					t.Fatal(err)
				}
			}
			return time.Since(start)
		}
		if took := pass(1 << 20); took < time.Second-burst-time.Millisecond || took > time.Second {
			t.Errorf("a second's bytes passed in %v", took)
		}
		time.Sleep(burst / 2)
		if took := pass(1 << 20); took < time.Second-burst/2-time.Millisecond || took > time.Second-burst/2+time.Millisecond {
			t.Errorf("after half a burst of nothing, a second's bytes passed in %v", took)
		}
		time.Sleep(time.Hour)
		if took := pass(1 << 20); took < time.Second-burst-time.Millisecond || took > time.Second {
			t.Errorf("after an hour of nothing, a second's bytes passed in %v", took)
		}
		hurry := make(chan struct{})
		close(hurry)
		start := time.Now()
		if err := l.wait(t.Context(), 1<<20, hurry); err != nil || time.Since(start) != 0 {
			t.Errorf("who is waited for waits %v, %v", time.Since(start), err)
		}
		// That is the others' loss.
		if took := pass(16 << 10); took < time.Second {
			t.Errorf("after a second's bytes in a hurry, others passed in %v", took)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errClosed)
		if err := l.wait(ctx, 1<<20, nil); !errors.Is(err, errClosed) {
			t.Errorf("who may not wait: %v", err)
		}
	})
}

// TestReaderHurries has a read wait for bytes that are on their way slowly.
func TestReaderHurries(t *testing.T) {
	img := imagetest.NewServer(t).Push(t, "a/b", imagetest.Build(t, someFiles(), imagetest.Options{Prioritized: []string{"big"}}))
	cfg := quick(img)
	cfg.Bandwidth = 1 << 10 // 5 min for what is prefetched
	m := open(t, cfg)
	layersOf(t, m)
	start := time.Now()
	if _, err := read(t, m, 0, "big"); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("reading took %v, as slow as prefetching", took)
	}
}

// TestReach is D9's question whether the rest can be had: a byte of each layer that is not whole says so.
func TestReach(t *testing.T) {
	img := imagetest.New(t, someFiles()[:2], someFiles())
	cfg := quick(img)
	cfg.Cache = cacheDir(t)
	cfg.Registry.Timeout = registry.Duration(time.Second)
	m := open(t, cfg)
	if _, err := read(t, m, 0, "etc/hostname"); err != nil { // all of the first layer
		t.Fatal(err)
	}
	img.Server.Reset()
	if err := m.Reach(within(t)); err != nil {
		t.Error(err)
	}
	reqs := img.Server.Requests()
	if len(reqs) != 1 || reqs[0].Range != byteRange(0, 1) || !strings.HasSuffix(reqs[0].Path, img.Layers[1].Digest) {
		t.Errorf("it asked for %+v, expected a byte of the second layer", reqs)
	}
	img.Server.SetFault(ofBlobs(-1, status(500)))
	if err := m.Reach(within(t)); err == nil || !strings.Contains(err.Error(), "status 500") || !strings.Contains(err.Error(), img.Layers[1].Digest) {
		t.Errorf("where the registry fails: %v", err)
	}
	img.Server.SetFault(ofBlobs(-1, hang))
	start := time.Now()
	if err := m.Reach(within(t)); err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("where it hangs: %v after %v", err, time.Since(start))
	}
	img.Server.SetFault(nil)
	check(t, m, img)
	img.Server.Close()
	if err := m.Reach(within(t)); err != nil {
		t.Errorf("where everything is here: %v", err)
	}
}

// TestSingleflight is T-D13: who asks for what is on its way waits for it.
func TestSingleflight(t *testing.T) {
	img := someImage(t)
	cfg := quick(img)
	cfg.Cache = cacheDir(t)
	// Two fetchers are as two processes: all that they share is the directory.
	images := []*Image{open(t, cfg), open(t, cfg)}
	e := entryOf(t, images[0], 0, "last")
	layersOf(t, images[1])
	img.Server.Reset()
	asked := make(chan struct{}, 100)
	release := make(chan struct{})
	img.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		asked <- struct{}{}
		<-release
		next.ServeHTTP(w, r)
	})
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			f, err := images[i%2].Chunk(context.Background(), 0, e.Chunks[0].Chunk)
			if err != nil {
				t.Error(err)
				return
			}
			f.Close()
		})
	}
	<-asked
	time.Sleep(20 * time.Millisecond) // the others could ask now if they would
	close(release)
	all.Wait()
	if gets, _ := img.Server.Blobs(); gets != 1 {
		t.Errorf("20 readers of one chunk asked %d times", gets)
	}
}

// TestLeaderGivesUp has the one who fetches go while others wait.
func TestLeaderGivesUp(t *testing.T) {
	img := someImage(t)
	cfg := quick(img)
	cfg.Registry.Stall = registry.Duration(5 * time.Second)
	m := open(t, cfg)
	e := entryOf(t, m, 0, "last")
	asked := make(chan struct{}, 100)
	img.Server.SetFault(ofBlobs(1, func(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
		asked <- struct{}{}
		<-r.Context().Done()
	}))
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := m.Chunk(ctx, 0, e.Chunks[0].Chunk)
		first <- err
	}()
	<-asked
	second := make(chan error, 1)
	go func() {
		f, err := m.Chunk(context.Background(), 0, e.Chunks[0].Chunk)
		if err == nil {
			f.Close()
		}
		second <- err
	}()
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v", err)
	}
	if err := <-second; err != nil {
		t.Errorf("the second: %v", err)
	}
}

// TestOffline is T-D8: what was fetched is there after a restart, without a registry; what was not is an error, in time.
func TestOffline(t *testing.T) {
	for _, byTag := range []bool{false, true} {
		t.Run(fmt.Sprintf("by tag %v", byTag), func(t *testing.T) {
			img := someImage(t)
			cfg := quick(img)
			if byTag {
				cfg.Reference = img.Tag
			}
			cfg.Cache = cacheDir(t)
			first := open(t, cfg)
			if _, err := read(t, first, 0, "big"); err != nil {
				t.Fatal(err)
			}
			shut(t, first)
			img.Server.Close()
			m := open(t, cfg)
			if b, err := read(t, m, 0, "big"); err != nil || !bytes.Equal(b, img.Layers[0].Files[2].Data) {
				t.Errorf("what was fetched before: %v", err)
			}
			start := time.Now()
			if _, err := read(t, m, 0, "last"); !errors.Is(err, store.ErrUnavailable) {
				t.Errorf("what was not: %v", err)
			}
			if took := time.Since(start); took > time.Duration(cfg.Registry.Timeout) {
				t.Errorf("that took %v", took)
			}
			if st, err := m.Status(within(t), 0); err != nil || st.Err == "" {
				t.Errorf("the status is %+v, %v", st, err)
			}
		})
	}
}

// TestRefused is T-D4: a layer without a table of contents that can be trusted is an error, or fetched whole.
func TestRefused(t *testing.T) {
	good := imagetest.Build(t, someFiles(), imagetest.Options{})
	other := imagetest.Build(t, someFiles()[:3], imagetest.Options{})
	wrong := good
	wrong.Annotations = other.Annotations
	for _, tt := range []struct {
		name  string
		layer imagetest.Layer
		says  string
	}{
		{"wrong digest", wrong, "not what the manifest says"},
		{"no annotation", imagetest.Build(t, someFiles(), imagetest.Options{NoAnnotation: true}), "it has no table of contents"},
		{"gzip", imagetest.Build(t, someFiles(), imagetest.Options{Format: imagetest.PlainGzip}), "it has no table of contents"},
		{"zstd", imagetest.Build(t, someFiles(), imagetest.Options{Format: imagetest.PlainZstd}), "it has no table of contents"},
		{"tar", imagetest.Build(t, someFiles(), imagetest.Options{Format: imagetest.PlainTar}), "it has no table of contents"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			img := imagetest.NewServer(t).Push(t, "a/b", good, tt.layer)
			cfg := quick(img)
			cfg.Cache = cacheDir(t)
			if _, err := open(t, cfg).Layers(within(t)); err == nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "fallback=pull") {
				t.Errorf("opened: %v; expected %q", err, tt.says)
			}
			cfg.Fallback = "pull"
			m := open(t, cfg)
			layersOf(t, m)
			check(t, m, img)
			if st, err := m.Status(within(t), 1); err != nil || st.Fetched != st.Size {
				t.Errorf("the status is %+v, %v", st, err)
			}
			if tt.name != "gzip" {
				return
			}
			shut(t, m)
			img.Server.Reset()
			again := open(t, cfg)
			layersOf(t, again)
			check(t, again, img)
			if n := len(img.Server.Requests()); n > 0 {
				t.Errorf("what was fetched whole was asked for %d times after a restart", n)
			}
			shut(t, again)
			// A chunk that is not there any more is got by fetching it all again.
			if list, _ := filepath.Glob(cfg.Cache.Dir + "/chunks/*/*"); len(list) == 0 {
				t.Error("the cache is empty")
			} else {
				for _, name := range list {
					if err := os.Remove(name); err != nil {
						t.Fatal(err)
					}
				}
			}
			check(t, open(t, cfg), img)
			// Its digest is what it is verified by.
			bad := bytes.Clone(tt.layer.Blob)
			bad[len(bad)/2] ^= 1
			img.Server.SetBlob(tt.layer.Digest, bad)
			cfg.Cache = CacheConfig{}
			if _, err := open(t, cfg).Layers(within(t)); err == nil {
				t.Error("a layer with a wrong bit has been opened")
			}
		})
	}
	t.Run("too large", func(t *testing.T) {
		img := imagetest.NewServer(t).Push(t, "a/b", imagetest.Build(t, []imagetest.File{{Name: "zeros", Data: make([]byte, 4<<20)}}, imagetest.Options{Format: imagetest.PlainGzip}))
		cfg := quick(img)
		cfg.Fallback, cfg.Cache.MemoryBudget = "pull", 1<<20
		if _, err := open(t, cfg).Layers(within(t)); err == nil || !strings.Contains(err.Error(), "unpacks to more") {
			t.Errorf("opened: %v", err)
		}
	})
}

// TestPullResumes has a layer that is fetched whole break off again and again.
func TestPullResumes(t *testing.T) {
	l := imagetest.Build(t, someFiles(), imagetest.Options{Format: imagetest.PlainGzip})
	img := imagetest.NewServer(t).Push(t, "a/b", l)
	img.Server.SetFault(ofBlobs(-1, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		cut := &cutWriter{ResponseWriter: w, left: 100 << 10}
		next.ServeHTTP(cut, r)
	}))
	cfg := quick(img)
	cfg.Fallback = "pull"
	check(t, open(t, cfg), img)
	if gets, n := img.Server.Blobs(); gets < 3 || n > int64(len(l.Blob))+1000 {
		t.Errorf("%d GETs of %d bytes, expected each byte once", gets, n)
	}
}

// cutWriter ends the connection after so many bytes.
type cutWriter struct {
	http.ResponseWriter
	left int
}

func (c *cutWriter) Write(p []byte) (int, error) {
	if len(p) > c.left {
		_, _ = c.ResponseWriter.Write(p[:c.left])
		_ = http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	c.left -= len(p)
	return c.ResponseWriter.Write(p)
}

func (c *cutWriter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// TestTrace has what was opened first prefetched the next time, with several ranges in a request, whether or not the registry likes that.
func TestTrace(t *testing.T) {
	img := someImage(t)
	dir := t.TempDir()
	cfg := quick(img)
	cfg.Trace = filepath.Join(dir, "trace")
	m := open(t, cfg)
	layersOf(t, m)
	opened := []string{"small/11", "last", "small/03", "small/11", "small/07"}
	for _, name := range opened {
		m.Note(0, name)
	}
	m.Note(5, "no layer")
	shut(t, m)
	f, err := os.Open(cfg.Trace)
	if err != nil {
		t.Fatal(err)
	}
	list, err := PrefetchList(f)
	f.Close()
	var paths []string
	for _, e := range list {
		paths = append(paths, e.Path)
	}
	if err != nil || strings.Join(paths, " ") != "small/11 last small/03 small/07" {
		t.Fatalf("the list is %v, %v", paths, err)
	}
	for _, tt := range []struct {
		name     string
		fault    fault
		requests int
	}{
		{"several ranges", nil, 1},
		{"400 for several ranges", func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			if strings.Contains(r.Header.Get("Range"), ",") {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			next.ServeHTTP(w, r)
		}, 5},
		{"the first of several ranges", func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			first, _, _ := strings.Cut(r.Header.Get("Range"), ",")
			if first != "" {
				r.Header.Set("Range", first)
			}
			next.ServeHTTP(w, r)
		}, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := quick(img)
			cfg.Prefetch.List = filepath.Join(dir, "trace")
			img.Server.SetFault(tt.fault)
			img.Server.Reset()
			m := open(t, cfg)
			if err := m.Prefetched(within(t)); err != nil {
				t.Fatal(err)
			}
			if n := len(img.Server.Requests()) - 3; n != tt.requests {
				t.Errorf("prefetching took %d requests, expected %d: %+v", n, tt.requests, img.Server.Requests()[3:])
			}
			img.Server.Reset()
			for _, name := range paths {
				if _, err := read(t, m, 0, name); err != nil {
					t.Error(err)
				}
			}
			if n := len(img.Server.Requests()); n != 0 {
				t.Errorf("what was prefetched took %d requests", n)
			}
			check(t, m, img)
		})
	}
}

// TestEntries compares what a layer says of its files with the tar that it was made of, in all formats.
func TestEntries(t *testing.T) {
	when := time.Date(2021, 2, 3, 4, 5, 6, 0, time.UTC)
	files := []imagetest.File{
		{Name: "d/", Mode: 0o1777, UID: 3, GID: 4},
		{Name: "d/suid", Mode: 0o4755, Data: []byte("x"), ModTime: when, Xattrs: map[string]string{"security.capability": "\x01\x00\x00\x02", "user.b": "2", "user.a": "1"}},
		{Name: "d/link", Type: tar.TypeSymlink, Link: "../somewhere/else", Mode: 0o777},
		{Name: "d/hard", Type: tar.TypeLink, Link: "d/suid"},
		{Name: "d/hard2", Type: tar.TypeLink, Link: "d/hard"},
		{Name: "d/fifo", Type: tar.TypeFifo},
		{Name: "d/char", Type: tar.TypeChar, Major: 1, Minor: 3},
		{Name: "d/block", Type: tar.TypeBlock, Major: 8, Minor: 300},
		{Name: "d/.wh.gone"},
		{Name: "d/.wh..wh..opq"},
		{Name: strings.Repeat("ü", 100) + "/" + strings.Repeat("n", 255), Data: []byte("y")},
		{Name: "zeros", Data: make([]byte, 5<<20)},
	}
	for _, o := range []imagetest.Options{{}, {MinChunkSize: 1 << 20}, {Format: imagetest.ZstdChunked}, {Format: imagetest.PlainGzip}} {
		t.Run(fmt.Sprint(o.Format, o.MinChunkSize), func(t *testing.T) {
			img := imagetest.NewServer(t).Push(t, "a/b", imagetest.Build(t, files, o))
			cfg := quick(img)
			cfg.Fallback = "pull"
			m := open(t, cfg)
			l := layersOf(t, m)[0]
			by := map[string]store.Entry{}
			for _, e := range l.Entries {
				by[e.Path] = e
			}
			if len(by) != len(files) {
				t.Errorf("%d entries, expected %d: %v", len(by), len(files), by)
			}
			if e := by["d/suid"]; e.Mode != unix.S_IFREG|0o4755 || e.MtimeSec != when.Unix() || e.Size != 1 || len(e.Xattrs) != 3 ||
				e.Xattrs[0].Name != "security.capability" || string(e.Xattrs[0].Value) != "\x01\x00\x00\x02" || e.Xattrs[1].Name != "user.a" {
				t.Errorf("d/suid is %+v", e)
			}
			if e := by["d"]; e.Mode != unix.S_IFDIR|0o1777 || e.UID != 3 || e.GID != 4 {
				t.Errorf("d is %+v", e)
			}
			if e := by["d/link"]; e.Mode&unix.S_IFMT != unix.S_IFLNK || e.Target != "../somewhere/else" {
				t.Errorf("d/link is %+v", e)
			}
			for _, name := range []string{"d/hard", "d/hard2"} {
				if e := by[name]; !e.Hardlink || e.Target != "d/suid" {
					t.Errorf("%s is %+v", name, e)
				}
			}
			for name, want := range map[string]struct{ mode, major, minor uint32 }{
				"d/fifo": {unix.S_IFIFO, 0, 0}, "d/char": {unix.S_IFCHR, 1, 3}, "d/block": {unix.S_IFBLK, 8, 300}, "d/.wh.gone": {unix.S_IFREG, 0, 0},
			} {
				if e := by[name]; e.Mode&unix.S_IFMT != want.mode || e.RdevMajor != want.major || e.RdevMinor != want.minor {
					t.Errorf("%s is %+v", name, e)
				}
			}
			if _, err := store.EncodeMeta([]store.Layer{l}); err != nil {
				t.Error(err)
			}
			check(t, m, img)
		})
	}
}

// TestOneLayer is of layers that are not an image's.
func TestOneLayer(t *testing.T) {
	img := imagetest.New(t, someFiles()[:5], someFiles())
	l := img.Layers[1]
	file := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(file, l.Blob, 0o600); err != nil {
		t.Fatal(err)
	}
	url := img.Server.URL + "/v2/test/image/blobs/" + l.Digest
	for _, tt := range []struct {
		name string
		cfg  func(c *Config)
		want string
	}{
		{"of an image", func(c *Config) { c.Layer = l.Digest }, ""},
		{"that the image has not", func(c *Config) { c.Layer = registry.DigestOf(nil) }, "has no layer"},
		{"in a file", func(c *Config) { c.Reference, c.TOCDigest = "file="+file, l.TOCDigest }, ""},
		{"in a file, taken for right", func(c *Config) { c.Reference, c.SkipVerify = "file="+file, true }, ""},
		{"in a file of unknown digest", func(c *Config) { c.Reference = "file=" + file }, "toc_digest says"},
		{"in no file", func(c *Config) { c.Reference, c.TOCDigest = "file="+file+"x", l.TOCDigest }, "no such file"},
		{"at an address", func(c *Config) { c.Reference, c.TOCDigest = url, l.TOCDigest }, ""},
		{"at an address, something else", func(c *Config) { c.Reference, c.TOCDigest = url, registry.DigestOf(nil) }, "not what the manifest says"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := quick(img)
			tt.cfg(&cfg)
			m := open(t, cfg)
			layers, err := m.Layers(within(t))
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("opened: %v, expected %q", err, tt.want)
				}
				return
			}
			if err != nil || len(layers) != 1 {
				t.Fatalf("%d layers, %v", len(layers), err)
			}
			check(t, m, &imagetest.Image{Layers: []imagetest.Layer{l}})
		})
	}
	t.Run("at an address without HEAD", func(t *testing.T) {
		img.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			if r.Method == http.MethodHead {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			next.ServeHTTP(w, r)
		})
		cfg := quick(img)
		cfg.Reference, cfg.TOCDigest = url, l.TOCDigest
		check(t, open(t, cfg), &imagetest.Image{Layers: []imagetest.Layer{l}})
	})
}

// TestLeaks opens, breaks off and closes, and counts descriptors.
func TestLeaks(t *testing.T) {
	img := someImage(t)
	cfg := quick(img)
	cfg.Cache = cacheDir(t)
	cfg.Background = BackgroundConfig{Silence: registry.Duration(time.Millisecond), Batch: 10 << 10}
	one := func() {
		m, err := NewFetcher(nil).Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		layersOf(t, m)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				if f, err := m.Chunk(ctx, 0, uint32(i)); err == nil {
					f.Close()
				}
			})
		}
		cancel()
		all.Wait()
		shut(t, m)
		if _, err := m.Chunk(t.Context(), 0, 0); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("a chunk of a closed image: %v", err)
		}
		if _, err := m.Layers(t.Context()); err != nil && !errors.Is(err, errClosed) {
			t.Errorf("layers of a closed image: %v", err)
		}
	}
	one()
	img.Server.CloseClientConnections()
	before := openFDs(t)
	for range 10 {
		one()
	}
	img.Server.CloseClientConnections()
	waitFor(t, func() bool { return openFDs(t) <= before })
}

// TestConfig is what cannot be.
func TestConfig(t *testing.T) {
	for _, text := range []string{
		`{}`, `{"reference":"UPPER/case@x"}`, `{"reference":"r.example/a@sha256:1"}`, `{"reference":"https://me:pw@h/x"}`, `{"reference":"file="}`,
		`{"reference":"r.example/a","layer":"sha256:1"}`, `{"reference":"r.example/a","toc_digest":"sha256:` + strings.Repeat("0", 64) + `"}`,
		`{"reference":"file=x","layer":"sha256:` + strings.Repeat("0", 64) + `"}`,
		`{"reference":"r.example/a","fallback":"hope"}`, `{"reference":"r.example/a","bandwidth":-1}`, `{"reference":"r.example/a","platform":"linux"}`,
		`{"reference":"r.example/a","registry":{"tries":-1}}`, `{"reference":"r.example/a","registry":{"hosts":{"a/b":{}}}}`,
		`{"reference":"r.example/a","registry":{"hosts":{"a":{"mirrors":[{"host":""}]}}}}`,
	} {
		var cfg Config
		if err := json.Unmarshal([]byte(text), &cfg); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		err := cfg.Validate()
		if err == nil {
			t.Errorf("%s is taken", text)
		} else if strings.Contains(err.Error(), "pw") {
			t.Errorf("%v names the password", err)
		}
	}
	var cfg Config
	text := `{"reference":"r.example/a:b","registry":{"timeout":"1m30s","hosts":{"r.example":{"plain_http":true,"mirrors":[{"host":"m","headers":{"a":"b"}}]}}}}`
	if err := json.Unmarshal([]byte(text), &cfg); err != nil || cfg.Validate() != nil || !cfg.Registry.Hosts["r.example"].PlainHTTP ||
		time.Duration(cfg.Registry.Timeout) != 90*time.Second || cfg.Registry.Hosts["r.example"].Mirrors[0].Headers["a"] != "b" {
		t.Errorf("%s is read as %+v, %v", text, cfg, err)
	}
}

package imagefetch

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

// fault answers a request in a registry's place.
type fault = func(w http.ResponseWriter, r *http.Request, next http.Handler)

// ofBlobs has f answer the first n GETs of blobs, all with n < 0.
func ofBlobs(n int64, f fault) fault {
	var count atomic.Int64
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if strings.Contains(r.URL.Path, "/blobs/") && (n < 0 || count.Add(1) <= n) {
			f(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	}
}

func status(code int, header ...string) fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

// changed answers as next does after f has changed it.
func changed(f func(rec *httptest.ResponseRecorder)) fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		f(rec)
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		_, _ = w.Write(rec.Body.Bytes())
	}
}

// hang sends part of the answer and nothing after that, until whoever asks has gone.
func hang(w http.ResponseWriter, r *http.Request, next http.Handler) {
	rec := httptest.NewRecorder()
	next.ServeHTTP(rec, r)
	w.Header().Set("Content-Range", rec.Header().Get("Content-Range"))
	w.Header().Set("Content-Length", rec.Header().Get("Content-Length"))
	w.WriteHeader(rec.Code)
	_, _ = w.Write(rec.Body.Bytes()[:100])
	_ = http.NewResponseController(w).Flush()
	<-r.Context().Done()
}

// reset sends part of the answer and resets the connection.
func reset(w http.ResponseWriter, r *http.Request, next http.Handler) {
	rec := httptest.NewRecorder()
	next.ServeHTTP(rec, r)
	w.Header().Set("Content-Range", rec.Header().Get("Content-Range"))
	w.Header().Set("Content-Length", rec.Header().Get("Content-Length"))
	w.WriteHeader(rec.Code)
	_, _ = w.Write(rec.Body.Bytes()[:rec.Body.Len()/2])
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	_ = c.(*net.TCPConn).SetLinger(0)
	_ = c.Close()
}

// TestFailures is T-D7: whatever a registry does, a read gets what it should, or an error, in time.
func TestFailures(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fault fault
		cfg   func(c *Config)
		want  error // of the chunk
		// requests are how many GETs of the blob there are at most, 0 for 5.
		requests int
		atLeast  time.Duration
		says     string // in the status, if there is an error
	}{
		{name: "nothing", requests: 1},
		{name: "429 with Retry-After", fault: ofBlobs(1, status(429, "Retry-After", "1")), requests: 2, atLeast: time.Second},
		{name: "503 with Retry-After", fault: ofBlobs(1, status(503, "Retry-After", "1")), requests: 2, atLeast: time.Second},
		{name: "503 with a Retry-After that is too long", fault: ofBlobs(-1, status(503, "Retry-After", "3600")), want: store.ErrUnavailable, requests: 1, says: "status 503"},
		{name: "500 twice", fault: ofBlobs(2, status(500)), requests: 3},
		{name: "500 always", fault: ofBlobs(-1, status(500)), want: store.ErrUnavailable, requests: 3, says: "status 500"},
		{name: "404", fault: ofBlobs(-1, status(404)), want: store.ErrUnavailable, requests: 1, says: "status 404"},
		{name: "416", fault: ofBlobs(-1, status(416, "Content-Range", "bytes */5")), want: store.ErrUnavailable, requests: 1, says: "status 416"},
		{name: "403", fault: ofBlobs(-1, status(403)), want: store.ErrUnavailable, requests: 1, says: "status 403"},
		{name: "401 without a challenge", fault: ofBlobs(-1, status(401)), want: store.ErrUnavailable, requests: 1, says: "status 401"},
		{name: "stall before the answer", fault: ofBlobs(1, func(_ http.ResponseWriter, r *http.Request, _ http.Handler) { <-r.Context().Done() }), requests: 2},
		{name: "stall in the answer", fault: ofBlobs(1, hang), requests: 2},
		{name: "stall always", fault: ofBlobs(-1, hang), want: store.ErrUnavailable, requests: 3, says: "nothing came for too long"},
		{
			name: "a byte at a time", want: store.ErrUnavailable, requests: 1, says: "gave up",
			cfg: func(c *Config) {
				c.Registry.Timeout, c.Registry.Stall = registry.Duration(500*time.Millisecond), registry.Duration(5*time.Second)
			},
			fault: ofBlobs(-1, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				rec := httptest.NewRecorder()
				next.ServeHTTP(rec, r)
				w.Header().Set("Content-Range", rec.Header().Get("Content-Range"))
				w.WriteHeader(rec.Code)
				for _, b := range rec.Body.Bytes() {
					_, _ = w.Write([]byte{b})
					_ = http.NewResponseController(w).Flush()
					select {
					case <-r.Context().Done():
						return
					case <-time.After(20 * time.Millisecond):
					}
				}
			}),
		},
		{name: "connection ends", fault: ofBlobs(2, func(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) }), requests: 6},
		{name: "connection reset in the answer", fault: ofBlobs(2, reset), requests: 3},
		{name: "connection reset in the answer always", fault: ofBlobs(-1, reset), want: store.ErrUnavailable, requests: 3, says: "breaks off"},
		{name: "body ends early", fault: ofBlobs(1, changed(func(rec *httptest.ResponseRecorder) {
			rec.Header().Del("Content-Length")
			rec.Body.Truncate(rec.Body.Len() / 2)
		})), requests: 2},
		{name: "body ends early always", want: store.ErrUnavailable, requests: 3, says: "breaks off", fault: ofBlobs(-1, changed(func(rec *httptest.ResponseRecorder) {
			rec.Header().Del("Content-Length")
			rec.Body.Truncate(rec.Body.Len() / 2)
		}))},
		{name: "200 for a range", requests: 1, fault: ofBlobs(-1, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			r.Header.Del("Range")
			next.ServeHTTP(w, r)
		})},
		{
			name: "200 for a range that is too far", want: store.ErrUnavailable, requests: 1, says: "ignores ranges",
			cfg: func(c *Config) { c.Registry.MaxSkip = 1000 },
			fault: ofBlobs(-1, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				r.Header.Del("Range")
				next.ServeHTTP(w, r)
			}),
		},
		{name: "200 with another size", want: store.ErrUnavailable, requests: 1, says: "bytes, and should have", fault: ofBlobs(-1, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			_, _ = w.Write(make([]byte, 1000))
		})},
		{name: "another range", want: store.ErrUnavailable, requests: 3, says: "other bytes", fault: ofBlobs(-1, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			r.Header.Set("Range", "bytes=0-1000")
			next.ServeHTTP(w, r)
		})},
		{name: "no Content-Range", want: store.ErrUnavailable, requests: 3, says: "no Content-Range", fault: ofBlobs(-1, changed(func(rec *httptest.ResponseRecorder) {
			rec.Header().Del("Content-Range")
		}))},
		{name: "another size", want: store.ErrUnavailable, requests: 1, says: "bytes, and should have", fault: ofBlobs(-1, changed(func(rec *httptest.ResponseRecorder) {
			span, _, _ := strings.Cut(rec.Header().Get("Content-Range"), "/")
			rec.Header().Set("Content-Range", span+"/99999999")
		}))},
		{name: "redirects in a circle", want: store.ErrUnavailable, requests: 6, says: "redirects more than", fault: ofBlobs(-1, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		})},
		{name: "redirect to nowhere", want: store.ErrUnavailable, requests: 1, says: "redirects to no address", fault: ofBlobs(-1, status(307, "Location", "ftp://x/"))},
		{name: "another content", want: store.ErrCorrupt, requests: 1, says: "not what it should be", fault: ofBlobs(-1, changed(func(rec *httptest.ResponseRecorder) {
			rec.Body.Bytes()[rec.Body.Len()/2] ^= 1
		}))},
		{name: "no content that can be unpacked", want: store.ErrCorrupt, requests: 1, says: "not what it should be", fault: ofBlobs(-1, changed(func(rec *httptest.ResponseRecorder) {
			clear(rec.Body.Bytes())
		}))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			img := someImage(t)
			cfg := quick(img)
			cfg.Cache = cacheDir(t)
			if strings.HasPrefix(tt.name, "stall") {
				cfg.Registry.Stall = registry.Duration(time.Second)
			}
			if tt.cfg != nil {
				tt.cfg(&cfg)
			}
			m := open(t, cfg)
			e := entryOf(t, m, 0, "last")
			img.Server.Reset()
			img.Server.SetFault(tt.fault)
			start := time.Now()
			f, err := m.Chunk(within(t), 0, e.Chunks[0].Chunk)
			took := time.Since(start)
			if !errors.Is(err, tt.want) {
				t.Fatalf("the chunk is %v, expected %v", err, tt.want)
			}
			if took < tt.atLeast || took > time.Duration(cfg.Registry.Timeout)+10*time.Second {
				t.Errorf("it took %v", took)
			}
			if gets, _ := img.Server.Blobs(); gets > max(tt.requests, 1) {
				t.Errorf("there were %d requests, expected at most %d", gets, tt.requests)
			}
			st, _ := m.Status(within(t), 0)
			if !strings.Contains(st.Err, tt.says) || tt.want == nil && st.Err != "" {
				t.Errorf("the status says %q, expected %q in it", st.Err, tt.says)
			}
			if err == nil {
				f.Close()
			}
			// Once the registry is well, everything is, and what was wrong has not been kept.
			img.Server.SetFault(nil)
			check(t, m, img)
		})
	}
}

// TestCorruptChunk is T-D3: one file cannot be read while its content is wrong, and the cache does not get it.
func TestCorruptChunk(t *testing.T) {
	img := someImage(t)
	cfg := quick(img)
	cfg.Cache = cacheDir(t)
	m := open(t, cfg)
	l := &img.Layers[0]
	bad := bytes.Clone(l.Blob)
	at := m.layers0(t).streams[m.layers0(t).at[entryOf(t, m, 0, "big").Chunks[2].Chunk].stream]
	bad[(at.off+at.end)/2] ^= 0x10
	img.Server.SetBlob(l.Digest, bad)
	for range 2 {
		if _, err := read(t, m, 0, "big"); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("big with a wrong bit: %v, expected ErrCorrupt", err)
		}
	}
	if b, err := read(t, m, 0, "last"); err != nil || !bytes.Equal(b, l.Files[len(l.Files)-1].Data) {
		t.Errorf("another file: %v", err)
	}
	if st, err := m.Status(within(t), 0); err != nil || !strings.Contains(st.Err, "not what it should be") {
		t.Errorf("the status is %+v, %v", st, err)
	}
	digest := fmt.Sprintf("%x", layersOf(t, m)[0].Chunks[entryOf(t, m, 0, "big").Chunks[2].Chunk].Digest)
	if list, _ := filepath.Glob(cfg.Cache.Dir + "/*/*/" + digest); len(list) > 0 {
		t.Errorf("the cache has got %v", list)
	}
	if list, _ := filepath.Glob(cfg.Cache.Dir + "/tmp/*"); len(list) > 0 {
		t.Errorf("%v are left over", list)
	}
	img.Server.SetBlob(l.Digest, l.Blob)
	check(t, m, img)
}

func (m *Image) layers0(t *testing.T) *layer {
	layersOf(t, m)
	return m.layers[0]
}

// TestToken is T-D7's 401: a token is got with the credentials of the docker config, which may change.
func TestToken(t *testing.T) {
	for _, kind := range []string{"Bearer", "Basic"} {
		t.Run(kind, func(t *testing.T) {
			img := someImage(t)
			var password atomic.Value
			password.Store("first")
			var tokens atomic.Int64
			img.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				user, pass, ok := r.BasicAuth()
				good := ok && user == "me" && pass == password.Load()
				if r.URL.Path == "/token" {
					if !good || r.URL.Query().Get("scope") != "repository:test/image:pull" {
						w.WriteHeader(http.StatusUnauthorized)
						return
					}
					tokens.Add(1)
					fmt.Fprintf(w, `{"token":"for-%s"}`, password.Load())
					return
				}
				if kind == "Bearer" {
					good = r.Header.Get("Authorization") == "Bearer for-"+password.Load().(string)
				}
				if !good {
					challenge := `Basic realm="here"`
					if kind == "Bearer" {
						challenge = fmt.Sprintf(`Bearer realm="%s/token",service="s",scope="repository:test/image:pull"`, img.Server.URL)
					}
					w.Header().Set("WWW-Authenticate", challenge)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				next.ServeHTTP(w, r)
			})
			dir := t.TempDir()
			write := func(pass string) {
				auth := base64.StdEncoding.EncodeToString([]byte("me:" + pass))
				text := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, img.Server.Host(), auth)
				if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cfg := quick(img)
			cfg.Registry.DockerConfig = dir
			var log syncBuffer
			m, err := NewFetcher(slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))).Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer shut(t, m)
			if _, err := m.Layers(within(t)); err == nil || !strings.Contains(err.Error(), "40") {
				t.Fatalf("without credentials: %v, expected a refusal", err)
			}
			write("first")
			if _, err := read(t, m, 0, "last"); err != nil {
				t.Fatal(err)
			}
			if n := tokens.Load(); kind == "Bearer" && n != 1 {
				t.Errorf("%d tokens were got, expected 1", n)
			}
			// The password changes: what there was is refused, and the file read again.
			password.Store("second")
			if _, err := read(t, m, 0, "big"); !errors.Is(err, store.ErrUnavailable) {
				t.Errorf("with an old password: %v", err)
			}
			write("second")
			check(t, m, img)
			st, err := m.Status(within(t), 0)
			if err != nil || st.Err == "" {
				t.Errorf("the status is %+v, %v", st, err)
			}
			text := log.String() + st.Err
			for _, secret := range []string{"first", "second", "bWU6"} {
				if strings.Contains(text, secret) {
					t.Errorf("%q is in the log or in the status: %s", secret, text)
				}
			}
			if !strings.Contains(text, "401") {
				t.Errorf("the log says nothing of the refusal: %s", text)
			}
		})
	}
}

// TestTokenExpires is T-D7's 401 in the middle of things: a token that is good for three requests is got anew, and nobody notices.
func TestTokenExpires(t *testing.T) {
	img := someImage(t)
	var token, used atomic.Int64
	img.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.URL.Path == "/token" {
			used.Store(0)
			fmt.Fprintf(w, `{"token":"%d","expires_in":3600}`, token.Add(1))
			return
		}
		if r.Header.Get("Authorization") != fmt.Sprint("Bearer ", token.Load()) || used.Add(1) > 3 {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s"`, img.Server.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
	m := open(t, quick(img))
	check(t, m, img)
	good := int64(0)
	for _, r := range img.Server.Requests() {
		if r.Status < 300 && r.Path != "/token" {
			good++
		}
	}
	if n := token.Load(); n < 3 || n > good/3+1 {
		t.Errorf("%d tokens were got for %d requests, expected one for 3", n, good)
	}
	if st, err := m.Status(within(t), 0); err != nil || st.Err != "" {
		t.Errorf("the status is %+v, %v", st, err)
	}
}

// syncBuffer is a log that several write to.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestRedirect is T-D7's 403: where the registry redirects to is remembered, asked for again when it has expired, and not told what is
// for the registry.
func TestRedirect(t *testing.T) {
	img := someImage(t)
	var valid, resolved, leaked atomic.Int64
	cdn := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" || r.Header.Get("X-Secret") != "" {
			leaked.Add(1)
		}
		if r.URL.Query().Get("sig") != fmt.Sprint(valid.Load()) {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(img.Layers[0].Blob))
	}))
	t.Cleanup(cdn.Close)
	secret := atomic.Int64{}
	img.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Header.Get("X-Secret") == "s" {
			secret.Add(1)
		}
		if !strings.Contains(r.URL.Path, "/blobs/") {
			next.ServeHTTP(w, r)
			return
		}
		resolved.Add(1)
		http.Redirect(w, r, cdn.URL+"/x?"+url.Values{"sig": {fmt.Sprint(valid.Load())}}.Encode(), http.StatusTemporaryRedirect)
	})
	cfg := quick(img)
	cfg.Registry.Hosts = map[string]registry.HostConfig{img.Server.Host(): {Access: registry.Access{Headers: map[string]string{"X-Secret": "s"}}}}
	m := open(t, cfg)
	check(t, m, img)
	if resolved.Load() != 1 || secret.Load() == 0 || leaked.Load() != 0 {
		t.Errorf("the redirect was asked for %d times, the registry was told the header %d times, others %d", resolved.Load(), secret.Load(), leaked.Load())
	}
	valid.Store(7)
	cfg.Cache = cacheDir(t) // nothing is there yet
	again := open(t, cfg)
	layersOf(t, again)
	before := resolved.Load()
	valid.Store(8)
	check(t, again, img)
	if n := resolved.Load() - before; n != 1 {
		t.Errorf("after it had expired the redirect was asked for %d times, expected 1", n)
	}
	// One that is refused at once is not asked for over and over.
	img.Server.SetFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		resolved.Add(1)
		http.Redirect(w, r, cdn.URL+"/x?sig=secret-signature", http.StatusTemporaryRedirect)
	})
	cfg.Cache = CacheConfig{MemoryBudget: 1 << 20}
	before = resolved.Load()
	last := open(t, cfg)
	_, err := last.Layers(within(t))
	if err == nil || strings.Contains(err.Error(), "secret-signature") || resolved.Load()-before > 2 {
		t.Errorf("refused redirect: %v after asking %d times", err, resolved.Load()-before)
	}
}

// TestMirrors is T-D7's 404: mirrors come first, what they do not have or have wrong comes from the next.
func TestMirrors(t *testing.T) {
	img := someImage(t)
	build := func(f fault) *imagetest.Server {
		s := imagetest.NewServer(t)
		s.Push(t, "test/image", img.Layers...)
		s.SetFault(f)
		return s
	}
	run := func(t *testing.T, mirrors ...*imagetest.Server) *Image {
		cfg := quick(img)
		cfg.Registry.Stall = registry.Duration(time.Second)
		var list []registry.Mirror
		for _, s := range mirrors {
			list = append(list, registry.Mirror{Host: s.Host()})
		}
		cfg.Registry.Hosts = map[string]registry.HostConfig{img.Server.Host(): {Mirrors: list}}
		m := open(t, cfg)
		check(t, m, img)
		return m
	}
	t.Run("good", func(t *testing.T) {
		good := build(nil)
		img.Server.Reset()
		run(t, good)
		if n := len(img.Server.Requests()); n != 0 {
			t.Errorf("the origin was asked %d times although a mirror has everything", n)
		}
	})
	t.Run("empty", func(t *testing.T) {
		var ns atomic.Value
		empty := build(func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			ns.Store(r.URL.Query().Get("ns"))
			w.WriteHeader(http.StatusNotFound)
		})
		good := build(nil)
		img.Server.Reset()
		run(t, empty, good)
		if n := len(img.Server.Requests()); n != 0 {
			t.Errorf("the origin was asked %d times although a mirror has everything", n)
		}
		if ns.Load() != img.Server.Host() {
			t.Errorf("the mirror was told ns=%v", ns.Load())
		}
	})
	t.Run("wrong content", func(t *testing.T) {
		bad := bytes.Clone(img.Layers[0].Blob)
		for i := 0; i < len(bad)*3/4; i += 300 {
			bad[i] ^= 1
		}
		wrong := build(nil)
		wrong.SetBlob(img.Layers[0].Digest, bad)
		run(t, wrong)
		if gets, _ := wrong.Blobs(); gets == 0 {
			t.Error("the mirror was not asked")
		}
	})
	t.Run("gone", func(t *testing.T) {
		gone := build(nil)
		gone.Close()
		img.Server.Reset()
		run(t, gone)
	})
	t.Run("stalls", func(t *testing.T) {
		stalls := build(func(_ http.ResponseWriter, r *http.Request, _ http.Handler) { <-r.Context().Done() })
		run(t, stalls)
		// It was asked for the first thing; after that, the origin comes first for a while.
		if n := len(stalls.Requests()); n > 2 {
			t.Errorf("a mirror that stalls was asked %d times", n)
		}
	})
}

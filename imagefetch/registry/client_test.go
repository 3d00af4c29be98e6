package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func testClient(t *testing.T, cfg Config) *Client {
	t.Helper()
	cfg.DockerConfig = t.TempDir()
	cfg.Tries, cfg.Backoff, cfg.Timeout, cfg.Stall = 2, Duration(time.Millisecond), Duration(5*time.Second), Duration(time.Second)
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

var alphabet = []byte("abcdefghijklmnopqrstuvwxyz")

func serveAlphabet(w http.ResponseWriter, r *http.Request) {
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(alphabet))
}

// fetchAll returns what Fetch hands out for ranges.
func fetchAll(b Blob, ranges ...Range) (got []string, err error) {
	got = make([]string, len(ranges))
	err = b.Fetch(context.Background(), ranges, func(i int, r io.Reader) error {
		p, err := io.ReadAll(r)
		got[i] = string(p)
		return err
	})
	return got, err
}

func urlBlob(t *testing.T, c *Client, address string) (Blob, error) {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	return c.URLBlob(t.Context(), u)
}

func TestFetch(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(serveAlphabet))
	defer s.Close()
	name := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(name, alphabet, 0o600); err != nil {
		t.Fatal(err)
	}
	file, closer, err := OpenFile(name)
	if err != nil {
		t.Fatal(err)
	}
	defer closer.Close()
	web, err := urlBlob(t, testClient(t, Config{}), s.URL)
	if err != nil {
		t.Fatal(err)
	}
	single, err := urlBlob(t, testClient(t, Config{SingleRange: true}), s.URL)
	if err != nil {
		t.Fatal(err)
	}
	for what, b := range map[string]Blob{"file": file, "web": web, "single ranges": single} {
		if b.Size() != 26 {
			t.Errorf("%s: the size is %d", what, b.Size())
		}
		got, err := fetchAll(b, Range{0, 3}, Range{5, 1}, Range{24, 2})
		if err != nil || strings.Join(got, " ") != "abc f yz" {
			t.Errorf("%s: %q, %v", what, got, err)
		}
		for _, bad := range [][]Range{{{0, 0}}, {{-1, 2}}, {{25, 2}}, {{5, 2}, {6, 1}}, {{5, 1}, {0, 1}}, {{1 << 62, 1 << 62}}, make([]Range, MaxRanges+1)} {
			if got, err := fetchAll(b, bad...); err == nil {
				t.Errorf("%s: %v is %q", what, bad[:1], got)
			}
		}
		// Not all of a range need be read.
		var first []byte
		if err := b.Fetch(t.Context(), []Range{{1, 10}, {20, 5}}, func(i int, r io.Reader) error {
			p := make([]byte, 1)
			_, err := r.Read(p)
			first = append(first, p...)
			return err
		}); err != nil || string(first) != "bu" {
			t.Errorf("%s: the first bytes are %q, %v", what, first, err)
		}
		own := errors.New("my own")
		if err := b.Fetch(t.Context(), []Range{{1, 10}}, func(int, io.Reader) error { return own }); !errors.Is(err, own) {
			t.Errorf("%s: an error of who reads comes back as %v", what, err)
		}
		r := b.Stream(t.Context())
		if all, err := io.ReadAll(r); err != nil || !bytes.Equal(all, alphabet) {
			t.Errorf("%s: all of it is %q, %v", what, all, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	if n, bytes := single.Counters(); n != 8 || bytes != 43 {
		t.Errorf("%d requests of %d bytes were counted", n, bytes)
	}
	if _, _, err := OpenFile(t.TempDir()); err == nil {
		t.Error("a directory is a layer")
	}
}

// TestMultipart is of servers that put ranges together, or leave some out.
func TestMultipart(t *testing.T) {
	for _, tt := range []struct {
		name    string
		pieces  []Range
		want    string // "" for an error
		queries int
	}{
		{"as asked", []Range{{0, 3}, {5, 1}, {24, 2}}, "abc f yz", 1},
		{"put together", []Range{{0, 6}, {24, 2}}, "abc f yz", 1},
		{"all of it", []Range{{0, 26}}, "abc f yz", 1},
		{"without the last", []Range{{0, 3}, {5, 1}}, "abc f yz", 2},
		{"out of order", []Range{{24, 2}, {5, 1}, {0, 3}}, "abc f yz", 3},
		{"something else first", []Range{{10, 5}, {0, 3}, {5, 1}, {24, 2}}, "abc f yz", 1},
		{"something else", []Range{{10, 5}}, "", 2},
		{"overlapping", []Range{{0, 3}, {2, 5}, {24, 2}}, "abc f yz", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			queries := 0
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodGet {
					queries++
				}
				if !strings.Contains(r.Header.Get("Range"), ",") {
					serveAlphabet(w, r)
					return
				}
				w.Header().Set("Content-Type", "multipart/byteranges; boundary=b")
				w.WriteHeader(http.StatusPartialContent)
				for _, p := range tt.pieces {
					_, _ = io.WriteString(w, "--b\r\nContent-Range: "+strings.Replace(header([]Range{p}), "=", " ", 1)+"/26\r\n\r\n")
					_, _ = w.Write(append(alphabet[p.Off:p.end():p.end()], "\r\n"...))
				}
				_, _ = io.WriteString(w, "--b--\r\n")
			}))
			defer s.Close()
			b, err := urlBlob(t, testClient(t, Config{}), s.URL)
			if err != nil {
				t.Fatal(err)
			}
			got, err := fetchAll(b, Range{0, 3}, Range{5, 1}, Range{24, 2})
			if tt.want == "" != (err != nil) || err == nil && strings.Join(got, " ") != tt.want {
				t.Errorf("%q, %v", got, err)
			}
			if queries > tt.queries+1 {
				t.Errorf("it took %d requests", queries)
			}
		})
	}
}

// TestTLS is of certificates, and of redirects that would do without.
func TestTLS(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(serveAlphabet))
	defer plain.Close()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away" {
			http.Redirect(w, r, plain.URL, http.StatusFound)
			return
		}
		serveAlphabet(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	host := strings.TrimPrefix(s.URL, "https://")
	if _, err := urlBlob(t, testClient(t, Config{}), s.URL); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown certificate: %v", err)
	}
	lax := testClient(t, Config{Hosts: map[string]HostConfig{host: {Access: Access{Insecure: true}}}})
	b, err := urlBlob(t, lax, s.URL)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := fetchAll(b, Range{1, 2}); err != nil || got[0] != "bc" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := urlBlob(t, lax, s.URL+"/away"); err == nil || !strings.Contains(err.Error(), "without TLS") {
		t.Errorf("a redirect to http: %v", err)
	}
}

// TestSize is of addresses that do not say how large they are.
func TestSize(t *testing.T) {
	for _, tt := range []struct {
		name string
		h    http.HandlerFunc
		ok   bool
	}{
		{"no HEAD", func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				w.WriteHeader(http.StatusForbidden)
				return
			}
			serveAlphabet(w, r)
		}, true},
		{"HEAD without a length", func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodHead {
				serveAlphabet(w, r)
			}
		}, true},
		{"no ranges", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "26")
			if r.Method != http.MethodHead {
				_, _ = w.Write(alphabet)
			}
		}, true},
		{"never", func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write(alphabet)
			_ = http.NewResponseController(w).Flush()
		}, false},
		{"404", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNotFound) }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := httptest.NewServer(tt.h)
			defer s.Close()
			b, err := urlBlob(t, testClient(t, Config{}), s.URL)
			if tt.ok != (err == nil) || err == nil && b.Size() != 26 {
				t.Errorf("opened: %v", err)
			}
		})
	}
}

// TestKeychain reads a docker config with credentials of several kinds.
func TestKeychain(t *testing.T) {
	dir := t.TempDir()
	text := `{"auths":{"a.example":{"auth":"bWU6cHc="},"b.example":{"identitytoken":"it"},"https://index.docker.io/v1/":{"username":"hub","password":"x"}}}`
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{"a.example": "me:pw:", "b.example": "::it", "index.docker.io": "hub:x:", "c.example": "::"} {
		a, err := keychain(dir).Resolve(resource(host))
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := a.Authorization()
		if got := cfg.Username + ":" + cfg.Password + ":" + cfg.IdentityToken; err != nil || got != want {
			t.Errorf("%s has %q, %v; expected %q", host, got, err, want)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte("{secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := keychain(dir).Resolve(resource("a.example")); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a config that is none: %v", err)
	}
}

type resource string

func (r resource) String() string      { return string(r) }
func (r resource) RegistryStr() string { return string(r) }

package imagetest

import (
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Image is one that a registry on the loopback serves.
type Image struct {
	// Ref is HOST:PORT/REPO@sha256:…, Tag the same by its tag.
	Ref, Tag string
	// Digest is the manifest's.
	Digest string
	Layers []Layer
	Server *Server
}

// Request is what a Server was asked for.
type Request struct {
	Method, Path, Range string
	Header              http.Header
	Status              int
	// Bytes are the body's that were sent.
	Bytes int64
	Start time.Time
}

// Server is a registry. Blobs are served as http.ServeContent does it: with single ranges, several of them, and suffixes.
type Server struct {
	*httptest.Server

	mu       sync.Mutex
	blobs    map[string][]byte
	requests []*Request
	fault    func(w http.ResponseWriter, r *http.Request, next http.Handler)
	registry http.Handler
}

// New builds a layer of eStargz from each list of files and pushes an image of them to a registry of its own, until the test ends.
func New(t testing.TB, layers ...[]File) *Image {
	t.Helper()
	built := make([]Layer, len(layers))
	for i, files := range layers {
		built[i] = Build(t, files, Options{})
	}
	return NewServer(t).Push(t, "test/image", built...)
}

// NewServer starts a registry, until the test ends.
func NewServer(t testing.TB) *Server {
	t.Helper()
	s := &Server{blobs: map[string][]byte{}, registry: registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

// Host is the registry's, as references name it.
func (s *Server) Host() string { return strings.TrimPrefix(s.URL, "http://") }

// Push makes an image of layers and puts it in the registry, as REPO or REPO:TAG. What this asks of it is not counted.
func (s *Server) Push(t testing.TB, repo string, layers ...Layer) *Image {
	t.Helper()
	repo, label, ok := strings.Cut(repo, ":")
	if !ok {
		label = "latest"
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{Architecture: "amd64", OS: "linux"})
	must(t, err)
	for _, l := range layers {
		img, err = mutate.Append(img, mutate.Addendum{Layer: static.NewLayer(l.Blob, l.MediaType), Annotations: l.Annotations, MediaType: l.MediaType})
		must(t, err)
	}
	tag, err := name.NewTag(s.Host() + "/" + repo + ":" + label)
	must(t, err)
	must(t, remote.Write(tag, img, remote.WithTransport(direct{s.registry})))
	sum, err := img.Digest()
	must(t, err)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range layers {
		s.blobs[l.Digest] = l.Blob
	}
	return &Image{
		Ref: s.Host() + "/" + repo + "@" + sum.String(), Tag: tag.String(), Digest: sum.String(), Layers: layers, Server: s,
	}
}

// SetBlob has the registry serve data as the blob of this digest, whatever its own is. It stays the caller's not to change.
func (s *Server) SetBlob(digest string, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blobs[digest] = data
}

// SetFault has f answer requests; next serves one as it should be. nil has all of them served so.
func (s *Server) SetFault(f func(w http.ResponseWriter, r *http.Request, next http.Handler)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Requests are those that have come, in this order. What an answer consists of is counted before it is sent, so that whoever has had
// it sees it here.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Request, len(s.requests))
	for i, r := range s.requests {
		list[i] = *r
	}
	return list
}

// Reset forgets what was counted.
func (s *Server) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = nil
}

// Blobs says how many GETs there were of blobs, and how many bytes of their content were sent.
func (s *Server) Blobs() (gets int, bytes int64) {
	for _, r := range s.Requests() {
		if r.Method == http.MethodGet && blobPath.MatchString(r.Path) {
			gets++
			bytes += r.Bytes
		}
	}
	return gets, bytes
}

var blobPath = regexp.MustCompile(`^/v2/.+/blobs/(sha256:[0-9a-f]{64})$`)

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	fault := s.fault
	s.mu.Unlock()
	c := &counter{ResponseWriter: w, s: s, r: &Request{
		Method: r.Method, Path: r.URL.Path, Range: r.Header.Get("Range"), Header: r.Header.Clone(), Status: http.StatusOK, Start: time.Now(),
	}}
	s.mu.Lock()
	s.requests = append(s.requests, c.r)
	s.mu.Unlock()
	if fault != nil {
		fault(c, r, http.HandlerFunc(s.serve))
		return
	}
	s.serve(c, r)
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if m := blobPath.FindStringSubmatch(r.URL.Path); m != nil && (r.Method == http.MethodGet || r.Method == http.MethodHead) {
		s.mu.Lock()
		data, ok := s.blobs[m[1]]
		s.mu.Unlock()
		if ok {
			w.Header().Set("Content-Type", "application/octet-stream")
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
			return
		}
	}
	s.registry.ServeHTTP(w, r)
}

// counter counts what is written.
type counter struct {
	http.ResponseWriter
	s *Server
	r *Request
}

func (c *counter) WriteHeader(status int) {
	c.s.mu.Lock()
	c.r.Status = status
	c.s.mu.Unlock()
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(p []byte) (int, error) {
	c.s.mu.Lock()
	c.r.Bytes += int64(len(p))
	c.s.mu.Unlock()
	return c.ResponseWriter.Write(p)
}

// Unwrap is for http.ResponseController.
func (c *counter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// direct is a transport that asks a handler without a connection.
type direct struct{ h http.Handler }

func (d direct) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	in := r.Clone(context.WithoutCancel(r.Context()))
	in.RequestURI = r.URL.RequestURI()
	if in.Body == nil {
		in.Body = http.NoBody
	}
	d.h.ServeHTTP(w, in)
	resp := w.Result()
	resp.Request = r
	return resp, nil
}

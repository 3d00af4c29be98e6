package webtree

import (
	"bytes"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/iofs"
)

// site is a server of files, which a test may have misbehave.
type site struct {
	files fstest.MapFS
	mu    sync.Mutex
	wrong func(w http.ResponseWriter, r *http.Request) bool // has answered
}

func (s *site) misbehave(wrong func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wrong = wrong
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	wrong := s.wrong
	s.mu.Unlock()
	if wrong != nil && wrong(w, r) {
		return
	}
	if r.URL.Path == "/tree/index.txt" {
		var index strings.Builder
		index.WriteString("# a comment, and an empty line\n\n")
		for p := range s.files {
			index.WriteString((&url.URL{Path: p}).EscapedPath() + "\n")
		}
		_, _ = io.WriteString(w, index.String())
		return
	}
	f := s.files[strings.TrimPrefix(r.URL.Path, "/tree/")]
	if f == nil {
		http.NotFound(w, r)
		return
	}
	http.ServeContent(w, r, "", f.ModTime, bytes.NewReader(f.Data))
}

// start serves files on the loopback interface for the time of the test.
func start(t *testing.T, files fstest.MapFS) (*site, *http.Client, string) {
	t.Helper()
	s := &site{files: files}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 8}}
	t.Cleanup(client.CloseIdleConnections)
	return s, client, server.URL + "/tree"
}

// idle is a backend that leaves no connection behind, for the suite counts descriptors.
type idle struct {
	*iofs.FS
	client *http.Client
}

func (i idle) Close() error {
	i.client.CloseIdleConnections()
	return i.FS.Close()
}

func TestSuite(t *testing.T) {
	files := fsbackendtest.Tree()
	for p, f := range files {
		if f.Mode.Type() == fs.ModeSymlink {
			delete(files, p)
		}
	}
	_, client, base := start(t, files)
	fsbackendtest.RunReadOnly(t, fsbackendtest.ReadOnlyConfig{
		New: func(t *testing.T) fsbackend.Backend {
			tree, err := New(client, base)
			if err != nil {
				t.Fatal(err)
			}
			b, err := iofs.New(iofs.Config{FS: tree})
			if err != nil {
				t.Fatal(err)
			}
			return idle{b, client}
		},
		NoSymlinks: true,
		NoAttrs:    true, // HTTP has no modes
	})
}

// TestServersThatWillNotDo says at the start why a server cannot be used.
func TestServersThatWillNotDo(t *testing.T) {
	answer := func(status int, header ...string) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "index.txt") {
				return false
			}
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(status)
			return true
		}
	}
	for what, row := range map[string]struct {
		wrong func(w http.ResponseWriter, r *http.Request) bool
		says  string
	}{
		"no index": {func(w http.ResponseWriter, r *http.Request) bool { http.NotFound(w, r); return true }, "expected a list"},
		"an index that leaves the tree": {func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, "index.txt") {
				return answer(http.StatusOK, "Content-Length", "4", "Accept-Ranges", "bytes")(w, r)
			}
			_, _ = io.WriteString(w, "%2e%2e/f\n")
			return true
		}, "is no path"},
		"a file that is not there":    {answer(http.StatusNotFound), "404"},
		"a file of an unknown size":   {answer(http.StatusOK, "Accept-Ranges", "bytes"), "Content-Length"},
		"a server that has no ranges": {answer(http.StatusOK, "Content-Length", "4"), "does not serve ranges"},
	} {
		s, client, base := start(t, fstest.MapFS{"f": {Data: []byte("data")}})
		s.misbehave(row.wrong)
		if _, err := New(client, base); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v, expected an error with %q", what, err, row.says)
		}
	}
}

// TestServersThatChange has the server answer READs with something else than was asked for: nothing of it may be taken for
// the file.
func TestServersThatChange(t *testing.T) {
	for what, row := range map[string]struct {
		wrong func(w http.ResponseWriter, r *http.Request) bool
		errno fsbackend.Errno
	}{
		"nothing": {nil, 0},
		"the whole file": {func(w http.ResponseWriter, _ *http.Request) bool {
			_, _ = io.WriteString(w, "data")
			return true
		}, unix.EIO},
		"another part": {func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Range", "bytes 0-1/4")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = io.WriteString(w, "da")
			return true
		}, unix.EIO},
		"less than it says": {func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Range", "bytes 1-2/4")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = io.WriteString(w, "a")
			return true
		}, unix.EIO},
		"a later version": {func(w http.ResponseWriter, r *http.Request) bool {
			http.ServeContent(w, r, "", time.Unix(1_800_000_000, 0), strings.NewReader("DATA"))
			return true
		}, unix.EIO},
		"nothing in time": {func(_ http.ResponseWriter, r *http.Request) bool {
			<-r.Context().Done()
			return true
		}, unix.ETIMEDOUT},
	} {
		s, client, base := start(t, fstest.MapFS{"f": {Data: []byte("data"), ModTime: time.Unix(1_700_000_000, 0)}})
		tree, err := New(client, base)
		if err != nil {
			t.Fatal(err)
		}
		b, err := iofs.New(iofs.Config{FS: tree})
		if err != nil {
			t.Fatal(err)
		}
		c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
		e, errno := c.Lookup(fsbackendtest.Root, "f")
		if errno != 0 || e.Mtime != 1_700_000_000 {
			t.Fatalf("LOOKUP: %v, changed %d", errno, e.Mtime)
		}
		fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
		if errno != 0 {
			t.Fatal(errno)
		}
		s.misbehave(row.wrong)
		if row.errno == unix.ETIMEDOUT {
			client.Timeout = 50 * time.Millisecond
		}
		data, errno := c.Read(e.NodeId, fh, 1, 2)
		if errno != row.errno || errno == 0 && string(data) != "at" {
			t.Errorf("READ where the server answers with %s: %q, %v, expected %v", what, data, errno, row.errno)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestWrongURLs names what is no URL of a web server, before it asks anybody.
func TestWrongURLs(t *testing.T) {
	for _, base := range []string{"", "localhost", "localhost:8000", "//localhost", "http://", "file:///srv", "htp://localhost", "http://local host"} {
		if _, err := New(&http.Client{}, base); err == nil || !strings.Contains(err.Error(), "expected a URL that starts with http:// or https://") {
			t.Errorf("%q: %v, expected an error that says what a URL is", base, err)
		}
	}
}

package lazyimage

import (
	"archive/tar"
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/sluicefs/sluice/imagefetch"
	"github.com/sluicefs/sluice/imagefetch/imagetest"
	"github.com/sluicefs/sluice/imagefetch/registry"
)

// startRegistry runs docker-registry(1), which wants a token of a service for each repository, until the test ends. tokens are how many
// the service has given.
func startRegistry(t *testing.T) (host string, tokens *atomic.Int64) {
	t.Helper()
	tokens = new(atomic.Int64)
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tokens.Add(1)
		fmt.Fprintf(w, `{"token":"t","scope":%q}`, r.URL.Query().Get("scope"))
	}))
	t.Cleanup(service.Close)
	// A token service is known by a name: one at a private address is not asked, unless that is the registry's.
	realm := strings.Replace(service.URL, "127.0.0.1", "localhost", 1) + "/token"
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
version: 0.1
log: {accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %q}}
http: {addr: "127.0.0.1:0"}
auth: {silly: {realm: %q, service: test}}
`, dir, realm), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("docker-registry", "serve", config)
	log, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatalf("start a registry (apt-get install docker-registry): %v", err)
	}
	var drained sync.WaitGroup
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		drained.Wait()
		_ = cmd.Wait()
	})
	listening := regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+)`)
	for lines := bufio.NewScanner(log); lines.Scan(); {
		if m := listening.FindStringSubmatch(lines.Text()); m != nil {
			drained.Go(func() { _, _ = io.Copy(io.Discard, log) })
			return m[1], tokens
		}
	}
	t.Fatal("the registry ends before it listens")
	return "", nil
}

// T-D9 with others' programs: an image that skopeo has made zstd:chunked, as podman and buildah do, is what unpacking its layers gives;
// and so is one of ordinary layers that is pulled. With SLUICE_FULL=1 they are in Debian's docker-registry, to be installed for that: it
// is none of scripts/packages.txt, as the package starts a registry for everybody.
func TestTools(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test makes devices: run it as root")
	}
	rnd := rand.New(rand.NewPCG(3, 14))
	packed := randomLayers(t, rnd, 1e9)
	noise := make([]byte, 150_000)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	// Chunks of many sizes, and zeros among them.
	packed = slices.Insert(packed, 0, pack(t,
		file{name: "big", data: string(noise) + strings.Repeat("\x00", 300_000) + string(noise[:100_000]), header: tar.Header{Typeflag: tar.TypeReg, Mode: 0o4711}},
		file{name: "hard", header: tar.Header{Typeflag: tar.TypeLink, Linkname: "big"}}))
	host := t.TempDir()
	var layers []imagetest.Layer
	for _, p := range packed {
		unpack(t, host, p)
		layers = append(layers, imagetest.Build(t, imageFiles(t, p), imagetest.Options{Format: imagetest.PlainGzip}))
	}
	want := snapshotDir(t, host, true)
	source := imagetest.NewServer(t).Push(t, "test/image", layers...)
	at, tokens := imagetest.NewServer(t).Host(), new(atomic.Int64) // where the layers are already, they stay as they are
	full := os.Getenv("SLUICE_FULL") != ""
	if full {
		at, tokens = startRegistry(t)
	}
	for _, tt := range []struct{ tag, fallback string }{{"lazy", ""}, {"plain", "pull"}} {
		var args []string
		if tt.fallback == "" {
			args = []string{"--dest-compress-format=zstd:chunked"}
		}
		ref := source.Skopeo(t, at+"/some/repo:"+tt.tag, args...).Ref
		before := tokens.Load()
		compareImage(t, tt.tag, want, imagefetch.Config{
			Reference: ref, Platform: "linux/amd64", Fallback: tt.fallback, Registry: registry.Config{DockerConfig: "/nonexistent"},
			Cache: imagefetch.CacheConfig{Dir: t.TempDir()}, Background: imagefetch.BackgroundConfig{Off: true},
		})
		if n := tokens.Load() - before; full && n != 1 {
			t.Errorf("%s: %d tokens were got, expected 1", tt.tag, n)
		}
	}
}

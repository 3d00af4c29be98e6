package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/seccomp"
)

// TestLife takes the extension through its steps with a server on the loopback interface.
func TestLife(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/index.txt":
			http.ServeContent(w, r, "", time.Time{}, strings.NewReader("dir/file\n"))
		case "/dir/file":
			http.ServeContent(w, r, "", time.Time{}, strings.NewReader("from afar"))
		default:
			http.NotFound(w, r)
		}
	}))
	defer server.Close()
	spec := &specs.Spec{}
	if off := new(extension); off.SandboxNeeds(spec).Network {
		t.Error("without a URL it needs the network")
	}
	if b, _, err := new(extension).TryHandleMount(spec, nil, "", false); b != nil || err != nil {
		t.Errorf("without a URL it answers %v, %v, expected that it declines", b, err)
	}
	e := &extension{url: server.URL + "/"}
	if !e.SandboxNeeds(spec).Network {
		t.Error("with a URL it does not need the network")
	}
	if b, _, err := e.TryHandleMount(spec, &specs.Mount{Destination: "/data"}, "", false); b != nil || err != nil {
		t.Errorf("a mount: %v, %v, expected that it declines", b, err)
	}
	b, options, err := e.TryHandleMount(spec, nil, "", false)
	if err != nil || b == nil || !options.ReadOnly {
		t.Fatalf("the root: %v, %+v, %v, expected a backend, read-only", b, options, err)
	}
	defer b.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	d, errno := c.Lookup(fsbackendtest.Root, "dir")
	if errno != 0 {
		t.Fatal(errno)
	}
	f, errno := c.Lookup(d.NodeId, "file")
	if errno != 0 {
		t.Fatal(errno)
	}
	fh, errno := c.Open(f.NodeId, 0)
	if errno != 0 {
		t.Fatal(errno)
	}
	if data, errno := c.Read(f.NodeId, fh, 5, 10); errno != 0 || string(data) != "afar" {
		t.Errorf("READ gave %q, %v, expected afar", data, errno)
	}
	server.Close()
	if b, _, err := e.TryHandleMount(spec, nil, "", false); b != nil || err == nil {
		t.Errorf("a server that is gone: %v, %v, expected an error", b, err)
	}
}

// TestSeccompRules sees that sockets are of the Internet only.
func TestSeccompRules(t *testing.T) {
	socket, ok := new(extension).SeccompRules()["socket"].(seccomp.Or)
	if !ok {
		t.Fatal("socket has no rule of alternatives")
	}
	for _, rule := range socket {
		family := rule.(seccomp.PerArg)[0]
		if family != seccomp.Int32(unix.AF_INET) && family != seccomp.Int32(unix.AF_INET6) {
			t.Errorf("sockets of family %v are allowed", family)
		}
	}
}

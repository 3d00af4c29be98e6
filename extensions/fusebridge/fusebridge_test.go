package fusebridge

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/internal/program"
	"github.com/sluicefs/sluice/seccomp"
)

func TestMain(m *testing.M) {
	program.MaybeConfine()
	goleak.VerifyTestMain(m)
}

// host is the daemon's part for a test.
type host struct {
	closers []func() error
	actions map[string]func(context.Context, json.RawMessage) (any, error)
}

func (h *host) outside() *extensions.Outside {
	h.actions = map[string]func(context.Context, json.RawMessage) (any, error){}
	return &extensions.Outside{
		Log:     slog.New(slog.NewTextHandler(os.Stderr, nil)),
		OnClose: func(f func() error) { h.closers = append(h.closers, f) },
		Action:  func(name string, f func(context.Context, json.RawMessage) (any, error)) { h.actions[name] = f },
	}
}

func (h *host) close(t *testing.T) {
	t.Helper()
	for i := len(h.closers) - 1; i >= 0; i-- {
		if err := h.closers[i](); err != nil {
			t.Error(err)
		}
	}
}

// open opens a mount with both halves, whose data goes as JSON between them.
func open(t *testing.T, options ...string) (*fsbackendtest.Client, *host, extensions.Options) {
	t.Helper()
	h := new(host)
	t.Cleanup(func() { h.close(t) })
	m := extensions.Mount{Backend: Name, Options: options}
	g, err := Extension{}.OpenOutside(t.Context(), h.outside(), m)
	if err != nil {
		t.Fatal(err)
	}
	procfd, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(procfd) })
	b, o, err := Extension{}.OpenInside(&extensions.Inside{Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), ProcFD: procfd}, m, g)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return &fsbackendtest.Client{R: fsbackend.Resolve(b)}, h, o
}

// image makes a squashfs image with a file "hello".
func image(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "hello"), []byte("hello, world"), 0o644); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "the image")
	if out, err := exec.Command("mksquashfs", dir, path, "-quiet", "-no-progress").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// hello reads the file.
func hello(t *testing.T, c *fsbackendtest.Client) {
	t.Helper()
	e, errno := c.Lookup(fsbackendtest.Root, "hello")
	if errno != 0 {
		t.Fatalf("LOOKUP: %v", errno)
	}
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatalf("OPEN: %v", errno)
	}
	defer c.Release(e.NodeId, fh)
	if got, errno := c.Read(e.NodeId, fh, 0, 100); errno != 0 || string(got) != "hello, world" {
		t.Errorf("READ: %q, %v", got, errno)
	}
}

func TestServe(t *testing.T) {
	c, h, o := open(t, "command=squashfuse -f '"+image(t)+"' {mnt}", "timeout=7", "restart=20s")
	hello(t, c)
	if o.Stock || o.Inline || o.Timeout < 27*time.Second {
		t.Errorf("options are %+v", o)
	}
	answer, err := h.actions["program"](t.Context(), nil)
	if err != nil || answer.(status).PID == 0 || answer.(status).Restarts != 0 {
		t.Errorf("%+v, %v", answer, err)
	}
	pid := answer.(status).PID
	if _, err := h.actions["restart"](t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for answer.(status).Restarts == 0 {
		time.Sleep(time.Millisecond)
		answer, _ = h.actions["program"](t.Context(), nil)
	}
	if again := answer.(status).PID; again == pid {
		t.Errorf("process %d still", again)
	}
	hello(t, c)
}

func TestServeAsUser(t *testing.T) {
	path := image(t)
	public, err := os.MkdirTemp("/var/tmp", "fusebridge-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(public) })
	if err := os.Chmod(public, 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(public, "image"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	c, h, _ := open(t, "command=squashfuse_ll -f "+public+"/image {mnt}", "user=nobody")
	hello(t, c)
	answer, err := h.actions["program"](t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/"+itoa(answer.(status).PID), &st); err != nil || st.Uid != 65534 {
		t.Errorf("it runs as %d, %v", st.Uid, err)
	}
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

// TestServeMounted has a program that really mounts.
func TestServeMounted(t *testing.T) {
	c, h, _ := open(t, "command=squashfuse -f -o allow_other '"+image(t)+"' {mnt}", "mount=private")
	hello(t, c)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), "sluice-fuse-") {
		t.Error("the host sees the mount")
	}
	answer, err := h.actions["program"](t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(answer.(status).PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for answer.(status).PID != 0 {
		time.Sleep(time.Millisecond)
		answer, _ = h.actions["program"](t.Context(), nil)
	}
	if _, errno := c.Lookup(fsbackendtest.Root, "other"); errno == 0 || errno == unix.ENOENT {
		t.Errorf("LOOKUP when it has ended: %v", errno)
	}
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []string
		outside string
		inside  string
	}{
		{"no such program", []string{"command=sluice-no-such-program {mnt}"}, "sluice-no-such-program", ""},
		{"ends at once", []string{"command=sh -c 'echo no luck; exit 3' {mnt}"}, "", "no luck"},
		{"speaks no FUSE", []string{"command=sh -c 'echo hello >&3; sleep 100' {mnt}"}, "", "INIT"},
		{"mounts nothing", []string{"command=sh -c 'echo no mount; exit 4' {mnt}", "mount=private"}, "no mount", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := new(host)
			defer h.close(t)
			m := extensions.Mount{Backend: Name, Options: tt.options}
			g, err := Extension{}.OpenOutside(t.Context(), h.outside(), m)
			if tt.outside != "" {
				if err == nil || !strings.Contains(err.Error(), tt.outside) {
					t.Errorf("%v, expected %q", err, tt.outside)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = Extension{}.OpenInside(&extensions.Inside{Log: slog.New(slog.DiscardHandler)}, m, g)
			if err == nil || !strings.Contains(err.Error(), tt.inside) {
				t.Errorf("%v, expected %q", err, tt.inside)
			}
		})
	}
}

// TestRules has the rules fit the daemon's.
func TestRules(t *testing.T) {
	p, err := seccomp.New(seccomp.Base(seccomp.BaseOptions{}), seccomp.Source{Owner: Name, Rules: Extension{}.SeccompRules()})
	if err != nil {
		t.Fatal(err)
	}
	if v := p.Ineffective(); len(v) != 0 {
		t.Errorf("asks in vain for %v", v)
	}
	for _, call := range []string{"connect", "socket", "bind", "execve"} {
		if p.Allows(call, [6]uint64{}) {
			t.Errorf("%s is allowed", call)
		}
	}
}

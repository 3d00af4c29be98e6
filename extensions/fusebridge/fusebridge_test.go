package fusebridge

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
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

// role is the environment variable that makes this binary the half inside, behind a filter: its value is the mount's data.
const role = "FUSEBRIDGE_TEST_INSIDE"

func TestMain(m *testing.M) {
	program.MaybeConfine()
	if data, ok := os.LookupEnv(role); ok {
		if err := inside(data); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
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
	if o.Stock || !o.Inline || o.Timeout < 27*time.Second {
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
	// What is asked of the one that has ended, before its end is seen, is EIO.
	e, errno := c.Lookup(fsbackendtest.Root, "hello")
	for end := time.Now().Add(10 * time.Second); ; {
		var fh uint64
		if errno == 0 {
			if fh, errno = c.Open(e.NodeId, unix.O_RDONLY); errno == 0 {
				c.Release(e.NodeId, fh)
				break
			}
		}
		if errno != unix.EIO || time.Now().After(end) {
			t.Fatalf("after a restart: %v", errno)
		}
		e, errno = c.Lookup(fsbackendtest.Root, "hello")
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
	e, errno := c.Lookup(fsbackendtest.Root, "hello")
	if errno != 0 {
		t.Fatal(errno)
	}
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	answer, err := h.actions["program"](t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(answer.(status).PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// It mounts again: names are found there, what was open is lost. Until then the host's kernel may know an answer still.
	for end := time.Now().Add(30 * time.Second); ; {
		now, errno := c.Lookup(fsbackendtest.Root, "hello")
		var opened uint64
		if errno == 0 {
			opened, errno = c.Open(now.NodeId, unix.O_RDONLY)
		}
		if errno == 0 {
			c.Release(now.NodeId, opened)
			if now.NodeId != e.NodeId {
				break
			}
		} else if errno != unix.ESTALE && errno != unix.EIO {
			t.Fatalf("when it has ended: %v", errno)
		}
		if time.Now().After(end) {
			t.Fatalf("it does not serve again: %v", errno)
		}
	}
	hello(t, c)
	if _, errno := c.Read(e.NodeId, fh, 0, 5); errno != unix.EIO {
		t.Errorf("READ of what was open before: %v", errno)
	}
	if _, errno := c.Getattr(e.NodeId); errno != unix.ESTALE {
		t.Errorf("GETATTR of a file of the first mount: %v", errno)
	}
	c.Release(e.NodeId, fh)
	again, err := h.actions["program"](t.Context(), nil)
	if err != nil || again.(status).PID == answer.(status).PID || again.(status).Restarts == 0 {
		t.Errorf("%+v, %v", again, err)
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

// inside serves what descriptor 3 leads to, behind the daemon's filter with the extension's rules, and tells of each round.
func inside(data string) error {
	m := extensions.Mount{Backend: Name}
	g := &extensions.Given{Data: json.RawMessage(data), Files: []*os.File{os.NewFile(3, "line")}}
	policy, err := seccomp.New(seccomp.Base(seccomp.BaseOptions{}), seccomp.Source{Owner: Name, Rules: Extension{}.SeccompRules()})
	if err != nil {
		return err
	}
	err = seccomp.Install(seccomp.InstallConfig{
		Filters: seccomp.Filters{Deny: policy.Deny(), Allow: policy.Allow(), NoSys: policy.NoSys()}, Action: seccomp.Kill,
	})
	if err != nil {
		return err
	}
	b, _, err := Extension{}.OpenInside(&extensions.Inside{Log: slog.New(slog.NewTextHandler(os.Stdout, nil))}, m, g)
	if err != nil {
		return err
	}
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	for range 2 {
		var group sync.WaitGroup
		for range 4 {
			group.Go(func() {
				for i := range 200 {
					out, errno := c.Create(fsbackendtest.Root, fmt.Sprint("file", i%10), unix.O_RDWR, 0o644)
					if errno != 0 {
						continue // the program is being killed
					}
					_, _ = c.Write(out.NodeId, out.Fh, 0, make([]byte, 300_000), unix.O_RDWR)
					_, _ = c.Read(out.NodeId, out.Fh, 0, 300_000)
					c.Release(out.NodeId, out.Fh)
					c.R.Forget(out.NodeId, 1)
				}
			})
		}
		group.Wait()
		fmt.Println("round")
		if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
			return err
		}
	}
	if _, errno := c.Lookup(fsbackendtest.Root, "file1"); errno != 0 {
		return errno
	}
	return b.Close()
}

// TestBehindFilter serves behind the daemon's system call filter, also when the program has been started again.
func TestBehindFilter(t *testing.T) {
	h := new(host)
	defer h.close(t)
	dir := t.TempDir()
	for _, d := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m := extensions.Mount{Backend: Name, Options: []string{
		fmt.Sprintf("command=fuse-overlayfs -f -o lowerdir=%[1]s,upperdir=%[1]s/upper,workdir=%[1]s/work {mnt}", dir), "restart=30s",
	}}
	g, err := Extension{}.OpenOutside(t.Context(), h.outside(), m)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), role+"="+string(g.Data))
	cmd.ExtraFiles = g.Files
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g.Close()
	lines := bufio.NewScanner(out)
	for rounds := 0; rounds < 2 && lines.Scan(); {
		if lines.Text() != "round" {
			t.Log(lines.Text())
			continue
		}
		if rounds++; rounds == 1 {
			st, _ := h.actions["program"](t.Context(), nil)
			if err := unix.Kill(st.(status).PID, unix.SIGKILL); err != nil {
				t.Error(err)
			}
		}
		if _, err := in.Write([]byte("\n")); err != nil {
			t.Error(err)
		}
	}
	for lines.Scan() {
		t.Log(lines.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the half inside: %v", err)
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

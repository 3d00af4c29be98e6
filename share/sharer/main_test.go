package sharer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control"
	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/control/client"
	"github.com/sluicefs/sluice/control/controltest"
)

var (
	_ Grafter = control.Daemon(nil)
	_ Grafter = (*client.Client)(nil)
)

// Environment of the processes that tests start.
const (
	victimEnv  = "SLUICE_SHARER_VICTIM"  // is killed at a step
	privateEnv = "SLUICE_SHARER_PRIVATE" // runs mount tests in a mount namespace of its own
)

func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) != "" {
		victim()
	}
	goleak.VerifyTestMain(m)
}

// inPrivateMounts runs the test again in a mount namespace of its own, and says whether this is that run. Who may not have
// one cannot make bind mounts either, which is what such tests are about: there is nothing to test then.
func inPrivateMounts(t *testing.T) bool {
	t.Helper()
	if os.Getenv(privateEnv) != "" {
		if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("bind mounts take CAP_SYS_ADMIN: run as root")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.count=1", "-test.v")
	cmd.Env = append(os.Environ(), privateEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Errorf("in a mount namespace of its own: %v\n%s", err, out)
	}
	return false
}

// mountAt mounts something until the test ends.
func mountAt(t *testing.T, source, target, fstype string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := (linux{}).unmount(target); err != nil {
			t.Error(err)
		}
	})
}

// errInjected is what a step that is made to fail says.
var errInjected = errors.New("injected failure")

// faults makes one step fail, or the process end there.
type faults struct {
	mu    sync.Mutex
	at    int  // the step, from 1; 0 is none
	after bool // the step is done, but says that it is not
	kill  bool
	names []string // of the steps so far
}

// step is one step: with a fault, do is not called.
func (f *faults) step(name string, do func() error) error {
	f.mu.Lock()
	f.names = append(f.names, name)
	hit := len(f.names) == f.at
	f.mu.Unlock()
	if hit && !f.after {
		if f.kill {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return errInjected
	}
	return do()
}

// doubtful is a step that can have been done although it says that it failed: an answer was lost.
func (f *faults) doubtful(name string, do func() error) error {
	err := f.step(name, do)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil && f.after && len(f.names) == f.at {
		return errInjected
	}
	return err
}

// reset sets the step that fails, from now on.
func (f *faults) reset(at int, after bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.at, f.after, f.names = at, after, nil
}

// steps is how many there were.
func (f *faults) steps() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.names)
}

// name is that of a step.
func (f *faults) name(n int) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n > len(f.names) {
		return "none"
	}
	return f.names[n-1]
}

// faultySystem is the host, with faults.
type faultySystem struct {
	linux
	*faults
}

func (f faultySystem) mkdir(path string, mode os.FileMode) error {
	return f.step("mkdir "+path, func() error { return f.linux.mkdir(path, mode) })
}

func (f faultySystem) create(path string) error {
	return f.step("create "+path, func() error { return f.linux.create(path) })
}

func (f faultySystem) remove(path string) error {
	return f.step("remove "+path, func() error { return f.linux.remove(path) })
}

func (f faultySystem) mount(source, target string, flags uintptr) error {
	return f.step(fmt.Sprintf("mount %s %#x", target, flags), func() error { return f.linux.mount(source, target, flags) })
}

func (f faultySystem) unmount(target string) error {
	return f.step("unmount "+target, func() error { return f.linux.unmount(target) })
}

func (f faultySystem) writeFile(path string, content []byte) error {
	return f.doubtful("write "+path, func() error { return f.linux.writeFile(path, content) })
}

func (f faultySystem) removeTree(path string) error {
	return f.step("remove tree "+path, func() error { return f.linux.removeTree(path) })
}

// faultyGrafter is a daemon, with faults in what changes something.
type faultyGrafter struct {
	Grafter
	*faults
}

func (f faultyGrafter) Grafts(ctx context.Context, tag string) (list []api.Graft, err error) {
	err = f.doubtful("Grafts", func() error { list, err = f.Grafter.Grafts(ctx, tag); return err })
	return list, err
}

func (f faultyGrafter) AddGraft(ctx context.Context, tag string, spec api.GraftSpec, replace bool) (g api.Graft, err error) {
	err = f.doubtful("AddGraft "+spec.Path, func() error { g, err = f.Grafter.AddGraft(ctx, tag, spec, replace); return err })
	return g, err
}

func (f faultyGrafter) ChangeGraft(ctx context.Context, tag, path string, change api.GraftChange) (g api.Graft, err error) {
	err = f.doubtful("ChangeGraft "+path, func() error { g, err = f.Grafter.ChangeGraft(ctx, tag, path, change); return err })
	return g, err
}

func (f faultyGrafter) RemoveGraft(ctx context.Context, tag, path string) error {
	return f.doubtful("RemoveGraft "+path, func() error { return f.Grafter.RemoveGraft(ctx, tag, path) })
}

// guestTag is the share's.
const guestTag = "kataShared"

// newDaemon is a daemon with the guest's share.
func newDaemon(t *testing.T) *controltest.Daemon {
	t.Helper()
	d := controltest.New()
	if _, err := d.AddShare(t.Context(), api.ShareSpec{Tag: guestTag}); err != nil {
		t.Fatal(err)
	}
	return d
}

// grafted are the daemon's grafts but the root, by path.
func grafted(t *testing.T, d Grafter) map[string]api.Graft {
	t.Helper()
	list, err := d.Grafts(t.Context(), guestTag)
	if err != nil {
		t.Fatal(err)
	}
	grafts := make(map[string]api.Graft)
	for _, g := range list {
		if g.Path != "/" {
			grafts[g.Path] = g
		}
	}
	return grafts
}

// only is the single graft that there is.
func only(t *testing.T, d Grafter) api.Graft {
	t.Helper()
	grafts := grafted(t, d)
	if len(grafts) != 1 {
		t.Fatalf("there are %d grafts, want one: %v", len(grafts), grafts)
	}
	for _, g := range grafts {
		return g
	}
	panic("unreachable")
}

// newTestSandbox makes a Sandbox, with defaults for tests, that is cleaned up at the end.
func newTestSandbox(t *testing.T, c Config, sys system) *Sandbox {
	t.Helper()
	if c.ID == "" {
		c.ID = "pod1"
	}
	if c.HostDir == "" {
		c.HostDir = filepath.Join(t.TempDir(), "sandboxes")
	}
	c.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, err := newSandbox(c, sys)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// prepare is Prepare, which has to work.
func prepare(t *testing.T, s *Sandbox) {
	t.Helper()
	if err := s.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// write makes a file with a content.
func write(t *testing.T, name, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// mountsBelow are the mount points in dir, sorted.
func mountsBelow(t *testing.T, dir string) []string {
	t.Helper()
	list, err := linux{}.mountinfo()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range list {
		if below(dir, m.path) {
			found = append(found, fmt.Sprintf("%s ro=%v", m.path, m.readOnly))
		}
	}
	slices.Sort(found)
	return found
}

// tree is what is in dir: names, types, modes and content, without crossing into mounts' content.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %v", strings.TrimPrefix(p, dir), info.Mode())
		switch {
		case info.Mode().IsRegular():
			content, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %s", content)
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", to)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return b.String()
}

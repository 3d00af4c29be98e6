package sharer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// guest is an Agent, and a directory that is its guest's root.
type guest struct {
	root string

	mu     sync.Mutex
	calls  []string
	fail   map[string]error // by the last element of the target
	hold   chan struct{}    // what calls wait for
	notify chan struct{}    // has a token after each call
}

func newGuest(t *testing.T) *guest {
	return &guest{root: t.TempDir(), fail: make(map[string]error), notify: make(chan struct{}, 1)}
}

func (g *guest) enter(ctx context.Context, call, target string) error {
	g.mu.Lock()
	hold := g.hold
	g.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls = append(g.calls, call)
	select {
	case g.notify <- struct{}{}:
	default:
	}
	return g.fail[filepath.Base(target)]
}

func (g *guest) CopyFile(ctx context.Context, source, target string) error {
	if err := g.enter(ctx, "copy "+filepath.Base(target), target); err != nil {
		return err
	}
	target = filepath.Join(g.root, target)
	info, err := os.Lstat(source)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.MkdirAll(target, 0o755)
	}
	content, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(filepath.Dir(target), 0o755), os.WriteFile(target, content, 0o644))
}

func (g *guest) Symlink(ctx context.Context, to, target string) error {
	if err := g.enter(ctx, "link "+filepath.Base(target), target); err != nil {
		return err
	}
	target = filepath.Join(g.root, target)
	// What the guest sees through ..data has to be complete by now.
	if filepath.Base(target) == dataLink {
		if _, err := os.Stat(filepath.Join(filepath.Dir(target), to, "complete")); err != nil {
			return fmt.Errorf("..data before its content: %w", err)
		}
	}
	if err := os.Symlink(to, target+".tmp"); err != nil {
		return err
	}
	return os.Rename(target+".tmp", target)
}

func (g *guest) RemoveFile(ctx context.Context, target string) error {
	if err := g.enter(ctx, "remove "+filepath.Base(target), target); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(g.root, target))
}

func (g *guest) failing(name string, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fail[name] = err
}

// until waits until what the guest has is as wanted.
func (g *guest) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-g.notify:
		case <-time.After(20 * time.Millisecond): // the end of a call is after its token
		case <-limit:
			t.Fatalf("%s does not come to be; the guest has\n%s", what, tree(t, g.root))
		}
	}
}

// copying is a prepared sandbox that copies.
func copying(t *testing.T, c Config) (*Sandbox, *guest) {
	t.Helper()
	g := newGuest(t)
	c.Backend = Copy{Agent: g}
	c.GuestDir = "/shared"
	s := newTestSandbox(t, c, linux{})
	prepare(t, s)
	return s, g
}

func TestCopy(t *testing.T) {
	dir := stage(t)
	s, g := copying(t, Config{SandboxBindMounts: []string{filepath.Join(dir, "certs")}})
	for name, link := range map[string]string{"relative": "x", "nowhere": "/no/where"} {
		if err := os.Symlink(link, filepath.Join(dir, "data", name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "data", "sub", "y"), "y")
	if err := syscall.Mkfifo(filepath.Join(dir, "data", "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := Mount{Source: filepath.Join(dir, "data"), Destination: "/data", ReadOnly: true}
	f := mustShare(t, s, "a", &m)
	want := ` drwxr-xr-x
/nowhere Lrwxrwxrwx -> /no/where
/relative Lrwxrwxrwx -> x
/sub drwxr-xr-x
/sub/y -rw-r--r-- y
/x -rw-r--r-- x
`
	if got := tree(t, filepath.Join(g.root, f.GuestPath)); got != want {
		t.Errorf("copied\n%swant\n%s", got, want)
	}
	if m.HostPath != "" {
		t.Errorf("HostPath is %q", m.HostPath)
	}
	if got, err := os.ReadFile(filepath.Join(g.root, "shared/sandbox-mounts/certs/ca")); err != nil || string(got) != "ca" {
		t.Errorf("sandbox bind mount: %q, %v", got, err)
	}
	// One source is copied once, and stays while somebody has it.
	calls := len(g.calls)
	other := Mount{Source: filepath.Join(dir, "data"), Destination: "/other"}
	if again := mustShare(t, s, "b", &other); again.GuestPath != f.GuestPath || len(g.calls) != calls {
		t.Errorf("copied again, to %s: %q", again.GuestPath, g.calls[calls:])
	}
	mustUnshare(t, s, "a", &m)
	if _, err := os.Stat(filepath.Join(g.root, f.GuestPath, "x")); err != nil {
		t.Error(err)
	}
	mustUnshare(t, s, "b", &other)
	if _, err := os.Stat(filepath.Join(g.root, f.GuestPath)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	if _, err := s.ShareRootFilesystem(t.Context(), &Container{ID: "a", RootFs: RootFs{Target: dir}}); err == nil {
		t.Error("a root is copied")
	}
}

// TestIgnored is row C5.
func TestIgnored(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(socket, link); err != nil {
		t.Fatal(err)
	}
	s, g := copying(t, Config{})
	before := tree(t, s.dir)
	for _, source := range []string{fifo, socket, link, "/dev/null"} {
		m := Mount{Source: source, Destination: "/x"}
		f, err := s.ShareFile(t.Context(), &Container{ID: "c"}, &m)
		if f != nil || err != nil {
			t.Errorf("%s: %v, %v; want nil, nil", source, f, err)
		}
		mustUnshare(t, s, "c", &m)
	}
	if len(g.calls) != 0 || tree(t, s.dir) != before {
		t.Errorf("something was done: %q\n%s", g.calls, tree(t, s.dir))
	}
	if f := mustShare(t, s, "c", &Mount{Source: write(t, filepath.Join(dir, "file"), "f"), Destination: "/x"}); f.GuestPath == "" {
		t.Error("a file is left out")
	}
}

// TestCopyFailure makes each call of the agent fail: nothing stays in the guest.
func TestCopyFailure(t *testing.T) {
	dir := stage(t)
	write(t, filepath.Join(dir, "data", "y"), "y")
	s, g := copying(t, Config{})
	for _, name := range []string{"x", "y"} {
		g.failing(name, errInjected)
		m := Mount{Source: filepath.Join(dir, "data"), Destination: "/data"}
		if f, err := s.ShareFile(t.Context(), &Container{ID: "c"}, &m); !errors.Is(err, errInjected) {
			t.Errorf("copy of %s fails: %v, %v", name, f, err)
		}
		if left, err := os.ReadDir(filepath.Join(g.root, "shared")); err != nil || len(left) != 0 {
			t.Errorf("left: %v, %v", left, err)
		}
		g.failing(name, nil)
		mustShare(t, s, "c", &m)
		// An agent that cannot remove leaves it.
		g.failing(filepath.Base(s.shared[0].Path), errors.ErrUnsupported)
		mustUnshare(t, s, "c", &m)
		if err := os.RemoveAll(filepath.Join(g.root, "shared")); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(g.root, "shared"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// configMap is a volume of kubelet's.
type configMap struct {
	t       *testing.T
	dir     string
	version int
}

// podDir is where the pod of a kubelet root has volumes of a type.
func podDir(root, kind string) string {
	return filepath.Join(root, "pods", "b44e3261-7cf0-48d3-83b4-6094bba95dc8", "volumes", kind)
}

func newConfigMap(t *testing.T, root, kind, name string, keys map[string]string) *configMap {
	t.Helper()
	c := &configMap{t: t, dir: filepath.Join(podDir(root, kind), name)}
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c.update(keys)
	return c
}

// update is what kubelet's atomic writer does, step by step.
func (c *configMap) update(keys map[string]string) {
	c.t.Helper()
	check := func(err error) {
		c.t.Helper()
		if err != nil {
			c.t.Fatal(err)
		}
	}
	old, _ := os.Readlink(filepath.Join(c.dir, dataLink))
	c.version++
	data := fmt.Sprintf("..2026_01_02_03_04_05.%09d", c.version)
	check(os.Mkdir(filepath.Join(c.dir, data), 0o755))
	for key, value := range keys {
		check(os.WriteFile(filepath.Join(c.dir, data, key), []byte(value), 0o644))
		if _, err := os.Lstat(filepath.Join(c.dir, key)); err != nil {
			check(os.Symlink(filepath.Join(dataLink, key), filepath.Join(c.dir, key)))
		}
	}
	// The test's own: the agent looks for it.
	check(os.WriteFile(filepath.Join(c.dir, data, "complete"), nil, 0o644))
	check(os.Symlink(data, filepath.Join(c.dir, "..data_tmp")))
	check(os.Rename(filepath.Join(c.dir, "..data_tmp"), filepath.Join(c.dir, dataLink)))
	entries, err := os.ReadDir(c.dir)
	check(err)
	for _, e := range entries {
		if _, ok := keys[e.Name()]; !ok && !strings.HasPrefix(e.Name(), "..") {
			check(os.Remove(filepath.Join(c.dir, e.Name())))
		}
	}
	if old != "" {
		check(os.RemoveAll(filepath.Join(c.dir, old)))
	}
}

// has says whether the guest has just these keys, with these values, and nothing of earlier versions.
func (g *guest) has(dir string, keys map[string]string) func() bool {
	return func() bool {
		entries, err := os.ReadDir(filepath.Join(g.root, dir))
		if err != nil || len(entries) != len(keys)+2 {
			return false
		}
		for key, value := range keys {
			if got, err := os.ReadFile(filepath.Join(g.root, dir, key)); err != nil || string(got) != value {
				return false
			}
		}
		return true
	}
}

// watching starts the watcher, and checks at the end that it stops.
func watching(t *testing.T, s *Sandbox) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- s.StartFileEventWatcher(context.WithoutCancel(t.Context())) }()
	t.Cleanup(func() {
		began := time.Now()
		s.StopFileEventWatcher(context.Background())
		if err := <-done; err != nil {
			t.Errorf("the watcher has ended: %v", err)
		}
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("stop took %v", took)
		}
	})
}

// TestWatchCopies is rows C10 to C12 where files are copied: updates in kubelet's way come to the guest, the data before the link
// to it, keys come and go.
func TestWatchCopies(t *testing.T) {
	for _, kind := range watchableTypes {
		t.Run(kind, func(t *testing.T) {
			root := t.TempDir()
			s, g := copying(t, Config{KubeletRoot: root})
			keys := map[string]string{"a": "1", "b": "2"}
			vol := newConfigMap(t, root, kind, "vol", keys)
			watching(t, s)
			f := mustShare(t, s, "c", &Mount{Source: vol.dir, Destination: "/etc/config", ReadOnly: true})
			if !g.has(f.GuestPath, keys)() {
				t.Fatalf("at first the guest has\n%s", tree(t, g.root))
			}
			for _, keys := range []map[string]string{
				{"a": "changed", "b": "2"},
				{"a": "changed", "b": "2", "new": "key"},
				{"new": "key"},
				{"new": "and", "old": "again"},
			} {
				vol.update(keys)
				g.until(t, fmt.Sprint(keys), g.has(f.GuestPath, keys))
			}
			// Many at once: it is the last that counts.
			for i := range 50 {
				vol.update(map[string]string{"n": fmt.Sprint(i)})
			}
			g.until(t, "the last of many", g.has(f.GuestPath, map[string]string{"n": "49"}))
		})
	}
}

// TestWatchBegins copies what has changed before the watcher runs, and what fails at first.
func TestWatchBegins(t *testing.T) {
	root := t.TempDir()
	s, g := copying(t, Config{KubeletRoot: root})
	vol := newConfigMap(t, root, k8sSecret, "vol", map[string]string{"a": "1"})
	f := mustShare(t, s, "c", &Mount{Source: vol.dir, Destination: "/etc/config"})
	vol.update(map[string]string{"a": "2"})
	g.failing("a", errInjected)
	watching(t, s)
	g.until(t, "a failure", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.calls) > 0 && g.calls[len(g.calls)-1] == "copy a"
	})
	g.failing("a", nil)
	g.until(t, "a change before the start", g.has(f.GuestPath, map[string]string{"a": "2"}))
}

// TestWatchSurvives deletes what is watched and makes it again.
func TestWatchSurvives(t *testing.T) {
	root := t.TempDir()
	s, g := copying(t, Config{KubeletRoot: root})
	vol := newConfigMap(t, root, k8sConfigMap, "vol", map[string]string{"a": "1"})
	other := newConfigMap(t, root, k8sConfigMap, "other", map[string]string{"b": "1"})
	watching(t, s)
	f := mustShare(t, s, "c", &Mount{Source: vol.dir, Destination: "/etc/config"})
	fOther := mustShare(t, s, "c", &Mount{Source: other.dir, Destination: "/etc/other"})
	if err := os.RemoveAll(vol.dir); err != nil {
		t.Fatal(err)
	}
	other.update(map[string]string{"b": "2"})
	g.until(t, "a change elsewhere", g.has(fOther.GuestPath, map[string]string{"b": "2"}))
	if err := os.Mkdir(vol.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	vol.update(map[string]string{"a": "back"})
	g.until(t, "a volume made again", g.has(f.GuestPath, map[string]string{"a": "back"}))
	// One that is not shared any more is not copied any more.
	mustUnshare(t, s, "c", &Mount{Source: vol.dir, Destination: "/etc/config"})
	vol.update(map[string]string{"a": "unseen"})
	other.update(map[string]string{"b": "3"})
	g.until(t, "a change elsewhere", g.has(fOther.GuestPath, map[string]string{"b": "3"}))
	if _, err := os.Stat(filepath.Join(g.root, f.GuestPath)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an unshared volume is in the guest: %v", err)
	}
}

// TestOverflow loses events: everything is looked through.
func TestOverflow(t *testing.T) {
	limit, err := os.ReadFile("/proc/sys/fs/inotify/max_queued_events")
	if err != nil {
		t.Fatal(err)
	}
	var queue int
	if _, err := fmt.Sscan(string(limit), &queue); err != nil || queue > 1<<17 {
		t.Skipf("inotify's queue has %d places (%v): too many to fill in a test", queue, err)
	}
	root := t.TempDir()
	s, g := copying(t, Config{KubeletRoot: root})
	vol := newConfigMap(t, root, k8sConfigMap, "vol", map[string]string{"a": "1"})
	other := newConfigMap(t, root, k8sConfigMap, "other", map[string]string{"a": "1"})
	watching(t, s)
	f := mustShare(t, s, "c", &Mount{Source: vol.dir, Destination: "/etc/config"})
	fOther := mustShare(t, s, "c", &Mount{Source: other.dir, Destination: "/etc/other"})
	g.until(t, "the copy", g.has(f.GuestPath, map[string]string{"a": "1"}))
	// Once this arrives, the other volume is watched.
	other.update(map[string]string{"a": "2"})
	g.until(t, "the copy", g.has(fOther.GuestPath, map[string]string{"a": "2"}))

	// While a call of the agent hangs nobody reads the queue.
	hold := make(chan struct{})
	g.mu.Lock()
	g.hold = hold
	g.mu.Unlock()
	vol.update(map[string]string{"a": "2"})
	for len(s.lock) == 0 {
		time.Sleep(time.Millisecond)
	}
	name := filepath.Join(vol.dir, "..noise")
	for range queue/2 + 1000 { // two events each
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	other.update(map[string]string{"a": "3"}) // which nobody is told
	g.mu.Lock()
	g.hold = nil
	g.mu.Unlock()
	close(hold)
	g.until(t, "what was lost", g.has(fOther.GuestPath, map[string]string{"a": "3"}))
	g.until(t, "a rescan", func() bool { return s.rescans.Load() > 0 })
}

// TestWatchOnce starts the watcher twice, stops it in the middle of a call, and before a start.
func TestWatchOnce(t *testing.T) {
	root := t.TempDir()
	s, g := copying(t, Config{KubeletRoot: root})
	vol := newConfigMap(t, root, k8sConfigMap, "vol", map[string]string{"a": "1"})
	mustShare(t, s, "c", &Mount{Source: vol.dir, Destination: "/etc/config"})
	g.hold = make(chan struct{}) // for ever
	first := make(chan error, 1)
	go func() { first <- s.StartFileEventWatcher(context.Background()) }()
	vol.update(map[string]string{"a": "2"})
	for len(s.lock) == 0 { // it is at the agent
		time.Sleep(time.Millisecond)
	}
	if err := s.StartFileEventWatcher(t.Context()); err != nil {
		t.Errorf("a second start: %v", err)
	}
	began := time.Now()
	for range 2 {
		s.StopFileEventWatcher(t.Context())
		s.watch.mu.Lock()
		if s.watch.cancel != nil {
			t.Error("it still runs")
		}
		s.watch.mu.Unlock()
	}
	if err := <-first; err != nil || time.Since(began) > 20*time.Second {
		t.Errorf("stopped after %v: %v", time.Since(began), err)
	}
	if err := s.StartFileEventWatcher(t.Context()); err != nil {
		t.Errorf("a start after the stop: %v", err)
	}
	g.hold = nil
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	prepare(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { first <- s.StartFileEventWatcher(ctx) }()
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("with its context's end: %v", err)
	}
}

// TestHostileData has a ..data that leads elsewhere.
func TestHostileData(t *testing.T) {
	for _, to := range []string{"/etc", "..", "../x", "..data", "plain", "..a/b"} {
		root := t.TempDir()
		s, g := copying(t, Config{KubeletRoot: root})
		dir := filepath.Join(podDir(root, k8sConfigMap), "vol")
		write(t, filepath.Join(dir, "key"), "x")
		if err := os.Symlink(to, filepath.Join(dir, dataLink)); err != nil {
			t.Fatal(err)
		}
		if f, err := s.ShareFile(t.Context(), &Container{ID: "c"}, &Mount{Source: dir, Destination: "/x"}); err == nil {
			t.Errorf("..data -> %s is followed: %v", to, f)
		}
		if slices.Contains(g.calls, "link ..data") {
			t.Errorf("..data -> %s: %q", to, g.calls)
		}
	}
}

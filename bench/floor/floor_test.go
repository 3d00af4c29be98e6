package floor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// files is how many there are to be listed.
const files = 100

// tree makes what the loops work on.
func tree(t *testing.T) Config {
	t.Helper()
	root := t.TempDir()
	cfg := Config{
		Read: filepath.Join(root, "read"), Written: filepath.Join(root, "written"), Dir: filepath.Join(root, "dir"),
		Cold: filepath.Join(root, "cold"), Scratch: filepath.Join(root, "scratch"),
	}
	paths := map[string]int{cfg.Read: 2 << 20, cfg.Written: 2 << 20}
	for _, name := range []string{"a/b/x", "a/b/y", "c/x", "c/y"} {
		paths[filepath.Join(cfg.Cold, name)] = 0
	}
	for i := range files {
		paths[filepath.Join(cfg.Dir, fmt.Sprint("file-", i))] = 0
	}
	if err := os.Mkdir(cfg.Scratch, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, size := range paths {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, make([]byte, size), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

func open(t *testing.T, cfg Config) *Files {
	t.Helper()
	f, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(cfg.Scratch); err != nil || len(left) > 0 {
			t.Errorf("files are left: %v, %v", left, err)
		}
	})
	return f
}

func TestRun(t *testing.T) {
	cfg := tree(t)
	f := open(t, cfg)
	if len(f.cold) != 4 {
		t.Errorf("%d cold files, want 4", len(f.cold))
	}
	for _, name := range Names() {
		if Calls(name) == "" {
			t.Errorf("%s does not say what it calls", name)
		}
		before := descriptors(t)
		r, err := f.Run(name, 0, 5*time.Millisecond)
		if err != nil {
			t.Error(err)
			continue
		}
		if r.Ops < batch || r.CPU <= 0 || r.Elapsed < 5*time.Millisecond || r.CPU > r.Elapsed+time.Millisecond {
			t.Errorf("%s: %+v", name, r)
		}
		if after := descriptors(t); after != before {
			t.Errorf("%s: %d descriptors, before %d", name, after, before)
		}
		t.Logf("%-14s %8.3f us", name, float64(r.CPU.Nanoseconds())/float64(r.Ops)/1e3)
	}
	for dir, want := range map[string]int{cfg.Dir: files, f.root: 1} {
		if left, err := os.ReadDir(dir); err != nil || len(left) != want {
			t.Errorf("%d files are left in %s, want %d: %v", len(left), dir, want, err)
		}
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

func TestOpenRefuses(t *testing.T) {
	before := descriptors(t)
	good, empty := tree(t), t.TempDir()
	for _, tt := range []struct {
		change func(c *Config)
		want   string
	}{
		{func(c *Config) { c.Cold = empty }, "there are no files"},
		{func(c *Config) { c.Cold = "/nowhere" }, "no such file"},
		{func(c *Config) { c.Dir = c.Cold }, "has 2 entries, expected at least 64"},
		{func(c *Config) { c.Read = filepath.Join(c.Dir, "file-1") }, "expected the same"},
		{func(c *Config) { c.Read, c.Written = c.Written+"x", c.Read }, "no such file"},
		{func(c *Config) { c.Scratch = "/nowhere" }, "no such file"},
	} {
		cfg := good
		tt.change(&cfg)
		if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", cfg, err, tt.want)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
	if left, err := os.ReadDir(good.Scratch); err != nil || len(left) > 0 {
		t.Errorf("files are left: %v, %v", left, err)
	}
}

// TestRunFailsWhereWorkIsNotDone takes what the loops work on away: a floor that does nothing would be a floor to be proud of.
func TestRunFailsWhereWorkIsNotDone(t *testing.T) {
	cfg := tree(t)
	f := open(t, cfg)
	if err := errors.Join(
		os.Remove(filepath.Join(cfg.Dir, "file-1")), os.Remove(filepath.Join(cfg.Cold, "a/b/y")),
		os.Truncate(cfg.Read, 1<<20), os.WriteFile(filepath.Join(cfg.Dir, "missing"), nil, 0o644),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"lookup":      "no such file",
		"lookup-cold": "no such file",
		"lookup-miss": "fstatat of a missing file",
		"read-4k":     "0 of 4096 bytes",
		"nothing":     "expected one of",
	} {
		if _, err := f.Run(name, -1, 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	if err := os.Remove(filepath.Join(cfg.Dir, "missing")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Run("readdirplus", -1, time.Millisecond); err == nil || !strings.Contains(err.Error(), "the directory has 101 entries, expected 102") {
		t.Errorf("readdirplus of a file less: %v", err)
	}
	if _, err := f.Run("getattr", 1023, time.Millisecond); err == nil || !strings.Contains(err.Error(), "run on CPU 1023") {
		t.Errorf("a CPU that does not exist: %v", err)
	}
}

func TestMeasureWake(t *testing.T) {
	// The world is stopped all the time meanwhile, which must not be for ever.
	stop := make(chan struct{})
	var stopping sync.WaitGroup
	stopping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	})
	w, err := MeasureWake(0, 0, 20*time.Millisecond)
	close(stop)
	stopping.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if w.Rounds < 2 || w.RoundTrip <= 0 || w.CPU <= 0 {
		t.Errorf("%+v", w)
	}
	t.Logf("%+v", w)
	if _, err := MeasureWake(0, 1023, time.Millisecond); err == nil || !strings.Contains(err.Error(), "run on CPU 1023") {
		t.Errorf("a CPU that does not exist: %v", err)
	}
}

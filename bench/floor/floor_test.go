package floor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T) *Files {
	t.Helper()
	cold := t.TempDir()
	for _, sub := range []string{"a/b", "c"} {
		if err := os.MkdirAll(filepath.Join(cold, sub), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"x", "y"} {
			if err := os.WriteFile(filepath.Join(cold, sub, name), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	f, err := Open(t.TempDir(), cold)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(f.root); !os.IsNotExist(err) {
			t.Errorf("the files are left: %v", err)
		}
	})
	return f
}

func TestRun(t *testing.T) {
	f := open(t)
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
	left, err := os.ReadDir(filepath.Join(f.root, "tree"))
	if err != nil || len(left) != entries {
		t.Errorf("%d files are left, want %d: %v", len(left), entries, err)
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

func TestOpenWantsColdFiles(t *testing.T) {
	before := descriptors(t)
	if _, err := Open(t.TempDir(), t.TempDir()); err == nil || !strings.Contains(err.Error(), "there are no files") {
		t.Errorf("no cold files: %v", err)
	}
	if _, err := Open(filepath.Join(t.TempDir(), "missing"), ""); err == nil {
		t.Error("a directory that does not exist passes")
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}

// TestRunFailsWhereWorkIsNotDone takes what the loops work on away: a floor that does nothing would be a floor to be proud of.
func TestRunFailsWhereWorkIsNotDone(t *testing.T) {
	f := open(t)
	if err := os.Remove(filepath.Join(f.root, "tree", "file-000007")); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(f.root, "data"), dataSize/2); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.root, "tree", "missing"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"lookup":      "no such file",
		"lookup-miss": "fstatat of a missing file",
		"read-4k":     "0 of 4096 bytes",
		"nothing":     "expected one of",
	} {
		if _, err := f.Run(name, -1, 50*time.Millisecond); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	if err := os.Remove(filepath.Join(f.root, "tree", "missing")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Run("readdirplus", -1, time.Millisecond); err == nil || !strings.Contains(err.Error(), "1001 entries") {
		t.Errorf("readdirplus of 999 files: %v", err)
	}
	if _, err := f.Run("getattr", 1023, time.Millisecond); err == nil || !strings.Contains(err.Error(), "run on CPU 1023") {
		t.Errorf("a CPU that does not exist: %v", err)
	}
}

func TestMeasureWake(t *testing.T) {
	w, err := MeasureWake(0, 0, 20*time.Millisecond)
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

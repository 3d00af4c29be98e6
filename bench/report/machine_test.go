package report

import "testing"

func TestFileSystem(t *testing.T) {
	for dir, want := range map[string]string{"/proc/self": "proc", "/proc": "proc"} {
		if got := fileSystem(dir); got != want {
			t.Errorf("%s is on %q, want %q", dir, got, want)
		}
	}
}

package passthrough

import "testing"

func TestLocalFileSystems(t *testing.T) {
	for dir, want := range map[string]bool{"/dev/shm": true, "/proc/self": false, "/sys": false} {
		g := newGuest(t, Config{Dir: dir})
		if got := g.fs.mounts.at(0).local.Load(); got != want {
			t.Errorf("%s: local is %v, expected %v", dir, got, want)
		}
	}
}

package watch

import (
	"os"
	"syscall"
	"testing"
	"time"
)

// TestFlood has somebody rename a file for as long as it takes; the watcher loses events, says so, and does not forget the rest.
func TestFlood(t *testing.T) {
	dir := t.TempDir()
	var log lockedBuilder
	r := follow(t, Config{Dir: dir, Log: log.logger()}, newInotify, nil)
	write(t, dir+"/a", "")
	cpu := func() time.Duration {
		var u syscall.Rusage
		must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	begun, before := time.Now(), cpu()
	for time.Since(begun) < 2*time.Second {
		must(t, os.Rename(dir+"/a", dir+"/b"), os.Rename(dir+"/b", dir+"/a"))
	}
	t.Logf("%v of processor time in %v, half of it the renames'; %+v", cpu()-before, time.Since(begun), r.w.Stats())
	must(t, os.Mkdir(dir+"/d", 0o755))
	write(t, dir+"/d/end", "")
	r.until("end", func(evs []Event) bool {
		for _, ev := range evs {
			if ev.Path == "/d/end" || ev.Kind == Rescan {
				return true
			}
		}
		return false
	})
	if n := len(log.String()); n > 4<<10 {
		t.Errorf("%d bytes of log", n)
	}
}

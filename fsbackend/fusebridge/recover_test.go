package fusebridge

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

// kill ends the program as nobody expects, and returns when it is gone.
func (s *served) kill(t *testing.T) {
	t.Helper()
	before := s.current.Load()
	pid := 0
	for pid == 0 {
		pid = s.sup.Status().PID // 0 between two starts
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		before.mu.Lock()
		dead := before.dead
		before.mu.Unlock()
		if dead {
			return
		}
		if time.Now().After(end) {
			t.Fatal("the bridge has not seen the end of the program")
		}
	}
}

func TestRecover(t *testing.T) {
	dir := t.TempDir()
	c, s := client(t, loopbackOn(dir), Config{RestartWait: 30 * time.Second})
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a/b/kept", "a/b/moved", "a/b/gone", "a/b/other", "a/b/deep"} {
		write(name, name)
	}
	lookup := func(parent uint64, name string) uint64 {
		t.Helper()
		e, errno := c.Lookup(parent, name)
		if errno != 0 {
			t.Fatalf("LOOKUP %s: %v", name, errno)
		}
		return e.NodeId
	}
	a := lookup(root, "a")
	b := lookup(a, "b")
	kept, moved, gone, other := lookup(b, "kept"), lookup(b, "moved"), lookup(b, "gone"), lookup(b, "other")
	deep := lookup(b, "deep")
	if errno := c.Rename(b, "moved", a, "there", 0); errno != 0 {
		t.Fatal(errno)
	}
	open := func(node uint64, flags uint32) uint64 {
		t.Helper()
		fh, errno := c.Open(node, flags)
		if errno != 0 {
			t.Fatal(errno)
		}
		return fh
	}
	reader, writer, lost := open(kept, unix.O_RDONLY), open(kept, unix.O_RDWR), open(gone, unix.O_RDONLY)
	lister, errno := c.Opendir(b)
	if errno != 0 {
		t.Fatal(errno)
	}
	c.R.Forget(b, 1) // what is in it must be found all the same

	s.kill(t)
	if err := os.Remove(filepath.Join(dir, "a/b/gone")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "a/b/other")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "a/b/other"), 0o755); err != nil {
		t.Fatal(err)
	}

	// Deep first: nothing on the way to it is known to the new program.
	if errno := c.Truncate(deep, 3); errno != 0 {
		t.Errorf("SETATTR of a deep file: %v", errno)
	}
	for _, tt := range []struct {
		what string
		node uint64
		want fsbackend.Errno
		name string
	}{
		{"a file", kept, 0, "a/b/kept"},
		{"a file that was renamed", moved, 0, "a/b/moved"},
		{"a file that is gone", gone, unix.ESTALE, ""},
		{"a file that is a directory now", other, unix.ESTALE, ""},
	} {
		_, errno := c.Chmod(tt.node, 0o600)
		if errno != tt.want {
			t.Errorf("SETATTR of %s: %v, expected %v", tt.what, errno, tt.want)
		}
		if errno == 0 {
			if got := string(contents(t, c, tt.node)); got != tt.name {
				t.Errorf("%s holds %q", tt.what, got)
			}
		}
	}
	if got, errno := c.Read(kept, reader, 0, 100); errno != 0 || string(got) != "a/b/kept" {
		t.Errorf("READ with a handle for reading: %q, %v", got, errno)
	}
	if _, errno := c.Write(kept, writer, 0, []byte("x"), unix.O_RDWR); errno != unix.EIO {
		t.Errorf("WRITE with a handle of a program that has ended: %v", errno)
	}
	if _, errno := c.Read(kept, writer, 0, 100); errno != unix.EIO {
		t.Errorf("READ with a handle for writing of a program that has ended: %v", errno)
	}
	if _, errno := c.Read(gone, lost, 0, 100); errno != unix.ESTALE {
		t.Errorf("READ of a file that is gone: %v", errno)
	}
	if list, errno := c.Readdir(b, lister, 0, 4096, false); errno != 0 && errno != unix.EBADF || errno == 0 && len(list) < 3 {
		t.Errorf("READDIR with a handle: %d entries, %v", len(list), errno)
	}
	if again := lookup(lookup(lookup(root, "a"), "b"), "kept"); again != kept {
		t.Errorf("LOOKUP gives node %d, expected %d still", again, kept)
	}
	c.Release(kept, reader)
	c.Release(kept, writer)
	c.Release(gone, lost)
	c.Releasedir(b, lister)
}

// TestKillUnderLoad kills the program again and again while requests are in flight: EIO, in bounded time, and then it is back.
func TestKillUnderLoad(t *testing.T) {
	dir := t.TempDir()
	for i := range 20 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), []byte(strings.Repeat("x", 100_000)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c, s := client(t, loopbackOn(dir), Config{NoCache: true, RestartWait: 20 * time.Second})
	var group sync.WaitGroup
	stop := make(chan struct{})
	var mu sync.Mutex
	var longest time.Duration
	failed, done := 0, 0
	for w := range 8 {
		group.Go(func() {
			for i := w; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				began := time.Now()
				errno := one(c, fmt.Sprint("f", i%20), w)
				mu.Lock()
				longest = max(longest, time.Since(began))
				switch errno {
				case 0:
					done++
				case unix.EIO:
					failed++
				default:
					t.Errorf("errno %v", errno)
				}
				mu.Unlock()
			}
		})
	}
	for range 5 {
		mu.Lock()
		target := done + 50
		mu.Unlock()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
			mu.Lock()
			enough := done >= target
			mu.Unlock()
			if enough {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("it does not come back: %d done, %d EIO, %+v, current %p dead %v", done, failed, s.sup.Status(), s.current.Load(), s.current.Load().dead)
			}
		}
		s.kill(t)
	}
	close(stop)
	group.Wait()
	t.Logf("%d done, %d EIO, %d restarts, longest %s", done, failed, s.sup.Status().Restarts, longest)
	if failed == 0 || longest > 30*time.Second {
		t.Errorf("%d requests failed, the longest took %s", failed, longest)
	}
	if errno := one(c, "f1", 1); errno != 0 {
		t.Errorf("afterwards: %v", errno)
	}
}

// one looks a file up, reads all of it in large pieces, writes a little and lets go.
func one(c *fsbackendtest.Client, name string, w int) fsbackend.Errno {
	e, errno := c.Lookup(root, name)
	if errno != 0 {
		return errno
	}
	defer c.R.Forget(e.NodeId, 1)
	fh, errno := c.Open(e.NodeId, unix.O_RDWR)
	if errno != 0 {
		return errno
	}
	defer c.Release(e.NodeId, fh)
	got, errno := c.Read(e.NodeId, fh, 0, 100_000)
	if errno != 0 {
		return errno
	}
	if len(got) != 100_000 || got[50_000] != 'x' {
		return unix.EDOM
	}
	_, errno = c.Write(e.NodeId, fh, uint64(w), []byte("xyz"), unix.O_RDWR)
	return errno
}

// TestProgramThatDoesNotStart has the program end for good: requests fail in bounded time.
func TestProgramThatDoesNotStart(t *testing.T) {
	c, _, f, l := newFake(t, Config{RestartWait: 50 * time.Millisecond}, dir(nil))
	close(l)
	_ = unix.Shutdown(f.fd, unix.SHUT_RDWR)
	for range 3 {
		began := time.Now()
		if _, errno := c.Lookup(root, "x"); errno != unix.EIO {
			t.Errorf("LOOKUP: %v", errno)
		}
		if d := time.Since(began); d > 20*time.Second {
			t.Errorf("it took %s", d)
		}
	}
}

package virtiofs

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/share"
)

// TestGraftsComeAndGo has a guest use grafts with lanes of their own, and those without, that are removed while a file is open:
// nothing is left of any, FORGETs on their way included.
func TestGraftsComeAndGo(t *testing.T) {
	removed := make(chan *fsbackend.Part, 1)
	s, err := share.New(share.Config{
		Dynamic: true, Grafts: []share.Graft{{Path: "/", Backend: newMem(t)}},
		OnRemoved: func(p *fsbackend.Part, err error) {
			if err != nil {
				t.Errorf("close of %s: %v", p.Path, err)
			}
			removed <- p
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, s, Config{})
	r.mount()
	lookup := func(parent uint64, name string) uint64 {
		t.Helper()
		return le64(r.must(request, call{op: fuseproto.FUSE_LOOKUP, node: parent, args: body(name), outArgs: 128}).data)
	}
	cycle := func(i int) {
		if err := s.Add(share.Graft{Path: "/g", Backend: newMem(t), Isolated: i%3 > 0, Slow: i%3 == 2, Timeout: time.Minute}); err != nil {
			t.Fatal(err)
		}
		dir := lookup(1, "g")
		node := lookup(dir, "file")
		fh := le64(r.must(request, call{op: fuseproto.FUSE_OPEN, node: node, args: body(uint32(unix.O_RDWR), uint32(0)), outArgs: 16}).data)
		r.must(request, fsync(node, fh))
		if err := s.Remove("/g"); err != nil {
			t.Fatal(err)
		}
		if p := r.do(request, call{op: fuseproto.FUSE_LOOKUP, node: 1, args: body("g"), outArgs: 128}); p.errno != unix.ENOENT {
			t.Fatalf("LOOKUP of what was removed: %v, expected ENOENT", p.errno)
		}
		r.must(request, read(node, fh, 0, 4096))
		r.do(hiprio, forget(node, 1))
		r.do(request, call{op: fuseproto.FUSE_RELEASE, node: node, args: body(fh, uint32(0), uint32(0), uint64(0))})
		r.do(hiprio, forget(dir, 1))
		p := <-removed
		if !p.Gone() {
			t.Fatal("the part has not gone")
		}
		// What comes too late is answered, on the threads of others: with ENOENT until all FORGETs have been counted.
		for wait := time.Millisecond; ; wait *= 2 {
			p := r.do(request, getattr(node))
			if p.errno == unix.ESTALE {
				break
			}
			if p.errno != unix.ENOENT || wait > patience/2 {
				t.Fatalf("GETATTR in what has gone: %v, expected ESTALE", p.errno)
			}
			time.Sleep(wait)
		}
	}
	lanes := func() int {
		r.device.pool.mu.Lock()
		defer r.device.pool.mu.Unlock()
		return len(r.device.pool.lanes)
	}
	settled := func(goroutines int) bool {
		for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
			if lanes() == 0 && runtime.NumGoroutine() <= goroutines {
				return true
			}
			time.Sleep(time.Millisecond)
		}
		return false
	}
	for i := range 10 {
		cycle(i)
	}
	settled(1 << 20)
	goroutines, fds := runtime.NumGoroutine(), openFDs(t)
	for i := range 150 {
		cycle(i)
	}
	if !settled(goroutines) {
		t.Errorf("%d lanes and %d goroutines are left, expected none and %d", lanes(), runtime.NumGoroutine(), goroutines)
	}
	if n := openFDs(t); n > fds {
		t.Errorf("%d fds are open, %d before", n, fds)
	}
}

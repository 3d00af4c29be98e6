package mem

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

// Inodes are those that the guest knows, and not those that there are.
func TestStats(t *testing.T) {
	f, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b", "c"} {
		if err := f.WriteFile(name, nil); err != nil {
			t.Fatal(err)
		}
	}
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	is := func(when string, want uint64) {
		t.Helper()
		if got := f.Stats(); got != (fsbackend.Stats{Inodes: want}) {
			t.Errorf("%s: %+v, expected %d inodes", when, got, want)
		}
	}
	is("idle", 1)
	e, _ := c.Lookup(fsbackendtest.Root, "a")
	_, _ = c.Lookup(fsbackendtest.Root, "a")
	_, _ = c.Lookup(fsbackendtest.Root, "nothing")
	is("one file looked up twice", 2)
	if _, errno := c.Create(fsbackendtest.Root, "d", unix.O_RDWR, 0o644); errno != 0 {
		t.Fatal(errno)
	}
	is("one created", 3)
	f.Forget(e.NodeId, 1)
	is("half forgotten", 3)
	f.Forget(e.NodeId, 5)
	f.Forget(e.NodeId, 1)
	is("one forgotten", 2)
	f.Reset()
	is("the session's end", 1)
}

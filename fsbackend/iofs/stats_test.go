package iofs

import (
	"testing"
	"testing/fstest"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

func TestStats(t *testing.T) {
	f := newFS(t, Config{FS: fstest.MapFS{"a": &fstest.MapFile{}, "b": &fstest.MapFile{}}})
	c := &fsbackendtest.Client{R: fsbackend.Resolve(f)}
	e, errno := c.Lookup(fsbackendtest.Root, "a")
	if n := f.Stats().Inodes; errno != 0 || n != 2 {
		t.Errorf("%d inodes after LOOKUP (%v), expected 2", n, errno)
	}
	f.Forget(e.NodeId, 1)
	if n := f.Stats().Inodes; n != 1 {
		t.Errorf("%d inodes after FORGET, expected 1", n)
	}
}

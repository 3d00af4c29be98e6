package gofuse

import (
	"os"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

func TestStats(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/a", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	root, err := fs.NewLoopbackRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewFromRoot(root, nil, Config{})
	if err != nil {
		t.Fatal(err)
	}
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	e, errno := c.Lookup(fsbackendtest.Root, "a")
	if n := b.Stats().Inodes; errno != 0 || n != 2 {
		t.Errorf("%d inodes after LOOKUP (%v), expected 2", n, errno)
	}
	b.Forget(e.NodeId, 1)
	if n := b.Stats().Inodes; n != 1 {
		t.Errorf("%d inodes after FORGET, expected 1", n)
	}
}

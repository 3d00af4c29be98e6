package mem

import (
	"testing"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

func TestWorkNode(t *testing.T) {
	f, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := fsbackendtest.Client{R: fsbackend.Resolve(f)}
	work := f.WorkNode()
	made, errno := c.Mkdir(work, "made", 0o755)
	if errno != 0 {
		t.Fatalf("MKDIR in the work directory: %v", errno)
	}
	if names := c.List(t, fsbackendtest.Root, 4096); len(names) > 0 {
		t.Errorf("the root lists %q", names)
	}
	if errno := c.Rename(work, "made", fsbackendtest.Root, "there", 0); errno != 0 {
		t.Errorf("RENAME out of the work directory: %v", errno)
	}
	if found, errno := c.Lookup(fsbackendtest.Root, "there"); errno != 0 || found.NodeId != made.NodeId {
		t.Errorf("LOOKUP after RENAME: node %d, %v, expected %d", found.NodeId, errno, made.NodeId)
	}
	f.Forget(work, 1)
	f.Reset()
	if _, errno := c.Getattr(work); errno != 0 || f.WorkNode() != work {
		t.Errorf("the work directory is node %d after Reset, GETATTR of %d: %v", f.WorkNode(), work, errno)
	}
}

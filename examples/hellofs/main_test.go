package main

import (
	"testing"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

// TestHello reads the file as a guest would.
func TestHello(t *testing.T) {
	b, _, err := extension{}.TryHandleMount(nil, nil, "", true)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	c := &fsbackendtest.Client{R: fsbackend.Resolve(b)}
	e, errno := c.Lookup(fsbackendtest.Root, "hello.txt")
	if errno != 0 {
		t.Fatal(errno)
	}
	fh, errno := c.Open(e.NodeId, 0)
	if errno != 0 {
		t.Fatal(errno)
	}
	if data, errno := c.Read(e.NodeId, fh, 0, 100); errno != 0 || string(data) != "hello from my own backend\n" {
		t.Errorf("READ gave %q, %v", data, errno)
	}
}

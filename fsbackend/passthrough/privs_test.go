package passthrough

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestPrivsAreNotForgotten lets looks that began before a set-user-id bit was set end after it.
func TestPrivsAreNotForgotten(t *testing.T) {
	fs := &FS{}
	fs.nodes.init(16, func(int32) {})
	s, id, n, _ := fs.nodes.insert(key{ino: 7}, rootID, []byte("f\x00"))
	if n == nil {
		t.Fatal("no room for a node")
	}
	s.mu.Unlock()
	if fs.privsOf(id).set() {
		t.Error("a new node has bits")
	}
	before := fs.privsOf(id)
	fs.setsPrivs(id)
	between := fs.privsOf(id)
	fs.setsPrivs(id)
	for _, since := range []privs{before, between} {
		if fs.privsGone(id, since); !fs.privsOf(id).set() {
			t.Errorf("a look that began at %#x has made the bits forgotten", since)
		}
	}
	if fs.privsGone(id, fs.privsOf(id)); fs.privsOf(id).set() {
		t.Error("a look that began after they were set, and saw none, has not")
	}
	s, n = fs.nodes.lock(id)
	n.privs.seen(0o777)
	n.privs.seen(unix.S_ISUID)
	s.mu.Unlock()
	if !fs.privsOf(id).set() {
		t.Error("bits that were seen are forgotten")
	}
}

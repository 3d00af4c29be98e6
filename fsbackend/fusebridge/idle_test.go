package fusebridge

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestIdle has a guest come back to what it has forgotten: the program is asked again only when what it has said is good no longer, and
// it is told to forget as many lookups as it has answered.
func TestIdle(t *testing.T) {
	var mu sync.Mutex
	lookups, forgotten := map[uint64]uint64{}, map[uint64]uint64{}
	asked := 0
	next := fuseproto.EntryOut{EntryValid: 1000, AttrValid: 1000} // the next answer
	next.Mode = unix.S_IFREG | 0o644
	raws := map[string]uint64{}
	c, b, f, _ := newFake(t, Config{}, func(f *fake, h *fuseproto.InHeader, body []byte) {
		mu.Lock()
		defer mu.Unlock()
		switch fuseproto.Opcode(h.Opcode) {
		case fuseproto.FUSE_LOOKUP:
			name := unix.ByteSliceToString(body)
			if raws[name] == 0 {
				raws[name] = uint64(100 + len(raws))
			}
			asked++
			e := next
			e.NodeId, e.Ino = raws[name], raws[name]
			lookups[e.NodeId]++
			f.reply(h.Unique, 0, bytesOf(&e))
		case fuseproto.FUSE_FORGET:
			forgotten[h.NodeId] += word(body)
		case fuseproto.FUSE_BATCH_FORGET:
			for body = body[8:]; len(body) > 0; body = body[16:] {
				forgotten[word(body)] += word(body[8:])
			}
		}
	})
	times := func() int {
		mu.Lock()
		defer mu.Unlock()
		return asked
	}
	set := func(change func()) {
		mu.Lock()
		defer mu.Unlock()
		change()
	}
	visit := func(name string, want int) uint64 {
		t.Helper()
		e, errno := c.Lookup(fsbackendtest.Root, name)
		if errno != 0 {
			t.Fatalf("LOOKUP %s: %v", name, errno)
		}
		if a, errno := c.Getattr(e.NodeId); errno != 0 || a.Mode != e.Mode {
			t.Errorf("GETATTR %s: mode %o, %v", name, a.Mode, errno)
		}
		b.Forget(e.NodeId, 1)
		if _, errno := c.Getattr(e.NodeId); errno != unix.ESTALE {
			t.Errorf("GETATTR of what is forgotten: %v, expected ESTALE", errno)
		}
		if n := times(); n != want {
			t.Errorf("%s: the program has been asked %d times, expected %d", name, n, want)
		}
		return e.NodeId
	}
	id := visit("a", 1)
	if again := visit("a", 1); again != id {
		t.Errorf("node %d is %d when looked up again", id, again)
	}
	var out fuseproto.EntryOut
	quick := &fsbackend.Context{} // on a thread that must not sleep
	if errno := b.Lookup(quick, fsbackendtest.Root, fsbackend.MakeName("a"), &out); errno != 0 || out.NodeId != id {
		t.Errorf("LOOKUP of what is known: node %d, %v", out.NodeId, errno)
	}
	b.Forget(id, 1)
	if errno := b.Lookup(quick, fsbackendtest.Root, fsbackend.MakeName("unknown"), &out); errno != fsbackend.ErrMayBlock || times() != 1 {
		t.Errorf("LOOKUP of what is not known: %v, the program has been asked %d times", errno, times())
	}

	// Another name for it, and then another file by its number.
	set(func() { raws["same"] = raws["a"] })
	if again := visit("same", 2); again != id {
		t.Errorf("node %d is %d by another name", id, again)
	}
	set(func() { raws["dir"] = raws["a"]; next.Mode = unix.S_IFDIR | 0o755; next.Generation = 1 })
	if again := visit("dir", 3); again == id {
		t.Errorf("node %d is another file's", id)
	}

	// What the program takes back is asked for again.
	inval := append(bytesOf(&struct{ parent, len uint64 }{fuseproto.FUSE_ROOT_ID, 3}), "dir\x00"...)
	o := fuseproto.OutHeader{Length: uint32(outHeaderSize + len(inval)), Status: notifyInvalEntry}
	f.send(append(bytes.Clone(bytesOf(&o)), inval...))
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		b.mu.Lock()
		told := b.root.children["dir"] == nil || b.root.children["dir"].until == 0
		b.mu.Unlock()
		if told {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the name is good still")
		}
	}
	visit("dir", 4)

	// What is not good for any time, and what there are too many of.
	set(func() { next.EntryValid = 0 })
	visit("short", 5)
	visit("short", 6)
	set(func() { next.EntryValid = 1000 })
	for i := range maxIdle + 10 {
		e, errno := c.Lookup(fsbackendtest.Root, fmt.Sprint(i))
		if errno != 0 {
			t.Fatal(errno)
		}
		b.Forget(e.NodeId, 1)
	}
	b.mu.Lock()
	idle := 0
	for n := b.idle.oldest; n != nil; n = n.newer {
		idle++
	}
	if idle != maxIdle || b.idle.len != idle || len(b.nodes) != 1 || len(b.root.children) != idle {
		t.Errorf("%d nodes idle, of %d, %d others, %d names", idle, b.idle.len, len(b.nodes), len(b.root.children))
	}
	b.mu.Unlock()
	b.Reset()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		mu.Lock()
		same := maps.Equal(lookups, forgotten)
		mu.Unlock()
		if same {
			break
		}
		if time.Now().After(end) {
			mu.Lock()
			defer mu.Unlock()
			raws := slices.DeleteFunc(slices.Collect(maps.Keys(lookups)), func(raw uint64) bool { return lookups[raw] == forgotten[raw] })
			t.Fatalf("nodes %v have been looked up and forgotten unequally often, as %d %d times and %d", raws, raws[0], lookups[raws[0]], forgotten[raws[0]])
		}
	}
}

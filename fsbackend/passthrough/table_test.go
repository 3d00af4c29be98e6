package passthrough

import (
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// modelNode is what the simple model of the table knows of a node.
type modelNode struct {
	key     key
	nlookup uint64
	parent  uint64
	name    string
	handle  string
}

type model struct {
	nodes map[uint64]*modelNode
}

func (m *model) located(parent uint64, name string) []uint64 {
	var ids []uint64
	for id, n := range m.nodes {
		if n.parent == parent && n.name == name && name != "" {
			ids = append(ids, id)
		}
	}
	return ids
}

// reap takes out what nothing needs any more.
func (m *model) reap() {
	for again := true; again; {
		again = false
		for id, n := range m.nodes {
			if n.nlookup > 0 || slices.ContainsFunc(slices.Collect(maps.Values(m.nodes)), func(k *modelNode) bool { return k.parent == id }) {
				continue
			}
			delete(m.nodes, id)
			again = true
		}
	}
}

// runTable plays the calls that script encodes, three bytes each, against a table and the model.
func runTable(t *testing.T, script []byte) {
	var tab table
	dropped := 0
	tab.init(24, func(int32) { dropped++ })
	m := model{nodes: map[uint64]*modelNode{}}
	names := []string{"a", "b", "a name", strings.Repeat("long", 10), strings.Repeat("x", 24), strings.Repeat("y", 255)}
	var ids []uint64
	pick := func(b byte) uint64 {
		if len(ids) == 0 || b%8 == 0 {
			return rootID
		}
		return ids[int(b/8)%len(ids)]
	}
	for ; len(script) >= 3; script = script[3:] {
		op, a, b := script[0], script[1], script[2]
		name := names[int(b)%len(names)]
		switch op % 6 {
		case 0, 1: // LOOKUP
			k := key{ino: uint64(a % 40), btime: int64(a % 3), typ: typeRegular}
			parent := pick(b)
			s, id, n, rel := tab.insert(k, parent, []byte(name))
			s.mu.Unlock()
			tab.settle(rel)
			if n == nil {
				if len(m.nodes) < 24 {
					t.Fatalf("insert refused with %d nodes", len(m.nodes))
				}
				break
			}
			have := m.nodes[id]
			if have == nil {
				for other, o := range m.nodes {
					if o.key == k {
						t.Fatalf("file %+v is node %#x and %#x", k, other, id)
					}
				}
				have = &modelNode{key: k}
				m.nodes[id] = have
				ids = append(ids, id)
			} else if have.key != k {
				t.Fatalf("file %+v got the node of %+v", k, have.key)
			}
			have.nlookup++
			have.name = name
			if have.parent = parent; m.nodes[parent] == nil && parent != rootID {
				have.parent = parent // of a directory that is gone: it counts nowhere
			}
		case 2: // FORGET
			id := pick(a)
			died := tab.forget(id, uint64(b))
			have := m.nodes[id]
			if id == rootID || have == nil || have.nlookup == 0 {
				if died {
					t.Fatalf("forget of %#x killed what was not there", id)
				}
				break
			}
			if want := uint64(b) >= have.nlookup; died != want {
				t.Fatalf("forget %d of %d lookups: died %v", b, have.nlookup, died)
			}
			have.nlookup -= min(have.nlookup, uint64(b))
		case 3: // UNLINK
			parent := pick(a)
			if at := m.located(parent, name); len(at) == 1 {
				m.nodes[at[0]].parent, m.nodes[at[0]].name = 0, ""
				tab.moved(parent, []byte(name), 0, nil)
			} else if len(at) == 0 {
				tab.moved(parent, []byte(name), 0, nil)
			}
		case 4: // RENAME
			parent, to, newName := pick(a), pick(b), names[int(a)%len(names)]
			if at := m.located(parent, name); len(at) == 1 && at[0] != to {
				m.nodes[at[0]].parent, m.nodes[at[0]].name = to, newName
				tab.moved(parent, []byte(name), to, []byte(newName))
			}
		case 5: // a file handle
			id := pick(a)
			s, n := tab.lock(id)
			if (n != nil) != (m.nodes[id] != nil) {
				t.Fatalf("node %#x: in the table %v, in the model %v", id, n != nil, m.nodes[id] != nil)
			}
			if n != nil {
				h := sys.FileHandle{Bytes: uint32(b) % (sys.MaxHandleSize + 1), Type: int32(a)}
				binary.LittleEndian.PutUint16(h.Handle[:], uint16(a))
				_, slot, _ := splitID(id)
				s.setHandle(slot, n, &h)
				m.nodes[id].handle = fmt.Sprint(h.Bytes, string(h.Handle[:h.Bytes]))
			}
			s.mu.Unlock()
		}
		m.reap()
		for id, want := range m.nodes {
			s, n := tab.lock(id)
			if n == nil {
				t.Fatalf("node %#x is gone: %+v", id, want)
			}
			var loc location
			_, slot, _ := splitID(id)
			s.describe(slot, n, &loc)
			nlookup := n.nlookup
			s.mu.Unlock()
			if loc.key != want.key || nlookup != want.nlookup || string(loc.name[:loc.nameLen]) != want.name || want.name != "" && loc.parent != want.parent {
				t.Fatalf("node %#x is %+v with %d lookups, expected %+v", id, loc, nlookup, want)
			}
			if want.handle != "" && fmt.Sprint(loc.handle.Bytes, string(loc.handle.Handle[:loc.handle.Bytes])) != want.handle {
				t.Fatalf("node %#x lost its handle", id)
			}
		}
		if got := int(tab.count.Load()); got != len(m.nodes) {
			t.Fatalf("%d nodes, expected %d", got, len(m.nodes))
		}
		if err := tab.check(); err != nil {
			t.Fatal(err)
		}
	}
	if dropped != 0 {
		t.Fatalf("%d descriptors dropped, none was held", dropped)
	}
}

func FuzzTable(f *testing.F) {
	f.Add([]byte{0, 1, 1, 0, 2, 9, 2, 1, 9, 4, 0, 8, 3, 1, 1})
	f.Add([]byte{0, 1, 0, 0, 2, 8, 0, 3, 16, 2, 8, 255, 2, 16, 255, 2, 24, 255})
	f.Add([]byte{0, 5, 3, 5, 8, 60, 5, 8, 3, 4, 0, 3, 2, 8, 1})
	f.Fuzz(func(t *testing.T, script []byte) {
		runTable(t, script[:min(len(script), 900)])
	})
}

func TestNodeidsAreNotReusedSoon(t *testing.T) {
	var tab table
	tab.init(10, func(int32) {})
	seen := map[uint64]bool{}
	for range 1000 {
		s, id, _, rel := tab.insert(key{ino: 7}, rootID, []byte("n"))
		s.mu.Unlock()
		tab.settle(rel)
		if seen[id] || id == rootID || id>>48 != 0 {
			t.Fatalf("nodeid %#x again, or out of range", id)
		}
		seen[id] = true
		tab.forget(id, 1)
	}
}

func TestLookupCountSaturates(t *testing.T) {
	n := node{nlookup: ^uint64(0) - 1}
	n.count()
	n.count()
	if n.nlookup != ^uint64(0) {
		t.Errorf("count is %d after passing its largest value", n.nlookup)
	}
}

// residentBytes is the process's resident memory after a collection.
func residentBytes(t testing.TB) int {
	t.Helper()
	debug.FreeOSMemory()
	return rssNow(t)
}

func TestMemoryOfAMillionInodes(t *testing.T) {
	inodes := 1_000_000
	if raceEnabled {
		t.Log("the race detector's shadow memory counts, too: checking the table only")
		inodes /= 10
	}
	g := newGuest(t, Config{})
	base := residentBytes(t)
	ids := make([]uint64, 0, inodes)
	held := residentBytes(t) - base // of ids: nothing yet, the memory comes with its use
	for i := range inodes {
		var st unix.Statx_t
		st.Ino, st.Mode, st.Mask = uint64(i+100), unix.S_IFREG|0o644, unix.STATX_BTIME
		name := fmt.Appendf(nil, "file-%07d.txt", i)
		m, _ := g.fs.mounts.of(&st, 0)
		s, id, _, rel := g.fs.nodes.insert(keyOf(&st, m), rootID, name)
		s.mu.Unlock()
		g.fs.nodes.settle(rel)
		ids = append(ids, id)
	}
	full := residentBytes(t)
	each := float64(full-base-held-8*inodes) / float64(inodes)
	t.Logf("%.0f bytes resident for each of %d inodes", each, inodes)
	if !raceEnabled && each > 220 {
		t.Errorf("%.0f bytes for each inode, expected at most 220", each)
	}
	if err := g.fs.nodes.check(); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		g.fs.Forget(id, 1)
	}
	g.fs.trims.Wait()
	after := rssNow(t) - 8*inodes
	t.Logf("base %d KiB, full %d KiB, after FORGETs %d KiB", base>>10, full>>10, after>>10)
	if !raceEnabled && after > base+8<<20 {
		t.Errorf("%d KiB resident after the FORGETs, expected about the %d KiB from before", after>>10, base>>10)
	}
	if got := g.fs.nodes.count.Load(); got != 0 {
		t.Errorf("%d nodes left", got)
	}
	runtime.KeepAlive(ids)
}

// rssNow is the process's resident memory as it is.
func rssNow(t testing.TB) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(data))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

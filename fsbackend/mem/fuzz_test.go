package mem

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// program reads operations and their arguments from fuzzed bytes; past their end, all is 0.
type program struct{ rest []byte }

func (p *program) byte() byte {
	if len(p.rest) == 0 {
		return 0
	}
	b := p.rest[0]
	p.rest = p.rest[1:]
	return b
}

// number is small, near a page's or the type's limit, or anything.
func (p *program) number() uint64 {
	switch b := p.byte(); b % 8 {
	case 0, 1, 2:
		return uint64(p.byte())
	case 3, 4:
		return uint64(b/8)*pageSize + uint64(p.byte()) - 128
	case 5:
		return maxSize - uint64(p.byte())
	case 6:
		return -uint64(p.byte())
	default:
		return uint64(p.byte())<<40 | uint64(p.byte())<<20 | uint64(p.byte())
	}
}

// fuzzGuest is what the operations have been given: numbers that may have died since.
type fuzzGuest struct {
	*program
	*fsbackendtest.Client
	f       *FS
	nodes   []uint64
	handles [][2]uint64 // node, handle
}

func (g *fuzzGuest) node() uint64         { return g.nodes[int(g.byte())%len(g.nodes)] }
func (g *fuzzGuest) handle() [2]uint64    { return g.handles[int(g.byte())%len(g.handles)] }
func (g *fuzzGuest) name() string         { return fmt.Sprintf("n%d", g.byte()%8) }
func (g *fuzzGuest) open(node, fh uint64) { g.handles = append(g.handles, [2]uint64{node, fh}) }

func (g *fuzzGuest) found(e *fuseproto.EntryOut, errno fsbackend.Errno) {
	if errno == 0 {
		g.nodes = append(g.nodes, e.NodeId)
	}
}

// step runs one operation; its errno does not matter.
func (g *fuzzGuest) step() {
	h := g.handle()
	switch g.byte() % 24 {
	case 0:
		e, errno := g.Lookup(g.node(), g.name())
		g.found(&e, errno)
	case 1:
		g.R.Forget(g.node(), uint64(g.byte()))
	case 2:
		e, errno := g.Mkdir(g.node(), g.name(), uint32(g.number()))
		g.found(&e, errno)
	case 3:
		e, errno := g.Mknod(g.node(), g.name(), uint32(g.byte())<<12, uint32(g.byte()))
		g.found(&e, errno)
	case 4:
		e, errno := g.Symlink(g.node(), g.name(), "target"[:1+g.byte()%6])
		g.found(&e, errno)
	case 5:
		e, errno := g.Link(g.node(), g.node(), g.name())
		g.found(&e, errno)
	case 6:
		_ = g.Unlink(g.node(), g.name())
	case 7:
		_ = g.Rmdir(g.node(), g.name())
	case 8:
		_ = g.Rename(g.node(), g.name(), g.node(), g.name(), uint32(g.byte()%8))
	case 9, 10:
		out, errno := g.Create(g.node(), g.name(), uint32(g.number()), uint32(g.number()))
		g.found(&out.EntryOut, errno)
		if errno == 0 {
			g.open(out.NodeId, out.Fh)
		}
	case 11:
		out, errno := g.Tmpfile(g.node(), uint32(g.number()), 0o600)
		g.found(&out.EntryOut, errno)
		if errno == 0 {
			g.open(out.NodeId, out.Fh)
		}
	case 12:
		node := g.node()
		if fh, errno := g.Open(node, uint32(g.number())); errno == 0 {
			g.open(node, fh)
		}
	case 13:
		g.Release(h[0], h[1])
	case 14, 15:
		_, _ = g.Write(h[0], h[1], g.number(), make([]byte, int(g.byte())*40), uint32(g.number()))
	case 16:
		_, _ = g.Read(h[0], h[1], g.number(), int(g.byte())*40)
	case 17:
		_ = g.Truncate(g.node(), g.number())
	case 18:
		_ = g.Fallocate(h[0], h[1], g.number(), g.number(), []uint32{0, 1, 3, 16, 17, 8}[g.byte()%6])
	case 19:
		to := g.handle()
		in := fuseproto.CopyFileRangeIn{FhIn: h[1], OffIn: g.number(), NodeIdOut: to[0], FhOut: to[1], OffOut: g.number(), Len: g.number()}
		in.NodeId = h[0]
		_, _ = g.CopyFileRange(in)
	case 20:
		_, _ = g.Lseek(h[0], h[1], g.number(), 3+uint32(g.byte()%2))
	case 21:
		node := g.node()
		if fh, errno := g.Opendir(node); errno == 0 {
			entries, _ := g.Readdir(node, fh, g.number(), int(g.byte())*8, g.byte()%2 == 0)
			for _, e := range entries {
				if e.Entry.NodeId != 0 {
					g.nodes = append(g.nodes, e.Entry.NodeId)
				}
			}
			g.open(node, fh)
		}
	case 22:
		if name := "user." + g.name(); g.byte()%3 == 0 {
			_ = g.Removexattr(g.node(), name)
		} else {
			_ = g.Setxattr(g.node(), name, make([]byte, g.byte()), uint32(g.byte()%4))
		}
	case 23:
		if g.byte()%8 == 0 {
			g.f.Reset()
		}
	}
}

// clean removes all below dir, which may be reached by its nodeid.
func (g *fuzzGuest) clean(t *testing.T, dir uint64) {
	for _, name := range g.List(t, dir, 4096) {
		e, errno := g.Lookup(dir, name)
		if errno != 0 {
			t.Fatalf("LOOKUP of listed %q: %v", name, errno)
		}
		if e.Mode&unix.S_IFMT == unix.S_IFDIR {
			g.clean(t, e.NodeId)
			errno = g.Rmdir(dir, name)
		} else {
			errno = g.Unlink(dir, name)
		}
		if errno != 0 {
			t.Fatalf("remove %q: %v", name, errno)
		}
	}
}

// FuzzMem runs any sequence of operations in a small tree and checks its bookkeeping, then empties the tree, which must leave
// nothing in use.
func FuzzMem(f *testing.F) {
	f.Add([]byte("\x00\x09\x00\x01\x00\x02\x00\x00\x01\x0e\x00\x10\x20\x01\x00\x06\x00\x01\x01\x0d"))
	f.Add([]byte("\x00\x02\x00\x01\x00\x00\x00\x02\x01\x02\x00\x00\x00\x08\x00\x01\x01\x02\x00\x00\x15\x00\x00\x00\xff\x00"))
	f.Add([]byte("\x00\x0b\x00\x00\x02\x01\x05\x01\x00\x03\x01\x12\x03\x10\x03\x20\x03\x01\x11\x01\x00\x05"))
	f.Fuzz(func(t *testing.T, ops []byte) {
		tree, err := New(Config{MaxBytes: 128 << 10, MaxInodes: 24})
		if err != nil {
			t.Fatal(err)
		}
		g := &fuzzGuest{
			program: &program{ops},
			Client:  &fsbackendtest.Client{R: fsbackend.Resolve(tree)},
			f:       tree, nodes: []uint64{fsbackendtest.Root, 99}, handles: [][2]uint64{{1, 99}},
		}
		for range 400 {
			if len(g.rest) == 0 {
				break
			}
			g.step()
		}
		if err := check(tree); err != nil {
			t.Fatalf("after the operations: %v", err)
		}
		tree.Reset()
		if err := check(tree); err != nil {
			t.Fatalf("after Reset: %v", err)
		}
		g.clean(t, fsbackendtest.Root)
		for i := range 8 {
			_ = g.Removexattr(fsbackendtest.Root, fmt.Sprint("user.n", i))
		}
		tree.Reset()
		if used, nodes := tree.bytes.Load(), len(tree.nodes); used != 0 || nodes != 1 {
			t.Fatalf("the empty tree uses %d bytes and %d inodes, expected 0 and its root", used, nodes)
		}
	})
}

package mem

import (
	"bytes"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// TestReadAllocatesNothing holds READ to the rule for the hot path.
func TestReadAllocatesNothing(t *testing.T) {
	f, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("sluice.."), 512)
	if err := f.WriteFile("dir/file", want); err != nil {
		t.Fatal(err)
	}
	c := new(fsbackend.Context)
	var dir, file fuseproto.EntryOut
	if errno := f.Lookup(c, fuseproto.FUSE_ROOT_ID, fsbackend.MakeName("dir"), &dir); errno != 0 {
		t.Fatal(errno)
	}
	if errno := f.Lookup(c, dir.NodeId, fsbackend.MakeName("file"), &file); errno != 0 {
		t.Fatal(errno)
	}
	var in fuseproto.OpenIn
	var opened fuseproto.OpenOut
	in.NodeId = file.NodeId
	if errno := f.Open(c, &in, &opened); errno != 0 {
		t.Fatal(errno)
	}
	r := newReader(file.NodeId, opened.Fh)
	once := func() {
		if errno := r.read(f); errno != 0 || r.dst.Written() != len(r.buf) {
			t.Fatalf("read %d bytes: %v, expected all %d", r.dst.Written(), errno, len(r.buf))
		}
	}
	if allocs := testing.AllocsPerRun(100, once); allocs != 0 {
		t.Errorf("READ of 4 KiB allocates %v times, expected never", allocs)
	}
	if !bytes.Equal(r.buf, want) {
		t.Error("READ returned other bytes than were written")
	}
}

// reader makes the same READ again and again, as a worker does with its one request.
type reader struct {
	ctx fsbackend.Context
	in  fuseproto.ReadIn
	buf []byte
	iov [1]unix.Iovec
	dst fsbackend.Sink
}

func newReader(node, fh uint64) *reader {
	r := &reader{buf: make([]byte, 4096)}
	r.in.NodeId, r.in.Fh, r.in.Size = node, fh, 4096
	return r
}

func (r *reader) read(f *FS) fsbackend.Errno {
	r.iov[0] = sys.MakeIovec(r.buf)
	r.dst.Reset(r.iov[:], 0, uint64(len(r.buf)))
	return f.Read(&r.ctx, &r.in, &r.dst)
}

func TestConformance(t *testing.T) {
	fsbackendtest.Run(t, fsbackendtest.Config{
		New: func(t *testing.T) fsbackend.Backend {
			f, err := New(Config{})
			if err != nil {
				t.Fatal(err)
			}
			return f
		},
		Check:       func(b fsbackend.Backend) error { return check(b.(*FS)) },
		AsRoot:      true,
		SparseBlock: pageSize,
	})
}

// check compares the bookkeeping of a tree at rest with what is in it.
func check(f *FS) error {
	var bytes int64
	links := make(map[*node]uint32)
	for id, n := range f.nodes {
		if n.id != id {
			return fmt.Errorf("node %d is under %d", n.id, id)
		}
		pages := int64(0)
		last := -1
		for _, c := range n.data.chunks {
			if int(c.index) <= last || c.used == 0 {
				return fmt.Errorf("node %d: chunk %d after %d, %d pages used", id, c.index, last, c.used)
			}
			last = int(c.index)
			used := 0
			for slot, p := range c.pages {
				if p == nil {
					continue
				}
				used++
				at := (c.index*chunkPages + uint64(slot)) * pageSize
				for i := range p {
					if at+uint64(i) >= n.size && p[i] != 0 {
						return fmt.Errorf("node %d: byte %d beyond size %d is %#x", id, at+uint64(i), n.size, p[i])
					}
				}
			}
			if used != c.used {
				return fmt.Errorf("node %d: chunk %d has %d pages, counted %d", id, c.index, used, c.used)
			}
			pages += int64(used)
		}
		if pages != n.data.pages.Load() {
			return fmt.Errorf("node %d has %d pages, counted %d", id, pages, n.data.pages.Load())
		}
		bytes += pages*pageSize + int64(len(n.target))
		for name, value := range n.xattrs {
			bytes += xattrCost(name, value)
		}
		if n.dir == nil {
			continue
		}
		if n.nlink > 0 {
			links[n] += 2
		}
		live := 0
		for _, e := range n.dir.order {
			if e.node != nil {
				live++
			}
		}
		if live != len(n.dir.names) || len(n.dir.order)-live != n.dir.removed {
			return fmt.Errorf("directory %d: %d names, %d in order, %d removed of %d", id, len(n.dir.names), live, n.dir.removed, len(n.dir.order))
		}
		for name, e := range n.dir.names {
			bytes += entryCost + int64(len(name))
			if e.name != name || f.nodes[e.node.id] != e.node {
				return fmt.Errorf("directory %d: %q is entry %q of a node that is not there", id, name, e.name)
			}
			if e.node.dir != nil {
				if e.node.dir.parent != n {
					return fmt.Errorf("directory %d: %q says another is above it", id, name)
				}
				links[n]++
			} else {
				links[e.node]++
			}
		}
	}
	known := int64(0)
	opens := make(map[*node]int)
	for _, h := range f.handles {
		opens[h.node]++
	}
	for id, n := range f.nodes {
		if n.nlink != links[n] || n.opens != opens[n] {
			return fmt.Errorf("node %d: %d links of %d, %d handles of %d", id, n.nlink, links[n], n.opens, opens[n])
		}
		if n.lookups.Load() > 0 {
			known++
		}
		if n.nlink == 0 && n.opens == 0 && n.lookups.Load() == 0 {
			return fmt.Errorf("node %d is not referred to, but there", id)
		}
	}
	if known != f.known.Load() {
		return fmt.Errorf("%d nodes are known, counted %d", known, f.known.Load())
	}
	if bytes != f.bytes.Load() {
		return fmt.Errorf("%d bytes used, counted %d", bytes, f.bytes.Load())
	}
	return nil
}

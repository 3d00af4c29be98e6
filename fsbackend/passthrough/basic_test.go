package passthrough

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// each runs a test with nodes found again by file handle and by name.
func each(t *testing.T, f func(t *testing.T, cfg Config)) {
	t.Run("handles", func(t *testing.T) { f(t, Config{MaxFDs: MinMaxFDs}) })
	t.Run("names", func(t *testing.T) { f(t, Config{MaxFDs: MinMaxFDs, NoFileHandles: true}) })
}

func TestLifeOfAFile(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		f := g.create(rootID, "a")
		if n, e := g.put(f.NodeId, f.Fh, 0, "hello", 0, 0); n != 5 || e != fsbackend.OK {
			t.Fatalf("WRITE: %d, %v", n, e)
		}
		if got := g.read(f.NodeId, f.Fh); got != "hello" {
			t.Fatalf("READ: %q", got)
		}
		if a, e := g.getattr(f.NodeId); e != fsbackend.OK || a.Size != 5 || a.Mode != unix.S_IFREG|0o644 || a.Nlink != 1 {
			t.Fatalf("GETATTR: %+v, %v", a, e)
		}
		g.ok("RENAME", g.rename(rootID, "a", rootID, "b", 0))
		g.release(f.NodeId, f.Fh)
		fh := g.open(f.NodeId, unix.O_RDONLY)
		if got := g.read(f.NodeId, fh); got != "hello" {
			t.Fatalf("READ after RENAME: %q", got)
		}
		if e := g.lookup("b"); e.NodeId != f.NodeId {
			t.Fatalf("LOOKUP after RENAME: node %#x, expected %#x", e.NodeId, f.NodeId)
		}
		g.ok("UNLINK", g.unlink(rootID, "b"))
		if a, e := g.getattr(f.NodeId); e != fsbackend.OK || a.Nlink != 0 {
			t.Fatalf("GETATTR of an open unlinked file: %+v, %v", a, e)
		}
		if _, e := g.setattr(f.NodeId, func(in *fuseproto.SetattrIn) { in.Valid, in.Size = fuseproto.FATTR_SIZE, 2 }); e != fsbackend.OK {
			t.Fatalf("SETATTR of an open unlinked file: %v", e)
		}
		if got := g.read(f.NodeId, fh); got != "he" {
			t.Fatalf("READ after truncation: %q", got)
		}
		g.release(f.NodeId, fh)
		_, e := g.tryRead(f.NodeId, fh, 0, 1)
		g.fails("READ of a released handle", e, unix.EBADF)
		g.fs.Forget(f.NodeId, 2)
		_, e = g.getattr(f.NodeId)
		g.fails("GETATTR of a forgotten node", e, unix.ESTALE)
	})
}

func TestListing(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		dir := g.mkdir(rootID, "d")
		want := map[string]bool{".": true, "..": true}
		for i := range 300 {
			name := "file" + string(rune('a'+i%26)) + padded(i)
			want[name] = true
			if err := os.WriteFile(g.path("d/"+name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for _, plus := range []bool{false, true} {
			for _, size := range []int{448, 4096, 1 << 16} {
				got := map[string]bool{}
				for _, d := range g.readdir(dir.NodeId, plus, size) {
					if got[d.name] {
						t.Fatalf("plus=%v size=%d: %q twice", plus, size, d.name)
					}
					got[d.name] = true
					if plus && d.name[0] == 'f' {
						if d.entry.NodeId == 0 || d.entry.Attr.Mode != unix.S_IFREG|0o600 || d.ino != d.entry.Attr.Ino {
							t.Fatalf("READDIRPLUS entry %+v", d)
						}
						if fh, e := g.tryOpen(d.entry.NodeId, 0); e != fsbackend.OK {
							t.Fatalf("OPEN of a listed file: %v", e)
						} else {
							g.release(d.entry.NodeId, fh)
						}
					}
				}
				if len(got) != len(want) {
					t.Fatalf("plus=%v size=%d: %d entries, expected %d", plus, size, len(got), len(want))
				}
			}
		}
	})
}

func padded(i int) string {
	return string([]byte{byte('0' + i/100), byte('0' + i/10%10), byte('0' + i%10)})
}

package overlay

import (
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestStress has several threads change the same merged directories, and files that are copied up, while others list and read them
// and sessions end: what is answered is what others' changes explain, the tables agree at the end, and no layer has anything left.
func TestStress(t *testing.T) {
	for _, resets := range []bool{false, true} {
		s := newStack(t, 2)
		fill(t, rand.New(rand.NewPCG(1, 2)), s.lowers[0], 80)
		fill(t, rand.New(rand.NewPCG(3, 4)), s.lowers[1], 80)
		o := s.open(t)
		var group sync.WaitGroup
		for i := range 6 {
			group.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(i), 5))
				for j := range 100 {
					what := act(rnd, o)
					if i == 0 && j%5 == 0 {
						_, _ = o.snapshot() // others change what is listed: it may say that
					}
					for _, bad := range []string{"input/output", "function not", "resource busy", "%!"} {
						if strings.Contains(what, bad) {
							t.Errorf("%s", what)
						}
					}
				}
			})
		}
		if resets {
			for range 20 {
				o.fs.Reset()
			}
		}
		group.Wait()
		if resets {
			o.fs.Reset()
		}
		if err := o.fs.check(); err != nil {
			t.Error(err)
		}
		for _, l := range o.fs.layers {
			if got := l.r.Stats(); got.Inodes != 1 || got.FDs.Open != 0 {
				t.Errorf("layer %s holds %+v, expected its root alone", l.name, got)
			}
		}
		tree := snap(t, "at rest", o)
		if err := o.fs.Close(); err != nil {
			t.Error(err)
		}
		again := s.open(t)
		differences(t, "opened again", snap(t, "again", again), tree)
		_ = again.fs.Close()
	}
}

// slow is a backend all of whose calls may sleep, and which some calls fail of.
type slow struct {
	*mem.FS
	t      *testing.T
	broken bool
}

func (*slow) Slow() bool { return true }

func (s *slow) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) errno {
	if !c.MayBlock {
		s.t.Errorf("LOOKUP of %s in a slow layer may not sleep", name)
	}
	if s.broken {
		return unix.EIO
	}
	return s.FS.Lookup(c, parent, name, out)
}

func (s *slow) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) errno {
	if !c.MayBlock {
		s.t.Error("READ of a slow layer may not sleep")
	}
	return s.FS.Read(c, in, dst)
}

// TestSlowLayer has what is in the upper layer be served by threads that may not sleep, though a layer is slow, and go on when that
// fails.
func TestSlowLayer(t *testing.T) {
	lower := &slow{FS: newMem(t), t: t}
	for _, name := range []string{"d/f", "d/g"} {
		if err := lower.WriteFile(name, []byte("lower")); err != nil {
			t.Fatal(err)
		}
	}
	o := newOurTree(newOverlay(t, Config{Upper: newMem(t), Lowers: []Layer{{Name: "slow", Backend: lower}}}))
	defer o.fs.Close()
	if o.R.Slow {
		t.Fatal("the overlay is slow as a whole")
	}
	for _, err := range []error{o.mkdir("own", 0o755), o.create("own/x", 0o644), o.write("d/f", 0, "upper")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	_ = o.names(t)
	own, err := o.walk("own")
	if err != nil {
		t.Fatal(err)
	}
	d, err := o.walk("d")
	if err != nil {
		t.Fatal(err)
	}
	lower.broken = true
	c := &fsbackend.Context{} // which may not sleep
	var out fuseproto.EntryOut
	if e := o.fs.Lookup(c, own.NodeId, fsbackend.MakeName("x"), &out); e != 0 {
		t.Errorf("LOOKUP in a directory of the upper layer's own: %v", e)
	}
	if e := o.fs.Lookup(c, own.NodeId, fsbackend.MakeName("nothing"), &out); e != unix.ENOENT {
		t.Errorf("LOOKUP of nothing in a directory of the upper layer's own: %v, expected ENOENT", e)
	}
	if e := o.fs.Lookup(c, d.NodeId, fsbackend.MakeName("f"), &out); e != 0 {
		t.Errorf("LOOKUP of a copy in a merged directory: %v", e)
	}
	if e := o.fs.Lookup(c, d.NodeId, fsbackend.MakeName("g"), &out); e != fsbackend.ErrMayBlock {
		t.Errorf("LOOKUP of a file of the slow layer: %v, expected ErrMayBlock", e)
	}
	if _, err := o.walk("d/g"); !errors.Is(err, unix.EIO) {
		t.Errorf("LOOKUP of a file of the broken layer: %v, expected EIO", err)
	}
	if err := o.write("own/x", 0, "goes on"); err != nil {
		t.Errorf("write to the upper layer while another is broken: %v", err)
	}
}

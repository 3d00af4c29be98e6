package share

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Stats implements fsbackend.Statser.
func (b *spy) Stats() fsbackend.Stats {
	return fsbackend.Stats{Inodes: 10, FDs: fsbackend.FDs{Open: 100}}
}

// moody is a backend whose Stats must not be asked for.
type moody struct{ *spy }

func (moody) Stats() fsbackend.Stats { panic("asked") }

func TestStats(t *testing.T) {
	host := t.TempDir()
	write(t, host+"/f", "")
	g := mount(t, fuseproto.FUSE_SUBMOUNTS, Graft{Path: "/", Backend: newMem(t)},
		Graft{Path: "/host", Backend: newPassthrough(t, host)},
		Graft{Path: "/spy", Backend: &spy{quiet: true}},
		Graft{Path: "/ext", Backend: moody{&spy{quiet: true}}, Isolated: true})
	idle := g.s.Stats()
	if idle.Inodes != 1+1+10 || idle.Tiers.OPath != 1 || idle.FDs.OPath != 1 || idle.FDs.Open != 100 {
		t.Errorf("idle: %+v, expected two roots and what the spy says", idle)
	}
	g.put(root, "m", "")
	f := g.walk("/host/f")
	if _, errno := g.Open(f.NodeId, unix.O_RDONLY); errno != 0 {
		t.Fatal(errno)
	}
	s := g.s.Stats()
	if s.Inodes != idle.Inodes+2 || s.Tiers.OPath != 2 || s.FDs.OPath != 2 || s.FDs.Open != 101 {
		t.Errorf("%+v, expected one more file in each of two grafts, one of them open", s)
	}
}

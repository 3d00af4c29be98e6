package lazyimage

import (
	"context"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/overlay"
	"github.com/sluicefs/sluice/fuseproto"
)

// Single layers, stacked by the daemon's own overlay, are what is merged here; and an image below an overlay can be written to.
func TestBelowAnOverlay(t *testing.T) {
	for seed := range uint64(3) {
		packed := randomLayers(t, rand.New(rand.NewPCG(seed, 15)), 1e9)
		layer := func(cfg Config) *FS {
			s := new(fake)
			for _, p := range packed {
				s.add(t, p, 16)
			}
			cfg.Store = s.wire(t)
			f, err := New(context.Background(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
		stack := func(cfg overlay.Config) *image {
			o, err := overlay.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := o.Close(); err != nil {
					t.Error(err)
				}
			})
			i := &image{Client: &fsbackendtest.Client{R: fsbackend.Resolve(o)}}
			i.R.Init(fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION, Flags: fuseproto.FUSE_DO_READDIRPLUS})
			return i
		}
		merged := layer(Config{Merge: true})
		want := snapshotOf(t, &image{Client: &fsbackendtest.Client{R: fsbackend.Resolve(merged)}}).unlinked()
		var lowers []overlay.Layer
		for n := range packed {
			lowers = append([]overlay.Layer{{Backend: layer(Config{Layer: n}), StableIno: true}}, lowers...)
		}
		snapshotOf(t, stack(overlay.Config{Lowers: lowers})).unlinked().compare(t, "single layers below an overlay", want)

		upper, err := mem.New(mem.Config{})
		if err != nil {
			t.Fatal(err)
		}
		i := stack(overlay.Config{Lowers: []overlay.Layer{{Backend: merged, StableIno: true}}, Upper: upper})
		got := snapshotOf(t, i).unlinked()
		delete(want, "") // the upper layer's
		delete(got, "")
		got.compare(t, "an image below an upper layer", want)
		for p, line := range want {
			e := i.walk(t, p)
			if e.Mode&unix.S_IFMT != unix.S_IFREG {
				continue
			}
			fh, errno := i.Open(e.NodeId, unix.O_RDWR)
			if errno != 0 {
				t.Fatalf("OPEN of %s for writing: %v", p, errno)
			}
			if _, errno := i.Write(e.NodeId, fh, e.Size, []byte("more"), unix.O_RDWR); errno != 0 {
				t.Errorf("WRITE to %s: %v", p, errno)
			}
			i.Release(e.NodeId, fh)
			if b := i.cat(t, p); len(b) != int(e.Size)+4 || string(b[e.Size:]) != "more" {
				t.Errorf("%s, which was %s, is of %d bytes after a WRITE of 4", p, line, len(b))
			}
		}
	}
}

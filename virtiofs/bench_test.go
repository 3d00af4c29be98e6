package virtiofs

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/share"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// readers is a rig with READs that are offered again and again.
type readers struct {
	*rig
	chains []vqtest.Chain
}

// newReaders finds "file" by way of path and makes n READs of 4 KiB of it.
func newReaders(b *testing.B, backend fsbackend.Backend, path []string, n int) *readers {
	r := &readers{rig: newRig(b, backend, Config{})}
	r.must(request, initCall())
	node := uint64(fuseproto.FUSE_ROOT_ID)
	for _, name := range append(slices.Clone(path), "file") {
		p := r.must(request, call{op: fuseproto.FUSE_LOOKUP, node: node, args: body(name), outArgs: 128})
		node = binary.LittleEndian.Uint64(p.data)
	}
	p := r.must(request, call{op: fuseproto.FUSE_OPEN, node: node, args: body(uint32(unix.O_RDONLY), uint32(0)), outArgs: 16})
	fh := binary.LittleEndian.Uint64(p.data)
	r.must(request, read(node, fh, 0, 4096))
	for i := range n {
		c := read(node, fh, uint64(i%16)<<12, 4096)
		header := body(uint32(40+len(c.args)), uint32(c.op), uint64(i+1), node, uint32(0), uint32(0), uint32(1), uint32(0))
		r.chains = append(r.chains, r.mem.Build(vqtest.Request{Header: header, Args: c.args, OutData: c.outData}))
	}
	return r
}

// round offers all READs, kicks once, and waits for all answers.
func (r *readers) round() {
	q := r.queues[request]
	for _, c := range r.chains {
		if _, ok := q.OfferIndirect(c); !ok {
			r.t.Fatal("no descriptor is free")
		}
	}
	r.kick(request)
	for left := len(r.chains); left > 0; {
		_, written, ok := q.Used()
		switch {
		case ok && written != 16+4096:
			r.t.Fatalf("a reply has %d bytes, expected 16 and 4096", written)
		case ok:
			left--
		case !q.EnableInterrupt():
			awaitFD(r.t, q.call.Int())
		}
	}
}

// BenchmarkREAD has a front-end read through the whole device: passthrough alone, and in Shares whose grafts may change, in turn, so
// that what else the machine does is the same for all. The unit x-alone is how many times what the tree alone takes, by lower quartiles: two threads do it, and what makes them wait is
// nothing of ours.
func BenchmarkREAD(b *testing.B) {
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<16), 0o644); err != nil {
		b.Fatal(err)
	}
	newBackend := func() fsbackend.Backend {
		fs, err := passthrough.New(passthrough.Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		return fs
	}
	newShare := func(grafts int) fsbackend.Backend {
		cfg := share.Config{Dynamic: true, Grafts: []share.Graft{{Path: "/", Backend: newBackend()}}}
		for i := range grafts {
			cfg.Grafts = append(cfg.Grafts, share.Graft{Path: fmt.Sprint("/g", i), Backend: newBackend()})
		}
		s, err := share.New(cfg)
		if err != nil {
			b.Fatal(err)
		}
		return s
	}
	for _, batch := range []int{1, 64} {
		b.Run(fmt.Sprint(batch), func(b *testing.B) {
			list := []struct {
				name string
				*readers
				taken []time.Duration
			}{
				{name: "alone", readers: newReaders(b, newBackend(), nil, batch)},
				{name: "root", readers: newReaders(b, newShare(1), nil, batch)},
				{name: "1", readers: newReaders(b, newShare(1), []string{"g0"}, batch)},
				{name: "1000", readers: newReaders(b, newShare(1000), []string{"g500"}, batch)},
			}
			for b.Loop() {
				for i := range list {
					r := &list[i]
					r.round()
					const rounds = 4
					begin := time.Now()
					for range rounds {
						r.round()
					}
					r.taken = append(r.taken, time.Since(begin)/rounds)
				}
			}
			quartile := func(i int) float64 {
				slices.Sort(list[i].taken)
				return float64(list[i].taken[len(list[i].taken)/4])
			}
			b.ReportMetric(quartile(0)/float64(batch), "ns-alone")
			for i := 1; i < len(list); i++ {
				b.ReportMetric(quartile(i)/quartile(0), list[i].name+"-x-alone")
			}
		})
	}
}

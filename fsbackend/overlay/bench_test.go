package overlay

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// side is passthrough, or an overlay of it, with the same names in the same directory.
type side struct {
	*fsbackendtest.Client
	dir uint64
}

// BenchmarkMerged has CPU times of an overlay in a merged directory, one half of whose names is in the upper layer, over those of
// passthrough: medians of what they take by turns.
func BenchmarkMerged(b *testing.B) {
	const few, many = 500, 20000
	dir := memDir(b)
	for _, size := range []int{few, many} {
		for i := range size {
			layer := "upper"
			if i%2 == 0 {
				layer = "lower"
			}
			for _, layer := range []string{layer, "alone"} {
				at := fmt.Sprintf("%s/%s/%d", dir, layer, size)
				if i < 2 {
					_ = os.MkdirAll(at, 0o755)
				}
				_ = os.MkdirAll(dir+"/work", 0o755)
				put(b, at, 0, fmt.Sprintf("name%d.txt", i))
			}
		}
	}
	alone := &side{Client: &fsbackendtest.Client{R: fsbackend.Resolve(newPassthrough(b, dir+"/alone", ""))}}
	merged := &side{Client: &fsbackendtest.Client{R: fsbackend.Resolve(newOverlay(b, Config{
		Upper: newPassthrough(b, dir+"/upper", dir+"/work"), Lowers: []Layer{{Backend: newPassthrough(b, dir+"/lower", "")}},
	}))}}
	defer alone.R.Close()
	defer merged.R.Close()
	c := &fsbackend.Context{MayBlock: true}
	name := make([]fsbackend.Name, few)
	fresh := make([]fsbackend.Name, few)
	for i := range name {
		name[i], fresh[i] = fsbackend.MakeName(fmt.Sprintf("name%d.txt", i)), fsbackend.MakeName(fmt.Sprintf("fresh%d", i))
	}
	ok := func(e errno) {
		if e != 0 {
			b.Fatal(e)
		}
	}
	var entry fuseproto.EntryOut
	lookup := func(s *side, from, step int) {
		for i := from; i < few; i += step {
			ok(s.R.Lookup(c, s.dir, name[i], &entry))
			s.R.Forget(entry.NodeId, 1)
		}
	}
	list := func(s *side, keep bool) (nodes []uint64) {
		fh, e := s.Opendir(s.dir)
		ok(e)
		for off := uint64(0); ; {
			entries, e := s.Readdir(s.dir, fh, off, 1<<15, true)
			ok(e)
			if len(entries) == 0 {
				break
			}
			for _, d := range entries {
				off = d.Off
				if d.Entry.NodeId == 0 {
					continue
				}
				if nodes = append(nodes, d.Entry.NodeId); !keep {
					s.R.Forget(d.Entry.NodeId, 1)
				}
			}
		}
		s.Releasedir(s.dir, fh)
		return nodes
	}
	for _, row := range []struct {
		name string
		size int
		do   func(s *side)
	}{
		{"lookup of what is in the upper layer", few, func(s *side) { lookup(s, 1, 2) }},
		{"lookup of what is below", few, func(s *side) { lookup(s, 0, 2) }},
		{"lookup of nothing", few, func(s *side) {
			for _, n := range fresh {
				_ = s.R.Lookup(c, s.dir, n, &entry)
			}
		}},
		{"readdirplus", few, func(s *side) { list(s, false) }},
		{"create and unlink", few, func(s *side) { makeAndRemove(s, c, fresh, ok) }},
		{"create and unlink among many", many, func(s *side) { makeAndRemove(s, c, fresh, ok) }},
	} {
		b.Run(row.name, func(b *testing.B) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for _, s := range []*side{alone, merged} {
				d, e := s.Lookup(root, fmt.Sprint(row.size))
				ok(e)
				s.dir = d.NodeId
				_, _ = s.Lookup(s.dir, "asked")
				row.do(s)
			}
			var ratios []float64
			for range 9 {
				var spent [2]time.Duration
				for spent[0] < 40*time.Millisecond { // CPU time is counted in ticks
					for i, s := range []*side{alone, merged} {
						start := cpu()
						row.do(s)
						spent[i] += cpu() - start
					}
				}
				ratios = append(ratios, float64(spent[1])/float64(spent[0]))
			}
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "ratio")
		})
	}
}

func makeAndRemove(s *side, c *fsbackend.Context, names []fsbackend.Name, ok func(errno)) {
	for _, n := range names {
		var out fuseproto.CreateOut
		in := fuseproto.CreateIn{InHeader: header(s.dir), Flags: unix.O_RDWR | unix.O_CREAT, Mode: unix.S_IFREG | 0o644}
		ok(s.R.Create(c, &in, n, &out))
		s.Release(out.NodeId, out.Fh)
		ok(s.R.Unlink(c, s.dir, n))
		s.R.Forget(out.NodeId, 1)
	}
}

func cpu() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_THREAD, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

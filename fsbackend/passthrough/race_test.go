package passthrough

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestReplacedWhileOpened opens a file over and over while the host replaces it by rename as fast as it can.
func TestReplacedWhileOpened(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		const size = 3*pageSize + 100
		version := func(b byte) string { return strings.Repeat(string(b), size) }
		g.write("f", version('a'))
		for i := range 20 {
			g.write(fmt.Sprintf("other%d", i), "")
		}
		var stop atomic.Bool
		var host sync.WaitGroup
		var replaced atomic.Int64
		host.Go(func() {
			for i := 0; !stop.Load(); i++ {
				if err := os.WriteFile(g.path("new"), []byte(version(byte('a'+i%26))), 0o644); err != nil {
					t.Error(err)
					return
				}
				if err := os.Rename(g.path("new"), g.path("f")); err != nil {
					t.Error(err)
					return
				}
				replaced.Add(1)
			}
		})
		var guests sync.WaitGroup
		for range 3 {
			guests.Go(func() {
				for i := range 3400 {
					entry, e := g.tryLookup(rootID, "f")
					if e != fsbackend.OK {
						t.Errorf("LOOKUP: %v", e)
						return
					}
					if i%7 == 0 { // others push its descriptor towards the end
						other := g.lookup(fmt.Sprintf("other%d", i%20))
						g.fs.Forget(other.NodeId, 1)
					}
					fh, e := g.tryOpen(entry.NodeId, unix.O_RDONLY)
					if e != fsbackend.OK {
						t.Errorf("OPEN: %v", e)
						return
					}
					data, e := g.tryRead(entry.NodeId, fh, 0, 1<<16)
					if e != fsbackend.OK || len(data) != size || data != version(data[0]) {
						t.Errorf("READ: %v, %d bytes, torn", e, len(data))
					}
					g.release(entry.NodeId, fh)
					g.fs.Forget(entry.NodeId, 1)
				}
			})
		}
		guests.Wait()
		stop.Store(true)
		host.Wait()
		if replaced.Load() < 100 {
			t.Errorf("the host replaced the file %d times only", replaced.Load())
		}
		if err := g.fs.check(); err != nil {
			t.Error(err)
		}
	})
}

// TestTreeBeyondTheBudget walks 10,000 files with eight descriptors.
func TestTreeBeyondTheBudget(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		cfg.Dir = fastDir(t)
		g := newGuest(t, cfg)
		const dirs, files = 100, 100
		for d := range dirs {
			// Every tenth directory lies ten deep.
			dir := g.path(fmt.Sprintf("d%d", d))
			if d%10 == 0 {
				dir = filepath.Join(dir, "1/2/3/4/5/6/7/8/9")
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			for f := range files {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("f", f)), fmt.Append(nil, d, "/", f), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		base := inodeFDs(t, g.dir) // the root's
		var nodes []uint64
		var walk func(dir uint64, plus bool)
		walk = func(dir uint64, plus bool) {
			for _, d := range g.readdir(dir, plus, 4096) {
				if d.name == "." || d.name == ".." {
					continue
				}
				entry := d.entry
				if !plus {
					var e fsbackend.Errno
					if entry, e = g.tryLookup(dir, d.name); e != fsbackend.OK {
						t.Fatalf("LOOKUP %s: %v", d.name, e)
					}
				}
				nodes = append(nodes, entry.NodeId)
				if d.typ == typeDir {
					walk(entry.NodeId, plus)
				}
			}
		}
		walk(rootID, true)
		walk(rootID, false)
		if want := 2 * (dirs*files + dirs + 9*10); len(nodes) != want {
			t.Fatalf("%d nodes, expected %d", len(nodes), want)
		}
		rand.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
		for i, node := range nodes {
			a, e := g.getattr(node)
			if e != fsbackend.OK {
				t.Fatalf("GETATTR of node %#x: %v", node, e)
			}
			if a.Mode&unix.S_IFMT == unix.S_IFREG && i%4 == 0 {
				fh := g.open(node, unix.O_RDONLY)
				if data := g.read(node, fh); !strings.Contains(data, "/") {
					t.Fatalf("READ: %q", data)
				}
				g.release(node, fh)
			}
			if i%50 == 0 {
				if n := inodeFDs(t, g.dir) - base; n > MinMaxFDs {
					t.Fatalf("%d inode descriptors, expected at most %d", n, MinMaxFDs)
				}
			}
		}
		if err := g.fs.check(); err != nil {
			t.Error(err)
		}
		for _, node := range nodes {
			g.fs.Forget(node, 1)
		}
		if n := g.fs.nodes.count.Load(); n != 0 {
			t.Errorf("%d nodes left after every lookup was taken back", n)
		}
	})
}

// TestEvictionOfDyingNodes has nodes forgotten while their descriptors are being taken away.
func TestEvictionOfDyingNodes(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		const files, threads, held = 64, 8, 6
		for i := range files {
			g.write(fmt.Sprint("f", i), "")
		}
		// What must not matter takes longer here: a dead node's slot is dropped once its lock is free.
		drop := g.fs.nodes.drop
		g.fs.nodes.drop = func(slot int32) {
			for range 50 {
				runtime.Gosched()
			}
			drop(slot)
		}
		var wg sync.WaitGroup
		for i := range threads {
			wg.Go(func() {
				var nodes [held]uint64 // more than have descriptors, so that there is always one to evict
				for j := range 5000 {
					out, e := g.tryLookup(rootID, fmt.Sprint("f", (i*7+j)%files))
					if e != fsbackend.OK {
						t.Errorf("LOOKUP: %v", e)
						return
					}
					g.fs.Forget(nodes[j%held], 1)
					nodes[j%held] = out.NodeId
				}
				for _, node := range nodes {
					g.fs.Forget(node, 1)
				}
			})
		}
		wg.Wait()
		if err := g.fs.check(); err != nil {
			t.Error(err)
		}
		if n := g.fs.nodes.count.Load(); n != 0 {
			t.Errorf("%d nodes left after every lookup was taken back", n)
		}
	})
}

// TestBudgetWithManyThreads has more calls at once than there are descriptors, two nodes each.
func TestBudgetWithManyThreads(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		base := inodeFDs(t, g.dir)
		const threads = 24
		var dirs [threads]uint64
		for i := range dirs {
			dirs[i] = g.mkdir(g.mkdir(rootID, fmt.Sprint("d", i)).NodeId, "sub").NodeId
		}
		var wg sync.WaitGroup
		for i := range threads {
			wg.Go(func() {
				labelled := *g
				labelled.ctx.Secctx = []fsbackend.Secctx{{Name: fsbackend.MakeName("user.label"), Value: []byte("l")}}
				for j := range 150 {
					from, to := dirs[(i+j)%threads], dirs[(i*7+j*3+1)%threads]
					name := fmt.Sprint("f", i)
					out, e := g.tryCreate(from, name, unix.O_RDWR|unix.O_EXCL, 0o600)
					if e != fsbackend.OK {
						t.Errorf("CREATE: %v", e)
						return
					}
					g.release(out.NodeId, out.Fh)
					again, e := g.tryCreate(from, name, unix.O_RDWR, 0o600)
					if e != fsbackend.OK || again.NodeId != out.NodeId {
						t.Errorf("CREATE of what exists: %v, node %#x, expected %#x", e, again.NodeId, out.NodeId)
						return
					}
					g.release(again.NodeId, again.Fh)
					made, e := labelled.tryMkdir(from, name+"d", 0o700)
					if e != fsbackend.OK {
						t.Errorf("MKDIR with a label: %v", e)
						return
					}
					if e := g.fs.Rmdir(&g.ctx, from, fsbackend.MakeName(name+"d")); e != fsbackend.OK {
						t.Errorf("RMDIR: %v", e)
					}
					g.fs.Forget(made.NodeId, 1)
					if e := g.rename(from, name, to, name, 0); e != fsbackend.OK {
						t.Errorf("RENAME: %v", e)
						return
					}
					if _, e := g.link(out.NodeId, from, name+"l"); e != fsbackend.OK {
						t.Errorf("LINK: %v", e)
						return
					}
					if e := g.unlink(to, name); e != fsbackend.OK {
						t.Errorf("UNLINK: %v", e)
					}
					if e := g.unlink(from, name+"l"); e != fsbackend.OK {
						t.Errorf("UNLINK: %v", e)
					}
					g.fs.Forget(out.NodeId, 3)
				}
			})
		}
		wg.Wait()
		// While calls run a scan of /proc/self/fd is not one moment's picture.
		if n := inodeFDs(t, g.dir) - base; n > MinMaxFDs {
			t.Errorf("%d inode descriptors, expected at most %d", n, MinMaxFDs)
		}
		if err := g.fs.check(); err != nil {
			t.Error(err)
		}
	})
}

// TestStress makes every kind of call from many threads while sessions end.
func TestStress(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		const rounds = 6000
		var succeeded atomic.Int64
		allowed := func(e fsbackend.Errno) bool {
			switch e {
			case fsbackend.OK, unix.ENOENT, unix.EEXIST, unix.ESTALE, unix.EBADF, unix.ENOTEMPTY, unix.ENOTDIR, unix.EISDIR, unix.EPERM, unix.EINVAL, unix.EXDEV, unix.ELOOP:
				return true
			}
			return false
		}
		var wg sync.WaitGroup
		for i := range 6 {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), 1))
				nodes := []uint64{rootID}
				var open [][2]uint64
				pick := func() uint64 { return nodes[rng.IntN(len(nodes))] }
				learn := func(id uint64) {
					if id != 0 {
						nodes = append(nodes, id)
					}
				}
				for range rounds {
					name := fmt.Sprint("n", rng.IntN(12))
					var e fsbackend.Errno
					switch rng.IntN(14) {
					case 0, 1, 2:
						var out fuseproto.EntryOut
						out, e = g.tryLookup(pick(), name)
						if e == 0 {
							learn(out.NodeId)
						}
					case 3:
						var out fuseproto.CreateOut
						out, e = g.tryCreate(pick(), name, unix.O_RDWR, 0o644)
						if e == 0 {
							learn(out.NodeId)
							open = append(open, [2]uint64{out.NodeId, out.Fh})
						}
					case 4:
						var out fuseproto.EntryOut
						out, e = g.tryMkdir(pick(), name, 0o755)
						if e == 0 {
							learn(out.NodeId)
						}
					case 5:
						e = g.unlink(pick(), name)
					case 6:
						e = g.fs.Rmdir(&g.ctx, pick(), fsbackend.MakeName(name))
					case 7:
						e = g.rename(pick(), name, pick(), fmt.Sprint("n", rng.IntN(12)), uint32(rng.IntN(3)))
					case 8:
						_, e = g.getattr(pick())
					case 9:
						node := pick()
						var fh uint64
						fh, e = g.tryOpen(node, unix.O_RDWR)
						if e == 0 {
							open = append(open, [2]uint64{node, fh})
						}
					case 10:
						if n := len(open); n > 0 {
							h := open[n-1]
							open = open[:n-1]
							_, e = g.put(h[0], h[1], 0, "data", 0, 0)
							if e == 0 {
								_, e = g.tryRead(h[0], h[1], 0, 10)
							}
							g.release(h[0], h[1])
						}
					case 11:
						if n := len(nodes); n > 1 {
							g.fs.Forget(nodes[n-1], 1)
							nodes = nodes[:n-1]
						}
					case 12:
						node := pick()
						var in fuseproto.OpenIn
						in.NodeId = node
						var out fuseproto.OpenOut
						if e = g.fs.Opendir(&g.ctx, &in, &out); e == 0 {
							var list []dirent
							list, e = g.readdirAt(node, out.Fh, 0, true, 2048)
							for _, d := range list {
								learn(d.entry.NodeId)
							}
							g.releasedir(node, out.Fh)
						}
					case 13:
						if i == 0 && rng.IntN(10) == 0 {
							g.fs.Reset()
						} else {
							_, e = g.link(pick(), pick(), name)
						}
					}
					switch e {
					case fsbackend.OK:
						succeeded.Add(1)
					case unix.ESTALE:
						nodes = nodes[:1] // a session has ended
					}
					if !allowed(e) {
						t.Errorf("unexpected %v (%d)", e, int(e))
						return
					}
				}
			})
		}
		wg.Wait()
		if n := succeeded.Load(); n < 6*rounds/4 {
			t.Errorf("%d of %d calls succeeded: too few to mean anything", n, 6*rounds)
		}
		g.fs.Reset()
		if n := g.fs.nodes.count.Load(); n != 0 {
			t.Errorf("%d nodes after Reset", n)
		}
		if err := g.fs.check(); err != nil {
			t.Error(err)
		}
		if n := inodeFDs(t, g.dir); n != 1 {
			t.Errorf("%d inode descriptors after Reset, expected the root's", n)
		}
	})
}

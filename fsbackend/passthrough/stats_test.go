package passthrough

import (
	"fmt"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/internal/sys"
)

// gauges checks what g's backend says of itself.
func (g *guest) gauges(when string, want fsbackend.Stats) {
	g.Helper()
	if got := g.fs.Stats(); got != want {
		g.Errorf("%s: %+v, expected %+v", when, got, want)
	}
	if n, want := inodeFDs(g, g.dir), int(want.FDs.OPath); n != want {
		g.Errorf("%s: %d inode descriptors are open, expected %d", when, n, want)
	}
}

func TestStats(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		idle := g.fs.Stats()
		mounts := uint64(0)
		if g.fs.mounts.at(0).state.Load() == handlesWork {
			mounts = 1
		}
		if !cfg.NoFileHandles && unix.Geteuid() == 0 && mounts == 0 {
			t.Error("root cannot open file handles: this test needs a file system that has them")
		}
		g.gauges("idle", fsbackend.Stats{Inodes: 1, Tiers: fsbackend.InodeTiers{OPath: 1}, FDs: fsbackend.FDs{OPath: 1, Mount: mounts}})

		const files = 3 * MinMaxFDs
		var nodes []uint64
		for i := range files {
			g.write(fmt.Sprint("f", i), "")
			nodes = append(nodes, g.lookup(fmt.Sprint("f", i)).NodeId)
		}
		want := fsbackend.Stats{Inodes: 1 + files, Tiers: fsbackend.InodeTiers{OPath: 1 + MinMaxFDs}, FDs: fsbackend.FDs{OPath: 1 + MinMaxFDs, Mount: mounts}}
		if mounts > 0 {
			want.Tiers.Handle = files - MinMaxFDs
		} else {
			want.Tiers.Name = files - MinMaxFDs
		}
		g.gauges("files that are known", want)

		file, dir := g.open(nodes[files-1], unix.O_RDWR), g.opendir(rootID)
		want.FDs.Open = 2
		g.gauges("files that are open", want)
		g.release(nodes[files-1], file)
		g.releasedir(rootID, dir)
		want.FDs.Open = 0
		g.gauges("files that are closed", want)

		for _, node := range nodes {
			g.fs.Forget(node, 1)
		}
		g.gauges("files that are forgotten", idle)
		g.open(g.lookup("f0").NodeId, unix.O_RDONLY)
		g.fs.Reset()
		g.gauges("the session's end", idle)
	})
}

func TestStatsOfLocks(t *testing.T) {
	dir, _ := lockDir(t)
	l := newLocker(t, dir)
	l.is(l.set(1, shared, 0, 9), 0, "SETLK")
	l.is(l.set(2, shared, 0, 9), 0, "SETLK")
	if n := l.fs.Stats().FDs.Lock; n != 2 {
		t.Errorf("%d descriptors for locks of two owners, expected 2", n)
	}
	l.flush(1)
	l.fs.Reset()
	if n := l.fs.Stats().FDs.Lock; n != 0 {
		t.Errorf("%d descriptors for locks after the session, expected 0", n)
	}
}

func TestStatsAfterClose(t *testing.T) {
	fs, err := New(Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if err := fs.Close(); err != nil {
		t.Fatal(err)
	}
	if s := fs.Stats(); s.FDs.Open != 0 || s.FDs.Lock != 0 {
		t.Errorf("%+v after Close", s)
	}
}

// Gauges are read while nodes come and go. They may be behind, but never below what is there all the time.
func TestStatsRace(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		g := newGuest(t, cfg)
		for i := range 2 * MinMaxFDs {
			g.write(fmt.Sprint("f", i), "")
		}
		g.lookup("f0")
		var busy sync.WaitGroup
		for range 3 {
			busy.Go(func() {
				for i := range 2000 {
					out, e := g.tryLookup(rootID, fmt.Sprint("f", i%(2*MinMaxFDs)))
					if e != fsbackend.OK {
						t.Errorf("LOOKUP: %v", e)
						return
					}
					g.fs.Forget(out.NodeId, 1)
				}
			})
		}
		busy.Go(func() {
			for range 2000 {
				s := g.fs.Stats()
				if s.Inodes < 2 || s.Tiers.OPath+s.Tiers.Handle+s.Tiers.Name != s.Inodes || s.FDs.OPath > 1+MinMaxFDs {
					t.Errorf("%+v", s)
					return
				}
			}
		})
		busy.Wait()
		if err := g.fs.check(); err != nil {
			t.Error(err)
		}
		if n := g.fs.Stats().Inodes; n != 2 {
			t.Errorf("%d inodes, expected 2", n)
		}
	})
}

// A node without a descriptor changes its tier with its file handle.
func TestTierOfHandle(t *testing.T) {
	var nodes table
	nodes.init(10, func(int32) {})
	s, id, n, rel := nodes.insert(key{ino: 5, typ: typeRegular}, rootID, []byte("f"))
	_, slot, _ := splitID(id)
	h := sys.FileHandle{Bytes: 8}
	for _, want := range []struct {
		handle *sys.FileHandle
		tiers  [tierCount]int
	}{
		{&h, [tierCount]int{tierHandle: 1}},
		{&h, [tierCount]int{tierHandle: 1}},
		{nil, [tierCount]int{tierName: 1}},
	} {
		if s.setHandle(slot, n, want.handle); s.tiers != want.tiers {
			t.Errorf("nodes by tier %v, expected %v", s.tiers, want.tiers)
		}
	}
	s.mu.Unlock()
	nodes.settle(rel)
	nodes.forget(id, 1)
	if s.tiers != [tierCount]int{} {
		t.Errorf("nodes by tier %v after the last has gone", s.tiers)
	}
}

package share

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// hot are calls that must not cost an allocation, of a share of base.
func hot(s fsbackend.Backend, base uint64) map[string]func() {
	r := fsbackend.Resolve(s)
	c := &fsbackend.Context{MayBlock: true}
	name := fsbackend.MakeName("name")
	var entry fuseproto.EntryOut
	var attr fuseproto.AttrOut
	getattr, read, write := new(fuseproto.GetattrIn), new(fuseproto.ReadIn), new(fuseproto.WriteIn)
	getattr.NodeId, read.NodeId, write.NodeId = base|5, base|5, base|5
	read.Fh, write.Fh = base|6, base|6
	sink, source := new(fsbackend.Sink), new(fsbackend.Source)
	list := &fsbackend.DirList{Plus: true}
	buf := make([]byte, 4096)
	iov := make([]unix.Iovec, 1)
	return map[string]func(){
		"LOOKUP":  func() { r.Lookup(c, base|5, name, &entry) },
		"GETATTR": func() { r.Getattr(c, getattr, &attr) },
		"READ":    func() { r.Read(c, read, sink) },
		"WRITE":   func() { r.Write(c, write, source) },
		"READDIRPLUS": func() {
			iov[0] = unix.Iovec{Base: &buf[0], Len: uint64(len(buf))}
			list.Reset(iov, 0, uint64(len(buf)))
			r.Readdirplus(c, read, list)
		},
	}
}

func grafts(t testing.TB, g Graft) *Share {
	g.Path, g.Backend = "/a/g", &spy{quiet: true}
	return newShare(t, Graft{Path: "/", Backend: &spy{quiet: true}}, g)
}

func TestHotOpsDoNotAllocate(t *testing.T) {
	ids := Graft{UIDMap: IDMap{{0, 1000, 1000}}, GIDMap: IDMap{{0, 1000, 2000}}}
	for _, tt := range []struct {
		name string
		s    *Share
		base uint64
	}{
		{"root", grafts(t, Graft{}), 0},
		{"graft", grafts(t, Graft{}), second},
		{"graft with id maps", grafts(t, ids), second},
	} {
		for op, call := range hot(tt.s, tt.base) {
			if n := testing.AllocsPerRun(100, call); n != 0 {
				t.Errorf("%s of %s: %v allocations, expected none", op, tt.name, n)
			}
		}
	}
	// Names on the way, once they are known.
	s := newShare(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/way/x", Backend: newMem(t)}, Graft{Path: "/m", Backend: newMem(t)})
	put(t, s, "f", "")
	single := newMem(t)
	put(t, single, "f", "")
	makeDirs(t, s.root.Backend, "way")
	files := newShare(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/f", Backend: single, File: "f"})
	c := &fsbackend.Context{MayBlock: true}
	var out fuseproto.EntryOut
	for _, tt := range []struct {
		s    *Share
		name string
	}{{s, "way"}, {s, "m"}, {s, "f"}, {files, "f"}} {
		name := fsbackend.MakeName(tt.name)
		lookup := func() {
			if errno := tt.s.Lookup(c, fsbackendtest.Root, name, &out); errno != 0 {
				t.Fatal(errno)
			}
		}
		lookup()
		if n := testing.AllocsPerRun(100, lookup); n != 0 {
			t.Errorf("LOOKUP of %s: %v allocations, expected none", tt.name, n)
		}
	}
}

func BenchmarkShare(b *testing.B) {
	direct := hot(&spy{quiet: true}, 0)
	for _, op := range []string{"LOOKUP", "GETATTR", "READ"} {
		for _, tt := range []struct {
			name string
			call func()
		}{
			{"direct", direct[op]},
			{"alone", hot(newShare(b, Graft{Path: "/", Backend: &spy{quiet: true}}), 0)[op]},
			{"root", hot(grafts(b, Graft{}), 0)[op]},
			{"graft", hot(grafts(b, Graft{}), second)[op]},
		} {
			b.Run(op+"/"+tt.name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					tt.call()
				}
			})
		}
	}
}

// TestRaces has guests look up, list and forget what is on the way, while the host moves it about and sessions end.
func TestRaces(t *testing.T) {
	host := t.TempDir()
	for i := range 3 {
		write(t, filepath.Join(host, fmt.Sprint("spare", i), "x", "y"), "")
	}
	single := t.TempDir()
	write(t, single+"/f", "")
	s := newShare(t, Graft{Path: "/", Backend: newPassthrough(t, host)},
		Graft{Path: "/way/x/mount", Backend: newMem(t)}, Graft{Path: "/way/x/mount/in/nested", Backend: newMem(t)},
		Graft{Path: "/other/m", Backend: newMem(t)}, Graft{Path: "/way/f", Backend: newPassthrough(t, single), File: "f"})
	s.Init(fsbackend.Features{Flags: fuseproto.FUSE_SUBMOUNTS})
	var guests, hosts sync.WaitGroup
	done := make(chan struct{})
	for i := range 2 {
		hosts.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 7))
			names := []string{"way", "other", "spare0", "spare1", "spare2"}
			for {
				select {
				case <-done:
					return
				default:
				}
				from, to := host+"/"+names[rnd.IntN(5)], host+"/"+names[rnd.IntN(5)]
				_ = unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, uint(rnd.IntN(3)))
				if i == 0 && rnd.IntN(20) == 0 {
					_ = os.Rename(single+"/f", single+"/g")
					_ = os.WriteFile(single+"/f", nil, 0o644)
				}
				if i == 1 && rnd.IntN(50) == 0 {
					s.Reset()
				}
			}
		})
	}
	paths := [][]string{{"way", "x", "mount", "in", "nested"}, {"other", "m"}, {"way", "f"}, {"spare1", "x"}}
	for i := range 4 {
		guests.Go(func() {
			c := &fsbackendtest.Client{R: fsbackend.Resolve(s)}
			rnd := rand.New(rand.NewPCG(uint64(i), 8))
			for range 400 {
				at := uint64(fsbackendtest.Root)
				for _, name := range paths[rnd.IntN(len(paths))] {
					e, errno := c.Lookup(at, name)
					if errno != 0 || e.NodeId == 0 {
						break
					}
					if fh, errno := c.Opendir(e.NodeId); errno == 0 {
						_, _ = c.Readdir(e.NodeId, fh, 0, 500, rnd.IntN(2) == 0)
						c.Releasedir(e.NodeId, fh)
					}
					_ = c.Rename(at, name, fsbackendtest.Root, "stolen", 0)
					if rnd.IntN(2) == 0 {
						s.Forget(e.NodeId, uint64(rnd.IntN(3))) // now and then more than there was
					}
					at = e.NodeId
				}
			}
		})
	}
	guests.Wait()
	close(done)
	hosts.Wait()
	// At rest, positions are found again.
	s.Reset()
	if err := os.RemoveAll(host + "/way"); err != nil {
		t.Fatal(err)
	}
	write(t, host+"/way/here", "")
	g := &guest{&fsbackendtest.Client{R: fsbackend.Resolve(s)}, t, s}
	if n := g.walk("/way").NodeId; n>>indexShift != 0 {
		t.Errorf("/way is node %#x, though the host has it", n)
	}
	if n := g.walk("/way/x/mount/in/nested").NodeId; n != 2<<indexShift|fsbackendtest.Root {
		t.Errorf("the nested graft is node %#x", n)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

package share

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// guarded is a spy that no call must reach after its Close.
type guarded struct {
	*spy
	closed atomic.Int32
	gone   chan struct{}
}

func newGuarded(t *testing.T) *guarded {
	b := &guarded{spy: new(spy), gone: make(chan struct{})}
	b.mode = unix.S_IFDIR | 0o755
	b.hook = func(call string) {
		switch {
		case call == "Close":
			if b.closed.Add(1) == 1 {
				close(b.gone)
				return
			}
			t.Error("a backend is closed twice")
		case b.closed.Load() != 0:
			t.Errorf("%s reaches a backend that is closed", call)
		}
		b.taken()
	}
	return b
}

// TestStorm has grafts come, change and go at random, as a model says they may, while guests ask anything with any number.
func TestStorm(t *testing.T) {
	s, err := New(Config{Dynamic: true, Grafts: []Graft{{Path: "/", Backend: newMem(t)}}})
	if err != nil {
		t.Fatal(err)
	}
	features := fsbackend.Features{Flags: fuseproto.FUSE_SUBMOUNTS}
	s.Init(features)
	var stop atomic.Bool
	var guests sync.WaitGroup
	var names []string
	for name := range ops {
		names = append(names, name)
	}
	slices.Sort(names)
	for i := range 4 {
		guests.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			node := func() uint64 {
				number := []uint64{1, 2, spyNode, rnd.Uint64() & numberMask}[rnd.IntN(4)]
				index := []uint64{0, rnd.Uint64N(40), madeUpIndex, rnd.Uint64N(1 << 16)}[rnd.IntN(4)]
				return index<<indexShift | number
			}
			for !stop.Load() {
				r := &request{node: node(), node2: node(), fh: node(), fh2: node(), name: string(rune('a' + rnd.IntN(3)))}
				if rnd.IntN(4) > 0 {
					r.node2 = r.node&^numberMask | rnd.Uint64N(9)
					r.fh, r.fh2 = r.node&^numberMask|spyFh, r.node&^numberMask|spyFh
				}
				r.c.MayBlock, r.c.Part, r.c.Shard = true, s.PartOf(r.node), uint8(rnd.Uint32())
				_ = ops[names[rnd.IntN(len(names))]].call(s, r)
				if rnd.IntN(3) == 0 {
					s.Forget(node(), rnd.Uint64()>>rnd.IntN(64))
				}
			}
		})
	}
	guests.Go(func() {
		for !stop.Load() {
			_ = s.Grafts()
			_ = s.WantFlags(fuseproto.FUSE_SUBMOUNTS)
			_ = s.Recount("/a")
		}
	})
	model := make(map[string]*guarded)
	var all []*guarded
	rnd := rand.New(rand.NewPCG(3, 3))
	below := func(path string) bool {
		for other := range model {
			if strings.HasPrefix(other, path+"/") {
				return true
			}
		}
		return false
	}
	for i := range 600 {
		path := ""
		for range 1 + rnd.IntN(3) {
			path += "/" + string(rune('a'+rnd.IntN(3)))
		}
		b := newGuarded(t)
		graft := Graft{Path: path, Backend: b, Isolated: rnd.IntN(4) == 0}
		switch rnd.IntN(8) {
		case 0, 1, 2:
			err := s.Add(graft)
			if _, is := model[path]; is != errors.Is(err, ErrExists) || !is && err != nil {
				t.Fatalf("Add %s: %v, while there is one: %v", path, err, is)
			}
			if err == nil {
				model[path], all = b, append(all, b)
			}
		case 3:
			if err := s.Replace(graft); err != nil {
				t.Fatalf("Replace %s: %v", path, err)
			}
			model[path], all = b, append(all, b)
		case 4, 5, 6:
			err := s.Remove(path)
			_, is := model[path]
			switch {
			case !is && !errors.Is(err, ErrNotFound), is && below(path) != errors.Is(err, ErrBusy), is && !below(path) && err != nil:
				t.Fatalf("Remove %s: %v, while there is one: %v, and some below: %v", path, err, is, below(path))
			}
			if err == nil {
				delete(model, path)
			}
		default:
			err := s.Change(path, Change{ReadOnly: new(rnd.IntN(2) == 0), NoSUID: new(true), MaxBytes: new(rnd.Uint64N(2) << 20)})
			if _, is := model[path]; is != (err == nil) {
				t.Fatalf("Change %s: %v", path, err)
			}
		}
		if i%100 == 99 {
			s.Reset()
			s.Init(features)
		}
		var got []string
		for _, st := range s.Grafts() {
			if !st.Leaving && st.Path != "/" {
				got = append(got, st.Path)
			}
		}
		if len(got) != len(model) {
			t.Fatalf("grafts are %q, expected %d", got, len(model))
		}
	}
	stop.Store(true)
	guests.Wait()
	s.Reset()
	for _, b := range all {
		if open := slices.Contains(values(model), b); open {
			if b.closed.Load() != 0 {
				t.Error("a backend is closed that is grafted")
			}
			continue
		}
		select {
		case <-b.gone:
		case <-time.After(10 * time.Second):
			t.Fatal("a backend that was removed is not closed after the session")
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	for _, b := range all {
		if b.closed.Load() != 1 {
			t.Error("a backend is not closed with the share")
		}
	}
}

func values[K comparable, V any](m map[K]V) []V {
	var list []V
	for _, v := range m {
		list = append(list, v)
	}
	return list
}

// TestHostileAfterRemove gives every op numbers of what was removed, of what has gone, and of what has its index since.
func TestHostileAfterRemove(t *testing.T) {
	for name, o := range ops {
		b := newGuarded(t)
		b.mode = 0
		g := changing(t, Graft{Path: "/", Backend: newMem(t)}, Graft{Path: "/g", Backend: b})
		g.walk("/g")
		r := in()
		r.node = second | root
		if errno := ops["Opendir"].call(g.s, r); errno != 0 {
			t.Fatal(errno)
		}
		g.remove("/g")
		r = in()
		errno := o.call(g.s, r)
		if !o.handle || name == "Getattr" || name == "Setattr" || name == "Statx" {
			if want := map[bool]Errno{true: fsbackend.OK, false: unix.ENOENT}[o.handle]; errno != want && name != "Setattr" && name != "Getattr" && name != "Statx" {
				t.Errorf("%s without a handle in what was removed: %v, expected %v", name, errno, want)
			}
		} else if errno != fsbackend.OK {
			t.Errorf("%s with a handle in what was removed: %v", name, errno)
		}
		r = in()
		r.node, r.fh = second|root, second|spyFh
		if errno := ops["Releasedir"].call(g.s, r); errno != 0 {
			t.Fatal(errno)
		}
		select {
		case <-b.gone:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s keeps what was removed", name)
		}
		want := unix.ENOENT // the guest still has /g
		if errno := o.call(g.s, in()); errno != want && name != "Release" && name != "Releasedir" {
			t.Errorf("%s in what has gone: %v, expected %v", name, errno, want)
		}
		for range 1000 {
			g.s.Forget(second|root, 1<<40)
			g.s.Forget(second|5, 1)
			g.s.Forget(9<<indexShift|5, 1)
		}
		if errno := o.call(g.s, in()); errno != unix.ESTALE && name != "Release" && name != "Releasedir" {
			t.Errorf("%s in what the guest has forgotten: %v, expected ESTALE", name, errno)
		}
	}
}

// TestHungIsolated removes an isolated graft that hangs: nothing else does.
func TestHungIsolated(t *testing.T) {
	b := new(spy)
	release := hang(b, "Getattr")
	s, err := New(Config{Dynamic: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Init(fsbackend.Features{})
	if err := s.Add(Graft{Path: "/g", Backend: b, Isolated: true, Slow: true}); err != nil {
		t.Fatal(err)
	}
	done := make(chan Errno)
	go func() { done <- ops["Getattr"].call(s, in()) }()
	for b.calls("Getattr") == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := s.Remove("/g"); err != nil {
		t.Fatal(err)
	}
	other := newGuarded(t)
	if err := s.Add(Graft{Path: "/g", Backend: other}); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("/g"); err != nil {
		t.Fatal(err)
	}
	<-other.gone
	if b.calls("Close") != 0 {
		t.Error("a backend is closed that hangs in a call")
	}
	if st := s.Grafts(); len(st) != 1 || !st[0].Leaving {
		t.Errorf("grafts are %+v", st)
	}
	release()
	<-done
	for b.calls("Close") == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// calls counts what b was asked.
func (b *spy) calls(call string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, a := range b.log {
		if a.call == call {
			n++
		}
	}
	return n
}

// TestManyGrafts looks one graft of a thousand up.
func TestManyGrafts(t *testing.T) {
	g := changing(t)
	for i := range 1000 {
		g.add(Graft{Path: fmt.Sprint("/containers/c", i), Backend: &spy{quiet: true, mode: unix.S_IFDIR | 0o755}})
	}
	if got := g.list(g.walk("/containers").NodeId, 32<<10, true); len(got) != 1000 {
		t.Errorf("%d names are listed", len(got))
	}
	dir := g.walk("/containers").NodeId
	c := &fsbackend.Context{MayBlock: true}
	name := fsbackend.MakeName("c500")
	var out fuseproto.EntryOut
	if n := testing.AllocsPerRun(100, func() { g.s.Lookup(c, dir, name, &out) }); n != 0 {
		t.Errorf("LOOKUP of one of many: %v allocations", n)
	}
	for op, call := range hot(g.s, 500<<indexShift) {
		if n := testing.AllocsPerRun(100, call); n != 0 {
			t.Errorf("%s in one of many: %v allocations", op, n)
		}
	}
}

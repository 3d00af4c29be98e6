package fuseserver

import (
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// halves is the stub in two parts: nodes up to 2 belong to the root's, all others to one of an extension.
type halves struct {
	*stub
	root, foreign fsbackend.Part
	inside        atomic.Int32 // calls between Enter and Leave
}

func (b *halves) PartOf(node uint64) *fsbackend.Part {
	if node <= 2 {
		return &b.root
	}
	return &b.foreign
}

func newHalves() *halves {
	b := &halves{stub: newStub(), root: fsbackend.Part{Path: "/"}, foreign: fsbackend.Part{Name: "ext", Path: "/mnt", Isolated: true, Slow: true}}
	b.foreign.Enter = func() { b.inside.Add(1) }
	b.foreign.Leave = func() { b.inside.Add(-1) }
	return b
}

// halved returns a guest of b that has done INIT.
func halved(t *testing.T, b *halves, cfg Config) *guest {
	t.Helper()
	cfg.Backend = b
	cfg.PosixLock, cfg.Flock = true, true
	g := newGuest(t, cfg)
	g.b = b.stub
	g.mount(allFlags)
	return g
}

// Each call runs between its part's Enter and Leave, even when it panics, and those of a slow part only where they may sleep.
func TestCallsRunInTheirPart(t *testing.T) {
	none := []string{"BATCH_FORGET", "DESTROY", "INTERRUPT", "FORGET"}
	for _, e := range examples() {
		for _, panics := range []bool{false, true} {
			b := newHalves()
			g := halved(t, b, Config{Xattr: true})
			calls := 0
			b.hook = func(op string, _ *fsbackend.Context) {
				if op == "Reset" {
					return
				}
				calls++
				if n := b.inside.Load(); n != 1 {
					t.Errorf("%s: %s is called %d times deep in its part", e.name, op, n)
				}
				if panics {
					panic("a bug")
				}
			}
			g.begin(e.msg, 4096)
			if none := slices.Contains(none, e.name); (g.r.Part() == nil) != none || !none && g.r.Part() != &b.foreign {
				t.Errorf("%s is for part %v", e.name, g.r.Part())
			}
			if _, done := g.s.Handle(g.r); !done {
				if calls > 0 {
					t.Errorf("%s is called where it must not sleep", e.name)
				}
				g.r.MayBlock = true
				g.s.Handle(g.r)
			}
			if b.inside.Load() != 0 {
				t.Errorf("%s: Enter without Leave", e.name)
			}
			if got := b.foreign.Stats.Panics.Load(); got != uint64(calls) && panics || got != 0 && !panics {
				t.Errorf("%s: %d panics counted in %d calls", e.name, got, calls)
			}
			if calls == 0 && !slices.Contains([]string{"DESTROY", "INTERRUPT"}, e.name) {
				t.Errorf("%s makes no call", e.name)
			}
		}
	}
}

// Beside a part that is slow, the others are not.
func TestEachPartIsSlowOrNot(t *testing.T) {
	b := newHalves()
	b.slow = true // says the whole; its parts know better
	g := halved(t, b, Config{})
	for node, want := range map[uint64]bool{1: true, 3: false} {
		g.begin(message(fuseproto.FUSE_GETATTR, node, make([]byte, 16)), 200)
		if _, done := g.s.Handle(g.r); done != want {
			t.Errorf("GETATTR of node %d is done without sleeping: %v", node, done)
		}
	}
	g.begin(message(fuseproto.FUSE_FORGET, 3, uint64(5)), 0)
	if _, done := g.s.Handle(g.r); !done {
		t.Error("FORGET is not kept at once")
	}
}

// Any request of an isolated part can be answered while its call runs, which cannot touch guest memory after that, and
// what comes of it is taken back.
func TestAbortIsolated(t *testing.T) {
	undone := map[string][]string{
		"LOOKUP": {"Forget 7 1"}, "SYMLINK": {"Forget 7 1"}, "MKNOD": {"Forget 7 1"}, "MKDIR": {"Forget 7 1"}, "LINK": {"Forget 7 1"},
		"OPEN": {"Release 3 9 0 0 0"}, "OPENDIR": {"Releasedir 3 9"},
		"CREATE": {"Release 7 9 0 0 0", "Forget 7 1"}, "TMPFILE": {"Release 7 9 0 0 0", "Forget 7 1"},
		"READDIRPLUS": {"Forget 7 1"},
	}
	for _, newSession := range []bool{false, true} {
		for _, e := range examples() {
			b := newHalves()
			g := halved(t, b, Config{Xattr: true})
			content := g.begin(e.msg, 4096)
			if g.r.Part() == nil {
				continue
			}
			if g.r.TouchesGuestMemory() {
				t.Errorf("%s cannot be aborted", e.name)
			}
			var reply []byte
			var before string
			b.hook = func(string, *fsbackend.Context) {
				b.hook = nil
				written := g.r.Abort(syscall.EIO)
				reply = g.check(e.msg, content(), written)
				before = string(content())
				if newSession {
					g.s.Reset()
				}
			}
			g.r.MayBlock = true
			written, done := g.s.Handle(g.r)
			if written != 0 || !done || !g.r.Aborted() || len(reply) != headerSize {
				t.Errorf("%s: Handle returned %d, %v after a reply of %d bytes", e.name, written, done, len(reply))
			}
			if string(content()) != before {
				t.Errorf("%s: guest memory has changed after Abort", e.name)
			}
			want := undone[e.name]
			if newSession {
				want = []string{"Reset"} // and nothing that the new session could miss
			}
			if calls := b.taken(); !slices.Equal(calls[1:], want) {
				t.Errorf("%s: taken back by %v, expected %v", e.name, calls[1:], want)
			}
		}
	}
}

// A call that was denied guest memory by an Abort that did not come about must not pass for complete.
func TestAnswerBehindAClosedGate(t *testing.T) {
	b := newHalves()
	g := halved(t, b, Config{})
	content := g.begin(message(fuseproto.FUSE_READ, 3, uint64(9), uint64(0), uint32(16), make([]byte, 20)), 200)
	b.hook = func(string, *fsbackend.Context) { g.r.gate.Close() }
	g.r.MayBlock = true
	if written, _ := g.s.Handle(g.r); written != headerSize || content()[4] != byte(256-int(syscall.EIO)) {
		t.Errorf("the reply has %d bytes: % x", written, content()[:headerSize])
	}
}

// What waited for a part that hung must not reach it in the guest's next session; a RELEASE of this one must.
func TestCallsThatWaitedLong(t *testing.T) {
	b := newHalves()
	g := halved(t, b, Config{})
	for _, e := range examples() {
		g.begin(e.msg, 4096)
		if g.r.Part() == nil {
			continue
		}
		g.r.Abort(syscall.EIO)
		g.r.MayBlock = true
		g.s.Handle(g.r)
		if calls := b.taken(); (len(calls) == 1) != (e.name == "RELEASE" || e.name == "RELEASEDIR") {
			t.Errorf("%s, given up before its call: %v", e.name, calls)
		}
		g.begin(e.msg, 4096)
		waiting := g.r
		g.r = g.s.NewRequest()
		g.mount(allFlags)
		g.r = waiting
		g.r.MayBlock = true
		g.s.Handle(g.r)
		if calls := b.taken(); len(calls) != 0 {
			t.Errorf("%s of an earlier session: %v", e.name, calls)
		}
	}
}

// The storm of one part neither drowns what the log says of another, nor fills it.
func TestPartsErrors(t *testing.T) {
	var log strings.Builder
	b := newHalves()
	g := halved(t, b, Config{Log: textLog(&log)})
	getattr := func(node uint64) { g.fails(message(fuseproto.FUSE_GETATTR, node, make([]byte, 16)), syscall.EIO) }
	b.errno = syscall.EIO
	for range 1000 {
		getattr(3)
		getattr(1)
	}
	b.errno = 600
	for range 10 {
		getattr(3)
	}
	b.hook = func(string, *fsbackend.Context) { panic("a bug") }
	for range 1000 {
		getattr(3)
	}
	if errs, panics := b.foreign.Stats.Errors.Load(), b.foreign.Stats.Panics.Load(); errs != 1010 || panics != 1000 {
		t.Errorf("%d errors and %d panics counted, expected 1010 and 1000", errs, panics)
	}
	if n := b.root.Stats.Errors.Load(); n != 0 {
		t.Errorf("%d errors counted in a part that is not isolated", n)
	}
	getattr(1)
	if n := strings.Count(log.String(), "\n"); n > 20 {
		t.Errorf("%d lines logged", n)
	}
	if !strings.Contains(log.String(), `extension=ext path=/mnt opcode=FUSE_GETATTR`) || !strings.Contains(log.String(), "path=/ ") {
		t.Errorf("the log does not name both parts:\n%s", &log)
	}
	// What a guest did is not the part's fault.
	b.hook, b.errno = nil, 0
	before := b.foreign.Stats.Errors.Load()
	g.doRoom(message(fuseproto.FUSE_GETXATTR, 3, uint32(8), uint32(0), "user.a\x00"), headerSize)
	g.doRoom(message(fuseproto.FUSE_GETATTR, 3, make([]byte, 16)), headerSize)
	if b.foreign.Stats.Errors.Load() != before {
		t.Error("a reply without room is counted as the part's error")
	}
}

// FORGETs of a slow part are kept until its thread asks for them; one that panics does not take others along.
func TestForgetsAreKept(t *testing.T) {
	b := newHalves()
	g := halved(t, b, Config{})
	var asked []*fsbackend.Part
	g.s.OnForgets(func(p *fsbackend.Part) { asked = append(asked, p) })
	batch := message(fuseproto.FUSE_BATCH_FORGET, 0, uint32(3), uint32(0), uint64(5), uint64(1), uint64(2), uint64(4), uint64(6), uint64(1))
	g.raw(batch, 0)
	g.raw(message(fuseproto.FUSE_FORGET, 7, uint64(2)), 0)
	if calls := b.taken(); !slices.Equal(calls, []string{"Forget 2 4"}) {
		t.Errorf("made at once: %v", calls)
	}
	if !slices.Equal(asked, []*fsbackend.Part{&b.foreign}) {
		t.Errorf("asked for threads of %v, expected the part's once", asked)
	}
	b.hook = func(string, *fsbackend.Context) {
		b.hook = nil
		panic("a bug")
	}
	g.s.RunForgets(&b.foreign)
	calls := b.taken()
	slices.Sort(calls)
	if !slices.Equal(calls, []string{"Forget 5 1", "Forget 6 1", "Forget 7 2"}) || b.foreign.Stats.Panics.Load() != 1 {
		t.Errorf("made later: %v, with %d panics", calls, b.foreign.Stats.Panics.Load())
	}
	// They are bounded, and gone with their session.
	for range maxKept + 10 {
		g.raw(message(fuseproto.FUSE_FORGET, 7, uint64(1)), 0)
	}
	if n := b.foreign.Stats.Refused.Load(); n != 10 || len(asked) != 2 {
		t.Errorf("%d FORGETs dropped, asked %d times", n, len(asked))
	}
	g.mount(allFlags)
	g.s.RunForgets(&b.foreign)
	if calls := b.taken(); len(calls) != 0 {
		t.Errorf("%d FORGETs of an earlier session are made", len(calls))
	}
}

func TestResetPanics(t *testing.T) {
	b := newHalves()
	g := halved(t, b, Config{})
	b.hook = func(op string, _ *fsbackend.Context) {
		if op == "Reset" {
			panic("a bug")
		}
	}
	g.s.Reset()
	g.mount(allFlags)
	if n := g.s.Stats().Panics.Load(); n != 1 {
		t.Errorf("%d panics counted", n)
	}
}

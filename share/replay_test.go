package share

import (
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// helper is a guest whose requests come from a helper that replays.
type helper struct {
	*guest
	token string
	id    uint64
	dir   string // the host's
}

const helperPid = 77

func newHelper(t testing.TB, g Graft) *helper {
	t.Helper()
	dir := t.TempDir()
	write(t, dir+"/d/f", "content")
	write(t, dir+"/d/g", "other")
	write(t, dir+"/d/sub/deep", "")
	g.Path, g.Backend = "/", newPassthrough(t, dir)
	h := &helper{guest: mount(t, 0, g), dir: dir}
	h.token = h.s.EnableReplay()
	h.Caller.Pid = helperPid
	return h
}

func (h *helper) announce(kind ReplayKind, path, to string, dir bool) uint64 {
	h.id++
	h.s.Announce(ReplayEvent{ID: h.id, Kind: kind, Path: path, To: to, Dir: dir})
	return h.id
}

// arm looks the reserved name up.
func (h *helper) arm(parent, id uint64, suffix string) Errno {
	h.t.Helper()
	e, errno := h.Lookup(parent, fmt.Sprint(ReplayPrefix, h.token, "-", id, suffix))
	if e.NodeId != 0 {
		h.t.Fatalf("a reserved name is node %#x", e.NodeId)
	}
	return errno
}

// armed announces an event and arms it.
func (h *helper) armed(kind ReplayKind, path, to string, dir bool) (parent, toParent uint64) {
	h.t.Helper()
	id := h.announce(kind, path, to, dir)
	parent = h.walk(filepath.Dir(path)).NodeId
	h.want(h.arm(parent, id, ""), "arm", ReplayArmed)
	if to != "" {
		other := *h.guest.Client
		other.Caller.Pid++
		toParent = (&guest{&other, h.t, h.s}).walk(filepath.Dir(to)).NodeId
		h.want(h.arm(toParent, id, "-to"), "arm where it goes", ReplayArmed)
	}
	return parent, toParent
}

// pending says whether an event was still armed, and disarms it.
func (h *helper) pending() bool {
	h.t.Helper()
	switch errno := h.arm(root, 0, ""); errno {
	case ReplayRefused:
		return true
	case ReplayUnknown:
		return false
	default:
		h.t.Fatalf("disarm: %v", errno)
		return false
	}
}

// states describes each file of the host.
func (h *helper) states() map[string]string {
	h.t.Helper()
	states := make(map[string]string)
	err := filepath.WalkDir(h.dir, func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		st.Atim = unix.Timespec{}
		content := ""
		if err == nil && d.Type().IsRegular() {
			b, _ := os.ReadFile(path)
			content = string(b)
		}
		states[path] = fmt.Sprintf("%+v %q", st, content)
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return states
}

// unchanged runs f and looks whether the host is as it was.
func (h *helper) unchanged(f func()) {
	h.t.Helper()
	before := h.states()
	f()
	if after := h.states(); !maps.Equal(before, after) {
		h.t.Errorf("the host had\n%v\nand has\n%v", before, after)
	}
}

func (h *helper) setattr(node uint64, valid uint32, size uint64) (fuseproto.AttrOut, Errno) {
	in := &fuseproto.SetattrIn{}
	in.NodeId, in.Valid, in.Size = node, valid, size
	var out fuseproto.AttrOut
	return out, h.s.Setattr(&fsbackend.Context{Caller: h.Caller, MayBlock: true}, in, &out)
}

func TestReplay(t *testing.T) {
	for _, readOnly := range []bool{false, true} {
		t.Run(fmt.Sprintf("readOnly=%v", readOnly), func(t *testing.T) {
			h := newHelper(t, Graft{Policy: Policy{ReadOnly: readOnly}})
			h.states() // reads all, so that times of access are as they will be
			d := h.walk("/d").NodeId
			f := h.walk("/d/f")
			other := *h.Client
			other.Caller.Pid = 5
			h.unchanged(func() {
				h.armed(ReplayModify, "/d/f", "", false)
				a, errno := h.Getattr(f.NodeId)
				h.want(errno, "GETATTR", fsbackend.OK)
				if a.Mtime == f.Mtime && a.Mtimensec == f.Mtimensec {
					t.Error("the time of the last change is none that lets a guest drop what it has cached")
				}
				if b, _ := other.Getattr(f.NodeId); b != f.Attr {
					t.Errorf("another caller is told %+v, not %+v", b, f.Attr)
				}
				o, errno := h.setattr(f.NodeId, fuseproto.FATTR_SIZE, 3)
				h.want(errno, "SETATTR", fsbackend.OK)
				if o.Attr != f.Attr {
					t.Errorf("SETATTR answers %+v, not %+v", o.Attr, f.Attr)
				}
				if h.pending() {
					t.Error("a complete modify is still armed")
				}

				h.armed(ReplayCreate, "/d/f", "", false)
				_, errno = h.Lookup(d, "f")
				h.want(errno, "LOOKUP of what is to be created", unix.ENOENT)
				if e, errno := other.Lookup(d, "f"); errno != 0 || e.NodeId != f.NodeId {
					t.Errorf("another caller finds node %#x: %v", e.NodeId, errno)
				}
				_, errno = h.Mkdir(d, "f", 0o755)
				h.want(errno, "MKDIR of a file", ReplayRefused)
				c, errno := h.Create(d, "f", unix.O_EXCL|unix.O_WRONLY, 0o644)
				h.want(errno, "CREATE", fsbackend.OK)
				if c.NodeId != f.NodeId {
					t.Errorf("CREATE answers node %#x, not %#x", c.NodeId, f.NodeId)
				}
				_, errno = h.Write(c.NodeId, c.Fh, 0, []byte("bad"), unix.O_WRONLY)
				if errno == fsbackend.OK {
					t.Error("WRITE to a replay's handle succeeds")
				}
				h.Release(c.NodeId, c.Fh)
				h.armed(ReplayCreate, "/d/sub", "", true)
				e, errno := h.Mkdir(d, "sub", 0o700)
				h.want(errno, "MKDIR", fsbackend.OK)
				if e.Mode&0o777 != 0o755 {
					t.Errorf("MKDIR answers mode %#o", e.Mode)
				}

				// What is still there cannot be removed by a replay, but in the eyes of the guest.
				h.armed(ReplayDelete, "/d/f", "", false)
				e, errno = h.Lookup(d, "f")
				h.want(errno, "LOOKUP of what is deleted", fsbackend.OK)
				if e.NodeId != f.NodeId {
					t.Errorf("what is deleted is node %#x, the guest knows %#x", e.NodeId, f.NodeId)
				}
				h.want(h.Unlink(d, "g"), "UNLINK of something else", ReplayRefused)
				h.want(h.Unlink(d, "f"), "UNLINK", fsbackend.OK)
				h.armed(ReplayDelete, "/d/never", "", true)
				e, errno = h.Lookup(d, "never")
				h.want(errno, "LOOKUP of what the guest does not know", fsbackend.OK)
				if e.Mode&unix.S_IFMT != unix.S_IFDIR || e.NodeId>>indexShift != ghostBase>>indexShift {
					t.Errorf("it is %+v", e)
				}
				h.want(h.Rmdir(d, "never"), "RMDIR", fsbackend.OK)
			})

			if err := os.Rename(h.dir+"/d/g", h.dir+"/d/sub/h"); err != nil {
				t.Fatal(err)
			}
			sub := h.walk("/d/sub").NodeId
			h.unchanged(func() {
				moved, errno := other.Lookup(sub, "h") // before the helper's turn
				h.want(errno, "LOOKUP", fsbackend.OK)
				h.armed(ReplayRename, "/d/g", "/d/sub/h", false)
				e, errno := h.Lookup(d, "g")
				h.want(errno, "LOOKUP of the old name", fsbackend.OK)
				if e.NodeId != moved.NodeId {
					t.Errorf("the old name is node %#x, expected %#x", e.NodeId, moved.NodeId)
				}
				_, errno = h.Lookup(sub, "h")
				h.want(errno, "LOOKUP of the new name", unix.ENOENT)
				h.want(h.Rename(d, "g", sub, "other", 0), "RENAME to something else", ReplayRefused)
				h.want(h.Rename(d, "g", sub, "h", 0), "RENAME", fsbackend.OK)
				if h.pending() {
					t.Error("a complete rename is still armed")
				}
			})
		})
	}
}

// TestReplayReserved looks reserved names up that are not right.
func TestReplayReserved(t *testing.T) {
	h := newHelper(t, Graft{})
	id := h.announce(ReplayModify, "/d/f", "", false)
	for _, name := range []string{
		ReplayPrefix, ReplayPrefix + h.token, ReplayPrefix + h.token + "-", ReplayPrefix + h.token + "-x", ReplayPrefix + h.token + "-1x",
		ReplayPrefix + strings.Repeat("0", tokenSize) + "-1", ReplayPrefix + h.token[1:] + "-1", ReplayPrefix + h.token + "--1",
		ReplayPrefix + strings.ToUpper(h.token) + "x-1", ReplayPrefix + h.token + "-99999999999999999999", ReplayPrefix + h.token + "-1-too",
	} {
		if _, errno := h.Lookup(root, name); errno != unix.ENOENT {
			t.Errorf("LOOKUP of %q: %v", name, errno)
		}
		if h.pending() {
			t.Errorf("LOOKUP of %q arms", name)
		}
	}
	h.want(h.arm(root, id+1, ""), "arm what is not announced", ReplayUnknown)
	h.want(h.arm(root, id, "-to"), "arm where it goes, of no rename", unix.EINVAL)
	h.Caller.Pid = 0
	h.want(h.arm(root, id, ""), "arm without a pid", unix.EACCES)
	h.Caller.Pid = helperPid
	for range maxEvents {
		h.announce(ReplayModify, "/d/f", "", false)
	}
	h.want(h.arm(root, id, ""), "arm what is too old", ReplayUnknown)
	h.want(h.arm(root, id+1, ""), "arm the oldest", ReplayArmed)
	h.announce(ReplayModify, "/"+strings.Repeat("x", maxEventBytes), "", false)
	h.want(h.arm(root, h.id, ""), "arm what is too long", ReplayUnknown)

	// Without replay, a reserved name is any name.
	s := newShare(t, Graft{Path: "/", Backend: newMem(t)})
	s.Announce(ReplayEvent{ID: 1, Kind: ReplayModify, Path: "/f"})
	put(t, s, ReplayPrefix+h.token+"-1", "")
	if token := h.s.EnableReplay(); token != h.token {
		t.Error("the token changes")
	}
}

// TestReplayOverdue lets a helper be held up: what it asks for then is refused once, and not carried out.
func TestReplayOverdue(t *testing.T) {
	h := newHelper(t, Graft{})
	d := h.walk("/d").NodeId
	overdue := func() {
		r := h.s.replay.Load()
		r.mu.Lock()
		r.armed[helperPid].until = time.Now().Add(-time.Second)
		r.mu.Unlock()
	}
	h.unchanged(func() {
		h.armed(ReplayDelete, "/d/f", "", false)
		overdue()
		h.want(h.Unlink(d, "f"), "UNLINK, late", ReplayRefused)
		h.armed(ReplayModify, "/d/f", "", false)
		overdue()
		_, errno := h.setattr(h.walk("/d/f").NodeId, fuseproto.FATTR_SIZE, 1)
		h.want(errno, "SETATTR, late", ReplayRefused)
		h.armed(ReplayCreate, "/d/late", "", false)
		overdue()
		_, errno = h.Create(d, "late", unix.O_EXCL|unix.O_WRONLY, 0o644)
		h.want(errno, "CREATE, late", ReplayRefused)
	})
	h.want(h.Unlink(d, "f"), "UNLINK of a caller with nothing armed", fsbackend.OK)

	// Callers that never come back make room in the end, and only then.
	id := h.announce(ReplayModify, "/d/g", "", false)
	for pid := range uint32(maxArmed) {
		h.Caller.Pid = 1000 + pid
		h.want(h.arm(root, id, ""), "arm", ReplayArmed)
	}
	h.Caller.Pid = helperPid
	h.want(h.arm(root, id, ""), "arm one too many", unix.EBUSY)
	r := h.s.replay.Load()
	r.mu.Lock()
	r.armed[1003].until = time.Now().Add(-time.Hour)
	r.mu.Unlock()
	h.want(h.arm(root, id, ""), "arm", ReplayArmed)
	h.s.Reset()
	if h.pending() {
		t.Error("an event stays armed when the session ends")
	}
}

// counting counts the lookups that a backend has given out.
type counting struct {
	*spy
	mu     sync.Mutex
	counts map[uint64]int64
	low    bool // a count has been below 0
}

func (b *counting) add(node uint64, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.counts[node] += n
	b.low = b.low || b.counts[node] < 0
}

// Lookup finds names that begin with a digit, of that number.
func (b *counting) Lookup(_ *fsbackend.Context, _ uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	if name[0] < '2' || name[0] > '9' || b.errno != 0 {
		return unix.ENOENT
	}
	out.NodeId = uint64(name[0] - '0')
	b.attr(&out.Attr)
	b.add(out.NodeId, 1)
	return fsbackend.OK
}

func (b *counting) Forget(node, n uint64) { b.add(node, -int64(n)) }

func (b *counting) Getattr(_ *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	b.attr(&out.Attr)
	return fsbackend.OK
}

// TestReplayHostile has a guest that knows the token send anything at all while events are armed: the backend is asked for nothing
// that changes it, and when the guest has forgotten what it was told of, all lookups are given back.
func TestReplayHostile(t *testing.T) {
	b := &counting{spy: &spy{quiet: true}, counts: make(map[uint64]int64)}
	s := newShare(t, Graft{Path: "/", Backend: b})
	token := s.EnableReplay()
	rnd := rand.New(rand.NewPCG(1, 2))
	kinds := []ReplayKind{ReplayCreate, ReplayModify, ReplayAttrib, ReplayDelete, ReplayRename, ReplayRescan, "limit"}
	names := []string{"2", "3", "4", "none", "gone"}
	held := make(map[uint64]uint64)
	hold := func(e *fuseproto.EntryOut, errno Errno) {
		if errno == fsbackend.OK && e.NodeId != 0 {
			held[e.NodeId]++
		}
	}
	id, answered := uint64(0), 0
	for range 10_000 {
		name := func() string { return names[rnd.IntN(len(names))] }
		node := func() uint64 { return uint64(1 + rnd.IntN(4)) }
		id++
		s.Announce(ReplayEvent{ID: id, Kind: kinds[rnd.IntN(len(kinds))], Path: "/" + name(), To: "/x/" + name(), Dir: rnd.IntN(2) == 0})
		c := fsbackend.Context{Caller: fuseproto.Caller{Pid: uint32(1 + rnd.IntN(3))}, MayBlock: true}
		lookup := func(parent uint64, name string) Errno {
			var out fuseproto.EntryOut
			errno := s.Lookup(&c, parent, fsbackend.MakeName(name), &out)
			hold(&out, errno)
			return errno
		}
		for _, suffix := range []string{"", "-to"}[:1+rnd.IntN(2)] {
			if errno := lookup(node(), fmt.Sprint(ReplayPrefix, token, "-", id, suffix)); suffix == "" && errno != ReplayArmed {
				t.Fatalf("arm: %v", errno)
			}
		}
		for range rnd.IntN(4) {
			lookup(node(), name())
		}
		if rnd.IntN(4) == 0 {
			for n, lookups := range held {
				some := 1 + rnd.Uint64N(lookups)
				s.Forget(n, some)
				if held[n] -= some; held[n] == 0 {
					delete(held, n)
				}
				break
			}
		}
		// One change, for an event that ends may leave nothing armed.
		r := &request{c: c, node: node(), node2: node(), name: name(), valid: rnd.Uint32(), flags: []uint32{0, unix.O_EXCL, unix.O_EXCL | unix.O_RDWR, rnd.Uint32()}[rnd.IntN(4)]}
		call := []string{"Setattr", "Mknod", "Mkdir", "Symlink", "Unlink", "Rmdir", "Rename", "Create", "Open"}[rnd.IntN(9)]
		if call == "Open" {
			r.flags |= unix.O_WRONLY
		}
		errno := ops[call].call(s, r)
		hold(&r.entry, errno)
		if errno == fsbackend.OK {
			answered++
		}
		b.quiet = false
		if log := b.taken(); len(log) > 0 {
			t.Fatalf("%s asks the backend for %+v", call, log)
		}
	}
	if answered < 500 {
		t.Errorf("only %d of the changes are answered as replays", answered)
	}
	for n, lookups := range held {
		s.Forget(n, lookups)
	}
	for n, count := range b.counts {
		if count != 0 {
			t.Errorf("node %d has %d lookups when the guest has forgotten it", n, count)
		}
	}
	r := s.replay.Load()
	if b.low || len(r.owed) != 0 || len(r.nodes) != 0 {
		t.Errorf("a count was below 0: %v; %d nodes owed, %d known", b.low, len(r.owed), len(r.nodes))
	}
}

// TestReplayRaces has callers arm, replay and forget at the same time.
func TestReplayRaces(t *testing.T) {
	h := newHelper(t, Graft{})
	h.unchanged(func() {
		var all sync.WaitGroup
		for i := range 4 {
			all.Go(func() {
				c := *h.Client
				c.Caller.Pid = uint32(100 + i)
				for n := range uint64(500) {
					h.s.Announce(ReplayEvent{ID: n + 1, Kind: ReplayDelete, Path: "/d"})
					_, _ = c.Lookup(root, fmt.Sprint(ReplayPrefix, h.token, "-", n+1))
					if e, errno := c.Lookup(root, "d"); errno == 0 {
						h.s.Forget(e.NodeId, 1)
					}
					_, _ = c.Lookup(root, ReplayPrefix+h.token+"-0")
					if n%100 == 0 {
						h.s.Reset()
					}
				}
			})
		}
		all.Wait()
	})
}

func TestReplayCosts(t *testing.T) {
	s := grafts(t, Graft{})
	s.EnableReplay()
	for op, call := range hot(s, second) {
		call()
		if n := testing.AllocsPerRun(100, call); n != 0 {
			t.Errorf("%s: %v allocations, expected none", op, n)
		}
	}
}

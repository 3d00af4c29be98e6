package virtiofs

import (
	"encoding/binary"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fuseproto"
)

// wildBit is in the nodeids of a twin's wild half.
const wildBit = 1 << 40

// twin is two trees in memory, each with its "file": the root's, and "wild" in it, an extension's whose calls a test can
// have panic, hang and fail.
type twin struct {
	*mem.FS
	root fsbackend.Part
	wild half
}

// half is of the part tame, whose timeout no test waits for, until it misbehaves: a healthy call may take long on a machine
// that has other things to do.
type half struct {
	*mem.FS
	tame, part fsbackend.Part
	hook       atomic.Pointer[hook]
	wild       atomic.Bool
}

// misbehave has calls from now on be part's, and run h.
func (h *half) misbehave(with *hook) {
	h.hook.Store(with)
	h.wild.Store(true)
}

// behave ends misbehave.
func (h *half) behave() {
	h.hook.Store(nil)
	h.wild.Store(false)
}

// hook has enter run before each call of the wild half, whose answer is enter's unless that is OK, and leave after it.
type hook struct {
	enter func(op string, c *fsbackend.Context) fsbackend.Errno
	leave func(op string)
}

func newTwin(t testing.TB, timeout time.Duration) *twin {
	w := &twin{FS: newMem(t), root: fsbackend.Part{Path: "/"}}
	w.wild.FS = newMem(t)
	w.wild.tame = fsbackend.Part{Name: "tame", Path: "/wild", Isolated: true, Slow: true, Timeout: patience}
	w.wild.part = fsbackend.Part{Name: "wildext", Path: "/wild", Isolated: true, Slow: true, Timeout: timeout}
	return w
}

func (w *twin) PartOf(node uint64) *fsbackend.Part {
	switch {
	case node&wildBit == 0:
		return &w.root
	case w.wild.wild.Load():
		return &w.wild.part
	default:
		return &w.wild.tame
	}
}

// in makes a call of the half that node is of, which becomes the node's number there.
func (w *twin) in(op string, c *fsbackend.Context, node *uint64, call func(fs *mem.FS) fsbackend.Errno) fsbackend.Errno {
	if *node&wildBit == 0 {
		return call(w.FS)
	}
	*node &^= wildBit
	h := w.wild.hook.Load()
	if h == nil {
		return call(w.wild.FS)
	}
	if h.leave != nil {
		defer h.leave(op)
	}
	if errno := h.enter(op, c); errno != fsbackend.OK {
		return errno
	}
	return call(w.wild.FS)
}

func (w *twin) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	if parent == 1 && string(name) == "wild" {
		var attr fuseproto.AttrOut
		errno := w.wild.Getattr(c, &fuseproto.GetattrIn{InHeader: fuseproto.InHeader{NodeId: 1}}, &attr)
		out.NodeId, out.Attr = wildBit|1, attr.Attr
		return errno
	}
	bit := parent & wildBit
	errno := w.in("Lookup", c, &parent, func(fs *mem.FS) fsbackend.Errno { return fs.Lookup(c, parent, name, out) })
	out.NodeId |= bit
	return errno
}

func (w *twin) Forget(node, n uint64) {
	w.in("Forget", nil, &node, func(fs *mem.FS) fsbackend.Errno {
		fs.Forget(node, n)
		return fsbackend.OK
	})
}

func (w *twin) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	return w.in("Getattr", c, &in.NodeId, func(fs *mem.FS) fsbackend.Errno { return fs.Getattr(c, in, out) })
}

func (w *twin) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	return w.in("Open", c, &in.NodeId, func(fs *mem.FS) fsbackend.Errno { return fs.Open(c, in, out) })
}

func (w *twin) Release(c *fsbackend.Context, in *fuseproto.ReleaseIn) {
	w.in("Release", c, &in.NodeId, func(fs *mem.FS) fsbackend.Errno {
		fs.Release(c, in)
		return fsbackend.OK
	})
}

func (w *twin) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) fsbackend.Errno {
	return w.in("Read", c, &in.NodeId, func(fs *mem.FS) fsbackend.Errno { return fs.Read(c, in, dst) })
}

func (w *twin) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (n uint32, errno fsbackend.Errno) {
	errno = w.in("Write", c, &in.NodeId, func(fs *mem.FS) (errno fsbackend.Errno) {
		n, errno = fs.Write(c, in, src)
		return errno
	})
	return n, errno
}

func (w *twin) Fsync(c *fsbackend.Context, in *fuseproto.FsyncIn) fsbackend.Errno {
	return w.in("Fsync", c, &in.NodeId, func(*mem.FS) fsbackend.Errno { return fsbackend.OK })
}

func (w *twin) Fsyncdir(*fsbackend.Context, *fuseproto.FsyncIn) fsbackend.Errno { return fsbackend.OK }

func (w *twin) Reset() {
	w.FS.Reset()
	w.wild.Reset()
}

// hang has the wild half's calls wait until release.
type hang struct {
	entered  chan string
	left     chan string
	cancels  chan (<-chan struct{})
	released chan struct{}
}

// hang is released at the test's end at the latest, before a rig that is older.
func (w *twin) hang(t testing.TB) *hang {
	h := &hang{
		entered: make(chan string, 8192), left: make(chan string, 8192), cancels: make(chan (<-chan struct{}), 8192),
		released: make(chan struct{}),
	}
	w.wild.misbehave(&hook{
		enter: func(op string, c *fsbackend.Context) fsbackend.Errno {
			h.entered <- op
			if c != nil {
				h.cancels <- c.Cancel
			}
			<-h.released
			return fsbackend.OK
		},
		leave: func(op string) { h.left <- op },
	})
	t.Cleanup(h.release)
	return h
}

func (h *hang) release() {
	select {
	case <-h.released:
	default:
		close(h.released)
	}
}

// await receives n times and returns the last.
func await[T any](t testing.TB, c <-chan T, n int, what string) (last T) {
	t.Helper()
	for i := range n {
		select {
		case last = <-c:
		case <-time.After(patience):
			t.Fatalf("%d of %d %s", i, n, what)
		}
	}
	return last
}

func le64(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }

// openWild opens the wild half's file.
func (r *rig) openWild() (node, fh uint64) {
	r.t.Helper()
	r.must(request, call{op: fuseproto.FUSE_LOOKUP, node: 1, args: body("wild"), outArgs: 128})
	node = le64(r.must(request, lookupWild()).data)
	return node, le64(r.must(request, call{op: fuseproto.FUSE_OPEN, node: node, args: body(uint32(unix.O_RDWR), uint32(0)), outArgs: 16}).data)
}

func lookupWild() call {
	return call{op: fuseproto.FUSE_LOOKUP, node: wildBit | 1, args: body("file"), outArgs: 128}
}

func write(node, fh uint64, data []byte) call {
	return call{
		op: fuseproto.FUSE_WRITE, node: node, data: data, outArgs: 8,
		args: body(fh, uint64(0), uint32(len(data)), uint32(0), uint64(0), uint32(0), uint32(0)),
	}
}

func forget(node, n uint64) call {
	return call{op: fuseproto.FUSE_FORGET, node: node, args: body(n), noReply: true}
}

// among is do while other requests of the queue are outstanding, whose replies go to others.
func (r *rig) among(i int, c call, others map[uint16]reply) reply {
	r.t.Helper()
	head := r.offer(i, c)
	r.kick(i)
	for {
		p := r.next(i)
		if p.head == head {
			return p
		}
		others[p.head] = p
	}
}

package fuseserver

import (
	"encoding/binary"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// Some opcodes go to a thread that may sleep without the backend being asked, for a slow backend all that have an answer.
func TestMayBlock(t *testing.T) {
	blocking := []string{"FSYNC", "FSYNCDIR", "SYNCFS", "FALLOCATE", "COPY_FILE_RANGE", "COPY_FILE_RANGE_64", "DESTROY"}
	for _, slow := range []bool{false, true} {
		for _, e := range examples() {
			b := newStub()
			b.slow = slow
			g := mounted(t, Config{Backend: b, Xattr: true})
			cancel := make(chan struct{})
			b.hook = func(op string, c *fsbackend.Context) {
				if c != nil && (c.MayBlock != g.r.MayBlock || (c.Cancel != nil) != c.MayBlock) {
					t.Errorf("%s: context %+v while MayBlock is %v", op, c, g.r.MayBlock)
				}
			}
			g.begin(e.msg, 4096)
			g.r.Cancel = cancel
			want := slices.Contains(blocking, e.name) || slow && e.name != "INTERRUPT"
			_, done := g.s.Handle(g.r)
			if done == want {
				t.Errorf("slow %v: %s is done %v without sleeping, expected %v", slow, e.name, done, !want)
			}
			if calls := b.taken(); !done && len(calls) > 0 {
				t.Errorf("slow %v: %s asks the backend %v before it may sleep", slow, e.name, calls)
			}
			if done {
				continue
			}
			g.r.MayBlock = true
			if _, done := g.s.Handle(g.r); !done {
				t.Errorf("slow %v: %s is not done", slow, e.name)
			}
			if calls := strings.Join(b.taken(), "; "); calls != e.call {
				t.Errorf("slow %v: %s asks the backend %q, expected %q", slow, e.name, calls, e.call)
			}
		}
	}
}

// A call that might sleep is made again, and its reply is as if it had not been interrupted.
func TestCallMadeAgain(t *testing.T) {
	for _, e := range examples() {
		if slices.Contains([]string{"READLINK", "IOCTL", "GETXATTR", "LISTXATTR", "READDIR", "READDIRPLUS", "RELEASE", "RELEASEDIR", "DESTROY", "WRITE"}, e.name) || !replies(e.msg) {
			continue // have an effect first in the stub, or cannot ask to be called again
		}
		b := newStub()
		g := mounted(t, Config{Backend: b, Xattr: true})
		b.errno = fsbackend.ErrMayBlock
		content := g.begin(e.msg, 4096)
		if _, done := g.s.Handle(g.r); done {
			t.Errorf("%s is done, though it might sleep", e.name)
			continue
		}
		b.errno = 0
		g.r.MayBlock = true
		written, done := g.s.Handle(g.r)
		if reply := g.check(e.msg, content(), written); !done || len(reply) < headerSize || string(reply[headerSize:]) != string(e.body) {
			t.Errorf("%s made again: reply %x, expected body %x", e.name, reply, e.body)
		}
	}
}

// stutter moves a few bytes in each call and then asks to be called again, until it may sleep.
type stutter struct {
	*stub
	reads, writes []uint64 // offsets
}

func (b *stutter) Read(c *fsbackend.Context, in *fuseproto.ReadIn, dst *fsbackend.Sink) Errno {
	b.reads = append(b.reads, in.Offset)
	if dst.Written() != 0 || dst.Len() != int(in.Size) {
		return syscall.EPROTO
	}
	if c.MayBlock {
		dst.Write(b.readData[in.Offset:])
		return 0
	}
	dst.Write(b.readData[in.Offset : in.Offset+3])
	return fsbackend.ErrMayBlock
}

func (b *stutter) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, Errno) {
	b.writes = append(b.writes, in.Offset)
	if src.Len() != int(in.Size) {
		return 0, syscall.EPROTO
	}
	p := make([]byte, src.Len())
	if !c.MayBlock {
		p = p[:3]
	}
	n := src.Read(p)
	b.written = append(b.written, p[:n]...)
	if !c.MayBlock {
		return uint32(n), fsbackend.ErrMayBlock
	}
	return uint32(n), 0
}

func TestReadWriteGoOn(t *testing.T) {
	for _, layout := range []layout{linuxLayout, onePiece, singleBytes, randomPieces(9)} {
		b := &stutter{stub: newStub()}
		g := newGuest(t, Config{Backend: b})
		g.layout = layout
		g.mount(allFlags)
		twice := func(msg []byte) string {
			t.Helper()
			content := g.begin(msg, 200)
			for range 2 {
				if _, done := g.s.Handle(g.r); done {
					t.Fatal("done, though it might sleep")
				}
			}
			g.r.MayBlock = true
			written, _ := g.s.Handle(g.r)
			return string(g.check(msg, content(), written)[headerSize:])
		}
		body := twice(message(fuseproto.FUSE_READ, 3, uint64(9), uint64(1), uint32(100), make([]byte, 20)))
		if body != "ata of the file" || !slices.Equal(b.reads, []uint64{1, 4, 7}) {
			t.Errorf("READ: %q by reads at %v", body, b.reads)
		}
		body = twice(message(fuseproto.FUSE_WRITE, 3, uint64(9), uint64(100), uint32(10), make([]byte, 20), "0123456789"))
		if body != string(cat(uint32(10), uint32(0))) || string(b.written) != "0123456789" || !slices.Equal(b.writes, []uint64{100, 103, 106}) {
			t.Errorf("WRITE: %x, %q by writes at %v", body, b.written, b.writes)
		}
	}
}

// What a backend must not do is EIO for the guest.
func TestBrokenBackend(t *testing.T) {
	tests := []struct {
		name   string
		mangle func(*stub)
		msg    []byte
	}{
		{"errno 512", func(b *stub) { b.errno = 512 }, message(fuseproto.FUSE_STATFS, 1)},
		{"negative errno", func(b *stub) { b.errno = ^Errno(0) }, message(fuseproto.FUSE_STATFS, 1)},
		{"ErrMayBlock where it may", func(b *stub) { b.errno = fsbackend.ErrMayBlock }, message(fuseproto.FUSE_FSYNC, 1, make([]byte, 16))},
		{"ErrMayBlock after a part", func(b *stub) { b.errno = fsbackend.ErrMayBlock }, message(fuseproto.FUSE_READLINK, 1)},
		{"node 0 created", func(b *stub) { b.nodeid = 0 }, message(fuseproto.FUSE_MKDIR, 1, uint64(0), "n\x00")},
	}
	for _, tt := range tests {
		b := newStub()
		g := mounted(t, Config{Backend: b})
		tt.mangle(b)
		g.fails(tt.msg, syscall.EIO)
		if n := g.s.Stats().BadReplies.Load(); n != 1 {
			t.Errorf("%s: counted %d times, expected once", tt.name, n)
		}
	}
	over := &overdone{newStub()}
	g := newGuest(t, Config{Backend: over})
	g.mount(allFlags)
	g.fails(message(fuseproto.FUSE_WRITE, 3, uint64(9), uint64(0), uint32(4), make([]byte, 20), "data"), syscall.EIO)
	g.fails(message(fuseproto.FUSE_COPY_FILE_RANGE, 3, make([]byte, 40), uint64(10), uint64(0)), syscall.EIO)
	if n := g.s.Stats().BadReplies.Load(); n != 2 {
		t.Errorf("%d bad replies counted, expected 2", n)
	}
}

// overdone says that it did more than it was asked.
type overdone struct{ *stub }

func (overdone) Write(_ *fsbackend.Context, in *fuseproto.WriteIn, _ *fsbackend.Source) (uint32, Errno) {
	return in.Size + 1, 0
}

func (overdone) CopyFileRange(_ *fsbackend.Context, in *fuseproto.CopyFileRangeIn) (uint64, Errno) {
	return in.Len + 1, 0
}

func TestBackendPanics(t *testing.T) {
	var log strings.Builder
	b := newStub()
	g := mounted(t, Config{Backend: b, Log: textLog(&log)})
	b.hook = func(string, *fsbackend.Context) { panic("a bug") }
	for range 100 {
		g.raw(make([]byte, inHeaderSize), 100) // the guest's own noise does not drown it
	}
	log.Reset()
	for range 100 {
		g.fails(message(fuseproto.FUSE_STATFS, 1), syscall.EIO)
	}
	if n := g.s.Stats().Panics.Load(); n != 100 {
		t.Errorf("%d panics counted, expected 100", n)
	}
	if n := strings.Count(log.String(), "FUSE_STATFS"); n == 0 || n > 5 {
		t.Errorf("%d lines logged for 100 panics, expected a few", n)
	}
	if n := strings.Count(log.String(), "[running]"); n != 1 {
		t.Errorf("%d stacks logged, expected one", n)
	}
	b.hook = nil
	g.fails(message(fuseproto.FUSE_STATFS, 1), 0)
}

// A guest that sends nothing but rubbish gets few lines into the log.
func TestLogIsBounded(t *testing.T) {
	var log strings.Builder
	g := newGuest(t, Config{Log: textLog(&log)})
	for range 1000 {
		g.raw(make([]byte, 30), 100)
		g.raw(initMessage(6, 0, 0), 100)
		g.raw(message(fuseproto.FUSE_LOOKUP, 1, "no end"), 100)
	}
	if n := strings.Count(log.String(), "\n"); n == 0 || n > 5 {
		t.Errorf("%d lines logged, expected a few", n)
	}
}

func TestAbort(t *testing.T) {
	for _, e := range examples() {
		b := newStub()
		g := mounted(t, Config{Backend: b, Xattr: true})
		content := g.begin(e.msg, 200)
		written := g.r.Abort(syscall.EINTR)
		reply := g.check(e.msg, content(), written)
		if !replies(e.msg) {
			if reply != nil {
				t.Errorf("%s: reply %x, expected none", e.name, reply)
			}
		} else if len(reply) != headerSize || -int32(binary.NativeEndian.Uint32(reply[4:])) != int32(syscall.EINTR) {
			t.Errorf("%s: reply %x, expected EINTR", e.name, reply)
		}
		if w, done := g.s.Handle(g.r); w != 0 || !done || !g.r.Aborted() {
			t.Errorf("%s: Handle after Abort: %d, %v, aborted %v", e.name, w, done, g.r.Aborted())
		}
		if calls := b.taken(); len(calls) > 0 {
			t.Errorf("%s: backend is asked %v after Abort", e.name, calls)
		}
		g.raw(e.msg, 4096)
		if g.r.Aborted() || g.r.Abort(syscall.EINTR) != 0 || g.r.Aborted() {
			t.Errorf("%s: answered twice", e.name)
		}
	}
}

// A call whose reply came too late is taken back.
func TestAbortWhileHandled(t *testing.T) {
	undone := map[string][]string{
		"LOOKUP": {"Forget 7 1"}, "SYMLINK": {"Forget 7 1"}, "MKNOD": {"Forget 7 1"}, "MKDIR": {"Forget 7 1"}, "LINK": {"Forget 7 1"},
		"OPEN": {"Release 3 9 0 0 0"}, "OPENDIR": {"Releasedir 3 9"},
		"CREATE": {"Release 7 9 0 0 0", "Forget 7 1"}, "TMPFILE": {"Release 7 9 0 0 0", "Forget 7 1"},
	}
	for _, e := range examples() {
		b := newStub()
		g := mounted(t, Config{Backend: b, Xattr: true})
		content := g.begin(e.msg, 4096)
		if g.r.TouchesGuestMemory() || !replies(e.msg) {
			continue
		}
		inside, aborted := make(chan struct{}), make(chan struct{})
		b.hook = func(string, *fsbackend.Context) {
			b.hook = nil
			close(inside)
			<-aborted
		}
		type outcome struct {
			written uint32
			done    bool
		}
		handled := make(chan outcome)
		g.r.MayBlock = true
		go func() {
			w, done := g.s.Handle(g.r)
			handled <- outcome{w, done}
		}()
		<-inside
		written := g.r.Abort(syscall.EINTR)
		reply := g.check(e.msg, content(), written)
		close(aborted)
		if got := <-handled; got != (outcome{0, true}) {
			t.Errorf("%s: Handle returned %+v after Abort", e.name, got)
		}
		if after := content()[:headerSize]; string(after) != string(reply) {
			t.Errorf("%s: reply is %x after Handle, %x before", e.name, after, reply)
		}
		if calls := b.taken(); !slices.Equal(calls[1:], undone[e.name]) {
			t.Errorf("%s: taken back by %v, expected %v", e.name, calls[1:], undone[e.name])
		}
	}
}

func TestTouchesGuestMemory(t *testing.T) {
	touch := []string{"READ", "WRITE", "READDIR", "READDIRPLUS", "READLINK", "GETXATTR", "GETXATTR size", "LISTXATTR", "LISTXATTR size", "IOCTL", "BATCH_FORGET"}
	g := mounted(t, Config{})
	for _, e := range examples() {
		g.begin(e.msg, 200)
		if want := slices.Contains(touch, e.name); g.r.TouchesGuestMemory() != want {
			t.Errorf("%s: %v, expected %v", e.name, !want, want)
		}
	}
}

// Guest memory can go at any time: that ends the request, not the process.
func TestGuestMemoryGone(t *testing.T) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	page := unix.Getpagesize()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(page)); err != nil {
		t.Fatal(err)
	}
	gone, err := unix.Mmap(fd, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(gone) }()
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	for _, e := range examples() {
		b := newStub()
		g := mounted(t, Config{Backend: b, Xattr: true})

		// The request is gone, then what follows its header.
		for _, n := range []int{0, inHeaderSize} {
			readable := []unix.Iovec{sys.MakeIovec(gone[:len(e.msg)-n])}
			if n > 0 {
				readable = []unix.Iovec{sys.MakeIovec(slices.Clone(e.msg[:n])), sys.MakeIovec(gone[:max(len(e.msg)-n, 1)])}
			}
			room, content := vector(make([]byte, 4096), onePiece)
			g.s.Begin(g.r, readable, room, uint64(len(e.msg)), 4096)
			g.r.MayBlock = true
			written, done := g.s.Handle(g.r)
			if !done {
				t.Errorf("%s without memory is not done", e.name)
			}
			g.check(e.msg, content(), written)
			if n == 0 && (written != 0 || g.s.Stats().Faults.Load() != 1) {
				t.Errorf("%s without a header: %d bytes, %d faults counted", e.name, written, g.s.Stats().Faults.Load())
			}
			if ops[binary.NativeEndian.Uint32(e.msg[4:])].flags&source == 0 {
				if calls := b.taken(); len(calls) > 0 && len(e.msg) > inHeaderSize && e.name != "INTERRUPT" {
					t.Errorf("%s without memory reaches the backend: %v", e.name, calls)
				}
			}
		}

		// The room for the reply is gone.
		if !replies(e.msg) {
			continue
		}
		g.mount(allFlags)
		readable, _ := vector(e.msg, onePiece)
		g.s.Begin(g.r, readable, []unix.Iovec{sys.MakeIovec(gone)}, uint64(len(e.msg)), uint64(page))
		g.r.MayBlock = true
		before := g.s.Stats().Faults.Load()
		if written, done := g.s.Handle(g.r); written != 0 || !done {
			t.Errorf("%s without room in memory: %d bytes, done %v", e.name, written, done)
		}
		if g.s.Stats().Faults.Load() == before {
			t.Errorf("%s: fault is not counted", e.name)
		}
	}
}

package fusebridge

import (
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestQuickOnQueueThread has a program that answers at once waited for where calls must not sleep, and one that does not never.
func TestQuickOnQueueThread(t *testing.T) {
	var slow atomic.Bool
	_, b, _, _ := newFake(t, Config{NoCache: true}, func(f *fake, h *fuseproto.InHeader, _ []byte) {
		if slow.Load() {
			time.Sleep(2 * slowAnswer) // as the program, not as the test
		}
		a := fuseproto.AttrOut{Attr: fuseproto.Attr{Ino: 1}}
		a.Mode = unix.S_IFDIR | 0o755
		f.reply(h.Unique, 0, bytesOf(&a))
	})
	in := &fuseproto.GetattrIn{}
	in.NodeId = fsbackendtest.Root
	ask := func(mayBlock bool) fsbackend.Errno {
		var out fuseproto.AttrOut
		return b.Getattr(&fsbackend.Context{MayBlock: mayBlock}, in, &out)
	}
	if errno := ask(false); errno != fsbackend.ErrMayBlock {
		t.Fatalf("before anything is known: %v", errno)
	}
	for end := time.Now().Add(30 * time.Second); ask(false) != 0; {
		if errno := ask(true); errno != 0 {
			t.Fatal(errno)
		}
		if time.Now().After(end) {
			t.Fatal("it is never quick")
		}
	}
	slow.Store(true)
	if errno := ask(false); errno != 0 && errno != fsbackend.ErrMayBlock { // the one that tells
		t.Fatal(errno)
	}
	if errno := ask(true); errno != 0 {
		t.Fatal(errno)
	}
	if errno := ask(false); errno != fsbackend.ErrMayBlock {
		t.Errorf("though it has become slow: %v", errno)
	}
}

// TestBusyProgramIsNotWaitedFor has another request on its way when one comes that must not sleep.
func TestBusyProgramIsNotWaitedFor(t *testing.T) {
	_, b, f, _ := newFake(t, Config{Timeout: 200 * time.Millisecond}, func(*fake, *fuseproto.InHeader, []byte) {})
	conn := b.current.Load()
	conn.pace[fuseproto.FUSE_STATFS].Store(mostQuick)
	done := make(chan fsbackend.Errno)
	go func() {
		done <- b.Statfs(&fsbackend.Context{MayBlock: true}, fsbackendtest.Root, new(fuseproto.StatfsOut))
	}()
	f.await(fuseproto.FUSE_STATFS)
	if errno := b.Statfs(&fsbackend.Context{}, fsbackendtest.Root, new(fuseproto.StatfsOut)); errno != fsbackend.ErrMayBlock {
		t.Errorf("STATFS: %v", errno)
	}
	if errno := <-done; errno != unix.EIO {
		t.Error(errno)
	}
	if n := conn.pace[fuseproto.FUSE_STATFS].Load(); n != leastQuick {
		t.Errorf("after an answer that did not come it counts %d", n)
	}
}

// TestNotAskedAgain asks once for what the program does not know of.
func TestNotAskedAgain(t *testing.T) {
	c, _, f, _ := newFake(t, Config{}, func(f *fake, h *fuseproto.InHeader, _ []byte) { f.reply(h.Unique, -int32(unix.ENOSYS), nil) })
	for range 3 {
		if _, _, errno := c.Getxattr(fsbackendtest.Root, "user.x", 0); errno != unix.ENOSYS {
			t.Fatal(errno)
		}
	}
	asked := 0
	for _, op := range f.seen() {
		if op == fuseproto.FUSE_GETXATTR {
			asked++
		}
	}
	if asked != 1 {
		t.Errorf("asked %d times", asked)
	}
}

// TestManyPiecesAreNotQuick reads to more pieces of memory than go into one request: the second could not be waited for.
func TestManyPiecesAreNotQuick(t *testing.T) {
	c, b, _, _ := newFake(t, Config{}, func(f *fake, h *fuseproto.InHeader, body []byte) {
		switch fuseproto.Opcode(h.Opcode) {
		case fuseproto.FUSE_LOOKUP:
			f.reply(h.Unique, 0, entryOf(9, unix.S_IFREG|0o644))
		case fuseproto.FUSE_OPEN:
			f.reply(h.Unique, 0, bytesOf(&fuseproto.OpenOut{Fh: 5}))
		case fuseproto.FUSE_READ:
			var in fuseproto.ReadIn
			copy(bytesOf(&in)[inHeaderSize:], body)
			f.reply(h.Unique, 0, make([]byte, in.Size))
		case fuseproto.FUSE_RELEASE:
			f.reply(h.Unique, 0, nil)
		}
	})
	e, errno := c.Lookup(fsbackendtest.Root, "file")
	if errno != 0 {
		t.Fatal(errno)
	}
	fh, errno := c.Open(e.NodeId, unix.O_RDONLY)
	if errno != 0 {
		t.Fatal(errno)
	}
	defer c.Release(e.NodeId, fh)
	b.current.Load().pace[fuseproto.FUSE_READ].Store(mostQuick)
	for _, tt := range []struct {
		piece int
		want  fsbackend.Errno
	}{{0, fsbackend.OK}, {1, fsbackend.ErrMayBlock}} {
		data := make([]byte, 2000)
		in := &fuseproto.ReadIn{Fh: fh, Size: uint32(len(data))}
		in.NodeId = e.NodeId
		if errno := b.Read(&fsbackend.Context{}, in, fsbackendtest.NewSink(data, tt.piece)); errno != tt.want {
			t.Errorf("pieces of %d: %v", tt.piece, errno)
		}
	}
}

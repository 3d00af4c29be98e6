package fusebridge

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// lines are sockets that a bridge is to get, as program.Line brings them.
type lines chan *os.File

func (l lines) Next(ctx context.Context) (*os.File, error) {
	select {
	case f, ok := <-l:
		if !ok {
			return nil, errors.New("no more programs")
		}
		return f, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// A fake is a FUSE program within the test: answer is called for each request but INIT, one after the other.
type fake struct {
	t      testing.TB
	fd     int
	mu     sync.Mutex
	ops    []fuseproto.Opcode
	answer func(f *fake, h *fuseproto.InHeader, body []byte)
	init   fuseproto.InitOut
}

// fakeInit is what a modern program answers to INIT.
var fakeInit = fuseproto.InitOut{
	Major: 7, Minor: 40, MaxWrite: 1 << 20, MaxPages: 256,
	Flags: uint32(offered & 0xffffffff &^ fuseproto.FUSE_NO_OPEN_SUPPORT &^ fuseproto.FUSE_NO_OPENDIR_SUPPORT),
}

// start starts it and returns the bridge's end of its socket.
func (f *fake) start() *os.File {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		f.t.Fatal(err)
	}
	for _, fd := range fds {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	}
	f.fd = fds[0]
	go f.run()
	return os.NewFile(uintptr(fds[1]), "fake")
}

func (f *fake) run() {
	defer unix.Close(f.fd)
	buf := make([]byte, 2<<20)
	for {
		n, err := unix.Read(f.fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n < inHeaderSize {
			return
		}
		h := *header(buf)
		f.mu.Lock()
		f.ops = append(f.ops, fuseproto.Opcode(h.Opcode))
		f.mu.Unlock()
		switch fuseproto.Opcode(h.Opcode) {
		case fuseproto.FUSE_INIT:
			out := f.init
			f.reply(h.Unique, 0, bytesOf(&out))
		case fuseproto.FUSE_DESTROY:
			f.reply(h.Unique, 0, nil)
		default:
			f.answer(f, &h, buf[inHeaderSize:n])
		}
	}
}

// reply sends a reply.
func (f *fake) reply(unique uint64, status int32, payload []byte) {
	o := fuseproto.OutHeader{Length: uint32(outHeaderSize + len(payload)), Status: status, Unique: unique}
	f.send(append(append([]byte(nil), bytesOf(&o)...), payload...))
}

func (f *fake) send(b []byte) { _ = unix.Send(f.fd, b, unix.MSG_NOSIGNAL) }

// seen returns the operations so far.
func (f *fake) seen() []fuseproto.Opcode {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]fuseproto.Opcode(nil), f.ops...)
}

// await returns when the program has been sent an op.
func (f *fake) await(op fuseproto.Opcode) {
	f.t.Helper()
	for end := time.Now().Add(30 * time.Second); !slices.Contains(f.seen(), op); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			f.t.Fatalf("it was not sent %v, but %v", op, f.seen())
		}
	}
}

// entryOf is an entry for a file of mode.
func entryOf(raw uint64, mode uint32) []byte {
	e := fuseproto.EntryOut{NodeId: raw}
	e.Mode, e.Ino, e.Nlink = mode, raw, 1
	return bytesOf(&e)
}

// newFake makes a bridge to a fake program that answers with answer.
func newFake(t testing.TB, cfg Config, answer func(*fake, *fuseproto.InHeader, []byte)) (*fsbackendtest.Client, *Bridge, *fake, lines) {
	t.Helper()
	return newFakeInit(t, fakeInit, cfg, answer)
}

// newFakeInit is newFake for a program that answers init to INIT.
func newFakeInit(t testing.TB, init fuseproto.InitOut, cfg Config, answer func(*fake, *fuseproto.InHeader, []byte)) (*fsbackendtest.Client, *Bridge, *fake, lines) {
	t.Helper()
	l := make(lines, 4)
	f := &fake{t: t, answer: answer, init: init}
	l <- f.start()
	cfg.Line = l
	b, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		for len(l) > 0 {
			(<-l).Close()
		}
	})
	return &fsbackendtest.Client{R: fsbackend.Resolve(b)}, b, f, l
}

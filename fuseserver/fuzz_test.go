package fuseserver

import (
	"encoding/binary"
	"runtime/debug"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// FuzzDecode sends arbitrary bytes, cut arbitrarily, with room for a reply that may be small: nothing panics, no reply
// is longer than its room, and used.len is its out_header.len.
func FuzzDecode(f *testing.F) {
	for i, e := range examples() {
		f.Add(e.msg, uint64(i), uint16(4096), byte(i))
		f.Add(e.msg, uint64(i), uint16(16), byte(i))
	}
	f.Add(withExtensions(message(fuseproto.FUSE_MKDIR, 1, make([]byte, 8), "n\x00"), secctxExt("security.x", "v"), groupsExt(1, 2)), uint64(1), uint16(300), byte(0))
	f.Add(initMessage(7, 45, allFlags), uint64(1), uint16(300), byte(0))
	f.Fuzz(func(t *testing.T, msg []byte, seed uint64, room uint16, mode byte) {
		debug.SetPanicOnFault(true)
		b := newStub()
		b.quiet = true
		b.want = func(f uint64) uint64 { return f | fuseproto.FUSE_SECURITY_CTX }
		g := newGuest(t, Config{Backend: b, Xattr: mode&1 == 0, ReadOnly: mode&2 != 0, AllowDirectIO: mode&4 != 0, PosixLock: mode&32 == 0, Flock: mode&64 == 0})
		if mode&8 == 0 {
			g.mount(allFlags)
		}
		if mode&16 != 0 {
			g.mount(allFlags &^ fuseproto.FUSE_SETXATTR_EXT)
		}
		g.layout = randomPieces(seed)
		readable, _ := vector(msg, g.layout)
		writable, content := vector(make([]byte, room), g.layout)
		for range 2 { // the second time all is as the first left it
			g.s.Begin(g.r, append([]unix.Iovec(nil), readable...), append([]unix.Iovec(nil), writable...), uint64(len(msg)), uint64(room))
			written, done := g.s.Handle(g.r)
			if !done {
				g.r.MayBlock = true
				if written, done = g.s.Handle(g.r); !done {
					t.Fatal("not done on a thread that may sleep")
				}
			}
			if written == 0 {
				continue
			}
			if written < headerSize || written > uint32(room) {
				t.Fatalf("reply of %d bytes in room for %d", written, room)
			}
			if fuseproto.Opcode(binary.NativeEndian.Uint32(msg[4:])) == fuseproto.FUSE_INIT_BSWAP_RESERVED {
				continue // its header has the other byte order
			}
			if n := binary.NativeEndian.Uint32(content()); n != written {
				t.Fatalf("out_header.len is %d, used.len %d", n, written)
			}
		}
		if n := g.s.Stats().Panics.Load() + g.s.Stats().BadReplies.Load(); n > 0 {
			t.Fatalf("%d panics or bad replies", n)
		}
	})
}

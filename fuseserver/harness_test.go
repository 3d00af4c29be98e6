package fuseserver

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

const (
	testUnique = 0x1122334455667788
	testUID    = 1000
	testGID    = 100
	testPID    = 4242
)

// cat joins integers, in the host's byte order, strings and bytes.
func cat(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch v := p.(type) {
		case uint16:
			b = binary.NativeEndian.AppendUint16(b, v)
		case uint32:
			b = binary.NativeEndian.AppendUint32(b, v)
		case int32:
			b = binary.NativeEndian.AppendUint32(b, uint32(v))
		case uint64:
			b = binary.NativeEndian.AppendUint64(b, v)
		case string:
			b = append(b, v...)
		case []byte:
			b = append(b, v...)
		default:
			panic(fmt.Sprintf("cat %T", p))
		}
	}
	return b
}

// message is a whole request.
func message(opcode fuseproto.Opcode, node uint64, args ...any) []byte {
	body := cat(args...)
	return cat(uint32(inHeaderSize+len(body)), uint32(opcode), uint64(testUnique), node,
		uint32(testUID), uint32(testGID), uint32(testPID), uint16(0), uint16(0), body)
}

// withExtensions appends an extension area to msg.
func withExtensions(msg []byte, area ...any) []byte {
	ext := cat(area...)
	if len(ext)%8 != 0 {
		panic("extension area is no multiple of 8 bytes")
	}
	msg = append(bytes.Clone(msg), ext...)
	binary.NativeEndian.PutUint32(msg, uint32(len(msg)))
	binary.NativeEndian.PutUint16(msg[36:], uint16(len(ext)/8))
	return msg
}

// A layout cuts n bytes into pieces.
type layout func(n int) []int

func onePiece(n int) []int { return []int{n} }

func singleBytes(n int) []int {
	pieces := make([]int, n)
	for i := range pieces {
		pieces[i] = 1
	}
	return pieces
}

func linuxLayout(n int) []int { return []int{min(n, 40), max(n-40, 0)} }

func randomPieces(seed uint64) layout {
	rng := rand.New(rand.NewPCG(seed, 1))
	return func(n int) []int {
		var pieces []int
		for n > 0 {
			k := min(n, rng.IntN(40))
			pieces, n = append(pieces, k), n-k
		}
		return append(pieces, 0)
	}
}

// vector returns b as iovecs of separate memory, and a function that returns what is in that memory then.
func vector(b []byte, cut layout) ([]unix.Iovec, func() []byte) {
	var iov []unix.Iovec
	var mem [][]byte
	for _, n := range cut(len(b)) {
		m := make([]byte, n, n+1)
		copy(m, b)
		b = b[n:]
		mem = append(mem, m)
		iov = append(iov, unix.Iovec{Base: &m[:1][0], Len: uint64(n)})
	}
	return iov, func() []byte { return bytes.Join(mem, nil) }
}

// roomFill is in the room for a reply before it is written.
const roomFill = 0xa5

// guest plays the driver.
type guest struct {
	t      testing.TB
	s      *Server
	b      *stub
	r      *Request
	layout layout
}

func newGuest(t testing.TB, cfg Config) *guest {
	t.Helper()
	b, ok := cfg.Backend.(*stub)
	if cfg.Backend == nil {
		b, ok = newStub(), true
		cfg.Backend = b
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, s: s, r: s.NewRequest(), layout: linuxLayout}
	if ok {
		g.b = b
	}
	return g
}

const allFlags = (1<<64 - 1) &^ fuseproto.FUSE_INIT_RESERVED

func initMessage(major, minor uint32, flags uint64) []byte {
	return message(fuseproto.FUSE_INIT, 0, major, minor, uint32(1<<20), uint32(flags), uint32(flags>>32), make([]byte, 44))
}

// mounted returns a guest that has done INIT and shares its locks.
func mounted(t testing.TB, cfg Config) *guest {
	t.Helper()
	cfg.PosixLock, cfg.Flock = true, true
	g := newGuest(t, cfg)
	g.mount(allFlags)
	return g
}

func (g *guest) mount(flags uint64) {
	g.t.Helper()
	if _, errno := g.do(initMessage(7, 45, flags)); errno != 0 {
		g.t.Fatalf("INIT: %v", errno)
	}
	if g.b != nil {
		g.b.taken()
	}
}

// begin hands msg over with room bytes for the reply, and returns what is in them.
func (g *guest) begin(msg []byte, room int) func() []byte {
	readable, _ := vector(msg, g.layout)
	writable, content := vector(bytes.Repeat([]byte{roomFill}, room), g.layout)
	g.s.Begin(g.r, readable, writable, uint64(len(msg)), uint64(room))
	return content
}

// raw sends msg and returns the reply's bytes, nil for none, having checked what holds for every reply.
func (g *guest) raw(msg []byte, room int) []byte {
	g.t.Helper()
	content := g.begin(msg, room)
	written, done := g.s.Handle(g.r)
	if !done {
		if written != 0 {
			g.t.Fatalf("Handle returned %d bytes before it was done", written)
		}
		g.r.MayBlock = true
		if written, done = g.s.Handle(g.r); !done {
			g.t.Fatal("Handle is not done on a thread that may sleep")
		}
	}
	return g.check(msg, content(), written)
}

// check returns the reply in room.
func (g *guest) check(msg, room []byte, written uint32) []byte {
	g.t.Helper()
	if written == 0 {
		return nil
	}
	if written < headerSize || int(written) > len(room) {
		g.t.Fatalf("reply of %d bytes in room for %d", written, len(room))
	}
	reply := room[:written]
	if n := binary.NativeEndian.Uint32(reply); n != written {
		g.t.Fatalf("out_header.len is %d, used.len %d", n, written)
	}
	if unique := reply[8:16]; !bytes.Equal(unique, msg[8:16]) {
		g.t.Fatalf("unique is %x, expected %x", unique, msg[8:16])
	}
	if errno := binary.NativeEndian.Uint32(reply[4:]); errno != 0 && written != headerSize {
		g.t.Fatalf("error reply of %d bytes, expected the header alone", written)
	}
	return reply
}

// do sends msg with ample room and returns the reply's body and errno.
func (g *guest) do(msg []byte) ([]byte, Errno) {
	g.t.Helper()
	return g.doRoom(msg, 4096)
}

func (g *guest) doRoom(msg []byte, room int) ([]byte, Errno) {
	g.t.Helper()
	reply := g.raw(msg, room)
	if reply == nil {
		return nil, 0
	}
	return reply[headerSize:], Errno(-int32(binary.NativeEndian.Uint32(reply[4:])))
}

// fails checks that msg is answered with errno.
func (g *guest) fails(msg []byte, want Errno) {
	g.t.Helper()
	if _, errno := g.do(msg); errno != want {
		g.t.Errorf("%v is answered with %v, expected %v", fuseproto.Opcode(binary.NativeEndian.Uint32(msg[4:])), errno, want)
	}
}

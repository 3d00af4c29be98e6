package fuseserver

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

func attrBytes() []byte {
	return cat(uint64(7), uint64(16), make([]byte, 44), uint32(syscall.S_IFREG|0o644), uint32(1), make([]byte, 20))
}

func entryBytes() []byte {
	return cat(uint64(7), uint64(1), uint64(1), uint64(1), uint64(0), attrBytes())
}

func openBytes() []byte { return cat(uint64(9), uint64(0)) }

// example is a good request of an opcode, what the backend is asked, and the reply's body.
type example struct {
	name  string
	msg   []byte
	least int // bytes of msg without which it is malformed; 0: all
	call  string
	body  []byte
	need  int // bytes of room without which there is no reply; 0: all of the body
}

func examples() []example {
	return []example{
		{name: "LOOKUP", msg: message(fuseproto.FUSE_LOOKUP, 3, "name\x00"), call: "Lookup 3 name", body: entryBytes()},
		{name: "FORGET", msg: message(fuseproto.FUSE_FORGET, 3, uint64(5)), call: "Forget 3 5"},
		{name: "GETATTR", msg: message(fuseproto.FUSE_GETATTR, 3, uint32(1), uint32(0), uint64(9)), call: "Getattr 3 1 9", body: cat(uint64(1), uint64(0), attrBytes())},
		{
			name: "SETATTR",
			msg:  message(fuseproto.FUSE_SETATTR, 3, fuseproto.FATTR_MODE, uint32(0), uint64(9), uint64(11), make([]byte, 44), uint32(0o600), uint32(0), uint32(1), uint32(2), uint32(0)),
			call: "Setattr 3 1 9 11 384 1 2", body: cat(uint64(1), uint64(0), attrBytes()),
		},
		{name: "READLINK", msg: message(fuseproto.FUSE_READLINK, 3), call: "Readlink 3", body: []byte("a/target"), need: 1},
		{name: "SYMLINK", msg: message(fuseproto.FUSE_SYMLINK, 3, "name\x00../to/it\x00"), call: "Symlink 3 name ../to/it", body: entryBytes()},
		{name: "MKNOD", msg: message(fuseproto.FUSE_MKNOD, 3, uint32(0o644), uint32(5), uint32(0o22), uint32(0), "name\x00"), call: "Mknod 3 name 420 5 18", body: entryBytes()},
		{name: "MKDIR", msg: message(fuseproto.FUSE_MKDIR, 3, uint32(0o755), uint32(0o22), "name\x00"), call: "Mkdir 3 name 493 18", body: entryBytes()},
		{name: "UNLINK", msg: message(fuseproto.FUSE_UNLINK, 3, "name\x00"), call: "Unlink 3 name"},
		{name: "RMDIR", msg: message(fuseproto.FUSE_RMDIR, 3, "name\x00"), call: "Rmdir 3 name"},
		{name: "RENAME", msg: message(fuseproto.FUSE_RENAME, 3, uint64(4), "old\x00new\x00"), call: "Rename 3 old 4 new 0"},
		{name: "RENAME2", msg: message(fuseproto.FUSE_RENAME2, 3, uint64(4), uint32(2), uint32(0), "old\x00new\x00"), call: "Rename 3 old 4 new 2"},
		{name: "LINK", msg: message(fuseproto.FUSE_LINK, 3, uint64(6), "name\x00"), call: "Link 3 name 6", body: entryBytes()},
		{name: "OPEN", msg: message(fuseproto.FUSE_OPEN, 3, uint32(unix.O_RDWR|unix.O_DIRECT|unix.O_CREAT), uint32(1)), call: "Open 3 2 1", body: openBytes()},
		{
			name: "READ", msg: message(fuseproto.FUSE_READ, 3, uint64(9), uint64(5), uint32(6), uint32(0), uint64(0), uint32(unix.O_APPEND), uint32(0)),
			call: "Read 3 9 5 6 1024", body: []byte("of the"), need: 1,
		},
		{
			name: "WRITE", msg: message(fuseproto.FUSE_WRITE, 3, uint64(9), uint64(5), uint32(6), uint32(1), uint64(0), uint32(2), uint32(0), "sluice"),
			call: "Write 3 9 5 6 1 2", body: cat(uint32(6), uint32(0)),
		},
		{name: "STATFS", msg: message(fuseproto.FUSE_STATFS, 3), call: "Statfs 3", body: cat(uint64(100), make([]byte, 32), uint32(4096), make([]byte, 36))},
		{name: "RELEASE", msg: message(fuseproto.FUSE_RELEASE, 3, uint64(9), uint32(2), uint32(1), uint64(77)), call: "Release 3 9 2 1 77"},
		{name: "FSYNC", msg: message(fuseproto.FUSE_FSYNC, 3, uint64(9), uint32(1), uint32(0)), call: "Fsync 3 9 1"},
		{
			name: "SETXATTR", msg: message(fuseproto.FUSE_SETXATTR, 3, uint32(5), uint32(1), uint32(1), uint32(0), "user.a/b\x00value"),
			call: "Setxattr 3 user.a/b 5 1 1 5",
		},
		{name: "GETXATTR", msg: message(fuseproto.FUSE_GETXATTR, 3, uint32(5), uint32(0), "user.a\x00"), call: "Getxattr 3 user.a 5", body: []byte("value")},
		{name: "GETXATTR size", msg: message(fuseproto.FUSE_GETXATTR, 3, uint32(0), uint32(0), "user.a\x00"), call: "Getxattr 3 user.a 0", body: cat(uint32(5), uint32(0))},
		{name: "LISTXATTR", msg: message(fuseproto.FUSE_LISTXATTR, 3, uint32(70), uint32(0)), call: "Listxattr 3 70", body: []byte("user.a\x00"), need: 1},
		{name: "LISTXATTR size", msg: message(fuseproto.FUSE_LISTXATTR, 3, uint32(0), uint32(0)), call: "Listxattr 3 0", body: cat(uint32(7), uint32(0))},
		{name: "REMOVEXATTR", msg: message(fuseproto.FUSE_REMOVEXATTR, 3, "user.a\x00"), call: "Removexattr 3 user.a"},
		{name: "FLUSH", msg: message(fuseproto.FUSE_FLUSH, 3, uint64(9), uint64(0), uint64(77)), call: "Flush 3 9 77"},
		{
			name: "GETLK", msg: message(fuseproto.FUSE_GETLK, 3, uint64(9), uint64(77), uint64(1), uint64(math.MaxInt64), uint32(unix.F_RDLCK), uint32(11), uint64(0)),
			call: "Getlk 3 9 77 1 9223372036854775807 0 0", body: cat(uint64(5), uint64(6), uint32(unix.F_WRLCK), uint32(42)),
		},
		{
			name: "SETLK", msg: message(fuseproto.FUSE_SETLK, 3, uint64(9), uint64(77), uint64(1), uint64(2), uint32(unix.F_WRLCK), uint32(11), uint64(0)),
			call: "Setlk 3 9 77 1 2 1 0",
		},
		{
			name: "SETLKW", msg: message(fuseproto.FUSE_SETLKW, 3, uint64(9), uint64(77), uint64(0), uint64(math.MaxInt64), uint32(unix.F_UNLCK), uint32(0), uint32(1), uint32(0)),
			call: "Setlk 3 9 77 0 9223372036854775807 2 1",
		},
		{name: "OPENDIR", msg: message(fuseproto.FUSE_OPENDIR, 3, uint32(unix.O_DIRECTORY), uint32(0)), call: fmt.Sprint("Opendir 3 ", unix.O_DIRECTORY), body: openBytes()},
		{
			name: "READDIR", msg: message(fuseproto.FUSE_READDIR, 3, uint64(9), uint64(math.MaxUint64-1), uint32(100), uint32(0), uint64(0), uint64(0)),
			call: "Readdir 3 9 18446744073709551614 100", body: cat(uint64(7), uint64(math.MaxUint64), uint32(8), uint32(syscall.DT_REG), "an entry"), need: 1,
		},
		{
			name: "READDIRPLUS", msg: message(fuseproto.FUSE_READDIRPLUS, 3, uint64(9), uint64(0), uint32(200), uint32(0), uint64(0), uint64(0)),
			call: "Readdirplus 3 9 0 200", need: 1,
			body: cat(uint64(7), uint64(1), uint64(1), uint64(1), make([]byte, 96), uint64(7), uint64(1), uint32(8), uint32(syscall.DT_REG), "an entry"),
		},
		{name: "RELEASEDIR", msg: message(fuseproto.FUSE_RELEASEDIR, 3, uint64(9), uint64(0), uint64(0)), call: "Releasedir 3 9"},
		{name: "FSYNCDIR", msg: message(fuseproto.FUSE_FSYNCDIR, 3, uint64(9), uint32(0), uint32(0)), call: "Fsyncdir 3 9 0"},
		{name: "ACCESS", msg: message(fuseproto.FUSE_ACCESS, 3, uint32(4), uint32(0)), call: "Access 3 4"},
		{
			name: "CREATE", msg: message(fuseproto.FUSE_CREATE, 3, uint32(unix.O_RDWR|unix.O_CREAT|unix.O_DIRECT), uint32(0o644), uint32(0o22), uint32(1), "name\x00"),
			call: "Create 3 name 66 420 18 1", body: cat(entryBytes(), openBytes()),
		},
		{
			name: "TMPFILE", msg: message(fuseproto.FUSE_TMPFILE, 3, uint32(unix.O_RDWR), uint32(0o644), uint32(0o22), uint32(1), "/\x00"), least: 56,
			call: "Tmpfile 3 2 420 18 1", body: cat(entryBytes(), openBytes()),
		},
		{name: "INTERRUPT", msg: message(fuseproto.FUSE_INTERRUPT, 0, uint64(1))},
		{name: "IOCTL", msg: message(fuseproto.FUSE_IOCTL, 3, uint64(9), uint32(0), uint32(0x80086601), uint64(0), uint32(3), uint32(6), "arg"), call: "Ioctl 3 9 2148034049 arg 6", body: cat(uint32(3), make([]byte, 12), "result")},
		{name: "BATCH_FORGET", msg: message(fuseproto.FUSE_BATCH_FORGET, 0, uint32(3), uint32(0), uint64(5), uint64(6), uint64(1), uint64(9), uint64(8), uint64(1)), call: "Forget 5 6; Forget 8 1"},
		{name: "FALLOCATE", msg: message(fuseproto.FUSE_FALLOCATE, 3, uint64(9), uint64(5), uint64(6), uint32(1), uint32(0)), call: "Fallocate 3 9 5 6 1"},
		{name: "LSEEK", msg: message(fuseproto.FUSE_LSEEK, 3, uint64(9), uint64(5), uint32(unix.SEEK_HOLE), uint32(0)), call: "Lseek 3 9 5 4", body: cat(uint64(6))},
		{
			name: "COPY_FILE_RANGE", msg: message(fuseproto.FUSE_COPY_FILE_RANGE, 3, uint64(9), uint64(5), uint64(4), uint64(10), uint64(6), uint64(1<<40), uint64(0)),
			call: "CopyFileRange 3 9 5 4 10 6 4294963200", body: cat(uint32(0xfffff000), uint32(0)),
		},
		{
			name: "COPY_FILE_RANGE_64", msg: message(fuseproto.FUSE_COPY_FILE_RANGE_64, 3, uint64(9), uint64(5), uint64(4), uint64(10), uint64(6), uint64(1<<40), uint64(0)),
			call: "CopyFileRange 3 9 5 4 10 6 1099511627776", body: cat(uint64(1 << 40)),
		},
		{name: "SYNCFS", msg: message(fuseproto.FUSE_SYNCFS, 3, uint64(0)), call: "Syncfs 3"},
		{
			name: "STATX", msg: message(fuseproto.FUSE_STATX, 3, uint32(1), uint32(0), uint64(9), uint32(2), uint32(0xfff)),
			call: "Statx 3 1 9 2 4095", body: cat(uint64(1), make([]byte, 24), uint32(0xfff), make([]byte, 28), uint64(7), make([]byte, 216)),
		},
		{name: "DESTROY", msg: message(fuseproto.FUSE_DESTROY, 0), call: "Reset"},
	}
}

func replies(msg []byte) bool {
	return ops[binary.NativeEndian.Uint32(msg[4:])].flags&noReply == 0
}

func TestEveryOpcodeHasExample(t *testing.T) {
	seen := map[fuseproto.Opcode]bool{fuseproto.FUSE_INIT: true}
	for _, e := range examples() {
		seen[fuseproto.Opcode(binary.NativeEndian.Uint32(e.msg[4:]))] = true
	}
	for opcode := range ops {
		if ops[opcode].handle != nil && !seen[fuseproto.Opcode(opcode)] {
			t.Errorf("%v has no example", fuseproto.Opcode(opcode))
		}
	}
}

func TestOps(t *testing.T) {
	layouts := map[string]layout{"Linux": linuxLayout, "one piece": onePiece, "single bytes": singleBytes, "random": randomPieces(1), "random 2": randomPieces(2)}
	for name, layout := range layouts {
		t.Run(name, func(t *testing.T) {
			for _, e := range examples() {
				g := mounted(t, Config{Xattr: true})
				g.layout = layout
				room := headerSize + len(e.body)
				if e.need > 0 {
					room = 4096
				}
				reply := g.raw(e.msg, room)
				if call := strings.Join(g.b.taken(), "; "); call != e.call {
					t.Errorf("%s: backend is asked %q, expected %q", e.name, call, e.call)
				}
				if !replies(e.msg) {
					if reply != nil {
						t.Errorf("%s: reply %x, expected none", e.name, reply)
					}
					continue
				}
				want := cat(uint32(headerSize+len(e.body)), int32(0), uint64(testUnique), e.body)
				if !bytes.Equal(reply, want) {
					t.Errorf("%s: reply\n%x, expected\n%x", e.name, reply, want)
				}
			}
		})
	}
	g := mounted(t, Config{})
	g.do(message(fuseproto.FUSE_WRITE, 3, uint64(9), uint64(5), uint32(6), uint32(1), uint64(0), uint32(2), uint32(0), "sluice"))
	if string(g.b.written) != "sluice" {
		t.Errorf("backend got %q to write", g.b.written)
	}
}

// A request cut anywhere is EINVAL, or no reply where there is no whole header, and never reaches the backend.
func TestCutRequests(t *testing.T) {
	for _, e := range examples() {
		for _, relen := range []bool{false, true} { // whether header.len says so
			g := mounted(t, Config{Xattr: true})
			least := e.least
			if least == 0 || !relen {
				least = len(e.msg)
			}
			for n := range least {
				cut := bytes.Clone(e.msg[:n])
				if relen && n >= 4 {
					binary.NativeEndian.PutUint32(cut, uint32(n))
				}
				before := g.s.Stats().Malformed.Load()
				reply := g.raw(cut, 4096)
				if calls := g.b.taken(); len(calls) > 0 {
					t.Fatalf("%s cut to %d bytes reaches the backend: %v", e.name, n, calls)
				}
				if g.s.Stats().Malformed.Load() != before+1 {
					t.Fatalf("%s cut to %d bytes is not counted once", e.name, n)
				}
				if n < inHeaderSize || !replies(e.msg) {
					if reply != nil {
						t.Fatalf("%s cut to %d bytes has reply %x", e.name, n, reply)
					}
					continue
				}
				if want := cat(uint32(headerSize), -int32(syscall.EINVAL), uint64(testUnique)); !bytes.Equal(reply, want) {
					t.Fatalf("%s cut to %d bytes: reply %x, expected EINVAL", e.name, n, reply)
				}
			}
		}
	}
}

// Without room for the header there is no reply, with too little for the rest a bare EIO; the backend is not asked.
func TestReplyRoom(t *testing.T) {
	for _, e := range examples() {
		if !replies(e.msg) {
			continue
		}
		g := mounted(t, Config{Xattr: true})
		need := headerSize + len(e.body)
		if e.need > 0 {
			need = headerSize
		}
		if strings.HasPrefix(e.name, "GETXATTR") && len(e.body) == 5 || e.name == "LISTXATTR" {
			need = headerSize + 1 // less is ERANGE, which the backend says
		}
		for room := range need {
			reply := g.raw(e.msg, room)
			if calls := g.b.taken(); len(calls) > 0 {
				t.Fatalf("%s with room for %d bytes reaches the backend: %v", e.name, room, calls)
			}
			if room < headerSize && reply != nil {
				t.Fatalf("%s with room for %d bytes has reply %x", e.name, room, reply)
			}
			if want := cat(uint32(headerSize), -int32(syscall.EIO), uint64(testUnique)); room >= headerSize && !bytes.Equal(reply, want) {
				t.Fatalf("%s with room for %d bytes has reply %x, expected EIO", e.name, room, reply)
			}
		}
		if got := g.s.Stats().NoRoom.Load(); got != uint64(need) {
			t.Errorf("%s: %d replies without room counted, expected %d", e.name, got, need)
		}
	}
}

// Data is cut to the room there is.
func TestDataFitsRoom(t *testing.T) {
	read := message(fuseproto.FUSE_READ, 3, uint64(9), uint64(0), uint32(math.MaxUint32), uint32(0), uint64(0), uint64(0))
	for _, layout := range []layout{linuxLayout, onePiece, singleBytes} {
		g := mounted(t, Config{})
		g.layout = layout
		for n := range 20 {
			body, errno := g.doRoom(read, headerSize+n)
			if want := "data of the file"[:min(n, 16)]; errno != 0 || string(body) != want {
				t.Errorf("READ with room for %d bytes: %q, %v, expected %q", n, body, errno, want)
			}
		}
	}
	g := mounted(t, Config{Xattr: true})
	if body, errno := g.doRoom(message(fuseproto.FUSE_READDIR, 3, uint64(9), uint64(0), uint32(4096), make([]byte, 20)), headerSize+31); len(body) != 0 || errno != 0 {
		t.Errorf("READDIR without room for an entry: %x, %v, expected nothing", body, errno)
	}
	if _, errno := g.doRoom(message(fuseproto.FUSE_GETXATTR, 3, uint32(4), uint32(0), "user.a\x00"), 4096); errno != syscall.ERANGE {
		t.Errorf("GETXATTR of 5 bytes into 4: %v, expected ERANGE", errno)
	}
}

func TestBackendErrorsReachGuestBare(t *testing.T) {
	for _, e := range examples() {
		b := newStub()
		g := mounted(t, Config{Backend: b, Xattr: true})
		b.errno = syscall.ENOSPC
		_, errno := g.do(e.msg)
		switch {
		case !replies(e.msg), e.name == "RELEASE", e.name == "RELEASEDIR", e.name == "DESTROY":
		case e.name == "READDIR", e.name == "READDIRPLUS", e.name == "WRITE":
			if errno != 0 { // entries listed and bytes taken count
				t.Errorf("%s that did a part is answered with %v", e.name, errno)
			}
		case errno != syscall.ENOSPC:
			t.Errorf("%s is answered with %v, expected ENOSPC", e.name, errno)
		}
	}
}

func TestOffsets(t *testing.T) {
	const far = uint64(1 << 63)
	read := func(off uint64, size uint32) []byte {
		return message(fuseproto.FUSE_READ, 3, uint64(9), off, size, uint32(0), uint64(0), uint64(0))
	}
	write := func(off uint64) []byte {
		return message(fuseproto.FUSE_WRITE, 3, uint64(9), off, uint32(4), uint32(0), uint64(0), uint64(0), "data")
	}
	lseek := func(off uint64, whence uint32) []byte {
		return message(fuseproto.FUSE_LSEEK, 3, uint64(9), off, whence, uint32(0))
	}
	fallocate := func(off, length uint64) []byte {
		return message(fuseproto.FUSE_FALLOCATE, 3, uint64(9), off, length, uint64(0))
	}
	copyRange := func(opcode fuseproto.Opcode, in, out, length, flags uint64) []byte {
		return message(opcode, 3, uint64(9), in, uint64(4), uint64(10), out, length, flags)
	}
	tests := []struct {
		name  string
		msg   []byte
		errno Errno
		call  string
	}{
		{"READ at 2^63", read(far, 1), syscall.EINVAL, ""},
		{"READ at 2^64-1", read(math.MaxUint64, 1), syscall.EINVAL, ""},
		{"READ across 2^63", read(far-3, 100), 0, "Read 3 9 9223372036854775805 2 0"},
		{"WRITE at 2^63", write(far), syscall.EINVAL, ""},
		{"WRITE at 2^64-1", write(math.MaxUint64), syscall.EINVAL, ""},
		{"WRITE across 2^63", write(far - 2), syscall.EINVAL, ""},
		{"WRITE up to 2^63", write(far - 5), 0, "Write 3 9 9223372036854775803 4 0 0"},
		{"LSEEK at 2^63", lseek(far, unix.SEEK_DATA), syscall.EINVAL, ""},
		{"LSEEK with SEEK_END", lseek(0, unix.SEEK_END), syscall.EINVAL, ""},
		{"LSEEK with whence 1000", lseek(0, 1000), syscall.EINVAL, ""},
		{"FALLOCATE at 2^63", fallocate(far, 1), syscall.EINVAL, ""},
		{"FALLOCATE of 2^63", fallocate(0, far), syscall.EINVAL, ""},
		{"FALLOCATE of 0", fallocate(0, 0), syscall.EINVAL, ""},
		{"FALLOCATE across 2^63", fallocate(far-1, 1), syscall.EFBIG, ""},
		{"COPY_FILE_RANGE from 2^63", copyRange(fuseproto.FUSE_COPY_FILE_RANGE, far, 0, 1, 0), syscall.EINVAL, ""},
		{"COPY_FILE_RANGE to 2^63", copyRange(fuseproto.FUSE_COPY_FILE_RANGE, 0, far, 1, 0), syscall.EINVAL, ""},
		{"COPY_FILE_RANGE with flags", copyRange(fuseproto.FUSE_COPY_FILE_RANGE, 0, 0, 1, 1), syscall.EINVAL, ""},
		{"COPY_FILE_RANGE_64 of 2^64-1", copyRange(fuseproto.FUSE_COPY_FILE_RANGE_64, 0, 9, math.MaxUint64, 0), 0, "CopyFileRange 3 9 0 4 10 9 9223372036854775798"},
	}
	for _, tt := range tests {
		g := mounted(t, Config{})
		if _, errno := g.do(tt.msg); errno != tt.errno {
			t.Errorf("%s is answered with %v, expected %v", tt.name, errno, tt.errno)
		}
		if call := strings.Join(g.b.taken(), "; "); call != tt.call {
			t.Errorf("%s: backend is asked %q, expected %q", tt.name, call, tt.call)
		}
	}
}

// fuseH returns the opcodes of fuse.h.
func fuseH(t *testing.T) []fuseproto.Opcode {
	t.Helper()
	f, err := os.Open("../fuseproto/testdata/opcodes.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var opcodes []fuseproto.Opcode
	for scan := bufio.NewScanner(f); scan.Scan(); {
		var name string
		var number uint32
		if _, err := fmt.Sscan(scan.Text(), &name, &number); err == nil {
			opcodes = append(opcodes, fuseproto.Opcode(number))
		}
	}
	return opcodes
}

func TestEveryOpcodeIsServedOrExcused(t *testing.T) {
	opcodes := fuseH(t)
	for _, opcode := range opcodes {
		served := int(opcode) < len(ops) && ops[opcode].handle != nil || opcode == fuseproto.FUSE_INIT_BSWAP_RESERVED
		if _, excused := notImplemented[opcode]; served == excused {
			t.Errorf("%v: served %v, excused %v; expected one of both", opcode, served, excused)
		}
	}
	for opcode := range ops {
		if ops[opcode].handle != nil && !slices.Contains(opcodes, fuseproto.Opcode(opcode)) {
			t.Errorf("opcode %d is served, but fuse.h has none such", opcode)
		}
	}
	g := mounted(t, Config{})
	for opcode := range notImplemented {
		g.fails(message(opcode, 3, make([]byte, 64)), syscall.ENOSYS)
	}
	for _, opcode := range []fuseproto.Opcode{0, 7, 19, 54, 4095, 1 << 20, math.MaxUint32} {
		g.fails(message(opcode, 3), syscall.ENOSYS)
	}
}

// What a backend leaves out is ENOSYS, except where the guest could not do without.
func TestBareBackend(t *testing.T) {
	b := newStub()
	g := newGuest(t, Config{Backend: bare{b}, Xattr: true, PosixLock: true, Flock: true})
	g.mount(allFlags)
	for _, e := range examples() {
		_, errno := g.do(e.msg)
		want := syscall.ENOSYS
		switch e.name {
		case "LOOKUP", "GETATTR", "OPEN", "STATFS", "RELEASE", "RELEASEDIR", "DESTROY", "FORGET", "BATCH_FORGET", "INTERRUPT":
			want = 0
		}
		if errno != want {
			t.Errorf("%s is answered with %v, expected %v", e.name, errno, want)
		}
	}
	g.mount(allFlags)
	if body, _ := g.do(message(fuseproto.FUSE_STATFS, 1)); !bytes.Equal(body, cat(make([]byte, 40), uint32(4096), uint32(255), uint32(4096), make([]byte, 28))) {
		t.Errorf("STATFS: %x", body)
	}
	if body, _ := g.do(message(fuseproto.FUSE_OPEN, 1, uint64(0))); !bytes.Equal(body, make([]byte, 16)) {
		t.Errorf("OPEN: %x, expected handle 0", body)
	}
}

// The rows' sizes are those of the structs that handlers lay over requests and replies.
func TestOpSizes(t *testing.T) {
	type none struct{}
	tests := map[fuseproto.Opcode][2]any{
		fuseproto.FUSE_LOOKUP:             {none{}, fuseproto.EntryOut{}},
		fuseproto.FUSE_FORGET:             {fuseproto.ForgetIn{}, none{}},
		fuseproto.FUSE_GETATTR:            {fuseproto.GetattrIn{}, fuseproto.AttrOut{}},
		fuseproto.FUSE_SETATTR:            {fuseproto.SetattrIn{}, fuseproto.AttrOut{}},
		fuseproto.FUSE_READLINK:           {none{}, none{}},
		fuseproto.FUSE_SYMLINK:            {none{}, fuseproto.EntryOut{}},
		fuseproto.FUSE_MKNOD:              {fuseproto.MknodIn{}, fuseproto.EntryOut{}},
		fuseproto.FUSE_MKDIR:              {fuseproto.MkdirIn{}, fuseproto.EntryOut{}},
		fuseproto.FUSE_UNLINK:             {none{}, none{}},
		fuseproto.FUSE_RMDIR:              {none{}, none{}},
		fuseproto.FUSE_RENAME:             {fuseproto.RenameIn{}, none{}},
		fuseproto.FUSE_RENAME2:            {fuseproto.Rename2In{}, none{}},
		fuseproto.FUSE_LINK:               {fuseproto.LinkIn{}, fuseproto.EntryOut{}},
		fuseproto.FUSE_OPEN:               {fuseproto.OpenIn{}, fuseproto.OpenOut{}},
		fuseproto.FUSE_READ:               {fuseproto.ReadIn{}, none{}},
		fuseproto.FUSE_WRITE:              {fuseproto.WriteIn{}, fuseproto.WriteOut{}},
		fuseproto.FUSE_STATFS:             {none{}, fuseproto.StatfsOut{}},
		fuseproto.FUSE_RELEASE:            {fuseproto.ReleaseIn{}, none{}},
		fuseproto.FUSE_FSYNC:              {fuseproto.FsyncIn{}, none{}},
		fuseproto.FUSE_GETXATTR:           {fuseproto.GetxattrIn{}, none{}},
		fuseproto.FUSE_LISTXATTR:          {fuseproto.GetxattrIn{}, none{}},
		fuseproto.FUSE_REMOVEXATTR:        {none{}, none{}},
		fuseproto.FUSE_FLUSH:              {fuseproto.FlushIn{}, none{}},
		fuseproto.FUSE_OPENDIR:            {fuseproto.OpenIn{}, fuseproto.OpenOut{}},
		fuseproto.FUSE_READDIR:            {fuseproto.ReadIn{}, none{}},
		fuseproto.FUSE_RELEASEDIR:         {fuseproto.ReleaseIn{}, none{}},
		fuseproto.FUSE_FSYNCDIR:           {fuseproto.FsyncIn{}, none{}},
		fuseproto.FUSE_ACCESS:             {fuseproto.AccessIn{}, none{}},
		fuseproto.FUSE_CREATE:             {fuseproto.CreateIn{}, fuseproto.CreateOut{}},
		fuseproto.FUSE_TMPFILE:            {fuseproto.CreateIn{}, fuseproto.CreateOut{}},
		fuseproto.FUSE_GETLK:              {fuseproto.LkIn{}, fuseproto.LkOut{}},
		fuseproto.FUSE_SETLK:              {fuseproto.LkIn{}, none{}},
		fuseproto.FUSE_SETLKW:             {fuseproto.LkIn{}, none{}},
		fuseproto.FUSE_INTERRUPT:          {fuseproto.InterruptIn{}, none{}},
		fuseproto.FUSE_DESTROY:            {none{}, none{}},
		fuseproto.FUSE_IOCTL:              {fuseproto.IoctlIn{}, fuseproto.IoctlOut{}},
		fuseproto.FUSE_BATCH_FORGET:       {fuseproto.BatchForgetIn{}, none{}},
		fuseproto.FUSE_FALLOCATE:          {fuseproto.FallocateIn{}, none{}},
		fuseproto.FUSE_READDIRPLUS:        {fuseproto.ReadIn{}, none{}},
		fuseproto.FUSE_LSEEK:              {fuseproto.LseekIn{}, fuseproto.LseekOut{}},
		fuseproto.FUSE_COPY_FILE_RANGE:    {fuseproto.CopyFileRangeIn{}, fuseproto.WriteOut{}},
		fuseproto.FUSE_COPY_FILE_RANGE_64: {fuseproto.CopyFileRangeIn{}, fuseproto.CopyFileRangeOut{}},
		fuseproto.FUSE_SYNCFS:             {fuseproto.SyncfsIn{}, none{}},
		fuseproto.FUSE_STATX:              {fuseproto.StatxIn{}, fuseproto.StatxOut{}},
	}
	for opcode, row := range ops {
		opcode := fuseproto.Opcode(opcode)
		switch opcode {
		case fuseproto.FUSE_INIT, fuseproto.FUSE_SETXATTR: // of two lengths, handled as such
			continue
		}
		if row.handle == nil {
			continue
		}
		structs, ok := tests[opcode]
		if !ok {
			t.Errorf("%v: no structs to compare with", opcode)
			continue
		}
		size := func(v any, header uint16) uint16 {
			if n := uint16(reflect.TypeOf(v).Size()); n > 0 {
				return n - header
			}
			return 0
		}
		if in, out := size(structs[0], inHeaderSize), size(structs[1], 0); row.in != in || row.out != out {
			t.Errorf("%v: in %d and out %d bytes, expected %d and %d", opcode, row.in, row.out, in, out)
		}
		if row.flags&data != 0 && row.out > maxDataOut {
			t.Errorf("%v: %d bytes before data, expected at most maxDataOut", opcode, row.out)
		}
	}
}

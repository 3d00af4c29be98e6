package fuseserver

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/share"
)

// verdict is what becomes of an opcode in a graft that was made read-only while a file was open for writing.
type verdict struct {
	// change says that its example is refused; all that the table flags as modifying are, whatever they say.
	change bool
	// numbers are where nodes and handles are in the request beside the header's node.
	numbers []int
}

// argsAt is the offset of a request's struct.
const argsAt = inHeaderSize

// verdicts has a row for each opcode that is served: a new one has to be thought about here.
var verdicts = map[fuseproto.Opcode]verdict{
	fuseproto.FUSE_LOOKUP:             {},
	fuseproto.FUSE_FORGET:             {},
	fuseproto.FUSE_GETATTR:            {numbers: []int{argsAt + 8}},
	fuseproto.FUSE_SETATTR:            {change: true, numbers: []int{argsAt + 8}},
	fuseproto.FUSE_READLINK:           {},
	fuseproto.FUSE_SYMLINK:            {change: true},
	fuseproto.FUSE_MKNOD:              {change: true},
	fuseproto.FUSE_MKDIR:              {change: true},
	fuseproto.FUSE_UNLINK:             {change: true},
	fuseproto.FUSE_RMDIR:              {change: true},
	fuseproto.FUSE_RENAME:             {change: true, numbers: []int{argsAt}},
	fuseproto.FUSE_RENAME2:            {change: true, numbers: []int{argsAt}},
	fuseproto.FUSE_LINK:               {change: true, numbers: []int{argsAt}},
	fuseproto.FUSE_OPEN:               {change: true}, // the example is for writing
	fuseproto.FUSE_READ:               {numbers: []int{argsAt}},
	fuseproto.FUSE_WRITE:              {change: true, numbers: []int{argsAt}},
	fuseproto.FUSE_STATFS:             {},
	fuseproto.FUSE_RELEASE:            {numbers: []int{argsAt}},
	fuseproto.FUSE_FSYNC:              {numbers: []int{argsAt}},
	fuseproto.FUSE_SETXATTR:           {change: true},
	fuseproto.FUSE_GETXATTR:           {},
	fuseproto.FUSE_LISTXATTR:          {},
	fuseproto.FUSE_REMOVEXATTR:        {change: true},
	fuseproto.FUSE_FLUSH:              {numbers: []int{argsAt}},
	fuseproto.FUSE_GETLK:              {numbers: []int{argsAt}},
	fuseproto.FUSE_SETLK:              {numbers: []int{argsAt}}, // locks are not the file's
	fuseproto.FUSE_SETLKW:             {numbers: []int{argsAt}},
	fuseproto.FUSE_OPENDIR:            {},
	fuseproto.FUSE_READDIR:            {numbers: []int{argsAt}},
	fuseproto.FUSE_READDIRPLUS:        {numbers: []int{argsAt}},
	fuseproto.FUSE_RELEASEDIR:         {numbers: []int{argsAt}},
	fuseproto.FUSE_FSYNCDIR:           {numbers: []int{argsAt}},
	fuseproto.FUSE_ACCESS:             {}, // the example is for reading
	fuseproto.FUSE_CREATE:             {change: true},
	fuseproto.FUSE_TMPFILE:            {change: true},
	fuseproto.FUSE_INTERRUPT:          {},
	fuseproto.FUSE_IOCTL:              {numbers: []int{argsAt}}, // the example returns something and takes nothing
	fuseproto.FUSE_BATCH_FORGET:       {numbers: []int{argsAt + 8, argsAt + 24, argsAt + 40}},
	fuseproto.FUSE_FALLOCATE:          {change: true, numbers: []int{argsAt}},
	fuseproto.FUSE_LSEEK:              {numbers: []int{argsAt}},
	fuseproto.FUSE_COPY_FILE_RANGE:    {change: true, numbers: []int{argsAt, argsAt + 16, argsAt + 24}},
	fuseproto.FUSE_COPY_FILE_RANGE_64: {change: true, numbers: []int{argsAt, argsAt + 16, argsAt + 24}},
	fuseproto.FUSE_SYNCFS:             {},
	fuseproto.FUSE_STATX:              {numbers: []int{argsAt + 8}},
	fuseproto.FUSE_INIT:               {},
	fuseproto.FUSE_DESTROY:            {},
}

// changesBeside are requests that change something though the examples of their opcodes do not, or do so in another way.
func changesBeside() []example {
	longer := func(valid uint32) []byte {
		return message(fuseproto.FUSE_SETATTR, 3, valid, uint32(0), uint64(9), uint64(1<<20), make([]byte, 64))
	}
	ioctl := func(cmd uint32) []byte {
		return message(fuseproto.FUSE_IOCTL, 3, uint64(9), uint32(0), cmd, uint64(0), uint32(3), uint32(6), "arg")
	}
	open := func(flags uint32) []byte { return message(fuseproto.FUSE_OPEN, 3, flags, uint32(0)) }
	return []example{
		{name: "SETATTR of the size by node", msg: longer(fuseproto.FATTR_SIZE), call: "Setattr"},
		{name: "SETATTR of the size by handle", msg: longer(fuseproto.FATTR_SIZE | fuseproto.FATTR_FH), call: "Setattr"},
		{name: "SETATTR of times", msg: longer(fuseproto.FATTR_ATIME | fuseproto.FATTR_MTIME), call: "Setattr"},
		{name: "SETATTR of nothing", msg: longer(0), call: "Setattr"},
		{name: "IOCTL that takes something", msg: ioctl(0x40086602), call: "Ioctl"},
		{name: "IOCTL both ways", msg: ioctl(0xc0086601), call: "Ioctl"},
		{name: "IOCTL that says nothing of itself", msg: ioctl(0x6601), call: "Ioctl"},
		{name: "ACCESS for writing", msg: message(fuseproto.FUSE_ACCESS, 3, uint32(unix.W_OK), uint32(0)), call: "Access"},
		{name: "OPEN for writing alone", msg: open(unix.O_WRONLY), call: "Open"},
		{name: "OPEN for reading that makes empty", msg: open(unix.O_RDONLY | unix.O_TRUNC), call: "Open"},
		{name: "OPEN with an access mode that is none", msg: open(unix.O_ACCMODE), call: "Open"},
		{
			name: "WRITE of nothing", msg: message(fuseproto.FUSE_WRITE, 3, uint64(9), uint64(5), uint32(0), uint32(1), uint64(0), uint32(2), uint32(0)),
			call: "Write",
		},
		{
			name: "WRITE from the cache", call: "Write",
			msg: message(fuseproto.FUSE_WRITE, 3, uint64(9), uint64(5), uint32(1), uint32(fuseproto.FUSE_WRITE_CACHE), uint64(0), uint32(0), uint32(0), "s"),
		},
		{name: "FALLOCATE that makes a hole", msg: message(fuseproto.FUSE_FALLOCATE, 3, uint64(9), uint64(5), uint64(6), uint32(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE), uint32(0)), call: "Fallocate"},
	}
}

// TestReadOnlyGraft sends every request to a graft that was made read-only while a file of it was open for writing: what changes
// something is EROFS and does not reach the backend, by that handle or by node; the rest goes on.
func TestReadOnlyGraft(t *testing.T) {
	const index = uint64(1) << 48
	// send makes a graft, opens a file of it for writing, and sends what e has, for that graft.
	send := func(e example, readOnly bool) ([]string, Errno) {
		t.Helper()
		spy := newStub()
		s, err := share.New(share.Config{Dynamic: true, Grafts: []share.Graft{{Path: "/", Backend: newStub()}}})
		if err != nil {
			t.Fatal(err)
		}
		g := mounted(t, Config{Backend: s, Xattr: true})
		if err := s.Add(share.Graft{Path: "/g", Backend: spy}); err != nil {
			t.Fatal(err)
		}
		body, errno := g.do(message(fuseproto.FUSE_OPEN, index|3, uint32(unix.O_RDWR), uint32(0)))
		if errno != 0 || binary.NativeEndian.Uint64(body) != index|9 {
			t.Fatalf("OPEN: %x, %v", body, errno)
		}
		if readOnly {
			if err := s.Change("/g", share.Change{ReadOnly: &readOnly}); err != nil {
				t.Fatal(err)
			}
		}
		spy.taken()
		msg := slices.Clone(e.msg)
		for _, at := range append([]int{16}, verdicts[fuseproto.Opcode(binary.NativeEndian.Uint32(msg[4:]))].numbers...) {
			binary.NativeEndian.PutUint64(msg[at:], binary.NativeEndian.Uint64(msg[at:])|index)
		}
		_, errno = g.do(msg)
		calls := spy.taken()
		if err := g.s.Close(); err != nil {
			t.Error(err)
		}
		return calls, errno
	}
	refused := func(e example) {
		t.Helper()
		calls, errno := send(e, false)
		method, _, _ := strings.Cut(e.call, " ")
		if !strings.HasPrefix(strings.Join(calls, ";"), method) || errno != 0 {
			t.Errorf("%s in a writable graft: %q, %v, expected %s: this test proves nothing", e.name, calls, errno, method)
		}
		if calls, errno := send(e, true); errno != unix.EROFS || len(calls) > 0 {
			t.Errorf("%s in a read-only graft: the backend is asked %q, %v, expected EROFS", e.name, calls, errno)
		}
	}
	for _, e := range examples() {
		opcode := fuseproto.Opcode(binary.NativeEndian.Uint32(e.msg[4:]))
		if v := verdicts[opcode]; v.change || ops[opcode].flags&modifies != 0 {
			refused(e)
			continue
		}
		before, errno := send(e, false)
		after, now := send(e, true)
		if errno != 0 || now != 0 || !slices.Equal(before, after) {
			t.Errorf("%s: %q, %v in a writable graft, %q, %v in a read-only one, expected the same", e.name, before, errno, after, now)
		}
	}
	for _, e := range changesBeside() {
		refused(e)
	}
	for opcode := range ops {
		v, ok := verdicts[fuseproto.Opcode(opcode)]
		if ops[opcode].handle != nil && !ok {
			t.Errorf("%v has no verdict: does it change anything, by what nodes and handles?", fuseproto.Opcode(opcode))
		}
		if ops[opcode].flags&modifies != 0 && !v.change {
			t.Errorf("%v is flagged as modifying, and its verdict says that it changes nothing", fuseproto.Opcode(opcode))
		}
	}
}

package virtiofs

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
)

// What a request allocates is counted here through the whole device, from the ring to the host's files and back: nothing. What
// allocates makes garbage, and collecting it takes CPUs away from guests.

// Where fields are in the requests and replies below, from the first byte after the header (fuse.h).
const (
	nodeHeaderAt = 16 // fuse_in_header.nodeid
	nodeidAt     = 0  // fuse_entry_out.nodeid
	openFhAt     = 0  // fuse_open_out.fh
	createFhAt   = 128
)

// cycle is a sequence of requests that leaves everything as it was.
type cycle struct {
	name  string
	steps []step
}

// step is one request of a cycle, and what it takes from the answer to one before.
type step struct {
	queue int
	call  call
	// nodeOf is the step, counted from 1, that node comes from; fhOf that of the handle, which is at fhAt in its answer.
	nodeOf     int
	fhOf, fhAt int
}

// prepared is a step that can be sent again and again without an allocation of ours.
type prepared struct {
	step
	head        uint16
	header, fh  []byte // of the request, in guest memory
	out, answer []byte // fuse_out_header, and what follows it
}

// cycles are on a directory that has "file", 1 MiB long, which is open as fh, and "dir", which is open as dh.
func cycles(file, fh, dir, dh uint64) []cycle {
	const root = fuseproto.FUSE_ROOT_ID
	lookup := func(parent uint64, name string) step {
		return step{queue: request, call: call{op: fuseproto.FUSE_LOOKUP, node: parent, args: body(name), outArgs: 128}}
	}
	forget := func(of int) step {
		return step{queue: hiprio, call: call{op: fuseproto.FUSE_FORGET, args: body(uint64(1)), noReply: true}, nodeOf: of}
	}
	on := func(node uint64, op fuseproto.Opcode, outArgs int, args ...any) step {
		return step{queue: request, call: call{op: op, node: node, args: body(args...), outArgs: outArgs}}
	}
	// fuse_release_in begins with the handle.
	release := func(op fuseproto.Opcode, node uint64, of, at int) step {
		s := on(node, op, 0, uint64(0), uint32(0), uint32(0), uint64(0))
		s.fhOf, s.fhAt = of, at
		return s
	}
	of := func(s step, node int) step {
		s.nodeOf = node
		return s
	}
	create := on(root, fuseproto.FUSE_CREATE, 144, uint32(unix.O_RDWR), uint32(0o644), uint32(0), uint32(0), "new")
	readdirplus := on(dir, fuseproto.FUSE_READDIRPLUS, 0, dh, uint64(0), uint32(32<<10), uint32(0), uint64(0), uint32(0), uint32(0))
	readdirplus.call.outData = 32 << 10
	setattr := make([]byte, 88)
	binary.LittleEndian.PutUint32(setattr, fuseproto.FATTR_MODE)
	binary.LittleEndian.PutUint32(setattr[68:], 0o640)
	return []cycle{
		{name: "GETATTR", steps: []step{{queue: request, call: getattr(file)}}},
		{name: "LOOKUP of a known name", steps: []step{lookup(root, "file")}},
		{name: "LOOKUP of nothing", steps: []step{lookup(root, "absent")}},
		{name: "LOOKUP for the first time, FORGET", steps: []step{lookup(root, "other"), forget(1)}},
		{name: "OPEN, RELEASE", steps: []step{
			on(file, fuseproto.FUSE_OPEN, 16, uint32(unix.O_RDWR), uint32(0)), release(fuseproto.FUSE_RELEASE, file, 1, openFhAt),
		}},
		{name: "READ 4 KiB", steps: []step{{queue: request, call: read(file, fh, 0, 4<<10)}}},
		{name: "READ 128 KiB", steps: []step{{queue: request, call: read(file, fh, 0, 128<<10)}}},
		{name: "READ 1 MiB", steps: []step{{queue: request, call: read(file, fh, 0, 1<<20)}}},
		{name: "WRITE 4 KiB", steps: []step{{queue: request, call: write(file, fh, make([]byte, 4<<10))}}},
		{name: "WRITE 128 KiB", steps: []step{{queue: request, call: write(file, fh, make([]byte, 128<<10))}}},
		{name: "FSYNC", steps: []step{{queue: request, call: fsync(file, fh)}}},
		{name: "READDIRPLUS of known entries", steps: []step{readdirplus}},
		{name: "OPENDIR, RELEASEDIR", steps: []step{
			on(root, fuseproto.FUSE_OPENDIR, 16, uint32(0), uint32(0)), release(fuseproto.FUSE_RELEASEDIR, root, 1, openFhAt),
		}},
		{name: "SETATTR of the mode", steps: []step{on(file, fuseproto.FUSE_SETATTR, 104, setattr)}},
		{name: "STATFS", steps: []step{on(root, fuseproto.FUSE_STATFS, 80)}},
		{name: "CREATE, RELEASE, UNLINK, FORGET", steps: []step{
			create, of(release(fuseproto.FUSE_RELEASE, 0, 1, createFhAt), 1), on(root, fuseproto.FUSE_UNLINK, 0, "new"), forget(1),
		}},
		{name: "MKDIR, RMDIR, FORGET", steps: []step{
			on(root, fuseproto.FUSE_MKDIR, 128, uint32(0o755), uint32(0), "newdir"), on(root, fuseproto.FUSE_RMDIR, 0, "newdir"), forget(1),
		}},
		{name: "RENAME there and back", steps: []step{
			on(root, fuseproto.FUSE_RENAME2, 0, uint64(root), uint32(0), uint32(0), "file", "moved"),
			on(root, fuseproto.FUSE_RENAME2, 0, uint64(root), uint32(0), uint32(0), "moved", "file"),
		}},
	}
}

// prepare puts each step into guest memory once. All of them are sent, in disorder, and what becomes of that is all the same.
func (r *rig) prepare(steps []step) []prepared {
	r.t.Helper()
	all := make([]prepared, len(steps))
	for i, s := range steps {
		p := &all[i]
		p.step, p.head = s, r.offer(s.queue, s.call)
		c := r.queues[s.queue].chains[p.head]
		p.header = r.mem.Bytes(c[0].Addr, uint64(c[0].Len))
		if s.fhOf > 0 {
			p.fh = r.mem.Bytes(c[1].Addr, 8)
		}
		for j, b := range c {
			if b.Write && p.out == nil {
				p.out = r.mem.Bytes(b.Addr, 16)
				if s.call.outArgs > 0 {
					p.answer = r.mem.Bytes(c[j+1].Addr, uint64(s.call.outArgs))
				}
			}
		}
	}
	for _, p := range all {
		r.kick(p.queue)
	}
	for _, p := range all {
		r.next(p.queue)
	}
	return all
}

// send sends the steps one after the other.
func (r *rig) send(all []prepared, counter []byte) (failed int, e unix.Errno) {
	for i := range all {
		p := &all[i]
		if p.nodeOf > 0 {
			copy(p.header[nodeHeaderAt:][:8], all[p.nodeOf-1].answer[nodeidAt:])
		}
		if p.fhOf > 0 {
			copy(p.fh, all[p.fhOf-1].answer[p.fhAt:][:8])
		}
		q := r.queues[p.queue]
		q.OfferHead(p.head)
		if q.Kick() {
			_, _ = unix.Write(q.kick.Int(), one)
		}
		for {
			if _, _, ok := q.Used(); ok {
				break
			}
			if !q.EnableInterrupt() {
				_, _ = unix.Read(q.call.Int(), counter)
			}
		}
		if p.out != nil {
			if e := unix.Errno(-int32(binary.LittleEndian.Uint32(p.out[4:]))); e != 0 {
				return i, e
			}
			if p.call.outData > 0 && binary.LittleEndian.Uint32(p.out) <= 16 {
				return i, unix.ENODATA
			}
		}
	}
	return 0, 0
}

// entries is how many files there are in "dir".
const entries = 1000

func entry(i int) string { return fmt.Sprint("entry", i) }

func TestAllocations(t *testing.T) {
	dir := t.TempDir()
	for name, size := range map[string]int{"file": 1 << 20, "other": 0} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range entries {
		if err := os.WriteFile(filepath.Join(dir, "dir", entry(i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	fs, err := passthrough.New(passthrough.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, fs, Config{})
	file, fh := r.mount()
	p := r.must(request, call{op: fuseproto.FUSE_LOOKUP, node: fuseproto.FUSE_ROOT_ID, args: body("dir"), outArgs: 128})
	sub := binary.LittleEndian.Uint64(p.data)
	p = r.must(request, call{op: fuseproto.FUSE_OPENDIR, node: sub, args: body(uint32(0), uint32(0)), outArgs: 16})
	dh := binary.LittleEndian.Uint64(p.data)

	// Each part of the table of inodes then has some, as with any guest that is at work: one that becomes empty gives its memory back.
	for i := range entries {
		r.must(request, call{op: fuseproto.FUSE_LOOKUP, node: sub, args: body(entry(i)), outArgs: 128})
	}

	counter := make([]byte, 8)
	for _, c := range cycles(file, fh, sub, dh) {
		t.Run(c.name, func(t *testing.T) {
			want := unix.Errno(0)
			if c.name == "LOOKUP of nothing" {
				want = unix.ENOENT
			}
			for _, q := range r.queues {
				clear(q.chains)
			}
			all := r.prepare(c.steps)
			got := testing.AllocsPerRun(500, func() {
				if i, e := r.send(all, counter); e != want {
					t.Fatalf("%v: %v, expected %v", all[i].call.op, e, want)
				}
			})
			if got != 0 {
				t.Errorf("%v allocations, expected none", got)
			}
		})
	}
}

package share_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/share"
)

// grafted are trees of passthrough to be compared: alone, in a Share that never changes, and as the root or a graft of one that may.
type grafted struct {
	name    string
	backend fsbackend.Backend
	path    []string // leads to a directory with "file"
}

func newGrafted(b *testing.B) []grafted {
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<16), 0o644); err != nil {
		b.Fatal(err)
	}
	newBackend := func() fsbackend.Backend {
		fs, err := passthrough.New(passthrough.Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		return fs
	}
	newShare := func(dynamic bool, grafts int) fsbackend.Backend {
		cfg := share.Config{Dynamic: dynamic, Grafts: []share.Graft{{Path: "/", Backend: newBackend()}}}
		for i := range grafts {
			cfg.Grafts = append(cfg.Grafts, share.Graft{Path: fmt.Sprint("/g", i), Backend: newBackend()})
		}
		s, err := share.New(cfg)
		if err != nil {
			b.Fatal(err)
		}
		return s
	}
	list := []grafted{
		{"alone", newBackend(), nil},
		{"static", newShare(false, 1), []string{"g0"}},
		{"root", newShare(true, 1), nil},
		{"1", newShare(true, 1), []string{"g0"}},
		{"1000", newShare(true, 1000), []string{"g500"}},
	}
	b.Cleanup(func() {
		for _, g := range list {
			if err := g.backend.Close(); err != nil {
				b.Error(err)
			}
		}
	})
	return list
}

// reader reads 4 KiB of a file again and again, by a call of the backend or a request to a Server.
type reader struct {
	b       *testing.B
	r       *fsbackend.Resolved
	c       fsbackend.Context
	dir     uint64
	read    fuseproto.ReadIn
	server  *fuseserver.Server
	req     *fuseserver.Request
	msg     int // bytes of wire
	pages   *pages
	in, iov [1]unix.Iovec
	out     [2]unix.Iovec
	sink    fsbackend.Sink
}

// pages are memory as a guest has it: data at the beginning of a page, headers elsewhere. All readers of a benchmark have the
// same: where copies begin makes more of a difference than what is measured.
type pages struct{ data, wire, reply []byte }

func newPages(b *testing.B) *pages {
	p, err := unix.Mmap(-1, 0, 2*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = unix.Munmap(p) })
	return &pages{p[:4096], p[4096 : 2*4096-16], p[2*4096-16:]}
}

func newReader(b *testing.B, g grafted, p *pages) *reader {
	server, err := fuseserver.New(fuseserver.Config{Backend: g.backend})
	if err != nil {
		b.Fatal(err)
	}
	r := &reader{b: b, r: fsbackend.Resolve(g.backend), c: fsbackend.Context{MayBlock: true}, server: server, req: server.NewRequest(), pages: p}
	init := fuseproto.InitIn{Major: fuseproto.FUSE_KERNEL_VERSION, Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION}
	init.Length, init.Opcode, init.Unique = uint32(binary.Size(init)), uint32(fuseproto.FUSE_INIT), 1
	r.send(&init)
	r.ask()
	at := uint64(fuseproto.FUSE_ROOT_ID)
	var entry fuseproto.EntryOut
	for _, name := range append(slices.Clone(g.path), "file") {
		if errno := r.r.Lookup(&r.c, at, fsbackend.MakeName(name), &entry); errno != 0 {
			b.Fatal(errno)
		}
		r.dir, at = at, entry.NodeId
	}
	var open fuseproto.OpenOut
	opened := &fuseproto.OpenIn{}
	opened.NodeId = at
	if errno := r.r.Open(&r.c, opened, &open); errno != 0 {
		b.Fatal(errno)
	}
	r.read = fuseproto.ReadIn{Fh: open.Fh, Size: 4096}
	r.read.NodeId = at
	r.read.Length, r.read.Opcode, r.read.Unique = uint32(binary.Size(r.read)), uint32(fuseproto.FUSE_READ), 2
	return r
}

// send puts a request where ask finds it.
func (r *reader) send(in any) {
	n, err := binary.Encode(r.pages.wire, binary.NativeEndian, in)
	if err != nil {
		r.b.Fatal(err)
	}
	r.msg = n
}

// ask makes the request.
func (r *reader) ask() {
	r.in[0] = unix.Iovec{Base: &r.pages.wire[0], Len: uint64(r.msg)}
	r.out[0], r.out[1] = unix.Iovec{Base: &r.pages.reply[0], Len: 16}, unix.Iovec{Base: &r.pages.data[0], Len: 4096}
	r.server.Begin(r.req, r.in[:], r.out[:], uint64(r.msg), 16+4096)
	n, done := r.server.Handle(r.req)
	if !done { // INIT
		r.req.MayBlock = true
		n, done = r.server.Handle(r.req)
	}
	if !done || n < 16 || binary.NativeEndian.Uint32(r.pages.reply[4:]) != 0 {
		r.b.Fatalf("%d bytes of reply, done %v: %x", n, done, r.pages.reply)
	}
}

// call makes the call.
func (r *reader) call() {
	r.iov[0] = unix.Iovec{Base: &r.pages.data[0], Len: 4096}
	r.sink.Reset(r.iov[:], 0, 4096)
	if errno := r.r.Read(&r.c, &r.read, &r.sink); errno != 0 {
		r.b.Fatal(errno)
	}
}

// BenchmarkGrafts has READ as a call and as a request, and LOOKUP, of each tree.
func BenchmarkGrafts(b *testing.B) {
	p := newPages(b)
	for _, g := range newGrafted(b) {
		r := newReader(b, g, p)
		b.Run("READ/"+g.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r.call()
			}
		})
		b.Run("request/"+g.name, func(b *testing.B) {
			b.ReportAllocs()
			r.send(&r.read)
			for b.Loop() {
				r.ask()
			}
		})
		name := fsbackend.MakeName("file")
		var entry fuseproto.EntryOut
		b.Run("LOOKUP/"+g.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if errno := r.r.Lookup(&r.c, r.dir, name, &entry); errno != 0 {
					b.Fatal(errno)
				}
				r.r.Forget(entry.NodeId, 1)
			}
		})
	}
}

// BenchmarkOverhead has the trees read in turn, a few requests at a time, so that what else the machine does is the same for
// all: the unit x-alone is how many times what the tree alone takes, by medians.
func BenchmarkOverhead(b *testing.B) {
	p := newPages(b)
	list := newGrafted(b)
	readers := make([]*reader, len(list))
	for i, g := range list {
		readers[i] = newReader(b, g, p)
	}
	const few = 64
	taken := make([][]time.Duration, len(list))
	for b.Loop() {
		for i, r := range readers {
			r.send(&r.read)
			r.ask()
			begin := time.Now()
			for range few {
				r.ask()
			}
			taken[i] = append(taken[i], time.Since(begin)/few)
		}
	}
	median := func(i int) float64 {
		slices.Sort(taken[i])
		return float64(taken[i][len(taken[i])/2])
	}
	alone := median(0)
	b.ReportMetric(alone, "ns-alone")
	for i, g := range list[1:] {
		b.ReportMetric(median(i+1)/alone, g.name+"-x-alone")
	}
}

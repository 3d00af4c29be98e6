package share_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/share"
)

// BenchmarkGrafts compares READ and LOOKUP of passthrough alone with those through a Share that never changes, and
// one of one graft and of many that may.
func BenchmarkGrafts(b *testing.B) {
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<16), 0o644); err != nil {
		b.Fatal(err)
	}
	newBackend := func() *passthrough.FS {
		fs, err := passthrough.New(passthrough.Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		return fs
	}
	grafted := func(n int) fsbackend.Backend {
		s, err := share.New(share.Config{Dynamic: true})
		if err != nil {
			b.Fatal(err)
		}
		for i := range n {
			if err := s.Add(share.Graft{Path: fmt.Sprint("/g", i), Backend: newBackend()}); err != nil {
				b.Fatal(err)
			}
		}
		return s
	}
	static, err := share.New(share.Config{Grafts: []share.Graft{{Path: "/", Backend: newBackend()}, {Path: "/g0", Backend: newBackend()}}})
	if err != nil {
		b.Fatal(err)
	}
	// The same memory for all, as a guest has it: data at the beginning of a page, headers elsewhere. Copies of pages differ by
	// 5 % with where they begin.
	pages, err := unix.Mmap(-1, 0, 2*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Munmap(pages)
	buf, wire, reply := pages[:4096], pages[4096:4096+1024:4096+1024], pages[2*4096-16:]
	in, out, iov := make([]unix.Iovec, 1), make([]unix.Iovec, 2), make([]unix.Iovec, 1)
	sink := new(fsbackend.Sink)
	for _, tt := range []struct {
		name    string
		backend fsbackend.Backend
		path    []string
	}{
		{"alone", newBackend(), nil},
		{"static", static, []string{"g0"}},
		{"1", grafted(1), []string{"g0"}},
		{"1000", grafted(1000), []string{"g500"}},
	} {
		server, err := fuseserver.New(fuseserver.Config{Backend: tt.backend})
		if err != nil {
			b.Fatal(err)
		}
		req := server.NewRequest()
		ask := func(length int) {
			in[0] = unix.Iovec{Base: &wire[0], Len: uint64(length)}
			out[0], out[1] = unix.Iovec{Base: &reply[0], Len: 16}, unix.Iovec{Base: &buf[0], Len: 4096}
			server.Begin(req, in, out, uint64(length), 16+4096)
			n, done := server.Handle(req)
			if !done { // INIT
				req.MayBlock = true
				n, done = server.Handle(req)
			}
			if !done || n < 16 || binary.NativeEndian.Uint32(reply[4:]) != 0 {
				b.Fatalf("%d bytes of reply, done %v: %x", n, done, reply[:16])
			}
		}
		init := fuseproto.InitIn{Major: fuseproto.FUSE_KERNEL_VERSION, Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION}
		init.Length, init.Opcode, init.Unique = uint32(binary.Size(init)), uint32(fuseproto.FUSE_INIT), 1
		length, err := binary.Encode(wire, binary.NativeEndian, &init)
		if err != nil {
			b.Fatal(err)
		}
		ask(length)
		r := fsbackend.Resolve(tt.backend)
		c := &fsbackend.Context{MayBlock: true}
		at := uint64(fuseproto.FUSE_ROOT_ID)
		var entry fuseproto.EntryOut
		for _, name := range tt.path {
			if errno := r.Lookup(c, at, fsbackend.MakeName(name), &entry); errno != 0 {
				b.Fatal(errno)
			}
			at = entry.NodeId
		}
		root, name := at, fsbackend.MakeName("file")
		if errno := r.Lookup(c, root, name, &entry); errno != 0 {
			b.Fatal(errno)
		}
		var open fuseproto.OpenOut
		opened := &fuseproto.OpenIn{}
		opened.NodeId = entry.NodeId
		if errno := r.Open(c, opened, &open); errno != 0 {
			b.Fatal(errno)
		}
		read := &fuseproto.ReadIn{Fh: open.Fh, Size: 4096}
		read.NodeId = entry.NodeId
		b.Run("READ/"+tt.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				iov[0] = unix.Iovec{Base: &buf[0], Len: 4096}
				sink.Reset(iov, 0, 4096)
				if errno := r.Read(c, read, sink); errno != 0 {
					b.Fatal(errno)
				}
			}
		})
		asked := *read
		asked.Length, asked.Opcode, asked.Unique = uint32(binary.Size(asked)), uint32(fuseproto.FUSE_READ), 2
		if length, err = binary.Encode(wire, binary.NativeEndian, &asked); err != nil {
			b.Fatal(err)
		}
		b.Run("request/"+tt.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				ask(length)
			}
		})
		b.Run("LOOKUP/"+tt.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if errno := r.Lookup(c, root, name, &entry); errno != 0 {
					b.Fatal(errno)
				}
				r.Forget(entry.NodeId, 1)
			}
		})
	}
}

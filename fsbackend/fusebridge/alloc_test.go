//go:build !race

package fusebridge

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestNoAllocations makes the requests that there are many of.
func TestNoAllocations(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		cfg  Config
	}{{"asked", Config{NoCache: true}}, {"kept", Config{}}} {
		t.Run(tt.name, func(t *testing.T) {
			c, s := client(t, loopbackOn(dir), tt.cfg)
			e, errno := c.Lookup(root, "file")
			if errno != 0 {
				t.Fatal(errno)
			}
			fh, errno := c.Open(e.NodeId, unix.O_RDWR)
			if errno != 0 {
				t.Fatal(errno)
			}
			defer c.Release(e.NodeId, fh)
			ctx := &fsbackend.Context{MayBlock: true, Cancel: make(chan struct{})}
			name := fsbackend.MakeName("file")
			data := make([]byte, 200_000)
			none := func(what string, f func() fsbackend.Errno) {
				t.Helper()
				if n := testing.AllocsPerRun(200, func() {
					if errno := f(); errno != 0 {
						t.Fatalf("%s: %v", what, errno)
					}
				}); n != 0 {
					t.Errorf("%s allocates %v times", what, n)
				}
			}
			var entry fuseproto.EntryOut
			none("LOOKUP", func() fsbackend.Errno {
				entry = fuseproto.EntryOut{}
				return s.Lookup(ctx, root, name, &entry)
			})
			getattr := &fuseproto.GetattrIn{}
			getattr.NodeId = e.NodeId
			var attr fuseproto.AttrOut
			none("GETATTR", func() fsbackend.Errno { return s.Getattr(ctx, getattr, &attr) })
			read := &fuseproto.ReadIn{Fh: fh, Size: uint32(len(data))}
			read.NodeId = e.NodeId
			sink := fsbackendtest.NewSink(data, 0)
			iov := []unix.Iovec{{Base: &data[0]}}
			none("READ", func() fsbackend.Errno {
				iov[0].Base = &data[0]
				iov[0].Len = uint64(len(data))
				sink.Reset(iov, 0, uint64(len(data)))
				return s.Read(ctx, read, sink)
			})
			write := &fuseproto.WriteIn{Fh: fh, Size: uint32(len(data))}
			write.NodeId = e.NodeId
			source := fsbackendtest.NewSource(data, 0)
			none("WRITE", func() fsbackend.Errno {
				iov[0].Base = &data[0]
				iov[0].Len = uint64(len(data))
				source.Reset(iov, 0, uint64(len(data)))
				_, errno := s.Write(ctx, write, source)
				return errno
			})
		})
	}
}

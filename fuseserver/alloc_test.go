package fuseserver

import (
	"io"
	"log/slog"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

func textLog(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, nil))
}

// hot are the requests that must not cost an allocation.
func hot() map[string][]byte {
	return map[string][]byte{
		"LOOKUP":       message(fuseproto.FUSE_LOOKUP, 1, "name\x00"),
		"GETATTR":      message(fuseproto.FUSE_GETATTR, 1, make([]byte, 16)),
		"OPEN":         message(fuseproto.FUSE_OPEN, 1, uint64(0)),
		"RELEASE":      message(fuseproto.FUSE_RELEASE, 1, make([]byte, 24)),
		"READ":         message(fuseproto.FUSE_READ, 1, uint64(9), uint64(0), uint32(4096), make([]byte, 20)),
		"WRITE":        message(fuseproto.FUSE_WRITE, 1, uint64(9), uint64(0), uint32(8), make([]byte, 20), "12345678"),
		"FORGET":       message(fuseproto.FUSE_FORGET, 5, uint64(1)),
		"BATCH_FORGET": message(fuseproto.FUSE_BATCH_FORGET, 0, uint32(2), uint32(0), make([]byte, 32)),
		"READDIR":      message(fuseproto.FUSE_READDIR, 1, uint64(9), uint64(0), uint32(4096), make([]byte, 20)),
		"READDIRPLUS":  message(fuseproto.FUSE_READDIRPLUS, 1, uint64(9), uint64(0), uint32(4096), make([]byte, 20)),
		"STATFS":       message(fuseproto.FUSE_STATFS, 1),
		"GETXATTR":     message(fuseproto.FUSE_GETXATTR, 1, uint64(0), "user.a\x00"),
		"unknown":      message(54, 1),
	}
}

// driver hands the same message over again and again.
func driver(t testing.TB, msg []byte) func() {
	b := newStub()
	b.quiet = true
	g := mounted(t, Config{Backend: b, Xattr: true})
	readable, _ := vector(msg, linuxLayout)
	writable, _ := vector(make([]byte, 8192), func(n int) []int { return []int{16, 112, n - 128} })
	g.r.Counters = g.s.NewCounters()
	in, out := make([]unix.Iovec, len(readable)), make([]unix.Iovec, len(writable))
	return func() {
		copy(in, readable)
		copy(out, writable)
		g.r.Fetched = g.r.Ended // as within a batch
		g.s.Begin(g.r, in, out, uint64(len(msg)), 8192)
		if _, done := g.s.Handle(g.r); !done {
			t.Fatal("not done")
		}
	}
}

func TestHotOpsDoNotAllocate(t *testing.T) {
	for name, msg := range hot() {
		if n := testing.AllocsPerRun(100, driver(t, msg)); n != 0 {
			t.Errorf("%s: %v allocations, expected none", name, n)
		}
	}
}

func BenchmarkHandle(b *testing.B) {
	for name, msg := range hot() {
		b.Run(name, func(b *testing.B) {
			request := driver(b, msg)
			b.ReportAllocs()
			for b.Loop() {
				request()
			}
		})
	}
}

package permshift

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// BenchmarkLayer makes the calls that the layer adds to, of a directory without it and with it.
func BenchmarkLayer(b *testing.B) {
	for _, layer := range []struct {
		name   string
		format Format
	}{{"without", Off}, {"with", ContainersOverride}} {
		c := serve(b, b.TempDir(), Config{Format: layer.format})
		f, errno := c.Create(root, "f", unix.O_RDWR, 0o644)
		want(b, errno, "CREATE", fsbackend.OK)
		if _, errno := c.Lookup(root, "f"); errno != fsbackend.OK {
			b.Fatal(errno)
		}
		var (
			ctx   fsbackend.Context
			get   fuseproto.GetattrIn
			attr  fuseproto.AttrOut
			entry fuseproto.EntryOut
			name  = fsbackend.MakeName("f")
		)
		get.NodeId = f.NodeId
		b.Run("GETATTR "+layer.name, func(b *testing.B) {
			for b.Loop() {
				_ = c.R.Getattr(&ctx, &get, &attr)
			}
		})
		b.Run("LOOKUP "+layer.name, func(b *testing.B) {
			for b.Loop() {
				_ = c.R.Lookup(&ctx, root, name, &entry)
			}
		})
		b.Run("CREATE "+layer.name, func(b *testing.B) {
			for b.Loop() {
				made, errno := c.Create(root, "fresh", unix.O_RDWR, 0o644)
				want(b, errno, "CREATE", fsbackend.OK)
				c.Release(made.NodeId, made.Fh)
				_ = c.Unlink(root, "fresh")
				c.R.Forget(made.NodeId, 1)
			}
		})
	}
}

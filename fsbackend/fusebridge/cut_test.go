package fusebridge

import (
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestTruncatingOpen opens and creates with O_TRUNC at a program that leaves that to SETATTR: the guest is promised otherwise.
func TestTruncatingOpen(t *testing.T) {
	var size atomic.Uint64
	var fail atomic.Int32
	size.Store(77)
	attrOf := func() fuseproto.Attr {
		a := fuseproto.Attr{Ino: 9, Size: size.Load(), Nlink: 1}
		a.Mode = unix.S_IFREG | 0o644
		return a
	}
	init := fakeInit
	init.Flags &^= uint32(fuseproto.FUSE_ATOMIC_O_TRUNC)
	c, b, f, _ := newFakeInit(t, init, Config{NoCache: true}, func(f *fake, h *fuseproto.InHeader, body []byte) {
		switch fuseproto.Opcode(h.Opcode) {
		case fuseproto.FUSE_LOOKUP:
			e := fuseproto.EntryOut{NodeId: 9}
			e.Attr = attrOf()
			f.reply(h.Unique, 0, bytesOf(&e))
		case fuseproto.FUSE_OPEN:
			var in fuseproto.OpenIn
			copy(bytesOf(&in)[inHeaderSize:], body)
			if in.Flags&unix.O_TRUNC != 0 {
				f.t.Error("OPEN with O_TRUNC")
			}
			f.reply(h.Unique, 0, bytesOf(&fuseproto.OpenOut{Fh: 33}))
		case fuseproto.FUSE_CREATE:
			var in fuseproto.CreateIn
			copy(bytesOf(&in)[inHeaderSize:], body)
			if in.Flags&unix.O_TRUNC != 0 {
				f.t.Error("CREATE with O_TRUNC")
			}
			var out fuseproto.CreateOut
			out.NodeId, out.Attr, out.Fh = 9, attrOf(), 33
			f.reply(h.Unique, 0, bytesOf(&out))
		case fuseproto.FUSE_SETATTR:
			var in fuseproto.SetattrIn
			copy(bytesOf(&in)[inHeaderSize:], body)
			if in.Valid != fuseproto.FATTR_SIZE|fuseproto.FATTR_FH || in.Size != 0 || in.Fh != 33 || h.NodeId != 9 {
				f.t.Errorf("SETATTR of node %d, handle %d: valid %#x, size %d", h.NodeId, in.Fh, in.Valid, in.Size)
			}
			if errno := fail.Load(); errno != 0 {
				f.reply(h.Unique, errno, nil)
				return
			}
			size.Store(0)
			out := fuseproto.AttrOut{Attr: attrOf()}
			f.reply(h.Unique, 0, bytesOf(&out))
		case fuseproto.FUSE_RELEASE:
			f.reply(h.Unique, 0, nil)
		}
	})
	if b.WantFlags(fuseproto.FUSE_ATOMIC_O_TRUNC) == 0 {
		t.Error("the guest is not to have FUSE_ATOMIC_O_TRUNC")
	}
	e, errno := c.Lookup(fsbackendtest.Root, "file")
	if errno != 0 {
		t.Fatal(errno)
	}
	fh, errno := c.Open(e.NodeId, unix.O_WRONLY|unix.O_TRUNC)
	if errno != 0 || size.Load() != 0 {
		t.Fatalf("%v; %d bytes are left", errno, size.Load())
	}
	c.Release(e.NodeId, fh)

	size.Store(77)
	fail.Store(-int32(unix.ENOSPC))
	if _, errno := c.Open(e.NodeId, unix.O_RDWR|unix.O_TRUNC); errno != unix.ENOSPC {
		t.Errorf("the file cannot be cut, but OPEN says %v", errno)
	}
	f.await(fuseproto.FUSE_RELEASE)
	if n := b.Stats().FDs.Open; n != 0 {
		t.Errorf("%d files are open", n)
	}

	// A CREATE whose name is there by then.
	fail.Store(0)
	out, errno := c.Create(fsbackendtest.Root, "file", unix.O_RDWR|unix.O_TRUNC, 0o644)
	if errno != 0 || size.Load() != 0 || out.Size != 0 {
		t.Fatalf("%v; %d bytes are left, and said are %d", errno, size.Load(), out.Size)
	}
	c.Release(out.NodeId, out.Fh)
}

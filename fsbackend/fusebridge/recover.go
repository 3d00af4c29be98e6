package fusebridge

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// maxDepth is how deep a node may be to be found again.
const maxDepth = 1000

// begin starts a request about n, which the caller has pinned, once there is a program. Its first request is an op.
func (b *Bridge) begin(ctx *fsbackend.Context, op fuseproto.Opcode, n *node) (*request, fsbackend.Errno) {
	var c *conn
	if ctx.MayBlock {
		var errno fsbackend.Errno
		if c, errno = b.live(ctx.Cancel); errno != 0 {
			return nil, errno
		}
	} else if c = b.quick(op, n); c == nil {
		return nil, fsbackend.ErrMayBlock
	}
	if c.missing.Load()>>op&1 != 0 {
		c.unref()
		return nil, unix.ENOSYS
	}
	raw, errno := b.find(ctx, c, n, 0)
	if errno != 0 {
		c.unref()
		return nil, errno
	}
	return c.request(ctx, raw), fsbackend.OK
}

// find returns what c's program calls n, which it may never have heard of.
func (b *Bridge) find(ctx *fsbackend.Context, c *conn, n *node, depth int) (uint64, fsbackend.Errno) {
	if n == b.root {
		return fuseproto.FUSE_ROOT_ID, fsbackend.OK
	}
	b.mu.Lock()
	at, parent, name := n.at, n.parent, n.name
	b.mu.Unlock()
	if at.conn == c {
		return at.raw, fsbackend.OK
	}
	if parent == nil || depth > maxDepth {
		return 0, unix.ESTALE
	}
	in, errno := b.find(ctx, c, parent, depth+1)
	if errno != 0 {
		return 0, errno
	}
	if !c.use() {
		return 0, unix.EIO
	}
	r := c.request(ctx, in)
	defer r.end()
	put(r, fuseproto.FUSE_LOOKUP, &fuseproto.InHeader{})
	r.name(fsbackend.MakeName(name))
	var e fuseproto.EntryOut
	switch errno := r.entry(ctx, &e); {
	case errno == unix.ENOENT || errno == 0 && e.NodeId == 0:
		return 0, unix.ESTALE
	case errno != 0:
		return 0, errno
	}
	raw := e.NodeId
	if raw == fuseproto.FUSE_ROOT_ID || e.Mode&unix.S_IFMT != n.typ {
		c.forget(raw, 1)
		return 0, unix.ESTALE
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if n.at.conn == c {
		// Another call has found it meanwhile.
		c.forget(raw, 1)
		return n.at.raw, fsbackend.OK
	}
	n.leave()
	n.at, n.gen, n.held = place{c, raw}, e.Generation, 1
	if c.byRaw[raw] == nil {
		c.byRaw[raw] = n
	}
	return raw, fsbackend.OK
}

// findHandle returns what c's program calls h.
func (b *Bridge) findHandle(ctx *fsbackend.Context, c *conn, raw uint64, h *handle) (uint64, fsbackend.Errno) {
	b.mu.Lock()
	at := h.at
	b.mu.Unlock()
	switch {
	case h.stateless:
		return 0, fsbackend.OK
	case at.conn == c:
		return at.raw, fsbackend.OK
	case !h.again:
		return 0, unix.EIO
	}
	if !c.use() {
		return 0, unix.EIO
	}
	r := c.request(ctx, raw)
	defer r.end()
	op := fuseproto.FUSE_OPEN
	if h.dir {
		op = fuseproto.FUSE_OPENDIR
	}
	put(r, op, &fuseproto.OpenIn{Flags: h.flags})
	if errno := r.call(ctx, sizeOf[fuseproto.OpenOut](), false); errno != 0 {
		return 0, errno
	}
	var out fuseproto.OpenOut
	decode(r.reply, &out)
	b.mu.Lock()
	defer b.mu.Unlock()
	if h.at.conn == c {
		c.undoOpen(releaseOf(h.dir), raw, r.reply)
		return h.at.raw, fsbackend.OK
	}
	h.at = place{c, out.Fh}
	return out.Fh, fsbackend.OK
}

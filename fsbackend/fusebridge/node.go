package fusebridge

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// place is where something is in a run of the program: its number there.
type place struct {
	conn *conn
	raw  uint64
}

// A node is one that the guest holds, or that a call or handle still uses. Its fields are under Bridge.mu, but for id and typ,
// which do not change, and names.
type node struct {
	id  uint64
	typ uint32 // S_IFMT bits

	// names is held by calls that look at the names in a directory, and alone by those that change them: programs count on the
	// kernel for that. It is taken before Bridge.mu, and for two directories in the order of their ids.
	names sync.RWMutex

	at    place
	gen   uint64 // the program's generation of at.raw
	held  uint64 // lookups that the program has counted for at
	count uint64 // lookups that the guest holds
	pins  int    // calls and handles that use it

	// by which name it was last seen, to find it again; nil for the root, and where it has none any more
	parent   *node
	name     string
	children map[string]*dentry // names that are known of it

	lockers []*handle // by which there are POSIX locks

	attr    fuseproto.Attr
	until   int64  // attr is good before this time, in nanoseconds of the bridge's clock
	version uint64 // of attr: what was asked for before it went up must not be kept

	idle         bool // in Bridge.idle, between these
	older, newer *node
}

// A dentry is a name in a directory. Bridge.mu.
type dentry struct {
	node  *node
	until int64 // good before
}

// began is when the clock of validities began.
var began = time.Now()

// clock is the time by that clock: it goes on whatever becomes of the host's date.
func clock() int64 { return int64(time.Since(began)) }

// changed says that attr may be wrong from here on.
func (n *node) changed() {
	n.version++
	n.until = 0
}

// pin returns the node that the guest calls id, for the time of a call.
func (b *Bridge) pin(id uint64) (*node, fsbackend.Errno) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.nodes[id]
	if n == nil {
		return nil, unix.ESTALE
	}
	n.pins++
	return n, fsbackend.OK
}

// pinDir is pin for a directory.
func (b *Bridge) pinDir(id uint64) (*node, fsbackend.Errno) {
	n, errno := b.pin(id)
	if errno == 0 && n.typ != unix.S_IFDIR {
		b.unpin(n)
		return nil, unix.ENOTDIR
	}
	return n, errno
}

// unpin ends a call's use of n.
func (b *Bridge) unpin(n *node) {
	b.mu.Lock()
	n.pins--
	g := b.drop(n)
	b.mu.Unlock()
	g.send()
}

// drop takes n out of the tables if neither the guest nor a call uses it, and returns what the program is then to forget.
func (b *Bridge) drop(n *node) (g goodbye) {
	if n == b.root || n.count > 0 {
		return goodbye{}
	}
	delete(b.nodes, n.id) // the guest cannot name it from here on
	if n.pins > 0 {
		return goodbye{}
	}
	return b.rest(n)
}

// end takes n out of its directory and of where it is in the program, which is then to forget it. Bridge.mu is held.
func (n *node) end() (at place, held uint64) {
	n.unname()
	return n.leave()
}

// unname takes n's name out of its directory. Bridge.mu is held.
func (n *node) unname() {
	if p := n.parent; p != nil {
		if d := p.children[n.name]; d != nil && d.node == n {
			delete(p.children, n.name)
		}
	}
}

// leave takes n out of where it is in the program, which is then to forget it. Bridge.mu is held.
func (n *node) leave() (at place, held uint64) {
	at, held = n.at, n.held
	n.at, n.held, n.gen = place{}, 0, 0
	n.changed()
	if at.conn != nil && at.conn.byRaw[at.raw] == n {
		delete(at.conn.byRaw, at.raw)
	}
	return at, held
}

// Forget implements fsbackend.Backend.
func (b *Bridge) Forget(id, count uint64) {
	b.mu.Lock()
	n := b.nodes[id]
	var g goodbye
	if n != nil && n != b.root {
		n.count -= min(count, n.count)
		g = b.drop(n)
	}
	b.mu.Unlock()
	g.send()
}

// Reset implements fsbackend.Backend.
func (b *Bridge) Reset() {
	lost := map[*conn][]fuseproto.ForgetOne{}
	lose := func(at place, held uint64) {
		if held > 0 {
			lost[at.conn] = append(lost[at.conn], fuseproto.ForgetOne{Nodeid: at.raw, Nlookup: held})
		}
	}
	var handles []*handle
	b.mu.Lock()
	for _, h := range b.handles {
		h.closed = true
		b.dropRest(h)
		h.node.lockers = nil
		if h.pins == 0 {
			handles = append(handles, h)
		}
	}
	clear(b.handles)
	for _, n := range b.nodes {
		n.count = 0
		for _, f := range b.drop(n) {
			lose(f.at, f.held)
		}
	}
	for b.idle.oldest != nil {
		lose(b.evict())
	}
	b.root.children = nil
	b.mu.Unlock()
	answers := true // from a program that does not, one is not to be waited for again and again
	for _, h := range handles {
		answers = b.release(h, answers)
	}
	for c, nodes := range lost {
		c.forgetAll(nodes...)
	}
}

// adopt turns an entry that c's program has answered for name in parent (nil: a file without a name) into the guest's, and counts
// its lookup. with is how it is to be counted: for the guest, unless by a call that looks for its own sake.
func (b *Bridge) adopt(c *conn, e *fuseproto.EntryOut, parent *node, name fsbackend.Name) (*node, fsbackend.Errno) {
	raw := e.NodeId
	if raw == fuseproto.FUSE_ROOT_ID || !checkAttr(&e.Attr, raw) {
		c.forget(raw, 1)
		return nil, unix.EIO
	}
	typ := e.Mode & unix.S_IFMT
	b.mu.Lock()
	n := c.byRaw[raw]
	var held uint64
	if n != nil && n.idle && (n.typ != typ || n.gen != e.Generation) {
		// The number is another file's now, and so are the lookups, which the program counts by number.
		b.idle.remove(n)
		_, held = n.end()
		n = nil
	}
	if n != nil && (n.typ != typ || n.gen != e.Generation) {
		// It has given the number to another file while this one is in use.
		b.mu.Unlock()
		c.forget(raw, 1)
		return nil, unix.EIO
	}
	if n == nil && parent != nil {
		// A node of a program that has ended, found again.
		if d := parent.children[string(name)]; d != nil && d.node.at.conn != c && d.node.typ == typ && b.nodes[d.node.id] == d.node {
			n = d.node
			n.leave()
		}
	}
	if (n == nil || n.idle) && len(b.nodes) >= b.cfg.MaxNodes {
		b.mu.Unlock()
		c.forget(raw, held+1)
		return nil, unix.ENFILE
	}
	switch {
	case n == nil:
		b.lastNode++
		n = &node{id: b.lastNode, typ: typ}
	case n.idle:
		b.idle.remove(n)
	}
	if n.at.conn != c {
		n.at, n.gen = place{c, raw}, e.Generation
		c.byRaw[raw] = n
	}
	n.held += held + 1
	n.count++
	b.nodes[n.id] = n
	if parent != nil {
		b.link(n, parent, name)
	}
	b.mu.Unlock()
	return n, fsbackend.OK
}

// link notes that n is at name in parent. Bridge.mu is held.
func (b *Bridge) link(n, parent *node, name fsbackend.Name) {
	if d := parent.children[string(name)]; d != nil && d.node == n {
		if n.parent == nil {
			n.parent, n.name = parent, name.String()
		}
		return
	}
	text := name.String()
	if parent.children == nil {
		parent.children = map[string]*dentry{}
	}
	if d := parent.children[text]; d != nil && d.node.parent == parent && d.node.name == text {
		d.node.parent, d.node.name = nil, "" // another file has its name now
	}
	n.unname() // of a file's names the last one seen is kept
	parent.children[text] = &dentry{node: n}
	n.parent, n.name = parent, text
}

// unlink notes that name in parent is gone, and returns the node that it was. Bridge.mu is held.
func (b *Bridge) unlink(parent *node, name fsbackend.Name) *node {
	d := parent.children[string(name)]
	if d == nil {
		return nil
	}
	delete(parent.children, string(name))
	n := d.node
	n.changed()
	if n.parent == parent && n.name == string(name) {
		n.parent, n.name = nil, ""
	}
	return n
}

package fusebridge

import (
	"math"
	"time"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// The program says for how long names and attributes are good, as it would tell a kernel, which would not ask it again meanwhile. The
// bridge does not either, and passes on to the guest what is left of the time.

// maxValid bounds what a program may promise.
const maxValid = 86400 * time.Second

// until is the time until which something is good that is good from now on for sec and nsec.
func until(now int64, sec uint64, nsec uint32) int64 {
	if sec >= uint64(maxValid/time.Second) {
		return now + int64(maxValid)
	}
	return now + int64(sec)*int64(time.Second) + int64(min(nsec, 999_999_999))
}

// setValid has *sec and *nsec say how long it is until then, or fsbackend.Stale.
func setValid(sec *uint64, nsec *uint32, now, then int64) {
	left := then - now
	if left <= 0 {
		*sec, *nsec = 0, fsbackend.Stale
		return
	}
	*sec, *nsec = uint64(left)/uint64(time.Second), uint32(uint64(left)%uint64(time.Second))
	if *sec == 0 && *nsec <= fsbackend.Stale {
		*nsec = fsbackend.Stale + 1
	}
}

// keepAttr keeps what the program has answered for n when asked at version, and says in *sec and *nsec how long the guest may.
func (b *Bridge) keepAttr(n *node, a *fuseproto.Attr, version uint64, sec *uint64, nsec *uint32) {
	now := clock()
	then := until(now, *sec, *nsec)
	setValid(sec, nsec, now, then)
	b.mu.Lock()
	defer b.mu.Unlock()
	if n.version == version && !b.cfg.NoCache {
		n.attr, n.until = *a, then
	}
}

// keepEntry is keepAttr for an entry, whose name in parent is kept too (nil: a file without one).
func (b *Bridge) keepEntry(n *node, e *fuseproto.EntryOut, version uint64, parent *node, name fsbackend.Name, names uint64) {
	b.keepAttr(n, &e.Attr, version, &e.AttrValid, &e.AttrValidNsec)
	now := clock()
	then := until(now, e.EntryValid, e.EntryValidNsec)
	setValid(&e.EntryValid, &e.EntryValidNsec, now, then)
	e.NodeId, e.Generation = n.id, 0
	if parent == nil || b.cfg.NoCache {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if d := parent.children[string(name)]; d != nil && d.node == n && parent.version == names {
		d.until = then
	}
}

// versions are what was the state before a request that asks about n, nil where that is not known yet.
func (b *Bridge) version(n *node) uint64 {
	if n == nil {
		return math.MaxUint64
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return n.version
}

// cachedAttr answers from what is kept.
func (b *Bridge) cachedAttr(id uint64, out *fuseproto.AttrOut) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.nodes[id]
	if n == nil || n.until == 0 {
		return false
	}
	now := clock()
	if now >= n.until {
		return false
	}
	out.Attr = n.attr
	setValid(&out.AttrValid, &out.AttrValidNsec, now, n.until)
	return true
}

// cachedEntry answers a LOOKUP from what is kept, and counts it.
func (b *Bridge) cachedEntry(parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.nodes[parent]
	if p == nil {
		return false
	}
	d := p.children[string(name)]
	if d == nil || d.until == 0 || d.node.until == 0 || b.nodes[d.node.id] != d.node && !d.node.idle {
		return false
	}
	now := clock()
	if now >= d.until || now >= d.node.until {
		return false
	}
	n := d.node
	if n.idle {
		if len(b.nodes) >= b.cfg.MaxNodes {
			return false
		}
		b.idle.remove(n)
		b.nodes[n.id] = n
	}
	n.count++
	out.NodeId, out.Attr = n.id, n.attr
	setValid(&out.AttrValid, &out.AttrValidNsec, now, n.until)
	setValid(&out.EntryValid, &out.EntryValidNsec, now, d.until)
	return true
}

// touch says that the attributes of nodes may have changed.
func (b *Bridge) touch(nodes ...*node) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, n := range nodes {
		if n != nil {
			n.changed()
		}
	}
}

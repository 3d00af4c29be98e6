package share

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// The host's events do not say who made a change: what the guest does itself comes back as one, of which its kernel has told already.
// So it is written down what the guest has changed, and an event that tells of nothing else is not replayed.
const (
	// ownFor is how long after a change of the guest its event can be expected.
	ownFor = 30 * time.Second
	maxOwn = 1 << 15 // names, and as many nodes
)

// own is what the guest has done lately. replay.mu is held for it.
type own struct {
	names map[entryKey]ownName
	nodes map[uint64]ownNode
}

// ownName is what the guest has done to a name.
type ownName struct {
	made  uint64   // the node that it has given the name, if it has
	gone  bool     // it has removed what had the name
	to    entryKey // where it has moved it to, if it has
	until time.Time
}

// ownNode is a node after the guest's last change of it. If its time is another by now, somebody else has changed it since; before
// Linux 6.13, or as the file system will, not if that was within the same tick of the clock.
type ownNode struct {
	ctime     uint64
	ctimensec uint32
	size      uint64
	kinds     ownKind // of the changes up to here, between which nobody else has made one of that kind
	until     time.Time
}

// ownKind says what of a file is changed.
type ownKind uint8

const (
	ownContent ownKind = 1 << iota
	ownAttrs
)

func (n ownNode) is(a *fuseproto.Attr) bool {
	return n.ctime == a.Ctime && n.ctimensec == a.Ctimensec && n.size == a.Size && time.Now().Before(n.until)
}

func newOwn() own { return own{make(map[entryKey]ownName), make(map[uint64]ownNode)} }

// remember sets what key is, and makes room for it if there is none.
func remember[K comparable, V any](m map[K]V, key K, v V) {
	if _, there := m[key]; !there && len(m) >= maxOwn {
		for other := range m { // any one
			delete(m, other)
			break
		}
	}
	m[key] = v
}

func (o *own) attr(node uint64, a *fuseproto.Attr, kinds ownKind) {
	remember(o.nodes, node, ownNode{a.Ctime, a.Ctimensec, a.Size, kinds, time.Now().Add(ownFor)})
}

// name has f note what was done to key now.
func (o *own) name(key entryKey, f func(*ownName)) {
	n := o.of(key)
	f(&n)
	n.until = time.Now().Add(ownFor)
	remember(o.names, key, n)
}

// of is what was done to key.
func (o *own) of(key entryKey) ownName {
	n := o.names[key]
	if time.Now().After(n.until) {
		return ownName{}
	}
	return n
}

// ownMade notes that the guest has made name, of which it was answered out; errno is that answer, and returned.
func (r *replay) ownMade(parent uint64, name fsbackend.Name, out *fuseproto.EntryOut, errno Errno) Errno {
	if r == nil || errno != fsbackend.OK || out.NodeId == 0 {
		return errno
	}
	r.learn(parent, name, out)
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.own.nodes[out.NodeId]; time.Now().After(n.until) {
		r.own.attr(out.NodeId, &out.Attr, ownContent|ownAttrs)
	}
	r.own.name(entryKey{parent, string(name)}, func(n *ownName) { n.made = out.NodeId })
	return errno
}

// ownRemoved notes that the guest has removed name, unless errno says that it has not.
func (r *replay) ownRemoved(parent uint64, name fsbackend.Name, errno Errno) Errno {
	if r == nil || errno != fsbackend.OK {
		return errno
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.own.name(entryKey{parent, string(name)}, func(n *ownName) { n.made, n.gone = 0, true })
	return errno
}

// ownMoved notes that the guest has renamed, unless errno says that it has not.
func (r *replay) ownMoved(in *fuseproto.Rename2In, oldName, newName fsbackend.Name, errno Errno) {
	if r == nil || errno != fsbackend.OK {
		return
	}
	from, to := entryKey{in.NodeId, string(oldName)}, entryKey{in.Newdir, string(newName)}
	r.mu.Lock()
	defer r.mu.Unlock()
	moved, replaced := r.own.of(from).made, r.own.of(to).made
	if in.Flags&unix.RENAME_EXCHANGE == 0 {
		replaced = 0
	} else {
		r.own.name(to, func(n *ownName) { n.to = from })
	}
	r.own.name(from, func(n *ownName) { n.made, n.to = replaced, to })
	r.own.name(to, func(n *ownName) { n.made = moved })
}

// ownLinked returns the node that the guest has given name itself, whose time changes with its names.
func (r *replay) ownLinked(parent uint64, name fsbackend.Name) uint64 {
	if r == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.own.of(entryKey{parent, string(name)}).made
}

// notOwn notes that the guest has found node there. If it is somebody else's, what the guest has done before is past.
func (r *replay) notOwn(parent uint64, name fsbackend.Name, node uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n, ok := r.own.names[entryKey{parent, string(name)}]; ok && n.made != node {
		delete(r.own.names, entryKey{parent, string(name)})
	}
}

// ownBefore is to be called before the guest changes other than the content of node, and returns what has to be given to ownChanged
// after it: what of the node the guest alone has changed so far.
func (r *replay) ownBefore(c *fsbackend.Context, node uint64) ownKind {
	if r == nil || node == 0 {
		return 0
	}
	r.mu.Lock()
	n := r.own.nodes[node]
	r.mu.Unlock()
	if n.kinds == 0 || time.Now().After(n.until) {
		return 0
	}
	var kinds ownKind
	r.look(c, node, func(a *fuseproto.Attr) {
		if n.is(a) {
			kinds = n.kinds
		}
	})
	return kinds
}

// ownChanged notes that the guest has changed node, unless errno, which it returns, says that it has not. kinds are what it has changed, and
// of what it has changed before what nobody else can have changed since.
func (r *replay) ownChanged(c *fsbackend.Context, node uint64, kinds ownKind, errno Errno) Errno {
	if r == nil || node == 0 || kinds == 0 || errno != fsbackend.OK {
		return errno
	}
	r.look(c, node, func(a *fuseproto.Attr) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.own.attr(node, a, kinds)
	})
	return errno
}

// look has f see the attributes of node, if it has any.
func (r *replay) look(c *fsbackend.Context, node uint64, f func(*fuseproto.Attr)) {
	q := questions.Get().(*question)
	defer questions.Put(q)
	*q = question{in: fuseproto.GetattrIn{InHeader: fuseproto.InHeader{NodeId: node, Caller: c.Caller}}}
	if r.share.getattr(c, &q.in, &q.out) == fsbackend.OK {
		f(&q.out.Attr)
	}
}

// questions are kept, as there may be one for each WRITE.
var questions = sync.Pool{New: func() any { return new(question) }}

type question struct {
	in  fuseproto.GetattrIn
	out fuseproto.AttrOut
}

// isOwn says that e, which is about name in the directory parent, tells of nothing but what the guest has done itself.
func (r *replay) isOwn(c *fsbackend.Context, e *ReplayEvent, p place) bool {
	switch e.Kind {
	case ReplayCreate, ReplayModify, ReplayAttrib, ReplayDelete:
	default:
		return false // a rename is known when it is known where to
	}
	out := new(fuseproto.EntryOut)
	found := r.share.lookUp(c, p.parent, fsbackend.MakeName(p.name), out) == fsbackend.OK && out.NodeId != 0
	if found {
		defer r.share.forget(out.NodeId, 1)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	name, node := r.own.of(entryKey(p)), r.own.nodes[out.NodeId]
	made, same := found && name.made == out.NodeId, found && node.is(&out.Attr)
	switch e.Kind {
	case ReplayCreate:
		// A directory's time is that of the last change in it, of which other events tell.
		return made && (same && node.kinds&ownContent != 0 || out.Mode&unix.S_IFMT == unix.S_IFDIR)
	case ReplayDelete:
		return made || name.gone
	case ReplayModify:
		return same && node.kinds&ownContent != 0
	}
	return same && node.kinds&ownAttrs != 0
}

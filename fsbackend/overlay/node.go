package overlay

import (
	"math"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const eOverflow = unix.EOVERFLOW

// node is a file as the guest knows it.
type node struct {
	id     uint64
	typ    uint32 // S_IFMT
	linked bool   // a file of a lower layer with several names: each gets a copy of its own
	dir    *dir   // nil if not a directory
	lowers []real // a directory's parts, the uppermost first, or the one file; never change
	ino    atomic.Uint64
	upper  atomic.Uint64 // nodeid in the upper layer; 0: there is none, yet
	origin atomic.Bool   // its upper file was copied up, and has marks
	gone   atomic.Bool   // its name has been removed, and it has no other that the overlay knows of
	// below says whether a lower layer has something of the node's name that its file, in the upper layer, hides (FS.knownBelow).
	below atomic.Uint32

	// copyMu is held while the file is copied up.
	copyMu sync.Mutex

	// Guarded by FS.mu.
	lookups  uint64 // saturates
	kids     int    // nodes whose parent it is
	parent   *node  // nil: none, or the file has other names
	name     string
	redirect string // what the upper directory's mark says of where the lower ones are
	dead     bool   // in no table any more, its files given back
	anchor   *file  // keeps the upper file open that never had a name
}

// What node.below knows.
const (
	belowUnknown = iota
	belowNothing
	belowSomething
)

// belowBits are those of node.below that say it; the others are the generation of the lower layers that it was found out of.
const belowBits = 2

// knownBelow says what is known of node.below.
func (fs *FS) knownBelow(n *node) uint32 {
	v := n.below.Load()
	if v>>belowBits != fs.indexes.generation.Load()<<belowBits>>belowBits {
		return belowUnknown
	}
	return v & (1<<belowBits - 1)
}

func (fs *FS) noteBelow(n *node, below uint32) {
	n.below.Store(fs.indexes.generation.Load()<<belowBits | below)
}

// dir is what a directory has beyond.
type dir struct {
	mu      sync.RWMutex
	parts   []part // of the upper layer, then of lowers
	version atomic.Uint64
}

func newDir(lowers int) *dir {
	return &dir{parts: make([]part, 1+lowers)}
}

// part is what is known of a directory in one layer.
type part struct {
	impure atomic.Uint32
	hides  atomic.Pointer[hides]
	// Of a lower one.
	names  atomic.Pointer[names]
	asking asking
}

// What part.impure knows: whether the directory has the mark of one that files were copied or moved to.
const (
	impureUnknown = iota
	impureNot
	impureYes
)

type nameKey struct {
	parent uint64
	name   string
}

// top is the file that the node's attributes are taken from.
func (n *node) top(fs *FS) real {
	if up := n.upper.Load(); up != 0 {
		return real{fs.upper, up}
	}
	return n.lowers[0]
}

// merged says whether a directory has several parts.
func (n *node) merged() bool {
	parts := len(n.lowers)
	if n.upper.Load() != 0 {
		parts++
	}
	return parts > 1
}

// part returns part i of a directory, and whether it has it.
func (n *node) part(fs *FS, i int) (real, bool) {
	if i == 0 {
		up := n.upper.Load()
		return real{fs.upper, up}, up != 0
	}
	return n.lowers[i-1], true
}

// node returns the file that a guest calls id.
func (fs *FS) node(id uint64) (*node, errno) {
	if id == rootID {
		return fs.root, 0
	}
	fs.mu.RLock()
	n := fs.nodes[id]
	ok := n != nil && n.lookups > 0
	fs.mu.RUnlock()
	if !ok {
		return nil, unix.ESTALE
	}
	return n, 0
}

// directory returns the directory that a guest calls id.
func (fs *FS) directory(id uint64) (*node, errno) {
	n, e := fs.node(id)
	if e == 0 && n.dir == nil {
		return nil, unix.ENOTDIR
	}
	return n, e
}

// found is what a name leads to in the layers. It has a lookup of each file until enter takes it over, or release.
type found struct {
	attr     fuseproto.Attr // of the uppermost file, as its layer gives it
	upper    uint64
	lowers   []real
	ino      uint64
	redirect string
	impure   uint32 // of upper
	origin   bool   // upper was copied up
	below    uint32
	// whiteout says that the upper layer has a device there that hides the name.
	whiteout bool
	// node is what upper is known as, with a lookup counted: nothing more is asked of it.
	node *node
	room [2]real
}

func (f *found) isDir() bool { return f.attr.Mode&unix.S_IFMT == unix.S_IFDIR }

// exists says whether the name leads to something.
func (f *found) exists() bool { return f.upper != 0 || len(f.lowers) > 0 }

// release gives the lookups back.
func (fs *FS) release(f *found) {
	if f.node != nil {
		fs.Forget(f.node.id, 1)
		f.node = nil
	}
	if f.upper != 0 {
		fs.upper.r.Forget(f.upper, 1)
	}
	for _, r := range f.lowers {
		r.forget()
	}
	f.upper, f.lowers = 0, nil
}

// enter finds or makes the node of f, found as name in p (nil: it has no name), counts a lookup and fills out. It takes f's
// lookups over. p's lock is held.
func (fs *FS) enter(epoch uint64, p *node, name []byte, f *found, out *fuseproto.EntryOut) (*node, errno) {
	fs.mu.Lock()
	if fs.epoch.Load() != epoch || p != nil && p.dead {
		fs.mu.Unlock()
		if fs.epoch.Load() == epoch {
			fs.release(f)
		}
		return nil, unix.ESTALE
	}
	var dying []*node
	n, counted := f.node, f.node != nil
	if f.node = nil; !counted {
		n = fs.known(p, name, f)
	}
	if n != nil {
		if p != nil && (n.parent != p || n.name != string(name)) && (n.dir != nil || n.upper.Load() == 0 || n.parent == nil) {
			dying = fs.place(n, p, string(name), dying)
		}
	} else {
		if p != nil {
			if old := fs.byName[nameKey{p.id, string(name)}]; old != nil {
				dying = fs.unplace(old, dying)
			}
		}
		if len(fs.nodes) >= fs.cfg.MaxInodes {
			fs.mu.Unlock()
			fs.bury(dying)
			fs.release(f)
			fs.full.Do(func() {
				fs.log.Warn("guest knows too many inodes: further ones are ENFILE until it forgets some", "max_inodes", fs.cfg.MaxInodes)
			})
			return nil, unix.ENFILE
		}
		n = fs.newNode(f)
		if p != nil {
			dying = fs.place(n, p, string(name), dying)
		}
	}
	if f.below != belowUnknown && n.parent == p && n.name == string(name) {
		fs.noteBelow(n, f.below) // it is of this name, and the file may have others
	}
	if !counted {
		n.count()
	}
	fs.mu.Unlock()
	fs.release(f) // what the node has taken is no longer there
	fs.bury(dying)
	out.NodeId, out.Generation = n.id, 0
	out.Attr = f.attr
	fs.finish(n, &out.Attr)
	return n, 0
}

// count counts a lookup. FS.mu is held.
func (n *node) count() {
	if n.lookups++; n.lookups == 0 {
		n.lookups = math.MaxUint64
	}
}

// holdUpper returns the node of a file of the upper layer with a lookup counted, nil if there is none.
func (fs *FS) holdUpper(id uint64, typ uint32) *node {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	n := fs.byUpper[id]
	if n == nil || n.typ != typ || n.dead {
		return nil
	}
	n.count()
	return n
}

// known returns the node that f is, nil if there is none. mu is held.
func (fs *FS) known(p *node, name []byte, f *found) *node {
	if f.upper != 0 {
		n := fs.byUpper[f.upper]
		if n != nil && n.typ == f.attr.Mode&unix.S_IFMT {
			return n
		}
		return nil
	}
	if n := fs.byLower[f.lowers[0]]; n != nil && !f.isDir() {
		return n
	}
	if p == nil {
		return nil
	}
	n := fs.byName[nameKey{p.id, string(name)}]
	if n != nil && n.upper.Load() == 0 && n.lowers[0] == f.lowers[0] && n.typ == f.attr.Mode&unix.S_IFMT {
		return n
	}
	return nil
}

// newNode makes f's node, which takes f's files. mu is held.
func (fs *FS) newNode(f *found) *node {
	fs.last++
	n := &node{id: fs.last, typ: f.attr.Mode & unix.S_IFMT, redirect: f.redirect}
	if len(f.lowers) > 0 {
		n.lowers = append(n.lowers, f.lowers...)
	}
	n.ino.Store(f.ino)
	n.origin.Store(f.origin)
	if f.isDir() {
		n.dir = newDir(len(n.lowers))
		n.dir.parts[0].impure.Store(f.impure)
	}
	fs.nodes[n.id] = n
	if f.upper != 0 {
		n.upper.Store(f.upper)
		if fs.byUpper[f.upper] == nil {
			fs.byUpper[f.upper] = n
		}
	} else if n.dir == nil {
		if fs.upper == nil {
			fs.byLower[n.lowers[0]] = n
		} else {
			n.linked = f.attr.Nlink > 1
		}
	}
	f.upper, f.lowers = 0, nil
	return n
}

// place gives n the name in p, which another node loses if it has it. It returns dying with the nodes added that are to be buried.
// mu is held.
func (fs *FS) place(n, p *node, name string, dying []*node) []*node {
	if old := fs.byName[nameKey{p.id, name}]; old != nil && old != n {
		dying = fs.unplace(old, dying)
	}
	p.kids++
	from := n.parent
	if from != nil {
		fs.leave(n)
	}
	n.parent, n.name = p, name
	n.gone.Store(false)
	fs.noteBelow(n, belowUnknown)
	fs.byName[nameKey{p.id, name}] = n
	return fs.reap(from, dying)
}

// leave takes n's name away. mu is held; the directory is to be reaped.
func (fs *FS) leave(n *node) {
	key := nameKey{n.parent.id, n.name}
	if fs.byName[key] == n {
		delete(fs.byName, key)
	}
	n.parent.kids--
	n.parent, n.name = nil, ""
}

// unplace takes n's name away for good. mu is held.
func (fs *FS) unplace(n *node, dying []*node) []*node {
	p := n.parent
	if p == nil {
		return dying
	}
	fs.leave(n)
	n.gone.Store(true)
	return fs.reap(p, dying)
}

// reap takes n out of the tables if nothing needs it any more, and the directories above it likewise. mu is held; what is added
// to dying is to be buried when it is not.
func (fs *FS) reap(n *node, dying []*node) []*node {
	for n != nil && n != fs.root && n.lookups == 0 && n.kids == 0 && !n.dead {
		n.dead = true
		delete(fs.nodes, n.id)
		if up := n.upper.Load(); up != 0 && fs.byUpper[up] == n {
			delete(fs.byUpper, up)
		}
		if fs.upper == nil && n.dir == nil && fs.byLower[n.lowers[0]] == n {
			delete(fs.byLower, n.lowers[0])
		}
		p := n.parent
		if p != nil {
			fs.leave(n)
		}
		dying = append(dying, n)
		n = p
	}
	return dying
}

// bury gives back what dead nodes have of the layers.
func (fs *FS) bury(dead []*node) {
	for _, n := range dead {
		fs.forgetReals(n)
	}
}

func (fs *FS) forgetReals(n *node) {
	n.anchor.close(&fsbackend.Context{MayBlock: true}, &handle{}, 0)
	if n.dir != nil {
		fs.indexes.dropOf(n.dir)
	}
	if up := n.upper.Load(); up != 0 {
		fs.upper.r.Forget(up, 1)
	}
	for _, r := range n.lowers {
		r.forget()
	}
}

// Forget implements fsbackend.Backend.
func (fs *FS) Forget(id, count uint64) {
	fs.mu.Lock()
	n := fs.nodes[id]
	if n == nil || n.lookups == 0 {
		fs.mu.Unlock()
		return
	}
	n.lookups -= min(n.lookups, count)
	dying := fs.reap(n, nil)
	fs.mu.Unlock()
	fs.bury(dying)
}

// at returns the node that name in p is, if it is known. p's lock is held.
func (fs *FS) at(p *node, name []byte) *node {
	fs.mu.RLock()
	defer fs.mu.RUnlock()
	return fs.byName[nameKey{p.id, string(name)}]
}

// removed notes that name in p is gone. p's lock is held.
func (fs *FS) removed(p *node, name []byte) {
	p.dir.version.Add(1)
	fs.mu.Lock()
	var dying []*node
	if n := fs.byName[nameKey{p.id, string(name)}]; n != nil {
		dying = fs.unplace(n, dying)
	}
	fs.mu.Unlock()
	fs.bury(dying)
}

// lock locks a directory to change it; rlock to look names up in it. ErrMayBlock says that it is locked and that the call may not
// sleep.
func (n *node) lock(c *fsbackend.Context) errno {
	if c.MayBlock {
		n.dir.mu.Lock()
	} else if !n.dir.mu.TryLock() {
		return fsbackend.ErrMayBlock
	}
	return 0
}

func (n *node) rlock(c *fsbackend.Context) errno {
	if c.MayBlock {
		n.dir.mu.RLock()
	} else if !n.dir.mu.TryRLock() {
		return fsbackend.ErrMayBlock
	}
	return 0
}

func (n *node) unlock()  { n.dir.mu.Unlock() }
func (n *node) runlock() { n.dir.mu.RUnlock() }

// lockBoth locks two directories in the order of their nodeids.
func lockBoth(a, b *node) {
	if a.id > b.id {
		a, b = b, a
	}
	a.dir.mu.Lock()
	b.dir.mu.Lock()
}

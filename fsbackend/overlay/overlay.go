// Package overlay merges layers, each of them a backend of its own, into one tree: what is in an upper layer hides what is in
// those below it, directories are merged, and all changes go to the uppermost one. Its marks in the layers are those of the
// kernel's overlayfs and of fuse-overlayfs.
//
// # Nodes
//
// A node stands for a file as the guest knows it. It holds one lookup of each file of a layer that it is made of: of one file, or
// of a directory's part in each layer that has one. Where a file that is only in a lower layer is changed it is copied up first:
// then it has another file behind it, and stays the same node. Files that are open read what was copied from then on.
//
// # Locks
//
// A directory's lock is held, for reading, while a name in it is looked up, and while it is changed, also across calls of the
// layers, so that who works in one directory does not wait for what happens in another. Two are locked in the order of
// their nodeids. FS.mu guards what nodes know of each other, and is never held across a call of a layer. Data is copied up
// with nothing locked but the file's own copyMu. Where a call may not sleep, a lock that is taken answers ErrMayBlock, and so
// does whatever takes more than one call that changes something.
package overlay

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

type errno = unix.Errno

const rootID = fuseproto.FUSE_ROOT_ID

// FS is a tree of layers.
type FS struct {
	cfg    Config
	log    *slog.Logger
	layers []*layer // the uppermost first
	upper  *layer   // the first of them, or nil
	root   *node
	work   uint64
	acl    bool // every layer has access control lists
	mapped bool // owners are translated

	noMknod   atomic.Bool // whiteouts cannot be made as devices
	noTmpfile atomic.Bool // the upper layer has no O_TMPFILE, or cannot link its files
	temp      atomic.Uint64
	metacopy  sync.Once // log of it
	full      sync.Once // log of MaxInodes
	features  atomic.Uint64
	noFlush   atomic.Bool // the upper layer needs no FLUSH

	// Of the session: what belongs to one before is not to be kept.
	epoch atomic.Uint64
	// turn is held while a session begins or ends, and while ReplaceUpper works, of which inSession is.
	turn      sync.Mutex
	inSession bool

	mu      sync.RWMutex
	nodes   map[uint64]*node
	byName  map[nameKey]*node
	byUpper map[uint64]*node
	byLower map[real]*node // files, where there is no upper layer: they keep their hard links
	last    uint64         // nodeid given out

	handles handles
	listed  atomic.Int64 // entries in listings of open directories
	indexes indexes
	gate    gate

	// renameMu is held while a directory changes its place in the tree.
	renameMu sync.Mutex
}

// New makes a tree of cfg's layers, all of which it takes over, also where it fails. The caller closes the FS.
func New(cfg Config) (*FS, error) {
	fs := &FS{cfg: cfg, log: cfg.Log}
	if fs.log == nil {
		fs.log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxInodes == 0 {
		fs.cfg.MaxInodes = DefaultMaxInodes
	}
	if cfg.MaxNames == 0 {
		fs.cfg.MaxNames = DefaultMaxNames
	}
	fs.indexes.all = make(map[*names]struct{})
	fs.mapped = len(cfg.UIDMap)+len(cfg.GIDMap) > 0 || cfg.SquashToRoot || cfg.SquashToUID != nil || cfg.SquashToGID != nil
	fs.clear()
	fs.handles.init()
	err := cfg.Validate()
	if err == nil {
		err = fs.open()
	}
	if err != nil {
		_ = fs.Close()
		return nil, fmt.Errorf("overlay: %w", err)
	}
	return fs, nil
}

func (fs *FS) open() error {
	if fs.cfg.Upper != nil {
		fs.upper = newLayer(fsbackend.Resolve(fs.cfg.Upper), 0, "upper")
		fs.layers = append(fs.layers, fs.upper)
		if err := fs.openUpper(); err != nil {
			return err
		}
	}
	for i, l := range fs.cfg.Lowers {
		name := l.Name
		if name == "" {
			name = fmt.Sprintf("lower %d", i)
		}
		lower := newLayer(fsbackend.Resolve(l.Backend), l.Root, name)
		lower.noACL = l.NoACL
		fs.layers = append(fs.layers, lower)
	}
	for i, l := range fs.layers {
		l.index, l.bottom = i, i == len(fs.layers)-1
	}
	if err := fs.numberLayers(); err != nil {
		return err
	}
	fs.chooseACL()
	return fs.openRoot()
}

// openRoot makes the node of the root of what the layers are.
func (fs *FS) openRoot() error {
	root := &node{id: rootID, typ: unix.S_IFDIR, lookups: math.MaxUint64}
	for _, l := range fs.layers {
		if l == fs.upper {
			root.upper.Store(l.root)
			continue
		}
		root.lowers = append(root.lowers, real{l, l.root})
		// A layer whose root is opaque hides all that is below.
		m, e := fs.marks(&fsbackend.Context{MayBlock: true}, l, l.root)
		if e != 0 {
			return fmt.Errorf("marks of the root of layer %s: %w", l.name, e)
		}
		if m.opaque {
			break
		}
	}
	root.dir = newDir(len(root.lowers))
	var out fuseproto.AttrOut
	if e := fs.realAttr(&fsbackend.Context{MayBlock: true}, root, &out); e != 0 {
		return fmt.Errorf("attributes of the root: %w", e)
	}
	root.ino.Store(root.top(fs).l.ino(out.Attr.Ino))
	fs.root = root
	return nil
}

// openUpper finds the work directory and takes out of it what a crash has left there.
func (fs *FS) openUpper() error {
	r := fs.upper.r
	if r.Maker == nil || r.Remover == nil || r.Renamer == nil || r.Setattrer == nil || r.Creater == nil || r.Opener == nil ||
		r.Reader == nil || r.Writer == nil || r.DirReader == nil {
		return errors.New("the upper layer's backend cannot be changed: expected one that makes, removes, renames and writes files")
	}
	fs.work = fs.cfg.Work
	if fs.work == 0 {
		fs.work = workNode(fs.cfg.Upper)
	}
	if fs.work == 0 {
		return errors.New("no work directory: expected one on the upper layer's file system")
	}
	return fs.cleanWork()
}

// workNode returns the nodeid of the work directory that a backend has for good, 0 if it has none.
func workNode(b fsbackend.Backend) uint64 {
	if w, ok := b.(interface{ WorkNode() uint64 }); ok {
		return w.WorkNode()
	}
	return 0
}

// chooseACL finds out whether the whole tree has access control lists, and says which layer is the reason if not.
func (fs *FS) chooseACL() {
	fs.acl = !fs.cfg.NoACL && !fs.mapped
	var with, without string
	for _, l := range fs.layers {
		if l.wantsACL() {
			with = l.name
		} else if without == "" {
			without = l.name
		}
	}
	if without != "" {
		if fs.acl && with != "" {
			fs.log.Warn("access control lists are off for the whole overlay: a layer does not have them", "layer", without)
		}
		fs.acl = false
	}
}

// clear makes the tables empty. mu is held, or the FS not in use.
func (fs *FS) clear() {
	fs.nodes = make(map[uint64]*node)
	fs.byName = make(map[nameKey]*node)
	fs.byUpper = make(map[uint64]*node)
	fs.byLower = make(map[real]*node)
	if fs.last == 0 {
		fs.last = rootID
	}
}

// Slow implements fsbackend.Slow: it is so if every layer is. Calls of a slow layer alone answer ErrMayBlock.
func (fs *FS) Slow() bool {
	for _, l := range fs.layers {
		if !l.r.Slow {
			return false
		}
	}
	return true
}

// notPassedOn are INIT flags that are between the guest and the overlay.
const notPassedOn = fuseproto.FUSE_NO_OPEN_SUPPORT | fuseproto.FUSE_NO_OPENDIR_SUPPORT | fuseproto.FUSE_SUBMOUNTS

// WantFlags implements fsbackend.Wanter.
func (fs *FS) WantFlags(defaults uint64) uint64 {
	const locks = fuseproto.FUSE_POSIX_LOCKS | fuseproto.FUSE_FLOCK_LOCKS
	const acls = fuseproto.FUSE_POSIX_ACL
	defaults &^= notPassedOn
	want := defaults
	if fs.upper != nil {
		want = fs.upper.wants(defaults) &^ notPassedOn
	}
	want |= defaults & (fuseproto.FUSE_DO_READDIRPLUS | fuseproto.FUSE_READDIRPLUS_AUTO)
	for _, l := range fs.layers {
		if l.r.Locker == nil || l.wants(defaults)&locks != defaults&locks {
			want &^= locks
		}
	}
	want &^= acls
	if fs.acl {
		want |= acls | fuseproto.FUSE_DONT_MASK | fuseproto.FUSE_SETXATTR_EXT
	} else if defaults&fuseproto.FUSE_DONT_MASK == 0 {
		want &^= fuseproto.FUSE_DONT_MASK
	}
	return want
}

// Init implements fsbackend.Initer. Layers that have access control lists show them to the overlay in any case: copies are to
// have them.
func (fs *FS) Init(f fsbackend.Features) {
	fs.turn.Lock()
	defer fs.turn.Unlock()
	fs.inSession = true
	fs.features.Store(f.Flags)
	fs.noFlush.Store(false)
	for _, l := range fs.layers {
		if l.r.Initer == nil {
			continue
		}
		g := f
		g.Flags &^= notPassedOn
		if l.wantsACL() {
			g.Flags |= fuseproto.FUSE_POSIX_ACL
		}
		l.r.Init(g)
	}
}

func (fs *FS) has(flags uint64) bool { return fs.features.Load()&flags == flags }

// Reset implements fsbackend.Backend.
func (fs *FS) Reset() {
	fs.turn.Lock()
	defer fs.turn.Unlock()
	fs.inSession = false
	fs.epoch.Add(1)
	fs.handles.closeAll(fs)
	fs.mu.Lock()
	nodes := fs.nodes
	for _, n := range nodes {
		n.dead, n.lookups, n.kids, n.parent = true, 0, 0, nil
	}
	fs.clear()
	fs.root.kids = 0
	fs.mu.Unlock()
	for _, n := range nodes {
		fs.forgetReals(n)
	}
	fs.indexes.dropOf(fs.root.dir)
	for i, l := range fs.layers {
		if fs.resettable(i) {
			l.r.Reset()
		}
	}
}

// resettable says whether a layer's session ends with the overlay's: its lookups other than of its root are all the overlay's. A
// backend that several layers have is asked once.
func (fs *FS) resettable(i int) bool {
	for j, other := range fs.layers {
		if other.r.Backend == fs.layers[i].r.Backend && (other.root != rootID || j < i) {
			return false
		}
	}
	return fs.layers[i] != fs.upper || fs.work == workNode(fs.cfg.Upper)
}

// Close implements fsbackend.Backend.
func (fs *FS) Close() error {
	fs.gate.thaw()
	fs.handles.closeAll(fs)
	var errs []error
	var closed []fsbackend.Backend
	all := []fsbackend.Backend{fs.cfg.Upper}
	for _, l := range fs.cfg.Lowers {
		all = append(all, l.Backend)
	}
next:
	for _, b := range all {
		if b == nil {
			continue
		}
		for _, c := range closed {
			if c == b {
				continue next
			}
		}
		closed = append(closed, b)
		errs = append(errs, b.Close())
	}
	return errors.Join(errs...)
}

// Stats implements fsbackend.Statser. Inodes are the overlay's own; the rest is what the layers have.
func (fs *FS) Stats() fsbackend.Stats {
	var s fsbackend.Stats
	for i, l := range fs.layers {
		if l.r.Statser != nil && fs.firstOf(i) {
			s.Add(l.r.Stats())
		}
	}
	fs.mu.RLock()
	s.Inodes = 1 + uint64(len(fs.nodes))
	fs.mu.RUnlock()
	return s
}

// firstOf says whether layer i is the first with its backend.
func (fs *FS) firstOf(i int) bool {
	for _, l := range fs.layers[:i] {
		if l.r.Backend == fs.layers[i].r.Backend {
			return false
		}
	}
	return true
}

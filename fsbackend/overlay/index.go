package overlay

import (
	"bytes"
	"hash/maphash"
	"math"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// What a merged directory knows of the names in its lower parts, so that no layer is asked for what it does not have: most of what
// is looked up, made and removed in an upper layer is not below. The kernel's overlayfs has negative dentries and cached listings
// for that. A layer says which of its directories can be known so (fsbackend.Complete); others are asked each time.

// names are those of a lower layer's directory, in the order in which it lists them. They do not change.
type names struct {
	of      *part
	since   uint32 // indexes.generation
	entries []indexed
	text    []byte   // the names
	table   []uint32 // by hash: 1 + the number of an entry, 0 for none; a power of two of them
	hiding  bool     // files .wh.NAME are among them
}

// indexed is one of the entries.
type indexed struct {
	ino uint64
	off uint64 // where a reading of the directory goes on after it
	at  uint32 // of its name in text
	len uint8
	typ uint8 // DT_*
}

var nameSeed = maphash.MakeSeed()

func (x *names) name(e *indexed) []byte { return x.text[e.at:][:e.len] }

// add adds an entry of a listing.
func (x *names) add(d *dirent) {
	x.hiding = x.hiding || bytes.HasPrefix(d.name, []byte(whPrefix))
	x.entries = append(x.entries, indexed{d.ino, d.off, uint32(len(x.text)), uint8(len(d.name)), uint8(d.typ)})
	x.text = append(x.text, d.name...)
}

// finish has the names be found.
func (x *names) finish() {
	size := 1
	for size < len(x.entries)+len(x.entries)/2+1 {
		size *= 2
	}
	x.table = make([]uint32, size)
	for i := range x.entries {
		*x.slot(x.name(&x.entries[i])) = uint32(i + 1)
	}
}

// slot is where in the table name is, or would be.
func (x *names) slot(name []byte) *uint32 {
	mask := uint64(len(x.table) - 1)
	for h := maphash.Bytes(nameSeed, name); ; h++ {
		s := &x.table[h&mask]
		if *s == 0 || bytes.Equal(x.name(&x.entries[*s-1]), name) {
			return s
		}
	}
}

// find returns the entry of a name, nil if there is none.
func (x *names) find(name []byte) *indexed {
	if s := *x.slot(name); s != 0 {
		return &x.entries[s-1]
	}
	return nil
}

// hides says whether a file .wh.NAME hides name in the layers below.
func (x *names) hides(name []byte) bool {
	if !x.hiding {
		return false
	}
	var room [unix.NAME_MAX + len(whPrefix)]byte
	return x.find(append(append(room[:0], whPrefix...), name...)) != nil
}

// size is how much memory the names take, of which a part is for an index of none.
func (x *names) size() int64 {
	return 256 + 24*int64(cap(x.entries)) + int64(cap(x.text)) + 4*int64(len(x.table))
}

// asking is what a part of a directory whose names are not known has been asked for.
type asking struct {
	misses atomic.Uint32 // questions that names would have answered
	due    atomic.Uint32 // how many of them are to come before the names are read
	busy   atomic.Bool   // they are being read
}

const (
	// namesPerMiss is how many names are read for each miss, and minNames how many at least: reading is to cost no more than a small
	// multiple of what was asked already, whatever the directory. What is larger is tried again after tries times as many misses.
	namesPerMiss = 64
	minNames     = 4096
	tries        = 4
	// inlineNames is how many names are read by a thread that may not sleep.
	inlineNames = 2048
	// never is due where the names will not be known.
	never = math.MaxUint32
)

// indexes are the names of all directories that are known.
type indexes struct {
	// generation counts the times that lower layers may have changed: what was read before one counts no more.
	generation atomic.Uint32

	mu   sync.Mutex // comes before FS.mu
	all  map[*names]struct{}
	size int64
}

// knownNames returns the names of part i of p if they are known.
func (fs *FS) knownNames(p *node, i int) *names {
	x := p.dir.parts[i].names.Load()
	// Behind the gate, lower layers may be changed.
	if x == nil || x.since != fs.indexes.generation.Load() || fs.gate.closed.Load() {
		return nil
	}
	return x
}

// namesOf returns the names of part i of p, which it reads if it pays. nil says that the layer is to be asked. p's lock is held.
func (fs *FS) namesOf(c *fsbackend.Context, p *node, i int) (*names, errno) {
	if x := fs.knownNames(p, i); x != nil {
		return x, 0
	}
	part := &p.dir.parts[i]
	a := &part.asking
	misses := a.misses.Load()
	if misses == 0 || misses < a.due.Load() {
		return nil, 0
	}
	x := fs.newNames(p, i)
	if x == nil || !a.busy.CompareAndSwap(false, true) {
		return nil, 0
	}
	defer a.busy.Store(false)
	dir, _ := p.part(fs, i)
	limit := max(minNames, namesPerMiss*int(min(misses, never/namesPerMiss)))
	most := limit
	if !c.MayBlock {
		most = min(most, inlineNames)
	}
	tooMany := false
	e := fs.readNames(c, p, dir, x, nil, func(*dirent) bool {
		tooMany = len(x.entries) >= most
		return !tooMany
	})
	switch {
	case e == fsbackend.ErrMayBlock || tooMany && most < limit:
		return nil, fsbackend.ErrMayBlock
	case e != 0 || tooMany:
		a.due.Store(max(tries*misses, tries*minNames/namesPerMiss))
		return nil, 0 // it is asked, and says itself what is wrong
	}
	return fs.knownNames(p, i), 0
}

// newNames returns what the names of part i of p can be gathered in; nil if they are not to be known.
func (fs *FS) newNames(p *node, i int) *names {
	if i == 0 || p.lowers[i-1].l.complete == nil || p.dir.parts[i].asking.due.Load() == never || fs.cfg.MaxNames < 0 {
		return nil
	}
	x := &names{of: &p.dir.parts[i], since: fs.indexes.generation.Load()}
	if fs.gate.closed.Load() {
		return nil
	}
	return x
}

// readNames calls do for each entry of a part of p, as each does, and keeps all of them if x is not nil and do has seen the last one.
// h is where it is left open, if it is not nil.
func (fs *FS) readNames(c *fsbackend.Context, p *node, dir real, x *names, h *handle, do func(*dirent) bool) errno {
	if h == nil {
		h = &handle{dir: true}
		defer func() { h.reading.close(c, h, 0) }()
	}
	f, e := fs.openPart(c, h, dir)
	if e != 0 {
		return e
	}
	if x != nil && !dir.l.complete.ListsAll(dir.node, f.fh) {
		x.of.asking.due.Store(never)
		x = nil
	}
	most := fs.cfg.MaxNames / 4
	whole := true
	e = fs.eachOf(c, f, func(d *dirent) bool {
		if x != nil {
			if x.add(d); x.size() > most {
				x.of.asking.due.Store(never)
				x = nil
			}
		}
		whole = do(d)
		return whole
	})
	if e != 0 || !whole || x == nil {
		return e
	}
	x.finish()
	switch exact, e := x.exact(c, dir); {
	case e != 0: // the next who wants them tries again
	case !exact:
		x.of.asking.due.Store(never)
	default:
		fs.keep(p, x)
	}
	return 0
}

// exact says whether the directory tells names apart by each byte: whether one of them in other letters, which is not listed, is not found.
func (x *names) exact(c *fsbackend.Context, dir real) (bool, errno) {
	for i := range x.entries {
		name := x.name(&x.entries[i])
		other := bytes.ToUpper(name)
		if bytes.Equal(other, name) {
			other = bytes.ToLower(name)
		}
		if bytes.Equal(other, name) || len(other) > unix.NAME_MAX {
			continue
		}
		if x.find(other) != nil {
			return true, 0
		}
		var out fuseproto.EntryOut
		e := dir.l.lookup(c, dir.node, fsbackend.MakeName(string(other)), &out)
		if e == 0 {
			dir.l.r.Forget(out.NodeId, 1)
		}
		if e != 0 && e != unix.ENOENT {
			return false, e
		}
		return e != 0, 0
	}
	return true, 0
}

// keep has p know names. Where they are too many, others go, whichever.
func (fs *FS) keep(p *node, x *names) {
	t := &fs.indexes
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := x.of.names.Load(); old != nil {
		t.drop(old)
	}
	size := x.size()
	for old := range t.all {
		if t.size+size <= fs.cfg.MaxNames {
			break
		}
		t.drop(old)
	}
	t.all[x] = struct{}{}
	t.size += size
	x.of.names.Store(x)
	fs.mu.RLock()
	dead := p.dead
	fs.mu.RUnlock()
	if dead {
		t.drop(x) // who has buried it did not see them
	}
}

// drop has names be forgotten. To be known again they must be worth it. mu is held.
func (t *indexes) drop(x *names) {
	if _, ok := t.all[x]; !ok {
		return
	}
	delete(t.all, x)
	t.size -= x.size()
	x.of.names.Store(nil)
	x.of.asking.misses.Store(0)
	x.of.asking.due.Store(uint32(len(x.entries) / namesPerMiss))
}

// dropOf forgets the names of a directory.
func (t *indexes) dropOf(d *dir) {
	for i := range d.parts {
		if d.parts[i].names.Load() == nil {
			continue
		}
		t.mu.Lock()
		if x := d.parts[i].names.Load(); x != nil {
			t.drop(x)
		}
		t.mu.Unlock()
	}
}

// mayHave is ENOENT if part i of p is known not to have name.
func (fs *FS) mayHave(c *fsbackend.Context, p *node, i int, name []byte) errno {
	x, e := fs.namesOf(c, p, i)
	if e == 0 && x != nil && x.find(name) == nil {
		e = unix.ENOENT
	}
	return e
}

// missed notes that part i of p has been asked for what names would have said.
func (p *node) missed(i int) {
	if i > 0 {
		p.dir.parts[i].asking.misses.Add(1)
	}
}

// below says whether a part of p, from part i on, has something of the name, which parts above it do not hide: belowUnknown if that is
// to be asked. p's lock is held.
func (fs *FS) below(c *fsbackend.Context, p *node, i int, name []byte) (uint32, errno) {
	for ; i <= len(p.lowers); i++ {
		x, e := fs.namesOf(c, p, i)
		if e != 0 || x == nil {
			return belowUnknown, e
		}
		switch f := x.find(name); {
		case f == nil:
		case f.typ == unix.DT_CHR || f.typ == unix.DT_UNKNOWN: // it may be a whiteout
			return belowUnknown, 0
		case f.typ == unix.DT_REG: // likewise, in some directories
			impure, e := fs.impure(c, p, i)
			if e != 0 || impure {
				return belowUnknown, e
			}
			return belowSomething, 0
		default:
			return belowSomething, 0
		}
		if x.hides(name) {
			break
		}
	}
	return belowNothing, 0
}

// eachIn calls do for every entry of part i of n as each does. The layer is only asked if the names are not known, which they are then.
// It stays open in h.
func (fs *FS) eachIn(c *fsbackend.Context, n *node, i int, h *handle, do func(*dirent) bool) errno {
	if x := fs.knownNames(n, i); x != nil {
		var d dirent
		for j := range x.entries {
			e := &x.entries[j]
			if d.ino, d.off, d.typ, d.name = e.ino, e.off, uint32(e.typ), x.name(e); !do(&d) {
				break
			}
		}
		return 0
	}
	dir, _ := n.part(fs, i)
	return fs.readNames(c, n, dir, fs.newNames(n, i), h, do)
}

// lowersChanged forgets what is known of the lower layers.
func (fs *FS) lowersChanged() { fs.indexes.generation.Add(1) }

package fusebridge

import (
	"bytes"
	"cmp"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// maxBurst is how many LOOKUPs are sent before the first answer is waited for. Each takes about 1 KiB of the socket's buffer, which has
// 208 KiB at least.
const maxBurst = 64

// A burst is the entries of a listing on their way to the guest, in order. Those that the program lists without looking them up,
// because it has no READDIRPLUS or, as libfuse's high level, makes no use of it, are looked up here, many at once: a guest would come
// back for one after the other.
type burst struct {
	b       *Bridge
	ctx     *fsbackend.Context
	dir     *node
	version uint64 // of dir before the listing
	plus    *conn  // whose program has looked entries up
	out     *fsbackend.DirList
	room    int  // of out, less what is on its way
	full    bool // something did not fit
	failed  bool // a lookup did: the others are left to the guest, for whom they may take as long

	entries [maxBurst]listed
	n       int
	asked   int   // of them, and not answered: the names of dir are locked
	c       *conn // who was asked
	shared  bool  // how the names are locked
}

// listed is an entry of a burst.
type listed struct {
	dirent
	asked  bool
	lookup lookup
}

// newBurst returns an empty one, which goes back to Bridge.bursts.
func (b *Bridge) newBurst(ctx *fsbackend.Context, dir *node, out *fsbackend.DirList) *burst {
	w, _ := b.bursts.Get().(*burst)
	if w == nil {
		w = new(burst)
	}
	w.b, w.ctx, w.dir, w.version, w.plus = b, ctx, dir, b.version(dir), nil
	w.out, w.room, w.full, w.failed = out, out.Len(), false, false
	return w
}

// add takes up an entry of a reply, unless it does not fit. d's name stays as it is until flush.
func (w *burst) add(d *dirent) (fits bool) {
	dots := isDots(d.name)
	size := (entryOutSize + direntSize + len(d.name) + 7) &^ 7
	if w.full = w.full || size > w.room; w.full {
		if w.plus != nil && !dots {
			w.plus.forget(d.entry.NodeId, 1)
		}
		return false
	}
	w.room -= size
	if w.n == maxBurst {
		w.flush()
	}
	name := fsbackend.Name(d.name)
	var r *request
	switch looked := w.plus != nil && d.entry.NodeId != 0; {
	case dots:
		d.entry = fuseproto.EntryOut{} // they are never looked up (fs/fuse/readdir.c, fuse_direntplus_link)
	case looked:
		n, errno := w.b.adopt(w.plus, &d.entry, w.dir, name)
		if errno != 0 {
			d.entry = fuseproto.EntryOut{} // the guest looks it up, and gets the error
			break
		}
		w.b.keepEntry(n, &d.entry, w.b.version(n), w.dir, name, w.version)
	default:
		d.entry = fuseproto.EntryOut{}
		if !w.b.cachedEntry(w.dir.id, name, &d.entry) {
			r = w.request()
		}
	}
	e := &w.entries[w.n]
	w.n++
	e.dirent, e.asked = *d, false
	if r != nil {
		w.ask(e, r)
	}
	return true
}

// request returns a request to be a LOOKUP, or nil if the guest is to make that. Nobody has been asked, or r's program.
func (w *burst) request() *request {
	if w.failed {
		return nil
	}
	r, errno := w.b.begin(w.ctx, fuseproto.FUSE_LOOKUP, w.dir)
	if errno != 0 {
		w.failed = true
		return nil
	}
	if w.asked > 0 && (r.c != w.c || !w.shared) {
		w.flush()
	}
	return r
}

// ask sends r.
func (w *burst) ask(e *listed, r *request) {
	if w.asked == 0 {
		w.c, w.shared = r.c, w.dir.look(r.c)
	}
	w.asked++
	if e.lookup.start(w.ctx, w.b, r, w.dir, e.name) == 0 {
		e.asked = true
		return
	}
	w.failed = true
	w.answered(r)
}

// answered ends what ask has begun.
func (w *burst) answered(r *request) {
	r.end()
	if w.asked--; w.asked == 0 {
		w.dir.unlook(w.shared)
		w.c = nil
	}
}

// flush waits for the answers and writes the entries.
func (w *burst) flush() {
	for i := range w.entries[:w.n] {
		e := &w.entries[i]
		if e.asked {
			errno := e.lookup.finish(w.b, &e.entry)
			if errno != 0 || e.entry.NodeId == 0 {
				e.entry = fuseproto.EntryOut{}
			}
			w.failed = w.failed || errno != 0 && errno != unix.ENOENT
			w.answered(e.lookup.r)
			e.lookup = lookup{}
		}
		node := e.entry.NodeId
		if !w.out.AddPlus(&e.entry, cmp.Or(e.head.Ino, cmp.Or(node, w.dir.id)), e.head.Off, e.head.Type&0xf, e.name) && node != 0 {
			w.b.Forget(node, 1)
		}
		e.name = nil
	}
	w.n = 0
}

// maxRests is how many directories may have something left over of a listing, and maxList how many bytes are asked for at once then.
const (
	maxRests = 64
	maxList  = 64 << 10
)

// rest is what is left over of a reply to READDIR, which has more names than go into one to READDIRPLUS, for the call that goes on with it.
type rest struct {
	reply   []byte
	offset  uint64 // of the first entry
	version uint64 // the directory's before it was listed
}

// takeRest returns what is left over of the last listing of h, if it begins at offset, and nothing has changed since.
func (b *Bridge) takeRest(h *handle, offset, version uint64) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	left := h.rest
	b.dropRest(h)
	if left.offset != offset || left.version != version {
		return nil
	}
	return left.reply
}

// dropRest forgets it. Bridge.mu is held.
func (b *Bridge) dropRest(h *handle) {
	if h.rest.reply != nil {
		h.rest = rest{}
		b.rests--
	}
}

// keepRest keeps what is left over of a listing of h.
func (b *Bridge) keepRest(h *handle, reply []byte, offset, version uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dropRest(h)
	if !h.closed && b.rests < maxRests {
		h.rest = rest{bytes.Clone(reply), offset, version}
		b.rests++
	}
}

package share

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"path"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// ReplayKind is what kind of change a ReplayEvent tells of. The words are those of the control API's events.
type ReplayKind string

// Kinds of changes. Events of other kinds keep their place in the order, and cannot be replayed.
const (
	ReplayCreate ReplayKind = "create"
	ReplayModify ReplayKind = "modify"
	ReplayAttrib ReplayKind = "attrib"
	ReplayDelete ReplayKind = "delete"
	ReplayRename ReplayKind = "rename"
	ReplayRescan ReplayKind = "rescan" // allows modify and attrib of anything
)

// ReplayEvent is a change that the host has made and that a helper in the guest is to have its kernel notice.
type ReplayEvent struct {
	// ID is not 0 and not RescanID, and rises by 1.
	ID   uint64
	Kind ReplayKind
	// Path and, of a rename, To are where in the share; both are clean and absolute.
	Path, To string
	// Dir says that it is a directory.
	Dir bool
}

// Answers to a LOOKUP of a reserved name. That it is neither ENOENT nor success is the helper's proof that the server knows
// what comes next for a replay: without it, its requests would be carried out.
const (
	// ReplayArmed says that the event is armed.
	ReplayArmed = unix.EINPROGRESS
	// ReplayUnknown says that the event is not known, or no longer.
	ReplayUnknown = unix.ENODATA
	// ReplayOwn says that the event tells of nothing but what this guest has done itself, of which its kernel has told already.
	ReplayOwn = unix.EALREADY
	// ReplayRefused is the answer to a caller with an event armed that asks for a change which is not that event's. The change is
	// not made.
	ReplayRefused = unix.ECANCELED
)

// ReplayPrefix begins the reserved names: the token, "-" and an event's ID in decimal follow, and "-to" in the directory that a
// rename leads to. ID 0 disarms.
const ReplayPrefix = ".sluice-replay-"

// RescanID stands for an event of kind ReplayRescan that is always known: it harms nobody to look again.
const RescanID = 1<<64 - 1

const (
	tokenSize = 32 // hex digits

	// How many events, and bytes of their paths, can still be armed.
	maxEvents     = 1 << 14
	maxEventBytes = 4 << 20
	// maxArmed bounds the callers that have an event armed; maxKnown and maxOwed what is remembered of what the guest knows.
	maxArmed = 64
	maxKnown = 1 << 15
	maxOwed  = 1 << 15
	// armedFor is how long an armed event is answered. A caller that comes later is refused, once: its request may be one for a
	// replay that was held up, and must not be carried out.
	armedFor = 30 * time.Second

	// ghostBase is the index of nodes and handles that stand for nothing. No part has it, so every request for one fails.
	ghostBase = nothingIndex << indexShift
	// deadHandle is what opening for a replay is answered with: nothing can be done through it but to close it.
	deadHandle = ghostBase | 1
)

// replay answers a helper in the guest as if changes of the host were made by its requests, so that the guest's kernel tells
// those who watch (inotify). No request of a caller that has an event armed changes anything but the guest's own view.
type replay struct {
	share *Share
	token string

	armedCount atomic.Int32 // len(armed)
	owedCount  atomic.Int32 // len(owed)
	ghosts     atomic.Uint64

	// mu is held for a few instructions at a time, never during a call.
	mu     sync.Mutex
	events []ReplayEvent // IDs without a gap
	bytes  int           // in their paths
	armed  map[uint32]*armed
	names  map[entryKey]*entryKnown
	nodes  map[uint64]*nodeKnown
	// owed counts lookups that replays have answered with a node of a backend that has not counted them.
	owed map[uint64]uint64
	own  own
}

// armed is the event that a caller has armed.
type armed struct {
	event    ReplayEvent
	from, to place // to is only a rename's
	until    time.Time
}

// place is a name in a directory, as the guest asks for it.
type place struct {
	parent uint64 // 0 is nowhere
	name   string
}

func (p place) is(parent uint64, name fsbackend.Name) bool {
	return p.parent == parent && p.parent != 0 && p.name == string(name)
}

type entryKey struct {
	parent uint64
	name   string
}

// entryKnown is what the guest knows a name for: it was looked up.
type entryKnown struct {
	now, before identity // before is what else it was, last
}

type nodeKnown struct {
	lookups uint64
	key     entryKey // one of its names
}

// identity is what must not change of a node in the eyes of a guest.
type identity struct {
	node, generation, ino uint64
	mode                  uint32
}

// EnableReplay has changes of the host replayed from now on, and returns the token that a helper in the guest has to know. It
// may be called again, and returns the same then.
func (s *Share) EnableReplay() (token string) {
	var random [tokenSize / 2]byte
	_, _ = rand.Read(random[:]) // never fails
	r := &replay{
		share: s, token: hex.EncodeToString(random[:]),
		armed: make(map[uint32]*armed), names: make(map[entryKey]*entryKnown), nodes: make(map[uint64]*nodeKnown), owed: make(map[uint64]uint64),
		own: newOwn(),
	}
	s.replay.CompareAndSwap(nil, r)
	return s.replay.Load().token
}

// Announce makes e known before a helper in the guest hears of it. Only so many events are remembered: those that are older can no
// longer be replayed. It does nothing before EnableReplay.
func (s *Share) Announce(e ReplayEvent) {
	r := s.replay.Load()
	if r == nil || e.ID == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.events); n > 0 && e.ID != r.events[n-1].ID+1 {
		r.events, r.bytes = nil, 0
	}
	r.events = append(r.events, e)
	r.bytes += len(e.Path) + len(e.To)
	for len(r.events) > maxEvents || r.bytes > maxEventBytes {
		r.bytes -= len(r.events[0].Path) + len(r.events[0].To)
		r.events[0] = ReplayEvent{} // for the collector
		r.events = r.events[1:]
	}
}

// known is event, without r.mu.
func (r *replay) known(id uint64) (ReplayEvent, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.event(id)
}

// event finds an event. r.mu is held.
func (r *replay) event(id uint64) (ReplayEvent, bool) {
	if id == RescanID {
		return ReplayEvent{ID: id, Kind: ReplayRescan, Path: "/", Dir: true}, true
	}
	if len(r.events) == 0 || id < r.events[0].ID || id-r.events[0].ID >= uint64(len(r.events)) {
		return ReplayEvent{}, false
	}
	return r.events[id-r.events[0].ID], true
}

// reset forgets a session's callers and nodes.
func (r *replay) reset() {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.armed)
	clear(r.names)
	clear(r.nodes)
	clear(r.owed)
	r.own = newOwn()
	r.armedCount.Store(0)
	r.owedCount.Store(0)
}

// reserved takes a reserved name apart; any other, and one with another token, is not ok.
func (r *replay) reserved(name fsbackend.Name) (id uint64, to, ok bool) {
	text := string(name)
	if !strings.HasPrefix(text, ReplayPrefix) {
		return 0, false, false
	}
	text = text[len(ReplayPrefix):]
	if len(text) < tokenSize+2 || text[tokenSize] != '-' || subtle.ConstantTimeCompare([]byte(text[:tokenSize]), []byte(r.token)) != 1 {
		return 0, false, false
	}
	digits, to := strings.CutSuffix(text[tokenSize+1:], "-to")
	id, err := strconv.ParseUint(digits, 10, 64)
	return id, to, err == nil
}

// arm arms the event id for a caller that has looked the reserved name up in the directory parent.
func (r *replay) arm(c *fsbackend.Context, parent, id uint64, to bool) Errno {
	pid := c.Caller.Pid
	if e, ok := r.known(id); ok && !to && pid != 0 && r.isOwn(c, &e, place{parent, path.Base(e.Path)}) {
		return ReplayOwn
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.armed[pid]
	switch {
	case pid == 0:
		return unix.EACCES // whoever the mount's pid namespace does not have looks so
	case id == 0 && a == nil:
		return ReplayUnknown
	case id == 0:
		r.disarm(pid)
		return ReplayRefused
	case to && (a == nil || a.event.ID != id || a.event.Kind != ReplayRename):
		return unix.EINVAL
	case to && a.from.parent>>indexShift != parent>>indexShift:
		return unix.EXDEV
	case to:
		a.to = place{parent, path.Base(a.event.To)}
		if r.own.of(entryKey(a.from)).to == entryKey(a.to) {
			r.disarm(pid)
			return ReplayOwn
		}
		return ReplayArmed
	}
	e, ok := r.event(id)
	if !ok {
		r.disarm(pid)
		return ReplayUnknown
	}
	if a == nil && len(r.armed) >= maxArmed && !r.disarmOverdue() {
		return unix.EBUSY
	}
	r.armed[pid] = &armed{event: e, from: place{parent, path.Base(e.Path)}, until: time.Now().Add(armedFor)}
	r.armedCount.Store(int32(len(r.armed)))
	return ReplayArmed
}

// disarm takes pid's event from it. r.mu is held.
func (r *replay) disarm(pid uint32) {
	delete(r.armed, pid)
	r.armedCount.Store(int32(len(r.armed)))
}

// disarmOverdue makes room: whoever armed something so long ago has ended. r.mu is held.
func (r *replay) disarmOverdue() bool {
	now := time.Now()
	for pid, a := range r.armed {
		if now.Sub(a.until) > 10*armedFor {
			r.disarm(pid)
			return true
		}
	}
	return false
}

// of returns what the caller has armed.
func (r *replay) of(c *fsbackend.Context) (armed, bool) {
	if r == nil || r.armedCount.Load() == 0 {
		return armed{}, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.armed[c.Caller.Pid]
	if a == nil {
		return armed{}, false
	}
	return *a, true
}

// change is of for a request that is to change something. Whatever it is answered, it must not be carried out.
func (r *replay) change(c *fsbackend.Context) (a armed, ok bool) {
	a, ok = r.of(c)
	if ok && time.Now().After(a.until) {
		r.done(c, &a)
		a = armed{}
	}
	return a, ok
}

// done ends the replay of a.
func (r *replay) done(c *fsbackend.Context, a *armed) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := r.armed[c.Caller.Pid]; now != nil && now.event.ID == a.event.ID {
		r.disarm(c.Caller.Pid)
	}
}

// learn writes down that the guest was told of e.
func (r *replay) learn(parent uint64, name fsbackend.Name, e *fuseproto.EntryOut) {
	told := identity{e.NodeId, e.Generation, e.Ino, e.Mode}
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.names[entryKey{parent, string(name)}]
	if known == nil {
		if len(r.names) >= maxKnown {
			for key := range r.names { // any one
				delete(r.names, key)
				break
			}
		}
		known = &entryKnown{now: told}
		r.names[entryKey{parent, string(name)}] = known
	}
	if known.now.node != told.node {
		known.before = known.now
	}
	known.now = told
	n := r.nodes[told.node]
	if n == nil {
		if len(r.nodes) >= maxKnown {
			for node := range r.nodes {
				r.unlearn(node)
				break
			}
		}
		n = &nodeKnown{key: entryKey{parent, string(name)}}
		r.nodes[told.node] = n
	}
	n.lookups++
}

// unlearn forgets what is known of node. r.mu is held.
func (r *replay) unlearn(node uint64) {
	n := r.nodes[node]
	delete(r.nodes, node)
	known := r.names[n.key]
	switch {
	case known == nil:
	case known.before.node == node:
		known.before = identity{}
	case known.now.node == node && r.nodes[known.before.node] != nil:
		known.now, known.before = known.before, identity{}
	case known.now.node == node:
		delete(r.names, n.key)
	}
}

// forget takes n lookups of node back and returns how many of them are the backend's.
func (r *replay) forget(node, n uint64) uint64 {
	if r == nil {
		return n
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if known := r.nodes[node]; known != nil {
		known.lookups -= min(n, known.lookups)
		if known.lookups == 0 {
			r.unlearn(node)
		}
	}
	if r.owedCount.Load() == 0 {
		return n
	}
	owed := min(r.owed[node], n)
	if r.owed[node] -= owed; r.owed[node] == 0 {
		delete(r.owed, node)
		r.owedCount.Store(int32(len(r.owed)))
	}
	return n - owed
}

// knows returns what the guest knows p for, other than the node not: the last that it was told.
func (r *replay) knows(p place, not uint64) (identity, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.names[entryKey(p)]
	if known == nil {
		return identity{}, false
	}
	for _, i := range []identity{known.now, known.before} {
		if i.node != 0 && i.node != not && r.nodes[i.node] != nil {
			return i, true
		}
	}
	return identity{}, false
}

// moved makes what is known of the name from known of to; without a to, it is known of no more.
func (r *replay) moved(from, to place) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// The guest's kernel takes the names for what the event says: whatever is there now has to be told of.
	delete(r.own.names, entryKey(from))
	delete(r.own.names, entryKey(to))
	known := r.names[entryKey(from)]
	delete(r.names, entryKey(from))
	if known == nil || to.parent == 0 {
		return
	}
	r.names[entryKey(to)] = &entryKnown{now: known.now}
	if n := r.nodes[known.now.node]; n != nil {
		n.key = entryKey(to)
	}
}

// lookup is LOOKUP.
func (r *replay) lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) Errno {
	if id, to, ok := r.reserved(name); ok {
		return r.arm(c, parent, id, to)
	}
	if a, ok := r.of(c); ok {
		switch {
		case a.event.Kind == ReplayCreate && a.from.is(parent, name):
			return unix.ENOENT
		case a.event.Kind == ReplayDelete && a.from.is(parent, name):
			r.gone(c, &a, out)
			return fsbackend.OK
		case a.event.Kind == ReplayRename && a.from.is(parent, name):
			return r.lookupMoved(c, &a, out)
		case a.event.Kind == ReplayRename && a.to.is(parent, name):
			return r.lookupReplaced(c, &a, out)
		}
	}
	errno := r.share.lookUp(c, parent, name, out)
	if errno == fsbackend.OK && out.NodeId != 0 {
		r.learn(parent, name, out)
		r.notOwn(parent, name, out.NodeId)
	}
	return errno
}

// gone answers with what the event's name was: the node that the guest knows, so that who watches that hears of it, or else
// something of the right type.
func (r *replay) gone(c *fsbackend.Context, a *armed, out *fuseproto.EntryOut) {
	if i, ok := r.knows(a.from, 0); ok && r.lend(c, i, out) {
		return
	}
	number := ghostBase | (1+r.ghosts.Add(1))&numberMask
	mode := uint32(unix.S_IFREG | 0o644)
	if a.event.Dir {
		mode = unix.S_IFDIR | 0o755
	}
	r.standIn(c, identity{node: number, ino: number, mode: mode}, out)
}

// standIn answers with a node that there may be nothing behind.
func (r *replay) standIn(c *fsbackend.Context, i identity, out *fuseproto.EntryOut) {
	*out = fuseproto.EntryOut{NodeId: i.node, Generation: i.generation, EntryValidNsec: 1, AttrValidNsec: 1}
	out.Ino, out.Mode, out.Nlink, out.Blksize = i.ino, i.mode, 1, 4096
	out.Uid, out.Gid = c.Caller.Uid, c.Caller.Gid // who asks may remove it from any directory of its own
}

// lend answers with a node that the guest knows, and owes its backend the lookup.
func (r *replay) lend(c *fsbackend.Context, i identity, out *fuseproto.EntryOut) bool {
	r.mu.Lock()
	if r.nodes[i.node] == nil || len(r.owed) >= maxOwed && r.owed[i.node] == 0 {
		r.mu.Unlock()
		return false
	}
	r.owed[i.node]++
	r.owedCount.Store(int32(len(r.owed)))
	r.mu.Unlock()
	r.standIn(c, i, out)
	var attr fuseproto.AttrOut
	in := fuseproto.GetattrIn{InHeader: fuseproto.InHeader{NodeId: i.node, Caller: c.Caller}}
	if r.share.getattr(c, &in, &attr) == fsbackend.OK && attr.Mode&unix.S_IFMT == i.mode&unix.S_IFMT {
		out.Attr = attr.Attr
		out.Nlink++ // the guest takes one away for the name, and what remains must be right
	}
	return true
}

// lookupMoved answers with what has been renamed.
func (r *replay) lookupMoved(c *fsbackend.Context, a *armed, out *fuseproto.EntryOut) Errno {
	if a.to.parent != 0 {
		errno := r.share.lookUp(c, a.to.parent, fsbackend.MakeName(a.to.name), out)
		if errno == fsbackend.OK && out.NodeId != 0 {
			out.EntryValid, out.EntryValidNsec = 0, 1
			return fsbackend.OK
		}
		if errno != fsbackend.OK && errno != unix.ENOENT {
			return errno
		}
	}
	r.gone(c, a, out)
	return fsbackend.OK
}

// lookupReplaced answers with what was there before the rename, as far as the guest knows. The renamed file itself may be what it
// has found there since: then a rename would be from a file to itself, of which the guest's kernel tells nobody.
func (r *replay) lookupReplaced(c *fsbackend.Context, a *armed, out *fuseproto.EntryOut) Errno {
	errno := r.share.lookUp(c, a.to.parent, fsbackend.MakeName(a.to.name), out)
	if errno != fsbackend.OK && errno != unix.ENOENT {
		return errno
	}
	moved := out.NodeId
	if moved != 0 {
		r.share.forget(moved, 1)
	}
	*out = fuseproto.EntryOut{}
	if i, ok := r.knows(a.to, moved); ok && r.lend(c, i, out) {
		return fsbackend.OK
	}
	return unix.ENOENT
}

// make answers what makes name in the directory parent.
func (r *replay) make(c *fsbackend.Context, parent uint64, name fsbackend.Name, typ uint32, out *fuseproto.EntryOut) (errno Errno, ok bool) {
	a, ok := r.change(c)
	if !ok {
		return 0, false
	}
	return r.made(c, &a, parent, name, typ, out), true
}

// made answers with the file of that type that the host has made.
func (r *replay) made(c *fsbackend.Context, a *armed, parent uint64, name fsbackend.Name, typ uint32, out *fuseproto.EntryOut) Errno {
	if a.event.Kind != ReplayCreate || !a.from.is(parent, name) {
		return ReplayRefused
	}
	errno := r.share.lookUp(c, parent, name, out)
	switch {
	case errno != fsbackend.OK:
		return errno
	case out.NodeId == 0:
		return unix.ENOENT
	case out.Mode&unix.S_IFMT != typ&unix.S_IFMT:
		r.share.forget(out.NodeId, 1)
		*out = fuseproto.EntryOut{}
		return ReplayRefused
	}
	r.learn(parent, name, out)
	r.notOwn(parent, name, out.NodeId)
	r.done(c, a)
	return fsbackend.OK
}

// create is CREATE. A guest that writes back its cache does so through any handle for writing: there none may be dead.
func (r *replay) create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) (errno Errno, ok bool) {
	a, ok := r.change(c)
	switch {
	case !ok:
		return 0, false
	case in.Flags&unix.O_EXCL == 0 || r.share.writeback.Load():
		return ReplayRefused, true
	}
	if errno = r.made(c, &a, in.NodeId, name, unix.S_IFREG, &out.EntryOut); errno == fsbackend.OK {
		out.Fh = deadHandle
	}
	return errno, true
}

// mknod is MKNOD.
func (r *replay) mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) (errno Errno, ok bool) {
	typ := in.Mode & unix.S_IFMT
	if typ == 0 {
		typ = unix.S_IFREG
	}
	return r.make(c, in.NodeId, name, typ, out)
}

// open is OPEN: for writing, a caller with an event armed gets a handle through which it cannot.
func (r *replay) open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) (errno Errno, ok bool) {
	if !fsbackend.OpensForWriting(in.Flags) {
		return 0, false
	}
	a, ok := r.change(c)
	switch {
	case !ok:
		return 0, false
	case !a.touches() || r.share.writeback.Load() || in.Flags&unix.O_TRUNC != 0:
		return ReplayRefused, true
	}
	p, errno := r.share.at(c, in.NodeId)
	if errno != fsbackend.OK {
		return errno, true
	}
	p.done()
	out.Fh = deadHandle
	return fsbackend.OK, true
}

// touches says that a is about a file and not about its name.
func (a *armed) touches() bool {
	return a.event.Kind == ReplayModify || a.event.Kind == ReplayAttrib || a.event.Kind == ReplayRescan
}

// remove is UNLINK and RMDIR.
func (r *replay) remove(c *fsbackend.Context, parent uint64, name fsbackend.Name) (errno Errno, ok bool) {
	a, ok := r.change(c)
	switch {
	case !ok:
		return 0, false
	case a.event.Kind != ReplayDelete || !a.from.is(parent, name):
		return ReplayRefused, true
	}
	r.moved(a.from, place{})
	r.done(c, &a)
	return fsbackend.OK, true
}

// rename is RENAME.
func (r *replay) rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) (errno Errno, ok bool) {
	a, ok := r.change(c)
	switch {
	case !ok:
		return 0, false
	case a.event.Kind != ReplayRename || in.Flags != 0 || !a.from.is(in.NodeId, oldName) || !a.to.is(in.Newdir, newName):
		return ReplayRefused, true
	}
	r.moved(a.from, a.to)
	r.done(c, &a)
	return fsbackend.OK, true
}

// setattr is SETATTR: the answer is what the attributes are, whatever they should become.
func (r *replay) setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) (errno Errno, ok bool) {
	a, ok := r.change(c)
	switch {
	case !ok:
		return 0, false
	case !a.touches():
		return ReplayRefused, true
	}
	errno = r.share.getattr(c, &fuseproto.GetattrIn{InHeader: in.InHeader}, out)
	if errno == fsbackend.OK && a.event.Kind != ReplayRescan {
		r.done(c, &a)
	}
	return errno, true
}

// getattr is GETATTR. A guest drops what it has cached of a file when the time of its last change is another, which two changes
// within one tick of the host's clock do not see to. So it is told of another one; the SETATTR that follows sets it right.
func (r *replay) getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno {
	errno := r.share.getattr(c, in, out)
	if errno != fsbackend.OK || out.Mode&unix.S_IFMT != unix.S_IFREG {
		return errno
	}
	if a, ok := r.of(c); ok && (a.event.Kind == ReplayModify || a.event.Kind == ReplayRescan) {
		out.Mtimensec = uint32((uint64(out.Mtimensec) + 1 + a.event.ID%1000) % 1e9)
		out.AttrValid, out.AttrValidNsec = 0, 1
	}
	return errno
}

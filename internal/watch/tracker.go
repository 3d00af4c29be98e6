package watch

import (
	"container/list"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/sluicefs/sluice/internal/ratelog"
	"golang.org/x/sys/unix"
)

const (
	// createBound and modifyBound are after how long a file that is written to without a pause is told of all the same.
	createBound = 10 * time.Second
	modifyBound = time.Second
	// moveHold is how long the first half of a rename waits for the second, which the kernel queues right after it.
	moveHold  = 10 * time.Millisecond
	maxMoves  = 64
	maxDoubts = 1024
	// readsToDoubt is after how many reads doubts are looked into even if the kernel's queue never is empty.
	readsToDoubt = 64
	// doubtAgain is after how long a doubt is looked into again that was put off, and maxDoubtTries how often.
	doubtAgain    = 10 * time.Millisecond
	maxDoubtTries = 50
	// recordRate and recordBurst bound what a tree costs in which somebody does nothing but make events; who makes more loses
	// some, and causes a Rescan.
	recordRate  = 50_000 // a second
	recordBurst = 200_000
	// The tree is looked at again at the earliest after minRetry; each time that this comes soon after the last, and while there
	// is no tree, the wait doubles; and it is at least 10 times as long as that took.
	minRetry, maxRetry, maxCostly = 20 * time.Millisecond, time.Second, 30 * time.Second
	calm                          = 10 * time.Second
)

// tracker turns records into events. It keeps what the reader knows of the tree, so that the reader is told neither twice nor of
// what it does not know. One goroutine uses it.
type tracker struct {
	cfg     *Config
	stats   *counters
	queue   *queue
	log     *ratelog.Logger
	newSrc  func() (source, error)
	ctx     context.Context // of run
	root    *node
	rootFD  int // O_PATH; -1
	wds     map[int32]*node
	above   int32 // watch of the directory that the tree has its name in; -1
	bytes   int64
	moves   []*move
	writing list.List         // of *writing, by due
	created []*writing        // those to be told as Create, and some that no longer are
	doubts  map[place]int     // how often it was put off
	lost    bool              // close has to be called: some of this is wrong
	limited [len(limits)]bool // limits that have been told

	tokens   float64
	tokensAt time.Time
	retryAt  time.Time // if src is nil
	wait     time.Duration
	openedAt time.Time

	// srcMu orders setting a deadline and interrupting.
	srcMu sync.Mutex
	src   source // nil: the tree has to be looked at again
}

// place is a name in a directory.
type place struct {
	dir  *node
	name string
}

// move is the first half of a rename, IN_MOVED_FROM.
type move struct {
	place
	cookie uint32
	entry  *entry
	due    time.Time
}

type limit int

const (
	maxFiles limit = iota
	maxBytes
	maxWatches
	maxKernel
	maxPath
	noAccess
)

// limits are what is said when they are reached for the first time.
var limits = [...]string{
	maxFiles:   "the tree has more files than its limit: those beyond it are served, but no events are sent for them",
	maxBytes:   "the tree has more bytes than its limit: files beyond it are served, but no events are sent for them",
	maxWatches: "the tree has more directories than its limit of watches: no events are sent for files in those beyond it",
	maxKernel:  "the kernel gives this user no more inotify watches: no events are sent for files in the directories that are left; raise the sysctl fs.inotify.max_user_watches",
	maxPath:    "the tree is deeper than a path can say: no events are sent for what is below",
	noAccess:   "a directory cannot be watched: no events are sent for the files in it",
}

func newTracker(cfg *Config, stats *counters, q *queue, log *ratelog.Logger, newSrc func() (source, error)) *tracker {
	return &tracker{
		cfg: cfg, stats: stats, queue: q, log: log, newSrc: newSrc, ctx: context.Background(),
		rootFD: -1, wait: minRetry, tokens: recordBurst, tokensAt: time.Now(),
	}
}

// open looks at the whole tree without telling of it.
func (t *tracker) open(ctx context.Context) error {
	t.ctx = ctx
	t.close()
	begun := time.Now()
	src, err := t.newSrc()
	if err != nil {
		return err
	}
	t.srcMu.Lock()
	t.src = src
	t.srcMu.Unlock()
	t.watchAbove()
	if t.rootFD, err = unix.Open(t.cfg.Dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		t.close()
		return err
	}
	t.root = &node{wd: -1}
	t.wds = make(map[int32]*node)
	t.bytes = 0
	t.doubts = make(map[place]int)
	t.limited = [len(limits)]bool{}
	t.grow(t.root, false)
	if t.root.wd < 0 {
		t.close()
		return errors.New("the directory cannot be watched")
	}
	t.openedAt = time.Now()
	t.wait = min(max(t.wait, 10*t.openedAt.Sub(begun)), maxCostly)
	return nil
}

// watchAbove watches the name of the tree. That the tree itself is removed the kernel does not say while somebody has it open,
// as who serves it has.
func (t *tracker) watchAbove() {
	t.above = -1
	path := filepath.Clean(t.cfg.Dir)
	if filepath.Dir(path) == path {
		return
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if wd, err := t.src.watch(fd, aboveMask); err == nil {
		t.above = wd
	}
}

// close lets go of the tree and of what is known of it.
func (t *tracker) close() {
	t.srcMu.Lock()
	if t.src != nil {
		_ = t.src.close()
	}
	t.src = nil
	t.srcMu.Unlock()
	t.lost = false
	if t.rootFD >= 0 {
		unix.Close(t.rootFD)
		t.rootFD = -1
	}
	for e := t.writing.Front(); e != nil; e = e.Next() {
		if w := e.Value.(*writing); w.held != nil {
			t.queue.release(w.held)
		}
	}
	t.writing.Init()
	t.root, t.wds, t.moves, t.created, t.doubts = nil, nil, nil, nil, nil
	t.stats.watches.Store(0)
	t.stats.files.Store(0)
}

// lose gives up what is known of the tree: run will let go of it, and look at it again later.
func (t *tracker) lose() { t.lost = true }

// letGo is what comes of lose.
func (t *tracker) letGo() {
	t.close()
	now := time.Now()
	if now.Sub(t.openedAt) > calm {
		t.wait = minRetry
	}
	t.retryAt = now.Add(t.wait)
	t.wait = max(t.wait, min(2*t.wait, maxRetry))
}

func (t *tracker) run(ctx context.Context) {
	t.ctx = ctx
	defer t.close()
	defer context.AfterFunc(ctx, func() {
		t.srcMu.Lock()
		defer t.srcMu.Unlock()
		if t.src != nil {
			_ = t.src.setDeadline(time.Unix(1, 0))
		}
	})()
	buf := make([]byte, 64<<10)
	for reads := 1; ctx.Err() == nil; reads++ {
		if t.lost {
			t.letGo()
		}
		if t.src == nil {
			t.sleep(time.Until(t.retryAt))
			if ctx.Err() != nil {
				return
			}
			if err := t.open(ctx); err != nil {
				t.log.Warn("cannot watch a directory; it is tried again", "dir", t.cfg.Dir, "error", err)
				t.openedAt = time.Now()
				t.letGo()
				continue
			}
			t.queue.rescan("/")
			continue
		}
		now := time.Now()
		t.expire(now)
		pending := t.src.pending()
		if len(t.doubts) > 0 && (!pending || reads%readsToDoubt == 0) {
			t.settleDoubts()
			if len(t.doubts) == 0 || t.lost || t.src.pending() {
				continue
			}
		}
		var deadline time.Time
		if !pending {
			deadline = t.due()
		}
		if soon := now.Add(doubtAgain); len(t.doubts) > 0 && (deadline.IsZero() || soon.Before(deadline)) {
			deadline = soon
		}
		n, err := t.read(buf, deadline)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		records := 0
		for b := buf[:max(n, 0)]; err == nil && len(b) > 0 && !t.lost; records++ {
			var r record
			if r, b, err = parse(b); err == nil {
				t.handle(r, time.Now())
			}
		}
		if err != nil {
			t.log.Warn("reading file events failed; the tree is looked at again", "dir", t.cfg.Dir, "error", err)
			t.lose()
		}
		t.pace(records)
	}
}

func (t *tracker) read(buf []byte, deadline time.Time) (int, error) {
	t.srcMu.Lock()
	var err error
	if t.ctx.Err() != nil {
		err = os.ErrDeadlineExceeded
	} else {
		err = t.src.setDeadline(deadline)
	}
	t.srcMu.Unlock()
	if err != nil {
		return 0, err
	}
	return t.src.read(buf)
}

func (t *tracker) sleep(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-t.ctx.Done():
	case <-timer.C:
	}
}

// pace waits when there are too many records.
func (t *tracker) pace(records int) {
	now := time.Now()
	t.tokens = min(recordBurst, t.tokens+now.Sub(t.tokensAt).Seconds()*recordRate) - float64(records)
	t.tokensAt = now
	if t.tokens < 0 {
		t.sleep(time.Duration(-t.tokens / recordRate * float64(time.Second)))
	}
}

// due is when expire has something to do; zero is never.
func (t *tracker) due() time.Time {
	var due time.Time
	if e := t.writing.Front(); e != nil {
		due = e.Value.(*writing).due
	}
	if len(t.moves) > 0 && (due.IsZero() || t.moves[0].due.Before(due)) {
		due = t.moves[0].due
	}
	return due
}

func (t *tracker) expire(now time.Time) {
	for len(t.moves) > 0 && !now.Before(t.moves[0].due) {
		t.endMove(0)
	}
	for e := t.writing.Front(); e != nil && !now.Before(e.Value.(*writing).due); e = t.writing.Front() {
		t.complete(e.Value.(*writing))
	}
}

func (t *tracker) handle(r record, now time.Time) {
	if r.mask&unix.IN_Q_OVERFLOW != 0 {
		t.stats.overflows.Add(1)
		t.log.Warn("file events came faster than they could be read; the tree is looked at again", "dir", t.cfg.Dir)
		t.lose()
		return
	}
	if r.wd == t.above && r.name == filepath.Base(t.cfg.Dir) {
		t.queue.rescan("/")
		t.lose()
		return
	}
	n := t.wds[r.wd]
	if n == nil {
		return
	}
	if r.name == "" {
		t.handleSelf(n, r.mask)
		return
	}
	if t.cfg.File != "" && r.name != t.cfg.File {
		return
	}
	t.endMoveFrom(place{n, r.name})
	e := n.entries[r.name]
	switch {
	case r.mask&unix.IN_CREATE != 0:
		t.create(n, r.name, r.mask&unix.IN_ISDIR != 0, now)
	case r.mask&unix.IN_MOVED_FROM != 0:
		if e != nil {
			t.moveFrom(&move{place: place{n, r.name}, cookie: r.cookie, entry: e, due: now.Add(moveHold)})
		} else {
			t.goneUnknown(n, r.name, r.mask&unix.IN_ISDIR != 0)
		}
	case r.mask&unix.IN_MOVED_TO != 0:
		t.moveTo(place{n, r.name}, r, now)
	case r.mask&unix.IN_DELETE != 0:
		if e != nil {
			t.remove(n, r.name)
		} else {
			t.goneUnknown(n, r.name, r.mask&unix.IN_ISDIR != 0)
		}
	case e == nil:
		t.promote(n, r.name, now)
	case r.mask&unix.IN_MODIFY != 0:
		t.wrote(n, r.name, e, now)
	case r.mask&unix.IN_CLOSE_WRITE != 0:
		if e.writing != nil {
			t.complete(e.writing)
		}
	case r.mask&unix.IN_ATTRIB != 0:
		if e.writing == nil || !e.writing.create {
			if path, ok := n.path(r.name); ok {
				t.queue.change(Attrib, path, e.typ == directory)
			}
		}
	}
}

// handleSelf is about a directory that is watched; its parent tells the rest.
func (t *tracker) handleSelf(n *node, mask uint32) {
	switch {
	case n == t.root && mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_UNMOUNT|unix.IN_IGNORED) != 0:
		t.queue.rescan("/")
		t.lose()
	case mask&unix.IN_IGNORED != 0:
		t.forget(n)
		t.doubt(n.parent, n.name)
	case n == t.root && mask&unix.IN_ATTRIB != 0 && t.cfg.File == "":
		t.queue.change(Attrib, "/", true)
	}
}

// create is IN_CREATE.
func (t *tracker) create(n *node, name string, dir bool, now time.Time) {
	e := n.entries[name]
	if e == nil {
		if !t.discover(n, name, true, false, now) {
			t.assume(n, name, dir, true, now)
		}
		return
	}
	// It was found when the directory was listed, and has been told already; if it is another one by now, more is to come.
	path, ok := n.path(name)
	if !ok {
		return
	}
	if st, err := statBeneath(t.rootFD, path); err == nil && (typeOf(st.Mode) != e.typ || e.typ == directory && !e.watches(&st)) {
		t.doubt(n, name)
	}
}

// discover tells of what is at a place that the reader knows nothing of (fresh), or something else; settled says that its content
// is complete. It returns false if there is nothing.
func (t *tracker) discover(n *node, name string, fresh, settled bool, now time.Time) bool {
	path, ok := n.path(name)
	if !ok {
		t.beyond(maxPath, n, "", true)
		return true
	}
	st, err := statBeneath(t.rootFD, path)
	if err != nil {
		return false
	}
	t.found(n, name, path, &st, fresh, settled, now)
	return true
}

// found tells of what st has found at a place, as discover. It does not look again: if that is gone by now, the event that says so needs the
// entry.
func (t *tracker) found(n *node, name, path string, st *unix.Stat_t, fresh, settled bool, now time.Time) {
	e := t.admit(n, name, typeOf(st.Mode), st.Size)
	if e == nil {
		return
	}
	if e.typ == regular && !settled && st.Nlink == 1 {
		t.begin(n, name, e, true, fresh, now)
		return
	}
	t.queue.create(path, e.typ == directory, fresh)
	if e.typ == directory {
		t.watch(n, name, e, true)
	}
}

// assume tells of what has been at a place, but no longer is: it, or a directory that it is in, has been renamed since, or it is
// gone. The events that say so are still to come, and mean nothing without this one.
func (t *tracker) assume(n *node, name string, dir, fresh bool, now time.Time) {
	typ := regular
	if dir {
		typ = directory
	}
	e := t.admit(n, name, typ, 0)
	switch path, ok := n.path(name); {
	case e == nil || !ok:
	case dir:
		t.queue.create(path, true, fresh)
		t.doubt(n, name)
	default:
		t.begin(n, name, e, true, fresh, now)
	}
}

// admit makes an entry, or nil if it is beyond a limit.
func (t *tracker) admit(n *node, name string, typ fileType, size int64) *entry {
	if t.stats.files.Load() >= int64(t.cfg.MaxFiles) {
		t.beyond(maxFiles, n, name, typ == directory)
		return nil
	}
	e := &entry{typ: typ}
	if t.cfg.MaxBytes > 0 && typ == regular {
		if t.bytes+size > t.cfg.MaxBytes {
			t.beyond(maxBytes, n, name, false)
			return nil
		}
		e.size = size
		t.bytes += size
	}
	if n.entries == nil {
		n.entries = make(map[string]*entry)
	}
	n.entries[name] = e
	t.stats.files.Add(1)
	return e
}

// promote tells of a change of what the reader is not told of: that may be because of a limit, and there may be room by now.
func (t *tracker) promote(n *node, name string, now time.Time) {
	if t.stats.files.Load() >= int64(t.cfg.MaxFiles) {
		t.beyond(maxFiles, n, name, false)
		return
	}
	if !t.limited[maxFiles] && !t.limited[maxBytes] {
		t.discover(n, name, false, false, now)
		return
	}
	path, ok := n.path(name)
	if !ok {
		t.beyond(maxPath, n, "", true)
		return
	}
	st, err := statBeneath(t.rootFD, path)
	if err != nil {
		return
	}
	e := t.admit(n, name, typeOf(st.Mode), st.Size)
	switch {
	case e == nil:
	case e.typ == directory:
		t.watch(n, name, e, false)
		t.queue.rescan(path)
	default:
		t.begin(n, name, e, false, false, now)
	}
}

// beyond says that a limit keeps a change from being told.
func (t *tracker) beyond(l limit, n *node, name string, dir bool) {
	t.stats.limited.Add(1)
	if t.limited[l] {
		return
	}
	t.limited[l] = true
	path, ok := n.path(name)
	for ; !ok; path, ok = n.path("") {
		n, dir = n.parent, true
	}
	t.queue.limit(path, dir)
	t.log.Warn(limits[l], "dir", t.cfg.Dir, "first", path)
}

// begin notes that a file's content is not complete.
func (t *tracker) begin(n *node, name string, e *entry, create, fresh bool, now time.Time) {
	w := &writing{entry: e, dir: n, name: name, create: create, fresh: fresh, since: now, due: now.Add(t.cfg.Settle)}
	w.elem = t.writing.PushBack(w)
	e.writing = w
	if create {
		if len(t.created) > 2*t.writing.Len()+64 {
			t.created = slices.DeleteFunc(t.created, func(w *writing) bool { return w.entry.writing != w })
		}
		t.created = append(t.created, w)
	}
}

// wrote is IN_MODIFY.
func (t *tracker) wrote(n *node, name string, e *entry, now time.Time) {
	w := e.writing
	if w == nil {
		t.begin(n, name, e, false, false, now)
		return
	}
	bound := modifyBound
	if w.create {
		bound = createBound
	}
	if now.Sub(w.since) > bound {
		t.complete(w)
		return
	}
	w.due = now.Add(t.cfg.Settle)
	t.writing.MoveToBack(w.elem)
}

// complete tells of a file that has been written.
func (t *tracker) complete(w *writing) {
	t.settle(w)
	path, ok := w.dir.path(w.name)
	if !ok {
		t.beyond(maxPath, w.dir, "", true)
		return
	}
	if t.cfg.MaxBytes > 0 {
		if st, err := statBeneath(t.rootFD, path); err == nil && typeOf(st.Mode) == regular {
			if t.bytes-w.entry.size+st.Size > t.cfg.MaxBytes {
				delete(w.dir.entries, w.name)
				t.drop(w.entry)
				t.beyond(maxBytes, w.dir, w.name, false)
				return
			}
			t.bytes += st.Size - w.entry.size
			w.entry.size = st.Size
		}
	}
	switch {
	case w.held != nil && t.queue.release(w.held):
	case w.create && w.held == nil:
		t.queue.create(path, false, w.fresh)
	default:
		t.queue.change(Modify, path, false)
	}
}

// settle ends a writing.
func (t *tracker) settle(w *writing) {
	t.writing.Remove(w.elem)
	w.entry.writing = nil
}

// remove tells that an entry is gone.
func (t *tracker) remove(n *node, name string) {
	e := n.entries[name]
	delete(n.entries, name)
	t.gone(place{n, name}, e)
}

// gone tells that e is, which is no entry of its directory any more.
func (t *tracker) gone(p place, e *entry) {
	path, ok := p.dir.path(p.name)
	secret := e.writing != nil && e.writing.create && e.writing.fresh && e.writing.held == nil
	t.drop(e)
	if ok {
		t.queue.remove(path, e.typ == directory, secret)
	}
}

// goneUnknown tells that what has never been told of is gone: a reader that has looked at the directory may know it.
func (t *tracker) goneUnknown(n *node, name string, dir bool) {
	if path, ok := n.path(name); ok {
		t.queue.remove(path, dir, true)
	}
}

// drop forgets an entry that is no entry of its directory any more, and everything below it.
func (t *tracker) drop(e *entry) {
	t.stats.files.Add(-1)
	t.limited[maxFiles] = t.limited[maxFiles] && t.stats.files.Load() >= int64(t.cfg.MaxFiles)
	t.bytes -= e.size
	if w := e.writing; w != nil {
		t.settle(w)
		if w.held != nil {
			t.queue.release(w.held)
		}
	}
	if e.dir != nil {
		t.prune(e.dir)
		e.dir = nil
	}
}

// prune forgets a directory's watch and everything below it.
func (t *tracker) prune(n *node) {
	// What left it did so before; later its path may be that of another.
	for i := len(t.moves) - 1; i >= 0; i-- {
		if i < len(t.moves) && t.moves[i].dir == n {
			t.endMove(i)
		}
	}
	if n.wd >= 0 {
		t.src.unwatch(n.wd)
		t.forget(n)
	}
	for _, e := range n.entries {
		t.drop(e)
	}
	n.entries = nil
}

// forget notes that a directory is not watched.
func (t *tracker) forget(n *node) {
	delete(t.wds, n.wd)
	n.wd = -1
	t.stats.watches.Store(int64(len(t.wds)))
}

func (t *tracker) moveFrom(m *move) {
	delete(m.dir.entries, m.name)
	t.moves = append(t.moves, m)
	// Nothing else in this directory is of interest, so there is no second half.
	if t.cfg.File != "" || len(t.moves) > maxMoves {
		t.endMove(0)
	}
}

// endMove tells of a move without a second half, which is one out of the tree.
func (t *tracker) endMove(i int) {
	m := t.moves[i]
	t.moves = slices.Delete(t.moves, i, i+1)
	t.gone(m.place, m.entry)
	// It may have been exchanged for another, from a place that is not watched.
	t.doubt(m.dir, m.name)
}

// endMoveFrom is called before something happens at p: what left it did so before.
func (t *tracker) endMoveFrom(p place) {
	if i := slices.IndexFunc(t.moves, func(m *move) bool { return m.place == p }); i >= 0 {
		t.endMove(i)
	}
}

// moveTo is IN_MOVED_TO.
func (t *tracker) moveTo(to place, r record, now time.Time) {
	old := to.dir.entries[to.name]
	i := slices.IndexFunc(t.moves, func(m *move) bool { return m.cookie == r.cookie })
	if i < 0 {
		// From outside, or from where it was not told of.
		if old != nil {
			delete(to.dir.entries, to.name)
			t.drop(old)
		}
		if !t.discover(to.dir, to.name, old == nil, true, now) {
			t.assume(to.dir, to.name, r.mask&unix.IN_ISDIR != 0, old == nil, now)
		}
		return
	}
	m := t.moves[i]
	t.moves = slices.Delete(t.moves, i, i+1)
	if m.entry.dir != nil && to.dir.below(m.entry.dir) {
		// What is known of the tree is wrong: nothing moves into itself.
		t.lose()
		return
	}
	from, ok1 := m.dir.path(m.name)
	path, ok2 := to.dir.path(to.name)
	if !ok1 || !ok2 {
		t.gone(m.place, m.entry)
		if old == nil && !ok2 {
			t.beyond(maxPath, to.dir, "", true)
		}
		t.doubt(to.dir, to.name)
		return
	}
	e := m.entry
	if st, err := statBeneath(t.rootFD, path); err == nil && e.writing != nil && typeOf(st.Mode) == other {
		// It was only assumed to be a file.
		e.typ = other
		t.complete(e.writing)
	}
	t.holdCreates(now)
	if e.typ == directory && !e.watched() && old != nil && old.watched() {
		// It was found at its new place, and told of there, before the rename was read.
		t.gone(m.place, e)
		return
	}
	if old != nil {
		t.drop(old)
	}
	if to.dir.entries == nil {
		to.dir.entries = make(map[string]*entry)
	}
	to.dir.entries[to.name] = e
	if e.dir != nil {
		e.dir.parent, e.dir.name = to.dir, to.name
	}
	if e.writing != nil {
		e.writing.dir, e.writing.name = to.dir, to.name
	}
	if e.typ == directory && !e.watched() {
		t.doubt(to.dir, to.name)
	}
	t.queue.rename(from, path, e.typ == directory, now)
	if (r.mask&unix.IN_ISDIR != 0) != (e.typ == directory) {
		// It was exchanged before for one that is a directory, or is not.
		t.doubt(to.dir, to.name)
	}
	// Two that were exchanged are told as two renames, and what is at the first place now is in neither.
	if _, err := statBeneath(t.rootFD, from); err == nil {
		t.doubt(m.dir, m.name)
		t.doubt(to.dir, to.name)
	}
}

// holdCreates puts the files that are being written into the queue, for a rename to wait for.
func (t *tracker) holdCreates(now time.Time) {
	for _, w := range t.created {
		if path, ok := w.dir.path(w.name); ok && w.entry.writing == w && w.held == nil {
			w.held = t.queue.hold(path, w.fresh, now)
		}
	}
	t.created = t.created[:0]
}

// doubt has a place looked at when the kernel's queue is empty: what is known of it may be wrong.
func (t *tracker) doubt(dir *node, name string) {
	if len(t.doubts) >= maxDoubts {
		t.lose()
		return
	}
	t.doubts[place{dir, name}] = 0
}

func (t *tracker) settleDoubts() {
	doubts := t.doubts
	t.doubts = make(map[place]int)
	for p, tries := range doubts {
		if t.lost {
			return
		}
		t.settleDoubt(p, tries)
	}
}

// misplaced says that a directory is no longer where it is known to be: events that say so are yet to be read.
func (t *tracker) misplaced(dir *node) bool {
	if dir.parent == nil {
		return false
	}
	path, ok := dir.path("")
	if !ok {
		return false
	}
	st, err := statBeneath(t.rootFD, path)
	return err != nil || identityOf(&st) != dir.id
}

func (t *tracker) settleDoubt(p place, tries int) {
	if t.wds[p.dir.wd] != p.dir {
		return
	}
	path, ok := p.dir.path(p.name)
	if !ok {
		return
	}
	t.endMoveFrom(p)
	e := p.dir.entries[p.name]
	st, err := statBeneath(t.rootFD, path)
	if tries < maxDoubtTries && t.misplaced(p.dir) {
		t.doubts[p] = tries + 1 // what was found, or not, is not the directory's
		return
	}
	switch {
	case err != nil && e != nil:
		t.remove(p.dir, p.name)
	case err != nil:
		t.goneUnknown(p.dir, p.name, true)
	case e == nil:
		t.found(p.dir, p.name, path, &st, false, true, time.Now())
	case e.typ != typeOf(st.Mode):
		delete(p.dir.entries, p.name)
		t.drop(e)
		t.found(p.dir, p.name, path, &st, false, true, time.Now())
	case e.typ == directory && !e.watches(&st):
		if e.dir != nil {
			t.prune(e.dir)
		}
		t.watch(p.dir, p.name, e, false)
		t.queue.rescan(path)
	}
}

func (e *entry) watched() bool { return e.dir != nil && e.dir.wd >= 0 }

// watches says that it is this directory that is watched.
func (e *entry) watches(st *unix.Stat_t) bool { return e.watched() && e.dir.id == identityOf(st) }

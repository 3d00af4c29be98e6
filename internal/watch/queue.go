package watch

import (
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// maxQueue is how many events wait for a reader; more are gathered into a Rescan.
	maxQueue = 4096
	// holdRename is how long a rename waits for files that are being written: one that makes a finished tree visible under
	// its name, as kubelet's atomic writer does, must not come before its files, and one of an unrelated file not much later.
	holdRename = 200 * time.Millisecond
	// recentRescan is how long it may take a reader to look at what a Rescan named, and the tracker to read what had happened there before.
	// Until then the reader may know more than it was told, and not take a name for what the tracker does.
	recentRescan = 10 * time.Second
	maxRecent    = 64
	// maxRescans is how many Rescans wait; more become one.
	maxRescans = 64
)

// item is an event that waits.
type item struct {
	Event
	fresh bool      // Create of what the reader does not know
	until time.Time // not before, unless ready; zero is at once
	ready bool
	gone  bool   // sent, or no longer to be sent
	gen   uint64 // of the queue, when it came
}

// queue holds events in the host's order, joins those that say the same, and is never longer than maxQueue.
type queue struct {
	wake chan struct{} // has a token when next may answer otherwise than before

	mu    sync.Mutex
	items []*item
	// gen changes when paths change their meaning: nothing is joined across a rename, or a Create that replaces.
	gen     uint64
	last    map[string]*item // the last Create, Modify or Attrib of a path, if it waits
	rescans []*item          // those that wait
	recent  []sentRescan
}

type sentRescan struct {
	path string
	at   time.Time
}

func newQueue() *queue {
	return &queue{wake: make(chan struct{}, 1), last: make(map[string]*item)}
}

// next takes the first event, or says how long to wait for it: 0 is until wake.
func (q *queue) next(now time.Time) (Event, time.Duration, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.items) > 0 {
		it := q.items[0]
		if it.gone {
			q.pop()
			continue
		}
		if wait := it.until.Sub(now); !it.ready && wait > 0 {
			return Event{}, wait, false
		}
		q.pop()
		q.forget(it)
		if it.Kind == Rescan {
			q.remember(it.Path, now)
		}
		return it.Event, 0, true
	}
	return Event{}, 0, false
}

func (q *queue) pop() {
	q.items[0] = nil
	q.items = q.items[1:]
}

// forget takes an item out of every table; it stays in items until its turn comes.
func (q *queue) forget(it *item) {
	it.gone = true
	if q.last[it.Path] == it {
		delete(q.last, it.Path)
	}
	if it.Kind == Rescan {
		for i, r := range q.rescans {
			if r == it {
				q.rescans = append(q.rescans[:i], q.rescans[i+1:]...)
				break
			}
		}
	}
}

// trim takes off the end what is gone.
func (q *queue) trim() {
	for n := len(q.items); n > 0 && q.items[n-1].gone; n-- {
		q.items[n-1] = nil
		q.items = q.items[:n-1]
	}
}

func (q *queue) remember(path string, now time.Time) {
	q.recent = slices.DeleteFunc(q.recent, func(r sentRescan) bool { return within(path, r.path) || now.Sub(r.at) >= recentRescan })
	if len(q.recent) == maxRecent {
		q.recent[1].path = ancestor(q.recent[0].path, q.recent[1].path)
		q.recent = q.recent[1:]
	}
	q.recent = append(q.recent, sentRescan{path, now})
}

// create tells of path; fresh says that the reader does not know it.
func (q *queue) create(path string, dir, fresh bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.covered(path) {
		return
	}
	if old := q.waiting(path); old != nil {
		if old.Kind == Create && old.Dir == dir && (fresh || !dir) {
			old.ready = true
			q.signal()
			return
		}
		if old.Kind != Create {
			q.forget(old)
		}
	}
	// A Rescan of path that waits is read before this, so what is told from now on is not in it.
	q.replaced(fresh && !q.rescanned(path))
	q.push(&item{Event: Event{Kind: Create, Path: path, Dir: dir}, fresh: fresh})
}

// replaced is called before a Create: of what the reader knows it takes away what was below. What waits of that says nothing of what is
// there from now on.
func (q *queue) replaced(fresh bool) {
	if !fresh {
		q.gen++
	}
}

// hold tells of a file that is being written before the rename that comes next, and says how to make it ready.
func (q *queue) hold(path string, fresh bool, now time.Time) *item {
	q.mu.Lock()
	defer q.mu.Unlock()
	it := &item{Event: Event{Kind: Create, Path: path}, fresh: fresh, until: now.Add(holdRename)}
	if q.covered(path) {
		it.gone = true
		return it
	}
	q.replaced(fresh)
	q.push(it)
	return it
}

// release makes an item of hold ready; false if it has gone already.
func (q *queue) release(it *item) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	it.ready = true
	q.signal()
	return !it.gone
}

// change tells of a Modify or an Attrib.
func (q *queue) change(kind Kind, path string, dir bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.covered(path) {
		return
	}
	// What waits says it already, or will when it comes to be read.
	if old := q.waiting(path); old != nil && (old.Kind == Create || old.Kind == kind) {
		return
	}
	q.push(&item{Event: Event{Kind: kind, Path: path, Dir: dir}})
}

// remove tells that path is gone; of what the reader knows nothing of, it need not hear that. secret says that it has not been told of path.
func (q *queue) remove(path string, dir, secret bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if dir {
		defer func() { q.gen++ }()
	}
	if q.covered(path) || secret && !q.seen(path) {
		return
	}
	if old := q.waiting(path); old != nil {
		// A directory that was moved away leaves what is told of its content behind, and that means nothing without it.
		parent := dir && old.Kind == Create && q.items[len(q.items)-1] != old
		if !parent {
			q.forget(old)
			q.trim()
		}
		delete(q.last, path)
		if old.Kind == Create && old.fresh && !parent && !q.seen(path) {
			return
		}
	}
	q.push(&item{Event: Event{Kind: Delete, Path: path, Dir: dir}})
}

// seen says that the reader may know path without having been told of it: it has looked, or will look, at what a Rescan names.
func (q *queue) seen(path string) bool {
	for _, r := range q.rescans {
		if within(r.Path, path) {
			return true
		}
	}
	return slices.ContainsFunc(q.recent, func(r sentRescan) bool { return within(r.path, path) && time.Since(r.at) < recentRescan })
}

func (q *queue) rename(from, to string, dir bool, now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.covered(from) && q.covered(to) {
		return
	}
	q.gen++
	q.push(&item{Event: Event{Kind: Rename, Path: from, To: to, Dir: dir}})
	if !dir {
		return
	}
	// What a Rescan names below from is to be found below to by the time that it is looked for; and if the Rescan names where from is, the
	// reader may have found another directory there, which it now takes for to.
	var again []string
	look := func(path string) {
		switch {
		case within(path, from):
			again = append(again, to)
		case within(from, path):
			again = append(again, to+strings.TrimPrefix(path, from))
		}
	}
	for _, r := range q.rescans {
		look(r.Path)
	}
	for _, r := range q.recent {
		if now.Sub(r.at) < recentRescan {
			look(r.path)
		}
	}
	for _, path := range again {
		q.addRescan(path)
	}
}

func (q *queue) rescan(path string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.addRescan(path)
}

func (q *queue) limit(path string, dir bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.push(&item{Event: Event{Kind: Limit, Path: path, Dir: dir}})
}

func (q *queue) addRescan(path string) {
	if q.rescanned(path) {
		return
	}
	it := &item{Event: Event{Kind: Rescan, Path: path, Dir: true}}
	if len(q.rescans) == maxRescans {
		q.gather(it)
		return
	}
	q.push(it)
	if !it.gone {
		q.rescans = append(q.rescans, it)
	}
}

// rescanned says that a Rescan which waits is one of the directory dir.
func (q *queue) rescanned(dir string) bool {
	for _, r := range q.rescans {
		if r.gen == q.gen && within(r.Path, dir) {
			return true
		}
	}
	return false
}

// waiting is the last item of a path that something can be joined to.
func (q *queue) waiting(path string) *item {
	if it := q.last[path]; it != nil && it.gen == q.gen {
		return it
	}
	return nil
}

// covered says that a Rescan which waits will tell what happens to the name path.
func (q *queue) covered(path string) bool { return path != "/" && q.rescanned(parent(path)) }

func (q *queue) push(it *item) {
	it.gen = q.gen
	if len(q.items) == maxQueue {
		q.items = slices.DeleteFunc(q.items, func(i *item) bool { return i.gone })
		// Only if that was worth it, or it would have to be done again for each event.
		if len(q.items) > maxQueue/2 {
			q.gather(it)
			return
		}
	}
	q.items = append(q.items, it)
	switch it.Kind {
	case Create, Modify, Attrib:
		q.last[it.Path] = it
	}
	q.signal()
}

// gather puts one Rescan in the place of all that waits, and of it.
func (q *queue) gather(it *item) {
	var common string
	var limit *item // what it says is in no Rescan
	for _, i := range append(q.items, it) {
		if i.gone {
			continue
		}
		i.gone = true
		dir := parent(i.Path)
		switch i.Kind {
		case Limit:
			limit = &item{Event: i.Event}
			continue
		case Rescan:
			dir = i.Path
		case Rename:
			dir = ancestor(dir, parent(i.To))
		}
		if common == "" {
			common = dir
		}
		common = ancestor(common, dir)
	}
	q.items, q.rescans = nil, nil
	q.last = make(map[string]*item)
	q.gen++
	if common != "" {
		q.addRescan(common)
	}
	if limit != nil {
		q.push(limit)
	}
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// parent is the directory that path is in; that of "/" is itself.
func parent(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "/"
}

// within says that path is dir or below it.
func within(dir, path string) bool {
	return dir == "/" || path == dir || strings.HasPrefix(path, dir) && path[len(dir)] == '/'
}

// ancestor is the smallest directory that both are in.
func ancestor(a, b string) string {
	for !within(a, b) {
		a = parent(a)
	}
	return a
}

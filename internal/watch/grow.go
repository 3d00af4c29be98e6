package watch

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watch watches the directory e, and those below it. tell says to tell of what is in it.
func (t *tracker) watch(n *node, name string, e *entry, tell bool) {
	if t.cfg.File != "" {
		return
	}
	e.dir = &node{parent: n, name: name, wd: -1}
	t.grow(e.dir, tell)
}

// grow watches n and every directory below, the higher before the lower.
func (t *tracker) grow(n *node, tell bool) {
	todo := []*node{n}
	for len(todo) > 0 && !t.lost && t.ctx.Err() == nil {
		found := t.visit(todo[0], tell)
		todo = append(todo[1:], found...)
	}
}

// visit watches one directory and then lists it, in this order, so that nothing is missed: what appears in between is found twice,
// and known the second time. It returns the directories in it.
func (t *tracker) visit(n *node, tell bool) []*node {
	path, ok := n.path("")
	if !ok {
		t.beyond(maxPath, n, "", true)
		return nil
	}
	if len(t.wds) >= t.cfg.MaxWatches {
		t.beyond(maxWatches, n, "", true)
		return nil
	}
	fd, err := openBeneath(t.rootFD, path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		t.unwatchable(n, err)
		return nil
	}
	dir := os.NewFile(uintptr(fd), fmt.Sprintf("/proc/self/fd/%d", fd))
	defer dir.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.unwatchable(n, err)
		return nil
	}
	n.id = identityOf(&st)
	wd, err := t.src.watch(fd, treeMask)
	if err != nil {
		t.unwatchable(n, err)
		return nil
	}
	if known := t.wds[wd]; known != nil || wd == t.above {
		switch {
		case !t.inPlace(n), known != nil && t.inPlace(known) && !t.inPlace(n):
			// It is in neither place by now, or in that where it is known, perhaps since it was looked for here; this one has to be looked at again.
			if n.parent != nil {
				t.doubt(n.parent, n.name)
			}
			return nil
		case wd == t.above || t.inPlace(known):
			// Two places of one directory, by a bind mount; it is told of at the first.
			t.beyond(noAccess, n, "", true)
			return nil
		}
		// It is here now, and the events that say so are still to come.
		known.wd = -1
		t.doubt(known.parent, known.name)
	}
	n.wd = wd
	t.wds[wd] = n
	t.stats.watches.Store(int64(len(t.wds)))
	if t.cfg.File != "" {
		if st, err := statIn(dir, t.cfg.File); err == nil {
			t.admit(n, t.cfg.File, typeOf(st.Mode), st.Size)
		}
		return nil
	}
	return t.list(n, path, dir, tell)
}

// inPlace says whether the directory that n is about still is where n is.
func (t *tracker) inPlace(n *node) bool {
	path, ok := n.path("")
	if !ok {
		return false
	}
	// One that has just been moved has its old path still, where there may be another.
	for d := n; d.parent != nil; d = d.parent {
		if e := d.parent.entries[d.name]; e == nil || e.dir != d {
			return false
		}
	}
	st, err := statBeneath(t.rootFD, path)
	return err == nil && identityOf(&st) == n.id
}

// unwatchable notes that a directory cannot be watched, and why.
func (t *tracker) unwatchable(n *node, err error) {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.ENOMEM):
		t.beyond(maxKernel, n, "", true)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		// Something else is there by now, and an event to come says so.
		if n.parent != nil {
			t.doubt(n.parent, n.name)
		}
	default:
		t.beyond(noAccess, n, "", true)
	}
}

func (t *tracker) list(n *node, path string, dir *os.File, tell bool) []*node {
	var found []*node
	now := time.Now()
	for {
		entries, err := dir.ReadDir(1024)
		for _, d := range entries {
			if n.entries[d.Name()] != nil {
				continue
			}
			e, st := t.admitFound(n, dir, d, tell)
			if e == nil {
				// One directory with millions of files is not read to its end for the count of those beyond the limit.
				if t.stats.files.Load() >= int64(t.cfg.MaxFiles) {
					return found
				}
				continue
			}
			if tell {
				t.tellFound(n, path, d.Name(), e, st, now)
			}
			if e.typ == directory {
				e.dir = &node{parent: n, name: d.Name(), wd: -1}
				found = append(found, e.dir)
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.unwatchable(n, err)
			}
			return found
		}
	}
}

// admitFound makes an entry of what was listed. The status is only there if it is needed.
func (t *tracker) admitFound(n *node, dir *os.File, d fs.DirEntry, tell bool) (*entry, unix.Stat_t) {
	var st unix.Stat_t
	typ := other
	switch {
	case d.IsDir():
		typ = directory
	case d.Type().IsRegular():
		typ = regular
		if tell || t.cfg.MaxBytes > 0 {
			var err error
			if st, err = statIn(dir, d.Name()); err != nil {
				return nil, st
			}
		}
	}
	return t.admit(n, d.Name(), typ, st.Size), st
}

// tellFound tells of what was listed in a directory that is new to the reader.
func (t *tracker) tellFound(n *node, path, name string, e *entry, st unix.Stat_t, now time.Time) {
	// A file that was written just now may still be.
	if e.typ == regular && now.Sub(time.Unix(st.Mtim.Unix())) < t.cfg.Settle {
		t.begin(n, name, e, true, true, now)
		return
	}
	if path != "/" {
		path += "/"
	}
	t.queue.create(path+name, e.typ == directory, true)
}

package share

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

// position is a path that leads to a mount point, or is one. Its pointers change with Share.mu held; who reads them takes no
// lock.
type position struct {
	name     string
	up       *position
	slot     int // in up's children
	children atomic.Pointer[children]
	graft    atomic.Pointer[part] // what is grafted here; nil for a directory on the way
	home     atomic.Pointer[part] // of a directory on the way: the part of the graft around it
	gone     atomic.Bool          // no graft is here or below any more
	madeUp   uint64               // number of the directory that stands in where home has none
	changed  atomic.Int64         // when children did, in ns

	// node is home's number for it, with a lookup held; 0 while it is not known or made up. Changes with Share.mu held.
	node atomic.Uint64
	// ino and typ (DT_*) are what it is listed with.
	ino atomic.Uint64
	typ atomic.Uint32
}

// children are the positions in a directory. They never change once Share.live.
type children struct {
	byName map[string]*position
	slots  []*position // as they are listed; nil where one has gone
	dirs   int         // of them, directories
}

func components(clean string) []string {
	if clean == "/" {
		return nil
	}
	return strings.Split(clean[1:], "/")
}

// Errors of Add, Replace, Change and Remove.
var (
	ErrExists   = errors.New("a graft is there already")
	ErrNotFound = errors.New("no graft is there")
	ErrBusy     = errors.New("other grafts are below it: remove them first")
	ErrNotDir   = errors.New("it is below a graft that is a file: expected a directory")
	ErrRoot     = errors.New("the root of a share cannot be added, replaced or removed: make another share")
	ErrFixed    = errors.New("the grafts of this share cannot change")
)

// position returns that of path, nil if there is none.
func (s *Share) position(path string) *position {
	at := s.top
	for _, name := range components(path) {
		if at = at.child(name); at == nil {
			return nil
		}
	}
	return at
}

func (pos *position) child(name string) *position {
	if in := pos.children.Load(); in != nil {
		return in.byName[name]
	}
	return nil
}

// each calls f for all positions directly below.
func (pos *position) each(f func(*position)) {
	if in := pos.children.Load(); in != nil {
		for _, child := range in.slots {
			if child != nil {
				f(child)
			}
		}
	}
}

// mayPlace says why p cannot be at its path. s.mu is held, or the Share not in use yet.
func (s *Share) mayPlace(p *part, replace bool) error {
	at := s.top
	for _, name := range components(p.info.Path) {
		if g := at.graft.Load(); g != nil && g.file != nil {
			return fmt.Errorf("%w: %s", ErrNotDir, g.info.Path)
		}
		next := at.child(name)
		if next == nil {
			return nil
		}
		at = next
	}
	switch g := at.graft.Load(); {
	case g != nil && !replace:
		return ErrExists
	case p.file != nil && at.children.Load() != nil:
		return fmt.Errorf("%w, for it is a file: %s", ErrBusy, strings.Join(at.below(nil), ", "))
	}
	return nil
}

// below lists the grafts below pos.
func (pos *position) below(paths []string) []string {
	pos.each(func(child *position) {
		if g := child.graft.Load(); g != nil {
			paths = append(paths, g.info.Path)
		}
		paths = child.below(paths)
	})
	return paths
}

// place makes p, which has its index, be what is at its path. What was there before leaves. s.mu is held, or the Share not in
// use yet.
func (s *Share) place(p *part, replace bool) error {
	if err := s.mayPlace(p, replace); err != nil {
		return err
	}
	at, home := s.top, s.root
	var fresh []*position
	for _, name := range components(p.info.Path) {
		if g := at.graft.Load(); g != nil {
			home = g
		}
		next := at.child(name)
		if next == nil {
			next = &position{name: name, up: at}
			next.home.Store(home)
			next.changed.Store(time.Now().UnixNano())
			fresh = append(fresh, next)
		}
		at = next
	}
	old := at.graft.Load()
	switch {
	case old != nil:
		old.replaced.Store(true) // before it loses what is below it: see lookupName
		old.dirs.Store(nil)
	case len(fresh) == 0:
		s.unplace(at)
	}
	at.ino.Store(p.base | rootID)
	at.typ.Store(unix.DT_DIR)
	if p.file != nil {
		at.typ.Store(unix.DT_UNKNOWN)
	}
	if at.children.Load() != nil {
		p.setDir(rootID, at)
		s.rehome(at, p)
	}
	at.graft.Store(p) // from now on it is found, where the way is there
	wasFile, isFile := old != nil && old.file != nil, p.file != nil
	if len(fresh) == 0 && wasFile != isFile {
		s.countDirs(at.up, map[bool]int{true: -1, false: 1}[isFile])
	}
	for i, pos := range slices.Backward(fresh) { // the way is seen at once, or not at all
		if i < len(fresh)-1 {
			pos.typ.Store(unix.DT_DIR)
			s.madeUps++
			pos.madeUp = s.madeUps
			pos.ino.Store(s.nobody.base | pos.madeUp)
			s.nobody.setDir(pos.madeUp, pos)
		}
		s.link(pos)
	}
	if old != nil {
		old.leaving.Store(true)
	}
	return nil
}

// unplace has pos, on the way so far, be no directory of its home nor one made up. s.mu is held, or the Share not in use yet.
func (s *Share) unplace(pos *position) {
	s.nobody.setDir(pos.madeUp, nil)
	s.leave(pos)
}

// leave forgets which directory of its home pos is.
func (s *Share) leave(pos *position) {
	if number := pos.node.Swap(0); number != 0 {
		home := pos.home.Load()
		home.setDir(number, nil)
		s.holds = append(s.holds, hold{home, number})
	}
}

// rehome makes home be what is around the directories on the way below pos. s.mu is held, or the Share not in use yet.
func (s *Share) rehome(pos *position, home *part) {
	pos.each(func(child *position) {
		if child.graft.Load() == nil {
			s.leave(child)
			s.rehome(child, home)
		}
		child.home.Store(home)
	})
}

// link puts pos among the children of the one above. s.mu is held, or the Share not in use yet.
func (s *Share) link(pos *position) {
	in := s.editable(pos.up)
	pos.slot = len(in.slots)
	if len(in.byName) < len(in.slots) {
		pos.slot = slices.Index(in.slots, nil)
	} else {
		in.slots = append(in.slots, nil)
	}
	in.slots[pos.slot] = pos
	in.byName[pos.name] = pos
	if g := pos.graft.Load(); g == nil || g.file == nil {
		in.dirs++
	}
	s.setChildren(pos.up, in)
}

// remove takes the graft at pos off the tree, below which there is none, and what leads nowhere then. s.mu is held.
func (s *Share) remove(pos *position) {
	g := pos.graft.Load()
	isDir := g.file == nil
	for {
		up := pos.up
		in := s.editable(up)
		in.slots[pos.slot] = nil
		delete(in.byName, pos.name)
		if isDir {
			in.dirs--
		}
		pos.gone.Store(true)
		pos.graft.Store(nil)
		s.setChildren(up, in)
		if len(in.byName) > 0 || up.graft.Load() != nil {
			break
		}
		s.unplace(up)
		pos, isDir = up, true
	}
	g.leaving.Store(true)
}

// countDirs changes how many directories there are in pos.
func (s *Share) countDirs(pos *position, by int) {
	in := s.editable(pos)
	in.dirs += by
	s.setChildren(pos, in)
}

// editable returns the children of pos to be changed, and then given to setChildren.
func (s *Share) editable(pos *position) *children {
	old := pos.children.Load()
	switch {
	case old == nil:
		return &children{byName: make(map[string]*position)}
	case !s.live:
		return old
	}
	return &children{maps.Clone(old.byName), slices.Clone(old.slots), old.dirs}
}

func (s *Share) setChildren(pos *position, in *children) {
	if len(in.byName) == 0 {
		in = nil
	}
	had := pos.children.Load() != nil
	pos.children.Store(in)
	now := time.Now().UnixNano()
	pos.changed.Store(max(now, pos.changed.Load()+1))
	if g := pos.graft.Load(); g != nil && had != (in != nil) && !(g == s.root && g.madeUp) {
		if in == nil {
			g.setDir(rootID, nil)
		} else {
			g.setDir(rootID, pos)
		}
	}
}

// sort lists what is there from the start by name.
func (s *Share) sort(pos *position) {
	in := pos.children.Load()
	if in == nil {
		return
	}
	slices.SortFunc(in.slots, func(a, b *position) int { return strings.Compare(a.name, b.name) })
	for i, child := range in.slots {
		child.slot = i
		s.sort(child)
	}
}

// dir returns the position that the directory number is, nil if it is none.
func (p *part) dir(number uint64) *position {
	dirs := p.dirs.Load()
	if dirs == nil {
		return nil
	}
	return (*dirs)[number]
}

// onWay returns the position that name in the directory node is, nil if it is none.
func (p *part) onWay(node uint64, name fsbackend.Name) *position {
	pos := p.dir(node & numberMask)
	if pos == nil {
		return nil
	}
	in := pos.children.Load()
	if in == nil {
		return nil
	}
	return in.byName[string(name)]
}

// setDir makes number be pos, or no position if that is nil. Share.mu is held, or the Share not in use yet.
func (p *part) setDir(number uint64, pos *position) {
	var dirs map[uint64]*position
	switch old := p.dirs.Load(); {
	case old == nil:
		dirs = make(map[uint64]*position)
	case p.share.live:
		dirs = maps.Clone(*old)
	default:
		dirs = *old
	}
	if pos != nil {
		dirs[number] = pos
	} else {
		delete(dirs, number)
	}
	if len(dirs) == 0 {
		p.dirs.Store(nil)
		return
	}
	p.dirs.Store(&dirs)
}

// record makes pos be number in p, which its home is, 0 if that has no such directory, and takes over one lookup of number. It
// fails, without having taken anything over, if a session has ended since epoch, what is around pos has changed, or number
// is home's root.
func (s *Share) record(pos *position, p *part, number, epoch uint64) bool {
	if number == rootID {
		return false
	}
	s.mu.Lock()
	if s.epoch.Load() != epoch || pos.gone.Load() || pos.graft.Load() != nil || pos.home.Load() != p {
		s.mu.Unlock()
		return false
	}
	old := pos.node.Load()
	spare := number == old
	if !spare {
		if old != 0 {
			p.setDir(old, nil)
		}
		if other := p.dir(number); number != 0 && other != nil {
			// The host has moved a directory from one position to another: its lookup is held already.
			other.node.Store(0)
			spare = true
		}
		if number != 0 {
			p.setDir(number, pos)
		}
		pos.node.Store(number)
	} else {
		old = 0
	}
	s.mu.Unlock()
	if old != 0 {
		p.Forget(old, 1)
	}
	if spare && number != 0 {
		p.Forget(number, 1)
	}
	return true
}

// loseNodes ends an epoch: which directories positions are has to be found out anew. The lookups that were held
// for them go with the backends' Reset.
func (s *Share) loseNodes() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.epoch.Add(1)
	s.holds = nil
	s.top.loseNodes()
}

func (pos *position) loseNodes() {
	if number := pos.node.Swap(0); number != 0 {
		pos.home.Load().setDir(number, nil)
	}
	pos.each((*position).loseNodes)
}

package share

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// position is a path that leads to a mount point, or is one.
type position struct {
	name     string
	children map[string]*position
	order    []*position // children, as they are listed
	graft    *part       // what is grafted here; nil for a directory on the way
	home     *part       // of a directory on the way: the part of the graft around it
	madeUp   uint64      // number of the directory that stands in where home has none

	// node is home's number for it, with a lookup held; 0 while it is not known or made up. Changes with Share.mu held.
	node atomic.Uint64
	// ino and typ (DT_*) are what it is listed with.
	ino atomic.Uint64
	typ atomic.Uint32
}

func components(clean string) []string {
	if clean == "/" {
		return nil
	}
	return strings.Split(clean[1:], "/")
}

// place makes the tree of positions.
func (s *Share) place() error {
	grafts := s.parts[:len(s.shown)]
	s.top = &position{graft: grafts[0]}
	for _, p := range grafts[1:] {
		at := s.top
		for _, name := range components(p.info.Path) {
			next := at.children[name]
			if next == nil {
				next = &position{name: name}
				if at.children == nil {
					at.children = make(map[string]*position)
				}
				at.children[name] = next
				at.order = append(at.order, next)
			}
			at = next
		}
		at.graft = p
	}
	return s.settle(s.top, "/", grafts[0])
}

// settle completes pos, whose path is in home, and all below it.
func (s *Share) settle(pos *position, at string, home *part) error {
	if len(pos.order) > maxMadeUpEntries {
		return fmt.Errorf("%d grafts in directory %q: expected at most %d", len(pos.order), at, maxMadeUpEntries)
	}
	slices.SortFunc(pos.order, func(a, b *position) int { return strings.Compare(a.name, b.name) })
	nobody := s.parts[len(s.shown)]
	subdirs := 0
	for _, child := range pos.order {
		if child.graft == nil || child.graft.file == nil {
			subdirs++
		}
	}
	pos.home = home
	pos.typ.Store(unix.DT_DIR)
	switch {
	case pos.graft == nil:
		pos.madeUp = s.madeUp.add(nobody.base>>indexShift, subdirs)
		nobody.setDir(pos.madeUp, pos)
		pos.ino.Store(nobody.base | pos.madeUp)
	case pos.graft.file != nil:
		pos.typ.Store(unix.DT_UNKNOWN)
		fallthrough
	default:
		home = pos.graft
		pos.ino.Store(home.base | fuseproto.FUSE_ROOT_ID)
		if len(pos.order) > 0 {
			home.setDir(fuseproto.FUSE_ROOT_ID, pos)
		}
	}
	for _, child := range pos.order {
		if err := s.settle(child, path.Join(at, child.name), home); err != nil {
			return err
		}
	}
	return nil
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
	return pos.children[string(name)]
}

// setDir makes number be pos, or no position if that is nil. Share.mu is held, or the Share not in use yet.
func (p *part) setDir(number uint64, pos *position) {
	dirs := make(map[uint64]*position)
	if old := p.dirs.Load(); old != nil {
		maps.Copy(dirs, *old)
	}
	if pos != nil {
		dirs[number] = pos
	} else {
		delete(dirs, number)
	}
	p.dirs.Store(&dirs)
}

// record makes pos be number in its home, 0 if home has no such directory, and takes over one lookup of number. It fails,
// without having taken anything over, if a session has ended since epoch, or number is home's root.
func (s *Share) record(pos *position, number, epoch uint64) bool {
	if number == fuseproto.FUSE_ROOT_ID {
		return false
	}
	s.mu.Lock()
	if s.epoch.Load() != epoch {
		s.mu.Unlock()
		return false
	}
	old := pos.node.Load()
	spare := number == old
	if !spare {
		if old != 0 {
			pos.home.setDir(old, nil)
		}
		if other := pos.home.dir(number); number != 0 && other != nil {
			// The host has moved a directory from one position to another: its lookup is held already.
			other.node.Store(0)
			spare = true
		}
		if number != 0 {
			pos.home.setDir(number, pos)
		}
		pos.node.Store(number)
	} else {
		old = 0
	}
	s.mu.Unlock()
	if old != 0 {
		pos.home.Forget(old, 1)
	}
	if spare && number != 0 {
		pos.home.Forget(number, 1)
	}
	return true
}

// loseNodes ends an epoch: which directories positions are has to be found out anew. The lookups that were held
// for them go with the backends' Reset.
func (s *Share) loseNodes() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.epoch.Add(1)
	s.top.loseNodes()
}

func (pos *position) loseNodes() {
	if number := pos.node.Swap(0); number != 0 {
		pos.home.setDir(number, nil)
	}
	for _, child := range pos.order {
		child.loseNodes()
	}
}

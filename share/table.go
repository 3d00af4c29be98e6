package share

import (
	"errors"
	"sync/atomic"
)

const (
	indexShift = 48
	numberMask = 1<<indexShift - 1

	// madeUpIndex is that of directories made up.
	madeUpIndex = 1<<(64-indexShift) - 1
	// nothingIndex is that of nodes and handles that stand for nothing: see replay.
	nothingIndex = madeUpIndex - 1
	// maxGrafts leaves an index for each of them.
	maxGrafts = nothingIndex

	pageBits = 8
)

// table finds parts by their index, without a lock.
type table struct {
	pages [1 << (64 - indexShift - pageBits)]atomic.Pointer[[1 << pageBits]atomic.Pointer[part]]
}

// get returns the part of an index below 1<<16, nil if there is none.
func (t *table) get(index uint64) *part {
	page := t.pages[uint8(index>>pageBits)].Load()
	if page == nil {
		return nil
	}
	return page[uint8(index)].Load()
}

// set puts p at index. Share.mu is held, or the Share not in use yet.
func (t *table) set(index uint16, p *part) {
	at := &t.pages[index>>pageBits]
	if at.Load() == nil {
		at.Store(new([1 << pageBits]atomic.Pointer[part]))
	}
	at.Load()[uint8(index)].Store(p)
}

// ErrFull says that every index is taken.
var ErrFull = errors.New("no place for another graft: the guest still uses what was removed, or there are too many; have it drop its caches, or mount anew")

// freeIndex returns one that nobody has, 0 if there is none: the one that was free for the longest time, so that what is on its
// way with an old number finds nobody. s.mu is held, or the Share not in use yet.
func (s *Share) freeIndex() uint16 {
	for range maxGrafts - 1 {
		if s.last++; s.last == nothingIndex {
			s.last = 1
		}
		if s.parts.get(uint64(s.last)) == nil && s.ghosts[s.last].lookups == 0 {
			return s.last
		}
	}
	return 0
}

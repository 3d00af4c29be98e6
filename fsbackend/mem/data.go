package mem

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

// maxSize is the largest file: MAX_LFS_FILESIZE of a 64-bit Linux.
const maxSize = math.MaxInt64

type page [pageSize]byte

// zeroPage is what a hole reads as.
var zeroPage page

const chunkPages = 64

// chunk is chunkPages pages of a file in a row, nil where there is a hole.
type chunk struct {
	index uint64 // of the chunk in the file
	used  int    // pages that are no hole
	pages [chunkPages]*page
}

// data is a file's contents: chunks by index, so that a hole costs nothing however large it is, a lookup is a binary search
// and appending is cheap. Bytes of a page that lie beyond the file's size are 0.
type data struct {
	mu     sync.RWMutex
	chunks []*chunk
	pages  atomic.Int64 // that are no hole; changed under mu
	dead   bool         // the file is gone and its room given back
}

// find returns where chunk index is, or belongs.
func (d *data) find(index uint64) (int, bool) {
	// A file written from front to back is the common case.
	if n := len(d.chunks); n > 0 && d.chunks[n-1].index == index {
		return n - 1, true
	}
	return slices.BinarySearchFunc(d.chunks, index, func(c *chunk, index uint64) int {
		switch {
		case c.index < index:
			return -1
		case c.index > index:
			return 1
		}
		return 0
	})
}

// page returns page number index, nil if it is a hole.
func (d *data) page(index uint64) *page {
	if i, ok := d.find(index / chunkPages); ok {
		return d.chunks[i].pages[index%chunkPages]
	}
	return nil
}

// fill makes page number index, which must be a hole.
func (d *data) fill(index uint64) *page {
	i, ok := d.find(index / chunkPages)
	if !ok {
		d.chunks = slices.Insert(d.chunks, i, &chunk{index: index / chunkPages})
	}
	c, p := d.chunks[i], new(page)
	c.pages[index%chunkPages] = p
	c.used++
	d.pages.Add(1)
	return p
}

// count returns how many pages of those from first to before end are no hole.
func (d *data) count(first, end uint64) int64 {
	total := int64(0)
	d.each(first, end, func(*chunk, int) { total++ })
	return total
}

// each calls do for the pages from first to before end that are no hole.
func (d *data) each(first, end uint64, do func(c *chunk, slot int)) {
	i, _ := d.find(first / chunkPages)
	for ; i < len(d.chunks); i++ {
		c := d.chunks[i]
		base := c.index * chunkPages
		if base >= end {
			return
		}
		from, to := max(first, base)-base, min(end, base+chunkPages)-base
		for slot := from; slot < to; slot++ {
			if c.pages[slot] != nil {
				do(c, int(slot))
			}
		}
	}
}

// discard makes holes of the pages from first to before end and returns the bytes that this frees.
func (d *data) discard(first, end uint64) int64 {
	freed := int64(0)
	empty := false
	d.each(first, end, func(c *chunk, slot int) {
		c.pages[slot] = nil
		c.used--
		freed++
		empty = empty || c.used == 0
	})
	if empty {
		d.chunks = slices.DeleteFunc(d.chunks, func(c *chunk) bool { return c.used == 0 })
	}
	d.pages.Add(-freed)
	return freed * pageSize
}

// zero makes the bytes from start to before end read as 0: of whole pages it makes holes if punch, and returns the bytes that
// this frees.
func (d *data) zero(start, end uint64, punch bool) int64 {
	if start >= end {
		return 0
	}
	first, last := start/pageSize, (end-1)/pageSize
	freed := int64(0)
	if punch {
		whole, beyond := (start+pageSize-1)/pageSize, end/pageSize
		if whole < beyond {
			freed = d.discard(whole, beyond)
		}
	}
	d.each(first, last+1, func(c *chunk, slot int) {
		at := (c.index*chunkPages + uint64(slot)) * pageSize
		clear(c.pages[slot][max(start, at)-at : min(end-at, pageSize)])
	})
	return freed
}

// truncate discards what is beyond size and returns the bytes that this frees.
func (d *data) truncate(size uint64) int64 {
	if at := size % pageSize; at != 0 {
		if p := d.page(size / pageSize); p != nil {
			clear(p[at:])
		}
	}
	return d.discard((size+pageSize-1)/pageSize, math.MaxUint64)
}

// next returns the first byte from off on that is data, or in a hole if hole is set, and whether there is one before size.
// The end of the file counts as a hole.
func (d *data) next(off, size uint64, hole bool) (uint64, bool) {
	if hole {
		for index := off / pageSize; index*pageSize < size; index++ {
			if d.page(index) == nil {
				return max(off, index*pageSize), true
			}
		}
		return size, true
	}
	i, _ := d.find(off / pageSize / chunkPages)
	for ; i < len(d.chunks); i++ {
		c := d.chunks[i]
		for slot, p := range c.pages {
			at := (c.index*chunkPages + uint64(slot)) * pageSize
			if p != nil && at+pageSize > off && at < size {
				return max(off, at), true
			}
		}
	}
	return 0, false
}

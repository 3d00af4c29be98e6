package virtqueue

import (
	"encoding/binary"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/internal/sys"
)

// Desc is struct virtq_desc, a descriptor of the split ring and of its indirect tables (virtio 1.3, section 2.7.5).
type Desc struct {
	Addr  uint64 // guest-physical
	Len   uint32 // bytes
	Flags uint16 // VIRTQ_DESC_F_*
	Next  uint16
}

// loadDesc takes the descriptor at the start of b, each field once: a Go read never sees two values (the Go memory model
// forbids the compiler to load again), so what was checked is what is used.
func loadDesc(b []byte) Desc {
	_ = b[descSize-1]
	return Desc{
		Addr:  binary.LittleEndian.Uint64(b[0:]),
		Len:   binary.LittleEndian.Uint32(b[8:]),
		Flags: binary.LittleEndian.Uint16(b[12:]),
		Next:  binary.LittleEndian.Uint16(b[14:]),
	}
}

// Chain is one request as host memory. The caller reuses it: once its slices have grown, Pop does not allocate. The iovecs
// are valid while the Map is held that the queue was bound to; their elements may be changed.
type Chain struct {
	Head        uint16
	Readable    []unix.Iovec // what the driver wrote for the device; no empty elements
	Writable    []unix.Iovec // where the device writes; no empty elements
	ReadableLen uint64       // bytes
	WritableLen uint64       // bytes
}

func (c *Chain) reset() {
	c.Readable, c.Writable = c.Readable[:0], c.Writable[:0]
	c.ReadableLen, c.WritableLen = 0, 0
}

// add appends one buffer. An empty one is skipped.
func (c *Chain) add(m *guestmem.Map, d Desc) Reason {
	n := uint64(d.Len)
	if n == 0 {
		return reasonNone
	}
	if c.ReadableLen+c.WritableLen+n > math.MaxUint32 {
		return ReasonTotal
	}
	var err error
	if d.Flags&VIRTQ_DESC_F_WRITE != 0 {
		c.Writable, err = m.Translate(c.Writable, d.Addr, n)
		c.WritableLen += n
	} else {
		if c.WritableLen > 0 {
			return ReasonOrder
		}
		c.Readable, err = m.Translate(c.Readable, d.Addr, n)
		c.ReadableLen += n
	}
	if err != nil {
		return ReasonAddress
	}
	return reasonNone
}

// walker follows the NEXT chains of descriptor tables. Packed rings have no such chains in their ring, but tables too.
type walker struct {
	m        *guestmem.Map
	indirect bool         // VIRTIO_RING_F_INDIRECT_DESC was negotiated
	limit    int          // descriptors that a chain may have
	copied   []byte       // private copy of an indirect table
	pieces   []unix.Iovec // the indirect table in guest memory
}

// walk adds the buffers from descriptor i of table on. before is how many descriptors the chain had before it came to this
// table; nested says that the table is an indirect one.
func (w *walker) walk(c *Chain, table []byte, i uint16, before int, nested bool) Reason {
	entries := len(table) / descSize
	for n := 1; ; n++ {
		if n > entries {
			return ReasonLoop
		}
		if before+n > w.limit {
			return ReasonTooLong
		}
		d := loadDesc(table[descSize*int(i):])
		if d.Flags&VIRTQ_DESC_F_INDIRECT != 0 {
			switch {
			case nested:
				return ReasonIndirectNested
			case !w.indirect:
				return ReasonIndirectFeature
			case d.Flags&VIRTQ_DESC_F_NEXT != 0:
				return ReasonIndirectNext
			}
			// WRITE on it means nothing (section 2.7.5.3.2).
			if r := w.copyTable(d); r != reasonNone {
				return r
			}
			return w.walk(c, w.copied, 0, n, true)
		}
		if r := c.add(w.m, d); r != reasonNone {
			return r
		}
		if d.Flags&VIRTQ_DESC_F_NEXT == 0 {
			return reasonNone
		}
		if int(d.Next) >= entries {
			return ReasonNext
		}
		i = d.Next
	}
}

// copyTable copies the indirect table that d describes out of guest memory.
func (w *walker) copyTable(d Desc) Reason {
	size := int(d.Len)
	if size == 0 || size%descSize != 0 {
		return ReasonIndirectLen
	}
	// A table that is larger than a chain can be is of no use to a driver, and a large copy is of use to an attacker.
	if size/descSize > w.limit {
		return ReasonTooLong
	}
	var err error
	if w.pieces, err = w.m.Translate(w.pieces[:0], d.Addr, uint64(size)); err != nil {
		return ReasonIndirectUnmapped
	}
	w.copied = slices.Grow(w.copied[:0], size)
	for i := range w.pieces {
		w.copied = append(w.copied, sys.Bytes(&w.pieces[i])...)
	}
	return reasonNone
}

package overlay

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// ahead is what a part of a directory has said of several names in one READDIRPLUS. They are to be listed in the same order, most
// likely: a merged directory costs little more calls than its parts then.
type ahead struct {
	s    *scratch
	part real
	rest []byte // what there has been no use for yet
	d    dirent
	// size is how much is asked for at a time: less if names came in another order, and most of them were of no use.
	size         int
	used, wasted int
}

const (
	maxAhead = 1 << 16
	minAhead = 1 << 10
)

// of returns what the part that has l says of it, with a lookup, if it says it along with others; nil if not, and l is to be looked
// up. room is how much there is for entries. h.mu is held.
func (a *ahead) of(fs *FS, c *fsbackend.Context, n *node, h *handle, l *listed, room int) (*fuseproto.EntryOut, errno) {
	part, ok := n.part(fs, int(l.part))
	// Offsets are to mean the same in another reading of the directory.
	if !ok || part.l.complete == nil || part.l.r.DirPlusReader == nil || !part.l.may(c) {
		return nil, 0
	}
	if part != a.part {
		a.drop(fs)
		a.part = part
	}
	for asked := false; ; asked = true {
		for len(a.rest) > 0 {
			if a.rest, ok = nextDirent(a.rest, true, &a.d); !ok {
				a.rest = nil
				return nil, unix.EIO
			}
			if string(a.d.name) == l.name && a.d.entry.NodeId != 0 {
				a.used++
				return &a.d.entry, 0
			}
			a.wasted++
			fs.unlook(part.l, &a.d, true)
		}
		if asked {
			return nil, 0
		}
		if e := a.ask(fs, c, h, l.before, room); e != 0 {
			return nil, e
		}
	}
}

// ask reads on from an offset.
func (a *ahead) ask(fs *FS, c *fsbackend.Context, h *handle, off uint64, room int) errno {
	switch {
	case a.s == nil:
		a.s, a.size = getScratch(), maxAhead
	case a.wasted > a.used:
		a.size = max(a.size/4, minAhead)
	default:
		a.size = min(a.size*4, maxAhead)
	}
	a.used, a.wasted = 0, 0
	f, e := fs.openPart(c, h, a.part)
	if e != 0 {
		return e
	}
	size := min(max(room, minAhead), a.size)
	a.s.list = fsbackend.DirList{Plus: true}
	a.s.iov[0] = sys.MakeIovec(a.s.buf[:size])
	a.s.list.Reset(a.s.iov[:], 0, uint64(size))
	in := fuseproto.ReadIn{InHeader: header(a.part.node), Fh: f.fh, Offset: off, Size: uint32(size)}
	e = f.l.r.Readdirplus(c, &in, &a.s.list)
	a.rest = a.s.buf[:a.s.list.Written()]
	if len(a.rest) > 0 {
		e = 0
	}
	return e
}

// drop gives back what nobody has asked for.
func (a *ahead) drop(fs *FS) {
	for len(a.rest) > 0 {
		var ok bool
		if a.rest, ok = nextDirent(a.rest, true, &a.d); !ok {
			a.rest = nil
			return
		}
		fs.unlook(a.part.l, &a.d, true)
	}
}

func (a *ahead) end(fs *FS) {
	if a.drop(fs); a.s != nil {
		a.s.put()
	}
}

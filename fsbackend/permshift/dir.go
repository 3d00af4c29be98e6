package permshift

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Readdir implements fsbackend.DirReader. What a regular file stands for is in its value: the guest is to look.
func (f *FS) Readdir(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	if !f.format.keepsTypes() {
		return f.Forward.Readdir(c, in, out)
	}
	before := out.Type
	out.Type = typeUnknown
	defer func() { out.Type = before }()
	return f.Forward.Readdir(c, in, out)
}

func typeUnknown(typ uint32) uint32 {
	if typ == unix.DT_REG {
		return unix.DT_UNKNOWN
	}
	return typ
}

// listing shifts the entries of a READDIRPLUS as the backend adds them.
type listing struct {
	fs   *FS
	c    *fsbackend.Context
	next func(*fuseproto.EntryOut) // of who wants the list
	// lost are nodes whose values could not be had: the guest is to look those entries up, and finds out why.
	lost  []uint64
	shift func(*fuseproto.EntryOut)
}

var listings = sync.Pool{New: func() any {
	l := new(listing)
	l.shift = l.entry
	return l
}}

// entry shifts an entry.
func (l *listing) entry(e *fuseproto.EntryOut) {
	if e.NodeId != 0 && l.fs.shift(l.c, e.NodeId, &e.Attr) != fsbackend.OK {
		l.lost = append(l.lost, e.NodeId)
		e.NodeId, e.Generation = 0, 0
	}
	if l.next != nil {
		l.next(e)
	}
}

// Readdirplus implements fsbackend.DirPlusReader.
func (f *FS) Readdirplus(c *fsbackend.Context, in *fuseproto.ReadIn, out *fsbackend.DirList) fsbackend.Errno {
	if f.format == Off {
		return f.Forward.Readdirplus(c, in, out)
	}
	if !c.MayBlock && f.reluctant.Load() {
		return fsbackend.ErrMayBlock
	}
	l := listings.Get().(*listing)
	l.fs, l.c, l.next = f, c, out.Translate
	out.Translate = l.shift
	defer func() {
		out.Translate = l.next
		for _, node := range l.lost {
			f.Inner.Forget(node, 1)
		}
		l.fs, l.c, l.next, l.lost = nil, nil, nil, l.lost[:0]
		listings.Put(l)
	}()
	return f.Forward.Readdirplus(c, in, out)
}

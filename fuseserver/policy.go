package fuseserver

import (
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// CachePolicy is what replies say where the backend has left it open. See fsbackend.CachePolicy.
type CachePolicy = fsbackend.CachePolicy

// Cache policies.
const (
	CacheAuto     = fsbackend.CacheAuto
	CacheNever    = fsbackend.CacheNever
	CacheMetadata = fsbackend.CacheMetadata
	CacheAlways   = fsbackend.CacheAlways
)

func (s *Server) fillEntry(e *fuseproto.EntryOut) {
	fsbackend.FillValid(&e.EntryValid, &e.EntryValidNsec, s.valid)
	fsbackend.FillValid(&e.AttrValid, &e.AttrValidNsec, s.valid)
}

func fillOpen(o *fuseproto.OpenOut, flags uint32) {
	if o.OpenFlags&(fsbackend.CacheFlags|fsbackend.CacheDecided) == 0 {
		o.OpenFlags |= flags
	}
	o.OpenFlags &^= fsbackend.CacheDecided
}

package fuseserver

import (
	"fmt"

	"github.com/sluicefs/sluice/fuseproto"
)

// CachePolicy is how long the guest may trust what it has been told; the host may change files behind its back, and
// virtio-fs has no way to tell the guest so. The values have the meaning that virtiofsd gives them.
type CachePolicy int

// Cache policies.
const (
	CacheAuto     CachePolicy = iota // names and attributes for 1 s; data until its mtime or size is seen to change
	CacheNever                       // nothing: every access asks the host
	CacheMetadata                    // names, attributes and directories for a day; no data
	CacheAlways                      // everything for a day: only for trees that nobody else changes
)

var policies = [...]struct {
	name      string
	valid     uint64 // seconds that names and attributes are valid
	fileFlags uint32 // FOPEN_* of files
	dirFlags  uint32 // FOPEN_* of directories
}{
	CacheAuto:     {name: "auto", valid: 1},
	CacheNever:    {name: "never", fileFlags: fuseproto.FOPEN_DIRECT_IO},
	CacheMetadata: {name: "metadata", valid: 86400, fileFlags: fuseproto.FOPEN_DIRECT_IO, dirFlags: fuseproto.FOPEN_KEEP_CACHE | fuseproto.FOPEN_CACHE_DIR},
	CacheAlways:   {name: "always", valid: 86400, fileFlags: fuseproto.FOPEN_KEEP_CACHE, dirFlags: fuseproto.FOPEN_KEEP_CACHE | fuseproto.FOPEN_CACHE_DIR},
}

// cacheFlags are the FOPEN_* flags that a policy decides unless the backend has set one of them.
const cacheFlags = fuseproto.FOPEN_DIRECT_IO | fuseproto.FOPEN_KEEP_CACHE | fuseproto.FOPEN_CACHE_DIR

// ParseCachePolicy returns the policy called name: never, metadata, auto or always.
func ParseCachePolicy(name string) (CachePolicy, error) {
	for p := range policies {
		if policies[p].name == name {
			return CachePolicy(p), nil
		}
	}
	return 0, fmt.Errorf("parse cache policy %q: expected never, metadata, auto or always", name)
}

// String returns the policy's name.
func (p CachePolicy) String() string {
	if !p.valid() {
		return fmt.Sprintf("CachePolicy(%d)", int(p))
	}
	return policies[p].name
}

func (p CachePolicy) valid() bool {
	return p >= 0 && int(p) < len(policies)
}

// fill sets the timeout of a reply that the backend left at 0.
func fill(sec *uint64, nsec uint32, valid uint64) {
	if *sec == 0 && nsec == 0 {
		*sec = valid
	}
}

func (s *Server) fillEntry(e *fuseproto.EntryOut) {
	fill(&e.EntryValid, e.EntryValidNsec, s.valid)
	fill(&e.AttrValid, e.AttrValidNsec, s.valid)
}

func fillOpen(o *fuseproto.OpenOut, flags uint32) {
	if o.OpenFlags&cacheFlags == 0 {
		o.OpenFlags |= flags
	}
}

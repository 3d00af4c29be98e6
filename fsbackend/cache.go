package fsbackend

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
	CacheAlways                      // everything for a day, also that a name is missing: only for trees that nobody else changes
)

// direct is what files are opened with that the guest keeps no data of. Its writes inside a file need not wait for each other:
// the file's own lock is the host's.
const direct = fuseproto.FOPEN_DIRECT_IO | fuseproto.FOPEN_PARALLEL_DIRECT_WRITES

var policies = [...]struct {
	name      string
	valid     uint64
	missing   uint64
	fileFlags uint32
	dirFlags  uint32
}{
	CacheAuto:     {name: "auto", valid: 1},
	CacheNever:    {name: "never", fileFlags: direct},
	CacheMetadata: {name: "metadata", valid: 86400, fileFlags: direct, dirFlags: fuseproto.FOPEN_KEEP_CACHE | fuseproto.FOPEN_CACHE_DIR},
	CacheAlways:   {name: "always", valid: 86400, missing: 86400, fileFlags: fuseproto.FOPEN_KEEP_CACHE, dirFlags: fuseproto.FOPEN_KEEP_CACHE | fuseproto.FOPEN_CACHE_DIR},
}

// CacheFlags are the FOPEN_* flags that a policy decides unless a backend has set one of them, or CacheDecided.
const CacheFlags = fuseproto.FOPEN_DIRECT_IO | fuseproto.FOPEN_KEEP_CACHE | fuseproto.FOPEN_CACHE_DIR

// CacheDecided in OpenOut.OpenFlags says that CacheFlags are as they are meant, even if none is set. No guest sees it.
const CacheDecided uint32 = 1 << 31

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
	if p.Validate() != nil {
		return fmt.Sprintf("CachePolicy(%d)", int(p))
	}
	return policies[p].name
}

// Validate says whether p is one of the policies.
func (p CachePolicy) Validate() error {
	if p < 0 || int(p) >= len(policies) {
		return fmt.Errorf("%d is no cache policy", int(p))
	}
	return nil
}

// Stale, as the nanoseconds of a validity of no seconds, is of what the guest may not trust at all; 0 leaves it to who answers the
// guest. It goes out as 0: Linux rounds a nanosecond up to its clock's ticks, and trusts it for up to 20 ms.
const Stale = 1

// FillValid completes a validity: what a backend has left open becomes valid seconds, and Stale nothing.
func FillValid(sec *uint64, nsec *uint32, valid uint64) {
	switch {
	case *sec != 0:
	case *nsec == 0:
		*sec = valid
	case *nsec == Stale:
		*nsec = 0
	}
}

// Valid returns for how many seconds names and attributes are.
func (p CachePolicy) Valid() uint64 { return policies[p].valid }

// Missing returns for how many seconds the guest may trust that a name does not exist; 0 is not at all. virtiofsd never lets
// it, and what the host creates is expected to be seen at once where the policy does not say otherwise.
func (p CachePolicy) Missing() uint64 { return policies[p].missing }

// FileFlags returns the FOPEN_* flags that files are opened with.
func (p CachePolicy) FileFlags() uint32 { return policies[p].fileFlags }

// DirFlags returns the FOPEN_* flags that directories are opened with.
func (p CachePolicy) DirFlags() uint32 { return policies[p].dirFlags }

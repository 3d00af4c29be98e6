// Package casefold makes names the same that differ in case alone, as Windows expects it, over any backend: what was made as
// "Readme" is found as "README", and goes on being listed as "Readme".
//
// # Which names are the same
//
// Those whose characters are the same after Unicode's simple case folding (CaseFolding.txt, status C and S, of the Unicode version
// of Go's package unicode): as in NTFS, one character is one character ("ß" is not "ss"), and there are no rules of one language
// ("I" is "i", and neither is "ı"). That is what NTFS' own table does but for a few characters that it does not fold (the Kelvin
// sign, the long s). ext4's casefold folds in full and normalizes, which NTFS does not: see Normalize. A name that is not UTF-8 is
// the same as itself alone.
//
// # Which name is found
//
// One that is exactly the same is tried first, and costs no more than without this layer. Only where there is none, the directory
// is read, and an index of it kept that is good for as long as the directory has not changed. Where the host has several names
// that are the same, all are listed, each is found by itself, and what is none of them finds the first in byte order.
//
// New names are checked in the same way: EEXIST answers what would be the same as one that there is, CREATE without O_EXCL opens
// that one, and a RENAME onto it replaces the file and keeps the name that is there. A RENAME that changes case alone does so.
//
// The guest is told not to remember a name that it was not found by, nor that there is none of a name.
package casefold

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// DefaultMaxNames is how many names are kept in indexes, which takes about 150 bytes each.
const DefaultMaxNames = 1 << 17

// Config says which names are the same.
type Config struct {
	Normalize Normalize
	// MaxNames bounds the names in all indexes together: if 0, DefaultMaxNames. A larger directory is read each time that a name
	// is looked up that it does not have.
	MaxNames int
	// Now is the clock of the host's files: nil is time.Now.
	Now func() time.Time
}

// Validate says what is wrong with c.
func (c *Config) Validate() error {
	switch {
	case c.Normalize < 0 || int(c.Normalize) >= len(normalizeNames):
		return fmt.Errorf("%v: expected none or nfc", c.Normalize)
	case c.MaxNames < 0:
		return fmt.Errorf("at most %d names in indexes: expected a positive number, or 0 for %d", c.MaxNames, DefaultMaxNames)
	}
	return nil
}

// FS is the layer. All that is not about names is the backend's in it.
type FS struct {
	fsbackend.Forward
	norm  Normalize
	cache cache
}

// New makes the layer over inner, which it takes over: Close closes it. On an error it stays the caller's.
func New(inner fsbackend.Backend, cfg Config) (*FS, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	f := &FS{Forward: fsbackend.Forward{Inner: fsbackend.Resolve(inner)}, norm: cfg.Normalize}
	if f.Inner.DirReader == nil {
		return nil, errors.New("the backend below lists no directories: expected one in which names can be searched for")
	}
	if cfg.MaxNames == 0 {
		cfg.MaxNames = DefaultMaxNames
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	f.cache.init(cfg.MaxNames, cfg.Now)
	return f, nil
}

// Reset implements fsbackend.Backend.
func (f *FS) Reset() {
	f.Forward.Reset()
	f.cache.reset()
}

// Lookup implements fsbackend.Backend.
func (f *FS) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	errno := f.Inner.Lookup(c, parent, name, out)
	if errno != unix.ENOENT && (errno != fsbackend.OK || out.NodeId != 0) {
		return errno
	}
	if f.norm.alone(name) {
		return errno
	}
	host, errno := f.other(c, parent, name, out)
	if errno != fsbackend.OK {
		return errno
	}
	if host == nil {
		// A file of another name that is the same may come, of which the guest would not know.
		*out = fuseproto.EntryOut{EntryValidNsec: fsbackend.Stale}
		return fsbackend.OK
	}
	alias(out)
	return fsbackend.OK
}

// alias marks an entry that was found by another name than its own: it may go under that one.
func alias(out *fuseproto.EntryOut) {
	out.EntryValid, out.EntryValidNsec = 0, fsbackend.Stale
}

// other looks up the file that name stands for, if it is not called so itself, and returns what it is called; nil if there is none.
func (f *FS) other(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) (fsbackend.Name, fsbackend.Errno) {
	for range 3 {
		host, found, _, errno := f.resolve(c, parent, name)
		if errno != fsbackend.OK || !found {
			return nil, errno
		}
		own := fsbackend.MakeName(host)
		*out = fuseproto.EntryOut{}
		errno = f.Inner.Lookup(c, parent, own, out)
		if errno == fsbackend.OK && out.NodeId != 0 {
			return own, errno
		}
		if errno != fsbackend.OK && errno != unix.ENOENT {
			return nil, errno
		}
		f.cache.forget(parent) // it has gone since
	}
	return nil, fsbackend.OK
}

package share

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Policy is what a Share holds the backend of a graft and the guest to, whatever either does. The guest's own mount options
// make no difference to it.
type Policy struct {
	// ReadOnly answers every change with EROFS, also by handles that were opened for writing before.
	ReadOnly bool
	// NoSUID hides set-user-ID, set-group-ID and file capabilities, and lets none be set.
	NoSUID bool
	// NoDev makes devices be of no driver, lets none be opened, and none be made.
	NoDev bool
	// NoExec hides the execute bits of regular files, and keeps the guest from changing them.
	NoExec bool
	// NoSymfollow answers READLINK with ELOOP.
	NoSymfollow bool
	// Cache is how long the guest may trust what it knows of the graft; nil leaves that to who answers the guest.
	Cache *fsbackend.CachePolicy
	// MaxBytes and MaxInodes bound what is stored in it; 0 does not. See quota.
	MaxBytes, MaxInodes uint64
}

func (p *Policy) validate() error {
	if p.Cache != nil {
		return p.Cache.Validate()
	}
	return nil
}

// own returns p without anything that its maker may change later.
func (p Policy) own() *Policy {
	if p.Cache != nil {
		cache := *p.Cache
		p.Cache = &cache
	}
	return &p
}

// Change says what of a graft's policy is to be different; what is nil stays.
type Change struct {
	ReadOnly, NoSUID, NoDev, NoExec, NoSymfollow *bool
	// Cache, if it points to nil, takes the graft's own policy away.
	Cache               **fsbackend.CachePolicy
	MaxBytes, MaxInodes *uint64
}

// apply returns p with c.
func (c *Change) apply(p Policy) Policy {
	set(&p.ReadOnly, c.ReadOnly)
	set(&p.NoSUID, c.NoSUID)
	set(&p.NoDev, c.NoDev)
	set(&p.NoExec, c.NoExec)
	set(&p.NoSymfollow, c.NoSymfollow)
	set(&p.Cache, c.Cache)
	set(&p.MaxBytes, c.MaxBytes)
	set(&p.MaxInodes, c.MaxInodes)
	return p
}

func set[T any](to, from *T) {
	if from != nil {
		*to = *from
	}
}

const (
	execBits = unix.S_IXUSR | unix.S_IXGRP | unix.S_IXOTH
	// noDevice is what the number of a device reads as: no driver has major 0. Whiteouts, 0:0, stay what they are.
	noDevice = 1
)

// mask takes from a mode what is hidden. Only regular files can be run; on directories, S_ISGID is about who owns what is
// made in them.
func mask(mode uint32, noSUID, noExec bool) uint32 {
	if mode&unix.S_IFMT != unix.S_IFREG {
		return mode
	}
	if noSUID {
		mode &^= unix.S_ISUID
		if mode&unix.S_IXGRP != 0 {
			mode &^= unix.S_ISGID // without S_IXGRP it is about locks, not set-group-ID (Linux fs/exec.c, bprm_fill_uid)
		}
	}
	if noExec {
		mode &^= execBits
	}
	return mode
}

// masks says whether attributes are not shown as they are, but for set-id bits.
func (p *Policy) masks() bool { return p.NoDev || p.NoExec }

// isDevice says whether mode is of a device that NoDev is about; whiteouts are none.
func isDevice(mode, rdev uint32) bool {
	switch mode & unix.S_IFMT {
	case unix.S_IFBLK:
		return true
	case unix.S_IFCHR:
		return rdev != 0
	}
	return false
}

// device makes the number that the guest sees of the backend's.
func (p *Policy) device(mode, rdev uint32) uint32 {
	if p.NoDev && isDevice(mode, rdev) {
		return noDevice
	}
	return rdev
}

// fill sets the validity of a reply that the backend has left open.
func (p *Policy) fill(sec *uint64, nsec *uint32) {
	if p.Cache != nil && *sec == 0 && *nsec == 0 {
		if *sec = p.Cache.Valid(); *sec == 0 {
			*nsec = 1 // at once stale
		}
	}
}

func (p *Policy) entry(out *fuseproto.EntryOut) {
	p.fill(&out.EntryValid, &out.EntryValidNsec)
	p.fill(&out.AttrValid, &out.AttrValidNsec)
}

// open sets the cache flags that the backend has left open, of a file or directory.
func (p *Policy) open(o *fuseproto.OpenOut, flags func(fsbackend.CachePolicy) uint32) {
	if p.Cache != nil && o.OpenFlags&(fsbackend.CacheFlags|fsbackend.CacheDecided) == 0 {
		o.OpenFlags |= flags(*p.Cache) | fsbackend.CacheDecided
	}
}

package passthrough

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// identity is who the daemon is.
type identity struct {
	uid, gid  uint32
	groups    []uint32
	canSwitch bool
}

func (id *identity) init() error {
	id.uid, id.gid = uint32(unix.Geteuid()), uint32(unix.Getegid())
	groups, err := unix.Getgroups()
	if err != nil {
		return fmt.Errorf("getgroups: %w", err)
	}
	for _, g := range groups {
		id.groups = append(id.groups, uint32(g))
	}
	caps, errno := sys.ThreadCaps()
	if errno != 0 {
		return fmt.Errorf("capget: %w", errno)
	}
	const need = 1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID
	id.canSwitch = id.uid == 0 && caps.Effective&need == need
	return nil
}

// disguise is what acting as a caller has to undo.
type disguise struct {
	locked, groups, gid, uid bool
}

const invalidID = ^uint32(0) // of a guest's process whose id the mount's id map lacks

// actAs makes the calling thread act as the request's caller until stopActing, locking the goroutine to it. The guest's
// root costs nothing. setresuid and not setfsuid: the latter does not say that it failed, and then root would create.
func (fs *FS) actAs(c *fsbackend.Context, d *disguise) errno {
	*d = disguise{}
	uid, gid := c.Caller.Uid, c.Caller.Gid
	if uid == invalidID || gid == invalidID {
		return unix.EOVERFLOW
	}
	me := &fs.ids
	if !me.canSwitch {
		if uid != 0 && uid != me.uid || gid != 0 && gid != me.gid {
			return unix.EPERM
		}
		return 0
	}
	if uid == 0 && gid == 0 {
		return 0
	}
	runtime.LockOSThread()
	d.locked = true
	// Groups of the daemon's own must not help a caller.
	if uid != 0 && (len(c.SuppGroups) > 0 || len(me.groups) > 0) {
		if errno := sys.SetThreadGroups(c.SuppGroups); errno != 0 {
			return fs.stopActing(d, errno)
		}
		d.groups = true
	}
	if gid != 0 {
		if errno := sys.SetThreadGID(gid); errno != 0 {
			return fs.stopActing(d, errno)
		}
		d.gid = true
	}
	if uid != 0 {
		if errno := sys.SetThreadUID(uid); errno != 0 {
			return fs.stopActing(d, errno)
		}
		d.uid = true
		if !fs.has(fuseproto.FUSE_CREATE_SUPP_GROUP) {
			// The guest has allowed it perhaps for a group that it cannot name, so that it may create wherever its kernel
			// lets it.
			if errno := raiseCap(unix.CAP_DAC_OVERRIDE); errno != 0 {
				return fs.stopActing(d, errno)
			}
		}
	}
	return 0
}

// stopActing makes the thread the daemon's again and returns e.
func (fs *FS) stopActing(d *disguise, e errno) errno {
	if !d.locked {
		return e
	}
	ok := true
	if d.uid {
		ok = sys.SetThreadUID(0) == 0
	}
	if d.gid {
		ok = sys.SetThreadGID(fs.ids.gid) == 0 && ok
	}
	if d.groups {
		ok = sys.SetThreadGroups(fs.ids.groups) == 0 && ok
	}
	if !ok {
		// Ids that were the process's own are always granted back. Should they not be, the goroutine stays locked, so that
		// nothing else ever runs as the caller, and what it does next fails as the caller's.
		return unix.EPERM
	}
	runtime.UnlockOSThread()
	*d = disguise{}
	return e
}

func raiseCap(bit uint) errno {
	caps, errno := sys.ThreadCaps()
	if errno != 0 || caps.Permitted&(1<<bit) == 0 {
		return errno
	}
	caps.Effective |= 1 << bit
	return sys.SetThreadCaps(caps)
}

// withoutFsetid runs f on a thread without CAP_FSETID, so that the kernel clears set-user-id and set-group-id bits as it
// does for any user who writes a file.
func withoutFsetid(f func() errno) errno {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	caps, e := sys.ThreadCaps()
	if e != 0 {
		return e
	}
	const bit = 1 << unix.CAP_FSETID
	if caps.Effective&bit == 0 {
		return f()
	}
	less := caps
	less.Effective &^= bit
	if e := sys.SetThreadCaps(less); e != 0 {
		return e
	}
	e = f()
	if back := sys.SetThreadCaps(caps); back != 0 {
		return back
	}
	return e
}

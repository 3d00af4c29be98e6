package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

type errno = unix.Errno

const (
	// errStarved never leaves this package: every slot for a descriptor is in use by running calls.
	errStarved errno = 1<<20 + 1
	// resolveFlags keep a name inside its directory whatever it is and whatever happens to the tree meanwhile.
	resolveFlags = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS
	// maxDepth bounds how many directories are opened by name to come to a node.
	maxDepth = 4096
)

// ref is a descriptor of a node, which stays open until put. It may be O_PATH or any other.
type ref struct {
	fd    int
	mount uint16
	typ   uint8
	privs privs
	slot  int32
	h     *handle
}

func (fs *FS) put(r *ref) {
	switch {
	case r.h != nil:
		fs.handles.put(r.h)
	case r.slot >= 0:
		fs.fds.unpin(r.slot)
	}
}

// noRef needs no put.
var noRef = ref{fd: -1, slot: -1}

// letGo puts r early: a call must hold nothing when it resolves more, see resolve2.
func (fs *FS) letGo(r *ref) {
	fs.put(r)
	*r = noRef
}

// fixed says whether node id is always there, and in no table: the root, or the work directory.
func (fs *FS) fixed(id uint64) bool {
	return id == rootID || id == workID && fs.work != nil
}

// fixedRef is a fixed node's, which needs no pin.
func (fs *FS) fixedRef(id uint64, r *ref) {
	*r = ref{fd: fs.root.Int(), typ: typeDir, slot: -1}
	if id == workID {
		r.fd = fs.work.Int()
	}
}

// resolve returns a descriptor of node id: ESTALE if the guest knows no such node, or if its file cannot be found again.
func (fs *FS) resolve(id uint64, r *ref) errno {
	if errno := fs.tryResolve(id, r, false); errno != errStarved {
		return errno
	}
	fs.starved.Lock()
	defer fs.starved.Unlock()
	return fs.tryResolve(id, r, true)
}

// resolve2 is resolve for two nodes. A call that must wait for a slot does so holding none, or, one call at a time, holding
// its first while every other call that holds some runs to its end: so the budget cannot deadlock.
func (fs *FS) resolve2(a, b uint64, ra, rb *ref) errno {
	if errno := fs.tryResolve2(a, b, ra, rb, false); errno != errStarved {
		return errno
	}
	fs.starved.Lock()
	defer fs.starved.Unlock()
	return fs.tryResolve2(a, b, ra, rb, true)
}

func (fs *FS) tryResolve2(a, b uint64, ra, rb *ref, wait bool) errno {
	if errno := fs.tryResolve(a, ra, wait); errno != 0 {
		return errno
	}
	errno := fs.tryResolve(b, rb, wait)
	if errno != 0 {
		fs.put(ra)
	}
	return errno
}

func (fs *FS) tryResolve(id uint64, r *ref, wait bool) errno {
	if fs.fixed(id) {
		fs.fixedRef(id, r)
		return 0
	}
	s, n := fs.nodes.lock(id)
	if n == nil || n.nlookup == 0 {
		s.mu.Unlock()
		return unix.ESTALE
	}
	hot := fs.pinHot(n, r)
	s.mu.Unlock()
	if hot {
		return 0
	}
	return fs.reopen(id, r, wait)
}

// pinHot pins a descriptor that the locked node has.
func (fs *FS) pinHot(n *node, r *ref) bool {
	if n.slot >= 0 {
		*r = ref{fd: fs.fds.pin(n.slot), mount: n.mount, typ: n.typ, privs: n.privs, slot: n.slot}
		return true
	}
	if h := fs.pinHandle(n); h != nil {
		*r = ref{fd: int(h.fd), mount: n.mount, typ: n.typ, privs: n.privs, slot: -1, h: h}
		return true
	}
	return false
}

// pinHandle pins a handle that the locked node has; nil if there is none.
func (fs *FS) pinHandle(n *node) *handle {
	for next := n.handles; next != 0; {
		h := fs.handles.at(next - 1)
		// It is taken off its node's list under the lock but closed before: then it is being released.
		if h.pin(h.state.Load() >> handleGenShift) {
			return h
		}
		next = h.next
	}
	return nil
}

// reopen opens a node that has no descriptor: by its file handle, or else by name from the nearest directory above it that
// can be had, downwards.
func (fs *FS) reopen(id uint64, r *ref, wait bool) errno {
	var (
		room  [16]uint64
		chain = room[:0]
		loc   location
	)
	for cur := id; ; {
		if fs.fixed(cur) {
			fs.fixedRef(cur, r)
			break
		}
		s, n := fs.nodes.lock(cur)
		if n == nil {
			s.mu.Unlock()
			return unix.ESTALE
		}
		if fs.pinHot(n, r) {
			s.mu.Unlock()
			break
		}
		_, slot, _ := splitID(cur)
		s.describe(slot, n, &loc)
		s.mu.Unlock()
		if loc.hasHandle() {
			if errno := fs.openStep(cur, nil, &loc, r, wait); errno != 0 {
				return errno
			}
			break
		}
		if loc.nameLen == 0 || len(chain) == maxDepth {
			return unix.ESTALE
		}
		chain = append(chain, cur)
		cur = loc.parent
	}
	for i := len(chain) - 1; i >= 0; i-- {
		cur := chain[i]
		s, n := fs.nodes.lock(cur)
		if n == nil {
			s.mu.Unlock()
			fs.put(r)
			return unix.ESTALE
		}
		var next ref
		if fs.pinHot(n, &next) {
			s.mu.Unlock()
		} else {
			_, slot, _ := splitID(cur)
			s.describe(slot, n, &loc)
			s.mu.Unlock()
			if errno := fs.openStep(cur, r, &loc, &next, wait); errno != 0 {
				fs.put(r)
				return errno
			}
		}
		fs.put(r)
		*r = next
	}
	return 0
}

// openStep opens node id, which is at loc, by its file handle or by name in parent, and gives it the descriptor.
func (fs *FS) openStep(id uint64, parent *ref, loc *location, r *ref, wait bool) errno {
	slot, ok := fs.reserve()
	if !ok {
		if !wait {
			return errStarved
		}
		slot = fs.reserveWait()
	}
	fd, errno := fs.openAt(parent, loc)
	if errno != 0 {
		fs.fds.putBack(slot)
		return errno
	}
	if loc.typ == typeDir {
		fs.probe(fs.mounts.at(loc.mount), fd)
	}
	s, n := fs.nodes.lock(id)
	if n == nil {
		s.mu.Unlock()
		_ = unix.Close(fd)
		fs.fds.putBack(slot)
		return unix.ESTALE
	}
	fs.adopt(n, id, slot, fd, r)
	s.mu.Unlock()
	return 0
}

// adopt gives the locked node the descriptor fd in a reserved slot, or, if another call was faster, pins what it has.
func (fs *FS) adopt(n *node, id uint64, slot int32, fd int, r *ref) {
	if n.slot >= 0 {
		_ = unix.Close(fd) // an O_PATH descriptor's: it cannot sleep
		fs.fds.putBack(slot)
	} else {
		fs.fds.fill(slot, fd, id)
		fs.nodes.shards[id%shards].setSlot(n, slot)
	}
	fs.pinHot(n, r)
}

// openAt opens what is at loc and makes sure that by name it is still the same file.
func (fs *FS) openAt(parent *ref, loc *location) (int, errno) {
	if loc.hasHandle() {
		return fs.openByHandle(loc.mount, &loc.handle, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	}
	if parent == nil || parent.typ != typeDir {
		return -1, unix.ESTALE
	}
	fd, errno := openPath(parent.fd, &loc.name[0])
	switch errno {
	case 0:
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
		return -1, unix.ESTALE
	default:
		return -1, errno
	}
	var st unix.Statx_t
	if errno = sys.Statx(fd, nil, statxFlags, statxMask, &st); errno == 0 {
		m, ok := fs.mounts.of(&st, loc.mount)
		if ok && keyOf(&st, m) == loc.key {
			return fd, 0
		}
		errno = unix.ESTALE
	}
	_ = unix.Close(fd)
	return -1, errno
}

// openByHandle opens the file with handle h on a mount.
func (fs *FS) openByHandle(mount uint16, h *sys.FileHandle, flags int) (int, errno) {
	fd, errno := sys.OpenByHandle(fs.mounts.at(mount).fd.Int(), h, flags)
	if errno == unix.ENOMEM {
		// ext4 says so, too, of a file that is gone whose inode number is just being given to another
		// (fs/inode.c, iget_locked; fs/ext4/inode.c, __ext4_iget).
		errno = unix.ESTALE
	}
	return fd, limit(errno)
}

// openPath opens name in dirfd as O_PATH.
func openPath(dirfd int, name *byte) (int, errno) {
	for try := 0; ; try++ {
		fd, errno := sys.Openat2(dirfd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0, resolveFlags)
		if !moving(errno) || try == 8 {
			return fd, limit(errno)
		}
	}
}

// moving says that openat2 met a tree that was being changed: EXDEV is for a file that was moved elsewhere after it was
// found (Linux fs/namei.c, complete_walk).
func moving(e errno) bool {
	return e == unix.EAGAIN || e == unix.EXDEV
}

// limit turns the process's own limit into one that is not the guest's process's.
func limit(e errno) errno {
	if e == unix.EMFILE {
		return unix.ENFILE
	}
	return e
}

package passthrough

import (
	"io"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// maxLockFiles bounds the descriptors kept for POSIX locks; ENOLCK answers beyond.
const maxLockFiles = 1 << 14

// lockFiles are the open files that POSIX locks are on. An open file description of its own for each node and owner makes the
// host's kernel tell owners apart (open file description locks, fcntl(2)): the guest's from each other, from those of other
// daemons, and from the host's programs. flock(2)'s need none: they are the handle's.
type lockFiles struct {
	mu     sync.Mutex
	files  map[uint64]map[uint64]*lockFile // by node, then owner
	count  int
	closed uint64 // sessions ended: what was opened in one is not kept in the next
}

// lockFile holds all locks of one owner on one node.
type lockFile struct {
	fd    int
	write bool   // open for writing too, which a write lock takes
	fh    uint64 // of the handle by way of which it was opened: no lock outlives that
	pid   uint32 // in the guest, of who asked last; mu of lockFiles is held

	// Guarded by mu of lockFiles: calls that use it, and whether it is to be closed after the last.
	users int
	gone  bool
}

// use returns owner's file on node for a call, nil if there is none.
func (l *lockFiles) use(node, owner uint64) *lockFile {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.files[node][owner]
	if f != nil {
		f.users++
	}
	return f
}

// done ends use.
func (l *lockFiles) done(f *lockFile) {
	l.mu.Lock()
	f.users--
	last := f.gone && f.users == 0
	l.mu.Unlock()
	if last {
		_ = unix.Close(f.fd)
	}
}

// add puts f in place for owner and uses it, unless somebody else has been quicker: then it is theirs that is returned.
func (l *lockFiles) add(node, owner uint64, f *lockFile, session uint64) (*lockFile, errno) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed != session {
		return nil, unix.EBADF
	}
	owners := l.files[node]
	if other := owners[owner]; other != nil {
		other.users++
		return other, 0
	}
	if l.count >= maxLockFiles {
		return nil, unix.ENOLCK
	}
	if l.files == nil {
		l.files = make(map[uint64]map[uint64]*lockFile)
	}
	if owners == nil {
		owners = make(map[uint64]*lockFile)
		l.files[node] = owners
	}
	owners[owner] = f
	l.count++
	f.users++
	return f, 0
}

// drop lets go of the files on node that which says, and with them of their locks: at once, or when the calls end that use them.
func (l *lockFiles) drop(node uint64, which func(owner uint64, f *lockFile) bool) {
	var closing []int
	l.mu.Lock()
	owners := l.files[node]
	for owner, f := range owners {
		if which(owner, f) {
			delete(owners, owner)
			l.count--
			closing = f.leave(closing)
		}
	}
	if owners != nil && len(owners) == 0 {
		delete(l.files, node)
	}
	l.mu.Unlock()
	closeAll(closing)
}

// dropAll lets go of all.
func (l *lockFiles) dropAll() {
	var closing []int
	l.mu.Lock()
	for _, owners := range l.files {
		for _, f := range owners {
			closing = f.leave(closing)
		}
	}
	l.files, l.count = nil, 0
	l.closed++
	l.mu.Unlock()
	closeAll(closing)
}

// leave adds f's descriptor to closing, unless a call uses it.
func (f *lockFile) leave(closing []int) []int {
	f.gone = true
	if f.users == 0 {
		closing = append(closing, f.fd)
	}
	return closing
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// session returns what add wants to know of the time before the file was opened.
func (l *lockFiles) session() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// others returns, in use, the files on node of other owners than owner.
func (l *lockFiles) others(node, owner uint64) (files []*lockFile) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for other, f := range l.files[node] {
		if other != owner {
			f.users++
			files = append(files, f)
		}
	}
	return files
}

func (l *lockFiles) pidOf(f *lockFile) uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return f.pid
}

// flockOf is lk as fcntl(2) has it. Ends are below 1<<63; the largest stands for the end of all files, which may grow.
func flockOf(lk *fuseproto.FileLock) unix.Flock_t {
	fl := unix.Flock_t{Type: int16(lk.Typ), Whence: io.SeekStart, Start: int64(lk.Start)}
	if lk.End < math.MaxInt64 {
		fl.Len = int64(lk.End-lk.Start) + 1
	}
	return fl
}

// Getlk implements fsbackend.Locker.
func (fs *FS) Getlk(_ *fsbackend.Context, in *fuseproto.LkIn, out *fuseproto.LkOut) fsbackend.Errno {
	h, errno := fs.useHandle(in.Fh, in.NodeId)
	if errno != 0 {
		return errno
	}
	defer fs.handles.put(h)
	fd := int(h.fd) // has no such locks itself, as its owner has none
	if f := fs.locks.use(in.NodeId, in.Owner); f != nil {
		defer fs.locks.done(f)
		fd = f.fd
	}
	fl := flockOf(&in.Lk)
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &fl); err != nil {
		return toErrno(err)
	}
	if fl.Type == unix.F_UNLCK {
		out.Lk = fuseproto.FileLock{Start: in.Lk.Start, End: in.Lk.End, Typ: unix.F_UNLCK}
		return fsbackend.OK
	}
	out.Lk = fuseproto.FileLock{Start: uint64(fl.Start), End: math.MaxInt64, Typ: uint32(fl.Type)}
	if fl.Len > 0 {
		out.Lk.End = uint64(fl.Start + fl.Len - 1)
	}
	if fl.Pid == -1 { // an open file description's, which may be ours
		out.Lk.Pid = fs.lockedBy(in, &fl)
	}
	return fsbackend.OK
}

// lockedBy returns the guest's process that has the lock fl in the way of in, 0 if none of the guest's has or it is one of
// several who share it. The kernel does not say whose the lock is; it is not in the way of its owner, though.
func (fs *FS) lockedBy(in *fuseproto.LkIn, fl *unix.Flock_t) (pid uint32) {
	for _, f := range fs.locks.others(in.NodeId, in.Owner) {
		probe := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: fl.Start, Len: 1}
		if err := unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_GETLK, &probe); err == nil && probe.Type == unix.F_UNLCK {
			pid = fs.locks.pidOf(f)
		}
		fs.locks.done(f)
	}
	return pid
}

// Setlk implements fsbackend.Locker.
func (fs *FS) Setlk(_ *fsbackend.Context, in *fuseproto.LkIn) fsbackend.Errno {
	h, errno := fs.useHandle(in.Fh, in.NodeId)
	if errno != 0 {
		return errno
	}
	defer fs.handles.put(h)
	if in.LkFlags&fuseproto.FUSE_LK_FLOCK != 0 {
		return flock(h, in.Lk.Typ)
	}
	f := fs.locks.use(in.NodeId, in.Owner)
	if f == nil {
		if in.Lk.Typ == unix.F_UNLCK {
			return fsbackend.OK
		}
		if f, errno = fs.openLockFile(h, in); errno != 0 {
			return errno
		}
	}
	defer fs.locks.done(f)
	if in.Lk.Typ == unix.F_WRLCK && !f.write {
		return unix.ENOLCK // the guest may write the file, but not at the time of its first lock
	}
	fl := flockOf(&in.Lk)
	if err := unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_SETLK, &fl); err != nil {
		return limitLocks(toErrno(err))
	}
	if in.Lk.Typ != unix.F_UNLCK {
		fs.locks.mu.Lock()
		f.pid = in.Lk.Pid
		fs.locks.mu.Unlock()
	}
	return fsbackend.OK
}

// openLockFile makes the file of an owner that has none yet on the node of h, in use. A read lock now may be followed by a
// write lock, by way of another handle: it is open for both, if it can be.
func (fs *FS) openLockFile(h *handle, in *fuseproto.LkIn) (*lockFile, errno) {
	session := fs.locks.session()
	fd, write := -1, true
	var errno errno
	for _, mode := range [...]int{unix.O_RDWR, int(h.flags) & unix.O_ACCMODE} {
		fd, errno = sys.Reopen(fs.procfd.Int(), int(h.fd), mode|unix.O_CLOEXEC|unix.O_NONBLOCK)
		if write = mode != unix.O_RDONLY; errno == 0 {
			break
		}
	}
	if errno != 0 {
		return nil, limitLocks(errno)
	}
	own := &lockFile{fd: fd, write: write, fh: in.Fh}
	f, errno := fs.locks.add(in.NodeId, in.Owner, own, session)
	if f != own {
		_ = unix.Close(fd)
	}
	if h.state.Load()&handleClosed != 0 {
		fs.unlockHandle(in.NodeId, in.Fh) // RELEASE has come meanwhile, and may not have seen it
	}
	return f, errno
}

// limitLocks is what is said of a limit that the guest does not know: ENOLCK, which programs expect here.
func limitLocks(errno errno) errno {
	if errno == unix.EMFILE || errno == unix.ENFILE {
		return unix.ENOLCK
	}
	return errno
}

// flock sets the lock that all of a file has, on the guest's own handle.
func flock(h *handle, typ uint32) errno {
	how := unix.LOCK_UN
	switch typ {
	case unix.F_RDLCK:
		how = unix.LOCK_SH | unix.LOCK_NB
	case unix.F_WRLCK:
		how = unix.LOCK_EX | unix.LOCK_NB
	}
	if err := unix.Flock(int(h.fd), how); err != nil {
		return toErrno(err)
	}
	return 0
}

// unlockOwner drops the POSIX locks that owner has on node (FLUSH).
func (fs *FS) unlockOwner(node, owner uint64) {
	fs.locks.drop(node, func(other uint64, _ *lockFile) bool { return other == owner })
}

// unlockHandle drops those set by way of fh (RELEASE). The guest's own F_OFD_SETLK makes such: their owner never comes with
// a FLUSH.
func (fs *FS) unlockHandle(node, fh uint64) {
	fs.locks.drop(node, func(_ uint64, f *lockFile) bool { return f.fh == fh })
}

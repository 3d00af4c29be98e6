package passthrough

import (
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// mount is a mount (and on Btrfs a subvolume of it) that the share reaches.
type mount struct {
	id    uint64 // STATX_MNT_ID
	major uint32
	minor uint32

	// state is what is known of file handles on this mount; fd, a directory on it opened for reading, is set before
	// it becomes handlesWork. There is one such descriptor for each mount, beyond the budget of inode descriptors.
	state atomic.Uint32
	fd    *sys.FD
	// local says that the file system is known to describe an inode in memory, or to find it by its handle, without asking anybody.
	local atomic.Bool
}

const (
	handlesUnknown = iota
	handlesProbing
	handlesWork
	handlesFail
)

// mounts only grows: a number given out stays valid. Readers take no lock.
type mounts struct {
	list atomic.Pointer[[]*mount]
	mu   sync.Mutex
}

const maxMounts = 1 << 16

func (m *mount) is(st *unix.Statx_t) bool {
	return m.id == st.Mnt_id && m.minor == st.Dev_minor && m.major == st.Dev_major
}

func (ms *mounts) at(i uint16) *mount { return (*ms.list.Load())[i] }

// of returns the number of the mount that st is on; near is tried first. It fails when there are too many.
func (ms *mounts) of(st *unix.Statx_t, near uint16) (uint16, bool) {
	var list []*mount
	if p := ms.list.Load(); p != nil {
		list = *p
		if int(near) < len(list) && list[near].is(st) {
			return near, true
		}
		if i := slices.IndexFunc(list, func(m *mount) bool { return m.is(st) }); i >= 0 {
			return uint16(i), true
		}
	}
	return ms.add(st)
}

func (ms *mounts) add(st *unix.Statx_t) (uint16, bool) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	var list []*mount
	if p := ms.list.Load(); p != nil {
		list = *p
	}
	if i := slices.IndexFunc(list, func(m *mount) bool { return m.is(st) }); i >= 0 {
		return uint16(i), true
	}
	if len(list) == maxMounts {
		return 0, false
	}
	grown := append(slices.Clone(list), &mount{id: st.Mnt_id, major: st.Dev_major, minor: st.Dev_minor})
	ms.list.Store(&grown)
	return uint16(len(list)), true
}

func (ms *mounts) close() {
	if p := ms.list.Load(); p != nil {
		for _, m := range *p {
			_ = m.fd.Close()
		}
	}
}

// probe finds out whether m's file system is a local one and whether file handles work on it, given a descriptor of a directory on it. It is done once for a mount.
func (fs *FS) probe(m *mount, dirfd int) {
	if m.state.Load() != handlesUnknown || !m.state.CompareAndSwap(handlesUnknown, handlesProbing) {
		return
	}
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(dirfd, &sfs); err == nil {
		m.local.Store(localFS(int64(sfs.Type)))
	}
	if fs.cfg.NoFileHandles || fs.mayNotOpenHandles.Load() {
		m.state.Store(handlesFail)
		return
	}
	state := uint32(handlesFail)
	var h sys.FileHandle
	if errno := sys.NameToHandle(dirfd, &h); errno == 0 {
		if fd, errno := sys.OpenDot(dirfd, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC); errno == 0 {
			m.fd = sys.NewFD(fd)
			switch probe, errno := sys.OpenByHandle(fd, &h, unix.O_PATH|unix.O_CLOEXEC); errno {
			case 0:
				_ = unix.Close(probe)
				state = handlesWork
			case unix.EPERM:
				fs.mayNotOpenHandles.Store(true) // on no mount
			}
		}
	}
	m.state.Store(state)
}

// localFS says whether a file system with this magic number (statfs(2)) answers fstat(2) out of memory alone (fs/*/inode.c, their
// getattr). Those that lie on others, or elsewhere, are not among them.
func localFS(magic int64) bool {
	switch magic {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
		return true
	}
	return false
}

// takeHandle keeps the file handle of the file behind fd in node id and in h, and says whether it has one.
func (fs *FS) takeHandle(id uint64, fd int, mountIndex uint16, typ uint8, h *sys.FileHandle) bool {
	m := fs.mounts.at(mountIndex)
	if typ == typeDir {
		fs.probe(m, fd)
	}
	if m.state.Load() != handlesWork {
		return false
	}
	if errno := sys.NameToHandle(fd, h); errno != 0 {
		h.Bytes = 0
		return false
	}
	sh, n := fs.nodes.lock(id)
	if n != nil {
		_, slot, _ := splitID(id)
		sh.setHandle(slot, n, h)
	}
	sh.mu.Unlock()
	return true
}

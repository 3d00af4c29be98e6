// Package passthrough serves a directory of the host.
//
// # Inodes without descriptors
//
// A node that the guest knows is found again in one of three ways. Those used of late have an O_PATH descriptor, out of
// a bounded number (fdcache.go). What loses it is known by a file handle from then on, where the process may open such
// (CAP_DAC_READ_SEARCH) and the file system has them. Everything else, and what was only seen in a listing, is known by its
// directory and name, and checked to be the same file when it is opened (resolve.go). A file that a guest has open is
// reached through that handle, too, so that it needs no name any more.
//
// LOOKUP opens a descriptor at once: what it found can be opened even if the host replaces it right after. Where a name no
// longer leads to the file the answer is ESTALE, upon which the guest's kernel looks the path up anew.
//
// # The process
//
// The daemon sets its umask to 0 and gives up its supplementary groups; a guest's umask is applied before (Maker). As root
// (with CAP_SETUID and CAP_SETGID) calls that create take the caller's ids for the moment; otherwise the guest's root and
// the daemon's own uid act as the daemon, and others may not create. The guest's kernel checks all other permissions.
// /proc must be mounted when New is called, unless Config.ProcFD stands for it, and must stay so before Linux 6.13 (extended
// attributes).
package passthrough

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

const rootID = fuseproto.FUSE_ROOT_ID

// workID is the nodeid of Config.WorkDirFD: it has no generation, so that it is no other node's.
const workID = rootID + 1

// File types as node.typ and DT_* have them, S_IFMT >> 12.
const (
	typeDir     = unix.DT_DIR
	typeRegular = unix.DT_REG
	typeSymlink = unix.DT_LNK
)

// Defaults and limits of Config.
const (
	DefaultMaxFDs    = 4096
	MinMaxFDs        = 8
	MaxMaxFDs        = 1 << 24
	DefaultMaxInodes = 1 << 24
)

// Config describes a directory to serve.
type Config struct {
	// Dir is the directory's path.
	Dir string
	// DirFD is a descriptor of the directory, which stays the caller's, for where Dir is out of reach; if 0, New opens Dir.
	DirFD int
	// WorkDirFD is a descriptor, which stays the caller's, of a directory outside Dir on the same mount, for a backend on top of this
	// one (WorkNode); 0 if there is none.
	WorkDirFD int
	// MaxFDs bounds the descriptors kept for inodes: if 0, DefaultMaxFDs or half of RLIMIT_NOFILE, whichever is less.
	// Beyond it there is one for each mount in the tree, two of the backend's own, one for each file that the guest
	// has open, and one for each file and process of the guest that has it locked. A mount that the guest has looked at stays busy on the host until the FS is closed.
	MaxFDs int
	// MaxInodes bounds the inodes known to the guest at a time, DefaultMaxInodes if 0; ENFILE answers beyond.
	MaxInodes int
	// NoFileHandles makes names the only way to find a node without a descriptor.
	NoFileHandles bool
	// PreserveNoatime passes O_NOATIME on to the host.
	PreserveNoatime bool
	// PosixACL offers POSIX ACLs to guests.
	PosixACL bool
	// SecurityLabel offers guests to label what they create (FUSE_SECURITY_CTX).
	SecurityLabel bool
	// NoOpen has the guest read without opening (noOpenFlags), where it can and nothing else is shared with it: for trees that it may
	// not change and keeps for good. A quarter of MaxFDs more descriptors are kept of what it reads. Where its mount is not
	// read-only, a program that opens a file for writing is told so by its write(2) only, and locks are the guest's own.
	NoOpen bool
	// ProcFD is a descriptor of /proc/self/fd, which stays the caller's, for where /proc is out of reach; if 0, New opens it.
	ProcFD int
	// Log is told of what is worth knowing once; nothing if nil.
	Log *slog.Logger
}

// Validate says what is wrong with c.
func (c *Config) Validate() error {
	switch {
	case c.Dir == "":
		return errors.New("no directory to share: expected its path")
	case c.MaxFDs != 0 && (c.MaxFDs < MinMaxFDs || c.MaxFDs > MaxMaxFDs):
		return fmt.Errorf("at most %d inode descriptors: expected 0 or %d to %d", c.MaxFDs, MinMaxFDs, MaxMaxFDs)
	case c.MaxInodes < 0 || c.MaxInodes > shards<<slotBits:
		return fmt.Errorf("at most %d inodes: expected 0 to %d", c.MaxInodes, shards<<slotBits)
	}
	return nil
}

// FS is a directory being served. It implements every interface of fsbackend.
type FS struct {
	cfg     Config
	log     *slog.Logger
	root    *sys.FD // O_PATH
	work    *sys.FD // O_PATH; nil if there is none
	procfd  *sys.FD // /proc/self/fd
	xattr   sys.ProcXattr
	ids     identity
	remote  bool // the root's file system is elsewhere: any call may sleep for long, and close reports errors
	rootIno uint64

	nodes   table
	fds     fdCache
	handles handleTable
	locks   lockFiles
	// unopened are among handles.
	unopened unopened
	mounts   mounts
	// mayNotOpenHandles says that the process lacks CAP_DAC_READ_SEARCH: no mount need be tried.
	mayNotOpenHandles atomic.Bool
	features          atomic.Uint64 // FUSE_* INIT flags in force

	_        [64]byte   // what follows changes
	starved  sync.Mutex // held by the one call that may wait for a descriptor slot
	tooMany  sync.Once  // log of MaxInodes
	trimming atomic.Bool
	trims    sync.WaitGroup
}

// New opens cfg.Dir. The caller closes the FS.
func New(cfg Config) (*FS, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.MaxFDs == 0 {
		cfg.MaxFDs = DefaultMaxFDs
		var limit unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
			cfg.MaxFDs = int(max(min(uint64(cfg.MaxFDs), limit.Cur/2), MinMaxFDs))
		}
	}
	if cfg.MaxInodes == 0 {
		cfg.MaxInodes = DefaultMaxInodes
	}
	fs := &FS{cfg: cfg, log: cfg.Log}
	if fs.log == nil {
		fs.log = slog.New(slog.DiscardHandler)
	}
	if err := fs.open(); err != nil {
		_ = fs.Close()
		return nil, fmt.Errorf("share directory %s: %w", cfg.Dir, err)
	}
	return fs, nil
}

func (fs *FS) open() error {
	fd, err := openOr(fs.cfg.DirFD, fs.cfg.Dir)
	if err != nil {
		return err
	}
	fs.root = sys.NewFD(fd)
	var st unix.Statx_t
	if errno := sys.Statx(fd, nil, statxFlags, statxMask, &st); errno != 0 {
		return fmt.Errorf("statx: %w", errno)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return errors.New("not a directory: expected one to share")
	}
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return errors.New("statx reports no mount id: expected Linux 5.8 or later")
	}
	dot := [2]byte{'.'}
	probe, errno := sys.Openat2(fd, &dot[0], unix.O_PATH|unix.O_CLOEXEC, 0, resolveFlags)
	if errno != 0 {
		return fmt.Errorf("openat2, which keeps the guest inside: %w: expected Linux 5.6 or later and a seccomp profile that allows it", errno)
	}
	_ = unix.Close(probe)
	proc, err := openOr(fs.cfg.ProcFD, "/proc/self/fd")
	if err != nil {
		return fmt.Errorf("open /proc/self/fd: %w: expected /proc to be mounted", err)
	}
	fs.procfd = sys.NewFD(proc)
	fs.xattr = sys.NewProcXattr(proc)
	if err := fs.ids.init(); err != nil {
		return err
	}
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(fd, &sfs); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	if err := fs.openWork(&st); err != nil {
		return err
	}
	fs.remote = remoteFS(int64(sfs.Type))
	fs.nodes.init(fs.cfg.MaxInodes, fs.fds.drop)
	fs.fds.init(fs.cfg.MaxFDs)
	fs.rootIno = st.Ino
	root, _ := fs.mounts.of(&st, 0)
	fs.probe(fs.mounts.at(root), fd)
	fs.log.Debug("opened share directory", "dir", fs.cfg.Dir, "file_handles", fs.mounts.at(root).state.Load() == handlesWork)
	return nil
}

// openWork takes the work directory, which must be where files can be moved to from the root that st describes.
func (fs *FS) openWork(root *unix.Statx_t) error {
	if fs.cfg.WorkDirFD == 0 {
		return nil
	}
	fd, err := openOr(fs.cfg.WorkDirFD, "")
	if err != nil {
		return fmt.Errorf("work directory: %w", err)
	}
	fs.work = sys.NewFD(fd)
	var st unix.Statx_t
	if errno := sys.Statx(fd, nil, statxFlags, statxMask, &st); errno != 0 {
		return fmt.Errorf("statx of the work directory: %w", errno)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Mnt_id != root.Mnt_id {
		return errors.New("the work directory is not one on the same mount: expected a directory that files can be renamed from and to")
	}
	return nil
}

// WorkNode returns the nodeid of Config.WorkDirFD, which is never forgotten; 0 if there is none. No path leads to it.
func (fs *FS) WorkNode() uint64 {
	if fs.work == nil {
		return 0
	}
	return workID
}

// openOr returns an O_PATH descriptor of its own: of what fd is open for or, if that is 0, of path.
func openOr(fd int, path string) (int, error) {
	if fd != 0 {
		return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	return unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
}

// WantFlags implements fsbackend.Wanter.
func (fs *FS) WantFlags(defaults uint64) uint64 {
	if fs.cfg.PosixACL {
		defaults |= fuseproto.FUSE_POSIX_ACL | fuseproto.FUSE_DONT_MASK | fuseproto.FUSE_SETXATTR_EXT
	}
	if fs.cfg.SecurityLabel {
		defaults |= fuseproto.FUSE_SECURITY_CTX
	}
	if fs.cfg.NoOpen {
		defaults |= noOpenFlags
		// Without the first an OPEN that truncates is a SETATTR, which can be refused; without RELEASE locks would stay.
		defaults &^= fuseproto.FUSE_ATOMIC_O_TRUNC | fuseproto.FUSE_POSIX_LOCKS | fuseproto.FUSE_FLOCK_LOCKS
	}
	return defaults
}

// Slow implements fsbackend.Slow: a server that does not answer must not hold up the requests that need none of it.
func (fs *FS) Slow() bool {
	return fs.remote
}

// Init implements fsbackend.Initer.
func (fs *FS) Init(f fsbackend.Features) {
	if f.Flags&noOpenFlags != 0 {
		fs.unopened.init(fs.cfg.MaxFDs)
	}
	fs.features.Store(f.Flags)
}

func (fs *FS) has(flags uint64) bool {
	return fs.features.Load()&flags == flags
}

// Reset implements fsbackend.Backend.
func (fs *FS) Reset() {
	// Nodes go first: none of them gets another handle then.
	var slots []int32
	for i := range fs.nodes.shards {
		slots = fs.nodes.clear(i, slots[:0])
		for _, slot := range slots {
			fs.fds.drop(slot)
		}
	}
	fs.closeHandles()
	fs.locks.dropAll()
	fs.trim()
}

// Close implements fsbackend.Backend.
func (fs *FS) Close() error {
	fs.closeHandles()
	fs.locks.dropAll()
	fs.fds.closeAll()
	fs.mounts.close()
	fs.trims.Wait()
	return errors.Join(fs.procfd.Close(), fs.root.Close(), fs.work.Close())
}

// trimStep is how many nodes must go before their memory is given back to the host.
const trimStep = 1 << 13

// trim gives memory back after most nodes have gone: Go's own scavenger would keep it for minutes.
func (fs *FS) trim() {
	if !fs.nodes.shrunk() || !fs.trimming.CompareAndSwap(false, true) {
		return
	}
	fs.trims.Go(func() {
		for fs.nodes.shrunk() {
			fs.nodes.peak.Store(fs.nodes.count.Load())
			debug.FreeOSMemory()
		}
		fs.trimming.Store(false)
		fs.trim() // the last nodes may have gone just now
	})
}

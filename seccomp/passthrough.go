package seccomp

import "golang.org/x/sys/unix"

// PassthroughOwner is the owner of what Passthrough returns.
const PassthroughOwner = "passthrough"

// PassthroughOptions are the properties of the directories served that decide which calls it takes to serve them. With
// several directories each is set if it is for one of them.
type PassthroughOptions struct {
	// Writable is for a directory that is not read-only: the core refuses changes of others.
	Writable bool
	// Xattr is for extended attributes; access control lists and security labels are such.
	Xattr bool
	// FileHandles is for inodes that are found again by file handle. These reach all of a file system, and not only the
	// directory that is served.
	FileHandles bool
	// SwitchIDs is for files that are created with the ids of the guest's user, as root does it.
	SwitchIDs bool
	// Locks is for locks that the guest shares with the host.
	Locks bool
	// Opens is for directories that come while the daemon runs.
	Opens bool
}

// Passthrough returns the rules for what fsbackend/passthrough calls once it is open. Paths are relative to a descriptor
// everywhere but in the extended attributes of kernels before 6.13.
func Passthrough(o PassthroughOptions) Source {
	s := Source{Owner: PassthroughOwner, Rules: make(Rules)}
	s.addRules(passthroughRead)
	if o.Writable {
		s.addRules(passthroughWrite)
	}
	if o.Xattr {
		s.addRules(passthroughXattrRead)
	}
	if o.Xattr && o.Writable {
		s.addRules(passthroughXattrWrite)
	}
	if o.FileHandles {
		s.addRules(passthroughHandles)
	}
	if o.SwitchIDs && o.Writable {
		s.addRules(passthroughIDs)
	}
	if o.Locks {
		s.addRules(passthroughLocks)
	}
	if o.Opens {
		s.addRules(passthroughOpens)
	}
	return s
}

// beneath allows a call whose first argument is a directory: a descriptor, and not the working directory. The calls of every
// LOOKUP, GETATTR and OPEN go without: an absolute path, which no filter sees, makes nothing of that argument, and calls
// allowed by number alone are answered from a bitmap of the kernel's (kernel/seccomp.c, seccomp_cache_check_allow).
var beneath = PerArg{0: NonNegativeFD{}}

// The FS_IOC_* of include/uapi/linux/fs.h that x/sys does not have.
const (
	fsIocFsgetxattr = 0x801c581f
	fsIocFssetxattr = 0x401c5820
)

var passthroughRead = Rules{
	"fcntl":      where(1, Int32(unix.F_DUPFD_CLOEXEC)),                                        // FLUSH on a network's file system: a copy to close
	"fdatasync":  MatchAll{},                                                                   // FSYNC
	"fstatfs":    MatchAll{},                                                                   // STATFS
	"fsync":      MatchAll{},                                                                   // FSYNC, FSYNCDIR
	"getdents64": MatchAll{},                                                                   // READDIR
	"ioctl":      where(1, uint32Is(unix.FS_IOC_GETFLAGS), uint32Is(fsIocFsgetxattr)),          // IOCTL: lsattr(1)
	"lseek":      where(2, Int32(unix.SEEK_SET), Int32(unix.SEEK_DATA), Int32(unix.SEEK_HOLE)), // READDIR; LSEEK
	"openat":     MatchAll{},                                                                   // OPEN: through /proc/self/fd; OPENDIR: "."; TMPFILE
	"openat2":    MatchAll{},                                                                   // LOOKUP, CREATE. What it opens, and how, lies in memory
	"readlinkat": beneath,                                                                      // READLINK
	"statx":      MatchAll{},                                                                   // nearly all
	"syncfs":     MatchAll{},                                                                   // SYNCFS
}

var passthroughWrite = Rules{
	"copy_file_range": PerArg{5: Int32(0)},                                                                                                                   // COPY_FILE_RANGE
	"fallocate":       MatchAll{},                                                                                                                            // FALLOCATE
	"fchmodat":        beneath,                                                                                                                               // SETATTR: through /proc/self/fd
	"fchownat":        PerArg{0: NonNegativeFD{}, 4: Int32(unix.AT_EMPTY_PATH)},                                                                              // SETATTR
	"ftruncate":       MatchAll{},                                                                                                                            // SETATTR
	"ioctl":           where(1, uint32Is(unix.FS_IOC_SETFLAGS), uint32Is(fsIocFssetxattr)),                                                                   // IOCTL: chattr(1)
	"linkat":          PerArg{0: NonNegativeFD{}, 2: NonNegativeFD{}, 4: Int32(unix.AT_SYMLINK_FOLLOW)},                                                      // LINK: through /proc/self/fd
	"mkdirat":         beneath,                                                                                                                               // MKDIR
	"mknodat":         beneath,                                                                                                                               // MKNOD
	"renameat2":       PerArg{0: NonNegativeFD{}, 2: NonNegativeFD{}, 4: bitsAllowed32(unix.RENAME_NOREPLACE | unix.RENAME_EXCHANGE | unix.RENAME_WHITEOUT)}, // RENAME, RENAME2
	"symlinkat":       PerArg{1: NonNegativeFD{}},                                                                                                            // SYMLINK
	"unlinkat":        PerArg{0: NonNegativeFD{}, 2: bitsAllowed32(unix.AT_REMOVEDIR)},                                                                       // UNLINK, RMDIR
	"utimensat":       beneath,                                                                                                                               // SETATTR: through /proc/self/fd
	// Writing as a user does, who has no CAP_FSETID, clears set-user-id bits: WRITE, OPEN, SETATTR.
	"capget": MatchAll{},
	"capset": MatchAll{},
}

// The calls with a path are for kernels before 6.13; those with a descriptor are not in every libseccomp.
var (
	passthroughXattrRead = Rules{
		"getxattr":    MatchAll{}, // GETXATTR
		"getxattrat":  beneath,
		"listxattr":   MatchAll{}, // LISTXATTR
		"listxattrat": beneath,
	}
	passthroughXattrWrite = Rules{
		"removexattr":   MatchAll{}, // REMOVEXATTR
		"removexattrat": beneath,
		"setxattr":      PerArg{4: bitsAllowed32(unix.XATTR_CREATE | unix.XATTR_REPLACE)}, // SETXATTR
		"setxattrat":    beneath,
	}
)

var passthroughHandles = Rules{
	"name_to_handle_at": PerArg{0: NonNegativeFD{}, 4: Int32(unix.AT_EMPTY_PATH)},
	"open_by_handle_at": beneath,
}

var passthroughLocks = Rules{
	"fcntl": where(1, Int32(unix.F_OFD_GETLK), Int32(unix.F_OFD_SETLK)), // GETLK, SETLK, SETLKW. None waits
	"flock": where(1, bitsAllowed32(unix.LOCK_SH|unix.LOCK_EX|unix.LOCK_UN|unix.LOCK_NB)),
}

// passthroughOpens is what New does besides with a directory that it is given by a descriptor.
var passthroughOpens = Rules{
	"capget":    MatchAll{},
	"fcntl":     where(1, Int32(unix.F_DUPFD_CLOEXEC)),
	"geteuid":   MatchAll{},
	"getegid":   MatchAll{},
	"getgroups": MatchAll{},
	// Can inodes be found again by file handle? Without CAP_DAC_READ_SEARCH, and thus without FileHandles, the kernel says no.
	"name_to_handle_at": passthroughHandles["name_to_handle_at"],
	"open_by_handle_at": passthroughHandles["open_by_handle_at"],
}

// passthroughIDs changes the thread's effective ids for a call that creates. The real and saved ones stay, so that it can
// change back.
var passthroughIDs = Rules{
	"setgroups": MatchAll{},
	"setresgid": PerArg{0: Int32(-1), 2: Int32(-1)},
	"setresuid": PerArg{0: Int32(-1), 2: Int32(-1)},
}

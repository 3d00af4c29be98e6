package fuseproto

// Protocol version spoken, FUSE_KERNEL_VERSION and FUSE_KERNEL_MINOR_VERSION of Linux 7.2.
const (
	FUSE_KERNEL_VERSION       = 7
	FUSE_KERNEL_MINOR_VERSION = 45
)

// FUSE_ROOT_ID is the nodeid of a tree's root.
const FUSE_ROOT_ID = 1

// INIT flags: the low 32 bits are fuse_init_in.flags, the high ones flags2 (valid with FUSE_INIT_EXT).
const (
	FUSE_ASYNC_READ           uint64 = 1 << 0
	FUSE_POSIX_LOCKS          uint64 = 1 << 1
	FUSE_FILE_OPS             uint64 = 1 << 2
	FUSE_ATOMIC_O_TRUNC       uint64 = 1 << 3
	FUSE_EXPORT_SUPPORT       uint64 = 1 << 4
	FUSE_BIG_WRITES           uint64 = 1 << 5
	FUSE_DONT_MASK            uint64 = 1 << 6
	FUSE_SPLICE_WRITE         uint64 = 1 << 7
	FUSE_SPLICE_MOVE          uint64 = 1 << 8
	FUSE_SPLICE_READ          uint64 = 1 << 9
	FUSE_FLOCK_LOCKS          uint64 = 1 << 10
	FUSE_HAS_IOCTL_DIR        uint64 = 1 << 11
	FUSE_AUTO_INVAL_DATA      uint64 = 1 << 12
	FUSE_DO_READDIRPLUS       uint64 = 1 << 13
	FUSE_READDIRPLUS_AUTO     uint64 = 1 << 14
	FUSE_ASYNC_DIO            uint64 = 1 << 15
	FUSE_WRITEBACK_CACHE      uint64 = 1 << 16
	FUSE_NO_OPEN_SUPPORT      uint64 = 1 << 17
	FUSE_PARALLEL_DIROPS      uint64 = 1 << 18
	FUSE_HANDLE_KILLPRIV      uint64 = 1 << 19
	FUSE_POSIX_ACL            uint64 = 1 << 20
	FUSE_ABORT_ERROR          uint64 = 1 << 21
	FUSE_MAX_PAGES            uint64 = 1 << 22
	FUSE_CACHE_SYMLINKS       uint64 = 1 << 23
	FUSE_NO_OPENDIR_SUPPORT   uint64 = 1 << 24
	FUSE_EXPLICIT_INVAL_DATA  uint64 = 1 << 25
	FUSE_MAP_ALIGNMENT        uint64 = 1 << 26
	FUSE_SUBMOUNTS            uint64 = 1 << 27
	FUSE_HANDLE_KILLPRIV_V2   uint64 = 1 << 28
	FUSE_SETXATTR_EXT         uint64 = 1 << 29
	FUSE_INIT_EXT             uint64 = 1 << 30
	FUSE_INIT_RESERVED        uint64 = 1 << 31
	FUSE_SECURITY_CTX         uint64 = 1 << 32
	FUSE_HAS_INODE_DAX        uint64 = 1 << 33
	FUSE_CREATE_SUPP_GROUP    uint64 = 1 << 34
	FUSE_HAS_EXPIRE_ONLY      uint64 = 1 << 35
	FUSE_DIRECT_IO_ALLOW_MMAP uint64 = 1 << 36
	FUSE_PASSTHROUGH          uint64 = 1 << 37
	FUSE_NO_EXPORT_SUPPORT    uint64 = 1 << 38
	FUSE_HAS_RESEND           uint64 = 1 << 39
	FUSE_ALLOW_IDMAP          uint64 = 1 << 40
	FUSE_OVER_IO_URING        uint64 = 1 << 41
	FUSE_REQUEST_TIMEOUT      uint64 = 1 << 42
)

// Flags of single requests and replies.
const (
	FATTR_MODE         uint32 = 1 << 0
	FATTR_UID          uint32 = 1 << 1
	FATTR_GID          uint32 = 1 << 2
	FATTR_SIZE         uint32 = 1 << 3
	FATTR_ATIME        uint32 = 1 << 4
	FATTR_MTIME        uint32 = 1 << 5
	FATTR_FH           uint32 = 1 << 6
	FATTR_ATIME_NOW    uint32 = 1 << 7
	FATTR_MTIME_NOW    uint32 = 1 << 8
	FATTR_LOCKOWNER    uint32 = 1 << 9
	FATTR_CTIME        uint32 = 1 << 10
	FATTR_KILL_SUIDGID uint32 = 1 << 11

	FOPEN_DIRECT_IO              uint32 = 1 << 0
	FOPEN_KEEP_CACHE             uint32 = 1 << 1
	FOPEN_NONSEEKABLE            uint32 = 1 << 2
	FOPEN_CACHE_DIR              uint32 = 1 << 3
	FOPEN_STREAM                 uint32 = 1 << 4
	FOPEN_NOFLUSH                uint32 = 1 << 5
	FOPEN_PARALLEL_DIRECT_WRITES uint32 = 1 << 6

	FUSE_RELEASE_FLUSH          uint32 = 1 << 0
	FUSE_RELEASE_FLOCK_UNLOCK   uint32 = 1 << 1
	FUSE_GETATTR_FH             uint32 = 1 << 0
	FUSE_WRITE_CACHE            uint32 = 1 << 0
	FUSE_WRITE_LOCKOWNER        uint32 = 1 << 1
	FUSE_WRITE_KILL_SUIDGID     uint32 = 1 << 2
	FUSE_READ_LOCKOWNER         uint32 = 1 << 1
	FUSE_LK_FLOCK               uint32 = 1 << 0
	FUSE_OPEN_KILL_SUIDGID      uint32 = 1 << 0
	FUSE_FSYNC_FDATASYNC        uint32 = 1 << 0
	FUSE_ATTR_SUBMOUNT          uint32 = 1 << 0
	FUSE_ATTR_DAX               uint32 = 1 << 1
	FUSE_SETXATTR_ACL_KILL_SGID uint32 = 1 << 0

	FUSE_IOCTL_COMPAT       uint32 = 1 << 0
	FUSE_IOCTL_UNRESTRICTED uint32 = 1 << 1
	FUSE_IOCTL_DIR          uint32 = 1 << 4
)

// FUSE_EXT_GROUPS is the fuse_ext_header.type of a supplementary group list; types up to FUSE_MAX_NR_SECCTX are the
// nr_secctx of a security context (enum fuse_ext_type).
const (
	FUSE_MAX_NR_SECCTX = 31
	FUSE_EXT_GROUPS    = 32
)

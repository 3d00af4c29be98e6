// Package fsbackend says what a tree of files must do to be served to a guest.
//
// A backend implements Backend and as many of the small interfaces below as it has something to say to; what it leaves
// out answers ENOSYS (and the guest's kernel then stops asking, or falls back), except where an interface says otherwise.
// The interfaces are looked up once, when the backend is attached (Resolve).
//
// # The contract
//
//   - Calls come from many threads at once. Each call belongs to one guest request and is answered by its return.
//   - Nodeids and file handles are the backend's own numbers, below 1<<48 (the bits above belong to the share that holds
//     the backend). Node FUSE_ROOT_ID exists from the start and is never forgotten. Nodeids come from a guest: an unknown
//     one is ESTALE, an unknown handle, or one of another node, EBADF.
//   - Every reply that carries an EntryOut with NodeId != 0 and every READDIRPLUS entry added counts one lookup of that
//     node; Forget takes lookups back, and at 0 the number may die. Counts never go below 0.
//   - In structs (*fuseproto.XxxIn) are private copies whose lengths are checked; Names are checked too: no '/', no NUL,
//     1 to 255 bytes, and never "." or "..". Both, and a Context, are only valid until the call returns.
//   - Offsets and sizes are the guest's: they may be any uint64. Flags may hold anything.
//   - An errno is what the guest sees: return it bare, from the kernel where it came from there.
//   - A call that might sleep while Context.MayBlock is false returns ErrMayBlock before it has had any effect, and is made
//     again, from a thread that may sleep. Calls for which that is the rule (fsync and the like) are made so at once.
//     Only READ and WRITE may do so after a part: the next call is for what is left.
//   - READDIR and READDIRPLUS that have added entries are answered with them, whatever errno comes after.
//   - EntryValid and AttrValid left 0 are filled in from the share's cache policy (1 in the Nsec field says "at once
//     stale"); likewise FOPEN_* cache flags.
//   - Attr.Ino, Mode with its file type, and Nlink are never 0 for a file that exists.
package fsbackend

import (
	"syscall"

	"github.com/sluicefs/sluice/fuseproto"
)

// Errno is a Linux errno as the guest sees it, positive; OK is 0.
type Errno = syscall.Errno

const (
	// OK is success.
	OK Errno = 0
	// ErrMayBlock never reaches a guest: it asks for the same call again from a thread that may sleep.
	ErrMayBlock Errno = 1 << 20
)

// Context is what a request brings beyond its own struct.
type Context struct {
	// Caller is the process in the guest: its fsuid and fsgid (real ones for ACCESS), and pid.
	Caller fuseproto.Caller
	// SuppGroups are groups of the caller beyond Caller.Gid that the guest found to matter (FUSE_CREATE_SUPP_GROUP):
	// nil where the request has none.
	SuppGroups []uint32
	// Secctx are the security attributes to set on what the request creates (FUSE_SECURITY_CTX).
	Secctx []Secctx
	// MayBlock says that this thread may sleep; see ErrMayBlock.
	MayBlock bool
	// Cancel is closed when nobody waits for the answer any more. It is nil where MayBlock is false.
	Cancel <-chan struct{}
	// Part is what PartOf has answered for this request, whose thread it runs on; nil where nobody has asked. If the node
	// belongs to another part by now, the call is ESTALE.
	Part *Part
	// Shard is where what is counted for every call is to be counted: threads that are to be fast have different ones, as far
	// as there are. It stays the same while the call runs.
	Shard uint8
}

// Secctx is one security attribute of a new file: an extended attribute's name and value.
type Secctx struct {
	Name  Name
	Value []byte
}

// Features is what a session has agreed on with its guest.
type Features struct {
	Minor uint32 // FUSE protocol minor spoken
	Flags uint64 // FUSE_* INIT flags in force
}

// Has says whether all of flags are in force.
func (f Features) Has(flags uint64) bool {
	return f.Flags&flags == flags
}

// Backend is the least that a tree has to do.
type Backend interface {
	// Lookup finds name in the directory parent, sets out.NodeId, Generation and Attr, and counts a lookup of the node.
	Lookup(c *Context, parent uint64, name Name, out *fuseproto.EntryOut) Errno
	// Forget takes n lookups of node back. Nothing answers it; unknown nodes and too large n are ignored.
	Forget(node, n uint64)
	// Getattr sets out.Attr; in.Fh() is valid where in.Flags() has FUSE_GETATTR_FH.
	Getattr(c *Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) Errno
	// Reset ends a session: every lookup count and file handle goes (locks too), the tree stays. Calls may still be running;
	// they end normally, or with ESTALE or EBADF. A new session may follow.
	Reset()
	// Close ends the backend and returns what it holds. No call follows or is running.
	Close() error
}

// Initer is told what each session agreed on, before its first call and after the Reset of the one before.
type Initer interface {
	Init(f Features)
}

// Wanter names INIT flags that the backend is ready for beyond the default ones (FUSE_POSIX_ACL, …) and those it cannot
// do (FUSE_HANDLE_KILLPRIV_V2, …). Without it, DefaultFlags are wanted.
type Wanter interface {
	WantFlags(defaults uint64) uint64
}

// Slow marks a backend all of whose calls may sleep (a network's, say): Slow returns true, and MayBlock is then always true.
type Slow interface {
	Slow() bool
}

// Complete marks a backend some of whose directories tell all by their listings, so that who knows them need not ask for other names:
// an overlay, of its lower layers. It is not for those where a lookup makes files appear that no listing has. Wrappers do not have it by
// themselves.
type Complete interface {
	// ListsAll says whether the directory node, open as fh, has the names that a READDIR lists and no others, for as long as nobody
	// changes it.
	ListsAll(node, fh uint64) bool
}

// Readlinker reads symbolic links.
type Readlinker interface {
	// Readlink writes the target to dst, without a NUL.
	Readlink(c *Context, node uint64, dst *Sink) Errno
}

// Maker creates directory entries. What is created belongs to Context.Caller; in.Umask is already applied to in.Mode unless
// FUSE_DONT_MASK is in force. out counts a lookup.
type Maker interface {
	Mknod(c *Context, in *fuseproto.MknodIn, name Name, out *fuseproto.EntryOut) Errno
	Mkdir(c *Context, in *fuseproto.MkdirIn, name Name, out *fuseproto.EntryOut) Errno
	// Symlink makes name point to target, which is any 1 to 4095 bytes without NUL.
	Symlink(c *Context, parent uint64, name, target Name, out *fuseproto.EntryOut) Errno
}

// Linker makes hard links: name in directory in.NodeId for node in.Oldnodeid. out counts a lookup.
type Linker interface {
	Link(c *Context, in *fuseproto.LinkIn, name Name, out *fuseproto.EntryOut) Errno
}

// Remover removes directory entries.
type Remover interface {
	Unlink(c *Context, parent uint64, name Name) Errno
	Rmdir(c *Context, parent uint64, name Name) Errno
}

// Renamer renames from directory in.NodeId to in.Newdir. in.Flags are RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT
// or others: what is not known is EINVAL.
type Renamer interface {
	Rename(c *Context, in *fuseproto.Rename2In, oldName, newName Name) Errno
}

// Setattrer changes attributes: in.Valid (FATTR_*) says which. out.Attr is what they are after it.
type Setattrer interface {
	Setattr(c *Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) Errno
}

// Opener opens files. A backend without it is stateless: OPEN answers ENOSYS only if the guest can do without
// (FUSE_NO_OPEN_SUPPORT), and succeeds with handle 0 otherwise.
type Opener interface {
	// Open sets out.Fh and may set out.OpenFlags. in.Flags are open(2) flags without O_CREAT, O_EXCL, O_NOCTTY; in.Mode has
	// FUSE_OPEN_KILL_SUIDGID.
	Open(c *Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno
	// Release closes in.Fh; it cannot fail.
	Release(c *Context, in *fuseproto.ReleaseIn)
}

// Creater creates and opens a regular file in one step. out counts a lookup.
type Creater interface {
	// Create honours O_EXCL in in.Flags: without it an existing file is opened.
	Create(c *Context, in *fuseproto.CreateIn, name Name, out *fuseproto.CreateOut) Errno
}

// Tmpfiler makes and opens a file without a name in the directory in.NodeId (O_TMPFILE). out counts a lookup.
type Tmpfiler interface {
	Tmpfile(c *Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) Errno
}

// Reader reads files.
type Reader interface {
	// Read fills dst from byte in.Offset on; what it does not fill is past the end of the file.
	Read(c *Context, in *fuseproto.ReadIn, dst *Sink) Errno
}

// Writer writes files.
type Writer interface {
	// Write takes src to byte in.Offset on and returns how many bytes it took: fewer than src has only on an error after
	// some. in.WriteFlags has FUSE_WRITE_CACHE, FUSE_WRITE_KILL_SUIDGID.
	Write(c *Context, in *fuseproto.WriteIn, src *Source) (uint32, Errno)
}

// Flusher is told of each close(2) of a handle. Without it, FLUSH answers ENOSYS and the guest stops sending it.
type Flusher interface {
	Flush(c *Context, in *fuseproto.FlushIn) Errno
}

// Fsyncer writes a file or directory to its medium. It is called only where it may sleep.
type Fsyncer interface {
	Fsync(c *Context, in *fuseproto.FsyncIn) Errno
	Fsyncdir(c *Context, in *fuseproto.FsyncIn) Errno
}

// Syncfser writes the file system that node is on to its medium. It is called only where it may sleep.
type Syncfser interface {
	Syncfs(c *Context, node uint64) Errno
}

// DirReader lists directories. A backend without OpenDir state may return handle 0 always.
type DirReader interface {
	Opendir(c *Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno
	// Readdir adds entries from the one after offset in.Offset (0: the first) to out until it is full or there are no more.
	// Offsets of entries stay valid while others come and go. "." and ".." may be listed or left out.
	Readdir(c *Context, in *fuseproto.ReadIn, out *DirList) Errno
	Releasedir(c *Context, in *fuseproto.ReleaseIn)
}

// DirPlusReader lists directories and looks every entry up in one call: each AddPlus with a NodeId counts a lookup, and
// none is counted for an entry that did not fit (ask DirList.Fits first). "." and ".." get NodeId 0.
type DirPlusReader interface {
	Readdirplus(c *Context, in *fuseproto.ReadIn, out *DirList) Errno
}

// StatFSer describes the file system that node is on. Without it, a file system without any blocks is reported.
type StatFSer interface {
	Statfs(c *Context, node uint64, out *fuseproto.StatfsOut) Errno
}

// XattrReader reads extended attributes.
type XattrReader interface {
	// Getxattr writes name's value to dst. Where dst has no room at all (in.Size 0), it returns the value's size and writes
	// nothing. A value longer than dst.Len() is ERANGE.
	Getxattr(c *Context, in *fuseproto.GetxattrIn, name Name, dst *Sink) (size uint32, errno Errno)
	// Listxattr writes the names, each with its NUL, in the same manner.
	Listxattr(c *Context, in *fuseproto.GetxattrIn, dst *Sink) (size uint32, errno Errno)
}

// XattrWriter changes extended attributes.
type XattrWriter interface {
	// Setxattr sets name to value; in.Flags are XATTR_CREATE, XATTR_REPLACE, in.SetXAttrFlags has FUSE_SETXATTR_ACL_KILL_SGID.
	Setxattr(c *Context, in *fuseproto.SetxattrIn, name Name, value []byte) Errno
	Removexattr(c *Context, node uint64, name Name) Errno
}

// Accesser checks access(2) for the guest; Linux asks only without default_permissions, which virtio-fs always has.
type Accesser interface {
	Access(c *Context, in *fuseproto.AccessIn) Errno
}

// Fallocater changes a file's space: in.Mode is FALLOC_FL_*. It is called only where it may sleep.
type Fallocater interface {
	Fallocate(c *Context, in *fuseproto.FallocateIn) Errno
}

// Lseeker finds data and holes: in.Whence is SEEK_DATA or SEEK_HOLE.
type Lseeker interface {
	Lseek(c *Context, in *fuseproto.LseekIn, out *fuseproto.LseekOut) Errno
}

// CopyFileRanger copies between two open files and returns the bytes copied. It is called only where it may sleep.
type CopyFileRanger interface {
	CopyFileRange(c *Context, in *fuseproto.CopyFileRangeIn) (uint64, Errno)
}

// Filer has other backends of this process use what files of the host lie behind its open ones: to copy from one to another
// without reading it all. No guest asks for it.
type Filer interface {
	// FileOf calls use with a descriptor of node's open file fh, which is good until use returns, and returns what that does; EBADF
	// if there is no such file, and EOPNOTSUPP if it is none of the host's.
	FileOf(node, fh uint64, use func(fd int) Errno) Errno
}

// Statxer answers statx(2); without it the guest falls back to GETATTR and has no birth time.
type Statxer interface {
	Statx(c *Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) Errno
}

// Ioctler answers the restricted ioctls that a guest's kernel passes on (FS_IOC_GETFLAGS and its like).
type Ioctler interface {
	// Ioctl is given the argument's bytes and writes the result's to dst. An unknown in.Cmd is ENOTTY.
	Ioctl(c *Context, in *fuseproto.IoctlIn, arg []byte, dst *Sink) (result int32, errno Errno)
}

// Locker keeps locks that the guest shares with others: other guests, other shares of the same files, and programs of the
// host. It is asked only in sessions that have FUSE_POSIX_LOCKS or FUSE_FLOCK_LOCKS in force, and only for the kind agreed on.
//
// A POSIX lock belongs to in.Owner and the node. All that an owner holds on a node goes with any FLUSH of that node by the
// same owner (FlushIn.LockOwner), which must not answer ENOSYS then; what was set by way of a handle goes with that handle's
// RELEASE at the latest. A lock with FUSE_LK_FLOCK in in.LkFlags is flock(2)'s: it is on all of the file, belongs to the
// handle in.Fh, and goes with its RELEASE.
type Locker interface {
	// Getlk finds a lock in the way of in.Lk, a POSIX lock, and describes it in out.Lk, with Typ F_UNLCK if there is none. Pid
	// is 0 unless it is of a process of this guest.
	Getlk(c *Context, in *fuseproto.LkIn, out *fuseproto.LkOut) Errno
	// Setlk sets or, with Typ F_UNLCK, takes away a lock. It never waits for another one: EAGAIN says that one is in the way.
	// SETLKW is made of it above: the call is made again and again.
	Setlk(c *Context, in *fuseproto.LkIn) Errno
}

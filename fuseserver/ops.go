package fuseserver

import (
	"syscall"

	"github.com/sluicefs/sluice/fuseproto"
)

// op is what has to hold before an opcode's handler runs, and the handler.
type op struct {
	handle func(*Server, *Request) Errno
	undo   func(*Server, *Request) // takes back a call that succeeded, when its reply is lost
	in     uint16                  // bytes of the struct behind the header, at least
	out    uint16                  // bytes of the reply's struct
	names  [2]nameRule             // strings behind the struct
	flags  opFlags
}

type opFlags uint16

const (
	modifies opFlags = 1 << iota // EROFS where read-only
	mayBlock                     // goes to a thread that may sleep at once
	inline                       // never does, not even for a slow backend
	noReply
	anytime  // needs no session
	whole    // all of the request is copied
	extended // extensions may follow the names
	data     // the reply's data goes straight to guest memory, behind the struct
	source   // data or a list follows the struct and stays in guest memory
	partless // is for no part of the backend, or for several
	owed     // see Request.Owed
	waits    // its calls may end in Request.Waiting
)

// maxDataOut is the largest op.out beside data.
const maxDataOut = 16

// Sizes of replies' structs.
const (
	entryOut  = 128
	attrOut   = 104
	openOut   = 16
	createOut = entryOut + openOut
)

// unknown is the row of every opcode that has none.
var unknown = op{handle: opUnknown, flags: anytime | inline | partless}

// otherEndian is the row of FUSE_INIT_BSWAP_RESERVED.
var otherEndian = op{handle: opOtherEndian, flags: anytime | inline | partless}

// opcodes is one more than the largest that has a row.
const opcodes = uint32(fuseproto.FUSE_COPY_FILE_RANGE_64) + 1

// ops is indexed by opcode. To serve another one: its structs and their sizes go to fuseproto, its row here, its handler to
// ops_*.go by subject, an example to examples in ops_test.go; tests miss what is left out.
var ops = [opcodes]op{
	fuseproto.FUSE_INIT:    {handle: opInit, in: 16, out: 64, flags: anytime | whole | mayBlock | partless},
	fuseproto.FUSE_DESTROY: {handle: opDestroy, flags: anytime | mayBlock | partless},

	fuseproto.FUSE_LOOKUP:       {handle: opLookup, undo: undoEntry, out: entryOut, names: [2]nameRule{nameLookup}, flags: whole},
	fuseproto.FUSE_FORGET:       {handle: opForget, in: 8, flags: noReply | partless},
	fuseproto.FUSE_BATCH_FORGET: {handle: opBatchForget, in: 8, flags: noReply | source | partless},

	fuseproto.FUSE_GETATTR:  {handle: opGetattr, in: 16, out: attrOut},
	fuseproto.FUSE_SETATTR:  {handle: opSetattr, in: 88, out: attrOut, flags: modifies},
	fuseproto.FUSE_STATX:    {handle: opStatx, in: 24, out: 288},
	fuseproto.FUSE_ACCESS:   {handle: opAccess, in: 8},
	fuseproto.FUSE_STATFS:   {handle: opStatfs, out: 80},
	fuseproto.FUSE_READLINK: {handle: opReadlink, flags: data},

	fuseproto.FUSE_SYMLINK: {handle: opSymlink, undo: undoEntry, out: entryOut, names: [2]nameRule{nameNew, nameTarget}, flags: modifies | whole | extended},
	fuseproto.FUSE_MKNOD:   {handle: opMknod, undo: undoEntry, in: 16, out: entryOut, names: [2]nameRule{nameNew}, flags: modifies | whole | extended},
	fuseproto.FUSE_MKDIR:   {handle: opMkdir, undo: undoEntry, in: 8, out: entryOut, names: [2]nameRule{nameNew}, flags: modifies | whole | extended},
	fuseproto.FUSE_LINK:    {handle: opLink, undo: undoEntry, in: 8, out: entryOut, names: [2]nameRule{nameNew}, flags: modifies | whole},
	fuseproto.FUSE_UNLINK:  {handle: opUnlink, names: [2]nameRule{nameOld}, flags: modifies | whole},
	fuseproto.FUSE_RMDIR:   {handle: opRmdir, names: [2]nameRule{nameOld}, flags: modifies | whole},
	fuseproto.FUSE_RENAME:  {handle: opRename, in: 8, names: [2]nameRule{nameOld, nameOld}, flags: modifies | whole},
	fuseproto.FUSE_RENAME2: {handle: opRename2, in: 16, names: [2]nameRule{nameOld, nameOld}, flags: modifies | whole},

	fuseproto.FUSE_OPEN:   {handle: opOpen, undo: undoOpen, in: 8, out: openOut},
	fuseproto.FUSE_CREATE: {handle: opCreate, undo: undoCreate, in: 16, out: createOut, names: [2]nameRule{nameNew}, flags: modifies | whole | extended},
	// Linux sends a name with TMPFILE, "/", which says nothing.
	fuseproto.FUSE_TMPFILE:            {handle: opTmpfile, undo: undoCreate, in: 16, out: createOut, flags: modifies | whole | extended},
	fuseproto.FUSE_READ:               {handle: opRead, in: 40, flags: data},
	fuseproto.FUSE_WRITE:              {handle: opWrite, in: 40, out: 8, flags: modifies | source},
	fuseproto.FUSE_FLUSH:              {handle: opFlush, in: 24},
	fuseproto.FUSE_RELEASE:            {handle: opRelease, in: 24, flags: owed},
	fuseproto.FUSE_FSYNC:              {handle: opFsync, in: 16, flags: mayBlock},
	fuseproto.FUSE_FALLOCATE:          {handle: opFallocate, in: 32, flags: modifies | mayBlock},
	fuseproto.FUSE_LSEEK:              {handle: opLseek, in: 24, out: 8},
	fuseproto.FUSE_COPY_FILE_RANGE:    {handle: opCopyFileRange, in: 56, out: 8, flags: modifies | mayBlock},
	fuseproto.FUSE_COPY_FILE_RANGE_64: {handle: opCopyFileRange64, in: 56, out: 8, flags: modifies | mayBlock},

	fuseproto.FUSE_GETLK:  {handle: opGetlk, in: 48, out: 24},
	fuseproto.FUSE_SETLK:  {handle: opSetlk, in: 48},
	fuseproto.FUSE_SETLKW: {handle: opSetlkw, in: 48, flags: waits},

	fuseproto.FUSE_OPENDIR:     {handle: opOpendir, undo: undoOpendir, in: 8, out: openOut},
	fuseproto.FUSE_READDIR:     {handle: opReaddir, in: 40, flags: data},
	fuseproto.FUSE_READDIRPLUS: {handle: opReaddirplus, undo: undoReaddirplus, in: 40, flags: data},
	fuseproto.FUSE_RELEASEDIR:  {handle: opReleasedir, in: 24, flags: owed},
	fuseproto.FUSE_FSYNCDIR:    {handle: opFsyncdir, in: 16, flags: mayBlock},

	fuseproto.FUSE_GETXATTR:    {handle: opGetxattr, in: 8, names: [2]nameRule{nameXattr}, flags: whole | data},
	fuseproto.FUSE_LISTXATTR:   {handle: opListxattr, in: 8, flags: data},
	fuseproto.FUSE_SETXATTR:    {handle: opSetxattr, in: 8, names: [2]nameRule{nameXattr}, flags: modifies | whole},
	fuseproto.FUSE_REMOVEXATTR: {handle: opRemovexattr, names: [2]nameRule{nameXattr}, flags: modifies | whole},

	fuseproto.FUSE_SYNCFS:    {handle: opSyncfs, in: 8, flags: mayBlock},
	fuseproto.FUSE_IOCTL:     {handle: opIoctl, in: 32, out: 16, flags: whole | data},
	fuseproto.FUSE_INTERRUPT: {handle: opInterrupt, in: 8, flags: anytime | inline | noReply | partless},
}

// notImplemented are fuse.h's other opcodes, which answer ENOSYS, and why.
var notImplemented = map[fuseproto.Opcode]string{
	fuseproto.FUSE_BMAP:          "only for file systems on a block device of the guest",
	fuseproto.FUSE_POLL:          "its wake-up is a notification, which Linux has no virtio-fs queue for",
	fuseproto.FUSE_NOTIFY_REPLY:  "answers a notification, and none is sent",
	fuseproto.FUSE_SETUPMAPPING:  "there is no DAX window",
	fuseproto.FUSE_REMOVEMAPPING: "there is no DAX window",
	fuseproto.CUSE_INIT:          "belongs to character devices in user space",
}

// opUnknown answers opcodes without a row: the guest's kernel learns from ENOSYS not to send them again.
func opUnknown(s *Server, _ *Request) Errno {
	s.stats.Unsupported.Add(1)
	return syscall.ENOSYS
}

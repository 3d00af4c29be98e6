package fuseproto

import (
	"structs"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Requests. Each begins with the InHeader, so that it lies over a request from its first byte.
type (
	InHeader        = fuse.InHeader
	Caller          = fuse.Caller // who asks, a part of the InHeader
	ForgetIn        = fuse.ForgetIn
	GetattrIn       = fuse.GetAttrIn
	SetattrIn       = fuse.SetAttrIn
	MknodIn         = fuse.MknodIn
	MkdirIn         = fuse.MkdirIn
	Rename2In       = fuse.RenameIn
	LinkIn          = fuse.LinkIn
	OpenIn          = fuse.OpenIn
	CreateIn        = fuse.CreateIn
	ReadIn          = fuse.ReadIn
	WriteIn         = fuse.WriteIn
	ReleaseIn       = fuse.ReleaseIn
	FlushIn         = fuse.FlushIn
	FsyncIn         = fuse.FsyncIn
	SetxattrIn      = fuse.SetXAttrIn // without FUSE_SETXATTR_EXT only its first 8 bytes are sent
	GetxattrIn      = fuse.GetXAttrIn
	AccessIn        = fuse.AccessIn
	InitIn          = fuse.InitIn
	IoctlIn         = fuse.IoctlIn
	FallocateIn     = fuse.FallocateIn
	LseekIn         = fuse.LseekIn
	CopyFileRangeIn = fuse.CopyFileRangeIn
	StatxIn         = fuse.StatxIn
	LkIn            = fuse.LkIn // of GETLK, SETLK and SETLKW
	InterruptIn     = fuse.InterruptIn
)

// RenameIn is fuse_rename_in (FUSE_RENAME).
type RenameIn struct {
	_ structs.HostLayout
	InHeader
	Newdir uint64
}

// SyncfsIn is fuse_syncfs_in.
type SyncfsIn struct {
	_ structs.HostLayout
	InHeader
	Padding uint64
}

// BatchForgetIn is fuse_batch_forget_in; Count ForgetOne follow.
type BatchForgetIn struct {
	_ structs.HostLayout
	InHeader
	Count uint32
	Dummy uint32
}

// ForgetOne is fuse_forget_one.
type ForgetOne struct {
	_       structs.HostLayout
	Nodeid  uint64
	Nlookup uint64
}

// Replies, each after an OutHeader.
type (
	OutHeader   = fuse.OutHeader
	Attr        = fuse.Attr // its Flags are FUSE_ATTR_*
	EntryOut    = fuse.EntryOut
	AttrOut     = fuse.AttrOut
	OpenOut     = fuse.OpenOut
	CreateOut   = fuse.CreateOut
	WriteOut    = fuse.WriteOut
	StatfsOut   = fuse.StatfsOut
	GetxattrOut = fuse.GetXAttrOut
	InitOut     = fuse.InitOut
	IoctlOut    = fuse.IoctlOut
	LseekOut    = fuse.LseekOut
	StatxOut    = fuse.StatxOut
	LkOut       = fuse.LkOut
	Statx       = fuse.Statx
)

// FileLock is fuse_file_lock: from byte Start to End, both included.
type FileLock = fuse.FileLock

// CopyFileRangeOut is fuse_copy_file_range_out (FUSE_COPY_FILE_RANGE_64).
type CopyFileRangeOut struct {
	_           structs.HostLayout
	BytesCopied uint64
}

// Dirent is fuse_dirent without its name, which follows and is padded with zeros to 8 bytes.
type Dirent struct {
	_       structs.HostLayout
	Ino     uint64
	Off     uint64 // where the next READDIR goes on
	Namelen uint32 // bytes
	Type    uint32 // DT_*
}

// Direntplus is fuse_direntplus without its name.
type Direntplus struct {
	_ structs.HostLayout
	EntryOut
	Dirent
}

// SecctxHeader is fuse_secctx_header.
type SecctxHeader struct {
	_        structs.HostLayout
	Size     uint32 // bytes of the whole list, this header and padding included
	NrSecctx uint32
}

// Secctx is fuse_secctx: the name with its NUL and Size bytes of value follow.
type Secctx struct {
	_       structs.HostLayout
	Size    uint32
	Padding uint32
}

// ExtHeader is fuse_ext_header.
type ExtHeader struct {
	_    structs.HostLayout
	Size uint32 // bytes, this header and padding included
	Type uint32
}

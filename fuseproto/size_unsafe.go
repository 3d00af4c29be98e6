package fuseproto

import "unsafe"

const (
	inHeaderSize = 40
	entryOutSize = 128
	openOutSize  = 16
	direntSize   = 24
)

// Structs have the size that fuse.h of Linux 7.2 gives them: an index other than 0 does not compile.
var (
	_ = [1]struct{}{}[unsafe.Sizeof(InHeader{})-inHeaderSize]
	_ = [1]struct{}{}[unsafe.Sizeof(Caller{})-12]
	_ = [1]struct{}{}[unsafe.Sizeof(ForgetIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(GetattrIn{})-inHeaderSize-16]
	_ = [1]struct{}{}[unsafe.Sizeof(SetattrIn{})-inHeaderSize-88]
	_ = [1]struct{}{}[unsafe.Sizeof(MknodIn{})-inHeaderSize-16]
	_ = [1]struct{}{}[unsafe.Sizeof(MkdirIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(RenameIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(Rename2In{})-inHeaderSize-16]
	_ = [1]struct{}{}[unsafe.Sizeof(LinkIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(OpenIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(CreateIn{})-inHeaderSize-16]
	_ = [1]struct{}{}[unsafe.Sizeof(ReadIn{})-inHeaderSize-40]
	_ = [1]struct{}{}[unsafe.Sizeof(WriteIn{})-inHeaderSize-40]
	_ = [1]struct{}{}[unsafe.Sizeof(ReleaseIn{})-inHeaderSize-24]
	_ = [1]struct{}{}[unsafe.Sizeof(FlushIn{})-inHeaderSize-24]
	_ = [1]struct{}{}[unsafe.Sizeof(FsyncIn{})-inHeaderSize-16]
	_ = [1]struct{}{}[unsafe.Sizeof(SetxattrIn{})-inHeaderSize-16]
	_ = [1]struct{}{}[unsafe.Sizeof(GetxattrIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(AccessIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(InitIn{})-inHeaderSize-64]
	_ = [1]struct{}{}[unsafe.Sizeof(IoctlIn{})-inHeaderSize-32]
	_ = [1]struct{}{}[unsafe.Sizeof(FallocateIn{})-inHeaderSize-32]
	_ = [1]struct{}{}[unsafe.Sizeof(LseekIn{})-inHeaderSize-24]
	_ = [1]struct{}{}[unsafe.Sizeof(CopyFileRangeIn{})-inHeaderSize-56]
	_ = [1]struct{}{}[unsafe.Sizeof(StatxIn{})-inHeaderSize-24]
	_ = [1]struct{}{}[unsafe.Sizeof(LkIn{})-inHeaderSize-48]
	_ = [1]struct{}{}[unsafe.Sizeof(InterruptIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(SyncfsIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(BatchForgetIn{})-inHeaderSize-8]
	_ = [1]struct{}{}[unsafe.Sizeof(ForgetOne{})-16]

	_ = [1]struct{}{}[unsafe.Sizeof(OutHeader{})-16]
	_ = [1]struct{}{}[unsafe.Sizeof(Attr{})-88]
	_ = [1]struct{}{}[unsafe.Sizeof(EntryOut{})-entryOutSize]
	_ = [1]struct{}{}[unsafe.Sizeof(AttrOut{})-104]
	_ = [1]struct{}{}[unsafe.Sizeof(OpenOut{})-openOutSize]
	_ = [1]struct{}{}[unsafe.Sizeof(CreateOut{})-entryOutSize-openOutSize]
	_ = [1]struct{}{}[unsafe.Sizeof(WriteOut{})-8]
	_ = [1]struct{}{}[unsafe.Sizeof(StatfsOut{})-80]
	_ = [1]struct{}{}[unsafe.Sizeof(GetxattrOut{})-8]
	_ = [1]struct{}{}[unsafe.Sizeof(InitOut{})-64]
	_ = [1]struct{}{}[unsafe.Sizeof(IoctlOut{})-16]
	_ = [1]struct{}{}[unsafe.Sizeof(LseekOut{})-8]
	_ = [1]struct{}{}[unsafe.Sizeof(StatxOut{})-288]
	_ = [1]struct{}{}[unsafe.Sizeof(Statx{})-256]
	_ = [1]struct{}{}[unsafe.Sizeof(FileLock{})-24]
	_ = [1]struct{}{}[unsafe.Sizeof(LkOut{})-24]
	_ = [1]struct{}{}[unsafe.Sizeof(CopyFileRangeOut{})-8]
	_ = [1]struct{}{}[unsafe.Sizeof(Dirent{})-direntSize]
	_ = [1]struct{}{}[unsafe.Sizeof(Direntplus{})-entryOutSize-direntSize]
	_ = [1]struct{}{}[unsafe.Sizeof(SecctxHeader{})-8]
	_ = [1]struct{}{}[unsafe.Sizeof(Secctx{})-8]
	_ = [1]struct{}{}[unsafe.Sizeof(ExtHeader{})-8]
)

// Fields that a padding in the wrong place would move.
var (
	_ = [1]struct{}{}[unsafe.Offsetof(InHeader{}.TotalExtlen)-36]
	_ = [1]struct{}{}[unsafe.Offsetof(SetattrIn{}.Mode)-inHeaderSize-68]
	_ = [1]struct{}{}[unsafe.Offsetof(RenameIn{}.Newdir)-inHeaderSize]
	_ = [1]struct{}{}[unsafe.Offsetof(InitIn{}.Flags2)-inHeaderSize-16]
	_ = [1]struct{}{}[unsafe.Offsetof(InitOut{}.MaxWrite)-20]
	_ = [1]struct{}{}[unsafe.Offsetof(InitOut{}.Flags2)-32]
	_ = [1]struct{}{}[unsafe.Offsetof(Attr{}.Mode)-60]
	_ = [1]struct{}{}[unsafe.Offsetof(Attr{}.Flags)-84]
	_ = [1]struct{}{}[unsafe.Offsetof(StatxOut{}.Statx)-32]
	_ = [1]struct{}{}[unsafe.Offsetof(Statx{}.Ino)-32]
	_ = [1]struct{}{}[unsafe.Offsetof(Statx{}.RdevMajor)-128]
)

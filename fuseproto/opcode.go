// Package fuseproto is the FUSE wire as include/uapi/linux/fuse.h of Linux 7.2 has it (protocol 7.45): opcodes, flags and
// structs under their own names. Structs are go-fuse's where its layout is the wire's (their first field is then the
// request header, as on the wire), ours where it has none.
package fuseproto

// Opcode is fuse_in_header.opcode.
type Opcode uint32

//go:generate go tool stringer -type=Opcode

// Opcodes, enum fuse_opcode.
const (
	FUSE_LOOKUP             Opcode = 1
	FUSE_FORGET             Opcode = 2
	FUSE_GETATTR            Opcode = 3
	FUSE_SETATTR            Opcode = 4
	FUSE_READLINK           Opcode = 5
	FUSE_SYMLINK            Opcode = 6
	FUSE_MKNOD              Opcode = 8
	FUSE_MKDIR              Opcode = 9
	FUSE_UNLINK             Opcode = 10
	FUSE_RMDIR              Opcode = 11
	FUSE_RENAME             Opcode = 12
	FUSE_LINK               Opcode = 13
	FUSE_OPEN               Opcode = 14
	FUSE_READ               Opcode = 15
	FUSE_WRITE              Opcode = 16
	FUSE_STATFS             Opcode = 17
	FUSE_RELEASE            Opcode = 18
	FUSE_FSYNC              Opcode = 20
	FUSE_SETXATTR           Opcode = 21
	FUSE_GETXATTR           Opcode = 22
	FUSE_LISTXATTR          Opcode = 23
	FUSE_REMOVEXATTR        Opcode = 24
	FUSE_FLUSH              Opcode = 25
	FUSE_INIT               Opcode = 26
	FUSE_OPENDIR            Opcode = 27
	FUSE_READDIR            Opcode = 28
	FUSE_RELEASEDIR         Opcode = 29
	FUSE_FSYNCDIR           Opcode = 30
	FUSE_GETLK              Opcode = 31
	FUSE_SETLK              Opcode = 32
	FUSE_SETLKW             Opcode = 33
	FUSE_ACCESS             Opcode = 34
	FUSE_CREATE             Opcode = 35
	FUSE_INTERRUPT          Opcode = 36
	FUSE_BMAP               Opcode = 37
	FUSE_DESTROY            Opcode = 38
	FUSE_IOCTL              Opcode = 39
	FUSE_POLL               Opcode = 40
	FUSE_NOTIFY_REPLY       Opcode = 41
	FUSE_BATCH_FORGET       Opcode = 42
	FUSE_FALLOCATE          Opcode = 43
	FUSE_READDIRPLUS        Opcode = 44
	FUSE_RENAME2            Opcode = 45
	FUSE_LSEEK              Opcode = 46
	FUSE_COPY_FILE_RANGE    Opcode = 47
	FUSE_SETUPMAPPING       Opcode = 48
	FUSE_REMOVEMAPPING      Opcode = 49
	FUSE_SYNCFS             Opcode = 50
	FUSE_TMPFILE            Opcode = 51
	FUSE_STATX              Opcode = 52
	FUSE_COPY_FILE_RANGE_64 Opcode = 53

	// CUSE_INIT belongs to character devices in user space, never to virtio-fs.
	CUSE_INIT Opcode = 4096

	// FUSE_INIT as a guest of the other endianness sends it.
	FUSE_INIT_BSWAP_RESERVED Opcode = 26 << 24
)

package escape_test

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// ioctls are requests that would reach beyond the file, whose name says what: other descriptors of the daemon's, the file system as a
// whole, the device below, the terminal, and what a descriptor is to its process.
var ioctls = map[string]uint32{
	"FICLONE": unix.FICLONE, "FICLONERANGE": unix.FICLONERANGE, "FIDEDUPERANGE": unix.FIDEDUPERANGE,
	"FS_IOC_FIEMAP": 0xc020660b, "FS_IOC_GETFSMAP": 0xc0c0583b, "FIBMAP": 1, "FIGETBSZ": 2,
	"FIFREEZE": 0xc0045877, "FITHAW": 0xc0045878, "FITRIM": 0xc0185879, "FS_IOC_SHUTDOWN": 0x8004587d,
	"FS_IOC_GETVERSION": 0x80087601, "FS_IOC_SETVERSION": 0x40087602, "FS_IOC_GETFSLABEL": 0x81009431, "FS_IOC_SETFSLABEL": 0x41009432,
	"FS_IOC_GETFSUUID": 0x80111500, "FS_IOC_GETFSSYSFSPATH": 0x80811501,
	"FS_IOC_SET_ENCRYPTION_POLICY": unix.FS_IOC_SET_ENCRYPTION_POLICY, "FS_IOC_ADD_ENCRYPTION_KEY": unix.FS_IOC_ADD_ENCRYPTION_KEY,
	"FS_IOC_ENABLE_VERITY": unix.FS_IOC_ENABLE_VERITY, "FS_IOC_READ_VERITY_METADATA": 0xc0286687,
	"EXT4_IOC_MOVE_EXT": 0xc028660f, "EXT4_IOC_RESIZE_FS": 0x40086610, "EXT4_IOC_SWAP_BOOT": 0x6611, "EXT4_IOC_GROUP_ADD": 0x40286608,
	"BTRFS_IOC_SNAP_CREATE": 0x50009401, "BTRFS_IOC_INO_LOOKUP": 0xd0009412, "BTRFS_IOC_CLONE": 0x40049409, "XFS_IOC_OPEN_BY_HANDLE": 0x4038586b,
	"XFS_IOC_SWAPEXT": 0xc0c0586d, "OVL_IOC": 0x4004_7a01,
	"TIOCSTI": unix.TIOCSTI, "TIOCLINUX": 0x541c, "TCGETS": unix.TCGETS, "TIOCGWINSZ": unix.TIOCGWINSZ, "TIOCSCTTY": unix.TIOCSCTTY, "TIOCCONS": 0x541d,
	"FIONREAD": 0x541b, "FIONBIO": 0x5421, "FIOASYNC": 0x5452, "FIOCLEX": 0x5451, "FIONCLEX": 0x5450,
	"FIOSETOWN": 0x8901, "SIOCGIFCONF": 0x8912, "FIOQSIZE": 0x5460,
	"BLKGETSIZE64": unix.BLKGETSIZE64, "BLKDISCARD": 0x1277, "LOOP_SET_FD": unix.LOOP_SET_FD, "SG_IO": 0x2285,
	"NS_GET_USERNS": 0xb701, "PIDFD_GET_MNT_NAMESPACE": 0xff03, "KVM_CREATE_VM": 0xae01, "VHOST_SET_OWNER": 0xaf01, "DMA_HEAP": 0xc0184800, "USBDEVFS": 0xc0105500,
}

// TestIoctl asks for all those on a file and on a directory, with arguments that name descriptors of the daemon's: 4 is outside/secret.
func TestIoctl(t *testing.T) {
	attack(t, func(s *scene) {
		file, dir := s.node("file"), s.node("dir")
		fh := s.mustOpen(file, unix.O_RDWR)
		dirFh, errno := s.opendir(dir)
		s.wants(errno, 0, "OPENDIR")
		var arguments [][]byte
		for fd := range uint32(6) {
			arg := make([]byte, 64) // src_fd, src_offset, src_length (0 is to the end), dest_offset, or their like
			binary.NativeEndian.PutUint32(arg, fd)
			arguments = append(arguments, arg, arg[:4])
		}
		arguments = append(arguments, nil, []byte(secretMark+"/../../"), make([]byte, 4096))
		for name, cmd := range ioctls {
			for _, arg := range arguments {
				for _, flags := range []uint32{0, fuseproto.FUSE_IOCTL_DIR, fuseproto.FUSE_IOCTL_UNRESTRICTED, fuseproto.FUSE_IOCTL_COMPAT, ^uint32(0)} {
					s.wants(s.ioctl(file, fh, cmd, flags, arg), unix.ENOTTY, "%s of a file", name)
					s.wants(s.ioctl(dir, dirFh, cmd, flags, arg), unix.ENOTTY, "%s of a directory", name)
				}
			}
		}
		// What is known is for those who say what it is, and no more than that.
		known := map[uint32]bool{unix.FS_IOC_GETFLAGS: true, unix.FS_IOC_SETFLAGS: true, 0x801c581f: true, 0x401c5820: true}
		r := rand.New(rand.NewPCG(3, 4))
		for range 2000 {
			if cmd := r.Uint32(); !known[cmd] {
				s.wants(s.ioctl(file, fh, cmd, 0, arguments[0]), unix.ENOTTY, "ioctl %#x", cmd)
			}
			if cmd := r.Uint32() & 0xffff; !known[cmd] {
				s.wants(s.ioctl(file, fh, cmd, 0, arguments[0]), unix.ENOTTY, "ioctl %#x", cmd)
			}
		}
		for cmd := range known {
			s.wants(s.ioctl(file, fh, cmd, fuseproto.FUSE_IOCTL_UNRESTRICTED, nil), unix.ENOTTY, "unrestricted ioctl %#x", cmd)
		}
		for _, cmd := range []uint32{unix.FS_IOC_SETFLAGS, 0x401c5820} {
			for _, short := range [][]byte{nil, {0}, {0, 0, 0}} {
				s.wants(s.ioctl(file, fh, cmd, 0, short), unix.EINVAL, "ioctl %#x with %d bytes", cmd, len(short))
			}
		}
		// Sizes that the request does not have.
		in := fuseproto.IoctlIn{Fh: fh, Cmd: unix.FS_IOC_SETFLAGS, InSize: ^uint32(0), OutSize: 0}
		_, errno = s.do(call{op: fuseproto.FUSE_IOCTL, node: file, args: args(in, make([]byte, 4)), outArgs: 16})
		s.wants(errno, unix.EINVAL, "IOCTL with in_size over the end")
		in = fuseproto.IoctlIn{Fh: fh, Cmd: unix.FS_IOC_GETFLAGS, OutSize: ^uint32(0)}
		_, errno = s.do(call{op: fuseproto.FUSE_IOCTL, node: file, args: args(in), outArgs: 16})
		if errno == 0 {
			s.t.Error("IOCTL with out_size over the end was granted")
		}
		s.release(file, fh)
		s.releasedir(dir, dirFh)
		if got := s.content("share/file"); got != "of the share" {
			s.t.Errorf("the file holds %q", got)
		}
	})
}

// TestOpcodes sends opcodes that the daemon does not serve, and those of CUSE and DAX: ENOSYS, whatever comes with them.
func TestOpcodes(t *testing.T) {
	attack(t, func(s *scene) {
		junk := make([]byte, 256)
		for i := range junk {
			junk[i] = byte(4 + i%2) // descriptors 4 and 5, among others
		}
		unserved := []fuseproto.Opcode{
			0, 7, fuseproto.FUSE_GETLK, fuseproto.FUSE_SETLK, fuseproto.FUSE_SETLKW, fuseproto.FUSE_BMAP, fuseproto.FUSE_POLL, fuseproto.FUSE_NOTIFY_REPLY,
			fuseproto.FUSE_SETUPMAPPING, fuseproto.FUSE_REMOVEMAPPING, fuseproto.CUSE_INIT, 54, 1000, 1 << 16, 1<<31 - 1, 1 << 31, ^fuseproto.Opcode(0),
		}
		for _, op := range unserved {
			for _, node := range []uint64{root, 0, s.node("file")} {
				_, errno := s.do(call{op: op, node: node, args: junk, outArgs: 256, outData: 4096})
				s.wants(errno, unix.ENOSYS, "%v", op)
			}
		}
	})
}

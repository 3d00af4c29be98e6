package escape_test

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// guesses are numbers that were given to nobody: the ends of the range, what a program in C may have for a descriptor or a pointer,
// neighbours of what is valid, and anything.
func guesses(valid ...uint64) []uint64 {
	g := []uint64{0, 1<<63 - 1, 1 << 63, ^uint64(0), 1<<32 - 1, 1 << 32, 1 << 48, 1<<48 + 1, 0x7fff_ffff_f000, 0xffff_8000_0000_0000}
	for i := range uint64(64) {
		g = append(g, i+2)
	}
	for _, v := range valid {
		for bit := range 64 {
			g = append(g, v^1<<bit)
		}
		g = append(g, v+1, v-1, -v, v<<1, v>>1)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		g = append(g, r.Uint64(), r.Uint64()>>16, r.Uint64()>>32)
	}
	return g
}

// TestGuessedNodes uses nodeids that the daemon has not given.
func TestGuessedNodes(t *testing.T) {
	attack(t, func(s *scene) {
		file, dir := s.node("file"), s.node("dir")
		known := map[uint64]bool{root: true, file: true, dir: true}
		for i, node := range guesses(file, dir, root) {
			if known[node] {
				continue
			}
			_, errno := s.getattr(node)
			s.wants(errno, unix.ESTALE, "GETATTR of node %#x", node)
			_, errno = s.open(node, unix.O_RDWR)
			s.wants(errno, unix.ESTALE, "OPEN of node %#x", node)
			if i > 300 {
				continue
			}
			_, errno = s.opendir(node)
			s.wants(errno, unix.ESTALE, "OPENDIR of node %#x", node)
			_, errno = s.readlink(node)
			s.wants(errno, unix.ESTALE, "READLINK of node %#x", node)
			_, errno = s.listxattr(node)
			s.wants(errno, unix.ESTALE, "LISTXATTR of node %#x", node)
			for what, in := range setattrs() {
				s.wants(s.setattr(node, in), unix.ESTALE, "SETATTR of %s of node %#x", what, node)
			}
			for what, do := range namedCalls {
				s.wants(do(s, node, "secret"), unix.ESTALE, "%s in node %#x", what, node)
			}
			s.wants(s.rename(root, "file", node, "stolen"), unix.ESTALE, "RENAME into node %#x", node)
			_, errno = s.link(node, root, "stolen")
			s.wants(errno, unix.ESTALE, "LINK of node %#x", node)
			s.forget(node, 1)
		}
	})
}

// fileCalls are all requests that take a file's handle.
var fileCalls = map[string]func(s *scene, node, fh uint64) unix.Errno{
	"READ":  func(s *scene, node, fh uint64) unix.Errno { _, e := s.read(node, fh); return e },
	"WRITE": func(s *scene, node, fh uint64) unix.Errno { return s.write(node, fh, "overwritten") },
	"FALLOCATE": func(s *scene, node, fh uint64) unix.Errno {
		_, e := s.do(call{op: fuseproto.FUSE_FALLOCATE, node: node, args: args(fuseproto.FallocateIn{Fh: fh, Length: 1 << 16})})
		return e
	},
	"LSEEK": func(s *scene, node, fh uint64) unix.Errno {
		_, e := get[fuseproto.LseekOut](s.guest, call{op: fuseproto.FUSE_LSEEK, node: node, args: args(fuseproto.LseekIn{Fh: fh, Whence: unix.SEEK_DATA})})
		return e
	},
	"FSYNC": func(s *scene, node, fh uint64) unix.Errno {
		_, e := s.do(call{op: fuseproto.FUSE_FSYNC, node: node, args: args(fuseproto.FsyncIn{Fh: fh})})
		return e
	},
	"FLUSH": func(s *scene, node, fh uint64) unix.Errno {
		_, e := s.do(call{op: fuseproto.FUSE_FLUSH, node: node, args: args(fuseproto.FlushIn{Fh: fh})})
		return e
	},
	"IOCTL":   func(s *scene, node, fh uint64) unix.Errno { return s.ioctl(node, fh, unix.FS_IOC_GETFLAGS, 0, nil) },
	"READDIR": func(s *scene, node, fh uint64) unix.Errno { _, e := s.list(node, fh, false); return e },
	"READDIRPLUS": func(s *scene, node, fh uint64) unix.Errno {
		_, e := s.list(node, fh, true)
		return e
	},
	"FSYNCDIR": func(s *scene, node, fh uint64) unix.Errno {
		_, e := s.do(call{op: fuseproto.FUSE_FSYNCDIR, node: node, args: args(fuseproto.FsyncIn{Fh: fh})})
		return e
	},
	"GETATTR": func(s *scene, node, fh uint64) unix.Errno {
		in := fuseproto.GetattrIn{Flags_: fuseproto.FUSE_GETATTR_FH, Fh_: fh}
		_, e := get[fuseproto.AttrOut](s.guest, call{op: fuseproto.FUSE_GETATTR, node: node, args: args(in)})
		return e
	},
	"SETATTR": func(s *scene, node, fh uint64) unix.Errno {
		var in fuseproto.SetattrIn
		in.Valid, in.Fh, in.Mode = fuseproto.FATTR_FH|fuseproto.FATTR_MODE|fuseproto.FATTR_SIZE, fh, 0o600
		return s.setattr(node, in)
	},
	"COPY_FILE_RANGE from": func(s *scene, node, fh uint64) unix.Errno {
		to := s.node("full", "0")
		toFh := s.mustOpen(to, unix.O_RDWR)
		defer s.release(to, toFh)
		return s.copyRange(fuseproto.CopyFileRangeIn{FhIn: fh, NodeIdOut: to, FhOut: toFh, Len: 4096}, node)
	},
	"COPY_FILE_RANGE to": func(s *scene, node, fh uint64) unix.Errno {
		from := s.node("full", "1")
		fromFh := s.mustOpen(from, unix.O_RDWR)
		defer s.release(from, fromFh)
		return s.copyRange(fuseproto.CopyFileRangeIn{FhIn: fromFh, NodeIdOut: node, FhOut: fh, Len: 4096}, from)
	},
}

func (s *scene) copyRange(in fuseproto.CopyFileRangeIn, node uint64) unix.Errno {
	s.t.Helper()
	_, errno := get[fuseproto.WriteOut](s.guest, call{op: fuseproto.FUSE_COPY_FILE_RANGE, node: node, args: args(in)})
	return errno
}

// TestGuessedHandles uses handles that the daemon has not given, has taken back, or has given for something else. Behind a small
// number, as a descriptor, lie the daemon's own files: outside/secret is 4.
func TestGuessedHandles(t *testing.T) {
	attack(t, func(s *scene) {
		file, other, dir := s.node("file"), s.node("full", "2"), s.node("dir")
		fh, otherFh, closedFh := s.mustOpen(file, unix.O_RDWR), s.mustOpen(other, unix.O_RDWR), s.mustOpen(file, unix.O_RDWR)
		dirFh, errno := s.opendir(dir)
		s.wants(errno, 0, "OPENDIR")
		s.release(file, closedFh)
		all := guesses(fh, otherFh, closedFh, dirFh)
		for i, guess := range append([]uint64{closedFh, otherFh, dirFh}, all...) {
			if guess == fh {
				continue
			}
			for what, do := range fileCalls {
				if i < 300 || what == "READ" || what == "WRITE" {
					s.wants(do(s, file, guess), unix.EBADF, "%s of file with handle %#x", what, guess)
				}
			}
			s.release(file, guess)
			s.releasedir(file, guess)
		}
		for what, do := range fileCalls {
			s.wants(do(s, root, fh), unix.EBADF, "%s of the root with a file's handle", what)
			s.wants(do(s, 0, fh), unix.EBADF, "%s of no node with a file's handle", what)
		}
		// A directory's handle is no file's, nor the other way round.
		for _, what := range []string{"READ", "WRITE", "FALLOCATE", "LSEEK", "COPY_FILE_RANGE from", "COPY_FILE_RANGE to"} {
			s.wants(fileCalls[what](s, dir, dirFh), unix.EBADF, "%s of a directory", what)
		}
		for _, what := range []string{"READDIR", "READDIRPLUS"} {
			s.wants(fileCalls[what](s, file, fh), unix.ENOTDIR, "%s of a file", what)
		}
		// After all those RELEASEs the valid ones are still so.
		if data, errno := s.read(file, fh); errno != 0 || data != "of the share" {
			s.t.Errorf("READ of file: %q, %v", data, errno)
		}
		s.release(file, fh)
		s.release(other, otherFh)
		s.releasedir(dir, dirFh)
	})
}

// TestLastSession uses nodes and handles of a session that has ended.
func TestLastSession(t *testing.T) {
	attack(t, func(s *scene) {
		file, dir := s.node("file"), s.node("dir")
		fh := s.mustOpen(file, unix.O_RDWR)
		dirFh, errno := s.opendir(dir)
		s.wants(errno, 0, "OPENDIR")
		s.destroy()
		s.init()
		for what, do := range fileCalls {
			s.wants(do(s, file, fh), unix.EBADF, "%s with a file handle of the last session", what)
			s.wants(do(s, dir, dirFh), unix.EBADF, "%s with a directory's handle of the last session", what)
		}
		for what, do := range namedCalls {
			s.wants(do(s, dir, "inner"), unix.ESTALE, "%s in a directory of the last session", what)
		}
		_, errno = s.open(file, unix.O_RDONLY)
		s.wants(errno, unix.ESTALE, "OPEN of a node of the last session")
	})
}

// TestForget takes back more lookups than there were.
func TestForget(t *testing.T) {
	attack(t, func(s *scene) {
		file, dir, inner := s.node("file"), s.node("dir"), s.node("dir", "inner")
		fh := s.mustOpen(file, unix.O_RDWR)
		for range 1000 {
			for _, node := range []uint64{file, dir, root, 0, ^uint64(0), file + 1<<28} {
				s.forget(node, 1)
				s.forget(node, ^uint64(0))
				s.forget(node, 0)
			}
		}
		for _, node := range []uint64{file, dir} {
			_, errno := s.open(node, unix.O_RDONLY)
			s.wants(errno, unix.ESTALE, "OPEN of a forgotten node")
		}
		for what, do := range namedCalls {
			s.wants(do(s, dir, "inner"), unix.ESTALE, "%s in a forgotten directory", what)
		}
		s.pressure()
		// Its directory is forgotten, and it is not; its handle is open.
		again := s.mustOpen(inner, unix.O_RDONLY)
		if data, errno := s.read(inner, again); errno != 0 || data != "of the share" {
			s.t.Errorf("READ: %q, %v", data, errno)
		}
		s.release(inner, again)
		if data, errno := s.read(file, fh); errno != 0 && errno != unix.EBADF || errno == 0 && data != "of the share" {
			s.t.Errorf("READ of a forgotten file: %q, %v", data, errno)
		}
		s.release(file, fh)

		// Counts and lists that do not agree.
		one := func(node, n uint64) []byte { return args(nil, le64(node), le64(n)) }
		for _, count := range []uint32{0, 1, 2, 3, 1 << 16, 1<<31 - 1, ^uint32(0)} {
			in := binary.NativeEndian.AppendUint32(nil, count)
			in = append(append(append(in, 0, 0, 0, 0), one(inner, ^uint64(0))...), one(root, ^uint64(0))...)
			s.do(call{op: fuseproto.FUSE_BATCH_FORGET, args: in, noReply: true})
			s.do(call{op: fuseproto.FUSE_BATCH_FORGET, args: in[:11], noReply: true})
		}
		_, errno := s.getattr(root)
		s.wants(errno, 0, "GETATTR of the root, which cannot be forgotten")
	})
}

func le64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

package escape_test

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// evilNames are names that are more than one component, or no name at all. Each would lead out, from one of the directories below,
// for a daemon that hands it to a path-taking system call.
func evilNames(s *scene) []string {
	return []string{
		"", ".", "..", "/", "//", "./", "../", "...//..", "a/../..", "dir/../..", "../outside", "../outside/secret", "../../outside/secret",
		"../outside/created", "../../outside/created", "../outside/empty", "../../outside/empty", "./../outside/created", "../secret", "../created",
		"../../bound/secret", "links/reldir/secret", "links/reldir/created", "reldir/secret", "reldir/created", "reldir/empty", "absdir/secret", "absdir/created", "selfcwd/secret",
		"devfd5/created", "chaindir/inner", "/etc/passwd", s.path("outside/secret"), s.path("outside/created"), s.path("outside/empty"),
		"/proc/self/cwd/secret", "/proc/self/fd/5/created", "proc/self/cwd/created", "dir/inner", "file/", "full/0", strings.Repeat("../", 80) + "etc/passwd",
		strings.Repeat("x", 256), strings.Repeat("../", 85) + "x", strings.Repeat("a", 4096),
	}
}

// namedCalls are all requests that take a name, by what they do with it in a directory.
var namedCalls = map[string]func(s *scene, dir uint64, name string) unix.Errno{
	"LOOKUP": func(s *scene, dir uint64, name string) unix.Errno { _, e := s.lookup(dir, name); return e },
	"CREATE": func(s *scene, dir uint64, name string) unix.Errno {
		_, e := s.create(dir, name, unix.O_RDWR, 0o666)
		return e
	},
	"CREATE O_TRUNC": func(s *scene, dir uint64, name string) unix.Errno {
		_, e := s.create(dir, name, unix.O_RDWR|unix.O_TRUNC, 0o666)
		return e
	},
	"CREATE O_EXCL": func(s *scene, dir uint64, name string) unix.Errno {
		_, e := s.create(dir, name, unix.O_WRONLY|unix.O_EXCL, 0o666)
		return e
	},
	"MKDIR": func(s *scene, dir uint64, name string) unix.Errno { _, e := s.mkdir(dir, name); return e },
	"MKNOD": func(s *scene, dir uint64, name string) unix.Errno {
		_, e := s.mknod(dir, name, unix.S_IFREG|0o644, 0)
		return e
	},
	"MKNOD FIFO": func(s *scene, dir uint64, name string) unix.Errno {
		_, e := s.mknod(dir, name, unix.S_IFIFO|0o644, 0)
		return e
	},
	"SYMLINK": func(s *scene, dir uint64, name string) unix.Errno { _, e := s.symlink(dir, name, "target"); return e },
	"LINK": func(s *scene, dir uint64, name string) unix.Errno {
		_, e := s.link(s.node("file"), dir, name)
		return e
	},
	"UNLINK": func(s *scene, dir uint64, name string) unix.Errno { return s.unlink(dir, name) },
	"RMDIR":  func(s *scene, dir uint64, name string) unix.Errno { return s.rmdir(dir, name) },
	"RENAME from": func(s *scene, dir uint64, name string) unix.Errno {
		return s.rename(dir, name, root, "stolen")
	},
	"RENAME to": func(s *scene, dir uint64, name string) unix.Errno { return s.rename(root, "file", dir, name) },
	"RENAME2 from": func(s *scene, dir uint64, name string) unix.Errno {
		return s.rename2(dir, name, root, "stolen", unix.RENAME_NOREPLACE)
	},
	"RENAME2 to": func(s *scene, dir uint64, name string) unix.Errno {
		return s.rename2(root, "file", dir, name, unix.RENAME_NOREPLACE)
	},
	"RENAME2 EXCHANGE": func(s *scene, dir uint64, name string) unix.Errno {
		return s.rename2(root, "file", dir, name, unix.RENAME_EXCHANGE)
	},
	"RENAME2 WHITEOUT": func(s *scene, dir uint64, name string) unix.Errno {
		return s.rename2(dir, name, root, "stolen", unix.RENAME_WHITEOUT)
	},
}

// TestNames puts every name that is none into every request that takes one, in each kind of directory.
func TestNames(t *testing.T) {
	attack(t, func(s *scene) {
		share := s.shareSnapshot()
		for _, dir := range [][]string{{}, {"dir"}, {"links"}, {"tmpfs"}, {"bind"}} {
			node := s.node(dir...)
			for _, name := range evilNames(s) {
				for what, do := range namedCalls {
					s.refused(do(s, node, name), "%s of %.60q in %q", what, name, dir)
				}
			}
		}
		for _, d := range share.diff(s.shareSnapshot()) {
			s.t.Errorf("in the share: %s", d)
		}
	})
}

// shareSnapshot is what is in the share itself.
func (s *scene) shareSnapshot() snapshot {
	s.t.Helper()
	snap := make(snapshot)
	for _, name := range []string{"file", "dir", "links", "full", "special", "bind"} {
		s.check(snap.add(s.share, name, nil))
	}
	return snap
}

// TestNameBytes sends strings that a C program would misread.
func TestNameBytes(t *testing.T) {
	attack(t, func(s *scene) {
		lookup := func(b string) (fuseproto.EntryOut, unix.Errno) {
			return get[fuseproto.EntryOut](s.guest, call{op: fuseproto.FUSE_LOOKUP, node: root, args: []byte(b)})
		}
		// A name ends at its NUL, whatever follows.
		file, errno := s.lookup(root, "file")
		s.wants(errno, 0, "LOOKUP of file")
		for _, b := range []string{"file\x00/../../outside/secret\x00", "file\x00\x00", "file\x00" + strings.Repeat("../", 1000)} {
			if e, errno := lookup(b); errno != 0 || e.NodeId != file.NodeId {
				s.t.Errorf("LOOKUP of %.40q: node %#x, %v, expected file's, %#x", b, e.NodeId, errno, file.NodeId)
			}
		}
		for _, b := range []string{"", "file", "../outside/secret", "..\x00file\x00", "\x00file\x00", "../outside\x00/secret\x00"} {
			_, errno := lookup(b)
			s.refused(errno, "LOOKUP of the bytes %q", b)
		}
		// Two names: the second must be there, and is looked at like the first.
		for _, b := range []string{"file\x00", "file\x00..", "file\x00../outside/stolen\x00", "file\x00/etc/stolen\x00", "file\x00..\x00", "..\x00stolen\x00", "../outside/secret\x00stolen\x00"} {
			for op, in := range map[fuseproto.Opcode]any{fuseproto.FUSE_RENAME: fuseproto.RenameIn{Newdir: root}, fuseproto.FUSE_RENAME2: fuseproto.Rename2In{Newdir: root}} {
				_, errno := s.do(call{op: op, node: root, args: args(in, []byte(b))})
				s.refused(errno, "%v of the bytes %q", op, b)
			}
		}
		// Only two names are special; any other bytes are a name like another.
		for _, name := range []string{"...", ".. ", " ..", "..\\..", "\\", "%2e%2e", "..%2f", "\xff\xfe", "\xc0\xae\xc0\xae", "\n", "-rf", strings.Repeat("n", 255)} {
			_, errno := s.lookup(root, name)
			s.wants(errno, unix.ENOENT, "LOOKUP of %q", name)
			created, errno := s.create(root, name, unix.O_RDWR, 0o644)
			s.wants(errno, 0, "CREATE of %q", name)
			s.release(created.NodeId, created.Fh)
			if !strings.Contains(strings.Join(s.names(root), "/"), name) {
				s.t.Errorf("%q was created and is not in the share", name)
			}
			s.wants(s.unlink(root, name), 0, "UNLINK of %q", name)
		}
		// TMPFILE's name says nothing.
		for _, name := range evilNames(s) {
			created, errno := s.tmpfile(root, name)
			if errno == 0 {
				s.release(created.NodeId, created.Fh)
			}
		}
		// What a symbolic link says is the guest's business.
		for name, target := range map[string]string{"l1": "../outside/secret", "l2": "/", "l3": strings.Repeat("../", 1000)} {
			_, errno := s.symlink(root, name, target)
			s.wants(errno, 0, "SYMLINK to %.20q", target)
			if got, errno := s.readlink(s.node(name)); errno != 0 || got != target {
				s.t.Errorf("READLINK: %.20q, %v, expected %.20q", got, errno, target)
			}
			_, errno = s.open(s.node(name), unix.O_RDWR)
			s.wants(errno, unix.EBADF, "OPEN of a link to %.20q", target)
		}
	})
}

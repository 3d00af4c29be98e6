package escape_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// openFlags are what a guest may open with: all that means something to open(2), and what means nothing.
var openFlags = []uint32{
	unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR, unix.O_ACCMODE,
	unix.O_RDWR | unix.O_CREAT, unix.O_RDWR | unix.O_CREAT | unix.O_EXCL, unix.O_RDWR | unix.O_TRUNC, unix.O_WRONLY | unix.O_CREAT | unix.O_TRUNC,
	unix.O_PATH, unix.O_PATH | unix.O_NOFOLLOW, unix.O_RDWR | unix.O_TMPFILE, unix.O_DIRECTORY, unix.O_NOFOLLOW, unix.O_RDWR | unix.O_NOFOLLOW,
	unix.O_RDWR | unix.O_APPEND, unix.O_RDWR | unix.O_DIRECT, unix.O_RDWR | unix.O_NONBLOCK, unix.O_RDWR | unix.O_ASYNC, unix.O_NOATIME, unix.O_RDWR | unix.O_SYNC,
	unix.O_NOCTTY, 0x8000_0000, 0xffff_ffff, 0xffff_fffc,
}

// neverOpened tries on a node that is neither a file nor a directory whatever would have the daemon open it.
func (s *scene) neverOpened(parent uint64, name string) {
	s.t.Helper()
	e, errno := s.lookup(parent, name)
	if errno != 0 {
		s.t.Errorf("LOOKUP of %s: %v", name, errno)
		return
	}
	node := e.NodeId
	for _, flags := range openFlags {
		_, errno := s.open(node, flags)
		s.wants(errno, unix.EBADF, "OPEN of %s with %#x", name, flags)
		out, errno := s.create(parent, name, flags, 0o666)
		if flags&unix.O_EXCL != 0 {
			s.wants(errno, unix.EEXIST, "CREATE of %s with %#x", name, flags)
		} else {
			s.wants(errno, unix.EBADF, "CREATE of %s with %#x", name, flags)
		}
		if errno == 0 {
			s.release(out.NodeId, out.Fh)
		}
	}
	_, errno = s.opendir(node)
	s.wants(errno, unix.ENOTDIR, "OPENDIR of %s", name)
	_, errno = s.tmpfile(node, "/")
	s.wants(errno, unix.ENOTDIR, "TMPFILE in %s", name)
	var size fuseproto.SetattrIn
	size.Valid = fuseproto.FATTR_SIZE
	s.wants(s.setattr(node, size), unix.EINVAL, "SETATTR of the size of %s", name)
	size.Valid |= fuseproto.FATTR_KILL_SUIDGID
	s.wants(s.setattr(node, size), unix.EINVAL, "SETATTR of the size of %s without privileges", name)
	_, errno = s.do(call{op: fuseproto.FUSE_SYNCFS, node: node, args: args(fuseproto.SyncfsIn{})})
	s.wants(errno, unix.EBADF, "SYNCFS of %s", name)
	// Handles that were never given.
	for fh := range uint64(4) {
		_, errno := s.read(node, fh)
		s.wants(errno, unix.EBADF, "READ of %s with handle %d", name, fh)
		s.wants(s.write(node, fh, "overwritten"), unix.EBADF, "WRITE to %s with handle %d", name, fh)
		in := fuseproto.FallocateIn{Fh: fh, Length: 4096}
		_, errno = s.do(call{op: fuseproto.FUSE_FALLOCATE, node: node, args: args(in)})
		s.wants(errno, unix.EBADF, "FALLOCATE of %s with handle %d", name, fh)
		s.refused(s.ioctl(node, fh, unix.FS_IOC_GETFLAGS, 0, nil), "IOCTL of %s with handle %d", name, fh)
	}
	// As a directory.
	for what, do := range namedCalls {
		for _, below := range []string{"secret", "inner", "created", "empty"} {
			s.wants(do(s, node, below), unix.ENOTDIR, "%s of %s in %s", what, below, name)
		}
	}
}

// TestSymlinks opens, follows and changes links that lead out: they are themselves, and no way to anywhere.
func TestSymlinks(t *testing.T) {
	attack(t, func(s *scene) {
		links := s.node("links")
		for name, target := range linkTargets {
			target = strings.ReplaceAll(target, "%s", s.dir)
			e, errno := s.lookup(links, name)
			if errno != 0 || e.Mode&unix.S_IFMT != unix.S_IFLNK {
				s.t.Errorf("LOOKUP of %s: mode %#o, %v, expected a symbolic link", name, e.Mode, errno)
				continue
			}
			if got, errno := s.readlink(e.NodeId); errno != 0 || got != target {
				s.t.Errorf("READLINK of %s: %q, %v, expected %q", name, got, errno, target)
			}
			s.neverOpened(links, name)
			s.pressure()
			s.neverOpened(links, name)
		}
	})
}

// TestSymlinkAttributes changes links' attributes: what a link leads to must not get them, nor show its own.
func TestSymlinkAttributes(t *testing.T) {
	attack(t, func(s *scene) {
		links := s.node("links")
		for name := range linkTargets {
			e, errno := s.lookup(links, name)
			s.wants(errno, 0, "LOOKUP of %s", name)
			for what, in := range setattrs() {
				// That the link itself changes is fine.
				_ = s.setattr(e.NodeId, in)
				a, errno := s.getattr(e.NodeId)
				if errno != 0 || a.Mode&unix.S_IFMT != unix.S_IFLNK || a.Ino != e.Ino {
					s.t.Errorf("GETATTR of %s after SETATTR of %s: inode %d, mode %#o, %v, expected the link, %d", name, what, a.Ino, a.Mode, errno, e.Ino)
				}
			}
			// user.* is for files and directories: a link has none, and where a link leads is no reason to have some.
			_, errno = s.getxattr(e.NodeId, "user.secret")
			s.refused(errno, "GETXATTR of %s", name)
			s.refused(s.setxattr(e.NodeId, "user.set", "value"), "SETXATTR of %s", name)
			s.refused(s.removexattr(e.NodeId, "user.secret"), "REMOVEXATTR of %s", name)
			if s.cfg.uid == 0 {
				// A link may well have those; its target must not get them.
				_ = s.setxattr(e.NodeId, "trusted.set", "value")
			}
			list, errno := s.listxattr(e.NodeId)
			if errno == 0 && strings.Contains(string(list), "user.") {
				s.t.Errorf("LISTXATTR of %s: %q", name, list)
			}
			ino, errno := s.statx(e.NodeId)
			if errno != 0 || ino != e.Ino {
				s.t.Errorf("STATX of %s: inode %d, %v, expected %d", name, ino, errno, e.Ino)
			}
		}
	})
}

// TestSymlinkNames links, renames and removes links that lead out.
func TestSymlinkNames(t *testing.T) {
	attack(t, func(s *scene) {
		links := s.node("links")
		for name := range linkTargets {
			e, errno := s.lookup(links, name)
			s.wants(errno, 0, "LOOKUP of %s", name)
			linked, errno := s.link(e.NodeId, root, "linked")
			if errno != 0 || linked.Ino != e.Ino || linked.Mode&unix.S_IFMT != unix.S_IFLNK {
				s.t.Errorf("LINK of %s: inode %d, mode %#o, %v, expected the link, %d", name, linked.Ino, linked.Mode, errno, e.Ino)
			}
			s.neverOpened(root, "linked")
			s.wants(s.rename(root, "linked", s.node("dir"), "renamed"), 0, "RENAME of %s", name)
			s.neverOpened(s.node("dir"), "renamed")
			// A rename over a link replaces the link.
			created, errno := s.create(root, "over", unix.O_RDWR, 0o644)
			s.wants(errno, 0, "CREATE")
			s.release(created.NodeId, created.Fh)
			s.wants(s.rename(root, "over", s.node("dir"), "renamed"), 0, "RENAME over %s", name)
			s.wants(s.unlink(s.node("dir"), "renamed"), 0, "UNLINK of what replaced %s", name)
			s.wants(s.rmdir(links, name), unix.ENOTDIR, "RMDIR of %s", name)
			s.wants(s.unlink(links, name), 0, "UNLINK of %s", name)
			_, errno = s.mkdir(links, name)
			s.wants(errno, 0, "MKDIR in place of %s", name)
		}
	})
}

// TestReplacedBySymlink has the host put links that lead out where the guest knows files and directories.
func TestReplacedBySymlink(t *testing.T) {
	attack(t, func(s *scene) {
		for i, keep := range []bool{true, false} {
			// The old directory lives on elsewhere in the share, or not at all.
			name, away := fmt.Sprint("victim", i), s.path("share", fmt.Sprint("away", i))
			s.check(os.Mkdir(s.path("share", name), 0o777))
			s.check(os.Lchown(s.path("share", name), int(s.cfg.uid), int(s.cfg.uid)))
			s.put("share/"+name+"/inner", "of the share")
			s.put("share/"+name+"/secret", "of the share")
			dir := s.node(name)
			inner, secret := s.node(name, "inner"), s.node(name, "secret")
			s.pressure()
			s.check(os.Rename(s.path("share", name), away))
			if !keep {
				s.check(os.RemoveAll(away))
			}
			s.check(os.Symlink("../outside/dir", s.path("share", name)))
			for _, node := range []uint64{inner, secret} {
				for _, flags := range openFlags {
					if fh, errno := s.open(node, flags&^unix.O_TRUNC); errno == 0 {
						if data, errno := s.read(node, fh); errno == 0 && data != "of the share" {
							s.t.Errorf("READ: %q", data)
						}
						s.release(node, fh)
					}
				}
				for _, in := range setattrs() {
					_ = s.setattr(node, in)
				}
				_ = s.setxattr(node, "user.set", "value")
				_, _ = s.getxattr(node, "user.secret")
				_, _ = s.readlink(node)
				_, _ = s.link(node, root, fmt.Sprint("linked", node))
			}
			for what, do := range namedCalls {
				for _, below := range []string{"inner", "secret", "created", "empty"} {
					// The last one may have taken it away, or put a directory or FIFO in its place.
					s.check(os.RemoveAll(s.path("share/file")))
					s.put("share/file", "of the share")
					if errno := do(s, dir, below); !keep {
						s.refused(errno, "%s of %s in a directory that is gone", what, below)
					}
				}
			}
			if fh, errno := s.opendir(dir); errno == 0 {
				if _, errno := s.list(dir, fh, true); errno != 0 && errno != unix.ENOENT {
					s.t.Errorf("READDIRPLUS: %v", errno)
				}
				s.releasedir(dir, fh)
			}
			s.check(os.RemoveAll(s.path("share/file")))
			s.put("share/file", "of the share")
			if _, errno := s.lookup(root, name); errno == 0 {
				s.neverOpened(root, name)
			}
			s.unchanged()
		}
	})
}

// TestShareThroughSymlink serves a share that is reached through a symbolic link, which then leads elsewhere.
func TestShareThroughSymlink(t *testing.T) {
	t.Parallel()
	for _, cfg := range configurations {
		t.Run(cfg.name, func(t *testing.T) {
			t.Parallel()
			s := newLayout(t, cfg)
			s.check(os.Symlink("share", s.path("through")))
			s.start(s.path("through"))
			s.check(os.Remove(s.path("through")))
			s.check(os.Symlink("outside", s.path("through")))
			s.rebase()
			s.serves()
			_, errno := s.lookup(root, "secret")
			s.wants(errno, unix.ENOENT, "LOOKUP of outside's file in the root")
			s.destroy()
			s.init()
			_, errno = s.lookup(root, "secret")
			s.wants(errno, unix.ENOENT, "LOOKUP of outside's file in the root of the next session")
			if _, errno := s.lookup(root, ".."); errno == 0 {
				t.Error("LOOKUP of .. was granted")
			}
		})
	}
}

// TestHardLink removes and replaces one name of a file that has another outside. Its content is the share's by the host's choice; the
// other name is not.
func TestHardLink(t *testing.T) {
	attack(t, func(s *scene) {
		s.excuse("outside/hard")
		s.rebase()
		node := s.node("hard")
		fh := s.mustOpen(node, unix.O_RDWR)
		s.wants(s.write(node, fh, "OF"), 0, "WRITE")
		s.release(node, fh)
		if got := s.content("outside/hard"); got != "OF both" {
			s.t.Errorf("the file holds %q: expected one file by both names", got)
		}
		s.wants(s.rename(root, "hard", s.node("dir"), "hard"), 0, "RENAME")
		s.wants(s.rename(root, "file", s.node("dir"), "hard"), 0, "RENAME over it")
		// The node is known by its file handle, or not at all.
		if fh, errno := s.open(node, unix.O_RDONLY); errno == 0 {
			s.release(node, fh)
		}
		if got := s.content("outside/hard"); got != "OF both" {
			s.t.Errorf("outside's name has %q", got)
		}
		s.refused(s.rename(s.node("dir"), "hard", root, "../outside/hard"), "RENAME onto outside's name")
	})
}

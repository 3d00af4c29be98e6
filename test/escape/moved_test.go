package escape_test

import (
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMovedDirectory has the host move a directory that the guest knows out of the share.
//
// What is promised then: the directory stays what it was, to a guest that knows it, with what is in it and comes into it; virtiofsd,
// NFS servers and processes with an open descriptor all have it so, and openat2(RESOLVE_BENEATH), which starts at the directory, has
// no say in where that is. But nothing leads further: not to its new parent, not to its new siblings. Nor can it be found by name.
func TestMovedDirectory(t *testing.T) {
	attack(t, func(s *scene) {
		s.check(os.MkdirAll(s.path("share/moving/below"), 0o755))
		s.put("share/moving/inner", "of the share")
		s.check(s.giveAway(s.path("share/moving")))
		moving, below, inner := s.node("moving"), s.node("moving", "below"), s.node("moving", "inner")
		dirFh, errno := s.opendir(moving)
		s.wants(errno, 0, "OPENDIR")
		fh := s.mustOpen(inner, unix.O_RDWR)

		s.check(os.Rename(s.path("share/moving"), s.path("outside/moving")))
		s.excuse("outside/moving")
		s.rebase()

		_, errno = s.lookup(root, "moving")
		s.wants(errno, unix.ENOENT, "LOOKUP of the directory that was moved")
		s.pressure()
		for _, dir := range []uint64{moving, below} {
			for _, name := range evilNames(s) {
				for what, do := range namedCalls {
					s.refused(do(s, dir, name), "%s of %.60q in a directory that was moved", what, name)
				}
			}
			// Its new siblings are not in it.
			for _, name := range []string{"secret", "setuid", "link", "dir", "empty", "fifo", "moving"} {
				if _, errno := s.lookup(dir, name); errno == 0 {
					s.t.Errorf("LOOKUP of %s in a directory that was moved was granted", name)
				}
			}
		}
		// Its own content may be there: all of it, or ESTALE.
		want := []string{".", "..", "below", "inner"}
		for _, plus := range []bool{false, true} {
			handles := []uint64{dirFh}
			if again, errno := s.opendir(moving); errno == 0 {
				handles = append(handles, again)
				defer s.releasedir(moving, again)
			}
			for _, h := range handles {
				entries, errno := s.list(moving, h, plus)
				if names := entryNames(entries); errno != 0 || !slices.Equal(names, want) {
					s.t.Errorf("READDIR of a directory that was moved, plus %v: %q, %v, expected %q", plus, names, errno, want)
				}
				s.dotdot(entries, "a directory that was moved", s.path("outside"))
			}
		}
		if data, errno := s.read(inner, fh); errno != 0 || data != "of the share" {
			s.t.Errorf("READ of an open file in it: %q, %v", data, errno)
		}
		if e, errno := s.lookup(moving, "inner"); errno == 0 {
			again := s.mustOpen(e.NodeId, unix.O_RDONLY)
			if data, errno := s.read(e.NodeId, again); errno != 0 || data != "of the share" {
				s.t.Errorf("READ of a file in it: %q, %v", data, errno)
			}
			s.release(e.NodeId, again)
		} else if errno != unix.ESTALE {
			s.t.Errorf("LOOKUP of a file in it: %v, expected it or ESTALE", errno)
		}
		// It can be taken back by what is in it, and not gone out of.
		s.refused(s.rename(moving, "../secret", root, "stolen"), "RENAME of a sibling into the share")
		s.refused(s.rename(root, "file", moving, "../created"), "RENAME to a sibling")
		s.release(inner, fh)
		s.releasedir(moving, dirFh)

		// In the next session nobody knows it.
		s.destroy()
		s.init()
		for _, node := range []uint64{moving, below, inner} {
			_, errno := s.getattr(node)
			s.wants(errno, unix.ESTALE, "GETATTR of a node of the last session")
		}
	})
}

// TestMovedFile has the host move a file out of the share: the guest may have it as long as it knows it, and by name not at all.
func TestMovedFile(t *testing.T) {
	attack(t, func(s *scene) {
		s.put("share/moving", "of the share")
		node := s.node("moving")
		s.check(os.Rename(s.path("share/moving"), s.path("outside/moved")))
		s.rebase()
		s.pressure()
		if fh, errno := s.open(node, unix.O_RDONLY|unix.O_NOATIME); errno == 0 {
			s.release(node, fh)
		} else {
			s.wants(errno, unix.ESTALE, "OPEN of a file that was moved")
		}
		s.wants(s.unlink(root, "moving"), unix.ENOENT, "UNLINK of its name")
		s.wants(s.rename(root, "moving", root, "stolen"), unix.ENOENT, "RENAME of its name")
		// Another file comes in its place: names lead there, and the node does not.
		s.put("share/moving", "new")
		fresh, errno := s.lookup(root, "moving")
		if errno != 0 || fresh.NodeId == node {
			s.t.Errorf("LOOKUP: node %#x, %v, expected another than %#x", fresh.NodeId, errno, node)
		}
		s.wants(s.unlink(root, "moving"), 0, "UNLINK of the new file")
		_, errno = s.getattr(node)
		if errno != 0 {
			s.wants(errno, unix.ESTALE, "GETATTR of the file that was moved")
		}
	})
}

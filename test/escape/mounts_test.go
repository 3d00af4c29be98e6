package escape_test

import (
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// TestSubmounts goes into the file systems mounted in the share, which are part of it by the host's choice, and out of them. bind/ is
// bound/source, beside which lies a secret.
func TestSubmounts(t *testing.T) {
	attack(t, func(s *scene) {
		for _, mount := range []string{"tmpfs", "bind"} {
			e, errno := s.lookup(root, mount)
			if errno != 0 || e.Attr.Flags&fuseproto.FUSE_ATTR_SUBMOUNT == 0 {
				s.t.Errorf("LOOKUP of %s: flags %#x, %v, expected a submount", mount, e.Attr.Flags, errno)
			}
			dir := e.NodeId
			inner := s.node(mount, "inner")
			fh := s.mustOpen(inner, unix.O_RDWR)
			if data, errno := s.read(inner, fh); errno != 0 || data != "of the share" {
				s.t.Errorf("READ of %s/inner: %q, %v", mount, data, errno)
			}
			s.release(inner, fh)
			if names := s.names(dir); !slices.Equal(names, []string{"inner"}) {
				s.t.Errorf("%s lists %q", mount, names)
			}
			for _, plus := range []bool{false, true} {
				h, errno := s.opendir(dir)
				s.wants(errno, 0, "OPENDIR")
				entries, errno := s.list(dir, h, plus)
				s.wants(errno, 0, "READDIR")
				s.dotdot(entries, mount, s.path("bound"))
				s.releasedir(dir, h)
			}
			_, errno = s.lookup(dir, "secret")
			s.wants(errno, unix.ENOENT, "LOOKUP of what is beside %s", mount)

			// Nothing moves between mounts, even on one file system.
			_, errno = s.link(inner, root, "linked")
			s.wants(errno, unix.EXDEV, "LINK out of %s", mount)
			_, errno = s.link(s.node("file"), dir, "linked")
			s.wants(errno, unix.EXDEV, "LINK into %s", mount)
			s.wants(s.rename(dir, "inner", root, "renamed"), unix.EXDEV, "RENAME out of %s", mount)
			s.wants(s.rename(root, "file", dir, "renamed"), unix.EXDEV, "RENAME into %s", mount)
			s.wants(s.rename2(root, "file", dir, "inner", unix.RENAME_EXCHANGE), unix.EXDEV, "RENAME_EXCHANGE with %s", mount)
			if tmp, errno := s.tmpfile(dir, "/"); errno == 0 {
				_, errno := s.link(tmp.NodeId, root, "linked")
				s.wants(errno, unix.EXDEV, "LINK of a TMPFILE out of %s", mount)
				s.release(tmp.NodeId, tmp.Fh)
			}
			// Nor does the mount point.
			s.wants(s.rmdir(root, mount), unix.EBUSY, "RMDIR of %s", mount)
			s.wants(s.rename(root, mount, root, "renamed"), unix.EBUSY, "RENAME of %s", mount)
			s.wants(s.rename2(root, mount, root, "dir", unix.RENAME_EXCHANGE), unix.EBUSY, "RENAME_EXCHANGE of %s", mount)
		}
	})
}

// TestSubmountLinks follows links from a submount: tmpfs/link leads to where the secret would be.
func TestSubmountLinks(t *testing.T) {
	attack(t, func(s *scene) {
		for _, mount := range []string{"tmpfs", "bind"} {
			s.check(os.Symlink("../../outside", s.path("share", mount, "link")))
			s.check(os.Symlink("../secret", s.path("share", mount, "beside")))
			for _, name := range []string{"link", "beside"} {
				s.neverOpened(s.node(mount), name)
				s.pressure()
				s.neverOpened(s.node(mount), name)
			}
		}
	})
}

// TestRemounted has the host replace a file system below the share by others, whose inodes have the same numbers: a node is of the file
// system that it was found on, or of none. A guest never sees a file handle, so this is all that it could do with those of another
// file system.
func TestRemounted(t *testing.T) {
	attack(t, func(s *scene) {
		const dir = "share/tmpfs"
		fill := func(content string) uint64 {
			for _, name := range []string{"a", "b", "c"} {
				s.put(dir+"/"+name, content)
			}
			var st unix.Stat_t
			s.check(unix.Stat(s.path(dir, "b"), &st))
			return st.Ino
		}
		// The first has had "inner", unlike the others.
		s.check(unix.Unmount(s.path(dir), unix.MNT_DETACH))
		s.mount("tmpfs", dir, "tmpfs", 0)
		number := fill("of the share")
		s.mounts++
		top := s.node("tmpfs")
		nodes := []uint64{s.node("tmpfs", "a"), s.node("tmpfs", "b"), s.node("tmpfs", "c")}
		for range 2 {
			s.pressure()
			s.check(unix.Unmount(s.path(dir), unix.MNT_DETACH))
			// What comes is not for the guest's old nodes: it has never looked it up.
			s.mount("tmpfs", dir, "tmpfs", 0)
			if again := fill(secretMark); again != number {
				s.t.Fatalf("the new file has inode number %d, expected %d again", again, number)
			}
			for _, node := range nodes {
				fh, errno := s.open(node, unix.O_RDWR)
				if errno != 0 {
					s.wants(errno, unix.ESTALE, "OPEN of a node of a file system that is not mounted")
					continue
				}
				if data, errno := s.read(node, fh); errno != 0 || data != "of the share" {
					s.t.Errorf("READ of a node of a file system that is not mounted: %q, %v, expected its old content", data, errno)
				}
				s.release(node, fh)
				for _, in := range setattrs() {
					in.Valid &^= fuseproto.FATTR_SIZE
					_ = s.setattr(node, in)
				}
			}
			if _, errno := s.create(top, "created", unix.O_RDWR, 0o644); errno != 0 {
				s.wants(errno, unix.ESTALE, "CREATE in the root of a file system that is not mounted")
			}
			got, err := os.ReadDir(s.path(dir))
			s.check(err)
			if len(got) != 3 {
				s.t.Errorf("the new file system has %v, expected what the host put there", got)
			}
		}
		// Without a mount there is the directory that it was on.
		for unix.Unmount(s.path(dir), unix.MNT_DETACH) == nil {
			continue
		}
		if names := s.names(s.node("tmpfs")); len(names) != 0 {
			s.t.Errorf("the mount point lists %q", names)
		}
	})
}

// TestMountOverKnown mounts what is outside over a directory that the guest knows: by name it is there, by the host's choice; the
// directory that the guest knows is still the one below.
func TestMountOverKnown(t *testing.T) {
	attack(t, func(s *scene) {
		known, inner := s.node("dir"), s.node("dir", "inner")
		s.pressure()
		s.check(os.Mkdir(s.path("mounted"), 0o777))
		s.put("mounted/inner", secretMark)
		s.put("mounted/other", secretMark)
		s.check(s.giveAway(s.path("mounted")))
		s.mount(s.path("mounted"), "share/dir", "", unix.MS_BIND)
		s.rebase()
		fh, errno := s.open(inner, unix.O_RDWR)
		if errno == 0 {
			if data, errno := s.read(inner, fh); errno != 0 || data != "of the share" {
				s.t.Errorf("READ of the file below: %q, %v", data, errno)
			}
			s.release(inner, fh)
		} else {
			s.wants(errno, unix.ESTALE, "OPEN of the file below")
		}
		_, errno = s.lookup(known, "other")
		if errno != unix.ENOENT && errno != unix.ESTALE {
			s.t.Errorf("LOOKUP in the directory below of what is mounted over it: %v, expected ENOENT or ESTALE", errno)
		}
		created, errno := s.create(known, "created", unix.O_RDWR, 0o644)
		if errno == 0 {
			s.release(created.NodeId, created.Fh)
		} else {
			s.wants(errno, unix.ESTALE, "CREATE in the directory below")
		}
		s.check(unix.Unmount(s.path("share/dir"), unix.MNT_DETACH))
	})
}

// dotdot checks that a listing of dir says nothing of the directory above, which the host has it in.
func (s *scene) dotdot(entries []fsbackendtest.Dirent, dir, above string) {
	s.t.Helper()
	var st unix.Stat_t
	s.check(unix.Stat(above, &st))
	for _, e := range entries {
		if (e.Name == "." || e.Name == "..") && (e.Entry.NodeId != 0 || e.Ino == st.Ino) {
			s.t.Errorf("READDIR of %s gives %s as node %#x and inode %d, that of %s", dir, e.Name, e.Entry.NodeId, e.Ino, above)
		}
	}
}

// TestReaddir lists every directory that there is: names of the share, and none that anything else has.
func TestReaddir(t *testing.T) {
	attack(t, func(s *scene) {
		want := map[string][]string{
			"":        {".", "..", "bind", "dir", "file", "full", "hard", "links", "proc", "special", "tmpfs"},
			"dir":     {".", "..", "inner"},
			"special": {".", "..", "disk", "fifo", "nodriver", "null", "sock"},
			"tmpfs":   {".", "..", "inner"},
			"bind":    {".", "..", "inner"},
		}
		for name, names := range want {
			node := uint64(root)
			if name != "" {
				node = s.node(name)
			}
			fh, errno := s.opendir(node)
			s.wants(errno, 0, "OPENDIR of %q", name)
			for _, plus := range []bool{false, true} {
				entries, errno := s.list(node, fh, plus)
				if got := entryNames(entries); errno != 0 || !slices.Equal(got, names) {
					s.t.Errorf("READDIR of %q, plus %v: %q, %v, expected %q", name, plus, got, errno, names)
				}
				s.dotdot(entries, "share/"+name, s.dir)
			}
			// Offsets that no listing has had.
			for _, off := range guesses() {
				// Whatever the answer, it is searched for secrets.
				s.do(call{op: fuseproto.FUSE_READDIR, node: node, args: args(fuseproto.ReadIn{Fh: fh, Offset: off, Size: 4096}), outData: 4096})
			}
			s.releasedir(node, fh)
		}
	})
}

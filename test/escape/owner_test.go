package escape_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
)

// TestOwners creates as several users of the guest. What root serves belongs to the caller, and has the mode that was asked for; what an
// ordinary user serves is that user's own, and nobody else's to ask for.
func TestOwners(t *testing.T) {
	attack(t, func(s *scene) {
		s.check(unix.Chmod(s.path("share/dir"), 0o777))
		dir := s.node("dir")
		created := map[string]func() unix.Errno{
			"file": func() unix.Errno {
				out, errno := s.create(dir, "file", unix.O_RDWR, 0o4755)
				if errno == 0 {
					s.release(out.NodeId, out.Fh)
				}
				return errno
			},
			"dir":  func() unix.Errno { _, errno := s.mkdir(dir, "dir"); return errno },
			"fifo": func() unix.Errno { _, errno := s.mknod(dir, "fifo", unix.S_IFIFO|0o644, 0); return errno },
			"link": func() unix.Errno { _, errno := s.symlink(dir, "link", "../../outside/secret"); return errno },
		}
		for _, caller := range []fuseproto.Caller{
			owner(0, 0), owner(1000, 1001), owner(0, 1001), owner(1000, 0), owner(nobody, nobody), owner(1, 1), owner(1<<31, 1<<31),
			owner(^uint32(0), 0), owner(0, ^uint32(0)), owner(^uint32(0), ^uint32(0)),
		} {
			s.caller.Owner = caller.Owner
			for name, create := range created {
				errno := create()
				want := unix.Errno(0)
				invalid := caller.Uid == ^uint32(0) || caller.Gid == ^uint32(0)
				foreign := caller.Uid != 0 && caller.Uid != s.cfg.uid || caller.Gid != 0 && caller.Gid != s.cfg.uid
				switch {
				case invalid:
					want = unix.EOVERFLOW
				case s.cfg.uid != 0 && foreign:
					want = unix.EPERM
				}
				s.wants(errno, want, "create %s as %d:%d", name, caller.Uid, caller.Gid)
				var st unix.Stat_t
				err := unix.Lstat(s.path("share/dir", name), &st)
				if want != 0 {
					if err != unix.ENOENT {
						s.t.Errorf("%s is there after it was refused to %d:%d: %v", name, caller.Uid, caller.Gid, err)
					}
					continue
				}
				s.check(err)
				uid, gid := caller.Uid, caller.Gid
				if s.cfg.uid != 0 {
					uid, gid = s.cfg.uid, s.cfg.uid
				}
				if st.Uid != uid || st.Gid != gid {
					s.t.Errorf("%s belongs to %d:%d, expected %d:%d", name, st.Uid, st.Gid, uid, gid)
				}
				if name == "file" && st.Mode != unix.S_IFREG|0o4755 {
					s.t.Errorf("the file has mode %#o, expected 4755 as asked for", st.Mode)
				}
				if name == "dir" {
					s.wants(s.rmdir(dir, name), 0, "RMDIR")
				} else {
					s.wants(s.unlink(dir, name), 0, "UNLINK of %s", name)
				}
			}
		}
		s.caller.Uid, s.caller.Gid = s.cfg.uid, s.cfg.uid
	})
}

// TestActsAsCaller creates where the caller may not: the guest's kernel should have seen to that, and one that lies gets no further than
// its caller would on the host.
func TestActsAsCaller(t *testing.T) {
	attack(t, func(s *scene) {
		if s.cfg.uid != 0 {
			s.caller.Owner = owner(0, 0).Owner
			_, errno := s.create(root, "created", unix.O_RDWR, 0o644)
			s.wants(errno, 0, "CREATE as the guest's root, who is the daemon's user")
			return
		}
		s.check(unix.Chmod(s.path("share/dir"), 0o700))
		dir := s.node("dir")
		s.caller.Owner = owner(1000, 1000).Owner
		_, errno := s.create(dir, "created", unix.O_RDWR, 0o644)
		s.wants(errno, unix.EACCES, "CREATE in a directory of root's alone")
		_, errno = s.mkdir(dir, "created")
		s.wants(errno, unix.EACCES, "MKDIR in a directory of root's alone")
		_, errno = s.mknod(dir, "created", unix.S_IFCHR|0o666, uint32(unix.Mkdev(1, 3)))
		s.refused(errno, "MKNOD of a device as a user")
		_, errno = s.tmpfile(dir, "/")
		s.wants(errno, unix.EACCES, "TMPFILE in a directory of root's alone")
		// The daemon is itself again.
		s.caller.Owner = owner(0, 0).Owner
		out, errno := s.create(dir, "created", unix.O_RDWR, 0o644)
		s.wants(errno, 0, "CREATE as root")
		s.release(out.NodeId, out.Fh)
		if out.Attr.Uid != 0 || out.Attr.Gid != 0 {
			s.t.Errorf("root's file belongs to %d:%d", out.Attr.Uid, out.Attr.Gid)
		}
	})
}

// owner is a caller of the guest.
func owner(uid, gid uint32) (c fuseproto.Caller) {
	c.Uid, c.Gid = uid, gid
	return c
}

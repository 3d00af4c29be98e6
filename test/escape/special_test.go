package escape_test

import (
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSpecialFiles opens what must never be opened: FIFOs, sockets and device nodes of the host.
func TestSpecialFiles(t *testing.T) {
	attack(t, func(s *scene) {
		// The other ends of FIFO and socket tell whether anybody came.
		fifo, err := unix.Open(s.path("share/special/fifo"), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		s.check(err)
		defer unix.Close(fifo)
		s.check(os.Remove(s.path("share/special/sock")))
		sock, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.path("share/special/sock"), Net: "unix"})
		s.check(err)
		defer sock.Close()
		special := s.node("special")
		for _, name := range []string{"fifo", "sock", "null", "nodriver", "disk"} {
			s.neverOpened(special, name)
			s.pressure()
			s.neverOpened(special, name)
		}
		events := []unix.PollFd{{Fd: int32(fifo), Events: unix.POLLIN}}
		if n, err := unix.Poll(events, 0); err != nil || n != 0 {
			s.t.Errorf("the FIFO was opened for writing: poll says %d, events %#x, %v", n, events[0].Revents, err)
		}
		s.check(sock.SetDeadline(time.Now()))
		if _, err := sock.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
			s.t.Errorf("accept: %v, expected that nobody has connected", err)
		}
		for _, f := range s.daemon.openFiles(s.t) {
			if strings.Contains(f.path, "/special/") && f.flags&unix.O_PATH == 0 {
				s.t.Errorf("the daemon has %s open with flags %#o", f.path, f.flags)
			}
		}
	})
}

// TestOpenFlags opens a file and a directory with all flags: those that the daemon's descriptors get are not the guest's to choose.
func TestOpenFlags(t *testing.T) {
	attack(t, func(s *scene) {
		dir := s.node("dir")
		for _, flags := range openFlags {
			s.put("share/dir/inner", "of the share")
			node := s.node("dir", "inner")
			fh, errno := s.open(node, flags)
			if errno == 0 {
				for _, f := range s.daemon.openFiles(s.t) {
					const harmful = unix.O_ASYNC | unix.O_NONBLOCK | unix.O_NOATIME | unix.O_APPEND | unix.O_DIRECTORY | unix.O_CREAT | unix.O_EXCL
					if f.path == s.path("share/dir/inner") && f.flags&unix.O_PATH == 0 && (f.flags&harmful != 0 || f.flags&unix.O_CLOEXEC == 0) {
						s.t.Errorf("OPEN with %#x: the daemon has the file open with %#x", flags, f.flags)
					}
				}
				s.release(node, fh)
			}
			if got := s.content("share/dir/inner"); got != "of the share" && (got != "" || flags&unix.O_TRUNC == 0) {
				s.t.Errorf("OPEN with %#x: the file holds %q", flags, got)
			}
			_, errno = s.open(dir, flags)
			s.wants(errno, unix.EISDIR, "OPEN of a directory with %#x", flags)
			_, errno = s.open(root, flags)
			s.wants(errno, unix.EISDIR, "OPEN of the root with %#x", flags)
		}
		s.put("share/dir/inner", "of the share")
	})
}

// TestMadeSpecialFiles makes special files: the guest may have them, and nobody opens them.
func TestMadeSpecialFiles(t *testing.T) {
	attack(t, func(s *scene) {
		for name, mode := range map[string]uint32{"fifo": unix.S_IFIFO, "sock": unix.S_IFSOCK, "null": unix.S_IFCHR, "disk": unix.S_IFBLK} {
			_, errno := s.mknod(root, name, mode|0o666, uint32(unix.Mkdev(1, 3)))
			if errno == unix.EPERM && s.cfg.uid != 0 && (mode == unix.S_IFCHR || mode == unix.S_IFBLK) {
				continue
			}
			s.wants(errno, 0, "MKNOD of a %s", name)
			s.neverOpened(root, name)
		}
		for _, mode := range []uint32{unix.S_IFDIR, unix.S_IFLNK, unix.S_IFMT, 0xffff_f000} {
			_, errno := s.mknod(root, "other", mode|0o666, 0)
			s.refused(errno, "MKNOD with mode %#o", mode)
		}
	})
}

// TestMagicLinks walks a procfs in the share, whose links are not names of files but the files themselves: those that the daemon and
// this test have open.
func TestMagicLinks(t *testing.T) {
	attack(t, func(s *scene) {
		proc := s.node("proc")
		for _, pid := range []int{s.daemon.cmd.Process.Pid, os.Getpid()} {
			dir, errno := s.lookup(proc, strconv.Itoa(pid))
			s.wants(errno, 0, "LOOKUP of process %d", pid)
			links := []uint64{dir.NodeId, dir.NodeId, dir.NodeId}
			names := []string{"cwd", "root", "exe"}
			if fd, errno := s.lookup(dir.NodeId, "fd"); errno == 0 {
				for _, name := range []string{"3", "4", "5"} {
					links, names = append(links, fd.NodeId), append(names, name)
				}
			}
			for i, parent := range links {
				e, errno := s.lookup(parent, names[i])
				if errno == unix.EACCES || errno == unix.ENOENT {
					continue // of another user's process, or not open
				}
				if errno != 0 || e.Mode&unix.S_IFMT != unix.S_IFLNK {
					s.t.Errorf("LOOKUP of %s: mode %#o, %v, expected a link", names[i], e.Mode, errno)
					continue
				}
				_, errno = s.open(e.NodeId, unix.O_RDWR)
				s.wants(errno, unix.EBADF, "OPEN of magic link %s", names[i])
				_, errno = s.opendir(e.NodeId)
				s.wants(errno, unix.ENOTDIR, "OPENDIR of magic link %s", names[i])
				for _, in := range setattrs() {
					// procfs lets the link itself change; what it stands for is the snapshot's to check.
					_ = s.setattr(e.NodeId, in)
				}
				_, errno = s.getxattr(e.NodeId, "user.secret")
				s.refused(errno, "GETXATTR of magic link %s", names[i])
				s.refused(s.setxattr(e.NodeId, "user.set", "value"), "SETXATTR of magic link %s", names[i])
				s.refused(s.removexattr(e.NodeId, "user.secret"), "REMOVEXATTR of magic link %s", names[i])
				_, errno = s.link(e.NodeId, root, "linked")
				s.wants(errno, unix.EXDEV, "LINK of magic link %s", names[i])
				for what, do := range namedCalls {
					for _, below := range []string{"secret", "created", "empty"} {
						s.wants(do(s, e.NodeId, below), unix.ENOTDIR, "%s of %s in magic link %s", what, below, names[i])
					}
				}
				ino, errno := s.statx(e.NodeId)
				if errno == 0 && ino != e.Ino {
					s.t.Errorf("STATX of magic link %s: inode %d, expected the link, %d", names[i], ino, e.Ino)
				}
			}
		}
	})
}

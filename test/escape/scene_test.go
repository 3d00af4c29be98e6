package escape_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

// scene is what a test plays in: the directories, a daemon that serves one of them, and the guest.
//
//	share/        the share
//	    file, dir/inner, full/0..19
//	    links/    symbolic links that lead out, see linkTargets
//	    special/  what must not be opened: fifo, sock, null, nodriver, disk
//	    hard      another name of outside/hard
//	    tmpfs/    another file system
//	    bind/     bound/source, mounted
//	    proc/     procfs, full of magic links
//	outside/      what must not be reached: secret, dir/inner, empty/, fifo, null, setuid, link, hard
//	bound/        source/inner, and a secret beside it
//
// Everything outside could be read and changed by the daemon's user: nothing but the daemon's own care protects it.
type scene struct {
	*guest
	cfg    configuration
	dir    string
	share  string
	daemon *daemon

	before snapshot // of all that is not the share's
	// excused are paths below dir, and all below them, that the test hands to the guest.
	excused []string
	fds     int // the daemon's
	// mounts is how many mounts came after the start and were shown to the daemon, which keeps a descriptor for each.
	mounts int
}

// linkTargets are the links in share/links; %s is the scratch directory.
var linkTargets = map[string]string{
	"abs":       "%s/outside/secret",
	"absdir":    "%s/outside",
	"abswrite":  "%s/outside/created",
	"rel":       "../../outside/secret",
	"reldir":    "../../outside",
	"relempty":  "../../outside/empty",
	"relfifo":   "../../outside/fifo",
	"relnull":   "../../outside/null",
	"relsetuid": "../../outside/setuid",
	"relwrite":  "../../outside/created",
	"bound":     "../../bound/secret",
	"frombind":  "../bind/../secret",
	"up":        "../..",
	"parent":    "..",
	"middle":    "reldir/inner",
	"chain":     "rel",
	"chaindir":  "./reldir/../outside/dir",
	"loop":      "loop",
	"root":      "/",
	"passwd":    "/etc/passwd",
	"selfroot":  "/proc/self/root",
	"selfcwd":   "/proc/self/cwd", // outside/
	"selfexe":   "/proc/self/exe",
	"selffd4":   "/proc/self/fd/4", // outside/secret
	"selffd5":   "/proc/self/fd/5", // outside/
	"devfd4":    "/dev/fd/4",
	"devfd5":    "/dev/fd/5",
	"stdin":     "/dev/stdin",
	"thread":    "/proc/thread-self/fd/5",
	"initroot":  "/proc/1/root",
	"inproc":    "../proc/self/cwd",
}

// newScene makes the directories and starts a daemon on share/.
func newScene(t *testing.T, cfg configuration) *scene {
	t.Helper()
	s := newLayout(t, cfg)
	s.start(s.share)
	return s
}

// newLayout makes the directories.
func newLayout(t *testing.T, cfg configuration) *scene {
	t.Helper()
	dir, err := os.MkdirTemp(base, "")
	if err != nil {
		t.Fatal(err)
	}
	s := &scene{guest: &guest{t: t}, cfg: cfg, dir: dir, share: filepath.Join(dir, "share")}
	t.Cleanup(func() { s.check(os.RemoveAll(dir)) })

	for _, d := range []string{"share/dir", "share/full", "share/links", "share/special", "share/tmpfs", "share/bind", "share/proc", "outside/dir", "outside/empty", "bound/source"} {
		s.check(os.MkdirAll(s.path(d), 0o755))
	}
	s.put("share/file", "of the share")
	s.put("share/dir/inner", "of the share")
	for i := range 20 {
		s.put(fmt.Sprint("share/full/", i), "")
	}
	s.put("bound/source/inner", "of the share")
	for _, secret := range []string{"outside/secret", "outside/dir/inner", "outside/dir/" + secretMark, "outside/setuid", "bound/secret"} {
		s.put(secret, secretMark)
	}
	s.put("outside/hard", "of both")
	s.check(os.Link(s.path("outside/hard"), s.path("share/hard")))
	s.check(os.Symlink("secret", s.path("outside/link")))
	for name, target := range linkTargets {
		s.check(os.Symlink(strings.ReplaceAll(target, "%s", dir), s.path("share/links", name)))
	}
	for _, n := range []struct {
		name string
		mode uint32
		dev  uint64
	}{
		{"outside/fifo", unix.S_IFIFO, 0},
		{"outside/null", unix.S_IFCHR, unix.Mkdev(1, 3)},
		{"share/special/fifo", unix.S_IFIFO, 0},
		{"share/special/null", unix.S_IFCHR, unix.Mkdev(1, 3)},
		// To open these is ENXIO: an answer that differs from that has not tried.
		{"share/special/nodriver", unix.S_IFCHR, unix.Mkdev(4000, 1)},
		{"share/special/disk", unix.S_IFBLK, unix.Mkdev(4000, 1)},
	} {
		s.check(unix.Mknod(s.path(n.name), n.mode|0o666, int(n.dev)))
		s.check(os.Chmod(s.path(n.name), 0o666))
	}
	sock, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.path("share/special/sock"), Net: "unix"})
	s.check(err)
	sock.SetUnlinkOnClose(false)
	s.check(sock.Close())

	s.mount("tmpfs", "share/tmpfs", "tmpfs", 0)
	s.put("share/tmpfs/inner", "of the share")
	s.mount(s.path("bound/source"), "share/bind", "", unix.MS_BIND)
	s.mount("proc", "share/proc", "proc", 0)

	for _, d := range []string{"share", "outside", "bound"} {
		s.check(s.giveAway(s.path(d)))
	}
	s.check(os.Chown(dir, int(cfg.uid), int(cfg.uid)))
	s.check(os.Chmod(s.path("outside/setuid"), 0o755|os.ModeSetuid))
	if err := unix.Setxattr(s.path("outside/secret"), "user.secret", []byte(secretMark), 0); err != unix.EOPNOTSUPP { // tmpfs, before Linux 6.6
		s.check(err)
	}
	return s
}

// giveAway makes all below path the daemon's user's, and as old as to show the next access.
func (s *scene) giveAway(path string) error {
	return filepath.WalkDir(path, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == s.path("share/proc") {
			return filepath.SkipDir
		}
		old := []unix.Timespec{{Sec: 1e9}, {Sec: 1e9}}
		return errors.Join(os.Lchown(path, int(s.cfg.uid), int(s.cfg.uid)), unix.UtimesNanoAt(unix.AT_FDCWD, path, old, unix.AT_SYMLINK_NOFOLLOW))
	})
}

// start starts the daemon on share, and the guest, and arranges for the checks that end every test.
func (s *scene) start(share string) {
	s.t.Helper()
	secret, err := os.OpenFile(s.path("outside/secret"), os.O_RDWR, 0)
	s.check(err)
	defer secret.Close()
	outside, err := os.Open(s.path("outside"))
	s.check(err)
	defer outside.Close()
	d, fe := startDaemon(s.t, s.cfg, share, s.path("outside"), secret, outside)
	s.daemon = d
	s.guest = newGuest(s.t, fe, d.exited)
	s.caller.Uid, s.caller.Gid = s.cfg.uid, s.cfg.uid

	s.init()
	// What the daemon keeps of each mount is there before descriptors are counted.
	for _, dir := range []string{"tmpfs", "bind", "proc"} {
		s.names(s.node(dir))
	}
	s.destroy()
	s.init()
	s.fds = len(s.daemon.openFiles(s.t))
	s.rebase()
	s.t.Cleanup(s.verify)
}

// path is a file in the scratch directory.
func (s *scene) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

// put writes a file in the scratch directory that belongs to the daemon's user.
func (s *scene) put(path, content string) {
	s.t.Helper()
	s.check(os.WriteFile(s.path(path), []byte(content), 0o666))
	s.check(os.Chown(s.path(path), int(s.cfg.uid), int(s.cfg.uid)))
}

// content reads a file of the scratch directory.
func (s *scene) content(path string) string {
	s.t.Helper()
	b, err := os.ReadFile(s.path(path))
	s.check(err)
	return string(b)
}

// mount mounts on a directory of the scratch directory, until the test has ended.
func (s *scene) mount(source, target, fstype string, flags uintptr) {
	s.t.Helper()
	data := ""
	if fstype == "tmpfs" {
		data = "mode=0777"
	}
	s.check(unix.Mount(source, s.path(target), fstype, flags, data))
	s.t.Cleanup(func() { _ = unix.Unmount(s.path(target), unix.MNT_DETACH) })
}

// excuse says that path, and all below it, is the guest's now.
func (s *scene) excuse(path string) {
	s.excused = append(s.excused, path)
}

// rebase takes what is outside as it is now for what has to stay: the test has just changed it.
func (s *scene) rebase() {
	s.t.Helper()
	s.before = s.snapshot()
}

func (s *scene) snapshot() snapshot {
	s.t.Helper()
	snap, err := takeSnapshot(s.dir, append([]string{"share", "bound/source"}, s.excused...))
	s.check(err)
	return snap
}

// unchanged checks that all outside the share is as it was.
func (s *scene) unchanged() {
	s.t.Helper()
	for _, d := range s.before.diff(s.snapshot()) {
		s.t.Errorf("outside the share: %s", d)
	}
}

// pressure makes nodes that were not used of late lose their descriptors where these are few: it knows more at a time.
func (s *scene) pressure() {
	s.t.Helper()
	full := s.node("full")
	known := []uint64{full}
	for i := range 20 {
		known = append(known, s.node("full", fmt.Sprint(i)))
	}
	for _, node := range known[1:] {
		s.forget(node, 1)
	}
	s.forget(full, 21)
}

// verify is the end of every test.
func (s *scene) verify() {
	if !s.daemon.alive() {
		s.t.Errorf("the daemon has ended: %v", s.daemon.err)
		return
	}
	if s.mem == nil {
		return
	}
	s.serves()
	s.unchanged()
	s.destroy()
	// A thread that is still busy with the end of a call holds what it worked on.
	deadline := time.Now().Add(patience)
	for {
		files := s.daemon.openFiles(s.t)
		if len(files) <= s.fds+s.mounts {
			break
		}
		if time.Now().After(deadline) {
			s.t.Errorf("the daemon holds %d descriptors, expected %d, and one for each of %d new mounts: %v", len(files), s.fds, s.mounts, files)
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// serves checks that the daemon does what a guest wants of it.
func (s *scene) serves() {
	s.t.Helper()
	node := s.node("dir", "inner")
	fh := s.mustOpen(node, unix.O_RDWR)
	if data, errno := s.read(node, fh); errno != 0 || data != "of the share" {
		s.t.Errorf("READ of dir/inner: %q, %v", data, errno)
	}
	s.release(node, fh)
}

// refused checks that a request was not granted. Any errno will do but those of the daemon's own trouble.
func (s *scene) refused(errno unix.Errno, format string, a ...any) {
	s.t.Helper()
	switch errno {
	case 0:
		s.t.Errorf("%s: granted, expected a refusal", fmt.Sprintf(format, a...))
	case unix.ENOSYS, unix.EIO, unix.ENFILE, unix.EMFILE, unix.ENOMEM, unix.EFAULT:
		s.t.Errorf("%s: %v, expected a refusal with reason", fmt.Sprintf(format, a...), errno)
	}
}

// wants checks the answer to a request.
func (s *scene) wants(errno, want unix.Errno, format string, a ...any) {
	s.t.Helper()
	if errno != want {
		s.t.Errorf("%s: %v, expected %v", fmt.Sprintf(format, a...), errno, want)
	}
}

// entryNames are the names of a listing, sorted.
func entryNames(entries []fsbackendtest.Dirent) []string {
	var names []string
	for _, e := range entries {
		names = append(names, e.Name)
	}
	slices.Sort(names)
	return names
}

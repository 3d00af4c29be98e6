package sandbox

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// Enter puts everything but the view out of reach and returns where each source is then. Only what was opened before leads
// back. Privileges remain until Confine; supplementary groups go where they can.
//
// Under Namespace sources are at /sources/N, with what is mounted below them, now or by the host later; they are mounted
// nosuid, nodev and noexec, for the daemon itself neither runs nor opens what the guest makes there.
func (b *Box) Enter(v View) (paths []string, err error) {
	if b.procfd != nil {
		return nil, errors.New("enter the sandbox a second time")
	}
	_, _ = time.Now().Zone() // loads the zone of the log's times: its file is out of reach from here on
	switch b.mode {
	case Namespace:
		paths, err = b.enterNamespace(v)
	case Chroot:
		paths, err = b.enterChroot(v)
	case None:
		paths, err = b.enterNone(v)
	}
	if err != nil {
		return nil, fmt.Errorf("enter the sandbox %s: %w", b.mode, err)
	}
	return paths, nil
}

func (b *Box) enterNone(v View) ([]string, error) {
	if err := b.identity.assume(); err != nil {
		return nil, err
	}
	paths := make([]string, len(v.Sources))
	for i, s := range v.Sources {
		if s.Path == "" {
			continue
		}
		fd, err := s.open()
		if err != nil {
			return nil, err
		}
		_ = fd.Close()
		paths[i] = s.Path
	}
	return paths, b.leavePorter(0)
}

func (b *Box) enterChroot(v View) ([]string, error) {
	if err := b.identity.assume(); err != nil {
		return nil, err
	}
	if len(v.Files) > 0 || v.Network {
		return nil, errors.New("files of the host are needed besides the source, which a changed root directory has no place for: expected --sandbox namespace")
	}
	paths := make([]string, len(v.Sources))
	var root *sys.FD
	for i, s := range v.Sources {
		if s.Path == "" {
			continue
		}
		if root != nil || s.File {
			_ = root.Close()
			return nil, errors.New("a changed root directory has room for one source, and it must be a directory: expected --sandbox namespace")
		}
		fd, err := s.open()
		if err != nil {
			return nil, err
		}
		root, paths[i] = fd, "/"
	}
	if root == nil {
		var err error
		if root, err = nowhere(); err != nil {
			return nil, err
		}
	}
	defer root.Close()
	if err := b.leavePorter(unix.CLONE_FS); err != nil {
		return nil, err
	}
	if err := unix.Fchdir(root.Int()); err != nil {
		return nil, fmt.Errorf("change to the source: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return nil, fmt.Errorf("change the root directory: %w: expected the capability sys_chroot", err)
	}
	return paths, unix.Chdir("/")
}

// nowhere returns an empty directory that nothing can be put into.
func nowhere() (*sys.FD, error) {
	dir, err := os.MkdirTemp("", "sluiced-root-")
	if err != nil {
		return nil, fmt.Errorf("make an empty root directory: %w: expected $TMPDIR, or /tmp, to be a directory that can be written to", err)
	}
	defer os.Remove(dir)
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the empty root directory: %w", err)
	}
	return sys.NewFD(fd), nil
}

// leavePorter starts the porter for a process that shares the host's /proc, and opens what is needed of that.
func (b *Box) leavePorter(flags int) error {
	fd, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /proc/self/fd: %w: expected /proc to be mounted", err)
	}
	procfd := sys.NewFD(fd)
	p, err := startPorter(flags, func() error { return nil })
	if err != nil {
		return errors.Join(err, procfd.Close())
	}
	b.porter, b.procfd = p, procfd
	return nil
}

// An identity is who a process is in a user namespace whose maps its launcher has written. The zero value stays who it is.
type identity struct {
	rootUser   bool // the map has a user 0, who is not the launcher's user, perhaps
	rootGroup  bool
	keepGroups bool // setgroups(2) is denied, for the launcher mapped the group without privileges
}

// assume becomes who identity says, on every thread.
func (i identity) assume() error {
	if caps, errno := sys.ThreadCaps(); errno == 0 && CapSet(caps.Effective).Has(capOf(unix.CAP_SETGID)) && !i.keepGroups {
		// A group of whoever started the daemon must not help the guest's users.
		if err := syscall.Setgroups(nil); err != nil {
			return fmt.Errorf("give up the supplementary groups: %w", err)
		}
	}
	if i.rootGroup {
		if err := syscall.Setresgid(0, 0, 0); err != nil {
			return fmt.Errorf("become group 0 of the map: %w", err)
		}
	}
	if i.rootUser {
		if err := syscall.Setresuid(0, 0, 0); err != nil {
			return fmt.Errorf("become user 0 of the map: %w", err)
		}
	}
	return nil
}

// resolveFiles opens what the view has besides the sources, by path.
func (v View) resolveFiles() (map[string]*sys.FD, error) {
	files := map[string]*sys.FD{}
	for _, path := range v.Files {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			closeFiles(files)
			return nil, fmt.Errorf("a file that is needed in the sandbox: %w", &os.PathError{Op: "open", Path: path, Err: err})
		}
		_ = files[path].Close()
		files[path] = sys.NewFD(fd)
	}
	if v.Network {
		for _, path := range networkFiles {
			if files[path] != nil {
				continue
			}
			if fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0); err == nil {
				files[path] = sys.NewFD(fd)
			}
		}
	}
	return files, nil
}

func closeFiles(files map[string]*sys.FD) {
	for _, fd := range files {
		_ = fd.Close()
	}
}

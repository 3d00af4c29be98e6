package sandbox

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// sourcesDir is where the sources are inside.
const sourcesDir = "/sources"

// inert is what every mount inside is, and everything mounted below.
const inert = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC

// A mount is a tree of mounts, not yet attached, and where it belongs.
type mount struct {
	tree *sys.FD
	path string
}

func (b *Box) enterNamespace(v View) (paths []string, err error) {
	var mounts []mount
	defer func() {
		for _, m := range mounts {
			_ = m.tree.Close()
		}
	}()
	add := func(fd *sys.FD, path string, attr uint64) error {
		tree, err := cloneTree(fd.Int(), "", attr)
		if err != nil {
			return fmt.Errorf("take %s along: %w", path, err)
		}
		mounts = append(mounts, mount{tree, path})
		return nil
	}

	// What the host mounts below a source arrives inside; nothing goes the other way.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return nil, fmt.Errorf("detach the mounts from the host's: %w", err)
	}
	paths = make([]string, len(v.Sources))
	for i, s := range v.Sources {
		if s.Path == "" {
			continue
		}
		fd, err := s.open()
		if err != nil {
			return nil, err
		}
		attr := uint64(inert)
		if s.ReadOnly {
			attr |= unix.MOUNT_ATTR_RDONLY
		}
		paths[i] = path.Join(sourcesDir, strconv.Itoa(i))
		err = add(fd, paths[i], attr)
		_ = fd.Close()
		if err != nil {
			return nil, fmt.Errorf("source %s: %w", s.Path, err)
		}
	}
	if err := v.checkFiles(); err != nil {
		return nil, err
	}
	files, err := v.resolveFiles()
	if err != nil {
		return nil, err
	}
	defer closeFiles(files)
	whole := "\x00" // the directory taken along last
	for _, file := range slices.SortedFunc(maps.Keys(files), compareTrees) {
		if strings.HasPrefix(file, whole) {
			continue // it is there already
		}
		if err := add(files[file], file, inert|unix.MOUNT_ATTR_RDONLY); err != nil {
			return nil, err
		}
		whole = file + "/"
	}

	// Paths are resolved as whoever started the daemon; what is made is made as who it is from here on.
	if err := b.identity.assume(); err != nil {
		return nil, err
	}
	proc, err := b.leaveProcPorter()
	if err != nil {
		return nil, err
	}
	mounts = append(mounts, mount{proc, procSelfFD})
	if b.procfd, err = proc.Dup(); err != nil {
		return nil, err
	}
	root, err := newRoot()
	if err != nil {
		return nil, err
	}
	b.root = root
	for _, m := range mounts {
		if err := attach(root.Int(), m); err != nil {
			return nil, err
		}
	}
	if err := changeRoot(root.Int()); err != nil {
		return nil, err
	}
	for _, file := range v.Files {
		if err := sameFile(file, files[file].Int()); err != nil {
			return nil, fmt.Errorf("file %s that is needed in the sandbox: %w", file, err)
		}
	}
	return paths, nil
}

// sameFile says what is wrong if path is not what fd is.
func sameFile(path string, fd int) error {
	var want, got unix.Stat_t
	if err := unix.Fstat(fd, &want); err != nil {
		return err
	}
	if err := unix.Stat(path, &got); err != nil || got.Dev != want.Dev || got.Ino != want.Ino {
		return errors.New("a symbolic link on the way leads to what is not there: expected that to be asked for as well")
	}
	return nil
}

// checkFiles refuses paths that cannot be had inside.
func (v View) checkFiles() error {
	for _, file := range v.Files {
		if !filepath.IsAbs(file) || filepath.Clean(file) != file || file == "/" {
			return fmt.Errorf("file %q that is needed in the sandbox: expected an absolute path without . and .., and not /", file)
		}
		for _, own := range []string{sourcesDir, "/proc"} {
			if file == own || strings.HasPrefix(file, own+"/") {
				return fmt.Errorf("file %q that is needed in the sandbox: %s is the sandbox's own: expected another path", file, own)
			}
		}
	}
	return nil
}

// compareTrees sorts paths so that those in a directory follow it without others between.
func compareTrees(a, b string) int {
	return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
}

// cloneTree copies the mounts from name in dirfd, or dirfd itself, on.
func cloneTree(dirfd int, name string, attr uint64) (*sys.FD, error) {
	const at = unix.AT_EMPTY_PATH | unix.AT_RECURSIVE
	fd, err := unix.OpenTree(dirfd, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|at)
	if err != nil {
		return nil, fmt.Errorf("copy the mounts: %w", err)
	}
	if err := unix.MountSetattr(fd, "", at, &unix.MountAttr{Attr_set: attr}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("restrict the mounts: %w", sinceLinux(err, "5.12"))
	}
	return sys.NewFD(fd), nil
}

// sinceLinux adds to err what kernel has the system call, if this one has it not.
func sinceLinux(err error, version string) error {
	if errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("%w: expected Linux %s or later", err, version)
	}
	return err
}

// procSelfFD is all that is ever inside of /proc.
const procSelfFD = "/proc/self/fd"

// leaveProcPorter starts the porter, who mounts the /proc of the new process namespace for itself alone, and returns
// the mount of /proc/self/fd.
func (b *Box) leaveProcPorter() (*sys.FD, error) {
	var proc *sys.FD
	p, err := startPorter(unix.CLONE_NEWNS, func() error {
		const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
		err := unix.Mount("proc", "/proc", "proc", flags, "subset=pid")
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("mount /proc: %w: in a container whose /proc is partly hidden that is not allowed; "+
				"expected one that is not, or --sandbox chroot or none", err)
		}
		if err != nil {
			return fmt.Errorf("mount /proc: %w", err)
		}
		fd, err := unix.Open(procSelfFD, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", procSelfFD, err)
		}
		defer unix.Close(fd)
		// A copy that starts there has no way up to the rest.
		proc, err = cloneTree(fd, "", inert)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, proc.Close())
	}
	b.porter = p
	return proc, nil
}

// newRoot mounts an empty file system on / and returns it. It has room for mount points only.
func newRoot() (*sys.FD, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a root: %w", err)
	}
	defer unix.Close(fs)
	for _, option := range [][2]string{{"source", "sluice"}, {"mode", "0755"}, {"size", "64k"}, {"nr_inodes", "16k"}} {
		if err := unix.FsconfigSetString(fs, option[0], option[1]); err != nil {
			return nil, fmt.Errorf("make a root with %s=%s: %w", option[0], option[1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("make a root: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, inert)
	if err != nil {
		return nil, fmt.Errorf("make a root: %w", err)
	}
	root := sys.NewFD(fd)
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		_ = root.Close()
		return nil, fmt.Errorf("mount a root: %w", err)
	}
	return root, nil
}

// attach makes the mount point of m below root, and mounts it.
func attach(root int, m mount) error {
	dir, err := isDir(m.tree.Int())
	if err == nil {
		err = makeMountPoint(root, m.path, dir)
	}
	if err == nil {
		err = unix.MoveMount(m.tree.Int(), "", root, relative(m.path), unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	if err != nil {
		return fmt.Errorf("mount %s inside: %w", m.path, err)
	}
	return nil
}

func relative(path string) string {
	return strings.TrimPrefix(path, "/")
}

// makeMountPoint makes the directories above file, and file. There are no mounts and no symbolic links on the way.
func makeMountPoint(root int, file string, dir bool) error {
	file = relative(file)
	for i, c := range file + "/" {
		if c != '/' {
			continue
		}
		part := file[:i]
		var err error
		mode := uint32(0o755)
		if part == file && !dir {
			mode = 0o644
			err = unix.Mknodat(root, part, unix.S_IFREG|mode, 0)
		} else {
			err = unix.Mkdirat(root, part, mode)
		}
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err == nil {
			err = unix.Fchmodat(root, part, mode, 0) // whatever the umask
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// changeRoot makes root, which is mounted on /, the root directory of all threads but the porter, and lets go of the old.
func changeRoot(root int) error {
	if err := unix.Fchdir(root); err != nil {
		return fmt.Errorf("change to the new root: %w", err)
	}
	// The old root is mounted on the new one then, and "." leads to it.
	err := unix.PivotRoot(".", ".")
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("change the root: %w: not from an initial ramdisk; expected another root, or --sandbox chroot or none", err)
	}
	if err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the old root: %w", err)
	}
	return unix.Chdir("/")
}

// sealRoot removes /proc/self/fd, where that is not needed, and makes the root read-only.
func (b *Box) sealRoot() error {
	if xattrByDescriptor() {
		if err := unix.Unmount(procSelfFD, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("remove %s from the sandbox: %w", procSelfFD, err)
		}
		for dir := procSelfFD; dir != "/"; dir = path.Dir(dir) {
			if err := unix.Rmdir(dir); err != nil {
				return fmt.Errorf("remove %s from the sandbox: %w", dir, err)
			}
		}
	}
	err := unix.MountSetattr(b.root.Int(), "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if err != nil {
		return fmt.Errorf("make the root read-only: %w", err)
	}
	return nil
}

// xattrByDescriptor says whether the kernel has listxattrat(2) and its like, as sys.NewProcXattr finds out.
func xattrByDescriptor() bool {
	_, _, errno := unix.Syscall6(unix.SYS_LISTXATTRAT, ^uintptr(0), 0, 0, 0, 0, 0)
	return errno != unix.ENOSYS && errno != unix.EPERM
}

package listen

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// An ownFile is a name together with the inode that was ours there. Its directory is open, for at the end the path may be
// out of reach.
type ownFile struct {
	dir      *sys.FD
	name     string
	path     string // to speak of
	dev, ino uint64
}

// identify notes what is at path now. The caller removes or closes it.
func identify(path string) (*ownFile, error) {
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	f := &ownFile{dir: sys.NewFD(fd), name: filepath.Base(path), path: path}
	if f.dev, f.ino, err = f.look(); err != nil {
		_ = f.dir.Close()
		return nil, err
	}
	return f, nil
}

// look returns what inode is there now.
func (f *ownFile) look() (dev, ino uint64, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(f.dir.Int(), f.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0, 0, &os.PathError{Op: "stat", Path: f.path, Err: err}
	}
	return uint64(st.Dev), st.Ino, nil
}

// remove unlinks the name if the same inode is still there, and closes the directory.
func (f *ownFile) remove() error {
	defer f.dir.Close()
	dev, ino, err := f.look()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil || dev != f.dev || ino != f.ino {
		return err
	}
	if err := unix.Unlinkat(f.dir.Int(), f.name, 0); err != nil {
		return &os.PathError{Op: "remove", Path: f.path, Err: err}
	}
	return nil
}

// ErrHeld says that another daemon has the path.
var ErrHeld = errors.New("one socket path serves one daemon")

// A pidFile is the lock of a socket path; virtiofsd takes the same one.
type pidFile struct {
	file *ownFile
	fd   *sys.FD
}

// pidFileTries bounds how often the pid file may vanish between being opened and being locked.
const pidFileTries = 100

// lockPidFile creates and locks path and writes the process id into it. The lock is held until remove.
func lockPidFile(path string) (*pidFile, error) {
	for range pidFileTries {
		p, err := tryLockPidFile(path)
		if p != nil || err != nil {
			return p, err
		}
	}
	return nil, fmt.Errorf("lock the pid file: %s is replaced again and again", path)
}

// tryLockPidFile returns neither file nor error if path was replaced before the lock was had.
func tryLockPidFile(path string) (*pidFile, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create the pid file: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	return lockOpened(fd, path)
}

// lockOpened is tryLockPidFile from the open descriptor raw of path on, which it takes over.
func lockOpened(raw int, path string) (*pidFile, error) {
	fd := sys.NewFD(raw)
	locked := false
	defer func() {
		if !locked {
			_ = fd.Close()
		}
	}()

	if err := unix.Flock(raw, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another daemon%s holds %s: %w", holder(raw), path, ErrHeld)
		}
		return nil, fmt.Errorf("lock the pid file %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(raw, &st); err != nil {
		return nil, fmt.Errorf("inspect the pid file %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s exists and is not a regular file: remove it, or choose another path", path)
	}
	// The previous holder may have removed the file after it was opened here.
	file, err := identify(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("inspect the pid file: %w", err)
	}
	defer func() {
		if !locked {
			_ = file.dir.Close()
		}
	}()
	if file.dev != uint64(st.Dev) || file.ino != st.Ino {
		return nil, nil
	}

	text := strconv.Itoa(os.Getpid()) + "\n"
	err = unix.Fchmod(raw, 0o600)
	if err == nil {
		err = unix.Ftruncate(raw, 0)
	}
	if err == nil {
		_, err = unix.Pwrite(raw, []byte(text), 0)
	}
	if err != nil {
		return nil, fmt.Errorf("write the pid file %s: %w", path, err)
	}
	locked = true
	return &pidFile{file: file, fd: fd}, nil
}

// holder reads who holds a pid file, for an error message: " (pid 123)", or "" if that is not to be known.
func holder(fd int) string {
	var buf [32]byte
	n, err := unix.Pread(fd, buf[:], 0)
	if err != nil {
		return ""
	}
	pid, err := strconv.ParseUint(strings.TrimSpace(string(buf[:n])), 10, 31)
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" (pid %d)", pid)
}

// remove unlinks the file and gives up the lock, in this order: nobody can lock a file that is about to go.
func (p *pidFile) remove() error {
	return errors.Join(p.file.remove(), p.fd.Close())
}

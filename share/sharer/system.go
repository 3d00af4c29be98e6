package sharer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// system is what sharing does to the host. Every method is one step: it is done or not, and a test can make it fail.
type system interface {
	// mkdir and create make an empty directory and file.
	mkdir(path string, mode os.FileMode) error
	create(path string) error
	// remove is rmdir(2) or unlink(2).
	remove(path string) error
	mount(source, target string, flags uintptr) error
	// unmount takes the uppermost mount at target away, at once, and does not follow a symbolic link there.
	unmount(target string) error
	mountinfo() ([]mountPoint, error)
	// writeFile exchanges a file's content in one step, and returns when it is on disk.
	writeFile(path string, content []byte) error
	// removeTree removes a tree of empty directories and files.
	removeTree(path string) error
}

// linux is the system.
type linux struct{}

func (linux) mkdir(path string, mode os.FileMode) error { return os.Mkdir(path, mode) }
func (linux) remove(path string) error                  { return os.Remove(path) }

func (linux) create(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	return f.Close()
}

func (linux) mount(source, target string, flags uintptr) error {
	if err := unix.Mount(source, target, "", flags, ""); err != nil {
		return &fs.PathError{Op: "mount", Path: target, Err: err}
	}
	return nil
}

func (linux) unmount(target string) error {
	if err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "unmount", Path: target, Err: err}
	}
	return nil
}

func (linux) mountinfo() ([]mountPoint, error) {
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMountinfo(content)
}

func (linux) writeFile(path string, content []byte) error {
	next := path + ".next"
	f, err := os.OpenFile(next, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(next, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

func (linux) removeTree(path string) error {
	dir, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := emptyTree(dir); err != nil {
		return err
	}
	return os.Remove(path)
}

// emptyTree removes what is in dir if it is nothing but directories and empty files, on dir's own mount: somebody's files are
// never removed, even if a mount was overlooked.
func emptyTree(dir *os.File) error {
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, flags := filepath.Join(dir.Name(), e.Name()), 0
		switch {
		case e.IsDir():
			flags = unix.AT_REMOVEDIR
			fd, err := unix.Openat2(int(dir.Fd()), e.Name(), &unix.OpenHow{
				Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
				Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS,
			})
			if err != nil {
				return &fs.PathError{Op: "open", Path: name, Err: err}
			}
			sub := os.NewFile(uintptr(fd), name)
			err = emptyTree(sub)
			sub.Close()
			if err != nil {
				return err
			}
		case e.Type().IsRegular():
			info, err := e.Info()
			if err != nil {
				return err
			}
			if info.Size() != 0 {
				return fmt.Errorf("remove %s: it has %d bytes, and is not this package's", name, info.Size())
			}
		default:
			return fmt.Errorf("remove %s: it is neither a directory nor a regular file, and not this package's", name)
		}
		if err := unix.Unlinkat(int(dir.Fd()), e.Name(), flags); err != nil {
			return &fs.PathError{Op: "remove", Path: name, Err: err}
		}
	}
	return nil
}

// mkdirs makes path and what is missing above it, and returns what it made, the uppermost first, also with an error.
func mkdirs(sys system, path string, mode os.FileMode) (made []string, err error) {
	info, err := os.Stat(path)
	switch {
	case err == nil && info.IsDir():
		return nil, nil
	case err == nil:
		return nil, &fs.PathError{Op: "mkdir", Path: path, Err: unix.ENOTDIR}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	if made, err = mkdirs(sys, filepath.Dir(path), mode); err != nil {
		return made, err
	}
	if err := sys.mkdir(path, mode); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return made, nil
		}
		return made, err
	}
	return append(made, path), nil
}

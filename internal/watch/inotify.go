package watch

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// treeMask is what is asked of each directory. IN_EXCL_UNLINK: a file that is open and gone has no name to tell.
const treeMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_MODIFY | unix.IN_CLOSE_WRITE |
	unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK

// aboveMask is what is asked of the directory that the tree has its name in.
const aboveMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_ONLYDIR

// source is where records come from: inotify, or a test.
type source interface {
	// watch adds the directory fd. A directory that is watched already gives the watch descriptor it has.
	watch(fd int, mask uint32) (int32, error)
	unwatch(wd int32)
	// read waits for records until the deadline, and then says os.ErrDeadlineExceeded.
	read(b []byte) (int, error)
	setDeadline(t time.Time) error
	// pending says whether read would find something at once.
	pending() bool
	close() error
}

type inotify struct {
	fd   int // of file, which polls it
	file *os.File
}

func newInotify() (source, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if errors.Is(err, unix.EMFILE) {
		return nil, fmt.Errorf("start inotify: %w: this user has as many as fs.inotify.max_user_instances allows, or the process too many files; raise the sysctl", err)
	} else if err != nil {
		return nil, fmt.Errorf("start inotify: %w", err)
	}
	return &inotify{fd: fd, file: os.NewFile(uintptr(fd), "inotify")}, nil
}

// watch goes by /proc/self/fd: it is this directory that is watched, whatever has its path now.
func (i *inotify) watch(fd int, mask uint32) (int32, error) {
	wd, err := unix.InotifyAddWatch(i.fd, fmt.Sprintf("/proc/self/fd/%d", fd), mask)
	if err != nil {
		return -1, err
	}
	return int32(wd), nil
}

// unwatch ignores errors: the kernel may have removed the watch with the directory.
func (i *inotify) unwatch(wd int32) { _, _ = unix.InotifyRmWatch(i.fd, uint32(wd)) }

func (i *inotify) read(b []byte) (int, error) { return i.file.Read(b) }

func (i *inotify) setDeadline(t time.Time) error { return i.file.SetReadDeadline(t) }

func (i *inotify) pending() bool {
	n, err := unix.IoctlGetInt(i.fd, unix.TIOCINQ)
	return err == nil && n > 0
}

func (i *inotify) close() error { return i.file.Close() }

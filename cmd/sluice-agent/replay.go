package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
)

// What the server answers to a look-up of a reserved name (share.ReplayArmed and the like).
const (
	armed   = unix.EINPROGRESS
	unknown = unix.ENODATA
	own     = unix.EALREADY
	refused = unix.ECANCELED
)

// errSkip is an event that there is nothing to replay for any more, and errUnknown one that the server has forgotten.
var (
	errSkip    = errors.New("skipped")
	errUnknown = errors.New("the server remembers the event no more")
)

// replayer makes events happen in the guest.
type replayer struct {
	root       int // the mount's root, O_PATH
	token      string
	closeWrite bool
	since      time.Time // when the event before this one was, by the host's clock; zero if there was none
}

// openMount opens the root of a mount and checks that what is needed is there.
func openMount(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("--mount %s: %w", dir, err)
	}
	var st unix.Statfs_t
	switch err = unix.Fstatfs(fd, &st); {
	case err != nil:
	case st.Type != unix.FUSE_SUPER_MAGIC:
		err = errors.New("no virtio-fs is mounted there")
	case st.Flags&unix.ST_RDONLY != 0:
		err = errors.New("it is mounted read-only: expected a mount for reading and writing (the host's read-only holds all the same)")
	default:
		if _, err = os.Stat(byFD(fd)); err == nil {
			return fd, nil
		}
		err = fmt.Errorf("/proc is needed: %w", err)
	}
	unix.Close(fd)
	return -1, fmt.Errorf("--mount %s: %w", dir, err)
}

// mountedAt returns the source of the mount that fd is in: the tag, for virtio-fs.
func mountedAt(fd int) (tag string, err error) {
	info, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	id := ""
	for line := range strings.Lines(string(info)) {
		if value, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			id = strings.TrimSpace(value)
		}
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := bytes.Fields(lines.Bytes())
		if len(fields) == 0 || string(fields[0]) != id {
			continue
		}
		// "-", the type and the source follow the optional fields; see proc_pid_mountinfo(5).
		for i := 6; i+2 < len(fields); i++ {
			if string(fields[i]) == "-" {
				return unescape(string(fields[i+2])), nil
			}
		}
	}
	return "", errors.New("find the share's tag in /proc/self/mountinfo: use --tag")
}

// unescape undoes the \040 of /proc/self/mountinfo.
func unescape(text string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(text)
}

// byFD is a path that leads to just what the O_PATH descriptor fd is of, wherever its name leads by now.
func byFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// replay makes e happen.
func (r *replayer) replay(e *api.Event) error {
	if !clean(e.Path) || e.Kind == api.EventRename && !clean(e.To) {
		return fmt.Errorf("path %q, to %q: expected absolute and clean ones", e.Path, e.To)
	}
	if e.Kind == api.EventRescan {
		return r.rescan(e)
	}
	dir, err := r.openDir(path.Dir(e.Path))
	if err != nil {
		return gone(err)
	}
	defer unix.Close(dir)
	name := path.Base(e.Path)
	if e.Path == "/" {
		name = "."
	}
	switch e.Kind {
	case api.EventModify:
		return r.touch(e, dir, name, r.modify)
	case api.EventAttrib:
		return r.touch(e, dir, name, attrib)
	}
	if e.Path == "/" || e.To == "/" {
		return errors.New("the root of a share does not come or go")
	}
	switch e.Kind {
	case api.EventCreate:
		return r.create(e, dir, name)
	case api.EventDelete:
		return r.remove(e, dir, name)
	case api.EventRename:
		return r.rename(e, dir, name)
	}
	return errSkip // of a later version
}

// clean says whether p is absolute and each component can only be a name in the directory before it.
func clean(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && strings.IndexByte(p, 0) < 0 && len(p) < 1<<16
}

// gone makes errSkip of an error that says that the host has gone on, and has other files there, or none: later events tell of that.
func gone(err error) error {
	for _, overtaken := range []unix.Errno{
		unix.ENOENT, unix.ESTALE, unix.ENOTDIR, unix.EISDIR, unix.ENOTEMPTY, unix.EEXIST, unix.EINVAL, refused,
	} {
		if errors.Is(err, overtaken) {
			return fmt.Errorf("%w: %w", errSkip, err)
		}
	}
	return err
}

// openDir opens a directory of the share. No symbolic link is followed: an event's path has none before its last component.
func (r *replayer) openDir(p string) (fd int, err error) {
	return r.openAt(p, unix.O_PATH|unix.O_DIRECTORY)
}

func (r *replayer) openAt(p string, flags int) (fd int, err error) {
	if p == "/" {
		return open(r.root, ".", flags)
	}
	at := r.root
	for rest := p[1:]; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		step := unix.O_PATH | unix.O_DIRECTORY
		if rest == "" {
			step = flags
		}
		fd, err = open(at, name, step)
		if at != r.root {
			unix.Close(at)
		}
		if err != nil {
			return -1, err
		}
		at = fd
	}
	return at, nil
}

func open(dir int, name string, flags int) (fd int, err error) {
	err = again(func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// again makes a system call until no signal interrupts it: the Go runtime sends itself some.
func again(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// arm has the server answer what this thread asks for next as a replay of e. Without its word that it will, nothing may be asked
// for: it would be carried out.
func (r *replayer) arm(dir int, id uint64, suffix string) error {
	err := r.say(dir, id, suffix)
	switch {
	case err == armed:
		return nil
	case err == unknown:
		return errUnknown
	case err == own:
		return fmt.Errorf("%w: it is what this guest has done itself", errSkip)
	case err == unix.ENOENT:
		// In a directory that is removed the guest's kernel finds nothing, without asking.
		var st unix.Stat_t
		if err := again(func() error { return unix.Fstat(dir, &st) }); err != nil || st.Nlink == 0 {
			return fmt.Errorf("%w: its directory is gone", errSkip)
		}
		return errors.New("the server does not know the token: is the share of these events mounted there?")
	case err == nil:
		return errors.New("a file has a reserved name")
	}
	return fmt.Errorf("arm: %w", err)
}

// disarm ends a replay and says whether it was not complete yet.
func (r *replayer) disarm(dir int) (pending bool) {
	return r.say(dir, 0, "") == refused
}

func (r *replayer) say(dir int, id uint64, suffix string) error {
	var st unix.Stat_t
	name := fmt.Sprintf(".sluice-replay-%s-%d%s", r.token, id, suffix)
	return again(func() error { return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) })
}

// armFor arms e in the directory dir and runs f, after which nothing is armed.
func (r *replayer) armFor(e *api.Event, dir int, f func() error) error {
	if err := r.arm(dir, e.ID, ""); err != nil {
		return err
	}
	err := f()
	if err != nil {
		r.disarm(dir)
	}
	return gone(err)
}

// file is what is replayed on, and not what may have its name by now.
type file struct {
	fd int // O_PATH
	st unix.Statx_t
}

// touch replays what is about the file name and not its name.
func (r *replayer) touch(e *api.Event, dir int, name string, f func(*file) error) error {
	fd, err := openFile(dir, name)
	if err != nil {
		return gone(err)
	}
	defer unix.Close(fd)
	return r.armFor(e, dir, func() error {
		v := file{fd: fd}
		if err := v.refresh(); err != nil {
			return err
		}
		return f(&v)
	})
}

// openFile opens name, unless something else of the guest's is mounted on it.
func openFile(dir int, name string) (fd int, err error) {
	if fd, err = open(dir, name, unix.O_PATH); err != nil {
		return -1, err
	}
	var own, above unix.Stat_t
	err = errors.Join(unix.Fstat(fd, &own), unix.Fstat(dir, &above))
	if err == nil && own.Dev != above.Dev && own.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = fmt.Errorf("%w: another file is mounted there", errSkip)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// refresh asks the server, whatever the guest's kernel believes to know.
func (v *file) refresh() error {
	return again(func() error {
		return unix.Statx(v.fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &v.st)
	})
}

func (v *file) is(typ uint16) bool { return v.st.Mode&unix.S_IFMT == typ }

// modify fires IN_MODIFY: a truncation to the size that the file has.
func (r *replayer) modify(v *file) error {
	if !v.is(unix.S_IFREG) {
		return attrib(v)
	}
	if r.closeWrite {
		// A server for a guest that writes back its cache refuses.
		if w, err := unix.Open(byFD(v.fd), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
			defer unix.Close(w)
		}
	}
	return again(func() error { return unix.Truncate(byFD(v.fd), int64(v.st.Size)) })
}

// attrib fires IN_ATTRIB: the times are set to what they are.
func attrib(v *file) error {
	times := []unix.Timespec{
		{Sec: v.st.Atime.Sec, Nsec: int64(v.st.Atime.Nsec)},
		{Sec: v.st.Mtime.Sec, Nsec: int64(v.st.Mtime.Nsec)},
	}
	return again(func() error { return unix.UtimesNanoAt(unix.AT_FDCWD, byFD(v.fd), times, 0) })
}

// create fires IN_CREATE.
func (r *replayer) create(e *api.Event, dir int, name string) error {
	var st unix.Stat_t
	if err := again(func() error { return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
		return gone(err)
	}
	return r.armFor(e, dir, func() error {
		return again(func() error { return makeName(dir, name, &st) })
	})
}

func makeName(dir int, name string, like *unix.Stat_t) error {
	switch typ := like.Mode & unix.S_IFMT; typ {
	case unix.S_IFDIR:
		return unix.Mkdirat(dir, name, 0o700)
	case unix.S_IFLNK:
		return unix.Symlinkat("replay", dir, name)
	case unix.S_IFREG:
		// So that those who wait for IN_CLOSE_WRITE see it, too.
		fd, err := unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err == nil {
			unix.Close(fd)
		}
		if err != refused {
			return err
		}
		// The guest writes back its cache.
		return unix.Mknodat(dir, name, typ|0o600, 0)
	default:
		return unix.Mknodat(dir, name, typ|0o600, int(like.Rdev))
	}
}

// remove fires IN_DELETE.
func (r *replayer) remove(e *api.Event, dir int, name string) error {
	return r.armFor(e, dir, func() error {
		flags, other := 0, unix.AT_REMOVEDIR
		if e.Dir {
			flags, other = other, flags
		}
		err := again(func() error { return unix.Unlinkat(dir, name, flags) })
		if err == unix.EISDIR || err == unix.ENOTDIR {
			// The guest knows the name for something else.
			err = again(func() error { return unix.Unlinkat(dir, name, other) })
		}
		return err
	})
}

// rename fires IN_MOVED_FROM and IN_MOVED_TO.
func (r *replayer) rename(e *api.Event, dir int, name string) error {
	toDir, err := r.openDir(path.Dir(e.To))
	if err != nil {
		return gone(err)
	}
	defer unix.Close(toDir)
	to := path.Base(e.To)
	return r.armFor(e, dir, func() error {
		if err := r.arm(toDir, e.ID, "-to"); err != nil {
			return err
		}
		// A kernel before 6.3 that knows the new name for the renamed file already would have nothing to do. One that is to make a name
		// asks the server first, which answers with what was there before; the making itself fails.
		_ = again(func() error { return unix.Mkdirat(toDir, to, 0o700) })
		// A directory that the kernel knows by its new name gets its old one back here. In the midst of a rename that fails.
		var st unix.Stat_t
		if err := again(func() error { return unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
			return err
		}
		if err := again(func() error { return unix.Renameat(dir, name, toDir, to) }); err != nil {
			return err
		}
		if r.disarm(dir) {
			return fmt.Errorf("%w: both names are the same file's", errSkip)
		}
		return nil
	})
}

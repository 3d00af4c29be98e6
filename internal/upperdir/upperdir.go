// Package upperdir looks after the upper directories of overlays, on the host: it makes them, copies them to checkpoints and back,
// says what is in them, and makes their changes somewhere else.
//
// What is in an upper directory was written by a guest. It is therefore reached by descriptors only, one name at a time: no symbolic
// link is followed, no device opened, no mount entered, and no path leads out of the directory.
//
// # Layout
//
//	BASE/lock                  held while something below is made or swept
//	BASE/uppers/NAME/lock      held as long as the upper is in use
//	BASE/uppers/NAME/upper     what the guest has written, under a random NAME, or keep-NAME
//	BASE/uppers/NAME/work      for what an overlay has not finished
//	BASE/checkpoints/NAME/     lock, upper, info.json; names that begin with a dot are not whole
//	BASE/given                 locked, a byte for each, for directories in use that operators have given
//	BASE/trash/                what is being removed
//
// A lock that nobody holds says that its daemon is dead: what was to go with it goes at the next Open.
package upperdir

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

const (
	discardPrefix = "discard-"
	keepPrefix    = "keep-"
	newPrefix     = ".new-"
	applyPrefix   = ".sluice-apply"

	maxNameLen = 128
)

// Store is a directory with uppers and checkpoints. Several daemons may use one at once. Its methods may be called from several
// goroutines.
type Store struct {
	log  *slog.Logger
	path string
	h    *host

	base, uppers, checkpoints, trash *node

	cancel context.CancelFunc
	sweeps sync.WaitGroup
}

// Open opens the store in the directory base, an absolute path, which is made if it is not there; its parent must be. What daemons
// that have died have left behind is removed while the store is in use.
func Open(base string, log *slog.Logger) (*Store, error) {
	if !filepath.IsAbs(base) {
		return nil, fmt.Errorf("directory of uppers %q is no absolute path", base)
	}
	h, err := newHost()
	if err != nil {
		return nil, err
	}
	s := &Store{log: log, path: base, h: h}
	if err := s.open(); err != nil {
		s.close()
		return nil, fmt.Errorf("open directory of uppers %s: %w", base, err)
	}
	return s, nil
}

func (s *Store) open() error {
	if err := unix.Mkdir(s.path, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return explain("make", s.path, err)
	}
	// The operator's own path: symbolic links on the way are the operator's, too.
	fd, err := unix.Open(s.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if s.base, err = s.h.take(fd); err != nil {
		return err
	}
	if s.base.st.Uid != uint32(os.Geteuid()) || s.base.st.Mode&0o022 != 0 {
		return fmt.Errorf("it belongs to user %d with mode %#o; it has to be the daemon's own (user %d), and no one else may write to it: chmod go-w",
			s.base.st.Uid, s.base.st.Mode&0o7777, os.Geteuid())
	}
	for _, d := range []struct {
		name string
		to   **node
	}{{"uppers", &s.uppers}, {"checkpoints", &s.checkpoints}, {"trash", &s.trash}} {
		if *d.to, err = s.h.subdir(s.base, d.name); err != nil {
			return explain("make", d.name, err)
		}
	}
	if err := s.locked(s.sweep); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.sweeps.Go(func() {
		if err := s.h.empty(ctx, s.trash); err != nil && ctx.Err() == nil {
			s.log.Warn("what dead daemons have left behind cannot be removed", "dir", s.path+"/trash", "err", err)
		}
	})
	return nil
}

// subdir opens the directory name, and makes it if it is not there.
func (h *host) subdir(dir *node, name string) (*node, error) {
	if err := unix.Mkdirat(dir.fd, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	d, err := dir.child(name)
	if err == nil && !d.isDir() {
		d.close()
		return nil, unix.ENOTDIR
	}
	return d, err
}

// Close ends the store; uppers of it are to be closed before.
func (s *Store) Close() error {
	s.cancel()
	s.sweeps.Wait()
	s.close()
	return nil
}

func (s *Store) close() {
	s.base.close()
	s.uppers.close()
	s.checkpoints.close()
	s.trash.close()
	_ = s.h.proc.Close()
}

// lock takes the lock file of the directory d; how is LOCK_*. With LOCK_NB, errInUse says that somebody has it.
func lock(d *node, how int) (*sys.FD, error) {
	fd, err := retry(func() (int, error) {
		return unix.Openat(d.fd, "lock", unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	})
	if err != nil {
		return nil, err
	}
	if _, err := retry(func() (int, error) {
		err := unix.Flock(fd, how)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return 0, errInUse // not for retry
		}
		return 0, err
	}); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return sys.NewFD(fd), nil
}

var errInUse = errors.New("it is in use")

// locked runs f while no other daemon makes or sweeps anything here.
func (s *Store) locked(f func() error) error {
	l, err := lock(s.base, unix.LOCK_EX)
	if err != nil {
		return explain("lock", s.path, err)
	}
	defer l.Close()
	return f()
}

// sweep moves to the trash what belongs to daemons that are dead.
func (s *Store) sweep() error {
	for _, d := range []struct {
		dir    *node
		prefix string
	}{{s.uppers, discardPrefix}, {s.uppers, newPrefix}, {s.checkpoints, newPrefix}} {
		entries, err := d.dir.list(context.Background())
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.name, d.prefix) {
				continue
			}
			if err := s.sweepOne(d.dir, e.name); err != nil {
				s.log.Warn("what a dead daemon has left behind cannot be removed", "dir", e.name, "err", err)
			}
		}
	}
	return nil
}

func (s *Store) sweepOne(dir *node, name string) error {
	d, err := dir.child(name)
	if err != nil {
		return err
	}
	defer d.close()
	l, err := lock(d, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, errInUse) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	return s.discard(dir, name)
}

// discard moves an entry to the trash, in one step.
func (s *Store) discard(dir *node, name string) error {
	return unix.Renameat(dir.fd, name, s.trash.fd, randomName(""))
}

// clear empties the trash, as far as it comes; what is left is for the next Open.
func (s *Store) clear() {
	if err := s.h.empty(context.Background(), s.trash); err != nil {
		s.log.Warn("a discarded upper directory cannot be removed", "dir", s.path+"/trash", "err", err)
	}
}

// Attr is what the root of a new upper is: an overlay shows it as its own root, so it should be the lower's.
type Attr struct {
	// Mode is permission bits; 0 is 0755.
	Mode     uint32
	UID, GID uint32
}

// Upper is an upper directory in use, and nobody else's until Close.
type Upper struct {
	s       *Store
	name    string // in s.uppers; "" for one given
	path    string
	lock    *sys.FD
	mine    *sys.FD // of one given: see claim
	dir     *node
	work    *node
	discard bool
}

// Discard makes an upper that is removed by Close, or at the next Open if this process dies before.
func (s *Store) Discard(root Attr) (*Upper, error) {
	u, err := s.make(randomName(discardPrefix), root)
	if err != nil {
		return nil, fmt.Errorf("make an upper directory in %s: %w", s.path, err)
	}
	u.discard = true
	return u, nil
}

// Keep returns the upper of that name, which outlives this process; created says that there was none before.
func (s *Store) Keep(name string, root Attr) (u *Upper, created bool, err error) {
	if err := checkName(name); err != nil {
		return nil, false, fmt.Errorf("upper directory: %w", err)
	}
	u, err = s.reopen(keepPrefix + name)
	if gone(err) {
		created = true
		u, err = s.make(keepPrefix+name, root)
	}
	if errors.Is(err, errInUse) {
		return nil, false, fmt.Errorf("upper directory %s of %s is in use by another overlay: end that one, or choose another name", name, s.path)
	}
	if err != nil {
		return nil, false, fmt.Errorf("open upper directory %s of %s: %w", name, s.path, err)
	}
	return u, created, nil
}

// HasKept says whether there is an upper as of Keep of that name.
func (s *Store) HasKept(name string) bool {
	d, err := s.uppers.child(keepPrefix + name)
	d.close()
	return err == nil
}

// Given returns the upper that the operator has in the directories dir and work, absolute paths.
func (s *Store) Given(dir, work string) (*Upper, error) {
	u := &Upper{s: s, path: dir}
	if err := u.given(dir, work); err != nil {
		u.release()
		return nil, err
	}
	return u, nil
}

func (u *Upper) given(dir, work string) error {
	for _, d := range []struct {
		what, path string
		to         **node
	}{{"upperdir", dir, &u.dir}, {"workdir", work, &u.work}} {
		if !filepath.IsAbs(d.path) {
			return fmt.Errorf("%s %q is no absolute path", d.what, d.path)
		}
		fd, err := unix.Open(d.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("open %s %q: %w: expected a directory that is there: make it", d.what, d.path, err)
		}
		if err != nil {
			return explain("open "+d.what, d.path, err)
		}
		if *d.to, err = u.s.h.take(fd); err != nil {
			return explain("open "+d.what, d.path, err)
		}
	}
	if u.dir.st.Dev != u.work.st.Dev {
		return fmt.Errorf("workdir %s is on another file system than upperdir %s; it has to be on the same one", work, dir)
	}
	// A guest never sees the work directory, so the lock on it is out of its reach.
	fd, err := u.work.open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return explain("open", work, err)
	}
	u.lock = sys.NewFD(fd)
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("workdir %s is in use by another overlay: end that one, or give each its own upperdir and workdir", work)
	}
	return u.claim()
}

// claim refuses directories that another overlay of this store has as its upper or work directory already. A lock on the directories
// themselves would be within the guest's reach, and in its way.
func (u *Upper) claim() error {
	fd, err := unix.Openat(u.s.base.fd, "given", unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return explain("open", u.s.path+"/given", err)
	}
	u.mine = sys.NewFD(fd)
	for _, d := range []struct {
		what string
		dir  *node
	}{{"upperdir " + u.path, u.dir}, {"workdir of upperdir " + u.path, u.work}} {
		err := unix.FcntlFlock(uintptr(u.mine.Int()), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: d.dir.place(), Len: 1})
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return fmt.Errorf("%s is in use by another overlay: end that one, or give each its own upperdir and workdir", d.what)
		}
		if err != nil {
			return explain("lock", u.s.path+"/given", err)
		}
	}
	return nil
}

// place is the byte that stands for the directory n in a file of locks.
func (n *node) place() int64 {
	h := fnv.New64a()
	_ = binary.Write(h, binary.NativeEndian, []uint64{n.st.Dev, n.st.Ino}) // never fails
	return int64(h.Sum64() >> 2)
}

// make makes an upper under a temporary name and renames it when it is whole.
func (s *Store) make(name string, root Attr) (*Upper, error) {
	return s.build(name, false, func(_, dir *node) error {
		if root.Mode == 0 {
			root.Mode = 0o755
		}
		if root.UID != dir.st.Uid || root.GID != dir.st.Gid {
			switch errno := sys.ChownFD(dir.fd, root.UID, root.GID); errno {
			case 0:
			case unix.EPERM:
				// An ordinary user, who can make no other's files: the guest sees that it is the user's.
				s.log.Info("the root of an upper directory belongs to the daemon's user: it may not be given away", "owner", root.UID, "group", root.GID)
			default:
				return explain("chown", "upper", errno)
			}
		}
		if errno := sys.ChmodFD(s.h.proc.Int(), dir.fd, root.Mode&0o7777); errno != 0 {
			return errno
		}
		return nil
	})
}

// build makes an upper as make does: fill is given its empty directory, and the one around it. With replace, another upper of that
// name makes room for it unless it is in use.
func (s *Store) build(name string, replace bool, fill func(around, dir *node) error) (*Upper, error) {
	u := &Upper{s: s, path: s.path + "/uppers/" + name + "/upper"}
	temp := randomName(newPrefix)
	var d *node
	err := s.locked(func() (err error) {
		if d, err = s.h.subdir(s.uppers, temp); err != nil {
			return err
		}
		u.lock, err = lock(d, unix.LOCK_EX|unix.LOCK_NB)
		return err
	})
	defer func() { d.close() }()
	if err == nil {
		err = u.subdirs(d)
	}
	if err == nil {
		err = fill(d, u.dir)
	}
	if err == nil {
		err = unix.Renameat2(s.uppers.fd, temp, s.uppers.fd, name, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EEXIST) {
			err = errInUse
			if replace {
				err = s.replace(temp, name)
			}
		}
	}
	if err == nil {
		u.name = name
		if err = fsyncDir(s.uppers); err == nil {
			return u, nil
		}
		temp = name
	}
	u.name = ""
	u.release()
	if d != nil {
		_ = s.discard(s.uppers, temp)
		s.clear()
	}
	return nil, err
}

// replace puts the upper temp in the place of the one called name, which goes.
func (s *Store) replace(temp, name string) error {
	old, err := s.reopen(name)
	if err != nil {
		return err
	}
	defer s.clear()
	defer old.release()
	if err := unix.Renameat2(s.uppers.fd, temp, s.uppers.fd, name, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	return s.discard(s.uppers, temp)
}

func (u *Upper) subdirs(d *node) (err error) {
	if u.dir, err = u.s.h.subdir(d, "upper"); err != nil {
		return err
	}
	u.work, err = u.s.h.subdir(d, "work")
	return err
}

// reopen opens an upper that there is.
func (s *Store) reopen(name string) (*Upper, error) {
	d, err := s.uppers.child(name)
	if err != nil {
		return nil, err
	}
	defer d.close()
	u := &Upper{s: s, name: name, path: s.path + "/uppers/" + name + "/upper"}
	if u.lock, err = lock(d, unix.LOCK_EX|unix.LOCK_NB); err == nil {
		err = u.subdirs(d)
	}
	if err != nil {
		u.release()
		return nil, err
	}
	return u, nil
}

// Dir returns a new O_PATH descriptor of the directory, which the caller closes.
func (u *Upper) Dir() (*os.File, error) { return dup(u.dir, u.path) }

// Work returns a new O_PATH descriptor of the work directory, which the caller closes.
func (u *Upper) Work() (*os.File, error) { return dup(u.work, u.path+" (work)") }

// Path is where the directory is, for messages.
func (u *Upper) Path() string { return u.path }

func dup(n *node, name string) (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(n.fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Close ends the use of the upper, and removes it if it is to be discarded. Nothing may be writing to it any more.
func (u *Upper) Close() error {
	var err error
	if u.discard {
		err = u.s.discard(u.s.uppers, u.name)
	}
	u.release()
	if u.discard {
		u.s.clear()
	}
	return explain("discard", u.path, err)
}

func (u *Upper) release() {
	u.dir.close()
	u.work.close()
	_ = u.lock.Close()
	_ = u.mine.Close()
}

func fsyncDir(d *node) error {
	fd, err := d.open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fsync(fd), unix.Close(fd))
}

// syncfs writes the file system that d is on to its medium.
func syncfs(d *node) error {
	fd, err := d.open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(fd), unix.Close(fd))
}

// checkName refuses names that are no single plain file name.
func checkName(name string) error {
	ok := name != "" && len(name) <= maxNameLen && name[0] != '.'
	for _, r := range name {
		ok = ok && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r))
	}
	if !ok {
		return fmt.Errorf("the name %q is not usable; expected 1 to %d letters, digits, '-', '_' and '.', not beginning with a dot", name, maxNameLen)
	}
	return nil
}

package upperdir

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

const (
	// maxDepth is how deep directories may be nested: what is being walked has one or two descriptors for each level.
	// Removing has no such bound.
	maxDepth = 500
	// maxNames is how many entries one directory may have, which are sorted in memory.
	maxNames = 4 << 20
	// maxXattr is XATTR_SIZE_MAX and XATTR_LIST_MAX (include/uapi/linux/limits.h).
	maxXattr = 65536
)

// bufferLen is how long a buffer is, in bytes: at least maxXattr.
const bufferLen = 128 << 10

// buffer is for what is needed for each of a million files, and for none of them for long.
type buffer [bufferLen]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

func takeBuffer() *buffer { return buffers.Get().(*buffer) }

func (b *buffer) put() { buffers.Put(b) }

// host is how files are reached: by descriptors, so that nothing a guest puts into a directory leads out of it.
type host struct {
	proc  *sys.FD // /proc/self/fd
	xattr sys.ProcXattr
}

func newHost() (*host, error) {
	fd, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /proc/self/fd: %w; mount /proc", err)
	}
	return &host{sys.NewFD(fd), sys.NewProcXattr(fd)}, nil
}

// node is a file that is known by an O_PATH descriptor, which never opens the file itself: no device is woken, no symbolic link
// followed.
type node struct {
	h  *host
	fd int
	st unix.Stat_t
}

func (n *node) close() {
	if n != nil {
		_ = unix.Close(n.fd)
	}
}

func (n *node) kind() uint32 { return n.st.Mode & unix.S_IFMT }
func (n *node) isDir() bool  { return n.kind() == unix.S_IFDIR }

// take makes a node of an O_PATH descriptor, which it closes on an error.
func (h *host) take(fd int) (*node, error) {
	n := &node{h: h, fd: fd}
	if errno := sys.Fstat(fd, &n.st); errno != 0 {
		n.close()
		return nil, errno
	}
	return n, nil
}

// at finds name, one name, in the directory dirfd. What is mounted there is not entered.
func (h *host) at(dirfd int, name string) (*node, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := retry(func() (int, error) { return unix.Openat2(dirfd, name, &how) })
	if err != nil {
		return nil, err
	}
	return h.take(fd)
}

// retry makes a call again while a signal interrupts it, or while a rename beside it has openat2(2) start over.
func retry(call func() (int, error)) (int, error) {
	for again := 0; ; {
		n, err := call()
		if errors.Is(err, unix.EAGAIN) && again < 100 {
			again++
			continue
		}
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func (n *node) child(name string) (*node, error) { return n.h.at(n.fd, name) }

// open opens n, a directory or a regular file, for flags; it is the same file however its name has moved.
func (n *node) open(flags int) (int, error) {
	if k := n.kind(); k != unix.S_IFDIR && k != unix.S_IFREG {
		return -1, unix.ELOOP
	}
	fd, errno := sys.Reopen(n.h.proc.Int(), n.fd, flags|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK)
	if errno != 0 {
		return -1, errno
	}
	return fd, nil
}

func (n *node) readlink() (string, error) {
	buf := make([]byte, unix.PathMax)
	got, errno := sys.ReadlinkFD(n.fd, buf)
	if errno != 0 {
		return "", errno
	}
	return string(buf[:got]), nil
}

// dirent is a name in a directory; typ is DT_*, perhaps DT_UNKNOWN.
type dirent struct {
	name string
	typ  uint8
}

// list returns the entries of the directory n but "." and "..", sorted by their bytes.
func (n *node) list(ctx context.Context) ([]dirent, error) {
	fd, err := n.open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	entries, err := readNames(ctx, fd)
	slices.SortFunc(entries, func(a, b dirent) int { return cmp.Compare(a.name, b.name) })
	return entries, err
}

func readNames(ctx context.Context, fd int) ([]dirent, error) {
	var entries []dirent
	b := takeBuffer()
	defer b.put()
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, errno := sys.Getdents64(fd, b[:])
		if errno != 0 {
			return nil, errno
		}
		if n == 0 {
			return entries, nil
		}
		// struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name with its NUL.
		for b := b[:n]; len(b) >= 19; {
			reclen := int(binary.NativeEndian.Uint16(b[16:]))
			if reclen < 19 || reclen > len(b) {
				return nil, unix.EIO
			}
			name, _, _ := strings.Cut(string(b[19:reclen]), "\x00")
			if name != "." && name != ".." {
				entries = append(entries, dirent{name, b[18]})
			}
			b = b[reclen:]
		}
		if len(entries) > maxNames {
			return nil, fmt.Errorf("a directory has more than %d entries", maxNames)
		}
	}
}

// xattrs returns the names of n's extended attributes, sorted; none where the file system has none.
func (n *node) xattrs() ([]string, error) {
	b := takeBuffer()
	defer b.put()
	buf := b[:maxXattr]
	got, errno := n.h.xattr.List(n.fd, buf)
	switch errno {
	case 0:
	case unix.EOPNOTSUPP, unix.EPERM:
		return nil, nil
	default:
		return nil, errno
	}
	names := strings.FieldsFunc(string(buf[:got]), func(r rune) bool { return r == 0 })
	slices.Sort(names)
	return names, nil
}

// get returns an extended attribute's value; ok is false if there is none.
func (n *node) get(name string) (value []byte, ok bool, err error) {
	file, err := unix.BytePtrFromString(name)
	if err != nil {
		return nil, false, err
	}
	buf := make([]byte, 256)
	for {
		got, errno := n.h.xattr.Get(n.fd, file, buf)
		switch errno {
		case 0:
			return buf[:got], true, nil
		case unix.ERANGE:
			if len(buf) == maxXattr {
				return nil, false, errno
			}
			buf = make([]byte, maxXattr)
		case unix.ENODATA, unix.EOPNOTSUPP, unix.EPERM:
			return nil, false, nil
		default:
			return nil, false, errno
		}
	}
}

func (n *node) set(name string, value []byte) error {
	file, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	if errno := n.h.xattr.Set(n.fd, file, value, 0); errno != 0 {
		return errno
	}
	return nil
}

// reader reads a regular file from its beginning, and looks at ctx now and then.
type reader struct {
	ctx context.Context
	fd  int
	off int64
}

func (n *node) reader(ctx context.Context) (*reader, error) {
	fd, err := n.open(unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	return &reader{ctx: ctx, fd: fd}, nil
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := retry(func() (int, error) { return unix.Pread(r.fd, p, r.off) })
	if err != nil {
		return 0, err
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	r.off += int64(n)
	return n, nil
}

func (r *reader) Close() error { return unix.Close(r.fd) }

// join appends a name to a path inside a tree, whose root is "".
func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "/" + name
}

// tooDeep is the error for what is nested deeper than maxDepth.
func tooDeep(path string) error {
	if len(path) > 100 {
		path = path[:100] + "…"
	}
	return fmt.Errorf("directories are nested more than %d deep at %q; remove or flatten them, in the guest", maxDepth, path)
}

// gone says whether err is that a file was removed between its listing and now.
func gone(err error) bool { return errors.Is(err, unix.ENOENT) }

// explain says with err at path what an operator can do about it.
func explain(what, path string, err error) error {
	if path == "" {
		path = "."
	}
	advice := ""
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		advice = "; free space there, or delete checkpoints, and do it again"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		advice = "; the daemon's user may not do that: run the daemon as root, or with the capabilities CHOWN, DAC_OVERRIDE, FOWNER, MKNOD, SYS_ADMIN"
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		advice = "; raise the limit of open files"
	case errors.Is(err, unix.EXDEV):
		advice = "; something is mounted there, unmount it first"
	case errors.Is(err, unix.EROFS):
		advice = "; mount the file system writable"
	}
	return fmt.Errorf("%s %q: %w%s", what, path, err, advice)
}

package permshift

import (
	"context"
	"encoding/binary"
	"fmt"
	"path"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// Converted says what Convert has done.
type Converted struct {
	Files   int // regular files and directories that have got a value
	Already int // that had one
	Left    int // other files, and what is mounted below the directory, which stay as they are
}

// Convert makes a tree one for New: the directory behind dirfd, which may be an O_PATH descriptor, and all regular files and
// directories below it get a value that says whose they are and with which mode, and the mode forceMask (if 0, DefaultForceMask) on
// the host. Owners stay: chown the tree to the storage's user after it, not before. What has a value keeps it, so that a tree can
// be converted again to convert what has come since, or to go on where an error, or ctx, has ended it. Other processes must not change
// the tree meanwhile.
func Convert(ctx context.Context, dirfd int, format Format, forceMask uint32) (Converted, error) {
	if format.keepsTypes() || format == OriginalPermissions {
		if err := validMask(forceMask); err != nil {
			return Converted{}, err
		}
	} else {
		return Converted{}, fmt.Errorf("convert to format %v: expected one that has an attribute", format)
	}
	if forceMask == 0 {
		forceMask = DefaultForceMask
	}
	proc, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return Converted{}, fmt.Errorf("open /proc/self/fd: %w: expected /proc to be mounted", err)
	}
	defer unix.Close(proc)
	c := converter{ctx: ctx, format: format, mode: forceMask, proc: proc, xattr: sys.NewProcXattr(proc)}
	c.name = append([]byte(format.Xattr()), 0)
	root, err := unix.FcntlInt(uintptr(dirfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return Converted{}, fmt.Errorf("duplicate the directory's descriptor: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		_ = unix.Close(root)
		return Converted{}, fmt.Errorf("stat the directory: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		_ = unix.Close(root)
		return Converted{}, fmt.Errorf("convert: expected a directory, found mode %#o", st.Mode)
	}
	err = c.file(root, &st, ".")
	return c.done, err
}

type converter struct {
	ctx    context.Context
	format Format
	mode   uint32
	name   []byte // of the attribute, with its NUL
	proc   int
	xattr  sys.ProcXattr
	done   Converted
}

// file converts what fd, which it closes, is an O_PATH descriptor of, and all below it.
func (c *converter) file(fd int, st *unix.Stat_t, at string) error {
	err := c.mark(fd, st)
	if err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		_ = unix.Close(fd)
		if err != nil {
			err = fmt.Errorf("convert %s: %w", at, err)
		}
		return err
	}
	// It can be read from here on, whatever its mode was.
	dir, errno := sys.OpenDot(fd, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	_ = unix.Close(fd)
	if errno != 0 {
		return fmt.Errorf("open directory %s: %w", at, errno)
	}
	defer unix.Close(dir)
	buf := make([]byte, 32<<10)
	for {
		n, errno := sys.Getdents64(dir, buf)
		if errno != 0 {
			return fmt.Errorf("read directory %s: %w", at, errno)
		}
		if n == 0 {
			return nil
		}
		for rest := buf[:n]; len(rest) >= direntHeader; {
			size := int(binary.NativeEndian.Uint16(rest[16:]))
			if err := c.entry(dir, rest[direntHeader:size], at); err != nil {
				return err
			}
			rest = rest[size:]
		}
	}
}

// direntHeader is the size of a linux_dirent64 before its name.
const direntHeader = 19

// entry converts the file name, which a NUL follows, in the directory dir.
func (c *converter) entry(dir int, cname []byte, at string) error {
	name := unix.ByteSliceToString(cname)
	if name == "." || name == ".." {
		return nil
	}
	if err := c.ctx.Err(); err != nil {
		return err
	}
	at = path.Join(at, name)
	fd, errno := sys.Openat2(dir, &cname[0], unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_XDEV|unix.RESOLVE_NO_SYMLINKS)
	switch errno {
	case 0:
	case unix.EXDEV:
		c.done.Left++
		return nil
	default:
		return fmt.Errorf("open %s: %w", at, errno)
	}
	var st unix.Stat_t
	if errno := sys.Fstat(fd, &st); errno != 0 {
		_ = unix.Close(fd)
		return fmt.Errorf("stat %s: %w", at, errno)
	}
	if !carries(st.Mode) {
		c.done.Left++
		return unix.Close(fd)
	}
	return c.file(fd, &st, at)
}

// mark gives one file its value, and then its mode: where that is interrupted, converting again goes on.
func (c *converter) mark(fd int, st *unix.Stat_t) error {
	value := c.format.Append(make([]byte, 0, maxValue), Stat{UID: st.Uid, GID: st.Gid, Mode: st.Mode})
	errno := c.xattr.Set(fd, &c.name[0], value, unix.XATTR_CREATE)
	if errno == unix.EACCES {
		// Who may not write a file may not set its attributes, be it the owner.
		if errno := sys.ChmodFD(c.proc, fd, st.Mode&0o7777|unix.S_IWUSR); errno != 0 {
			return fmt.Errorf("make writable: %w", errno)
		}
		if errno = c.xattr.Set(fd, &c.name[0], value, unix.XATTR_CREATE); errno != 0 && errno != unix.EEXIST {
			_ = sys.ChmodFD(c.proc, fd, st.Mode&0o7777)
		}
	}
	switch errno {
	case 0:
		c.done.Files++
	case unix.EEXIST:
		c.done.Already++
	default:
		return fmt.Errorf("set attribute %s: %w", c.format.Xattr(), errno)
	}
	if st.Mode&0o7777 == c.mode {
		return nil
	}
	if errno := sys.ChmodFD(c.proc, fd, c.mode); errno != 0 {
		return fmt.Errorf("set mode %#o: %w", c.mode, errno)
	}
	return nil
}

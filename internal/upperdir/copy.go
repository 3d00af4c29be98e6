package upperdir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// Stats says how much was copied.
type Stats struct {
	// Files counts files of every type, names of one file once; Bytes is the length of the regular ones.
	Files int64 `json:"files"`
	Bytes int64 `json:"bytes"`
}

// copier copies files with all that they are: data and holes, owners, modes, times, extended attributes, hard links.
type copier struct {
	h   *host
	ctx context.Context
	// links is a directory on the target's file system where files with several names wait for the next one.
	links  int
	linked map[fileID]string
	// rename says what an extended attribute is called at the target; ok is false for one that stays behind.
	rename func(name string) (as string, ok bool)
	stats  Stats
}

type fileID struct{ dev, ino uint64 }

func (n *node) id() fileID { return fileID{n.st.Dev, n.st.Ino} }

// keepXattr is the copier's rename for a copy of a layer.
func keepXattr(name string) (string, bool) { return name, true }

// tree copies what is in the directory from into the directory to.
func (c *copier) tree(from, to *node, path string, depth int) error {
	if depth > maxDepth {
		return tooDeep(path)
	}
	entries, err := from.list(c.ctx)
	if err != nil {
		return explain("read directory", path, err)
	}
	for _, e := range entries {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		path := join(path, e.name)
		f, err := from.child(e.name)
		if gone(err) {
			continue // a guest may be at work
		}
		if err != nil {
			return explain("copy", path, err)
		}
		err = c.entry(f, to.fd, e.name, path, depth)
		f.close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *copier) entry(f *node, dirfd int, name, path string, depth int) error {
	if !f.isDir() {
		return explain("copy", path, c.file(f, dirfd, name))
	}
	d, err := c.mkdir(dirfd, name)
	if err != nil {
		return explain("copy", path, err)
	}
	defer d.close()
	c.stats.Files++
	if err := c.tree(f, d, path, depth+1); err != nil {
		return err
	}
	return explain("copy attributes of", path, c.attributes(f, d))
}

// mkdir makes a directory that only its attributes open to others.
func (c *copier) mkdir(dirfd int, name string) (*node, error) {
	if err := unix.Mkdirat(dirfd, name, 0o700); err != nil {
		return nil, err
	}
	return c.h.at(dirfd, name)
}

// file copies f, which is no directory, as name, which is not there yet.
func (c *copier) file(f *node, dirfd int, name string) error {
	if as, ok := c.linked[f.id()]; ok {
		err := unix.Linkat(c.links, as, dirfd, name, 0)
		if !errors.Is(err, unix.EMLINK) && !gone(err) {
			return err
		}
	}
	d, err := c.make(f, dirfd, name)
	if err != nil {
		return err
	}
	defer d.close()
	if err := c.attributes(f, d); err != nil {
		return err
	}
	c.stats.Files++
	if f.st.Nlink > 1 {
		as := strconv.Itoa(len(c.linked))
		// A file that cannot have another link is copied once more.
		if err := unix.Linkat(dirfd, name, c.links, as, 0); err == nil {
			c.linked[f.id()] = as
		} else if !errors.Is(err, unix.EMLINK) {
			return err
		}
	}
	return nil
}

func (c *copier) make(f *node, dirfd int, name string) (*node, error) {
	switch f.kind() {
	case unix.S_IFREG:
		if err := c.regular(f, dirfd, name); err != nil {
			return nil, err
		}
	case unix.S_IFLNK:
		target, err := f.readlink()
		if err != nil {
			return nil, err
		}
		if err := unix.Symlinkat(target, dirfd, name); err != nil {
			return nil, err
		}
	default:
		if err := unix.Mknodat(dirfd, name, f.kind()|0o600, int(f.st.Rdev)); err != nil {
			return nil, err
		}
	}
	return c.h.at(dirfd, name)
}

func (c *copier) regular(f *node, dirfd int, name string) error {
	in, err := f.open(unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(in)
	out, err := retry(func() (int, error) {
		return unix.Openat(dirfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	})
	if err != nil {
		return err
	}
	err = copyData(c.ctx, in, out)
	c.stats.Bytes += f.st.Size
	return errors.Join(err, unix.Close(out))
}

// copyData makes the empty file out hold what in does: by sharing its blocks where the file system can, otherwise extent by extent.
func copyData(ctx context.Context, in, out int) error {
	if unix.IoctlFileClone(out, in) == nil {
		return nil
	}
	var st unix.Stat_t
	if errno := sys.Fstat(in, &st); errno != 0 {
		return errno
	}
	for off := int64(0); off < st.Size; {
		data, errno := sys.Lseek(in, off, unix.SEEK_DATA)
		if errno == unix.ENXIO {
			break // a hole up to the end
		}
		if errno != 0 {
			data = off // no SEEK_DATA here
		}
		end, errno := sys.Lseek(in, data, unix.SEEK_HOLE)
		if errno != 0 {
			end = st.Size
		}
		if err := copyRange(ctx, in, out, data, min(end, st.Size)); err != nil {
			return err
		}
		off = max(end, data+1)
	}
	if errno := sys.Ftruncate(out, st.Size); errno != 0 {
		return errno
	}
	return nil
}

func copyRange(ctx context.Context, in, out int, off, end int64) error {
	const step = 8 << 20
	var buf []byte
	for off < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		want := int(min(end-off, step))
		if buf == nil {
			n, errno := sys.CopyFileRange(in, off, out, off, uint64(want), 0)
			switch {
			case errno == 0 && n > 0:
				off += int64(n)
				continue
			case errno != 0 && errno != unix.EXDEV && errno != unix.EINVAL && errno != unix.ENOSYS && errno != unix.EOPNOTSUPP:
				return errno
			}
			buf = make([]byte, 256<<10)
		}
		n, err := retry(func() (int, error) { return unix.Pread(in, buf[:min(want, len(buf))], off) })
		if err != nil {
			return err
		}
		if n == 0 {
			return nil // the file has shrunk
		}
		for p := buf[:n]; len(p) > 0; {
			wrote, err := retry(func() (int, error) { return unix.Pwrite(out, p, off) })
			if err != nil {
				return err
			}
			if wrote == 0 {
				return io.ErrShortWrite
			}
			p = p[wrote:]
			off += int64(wrote)
		}
	}
	return nil
}

// attributes gives to what from has: the owner first, which takes set-user-ID bits and capabilities away, times last.
func (c *copier) attributes(from, to *node) error {
	if from.st.Uid != to.st.Uid || from.st.Gid != to.st.Gid {
		if errno := sys.ChownFD(to.fd, from.st.Uid, from.st.Gid); errno != 0 {
			return fmt.Errorf("give it to %d:%d: %w", from.st.Uid, from.st.Gid, errno)
		}
	}
	if err := c.xattrs(from, to); err != nil {
		return err
	}
	if from.kind() != unix.S_IFLNK {
		if errno := sys.ChmodFD(c.h.proc.Int(), to.fd, from.st.Mode&0o7777); errno != 0 {
			return errno
		}
	}
	times := [2]unix.Timespec{from.st.Atim, from.st.Mtim}
	if errno := sys.UtimensFD(c.h.proc.Int(), to.fd, &times); errno != 0 {
		return errno
	}
	return nil
}

func (c *copier) xattrs(from, to *node) error {
	names, err := from.xattrs()
	if err != nil {
		return err
	}
	for _, name := range names {
		as, ok := c.rename(name)
		if !ok {
			continue
		}
		value, ok, err := from.get(name)
		if err != nil {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
		if !ok {
			continue
		}
		err = to.set(as, value)
		if name == "security.selinux" && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM)) {
			continue // the policy labels what is made there
		}
		if err != nil {
			return fmt.Errorf("attribute %s: %w", as, err)
		}
	}
	return nil
}

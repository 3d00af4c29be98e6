package overlay_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// side is a tree that operations are done to.
type side interface {
	// do returns what came of it: an errno, and what was read.
	do(o op) string
	// tree describes every file.
	tree() (map[string]string, error)
	// closeSlots closes all open files.
	closeSlots()
}

// kernelSide is a directory of the host, as the host's kernel has it.
type kernelSide struct {
	root string
	fds  [slots]int
}

func newKernelSide(root string) *kernelSide {
	k := &kernelSide{root: root}
	for i := range k.fds {
		k.fds[i] = -1
	}
	return k
}

func (k *kernelSide) at(path string) string {
	if path == "" {
		return k.root
	}
	return k.root + "/" + path
}

func (k *kernelSide) closeSlots() {
	for i, fd := range k.fds {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		k.fds[i] = -1
	}
}

// fill puts an open file into a slot.
func (k *kernelSide) fill(slot, fd int, err error) string {
	if err != nil {
		return errnoText(err)
	}
	if k.fds[slot] >= 0 {
		_ = unix.Close(k.fds[slot])
	}
	k.fds[slot] = fd
	return "OK"
}

// opened opens a regular file; what opening others does is not the file system's business.
func (k *kernelSide) opened(path string, flags int) (int, error) {
	var st unix.Stat_t
	if err := unix.Lstat(k.at(path), &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, unix.EINVAL
	}
	return unix.Open(k.at(path), flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

func (k *kernelSide) do(o op) string {
	a, b := k.at(o.a), k.at(o.b)
	fd := -1
	if o.slot >= 0 {
		fd = k.fds[o.slot]
	}
	var err error
	switch o.what {
	case "create":
		fd, err := unix.Open(a, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, o.mode()&0o777)
		return k.fill(o.slot, fd, err)
	case "open":
		fd, err := k.opened(o.a, unix.O_RDWR)
		return k.fill(o.slot, fd, err)
	case "openro":
		fd, err := k.opened(o.a, unix.O_RDONLY)
		return k.fill(o.slot, fd, err)
	case "tmpfile":
		fd, err := unix.Open(a, unix.O_RDWR|unix.O_TMPFILE|unix.O_NOFOLLOW|unix.O_CLOEXEC, o.mode()&0o777)
		return k.fill(o.slot, fd, err)
	case "close":
		if fd < 0 {
			return "EBADF"
		}
		err = unix.Close(fd)
		k.fds[o.slot] = -1
	case "write":
		n, err := unix.Pwrite(fd, o.data(), int64(o.offset()))
		return fmt.Sprint(errnoText(err), " ", max(n, 0))
	case "read":
		buf := make([]byte, 1<<17)
		n, err := unix.Pread(fd, buf, 0)
		return errnoText(err) + " " + digest(buf[:max(n, 0)])
	case "fstat":
		var st unix.Stat_t
		if err = unix.Fstat(fd, &st); err == nil {
			return describeStat(&st, "", nil).String()
		}
	case "ftruncate":
		err = unix.Ftruncate(fd, int64(o.offset()))
	case "fallocate":
		err = unix.Fallocate(fd, uint32(o.n%2)*unix.FALLOC_FL_KEEP_SIZE, int64(o.offset()), int64(o.length()+1))
	case "punch":
		err = unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(o.offset()), int64(o.length()+1))
	case "fchmod":
		err = unix.Fchmod(fd, o.mode()&0o777)
	case "linkslot":
		if fd < 0 {
			return "EBADF"
		}
		err = unix.Linkat(fd, "", unix.AT_FDCWD, a, unix.AT_EMPTY_PATH)
	case "copyrange":
		if o.other() == o.slot || fd < 0 || k.fds[o.other()] < 0 || k.sameFile(fd, k.fds[o.other()]) {
			return "EBADF"
		}
		in, out := int64(o.offset()/2), int64(o.offset())
		n, err := unix.CopyFileRange(fd, &in, k.fds[o.other()], &out, int(o.length()), 0)
		return fmt.Sprint(errnoText(err), " ", max(n, 0))
	case "mkdir":
		err = unix.Mkdir(a, o.mode()&0o1777)
	case "rmdir":
		err = unix.Rmdir(a)
	case "unlink":
		err = unix.Unlink(a)
	case "rename":
		err = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, 0)
	case "noreplace":
		err = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_NOREPLACE)
	case "exchange":
		err = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
	case "whiteout":
		err = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_WHITEOUT)
	case "link":
		err = unix.Linkat(unix.AT_FDCWD, a, unix.AT_FDCWD, b, 0)
	case "symlink":
		err = unix.Symlink(o.target(), a)
	case "readlink":
		buf := make([]byte, 100)
		n, err := unix.Readlink(a, buf)
		return errnoText(err) + " " + string(buf[:max(n, 0)])
	case "mknod":
		node := nodes[o.n%uint64(len(nodes))]
		err = unix.Mknod(a, node.mode|o.mode()&0o777, int(node.dev))
	case "truncate":
		err = unix.Truncate(a, int64(o.offset()))
	case "chmod":
		err = unix.Chmod(a, o.mode())
	case "chown":
		uid, gid := o.owner()
		err = unix.Lchown(a, uid, gid)
	case "utimens":
		t := unix.NsecToTimespec(o.time() * 1e9)
		err = unix.UtimesNanoAt(unix.AT_FDCWD, a, []unix.Timespec{t, t}, unix.AT_SYMLINK_NOFOLLOW)
	case "setxattr":
		err = unix.Lsetxattr(a, o.xattr(), o.data()[:o.n%200%uint64(len(o.data()))], 0)
	case "getxattr":
		buf := make([]byte, 4096)
		n, err := unix.Lgetxattr(a, o.xattr(), buf)
		return errnoText(err) + " " + digest(buf[:max(n, 0)])
	case "removexattr":
		err = unix.Lremovexattr(a, o.xattr())
	case "setacl", "removeacl":
		var st unix.Stat_t
		if err := unix.Lstat(a, &st); err != nil {
			return errnoText(err)
		}
		name, value, isDefault := o.acl()
		if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFDIR && (isDefault || kind != unix.S_IFREG) {
			return "EACCES" // whatever it is: not the file system's business
		}
		if o.what == "setacl" {
			err = unix.Lsetxattr(a, name, value, 0)
		} else {
			err = unix.Lremovexattr(a, name)
		}
	case "readdir":
		list, err := os.ReadDir(a)
		if err != nil {
			return errnoText(err.(*os.PathError).Err)
		}
		var names []string
		for _, e := range list {
			// The kernel lists a whiteout of an upper directory that has nothing below any more: a name that nothing is found under.
			if errors.Is(unix.Lstat(a+"/"+e.Name(), new(unix.Stat_t)), unix.ENOENT) {
				continue
			}
			names = append(names, fmt.Sprintf("%s:%s", e.Name(), e.Type().String()[:1]))
		}
		return "OK " + strings.Join(names, " ")
	case "stat":
		var st unix.Stat_t
		if err = unix.Lstat(a, &st); err == nil {
			return describeStat(&st, "", nil).String()
		}
	default:
		panic(o.what)
	}
	return errnoText(err)
}

func (k *kernelSide) sameFile(a, b int) bool {
	var x, y unix.Stat_t
	return unix.Fstat(a, &x) != nil || unix.Fstat(b, &y) != nil || x.Ino == y.Ino
}

func digest(b []byte) string { return fmt.Sprintf("%d bytes %x", len(b), sha256.Sum256(b))[:30] }

func describeStat(st *unix.Stat_t, extra string, attrs []string) fileInfo {
	return fileInfo{st.Mode, st.Uid, st.Gid, uint64(st.Size), uint32(st.Nlink), uint32(st.Rdev), st.Mtim.Sec, extra, attrs}
}

func (k *kernelSide) tree() (map[string]string, error) {
	all := make(map[string]string)
	return all, filepath.Walk(k.root, func(path string, _ os.FileInfo, err error) error {
		if errors.Is(err, unix.ENOENT) {
			return nil // a whiteout, as in readdir
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		extra, err := contents(path, st.Mode)
		if err != nil {
			return err
		}
		attrs, err := xattrs(path)
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(k.root, path)
		all[rel] = describeStat(&st, extra, attrs).String()
		return nil
	})
}

// contents is what a file holds: a digest, or a target.
func contents(path string, mode uint32) (string, error) {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		data, err := os.ReadFile(path)
		return digest(data), err
	case unix.S_IFLNK:
		return os.Readlink(path)
	}
	return "", nil
}

func xattrs(path string) ([]string, error) {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return nil, err
	}
	var attrs []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 1024)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("%s of %s: %w", name, path, err)
		}
		attrs = append(attrs, name+"="+digest(value[:n]))
	}
	slices.Sort(attrs)
	return attrs, nil
}

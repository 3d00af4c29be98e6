package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// posixCases is what a local file system does, so a share must.
var posixCases = []posixCase{
	{"umask", anyone, umask},
	{"create exclusive", anyone, createExclusive},
	{"append", anyone, appendTwice},
	{"truncate", anyone, truncate},
	{"tmpfile", anyone, tmpfile},
	{"rename", anyone, rename},
	{"rename flags", anyone, renameFlags},
	{"rename whiteout", rootOnly, renameWhiteout},
	{"sparse", anyone, sparse},
	{"fallocate", anyone, fallocate},
	{"xattr", anyone, xattr},
	{"inode flags", anyone, inodeFlags},
	{"fifo", anyone, fifo},
	{"socket", anyone, socket},
	{"device", rootOnly, device},
	{"hard links", anyone, hardLinks},
	{"symbolic links", anyone, symlinks},
	{"open but unlinked", anyone, openUnlinked},
	{"readdir while deleting", anyone, readdirDeleting},
	{"mmap shared", anyone, mmapShared},
	{"birth time", anyone, birthTime},
	{"times", anyone, times},
	{"names", anyone, names},
	{"copy range", anyone, copyRange},
	{"locks", anyone, locks},
	{"setgid directory", anyone, setgidDirectory},
	{"chown", rootOnly, chown},
	{"owner and group", userOnly, ownerAndGroup},
	{"permission denied", userOnly, permissionDenied},
	{"sticky directory", userOnly, stickyDirectory},
	{"supplementary group", userOnly, supplementaryGroup},
	{"set-id cleared by write", userOnly, setIDCleared},
	{"set-id cleared by chown", rootOnly, setIDClearedByChown},
}

func umask(dir string) error {
	defer unix.Umask(unix.Umask(0o027))
	file, sub := filepath.Join(dir, "file"), filepath.Join(dir, "sub")
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o666)
	if err != nil {
		return err
	}
	f.Close()
	return first(
		mode(file, unix.S_IFREG|0o640),
		unix.Mkdir(sub, 0o777),
		mode(sub, unix.S_IFDIR|0o750),
		unix.Mknod(filepath.Join(dir, "fifo"), unix.S_IFIFO|0o666, 0),
		mode(filepath.Join(dir, "fifo"), unix.S_IFIFO|0o640),
	)
}

func createExclusive(dir string) error {
	file := filepath.Join(dir, "file")
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o400)
	if err != nil {
		return err
	}
	defer f.Close()
	// The file may be written through the descriptor that made it, whatever its mode.
	_, err = f.WriteString("x")
	_, again := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o400)
	return first(err, want(unix.EEXIST, again), want(unix.EEXIST, unix.Mkdir(file, 0o755)),
		want(unix.ENOTDIR, unix.Mkdir(filepath.Join(file, "sub"), 0o755)), want(unix.ENOENT, unix.Rmdir(filepath.Join(dir, "none"))))
}

func appendTwice(dir string) error {
	file := filepath.Join(dir, "file")
	var both [2]*os.File
	for i := range both {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		defer f.Close()
		both[i] = f
	}
	var expected []byte
	for i := range 100 {
		line := fmt.Appendf(nil, "line %d\n", i)
		if _, err := both[i%2].Write(line); err != nil {
			return err
		}
		expected = append(expected, line...)
	}
	return holds(file, expected)
}

func truncate(dir string) error {
	file := filepath.Join(dir, "file")
	if err := put(file, strings.Repeat("x", 10000), 0o644); err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	steps := first(
		f.Truncate(5000), holds(file, bytes.Repeat([]byte("x"), 5000)),
		f.Truncate(8192), holds(file, append(bytes.Repeat([]byte("x"), 5000), make([]byte, 3192)...)),
		unix.Truncate(file, 3), holds(file, []byte("xxx")),
		want(unix.EISDIR, unix.Truncate(dir, 0)),
	)
	if steps != nil {
		return steps
	}
	again, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	return first(again.Close(), holds(file, nil))
}

func tmpfile(dir string) error {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR, 0o640)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "tmpfile")
	defer f.Close()
	entries, err := os.ReadDir(dir)
	file := filepath.Join(dir, "linked")
	_, werr := f.WriteString("content")
	return first(err, equal("number of names", len(entries), 0), werr,
		unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, file, unix.AT_SYMLINK_FOLLOW),
		holds(file, []byte("content")), mode(file, unix.S_IFREG|0o640))
}

func rename(dir string) error {
	a, b, full, empty := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "full"), filepath.Join(dir, "empty")
	return first(
		put(a, "a", 0o644), put(b, "b", 0o644),
		os.Rename(a, b), holds(b, []byte("a")), want(unix.ENOENT, unix.Access(a, unix.F_OK)),
		os.Mkdir(full, 0o755), os.Mkdir(empty, 0o755), put(filepath.Join(full, "x"), "x", 0o644),
		want(unix.ENOTEMPTY, unix.Rename(empty, full)),
		want(unix.ENOTDIR, unix.Rename(empty, b)), want(unix.EISDIR, unix.Rename(b, empty)),
		want(unix.EINVAL, unix.Rename(full, filepath.Join(full, "below"))),
		unix.Rename(full, empty), holds(filepath.Join(empty, "x"), []byte("x")),
	)
}

func renameFlags(dir string) error {
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	rename2 := func(from, to string, flags uint) error {
		return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags)
	}
	return first(
		put(a, "a", 0o644), os.Mkdir(b, 0o755),
		want(unix.EEXIST, rename2(a, b, unix.RENAME_NOREPLACE)),
		rename2(a, b, unix.RENAME_EXCHANGE), holds(b, []byte("a")), mode(a, unix.S_IFDIR|0o755),
		want(unix.ENOENT, rename2(a, filepath.Join(dir, "c"), unix.RENAME_EXCHANGE)),
		rename2(a, filepath.Join(dir, "c"), unix.RENAME_NOREPLACE),
		want(unix.ENOENT, unix.Access(a, unix.F_OK)),
	)
}

func renameWhiteout(dir string) error {
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	err := first(put(a, "a", 0o644), unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_WHITEOUT), holds(b, []byte("a")))
	if err != nil {
		return err
	}
	st, err := lstat(a)
	return first(err, equal("type", st.Mode&unix.S_IFMT, unix.S_IFCHR), equal("device", st.Rdev, 0))
}

func sparse(dir string) error {
	f, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		return err
	}
	defer f.Close()
	const data, size = 1 << 20, 4 << 20
	_, err = f.WriteAt([]byte("data"), data)
	if err := first(err, f.Truncate(size), f.Sync()); err != nil {
		return err
	}
	seek := func(offset int64, whence int, expected int64) error {
		got, err := unix.Seek(int(f.Fd()), offset, whence)
		return first(err, equal(fmt.Sprintf("seek %d from %d", whence, offset), got, expected))
	}
	_, end := unix.Seek(int(f.Fd()), size, unix.SEEK_DATA)
	st, err := lstat(f.Name())
	if st.Blocks*512 >= size {
		return fmt.Errorf("%d blocks are allocated", st.Blocks)
	}
	return first(err, seek(0, unix.SEEK_HOLE, 0), seek(0, unix.SEEK_DATA, data), seek(data, unix.SEEK_HOLE, data+4096), want(unix.ENXIO, end))
}

func fallocate(dir string) error {
	file := filepath.Join(dir, "file")
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	content := bytes.Repeat([]byte("x"), 16<<10)
	size := func(want int64) error {
		st, err := lstat(file)
		return first(err, equal("size", st.Size, want))
	}
	call := func(mode uint32, offset, length int64) error {
		return unix.Fallocate(int(f.Fd()), mode, offset, length)
	}
	_, err = f.Write(content)
	punched := bytes.Clone(content)
	clear(punched[4096:8192])
	zeroed := bytes.Clone(punched)
	clear(zeroed[12288:])
	return first(err,
		call(unix.FALLOC_FL_KEEP_SIZE, 0, 64<<10), size(16<<10),
		call(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, 4096), size(16<<10), holds(file, punched),
		call(unix.FALLOC_FL_ZERO_RANGE, 12288, 4096), holds(file, zeroed),
		call(0, 0, 32<<10), size(32<<10), holds(file, append(zeroed, make([]byte, 16<<10)...)),
		want(unix.EINVAL, call(0, 0, 0)),
	)
}

// inodeFlags does what lsattr(1) and chattr(1) do.
func inodeFlags(dir string) error {
	f, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		return err
	}
	defer f.Close()
	const noDump = 0x40 // FS_NODUMP_FL, FS_XFLAG_NODUMP is 0x80
	flags := func(want int) error {
		got, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
		x, xErr := extendedFlags(f)
		return first(err, xErr, equal("flag", got&noDump, want), equal("extended flag", int(x&0x80), 2*want))
	}
	set := func(attributes int) error {
		return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, attributes)
	}
	got, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	return first(err, flags(0), set(got|noDump), flags(noDump), setExtendedFlags(f, 0), flags(0))
}

func xattr(dir string) error {
	file := filepath.Join(dir, "file")
	buf := make([]byte, 64<<10)
	get := func(name, want string) error {
		n, err := unix.Getxattr(file, name, buf)
		return first(err, equal(name, string(buf[:max(n, 0)]), want))
	}
	_, missing := unix.Getxattr(file, "user.missing", buf)
	err := first(
		put(file, "", 0o644), want(unix.ENOENT, missing),
		unix.Setxattr(file, "user.a", []byte("1"), unix.XATTR_CREATE), get("user.a", "1"),
		want(unix.EEXIST, unix.Setxattr(file, "user.a", []byte("2"), unix.XATTR_CREATE)),
		unix.Setxattr(file, "user.a", []byte("2"), unix.XATTR_REPLACE), get("user.a", "2"),
		want(unix.ENODATA, unix.Setxattr(file, "user.b", nil, unix.XATTR_REPLACE)),
		unix.Setxattr(file, "user.empty", nil, 0), get("user.empty", ""),
		unix.Setxattr(file, "user.long", bytes.Repeat([]byte("v"), 2000), 0), get("user.long", strings.Repeat("v", 2000)),
		unix.Setxattr(dir, "user.dir", []byte("d"), 0),
	)
	if err != nil {
		return err
	}
	_, missing = unix.Getxattr(file, "user.missing", buf)
	_, short := unix.Getxattr(file, "user.long", buf[:10])
	asked, sizeErr := unix.Getxattr(file, "user.long", nil)
	n, err := unix.Listxattr(file, buf)
	list := string(buf[:max(n, 0)])
	for _, name := range []string{"user.a", "user.empty", "user.long"} {
		if !strings.Contains("\x00"+list, "\x00"+name+"\x00") {
			return fmt.Errorf("%s is not listed in %q", name, list)
		}
	}
	return first(err, want(unix.ENODATA, missing), want(unix.ERANGE, short), sizeErr, equal("size", asked, 2000),
		unix.Removexattr(file, "user.a"), want(unix.ENODATA, unix.Removexattr(file, "user.a")))
}

func fifo(dir string) error {
	path := filepath.Join(dir, "fifo")
	if err := first(unix.Mkfifo(path, 0o622), mode(path, unix.S_IFIFO|0o622), unix.Chmod(path, 0o600)); err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() { written <- os.WriteFile(path, []byte("through"), 0) }()
	return first(holds(path, []byte("through")), <-written)
}

func socket(dir string) error {
	// A path from / may be too long for a socket address.
	if err := os.Chdir(dir); err != nil {
		return err
	}
	defer func() { _ = os.Chdir("/") }()
	l, err := net.Listen("unix", "s")
	if err != nil {
		return err
	}
	defer l.Close()
	st, err := lstat("s")
	if err := first(err, equal("type", st.Mode&unix.S_IFMT, unix.S_IFSOCK)); err != nil {
		return err
	}
	c, err := net.Dial("unix", "s")
	if err != nil {
		return err
	}
	return c.Close()
}

func device(dir string) error {
	path := filepath.Join(dir, "null")
	null := int(unix.Mkdev(1, 3))
	if err := unix.Mknod(path, unix.S_IFCHR|0o666, null); err != nil {
		return err
	}
	st, err := lstat(path)
	return first(err, equal("mode", st.Mode, unix.S_IFCHR|0o666), equal("device", int(st.Rdev), null),
		os.WriteFile(path, []byte("x"), 0), holds(path, nil),
		unix.Mknod(filepath.Join(dir, "block"), unix.S_IFBLK|0o600, int(unix.Mkdev(250, 300))), mode(filepath.Join(dir, "block"), unix.S_IFBLK|0o600))
}

func hardLinks(dir string) error {
	a, b, sub := filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "sub")
	if err := first(put(a, "one", 0o644), os.Mkdir(sub, 0o755), os.Link(a, b), os.Link(b, filepath.Join(sub, "c"))); err != nil {
		return err
	}
	sa, errA := lstat(a)
	sb, errB := lstat(b)
	err := first(errA, errB, equal("inode", sa.Ino, sb.Ino), equal("links", sa.Nlink, 3), equal("links", sb.Nlink, 3),
		put(b, "changed", 0o600), holds(a, []byte("changed")), mode(a, unix.S_IFREG|0o600),
		unix.Unlink(a), holds(b, []byte("changed")))
	if err != nil {
		return err
	}
	sb, err = lstat(b)
	return first(err, equal("links", sb.Nlink, 2), want(unix.EEXIST, os.Link(b, filepath.Join(sub, "c"))), want(unix.EPERM, os.Link(sub, a)))
}

func symlinks(dir string) error {
	link, long := filepath.Join(dir, "link"), strings.Repeat("x/", 2000)
	read := func(file, want string) error {
		got, err := os.Readlink(file)
		return first(err, equal("target", got, want))
	}
	err := first(
		os.Symlink("nowhere", link), read(link, "nowhere"),
		os.Symlink(long, filepath.Join(dir, "long")), read(filepath.Join(dir, "long"), long),
		os.Symlink("loop", filepath.Join(dir, "loop")),
		put(filepath.Join(dir, "target"), "t", 0o644), os.Symlink("target", filepath.Join(dir, "good")), holds(filepath.Join(dir, "good"), []byte("t")),
		unix.Lchown(link, os.Getuid(), os.Getgid()),
		os.Link(link, filepath.Join(dir, "hard")), read(filepath.Join(dir, "hard"), "nowhere"),
	)
	_, loop := os.Open(filepath.Join(dir, "loop"))
	st, statErr := lstat(link)
	return first(err, want(unix.ELOOP, loop), statErr, equal("size", st.Size, int64(len("nowhere"))))
}

func openUnlinked(dir string) error {
	file := filepath.Join(dir, "file")
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, werr := f.WriteString("still here")
	err = first(werr, os.Remove(file), want(unix.ENOENT, unix.Access(file, unix.F_OK)))
	if err != nil {
		return err
	}
	_, werr = f.WriteAt([]byte("STILL"), 0)
	got := make([]byte, 10)
	_, rerr := f.ReadAt(got, 0)
	var st unix.Stat_t
	return first(werr, rerr, equal("content", string(got), "STILL here"),
		unix.Fstat(int(f.Fd()), &st), equal("links", st.Nlink, 0), equal("size", st.Size, 10),
		f.Truncate(3), f.Chmod(0o600), f.Sync(),
		// A new file of the same name is another file.
		put(file, "new", 0o644), holds(file, []byte("new")))
}

func readdirDeleting(dir string) error {
	const files = 1000 // more than one reply can list
	for i := range files {
		if err := unix.Mknod(filepath.Join(dir, fmt.Sprint("file", i)), unix.S_IFREG|0o644, 0); err != nil {
			return err
		}
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	seen := map[string]bool{}
	for {
		batch, err := d.Readdirnames(37)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		for _, name := range batch {
			if seen[name] {
				return fmt.Errorf("%s is listed twice", name)
			}
			seen[name] = true
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	left, err := os.ReadDir(dir)
	return first(err, equal("number of names listed", len(seen), files), equal("number of names left", len(left), 0))
}

func mmapShared(dir string) error {
	file := filepath.Join(dir, "file")
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	const size = 256 << 10
	if err := f.Truncate(size); err != nil {
		return err
	}
	var maps [2][]byte
	for i := range maps {
		m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("map %d: %w", i, err)
		}
		defer func() { _ = unix.Munmap(m) }()
		maps[i] = m
	}
	expected := make([]byte, size)
	for i := range expected {
		expected[i] = byte(i * 7 >> 3)
	}
	copy(maps[0], expected)
	if !bytes.Equal(maps[1], expected) {
		return errors.New("the second mapping does not show what the first one wrote")
	}
	if err := first(unix.Msync(maps[0], unix.MS_SYNC), holds(file, expected)); err != nil {
		return err
	}
	// A write shows in the mapping.
	_, err = f.WriteAt([]byte("written"), 100000)
	return first(err, equal("mapping", string(maps[1][100000:100007]), "written"))
}

func birthTime(dir string) error {
	file := filepath.Join(dir, "file")
	begin := time.Now()
	if err := put(file, "x", 0o644); err != nil {
		return err
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, file, 0, unix.STATX_ALL, &st); err != nil {
		return err
	}
	if st.Mask&unix.STATX_BTIME == 0 {
		return errors.New("statx has no birth time")
	}
	// The clocks of guest and host may differ by what a boot rounds.
	if d := time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)).Sub(begin); d.Abs() > time.Minute {
		return fmt.Errorf("birth time is %v off", d)
	}
	return nil
}

func times(dir string) error {
	file := filepath.Join(dir, "file")
	link := filepath.Join(dir, "link")
	set := [2]unix.Timespec{{Sec: 1_000_000_001, Nsec: 123_456_789}, {Sec: 5_000_000_000, Nsec: 987_654_321}}
	check := func(path string) error {
		st, err := lstat(path)
		return first(err, equal("atime", st.Atim, set[0]), equal("mtime", st.Mtim, set[1]))
	}
	nano := func(path string, times []unix.Timespec) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, times, unix.AT_SYMLINK_NOFOLLOW)
	}
	err := first(put(file, "x", 0o644), os.Symlink("file", link),
		nano(file, set[:]), check(file), nano(link, set[:]), check(link),
		// One of the two may be left as it is.
		nano(file, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_NOW}}))
	if err != nil {
		return err
	}
	st, err := lstat(file)
	if d := time.Since(time.Unix(st.Mtim.Sec, st.Mtim.Nsec)); d.Abs() > time.Minute {
		return fmt.Errorf("mtime set to now is %v off", d)
	}
	return first(err, equal("atime", st.Atim, set[0]))
}

func names(dir string) error {
	for _, name := range []string{strings.Repeat("n", 255), "\xff\xfe not UTF-8 \x01", "new\nline", "...", " ", "ü", "-"} {
		file := filepath.Join(dir, name)
		if err := first(put(file, name, 0o644), holds(file, []byte(name))); err != nil {
			return fmt.Errorf("name %q: %w", name, err)
		}
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		listed, err := d.Readdirnames(-1)
		d.Close()
		if err := first(err, equal("list", fmt.Sprintf("%q", listed), fmt.Sprintf("%q", []string{name})), os.Remove(file)); err != nil {
			return fmt.Errorf("name %q: %w", name, err)
		}
	}
	return want(unix.ENAMETOOLONG, unix.Mkdir(filepath.Join(dir, strings.Repeat("n", 256)), 0o755))
}

func copyRange(dir string) error {
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	content := bytes.Repeat([]byte("0123456789"), 50000)
	if err := first(put(from, string(content), 0o644), put(to, "", 0o644)); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	for offset, done := int64(5), int64(0); ; {
		n, err := unix.CopyFileRange(int(in.Fd()), &offset, int(out.Fd()), &done, len(content), 0)
		if err != nil {
			return err
		}
		if n == 0 {
			return holds(to, content[5:])
		}
	}
}

func locks(dir string) error {
	file := filepath.Join(dir, "file")
	var both [2]*os.File
	for i := range both {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return err
		}
		defer f.Close()
		both[i] = f
	}
	ofd := func(i int, kind int16) error {
		return unix.FcntlFlock(both[i].Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: 10, Len: 10})
	}
	flock := func(i, how int) error { return unix.Flock(int(both[i].Fd()), how|unix.LOCK_NB) }
	return first(
		flock(0, unix.LOCK_EX), want(unix.EWOULDBLOCK, flock(1, unix.LOCK_SH)), flock(0, unix.LOCK_UN), flock(1, unix.LOCK_EX),
		ofd(0, unix.F_WRLCK), want(unix.EAGAIN, ofd(1, unix.F_RDLCK)), ofd(0, unix.F_UNLCK), ofd(1, unix.F_WRLCK),
	)
}

// setgidDirectory is about a directory whose group, 2000, is inherited.
func setgidDirectory(dir string) error {
	team := filepath.Join(fixture(dir, "team-setgid"), filepath.Base(dir))
	file := filepath.Join(team, "file")
	if err := first(unix.Mkdir(team, 0o755), mode(team, unix.S_IFDIR|unix.S_ISGID|0o755), put(file, "x", 0o644)); err != nil {
		return err
	}
	owner := func(path string) error {
		st, err := lstat(path)
		return first(err, equal("uid", int(st.Uid), os.Getuid()), equal("gid", st.Gid, 2000))
	}
	return first(owner(team), owner(file), os.RemoveAll(team))
}

func chown(dir string) error {
	file := filepath.Join(dir, "file")
	owner := func(uid, gid uint32) error {
		st, err := lstat(file)
		return first(err, equal("uid", st.Uid, uid), equal("gid", st.Gid, gid))
	}
	return first(put(file, "x", 0o644), os.Chown(file, 1234, 5678), owner(1234, 5678), os.Chown(file, -1, 7), owner(1234, 7),
		os.Chown(file, 65534, -1), owner(65534, 7))
}

func ownerAndGroup(dir string) error {
	file, sub, link := filepath.Join(dir, "file"), filepath.Join(dir, "sub"), filepath.Join(dir, "link")
	owner := func(path string) error {
		st, err := lstat(path)
		return first(err, equal("uid", st.Uid, 1000), equal("gid", st.Gid, 1000))
	}
	return first(put(file, "x", 0o644), os.Mkdir(sub, 0o755), os.Symlink("x", link), owner(file), owner(sub), owner(link),
		// To a group of one's own, but to no other and to no other user.
		os.Chown(file, -1, 2000), want(unix.EPERM, unix.Chown(file, -1, 3000)), want(unix.EPERM, unix.Chown(file, 0, -1)))
}

func permissionDenied(dir string) error {
	private := fixture(dir, "root-0755")
	_, read := os.ReadFile(filepath.Join(private, "root-0600"))
	_, write := os.OpenFile(filepath.Join(private, "root-0644"), os.O_WRONLY, 0)
	return first(
		want(unix.EACCES, unix.Mkdir(filepath.Join(private, "x"), 0o755)),
		want(unix.EACCES, unix.Mknod(filepath.Join(private, "x"), unix.S_IFREG|0o644, 0)),
		want(unix.EACCES, unix.Unlink(filepath.Join(private, "root-0644"))),
		want(unix.EACCES, read), want(unix.EACCES, write), holds(filepath.Join(private, "root-0644"), []byte("0644")),
		want(unix.EPERM, unix.Chmod(filepath.Join(private, "root-0644"), 0o666)),
		want(unix.EPERM, unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))),
	)
}

func stickyDirectory(dir string) error {
	sticky := fixture(dir, "sticky")
	mine := filepath.Join(sticky, "mine")
	return first(want(unix.EPERM, unix.Unlink(filepath.Join(sticky, "of-root"))),
		want(unix.EPERM, unix.Rename(filepath.Join(sticky, "of-root"), mine)), put(mine, "x", 0o644), os.Remove(mine))
}

// supplementaryGroup is about a directory in which only the group 2000 may create.
func supplementaryGroup(dir string) error {
	team := fixture(dir, "team-0770")
	file, sub, link, fifo := filepath.Join(team, "file"), filepath.Join(team, "sub"), filepath.Join(team, "link"), filepath.Join(team, "fifo")
	if err := first(put(file, "x", 0o644), os.Mkdir(sub, 0o755), os.Symlink("x", link), unix.Mkfifo(fifo, 0o600)); err != nil {
		return err
	}
	st, err := lstat(file)
	return first(err, equal("gid", st.Gid, 1000), os.Remove(file), os.Remove(sub), os.Remove(link), os.Remove(fifo),
		holds(filepath.Join(team, "team-0640"), []byte("0640")))
}

// setIDCleared: who is not root takes the bits off a file by changing what it holds.
func setIDCleared(dir string) error {
	file := filepath.Join(dir, "file")
	const set, cleared = unix.S_IFREG | 0o6755, unix.S_IFREG | 0o755
	change := func(f func() error) error {
		return first(unix.Chmod(file, 0o6755), mode(file, set), f(), mode(file, cleared))
	}
	return first(
		put(file, strings.Repeat("x", 5000), 0o644),
		change(func() error {
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteString("y")
			return first(err, f.Close())
		}),
		change(func() error { return unix.Truncate(file, 100) }),
		change(func() error {
			f, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteString("z")
			return first(err, f.Close())
		}),
	)
}

func setIDClearedByChown(dir string) error {
	file := filepath.Join(dir, "file")
	return first(put(file, "x", 0o6755), mode(file, unix.S_IFREG|0o6755), os.Chown(file, 1000, 1000), mode(file, unix.S_IFREG|0o755),
		// Without the group's x bit, set-group-id means something else and stays.
		unix.Chmod(file, 0o6744), os.Chown(file, 0, 0), mode(file, unix.S_IFREG|syscall.S_ISGID|0o744))
}

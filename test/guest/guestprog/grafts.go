package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/test/guest/selfcheck"
)

// readWhile reads and checks the self-checking file as fast as it can until the file stop is there, and says how that ended, most of
// all how often there was no such file.
func readWhile(file, stop string) error {
	counts := map[string]int{}
	for {
		if _, err := os.Stat(stop); err == nil {
			break
		}
		content, err := os.ReadFile(file)
		if err == nil {
			err = selfcheck.Verify(content)
		}
		switch {
		case err == nil:
			counts["read"]++
		case errors.Is(err, unix.ENOENT):
			counts["absent"]++
		default:
			counts[err.Error()]++
		}
	}
	for what, n := range counts {
		fmt.Printf("%d %s\n", n, what)
	}
	return nil
}

// timeStat says how many nanoseconds one stat of each of files takes, of n each in turn.
func timeStat(n int64, files ...string) error {
	took := make([]time.Duration, len(files))
	for range n {
		for i, file := range files {
			var st unix.Stat_t
			begin := time.Now()
			if err := unix.Stat(file, &st); err != nil {
				return fmt.Errorf("stat %s: %w", file, err)
			}
			took[i] += time.Since(begin)
		}
	}
	for _, t := range took {
		fmt.Println(t.Nanoseconds() / n)
	}
	return nil
}

// frozen opens files of dir for writing, waits until dir is read-only and tries to change them, then again until it is not. What
// was put into memory that is shared with a file must come back as an error at the latest when that is synced.
func frozen(dir, say, hear string) error {
	held, err := os.OpenFile(filepath.Join(dir, "held"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer held.Close()
	appended, err := os.OpenFile(filepath.Join(dir, "held"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer appended.Close()
	if _, err := held.WriteString("before"); err != nil {
		return err
	}
	nameless, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o644)
	if err != nil {
		return err
	}
	defer nameless.Close()
	source, err := os.Open(filepath.Join(dir, "file"))
	if err != nil {
		return err
	}
	defer source.Close()
	at, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer at.Close()
	owner, err := lstat(held.Name())
	if err != nil {
		return err
	}
	memory, err := unix.Mmap(int(held.Fd()), 0, 6, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(memory)
	fd, dirfd := int(held.Fd()), int(at.Fd())
	changes := []struct {
		name string
		do   func() error
	}{
		{"write", func() error { _, err := unix.Pwrite(fd, []byte("written"), 0); return err }},
		{"append", func() error { _, err := unix.Write(int(appended.Fd()), []byte("more")); return err }},
		{"write to a nameless file", func() error { _, err := nameless.WriteAt([]byte("x"), 0); return err }},
		{"truncate", func() error { return unix.Ftruncate(fd, 3) }},
		{"allocate", func() error { return unix.Fallocate(fd, 0, 0, 1<<16) }},
		{"punch a hole", func() error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
		}},
		{"copy range", func() error {
			var from, to int64
			_, err := unix.CopyFileRange(int(source.Fd()), &from, fd, &to, 4, 0)
			return err
		}},
		{"chmod", func() error { return unix.Fchmod(fd, 0o600) }},
		{"chown", func() error { return unix.Fchown(fd, int(owner.Uid), int(owner.Gid)) }},
		{"set times", func() error { return unix.Futimes(fd, []unix.Timeval{{Sec: 1}, {Sec: 1}}) }},
		{"set xattr", func() error { return unix.Fsetxattr(fd, "user.b", []byte("1"), 0) }},
		{"remove xattr", func() error { return unix.Fremovexattr(fd, "user.b") }},
		{"link nameless", func() error {
			return unix.Linkat(unix.AT_FDCWD, fmt.Sprint("/proc/self/fd/", nameless.Fd()), dirfd, "named", unix.AT_SYMLINK_FOLLOW)
		}},
		{"create", func() error {
			fd, err := unix.Openat(dirfd, "created", unix.O_CREAT|unix.O_WRONLY, 0o644)
			if err == nil {
				_ = unix.Close(fd)
			}
			return err
		}},
		{"mkdir", func() error { return unix.Mkdirat(dirfd, "directory", 0o755) }},
		{"symlink", func() error { return unix.Symlinkat("target", dirfd, "symlink") }},
		{"mknod", func() error { return unix.Mknodat(dirfd, "fifo", unix.S_IFIFO|0o644, 0) }},
		{"rename", func() error { return unix.Renameat(dirfd, "held", dirfd, "renamed") }},
		{"rename back", func() error { return unix.Renameat(dirfd, "renamed", dirfd, "held") }},
		{"unlink", func() error { return unix.Unlinkat(dirfd, "fifo", 0) }},
		{"rmdir", func() error { return unix.Unlinkat(dirfd, "directory", unix.AT_REMOVEDIR) }},
	}
	if err := talk(say, hear); err != nil {
		return err
	}
	failed := 0
	fails := func(when, what string, err error) {
		fmt.Printf("FAIL %s %s: %v\n", when, what, err)
		failed++
	}
	for _, c := range changes {
		err := c.do()
		// There is nothing of that name then.
		missing := (c.name == "rename back" || c.name == "unlink" || c.name == "rmdir") && errors.Is(err, unix.ENOENT)
		if !missing && !errors.Is(err, unix.EROFS) {
			fails("while it is read-only,", c.name, want(unix.EROFS, err))
		}
	}
	memory[0] = 'X'
	if err := unix.Msync(memory, unix.MS_SYNC); err == nil {
		fails("while it is read-only,", "sync of shared memory", errors.New("it is done"))
	}
	if err := talk(say, hear); err != nil {
		return err
	}
	for _, c := range changes {
		if err := c.do(); err != nil {
			fails("when it is no more,", c.name, err)
		}
	}
	memory[0] = 'Y'
	if err := unix.Msync(memory, unix.MS_SYNC); err != nil {
		fails("when it is no more,", "sync of shared memory", err)
	}
	if failed > 0 {
		return fmt.Errorf("%d changes ended otherwise", failed)
	}
	return nil
}

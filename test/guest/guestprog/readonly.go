package main

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// readonlyCases are all the ways to change something; the directory they get has "file" and "sub".
var readonlyCases = func() []posixCase {
	cases := []posixCase{{"read", anyone, func(dir string) error {
		entries, err := os.ReadDir(dir)
		if len(entries) == 0 {
			return fmt.Errorf("no names: %w", err)
		}
		return first(err, holds(filepath.Join(dir, "file"), []byte("content")))
	}}}
	for _, c := range []struct {
		name   string
		change func(file, sub, missing string) error
	}{
		{"open for writing", func(file, _, _ string) error { return openClose(file, unix.O_WRONLY) }},
		{"open for both", func(file, _, _ string) error { return openClose(file, unix.O_RDWR) }},
		{"open with truncation", func(file, _, _ string) error { return openClose(file, unix.O_WRONLY|unix.O_TRUNC) }},
		{"create", func(_, _, missing string) error { return openClose(missing, unix.O_CREAT|unix.O_WRONLY) }},
		{"create for reading", func(_, _, missing string) error { return openClose(missing, unix.O_CREAT|unix.O_RDONLY) }},
		{"tmpfile", func(_, sub, _ string) error { return openClose(sub, unix.O_TMPFILE|unix.O_RDWR) }},
		{"truncate", func(file, _, _ string) error { return unix.Truncate(file, 0) }},
		{"mkdir", func(_, _, missing string) error { return unix.Mkdir(missing, 0o755) }},
		{"mknod", func(_, _, missing string) error { return unix.Mknod(missing, unix.S_IFREG|0o644, 0) }},
		{"mkfifo", func(_, _, missing string) error { return unix.Mkfifo(missing, 0o644) }},
		{"symlink", func(_, _, missing string) error { return unix.Symlink("target", missing) }},
		{"link", func(file, _, missing string) error { return unix.Link(file, missing) }},
		{"unlink", func(file, _, _ string) error { return unix.Unlink(file) }},
		{"rmdir", func(_, sub, _ string) error { return unix.Rmdir(sub) }},
		{"rename", func(file, _, missing string) error { return unix.Rename(file, missing) }},
		{"exchange", func(file, sub, _ string) error {
			return unix.Renameat2(unix.AT_FDCWD, file, unix.AT_FDCWD, sub, unix.RENAME_EXCHANGE)
		}},
		{"chmod", func(file, _, _ string) error { return unix.Chmod(file, 0o777) }},
		{"chown", func(file, _, _ string) error { return unix.Chown(file, 1, 1) }},
		{"set times", func(file, _, _ string) error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0)
		}},
		{"set xattr", func(file, _, _ string) error { return unix.Setxattr(file, "user.a", []byte("1"), 0) }},
		{"remove xattr", func(file, _, _ string) error { return unix.Removexattr(file, "user.present") }},
	} {
		cases = append(cases, posixCase{c.name, anyone, func(dir string) error {
			return want(unix.EROFS, c.change(filepath.Join(dir, "file"), filepath.Join(dir, "sub"), filepath.Join(dir, "missing")))
		}})
	}
	return cases
}()

func openClose(path string, flags int) error {
	fd, err := unix.Open(path, flags, 0o644)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

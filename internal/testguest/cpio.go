package testguest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// cpioWriter writes the archive format of an initramfs, "newc" of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
// Everything in it belongs to root and has no time, so the same content is the same archive.
type cpioWriter struct {
	w    *bufio.Writer
	ino  int
	dirs map[string]bool
}

func newCPIOWriter(w io.Writer) *cpioWriter {
	return &cpioWriter{w: bufio.NewWriter(w), dirs: map[string]bool{".": true, "/": true}}
}

// file adds a regular file, after the directories that lead to it.
func (c *cpioWriter) file(name string, perm uint32, size int64, content io.Reader) error {
	if err := c.parents(name); err != nil {
		return err
	}
	return c.entry(name, unix.S_IFREG|perm, size, content)
}

// device adds a character device.
func (c *cpioWriter) device(name string, perm, major, minor uint32) error {
	if err := c.parents(name); err != nil {
		return err
	}
	return c.header(name, unix.S_IFCHR|perm, 0, major, minor)
}

// parents adds the directories above name that are not there yet: the kernel does not make them up.
func (c *cpioWriter) parents(name string) error {
	dir := path.Dir(strings.TrimPrefix(name, "/"))
	if c.dirs[dir] {
		return nil
	}
	if err := c.parents(dir); err != nil {
		return err
	}
	c.dirs[dir] = true
	return c.entry(dir, unix.S_IFDIR|0o755, 0, strings.NewReader(""))
}

func (c *cpioWriter) entry(name string, mode uint32, size int64, content io.Reader) error {
	if size >= 1<<32 {
		return fmt.Errorf("archive %s: %d bytes is more than newc can hold", name, size)
	}
	if err := c.header(name, mode, size, 0, 0); err != nil {
		return err
	}
	if n, err := io.Copy(c.w, content); err != nil || n != size {
		return fmt.Errorf("archive %s: copied %d of %d bytes: %w", name, n, size, err)
	}
	return c.pad(size)
}

func (c *cpioWriter) header(name string, mode uint32, size int64, major, minor uint32) error {
	name = strings.TrimPrefix(name, "/")
	c.ino++
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
	n, err := fmt.Fprintf(c.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.ino, mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
	if err != nil {
		return err
	}
	return c.pad(int64(n))
}

// pad fills up to a multiple of four bytes, which headers and contents both start on.
func (c *cpioWriter) pad(written int64) error {
	_, err := c.w.Write(make([]byte, -written&3))
	return err
}

// close writes the trailer.
func (c *cpioWriter) close() error {
	if err := c.header("TRAILER!!!", 0, 0, 0, 0); err != nil {
		return err
	}
	return c.w.Flush()
}

// hostFile adds a copy of a file of the host.
func (c *cpioWriter) hostFile(name string, perm uint32, source string) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return c.file(name, perm, info.Size(), f)
}

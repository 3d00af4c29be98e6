package fusebridge

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
)

// compare compares the tree under node with dir: names, types, modes, sizes, links, targets and contents.
func compare(t *testing.T, c *fsbackendtest.Client, node uint64, dir string) (files int) {
	t.Helper()
	want, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.List(t, node, 8192); len(got) != len(want) {
		t.Errorf("%s: lists %d names, expected %d: %v", dir, len(got), len(want), got)
	}
	for _, w := range want {
		path := filepath.Join(dir, w.Name())
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Fatal(err)
		}
		e, errno := c.Lookup(node, w.Name())
		if errno != 0 {
			t.Errorf("%s: LOOKUP: %v", path, errno)
			continue
		}
		files++
		a, errno := c.Getattr(e.NodeId)
		if errno != 0 || a.Mode != st.Mode || a.Uid != st.Uid || a.Mode&unix.S_IFMT != unix.S_IFDIR && a.Size != uint64(st.Size) {
			t.Errorf("%s: mode %o, owner %d, size %d, errno %v, expected %o, %d, %d", path, a.Mode, a.Uid, a.Size, errno, st.Mode, st.Uid, st.Size)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			files += compare(t, c, e.NodeId, path)
		case unix.S_IFLNK:
			target, _ := os.Readlink(path)
			if got, errno := c.Readlink(e.NodeId); errno != 0 || got != target {
				t.Errorf("%s points to %q, %v", path, got, errno)
			}
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got := contents(t, c, e.NodeId); !bytes.Equal(got, data) {
				t.Errorf("%s: %d bytes, expected %d, or others", path, len(got), len(data))
			}
		}
		c.R.Forget(e.NodeId, 1)
	}
	return files
}

// contents reads a file in pieces of a guest's largest read.
func contents(t *testing.T, c *fsbackendtest.Client, node uint64) (all []byte) {
	t.Helper()
	fh, errno := c.Open(node, unix.O_RDONLY)
	if errno != 0 {
		t.Fatalf("OPEN: %v", errno)
	}
	defer c.Release(node, fh)
	for {
		b, errno := c.Read(node, fh, uint64(len(all)), 1<<20)
		if errno != 0 {
			t.Fatalf("READ at %d: %v", len(all), errno)
		}
		if len(b) == 0 {
			return all
		}
		all = append(all, b...)
	}
}

func TestSquashfuse(t *testing.T) {
	dir := tree(t)
	image := filepath.Join(t.TempDir(), "image")
	run(t, "mksquashfs", dir, image, "-quiet", "-no-progress")
	for _, name := range []string{"squashfuse", "squashfuse_ll"} {
		t.Run(name, func(t *testing.T) {
			c, s := client(t, command(name, "-f", image, mnt), Config{})
			for range 2 {
				if n := compare(t, c, fsbackendtest.Root, dir); n < 170 {
					t.Errorf("compared %d files", n)
				}
			}
			t.Logf("minor %d, flags %#x, READ %d, WRITE %d", s.current.Load().minor, s.current.Load().flags, s.current.Load().maxRead, s.current.Load().maxWrite)
		})
	}
}

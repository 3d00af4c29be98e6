package fusebridge

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/internal/testguest/sshd"
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

func TestFuseOverlayfsTree(t *testing.T) {
	lower, upper, work := tree(t), t.TempDir(), t.TempDir()
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", lower, upper, work)
	c, _ := client(t, command("fuse-overlayfs", "-f", "-o", options, mnt), Config{})
	if n := compare(t, c, fsbackendtest.Root, lower); n < 170 {
		t.Errorf("compared %d files", n)
	}
	roundTrip(t, c, "") // upper has marks of its own besides
}

// TestGocryptfsTree writes a tree, ends the program and has another one read it.
func TestGocryptfsTree(t *testing.T) {
	dir, cipher := tree(t), t.TempDir()
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "gocryptfs", "-init", "-q", "-passfile", password, "-scryptn", "10", cipher)
	c, s := client(t, command("gocryptfs", "-fg", "-q", "-passfile", password, "-allow_other", cipher, mnt), Config{RestartWait: 30 * time.Second})
	fill(t, c, fsbackendtest.Root, dir)
	compare(t, c, fsbackendtest.Root, dir)
	roundTrip(t, c, "")
	want := c.List(t, fsbackendtest.Root, 8192)
	s.kill(t)
	if got := c.List(t, fsbackendtest.Root, 8192); len(got) != len(want) {
		t.Errorf("lists %d names when it had ended, %d before", len(got), len(want))
	}
	data, err := os.ReadFile(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	e, errno := c.Lookup(fsbackendtest.Root, "big")
	if errno != 0 {
		t.Fatal(errno)
	}
	if got := contents(t, c, e.NodeId); !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, expected %d, or others", len(got), len(data))
	}
}

// fill copies dir to node.
func fill(t *testing.T, c *fsbackendtest.Client, node uint64, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		mode := uint32(info.Mode().Perm())
		switch {
		case e.IsDir():
			made, errno := c.Mkdir(node, e.Name(), mode)
			if errno != 0 {
				t.Fatalf("MKDIR %s: %v", path, errno)
			}
			fill(t, c, made.NodeId, path)
		case info.Mode()&os.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			if _, errno := c.Symlink(node, e.Name(), target); errno != 0 {
				t.Fatalf("SYMLINK %s: %v", path, errno)
			}
		default:
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			out, errno := c.Create(node, e.Name(), unix.O_RDWR|unix.O_EXCL, mode)
			if errno != 0 {
				t.Fatalf("CREATE %s: %v", path, errno)
			}
			if n, errno := c.Write(out.NodeId, out.Fh, 0, data, unix.O_RDWR); errno != 0 || int(n) != len(data) {
				t.Fatalf("WRITE %s: %d bytes, %v", path, n, errno)
			}
			c.Release(out.NodeId, out.Fh)
		}
	}
}

// TestSshfs serves a directory by way of an SSH server on loopback.
func TestSshfs(t *testing.T) {
	dir := tree(t)
	server, err := sshd.Start(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	p := command(append(append([]string{"sshfs", "-f"}, server.Options(dir)...), mnt)...)
	p.Confine.Network = true
	c, s := client(t, p, Config{RestartWait: 30 * time.Second})
	if n := compare(t, c, fsbackendtest.Root, dir); n < 170 {
		t.Errorf("compared %d files", n)
	}
	roundTrip(t, c, dir)
	s.kill(t)
	if n := compare(t, c, fsbackendtest.Root, dir); n < 170 {
		t.Errorf("compared %d files when it had ended", n)
	}
}

// roundTrip writes a tree through the bridge and compares what has arrived in dir.
func roundTrip(t *testing.T, c *fsbackendtest.Client, dir string) {
	t.Helper()
	made, errno := c.Mkdir(fsbackendtest.Root, "made", 0o755)
	if errno != 0 {
		t.Fatal(errno)
	}
	data := bytes.Repeat([]byte("0123456789"), 70_000)
	for i := range 10 {
		name := fmt.Sprint("file", i)
		out, errno := c.Create(made.NodeId, name, unix.O_RDWR|unix.O_EXCL, 0o640)
		if errno != 0 {
			t.Fatal(errno)
		}
		part := data[:len(data)/(i+1)]
		n, errno := c.Write(out.NodeId, out.Fh, 0, part, unix.O_RDWR)
		if errno != 0 || int(n) != len(part) {
			t.Fatalf("WRITE took %d of %d bytes: %v", n, len(part), errno)
		}
		if errno := c.Flush(out.NodeId, out.Fh); errno != 0 {
			t.Fatal(errno)
		}
		c.Release(out.NodeId, out.Fh)
		if got := contents(t, c, out.NodeId); !bytes.Equal(got, part) {
			t.Errorf("%s holds %d bytes, expected %d", name, len(got), len(part))
		}
	}
	if dir != "" {
		compare(t, c, made.NodeId, filepath.Join(dir, "made"))
	}
}

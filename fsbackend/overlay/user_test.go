package overlay

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
)

const (
	userID  = 65534
	userEnv = "SLUICE_TEST_USER"
)

// TestAsOrdinaryUser runs tests that are not root's again as an ordinary user, whose marks are in user.* and whose files are its
// own.
func TestAsOrdinaryUser(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv(userEnv) == "" {
			t.Log("running as an ordinary user already")
		}
		return
	}
	tmp, err := os.MkdirTemp("", "sluice-user")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	if err := os.Chown(tmp, userID, userID); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run", "^(TestConformance|TestOrdinaryUser|TestReadOnly|TestInodeNumbers|TestLinkCounts|TestOpenBeforeCopyUp)$")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), userEnv+"=1", "TMPDIR="+tmp, "HOME="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: userID, Gid: userID}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "--- PASS: TestOrdinaryUser") {
		t.Fatalf("the ordinary user's tests did not run:\n%s", out)
	}
}

// TestOrdinaryUser makes whiteouts, opaque directories and redirects, and finds them again.
func TestOrdinaryUser(t *testing.T) {
	changes(t, func(c *Config) { c.Format = FormatUser })
}

// TestWithoutDevices has whiteouts be files where the upper layer cannot have devices.
func TestWithoutDevices(t *testing.T) {
	s := changes(t, func(c *Config) { c.Upper = &noDevices{c.Upper.(*passthrough.FS)} })
	for _, name := range []string{".wh.f", ".wh.d", "e/.wh.x"} {
		if st, err := os.Lstat(s.upper + "/" + name); err != nil || !st.Mode().IsRegular() {
			t.Errorf("the upper layer lacks the whiteout %s: %v", name, err)
		}
	}
}

// TestFuseFormat has marks be fuse-overlayfs'.
func TestFuseFormat(t *testing.T) {
	s := changes(t, func(c *Config) { c.Format = FormatFuse })
	buf := make([]byte, 10)
	if n, err := unix.Lgetxattr(s.upper+"/g", "user.fuseoverlayfs.opaque", buf); err != nil || string(buf[:n]) != "y" {
		t.Errorf("the new directory is marked %q, %v", buf[:max(n, 0)], err)
	}
}

// changes makes changes that leave marks of all kinds, and looks at the tree before and after it is opened again.
func changes(t *testing.T, configure func(*Config)) *stack {
	t.Helper()
	s := newStack(t, 1)
	put(t, s.lowers[0], 0, "f", "g/", "g/x", "d/", "d/y", "e/", "e/x", "e/z", "k", "r/", "r/y", "q")
	open := func() *ourTree {
		cfg := s.config(t)
		cfg.Format = FormatUser
		configure(&cfg)
		return newOurTree(newOverlay(t, cfg))
	}
	o := open()
	for _, err := range []error{
		o.unlink("f"), o.unlink("g/x"), o.rmdir("g"), o.mkdir("g", 0o755), o.rename("d", "moved", 0), o.unlink("e/x"),
		o.rename("k", "e/k", 0), o.unlink("q"), o.create("q", 0o644), o.unlink("r/y"), o.rename("moved", "r", 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	expected := []string{"e/", "e/k", "e/z", "g/", "q", "r/", "r/y"}
	if got := o.names(t); !slices.Equal(got, expected) {
		t.Errorf("the tree has %q, expected %q", got, expected)
	}
	if err := o.fs.check(); err != nil {
		t.Error(err)
	}
	_ = o.fs.Close()
	o = open()
	if got := o.names(t); !slices.Equal(got, expected) {
		t.Errorf("opened again, the tree has %q, expected %q", got, expected)
	}
	_ = o.fs.Close()
	return s
}

// noDevices is a backend whose file system refuses devices.
type noDevices struct{ *passthrough.FS }

func (n *noDevices) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) errno {
	if in.Mode&unix.S_IFMT == unix.S_IFCHR {
		return unix.EPERM
	}
	return n.FS.Mknod(c, in, name, out)
}

func (n *noDevices) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, a, b fsbackend.Name) errno {
	if in.Flags&unix.RENAME_WHITEOUT != 0 {
		return unix.EINVAL
	}
	return n.FS.Rename(c, in, a, b)
}

// TestRefusedConfigs is what New does not take, and it closes what it was given.
func TestRefusedConfigs(t *testing.T) {
	lower := func() []Layer { return []Layer{{Backend: newMem(t)}} }
	for what, cfg := range map[string]Config{
		"no lower layer":        {Upper: newMem(t)},
		"a layer of nothing":    {Lowers: []Layer{{Name: "x"}}},
		"no work directory":     {Upper: newPassthrough(t, t.TempDir(), ""), Lowers: lower()},
		"an unknown format":     {Lowers: lower(), Format: 9},
		"overlapping id map":    {Lowers: lower(), UIDMap: IDMap{{0, 0, 10}, {5, 100, 1}}},
		"an empty id range":     {Lowers: lower(), GIDMap: IDMap{{0, 0, 0}}},
		"negative inodes":       {Lowers: lower(), MaxInodes: -1},
		"too many lowers":       {Lowers: slices.Repeat(lower(), MaxLowers+1)},
		"a file as the upper":   {Lowers: lower(), Upper: &onlyReads{newMem(t)}},
		"a root that is none":   {Lowers: []Layer{{Backend: newMem(t), Root: 99}}},
		"a work that is none":   {Lowers: lower(), Upper: newMem(t), Work: 99},
		"unstable, but xino=on": {Lowers: lower(), Xino: XinoOn},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s was taken", what)
		}
	}
}

// onlyReads is a backend that has the least there is.
type onlyReads struct{ *mem.FS }

func (onlyReads) Mknod() {}

// TestInodeLimit has the guest know no more files than it may.
func TestInodeLimit(t *testing.T) {
	lower := newMem(t)
	for _, name := range []string{"a", "b", "c"} {
		if err := lower.WriteFile(name, nil); err != nil {
			t.Fatal(err)
		}
	}
	o := newOurTree(newOverlay(t, Config{Lowers: []Layer{{Backend: lower}}, MaxInodes: 2}))
	defer o.fs.Close()
	a, _ := o.Lookup(root, "a")
	_, e := o.Lookup(root, "b")
	if _, e2 := o.Lookup(root, "c"); e != 0 || e2 != unix.ENFILE {
		t.Errorf("LOOKUP of a second and third file: %v, %v, expected OK and ENFILE", e, e2)
	}
	o.fs.Forget(a.NodeId, 1)
	if _, e := o.Lookup(root, "c"); e != 0 {
		t.Errorf("LOOKUP after FORGET: %v", e)
	}
	if got := lower.Stats().Inodes; got != 3 {
		t.Errorf("the layer knows %d files, expected 3", got)
	}
}

// TestMetacopy refuses files whose data is elsewhere.
func TestMetacopy(t *testing.T) {
	needRoot(t)
	s := newStack(t, 2)
	put(t, s.lowers[0], 0, "d/", "d/f", "d/g", "d=trusted.overlay.impure:y", "d/f=trusted.overlay.metacopy:")
	put(t, s.lowers[1], 1, "d/", "d/f")
	o := s.open(t)
	defer o.fs.Close()
	if _, err := o.walk("d/f"); err != unix.EIO {
		t.Errorf("LOOKUP of a metacopy file: %v, expected EIO", err)
	}
	if _, err := o.walk("d/g"); err != nil {
		t.Errorf("LOOKUP of its neighbour: %v", err)
	}
}

// noTmpfile is a backend whose file system has no files without a name, or, with links, cannot give them one.
type noTmpfile struct {
	*passthrough.FS
	links bool
}

func (n *noTmpfile) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) errno {
	if n.links {
		return n.FS.Tmpfile(c, in, out)
	}
	return unix.EOPNOTSUPP
}

func (n *noTmpfile) Link(c *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) errno {
	if n.links {
		return unix.EPERM
	}
	return n.FS.Link(c, in, name, out)
}

// TestWithoutTmpfile has copies be made by name where they cannot be made without.
func TestWithoutTmpfile(t *testing.T) {
	for _, links := range []bool{false, true} {
		s := newStack(t, 1)
		put(t, s.lowers[0], 0, "d/", "d/f", "g")
		cfg := s.config(t)
		cfg.Upper = &noTmpfile{cfg.Upper.(*passthrough.FS), links}
		o := newOurTree(newOverlay(t, cfg))
		for _, path := range []string{"d/f", "g"} {
			if err := o.write(path, 0, "W"); err != nil {
				t.Errorf("write %s: %v", path, err)
			}
			if data, err := os.ReadFile(s.upper + "/" + path); err != nil || string(data) != "W"+(path + " of 0")[1:] {
				t.Errorf("the copy of %s holds %q, %v", path, data, err)
			}
		}
		if err := o.fs.check(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(s.work); err != nil || len(left) > 0 {
			t.Errorf("the work directory has %v, %v", left, err)
		}
		_ = o.fs.Close()
	}
}

// TestWorkIsCleaned has what a crash has left in the work directory go, and nothing else.
func TestWorkIsCleaned(t *testing.T) {
	s := newStack(t, 1)
	put(t, s.work, 0, "#1/", "#1/.wh.x", "#1/sub/", "#2", "mine")
	o := newOurTree(newOverlay(t, s.config(t)))
	defer o.fs.Close()
	left, err := os.ReadDir(s.work)
	if err != nil || len(left) != 1 || left[0].Name() != "mine" {
		t.Errorf("the work directory has %v, %v, expected what is not the overlay's", left, err)
	}
}

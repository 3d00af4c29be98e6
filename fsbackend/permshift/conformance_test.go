package permshift

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/fuseproto"
)

func TestMain(m *testing.M) {
	unix.Umask(0) // as the daemon does
	os.Exit(m.Run())
}

const (
	userID  = 65534
	userEnv = "SLUICE_TEST_USER"
)

// TestAsOrdinaryUser runs every test again as who has one user's storage and no privileges.
func TestAsOrdinaryUser(t *testing.T) {
	if os.Getuid() != 0 {
		return
	}
	tmp, err := os.MkdirTemp("", "sluice-permshift")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	if err := os.Chown(tmp, userID, userID); err != nil {
		t.Fatal(err)
	}
	// What is in memory is the same for everybody.
	cmd := exec.Command("/proc/self/exe", "-test.v", "-test.skip", "^TestConformance$/^(mem|reluctant)|^TestStacked$|^TestAllocatesNothing$")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), userEnv+"=1", "TMPDIR="+tmp, "HOME="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: userID, Gid: userID}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestOrdinaryUser") {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestOrdinaryUser: without any privilege, a guest's users own what they make, and may give it away.
func TestOrdinaryUser(t *testing.T) {
	if os.Getuid() == 0 {
		return // see TestAsOrdinaryUser
	}
	if os.Getenv(userEnv) == "" {
		t.Log("running as an ordinary user already")
	}
	c := serve(t, t.TempDir(), Config{Format: ContainersOverride})
	user := c.As(1000, 1001)
	d, errno := user.Mkdir(root, "d", 0o700)
	want(t, errno, "MKDIR", fsbackend.OK)
	f, errno := user.Create(d.NodeId, "f", unix.O_RDWR, 0o600)
	want(t, errno, "CREATE", fsbackend.OK)
	dev, errno := c.Mknod(d.NodeId, "null", unix.S_IFCHR|0o666, uint32(unix.Mkdev(1, 3)))
	want(t, errno, "MKNOD", fsbackend.OK)
	l, errno := user.Symlink(d.NodeId, "l", "x")
	want(t, errno, "SYMLINK", fsbackend.OK)
	if d.Uid != 1000 || f.Gid != 1001 || dev.Uid != 0 || dev.Mode != unix.S_IFCHR|0o666 || l.Uid != uint32(os.Getuid()) {
		t.Errorf("owners %d, group %d, device %d, mode %#o, link %d", d.Uid, f.Gid, dev.Uid, dev.Mode, l.Uid)
	}
	in := fuseproto.SetattrIn{}
	in.Valid, in.Uid, in.Gid = fuseproto.FATTR_UID|fuseproto.FATTR_GID, 7, 8
	for _, node := range []uint64{f.NodeId, l.NodeId, root} {
		a, errno := c.Setattr(node, in)
		want(t, errno, "SETATTR of the owner", fsbackend.OK)
		if node != l.NodeId && (a.Uid != 7 || a.Gid != 8) {
			t.Errorf("it belongs to %d:%d, expected 7:8", a.Uid, a.Gid)
		}
	}
}

func newMem(t testing.TB) fsbackend.Backend {
	t.Helper()
	b, err := mem.New(mem.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newPassthrough(t testing.TB, dir string) fsbackend.Backend {
	t.Helper()
	b, err := passthrough.New(passthrough.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// over makes the layer over b, which it closes if it fails.
func over(t testing.TB, b fsbackend.Backend, cfg Config) *FS {
	t.Helper()
	f, err := New(b, cfg)
	if err != nil {
		_ = b.Close()
		t.Fatal(err)
	}
	return f
}

// reluctant is a backend whose extended attributes take a thread that may sleep.
type reluctant struct{ fsbackend.Forward }

func (r reluctant) Getxattr(c *fsbackend.Context, in *fuseproto.GetxattrIn, name fsbackend.Name, dst *fsbackend.Sink) (uint32, fsbackend.Errno) {
	if !c.MayBlock {
		return 0, fsbackend.ErrMayBlock
	}
	return r.Forward.Getxattr(c, in, name, dst)
}

func (r reluctant) Setxattr(c *fsbackend.Context, in *fuseproto.SetxattrIn, name fsbackend.Name, value []byte) fsbackend.Errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	return r.Forward.Setxattr(c, in, name, value)
}

func TestConformance(t *testing.T) {
	for name, newBackend := range map[string]func(testing.TB) fsbackend.Backend{
		"mem": newMem,
		"reluctant": func(t testing.TB) fsbackend.Backend {
			return reluctant{fsbackend.Forward{Inner: fsbackend.Resolve(newMem(t))}}
		},
		"passthrough": func(t testing.TB) fsbackend.Backend { return newPassthrough(t, t.TempDir()) },
	} {
		for _, format := range []Format{Off, OriginalPermissions, SecurityOverride, ContainersOverride, UserOverride} {
			switch {
			case name == "reluctant" && format != ContainersOverride:
				continue
			case name == "passthrough" && format != ContainersOverride && (format != OriginalPermissions || os.Getuid() != 0):
				continue // it waits for the disk, and formats differ in what is kept where, which mem knows as well
			}
			t.Run(name+"/"+format.String(), func(t *testing.T) {
				fsbackendtest.Run(t, fsbackendtest.Config{
					New: func(t *testing.T) fsbackend.Backend {
						return over(t, newBackend(t), Config{Format: format})
					},
					AsRoot:      name != "passthrough" || os.Getuid() == 0,
					SparseBlock: 4096,
				})
			})
		}
	}
}

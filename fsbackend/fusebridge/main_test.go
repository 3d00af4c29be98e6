package fusebridge

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	gofs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/goleak"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/internal/program"
)

// role is the environment variable that makes this binary a FUSE program: go-fuse's loopback on the directory that is its value.
const role = "FUSEBRIDGE_TEST_LOOPBACK"

// mountRole is where it mounts, if not on the descriptor.
const mountRole = "FUSEBRIDGE_TEST_MOUNT"

func TestMain(m *testing.M) {
	program.MaybeConfine()
	if dir, ok := os.LookupEnv(role); ok {
		mount := "/dev/fd/3"
		if m := os.Getenv(mountRole); m != "" {
			mount = m
		}
		if err := loopback(dir, mount); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// loopback serves dir at the mount point until it is unmounted.
func loopback(dir, mount string) error {
	syscall.Umask(0)
	root, err := gofs.NewLoopbackRoot(dir)
	if err != nil {
		return err
	}
	second := time.Second
	server, err := gofs.Mount(mount, root, &gofs.Options{
		EntryTimeout: &second, AttrTimeout: &second, NullPermissions: true,
		MountOptions: fuse.MountOptions{MaxWrite: 1 << 20, EnableLocks: true, DirectMount: true, AllowOther: mount[0] == '/' && !strings.HasPrefix(mount, "/dev/fd/")},
	})
	if err != nil {
		return err
	}
	server.Wait()
	return nil
}

// mnt is replaced in a command by where the program finds its socket.
const mnt = "{mnt}"

// command is a program and its arguments, confined as the daemon has them.
func command(args ...string) program.Config {
	c := program.Config{
		Name: filepath.Base(args[0]), Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
		Confine: program.Confinement{Seccomp: true, Caps: fileCaps},
		Backoff: program.Backoff{First: 10 * time.Millisecond, Max: 100 * time.Millisecond},
	}
	for _, a := range args {
		c.Args = append(c.Args, strings.ReplaceAll(a, mnt, fmt.Sprintf("/dev/fd/%d", program.FD)))
	}
	return c
}

// fileCaps are CAP_CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
const fileCaps = 1<<0 | 1<<1 | 1<<2 | 1<<3 | 1<<4 | 1<<6 | 1<<7 | 1<<27 | 1<<31

// loopbackOn is go-fuse's loopback on dir.
func loopbackOn(dir string) program.Config {
	c := command(os.Args[0])
	c.Name = "loopback"
	c.Env = append(program.DefaultEnv(), role+"="+dir)
	return c
}

// served is a bridge and its program. Closing the backend ends both.
type served struct {
	*Bridge
	sup  *program.Supervisor
	line *program.Line
}

func (s *served) Close() error {
	err := s.Bridge.Close()
	_ = s.sup.Stop(context.Background())
	_ = s.line.Close()
	return err
}

// serve starts a program and a bridge to it.
func serve(t testing.TB, p program.Config, cfg Config) *served {
	t.Helper()
	sup, err := program.Start(context.Background(), p)
	if err != nil {
		t.Fatal(err)
	}
	line := program.NewLine(sup.Line())
	cfg.Line = line
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	b, err := New(ctx, cfg)
	if err != nil {
		_ = sup.Stop(ctx)
		_ = line.Close()
		t.Fatalf("%v; the program: %s", err, sup.Status().Last)
	}
	return &served{b, sup, line}
}

// client is a client of a bridge that the test's end closes.
func client(t testing.TB, p program.Config, cfg Config) (*fsbackendtest.Client, *served) {
	t.Helper()
	s := serve(t, p, cfg)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &fsbackendtest.Client{R: fsbackend.Resolve(s)}, s
}

// tree makes a directory with files of many kinds and sizes.
func tree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	for d := range 5 {
		sub := filepath.Join(dir, fmt.Sprintf("dir%d", d), "sub")
		must(os.MkdirAll(sub, 0o755))
		for f := range 30 {
			data := []byte(strings.Repeat(fmt.Sprintf("%d/%d ", d, f), f*f*20))
			must(os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%d", f)), data, fs.FileMode(0o600+f%8*8)))
		}
		must(os.Symlink(strings.Repeat("x", 10+d), filepath.Join(sub, "link")))
		must(os.Link(filepath.Join(sub, "file3"), filepath.Join(dir, fmt.Sprintf("hard%d", d))))
	}
	big := make([]byte, 3<<20)
	for i := range big {
		big[i] = byte(i * 7 >> 3)
	}
	must(os.WriteFile(filepath.Join(dir, "big"), big, 0o644))
	must(os.WriteFile(filepath.Join(dir, "empty"), nil, 0o644))
	return dir
}

// run runs a command that must succeed.
func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
}

// Package escape_test attacks a daemon as a guest that lies: raw FUSE requests, any bytes of them, through a real vhost-user
// connection and a real virtqueue in shared memory. Nothing outside the share may be read, changed or created.
//
// Each test has its own scratch directory with the share, and beside it what must not be reached (scene_test.go), and a daemon of
// its own for each of the configurations. However it went, the end is the same: what lies outside is as it was, to the last time
// stamp; no reply has held a byte of a secret; the daemon still serves and holds no more descriptors than before.
//
// The daemon is $SLUICED, or else ./cmd/sluiced built here. The tests need root, for mounts, device nodes and daemons of several users.
package escape_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
)

// configuration is a way to run the daemon.
type configuration struct {
	name    string
	options []string
	// uid is the user and the group that it runs as.
	uid uint32
	// managed has a control socket: what is served can change, and comes to the serving process by descriptors.
	managed bool
	// rare leaves it out, but with SLUICE_FULL or where system calls are traced.
	rare bool
}

// nobody is a user without any privilege.
const nobody = 65534

// configurations are all that every attack is tried on: a sandbox gets a row, and no test needs to know. The seccomp filter is
// in force in each but the first.
var configurations = []configuration{
	{name: "none", options: []string{"--sandbox", "none", "--seccomp", "none"}},
	// With the fewest descriptors nodes lose theirs and are found again, by file handle or, without privilege, by name.
	{name: "none few descriptors", options: []string{"--sandbox", "none", "--max-fds", "8"}},
	{name: "none unprivileged", options: []string{"--sandbox", "none", "--max-fds", "8"}, uid: nobody},
	{name: "chroot", options: []string{"--sandbox", "chroot"}},
	{name: "namespace", options: []string{"--sandbox", "namespace"}},
	{name: "namespace unprivileged", options: []string{"--sandbox", "namespace", "--max-fds", "8"}, uid: nobody},

	{name: "none managed", rare: true, options: []string{"--sandbox", "none", "--max-fds", "8"}, managed: true},
	{name: "chroot managed", rare: true, options: []string{"--sandbox", "chroot"}, managed: true},
	{name: "namespace managed", options: []string{"--sandbox", "namespace"}, managed: true},
	{name: "none unprivileged managed", rare: true, options: []string{"--sandbox", "none", "--max-fds", "8"}, uid: nobody, managed: true},
	{name: "namespace unprivileged managed", options: []string{"--sandbox", "namespace"}, uid: nobody, managed: true},
}

// surroundings are the user and the sandbox, named as in test/guest.
func (c configuration) surroundings() string {
	user := "root"
	if c.uid != 0 {
		user = "user"
	}
	return user + "+" + strings.Fields(c.name)[0]
}

// What TestMain has made ready for all tests.
var (
	program string // the daemon
	base    string // scratch directories are made in it, a file system of its own
)

func TestMain(m *testing.M) {
	if os.Getenv("SLUICE_FULL") != "" {
		raceTime = 2 * time.Second
	}
	if os.Getenv("SLUICE_FULL") == "" && testguest.TraceDir() == "" {
		configurations = slices.DeleteFunc(configurations, func(c configuration) bool { return c.rare })
	}
	run := runConfined
	if base = os.Getenv(baseVariable); base == "" {
		run = confine
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintf(os.Stderr, "escape tests: %v\n", err)
		code = 1
	}
	os.Exit(code)
}

// baseVariable is set in the environment of the process that runs the tests.
const baseVariable = "SLUICE_ESCAPE_BASE"

// confine runs this program again in namespaces of its own, where the tests are. A daemon that fails them does not do so to the machine:
// there, all but the tests' own file system is read-only, and /proc leads to nobody else's.
func confine(*testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("not root: expected `make test-guest`, which sees to it, or sudo")
	}
	dir, err := os.MkdirTemp("", "sluice-escape-")
	if err != nil {
		return 1, err
	}
	defer os.Remove(dir)
	if program = os.Getenv("SLUICED"); program == "" {
		var remove func()
		if program, remove, err = testguest.BuildDaemon("github.com/sluicefs/sluice/cmd/sluiced"); err != nil {
			return 1, err
		}
		defer remove()
	}
	// The child dies with this thread.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", slices.DeleteFunc(os.Args[1:], func(arg string) bool {
		return strings.HasPrefix(arg, "-test.testlogfile=") // it could not be written
	})...)
	cmd.Env = append(os.Environ(), baseVariable+"="+dir, "SLUICED="+program)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID, Pdeathsig: unix.SIGKILL}
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() > 0 {
			return exit.ExitCode(), nil
		}
		return 1, err
	}
	return 0, nil
}

// runConfined runs the tests, in the namespaces that confine has made.
func runConfined(m *testing.M) (code int, err error) {
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("proc", "/proc", "proc", 0, "")); err != nil {
		return 1, fmt.Errorf("mount /proc of the new process namespace: %w", err)
	}
	trace := testguest.TraceDir()
	if trace != "" {
		if err := unix.Mount(trace, trace, "", unix.MS_BIND, ""); err != nil {
			return 1, fmt.Errorf("bind mount %s: %w", trace, err)
		}
	}
	readOnly := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &readOnly); err != nil {
		return 1, fmt.Errorf("make all file systems read-only: %w", err)
	}
	// An ordinary user's daemon writes its id maps there.
	if err := unix.MountSetattr(unix.AT_FDCWD, "/proc", 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return 1, fmt.Errorf("make /proc writable: %w", err)
	}
	if trace != "" {
		if err := unix.MountSetattr(unix.AT_FDCWD, trace, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return 1, fmt.Errorf("make %s writable: %w", trace, err)
		}
	}
	// Shared, so that a daemon in a mount namespace of its own hears of mounts that come and go.
	if err := errors.Join(unix.Mount("tmpfs", base, "tmpfs", 0, "mode=0755"), unix.Mount("", base, "", unix.MS_SHARED, "")); err != nil {
		return 1, fmt.Errorf("mount a file system on %s: %w", base, err)
	}
	// It is to be run by a user who may not look into the directory that it is in.
	text, err := os.ReadFile(os.Getenv("SLUICED"))
	if err != nil {
		return 1, err
	}
	program = filepath.Join(base, "sluiced")
	if err := os.WriteFile(program, text, 0o755); err != nil {
		return 1, err
	}
	if code = m.Run(); code == 0 {
		err = goleak.Find()
	}
	return code, err
}

// attack runs a test against a daemon of each configuration.
func attack(t *testing.T, test func(s *scene)) {
	t.Parallel()
	for _, cfg := range configurations {
		t.Run(cfg.name, func(t *testing.T) {
			t.Parallel()
			test(newScene(t, cfg))
		})
	}
}

// TestConfined checks that a daemon that fails a test cannot do so to the machine.
func TestConfined(t *testing.T) {
	for _, dir := range []string{"/", "/etc", "/proc/1/root", "/proc/self/root/etc", filepath.Dir(base)} {
		if err := unix.Access(dir, unix.W_OK); err != unix.EROFS {
			t.Errorf("access to %s: %v, expected a read-only file system", dir, err)
		}
	}
	if os.Getpid() != 1 {
		t.Errorf("process %d, expected the first of a namespace", os.Getpid())
	}
}

// Package escape_test attacks a daemon as a guest that lies: raw FUSE requests, any bytes of them, through a real vhost-user
// connection and a real virtqueue in shared memory. Nothing outside the share may be read, changed or created.
//
// Each test has its own scratch directory with the share, and beside it what must not be reached (scene_test.go), and a daemon of
// its own for each of the configurations. However it went, the end is the same: what lies outside is as it was, to the last time
// stamp; no reply has held a byte of a secret; the daemon still serves and holds no more descriptors than before.
//
// The daemon is $SLUICED, or else ./cmd/sluiced built here. The tests need root, for mounts (in a mount namespace of their own),
// device nodes and daemons of several users.
package escape_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

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
}

// nobody is a user without any privilege.
const nobody = 65534

// configurations are all that every attack is tried on: a sandbox, a seccomp filter gets a row, and no test needs to know.
var configurations = []configuration{
	{name: "none", options: []string{"--sandbox", "none"}},
	// With the fewest descriptors nodes lose theirs and are found again, by file handle or, without privilege, by name.
	{name: "none few descriptors", options: []string{"--sandbox", "none", "--max-fds", "8"}},
	{name: "none unprivileged", options: []string{"--sandbox", "none", "--max-fds", "8"}, uid: nobody},
}

// What TestMain has made ready for all tests.
var (
	program string // the daemon
	base    string // scratch directories are made in it, a mount of its own
)

func TestMain(m *testing.M) {
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintf(os.Stderr, "escape tests: %v\n", err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("not root: expected `sudo go test`, or `make test-guest`, which sees to it")
	}
	if err := enterNamespace(); err != nil {
		return 1, err
	}
	if program = os.Getenv("SLUICED"); program == "" {
		var remove func()
		if program, remove, err = testguest.BuildProgram("github.com/sluicefs/sluice/cmd/sluiced"); err != nil {
			return 1, err
		}
		defer remove()
		// It is to be run by a user who cannot look into a directory of root's.
		if err := os.Chmod(filepath.Dir(program), 0o755); err != nil {
			return 1, err
		}
	}
	// The daemon's working directory is not ours.
	if program, err = filepath.Abs(program); err != nil {
		return 1, err
	}
	if base, err = os.MkdirTemp("", "sluice-escape-"); err != nil {
		return 1, err
	}
	defer os.RemoveAll(base)
	// Shared, so that a daemon in a mount namespace of its own hears of mounts that come and go.
	if err := errors.Join(os.Chmod(base, 0o755), unix.Mount(base, base, "", unix.MS_BIND, ""), unix.Mount("", base, "", unix.MS_SHARED, "")); err != nil {
		return 1, fmt.Errorf("make %s a shared mount: %w", base, err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(base, unix.MNT_DETACH)) }()
	if code = m.Run(); code == 0 {
		err = goleak.Find()
	}
	return code, err
}

// inNamespace is set in the environment of the process that has its own mount namespace.
const inNamespace = "SLUICE_ESCAPE_NAMESPACE"

// enterNamespace starts the test program anew with a mount namespace of its own: mounts end with the tests, whatever happens.
// unshare(2) is for one thread, and that one alone survives execve(2).
func enterNamespace() error {
	if os.Getenv(inNamespace) != "" {
		return nil
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts from other namespaces: %w", err)
	}
	return syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), inNamespace+"=1"))
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

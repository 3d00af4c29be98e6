// Package guest_test runs a daemon in front of real Linux guests, of both kinds, and looks at what they see.
//
// The daemon is $SLUICED, or else ./cmd/sluiced built here. Everything is of a size that `make test` can afford on two CPUs without
// hardware virtualisation; with SLUICE_FULL set (`make test-guest-full`) each test takes its full size, and all that can be is done in
// both kinds of guest.
package guest_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/testguest"
)

// size is how much a test does: in `make test`, and in a full run.
type size struct{ usual, full int }

func (s size) n() int {
	if full() {
		return s.full
	}
	return s.usual
}

func full() bool { return os.Getenv("SLUICE_FULL") != "" }

var (
	kinds = []testguest.Kind{testguest.UML, testguest.QEMU}

	// What TestMain has made ready for all tests.
	kit     testguest.Kit
	initrd  string
	program string // the daemon
	extd    string // the same with extensions for tests
	fetch   string // what fetches images for the daemon
)

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintf(os.Stderr, "guest tests: %v\n", err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	if err := chooseSurroundings(); err != nil {
		return 1, err
	}
	if around.uid != 0 && around.ranges && os.Getenv(subIDsGiven) == "" {
		return withSubIDs()
	}
	if kit, err = testguest.FindKit(); err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "sluice-guest-tests-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	build := func(to *string, with func(string) (string, func(), error), pkg string) {
		if err != nil {
			return
		}
		var remove func()
		if *to, remove, err = with(pkg); err == nil {
			cleanups = append(cleanups, remove)
		}
	}
	defer func() {
		for _, f := range cleanups {
			f()
		}
	}()
	var guestprog, posixtest, agent string
	build(&guestprog, testguest.BuildProgram, "github.com/sluicefs/sluice/test/guest/guestprog")
	build(&agent, testguest.BuildProgram, "github.com/sluicefs/sluice/cmd/sluice-agent")
	build(&posixtest, testguest.BuildTest, "github.com/hanwen/go-fuse/v2/posixtest")
	if program = os.Getenv("SLUICED"); program == "" {
		build(&program, testguest.BuildDaemon, "github.com/sluicefs/sluice/cmd/sluiced")
	}
	build(&fetch, testguest.BuildProgram, "github.com/sluicefs/sluice/cmd/sluice-fetch")
	build(&extd, testguest.BuildDaemon, "github.com/sluicefs/sluice/test/guest/extd")
	if err != nil {
		return 1, err
	}
	initrd = filepath.Join(dir, "initrd")
	if err := testguest.WriteInitramfs(initrd, kit, map[string]string{"guestprog": guestprog, "posixtest": posixtest, "sluice-agent": agent}); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

var cleanups []func()

// machine is a guest, the daemon that serves it, and the directory that both see.
type machine struct {
	t       *testing.T
	ctx     context.Context // ends shortly before the test's time is over
	serving context.Context // ends with the daemon too: a guest whose daemon has gone may hang for ever
	scratch string
	share   string
	daemon  *testguest.Daemon
	guest   *testguest.Guest
}

// own gives a file of the host to the guest's root.
func (m *machine) own(path string) { m.chown(path, 0, 0) }

// ownAll does so with all that the test has put into the share as the host's root.
func (m *machine) ownAll() {
	m.t.Helper()
	if around.uid == 0 {
		return
	}
	m.check(filepath.WalkDir(m.share, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err == nil && st.Uid == 0 {
			m.own(path)
		}
		return err
	}))
}

// chown gives a file of the host to users of the guest.
func (m *machine) chown(path string, uid, gid int) {
	m.t.Helper()
	m.check(os.Lchown(path, around.hostID(uid), around.hostID(gid)))
}

// newMachine starts a daemon with these options on an empty directory. The test sees what daemon and guest have said if it fails.
func newMachine(t *testing.T, options ...string) *machine {
	t.Helper()
	m := newScratch(t)
	m.check(m.start(testguest.DaemonConfig{Program: program, Share: m.share, Args: options}))
	return m
}

// newScratch makes the directories of a machine whose daemon is to be started yet.
func newScratch(t *testing.T) *machine {
	t.Helper()
	m := &machine{t: t}
	// The end of all the time there is must come as an error here: when go test ends the process, nobody cleans up.
	deadline, ok := t.Deadline()
	if !ok {
		deadline = time.Now().Add(time.Hour)
	}
	ctx, cancel := context.WithDeadline(context.Background(), deadline.Add(-20*time.Second))
	m.ctx = ctx
	t.Cleanup(cancel)
	// t.TempDir has too long a name for a socket.
	dir, err := os.MkdirTemp("", "sluice-")
	m.check(err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	m.scratch = dir
	m.share = filepath.Join(dir, "share")
	m.check(os.Mkdir(m.share, 0o755))
	m.check(os.Chmod(dir, 0o755))
	if around.uid != 0 {
		m.check(os.Chown(dir, int(around.uid), int(around.uid)))
		m.own(m.share)
	}
	return m
}

// start starts the daemon in the surroundings of this run.
func (m *machine) start(cfg testguest.DaemonConfig) (err error) {
	m.t.Helper()
	cfg.Scratch, cfg.UID, cfg.Args = m.scratch, around.uid, append(slices.Clone(around.options), cfg.Args...)
	cfg.Surroundings = around.name
	if m.daemon, err = testguest.StartDaemon(m.ctx, cfg); err != nil {
		return err
	}
	serving, ended := context.WithCancelCause(m.ctx)
	m.serving = serving
	m.t.Cleanup(func() { ended(nil) })
	daemon := m.daemon // a test may start another
	go func() {
		select {
		case <-daemon.Exited():
			ended(errors.New("the daemon has ended"))
		case <-m.ctx.Done():
		}
	}()
	m.t.Cleanup(func() {
		if m.t.Failed() {
			m.t.Logf("daemon:\n%s", daemon.Log())
		}
		daemon.Close()
	})
	return nil
}

// bootTime is how long a guest may take to boot: seconds of CPU time, of which it may get little.
const bootTime = 3 * time.Minute

// boot boots a guest and mounts the share at /mnt, with mount's options.
func (m *machine) boot(cfg testguest.Config, mountOptions ...string) {
	m.t.Helper()
	m.ownAll()
	cfg.Kit, cfg.Initrd, cfg.Scratch = kit, initrd, m.scratch
	device := m.daemon.Device()
	device.Queues = cfg.CPUs
	cfg.Devices = []testguest.Device{device}
	ctx, cancel := context.WithTimeout(m.serving, bootTime)
	defer cancel()
	g, err := testguest.Boot(ctx, cfg)
	m.check(err)
	m.guest = g
	m.t.Cleanup(func() {
		if m.t.Failed() {
			m.t.Logf("%s guest's console:\n%s", cfg.Kind, g.Console())
		}
		g.Close()
	})
	m.mount(mountOptions...)
}

func (m *machine) mount(options ...string) {
	m.t.Helper()
	m.sh("mount -t virtiofs -o %s %s /mnt", strings.Join(append([]string{"rw"}, options...), ","), testguest.Tag)
}

// run runs a command in the guest, for no longer than any should take.
func (m *machine) run(command testguest.Command) (testguest.Result, error) {
	ctx, cancel := context.WithTimeout(m.serving, time.Duration(commandMinutes.n())*time.Minute)
	defer cancel()
	return m.guest.Run(ctx, command)
}

var commandMinutes = size{5, 30}

// sh runs a shell script in the guest as root, which must succeed, and returns its output without the last newline.
func (m *machine) sh(format string, args ...any) string {
	m.t.Helper()
	out, err := m.trySh(fmt.Sprintf(format, args...))
	m.check(err)
	return out
}

// trySh is sh for a script that may fail.
func (m *machine) trySh(script string) (string, error) {
	r, err := m.run(testguest.Command{Args: []string{"sh", "-euc", script}})
	if err == nil && r.Status != 0 {
		err = fmt.Errorf("guest: %s: status %d", script, r.Status)
	}
	if err != nil {
		return "", fmt.Errorf("%w\n%s%s", err, r.Stdout, r.Stderr)
	}
	return strings.TrimSuffix(r.Stdout, "\n"), nil
}

// path is a file of the share on the host.
func (m *machine) path(name string) string { return filepath.Join(m.share, name) }

func (m *machine) usage() testguest.Usage {
	m.t.Helper()
	u, err := m.daemon.Usage()
	m.check(err)
	return u
}

// check ends the test if there is an error.
func (m *machine) check(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// eachKind runs a test for each kind of guest.
func eachKind(t *testing.T, test func(t *testing.T, kind testguest.Kind)) {
	t.Parallel()
	inKinds(t, kinds, test)
}

// eachKindInFull is eachKind in a full run, and otherwise for User-Mode Linux alone: to boot QEMU without KVM takes as much as the
// whole of a small test does there. It is for what the emulated machine has no part in.
func eachKindInFull(t *testing.T, test func(t *testing.T, kind testguest.Kind)) {
	t.Parallel()
	if full() {
		inKinds(t, kinds, test)
	} else {
		inKinds(t, kinds[:1], test)
	}
}

func inKinds(t *testing.T, kinds []testguest.Kind, test func(t *testing.T, kind testguest.Kind)) {
	for _, kind := range kinds {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			test(t, kind)
		})
	}
}

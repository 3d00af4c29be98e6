package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests start this test binary as a program of its own, which enters a sandbox and says what it finds there.

// scenarioVar tells the program what to do.
const scenarioVar = "SANDBOX_TEST_SCENARIO"

// privateVar says that this process has mounts of its own already.
const privateVar = "SANDBOX_TEST_PRIVATE"

// scenario is one run of the program.
type scenario struct {
	Mode       Mode
	Launch     Launch   // without Files
	Pass       []string // files to open and pass on
	View       View
	Caps       CapSet
	Threads    int  // to be there before the sandbox is entered
	Unconfined bool // the probe runs after Enter
	Launched   bool // even without namespaces
	Umask      int
	Probe      string // of probes
	Arg        string
}

// report is what the program says, in JSON on its standard output.
type report struct {
	Paths   []string
	Missing CapSet
	Found   json.RawMessage
}

// inside is what a probe works with.
type inside struct {
	scenario
	box   *Box
	files []*os.File
	paths []string
	tasks *os.File // /proc/self/task, opened before the sandbox was entered
}

func TestMain(m *testing.M) {
	if text, ok := os.LookupEnv(scenarioVar); ok {
		status, err := program(text)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			status = max(status, 1)
		}
		os.Exit(status)
	}
	fuzzing := slices.ContainsFunc(os.Args, func(a string) bool {
		return strings.HasPrefix(a, "-test.fuzz=") || strings.HasPrefix(a, "-test.fuzzworker")
	})
	if os.Geteuid() == 0 && os.Getenv(privateVar) == "" && !fuzzing {
		os.Exit(private())
	}
	os.Exit(m.Run())
}

// private runs the tests in a process whose mounts are its own, so that they may mount as they like.
func private() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), privateVar+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

// program is the life of a daemon, as the package's documentation has it.
func program(text string) (int, error) {
	if text == firstThread {
		return 0, porterOnFirstThread()
	}
	var s scenario
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return 1, err
	}
	box, files, err := Inherited()
	if err != nil {
		return 1, err
	}
	if box == nil && (s.Mode == Namespace || s.Launched) {
		s.Launch.Mode = s.Mode
		return launcher(s)
	}
	if box == nil {
		if box, err = New(s.Mode); err != nil {
			return 1, err
		}
	}
	in := &inside{scenario: s, box: box, files: files}
	if in.tasks, err = os.Open("/proc/self/task"); err != nil {
		return 1, err
	}
	holdThreads(s.Threads)
	unix.Umask(s.Umask)
	if in.paths, err = box.Enter(s.View); err != nil {
		return 1, err
	}
	r := report{Paths: in.paths}
	if !s.Unconfined {
		if r.Missing, err = box.Confine(s.Caps); err != nil {
			return 1, err
		}
	}
	if probe := probes[s.Probe]; probe != nil {
		found, err := probe(in)
		if err != nil {
			return 1, fmt.Errorf("probe %s: %w", s.Probe, err)
		}
		if r.Found, err = json.Marshal(found); err != nil {
			return 1, err
		}
	} else if s.Probe != "" {
		return 1, fmt.Errorf("no probe %q", s.Probe)
	}
	if err := box.Close(); err != nil {
		return 1, err
	}
	if s.Mode == Namespace || s.Launched {
		<-box.Orphaned() // Close has ended what waits for the launcher
	}
	return 0, json.NewEncoder(os.Stdout).Encode(r)
}

func launcher(s scenario) (int, error) {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	for _, path := range s.Pass {
		f, err := os.Open(path)
		if err != nil {
			return 1, err
		}
		s.Launch.Files = append(s.Launch.Files, f)
	}
	holdThreads(s.Threads)
	child, err := Start(s.Launch)
	if err != nil {
		return 1, err
	}
	if s.Probe == "early" {
		if err := child.Signal(unix.SIGTERM); err != nil {
			return 1, err
		}
	}
	if s.Probe == "launcher" {
		found, err := readThreadsOf("/proc/self/task")
		if err != nil {
			return 1, err
		}
		if err := json.NewEncoder(os.Stderr).Encode(found); err != nil {
			return 1, err
		}
	}
	return child.Wait(signals)
}

// holdThreads has at least n threads besides the others.
func holdThreads(n int) {
	started := make(chan bool)
	for range n {
		go func() {
			runtime.LockOSThread()
			started <- true
			select {}
		}()
		<-started
	}
}

// programFile is a copy of the test binary that everybody may execute.
func programFile(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sandbox-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	name := filepath.Join(dir, "sandboxed")
	out, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Chmod(0o755), out.Close()); err != nil {
		t.Fatal(err)
	}
	return name
}

// An ordinary user of the tests.
const (
	userID  = 65534
	groupID = 65534
)

// who starts the program.
type who bool

const (
	root who = false
	user who = true
)

func (w who) String() string {
	if w == user {
		return "user"
	}
	return "root"
}

// command is the program with a scenario, not yet started.
func command(t *testing.T, w who, s scenario) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(programFile(t), "an", "argument")
	cmd.Env = append(os.Environ(), scenarioVar+"="+string(text), "GORACE=atexit_sleep_ms=0", "GOCOVERDIR=")
	if w == user && os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: userID, Gid: groupID, Groups: []uint32{groupID, 12345}}}
	}
	return cmd
}

// patience is how long the program may take; it only ever passes when a test fails.
const patience = time.Minute

// run runs the program and returns its report, its exit status and what it said on standard error.
func run(t *testing.T, cmd *exec.Cmd) (r report, status int, said string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if stdout.Len() > 0 {
		if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
			t.Fatalf("%v in %q", err, stdout.String())
		}
	}
	return r, cmd.ProcessState.ExitCode(), strings.TrimSpace(stderr.String())
}

// enter runs the program, which must succeed, and decodes what its probe found.
func enter[T any](t *testing.T, w who, s scenario) (T, report) {
	t.Helper()
	r, status, said := run(t, command(t, w, s))
	if status != 0 || said != "" {
		t.Fatalf("exit status %d: %s", status, said)
	}
	return decode[T](t, r), r
}

// decode returns what the probe found.
func decode[T any](t *testing.T, r report) (found T) {
	t.Helper()
	if err := json.Unmarshal(r.Found, &found); err != nil {
		t.Fatalf("%v in %q", err, r.Found)
	}
	return found
}

// fails runs the program, which must fail with a message that has want in it.
func fails(t *testing.T, w who, s scenario, want ...string) {
	t.Helper()
	r, status, said := run(t, command(t, w, s))
	if status != 1 {
		t.Errorf("exit status %d, report %+v: %s", status, r, said)
	}
	for _, part := range want {
		if !strings.Contains(said, part) {
			t.Errorf("it says %q; expected %q in it", said, part)
		}
	}
}

// needRoot skips what only root can set up. CI runs the tests as root.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("takes root")
	}
}

// tree makes a directory that both kinds of users own a part of:
//
//	file       "in the share"
//	sub/file
func tree(t *testing.T, w who) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sandbox-share-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Mkdir(dir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "sub/file"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("in the share"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if w == user && os.Geteuid() == 0 {
		for _, name := range []string{"", "file", "sub", "sub/file"} {
			if err := os.Chown(filepath.Join(dir, name), userID, groupID); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

package program

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// gone fails the test unless the process ends soon.
func gone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		// There is no event for the end of a process that is nobody's child here.
		if state := processState(pid); state == "" || state == "Z" && !ours(pid) {
			return
		}
	}
	t.Fatalf("process %d is still there: %s", pid, processState(pid))
}

func processState(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return ""
	}
	_, rest, _ := bytes.Cut(b, []byte(") "))
	return string(rest[:1])
}

func ours(pid int) bool {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	_, rest, _ := bytes.Cut(b, []byte(") "))
	fields := bytes.Fields(rest)
	return len(fields) > 1 && string(fields[1]) == strconv.Itoa(os.Getpid())
}

func TestLargeMessages(t *testing.T) {
	_, line := start(t, self("echo"))
	fd := next(t, line)
	sent := bytes.Repeat([]byte("0123456789abcdef"), (1<<20+4096)/16)
	if _, err := unix.Write(fd, sent); err != nil {
		t.Fatalf("1 MiB and headers do not pass: %v", err)
	}
	if got := receive(t, fd); !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back, other than sent", len(got))
	}
	f := os.NewFile(uintptr(must(unix.Dup(fd))), "")
	defer f.Close()
	if n, err := SendLimit(f); err != nil || n < 1<<20+4096 {
		t.Errorf("SendLimit is %d, %v", n, err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestKilledProgramIsStartedAgain(t *testing.T) {
	s, line := start(t, self("echo"))
	fd := next(t, line)
	pid := s.Status().PID
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, fd); len(got) != 0 {
		t.Errorf("received %q from a killed program", got)
	}
	again := next(t, line)
	if _, err := unix.Write(again, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if got := string(receive(t, again)); got != "hello" {
		t.Errorf("the new one says %q", got)
	}
	st := s.Status()
	if st.Restarts != 1 || st.PID == pid || st.PID == 0 || !strings.Contains(st.Last, "killed") || st.Uptime <= 0 {
		t.Errorf("status is %+v", st)
	}
	if got := line.State(); !got.Running || got.Starts != 2 || !strings.Contains(got.Status, "killed") {
		t.Errorf("the line's state is %+v", got)
	}
}

func TestShutSocketRestarts(t *testing.T) {
	s, line := start(t, self("stubborn"))
	fd := next(t, line)
	receive(t, fd)
	pid := s.Status().PID
	if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	receive(t, next(t, line))
	gone(t, pid)
}

func TestRestart(t *testing.T) {
	c := self("echo")
	c.Backoff.First = time.Hour // which a restart does not wait for
	s, line := start(t, c)
	next(t, line)
	pid := s.Status().PID
	s.Restart()
	next(t, line)
	if st := s.Status(); st.PID == pid || st.Restarts != 1 {
		t.Errorf("status is %+v", st)
	}
	gone(t, pid)
}

func TestStopEndsDescendants(t *testing.T) {
	for _, tt := range []struct {
		name    string
		confine Confinement
		env     []string
	}{
		{"namespaces", Confinement{}, []string{"SETSID=1"}},
		{"group", Confinement{None: true}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := self("tree", append(tt.env, DefaultEnv()...)...)
			c.Confine = tt.confine
			s, line := start(t, c)
			inside := receive(t, next(t, line))
			pids := []int{s.Status().PID}
			for _, p := range list("/proc") {
				status, _ := os.ReadFile("/proc/" + p + "/status")
				if _, err := strconv.Atoi(p); err == nil && strings.Contains(string(status), "\nPPid:\t"+strconv.Itoa(pids[0])+"\n") {
					pids = append(pids, must(strconv.Atoi(p)))
				}
			}
			if len(pids) != 2 || len(inside) == 0 {
				t.Fatalf("found processes %v, and inside %q", pids, inside)
			}
			if err := s.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, pid := range pids {
				gone(t, pid)
			}
			if processState(pids[0]) != "" {
				t.Error("the program was not reaped")
			}
		})
	}
}

func TestStopKillsTheStubborn(t *testing.T) {
	s, line := start(t, self("stubborn"))
	receive(t, next(t, line))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := s.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > grace {
		t.Errorf("it took %s", d)
	}
}

func TestFailingProgramIsRetriedLessAndLess(t *testing.T) {
	c := self("fail")
	c.Backoff = Backoff{First: 300 * time.Millisecond, Max: 500 * time.Millisecond}
	s, line := start(t, c)
	began := time.Now()
	const starts = 4
	for line.State().Starts < starts {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		f, err := line.Next(ctx)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	if d := time.Since(began); d < (300+500+500)*time.Millisecond {
		t.Errorf("%d starts in %s", starts, d)
	}
	if got := s.Status().Last; got != "exit status 3: out of luck" {
		// Between two starts it may be that the socket was shut before the program could say anything.
		if !strings.Contains(got, "killed") {
			t.Errorf("it ended with %q", got)
		}
	}
}

func TestStatusHasLastWords(t *testing.T) {
	c := self("fail")
	c.Backoff.First = time.Hour
	s, line := start(t, c)
	f, err := line.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s.Status().PID != 0 { // the end comes with the second message at the latest
		receive(t, int(f.Fd()))
	}
	if got := s.Status().Last; got != "exit status 3: out of luck" {
		t.Errorf("it ended with %q", got)
	}
}

func TestOutputIsBounded(t *testing.T) {
	var log bytes.Buffer
	c := self("talk")
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	s, line := start(t, c)
	fd := next(t, line)
	if _, err := unix.Write(fd, []byte("done?")); err != nil {
		t.Fatal(err)
	}
	receive(t, fd) // after all that it had to say
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(log.String(), "program says"); n < 10 || n > 1000 {
		t.Errorf("%d lines of 20000 were logged", n)
	}
}

func TestStartErrors(t *testing.T) {
	noExec := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(noExec, []byte("#!/nonexistent\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		c    Config
		want error
	}{
		{"no program", Config{}, nil},
		{"not found", Config{Args: []string{"sluice-no-such-program"}}, exec.ErrNotFound},
		{"no interpreter", Config{Args: []string{noExec}}, nil},
		{"no directory", Config{Args: []string{"true"}, Dir: "/nonexistent"}, nil},
		{"no writable path", Config{Args: []string{"true"}, Confine: Confinement{ReadOnly: true, Writable: []string{"/nonexistent"}}}, nil},
		{"relative path", Config{Args: []string{"true"}, Confine: Confinement{ReadOnly: true, Writable: []string{"x"}}}, nil},
		{"NUL", Config{Args: []string{"true", "a\x00b"}}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := len(list("/proc/self/fd"))
			s, err := Start(t.Context(), tt.c)
			if err == nil {
				_ = s.Stop(t.Context())
				t.Fatal("it was started")
			}
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("%v: expected %v", err, tt.want)
			}
			if after := len(list("/proc/self/fd")); after > before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

func TestNoDescriptorsLeft(t *testing.T) {
	run := func() {
		s, err := Start(t.Context(), self("echo"))
		if err != nil {
			t.Fatal(err)
		}
		line := NewLine(s.Line())
		f, err := line.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		if f, err = line.Next(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if err := errors.Join(s.Stop(t.Context()), line.Close()); err != nil {
			t.Fatal(err)
		}
	}
	run()
	before := list("/proc/self/fd")
	for range 3 {
		run()
	}
	if after := list("/proc/self/fd"); len(after) > len(before) {
		t.Errorf("%d descriptors before, %d after", len(before), len(after))
	}
}

func TestLineEnds(t *testing.T) {
	s, line := start(t, self("echo"))
	next(t, line)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := line.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Next with a context that has ended: %v", err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := line.Next(t.Context()); !errors.Is(err, ErrLineClosed) {
		t.Errorf("Next after Stop: %v", err)
	}
	if line.State().Running {
		t.Error("it still runs")
	}
	if err := line.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := line.Next(t.Context()); !errors.Is(err, ErrLineClosed) {
		t.Errorf("Next after Close: %v", err)
	}
}

func TestService(t *testing.T) {
	controls := make(chan *os.File, 10)
	c := self("echo")
	c.OnStart = func(f *os.File) { controls <- f }
	s, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop(context.Background())
	if s.Line() != nil {
		t.Error("there is a line, too")
	}
	for range 2 {
		f := <-controls
		if _, err := unix.Write(int(f.Fd()), []byte("x")); err != nil {
			t.Fatal(err)
		}
		if got := string(receive(t, int(f.Fd()))); got != "x" {
			t.Errorf("received %q", got)
		}
		f.Close() // and so it is started again
	}
	(<-controls).Close()
}

func TestExtraFiles(t *testing.T) {
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := self("report")
	c.Files = []*os.File{f, f}
	_, line := start(t, c)
	r := reported(t, receive(t, next(t, line)))
	if !slices.Equal(r.FDs, []string{"0", "1", "2", "3", "4", "5"}) {
		t.Errorf("it has descriptors %v", r.FDs)
	}
}

func reported(t *testing.T, b []byte) (r report) {
	t.Helper()
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatalf("%v: %q", err, b)
	}
	return r
}

func TestConfinement(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test is for root; TestUnprivileged is for others")
	}
	in, out := publicDir(t), publicDir(t)
	c := self("report", "WRITE="+in+":"+out)
	c.Args = []string{publicBinary(t)}
	c.Credential = &Credential{UID: 65534, GID: 65533, Groups: []uint32{65532}}
	c.Confine = Confinement{ReadOnly: true, Writable: []string{in}, Seccomp: true, Rlimits: map[int]unix.Rlimit{unix.RLIMIT_NOFILE: {Cur: 77, Max: 77}}}
	_, line := start(t, c)
	r := reported(t, receive(t, next(t, line)))
	if r.PID != 1 || r.UID != 65534 || r.GID != 65533 || !slices.Equal(r.Groups, []int{65532}) || r.Dir != "/" {
		t.Errorf("it is %+v", r)
	}
	for field, want := range map[string]string{
		"CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapInh": "0000000000000000", "CapAmb": "0000000000000000",
		"CapBnd": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
	} {
		if r.Status[field] != want {
			t.Errorf("%s is %s: expected %s", field, r.Status[field], want)
		}
	}
	if r.Processes != 1 || !slices.Equal(r.Interfaces, []string{"lo"}) || !slices.Equal(r.FDs, []string{"0", "1", "2", "3"}) {
		t.Errorf("it sees %d processes, interfaces %v, descriptors %v", r.Processes, r.Interfaces, r.FDs)
	}
	eperm := unix.EPERM.Error()
	checkCalls(t, r, map[string]string{
		"mount": eperm, "unshare": eperm, "ptrace": eperm, "bpf": eperm, "keyctl": eperm, "clone3": unix.ENOSYS.Error(), "pipe size": eperm, "vmsplice": eperm,
		"write0": "ok", "write1": unix.EROFS.Error(), "sysctl": unix.EROFS.Error(),
	})
}

func TestRootKeepsWhatItIsGiven(t *testing.T) {
	dir := publicDir(t)
	c := self("report", "WRITE="+dir)
	c.Confine = Confinement{Caps: 1 << unix.CAP_FOWNER}
	_, line := start(t, c)
	r := reported(t, receive(t, next(t, line)))
	if r.UID != 0 || r.Status["CapEff"] != "0000000000000008" || r.Status["CapBnd"] != "0000000000000008" || r.Status["Seccomp"] != "0" {
		t.Errorf("user %d, capabilities %s of %s, seccomp %s", r.UID, r.Status["CapEff"], r.Status["CapBnd"], r.Status["Seccomp"])
	}
	checkCalls(t, r, map[string]string{"mount": unix.EPERM.Error(), "write0": "ok", "sysctl": unix.EROFS.Error()})
}

func TestMount(t *testing.T) {
	c := self("report")
	c.Confine = Confinement{Mount: true, Seccomp: true}
	_, line := start(t, c)
	r := reported(t, receive(t, next(t, line)))
	checkCalls(t, r, map[string]string{"mount": "ok", "unshare": unix.EPERM.Error()})
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), "none /mnt tmpfs") {
		t.Error("the mount is the host's, too")
	}
}

func checkCalls(t *testing.T, r report, want map[string]string) {
	t.Helper()
	for name, result := range want {
		if r.Calls[name] != result {
			t.Errorf("%s: %s: expected %s", name, r.Calls[name], result)
		}
	}
}

// publicDir is a directory that every user may write to.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "program-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

// publicBinary is this binary where every user may execute it.
func publicBinary(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(publicDir(t), "program")
	if err := os.WriteFile(file, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

// startKeeper starts another process that supervises, and returns it, the program's id and its report.
func startKeeper(t *testing.T, attr *syscall.SysProcAttr, as string) (*exec.Cmd, int, report) {
	t.Helper()
	cmd := exec.Command(publicBinary(t))
	cmd.Env = append(DefaultEnv(), role+"=keeper", "PROGRAM="+as)
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	buf := make([]byte, 1<<16)
	text := ""
	for strings.Count(text, "\n") < 2 {
		n, err := out.Read(buf)
		if text += string(buf[:n]); err != nil {
			t.Fatalf("%v: %q", err, text)
		}
	}
	first, rest, _ := strings.Cut(text, "\n")
	return cmd, must(strconv.Atoi(first)), reported(t, []byte(rest))
}

// TestKeeperDies kills the supervising process, which the program must not outlive.
func TestKeeperDies(t *testing.T) {
	cmd, pid, _ := startKeeper(t, nil, "stubborn")
	if processState(pid) == "" {
		t.Fatal("the program does not run")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	gone(t, pid)
}

// TestUnprivileged has an ordinary user supervise, in a user namespace.
func TestUnprivileged(t *testing.T) {
	var attr *syscall.SysProcAttr
	if os.Geteuid() == 0 {
		attr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	_, _, r := startKeeper(t, attr, "report")
	if r.PID != 1 || r.UID == 0 || r.Status["CapEff"] != "0000000000000000" || r.Status["NoNewPrivs"] != "1" || r.Status["Seccomp"] != "2" {
		t.Errorf("it is %+v", r)
	}
	if !slices.Equal(r.Interfaces, []string{"lo"}) {
		t.Errorf("it has interfaces %v", r.Interfaces)
	}
	checkCalls(t, r, map[string]string{"mount": unix.EPERM.Error(), "unshare": unix.EPERM.Error()})
}

// TestMarkerAlone has only the environment variable of a child set.
func TestMarkerAlone(t *testing.T) {
	for _, value := range []string{"4", "x"} {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = []string{marker + "=" + value}
		cmd.ExtraFiles = []*os.File{os.Stdout, os.Stdout}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS") {
			t.Errorf("%q: %v: %s", value, err, out)
		}
	}
}

func TestPath(t *testing.T) {
	if got, err := path("true", DefaultEnv()); err != nil || !filepath.IsAbs(got) {
		t.Errorf("true is %q, %v", got, err)
	}
	if _, err := path("true", nil); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("without PATH: %v", err)
	}
	if got, err := path("./x", nil); err != nil || got != "./x" {
		t.Errorf("./x is %q, %v", got, err)
	}
}

// TestLogOfEnds has a program end by itself, which is told, and for want of somebody to speak with, which is not.
func TestLogOfEnds(t *testing.T) {
	var log bytes.Buffer
	c := self("fail")
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	s, line := start(t, c)
	next(t, line)
	next(t, line)
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := log.String(); !strings.Contains(got, "is started again") || !strings.Contains(got, "out of luck") {
		t.Errorf("the log of a program that fails: %s", got)
	}

	log.Reset()
	c = self("stubborn")
	c.Log = slog.New(slog.NewTextHandler(&log, nil))
	s, line = start(t, c)
	fd := next(t, line)
	receive(t, fd)
	pid := s.Status().PID
	if err := line.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	gone(t, pid)
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := log.String(); strings.Contains(got, "again") {
		t.Errorf("the log of a program that nobody wants any more: %s", got)
	}
}

// TestServes has the line bring what the program serves once it does, and the program started again where that fails.
func TestServes(t *testing.T) {
	var starts atomic.Int32
	c := self("echo")
	c.Serves = func(ctx context.Context, pid int) (*os.File, error) {
		switch starts.Add(1) {
		case 2:
			return nil, errors.New("it serves nothing")
		case 3:
			_ = unix.Kill(pid, unix.SIGKILL)
			<-ctx.Done() // it has ended before it serves
			return nil, ctx.Err()
		}
		return os.Open("/dev/null")
	}
	s, line := start(t, c)
	for range 2 {
		f, err := line.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
			t.Errorf("the line brings a file of mode %#o, %v", st.Mode, err)
		}
		f.Close()
		if err := unix.Kill(s.Status().PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if n := starts.Load(); n < 4 {
		t.Errorf("%d starts", n)
	}
}

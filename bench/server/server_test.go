package server

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestMain makes this program a server, of which two processes are left, if it is started as one.
func TestMain(m *testing.M) {
	switch role := os.Getenv("SLUICE_BENCH_FAKE"); role {
	case "parent", "child":
		if err := fake(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// The thread that starts processes lives as long as this one.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/sluicefs/sluice/internal/testguest.spawn"))
}

func fake(role string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if role == "parent" {
		child := exec.Command(os.Args[0], os.Args[1:]...)
		child.Env = append(os.Environ(), "SLUICE_BENCH_FAKE=child")
		child.Stderr = os.Stderr
		return child.Run()
	}
	ln, err := net.Listen("unix", os.Args[slices.Index(os.Args, "--socket-path")+1])
	if err != nil {
		return err
	}
	defer ln.Close()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "args:", os.Args[1:], "cpus:", set.Count(), set.IsSet(0))
	fmt.Fprintln(os.Stderr, "Waiting for vhost-user socket connection...")
	<-ctx.Done()
	return nil
}

func TestStart(t *testing.T) {
	t.Setenv("SLUICE_BENCH_FAKE", "parent")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s, err := Start(ctx, Spec{Name: "fake", Kind: Sluice, Program: program, Args: []string{"--more"}, Dir: dir, CPUs: []int{0}})
	if err != nil {
		t.Fatal(err)
	}
	stop := s.Stop
	defer func() { _ = stop() }()
	conn, err := net.Dial("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	for _, want := range []string{"--shared-dir " + dir + " --more]", "cpus: 1 true"} {
		if !strings.Contains(s.Log(), want) {
			t.Errorf("the server says %q, want %q in it", s.Log(), want)
		}
	}
	pids := s.PIDs()
	if len(pids) != 2 || pids[0] != s.PID() {
		t.Errorf("processes %v, want two, the first %d", pids, s.PID())
	}
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	for _, pid := range pids {
		// Whoever has adopted the child may not have reaped it yet.
		if err := awaitEnd(ctx, pid); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Dir(s.Socket)); !os.IsNotExist(err) {
		t.Errorf("the socket's directory is left: %v", err)
	}
}

// awaitEnd waits until a process has ended, whether or not it has been reaped.
func awaitEnd(ctx context.Context, pid int) error {
	for {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(text), ") Z ") {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d is left", pid)
		case <-time.After(time.Millisecond):
		}
	}
}

func TestStartSaysWhy(t *testing.T) {
	t.Setenv("SLUICE_GUEST_KIT", t.TempDir())
	for _, tt := range []struct {
		spec Spec
		want string
	}{
		{Spec{Name: "x", Kind: Rust, Dir: "."}, "make peers"},
		{Spec{Name: "x", Kind: C, Dir: "."}, "make peers"},
		{Spec{Name: "x", Kind: "d", Dir: "."}, "expected one of [sluice rust rust-nofh c]"},
		{Spec{Name: "x", Kind: Sluice, Program: "/nowhere/sluiced", Dir: "."}, "no such file"},
		{Spec{Name: "x", Kind: Sluice, Program: "/bin/false", Dir: "."}, "ended without"},
		{Spec{Name: "x", Kind: Sluice, Program: "/bin/false", Dir: ".", CPUs: []int{1023}}, "run on CPUs [1023]"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		s, err := Start(ctx, tt.spec)
		cancel()
		if err == nil {
			t.Errorf("%+v starts: %v", tt.spec, s.Stop())
		} else if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q in it", tt.spec, err, tt.want)
		}
	}
}

func TestParse(t *testing.T) {
	for text, want := range map[string]Spec{
		"sluice":                              {Name: "sluice", Kind: Sluice},
		"sluice,--poll-us=0":                  {Name: "sluice,--poll-us=0", Kind: Sluice, Args: []string{"--poll-us=0"}},
		"old=sluice@/tmp/d,--a=b,--c":         {Name: "old", Kind: Sluice, Program: "/tmp/d", Args: []string{"--a=b", "--c"}},
		"rust4=rust,--thread-pool-size=4":     {Name: "rust4", Kind: Rust, Args: []string{"--thread-pool-size=4"}},
		"rust-nofh":                           {Name: "rust-nofh", Kind: RustNoHandles},
		"c@/usr/lib/qemu/virtiofsd,--fd=1@=2": {Name: "c@/usr/lib/qemu/virtiofsd,--fd=1@=2", Kind: C, Program: "/usr/lib/qemu/virtiofsd", Args: []string{"--fd=1@=2"}},
	} {
		if got, err := Parse(text); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v, want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "go", "=sluice", "x=", "sluice@", ",--x"} {
		if got, err := Parse(text); err == nil {
			t.Errorf("%q is taken for %+v", text, got)
		}
	}
}

package meter

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain is a process to measure when it is told so.
func TestMain(m *testing.M) {
	switch os.Getenv("METER_TEST") {
	case "child":
		work()
	case "parent":
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), "METER_TEST=child")
		child.Stdin, child.Stdout = os.Stdin, os.Stdout
		if err := child.Run(); err != nil {
			panic(err)
		}
	default:
		os.Exit(m.Run())
	}
}

// calls is how many times the child calls getppid.
const calls = 20_000

// work takes CPU time and makes system calls each time that it is told to, with a line.
func work() {
	os.Stdout.WriteString("ready\n")
	in := bufio.NewReader(os.Stdin)
	for {
		if _, err := in.ReadString('\n'); err != nil {
			return
		}
		for begin := time.Now(); time.Since(begin) < 50*time.Millisecond; {
		}
		for range calls {
			unix.Getppid()
		}
		os.Stdout.WriteString("done\n")
	}
}

// worker starts a process whose child works. tell has it work once.
func worker(t *testing.T) (pid int, tell func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "METER_TEST=parent")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	expect := func(want string) {
		t.Helper()
		if got, err := lines.ReadString('\n'); got != want {
			t.Fatalf("the worker says %q, %v, expected %q", got, err, want)
		}
	}
	expect("ready\n")
	t.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the worker ended with %v", err)
		}
	})
	return cmd.Process.Pid, func() {
		t.Helper()
		if _, err := in.Write([]byte("\n")); err != nil {
			t.Fatal(err)
		}
		expect("done\n")
	}
}

func TestRead(t *testing.T) {
	pid, tell := worker(t)
	before, err := Read(pid)
	if err != nil {
		t.Fatal(err)
	}
	// Only the child works: it is counted, too.
	tell()
	after, err := Read(pid)
	if err != nil {
		t.Fatal(err)
	}
	used := after.Sub(before)
	// A noisy machine may give it half of the time; ticks are of 10 ms and rounded.
	if used.CPU < 10*time.Millisecond || used.CPU > 10*time.Second {
		t.Errorf("the worker took %v, expected some 50 ms", used.CPU)
	}
	if sum, diff := used.User+used.System, used.User+used.System-used.CPU; sum == 0 || max(diff, -diff) > 100*time.Millisecond {
		t.Errorf("user %v and system %v of %v", used.User, used.System, used.CPU)
	}
	if used.Voluntary == 0 || used.Voluntary > 10_000 {
		t.Errorf("%d voluntary context switches, expected one or more: it waited for its order", used.Voluntary)
	}
	if used.Processes != 2 || used.Threads < 2 {
		t.Errorf("%d processes and %d threads, expected 2 and 2 or more", used.Processes, used.Threads)
	}
	if used.Private < 1<<20 || used.RSS <= used.Private {
		t.Errorf("%d bytes in memory, %d of them private, expected 1 MiB and the program's text", used.RSS, used.Private)
	}
}

func TestReadNobody(t *testing.T) {
	if _, err := Read(1 << 30); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("measured a process that is not there: %v", err)
	}
	if _, err := CountSyscalls(1 << 30); err == nil {
		t.Error("counted the system calls of a process that is not there")
	}
}

func TestCountSyscalls(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("counting system calls takes root")
	}
	pid, tell := worker(t)
	s, err := CountSyscalls(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	before, err := s.Read()
	if err != nil {
		t.Fatal(err)
	}
	tell()
	after, err := s.Read()
	if err != nil {
		t.Fatal(err)
	}
	if n := after - before; n < calls || n > calls+5000 {
		t.Errorf("%d system calls, expected %d and some", n, calls)
	}
}

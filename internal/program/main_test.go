package program

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// role is the environment variable that makes this binary one of the programs that are started.
const role = "PROGRAM_TEST_ROLE"

func TestMain(m *testing.M) {
	MaybeConfine()
	switch os.Getenv(role) {
	case "":
		goleak.VerifyTestMain(m)
		return
	case "echo":
		echo()
	case "fail":
		fmt.Println("out of luck")
		os.Exit(3)
	case "talk":
		for i := range 20000 {
			fmt.Println("line", i)
		}
		echo()
	case "tree":
		// A descendant that has left the session.
		cmd := exec.Command("sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: os.Getenv("SETSID") != ""}
		if err := cmd.Start(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		_ = unix.Send(FD, []byte(strconv.Itoa(cmd.Process.Pid)), 0)
		echo()
	case "stubborn":
		signal.Ignore(unix.SIGTERM)
		_ = unix.Send(FD, []byte("{}"), 0)
		time.Sleep(time.Hour)
	case "report":
		b, err := json.Marshal(look())
		if err != nil {
			b = []byte(err.Error())
		}
		_ = unix.Send(FD, b, 0)
		echo()
	case "keeper":
		keeper()
	}
	os.Exit(0)
}

// echo sends back what comes until the socket is shut.
func echo() {
	buf := make([]byte, 1<<20+4096)
	for {
		n, err := unix.Read(FD, buf)
		if err == unix.EINTR {
			continue
		}
		if n <= 0 {
			os.Exit(0)
		}
		if _, err := unix.Write(FD, buf[:n]); err != nil {
			fmt.Println("write:", err)
			os.Exit(1)
		}
	}
}

// keeper starts a program as who it is, and says what it was told.
func keeper() {
	c := Config{Args: []string{os.Args[0]}, Env: []string{role + "=" + os.Getenv("PROGRAM")}, Confine: Confinement{Seccomp: true}, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if os.Geteuid() == 0 {
		c.Credential = &Credential{UID: 65534, GID: 65534}
	}
	s, err := Start(context.Background(), c)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	f, err := NewLine(s.Line()).Next(context.Background())
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	buf := make([]byte, 1<<16)
	n, err := unix.Read(int(f.Fd()), buf)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(s.Status().PID)
	fmt.Println(string(buf[:n]))
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// report is what a program finds around itself.
type report struct {
	PID, UID, GID int
	Groups        []int
	Status        map[string]string // /proc/self/status
	Processes     int               // in /proc
	Interfaces    []string
	FDs           []string
	Dir           string
	Calls         map[string]string // errors
}

func look() report {
	r := report{PID: os.Getpid(), UID: os.Getuid(), GID: os.Getgid(), Status: map[string]string{}, Calls: map[string]string{}}
	r.Groups, _ = os.Getgroups()
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		k, v, _ := strings.Cut(line, ":")
		r.Status[k] = strings.TrimSpace(v)
	}
	for _, name := range list("/proc") {
		if _, err := strconv.Atoi(name); err == nil {
			r.Processes++
		}
	}
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		r.Interfaces = append(r.Interfaces, i.Name)
	}
	for fd := range 64 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
			link, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			if !strings.HasPrefix(link, "anon_inode") && !strings.HasPrefix(link, "/sys/fs/cgroup") { // Go's own
				r.FDs = append(r.FDs, strconv.Itoa(fd))
			}
		}
	}
	r.Dir, _ = os.Getwd()
	call := func(name string, err error) {
		r.Calls[name] = "ok"
		if err != nil && err != syscall.Errno(0) {
			r.Calls[name] = err.Error()
		}
	}
	call("mount", unix.Mount("none", "/mnt", "tmpfs", 0, ""))
	call("unshare", unix.Unshare(unix.CLONE_NEWUSER))
	// Not TRACEME: nobody would let the process go on after its next signal, which the Go runtime sends.
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_DETACH, 0, 0, 0, 0, 0)
	call("ptrace", errno)
	_, _, errno = unix.Syscall6(unix.SYS_BPF, 0, 0, 0, 0, 0, 0)
	call("bpf", errno)
	_, err := unix.KeyctlInt(unix.KEYCTL_GET_KEYRING_ID, unix.KEY_SPEC_SESSION_KEYRING, 0, 0, 0)
	call("keyctl", err)
	_, _, errno = unix.Syscall(435, 0, 0, 0) // clone3
	call("clone3", errno)
	var pipe [2]int
	_ = unix.Pipe(pipe[:])
	_, err = unix.FcntlInt(uintptr(pipe[0]), unix.F_SETPIPE_SZ, 1<<18)
	call("pipe size", err)
	_, err = unix.Vmsplice(pipe[1], nil, 0)
	call("vmsplice", err)
	for i, dir := range filepath.SplitList(os.Getenv("WRITE")) {
		err := os.WriteFile(filepath.Join(dir, "written"), nil, 0o644)
		if err != nil {
			err = err.(*os.PathError).Err
		}
		call(fmt.Sprint("write", i), err)
	}
	f, err := os.OpenFile("/proc/sys/vm/swappiness", os.O_WRONLY, 0)
	if err == nil {
		f.Close()
	} else {
		err = err.(*os.PathError).Err
	}
	call("sysctl", err)
	return r
}

func list(dir string) []string {
	entries, _ := os.ReadDir(dir)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// self is this binary as a program.
func self(as string, env ...string) Config {
	return Config{
		Name: as, Args: []string{os.Args[0]}, Env: append(env, role+"="+as),
		Backoff: Backoff{First: 10 * time.Millisecond, Max: 40 * time.Millisecond},
	}
}

// start starts a program that the test's end stops.
func start(t *testing.T, c Config) (*Supervisor, *Line) {
	t.Helper()
	s, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	line := NewLine(s.Line())
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
		_ = line.Close()
	})
	return s, line
}

// next is line.Next, as a blocking socket with a timeout.
func next(t *testing.T, line *Line) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	f, err := line.Next(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	fd := int(f.Fd()) // makes it blocking
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30}); err != nil {
		t.Fatal(err)
	}
	return fd
}

func receive(t *testing.T, fd int) []byte {
	t.Helper()
	buf := make([]byte, 2<<20)
	n, err := unix.Read(fd, buf)
	for err == unix.EINTR { // which a time limit has it give up with (signal(7))
		n, err = unix.Read(fd, buf)
	}
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

//go:build linux && cgo && (amd64 || arm64)

package seccomp

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// caseVariable names the case that a copy of this program runs: a filter is for good, so that each has a process.
const caseVariable = "SLUICE_SECCOMP_CASE"

func TestMain(m *testing.M) {
	name := os.Getenv(caseVariable)
	if name == "" {
		os.Exit(m.Run())
	}
	if err := cases[name](); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println("done")
	os.Exit(0)
}

// runtimeCalls are what the Go runtime and libc make in these cases, and what the cases themselves report with.
var runtimeCalls = []string{
	"brk", "clock_gettime", "clone", "close", "epoll_create1", "epoll_ctl", "epoll_pwait", "eventfd2", "exit", "exit_group",
	"fcntl", "futex", "getpid", "getrandom", "gettid", "madvise", "mincore", "mmap", "mprotect", "munmap", "nanosleep", "pipe2",
	"prctl", "pread64", "read", "rseq", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield",
	"set_robust_list", "sigaltstack", "tgkill", "write",
}

func maskedEqual(arg uint, mask, value uint64) Cond {
	return Cond{Arg: arg, Op: OpMaskedEqual, Mask: mask, Value: value}
}

// filters allow the runtime's calls and those of clauses, beneath the denials that a daemon would have.
func filters(clauses ...Clause) Filters {
	f := Filters{
		Deny: []Clause{
			{Syscall: "mmap", Conds: []Cond{maskedEqual(2, unix.PROT_EXEC, unix.PROT_EXEC)}},
			{Syscall: "mprotect", Conds: []Cond{maskedEqual(2, unix.PROT_EXEC, unix.PROT_EXEC)}},
			{Syscall: "rt_sigaction", Conds: []Cond{maskedEqual(0, 0xffffffff, uint64(unix.SIGSYS))}},
			{Syscall: "prctl", Conds: []Cond{maskedEqual(0, 0xffffffff, unix.PR_SET_SECCOMP)}},
		},
		Allow: clauses,
		NoSys: []string{"clone3"},
	}
	for _, name := range runtimeCalls {
		f.Allow = append(f.Allow, Clause{Syscall: name})
	}
	return f
}

func installed(action Action, marks *Marks, clauses ...Clause) error {
	return Install(InstallConfig{Filters: filters(clauses...), Action: action, Marks: marks})
}

// violate makes a call that no case allows.
func violate() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func register(m *Marks, name string) Owner {
	o, err := m.Register(name)
	if err != nil {
		panic(err)
	}
	return o
}

// locked runs f on n threads of their own, which wait for one another before they begin and return when all have ended.
func locked(n int, f func(i int)) {
	var ready, done sync.WaitGroup
	ready.Add(n)
	for i := range n {
		done.Go(func() {
			runtime.LockOSThread() // and never unlocked: the thread ends, too
			ready.Done()
			ready.Wait()
			f(i)
		})
	}
	done.Wait()
}

var cases = map[string]func() error{
	"kill": func() error {
		marks := new(Marks)
		probe := register(marks, "probe")
		if err := installed(Kill, marks); err != nil {
			return err
		}
		runtime.LockOSThread()
		marks.Enter(probe)
		return violate()
	},
	"kill from 50 threads at once": func() error {
		if err := installed(Kill, nil); err != nil {
			return err
		}
		locked(50, func(int) { _ = violate() })
		return nil
	},
	"kill into a pipe that is full": func() error {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		fd := int(w.Fd())
		if err := unix.SetNonblock(fd, true); err != nil {
			return err
		}
		for err == nil {
			_, err = unix.Write(fd, make([]byte, 4096))
		}
		if err := Install(InstallConfig{Filters: filters(), Action: Kill, Output: w}); err != nil {
			return err
		}
		return violate()
	},
	"trap": func() error {
		if err := installed(Trap, nil); err != nil {
			return err
		}
		return violate()
	},
	"background": func() error {
		marks := new(Marks)
		register(marks, "idle")
		owner := register(marks, "http")
		if err := installed(Kill, marks); err != nil {
			return err
		}
		runtime.LockOSThread()
		marks.Enter(owner)
		go func() { _ = violate() }()
		select {}
	},
	"left": func() error {
		marks := new(Marks)
		owner := register(marks, "http")
		if err := installed(Kill, marks); err != nil {
			return err
		}
		runtime.LockOSThread()
		marks.Enter(owner)
		marks.Leave()
		return violate()
	},
	"every thread": func() error {
		var before, after sync.WaitGroup
		confined := make(chan struct{})
		errs := make(chan error, 100)
		try := func() {
			// sysinfo is among those that fail with ENOSYS: a thread that is not confined would succeed.
			if _, _, errno := unix.RawSyscall(unix.SYS_SYSINFO, 0, 0, 0); errno != unix.ENOSYS {
				errs <- fmt.Errorf("sysinfo in thread %d: %v, want ENOSYS", unix.Gettid(), errno)
			}
		}
		before.Add(50)
		for range 50 {
			after.Go(func() {
				runtime.LockOSThread()
				before.Done()
				<-confined
				try()
			})
		}
		before.Wait()
		f := filters()
		f.NoSys = append(f.NoSys, "sysinfo")
		tasks, err := os.Open("/proc/self/task")
		if err != nil {
			return err
		}
		if err := Install(InstallConfig{Filters: f, Action: Kill, Tasks: tasks}); err != nil {
			return err
		}
		close(confined)
		after.Wait()
		locked(50, func(int) { try() })
		close(errs)
		return <-errs
	},
	"runtime": func() error {
		if err := installed(Kill, nil); err != nil {
			return err
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0); errno != unix.ENOSYS {
			return fmt.Errorf("clone3: %v, want ENOSYS", errno)
		}
		// Threads, timers, memory to and fro, and the poller.
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			locked(20, func(i int) {
				for range 5 {
					kept := make([][]byte, 0, 64)
					for range 64 {
						kept = append(kept, make([]byte, 64<<10))
					}
					runtime.KeepAlive(kept)
					time.Sleep(time.Millisecond)
				}
			})
			_, _ = w.Write([]byte("x"))
		})
		_, err = r.Read(make([]byte, 1))
		wg.Wait()
		runtime.GC()
		debug.FreeOSMemory()
		if err := r.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
			return err
		}
		if _, err := r.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("read past the deadline: %v", err)
		}
		runtime.KeepAlive(w)
		return err
	},
	"socket": func() error {
		inet := Clause{Syscall: "socket", Conds: []Cond{{Arg: 0, Op: OpEqual, Value: unix.AF_INET}}}
		if err := installed(Kill, nil, inet); err != nil {
			return err
		}
		if _, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0); err != nil {
			return err
		}
		fmt.Println("inet")
		_, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, 0)
		return err
	},
	"executable memory": func() error {
		if err := installed(Kill, nil); err != nil {
			return err
		}
		if _, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
			return err
		}
		fmt.Println("writable")
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
		return err
	},
	"descriptor": func() error {
		return openat(1000)
	},
	"AT_FDCWD": func() error {
		return openat(^uintptr(99))
	},
	"AT_FDCWD of 32 bits": func() error {
		return openat(0xffffff9c)
	},
	"handler": func() error {
		if err := installed(Kill, nil); err != nil {
			return err
		}
		// The kernel looks at the lower half of the number alone.
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, 1<<32|uintptr(unix.SIGSYS), 0, 0, 8, 0, 0)
		return errno
	},
	"another filter": func() error {
		if err := installed(Kill, nil); err != nil {
			return err
		}
		if err := installed(Kill, nil); !errors.Is(err, errInstalled) {
			return fmt.Errorf("installed twice: %v", err)
		}
		// As the first of the two filters lets the second in.
		_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC|unix.SECCOMP_FILTER_FLAG_LOG, 0)
		return errno
	},
	"signal from elsewhere": func() error {
		if err := installed(Kill, nil, Clause{Syscall: "kill"}); err != nil {
			return err
		}
		if err := unix.Kill(unix.Getpid(), unix.SIGSYS); err != nil {
			return err
		}
		select {}
	},
	"x32": func() error {
		if err := installed(Kill, nil); err != nil {
			return err
		}
		_, _, errno := unix.RawSyscall(0x40000000|unix.SYS_GETPID, 0, 0, 0)
		return errno
	},
	"thread with a filter of its own": func() error {
		done, stop := make(chan error), make(chan struct{})
		defer close(stop)
		go func() {
			runtime.LockOSThread()
			if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
				done <- err
				return
			}
			done <- loadForThread([]unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}})
			<-stop
		}()
		if err := <-done; err != nil {
			return err
		}
		fmt.Println("install:", installed(Kill, nil))
		return nil
	},
	"log": func() error {
		marks := new(Marks)
		owners := []Owner{register(marks, "one"), register(marks, "two")}
		if err := installed(Log, marks); err != nil {
			return err
		}
		errs := make(chan error, 4)
		locked(4, func(i int) {
			for range 1250 {
				marks.Enter(owners[i%2])
				err := violate()
				if e := unix.Sysinfo(new(unix.Sysinfo_t)); err == nil {
					err = e
				}
				marks.Leave()
				if err != nil {
					errs <- err
					return
				}
			}
		})
		close(errs)
		if err := <-errs; err != nil {
			return err
		}
		if _, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
			return err
		}
		fmt.Println(Violations(), Seen())
		return nil
	},
	"log under pressure": func() error {
		if err := installed(Log, nil); err != nil {
			return err
		}
		const threads, calls = 4, 1000
		var running, stopped sync.WaitGroup
		var done atomic.Bool
		stopped.Go(func() {
			for !done.Load() {
				runtime.GC() // which stops the world by signals
			}
		})
		for range threads {
			running.Go(func() {
				for range calls {
					_, _, _ = unix.RawSyscall(unix.SYS_SYSINFO, 0, 0, 0)
				}
			})
		}
		running.Wait()
		done.Store(true)
		stopped.Wait()
		if want := []Violation{{Syscall: "sysinfo", Count: threads * calls}}; !slices.Equal(Seen(), want) {
			return fmt.Errorf("saw %v, want %v", Seen(), want)
		}
		return nil
	},
	"trace": func() error {
		f := filters(
			Clause{Syscall: "getpriority", Conds: []Cond{{Arg: 0, Op: OpEqual, Value: unix.PRIO_PROCESS}, {Arg: 1, Op: OpGreaterOrEqual, Value: 1}}},
			Clause{Syscall: "getpriority", Conds: []Cond{{Arg: 0, Op: OpLessOrEqual, Value: unix.PRIO_PGRP}, {Arg: 1, Op: OpLess, Value: 1}}},
			Clause{Syscall: "getpriority", Conds: []Cond{maskedEqual(0, 3, unix.PRIO_USER), {Arg: 1, Op: OpNotEqual, Value: 0}}},
			Clause{Syscall: "getpriority", Conds: []Cond{{Arg: 0, Op: OpGreater, Value: unix.PRIO_USER}}},
			Clause{Syscall: "chroot"},
		)
		f.Deny = append(f.Deny, Clause{Syscall: "chroot"})
		if err := Install(InstallConfig{Action: Log, Trace: true, Filters: f}); err != nil {
			return err
		}
		for _, which := range []int{unix.PRIO_PROCESS, unix.PRIO_PROCESS, unix.PRIO_PGRP, unix.PRIO_USER} {
			if _, err := unix.Getpriority(which, 0); err != nil {
				return err
			}
		}
		if _, err := unix.Getpriority(unix.PRIO_PROCESS, unix.Getpid()); err != nil {
			return err
		}
		_ = unix.Chroot("/no/such/directory")
		if err := violate(); err != nil {
			return err
		}
		runtime.GC()
		locked(10, func(int) { time.Sleep(time.Millisecond) })
		return WriteReport(os.Stdout)
	},
}

func openat(dir uintptr) error {
	if err := installed(Kill, nil, Clause{Syscall: "openat", Conds: []Cond{maskedEqual(0, 1<<31, 0)}}); err != nil {
		return err
	}
	path := [...]byte{'x', 0}
	_, errno := openatRaw(dir, path[:])
	fmt.Println("openat:", errno)
	return nil
}

// runCase runs a case and returns what it wrote and how it ended.
func runCase(t *testing.T, name string) (stdout, stderr string, status syscall.WaitStatus) {
	t.Helper()
	if cases[name] == nil {
		t.Fatalf("no case %q", name)
	}
	var out, errs bytes.Buffer
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), caseVariable+"="+name, "GOTRACEBACK=all")
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	hung := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Signal(unix.SIGKILL) })
	_ = cmd.Wait()
	hung.Stop()
	return out.String(), errs.String(), cmd.ProcessState.Sys().(syscall.WaitStatus)
}

const anyArgs = `args="(0x[0-9a-f]+ ){5}0x[0-9a-f]+" thread=\d+`

func line(level, call, rest string) string {
	return `^level=` + level + ` msg="system call is not in the filter" call=` + call + ` ` + anyArgs + ` ` + rest + "\n$"
}

func TestKill(t *testing.T) {
	for _, tt := range []struct {
		name, stdout, stderr string // stderr is a pattern
	}{
		{"kill", "", `^level=ERROR msg="system call is not in the filter" call=socket args="0x1 0x1 0x0 (0x[0-9a-f]+ ){2}0x[0-9a-f]+" thread=\d+ action=kill extension=probe` + "\n$"},
		{"kill from 50 threads at once", "", line("ERROR", "socket", `action=kill extension=\(none\)`)},
		{"kill into a pipe that is full", "", `^$`},
		{"background", "", line("ERROR", "socket", `action=kill extension="\(in the background; calls in progress: http\)"`)},
		{"left", "", line("ERROR", "socket", `action=kill extension=\(none\)`)},
		{"socket", "inet\n", line("ERROR", "socket", `action=kill extension=\(none\)`)},
		{"executable memory", "writable\n", line("ERROR", "mmap", `action=kill extension=\(none\)`)},
		{"AT_FDCWD", "", line("ERROR", "openat", `action=kill extension=\(none\)`)},
		{"AT_FDCWD of 32 bits", "", line("ERROR", "openat", `action=kill extension=\(none\)`)},
		{"handler", "", line("ERROR", "rt_sigaction", `action=kill extension=\(none\)`)},
		{"another filter", "", line("ERROR", "seccomp", `action=kill extension=\(none\)`)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, status := runCase(t, tt.name)
			if !status.Signaled() || status.Signal() != unix.SIGSYS {
				t.Errorf("ended with status %#x, want death by SIGSYS", uint32(status))
			}
			if stdout != tt.stdout {
				t.Errorf("stdout is %q, want %q", stdout, tt.stdout)
			}
			if !regexp.MustCompile(tt.stderr).MatchString(stderr) {
				t.Errorf("stderr is %q, want %s", stderr, tt.stderr)
			}
		})
	}
}

func TestForeignArchitecture(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		return // x32 is amd64's
	}
	stdout, stderr, status := runCase(t, "x32")
	if !status.Signaled() || status.Signal() != unix.SIGSYS || stdout != "" || stderr != "" {
		t.Errorf("ended with status %#x, stdout %q, stderr %q; want death by SIGSYS without a word", uint32(status), stdout, stderr)
	}
}

func TestTrap(t *testing.T) {
	stdout, stderr, status := runCase(t, "trap")
	if !status.Exited() || status.ExitStatus() != 2 || stdout != "" {
		t.Errorf("ended with status %#x, stdout %q, want exit status 2", uint32(status), stdout)
	}
	first, rest, _ := strings.Cut(stderr, "\n")
	if want := line("ERROR", "socket", `action=trap extension=\(none\)`); !regexp.MustCompile(want).MatchString(first + "\n") {
		t.Errorf("first line is %q, want %s", first, want)
	}
	for _, want := range []string{"SIGSYS: bad system call", "goroutine 1", "seccomp.violate("} {
		if !strings.Contains(rest, want) {
			t.Errorf("stderr lacks %q:\n%s", want, rest)
		}
	}
}

// TestSignal sends a SIGSYS that is no violation: it is Go's affair.
func TestSignal(t *testing.T) {
	_, stderr, status := runCase(t, "signal from elsewhere")
	if !status.Exited() || status.ExitStatus() != 2 || !strings.HasPrefix(stderr, "SIGSYS: bad system call") {
		t.Errorf("ended with status %#x, stderr %q; want Go's exit status 2 and traceback", uint32(status), stderr)
	}
}

func TestAllowed(t *testing.T) {
	for _, tt := range []struct{ name, stdout string }{
		{"every thread", "done\n"},
		{"runtime", "done\n"},
		{"descriptor", "openat: bad file descriptor\ndone\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, status := runCase(t, tt.name)
			if status != 0 || stdout != tt.stdout || stderr != "" {
				t.Errorf("ended with status %#x, stdout %q, stderr %q; want success and %q", uint32(status), stdout, stderr, tt.stdout)
			}
		})
	}
}

// TestNotAllThreads has one thread that cannot be confined with the others.
func TestNotAllThreads(t *testing.T) {
	stdout, stderr, _ := runCase(t, "thread with a filter of its own")
	if want := regexp.MustCompile(`^install: install system call filter: load filter: thread \d+ already has another than this thread`); !want.MatchString(stdout) || stderr != "" {
		t.Errorf("stdout %q, stderr %q, want %s", stdout, stderr, want)
	}
}

func TestLog(t *testing.T) {
	stdout, stderr, status := runCase(t, "log")
	want := "10001 [{socket one 2500} {socket two 2500} {sysinfo one 2500} {sysinfo two 2500} {mmap  1}]\ndone\n"
	if status != 0 || stdout != want {
		t.Errorf("ended with status %#x, stdout %q, want %q", uint32(status), stdout, want)
	}
	var got []string
	for l := range strings.Lines(stderr) {
		m := regexp.MustCompile(`^level=WARN msg="system call is not in the filter" call=(\w+) ` + anyArgs + ` action=log extension=(\S+)\n$`).FindStringSubmatch(l)
		if m == nil {
			t.Fatalf("line %q is not about a violation", l)
		}
		got = append(got, m[1]+" "+m[3])
	}
	slices.Sort(got)
	if want := []string{"mmap (none)", "socket one", "socket two", "sysinfo one", "sysinfo two"}; !slices.Equal(got, want) {
		t.Errorf("lines about %q, want %q", got, want)
	}
}

func TestLogUnderPressure(t *testing.T) {
	stdout, stderr, status := runCase(t, "log under pressure")
	if status != 0 || stdout != "done\n" {
		t.Errorf("ended with status %#x, stdout %q, stderr %q", uint32(status), stdout, stderr)
	}
}

func TestTrace(t *testing.T) {
	stdout, stderr, status := runCase(t, "trace")
	if status != 0 || stderr != "" || !strings.HasSuffix(stdout, "done\n") {
		t.Fatalf("ended with status %#x, stdout %q, stderr %q", uint32(status), stdout, stderr)
	}
	got := regexp.MustCompile(" +").ReplaceAllString(stdout, " ")
	for _, want := range []string{
		`refuse chroot \(none\) 1`, `refuse getpriority \(none\) 1`, `refuse socket \(none\) 1`,
		`allow getpriority arg0 == 0x0 and arg1 >= 0x1 1`, `allow getpriority arg0 <= 0x1 and arg1 < 0x1 3`,
		`allow getpriority arg0 & 0x3 == 0x2 and arg1 != 0x0 0`, `allow getpriority arg0 > 0x2 0`, `allow chroot any arguments 0`,
		`allow close any arguments \d*[1-9]\d*`, `allow futex any arguments \d*[1-9]\d*`, `allow clone any arguments \d*[1-9]\d*`,
		`allow exit_group any arguments 0`, `allow gettid any arguments \d+`,
	} {
		if !regexp.MustCompile(`(?m)^` + want + `$`).MatchString(got) {
			t.Errorf("the report has no line %s:\n%s", want, got)
		}
	}
	if n := strings.Count(got, "refuse "); n != 3 {
		t.Errorf("the report has %d refusals, expected 3:\n%s", n, got)
	}
}

func TestSupported(t *testing.T) {
	if err := Supported(); err != nil {
		t.Errorf("seccomp is not supported here: %v", err)
	}
}

// TestThreadsUnconfined has the check look at a process without filters.
func TestThreadsUnconfined(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	threads, err := openThreads(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer threads.close()
	if err := threads.check(); err == nil || !strings.Contains(err.Error(), "expected mode 2") {
		t.Errorf("check says %v of threads without a filter", err)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if threads, err := openThreads(dir); err == nil {
		threads.close()
		t.Error("an empty directory passes for that of the threads")
	}
}

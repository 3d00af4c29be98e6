// Package limits holds what sluiced may cost where that does not depend on the machine: system calls, kicks and notifications for
// each operation of a workload of bench/frontend, and memory. Whatever exceeds a limit is named. What takes fewer than its limit
// allows is a reason to lower that.
package limits

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sluicefs/sluice/bench/frontend"
	"github.com/sluicefs/sluice/bench/meter"
)

// patience is how long anything may take that must come: a failure, never a measure.
const patience = 60 * time.Second

// calls are how many system calls of each name an operation may take. What is not named it may not make, but for those that move
// requests (moving) and those of Go's runtime (runtimes).
type calls map[string]float64

// limits are by workload: on files, and the requests that an operation takes.
var limits = []struct {
	workload string
	requests float64
	calls    calls
}{
	{"nop", 1, nil},
	{"getattr", 1, calls{"fstat": 1}},
	{"lookup", 1, calls{"statx": 1}},
	{"lookup-miss", 1, calls{"openat2": 1}},
	{"openrel", 2, calls{"open_by_handle_at": 1, "close": 1, "openat": 0.1, "name_to_handle_at": 0.1}}, // the latter for each file's first two
	{"read4k", 1, calls{"preadv2": 1}},
	{"read128k", 1, calls{"preadv2": 1}},
	{"write4k", 1, calls{"pwrite64": 1}},
	{"statfs", 1, calls{"fstatfs": 1}},
	{"rename", 1, calls{"renameat2": 1}},
	{"create", 4, calls{"openat2": 1, "statx": 1, "close": 1, "unlinkat": 1}},
}

// moving are the calls by which a server without polling sleeps and notifies, and how many each request may take of them.
var moving = calls{"epoll_pwait": 2, "write": 1}

// runtimes are calls of Go's runtime and of libc, which time decides on.
var runtimes = []string{
	"clock_nanosleep", "clone", "exit", "futex", "getpid", "gettid", "madvise", "mmap", "mprotect", "munmap", "nanosleep", "prctl",
	"read", "rseq", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield", "set_robust_list", "sigaltstack", "tgkill",
}

// slack is for what a run does once more or less than another: by the operation, of span many.
const (
	span  = 1000
	slack = 0.02
	// movingSlack is for wake-ups, of which there may be some more to begin with and between threads.
	movingSlack = 0.2
)

func TestSystemCalls(t *testing.T) {
	program := build(t)
	share := t.TempDir()
	if err := frontend.MakeTree(share); err != nil {
		t.Fatal(err)
	}
	for _, l := range limits {
		w, ok := frontend.Find(l.workload)
		if !ok {
			t.Fatalf("no workload is called %q", l.workload)
		}
		for _, c := range []frontend.Config{
			{Depth: 1, Wait: frontend.Sleep},
			{Depth: 16, Wait: frontend.Poll},
		} {
			t.Run(fmt.Sprint(l.workload, "/", c.Depth), func(t *testing.T) {
				// What it takes to begin and to end is in both.
				_, few := count(t, program, share, c, w, 100)
				res, many := count(t, program, share, c, w, 100+span)
				for _, name := range slices.Sorted(maps.Keys(many)) {
					got := (many[name] - few[name]) / span
					limit := l.calls[name] + slack
					if per, ok := moving[name]; ok {
						limit = per*l.requests + movingSlack
						if name == "write" && c.Wait == frontend.Poll {
							limit = movingSlack // a driver that looks wants no notifications
						}
					} else if slices.Contains(runtimes, name) {
						continue
					}
					if got > limit {
						t.Errorf("%.3f calls of %s for each operation, expected at most %.3f", got, name, limit)
					}
				}
				ops := float64(res.Ops)
				if kicks := float64(res.Kicks) / ops; kicks > l.requests+slack {
					t.Errorf("%.3f kicks for each operation, expected at most one for each of %v requests", kicks, l.requests)
				}
				most := l.requests
				if c.Wait == frontend.Poll {
					most = 0
				}
				if n := float64(res.Notifications) / ops; n > most+slack {
					t.Errorf("%.3f notifications for each operation, expected at most %v", n, most)
				}
			})
		}
	}
}

// scratch is a directory for all tests.
var scratch string

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "sluice"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	_ = os.RemoveAll(scratch)
	os.Exit(status)
}

// built is sluiced as it is, without the profile, by which all of it would be compiled anew.
var built = sync.OnceValues(func() (string, error) {
	program := filepath.Join(scratch, "sluiced")
	cmd := exec.Command("go", "build", "-pgo=off", "-o", program, "github.com/sluicefs/sluice/cmd/sluiced")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %w\n%s", cmd, err, out)
	}
	return program, nil
})

func build(t testing.TB) string {
	t.Helper()
	program, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return program
}

// sockets returns a directory with a path that is short enough for sockets.
func sockets(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sluice")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// start starts d and waits until it is ready.
func start(t testing.TB, d *exec.Cmd) {
	t.Helper()
	said, err := d.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = d.Process.Kill() // unless it has ended
		_ = d.Wait()
	})
	late := time.AfterFunc(patience, func() { _ = d.Process.Kill() })
	defer late.Stop()
	lines := bufio.NewScanner(said)
	var all []string
	for lines.Scan() {
		all = append(all, lines.Text())
		if strings.Contains(lines.Text(), "Waiting for vhost-user socket connection") {
			go func() {
				for lines.Scan() { // it is not to wait for us
				}
			}()
			return
		}
	}
	t.Fatalf("%v ended:\n%s", d, strings.Join(all, "\n"))
}

// count returns how often the daemon has called what in ops operations and what goes with them.
func count(t *testing.T, program, share string, c frontend.Config, w frontend.Workload, ops uint64) (frontend.Result, calls) {
	t.Helper()
	report := filepath.Join(t.TempDir(), "report")
	// With a socket of its own it would have rules to remove that, and a call is counted for each rule that allows it.
	c.Socket, c.Dir = filepath.Join(sockets(t), "s"), share
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.Socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	fd, err := ln.File()
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	d := exec.Command(program, "--fd", "3", "--shared-dir", share, "--poll-us", "0", "--sandbox", "none", "--seccomp", "trace", "--seccomp-report", report)
	d.ExtraFiles = []*os.File{fd}
	start(t, d)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	f, err := frontend.Connect(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	res, err := f.Run(ctx, w, frontend.Limit{Ops: ops})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Wait(); err != nil {
		t.Fatalf("%v: %v", d, err)
	}
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	sum := make(calls)
	for line := range strings.Lines(string(text)) {
		// allow  NAME  conditions  owner  count
		words := strings.Fields(line)
		n, err := strconv.ParseUint(words[len(words)-1], 10, 64)
		if err != nil || len(words) < 4 {
			t.Fatalf("report: %q: expected a call and how often", line)
		}
		if words[0] == "refuse" {
			t.Errorf("a call that no rule allows: %s", line)
		}
		sum[words[1]] += float64(n)
	}
	if sum["recvmsg"] == 0 {
		t.Fatalf("the report has no call of recvmsg, without which there is no session:\n%s", text)
	}
	return res, sum
}

// Memory, in bytes, of a daemon that has nothing to do.
const (
	maxIdle  = 20 << 20 // with one share, its text included, of which the kernel may have all in memory
	maxShare = 1 << 20  // for each further share
	shares   = 16
)

func TestMemory(t *testing.T) {
	program, dir := build(t), t.TempDir()
	one := exec.Command(program, "--sandbox", "none", "--socket-path", filepath.Join(sockets(t), "s"), "--shared-dir", dir)
	start(t, one)
	if s := memory(t, one); s.RSS > maxIdle {
		t.Errorf("a daemon with one share has %d KiB in memory, expected at most %d", s.RSS>>10, maxIdle>>10)
	}
	managed := func(n int) uint64 {
		at := sockets(t)
		d := exec.Command(program, "--sandbox", "none", "--control-socket", filepath.Join(at, "control"))
		for i := range n {
			d.Args = append(d.Args, "--share", fmt.Sprintf("tag=t%d,dir=%s,socket=%s", i, dir, filepath.Join(at, strconv.Itoa(i))))
		}
		start(t, d)
		return memory(t, d).Private
	}
	few, many := managed(1), managed(1+shares)
	if each := (int64(many) - int64(few)) / shares; each > maxShare {
		t.Errorf("each further share takes %d KiB, expected at most %d", each>>10, maxShare>>10)
	}
}

func memory(t *testing.T, d *exec.Cmd) meter.Sample {
	t.Helper()
	s, err := meter.Read(d.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d processes, %d threads: RSS %d KiB in all, private %d KiB", s.Processes, s.Threads, s.RSS>>10, s.Private>>10)
	return s
}

// BenchmarkStart is from the start of the program to its readiness to be connected to.
func BenchmarkStart(b *testing.B) {
	program := build(b)
	dir, at := b.TempDir(), sockets(b)
	for b.Loop() {
		d := exec.Command(program, "--socket-path", filepath.Join(at, "s"), "--shared-dir", dir)
		start(b, d)
		b.StopTimer()
		_ = d.Process.Signal(os.Interrupt)
		_ = d.Wait()
		b.StartTimer()
	}
}

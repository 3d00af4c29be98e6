package sandbox

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// bothUsers runs test for root, if this is root, and for an ordinary user.
func bothUsers(t *testing.T, test func(t *testing.T, w who)) {
	for _, w := range []who{root, user} {
		t.Run(w.String(), func(t *testing.T) {
			if w == root {
				needRoot(t)
			}
			test(t, w)
		})
	}
}

// A running is the program while it runs.
type running struct {
	*exec.Cmd
	t      *testing.T
	out    *bufio.Reader
	said   *bytes.Buffer
	output *os.File
}

// start starts the program, whose standard output the test reads.
func start(t *testing.T, cmd *exec.Cmd) *running {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close() })
	r := &running{Cmd: cmd, t: t, out: bufio.NewReader(read), said: new(bytes.Buffer), output: read}
	cmd.Stdout, cmd.Stderr = write, r.said
	err = cmd.Start()
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := read.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return r
}

// line reads what the program must say next.
func (r *running) line(want string) {
	r.t.Helper()
	got, err := r.out.ReadString('\n')
	if err != nil || got != want+"\n" {
		r.t.Fatalf("it says %q, %v; expected %q", got, err, want)
	}
}

// ended waits for the end of the program and returns its status.
func (r *running) ended() int {
	r.t.Helper()
	err := r.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	return r.ProcessState.ExitCode()
}

// TestOrphan kills the launcher: the child is told.
func TestOrphan(t *testing.T) {
	bothUsers(t, func(t *testing.T, w who) {
		r := start(t, command(t, w, scenario{View: View{Sources: []Source{{Path: tree(t, w)}}}, Probe: "orphan"}))
		r.line("0")
		if err := r.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		r.line("orphaned")
		// Its end of the pipe closes with it.
		if rest, err := io.ReadAll(r.out); err != nil || len(rest) != 0 {
			t.Errorf("%q, %v", rest, err)
		}
		if r.ended() != -1 {
			t.Errorf("the launcher: %s", r.ProcessState)
		}
	})
}

// TestSignals sends signals to the launcher, and expects them in the child, once each.
func TestSignals(t *testing.T) {
	bothUsers(t, func(t *testing.T, w who) {
		cmd := command(t, w, scenario{View: View{Sources: []Source{{Path: tree(t, w)}}}, Probe: "signals"})
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = new(syscall.SysProcAttr)
		}
		cmd.SysProcAttr.Setpgid = true
		r := start(t, cmd)
		r.line("ready")
		for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGINT} {
			if err := unix.Kill(r.Process.Pid, sig); err != nil {
				t.Fatal(err)
			}
			r.line(unix.SignalName(sig))
		}
		// As from a terminal, to all of the group: still once.
		for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM} {
			if err := unix.Kill(-r.Process.Pid, sig); err != nil {
				t.Fatal(err)
			}
			r.line(unix.SignalName(sig))
		}
		if status := r.ended(); status != 7 {
			t.Errorf("exit status %d: %s", status, r.said)
		}
	})
}

// TestEarlySignal sends a signal as soon as Start has returned. The first process of a process namespace never sees one
// that it has no handler for, and would run on.
func TestEarlySignal(t *testing.T) {
	_, status, said := run(t, command(t, user, scenario{View: View{Sources: []Source{{Path: tree(t, user)}}}, Probe: "early"}))
	if status != 2 {
		t.Errorf("exit status %d: %s; expected 2, which Go ends with where the signal cannot end it", status, said)
	}
}

func TestExitStatus(t *testing.T) {
	bothUsers(t, func(t *testing.T, w who) {
		view := View{Sources: []Source{{Path: tree(t, w)}}}
		for _, want := range []int{0, 1, 2, 77, 255} {
			if _, status, said := run(t, command(t, w, scenario{View: view, Probe: "exit", Arg: strconv.Itoa(want)})); status != want || said != "" {
				t.Errorf("exit status %d: %s; expected %d", status, said, want)
			}
		}
		_, status, said := run(t, command(t, w, scenario{View: view, Probe: "forbidden"}))
		if status != 128+int(unix.SIGSYS) || !strings.Contains(said, "SIGSYS") || !strings.Contains(said, "ended by the seccomp filter") || strings.Contains(said, "\n") {
			t.Errorf("exit status %d: %s", status, said)
		}
	})
}

func TestStatusOfSignals(t *testing.T) {
	for ws, want := range map[syscall.WaitStatus]string{
		syscall.WaitStatus(unix.SIGKILL): "SIGKILL (killed): by an administrator",
		syscall.WaitStatus(unix.SIGSEGV): "SIGSEGV (segmentation fault)",
	} {
		status, err := exitStatus(ws)
		if err == nil || status != 128+int(ws) || !strings.Contains(err.Error(), want) {
			t.Errorf("%d: %d, %v; expected %q", ws, status, err, want)
		}
	}
}

// TestLauncher looks at what the launcher keeps.
func TestLauncher(t *testing.T) {
	bothUsers(t, func(t *testing.T, w who) {
		for _, keep := range []CapSet{0, capOf(unix.CAP_DAC_OVERRIDE)} {
			s := scenario{Launch: Launch{Keep: keep}, Threads: 20, View: View{Sources: []Source{{Path: tree(t, w)}}}, Probe: "launcher"}
			_, status, said := run(t, command(t, w, s))
			if status != 0 {
				t.Fatalf("exit status %d: %s", status, said)
			}
			var found map[string]thread
			if err := json.Unmarshal([]byte(said), &found); err != nil {
				t.Fatalf("%v in %q", err, said)
			}
			if len(found) < 20 {
				t.Errorf("%d threads", len(found))
			}
			if w == user {
				keep = 0
			}
			for tid, state := range found {
				state.Bounding = 0
				if want := (thread{Permitted: keep, Effective: keep, NoNewPrivs: true}); state != want {
					t.Errorf("thread %s: %+v, want %+v", tid, state, want)
				}
			}
		}
	})
}

// TestNotAChild starts the program with the marker but without a launcher.
func TestNotAChild(t *testing.T) {
	for value, want := range map[string]string{
		"": "expected it to be unset", "1": "expected it to be unset", "mode=0 files=0 user=false group=false groups=false": "no launcher started this process",
		"files=-1 user=false group=false groups=false": "expected it to be unset",
	} {
		cmd := command(t, user, scenario{})
		cmd.Env = append(cmd.Env, marker+"="+value)
		if _, status, said := run(t, cmd); status != 1 || !strings.Contains(said, want) {
			t.Errorf("%q: exit status %d: %s", value, status, said)
		}
	}
	if _, err := New(Namespace); err == nil {
		t.Error("namespaces without a launcher")
	}
}

// subIDs are granted to the user of the tests in grantSubIDs.
const subIDs = 200000

// grantSubIDs has /etc/subuid and /etc/subgid as newuidmap reads them say text, in the mounts of the tests.
func grantSubIDs(t *testing.T, text string) {
	t.Helper()
	for _, name := range []string{"/etc/subuid", "/etc/subgid"} {
		mine := filepath.Join(t.TempDir(), "sub")
		if err := os.WriteFile(mine, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(mine, name, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(name, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestIDMaps looks at owners through the maps of an ordinary user.
func TestIDMaps(t *testing.T) {
	needRoot(t)
	grantSubIDs(t, "65534:200000:65536\n")
	single := func(inside uint32) []IDMap { return []IDMap{{Inside: inside, Outside: userID, Count: 1}} }
	ids := []IDMap{{Inside: 0, Outside: subIDs, Count: 65536}}
	both := []IDMap{{Inside: 0, Outside: userID, Count: 1}, {Inside: 1, Outside: subIDs, Count: 65536}}
	beside := []IDMap{{Inside: userID, Outside: userID, Count: 1}, {Inside: 0, Outside: subIDs, Count: 1000}}
	for _, tt := range []struct {
		name   string
		m      []IDMap
		owner  int // of the share, on the host
		give   string
		inside map[string]string
		host   map[string]int
	}{
		{"default", nil, userID, "", map[string]string{"file": "65534:65534", "own": "65534:65534"}, map[string]int{"own": userID}},
		{"as root", single(0), userID, "", map[string]string{"file": "0:0", "own": "0:0"}, map[string]int{"own": userID}},
		{
			"a range", ids, subIDs, "5",
			map[string]string{"file": "0:0", "own": "0:0", "given": "5:5"},
			map[string]int{"own": subIDs, "given": subIDs + 5},
		},
		{
			"root and a range", both, userID, "5",
			map[string]string{"file": "0:0", "own": "0:0", "given": "5:5"},
			map[string]int{"own": userID, "given": subIDs + 4},
		},
		{
			// Files of a user who is mapped elsewhere, in a directory that only that user may enter.
			"a range beside", beside, userID, "5",
			map[string]string{"file": "65534:65534", "own": "0:0", "given": "5:5"},
			map[string]int{"own": subIDs, "given": subIDs + 5},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := tree(t, user)
			inner := filepath.Join(dir, "sub")
			for name, id := range map[string]int{dir: userID, inner: tt.owner, inner + "/file": tt.owner} {
				if err := errors.Join(os.Chown(name, id, id), os.Chmod(name, 0o700)); err != nil {
					t.Fatal(err)
				}
			}
			s := scenario{Launch: Launch{UIDMap: tt.m, GIDMap: tt.m}, View: View{Sources: []Source{{Path: inner}}}, Caps: Needed(Options{}), Probe: "owners", Arg: tt.give}
			found, _ := enter[map[string]string](t, user, s)
			for name, want := range tt.inside {
				if found[name] != want {
					t.Errorf("%s belongs to %s inside, want %s", name, found[name], want)
				}
			}
			for name, want := range tt.host {
				var st unix.Stat_t
				if err := unix.Stat(inner+"/"+name, &st); err != nil {
					t.Error(err)
				} else if int(st.Uid) != want || int(st.Gid) != want {
					t.Errorf("%s belongs to %d:%d on the host, want %d", name, st.Uid, st.Gid, want)
				}
			}
			// The launcher's other groups are good for what is its own only.
			s.Probe = "process"
			if p, _ := enter[process](t, user, s); (tt.m == nil || tt.name == "as root") != (len(p.Groups) > 0) {
				t.Errorf("groups %d", p.Groups)
			}
		})
	}
}

// TestIDMapErrors has maps that cannot be had.
func TestIDMapErrors(t *testing.T) {
	needRoot(t)
	grantSubIDs(t, "65534:200000:65536\n")
	ids := []IDMap{{Inside: 0, Outside: 300000, Count: 65536}}
	view := View{Sources: []Source{{Path: tree(t, user)}}}
	fails(t, user, scenario{Launch: Launch{UIDMap: ids}, View: view}, "map user ids: newuidmap: ", "/etc/subuid")
	fails(t, user, scenario{Launch: Launch{GIDMap: ids}, View: view}, "map group ids: newgidmap: ", "/etc/subgid")
	fails(t, user, scenario{Launch: Launch{UIDMap: slices.Repeat(ids, 2)}, View: view}, "map of user ids", "overlap")
	fails(t, user, scenario{Launch: Launch{GIDMap: []IDMap{{Inside: 1, Outside: 1, Count: 1}}}, View: view}, "map of group ids", "for the daemon itself")
	fails(t, root, scenario{Launch: Launch{UIDMap: ids}, View: view}, "are for ordinary users")

	cmd := command(t, user, scenario{Launch: Launch{UIDMap: ids}, View: view})
	cmd.Env = append(cmd.Env, "PATH=/nonexistent")
	_, status, said := run(t, cmd)
	if status != 1 || !strings.Contains(said, "expected the program newuidmap, of the package uidmap") || strings.Contains(said, "\n") {
		t.Errorf("exit status %d: %s", status, said)
	}
}

// TestStartErrors has what keeps a process from namespaces.
func TestStartErrors(t *testing.T) {
	err := startError(&os.PathError{Op: "fork/exec", Path: "/proc/self/exe", Err: unix.ENOSPC})
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "user.max_user_namespaces") {
		t.Error(err)
	}
	needRoot(t)
	// A container's root, who may not do that.
	cmd := command(t, root, scenario{View: View{Sources: []Source{{Path: tree(t, root)}}}, Probe: "tree"})
	withoutAdmin(t, cmd)
	if _, status, said := run(t, cmd); status != 1 || !strings.Contains(said, "expected the capability sys_admin") || strings.Contains(said, "\n") {
		t.Errorf("exit status %d: %s", status, said)
	}
}

// withoutAdmin has cmd run without CAP_SYS_ADMIN, as in most containers.
func withoutAdmin(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args = append([]string{"setpriv", "--bounding-set=-sys_admin", "--", cmd.Path}, cmd.Args[1:]...)
	cmd.Path = setpriv
}

// TestHiddenProc has part of /proc covered, as containers have it: a user namespace must not mount what uncovers it.
func TestHiddenProc(t *testing.T) {
	needRoot(t)
	if err := unix.Mount("none", "/proc/sys", "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/proc/sys", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s := scenario{View: View{Sources: []Source{{Path: tree(t, user)}}}, Probe: "tree"}
	_, status, said := run(t, command(t, user, s))
	// Linux may come to allow it for a /proc that shows processes only.
	if status != 0 && (!strings.Contains(said, "whose /proc is partly hidden") || strings.Contains(said, "\n")) {
		t.Errorf("exit status %d: %s", status, said)
	}
	enter[[]string](t, root, s)
}

// TestMissingCapability enters without a namespace and without a capability that is wanted, as in a container.
func TestMissingCapability(t *testing.T) {
	needRoot(t)
	for _, mode := range []Mode{Chroot, None} {
		admin := capOf(unix.CAP_SYS_ADMIN)
		cmd := command(t, root, scenario{Mode: mode, View: View{Sources: []Source{{Path: tree(t, root)}}}, Caps: Needed(Options{}) | admin, Probe: "threads"})
		withoutAdmin(t, cmd)
		r, status, said := run(t, cmd)
		if status != 0 || r.Missing != admin {
			t.Errorf("%s: exit status %d, missing %s: %s", mode, status, r.Missing, said)
		}
		for tid, state := range decode[map[string]thread](t, r) {
			if want := (thread{Permitted: Needed(Options{}), Effective: Needed(Options{}), NoNewPrivs: true}); state != want {
				t.Errorf("%s: thread %s: %+v", mode, tid, state)
			}
		}
	}
}

// TestSubmounts mounts below a source, before and after the sandbox was entered.
func TestSubmounts(t *testing.T) {
	needRoot(t)
	bothUsers(t, func(t *testing.T, w who) {
		dir := tree(t, w)
		mount := func(what string, flags uintptr) {
			t.Helper()
			name := filepath.Join(dir, what)
			if flags != 0 {
				if err := unix.Mount("", name, "", flags, ""); err != nil {
					t.Fatal(err)
				}
				return
			}
			if err := unix.Mount("none", name, "tmpfs", 0, "mode=0755"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(name, unix.MNT_DETACH) })
			if err := os.WriteFile(name+"/file", []byte("in a mount at "+what), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		mount("", 0)
		mount("", unix.MS_SHARED)
		for _, name := range []string{"before", "after"} {
			if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		mount("before", 0)
		for _, name := range []string{"before", "after"} {
			pipe := filepath.Join(t.TempDir(), "pipe")
			if err := unix.Mkfifo(pipe, 0o666); err != nil {
				t.Fatal(err)
			}
			// Both ends, so that nobody waits for the other.
			end, err := os.OpenFile(pipe, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer end.Close()
			cmd := command(t, w, scenario{View: View{Sources: []Source{{Path: dir, ReadOnly: true}}}, Pass: []string{pipe}, Probe: "submount", Arg: name + "/file"})
			for dir := filepath.Dir(pipe); dir != "/tmp"; dir = filepath.Dir(dir) {
				if err := os.Chmod(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			ready, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			cmd.Stdout = &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(ready).ReadString('\n'); line != "ready\n" {
				t.Fatal(line, err)
			}
			if name == "after" {
				mount("after", 0)
			}
			if _, err := end.WriteString("\n"); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
			var r report
			if err := json.Unmarshal(out.Bytes(), &r); err != nil {
				t.Fatal(err)
			}
			found := decode[[]string](t, r)
			if found[0] != "in a mount at "+name {
				t.Errorf("%s: read %q", name, found[0])
			}
			if name == "before" && found[1] != "EROFS" {
				t.Errorf("create a file in a mount below a read-only source: %q, want EROFS", found[1])
			}
		}
	})
}

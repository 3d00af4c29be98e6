package sandbox

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// kinds are the ways into a sandbox.
var kinds = []struct {
	who  who
	mode Mode
}{
	{root, Namespace},
	{user, Namespace},
	{root, Chroot},
	{root, None},
	{user, None},
}

// eachKind runs test for each way into a sandbox.
func eachKind(t *testing.T, test func(t *testing.T, w who, mode Mode)) {
	for _, k := range kinds {
		t.Run(fmt.Sprintf("%s/%s", k.mode, k.who), func(t *testing.T) {
			if k.who == root {
				needRoot(t)
			}
			test(t, k.who, k.mode)
		})
	}
}

// TestVisible lists all there is in the sandbox.
func TestVisible(t *testing.T) {
	for _, tt := range []struct {
		name string
		who  who
		mode Mode
		view func(dir string) View
		part bool // after Enter only
		want []string
	}{
		{
			"root", root, Namespace, func(dir string) View { return View{Sources: []Source{{Path: dir}}} }, false,
			[]string{"/", "/sources", "/sources/0", "/sources/0/file", "/sources/0/sub", "/sources/0/sub/file"},
		},
		{
			"user", user, Namespace, func(dir string) View { return View{Sources: []Source{{Path: dir}}} }, false,
			[]string{"/", "/sources", "/sources/0", "/sources/0/file", "/sources/0/sub", "/sources/0/sub/file"},
		},
		{
			"before Confine", user, Namespace, func(dir string) View { return View{Sources: []Source{{Path: dir + "/sub"}}} }, true,
			[]string{"/", "/proc", "/proc/self", "/proc/self/fd", "/sources", "/sources/0", "/sources/0/file"},
		},
		{
			"several", user, Namespace, func(dir string) View {
				return View{Sources: []Source{{Path: dir + "/sub", ReadOnly: true}, {}, {Path: dir + "/file", File: true}, {Path: dir + "/sub"}}}
			}, false,
			[]string{"/", "/sources", "/sources/0", "/sources/0/file", "/sources/2", "/sources/3", "/sources/3/file"},
		},
		{
			"nothing", user, Namespace, func(string) View { return View{} }, false,
			[]string{"/"},
		},
		{
			"files", root, Namespace, func(dir string) View {
				return View{Files: []string{dir + "/sub/file", dir + "/sub", dir + "/file", dir + "/sub"}}
			}, false,
			[]string{"/", "/tmp", "/tmp/SHARE", "/tmp/SHARE/file", "/tmp/SHARE/sub", "/tmp/SHARE/sub/file"},
		},
		{
			"chroot", root, Chroot, func(dir string) View { return View{Sources: []Source{{}, {Path: dir}}} }, false,
			[]string{"/", "/file", "/sub", "/sub/file"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.who == root {
				needRoot(t)
			}
			dir := tree(t, tt.who)
			view := tt.view(dir)
			found, r := enter[[]string](t, tt.who, scenario{Mode: tt.mode, View: view, Unconfined: tt.part, Probe: "tree"})
			for i := range found {
				found[i] = strings.ReplaceAll(found[i], filepath.Base(dir), "SHARE")
			}
			if !slices.Equal(found, tt.want) {
				t.Errorf("found %q, want %q", found, tt.want)
			}
			for i, path := range r.Paths {
				want := "/sources/" + strconv.Itoa(i)
				if tt.mode == Chroot {
					want = "/"
				}
				if view.Sources[i].Path == "" {
					want = ""
				}
				if path != want {
					t.Errorf("source %d is at %q, want %q", i, path, want)
				}
			}
		})
	}
}

// TestNowhere changes the root directory without a source: it becomes one that is gone, in which nothing can be found or made.
func TestNowhere(t *testing.T) {
	needRoot(t)
	fails(t, root, scenario{Mode: Chroot, Launched: true, Probe: "tree"}, "readdirent /: no such file or directory")
}

// TestUmask enters with a umask that would keep the guest's users, as which the daemon works, out of every directory.
func TestUmask(t *testing.T) {
	dir := tree(t, user)
	view := View{Sources: []Source{{Path: dir + "/sub"}}, Files: []string{dir + "/file"}}
	found, _ := enter[map[string]string](t, user, scenario{Umask: 0o777, View: view, Probe: "modes"})
	if len(found) < 4 {
		t.Errorf("directories %v", found)
	}
	for path, mode := range found {
		if mode != "-rwxr-xr-x" {
			t.Errorf("%s has the mode %s", path, mode)
		}
	}
}

// TestNetworkFiles asks for what name resolution needs.
func TestNetworkFiles(t *testing.T) {
	dir := tree(t, user)
	found, _ := enter[[]string](t, user, scenario{Launch: Launch{Network: true}, View: View{Sources: []Source{{Path: dir}}, Network: true}, Probe: "tree"})
	some := 0
	for _, path := range networkFiles {
		_, err := os.Stat(path)
		if there := err == nil; there != slices.Contains(found, path) {
			t.Errorf("%s is on the host: %t; inside: %t", path, there, !there)
		} else if there {
			some++
		}
	}
	if some == 0 {
		t.Errorf("this host has none of %q: the test shows nothing", networkFiles)
	}
	for _, path := range found {
		in := func(dir string) bool {
			return path == dir || strings.HasPrefix(path, dir+"/") || strings.HasPrefix(dir, path)
		}
		if !slices.ContainsFunc(append(networkFiles, "/sources"), in) {
			t.Errorf("%s is inside", path)
		}
	}
}

// TestLinkedFiles asks for a file that a symbolic link in a directory leads to.
func TestLinkedFiles(t *testing.T) {
	dir := tree(t, user)
	if err := os.Symlink("../file", dir+"/sub/link"); err != nil {
		t.Fatal(err)
	}
	found, _ := enter[[]string](t, user, scenario{View: View{Files: []string{dir + "/sub/link"}}, Probe: "tree"})
	if !slices.Contains(found, dir+"/sub/link") || slices.Contains(found, dir+"/file") {
		t.Errorf("found %q", found)
	}
	fails(t, user, scenario{View: View{Files: []string{dir + "/sub", dir + "/sub/link"}}}, "/sub/link that is needed", "a symbolic link on the way")
	enter[[]string](t, user, scenario{View: View{Files: []string{dir + "/sub", dir + "/sub/link", dir + "/file"}}, Probe: "tree"})
}

// TestEverything has the host's root for a source, with /proc, /sys, /dev and all.
func TestEverything(t *testing.T) {
	bothUsers(t, func(t *testing.T, w who) {
		for _, readonly := range []bool{false, true} {
			dir := tree(t, w)
			s := scenario{View: View{Sources: []Source{{Path: "/", ReadOnly: readonly}}}, Probe: "create", Arg: "/sources/0" + dir + "/made"}
			want := ""
			if readonly {
				want = "EROFS"
			}
			if got, _ := enter[string](t, w, s); got != want {
				t.Errorf("read-only %t: create a file: %q, want %q", readonly, got, want)
			}
		}
	})
}

func TestProcess(t *testing.T) {
	eachKind(t, func(t *testing.T, w who, mode Mode) {
		dir := tree(t, w)
		extra, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer extra.Close()
		s := scenario{Mode: mode, View: View{Sources: []Source{{Path: dir}}}, Probe: "process"}
		if mode == Namespace {
			s.Pass = []string{dir + "/file", dir + "/sub/file"}
		}
		cmd := command(t, w, s)
		cmd.ExtraFiles = slices.Repeat([]*os.File{extra}, 9) // what a careless parent leaves open
		r, status, said := run(t, cmd)
		if status != 0 {
			t.Fatalf("exit status %d: %s", status, said)
		}
		p := decode[process](t, r)

		if mode == Namespace && p.PID != 1 || mode != Namespace && p.PID == 1 {
			t.Errorf("process id %d", p.PID)
		}
		uid, gid := os.Geteuid(), os.Getegid()
		if uid == 0 && w == user {
			uid, gid = userID, groupID
		}
		if p.UID != uid || p.GID != gid {
			t.Errorf("user %d, group %d; want %d, %d", p.UID, p.GID, uid, gid)
		}
		if w == root && len(p.Groups) != 0 {
			t.Errorf("groups %d", p.Groups)
		}
		if want := []string{"an", "argument"}; !slices.Equal(p.Args, want) {
			t.Errorf("arguments %q, want %q", p.Args, want)
		}
		if p.Marked || p.Core != 0 {
			t.Errorf("%+v", p)
		}
		var own []string
		for _, kind := range namespaces {
			name, err := os.Readlink("/proc/self/ns/" + kind)
			if err != nil {
				t.Fatal(err)
			}
			if name != p.Namespaces[kind] {
				own = append(own, kind)
			}
		}
		var want []string
		if mode == Namespace {
			want = []string{"ipc", "mnt", "net", "pid"}
		}
		if mode == Namespace && w == user {
			want = append(want, "user")
		}
		if !slices.Equal(own, want) {
			t.Errorf("it has %q namespaces of its own, want %q", own, want)
		}
		if mode != Namespace {
			return
		}
		if !slices.Equal(p.Interfaces, []string{"lo"}) || !p.Session {
			t.Errorf("%+v", p)
		}
		number := regexp.MustCompile(`:\[\d+\]$`)
		for i := range p.Descriptors {
			p.Descriptors[i] = number.ReplaceAllString(p.Descriptors[i], "")
		}
		// Go's runtime keeps the files with the limits of its cgroup open, and the test a list of the threads.
		p.Descriptors = slices.DeleteFunc(p.Descriptors, func(d string) bool {
			name := filepath.Base(d)
			return name == "task" || strings.HasPrefix(name, "cpu.")
		})
		want = []string{
			"/dev/null", "pipe", "pipe", // the standard streams
			"pipe", // the lifeline
			dir + "/file", dir + "/sub/file",
			"/",                                              // the root
			"/",                                              // /proc/self/fd, whose mount starts there
			"anon_inode:[eventpoll]", "anon_inode:[eventfd]", // Go's own
		}
		slices.Sort(want)
		if !slices.Equal(p.Descriptors, want) {
			t.Errorf("open: %q\nwant: %q", p.Descriptors, want)
		}
	})
}

// TestNetwork keeps the host's network.
func TestNetwork(t *testing.T) {
	p, _ := enter[process](t, user, scenario{Launch: Launch{Network: true}, Probe: "process"})
	if slices.Equal(p.Interfaces, []string{"lo"}) {
		t.Errorf("interfaces %q: expected the host's", p.Interfaces)
	}
}

// TestThreads looks at the privileges of each of many threads.
func TestThreads(t *testing.T) {
	const held = 50
	wanted := Needed(Options{Xattr: true, FileHandles: true})
	var bounding CapSet
	for number := range lastCap() + 1 {
		if in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(number), 0, 0, 0); err == nil && in == 1 {
			bounding |= capOf(number)
		}
	}
	eachKind(t, func(t *testing.T, w who, mode Mode) {
		for _, caps := range []CapSet{wanted, 0, capOf(unix.CAP_DAC_READ_SEARCH)} {
			s := scenario{
				Mode: mode, View: View{Sources: []Source{{Path: tree(t, w)}}}, Caps: caps, Threads: held, Probe: "threads",
				Launched: caps == wanted, // it is all the same
			}
			found, r := enter[map[string]thread](t, w, s)
			want, missing := thread{Permitted: caps, Effective: caps, NoNewPrivs: true}, CapSet(0)
			if w == user && mode == None {
				want, missing = thread{NoNewPrivs: true, Bounding: bounding}, caps
			}
			if r.Missing != missing {
				t.Errorf("missing: %s, want %s", r.Missing, missing)
			}
			if len(found) < held {
				t.Errorf("%d threads, want more than %d", len(found), held)
			}
			for tid, state := range found {
				if state != want {
					t.Errorf("thread %s: %+v, want %+v", tid, state, want)
				}
			}
		}
	})
}

// TestNotConfined shows that TestThreads and Confine could see a thread that is otherwise.
func TestNotConfined(t *testing.T) {
	found, _ := enter[map[string]thread](t, user, scenario{View: View{Sources: []Source{{Path: tree(t, user)}}}, Unconfined: true, Threads: 3, Probe: "threads"})
	for tid, state := range found {
		if !state.Effective.Has(capOf(unix.CAP_SYS_ADMIN)) || state.Bounding == 0 || state.NoNewPrivs {
			t.Errorf("thread %s: %+v", tid, state)
		}
	}
	for change, want := range map[string]string{
		"capabilities": "kept privileges", "no_new_privs": "kept privileges", "root": "has a root directory of its own",
	} {
		fails(t, user, scenario{View: View{Sources: []Source{{Path: tree(t, user)}}}, Unconfined: true, Probe: "check", Arg: change}, want)
	}
}

// TestEmptyFromTheStart sees that the process in the sandbox, where its launcher can see to that, has all privileges that it begins
// with and cannot come by others.
func TestEmptyFromTheStart(t *testing.T) {
	needRoot(t)
	found, _ := enter[map[string]thread](t, root, scenario{View: View{Sources: []Source{{Path: tree(t, root)}}}, Unconfined: true, Threads: 3, Probe: "threads"})
	for tid, state := range found {
		if !state.Effective.Has(capOf(unix.CAP_SYS_ADMIN)|capOf(unix.CAP_SETFCAP)) || state.Bounding != 0 {
			t.Errorf("thread %s: %+v", tid, state)
		}
	}
}

// TestAttempts tries to get out.
func TestAttempts(t *testing.T) {
	eachKind(t, func(t *testing.T, w who, mode Mode) {
		if mode == None {
			t.Skip("keeps nothing from the daemon")
		}
		for _, readonly := range []bool{false, true} {
			if readonly && mode == Chroot {
				continue
			}
			s := scenario{
				Mode: mode, View: View{Sources: []Source{{Path: tree(t, w), ReadOnly: readonly}}}, Caps: Needed(Options{Xattr: true, FileHandles: true}),
				Probe: "attempts", Arg: strconv.Itoa(os.Getpid()),
			}
			found, _ := enter[map[string]string](t, w, s)
			want := map[string]string{
				"passwd above": "ENOENT", "passwd above the source": "ENOENT", "passwd from the working directory": "ENOENT",
				"kcore": "ENOENT", "root of init": "ENOENT", "own root": "ENOENT", "own memory": "ENOENT",
				"root by descriptor": "ENOENT", "memory by descriptor": "ENOENT", "sysrq by descriptor": "ENOENT", "own descriptors": "",
				"directory in the root": "EROFS", "directory in the source": "",
				"device": "", "device by path": "", "device opened": "EACCES", "device inspected": "", "device removed": "",
				"fifo": "", "fifo by path": "", "fifo opened": "",
				"mount": "EPERM", "remount": "EPERM", "clear read-only": "EPERM", "clear nodev": "EPERM", "unmount": "EPERM",
				"copy of mounts": "EPERM", "new mount namespace": "EPERM", "chroot": "EPERM",
				"signal all": "ESRCH", "signal a process of the host": "ESRCH", "regain privileges": "EPERM",
			}
			only := func(what, errno string) {
				maps.DeleteFunc(want, func(k, _ string) bool { return strings.HasPrefix(k, what+" ") })
				want[what] = errno
			}
			switch {
			case readonly:
				want["directory in the source"] = "EROFS"
				only("device", "EROFS")
				only("fifo", "EROFS")
			case w == user:
				only("device", "EPERM") // a user namespace cannot give that
			}
			if mode == Chroot {
				// Processes and mounts are the host's; capabilities alone protect them. The source is the root.
				for _, what := range []string{"signal all", "signal a process of the host", "root by descriptor", "memory by descriptor", "sysrq by descriptor"} {
					delete(want, what)
					delete(found, what)
				}
				want["directory in the root"], want["device opened"] = "", ""
			}
			if !maps.Equal(found, want) {
				for what := range found {
					if g, ok := want[what]; !ok || g != found[what] {
						t.Errorf("read-only %t: %s: %q, want %q", readonly, what, found[what], want[what])
					}
				}
				if len(want) != len(found) {
					t.Errorf("read-only %t: %d attempts, want %d: %v", readonly, len(found), len(want), found)
				}
			}
		}
	})
}

// TestReopen does with the descriptor of /proc/self/fd what passthrough does with it.
func TestReopen(t *testing.T) {
	eachKind(t, func(t *testing.T, w who, mode Mode) {
		dir := tree(t, w)
		text, _ := enter[string](t, w, scenario{Mode: mode, View: View{Sources: []Source{{Path: dir}}}, Caps: Needed(Options{}), Probe: "reopen"})
		if text != "in the share" {
			t.Errorf("read %q", text)
		}
		if _, err := os.Stat(dir + "/link"); err != nil {
			t.Error(err)
		}
	})
}

// TestRefusals has views that cannot be had.
func TestRefusals(t *testing.T) {
	dir := tree(t, user)
	source := []Source{{Path: dir}}
	for _, tt := range []struct {
		name string
		mode Mode
		who  who
		view View
		want string
	}{
		{"no such source", Namespace, user, View{Sources: []Source{{Path: dir + "/none"}}}, "/none: no such file"},
		{"file for a directory", Namespace, user, View{Sources: []Source{{Path: dir + "/file"}}}, "expected one to serve"},
		{"directory for a file", Namespace, user, View{Sources: []Source{{Path: dir, File: true}}}, "expected a file"},
		{"no such file", Namespace, user, View{Files: []string{dir + "/none"}}, "needed in the sandbox: open"},
		{"relative file", Namespace, user, View{Files: []string{"etc/hosts"}}, "expected an absolute path"},
		{"roundabout file", Namespace, user, View{Files: []string{"/etc/../etc/hosts"}}, "expected an absolute path"},
		{"everything", Namespace, user, View{Files: []string{"/"}}, "not /"},
		{"file of proc", Namespace, user, View{Files: []string{"/proc/version"}}, "/proc is the sandbox's own"},
		{"sources", Namespace, user, View{Files: []string{"/sources"}}, "/sources is the sandbox's own"},
		{"two roots", Chroot, root, View{Sources: []Source{{Path: dir}, {Path: dir}}}, "one source"},
		{"root that is a file", Chroot, root, View{Sources: []Source{{Path: dir + "/file", File: true}}}, "must be a directory"},
		{"files in a root", Chroot, root, View{Sources: source, Files: []string{dir + "/file"}}, "--sandbox namespace"},
		{"network in a root", Chroot, root, View{Sources: source, Network: true}, "--sandbox namespace"},
		{"root of a user", Chroot, user, View{Sources: source}, "takes root"},
		{"none without a source", None, user, View{Sources: []Source{{Path: dir + "/none"}}}, "/none: no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.who == root {
				needRoot(t)
			}
			fails(t, tt.who, scenario{Mode: tt.mode, View: tt.view}, tt.want)
		})
	}
}

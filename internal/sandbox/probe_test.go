package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// probes run in the sandbox; what they find goes to the test.
var probes = map[string]func(*inside) (any, error){
	"tree":     func(*inside) (any, error) { return listTree() },
	"modes":    modes,
	"process":  func(in *inside) (any, error) { return describe(in) },
	"threads":  func(in *inside) (any, error) { return threadsOf(in.tasks) },
	"attempts": func(in *inside) (any, error) { return attempts(in) },
	"launcher": func(*inside) (any, error) { return nil, nil },
	"owners":   owners,
	"orphan":   orphan,
	"signals":  waitForSignals,
	"exit": func(in *inside) (any, error) {
		status, err := strconv.Atoi(in.Arg)
		if err == nil {
			os.Exit(status)
		}
		return nil, err
	},
	"forbidden": func(*inside) (any, error) { return nil, forbiddenCall() },
	"early": func(in *inside) (any, error) {
		<-in.box.Orphaned()
		return nil, nil
	},
	"submount": submount,
	"reopen":   reopen,
	"check":    check,
	"create": func(in *inside) (any, error) {
		return unix.ErrnoName(errnoOf(unix.Mknod(in.Arg, unix.S_IFREG|0o600, 0))), nil
	},
}

// listTree lists all there is.
func listTree() ([]string, error) {
	var all []string
	err := filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrPermission) {
			return nil
		}
		if err != nil {
			return err
		}
		all = append(all, path)
		if path == procSelfFD {
			return fs.SkipDir
		}
		return nil
	})
	return all, err
}

// modes returns the permissions of all directories.
func modes(*inside) (any, error) {
	found := map[string]string{}
	all, err := listTree()
	for _, path := range all {
		var st os.FileInfo
		if st, err = os.Lstat(path); err != nil {
			return nil, err
		}
		if st.IsDir() {
			found[path] = st.Mode().Perm().String()
		}
	}
	return found, err
}

// process is what a process knows of itself.
type process struct {
	PID, UID, GID int
	Groups        []int
	Interfaces    []string // names, with " up"
	Descriptors   []string // what they are
	Args          []string
	Marked        bool // the launcher's marker is in the environment
	Core          uint64
	Umask         int
	Session       bool // it has a session of its own
	Namespaces    map[string]string
}

// namespaces are the kinds of namespaces of a process, as /proc/PID/ns names them.
var namespaces = []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"}

func describe(in *inside) (process, error) {
	p := process{PID: os.Getpid(), UID: os.Geteuid(), GID: os.Getegid(), Args: os.Args[1:], Namespaces: map[string]string{}}
	_, p.Marked = os.LookupEnv(marker)
	p.Umask = unix.Umask(0)
	var err error
	if p.Groups, err = os.Getgroups(); err != nil {
		return p, err
	}
	sid, err := unix.Getsid(0)
	if err != nil {
		return p, err
	}
	p.Session = sid == os.Getpid()
	tids, err := in.tasks.Readdirnames(1)
	if err != nil {
		return p, err
	}
	for _, kind := range namespaces {
		var name [64]byte
		n, err := unix.Readlinkat(int(in.tasks.Fd()), tids[0]+"/ns/"+kind, name[:])
		if err != nil {
			return p, err
		}
		p.Namespaces[kind] = string(name[:n])
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		return p, err
	}
	for _, i := range interfaces {
		name := i.Name
		if i.Flags&net.FlagUp != 0 {
			name += " up"
		}
		p.Interfaces = append(p.Interfaces, name)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		return p, err
	}
	p.Core = limit.Max
	dir, err := unix.Openat(in.box.ProcSelfFD(), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return p, err
	}
	f := os.NewFile(uintptr(dir), "fds")
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return p, err
	}
	for _, name := range names {
		var target [256]byte
		n, err := unix.Readlinkat(in.box.ProcSelfFD(), name, target[:])
		if err != nil {
			return p, err
		}
		if name != strconv.Itoa(dir) {
			p.Descriptors = append(p.Descriptors, string(target[:n]))
		}
	}
	slices.Sort(p.Descriptors)
	return p, nil
}

// thread is a threadState that JSON can have.
type thread struct {
	Inheritable, Permitted, Effective, Bounding, Ambient CapSet
	NoNewPrivs                                           bool
}

func threadsOf(tasks *os.File) (map[string]thread, error) {
	states, err := readThreads(tasks)
	found := map[string]thread{}
	for tid, s := range states {
		found[tid] = thread{s.inheritable, s.permitted, s.effective, s.bounding, s.ambient, s.noNewPrivs}
	}
	return found, err
}

func readThreadsOf(path string) (map[string]thread, error) {
	tasks, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer tasks.Close()
	return threadsOf(tasks)
}

// attempts tries what must not work, and what must, and returns the error of each: "" for none.
func attempts(in *inside) (map[string]string, error) {
	tried := map[string]string{}
	try := func(what string, err error) {
		tried[what] = unix.ErrnoName(errnoOf(err))
		if err != nil && tried[what] == "" {
			tried[what] = err.Error()
		}
	}
	open := func(what string, at int, path string, flags int) {
		fd, err := unix.Openat(at, path, flags|unix.O_CLOEXEC, 0)
		if err == nil {
			_ = unix.Close(fd)
		}
		try(what, err)
	}
	source := in.paths[0]

	open("passwd above", unix.AT_FDCWD, "/../../etc/passwd", unix.O_RDONLY)
	open("passwd above the source", unix.AT_FDCWD, source+"/../../../../etc/passwd", unix.O_RDONLY)
	open("passwd from the working directory", unix.AT_FDCWD, "../../../../etc/passwd", unix.O_RDONLY)
	open("kcore", unix.AT_FDCWD, "/proc/kcore", unix.O_RDONLY)
	open("root of init", unix.AT_FDCWD, "/proc/1/root/etc/passwd", unix.O_RDONLY)
	open("own root", unix.AT_FDCWD, "/proc/self/root/etc/passwd", unix.O_RDONLY)
	open("own memory", unix.AT_FDCWD, "/proc/self/mem", unix.O_RDWR)
	open("root by descriptor", in.box.ProcSelfFD(), "../root/etc/passwd", unix.O_RDONLY)
	open("memory by descriptor", in.box.ProcSelfFD(), "../mem", unix.O_RDWR)
	open("sysrq by descriptor", in.box.ProcSelfFD(), "../../sysrq-trigger", unix.O_WRONLY)
	open("own descriptors", in.box.ProcSelfFD(), "0", unix.O_PATH)

	try("directory in the root", unix.Mkdir("/escape", 0o755))
	try("directory in the source", unix.Mkdir(source+"/made", 0o755))

	try("device", unix.Mknod(source+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	if tried["device"] == "" {
		open("device by path", unix.AT_FDCWD, source+"/null", unix.O_PATH)
		open("device opened", unix.AT_FDCWD, source+"/null", unix.O_RDWR)
		var st unix.Stat_t
		try("device inspected", unix.Stat(source+"/null", &st))
		try("device removed", unix.Unlink(source+"/null"))
	}
	try("fifo", unix.Mknod(source+"/fifo", unix.S_IFIFO|0o666, 0))
	if tried["fifo"] == "" {
		open("fifo by path", unix.AT_FDCWD, source+"/fifo", unix.O_PATH)
		open("fifo opened", unix.AT_FDCWD, source+"/fifo", unix.O_RDWR|unix.O_NONBLOCK)
	}

	try("mount", unix.Mount("none", source, "tmpfs", 0, ""))
	try("remount", unix.Mount("", source, "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	try("clear read-only", unix.MountSetattr(unix.AT_FDCWD, source, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}))
	try("clear nodev", unix.MountSetattr(unix.AT_FDCWD, source, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_NODEV}))
	try("unmount", unix.Unmount(source, unix.MNT_DETACH))
	try("copy of mounts", func() error {
		fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err == nil {
			_ = unix.Close(fd)
		}
		return err
	}())
	try("new mount namespace", unix.Unshare(unix.CLONE_NEWNS))
	try("chroot", unix.Chroot(source))
	// Signal 0 asks whether one could be sent, and sends none: a sandbox that fails here must not take the host with it.
	try("signal all", unix.Kill(-1, 0))
	try("signal a process of the host", unix.Kill(in.hostPID(), 0))
	try("regain privileges", capsetAll(capOf(unix.CAP_SYS_ADMIN)|capOf(unix.CAP_SYS_CHROOT)))
	return tried, nil
}

// hostPID is a process of the host, one that the scenario's Arg names.
func (in *inside) hostPID() int {
	pid, err := strconv.Atoi(in.Arg)
	if err != nil {
		return 1 << 22 // above the highest there can be
	}
	return pid
}

// owners makes files as the daemon and as other users, and returns what their owners are, seen from inside.
func owners(in *inside) (any, error) {
	found := map[string]string{}
	add := func(name string) error {
		var st unix.Stat_t
		err := unix.Stat(in.paths[0]+"/"+name, &st)
		found[name] = fmt.Sprintf("%d:%d", st.Uid, st.Gid)
		return err
	}
	err := os.WriteFile(in.paths[0]+"/own", nil, 0o600)
	err = errors.Join(err, add("file"), add("own"))
	if in.Arg != "" {
		id, aerr := strconv.Atoi(in.Arg)
		err = errors.Join(err, aerr, os.WriteFile(in.paths[0]+"/given", nil, 0o600), os.Chown(in.paths[0]+"/given", id, id), add("given"))
	}
	return found, err
}

func orphan(in *inside) (any, error) {
	fmt.Println(os.Getppid()) // 0 in a process namespace: the launcher is outside
	<-in.box.Orphaned()
	fmt.Println("orphaned")
	os.Exit(0)
	return nil, nil
}

// submount says that it is ready, waits for a line on a pipe that was passed, reads the file Arg in the source and
// creates one beside it.
func submount(in *inside) (any, error) {
	fmt.Fprintln(os.Stderr, "ready")
	var line [1]byte
	if _, err := in.files[0].Read(line[:]); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(in.paths[0] + "/" + in.Arg)
	change := unix.Mknod(in.paths[0]+"/"+in.Arg+"2", unix.S_IFREG|0o600, 0)
	return []string{string(text), unix.ErrnoName(errnoOf(change))}, err
}

// reopen opens a file of the source by O_PATH and again through ProcSelfFD, as passthrough does.
func reopen(in *inside) (any, error) {
	fd, err := unix.Open(in.paths[0]+"/file", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	again, err := unix.Openat(in.box.ProcSelfFD(), strconv.Itoa(fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(again)
	var text [64]byte
	n, err := unix.Read(again, text[:])
	if err != nil {
		return nil, err
	}
	if err := unix.Linkat(in.box.ProcSelfFD(), strconv.Itoa(fd), unix.AT_FDCWD, in.paths[0]+"/link", unix.AT_SYMLINK_FOLLOW); err != nil {
		return nil, fmt.Errorf("link: %w", err)
	}
	return strings.Clone(string(text[:n])), nil
}

// check makes one thread differ, in what Arg says, and has the threads checked.
func check(in *inside) (any, error) {
	if err := in.box.porter.end(); err != nil {
		return nil, err
	}
	in.box.porter = nil
	states, err := readThreads(in.tasks)
	if err != nil {
		return nil, err
	}
	want := slices.Collect(maps.Values(states))[0]
	if err := checkThreads(in.tasks, want); err != nil {
		return nil, fmt.Errorf("before: %w", err)
	}
	changed := make(chan error)
	go func() {
		runtime.LockOSThread()
		switch in.Arg {
		case "capabilities":
			if errno := sys.SetThreadCaps(sys.Caps{Effective: uint64(want.effective &^ 1), Permitted: uint64(want.permitted)}); errno != 0 {
				changed <- errno
			}
			changed <- nil
		case "no_new_privs":
			changed <- unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		case "root":
			changed <- errors.Join(unix.Unshare(unix.CLONE_FS), unix.Chroot(in.paths[0]))
		}
		select {}
	}()
	if err := <-changed; err != nil {
		return nil, fmt.Errorf("change a thread: %w", err)
	}
	return nil, checkThreads(in.tasks, want)
}

// errnoOf is the errno that err is, 0 for none.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	errors.As(err, &errno)
	return errno
}

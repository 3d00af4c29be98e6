package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// Launch is how the program is started again in namespaces of its own. The zero value is the same command line, and for an
// ordinary user the own ids and no others.
type Launch struct {
	// Mode is the child's sandbox; with Chroot and None it gets no namespaces of its own, and is only another process.
	Mode Mode
	// Network keeps the host's network.
	Network bool
	// UIDMap and GIDMap are the ids of the user namespace; root has none. Empty is the own id, which stays what it is.
	// Anything but one entry for just that takes newuidmap(1) and newgidmap(1), and ranges in /etc/subuid and /etc/subgid.
	UIDMap, GIDMap []IDMap
	// Files are what Inherited returns in the child. Start closes them.
	Files []*os.File
	// Args are the child's arguments with the program's name, os.Args without.
	Args []string
	// Env is the child's environment, os.Environ() if nil.
	Env []string
	// Keep are the capabilities that the launcher keeps for what it does at the end.
	Keep CapSet
}

// Validate says what cannot be done for the user who runs this process.
func (l Launch) Validate() error {
	if l.Mode == Chroot && os.Geteuid() != 0 {
		return errChrootTakesRoot
	}
	if len(l.UIDMap) == 0 && len(l.GIDMap) == 0 {
		return nil
	}
	if os.Geteuid() == 0 {
		return errors.New("--uid-map and --gid-map are for ordinary users, and this is root: expected neither")
	}
	if err := checkIDMaps(l.uidMap(), uint32(os.Geteuid())); err != nil {
		return fmt.Errorf("map of user ids: %w", err)
	}
	if err := checkIDMaps(l.gidMap(), uint32(os.Getegid())); err != nil {
		return fmt.Errorf("map of group ids: %w", err)
	}
	return nil
}

func (l Launch) uidMap() []IDMap { return orOwn(l.UIDMap, os.Geteuid()) }
func (l Launch) gidMap() []IDMap { return orOwn(l.GIDMap, os.Getegid()) }

func orOwn(m []IDMap, id int) []IDMap {
	if len(m) > 0 {
		return m
	}
	return []IDMap{{Inside: uint32(id), Outside: uint32(id), Count: 1}}
}

// A Child is the process in the sandbox, seen from its launcher.
type Child struct {
	cmd      *exec.Cmd
	lifeline *os.File // nothing else in the world holds this end of the pipe
}

// Start starts the child. When it returns the child is past Inherited, and this process has given up all capabilities but
// l.Keep and may not get any again, on every thread: start nothing more that needs any.
//
// Every descriptor of this process becomes close-on-exec, so that the child has the standard streams, of which the
// input is /dev/null, and l.Files. It has a session of its own: a signal from the terminal comes to the launcher only, and
// input cannot be pushed to the terminal.
func Start(l Launch) (*Child, error) {
	defer func() {
		for _, f := range l.Files {
			_ = f.Close()
		}
	}()
	if err := l.Validate(); err != nil {
		return nil, err
	}
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("keep descriptors from the sandbox: %w", sinceLinux(err, "5.11"))
	}
	life, lifeline, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	ready, answer, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make a pipe: %w", err), life.Close(), lifeline.Close())
	}
	defer ready.Close()
	c := &Child{cmd: l.command(life, answer), lifeline: lifeline}
	err = l.start(c.cmd)
	// The child has them now, and its end must be seen.
	_, _ = life.Close(), answer.Close()
	if err != nil {
		_ = lifeline.Close()
		return nil, startError(err)
	}
	if err := l.prepare(c, ready); err != nil {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
		_ = lifeline.Close()
		return nil, err
	}
	return c, nil
}

// command is the child, not yet started.
func (l Launch) command(life, answer *os.File) *exec.Cmd {
	args, env := l.Args, l.Env
	if args == nil {
		args = os.Args
	}
	if env == nil {
		env = os.Environ()
	}
	h := handover{mode: l.Mode, files: len(l.Files)}
	attr := &syscall.SysProcAttr{Setsid: true}
	if l.Mode == Namespace {
		attr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC
		if !l.Network {
			attr.Cloneflags |= unix.CLONE_NEWNET
		}
	}
	if l.unshareUser() {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		// A user other than 0 loses all capabilities when a program is executed, unless they are ambient.
		for number := range lastCap() + 1 {
			attr.AmbientCaps = append(attr.AmbientCaps, uintptr(number))
		}
		h.rootUser, h.rootGroup = mapsRoot(l.uidMap()), mapsRoot(l.gidMap())
		h.keepGroups = isOwn(l.gidMap(), os.Getegid())
	}
	return &exec.Cmd{
		Path: "/proc/self/exe", Args: args, Env: append(env[:len(env):len(env)], marker+"="+h.String()),
		Stdout: os.Stdout, Stderr: os.Stderr,
		ExtraFiles: append([]*os.File{life, answer}, l.Files...), SysProcAttr: attr,
	}
}

// start starts the child with an empty bounding set, if it can: the child then has not to empty it on each of its threads, 41
// times, which is a third of the time that it takes to serve. What the child has meanwhile it has by its inheritable set.
func (l Launch) start(cmd *exec.Cmd) error {
	has, errno := sys.ThreadCaps()
	if errno != 0 {
		return fmt.Errorf("read the capabilities: %w", errno)
	}
	if l.unshareUser() || !CapSet(has.Effective).Has(capOf(unix.CAP_SETPCAP)) {
		return cmd.Start() // a new user namespace begins with all of them
	}
	p := newPorter()
	err := p.do(func() error {
		has.Inheritable = has.Permitted
		if errno := sys.SetThreadCaps(has); errno != 0 {
			return fmt.Errorf("have the child inherit the capabilities: %w", errno)
		}
		for number := range lastCap() + 1 {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(number), 0, 0, 0); err != nil {
				return fmt.Errorf("drop %s from the bounding set of the child: %w", capOf(number), err)
			}
		}
		return cmd.Start()
	})
	return errors.Join(err, p.end())
}

// unshareUser says whether the child gets a user namespace.
func (l Launch) unshareUser() bool { return l.Mode == Namespace && os.Geteuid() != 0 }

// startError says what to do about a child that could not be started.
func startError(err error) error {
	hint := ""
	switch root := os.Geteuid() == 0; {
	case root && errors.Is(err, unix.EPERM):
		hint = ": expected the capability sys_admin; without it, as in a container, use --sandbox chroot or none"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		hint = ": expected user namespaces to be allowed for ordinary users (sysctl kernel.unprivileged_userns_clone, " +
			"kernel.apparmor_restrict_unprivileged_userns); otherwise use --sandbox none"
	case errors.Is(err, unix.ENOSPC):
		hint = ": expected room for more namespaces (sysctl user.max_user_namespaces and the others of user.)"
	}
	return fmt.Errorf("start in namespaces: %w%s", err, hint)
}

// prepare maps the child's ids, gives up this process's privileges, tells the child to go on and waits until it does.
func (l Launch) prepare(c *Child, ready *os.File) error {
	if l.unshareUser() {
		if err := l.mapIDs(c.cmd.Process.Pid); err != nil {
			return err
		}
	}
	tasks, err := openTasks()
	if err != nil {
		return err
	}
	defer tasks.Close()
	// The bounding set, with its 40 calls on every thread, says nothing once no_new_privs is set.
	_, want, err := dropAll(l.Keep, false)
	if err == nil {
		err = checkThreads(tasks, want)
	}
	if err != nil {
		return fmt.Errorf("give up the launcher's privileges: %w", err)
	}
	_, err = c.lifeline.Write([]byte{1})
	if err == nil {
		_, err = io.ReadFull(ready, make([]byte, 1))
	}
	if err != nil {
		status, err := c.Wait(nil)
		if err != nil {
			return err
		}
		return fmt.Errorf("the process in the sandbox ended at once, with status %d", status)
	}
	return nil
}

func (l Launch) mapIDs(pid int) error {
	if err := mapIDs(pid, "gid", l.gidMap(), os.Getegid()); err != nil {
		return fmt.Errorf("map group ids: %w", err)
	}
	if err := mapIDs(pid, "uid", l.uidMap(), os.Geteuid()); err != nil {
		return fmt.Errorf("map user ids: %w", err)
	}
	return nil
}

// isOwn says whether the map is what an ordinary user may write: the own id and no other.
func isOwn(m []IDMap, own int) bool {
	return len(m) == 1 && m[0].Count == 1 && m[0].Outside == uint32(own)
}

// mapIDs writes the map of the user namespace of pid, of the kind "uid" or "gid".
func mapIDs(pid int, kind string, m []IDMap, own int) error {
	if !isOwn(m, own) {
		return mapWithHelper(pid, kind, m)
	}
	dir := "/proc/" + strconv.Itoa(pid)
	if kind == "gid" {
		// Or else giving up a group could give access to what is denied to the group.
		if err := os.WriteFile(dir+"/setgroups", []byte("deny"), 0); err != nil {
			return err
		}
	}
	err := os.WriteFile(dir+"/"+kind+"_map", fmt.Appendf(nil, "%d %d 1\n", m[0].Inside, m[0].Outside), 0)
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w: expected user namespaces to be allowed for ordinary users (sysctl kernel.apparmor_restrict_unprivileged_userns)", err)
	}
	return err
}

// mapWithHelper has newuidmap(1) or newgidmap(1) write the map.
func mapWithHelper(pid int, kind string, m []IDMap) error {
	helper := "new" + kind + "map"
	args := []string{strconv.Itoa(pid)}
	for _, e := range m {
		for _, n := range []uint32{e.Inside, e.Outside, e.Count} {
			args = append(args, strconv.FormatUint(uint64(n), 10))
		}
	}
	out, err := exec.Command(helper, args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%w: expected the program %s, of the package uidmap or shadow-utils; without it only the own id can be mapped", err, helper)
	}
	if err != nil {
		said := string(bytes.TrimSpace(out))
		return fmt.Errorf("%s: %w: %s: expected the ranges to be granted to this user in /etc/sub%s", helper, err,
			strings.ReplaceAll(said, "\n", "; "), kind)
	}
	return nil
}

// PID is the child's process id.
func (c *Child) PID() int { return c.cmd.Process.Pid }

// Signal sends the child a signal.
func (c *Child) Signal(sig os.Signal) error {
	return c.cmd.Process.Signal(sig)
}

// Wait passes signals on to the child until it ends, and returns its exit status. If a signal ended it, that is 128 and the
// signal's number, with an error that says so.
func (c *Child) Wait(signals <-chan os.Signal) (status int, err error) {
	done := make(chan error, 1)
	go func() { done <- c.cmd.Wait() }()
	for {
		select {
		case sig, ok := <-signals:
			if !ok {
				signals = nil
				continue
			}
			// One that comes too late is of no use to anybody.
			_ = c.Signal(sig)
			continue
		case err = <-done:
		}
		break
	}
	_ = c.lifeline.Close()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 1, fmt.Errorf("wait for the process in the sandbox: %w", err)
	}
	return exitStatus(c.cmd.ProcessState.Sys().(syscall.WaitStatus))
}

// exitStatus is Wait's result.
func exitStatus(ws syscall.WaitStatus) (int, error) {
	if !ws.Signaled() {
		return ws.ExitStatus(), nil
	}
	sig := ws.Signal()
	hint := ""
	switch sig {
	case unix.SIGSYS:
		hint = ": ended by the seccomp filter, for a system call that it does not allow"
	case unix.SIGKILL:
		hint = ": by an administrator, or for want of memory"
	}
	return 128 + int(sig), fmt.Errorf("the process in the sandbox was ended by %s (%s)%s", unix.SignalName(sig), sig, hint)
}

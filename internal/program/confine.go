package program

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/seccomp"
)

// marker is the environment variable that tells a child that it is to become a program: its value is the descriptor of a
// SOCK_SEQPACKET socket on which the plan waits, and which takes an error.
const marker = "SLUICE_PROGRAM"

// plan is what a child is to become.
type plan struct {
	Path       string
	Args, Env  []string
	Dir        string
	Credential *Credential
	Confine    Confinement
}

func (c *Config) plan(path string) plan {
	return plan{Path: path, Args: c.Args, Env: c.Env, Dir: cmp.Or(c.Dir, "/"), Credential: c.Credential, Confine: c.Confine}
}

// MaybeConfine makes this process the program that Start has it started for, and does not return then; in any other process
// it does nothing. Call it first in main, and in TestMain of packages that start programs.
func MaybeConfine() {
	fd, p, ok := inherited()
	if !ok {
		return
	}
	runtime.LockOSThread() // all that follows changes this thread, and execve(2) leaves no other
	err := p.become(fd)
	_ = unix.Sendmsg(fd, []byte(err.Error()), nil, nil, unix.MSG_NOSIGNAL)
	unix.Exit(1) // half of a program must not go on as the daemon
}

// inherited returns the socket to the supervisor and the plan, and false if this process is not such a child. A variable that
// somebody has set by mistake is not enough.
func inherited() (int, *plan, bool) {
	text, ok := os.LookupEnv(marker)
	if !ok {
		return 0, nil, false
	}
	fd, err := strconv.Atoi(text)
	if err != nil || fd <= FD {
		return 0, nil, false
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_SEQPACKET {
		return 0, nil, false
	}
	size, _, err := unix.Recvfrom(fd, nil, unix.MSG_PEEK|unix.MSG_TRUNC|unix.MSG_DONTWAIT)
	if err != nil {
		return 0, nil, false
	}
	b := make([]byte, size)
	if _, _, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT); err != nil {
		return 0, nil, false
	}
	p := new(plan)
	if err := json.Unmarshal(b, p); err != nil || len(p.Args) == 0 {
		return 0, nil, false
	}
	return fd, p, true
}

// become confines this thread and executes the program. It returns only if it cannot.
func (p *plan) become(supervisor int) error {
	// What this process has inherited itself without being asked is not for the program.
	if err := unix.CloseRange(uint(supervisor), math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("keep descriptors from the program: %w: expected Linux 5.11 or later", err)
	}
	if !p.Confine.None {
		if err := p.mounts(); err != nil {
			return err
		}
	}
	if err := p.limits(); err != nil {
		return err
	}
	if err := p.identity(); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	// Becoming another user has taken it away.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("end with the supervisor: %w", err)
	}
	gone := []unix.PollFd{{Fd: int32(supervisor)}}
	if n, err := unix.Poll(gone, 0); err != nil || n != 0 {
		return errors.New("the supervisor has gone")
	}
	if err := unix.Chdir(p.Dir); err != nil {
		return &os.PathError{Op: "change to directory", Path: p.Dir, Err: err}
	}
	if p.Confine.Seccomp {
		if err := seccomp.ConfineProgram(p.Confine.Mount); err != nil {
			return err
		}
	}
	return &os.PathError{Op: "execute", Path: p.Path, Err: syscall.Exec(p.Path, p.Args, p.Env)}
}

// mounts makes what is mounted private, and takes away what the program has no use for.
func (p *plan) mounts() error {
	// What the host mounts later is still to be seen here, and nothing of this there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts to itself: %w", err)
	}
	if p.Confine.ReadOnly {
		if err := p.readOnly(); err != nil {
			return err
		}
	}
	// Kernel settings are files of user 0's, who need not have a capability for them.
	if err := setMount("/sys", true, unix.MOUNT_ATTR_RDONLY); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("make /sys read-only: %w", err)
	}
	// Other processes are none of its business. Where /proc is covered in part, as in containers, an ordinary user may not mount
	// another one; the host's then shows nothing of what it is not in.
	err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, "")
	if err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("mount /proc: %w", err)
	}
	return nil
}

// readOnly makes everything read-only but what is to be writable.
func (p *plan) readOnly() error {
	for _, w := range p.Confine.Writable {
		if err := unix.Mount(w, w, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("keep %s writable: %w", w, err)
		}
	}
	if err := setMount("/", true, unix.MOUNT_ATTR_RDONLY); err != nil {
		return fmt.Errorf("make files read-only: %w", err)
	}
	for _, w := range p.Confine.Writable {
		err := unix.MountSetattr(unix.AT_FDCWD, w, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})
		if err != nil {
			return fmt.Errorf("keep %s writable: %w", w, err)
		}
	}
	for _, w := range p.Confine.Writable {
		if w == "/tmp" || len(w) > len("/tmp/") && w[:len("/tmp/")] == "/tmp/" {
			return nil // it would be covered
		}
	}
	if err := unix.Mount("tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777,size=64m"); err != nil {
		return fmt.Errorf("mount an empty /tmp: %w", err)
	}
	return nil
}

func setMount(path string, recursive bool, set uint64) error {
	flags := uint(0)
	if recursive {
		flags = unix.AT_RECURSIVE
	}
	return unix.MountSetattr(unix.AT_FDCWD, path, flags, &unix.MountAttr{Attr_set: set})
}

func (p *plan) limits() error {
	core := unix.Rlimit{}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &core); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	for which, limit := range p.Confine.Rlimits {
		if err := unix.Setrlimit(which, &limit); err != nil {
			return fmt.Errorf("set limit %d to %d: %w", which, limit.Cur, err)
		}
	}
	return nil
}

// identity becomes the user, with the capabilities that are kept.
func (p *plan) identity() error {
	caps, errno := sys.ThreadCaps()
	if errno != 0 {
		return fmt.Errorf("read the capabilities: %w", errno)
	}
	keep := caps.Permitted & p.Confine.Caps
	if p.Confine.Mount {
		keep |= caps.Permitted & (1 << unix.CAP_SYS_ADMIN)
	}
	if caps.Effective&(1<<unix.CAP_SETPCAP) != 0 {
		for n := range lastCap() + 1 {
			if keep&(1<<n) == 0 {
				_ = unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0)
			}
		}
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep capabilities: %w", err)
	}
	who := Credential{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
	if p.Credential != nil {
		who = *p.Credential
	}
	if errno := sys.SetThreadGroups(who.Groups); errno != 0 && (errno != unix.EPERM || len(who.Groups) > 0) {
		return fmt.Errorf("set the supplementary groups: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SETRESGID, uintptr(who.GID), uintptr(who.GID), uintptr(who.GID)); errno != 0 {
		return fmt.Errorf("become group %d: %w", who.GID, errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_SETRESUID, uintptr(who.UID), uintptr(who.UID), uintptr(who.UID)); errno != 0 {
		return fmt.Errorf("become user %d: %w", who.UID, errno)
	}
	// What is not inheritable is not ambient either.
	left := sys.Caps{Effective: keep, Permitted: keep}
	if who.UID != 0 {
		left.Inheritable = keep
	}
	if errno := sys.SetThreadCaps(left); errno != 0 {
		return fmt.Errorf("give up capabilities: %w", errno)
	}
	for n := range lastCap() + 1 {
		if left.Inheritable&(1<<n) != 0 {
			if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(n), 0, 0); err != nil {
				return fmt.Errorf("keep capability %d: %w", n, err)
			}
		}
	}
	return nil
}

// lastCap is the highest capability that the kernel knows.
func lastCap() int {
	n := 0
	for {
		if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(n+1), 0, 0, 0); err != nil {
			return n
		}
		n++
	}
}

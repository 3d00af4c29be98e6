// Package program starts programs outside the sandbox, confines them, starts them again when they end, and hands what they are
// to speak with over to the process that serves guests.
//
// A program finds a SOCK_SEQPACKET socket as descriptor FD. For each start there is a new pair of sockets; the other end goes
// to the server over the Supervisor's line, or with Config.OnStart to who started it.
//
// Go can run nothing between fork and exec, so the process starts its own binary again in the new namespaces, which puts
// what is left of the confinement on and then becomes the program: MaybeConfine must be called first in main.
package program

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// FD is the descriptor at which a program finds its socket. Config.Files follow.
const FD = 3

// Config is a program and how it is run.
type Config struct {
	// Name is what the log calls it.
	Name string
	// Args are the program and its arguments. A program without a slash is looked for in the PATH of Env.
	Args []string
	// Env is its whole environment; nil is DefaultEnv.
	Env []string
	// Dir is its working directory; "" is /.
	Dir string
	// Files are descriptors FD+1 and on for it. They stay the caller's, and must stay open until Stop has returned.
	Files []*os.File
	// Credential is who it runs as; nil is who this process runs as, without supplementary groups where they can be given up.
	Credential *Credential
	// Confine is what it is kept from. Every program gets no_new_privs and a session of its own.
	Confine Confinement
	// BufferSize is what the sockets are to take at once, in bytes; 0 is DefaultBufferSize. Without CAP_NET_ADMIN it is at
	// most what net.core.wmem_max allows, and SendLimit of the socket says what came of it.
	BufferSize int
	// Backoff is how it is started again.
	Backoff Backoff
	// OnStart, unless nil, is given the other end of each start's socket, to be closed by it, and there is no line: for a
	// program that serves many over one control socket. It must return soon.
	OnStart func(control *os.File)
	// Serves, unless nil, waits until the program that has just been started as process pid serves, and returns what the line brings
	// in place of its socket: for a program that mounts. ctx ends with the program; on an error it is ended, and started again.
	Serves func(ctx context.Context, pid int) (*os.File, error)
	// Log takes what the program writes to its standard output and error, line by line and at a bounded rate, and its ends.
	Log *slog.Logger
}

// Credential is who a program runs as.
type Credential struct {
	UID, GID uint32
	Groups   []uint32
}

// Confinement is what a program is kept from. The zero value gives it new process, mount, IPC, UTS and network namespaces, with
// no network and the host's files as its user may use them.
type Confinement struct {
	// None starts it in the host's namespaces, as where namespaces are not to be had.
	None bool
	// Network leaves it the host's network.
	Network bool
	// ReadOnly makes all files that it sees read-only, with an empty /tmp of its own, but for what is below Writable.
	ReadOnly bool
	Writable []string
	// Seccomp refuses it, with EPERM, the system calls of the daemon's deny set that change the machine, mounts or namespaces, or
	// reach into other processes.
	Seccomp bool
	// Mount lets it mount in its own mount namespace: it keeps CAP_SYS_ADMIN, and Seccomp leaves mount(2) and umount2(2).
	Mount bool
	// Caps are the capabilities that it keeps of those that this process has: bit N is number N of linux/capability.h.
	Caps uint64
	// Rlimits are its limits by unix.RLIMIT_*.
	Rlimits map[int]unix.Rlimit
}

// KeeperCaps are the capabilities that a supervising process of root's needs for as long as programs are to be started again, besides
// those of Confinement.Caps, which it can only pass on: namespaces, another user, an empty bounding set, the sockets' buffers, signals
// for another user's processes, and what they have mounted.
const KeeperCaps uint64 = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETPCAP | 1<<unix.CAP_NET_ADMIN |
	1<<unix.CAP_KILL | 1<<unix.CAP_SYS_PTRACE

// DefaultBufferSize takes the largest messages of FUSE programs: 1 MiB with headers, and as much again that is waiting.
const DefaultBufferSize = 2<<20 + 1<<16

// Backoff is how long to wait before a program is started again: First, then twice as long each time up to Max, and First again
// after it has run for Reset. Zeros are 100 ms, 10 s and 30 s.
type Backoff struct {
	First, Max, Reset time.Duration
}

// DefaultEnv is the environment of programs that are given none: nothing of the daemon's is their business.
func DefaultEnv() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/"}
}

// Validate says what of c cannot be.
func (c *Config) Validate() error {
	switch {
	case len(c.Args) == 0 || c.Args[0] == "":
		return errors.New("no program: expected its name and arguments")
	case c.OnStart != nil && c.Serves != nil:
		return errors.New("OnStart and Serves: expected one of the two")
	case c.BufferSize < 0:
		return fmt.Errorf("buffer of %d bytes: expected 0 for the default, or more", c.BufferSize)
	case c.Confine.None && (c.Confine.ReadOnly || c.Confine.Mount):
		return errors.New("a program without namespaces cannot have mounts of its own: expected one of the two")
	case c.Credential != nil && os.Geteuid() != 0 && c.Credential.UID != uint32(os.Geteuid()):
		return fmt.Errorf("run as user %d: expected root to start it, this is user %d", c.Credential.UID, os.Geteuid())
	}
	for _, w := range c.Confine.Writable {
		if !filepath.IsAbs(w) {
			return fmt.Errorf("writable path %q: expected an absolute one", w)
		}
	}
	for _, a := range append(append([]string(nil), c.Args...), c.Env...) {
		if strings.ContainsRune(a, 0) {
			return fmt.Errorf("argument or environment variable %q: expected no NUL in it", a)
		}
	}
	return nil
}

// path finds the program in env's PATH.
func path(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, e := range env {
		dirs, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(dirs) {
			file := filepath.Join(dir, name)
			if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 && filepath.IsAbs(file) {
				return file, nil
			}
		}
	}
	return "", fmt.Errorf("find program %s: %w: expected it to be installed, or its absolute path", name, exec.ErrNotFound)
}

// Package config holds what a run of sluiced was asked to do, as data: no flags, no files, no I/O.
//
// Every field has one row in daemon/flags.go, and a test holds the two together.
package config

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"unicode/utf8"
)

const (
	// NoFD in Config.FD says that no socket was inherited.
	NoFD = -1
	// DefaultNofile in Config.RlimitNofile asks for the default limit: 1000000, or fs.nr_open if that is less.
	DefaultNofile = -1

	// MaxTag is the length of the tag field of struct virtio_fs_config, in bytes (virtio 1.3, 5.11.4).
	MaxTag = 36
	// MaxSocketPath is the longest path a Unix socket can be bound to, in bytes: sun_path less its NUL.
	MaxSocketPath = 107
	// MaxRequestQueues bounds Config.RequestQueues: vhost-user has 8 bits for the index of a queue, and hiprio is one of them.
	MaxRequestQueues = 255

	// DefaultMaxInodes is what Share.MaxInodes 0 stands for.
	DefaultMaxInodes = 16 << 20

	stderr = 2
)

// Config is one run of the daemon.
type Config struct {
	// Share is the directory to serve.
	Share Share
	// Bundle is the directory of an OCI bundle to serve instead of Share.Dir: root file system and mounts of its config.json.
	Bundle string
	// Spec is the file of an OCI runtime spec to serve instead, whose relative paths start from its directory.
	Spec string
	// Backend names what serves the root: an extension, "passthrough" or "mem"; "" asks the extensions.
	Backend string
	// ListExtensions prints the extensions instead of serving.
	ListExtensions bool

	// File is a TOML file with shares and options; what the command line says goes before it.
	File string
	// CheckFile checks File instead of serving.
	CheckFile bool
	// Shares are shares beside those of File, "tag=…,dir=…,socket=…" each.
	Shares []string
	// ControlSocket is where the control API listens; "" is nowhere.
	ControlSocket string
	// ControlGroup names the group that may connect to ControlSocket.
	ControlGroup string
	// AllowExtensions are the extensions that may serve where grafts can be added later; nil is all of them.
	AllowExtensions []string

	// StateDir is where the daemon keeps what outlives it: layers that a guest has written, checkpoints, chunks of images. "" is
	// /var/lib/sluice for root, and sluice in the user's own state directory.
	StateDir string
	// Plugins are executables that serve layers; nil is those in the default directory.
	Plugins []string

	// Keeper is no option: the daemon sets it where the share needs a process outside the sandbox, as with Shares.
	Keeper bool

	// SocketPath is where to create the listening socket. Its pid file is the same path with ".pid" appended.
	SocketPath string
	// SocketGroup names the group that may connect to SocketPath; "" leaves it to the daemon's own user.
	SocketGroup string
	// FD is an inherited Unix stream socket, listening or connected; NoFD is none.
	FD int
	// Persist listens again after a front-end has gone.
	Persist bool

	// RequestQueues is the number of request queues offered, beside hiprio.
	RequestQueues int

	// Sandbox is what the daemon locks itself into before it serves.
	Sandbox Sandbox
	// UIDMap and GIDMap say which ids an ordinary user's namespace has, ":inside:outside:count:" each.
	UIDMap, GIDMap []string
	// ModCaps adds capabilities to those that are kept, or takes some away: "+sys_admin:-mknod".
	ModCaps string
	// Seccomp is what happens to a system call outside the filter.
	Seccomp Seccomp
	// SeccompReport is a file for what log and trace have seen; "" writes none.
	SeccompReport string
	// CPUProfile is a file for a profile of what the serving process's CPU time goes to, as pprof has it; "" writes none.
	CPUProfile string

	// RlimitNofile is the limit on open files to set, soft and hard; 0 leaves it as it is, DefaultNofile is the default.
	RlimitNofile int64

	// LogLevel is the least severe level that is logged.
	LogLevel LogLevel
	// Syslog sends the log to syslog instead of standard error.
	Syslog bool
}

// Share is one directory and how the guest sees it.
type Share struct {
	// Dir is the directory on the host.
	Dir string
	// Tag is the name the guest mounts it by, 1 to MaxTag bytes; with "" the front-end provides the configuration space.
	Tag string

	// Cache says how long the guest may trust what it has cached.
	Cache CachePolicy
	// Writeback lets the guest gather writes in its page cache.
	Writeback bool
	// ReadOnly refuses every change with EROFS.
	ReadOnly bool
	// Xattr serves extended attributes; without it they are ENOSYS.
	Xattr bool
	// AllowMmap lets the guest map files shared that it has open for direct I/O (FUSE_DIRECT_IO_ALLOW_MMAP).
	AllowMmap bool
	// AllowDirectIO passes the guest's O_DIRECT on to the host; without it the flag is dropped.
	AllowDirectIO bool
	// PosixLock shares fcntl(2)'s locks with other guests and with the host; without it they are each guest's own.
	PosixLock bool
	// Flock does the same for flock(2)'s.
	Flock bool
	// NoReaddirplus withholds READDIRPLUS, as CacheNever does.
	NoReaddirplus bool
	// NoOpen has the guest read files and directories without opening them (FUSE_NO_OPEN_SUPPORT).
	NoOpen bool

	// PollWindow is how long the share's workers look at their rings before they sleep.
	PollWindow PollWindow

	// MaxFDs bounds the descriptors kept for inodes the guest knows, beside those of the files it has open; 0 derives it
	// from the limit on open files.
	MaxFDs int
	// MaxInodes bounds the inodes the guest may know at one time; 0 is DefaultMaxInodes.
	MaxInodes int
}

// Default returns the configuration of a command line without options, which still lacks a directory and a socket.
func Default() Config {
	return Config{
		FD:            NoFD,
		RequestQueues: min(runtime.NumCPU(), 8),
		RlimitNofile:  DefaultNofile,
	}
}

// Validate reports the first thing that cannot work, in terms of the options. That there is neither SocketPath nor FD is
// no fault here: systemd may have passed a socket.
func (c Config) Validate() error {
	switch {
	case c.FD != NoFD && c.FD <= stderr:
		return fmt.Errorf("--fd: %d is not an inherited socket; expected a number above %d, the last of the standard streams", c.FD, stderr)
	case c.FD != NoFD && c.SocketPath != "":
		return errors.New("--fd and --socket-path exclude each other: an inherited socket is already bound")
	case c.FD != NoFD && c.SocketGroup != "":
		return errors.New("--fd and --socket-group exclude each other: an inherited socket has its permissions already")
	case c.SocketGroup != "" && c.SocketPath == "":
		return errors.New("--socket-group needs --socket-path")
	case len(c.SocketPath) > MaxSocketPath:
		return fmt.Errorf("--socket-path: %d bytes are too long for a Unix socket; at most %d fit", len(c.SocketPath), MaxSocketPath)
	case c.RequestQueues < 1 || c.RequestQueues > MaxRequestQueues:
		return fmt.Errorf("--num-request-queues: %d is out of range; expected 1 to %d", c.RequestQueues, MaxRequestQueues)
	case c.Seccomp == SeccompTrace && c.SeccompReport == "":
		return errors.New("--seccomp trace needs --seccomp-report: it writes nothing else")
	case c.SeccompReport != "" && c.Seccomp != SeccompLog && c.Seccomp != SeccompTrace:
		return errors.New("--seccomp-report needs --seccomp log or --seccomp trace: nothing else lets calls happen and counts them")
	case c.RlimitNofile < DefaultNofile:
		return fmt.Errorf("--rlimit-nofile: %d is out of range; expected a number of files, or 0 to leave the limit alone", c.RlimitNofile)
	}
	if c.Share.NoOpen && c.Managed() {
		return errors.New("--no-open is for a share that never changes: it excludes --config, --share and --control-socket")
	}
	if err := c.validateManaged(); err != nil {
		return err
	}
	if err := c.validateSource(); err != nil {
		return err
	}
	if c.Sandbox != SandboxNamespace && len(c.UIDMap)+len(c.GIDMap) > 0 {
		return errors.New("--uid-map and --gid-map are for --sandbox namespace: without a namespace of its own the daemon's ids are the host's")
	}
	return c.Share.Validate()
}

// Managed says that shares can come, go and change while the daemon runs, and that there can be several.
func (c *Config) Managed() bool {
	return c.Keeper || c.File != "" || len(c.Shares) > 0 || c.ControlSocket != ""
}

// Single says that the options for one share describe one.
func (c *Config) Single() bool {
	return c.Share.Dir != "" || c.Bundle != "" || c.Spec != ""
}

// validateManaged finds what does not go together with several shares.
func (c *Config) validateManaged() error {
	switch {
	case c.CheckFile && c.File == "":
		return errors.New("--check-config needs --config: there is nothing to check")
	case c.ControlGroup != "" && c.ControlSocket == "" && c.File == "":
		return errors.New("--control-group needs --control-socket")
	case len(c.ControlSocket) > MaxSocketPath:
		return fmt.Errorf("--control-socket: %d bytes are too long for a Unix socket; at most %d fit", len(c.ControlSocket), MaxSocketPath)
	case len(c.AllowExtensions) > 0 && !c.Managed():
		return errors.New("--allow-extension is for --config, --share and --control-socket: otherwise what can serve is known from the start")
	case !c.Managed():
		return nil
	case c.Single() && c.Share.Tag == "":
		return errors.New("--tag is needed: with --config, --share or --control-socket, shares are known by their tags")
	case c.Single() && c.SocketPath == "" && c.FD == NoFD && c.ControlSocket == "":
		return errors.New("--socket-path or --fd is needed for the share of --shared-dir, --bundle or --spec")
	case !c.Single() && (c.SocketPath != "" || c.FD != NoFD):
		return errors.New("--socket-path and --fd go with --shared-dir, --bundle or --spec: a share of --share or --config has its own socket")
	}
	return nil
}

// validateSource wants exactly one answer to what is served.
func (c Config) validateSource() error {
	var given []string
	for _, o := range []struct{ name, value string }{{"--shared-dir", c.Share.Dir}, {"--bundle", c.Bundle}, {"--spec", c.Spec}} {
		if o.value != "" {
			given = append(given, o.name)
		}
	}
	switch len(given) {
	case 0:
		if c.Managed() {
			return nil
		}
		return errors.New("--shared-dir is needed: it names the directory to serve (or --bundle, or --spec; or --config, --share or --control-socket for several shares)")
	case 1:
		return nil
	default:
		return fmt.Errorf("%s exclude each other: each says what to serve", strings.Join(given, " and "))
	}
}

// Validate reports the first thing that cannot work, in terms of the options.
func (s *Share) Validate() error {
	switch {
	case len(s.Tag) > MaxTag:
		return fmt.Errorf("--tag: %d bytes are too long; at most %d fit", len(s.Tag), MaxTag)
	case !utf8.ValidString(s.Tag):
		return errors.New("--tag: not UTF-8")
	case s.NoOpen && (!s.ReadOnly || s.Cache != CacheAlways):
		return errors.New("--no-open needs --readonly and --cache always: the guest checks nothing when it opens a file")
	case s.NoOpen && (s.PosixLock || s.Flock):
		return errors.New("--no-open excludes --posix-lock and --flock: the guest does not say when it closes a file, which ends locks")
	case s.MaxFDs < 0:
		return fmt.Errorf("--max-fds: %d is out of range; expected a number of descriptors, or 0 for the default", s.MaxFDs)
	case s.MaxInodes < 0:
		return fmt.Errorf("--max-inodes: %d is out of range; expected a number of inodes, or 0 for the default", s.MaxInodes)
	}
	return nil
}

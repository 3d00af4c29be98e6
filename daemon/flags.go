package daemon

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/internal/cli"
	"github.com/sluicefs/sluice/internal/config"
)

// option is one row of the command line: a flag and the field of the configuration that it sets.
type option struct {
	name string
	// usage names its argument in back quotes. It says the default where that is computed.
	usage string
	// computed says that the default differs from machine to machine, or is no value one could give.
	computed bool
	// files has a shell complete the argument with names of directories or files.
	files bool
	field func(*config.Config) any
}

// options are in the order of --help. A field without a row, or a row without a field, fails TestOptionsMatchConfig.
var options = []option{
	{name: "shared-dir", usage: "`DIR` to serve", files: true, field: func(c *config.Config) any { return &c.Share.Dir }},
	{name: "tag", usage: "`TAG` by which the guest mounts it, 1 to 36 bytes; for front-ends that leave the configuration space to the daemon (crosvm, User-Mode Linux)", field: func(c *config.Config) any { return &c.Share.Tag }},

	{name: "bundle", usage: "serve the OCI bundle in `DIR`: root file system and mounts of its config.json", files: true, field: func(c *config.Config) any { return &c.Bundle }},
	{name: "spec", usage: "serve root file system and mounts of the OCI runtime spec `FILE`", files: true, field: func(c *config.Config) any { return &c.Spec }},
	{name: "backend", usage: "have `NAME` serve the root: an extension, passthrough or mem; by default whoever claims it, or passthrough", computed: true, field: func(c *config.Config) any { return &c.Backend }},
	{name: "list-extensions", usage: "print the names of the extensions and end", field: func(c *config.Config) any { return &c.ListExtensions }},

	{name: "config", usage: "serve the shares of the TOML `FILE`, and take options from it that the command line does not give", files: true, field: func(c *config.Config) any { return &c.File }},
	{name: "check-config", usage: "say what is wrong with the file of --config and end", field: func(c *config.Config) any { return &c.CheckFile }},
	{name: "share", usage: "serve one more share, `SPEC`: tag=TAG,socket=PATH,dir=DIR and any key of [[share]] in such a file; image=REFERENCE, fuse=COMMAND or lowerdir=LAYERS instead of dir, and overlay=discard on any of them; may be repeated", computed: true, field: func(c *config.Config) any { return &c.Shares }},
	{name: "control-socket", usage: "take orders by the control API on the Unix socket `PATH`: sluicectl(1), HTTP and JSON", files: true, field: func(c *config.Config) any { return &c.ControlSocket }},
	{name: "control-group", usage: "`GROUP` that may connect to the control socket", field: func(c *config.Config) any { return &c.ControlGroup }},
	{name: "allow-extension", usage: "let only the extension `NAME` serve what is added while the daemon runs; may be repeated; by default all may", computed: true, field: func(c *config.Config) any { return &c.AllowExtensions }},

	{name: "state-dir", usage: "keep what outlives the daemon in `DIR`: layers that guests have written, checkpoints, chunks of images; by default /var/lib/sluice, or sluice in the user's state directory", computed: true, files: true, field: func(c *config.Config) any { return &c.StateDir }},
	{name: "plugin", usage: "let the executable `FILE` serve layers; may be repeated; by default those in libexec/sluice/plugins beside the daemon's directory", computed: true, files: true, field: func(c *config.Config) any { return &c.Plugins }},

	{name: "socket-path", usage: "`PATH` of the Unix socket to create and listen on; PATH.pid is its lock", files: true, field: func(c *config.Config) any { return &c.SocketPath }},
	{name: "socket-group", usage: "`GROUP` that may connect to the socket", field: func(c *config.Config) any { return &c.SocketGroup }},
	{name: "fd", usage: "`FD` of an inherited Unix socket, listening or connected", computed: true, field: func(c *config.Config) any { return &c.FD }},
	{name: "persist", usage: "listen again after a front-end has gone, instead of ending", field: func(c *config.Config) any { return &c.Persist }},
	{name: "num-request-queues", usage: "offer `N` request queues; by default one for each CPU, at most 8", computed: true, field: func(c *config.Config) any { return &c.RequestQueues }},

	{name: "cache", usage: "cache `POLICY` of the guest: never, metadata, auto or always", field: func(c *config.Config) any { return &c.Share.Cache }},
	{name: "writeback", usage: "let the guest gather writes in its page cache", field: func(c *config.Config) any { return &c.Share.Writeback }},
	{name: "readonly", usage: "refuse every change", field: func(c *config.Config) any { return &c.Share.ReadOnly }},
	{name: "xattr", usage: "serve extended attributes", field: func(c *config.Config) any { return &c.Share.Xattr }},
	{name: "allow-mmap", usage: "allow shared mappings of files that are open for direct I/O, as all are with --cache never and metadata", field: func(c *config.Config) any { return &c.Share.AllowMmap }},
	{name: "allow-direct-io", usage: "pass O_DIRECT on to the host instead of dropping it", field: func(c *config.Config) any { return &c.Share.AllowDirectIO }},
	{name: "posix-lock", usage: "share fcntl(2) locks with the host and with other guests, instead of leaving them to each guest", field: func(c *config.Config) any { return &c.Share.PosixLock }},
	{name: "flock", usage: "share flock(2) locks with the host and with other guests, instead of leaving them to each guest", field: func(c *config.Config) any { return &c.Share.Flock }},
	{name: "no-readdirplus", usage: "list directories without the attributes of their entries", field: func(c *config.Config) any { return &c.Share.NoReaddirplus }},
	{name: "no-open", usage: "let the guest read without opening files and directories, with --readonly and --cache always; it should mount read-only, too: whoever opens a file for writing is told only when he writes", field: func(c *config.Config) any { return &c.Share.NoOpen }},
	{name: "poll-us", usage: "look for requests for `TIME` before sleeping: 0 (never) to 1000 microseconds, or auto, which polls where it pays", field: func(c *config.Config) any { return &c.Share.PollWindow }},

	{name: "sandbox", usage: "sandbox `MODE`: namespace, chroot (root only) or none", field: func(c *config.Config) any { return &c.Sandbox }},
	{name: "uid-map", usage: "give the namespace of an ordinary user the user ids of `MAP`, :inside:outside:count:; may be repeated; by default the own one", computed: true, field: func(c *config.Config) any { return &c.UIDMap }},
	{name: "gid-map", usage: "the same for group ids, `MAP`", computed: true, field: func(c *config.Config) any { return &c.GIDMap }},
	{name: "modcaps", usage: "keep more or fewer capabilities than the other options need: `LIST` as in +sys_admin:-mknod", field: func(c *config.Config) any { return &c.ModCaps }},
	{name: "seccomp", usage: "`ACTION` on a system call outside the filter: kill, trap, log or none; trace also counts those inside; dump prints the filter and ends", field: func(c *config.Config) any { return &c.Seccomp }},
	{name: "seccomp-report", usage: "write which system calls --seccomp log or trace has seen to `FILE` at the end", files: true, field: func(c *config.Config) any { return &c.SeccompReport }},
	{name: "rlimit-nofile", usage: "limit of open files: `N`, or 0 to leave it alone; by default 1000000 or fs.nr_open, whichever is less", computed: true, field: func(c *config.Config) any { return &c.RlimitNofile }},
	{name: "max-fds", usage: "keep at most `N` descriptors for inodes that the guest knows; by default half of what the limit of open files leaves, at most 65536", field: func(c *config.Config) any { return &c.Share.MaxFDs }},
	{name: "max-inodes", usage: "let the guest know at most `N` inodes at a time; by default 16777216", field: func(c *config.Config) any { return &c.Share.MaxInodes }},

	{name: "log-level", usage: "log `LEVEL`: error, warn, info, debug, trace or off", field: func(c *config.Config) any { return &c.LogLevel }},
	{name: "cpu-profile", usage: "write what the serving process spends CPU time on to `FILE` at the end, for go tool pprof", files: true, field: func(c *config.Config) any { return &c.CPUProfile }},
	{name: "syslog", usage: "log to syslog (facility user) instead of standard error", field: func(c *config.Config) any { return &c.Syslog }},
}

// settled is an option of virtiofsd that sets nothing here: its behaviour is not done yet, or the only one there is.
// It is known so that it is refused by name. Ignoring it would, for many, be a hole in somebody's security.
type settled struct {
	name string
	// short is set, and equal to name, where virtiofsd has a single letter.
	short string
	// same is the value that asks for what happens anyway and is therefore accepted; bare is that of the option alone.
	same string
	// usage is that of --help; without it the option is hidden there.
	usage string
	// reason follows "is not done yet".
	reason string
}

// bare is the value of an option that was given without one.
const bare = "true"

// settledOptions is, with options, all of virtiofsd 1.14; TestVirtiofsdOptions holds the list.
var settledOptions = []settled{
	{name: "announce-submounts", same: bare, usage: "tell the guest of mounts in the directory, which is done anyway", reason: "mounts are always announced"},
	{name: "no-announce-submounts", reason: "mounts in the directory are always announced"},
	{name: "killpriv-v2", same: bare, usage: "have set-user-ID bits cleared on the host, which is done anyway", reason: "guests that can are always served so"},
	{name: "no-killpriv-v2", reason: "guests that can are always served with FUSE_HANDLE_KILLPRIV_V2"},
	{name: "posix-acl", same: "never", reason: "only --posix-acl=never is"},
	{name: "security-label", same: "never", reason: "only --security-label=never is"},
	{name: "xattrmap", reason: "names of extended attributes pass unchanged"},
	{name: "thread-pool-size", reason: "the number of threads is not for the command line to say"},
	{name: "inode-file-handles", reason: "descriptors are bounded by --max-fds"},
	{name: "translate-uid", reason: "user ids pass unchanged"},
	{name: "translate-gid", reason: "group ids pass unchanged"},
	{name: "preserve-noatime", reason: "O_NOATIME is dropped"},
	{name: "migration-mode", reason: "a guest cannot be migrated"},
	{name: "migration-on-error", reason: "a guest cannot be migrated"},
	{name: "migration-verify-handles", reason: "a guest cannot be migrated"},
	{name: "migration-confirm-paths", reason: "a guest cannot be migrated"},
	{name: "socket", reason: "use --socket-path"},
	{name: "o", short: "o", reason: "use the separate options"},
	{name: "d", short: "d", reason: "use --log-level debug"},
	{name: "f", short: "f", reason: "leave it out, sluiced stays in the foreground"},
}

// spelled is the option as it is typed.
func (s *settled) spelled() string {
	if s.short != "" {
		return "-" + s.short
	}
	return "--" + s.name
}

// String, Set and Type make a settled option a pflag.Value.
func (s *settled) String() string { return "" }

// Set implements pflag.Value: it accepts the one value that changes nothing.
func (s *settled) Set(v string) error {
	if s.same != "" && v == s.same {
		return nil
	}
	return refusedError{fmt.Sprintf("%s is not done yet: %s", s.spelled(), s.reason)}
}

// Type implements pflag.Value.
func (s *settled) Type() string { return "bool" }

// refusedError is a whole sentence on an option, to which its name need not be added.
type refusedError struct{ text string }

func (e refusedError) Error() string { return e.text }

// addFlags gives cmd the flags of every row; they set cfg, which holds the defaults.
func addFlags(cmd *cobra.Command, cfg *config.Config) {
	fs := cmd.Flags()
	fs.SortFlags = false
	for _, o := range options {
		f := cli.AddFlag(fs, o.name, o.usage, o.field(cfg))
		if strings.HasPrefix(f.DefValue, "-") {
			f.DefValue = "0" // pflag then shows no default; the usage says it
		}
		cli.CompleteFlag(cmd, o.name, o.files)
	}
	for i := range settledOptions {
		s := &settledOptions[i]
		f := fs.VarPF(s, s.name, s.short, s.usage)
		f.NoOptDefVal = bare
		f.Hidden = s.usage == ""
	}
	fs.Bool("print-capabilities", false, "print what this program can do, in JSON, and end")
	fs.BoolP("version", "V", false, "print the version and end")
	fs.BoolP("help", "h", false, "print this help and end")
}

// explainFlagError says in our words what pflag found wrong with the command line.
func explainFlagError(_ *cobra.Command, err error) error {
	var refused refusedError
	if errors.As(err, &refused) {
		return usageError{refused}
	}
	return usageError{cli.FlagError(err)}
}

// usageError is a command line that cannot be run: exit status 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

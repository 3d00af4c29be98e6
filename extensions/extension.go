// Package extensions says how a file server of one's own becomes part of sluiced: it is asked for each mount whether it
// wants to serve it, hands back a backend, and declares the system calls that it needs.
//
// # The life of an extension
//
//  1. SetFlags (FlagSetter): its options join the command line.
//  2. SandboxNeeds (SandboxUser): what of the host must stay within reach.
//  3. Prepare (Preparer): still with all privileges, before the sandbox. What it opens stays open, what it keeps in the
//     extension's own fields stays there.
//  4. TryHandleMount: in the sandbox, with reduced privileges, once for the root and then for each mount, until an extension
//     claims it.
//  5. SeccompRules of those that claimed something; the filter is installed. From then on the backends are called.
//
// With --sandbox namespace the program runs twice: the first process only parses the command line, asks SandboxNeeds and
// waits for the second, in which all five steps happen. The first does neither Prepare nor anything after it.
package extensions

import (
	"log/slog"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/seccomp"
)

// Extension serves mounts that it claims. A pointer to a struct is the usual form, for Prepare keeps its state there.
type Extension interface {
	// Name identifies the extension: in --backend, in annotations, in the log. It is 1 to 32 of a-z, 0-9 and '-', and starts
	// with a letter.
	Name() string
	// TryHandleMount returns a backend to claim the mount, or nil to decline it; the next extension is asked then, and
	// passthrough serves what nobody claims. An error means that the mount is this extension's but cannot be served: the
	// daemon does not start.
	//
	// spec is what the daemon serves: of --bundle or --spec, or one made from the options, whose Root.Path is --shared-dir.
	// It is the extension's own copy. mount is nil for the root and one of spec.Mounts otherwise. mountPath is where the mount's source on the
	// host is found inside the sandbox; it is "" where there is none, as for a tmpfs. readonly says that the core will refuse all changes, which
	// it does whatever the backend does.
	TryHandleMount(spec *specs.Spec, mount *specs.Mount, mountPath string, readonly bool) (fsbackend.Backend, Options, error)
	// SeccompRules are the system calls that the extension needs beyond those that the daemon makes itself. They are asked for
	// only when it has claimed something, and after that.
	SeccompRules() seccomp.Rules
}

// Options is what the core should know of a backend. The zero value is right for most.
type Options struct {
	// ReadOnly has the core refuse every change with EROFS, as a read-only mount does.
	ReadOnly bool
	// Inline promises that no call of the backend sleeps for longer than a disk does, so that it is made on the queue's own thread. A
	// call that hangs all the same holds the queue up until another thread takes it over.
	Inline bool
	// Timeout is how long a call may take until the guest gets EIO and the call is given up; 0 is DefaultTimeout, and
	// NoTimeout waits for ever.
	Timeout time.Duration
	// Stock has calls made as those of the daemon's own backends: on the queue's thread, and, where ErrMayBlock asks for it, on threads shared
	// with other grafts. Isolation and Timeout do not apply, so no call may wait for anything but a disk. Inline has no meaning with it.
	Stock bool
}

const (
	// DefaultTimeout is what Options.Timeout 0 means.
	DefaultTimeout = time.Minute
	// NoTimeout in Options.Timeout never gives a call up.
	NoTimeout time.Duration = -1
)

// FlagSetter is an extension with options of its own. They appear in --help under its name, which each option's name
// must start with ("http-" for an extension named http).
type FlagSetter interface {
	SetFlags(flags *pflag.FlagSet)
}

// SandboxUser is an extension that needs more of the host than its mounts.
type SandboxUser interface {
	// SandboxNeeds is asked once the options are set and before the sandbox is built. Answer for the mounts of spec that
	// TryHandleMount is going to claim; nothing where it will claim none.
	SandboxNeeds(spec *specs.Spec) Needs
}

// Needs is what an extension needs in the sandbox.
type Needs struct {
	// Network keeps the host's network, and its resolver's files and certificates in reach (/etc/resolv.conf, /etc/hosts,
	// /etc/nsswitch.conf, /etc/ssl, /etc/pki, /usr/share/ca-certificates).
	Network bool
	// Files are more files and directories of the host to have in the sandbox, read-only, at the same absolute path. They must exist.
	Files []string
	// Capabilities to keep beyond those that the daemon needs, as capabilities(7) names them ("CAP_SYS_ADMIN").
	Capabilities []string
}

// Preparer is an extension that sets something up while the daemon still has all its privileges and sees the host's own
// files: opens a device, a socket, a file that only root may read.
type Preparer interface {
	Prepare(ctx PrepareContext) error
}

// PrepareContext is what Prepare is told.
type PrepareContext struct {
	// Spec is as in TryHandleMount.
	Spec *specs.Spec
	// BundleDir is the directory of --bundle or the one that the file of --spec is in, "" without.
	BundleDir string
	// Log is the daemon's, for the extension to keep. What a guest can cause is to be logged at a bounded rate.
	Log *slog.Logger
}

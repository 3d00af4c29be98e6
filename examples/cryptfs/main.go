// Command cryptfs is sluiced with a directory whose files are encrypted on the host and clear in the guest.
//
//	head -c 32 /dev/urandom > /root/key && chmod 600 /root/key
//	cryptfs --cryptfs-key /root/key --shared-dir /srv/encrypted --socket-path /run/fs.sock
//
// Contents are sealed with AES-256-GCM, 4 KiB at a time. Names, sizes, owners, times, symbolic links and extended attributes
// are not. Package sectorfs says what else is not protected.
package main

import (
	"crypto/cipher"
	"os"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/daemon"
	"github.com/sluicefs/sluice/examples/cryptfs/sectorfs"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/gofuse"
	"github.com/sluicefs/sluice/seccomp"
)

func main() { os.Exit(daemon.Main(new(extension))) }

type extension struct {
	keyFile string
	aead    cipher.AEAD
}

func (*extension) Name() string { return "cryptfs" }

func (e *extension) SetFlags(flags *pflag.FlagSet) {
	flags.StringVar(&e.keyFile, "cryptfs-key", "", "encrypt the directory with the 32 bytes in `FILE`")
}

// Prepare reads the key while the daemon may still read what only root may; it is not in sight of the sandbox.
func (e *extension) Prepare(extensions.PrepareContext) (err error) {
	if e.keyFile != "" {
		e.aead, err = sectorfs.ReadKey(e.keyFile)
	}
	return err
}

// TryHandleMount claims the root if there is a key, and nothing else.
func (e *extension) TryHandleMount(_ *specs.Spec, mount *specs.Mount, dir string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	if e.aead == nil || mount != nil {
		return nil, extensions.Options{}, nil
	}
	root, err := sectorfs.New(dir, e.aead)
	if err != nil {
		return nil, extensions.Options{}, err
	}
	backend, err := gofuse.NewFromRoot(root, nil, gofuse.Config{MaxFileSize: sectorfs.MaxFileSize})
	if err != nil {
		return nil, extensions.Options{}, err
	}
	return backend, extensions.Options{}, nil
}

// SeccompRules are what go-fuse's loopback does with paths, where the daemon's own passthrough uses descriptors. No condition
// would make them narrower: a filter does not see paths, and in the sandbox all lead into the directory.
func (*extension) SeccompRules() seccomp.Rules {
	rules := seccomp.Rules{"fcntl": seccomp.Or{seccomp.PerArg{1: seccomp.Int32(unix.F_GETFL)}, seccomp.PerArg{1: seccomp.Int32(unix.F_SETFL)}}}
	for _, name := range strings.Fields("openat openat2 statx newfstatat dup getdents64 lseek readlinkat unlinkat mkdirat mknodat symlinkat linkat " +
		"renameat renameat2 fchownat fchmodat fchown fchmod utimensat ftruncate fsync pwrite64 statfs lgetxattr lsetxattr llistxattr lremovexattr getuid") {
		rules[name] = seccomp.MatchAll{}
	}
	return rules
}

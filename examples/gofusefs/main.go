// Command gofusefs is sluiced with a tree of go-fuse nodes: live files of the host, /proc/loadavg and /proc/uptime or those
// of --gofusefs-file, each read anew whenever the guest reads it.
//
//	gofusefs --gofusefs-file /proc/meminfo --socket-path /run/fs.sock --shared-dir /var/empty
//
// It serves the root, or the mount whose destination the annotation io.sluice.x.gofusefs.at names.
package main

import (
	"os"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/daemon"
	"github.com/sluicefs/sluice/examples/gofusefs/hostfiles"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/gofuse"
	"github.com/sluicefs/sluice/seccomp"
)

func main() { os.Exit(daemon.Main(new(extension))) }

type extension struct {
	names []string
	files []*os.File
}

func (*extension) Name() string { return "gofusefs" }

func (e *extension) SetFlags(flags *pflag.FlagSet) {
	flags.StringSliceVar(&e.names, "gofusefs-file", []string{"/proc/loadavg", "/proc/uptime"}, "serve `FILE` of the host as it is at any moment")
}

// Prepare opens the files while the host's /proc is still in sight; they stay open in the sandbox.
func (e *extension) Prepare(extensions.PrepareContext) (err error) {
	e.files, err = hostfiles.Open(e.names)
	return err
}

func (e *extension) TryHandleMount(spec *specs.Spec, mount *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	options := extensions.Options{ReadOnly: true}
	if at := spec.Annotations["io.sluice.x.gofusefs.at"]; mount == nil && at != "" || mount != nil && mount.Destination != at {
		return nil, options, nil
	}
	soon := time.Nanosecond // sizes and times are not to be remembered, whatever --cache says
	backend, err := gofuse.NewFromRoot(hostfiles.New(e.files), &fs.Options{AttrTimeout: &soon}, gofuse.Config{})
	if err != nil {
		return nil, options, err
	}
	return backend, options, nil
}

// SeccompRules are none: reading an open file is what the daemon does all the time.
func (*extension) SeccompRules() seccomp.Rules { return nil }

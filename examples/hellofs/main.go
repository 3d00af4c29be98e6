// Command hellofs is sluiced with a backend of one's own, in thirty lines.
package main

import (
	"io/fs"
	"os"
	"testing/fstest"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/daemon"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/iofs"
	"github.com/sluicefs/sluice/seccomp"
)

func main() { os.Exit(daemon.Main(extension{})) }

// files may be any fs.FS: a *zip.Reader, an embed.FS, what iofs.Tree makes of a list, or a type of your own.
var files fs.FS = fstest.MapFS{"hello.txt": {Data: []byte("hello from my own backend\n"), Mode: 0o444}}

type extension struct{}

func (extension) Name() string { return "hellofs" }

func (extension) TryHandleMount(_ *specs.Spec, mount *specs.Mount, _ string, _ bool) (fsbackend.Backend, extensions.Options, error) {
	options := extensions.Options{ReadOnly: true}
	if mount != nil {
		return nil, options, nil // not ours: we serve the root
	}
	backend, err := iofs.New(iofs.Config{FS: files})
	if err != nil {
		return nil, options, err
	}
	return backend, options, nil
}

func (extension) SeccompRules() seccomp.Rules { return nil }

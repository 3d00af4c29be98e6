package daemon

import (
	"fmt"
	"os"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/internal/bundle"
	"github.com/sluicefs/sluice/internal/config"
)

// source is what is to be served: an OCI bundle, or one made of --shared-dir.
type source struct {
	bundle *bundle.Bundle
	plan   *bundle.Plan
}

// emptySource is nothing: shares come later.
func emptySource() *source {
	return &source{bundle: &bundle.Bundle{Spec: &specs.Spec{Version: specs.Version, Root: &specs.Root{}}}, plan: &bundle.Plan{}}
}

// mounts lists the root and what is mounted below it.
func (s *source) mounts() []bundle.Mount {
	return append([]bundle.Mount{s.plan.Root}, s.plan.Mounts...)
}

// readOnly says that nothing of it may be changed.
func (s *source) readOnly() bool {
	return !slices.ContainsFunc(s.mounts(), func(m bundle.Mount) bool { return !m.ReadOnly })
}

// annotated are the options that a bundle may set by an annotation, io.sluice.option.NAME: how the share looks to the
// guest, and nothing about the daemon.
var annotated = []string{"cache", "writeback", "readonly", "xattr", "allow-mmap", "allow-direct-io", "no-readdirplus"}

// loadSource reads what cfg says is served. Options that the bundle asks for are set in flags, and so in cfg, unless the
// command line has them.
func loadSource(cfg *config.Config, flags *pflag.FlagSet) (*source, error) {
	if !cfg.Single() {
		return emptySource(), nil
	}
	s := &source{}
	if cfg.Share.Dir != "" {
		if err := checkDir(cfg.Share.Dir); err != nil {
			return nil, err
		}
		s.bundle = bundle.FromDir(cfg.Share.Dir, cfg.Share.ReadOnly)
	} else {
		var err error
		if s.bundle, err = bundle.Load(cfg.Bundle, cfg.Spec); err != nil {
			return nil, err
		}
	}
	var err error
	if s.plan, err = s.bundle.Plan(); err != nil {
		return nil, err
	}
	for name, value := range s.plan.Options {
		if !slices.Contains(annotated, name) {
			return nil, fmt.Errorf("annotation io.sluice.option.%s: expected io.sluice.option. and one of %s", name, strings.Join(annotated, ", "))
		}
		if flags.Changed(name) {
			continue
		}
		if err := flags.Lookup(name).Value.Set(value); err != nil {
			return nil, fmt.Errorf("annotation io.sluice.option.%s: %w", name, err)
		}
	}
	if cfg.Backend != "" {
		s.plan.Root.Backend = cfg.Backend
	}
	if cfg.Share.ReadOnly {
		s.plan.Root.ReadOnly = true
		for i := range s.plan.Mounts {
			s.plan.Mounts[i].ReadOnly = true
		}
	}
	return s, nil
}

// checkDir gives a wrong --shared-dir its own message; opening it again, and safely, is the server's affair.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("--shared-dir: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("--shared-dir: %s is not a directory; a single file cannot be shared yet", dir)
	}
	return nil
}

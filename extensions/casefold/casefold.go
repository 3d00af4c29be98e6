// Package casefold makes fsbackend/casefold a backend of the daemon: names that differ in case alone are the same, for Windows guests,
// over a directory or another backend. docs/case-folding.md is for its users.
package casefold

import (
	"context"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/casefold"
	"github.com/sluicefs/sluice/seccomp"
)

// Extension serves mounts whose backend is "casefold". Their option is
//
//	normalize=none|nfc   none without it
type Extension struct{}

var _ extensions.Checker = Extension{}

// Name implements extensions.Extension.
func (Extension) Name() string { return "casefold" }

// TryHandleMount implements extensions.Extension: it declines.
func (Extension) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	return nil, extensions.Options{}, nil
}

// SeccompRules implements extensions.Extension: there is nothing that what is below it does not do.
func (Extension) SeccompRules() seccomp.Rules { return nil }

func parse(m extensions.Mount) (cfg casefold.Config, err error) {
	err = m.ParseOptions(map[string]func(string) error{
		"normalize": func(value string) (err error) {
			cfg.Normalize, err = casefold.ParseNormalize(value)
			return err
		},
	})
	return cfg, err
}

// CheckMount implements extensions.Checker.
func (Extension) CheckMount(c *extensions.Checking, m extensions.Mount) error {
	if _, err := parse(m); err != nil {
		return err
	}
	return c.CheckOne(m)
}

// OpenOutside implements extensions.Hosted.
func (Extension) OpenOutside(ctx context.Context, out *extensions.Outside, m extensions.Mount) (*extensions.Given, error) {
	if _, err := parse(m); err != nil {
		return nil, err
	}
	return out.OpenOne(ctx, m)
}

// OpenInside implements extensions.Hosted.
func (Extension) OpenInside(in *extensions.Inside, m extensions.Mount, g *extensions.Given) (fsbackend.Backend, extensions.Options, error) {
	cfg, err := parse(m)
	if err != nil {
		g.Close()
		return nil, extensions.Options{}, err
	}
	return in.OpenOne(g, func(inner fsbackend.Backend, _ bool) (fsbackend.Backend, error) { return casefold.New(inner, cfg) })
}

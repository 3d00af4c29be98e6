// Package permshift makes fsbackend/permshift a backend of the daemon: owners and modes that are kept in extended attributes, over a
// directory or another backend. docs/permissions.md is for its users.
package permshift

import (
	"context"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/permshift"
	"github.com/sluicefs/sluice/seccomp"
)

// Extension serves mounts whose backend is "permshift". Their options are
//
//	format=NAME         of permshift.ParseFormat, auto without it
//	force-mask=MODE     of files on the host: octal, or shared (0755, the default) or private (0700)
type Extension struct{}

var _ extensions.Checker = Extension{}

// Name implements extensions.Extension.
func (Extension) Name() string { return "permshift" }

// TryHandleMount implements extensions.Extension: it declines.
func (Extension) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	return nil, extensions.Options{}, nil
}

// SeccompRules implements extensions.Extension: values are read and written whether or not guests have extended attributes.
func (Extension) SeccompRules() seccomp.Rules {
	relative := seccomp.PerArg{0: seccomp.NonNegativeFD{}}
	return seccomp.Rules{
		"getxattr":   seccomp.MatchAll{}, // before Linux 6.13
		"getxattrat": relative,
		"setxattr":   seccomp.MatchAll{},
		"setxattrat": relative,
	}
}

// parse returns what m asks for.
func parse(m extensions.Mount) (permshift.Config, error) {
	cfg := permshift.Config{ReadOnly: m.ReadOnly}
	err := m.ParseOptions(map[string]func(string) error{
		"format": func(value string) (err error) {
			cfg.Format, err = permshift.ParseFormat(value)
			return err
		},
		"force-mask": func(value string) (err error) {
			cfg.ForceMask, err = permshift.ParseForceMask(value)
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
	return in.OpenOne(g, func(inner fsbackend.Backend, readOnly bool) (fsbackend.Backend, error) {
		cfg.ReadOnly = cfg.ReadOnly || readOnly
		return permshift.New(inner, cfg)
	})
}

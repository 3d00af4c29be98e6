package extensions

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sluicefs/sluice/fsbackend"
)

// ParseOptions gives each of m's options to the function that is known by its name, with its value, which is "" for an option without
// "=". One that is not known, or that its function does not like, is an error that says so; the known ones are listed.
func (m Mount) ParseOptions(known map[string]func(value string) error) error {
	for _, option := range m.Options {
		name, value, _ := strings.Cut(option, "=")
		set := known[name]
		if set == nil {
			if len(known) == 0 {
				return fmt.Errorf("option %q: %s has none", name, m.Backend)
			}
			return fmt.Errorf("option %q: expected one of %s", name, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		}
		if err := set(value); err != nil {
			return fmt.Errorf("option %s: %w", name, err)
		}
	}
	return nil
}

// one is the tree that m is a layer over: its only Lower, or the directory that is its Source.
func (m Mount) one() (Mount, error) {
	lower := Mount{Backend: Passthrough, Source: m.Source, Share: m.Share, Path: m.Path}
	switch {
	case len(m.Lowers) > 1:
		return lower, fmt.Errorf("%d trees below %s: expected one", len(m.Lowers), m.Backend)
	case len(m.Lowers) == 1 && m.Source != "":
		return lower, fmt.Errorf("%s is a layer over a tree: expected it, or a directory as the source, and not both", m.Backend)
	case len(m.Lowers) == 1:
		lower = m.Lowers[0]
	case m.Source == "":
		return lower, fmt.Errorf("%s is a layer over a tree: expected a directory as the source, or a tree below it", m.Backend)
	}
	lower.ReadOnly = lower.ReadOnly || m.ReadOnly
	return lower, nil
}

// CheckOne is OpenOne's for CheckMount.
func (c *Checking) CheckOne(m Mount) error {
	lower, err := m.one()
	if err != nil {
		return err
	}
	return c.Mount(lower)
}

// OpenOne opens the one tree that m is a layer over: its only Lower, or the directory that is its Source.
func (out *Outside) OpenOne(ctx context.Context, m Mount) (*Given, error) {
	lower, err := m.one()
	if err != nil {
		return nil, err
	}
	part, err := out.Open(ctx, lower)
	if err != nil {
		return nil, err
	}
	return &Given{Parts: []Part{part}}, nil
}

// OpenOne makes the backend of what Outside.OpenOne has opened, and the layer over it by wrap, which is told whether the part is read-only.
// The options are the part's.
func (in *Inside) OpenOne(g *Given, wrap func(inner fsbackend.Backend, readOnly bool) (fsbackend.Backend, error)) (fsbackend.Backend, Options, error) {
	if len(g.Parts) != 1 {
		g.Close()
		return nil, Options{}, fmt.Errorf("%d trees below a layer: expected one", len(g.Parts))
	}
	inner, o, err := in.Open(g.Parts[0])
	if err != nil {
		return nil, Options{}, err
	}
	b, err := wrap(inner, g.Parts[0].Mount.ReadOnly || o.ReadOnly)
	if err != nil {
		return nil, Options{}, errors.Join(err, inner.Close())
	}
	return b, o, nil
}

package daemon

import (
	"errors"
	"fmt"
	"reflect"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/control"
	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/configfile"
)

// managed is what a daemon whose shares can change starts with.
type managed struct {
	shares  []api.ShareSpec
	single  *source // what the options for one share describe, nil if they describe none
	control control.Config
	notes   []string // on the file of --config
}

// loadFile reads the file of --config, if there is one. Options in it are set in cfg, unless the command line has them.
func (p *program) loadFile(cfg *config.Config, flags *pflag.FlagSet) (*configfile.File, error) {
	if cfg.File == "" {
		return nil, nil
	}
	f, err := configfile.Load(cfg.File)
	if err != nil {
		return nil, err
	}
	for _, o := range []struct {
		name string
		set  func()
	}{
		{"control-socket", func() { cfg.ControlSocket = f.ControlSocket }},
		{"control-group", func() { cfg.ControlGroup = f.ControlGroup }},
		{"allow-extension", func() { cfg.AllowExtensions = p.allowedBy(f) }},
		{"state-dir", func() { cfg.StateDir = f.StateDir }},
		{"plugin", func() { cfg.Plugins = f.Plugins }},
		{"sandbox", func() { cfg.Sandbox = f.Sandbox }},
		{"uid-map", func() { cfg.UIDMap = f.UIDMap }},
		{"gid-map", func() { cfg.GIDMap = f.GIDMap }},
		{"modcaps", func() { cfg.ModCaps = f.ModCaps }},
		{"seccomp", func() { cfg.Seccomp = f.Seccomp }},
		{"seccomp-report", func() { cfg.SeccompReport = f.SeccompReport }},
		{"rlimit-nofile", func() { cfg.RlimitNofile = f.RlimitNofile }},
		{"log-level", func() { cfg.LogLevel = f.LogLevel }},
		{"syslog", func() { cfg.Syslog = f.Syslog }},
	} {
		if !flags.Changed(o.name) {
			o.set()
		}
	}
	for i, l := range vsockListeners(f) {
		if err := validListener(control.Config{Vsock: []control.VsockListener{l}}); err != nil {
			return nil, f.Wrong(fmt.Sprintf("vsock[%d]", i), err.Error())
		}
	}
	for i, l := range hybridListeners(f) {
		if err := validListener(control.Config{Hybrid: []control.HybridListener{l}}); err != nil {
			return nil, f.Wrong(fmt.Sprintf("hybrid-vsock[%d]", i), err.Error())
		}
	}
	return f, nil
}

// checkGrafts says what is wrong with the grafts of f that extensions serve, without opening or starting anything.
func (p *program) checkGrafts(f *configfile.File) error {
	var wrong []error
	for i, s := range f.Shares {
		for j, g := range s.Grafts {
			g.Backend = backendOf(p.registry, g)
			at, err := fmt.Sprintf("share[%d].graft[%d]", i, j), error(nil)
			if _, known := p.registry.Lookup(g.Backend); known {
				if _, hosted := p.registry.Hosted(g.Backend); hosted {
					err = p.registry.Check(hostedMount(s.Tag, g))
				}
			} else if !isStock(g.Backend) {
				at, err = at+".backend", fmt.Errorf("there is no backend %q: expected one of those that --list-extensions prints", g.Backend)
			}
			if err != nil {
				wrong = append(wrong, f.Wrong(at, err.Error()))
			}
		}
	}
	return errors.Join(wrong...)
}

// checkShareOptions refuses options about one share where they describe none: nobody must believe in a --readonly that is not heeded.
func checkShareOptions(cfg config.Config, flags *pflag.FlagSet) error {
	if !cfg.Managed() || cfg.Single() {
		return nil
	}
	var about config.Config
	for _, o := range options {
		if isShareOption(o.field(&about), &about) && flags.Changed(o.name) {
			return fmt.Errorf("--%s is for the share of --shared-dir, --bundle or --spec: a share of --share or --config says so itself", o.name)
		}
	}
	return nil
}

// isShareOption says whether a field of c is about one share.
func isShareOption(field any, c *config.Config) bool {
	share := reflect.ValueOf(&c.Share).Elem()
	for i := range share.NumField() {
		if share.Field(i).Addr().Interface() == field {
			return true
		}
	}
	return field == any(&c.Backend)
}

func validListener(c control.Config) error {
	c.Daemon = (*keeper)(nil)
	return c.Validate()
}

// allowedBy are the extensions that may serve: those listed, or those in two halves, and those that the shares name. It is not nil,
// which would be all.
func (p *program) allowedBy(f *configfile.File) []string {
	names := append([]string{}, f.Extensions...)
	if f.Extensions == nil {
		names = append(names, p.registry.HostedNames()...)
	}
	for _, s := range f.Shares {
		for _, g := range s.Grafts {
			names = append(names, backendsOf(api.LowerSpec{Backend: g.Backend, Lowers: g.Lowers})...)
		}
	}
	return names
}

// backendsOf are the extensions that l and what it is made of name.
func backendsOf(l api.LowerSpec) (names []string) {
	if !isStock(l.Backend) {
		names = append(names, l.Backend)
	}
	for _, lower := range l.Lowers {
		names = append(names, backendsOf(lower)...)
	}
	return names
}

func vsockListeners(f *configfile.File) (all []control.VsockListener) {
	for _, v := range f.VSocks {
		all = append(all, control.VsockListener{Port: v.Port, Allow: control.Allow{Operations: v.Allow, Shares: v.Shares, CIDs: v.CIDs}})
	}
	return all
}

func hybridListeners(f *configfile.File) (all []control.HybridListener) {
	for _, v := range f.HybridVSocks {
		all = append(all, control.HybridListener{Path: v.Path, Port: v.Port, Allow: control.Allow{Operations: v.Allow, Shares: v.Shares}})
	}
	return all
}

// spec is what extensions are told is served before anything is: what the options for one share describe, and mounts of other
// shares that may be for an extension. What is added later they hear of then.
func (m *managed) spec() *specs.Spec {
	spec := *emptySource().bundle.Spec
	if m.single != nil {
		spec = *m.single.bundle.Spec
	}
	spec.Mounts = slices.Clone(spec.Mounts)
	for _, s := range m.shares {
		for _, g := range s.Grafts {
			if g.Backend != extensions.Mem && g.Backend != extensions.Passthrough {
				spec.Mounts = append(spec.Mounts, mountOf(g))
			}
		}
	}
	return &spec
}

// mountOf is a graft as an extension is told of it.
func mountOf(g api.GraftSpec) specs.Mount {
	return specs.Mount{Destination: g.Path, Type: g.Type, Source: g.Source, Options: g.Options}
}

// newManaged puts together what cfg and f, which may be nil, ask for.
func newManaged(cfg config.Config, what *source, f *configfile.File) (*managed, error) {
	m := &managed{}
	m.control.Unix = control.UnixListener{Path: cfg.ControlSocket, Group: cfg.ControlGroup}
	if cfg.Single() {
		m.single = what
	}
	if f != nil {
		m.shares, m.notes = f.Shares, f.Notes
		m.control.Vsock, m.control.Hybrid, m.control.NydusShare = vsockListeners(f), hybridListeners(f), f.NydusShare
	}
	for _, text := range cfg.Shares {
		s, err := configfile.ParseShare(text)
		if err != nil {
			return nil, usageError{fmt.Errorf("--share %s: %w", text, err)}
		}
		m.shares = append(m.shares, s)
	}
	return m, nil
}

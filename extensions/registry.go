package extensions

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/seccomp"
)

// Names of the backends that come with the daemon, which no extension can have.
const (
	Passthrough = "passthrough" // a directory of the host
	Mem         = "mem"         // a tree in memory
)

var (
	nameShape       = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`) })
	capabilityShape = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^CAP_[A-Z][A-Z0-9_]*$`) })
)

// Registry is a set of extensions, in the order they are asked in. It is a value that cannot change; the zero value has
// none. A panic of an extension comes back as an error (PanicError).
type Registry struct {
	entries []entry
}

// entry keeps the name as it was when it was checked.
type entry struct {
	Extension
	name string
}

// FlagGroup is the options of one extension.
type FlagGroup struct {
	Extension string
	Flags     *pflag.FlagSet
}

// PanicError is a panic in an extension.
type PanicError struct {
	Extension string
	Method    string // as Go names it: "TryHandleMount"
	Value     any    // what it panicked with
	Stack     []byte // where, as debug.Stack tells it
}

func (e *PanicError) Error() string {
	return fmt.Sprintf("extension %s: %s panicked: %v", e.Extension, e.Method, e.Value)
}

// Unwrap returns the error that the extension panicked with, if it was one.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// NewRegistry returns the registry of exts. It refuses nil ones, and names that are malformed, taken, or those of the
// daemon's own backends.
func NewRegistry(exts ...Extension) (Registry, error) {
	var r Registry
	for i, ext := range exts {
		if isNil(ext) {
			return Registry{}, fmt.Errorf("extension %d of %d is nil (%T): register a value that can be called", i+1, len(exts), ext)
		}
		e := entry{Extension: ext, name: fmt.Sprintf("%d of %d", i+1, len(exts))}
		var name string
		if err := e.call("Name", func() { name = ext.Name() }); err != nil {
			return Registry{}, err
		}
		switch earlier := slices.Index(r.Names(), name); {
		case !nameShape().MatchString(name):
			return Registry{}, fmt.Errorf("extension %s: bad name %q: expected 1 to 32 of a-z, 0-9 and '-', and a letter first", e.name, name)
		case reserved(name):
			return Registry{}, fmt.Errorf("extension %s: the name %q is that of a backend of the daemon's own: choose another", e.name, name)
		case earlier >= 0:
			return Registry{}, fmt.Errorf("extension %s: the name %q is already that of extension %d: choose another", e.name, name, earlier+1)
		}
		e.name = name
		r.entries = append(r.entries, e)
	}
	return r, nil
}

// Names returns the extensions' names, in order.
func (r Registry) Names() []string {
	names := make([]string, len(r.entries))
	for i, e := range r.entries {
		names[i] = e.name
	}
	return names
}

// All returns the extensions, in order.
func (r Registry) All() []Extension {
	all := make([]Extension, len(r.entries))
	for i, e := range r.entries {
		all[i] = e.Extension
	}
	return all
}

// Lookup returns the extension of this name.
func (r Registry) Lookup(name string) (Extension, bool) {
	e, ok := r.lookup(name)
	return e.Extension, ok
}

func (r Registry) lookup(name string) (entry, bool) {
	i := slices.IndexFunc(r.entries, func(e entry) bool { return e.name == name })
	if i < 0 {
		return entry{}, false
	}
	return r.entries[i], true
}

// Hosted returns the extension of this name if it is one in two halves.
func (r Registry) Hosted(name string) (Hosted, bool) {
	e, ok := r.lookup(name)
	if !ok {
		return nil, false
	}
	h, ok := e.Extension.(Hosted)
	return h, ok
}

// Outside is OpenOutside of the Hosted extension of this name, in which a panic is an error.
func (r Registry) Outside(ctx context.Context, out *Outside, m Mount) (g *Given, err error) {
	e, h, err := r.hosted(m)
	if err != nil {
		return nil, err
	}
	if panicked := e.call("OpenOutside", func() { g, err = h.OpenOutside(ctx, out, deepCopy(m)) }); panicked != nil {
		err = panicked
	}
	if err == nil && g == nil {
		g = &Given{}
	}
	if err != nil {
		g.Close()
		return nil, fmt.Errorf("%s: %w", e.name, err)
	}
	return g, nil
}

// Inside is OpenInside likewise, with what Select checks of a backend and its options. It takes g's files over.
func (r Registry) Inside(in *Inside, m Mount, g *Given) (Choice, error) {
	e, h, err := r.hosted(m)
	if err != nil {
		g.Close()
		return Choice{}, err
	}
	return e.choose("OpenInside", m.Path, m.ReadOnly, func() (fsbackend.Backend, Options, error) { return h.OpenInside(in, deepCopy(m), g) })
}

// MayBePart says whether Outside.Open opens a Mount whose Backend is name.
func (r Registry) MayBePart(name string) bool {
	_, hosted := r.Hosted(name)
	return hosted || reserved(name)
}

// Check returns what is wrong with m, as far as can be said without a look at the host. A panic is an error.
func (r Registry) Check(m Mount) error {
	switch m.Backend {
	case "":
		return errors.New("it has no backend: expected its name")
	case Mem:
		return nil
	case Passthrough:
		if m.Source == "" {
			return errors.New("backend passthrough has no source: expected a directory of the host")
		}
		return nil
	}
	e, h, err := r.hosted(m)
	if err != nil {
		return err
	}
	c, ok := h.(Checker)
	if !ok {
		return nil
	}
	if panicked := e.call("CheckMount", func() { err = c.CheckMount(&Checking{Has: r.MayBePart, Mount: r.Check}, deepCopy(m)) }); panicked != nil {
		err = panicked
	}
	if err != nil {
		return fmt.Errorf("%s: %w", e.name, err)
	}
	return nil
}

// ImageStats asks each ImageCounter. What those that could answer have counted is returned beside an error of others.
func (r Registry) ImageStats(ctx context.Context) (all []api.ImageStats, err error) {
	for _, e := range r.entries {
		c, ok := e.Extension.(ImageCounter)
		if !ok {
			continue
		}
		var stats []api.ImageStats
		var failed error
		if panicked := e.call("ImageStats", func() { stats, failed = c.ImageStats(ctx) }); panicked != nil {
			failed = panicked
		}
		if failed != nil {
			err = errors.Join(err, fmt.Errorf("extension %s: count images: %w", e.name, failed))
		}
		all = append(all, stats...)
	}
	return all, err
}

func (r Registry) hosted(m Mount) (entry, Hosted, error) {
	if e, ok := r.lookup(m.Backend); ok {
		if h, ok := e.Extension.(Hosted); ok {
			return e, h, nil
		}
	}
	known := append([]string{Passthrough, Mem}, r.HostedNames()...)
	return entry{}, nil, fmt.Errorf("backend %q serves nothing that is named in this way: expected one of %s", m.Backend, strings.Join(known, ", "))
}

// HostedNames are the names of the Hosted extensions, in order.
func (r Registry) HostedNames() (names []string) {
	for _, e := range r.entries {
		if _, ok := e.Extension.(Hosted); ok {
			names = append(names, e.name)
		}
	}
	return names
}

// Only returns a registry of those named, in this one's order.
func (r Registry) Only(names ...string) (Registry, error) {
	var only Registry
	for _, name := range names {
		if _, ok := r.lookup(name); !ok {
			return Registry{}, fmt.Errorf("there is no extension %q: expected one of those that --list-extensions prints", name)
		}
	}
	for _, e := range r.entries {
		if slices.Contains(names, e.name) {
			only.entries = append(only.entries, e)
		}
	}
	return only, nil
}

// FlagSets asks each FlagSetter for its options, once, and returns those that have any. An option's name starts with the
// extension's and '-', belongs to one extension only, and has no one-letter form, for those are the daemon's. Whether the daemon
// itself has an option of such a name is for the caller to check.
func (r Registry) FlagSets() ([]FlagGroup, error) {
	var groups []FlagGroup
	owners := map[string]string{}
	for _, e := range r.entries {
		setter, ok := e.Extension.(FlagSetter)
		if !ok {
			continue
		}
		flags := pflag.NewFlagSet(e.name, pflag.ContinueOnError)
		if err := e.call("SetFlags", func() { setter.SetFlags(flags) }); err != nil {
			return nil, err
		}
		var err error
		flags.VisitAll(func(f *pflag.Flag) {
			rest, ok := strings.CutPrefix(f.Name, e.name+"-")
			owner, taken := owners[f.Name]
			switch {
			case err != nil:
			case !ok || rest == "":
				err = fmt.Errorf("extension %s: option --%s: its name must start with %q, as those of all the extension's options", e.name, f.Name, e.name+"-")
			case f.Shorthand != "":
				err = fmt.Errorf("extension %s: option --%s: an extension's option has no one-letter form, such as -%s", e.name, f.Name, f.Shorthand)
			case taken:
				err = fmt.Errorf("extension %s: option --%s is already that of extension %s", e.name, f.Name, owner)
			}
			owners[f.Name] = e.name
		})
		if err != nil {
			return nil, err
		}
		if flags.HasFlags() {
			groups = append(groups, FlagGroup{e.name, flags})
		}
	}
	return groups, nil
}

// Needs returns what all SandboxUsers need together for spec, each thing once.
func (r Registry) Needs(spec *specs.Spec) (Needs, error) {
	var all Needs
	for _, e := range r.entries {
		user, ok := e.Extension.(SandboxUser)
		if !ok {
			continue
		}
		var needs Needs
		if err := e.call("SandboxNeeds", func() { needs = user.SandboxNeeds(deepCopy(spec)) }); err != nil {
			return Needs{}, err
		}
		all.Network = all.Network || needs.Network
		for _, file := range needs.Files {
			// The root itself would be no sandbox any more.
			if !filepath.IsAbs(file) || filepath.Clean(file) != file || file == "/" || strings.ContainsRune(file, 0) {
				return Needs{}, fmt.Errorf("extension %s: SandboxNeeds: file %q: expected an absolute path without '.', '..', '//' or '/' at the end, and not the root", e.name, file)
			}
			all.Files = appendNew(all.Files, file)
		}
		for _, name := range needs.Capabilities {
			if !capabilityShape().MatchString(name) {
				return Needs{}, fmt.Errorf("extension %s: SandboxNeeds: capability %q: expected a name of capabilities(7), such as CAP_SYS_ADMIN", e.name, name)
			}
			all.Capabilities = appendNew(all.Capabilities, name)
		}
	}
	return all, nil
}

// Prepare prepares each Preparer, in order; the first error ends it. Each gets its own copy of ctx.Spec.
func (r Registry) Prepare(ctx PrepareContext) error {
	for _, e := range r.entries {
		preparer, ok := e.Extension.(Preparer)
		if !ok {
			continue
		}
		own := ctx
		own.Spec = deepCopy(ctx.Spec)
		var failed error
		if err := e.call("Prepare", func() { failed = preparer.Prepare(own) }); err != nil {
			return err
		}
		if failed != nil {
			return fmt.Errorf("extension %s: prepare: %w", e.name, failed)
		}
	}
	return nil
}

// call runs f, which calls the extension's method.
func (e entry) call(method string, f func()) error {
	return Call(e.name, method, func() error { f(); return nil })
}

// Call runs f, something of this extension's that it calls method. A panic becomes a *PanicError.
func Call(extension, method string, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{Extension: extension, Method: method, Value: v, Stack: debug.Stack()}
		}
	}()
	return f()
}

func reserved(name string) bool {
	return name == Passthrough || name == Mem
}

func appendNew(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

// isNil tells a nil interface, and one that holds a nil, which looks like a value until it is called.
func isNil(v any) bool {
	if v == nil {
		return true
	}
	switch rv := reflect.ValueOf(v); rv.Kind() {
	case reflect.Pointer, reflect.Map, reflect.Slice, reflect.Func, reflect.Chan:
		return rv.IsNil()
	default:
		return false
	}
}

// Rules returns what each of claimed, extensions of the registry, declares.
func (r Registry) Rules(claimed []Extension) ([]seccomp.Source, error) {
	var sources []seccomp.Source
	for _, ext := range claimed {
		e, ok := r.lookup(ext.Name())
		if !ok {
			return nil, fmt.Errorf("rules of extension %s: it is not registered", ext.Name())
		}
		var rules seccomp.Rules
		if err := e.call("SeccompRules", func() { rules = ext.SeccompRules() }); err != nil {
			return nil, err
		}
		if len(rules) > 0 {
			sources = append(sources, seccomp.Source{Owner: e.name, Rules: rules})
		}
	}
	return sources, nil
}

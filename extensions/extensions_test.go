package extensions

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/pflag"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/seccomp"
)

// plain is an extension without any of the optional interfaces. It records what it was asked for.
type plain struct {
	name  string
	try   func(spec *specs.Spec, mount *specs.Mount) (fsbackend.Backend, Options, error) // nil declines
	calls []call
}

type call struct {
	destination string // "" for a nil mount
	path        string
	readonly    bool
}

func (p *plain) Name() string                { return p.name }
func (p *plain) SeccompRules() seccomp.Rules { return nil }

func (p *plain) TryHandleMount(spec *specs.Spec, mount *specs.Mount, path string, readonly bool) (fsbackend.Backend, Options, error) {
	c := call{path: path, readonly: readonly}
	if mount != nil {
		c.destination = mount.Destination
	}
	p.calls = append(p.calls, c)
	if p.try == nil {
		return nil, Options{}, nil
	}
	return p.try(spec, mount)
}

// full has all the optional interfaces.
type full struct {
	plain
	setFlags func(*pflag.FlagSet)
	needs    func(*specs.Spec) Needs
	prepare  func(PrepareContext) error
}

func (f *full) SetFlags(flags *pflag.FlagSet)       { f.setFlags(flags) }
func (f *full) SandboxNeeds(spec *specs.Spec) Needs { return f.needs(spec) }
func (f *full) Prepare(ctx PrepareContext) error    { return f.prepare(ctx) }
func claim(b fsbackend.Backend, o Options) *plain   { return claimAs("e", b, o, nil) }
func named(name string) *plain                      { return &plain{name: name} }
func setter(name string, f func(*pflag.FlagSet)) *full {
	return &full{plain: plain{name: name}, setFlags: f}
}

func claimAs(name string, b fsbackend.Backend, o Options, err error) *plain {
	return &plain{name: name, try: func(*specs.Spec, *specs.Mount) (fsbackend.Backend, Options, error) { return b, o, err }}
}

// backend does nothing but count how often it is closed.
type backend struct {
	fsbackend.Backend
	closed   int
	closeErr error
	panics   bool
}

func (b *backend) Close() error {
	b.closed++
	if b.panics {
		panic("close of the backend")
	}
	return b.closeErr
}

func mustRegistry(t *testing.T, exts ...Extension) Registry {
	t.Helper()
	r, err := NewRegistry(exts...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// wantError checks that err is one line with all of parts, and that there is an error if there are parts.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		if len(parts) > 0 {
			t.Errorf("no error, want one with %q", parts)
		}
		return
	}
	if len(parts) == 0 {
		t.Errorf("error %v, want none", err)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q has more than one line", err)
	}
}

// wantPanicError checks that err is the panic of that extension's method.
func wantPanicError(t *testing.T, err error, extension, method string) {
	t.Helper()
	var p *PanicError
	if !errors.As(err, &p) || p.Extension != extension || p.Method != method || len(p.Stack) == 0 {
		t.Errorf("error %#v, want a PanicError of %s.%s", err, extension, method)
	}
	wantError(t, err, extension, method, "panicked")
}

// namePanics has a Name that cannot be called, and is no pointer.
type namePanics struct{}

func (namePanics) Name() string { panic("no name") }
func (namePanics) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, Options, error) {
	return nil, Options{}, nil
}
func (namePanics) SeccompRules() seccomp.Rules { return nil }

func TestNewRegistry(t *testing.T) {
	for _, tt := range []struct {
		name string
		exts []Extension
		want []string
	}{
		{"none", nil, nil},
		{"one letter", []Extension{named("a")}, nil},
		{"longest", []Extension{named(strings.Repeat("a", 32))}, nil},
		{"digits and hyphens", []Extension{named("s3-v2-")}, nil},
		{"nil", []Extension{named("a"), nil}, []string{"extension 2 of 2", "nil"}},
		{"typed nil", []Extension{(*plain)(nil), named("a")}, []string{"extension 1 of 2", "nil", "*extensions.plain"}},
		{"no name", []Extension{named("")}, []string{"extension 1 of 1", `""`, "expected"}},
		{"too long", []Extension{named(strings.Repeat("a", 33))}, []string{"extension 1 of 1", "aaaa", "1 to 32"}},
		{"upper case", []Extension{named("a"), named("Http")}, []string{"extension 2 of 2", `"Http"`}},
		{"digit first", []Extension{named("3fs")}, []string{`"3fs"`, "letter first"}},
		{"hyphen first", []Extension{named("-a")}, []string{`"-a"`}},
		{"dot", []Extension{named("a.b")}, []string{`"a.b"`}},
		{"line end", []Extension{named("a\n")}, []string{`"a\n"`}},
		{"passthrough", []Extension{named("passthrough")}, []string{"extension 1 of 1", "passthrough", "daemon's own"}},
		{"mem", []Extension{named("mem")}, []string{"extension 1 of 1", "mem", "daemon's own"}},
		{"twice", []Extension{named("a"), named("b"), named("a")}, []string{"extension 3 of 3", `"a"`, "extension 1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := NewRegistry(tt.exts...)
			wantError(t, err, tt.want...)
			if err != nil {
				if len(r.All()) != 0 {
					t.Errorf("an error, and %d extensions", len(r.All()))
				}
				return
			}
			if !reflect.DeepEqual(r.All(), append([]Extension{}, tt.exts...)) {
				t.Errorf("All() = %v, want %v", r.All(), tt.exts)
			}
		})
	}
	t.Run("panic", func(t *testing.T) {
		_, err := NewRegistry(named("a"), namePanics{})
		wantPanicError(t, err, "2 of 2", "Name")
	})
}

// TestRegistryIsAValue changes all that went in and came out.
func TestRegistryIsAValue(t *testing.T) {
	a, b := named("a"), named("b")
	exts := []Extension{a, b}
	r := mustRegistry(t, exts...)
	exts[0] = b
	r.All()[0] = b
	r.Names()[0] = "c"
	a.name = "renamed"
	if want := []string{"a", "b"}; !reflect.DeepEqual(r.Names(), want) {
		t.Errorf("Names() = %v, want %v", r.Names(), want)
	}
	if got := r.All(); got[0] != a || got[1] != b {
		t.Errorf("All() = %v, want %v", got, []Extension{a, b})
	}
	if got, ok := r.Lookup("a"); !ok || got != a {
		t.Errorf("Lookup(a) = %v, %v", got, ok)
	}
	if got, ok := r.Lookup("renamed"); ok || got != nil {
		t.Errorf("Lookup(renamed) = %v, %v, want nothing", got, ok)
	}
}

func TestFlagSets(t *testing.T) {
	option := func(names ...string) func(*pflag.FlagSet) {
		return func(flags *pflag.FlagSet) {
			for _, name := range names {
				flags.String(name, "", "for the test")
			}
		}
	}
	for _, tt := range []struct {
		name string
		exts []Extension
		want []string
	}{
		{"other prefix", []Extension{setter("http", option("http-a", "https-b"))}, []string{"extension http", "--https-b", `"http-"`}},
		{"nothing but the prefix", []Extension{setter("http", option("http-"))}, []string{"--http-:", `"http-"`}},
		{"name without hyphen", []Extension{setter("http", option("http"))}, []string{"--http:"}},
		{"one letter", []Extension{setter("http", func(f *pflag.FlagSet) { f.StringP("http-a", "x", "", "") })}, []string{"extension http", "--http-a", "-x"}},
		{"two owners", []Extension{setter("a", option("a-b-c")), setter("a-b", option("a-b-c"))}, []string{"extension a-b:", "--a-b-c", "extension a"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			groups, err := mustRegistry(t, tt.exts...).FlagSets()
			wantError(t, err, tt.want...)
			if groups != nil {
				t.Errorf("groups %v and an error", groups)
			}
		})
	}
	t.Run("defined twice", func(t *testing.T) {
		_, err := mustRegistry(t, setter("ok", option("ok-a")), setter("bad", option("bad-a", "bad-a"))).FlagSets()
		wantPanicError(t, err, "bad", "SetFlags")
	})
	t.Run("good", func(t *testing.T) {
		var url string
		calls := 0
		r := mustRegistry(t, setter("z", option("z-a")), named("noflags"), setter("none", option()),
			setter("http", func(f *pflag.FlagSet) { calls++; f.StringVar(&url, "http-url", "", "where") }))
		groups, err := r.FlagSets()
		if err != nil {
			t.Fatal(err)
		}
		if len(groups) != 2 || groups[0].Extension != "z" || groups[1].Extension != "http" {
			t.Fatalf("groups %v, want those of z and http", groups)
		}
		if err := groups[1].Flags.Parse([]string{"--http-url=there"}); err != nil || url != "there" || calls != 1 {
			t.Errorf("parse: %v; url %q after %d calls", err, url, calls)
		}
	})
}

func user(name string, f func(*specs.Spec) Needs) *full {
	return &full{plain: plain{name: name}, needs: f}
}

func needing(name string, needs Needs) *full {
	return user(name, func(*specs.Spec) Needs { return needs })
}

func TestNeeds(t *testing.T) {
	for _, tt := range []struct {
		name  string
		needs Needs
		want  []string
	}{
		{"relative file", Needs{Files: []string{"etc/passwd"}}, []string{"extension e", `"etc/passwd"`, "absolute"}},
		{"no file", Needs{Files: []string{""}}, []string{`""`}},
		{"file not clean", Needs{Files: []string{"/etc", "/etc/../root"}}, []string{`"/etc/../root"`}},
		{"slash at the end", Needs{Files: []string{"/etc/"}}, []string{`"/etc/"`}},
		{"root", Needs{Files: []string{"/"}}, []string{`"/"`, "not the root"}},
		{"NUL", Needs{Files: []string{"/a\x00b"}}, []string{`"/a\x00b"`}},
		{"capability without prefix", Needs{Capabilities: []string{"SYS_ADMIN"}}, []string{"extension e", `"SYS_ADMIN"`, "CAP_SYS_ADMIN"}},
		{"capability in lower case", Needs{Capabilities: []string{"cap_chown"}}, []string{`"cap_chown"`}},
		{"only the prefix", Needs{Capabilities: []string{"CAP_"}}, []string{`"CAP_"`}},
		{"list in one", Needs{Capabilities: []string{"CAP_CHOWN,CAP_FOWNER"}}, []string{`"CAP_CHOWN,CAP_FOWNER"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := mustRegistry(t, needing("e", tt.needs)).Needs(&specs.Spec{})
			wantError(t, err, tt.want...)
			if !reflect.DeepEqual(got, Needs{}) {
				t.Errorf("needs %v and an error", got)
			}
		})
	}
	t.Run("panic", func(t *testing.T) {
		_, err := mustRegistry(t, user("e", func(s *specs.Spec) Needs { panic(errors.ErrUnsupported) })).Needs(&specs.Spec{})
		wantPanicError(t, err, "e", "SandboxNeeds")
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("error %v is not the one of the panic", err)
		}
	})
	t.Run("union", func(t *testing.T) {
		spec := testSpec()
		r := mustRegistry(t,
			needing("a", Needs{Files: []string{"/b", "/a"}, Capabilities: []string{"CAP_SYS_ADMIN"}}),
			named("none"),
			user("b", func(s *specs.Spec) Needs { s.Root.Path = "changed"; return Needs{Network: true} }),
			user("c", func(s *specs.Spec) Needs {
				return Needs{Files: []string{"/c", "/a", s.Root.Path}, Capabilities: []string{"CAP_BPF", "CAP_SYS_ADMIN"}}
			}),
		)
		got, err := r.Needs(spec)
		want := Needs{Network: true, Files: []string{"/b", "/a", "/c", "/root"}, Capabilities: []string{"CAP_SYS_ADMIN", "CAP_BPF"}}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("needs %v, %v; want %v", got, err, want)
		}
		if !reflect.DeepEqual(spec, testSpec()) {
			t.Errorf("the spec is now %v", spec)
		}
	})
}

// hosted is one in two halves, of which none is asked for anything here.
type hosted struct{ plain }

func (*hosted) OpenOutside(context.Context, *Outside, Mount) (*Given, error) { return nil, nil }
func (*hosted) OpenInside(*Inside, Mount, *Given) (fsbackend.Backend, Options, error) {
	return nil, Options{}, nil
}

// counter counts images.
type counter struct {
	hosted
	stats func() ([]api.ImageStats, error)
}

func (c *counter) ImageStats(context.Context) ([]api.ImageStats, error) { return c.stats() }

func TestImageStats(t *testing.T) {
	of := func(name string, f func() ([]api.ImageStats, error)) *counter {
		return &counter{hosted{plain{name: name}}, f}
	}
	r, err := NewRegistry(named("other"),
		of("good", func() ([]api.ImageStats, error) { return []api.ImageStats{{Tag: "a"}, {Tag: "b"}}, nil }),
		of("panics", func() ([]api.ImageStats, error) { panic("oh") }),
		of("fails", func() ([]api.ImageStats, error) { return nil, errors.New("cannot") }),
		of("last", func() ([]api.ImageStats, error) { return []api.ImageStats{{Tag: "c"}}, nil }))
	if err != nil {
		t.Fatal(err)
	}
	all, err := r.ImageStats(t.Context())
	if len(all) != 3 || all[0].Tag != "a" || all[2].Tag != "c" {
		t.Errorf("they are %+v", all)
	}
	if err == nil || !strings.Contains(err.Error(), "panics: count images") || !strings.Contains(err.Error(), "fails: count images: cannot") {
		t.Errorf("the error is %v", err)
	}
}

func TestPrepare(t *testing.T) {
	var order []string
	preparer := func(name string, f func(PrepareContext) error) *full {
		return &full{plain: plain{name: name}, prepare: func(ctx PrepareContext) error {
			order = append(order, name)
			return f(ctx)
		}}
	}
	log := slog.New(slog.DiscardHandler)
	spoil := func(ctx PrepareContext) error { *ctx.Spec = specs.Spec{}; return nil }
	check := func(ctx PrepareContext) error {
		if !reflect.DeepEqual(ctx.Spec, testSpec()) || ctx.BundleDir != "/bundle" || ctx.Log != log {
			t.Errorf("asked with %v, %q, %v", ctx.Spec, ctx.BundleDir, ctx.Log)
		}
		return nil
	}
	ctx := PrepareContext{Spec: testSpec(), BundleDir: "/bundle", Log: log}
	if err := mustRegistry(t, preparer("b", spoil), named("none"), preparer("a", check)).Prepare(ctx); err != nil {
		t.Error(err)
	}
	failure := errors.New("no such device")
	fail := func(PrepareContext) error { return failure }
	err := mustRegistry(t, preparer("c", check), preparer("d", fail), preparer("e", check)).Prepare(ctx)
	wantError(t, err, "extension d", "no such device")
	if !errors.Is(err, failure) {
		t.Errorf("error %v is not the extension's", err)
	}
	err = mustRegistry(t, preparer("f", func(PrepareContext) error { panic("boom") }), preparer("g", check)).Prepare(ctx)
	wantPanicError(t, err, "f", "Prepare")
	if want := []string{"b", "a", "c", "d", "f"}; !reflect.DeepEqual(order, want) {
		t.Errorf("prepared %v, want %v", order, want)
	}
}

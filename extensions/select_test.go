package extensions

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/fsbackend"
)

// testSpec has what a copy may get wrong: pointers, maps, lists in lists, empty lists, values of any type, a path that is
// not UTF-8.
func testSpec() *specs.Spec {
	limit := int64(7)
	return &specs.Spec{
		Version: "1.3.0",
		Root:    &specs.Root{Path: "/root"},
		Process: &specs.Process{Args: []string{}},
		Mounts: []specs.Mount{
			{Destination: "/a", Type: "bind", Source: "/host/\xff", Options: []string{"rbind", "ro"}},
			{Destination: "/b", Type: "overlay", UIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 1, Size: 2}}},
		},
		Annotations: map[string]string{"k": "v"},
		Linux:       &specs.Linux{Resources: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}},
		Windows:     &specs.Windows{CredentialSpec: map[string]any{"list": []any{1.0, nil, "x"}}},
	}
}

func TestSelect(t *testing.T) {
	spec := testSpec()
	failure := errors.New("cannot reach the store")
	b1, b2 := &backend{}, &backend{}
	for _, tt := range []struct {
		name  string
		exts  []*plain
		mount *specs.Mount // of spec
		ask   string
		want  int   // index in exts of the one that serves; -1 for nobody
		asked []int // how often each was asked
		b     fsbackend.Backend
		err   []string
	}{
		{"no extensions", nil, nil, "", -1, nil, nil, nil},
		{"all decline", []*plain{named("a"), named("b")}, nil, "", -1, []int{1, 1}, nil, nil},
		{"first claims", []*plain{claimAs("a", b1, Options{}, nil), claimAs("b", b2, Options{}, nil)}, nil, "", 0, []int{1, 0}, b1, nil},
		{"second claims", []*plain{named("a"), claimAs("b", b2, Options{}, nil)}, &spec.Mounts[0], "", 1, []int{1, 1}, b2, nil},
		{"error is final", []*plain{claimAs("a", nil, Options{}, failure), claimAs("b", b2, Options{}, nil)}, &spec.Mounts[1], "", -1, []int{1, 0}, nil, []string{"extension a", "/b", "cannot reach the store"}},
		{"error at the root", []*plain{claimAs("a", nil, Options{}, failure)}, nil, "", -1, []int{1}, nil, []string{"extension a", "serve /:"}},
		{"named", []*plain{claimAs("a", b1, Options{}, nil), claimAs("b", b2, Options{}, nil)}, nil, "b", 1, []int{0, 1}, b2, nil},
		{"named declines", []*plain{claimAs("a", b1, Options{}, nil), named("b")}, &spec.Mounts[0], "b", -1, []int{0, 1}, nil, []string{"extension b does not serve /a"}},
		{"named fails", []*plain{claimAs("a", nil, Options{}, failure)}, nil, "a", -1, []int{1}, nil, []string{"extension a", "cannot reach"}},
		{"unknown", []*plain{claimAs("a", b1, Options{}, nil), named("b")}, &spec.Mounts[0], "c", -1, []int{0, 0}, nil, []string{`"c"`, "/a", "passthrough, mem, a, b"}},
		{"passthrough by name", []*plain{claimAs("a", b1, Options{}, nil)}, nil, "passthrough", -1, []int{0}, nil, nil},
		{"mem by name", []*plain{claimAs("a", b1, Options{}, nil)}, nil, "mem", -1, []int{0}, nil, nil},
		{"typed nil", []*plain{claimAs("a", (*backend)(nil), Options{}, nil), claimAs("b", b2, Options{}, nil)}, &spec.Mounts[0], "", -1, []int{1, 0}, nil, []string{"extension a", "/a", "nil *extensions.backend", "plain nil"}},
		{"typed nil and an error", []*plain{claimAs("a", (*backend)(nil), Options{}, failure)}, nil, "", -1, []int{1}, nil, []string{"extension a", "cannot reach"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			exts := make([]Extension, len(tt.exts))
			for i, e := range tt.exts {
				exts[i] = e
			}
			got, err := mustRegistry(t, exts...).Select(Request{Spec: spec, Mount: tt.mount, MountPath: "/inside", ReadOnly: true, Backend: tt.ask})
			wantError(t, err, tt.err...)
			if err != nil && strings.Contains(err.Error(), "Close") {
				t.Errorf("error %q: a nil backend was closed", err)
			}
			want := Choice{}
			if tt.err == nil {
				want.Options.ReadOnly = true
			}
			if tt.want >= 0 {
				want.Extension, want.Backend = exts[tt.want], tt.b
			}
			if got != want {
				t.Errorf("choice %+v, want %+v", got, want)
			}
			wantCall := call{path: "/inside", readonly: true}
			if tt.mount != nil {
				wantCall.destination = tt.mount.Destination
			}
			for i, e := range tt.exts {
				if len(e.calls) != tt.asked[i] || tt.asked[i] == 1 && e.calls[0] != wantCall {
					t.Errorf("%s was called with %v, want %d times %v", e.name, e.calls, tt.asked[i], wantCall)
				}
			}
		})
	}
	if b1.closed+b2.closed != 0 {
		t.Error("a backend that was handed out, or never asked for, is closed")
	}
}

// TestSelectForAll is a daemon's start with an extension that claims everything.
func TestSelectForAll(t *testing.T) {
	spec := testSpec()
	e := claim(&backend{}, Options{})
	r := mustRegistry(t, e)
	requests := []Request{{Spec: spec, MountPath: "/"}}
	for i := range spec.Mounts {
		requests = append(requests, Request{Spec: spec, Mount: &spec.Mounts[i], ReadOnly: i == 0})
	}
	for _, req := range requests {
		if c, err := r.Select(req); err != nil || c.Extension != e {
			t.Errorf("select for %s: %+v, %v", req.where(), c, err)
		}
	}
	want := []call{{path: "/"}, {destination: "/a", readonly: true}, {destination: "/b"}}
	if !reflect.DeepEqual(e.calls, want) {
		t.Errorf("called with %+v, want %+v: the root first, with a nil mount", e.calls, want)
	}
}

func TestSelectOptions(t *testing.T) {
	for _, tt := range []struct {
		name     string
		readonly bool
		in, want Options
		err      []string
	}{
		{"zero", false, Options{}, Options{}, nil},
		{"all", false, Options{ReadOnly: true, Inline: true, Timeout: time.Hour}, Options{ReadOnly: true, Inline: true, Timeout: time.Hour}, nil},
		{"read-only request", true, Options{}, Options{ReadOnly: true}, nil},
		{"no timeout", false, Options{Timeout: NoTimeout}, Options{Timeout: NoTimeout}, nil},
		{"least timeout", false, Options{Timeout: MinTimeout}, Options{Timeout: MinTimeout}, nil},
		{"negative", false, Options{Timeout: -time.Second}, Options{}, []string{"extension e", "serve /", "-1s", "10ms", "1m0s", "NoTimeout"}},
		{"without a unit", false, Options{Timeout: 30}, Options{}, []string{"extension e", "30ns"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := &backend{}
			c, err := mustRegistry(t, claim(b, tt.in)).Select(Request{Spec: testSpec(), ReadOnly: tt.readonly})
			wantError(t, err, tt.err...)
			if c.Options != tt.want {
				t.Errorf("options %+v, want %+v", c.Options, tt.want)
			}
			if (err != nil) != (b.closed == 1) {
				t.Errorf("the backend was closed %d times", b.closed)
			}
		})
	}
}

func TestSelectErrorClosesBackend(t *testing.T) {
	failure, closeFailure := errors.New("cannot reach the store"), errors.New("cannot let go")
	for _, tt := range []struct {
		name string
		b    backend
		want []string
	}{
		{"closes", backend{}, []string{"extension e", "cannot reach"}},
		{"fails to close", backend{closeErr: closeFailure}, []string{"extension e", "cannot reach", "cannot let go"}},
		{"panics", backend{panics: true}, []string{"extension e", "cannot reach", "Close panicked"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := mustRegistry(t, claimAs("e", &tt.b, Options{}, failure)).Select(Request{Spec: testSpec()})
			wantError(t, err, tt.want...)
			if !errors.Is(err, failure) || c != (Choice{}) || tt.b.closed != 1 {
				t.Errorf("choice %+v, error %v, closed %d times", c, err, tt.b.closed)
			}
		})
	}
}

func TestSelectPanic(t *testing.T) {
	spec := testSpec()
	after := claim(&backend{}, Options{})
	r := mustRegistry(t, &plain{name: "bad", try: func(_ *specs.Spec, m *specs.Mount) (fsbackend.Backend, Options, error) {
		return nil, Options{}, errors.New(m.Destination) // the root has no mount
	}}, after)
	_, err := r.Select(Request{Spec: spec})
	wantPanicError(t, err, "bad", "TryHandleMount")
	wantError(t, err, "serve /:")
	if len(after.calls) != 0 {
		t.Error("the next was asked after a panic")
	}
}

func TestSelectWithoutSpec(t *testing.T) {
	_, err := mustRegistry(t, claim(&backend{}, Options{})).Select(Request{})
	wantError(t, err, "no spec")
}

// TestSelectHandsOutCopies has an extension overwrite all it is given.
func TestSelectHandsOutCopies(t *testing.T) {
	spec := testSpec()
	odd := specs.Mount{Destination: "/later", Options: []string{"ro"}}
	vandal := &plain{name: "vandal", try: func(s *specs.Spec, m *specs.Mount) (fsbackend.Backend, Options, error) {
		s.Root.Path = "x"
		s.Mounts[0].Options[0] = "x"
		s.Annotations["k"] = "x"
		*s.Linux.Resources.Memory.Limit = 8
		s.Windows.CredentialSpec.(map[string]any)["list"].([]any)[0] = "x"
		s.Process.Args = append(s.Process.Args, "x")
		if m != nil {
			m.Destination, m.Options[0] = "x", "x"
		}
		s.Mounts = nil
		return nil, Options{}, nil
	}}
	var wantMount *specs.Mount
	witness := &plain{name: "witness", try: func(s *specs.Spec, m *specs.Mount) (fsbackend.Backend, Options, error) {
		if !reflect.DeepEqual(s, testSpec()) {
			t.Errorf("the second extension got the spec %+v", s)
		}
		if !reflect.DeepEqual(m, wantMount) {
			t.Errorf("the second extension got the mount %+v, want %+v", m, wantMount)
		}
		if m != nil && m.Destination == "/a" && m != &s.Mounts[0] {
			t.Error("the mount is not one of the spec's")
		}
		return nil, Options{}, nil
	}}
	r := mustRegistry(t, vandal, witness)
	for _, mount := range []*specs.Mount{nil, &spec.Mounts[0], &odd} {
		wantMount = deepCopy(mount)
		if _, err := r.Select(Request{Spec: spec, Mount: mount}); err != nil {
			t.Fatal(err)
		}
	}
	if !reflect.DeepEqual(spec, testSpec()) || odd.Destination != "/later" || odd.Options[0] != "ro" {
		t.Errorf("the caller's spec is now %+v, and its mount %+v", spec, odd)
	}
	if len(witness.calls) != 3 {
		t.Errorf("%d calls of the second extension, want 3", len(witness.calls))
	}
}

func TestDeepCopyKeepsHiddenFields(t *testing.T) {
	type hidden struct {
		n    int
		Open []int
	}
	in := hidden{n: 1, Open: []int{2}}
	out := deepCopy(in)
	out.Open[0] = 3
	if out.n != 1 || in.Open[0] != 2 {
		t.Errorf("copy %v of %v", out, in)
	}
}

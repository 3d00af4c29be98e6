package extensions

import (
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/seccomp"
)

// ruled declares what it is made of.
type ruled struct {
	name  string
	rules func() seccomp.Rules
}

func (r ruled) Name() string { return r.name }

func (ruled) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, Options, error) {
	return nil, Options{}, nil
}

func (r ruled) SeccompRules() seccomp.Rules { return r.rules() }

func TestRules(t *testing.T) {
	some := ruled{"some", func() seccomp.Rules { return seccomp.Rules{"socket": seccomp.MatchAll{}} }}
	none := ruled{"none", func() seccomp.Rules { return nil }}
	bad := ruled{"bad", func() seccomp.Rules { panic("no rules") }}
	r, err := NewRegistry(some, none, bad)
	if err != nil {
		t.Fatal(err)
	}
	sources, err := r.Rules([]Extension{none, some})
	if err != nil || len(sources) != 1 || sources[0].Owner != "some" || len(sources[0].Rules) != 1 {
		t.Errorf("rules are %v, %v", sources, err)
	}
	if _, err := r.Rules([]Extension{some, bad}); err == nil || !strings.Contains(err.Error(), "bad") || !strings.Contains(err.Error(), "no rules") {
		t.Errorf("a panic is %v, expected an error that names the extension", err)
	}
	if _, err := r.Rules([]Extension{ruled{name: "other"}}); err == nil || !strings.Contains(err.Error(), "other") {
		t.Errorf("a stranger's rules are %v, expected an error", err)
	}
}

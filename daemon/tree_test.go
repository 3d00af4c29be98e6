package daemon

import (
	"log/slog"
	"os"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/internal/bundle"
	"github.com/sluicefs/sluice/seccomp"
	"github.com/sluicefs/sluice/share"
)

// claimer serves the root from memory if it is to. Its type cannot be compared, as an extension's need not be.
type claimer struct {
	claims bool
	_      []int
}

func (claimer) Name() string { return "claimer" }

func (c claimer) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	if !c.claims {
		return nil, extensions.Options{}, nil
	}
	b, err := mem.New(mem.Config{})
	return b, extensions.Options{}, err
}

func (claimer) SeccompRules() seccomp.Rules { return seccomp.Rules{"socket": seccomp.MatchAll{}} }

// openFor opens dir as it would be served with these extensions.
func openFor(t *testing.T, dir string, exts ...extensions.Extension) (*tree, extensions.Registry) {
	t.Helper()
	registry, err := extensions.NewRegistry(exts...)
	if err != nil {
		t.Fatal(err)
	}
	b := bundle.FromDir(dir, false)
	plan, err := b.Plan()
	if err != nil {
		t.Fatal(err)
	}
	o := opener{registry: registry, what: &source{bundle: b, plan: plan}, marks: &seccomp.Marks{}, log: slog.New(slog.DiscardHandler)}
	tr, err := o.openTree([]place{{path: dir}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.backend.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr, registry
}

// TestPlainDirectory: a directory that no extension claims is served by passthrough itself, with nothing around it and no
// rules of anybody's.
func TestPlainDirectory(t *testing.T) {
	dir := t.TempDir()
	for name, exts := range map[string][]extensions.Extension{"without extensions": nil, "declined": {claimer{}}} {
		tr, _ := openFor(t, dir, exts...)
		if _, ok := tr.backend.(*passthrough.FS); !ok || len(tr.claimed) != 0 || !tr.host || !tr.writes {
			t.Errorf("%s: served by a %T, claimed by %v", name, tr.backend, tr.claimed)
		}
	}
}

// TestClaimedDirectory: an extension's backend is wrapped, so that it is isolated, and only the rules of who claims count.
func TestClaimedDirectory(t *testing.T) {
	tr, registry := openFor(t, t.TempDir(), claimer{claims: true})
	s, ok := tr.backend.(*share.Share)
	if !ok || len(tr.claimed) != 1 || tr.host {
		t.Fatalf("served by a %T, claimed by %v, passthrough too: %v", tr.backend, tr.claimed, tr.host)
	}
	part := s.PartOf(1)
	if part.Name != "claimer" || !part.Isolated || !part.Slow || part.Timeout != extensions.DefaultTimeout {
		t.Errorf("its part is %q, isolated %v, slow %v, timeout %v", part.Name, part.Isolated, part.Slow, part.Timeout)
	}
	if sources, err := registry.Rules(tr.claimed); err != nil || len(sources) != 1 || sources[0].Owner != "claimer" {
		t.Errorf("its rules are %v, %v", sources, err)
	}
}

// TestSharedDirErrors has no directory to serve.
func TestSharedDirErrors(t *testing.T) {
	file := t.TempDir() + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, file + "-not-there"} {
		if err := checkDir(dir); err == nil {
			t.Errorf("%s is taken", dir)
		}
	}
}

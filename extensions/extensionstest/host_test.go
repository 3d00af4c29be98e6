package extensionstest

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/seccomp"
)

// layer serves its one lower as it is, and hands a file in.
type layer struct {
	log    []string
	secret string // read inside from the file
	fail   string // "outside" or "inside"
	told   string
}

func (*layer) Name() string { return "layer" }

func (*layer) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	return nil, extensions.Options{}, errors.New("not asked")
}

func (*layer) SeccompRules() seccomp.Rules { return nil }

func (l *layer) OpenOutside(ctx context.Context, out *extensions.Outside, m extensions.Mount) (*extensions.Given, error) {
	for _, name := range []string{"first", "second"} {
		out.OnClose(func() error {
			l.log = append(l.log, name)
			return nil
		})
	}
	part, err := out.Open(ctx, m.Lowers[0])
	if err != nil {
		return nil, err
	}
	given := &extensions.Given{Parts: []extensions.Part{part}, Data: json.RawMessage(`{"n":7}`)}
	file, err := os.Open(m.Source)
	if err != nil {
		return given, err
	}
	given.Files = []*os.File{file}
	if l.fail == "outside" {
		return given, errors.New("failed outside")
	}
	out.Action("tell", func(ctx context.Context, arg json.RawMessage) (any, error) {
		file, err := os.Open(m.Source)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		return out.Tell(ctx, "hear", arg, file)
	})
	return given, nil
}

func (l *layer) OpenInside(in *extensions.Inside, _ extensions.Mount, g *extensions.Given) (fsbackend.Backend, extensions.Options, error) {
	defer g.Close()
	if string(g.Data) != `{"n":7}` {
		return nil, extensions.Options{}, errors.New("data is " + string(g.Data))
	}
	b, err := io.ReadAll(g.Files[0])
	if err != nil {
		return nil, extensions.Options{}, err
	}
	l.secret = string(b)
	if l.fail == "inside" {
		return nil, extensions.Options{}, errors.New("failed inside")
	}
	in.OnTell(func(method string, arg json.RawMessage, files []*os.File) (any, error) {
		l.told = method + " " + string(arg)
		return map[string]int{"heard": len(files)}, files[0].Close()
	})
	return in.Open(g.Parts[0])
}

func TestHost(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("s3cret"), 0o600); err != nil {
		t.Fatal(err)
	}
	l := &layer{}
	h := &Host{Extensions: []extensions.Hosted{l}}
	m := extensions.Mount{
		Backend: "layer", Source: filepath.Join(dir, "secret"),
		Lowers: []extensions.Mount{{Backend: extensions.Passthrough, Source: dir}},
	}
	t.Run("served", func(t *testing.T) {
		g := h.Open(t, m)
		if l.secret != "s3cret" || !g.Options.Stock {
			t.Errorf("inside got %q, options %+v", l.secret, g.Options)
		}
		if _, errno := g.Client().Lookup(fsbackendtest.Root, "secret"); errno != fsbackend.OK {
			t.Errorf("LOOKUP in the directory: %v", errno)
		}
		got, err := g.Act(t.Context(), "tell", []int{1})
		if err != nil || string(got) != `{"heard":1}` || l.told != "hear [1]" {
			t.Errorf("action answered %s, %v; inside was told %q", got, err, l.told)
		}
		if _, err := g.Act(t.Context(), "other", nil); err == nil {
			t.Error("an action that there is not was done")
		}
	})
	if want := []string{"second", "first"}; !slices.Equal(l.log, want) {
		t.Errorf("ends: %q, expected %q", l.log, want)
	}
	for _, where := range []string{"outside", "inside"} {
		l.fail, l.log = where, nil
		if err := h.OpenFails(t, m); !strings.Contains(err.Error(), "failed "+where) {
			t.Errorf("error %v, expected that from %s", err, where)
		}
		if len(l.log) != 2 {
			t.Errorf("after a failure %s: %q was ended, expected both", where, l.log)
		}
	}
	l.fail = ""
	m.Lowers[0].Backend = "other"
	if err := h.OpenFails(t, m); !strings.Contains(err.Error(), "other") {
		t.Errorf("unknown backend: %v", err)
	}
	m.Lowers[0] = extensions.Mount{Backend: extensions.Mem}
	g := h.Open(t, m)
	if _, errno := g.Client().Create(fsbackendtest.Root, "f", unix.O_RDWR, 0o600); errno != fsbackend.OK {
		t.Errorf("CREATE in memory: %v", errno)
	}
}

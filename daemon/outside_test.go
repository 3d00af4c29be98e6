package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/seccomp"
)

// halves is an extension in two halves: what is below its first lower, and a file that it was given.
type halves struct {
	mu     sync.Mutex
	events []string
	fail   string // the half that fails
	action chan struct{}
	ended  chan string // the graft of each half outside that ends
}

func newHalves() *halves { return &halves{ended: make(chan string, 10)} }

func (*halves) Name() string                { return "halves" }
func (*halves) SeccompRules() seccomp.Rules { return nil }
func (*halves) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	panic("asked as if it were in one")
}

func (h *halves) note(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = append(h.events, fmt.Sprintf(format, args...))
}

func (h *halves) noted() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.events, "; ")
}

func (h *halves) OpenOutside(ctx context.Context, out *extensions.Outside, m extensions.Mount) (*extensions.Given, error) {
	h.note("outside %s %q", m.Path, m.Options)
	out.OnClose(func() error {
		h.ended <- m.Path
		if h.fail == "close" {
			panic("while it ends")
		}
		return nil
	})
	if h.fail == "outside" {
		return nil, errors.New("no luck outside: expected some")
	}
	if len(m.Lowers) == 0 {
		return nil, errors.New("there is nothing below")
	}
	g := &extensions.Given{Data: json.RawMessage(`"hello"`)}
	f, err := os.Open(filepath.Join(m.Lowers[0].Source, "..", "f"))
	if err != nil {
		return nil, err
	}
	g.Files = append(g.Files, f)
	for _, lower := range m.Lowers {
		p, err := out.Open(ctx, lower)
		if err != nil {
			return g, err
		}
		g.Parts = append(g.Parts, p)
	}
	out.Action("say", func(ctx context.Context, arg json.RawMessage) (any, error) {
		if h.action != nil && string(arg) != `"wait"` {
			h.action <- struct{}{}
			<-h.action
		}
		switch string(arg) {
		case `"panic"`:
			panic("in an action")
		case `"wait"`:
			h.action <- struct{}{}
			<-ctx.Done()
			h.note("the action has ended")
			return nil, ctx.Err()
		case `"full"`:
			return nil, fmt.Errorf("write: %w", unix.ENOSPC)
		case `"wrong"`:
			return nil, &extensions.ActionError{Message: "wrong: expected something else", Hint: "say something else"}
		}
		f, err := os.Open(filepath.Join(m.Lowers[0].Source, "..", "f"))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return out.Tell(ctx, "say", arg, f)
	})
	return g, nil
}

func (h *halves) OpenInside(in *extensions.Inside, m extensions.Mount, g *extensions.Given) (fsbackend.Backend, extensions.Options, error) {
	defer g.Close()
	h.note("inside %s %s, %d files, %d parts", m.Path, g.Data, len(g.Files), len(g.Parts))
	if h.fail == "inside" {
		return nil, extensions.Options{}, errors.New("no luck inside")
	}
	in.OnTell(func(method string, arg json.RawMessage, files []*os.File) (any, error) {
		defer closeFiles(files)
		if string(arg) == `"panic inside"` {
			panic("inside")
		}
		text, err := io.ReadAll(files[0])
		return fmt.Sprintf("%s %s %s", method, arg, text), err
	})
	var last fsbackend.Backend
	for i := range g.Parts {
		b, o, err := in.Open(g.Parts[len(g.Parts)-1-i])
		if last != nil {
			err = errors.Join(err, last.Close())
		}
		if err != nil || !o.Stock {
			return nil, o, errors.Join(err, errors.New("a part is not what was expected"))
		}
		last = b
	}
	return last, extensions.Options{Stock: true}, nil
}

func (r *rig) halvesSpec(path string) api.GraftSpec {
	return api.GraftSpec{Path: path, Backend: "halves", Options: []string{"x=y"}, Lowers: []api.LowerSpec{{Source: r.path("a")}, {Backend: "mem"}}}
}

// TestHalves follows grafts in two halves from their beginning to their end, as a root, beside it, replaced, and removed.
func TestHalves(t *testing.T) {
	h := newHalves()
	r := newRig(t, h)
	if err := os.WriteFile(r.path("a/name"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	r.add(t, api.ShareSpec{Tag: "x", Grafts: []api.GraftSpec{r.halvesSpec("/")}})
	want := `outside / ["x=y"]; inside / "hello", 1 files, 2 parts`
	if got := h.noted(); got != want {
		t.Fatalf("a root: %s, expected %s", got, want)
	}
	s, err := r.in.find("x")
	if err != nil {
		t.Fatal(err)
	}
	c := &fsbackendtest.Client{R: fsbackend.Resolve(s.tree)}
	if _, errno := c.Lookup(1, "name"); errno != 0 {
		t.Errorf("what the part has is not found: %v", errno)
	}
	if _, err := r.AddGraft(t.Context(), "x", r.halvesSpec("/sub"), false); err != nil {
		t.Fatal(err)
	}
	answer, err := r.ActGraft(t.Context(), "x", "/sub", "say", json.RawMessage(`"hi"`))
	if err != nil || string(answer) != `"say \"hi\" text"` {
		t.Errorf("an action: %s, %v", answer, err)
	}
	_, err = r.ActGraft(t.Context(), "x", "/sub", "say", json.RawMessage(`"wrong"`))
	wantCode(t, err, api.CodeInvalid, "expected something else")
	_, err = r.ActGraft(t.Context(), "x", "/sub", "say", json.RawMessage(`"full"`))
	wantCode(t, err, api.CodeUnavailable, "no space left")
	_, err = r.ActGraft(t.Context(), "x", "/sub", "shout", nil)
	wantCode(t, err, api.CodeInvalid, "[say]")
	_, err = r.ActGraft(t.Context(), "x", "/none", "say", nil)
	wantCode(t, err, api.CodeNotFound, "/none")

	if _, err := r.AddGraft(t.Context(), "x", r.halvesSpec("/sub"), true); err != nil {
		t.Fatal(err)
	}
	h.await(t, "/sub")
	if err := r.RemoveGraft(t.Context(), "x", "/sub"); err != nil {
		t.Fatal(err)
	}
	h.await(t, "/sub")
	if err := r.RemoveShare(t.Context(), "x", true); err != nil {
		t.Fatal(err)
	}
	h.await(t, "/")
}

// await waits until the half outside of a graft ends.
func (h *halves) await(t *testing.T, path string) {
	t.Helper()
	select {
	case got := <-h.ended:
		if got != path {
			t.Errorf("the half of %s ends, expected that of %s", got, path)
		}
	case <-time.After(patience):
		t.Errorf("the half of %s does not end", path)
	}
}

// TestHalvesFail has each half fail: nothing is left.
func TestHalvesFail(t *testing.T) {
	for _, half := range []string{"outside", "inside", "part"} {
		t.Run(half, func(t *testing.T) {
			h := newHalves()
			h.fail = half
			r := newRig(t, h)
			spec := r.halvesSpec("/")
			want := "no luck " + half
			if half == "part" {
				spec.Lowers = append(spec.Lowers, api.LowerSpec{Source: r.path("missing")})
				want = "missing"
			}
			_, err := r.AddShare(t.Context(), api.ShareSpec{Tag: "x", Grafts: []api.GraftSpec{spec}})
			wantCode(t, err, api.CodeInvalid, want)
			h.await(t, "/")
			r.in.mu.Lock()
			defer r.in.mu.Unlock()
			if len(r.in.hosted) != 0 {
				t.Errorf("%d halves are kept", len(r.in.hosted))
			}
		})
	}
}

// TestHalvesBusy asks for two actions at once.
func TestHalvesBusy(t *testing.T) {
	h := newHalves()
	h.action = make(chan struct{})
	r := newRig(t, h)
	r.add(t, api.ShareSpec{Tag: "x", Grafts: []api.GraftSpec{r.halvesSpec("/")}})
	done := make(chan error, 1)
	go func() {
		_, err := r.ActGraft(t.Context(), "x", "/", "say", json.RawMessage(`1`))
		done <- err
	}()
	<-h.action
	_, err := r.ActGraft(t.Context(), "x", "/", "say", json.RawMessage(`2`))
	wantCode(t, err, api.CodeBusy, "under way")
	h.action <- struct{}{}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestHalvesPanic has an extension panic in all that it is called for later: that fails, and the daemon goes on.
func TestHalvesPanic(t *testing.T) {
	h := newHalves()
	h.fail = "close"
	r := newRig(t, h)
	r.add(t, api.ShareSpec{Tag: "x", Grafts: []api.GraftSpec{r.halvesSpec("/")}})
	_, err := r.ActGraft(t.Context(), "x", "/", "say", json.RawMessage(`"panic"`))
	wantCode(t, err, api.CodeInternal, "in an action")
	_, err = r.ActGraft(t.Context(), "x", "/", "say", json.RawMessage(`"panic inside"`))
	if err == nil || !strings.Contains(err.Error(), "panicked") && !strings.Contains(err.Error(), "inside") {
		t.Errorf("a panic of the half inside: %v", err)
	}
	if err := r.RemoveShare(t.Context(), "x", true); err != nil {
		t.Fatal(err)
	}
	h.await(t, "/")
}

// TestHalvesEndWhileActing removes a graft while an action is under way: what the action uses is closed after it.
func TestHalvesEndWhileActing(t *testing.T) {
	h := newHalves()
	h.action = make(chan struct{})
	r := newRig(t, h)
	r.add(t, api.ShareSpec{Tag: "x", Grafts: []api.GraftSpec{r.halvesSpec("/")}})
	done := make(chan error, 1)
	go func() {
		_, err := r.ActGraft(t.Context(), "x", "/", "say", json.RawMessage(`"wait"`))
		done <- err
	}()
	<-h.action
	if err := r.RemoveShare(t.Context(), "x", true); err != nil {
		t.Fatal(err)
	}
	h.await(t, "/")
	if !strings.HasSuffix(h.noted(), "the action has ended") {
		t.Errorf("what an action uses was closed before it had ended: %s", h.noted())
	}
	if err := <-done; err == nil {
		t.Error("an action on what has gone has succeeded")
	}
}

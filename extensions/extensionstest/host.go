// Package extensionstest stands in for the daemon in tests of extensions.Hosted: it makes both halves in one process, and has all
// that goes from one to the other go through JSON and descriptors, as between the daemon's two processes.
package extensionstest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
)

// Host opens mounts as the daemon does. The zero value knows passthrough and mem.
type Host struct {
	// Extensions are those that mounts can name.
	Extensions []extensions.Hosted
	// Log is given to both halves; nothing is logged if nil.
	Log *slog.Logger
	// StateDir and Plugins are what Outside says, MaxFDs and MaxInodes what Inside says.
	StateDir          string
	Plugins           []string
	MaxFDs, MaxInodes int
}

// Graft is a mount that is served.
type Graft struct {
	Backend fsbackend.Backend
	Options extensions.Options

	host  *Host
	mount extensions.Mount
	now   *halves
}

// halves are what one opening of a graft has made.
type halves struct {
	onClose []func() error
	actions map[string]func(context.Context, json.RawMessage) (any, error)
	onTell  func(string, json.RawMessage, []*os.File) (any, error)
	procfd  *os.File
}

// Open opens m or fails the test, which closes it at its end and checks that no descriptor is left.
func (h *Host) Open(t testing.TB, m extensions.Mount) *Graft {
	t.Helper()
	fds := openFDs(t)
	g, err := h.TryOpen(t.Context(), m)
	if err != nil {
		t.Fatalf("open %s: %v", m.Backend, err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Errorf("close %s: %v", m.Backend, err)
		}
		if left := openFDs(t); left > fds {
			t.Errorf("%d file descriptors open after %s is closed, %d before", left, m.Backend, fds)
		}
	})
	return g
}

// OpenFails has m opened, which must fail, and leave no descriptor behind. It returns the error.
func (h *Host) OpenFails(t testing.TB, m extensions.Mount) error {
	t.Helper()
	fds := openFDs(t)
	g, err := h.TryOpen(t.Context(), m)
	if err == nil {
		_ = g.Close()
		t.Fatalf("%+v was opened, expected an error", m)
	}
	if left := openFDs(t); left > fds {
		t.Errorf("%d file descriptors open after %q, %d before", left, err, fds)
	}
	return err
}

// TryOpen opens m. Who gets a Graft closes it.
func (h *Host) TryOpen(ctx context.Context, m extensions.Mount) (*Graft, error) {
	g := &Graft{host: h, mount: m}
	return g, g.open(ctx)
}

// Client makes requests of the backend as a guest's root does.
func (g *Graft) Client() *fsbackendtest.Client {
	return &fsbackendtest.Client{R: fsbackend.Resolve(g.Backend)}
}

// Act makes the request of an operator that Outside.Action has named. arg and the answer go through JSON.
func (g *Graft) Act(ctx context.Context, name string, arg any) (json.RawMessage, error) {
	f := g.now.actions[name]
	if f == nil {
		return nil, fmt.Errorf("there is no action %q", name)
	}
	return answer(arg, func(arg json.RawMessage) (any, error) { return f(ctx, arg) })
}

// Close ends the graft as the daemon does: first the half inside, then what OnClose was given, the last first.
func (g *Graft) Close() error {
	return errors.Join(g.Backend.Close(), g.now.close())
}

func (p *halves) close() error {
	var errs []error
	for _, f := range slices.Backward(p.onClose) {
		errs = append(errs, f())
	}
	return errors.Join(append(errs, p.procfd.Close())...)
}

// open makes both halves of the graft.
func (g *Graft) open(ctx context.Context) error {
	proc, err := os.OpenFile("/proc/self/fd", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	p := &halves{procfd: proc, actions: map[string]func(context.Context, json.RawMessage) (any, error){}}
	part, err := g.outside(ctx, p, g.mount)
	if err == nil {
		part, err = sent(part)
	}
	if err == nil {
		var b fsbackend.Backend
		var o extensions.Options
		if b, o, err = g.inside(p, part); err == nil {
			g.Backend, g.Options, g.now = b, o, p
			return nil
		}
	}
	return errors.Join(err, p.close())
}

func (g *Graft) log() *slog.Logger {
	if g.host.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return g.host.Log
}

func (g *Graft) extension(name string) (extensions.Hosted, error) {
	for _, e := range g.host.Extensions {
		if e.Name() == name {
			return e, nil
		}
	}
	return nil, fmt.Errorf("no backend %q: expected one of Host.Extensions, passthrough or mem", name)
}

// outside is Outside.Open.
func (g *Graft) outside(ctx context.Context, p *halves, m extensions.Mount) (extensions.Part, error) {
	part := extensions.Part{Mount: m, Given: new(extensions.Given)}
	switch m.Backend {
	case extensions.Mem:
		return part, nil
	case extensions.Passthrough:
		dir, err := os.OpenFile(m.Source, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err == nil {
			part.Given.Files = []*os.File{dir}
		}
		return part, err
	}
	ext, err := g.extension(m.Backend)
	if err != nil {
		return part, err
	}
	out := &extensions.Outside{
		Log:     g.log(),
		Open:    func(ctx context.Context, m extensions.Mount) (extensions.Part, error) { return g.outside(ctx, p, m) },
		OnClose: func(f func() error) { p.onClose = append(p.onClose, f) },
		Action: func(name string, f func(context.Context, json.RawMessage) (any, error)) {
			p.actions[name] = f
		},
		Tell: func(_ context.Context, method string, arg any, files ...*os.File) (json.RawMessage, error) {
			if p.onTell == nil {
				return nil, errors.New("nobody inside listens: Inside.OnTell was not called")
			}
			copies := new(extensions.Given)
			if err := copyFiles(copies, &extensions.Given{Files: files}); err != nil {
				return nil, err
			}
			return answer(arg, func(arg json.RawMessage) (any, error) { return p.onTell(method, arg, copies.Files) })
		},
		StateDir: g.host.StateDir,
		Plugins:  g.host.Plugins,
		Has: func(name string) bool {
			_, err := g.extension(name)
			return err == nil || name == extensions.Mem || name == extensions.Passthrough
		},
	}
	given, err := ext.OpenOutside(ctx, out, m)
	if err != nil {
		given.Close()
		return part, err
	}
	part.Given = given
	return part, nil
}

// inside is Inside.Open.
func (g *Graft) inside(p *halves, part extensions.Part) (fsbackend.Backend, extensions.Options, error) {
	switch m := part.Mount; m.Backend {
	case extensions.Mem:
		b, err := mem.New(mem.Config{})
		return b, extensions.Options{Stock: true}, err
	case extensions.Passthrough:
		defer part.Given.Close()
		b, err := passthrough.New(passthrough.Config{
			Dir: m.Source, DirFD: int(part.Given.Files[0].Fd()), ProcFD: int(p.procfd.Fd()),
			MaxFDs: g.host.MaxFDs, MaxInodes: g.host.MaxInodes,
		})
		return b, extensions.Options{Stock: true}, err
	}
	ext, err := g.extension(part.Mount.Backend)
	if err != nil {
		return nil, extensions.Options{}, err
	}
	in := &extensions.Inside{
		Log:    g.log(),
		Open:   func(part extensions.Part) (fsbackend.Backend, extensions.Options, error) { return g.inside(p, part) },
		OnTell: func(f func(string, json.RawMessage, []*os.File) (any, error)) { p.onTell = f },
		ProcFD: int(p.procfd.Fd()),
		MaxFDs: g.host.MaxFDs, MaxInodes: g.host.MaxInodes,
	}
	return ext.OpenInside(in, part.Mount, part.Given)
}

// sent is part as the other process gets it: a copy by JSON, and descriptors of its own.
func sent(part extensions.Part) (extensions.Part, error) {
	defer part.Given.Close()
	b, err := json.Marshal(part)
	if err != nil {
		return part, err
	}
	var got extensions.Part
	if err := json.Unmarshal(b, &got); err != nil {
		return got, err
	}
	if err := copyFiles(got.Given, part.Given); err != nil {
		got.Given.Close()
		return got, err
	}
	return got, nil
}

func copyFiles(to, from *extensions.Given) error {
	if from == nil {
		return nil
	}
	for _, f := range from.Files {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("duplicate %s: %w", f.Name(), err)
		}
		to.Files = append(to.Files, os.NewFile(uintptr(fd), f.Name()))
	}
	for i := range from.Parts {
		if err := copyFiles(to.Parts[i].Given, from.Parts[i].Given); err != nil {
			return err
		}
	}
	return nil
}

// answer has f called with arg and returns what it answers, both by JSON.
func answer(arg any, f func(json.RawMessage) (any, error)) (json.RawMessage, error) {
	b, err := json.Marshal(arg)
	if err != nil {
		return nil, err
	}
	out, err := f(b)
	if err != nil {
		return nil, err
	}
	return json.Marshal(out)
}

func openFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

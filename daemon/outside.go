package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/link"
)

// Grafts of extensions in two halves (extensions.Hosted), in the keeper. hosted.go is the server's side.

// maxGivenFiles bounds the descriptors that one graft is given, its parts included: they go in one message (link.MaxFiles), with room
// for what comes to mind later.
const maxGivenFiles = 200

// hostedOrder is what the server is told of a graft in two halves. Its descriptors come with the message.
type hostedOrder struct {
	ID    uint64
	Mount extensions.Mount
	Given givenOrder
}

// givenOrder is extensions.Given on its way: of the descriptors, those of the parts follow its own.
type givenOrder struct {
	Data  json.RawMessage
	Files int
	Parts []partOrder
}

type partOrder struct {
	Mount extensions.Mount
	Given givenOrder
}

// packGiven takes g apart for a message.
func packGiven(g *extensions.Given) (order givenOrder, files []*os.File) {
	order = givenOrder{Data: g.Data, Files: len(g.Files)}
	files = slices.Clone(g.Files)
	for _, p := range g.Parts {
		given, more := packGiven(p.Given)
		order.Parts = append(order.Parts, partOrder{p.Mount, given})
		files = append(files, more...)
	}
	return order, files
}

// hostedGraft is the half of a graft that is outside.
type hostedGraft struct {
	order hostedOrder
	files []*os.File
	log   *slog.Logger
	tell  func(ctx context.Context, method string, arg any, files ...*os.File) (json.RawMessage, error)

	mu      sync.Mutex
	closers []func() error
	closed  bool
	actions map[string]func(context.Context, json.RawMessage) (any, error)

	acting sync.Mutex // held while an action runs, and by close
	ending context.Context
	end    context.CancelFunc // has an action that is under way end
}

// lastHosted is the ID of the graft in two halves that was opened last.
var lastHosted atomic.Uint64

// outsidePatience is how long the outer half of a graft may take to open.
const outsidePatience = 2 * time.Minute

// openHosted opens the outer half of a graft.
func (k *keeper) openHosted(tag string, spec api.GraftSpec) (_ *hostedGraft, err error) {
	h := &hostedGraft{
		log:     k.log.With("share", tag, "graft", spec.Path),
		actions: make(map[string]func(context.Context, json.RawMessage) (any, error)),
	}
	h.order.ID = lastHosted.Add(1)
	h.ending, h.end = context.WithCancel(context.Background())
	h.tell = func(ctx context.Context, method string, arg any, files ...*os.File) (answer json.RawMessage, err error) {
		text, err := json.Marshal(arg)
		if err != nil {
			return nil, err
		}
		err = ended(k.line.Call(ctx, askTell, tellOrder{ID: h.order.ID, Method: method, Arg: text}, &answer, files...))
		return answer, err
	}
	h.order.Mount = hostedMount(tag, spec)
	defer func() {
		if err != nil {
			err = errors.Join(invalidGraft(err), h.close())
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), outsidePatience)
	defer cancel()
	given, err := k.registry.Outside(ctx, k.outside(h), h.order.Mount)
	if err != nil {
		return nil, err
	}
	if h.order.Given, h.files = packGiven(given); len(h.files) > maxGivenFiles {
		return nil, fmt.Errorf("it takes %d descriptors: expected at most %d: use fewer layers", len(h.files), maxGivenFiles)
	}
	return h, nil
}

// invalidGraft is err as of a graft that was asked for: nothing to be done about by asking for something else is what the host is short of.
func invalidGraft(err error) error {
	if errors.As(err, new(*api.Error)) {
		return err
	}
	code := api.CodeInvalid
	for _, short := range []error{unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, short) {
			code = api.CodeUnavailable
		}
	}
	return &api.Error{Code: code, Message: err.Error()}
}

// hostedMount is a graft as its extension is asked for it.
func hostedMount(tag string, spec api.GraftSpec) extensions.Mount {
	return extensions.Mount{
		Share: tag, Path: spec.Path, Backend: spec.Backend, Source: spec.Source, Options: spec.Options, ReadOnly: spec.ReadOnly,
		Lowers: lowerMounts(tag, spec.Path, spec.Lowers),
	}
}

func lowerMounts(tag, path string, lowers []api.LowerSpec) (mounts []extensions.Mount) {
	for _, l := range lowers {
		backend := l.Backend
		if backend == "" {
			backend = extensions.Passthrough
		}
		mounts = append(mounts, extensions.Mount{
			Share: tag, Path: path, Backend: backend, Source: l.Source, Options: l.Options, ReadOnly: true,
			Lowers: lowerMounts(tag, path, l.Lowers),
		})
	}
	return mounts
}

// outside is what the extension has of the daemon for h.
func (k *keeper) outside(h *hostedGraft) *extensions.Outside {
	out := &extensions.Outside{Log: h.log, Tell: h.tell, StateDir: k.stateDir, Plugins: k.plugins, Has: k.registry.MayBePart}
	out.OnClose = func(f func() error) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.closers = append(h.closers, f)
	}
	out.Action = func(name string, f func(context.Context, json.RawMessage) (any, error)) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.actions[name] = f
	}
	// A part has no actions of its own: they would be those of the whole.
	part := *out
	part.Action = func(string, func(context.Context, json.RawMessage) (any, error)) {}
	out.Open = func(ctx context.Context, m extensions.Mount) (extensions.Part, error) {
		return k.openPart(ctx, &part, m)
	}
	part.Open = out.Open
	return out
}

// openPart opens what a graft is made of.
func (k *keeper) openPart(ctx context.Context, out *extensions.Outside, m extensions.Mount) (extensions.Part, error) {
	p := extensions.Part{Mount: m, Given: &extensions.Given{}}
	var err error
	switch m.Backend {
	case "":
		return p, errors.New("a part has no backend: expected its name")
	case extensions.Mem:
	case extensions.Passthrough:
		p.Given.Files, err = openSource(m.Source)
	default:
		p.Given, err = k.registry.Outside(ctx, out, m)
	}
	return p, err
}

// openSource opens a directory of the host as openOne does.
func openSource(path string) ([]*os.File, error) {
	g := &openGraft{graftOrder: graftOrder{Spec: api.GraftSpec{Path: "/", Source: path}}}
	g.Mount.Path, g.Mount.Source = "/", path
	if path == "" {
		return nil, errors.New("backend passthrough has no source: expected a directory of the host")
	}
	if err := g.resolve(); err != nil {
		return nil, err
	}
	return []*os.File{g.dir}, nil
}

// closeFiles closes what has been sent.
func (h *hostedGraft) closeFiles() {
	closeFiles(h.files)
	h.files = nil
}

// close ends the half outside, and first an action that is under way, which uses what is closed then. It may be called again.
func (h *hostedGraft) close() error {
	h.closeFiles()
	h.end()
	h.acting.Lock()
	defer h.acting.Unlock()
	h.mu.Lock()
	closers := h.closers
	h.closers, h.closed = nil, true
	h.mu.Unlock()
	var failed []error
	for _, f := range slices.Backward(closers) {
		failed = append(failed, safely(h.order.Mount.Backend, "OnClose", f))
	}
	return errors.Join(failed...)
}

// safely calls f, which is an extension's, in which a panic is an error.
func safely(extension, what string, f func() error) error {
	return extensions.Call(extension, what, f)
}

// adopt has h end when the server says that its graft is gone for good, and with the server.
func (k *keeper) adopt(h *hostedGraft) {
	k.hosted.Go(func() {
		err := k.line.Call(context.Background(), askGone, h.order.ID, nil)
		if err != nil && !errors.Is(err, link.ErrClosed) {
			h.log.Warn("cannot wait for the end of a graft", "error", err)
		}
		if err := h.close(); err != nil {
			h.log.Warn("cannot end what a graft had outside the sandbox", "error", err)
		}
	})
}

// awaitHosted waits until all that was adopted has ended, which it does with the server.
func (k *keeper) awaitHosted(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		k.hosted.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return errors.New("what grafts have outside the sandbox does not end")
	}
}

// act has the graft do what it can by this name.
func (h *hostedGraft) act(ctx context.Context, name string, arg json.RawMessage) (json.RawMessage, error) {
	if !h.acting.TryLock() {
		return nil, &api.Error{Code: api.CodeBusy, Message: "another action on the graft is under way", Hint: "try again when it is done"}
	}
	defer h.acting.Unlock()
	h.mu.Lock()
	f, closed := h.actions[name], h.closed
	var known []string
	for name := range h.actions {
		known = append(known, name)
	}
	h.mu.Unlock()
	slices.Sort(known)
	switch {
	case closed:
		return nil, api.Errorf(api.CodeNotFound, "the graft has gone")
	case f == nil && len(known) == 0:
		return nil, api.Errorf(api.CodeInvalid, "backend %s has no actions", h.order.Mount.Backend)
	case f == nil:
		return nil, api.Errorf(api.CodeInvalid, "%q is nothing that the graft can do: expected one of %v", name, known)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(h.ending, cancel)()
	var v any
	err := safely(h.order.Mount.Backend, "Action "+name, func() (err error) {
		v, err = f(ctx, arg)
		return err
	})
	var action *extensions.ActionError
	var panicked *extensions.PanicError
	if errors.As(err, &panicked) {
		h.log.Error("an extension has panicked; the action it was asked for has failed", "error", panicked, "stack", string(panicked.Stack))
		return nil, &api.Error{Code: api.CodeInternal, Message: panicked.Error()}
	}
	switch {
	case errors.As(err, &action):
		return nil, &api.Error{Code: api.CodeInvalid, Message: action.Message, Hint: action.Hint}
	case err != nil:
		return nil, invalidGraft(err)
	}
	return json.Marshal(v)
}

// ActGraft implements control.Daemon.
func (k *keeper) ActGraft(ctx context.Context, tag, path, action string, arg json.RawMessage) (json.RawMessage, error) {
	s, err := k.find(tag)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	h, known := s.hosted[path], s.grafts[path].Path != ""
	s.mu.Unlock()
	switch {
	case !known:
		return nil, api.Errorf(api.CodeNotFound, "there is no graft at %s in share %q", path, tag)
	case h == nil:
		return nil, api.Errorf(api.CodeInvalid, "the graft at %s has no actions: they are for an overlay and its like", path)
	}
	return await(ctx, func() (json.RawMessage, error) { return h.act(ctx, action, arg) })
}

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/bundle"
	"github.com/sluicefs/sluice/internal/cli"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/configfile"
	"github.com/sluicefs/sluice/internal/link"
	"github.com/sluicefs/sluice/internal/listen"
)

// keeper is the process outside the sandbox. It does what takes the host: it opens what is to be grafted, creates sockets, watches
// files; and tells the server the rest. It implements control.Daemon.
//
// Whatever touches the host's files, or has the server do so, may hang with a disk or a network. Then only changes of the same share
// wait: nothing is locked that others take, and what is asked about a share is answered.
type keeper struct {
	line     *link.Keeper
	log      *slog.Logger
	journal  journal
	control  string // path of the control socket, beside which sockets are that nobody has named; "" is none
	backends []string
	sandbox  config.Sandbox
	id       string
	server   int // its process id
	started  time.Time
	registry extensions.Registry // of those that may serve
	stateDir string
	plugins  []string
	hosted   sync.WaitGroup // halves of grafts outside the sandbox that are not ended

	mu     sync.Mutex // no call is made while it is held
	shares map[string]*kept
	ending bool // no share is added any more
}

// kept is a share, or one about to be.
type kept struct {
	tag    string
	socket string // absolute, as the journal has it; "" is an inherited one
	events *eventLog
	turn   chan struct{} // whose element is held by who changes the share

	// What follows is for who has the turn.
	ln     *listen.Listener
	inside bool // the server has it

	mu      sync.Mutex // no call is made while it is held
	ready   bool       // it is there for others
	spec    api.ShareSpec
	grafts  map[string]api.GraftSpec // by path, as they are
	watches map[string]*watching     // by graft, those of them that are watched
	hosted  map[string]*hostedGraft  // by graft, those of them in two halves
}

// ask asks the server for what it has at hand. ErrClosed is also an *api.Error.
func (k *keeper) ask(ctx context.Context, method string, params, result any) error {
	return ended(k.line.Call(ctx, method, params, result))
}

// order has the server do something. Once begun it comes to its end.
func (k *keeper) order(method string, params, result any, files ...*os.File) error {
	return ended(k.line.Call(context.Background(), method, params, result, files...))
}

func ended(err error) error {
	if errors.Is(err, link.ErrClosed) {
		return fmt.Errorf("%w (%w)", api.Errorf(api.CodeUnavailable, "the daemon is ending"), err)
	}
	return err
}

// await returns what change does, for which nobody waits longer than ctx lasts. A change that has begun by then goes on and comes to
// its end: it has all of its effect, or, if it fails, none. What has not begun does not.
func await[T any](ctx context.Context, change func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	c := make(chan result, 1)
	go func() {
		v, err := change()
		c <- result{v, err}
	}()
	select {
	case r := <-c:
		return r.v, r.err
	case <-ctx.Done():
		var none T
		return none, &api.Error{
			Code: api.CodeUnavailable, Message: "it was not done in time, and may be yet: what it needs of the host hangs, or is slow",
			Hint: "look at the source, and what there is by sluicectl share ls and graft ls",
		}
	}
}

// Info implements control.Daemon.
func (k *keeper) Info(ctx context.Context) (api.Info, error) {
	shares, err := k.Shares(ctx)
	if err != nil {
		return api.Info{}, err
	}
	info := api.Info{
		ID: k.id, Version: cli.Version(), State: "READY", PID: os.Getpid(), Started: k.started, Sandbox: k.sandbox.String(),
		Shares: len(shares), Backends: k.backends,
	}
	for _, s := range shares {
		if s.State != api.StateWaiting {
			info.State = "RUNNING"
		}
	}
	return info, nil
}

// Shares implements control.Daemon.
func (k *keeper) Shares(ctx context.Context) ([]api.Share, error) {
	var states []shareStatus
	if err := k.ask(ctx, askShares, nil, &states); err != nil {
		return nil, err
	}
	by := make(map[string]shareStatus)
	for _, state := range states {
		by[state.Tag] = state
	}
	shares := []api.Share{}
	for _, s := range k.all() {
		// One that the server does not have is about to be no more.
		if state, ok := by[s.tag]; ok {
			shares = append(shares, s.show(state))
		}
	}
	return shares, nil
}

// all are the shares that are there for others, by tag.
func (k *keeper) all() []*kept {
	k.mu.Lock()
	shares := slices.Collect(maps.Values(k.shares))
	k.mu.Unlock()
	shares = slices.DeleteFunc(shares, func(s *kept) bool { return !s.isReady() })
	slices.SortFunc(shares, func(a, b *kept) int { return strings.Compare(a.tag, b.tag) })
	return shares
}

// find returns the share of this tag, that is there for others.
func (k *keeper) find(tag string) (*kept, error) {
	k.mu.Lock()
	s := k.shares[tag]
	k.mu.Unlock()
	if s == nil || !s.isReady() {
		return nil, noShare(tag)
	}
	return s, nil
}

func noShare(tag string) error {
	return &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("there is no share %q", tag), Hint: "sluicectl share ls lists them"}
}

func (s *kept) isReady() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ready
}

func (s *kept) setReady(ready bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = ready
}

// show is the share as the API has it.
func (s *kept) show(state shareStatus) api.Share {
	s.mu.Lock()
	defer s.mu.Unlock()
	spec := s.spec
	spec.Grafts = nil
	for _, path := range slices.Sorted(maps.Keys(s.grafts)) {
		spec.Grafts = append(spec.Grafts, s.grafts[path])
	}
	return api.Share{ShareSpec: spec, State: state.State, Guests: state.Guests}
}

// take waits for the turn to change s, until ctx ends.
func (s *kept) take(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err // or else it could have the turn all the same
	}
	select {
	case s.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *kept) give() { <-s.turn }

// change has f change a share, one at a time.
func (k *keeper) change(ctx context.Context, tag string, f func(*kept) error) error {
	s, err := k.find(tag)
	if err != nil {
		return err
	}
	if err := s.take(ctx); err != nil {
		return err
	}
	defer s.give()
	if !s.isReady() {
		return noShare(tag)
	}
	return f(s)
}

// AddShare implements control.Daemon.
func (k *keeper) AddShare(ctx context.Context, spec api.ShareSpec) (api.Share, error) {
	if spec.Socket == "" && k.control != "" {
		spec.Socket = configfile.DefaultSocket(k.control, spec.Tag)
	}
	if err := invalid(spec.Validate()); err != nil {
		return api.Share{}, err
	}
	if spec.Socket == "" {
		return api.Share{}, api.Errorf(api.CodeInvalid, "socket: it is missing: expected a path, for there is no control socket beside which one could be")
	}
	return await(ctx, func() (api.Share, error) {
		grafts, err := k.openGrafts(spec.Tag, spec.Grafts)
		if err != nil {
			return api.Share{}, err
		}
		return k.addShare(ctx, spec, grafts, func() (*listen.Listener, error) { return listen.Path(spec.Socket, spec.SocketGroup) })
	})
}

// invalid makes a *api.FieldError what a client is told.
func invalid(err error) error {
	var problem *api.FieldError
	if errors.As(err, &problem) {
		return problem.API()
	}
	return err
}

// addShare adds a share of these grafts, which it closes, with a socket that is made by open.
func (k *keeper) addShare(ctx context.Context, spec api.ShareSpec, grafts grafts, open func() (*listen.Listener, error)) (_ api.Share, err error) {
	defer grafts.close()
	if err := ctx.Err(); err != nil {
		return api.Share{}, err
	}
	s, err := k.reserve(spec)
	if err != nil {
		return api.Share{}, err
	}
	defer s.give()
	defer func() {
		if err != nil {
			err = errors.Join(err, k.undo(s))
		}
	}()
	if err := k.journal.add(s.socket); err != nil {
		return api.Share{}, err
	}
	if s.ln, err = open(); err != nil {
		return api.Share{}, socketError(err)
	}
	if err := k.build(s, grafts); err != nil {
		return api.Share{}, err
	}
	if err := k.open(s); err != nil {
		return api.Share{}, err
	}
	s.setReady(true)
	return s.show(shareStatus{State: api.StateWaiting}), nil
}

// socketError gives what is wrong with a socket its code, and says what to do.
func socketError(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &api.Error{Code: api.CodeInvalid, Message: fmt.Sprintf("socket: %v", err), Hint: "make its directory first"}
	case errors.Is(err, listen.ErrHeld):
		return api.Errorf(api.CodeExists, "socket: %v", err)
	}
	return api.Errorf(api.CodeInvalid, "socket: %v", err)
}

// reserve takes the tag and the socket for a share, before anything is made, and its turn.
func (k *keeper) reserve(spec api.ShareSpec) (*kept, error) {
	s := &kept{
		tag: spec.Tag, socket: spec.Socket, turn: make(chan struct{}, 1),
		spec: spec, grafts: make(map[string]api.GraftSpec), watches: make(map[string]*watching), hosted: make(map[string]*hostedGraft),
	}
	s.turn <- struct{}{}
	s.events = newEventLog(func(events []api.Event) error {
		return k.order(askAnnounce, announcement{Tag: s.tag, Events: events}, nil)
	}, k.log.With("share", s.tag))

	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ending {
		return nil, ended(link.ErrClosed)
	}
	if k.shares[s.tag] != nil {
		return nil, &api.Error{
			Code: api.CodeExists, Message: fmt.Sprintf("there is a share %q already", s.tag),
			Hint: "choose another tag, or remove it first",
		}
	}
	for tag, other := range k.shares {
		if s.socket != "" && other.socket == s.socket {
			return nil, api.Errorf(api.CodeExists, "socket: %s is that of share %q: expected another path", s.socket, tag)
		}
	}
	k.shares[s.tag] = s
	return s, nil
}

// build makes the share in the server, with its grafts.
func (k *keeper) build(s *kept, grafts grafts) error {
	// A graft comes after those around it.
	slices.SortFunc(grafts, func(a, b *openGraft) int { return strings.Compare(a.Spec.Path, b.Spec.Path) })
	order := shareOrder{Spec: s.spec}
	order.Spec.Grafts = nil
	var root *openGraft
	if len(grafts) > 0 && grafts[0].Spec.Path == "/" {
		root, grafts = grafts[0], grafts[1:]
		order.Root = &root.graftOrder
	}
	if err := k.order(askAddShare, order, nil, root.files()...); err != nil {
		return err
	}
	s.inside = true
	if root != nil {
		w, err := k.watch(s, &root.graftOrder)
		if err != nil {
			return fmt.Errorf("graft /: %w", err)
		}
		k.put(s, root, w)
	}
	for _, g := range grafts {
		if err := k.addGraft(s, g); err != nil {
			return fmt.Errorf("graft %s: %w", g.Spec.Path, err)
		}
	}
	return nil
}

// open has the server let front-ends come.
func (k *keeper) open(s *kept) error {
	socket, err := s.ln.File()
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := k.order(askOpenShare, s.tag, nil, socket); err != nil {
		return err
	}
	// Only the server may hold the socket, or nobody could be refused.
	release := s.ln.Refuse
	if s.ln.Connected() {
		release = s.ln.Close
	}
	if err := release(); err != nil {
		k.log.Warn("cannot close the socket", "share", s.tag, "error", err)
	}
	return nil
}

// undo gives up all that there is of s, which was not to be.
func (k *keeper) undo(s *kept) error {
	var err error
	if s.inside {
		err = k.order(askRemoveShare, shareRemoval{Tag: s.tag, Force: true}, nil)
		if errors.Is(err, link.ErrClosed) {
			err = nil // which is why
		}
	}
	return errors.Join(err, k.forget(s))
}

// forget gives up what s has outside the server.
func (k *keeper) forget(s *kept) error {
	s.mu.Lock()
	s.ready = false
	watches := slices.Collect(maps.Values(s.watches))
	clear(s.watches)
	clear(s.hosted)
	s.mu.Unlock()
	var failed []error
	for _, w := range watches {
		failed = append(failed, w.close())
	}
	s.events.close()
	if s.ln != nil {
		failed = append(failed, s.ln.Close())
	}
	failed = append(failed, k.journal.drop(s.socket))
	k.mu.Lock()
	delete(k.shares, s.tag)
	k.mu.Unlock()
	return errors.Join(failed...)
}

// addGraft makes a graft in the server, in which there is all of it or nothing.
func (k *keeper) addGraft(s *kept, g *openGraft) error {
	w, err := k.watch(s, &g.graftOrder)
	if err != nil {
		return err
	}
	if err := k.order(askAddGraft, g.graftOrder, nil, g.files()...); err != nil {
		return errors.Join(err, w.close())
	}
	k.put(s, g, w)
	return nil
}

// watch begins to watch what is to be grafted, if that is asked for; put has followers be told.
func (k *keeper) watch(s *kept, o *graftOrder) (*watching, error) {
	if !o.Spec.Watch {
		return nil, nil
	}
	if !o.Dir {
		return nil, api.Errorf(api.CodeInvalid, "watch: graft %s has no source on the host that could be watched", o.Spec.Path)
	}
	// Only where something is watched does the server have to think of sluice-agent.
	var token string
	if err := k.order(askReplay, s.tag, &token); err != nil {
		return nil, err
	}
	s.events.enable(token)
	w, err := watchGraft(o, s.events, k.log.With("share", s.tag))
	if err != nil {
		return nil, api.Errorf(api.CodeInvalid, "watch: %v", err)
	}
	return w, nil
}

// put notes a graft that the server has now, in the place of the one that there may have been.
func (k *keeper) put(s *kept, g *openGraft, w *watching) {
	path := g.Spec.Path
	s.mu.Lock()
	s.grafts[path] = g.Spec
	old := s.watches[path]
	delete(s.watches, path)
	if w != nil {
		s.watches[path] = w
	}
	delete(s.hosted, path)
	if g.outer != nil {
		g.outer.closeFiles()
		k.adopt(g.outer)
		s.hosted[path], g.outer = g.outer, nil
	}
	s.mu.Unlock()
	k.endWatch(s, path, old)
	w.start()
}

func (k *keeper) endWatch(s *kept, path string, w *watching) {
	if err := w.close(); err != nil {
		k.log.Warn("cannot end a watch", "share", s.tag, "graft", path, "error", err)
	}
}

// RemoveShare implements control.Daemon.
func (k *keeper) RemoveShare(ctx context.Context, tag string, force bool) error {
	_, err := await(ctx, func() (struct{}, error) {
		return struct{}{}, k.change(ctx, tag, func(s *kept) error {
			if err := k.order(askRemoveShare, shareRemoval{Tag: tag, Force: force}, nil); err != nil {
				return err
			}
			return k.forget(s)
		})
	})
	return err
}

// Grafts implements control.Daemon.
func (k *keeper) Grafts(ctx context.Context, tag string) ([]api.Graft, error) {
	s, err := k.find(tag)
	if err != nil {
		return nil, err
	}
	var grafts []api.Graft
	if err := k.ask(ctx, askGrafts, tag, &grafts); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range grafts {
		if spec, ok := s.grafts[grafts[i].Path]; ok && !grafts[i].Leaving {
			grafts[i].GraftSpec = spec
		}
	}
	return grafts, nil
}

// AddGraft implements control.Daemon.
func (k *keeper) AddGraft(ctx context.Context, tag string, spec api.GraftSpec, replace bool) (api.Graft, error) {
	if err := invalid(spec.Validate()); err != nil {
		return api.Graft{}, err
	}
	if _, err := k.find(tag); err != nil {
		return api.Graft{}, err
	}
	return await(ctx, func() (api.Graft, error) {
		g, err := k.openOne(tag, spec)
		if err != nil {
			return api.Graft{}, err
		}
		defer g.close()
		g.Replace = replace
		err = k.change(ctx, tag, func(s *kept) error { return k.addGraft(s, g) })
		if err != nil {
			return api.Graft{}, err
		}
		return api.Graft{GraftSpec: spec, File: g.Mount.Kind == bundle.File}, nil
	})
}

// ChangeGraft implements control.Daemon.
func (k *keeper) ChangeGraft(ctx context.Context, tag, path string, change api.GraftChange) (api.Graft, error) {
	if err := invalid(change.Validate()); err != nil {
		return api.Graft{}, err
	}
	changed, err := await(ctx, func() (changed graftChanged, err error) {
		err = k.change(ctx, tag, func(s *kept) error {
			if err := k.order(askChangeGraft, graftChange{graftName{tag, path}, change}, &changed); err != nil {
				return err
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			spec := s.grafts[path]
			applyChange(&spec, change)
			s.grafts[path] = spec
			return nil
		})
		return changed, err
	})
	if err != nil {
		return api.Graft{}, err
	}
	if changed.Unsettled {
		return api.Graft{}, &api.Error{
			Code: api.CodeBusy, Message: fmt.Sprintf("%s is read-only from now on, but a change by the guest that began before still goes on", path),
			Hint: "ask for it again to wait for that",
		}
	}
	grafts, err := k.Grafts(ctx, tag)
	if err != nil {
		return api.Graft{}, err
	}
	for _, g := range grafts {
		if g.Path == path && !g.Leaving {
			return g, nil
		}
	}
	return api.Graft{}, api.Errorf(api.CodeNotFound, "the graft at %s was changed, and has been removed since", path)
}

// applyChange makes spec say what it is after c.
func applyChange(spec *api.GraftSpec, c api.GraftChange) {
	set(&spec.ReadOnly, c.ReadOnly)
	set(&spec.Cache, c.Cache)
	set(&spec.NoSUID, c.NoSUID)
	set(&spec.NoDev, c.NoDev)
	set(&spec.NoExec, c.NoExec)
	set(&spec.NoSymfollow, c.NoSymfollow)
	set(&spec.MaxBytes, c.MaxBytes)
	set(&spec.MaxInodes, c.MaxInodes)
}

func set[T any](field, to *T) {
	if to != nil {
		*field = *to
	}
}

// RemoveGraft implements control.Daemon.
func (k *keeper) RemoveGraft(ctx context.Context, tag, path string) error {
	_, err := await(ctx, func() (struct{}, error) {
		return struct{}{}, k.change(ctx, tag, func(s *kept) error {
			if err := k.order(askRemoveGraft, graftName{tag, path}, nil); err != nil {
				return err
			}
			s.mu.Lock()
			delete(s.grafts, path)
			w := s.watches[path]
			delete(s.watches, path)
			delete(s.hosted, path)
			s.mu.Unlock()
			k.endWatch(s, path, w)
			return nil
		})
	})
	return err
}

// Events implements control.Daemon.
func (k *keeper) Events(ctx context.Context, tag string, since uint64, send func(api.Event) error) error {
	s, err := k.find(tag)
	if err != nil {
		return err
	}
	return s.events.follow(ctx, since, send)
}

// Stats implements control.Daemon.
func (k *keeper) Stats(ctx context.Context) (stats api.Stats, err error) {
	if err := k.ask(ctx, askStats, nil, &stats); err != nil {
		return stats, err
	}
	fds, threads, err := countProcess(k.server)
	if err != nil {
		k.log.Debug("the server's descriptors cannot be counted", "error", err)
	}
	stats.OpenFDs, stats.Threads = fds, max(threads, stats.Threads)
	for _, s := range k.all() {
		stats.Events = append(stats.Events, s.eventStats()...)
	}
	images, err := k.registry.ImageStats(ctx)
	if err != nil {
		k.log.Warn("what is fetched of images cannot be counted", "error", err)
	}
	stats.Images = imageStats(images)
	return stats, nil
}

// eventStats are the counters of what is watched, by path.
func (s *kept) eventStats() (stats []api.EventStats) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, path := range slices.Sorted(maps.Keys(s.watches)) {
		n := s.watches[path].watcher.Stats()
		stats = append(stats, api.EventStats{
			Tag: s.tag, Path: path, Watches: n.Watches, Sent: n.Sent, Rescans: n.Rescans, Limited: n.Limited, Overflows: n.Overflows,
		})
	}
	return stats
}

// close gives up all shares outside the server, which is gone, and lets nobody add more. It waits for those that are being
// changed until ctx ends.
func (k *keeper) close(ctx context.Context) error {
	k.mu.Lock()
	k.ending = true
	shares := slices.Collect(maps.Values(k.shares))
	k.mu.Unlock()
	failed := make([]error, len(shares))
	var all sync.WaitGroup
	for i, s := range shares {
		all.Go(func() {
			if err := s.take(ctx); err != nil {
				failed[i] = fmt.Errorf("share %q is left as it is: what it needs of the host hangs", s.tag)
				return
			}
			defer s.give()
			failed[i] = k.forget(s)
		})
	}
	all.Wait()
	failed = append(failed, k.awaitHosted(ctx))
	return errors.Join(errors.Join(failed...), k.journal.close())
}

// absolute is path from the root directory on; "" stays.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

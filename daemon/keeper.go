package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/link"
	"github.com/sluicefs/sluice/internal/listen"
)

// keeper is the process outside the sandbox. It does what takes the host: it opens what is to be grafted, creates sockets, watches
// files; and tells the server the rest. It implements control.Daemon.
type keeper struct {
	line     *link.Keeper
	log      *slog.Logger
	journal  journal
	sockets  string // directory of sockets that nobody has named; "" is none
	backends []string
	sandbox  config.Sandbox
	id       string
	server   int // its process id
	started  time.Time

	mu     sync.Mutex
	shares map[string]*kept
}

// kept is a share, or one about to be.
type kept struct {
	mu      sync.Mutex // orders changes
	spec    api.ShareSpec
	socket  string // what the journal has of it
	ln      *listen.Listener
	grafts  map[string]api.GraftSpec // by path, as they are
	events  *eventLog
	watches map[string]*watching // by graft
	gone    bool
}

// Info implements control.Daemon.
func (k *keeper) Info(context.Context) (api.Info, error) {
	states, err := k.states()
	if err != nil {
		return api.Info{}, err
	}
	info := api.Info{
		ID: k.id, Version: buildVersion(), State: "READY", PID: os.Getpid(), Started: k.started, Sandbox: k.sandbox.String(),
		Shares: len(states), Backends: k.backends,
	}
	for _, s := range states {
		if s.State != api.StateWaiting {
			info.State = "RUNNING"
		}
	}
	return info, nil
}

func (k *keeper) states() (map[string]shareStatus, error) {
	var states []shareStatus
	if err := k.line.Call(askShares, nil, &states); err != nil {
		return nil, err
	}
	m := make(map[string]shareStatus)
	for _, s := range states {
		m[s.Tag] = s
	}
	return m, nil
}

// Shares implements control.Daemon.
func (k *keeper) Shares(context.Context) ([]api.Share, error) {
	states, err := k.states()
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	tags := slices.Sorted(maps.Keys(k.shares))
	k.mu.Unlock()
	shares := []api.Share{}
	for _, tag := range tags {
		state, ok := states[tag]
		if !ok {
			continue // about to be, or to be no more
		}
		if s, err := k.find(tag); err == nil {
			shares = append(shares, s.show(state))
		}
	}
	return shares, nil
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

func (k *keeper) find(tag string) (*kept, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.shares[tag]
	if s == nil {
		return nil, noShare(tag)
	}
	return s, nil
}

func noShare(tag string) error {
	return &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("there is no share %q", tag), Hint: "sluicectl share ls lists them"}
}

// change has f change a share, one at a time.
func (k *keeper) change(ctx context.Context, tag string, f func(*kept) error) error {
	s, err := k.find(tag)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return noShare(tag)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return f(s)
}

// AddShare implements control.Daemon.
func (k *keeper) AddShare(ctx context.Context, spec api.ShareSpec) (api.Share, error) {
	var problem *api.FieldError
	if err := spec.Validate(); errors.As(err, &problem) {
		return api.Share{}, problem.API()
	}
	if spec.Socket == "" {
		if k.sockets == "" {
			return api.Share{}, api.Errorf(api.CodeInvalid, "socket: expected a path: there is no control socket beside which one could be")
		}
		spec.Socket = k.socketOf(spec.Tag)
	}
	grafts, err := openGrafts(spec.Tag, spec.Grafts)
	if err != nil {
		return api.Share{}, err
	}
	return k.addShare(ctx, spec, grafts, func() (*listen.Listener, error) { return listen.Path(spec.Socket, spec.SocketGroup) })
}

// socketOf is the path of a socket that nobody has named.
func (k *keeper) socketOf(tag string) string {
	return filepath.Join(k.sockets, url.PathEscape(tag)+".sock")
}

// addShare adds a share of these grafts, which it closes, with a socket that is made by open.
func (k *keeper) addShare(ctx context.Context, spec api.ShareSpec, grafts grafts, open func() (*listen.Listener, error)) (_ api.Share, err error) {
	defer grafts.close()
	s := &kept{spec: spec, socket: spec.Socket, grafts: make(map[string]api.GraftSpec), watches: make(map[string]*watching)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := k.reserve(s); err != nil {
		return api.Share{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.forget(s))
		}
	}()
	if err := ctx.Err(); err != nil {
		return api.Share{}, err
	}
	if s.ln, err = open(); err != nil {
		return api.Share{}, api.Errorf(api.CodeInvalid, "socket: %v", err)
	}
	if err := k.tellShare(s, grafts); err != nil {
		return api.Share{}, err
	}
	socket, err := s.ln.File()
	if err != nil {
		return api.Share{}, err
	}
	defer socket.Close()
	if err := k.line.Call(askOpenShare, spec.Tag, nil, socket); err != nil {
		return api.Share{}, errors.Join(err, k.line.Call(askRemoveShare, shareRemoval{Tag: spec.Tag, Force: true}, nil))
	}
	// Only the server may hold the socket, or nobody could be refused.
	release := s.ln.Refuse
	if s.ln.Connected() {
		release = s.ln.Close
	}
	if err := release(); err != nil {
		k.log.Warn("cannot close the socket", "share", spec.Tag, "error", err)
	}
	return api.Share{ShareSpec: spec, State: api.StateWaiting}, nil
}

// reserve takes the tag and the socket for s, before anything is made.
func (k *keeper) reserve(s *kept) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.shares[s.spec.Tag] != nil {
		return &api.Error{
			Code: api.CodeExists, Message: fmt.Sprintf("there is a share %q already", s.spec.Tag),
			Hint: "choose another tag, or remove it first",
		}
	}
	for tag, other := range k.shares {
		if s.socket != "" && other.socket == s.socket {
			return api.Errorf(api.CodeExists, "socket: %s is that of share %q: expected another path", s.socket, tag)
		}
	}
	k.shares[s.spec.Tag] = s
	if err := k.noteLocked(); err != nil {
		delete(k.shares, s.spec.Tag)
		return err
	}
	return nil
}

func (k *keeper) noteLocked() error {
	var sockets []string
	for _, s := range k.shares {
		if s.socket != "" {
			sockets = append(sockets, s.socket)
		}
	}
	slices.Sort(sockets)
	return k.journal.write(sockets)
}

// forget gives up what s has outside the server. Its mu is held.
func (k *keeper) forget(s *kept) error {
	s.gone = true
	var failed []error
	for _, w := range s.watches {
		failed = append(failed, w.close())
	}
	clear(s.watches)
	if s.events != nil {
		s.events.close()
	}
	if s.ln != nil {
		failed = append(failed, s.ln.Close())
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.shares, s.spec.Tag)
	return errors.Join(append(failed, k.noteLocked())...)
}

// tellShare makes the share in the server, with its grafts but not open yet. After an error the server has nothing of it.
func (k *keeper) tellShare(s *kept, grafts grafts) (err error) {
	order := shareOrder{Spec: s.spec}
	order.Spec.Grafts = nil
	var files []*os.File
	// A graft comes after those around it.
	slices.SortFunc(grafts, func(a, b *openGraft) int { return strings.Compare(a.Spec.Path, b.Spec.Path) })
	others := grafts
	if len(grafts) > 0 && grafts[0].Spec.Path == "/" {
		order.Root, files, others = &grafts[0].graftOrder, grafts[0].files(), grafts[1:]
	}
	if err := k.line.Call(askAddShare, order, nil, files...); err != nil {
		return err
	}
	tag := s.spec.Tag
	defer func() {
		if err != nil {
			err = errors.Join(err, k.line.Call(askRemoveShare, shareRemoval{Tag: tag, Force: true}, nil))
		}
	}()
	s.events = newEventLog(func(events []api.Event) error {
		return k.line.Call(askAnnounce, announcement{Tag: tag, Events: events}, nil)
	}, k.log.With("share", tag))
	if order.Root != nil {
		s.grafts["/"] = order.Root.Spec
		if err := k.watch(s, order.Root); err != nil {
			return err
		}
	}
	for _, g := range others {
		if _, err := k.tellGraft(s, g, false); err != nil {
			return fmt.Errorf("graft %s: %w", g.Spec.Path, err)
		}
	}
	return nil
}

// tellGraft makes a graft in the server. The mu of s is held.
func (k *keeper) tellGraft(s *kept, g *openGraft, replace bool) (made api.Graft, err error) {
	g.Replace = replace
	if err := k.line.Call(askAddGraft, g.graftOrder, &made, g.files()...); err != nil {
		return made, err
	}
	path := g.Spec.Path
	k.unwatch(s, path)
	if err := k.watch(s, &g.graftOrder); err != nil {
		delete(s.grafts, path)
		return made, errors.Join(err, k.line.Call(askRemoveGraft, graftName{s.spec.Tag, path}, nil))
	}
	s.grafts[path] = g.Spec
	return made, nil
}

// watch starts to watch the graft that was ordered, if it is to be.
func (k *keeper) watch(s *kept, o *graftOrder) error {
	if !o.Spec.Watch {
		return nil
	}
	if !o.Dir {
		return api.Errorf(api.CodeInvalid, "watch: graft %s has no source on the host that could be watched", o.Spec.Path)
	}
	// Only where something is watched does the server have to think of sluice-agent.
	var token string
	if err := k.line.Call(askReplay, s.spec.Tag, &token); err != nil {
		return err
	}
	s.events.enable(token)
	w, err := watchGraft(o, s.events, k.log.With("share", s.spec.Tag))
	if err != nil {
		return api.Errorf(api.CodeInvalid, "watch: %v", err)
	}
	s.watches[o.Spec.Path] = w
	return nil
}

func (k *keeper) unwatch(s *kept, path string) {
	w := s.watches[path]
	if w == nil {
		return
	}
	delete(s.watches, path)
	if err := w.close(); err != nil {
		k.log.Warn("cannot end a watch", "share", s.spec.Tag, "graft", path, "error", err)
	}
}

// RemoveShare implements control.Daemon.
func (k *keeper) RemoveShare(ctx context.Context, tag string, force bool) error {
	return k.change(ctx, tag, func(s *kept) error {
		if err := k.line.Call(askRemoveShare, shareRemoval{Tag: tag, Force: force}, nil); err != nil {
			return err
		}
		return k.forget(s)
	})
}

// Grafts implements control.Daemon.
func (k *keeper) Grafts(_ context.Context, tag string) (grafts []api.Graft, err error) {
	err = k.line.Call(askGrafts, tag, &grafts)
	return grafts, err
}

// AddGraft implements control.Daemon.
func (k *keeper) AddGraft(ctx context.Context, tag string, spec api.GraftSpec, replace bool) (made api.Graft, err error) {
	var problem *api.FieldError
	if err := spec.Validate(); errors.As(err, &problem) {
		return made, problem.API()
	}
	g, err := openOne(tag, spec)
	if err != nil {
		return made, err
	}
	defer g.close()
	err = k.change(ctx, tag, func(s *kept) error {
		_, there := s.grafts[spec.Path]
		made, err = k.tellGraft(s, g, replace && there)
		return err
	})
	return made, err
}

// ChangeGraft implements control.Daemon.
func (k *keeper) ChangeGraft(ctx context.Context, tag, path string, change api.GraftChange) (made api.Graft, err error) {
	var problem *api.FieldError
	if err := change.Validate(); errors.As(err, &problem) {
		return made, problem.API()
	}
	err = k.change(ctx, tag, func(s *kept) error {
		if err := k.line.Call(askChangeGraft, graftChange{graftName{tag, path}, change}, &made); err != nil {
			return err
		}
		spec := s.grafts[path]
		applyChange(&spec, change)
		s.grafts[path] = spec
		return nil
	})
	return made, err
}

// RemoveGraft implements control.Daemon.
func (k *keeper) RemoveGraft(ctx context.Context, tag, path string) error {
	return k.change(ctx, tag, func(s *kept) error {
		if err := k.line.Call(askRemoveGraft, graftName{tag, path}, nil); err != nil {
			return err
		}
		delete(s.grafts, path)
		k.unwatch(s, path)
		return nil
	})
}

// Events implements control.Daemon.
func (k *keeper) Events(ctx context.Context, tag string, since uint64, send func(api.Event) error) error {
	s, err := k.find(tag)
	if err != nil {
		return err
	}
	s.mu.Lock()
	events := s.events
	s.mu.Unlock()
	if events == nil {
		return noShare(tag)
	}
	return events.follow(ctx, since, send)
}

// Stats implements control.Daemon.
func (k *keeper) Stats(context.Context) (stats api.Stats, err error) {
	if err := k.line.Call(askStats, nil, &stats); err != nil {
		return stats, err
	}
	fds, threads, err := countProcess(k.server)
	if err != nil {
		k.log.Debug("the server's descriptors cannot be counted", "error", err)
	}
	stats.OpenFDs, stats.Threads = fds, max(threads, stats.Threads)
	k.mu.Lock()
	shares := slices.Collect(maps.Values(k.shares))
	k.mu.Unlock()
	for _, s := range shares {
		s.mu.Lock()
		for path, w := range s.watches {
			n := w.watcher.Stats()
			stats.Events = append(stats.Events, api.EventStats{
				Tag: s.spec.Tag, Path: path, Watches: n.Watches, Sent: n.Sent, Rescans: n.Rescans, Limited: n.Limited, Overflows: n.Overflows,
			})
		}
		s.mu.Unlock()
	}
	slices.SortFunc(stats.Events, func(a, b api.EventStats) int {
		return strings.Compare(a.Tag+"\x00"+a.Path, b.Tag+"\x00"+b.Path)
	})
	return stats, nil
}

// close gives up all shares outside the server, which is gone.
func (k *keeper) close() error {
	k.mu.Lock()
	shares := slices.Collect(maps.Values(k.shares))
	k.mu.Unlock()
	var failed []error
	for _, s := range shares {
		s.mu.Lock()
		failed = append(failed, k.forget(s))
		s.mu.Unlock()
	}
	return errors.Join(append(failed, k.journal.remove())...)
}

package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/internal/bundle"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/link"
	"github.com/sluicefs/sluice/internal/listen"
	"github.com/sluicefs/sluice/internal/sandbox"
	"github.com/sluicefs/sluice/seccomp"
	"github.com/sluicefs/sluice/share"
)

// inside is the server of shares that change: the confined process, which does what the keeper asks.
type inside struct {
	program  *program
	cfg      config.Config
	registry extensions.Registry // of those that may serve
	procFD   int
	marks    *seccomp.Marks
	// noFileHandles says that the filter, which is there before the first backend, has no file handles.
	noFileHandles bool
	log           *slog.Logger
	ctx           context.Context // of all sessions

	mu     sync.Mutex
	shares map[string]*served
}

// served is one share.
type served struct {
	mu   sync.Mutex // orders changes of it
	spec api.ShareSpec
	// specs are what was asked for, by path.
	specs map[string]api.GraftSpec
	tree  *share.Share
	srv   server
	log   *slog.Logger

	stop context.CancelFunc
	done chan struct{} // closed when no session runs and none will; nil before the share is open

	reading sync.RWMutex // held, to read, while srv and tree are asked for counts, and to close them
	closed  bool
}

// workManaged is what the serving process does for a keeper: enter the sandbox and confine itself before there is anything to
// serve, then serve what the keeper asks for.
func (p *program) workManaged(ctx context.Context, w *worker) (err error) {
	cfg, log := w.cfg, w.log
	if cfg.SeccompReport != "" {
		report := w.handed[handedLinkReport]
		defer func() { err = errors.Join(err, seccomp.WriteReport(report), report.Close()) }()
	}
	// Each share's budget is its own affair.
	if err := setLimits(&cfg, log); err != nil {
		return err
	}
	registry, err := p.allowed(cfg)
	if err != nil {
		return err
	}
	spec := w.what.bundle.Spec
	needs, err := registry.Needs(spec)
	if err != nil {
		return err
	}
	caps, err := keptCapabilities(cfg, w.what, needs)
	if err != nil {
		return err
	}
	if err := registry.Prepare(extensions.PrepareContext{Spec: spec, BundleDir: w.what.bundle.Dir, Log: log}); err != nil {
		return err
	}
	// What is served comes by descriptors, wherever it is.
	if _, err := w.box.Enter(sandbox.View{Files: needs.Files, Network: needs.Network}); err != nil {
		return err
	}
	unix.Umask(0)
	in := &inside{
		program: p, cfg: cfg, registry: registry, procFD: w.box.ProcSelfFD(), marks: &seccomp.Marks{}, log: log,
		shares: make(map[string]*served),
	}
	line := w.handed[handedLink]
	if caps, err = w.confine(registry, caps, anything(registry), in.marks); err != nil {
		return err
	}
	in.noFileHandles = !caps.Has(capFileHandles)
	sessions, cancel := context.WithCancel(ctx)
	defer cancel()
	in.ctx = sessions
	asked := make(chan error, 1)
	go func() { asked <- link.Serve(line, in.handle) }()
	select {
	case err = <-asked: // the keeper ends
	case sig := <-w.signals:
		log.Info("ending", "signal", signalName(sig))
	case <-w.box.Orphaned():
		log.Info("ending: the process that started this one is gone")
	}
	cancel()
	ended := make(chan error, 1)
	go func() { ended <- in.close() }()
	select {
	case e := <-ended:
		return errors.Join(err, e)
	case sig := <-w.signals:
		return fmt.Errorf("ended by a second signal (%s) before requests in progress were done", signalName(sig))
	case <-time.After(p.stopTimeout):
		return fmt.Errorf("requests in progress were not done %s after the end was asked for", p.stopTimeout)
	}
}

// allowed is the registry of those who may serve what is added at run time.
func (p *program) allowed(cfg config.Config) (extensions.Registry, error) {
	if len(cfg.AllowExtensions) == 0 {
		return p.registry, nil
	}
	only, err := p.registry.Only(cfg.AllowExtensions...)
	if err != nil {
		return only, usageError{fmt.Errorf("--allow-extension: %w", err)}
	}
	return only, nil
}

// anything is a tree that may be anything: what a filter has to be made for before it is known.
func anything(registry extensions.Registry) *tree {
	return &tree{host: true, writes: true, claimed: registry.All()}
}

// handle answers one question of the keeper's.
func (in *inside) handle(method string, body json.RawMessage, files []*os.File) (any, error) {
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	switch method {
	case askHello:
		return struct{}{}, nil
	case askAddShare:
		return with(body, func(o shareOrder) (any, error) { return in.addShare(o, files) })
	case askAddGraft:
		return with(body, func(o graftOrder) (any, error) {
			return in.change(o.Tag, func(s *served) (any, error) { return in.addGraft(s, o, files) })
		})
	case askChangeGraft:
		return with(body, func(c graftChange) (any, error) {
			return in.change(c.Tag, func(s *served) (any, error) { return s.changeGraft(c) })
		})
	case askRemoveGraft:
		return with(body, func(n graftName) (any, error) {
			return in.change(n.Tag, func(s *served) (any, error) { return nil, s.removeGraft(n.Path) })
		})
	case askOpenShare:
		return with(body, func(tag string) (any, error) {
			return in.change(tag, func(s *served) (any, error) { return nil, in.open(s, files) })
		})
	case askRemoveShare:
		return with(body, func(r shareRemoval) (any, error) { return nil, in.removeShare(r) })
	case askShares:
		return in.states(), nil
	case askGrafts:
		return with(body, func(tag string) (any, error) {
			return in.change(tag, func(s *served) (any, error) { return s.grafts(), nil })
		})
	case askReplay:
		return with(body, func(tag string) (any, error) {
			return in.change(tag, func(s *served) (any, error) { return s.tree.EnableReplay(), nil })
		})
	case askAnnounce:
		return with(body, func(a announcement) (any, error) { return nil, in.announce(a) })
	case askStats:
		return in.stats(), nil
	}
	return nil, fmt.Errorf("question %q is not known", method)
}

// with decodes a question's body for answer.
func with[T any](body json.RawMessage, answer func(T) (any, error)) (any, error) {
	var v T
	if err := json.Unmarshal(body, &v); err != nil {
		return nil, err
	}
	return answer(v)
}

func (in *inside) find(tag string) (*served, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	s := in.shares[tag]
	if s == nil {
		return nil, api.Errorf(api.CodeNotFound, "there is no share %q", tag)
	}
	return s, nil
}

// change has f change a share, one at a time.
func (in *inside) change(tag string, f func(*served) (any, error)) (any, error) {
	s, err := in.find(tag)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return f(s)
}

func (in *inside) addShare(o shareOrder, files []*os.File) (any, error) {
	spec := o.Spec
	cfg, err := shareConfig(in.cfg, spec)
	if err != nil {
		return nil, err
	}
	s := &served{spec: spec, specs: make(map[string]api.GraftSpec), log: in.log.With("share", spec.Tag)}
	c := share.Config{Dynamic: true, Log: s.log}
	if o.Root != nil {
		g, err := in.graft(s, *o.Root, files)
		if err != nil {
			return nil, err
		}
		c.Grafts = []share.Graft{g}
		s.specs["/"] = o.Root.Spec
	}
	if s.tree, err = share.New(c); err != nil {
		for _, g := range c.Grafts {
			err = errors.Join(err, g.Backend.Close())
		}
		return nil, err
	}
	if s.srv, err = in.program.newServer(cfg, &tree{backend: s.tree}, s.log); err != nil {
		return nil, errors.Join(err, s.tree.Close())
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.shares[spec.Tag] != nil {
		return nil, errors.Join(api.Errorf(api.CodeExists, "there is a share %q already", spec.Tag), s.srv.Close())
	}
	in.shares[spec.Tag] = s
	return nil, nil
}

// shareConfig is what a run with spec as its only share would have.
func shareConfig(cfg config.Config, spec api.ShareSpec) (config.Config, error) {
	cfg.Share = config.Share{
		Tag: spec.Tag, Writeback: spec.Writeback, ReadOnly: spec.ReadOnly, Xattr: spec.Xattr, AllowMmap: spec.AllowMmap,
		AllowDirectIO: spec.AllowDirectIO, PosixLock: spec.PosixLock, Flock: spec.Flock, NoReaddirplus: spec.NoReaddirplus,
		MaxFDs: spec.MaxFDs, MaxInodes: spec.MaxInodes,
	}
	if spec.RequestQueues > 0 {
		cfg.RequestQueues = spec.RequestQueues
	}
	cfg.Persist = true
	if spec.Cache != "" {
		if err := cfg.Share.Cache.Set(spec.Cache); err != nil {
			return cfg, api.Errorf(api.CodeInvalid, "cache: %v", err)
		}
	}
	return cfg, nil
}

// graftFDs is the default of MaxFDs of a graft, of which there may be thousands.
const graftFDs = 1024

// graft opens the backend of a graft for s.
func (in *inside) graft(s *served, o graftOrder, files []*os.File) (share.Graft, error) {
	var at place
	if o.Dir {
		if len(files) != 1 {
			return share.Graft{}, fmt.Errorf("%d descriptors for a graft: expected one", len(files))
		}
		at.fd = int(files[0].Fd())
	}
	cfg, err := shareConfig(in.cfg, s.spec)
	if err != nil {
		return share.Graft{}, err
	}
	if cfg.Share.MaxFDs == 0 {
		cfg.Share.MaxFDs = graftFDs
	}
	opener := opener{
		registry: in.registry, what: &source{bundle: &bundle.Bundle{Spec: o.OCI}}, share: cfg.Share, procFD: in.procFD,
		marks: in.marks, noFileHandles: in.noFileHandles, log: s.log,
	}
	g, err := opener.open(&o.Mount, at)
	if err != nil {
		return g, &api.Error{Code: api.CodeInvalid, Message: err.Error()}
	}
	spec := o.Spec
	// Not by who answers the guest: sluice-agent has to be answered where nothing may be changed.
	g.ReadOnly = g.ReadOnly || s.spec.ReadOnly
	g.NoSUID, g.NoDev, g.NoExec, g.NoSymfollow = spec.NoSUID, spec.NoDev, spec.NoExec, spec.NoSymfollow
	g.MaxBytes, g.MaxInodes = spec.MaxBytes, spec.MaxInodes
	g.Cache, err = graftCache(spec.Cache)
	return g, err
}

// graftCache is a graft's policy; "" is the share's.
func graftCache(name string) (*fsbackend.CachePolicy, error) {
	if name == "" {
		return nil, nil
	}
	var policy config.CachePolicy
	if err := policy.Set(name); err != nil {
		return nil, api.Errorf(api.CodeInvalid, "cache: %v", err)
	}
	p := cachePolicies[policy]
	return &p, nil
}

func (in *inside) addGraft(s *served, o graftOrder, files []*os.File) (any, error) {
	g, err := in.graft(s, o, files)
	if err != nil {
		return nil, err
	}
	if o.Replace {
		err = s.tree.Replace(g)
	} else {
		err = s.tree.Add(g)
	}
	if err != nil {
		return nil, errors.Join(graftError(err), g.Backend.Close())
	}
	s.specs[o.Spec.Path] = o.Spec
	return s.find(o.Spec.Path)
}

// graftError gives an error of the tree its code.
func graftError(err error) error {
	code := api.CodeInvalid
	switch {
	case errors.Is(err, share.ErrNotFound):
		code = api.CodeNotFound
	case errors.Is(err, share.ErrExists):
		code = api.CodeExists
	case errors.Is(err, share.ErrBusy):
		code = api.CodeBusy
	}
	return &api.Error{Code: code, Message: err.Error()}
}

func (s *served) changeGraft(c graftChange) (any, error) {
	change := share.Change{
		ReadOnly: c.Change.ReadOnly, NoSUID: c.Change.NoSUID, NoDev: c.Change.NoDev, NoExec: c.Change.NoExec,
		NoSymfollow: c.Change.NoSymfollow, MaxBytes: c.Change.MaxBytes, MaxInodes: c.Change.MaxInodes,
	}
	if s.spec.ReadOnly && c.Change.ReadOnly != nil && !*c.Change.ReadOnly {
		return nil, &api.Error{
			Code: api.CodeInvalid, Message: fmt.Sprintf("share %q is read-only, and every graft with it", s.spec.Tag),
			Hint: "add the share without read_only, and make grafts read-only one by one",
		}
	}
	if c.Change.Cache != nil {
		policy, err := graftCache(*c.Change.Cache)
		if err != nil {
			return nil, err
		}
		change.Cache = &policy
	}
	if err := s.tree.Change(c.Path, change); err != nil {
		return nil, graftError(err)
	}
	spec := s.specs[c.Path]
	applyChange(&spec, c.Change)
	s.specs[c.Path] = spec
	return s.find(c.Path)
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

func (s *served) removeGraft(path string) error {
	if err := s.tree.Remove(path); err != nil {
		return graftError(err)
	}
	delete(s.specs, path)
	return nil
}

// open lets front-ends come, by the listening or connected socket in files.
func (in *inside) open(s *served, files []*os.File) error {
	if len(files) != 1 || s.done != nil {
		return errors.New("open a share: expected one socket, once")
	}
	fd, err := unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("take over the socket: %w", err)
	}
	ln, err := listen.FD(fd)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(in.ctx)
	s.stop, s.done = cancel, make(chan struct{})
	go func() {
		defer close(s.done)
		defer cancel()
		cfg := in.cfg
		cfg.Persist = !ln.Connected()
		if err := errors.Join(sessions(ctx, cfg, ln, s.srv, s.log), ln.Close()); err != nil {
			s.log.Error("the share no longer serves anybody", "error", err)
		}
	}()
	return nil
}

// end waits for the sessions to end, and closes the share.
func (s *served) end() error {
	if s.done != nil {
		s.stop()
		<-s.done
	}
	s.reading.Lock()
	defer s.reading.Unlock()
	s.closed = true
	return s.srv.Close()
}

func (in *inside) removeShare(r shareRemoval) error {
	s, err := in.find(r.Tag)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.srv.Stats().Connected && !r.Force {
		return &api.Error{
			Code: api.CodeBusy, Message: fmt.Sprintf("share %q has a guest", r.Tag),
			Hint: "unmount it and remove the device from the VM first, or force it",
		}
	}
	in.mu.Lock()
	delete(in.shares, r.Tag)
	in.mu.Unlock()
	return s.end()
}

// close ends all shares.
func (in *inside) close() error {
	in.mu.Lock()
	shares := in.shares
	in.shares = make(map[string]*served)
	in.mu.Unlock()
	var failed []error
	for _, s := range shares {
		s.mu.Lock()
		failed = append(failed, s.end())
		s.mu.Unlock()
	}
	return errors.Join(failed...)
}

// each calls f with every share that is not being closed, by tag.
func (in *inside) each(f func(tag string, s *served)) {
	in.mu.Lock()
	shares := maps.Clone(in.shares)
	in.mu.Unlock()
	for _, tag := range slices.Sorted(maps.Keys(shares)) {
		s := shares[tag]
		s.reading.RLock()
		if !s.closed {
			f(tag, s)
		}
		s.reading.RUnlock()
	}
}

func (in *inside) states() []shareStatus {
	states := []shareStatus{}
	in.each(func(tag string, s *served) {
		counts := s.srv.Stats()
		states = append(states, shareStatus{Tag: tag, State: shareState(counts), Guests: counts.FrontEnds})
	})
	return states
}

func (in *inside) stats() api.Stats {
	stats := processStats()
	in.each(func(tag string, s *served) { stats.Shares = append(stats.Shares, shareStats(tag, s.srv.Stats())) })
	return stats
}

// grafts are what is grafted, the root first, and then what leaves.
func (s *served) grafts() []api.Graft {
	all := []api.Graft{}
	for _, g := range s.tree.Grafts() {
		a := api.Graft{
			GraftSpec: api.GraftSpec{Path: g.Path}, File: g.File != "", Leaving: g.Leaving, OpenFiles: g.OpenFiles,
			UsedBytes: g.UsedBytes, UsedInodes: g.UsedInodes,
			Panics: g.Stats.Panics.Load(), Timeouts: g.Stats.Timeouts.Load(), Refused: g.Stats.Refused.Load(), Errors: g.Stats.Errors.Load(),
		}
		if spec, ok := s.specs[g.Path]; ok && !g.Leaving {
			a.GraftSpec = spec
		}
		all = append(all, a)
	}
	return all
}

// find is the graft at path.
func (s *served) find(path string) (api.Graft, error) {
	for _, g := range s.grafts() {
		if g.Path == path && !g.Leaving {
			return g, nil
		}
	}
	return api.Graft{}, api.Errorf(api.CodeNotFound, "there is no graft at %s", path)
}

func (in *inside) announce(a announcement) error {
	s, err := in.find(a.Tag)
	if err != nil {
		return err
	}
	for _, e := range a.Events {
		s.tree.Announce(share.ReplayEvent{ID: e.ID, Kind: share.ReplayKind(e.Kind), Path: e.Path, To: e.To, Dir: e.Dir})
	}
	return nil
}

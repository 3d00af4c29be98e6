package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"runtime/debug"
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
	hosted map[uint64]*hostedInside
}

// served is one share.
type served struct {
	spec api.ShareSpec
	tree *share.Share
	srv  server
	log  *slog.Logger

	turn sync.Mutex         // held by who changes it, which may take as long as its backends do
	over bool               // it has been removed
	stop context.CancelFunc // ends the sessions; nil before the share is open
	done chan struct{}      // closed when no session runs and none will

	reading sync.RWMutex // held, to read, while srv and tree are asked for counts; nothing else that takes time
	closed  bool         // they may not be any more
}

// maxThreads replaces Go's limit of 10,000, at which it ends the process: shares beyond a thousand have as many, asleep, and slow
// disks may need more.
const maxThreads = 1 << 17

// workManaged is what the serving process does for a keeper: enter the sandbox and confine itself before there is anything to
// serve, then serve what the keeper asks for.
func (p *program) workManaged(ctx context.Context, w *worker, m *managed) (err error) {
	cfg, log := w.cfg, w.log
	out := handedOutputs(cfg, w.handed[handedLinkOutput:])
	defer func() { err = errors.Join(err, out.end()) }()
	if err := out.begin(); err != nil {
		return err
	}
	if err := setLimits(&cfg, log); err != nil {
		return err
	}
	registry, err := p.allowed(cfg)
	if err != nil {
		return err
	}
	spec := m.spec()
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
	debug.SetMaxThreads(maxThreads)
	in := &inside{
		program: p, cfg: cfg, registry: registry, procFD: w.box.ProcSelfFD(), marks: &seccomp.Marks{}, log: log,
		shares: make(map[string]*served), hosted: make(map[uint64]*hostedInside),
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
	return errors.Join(err, p.awaitEnd(ended, w.signals, "the end was asked for"))
}

// allowed is the registry of those who may serve what is added at run time.
func (p *program) allowed(cfg config.Config) (extensions.Registry, error) {
	if cfg.AllowExtensions == nil {
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
	switch method {
	case askAddShare:
		return with(body, func(o shareOrder) (any, error) { return nil, in.addShare(o, files) })
	case askAddGraft:
		return with(body, func(o graftOrder) (any, error) { return nil, in.addGraft(o, files) })
	case askTell:
		return with(body, func(o tellOrder) (any, error) { return in.tell(o, files) })
	}
	defer closeFiles(files)
	switch method {
	case askHello:
		return struct{}{}, nil
	case askChangeGraft:
		return with(body, in.changeGraft)
	case askRemoveGraft:
		return with(body, func(n graftName) (any, error) { return nil, in.removeGraft(n) })
	case askOpenShare:
		return with(body, func(tag string) (any, error) { return nil, in.open(tag, files) })
	case askRemoveShare:
		return with(body, func(r shareRemoval) (any, error) { return nil, in.removeShare(r) })
	case askShares:
		return in.states(), nil
	case askGrafts:
		return with(body, in.grafts)
	case askReplay:
		return with(body, in.replay)
	case askAnnounce:
		return with(body, func(a announcement) (any, error) { return nil, in.announce(a) })
	case askStats:
		return in.stats(), nil
	case askGone:
		return with(body, in.awaitGone)
	}
	return nil, fmt.Errorf("question %q is not known", method)
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
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
		return nil, noShare(tag)
	}
	return s, nil
}

// change has f change a share, one at a time.
func (in *inside) change(tag string, f func(*served) error) error {
	s, err := in.find(tag)
	if err != nil {
		return err
	}
	s.turn.Lock()
	defer s.turn.Unlock()
	if s.over {
		return noShare(tag)
	}
	return f(s)
}

// read has f look at a share, whatever changes.
func (in *inside) read(tag string, f func(*served)) error {
	s, err := in.find(tag)
	if err == nil && !s.read(f) {
		err = noShare(tag)
	}
	return err
}

// read calls f unless s is being closed.
func (s *served) read(f func(*served)) bool {
	s.reading.RLock()
	defer s.reading.RUnlock()
	if s.closed {
		return false
	}
	f(s)
	return true
}

// addShare takes files over.
func (in *inside) addShare(o shareOrder, files []*os.File) error {
	spec := o.Spec
	cfg, err := shareConfig(in.cfg, spec)
	if err != nil {
		closeFiles(files)
		return err
	}
	s := &served{spec: spec, log: in.log.With("share", spec.Tag)}
	c := share.Config{Dynamic: true, Log: s.log}
	if o.Root != nil {
		g, err := in.graft(s, *o.Root, files)
		if err != nil {
			return err
		}
		c.Grafts = []share.Graft{g}
	}
	if s.tree, err = share.New(c); err != nil {
		for _, g := range c.Grafts {
			err = errors.Join(err, g.Close())
		}
		return err
	}
	if s.srv, err = in.program.newServer(cfg, &tree{backend: s.tree}, s.log); err != nil {
		return errors.Join(err, s.tree.Close())
	}
	if err := in.put(s); err != nil {
		return errors.Join(err, s.srv.Close())
	}
	return nil
}

func (in *inside) put(s *served) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.shares[s.spec.Tag] != nil {
		return api.Errorf(api.CodeExists, "there is a share %q already", s.spec.Tag)
	}
	in.shares[s.spec.Tag] = s
	return nil
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
	if spec.PollUS != "" {
		if err := cfg.Share.PollWindow.Set(spec.PollUS); err != nil {
			return cfg, api.Errorf(api.CodeInvalid, "poll_us: %v", err)
		}
	}
	return cfg, nil
}

// graftFDs is the default of MaxFDs of a graft, of which there may be thousands.
const graftFDs = 1024

// openPatience is how long the backend of a graft may take to open. It then goes on in vain.
const openPatience = 10 * time.Second

// graft opens the backend of a graft for s. It takes files over.
func (in *inside) graft(s *served, o graftOrder, files []*os.File) (share.Graft, error) {
	type result struct {
		g   share.Graft
		err error
	}
	patience := openPatience
	if o.Hosted != nil {
		patience = outsidePatience // a registry may be slow to answer
	}
	c := make(chan result, 1)
	go func() {
		g, err := in.openGraft(s, &o, files)
		c <- result{g, err}
	}()
	select {
	case r := <-c:
		return r.g, r.err
	case <-time.After(patience):
	}
	go func() {
		if r := <-c; r.err == nil {
			_ = r.g.Close()
		}
	}()
	return share.Graft{}, &api.Error{
		Code: api.CodeUnavailable, Message: fmt.Sprintf("%s was not open after %s", o.Spec.Path, patience),
		Hint: "look whether its source, or the extension for it, hangs",
	}
}

func (in *inside) openGraft(s *served, o *graftOrder, files []*os.File) (share.Graft, error) {
	var at place
	defer func() { closeFiles(files) }()
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
	cache, err := graftCache(o.Spec.Cache)
	if err != nil {
		return share.Graft{}, err
	}
	opener := opener{
		registry: in.registry, what: &source{bundle: &bundle.Bundle{Spec: o.OCI}}, share: cfg.Share, procFD: in.procFD,
		marks: in.marks, noFileHandles: in.noFileHandles, log: s.log,
	}
	var g share.Graft
	if o.Hosted != nil {
		g = opener.graft(&o.Mount)
		err = in.openHosted(&opener, &g, o.Hosted, files)
		files = nil
	} else {
		g, err = opener.open(&o.Mount, at)
	}
	if err != nil {
		return g, &api.Error{Code: api.CodeInvalid, Message: err.Error()}
	}
	// Not by who answers the guest: sluice-agent has to be answered where nothing may be changed.
	g.ReadOnly = g.ReadOnly || s.spec.ReadOnly
	g.NoSUID, g.NoDev, g.NoExec, g.NoSymfollow = o.Spec.NoSUID, o.Spec.NoDev, o.Spec.NoExec, o.Spec.NoSymfollow
	g.MaxBytes, g.MaxInodes, g.Cache = o.Spec.MaxBytes, o.Spec.MaxInodes, cache
	return g, nil
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

// addGraft takes files over. The backend is opened before others have to wait.
func (in *inside) addGraft(o graftOrder, files []*os.File) error {
	s, err := in.find(o.Tag)
	if err != nil {
		closeFiles(files)
		return err
	}
	g, err := in.graft(s, o, files)
	if err != nil {
		return err
	}
	err = in.change(o.Tag, func(s *served) error {
		if o.Replace {
			return s.tree.Replace(g)
		}
		return s.tree.Add(g)
	})
	if errors.Is(err, share.ErrHung) {
		return graftError(err) // and it may not be closed
	}
	if err != nil {
		return errors.Join(graftError(err), g.Close())
	}
	return nil
}

// graftError gives an error of the tree its code.
func graftError(err error) error {
	for is, code := range map[error]string{
		share.ErrNotFound: api.CodeNotFound, share.ErrExists: api.CodeExists, share.ErrBusy: api.CodeBusy, share.ErrHung: api.CodeUnavailable,
	} {
		if errors.Is(err, is) {
			return &api.Error{Code: code, Message: err.Error()}
		}
	}
	if errors.As(err, new(*api.Error)) {
		return err
	}
	return &api.Error{Code: api.CodeInvalid, Message: err.Error()}
}

func (in *inside) changeGraft(c graftChange) (any, error) {
	change := share.Change{
		ReadOnly: c.Change.ReadOnly, NoSUID: c.Change.NoSUID, NoDev: c.Change.NoDev, NoExec: c.Change.NoExec,
		NoSymfollow: c.Change.NoSymfollow, MaxBytes: c.Change.MaxBytes, MaxInodes: c.Change.MaxInodes,
	}
	if c.Change.Cache != nil {
		policy, err := graftCache(*c.Change.Cache)
		if err != nil {
			return nil, err
		}
		change.Cache = &policy
	}
	err := in.change(c.Tag, func(s *served) error {
		if s.spec.ReadOnly && change.ReadOnly != nil && !*change.ReadOnly {
			return &api.Error{
				Code: api.CodeInvalid, Message: fmt.Sprintf("share %q is read-only, and every graft with it", s.spec.Tag),
				Hint: "add the share without read_only, and make grafts read-only one by one",
			}
		}
		return s.tree.Change(c.Path, change)
	})
	if errors.Is(err, share.ErrUnsettled) {
		return graftChanged{Unsettled: true}, nil
	}
	if err != nil {
		return nil, graftError(err)
	}
	return graftChanged{}, nil
}

func (in *inside) removeGraft(n graftName) error {
	err := in.change(n.Tag, func(s *served) error { return s.tree.Remove(n.Path) })
	if err != nil {
		return graftError(err)
	}
	return nil
}

// open lets front-ends come, by the listening or connected socket in files.
func (in *inside) open(tag string, files []*os.File) error {
	return in.change(tag, func(s *served) error {
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
		var ctx context.Context
		ctx, s.stop = context.WithCancel(in.ctx)
		s.done = make(chan struct{})
		go s.serve(ctx, in.cfg, ln)
		return nil
	})
}

// serve serves whoever comes, until ctx is done.
func (s *served) serve(ctx context.Context, cfg config.Config, ln *listen.Listener) {
	defer close(s.done)
	cfg.Persist = !ln.Connected()
	if err := errors.Join(sessions(ctx, cfg, ln, s.srv, s.log), ln.Close()); err != nil {
		s.log.Error("the share no longer serves anybody", "error", err)
	}
}

// end ends the sessions and closes the share, which takes as long as requests in progress do. s.turn is held.
func (s *served) end() error {
	s.over = true
	if s.done != nil {
		s.stop()
		<-s.done
	}
	s.reading.Lock() // who reads is done at once
	s.closed = true
	s.reading.Unlock()
	return s.srv.Close()
}

func (in *inside) removeShare(r shareRemoval) error {
	return in.change(r.Tag, func(s *served) error {
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
	})
}

// close ends all shares.
func (in *inside) close() error {
	in.mu.Lock()
	shares := slices.Collect(maps.Values(in.shares))
	in.mu.Unlock()
	failed := make([]error, len(shares))
	var all sync.WaitGroup
	for i, s := range shares {
		all.Go(func() {
			s.turn.Lock()
			defer s.turn.Unlock()
			if !s.over {
				failed[i] = s.end()
			}
		})
	}
	all.Wait()
	return errors.Join(failed...)
}

// each calls f with every share that is not being closed, by tag.
func (in *inside) each(f func(tag string, s *served)) {
	in.mu.Lock()
	shares := maps.Clone(in.shares)
	in.mu.Unlock()
	for _, tag := range slices.Sorted(maps.Keys(shares)) {
		shares[tag].read(func(s *served) { f(tag, s) })
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

// grafts are what is grafted in a share, the root first, and then what leaves.
func (in *inside) grafts(tag string) (any, error) {
	all := []api.Graft{}
	err := in.read(tag, func(s *served) {
		for _, g := range s.tree.Grafts() {
			all = append(all, api.Graft{
				GraftSpec: api.GraftSpec{Path: g.Path}, File: g.File != "", Leaving: g.Leaving, OpenFiles: g.OpenFiles,
				UsedBytes: g.UsedBytes, UsedInodes: g.UsedInodes,
				Panics: g.Stats.Panics.Load(), Timeouts: g.Stats.Timeouts.Load(), Refused: g.Stats.Refused.Load(), Errors: g.Stats.Errors.Load(),
			})
		}
	})
	return all, err
}

// replay lets sluice-agent come, who has to know the token.
func (in *inside) replay(tag string) (any, error) {
	var token string
	err := in.read(tag, func(s *served) { token = s.tree.EnableReplay() })
	return token, err
}

func (in *inside) announce(a announcement) error {
	return in.read(a.Tag, func(s *served) {
		for _, e := range a.Events {
			s.tree.Announce(share.ReplayEvent{ID: e.ID, Kind: share.ReplayKind(e.Kind), Path: e.Path, To: e.To, Dir: e.Dir})
		}
	})
}

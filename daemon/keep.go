package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control"
	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/configfile"
	"github.com/sluicefs/sluice/internal/link"
	"github.com/sluicefs/sluice/internal/listen"
	"github.com/sluicefs/sluice/internal/sandbox"
)

// Where shares can change while the daemon runs, there are two processes whatever the sandbox. The keeper, which was started, stays
// outside and takes orders (keeper.go); the server, inside, serves (inside.go).

// Descriptors handed to a server by its keeper, in this order.
const (
	handedLink       = iota
	handedLinkReport // the file of --seccomp-report, if there is one
)

// keepCaps are what the keeper does with privileges, if it has them: it opens directories, copies what is mounted there, creates
// sockets for others, and counts the server's descriptors.
const keepCaps = sandbox.CapSet(1)<<unix.CAP_SYS_ADMIN | sandbox.CapSet(1)<<unix.CAP_DAC_READ_SEARCH |
	sandbox.CapSet(1)<<unix.CAP_DAC_OVERRIDE | sandbox.CapSet(1)<<unix.CAP_CHOWN | sandbox.CapSet(1)<<unix.CAP_FOWNER |
	sandbox.CapSet(1)<<unix.CAP_SYS_PTRACE

// modes are the options' words in sandbox's own.
var modes = map[config.Sandbox]sandbox.Mode{
	config.SandboxNamespace: sandbox.Namespace,
	config.SandboxChroot:    sandbox.Chroot,
	config.SandboxNone:      sandbox.None,
}

// keep is the keeper's life: it starts the server, has it serve what there is at the start, and takes orders until a signal or
// the server's end.
func (p *program) keep(
	ctx context.Context, cfg config.Config, what *source, file *configfile.File, log *slog.Logger, signals <-chan os.Signal,
) error {
	m, err := newManaged(cfg, what, file)
	if err != nil {
		return err
	}
	for _, note := range m.notes {
		log.Warn(note)
	}
	k := &keeper{log: log, sandbox: cfg.Sandbox, started: time.Now(), shares: make(map[string]*kept), id: rand.Text()}
	if cfg.ControlSocket != "" {
		k.sockets = filepath.Dir(cfg.ControlSocket)
		k.journal = journal(cfg.ControlSocket + ".shares")
	}
	s, err := p.startServer(cfg, m, k)
	if err != nil {
		return err
	}
	api, err := p.begin(ctx, cfg, m, k)
	if err == nil {
		err = p.takeOrders(ctx, api, s, log, signals)
	}
	_ = k.line.Close() // upon which the server ends, if it has not
	ended := s.wait(signals)
	if errors.Is(err, link.ErrClosed) && s.status != exitOK {
		err = nil // it has said why itself
	}
	err = errors.Join(err, ended, k.close())
	if err == nil && s.status != exitOK {
		return statusError{s.status}
	}
	return err
}

// takeOrders runs the control API until a signal, the server's end, or what breaks the API.
func (p *program) takeOrders(ctx context.Context, api *control.Server, s *serverProcess, log *slog.Logger, signals <-chan os.Signal) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	taken := make(chan error, 1)
	go func() { taken <- api.Serve(ctx) }()
	select {
	case err := <-taken:
		return errors.Join(err, api.Close())
	case <-s.ended:
	case <-ctx.Done():
	case sig := <-signals:
		log.Info("ending", "signal", signalName(sig))
	}
	cancel()
	return errors.Join(<-taken, api.Close())
}

// serverProcess is the server, seen from its keeper.
type serverProcess struct {
	forward chan os.Signal
	ended   chan struct{}
	// Once it has ended.
	status int
	err    error
}

// wait returns when the server has ended. A signal meanwhile is for it: requests in progress may take too long.
func (s *serverProcess) wait(signals <-chan os.Signal) error {
	for {
		select {
		case sig := <-signals:
			s.forward <- sig
		case <-s.ended:
			return s.err
		}
	}
}

// startServer starts the serving process and waits until it is confined.
func (p *program) startServer(cfg config.Config, m *managed, k *keeper) (*serverProcess, error) {
	registry, err := p.allowed(cfg)
	if err != nil {
		return nil, err
	}
	k.backends = append([]string{extensions.Passthrough, extensions.Mem}, registry.Names()...)
	needs, err := registry.Needs(m.what().bundle.Spec)
	if err != nil {
		return nil, err
	}
	uids, gids, err := idMaps(cfg)
	if err != nil {
		return nil, usageError{err}
	}
	mine, theirs, err := link.Pair()
	if err != nil {
		return nil, err
	}
	files := []*os.File{handedLink: theirs}
	if cfg.SeccompReport != "" {
		report, err := createReport(cfg)
		if err != nil {
			return nil, errors.Join(err, mine.Close(), theirs.Close())
		}
		files = append(files, report)
	}
	child, err := sandbox.Start(sandbox.Launch{
		Mode: modes[cfg.Sandbox], Network: needs.Network, UIDMap: uids, GIDMap: gids, Args: os.Args, Keep: keepCaps, Files: files,
	})
	if err != nil {
		return nil, errors.Join(err, mine.Close())
	}
	s := &serverProcess{forward: make(chan os.Signal, 2), ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		s.status, s.err = child.Wait(s.forward)
	}()
	k.server = child.PID()
	k.line, err = link.NewKeeper(mine)
	return s, err
}

// begin has the server serve what there is at the start, and opens the control API, when everything is ready.
func (p *program) begin(ctx context.Context, cfg config.Config, m *managed, k *keeper) (*control.Server, error) {
	err := k.line.Call(askHello, nil, nil)
	if err != nil {
		return nil, err
	}
	// First of all: of two daemons on one control socket the second fails, before it has touched what is the first one's.
	m.control.Daemon, m.control.Log = k, k.log
	api, err := control.New(m.control)
	if err != nil {
		return nil, err
	}
	if err := k.serveAll(ctx, cfg, m); err != nil {
		return nil, errors.Join(err, api.Close())
	}
	k.log.Info("Waiting for vhost-user socket connection...")
	tell(p.dialNotify(k.log), k.log)
	return api, nil
}

// serveAll adds the shares of the start.
func (k *keeper) serveAll(ctx context.Context, cfg config.Config, m *managed) error {
	if err := k.journal.clean(k.log); err != nil {
		return err
	}
	for _, spec := range m.shares {
		if _, err := k.AddShare(ctx, spec); err != nil {
			return fmt.Errorf("share %q: %w", spec.Tag, err)
		}
	}
	if m.single == nil {
		return nil
	}
	return k.addSingle(ctx, cfg, m.single)
}

// addSingle adds the share of --shared-dir, --bundle or --spec.
func (k *keeper) addSingle(ctx context.Context, cfg config.Config, what *source) error {
	share := cfg.Share
	spec := api.ShareSpec{
		Tag: share.Tag, Socket: cfg.SocketPath, SocketGroup: cfg.SocketGroup, Cache: share.Cache.String(), ReadOnly: share.ReadOnly,
		Writeback: share.Writeback, Xattr: share.Xattr, AllowMmap: share.AllowMmap, AllowDirectIO: share.AllowDirectIO,
		PosixLock: share.PosixLock, Flock: share.Flock, NoReaddirplus: share.NoReaddirplus,
		RequestQueues: cfg.RequestQueues, MaxFDs: share.MaxFDs, MaxInodes: share.MaxInodes,
	}
	if cfg.FD == config.NoFD && spec.Socket == "" {
		spec.Socket = k.socketOf(spec.Tag)
	}
	grafts, err := openPlan(share.Tag, what)
	if err != nil {
		return err
	}
	cfg.SocketPath = spec.Socket
	_, err = k.addShare(ctx, spec, grafts, func() (*listen.Listener, error) { return openListener(cfg) })
	return err
}

package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control"
	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/configfile"
	"github.com/sluicefs/sluice/internal/link"
	"github.com/sluicefs/sluice/internal/listen"
	confined "github.com/sluicefs/sluice/internal/program"
	"github.com/sluicefs/sluice/internal/sandbox"
)

// Where shares can change while the daemon runs, there are two processes whatever the sandbox. The keeper, which was started, stays
// outside and takes orders (keeper.go); the server, inside, serves (inside.go).

// Descriptors handed to a server by its keeper, in this order.
const (
	handedLink       = iota
	handedLinkOutput // the first of the outputs that there are
)

// keepCaps are what the keeper does with privileges, if it has them: it opens directories, copies what is mounted there, creates
// sockets for others, and counts the server's descriptors.
const keepCaps = sandbox.CapSet(1)<<unix.CAP_SYS_ADMIN | sandbox.CapSet(1)<<unix.CAP_DAC_READ_SEARCH |
	sandbox.CapSet(1)<<unix.CAP_DAC_OVERRIDE | sandbox.CapSet(1)<<unix.CAP_CHOWN | sandbox.CapSet(1)<<unix.CAP_FOWNER |
	sandbox.CapSet(1)<<unix.CAP_SYS_PTRACE

// hostedCaps are what halves of extensions outside the sandbox need beyond: they copy files of any kind and owner, and start programs
// as other users, in namespaces and with large socket buffers.
const hostedCaps = sandbox.CapSet(confined.KeeperCaps) | sandbox.CapSet(1)<<unix.CAP_MKNOD | sandbox.CapSet(1)<<unix.CAP_FSETID |
	sandbox.CapSet(1)<<unix.CAP_SETFCAP

// modes are the options' words in sandbox's own.
var modes = map[config.Sandbox]sandbox.Mode{
	config.SandboxNamespace: sandbox.Namespace,
	config.SandboxChroot:    sandbox.Chroot,
	config.SandboxNone:      sandbox.None,
}

// keep is the keeper's life: it starts the server, has it serve what there is at the start, and takes orders until a signal or
// the server's end.
func (p *program) keep(ctx context.Context, cfg config.Config, m *managed, log *slog.Logger, signals <-chan os.Signal) (err error) {
	warnUnconfined(cfg, log)
	notes := m.notes
	if m.single != nil {
		notes = append(notes[:len(notes):len(notes)], m.single.plan.Notes...)
	}
	for _, note := range notes {
		log.Warn(note)
	}
	k := &keeper{log: log, sandbox: cfg.Sandbox, started: time.Now(), shares: make(map[string]*kept), id: rand.Text()}
	if k.control, err = absolute(cfg.ControlSocket); err != nil {
		return err
	}
	if k.stateDir, err = absolute(stateDir(cfg.StateDir, p.getenv)); err != nil {
		return err
	}
	k.plugins = cfg.Plugins
	s, err := p.startServer(cfg, m, k)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	o := p.takeOrders(ctx, cfg, m, k)
	select {
	case err = <-o.failed:
	case <-s.ended:
	case <-ctx.Done():
	case sig := <-signals:
		log.Info("ending", "signal", signalName(sig))
	}
	_ = k.line.Close() // upon which the server ends, if it has not
	gone := s.wait(signals)
	if errors.Is(err, link.ErrClosed) && (gone != nil || s.status != exitOK) {
		err = nil // it has said why itself
	}
	err = errors.Join(err, gone, p.tidy(k, o, cancel, signals))
	if err == nil && s.status != exitOK {
		return statusError{s.status}
	}
	return err
}

// tidy ends what the keeper has, as far as it can: what hangs, and a signal, end it. The control socket comes last, for who has that
// may take the other sockets for his own.
func (p *program) tidy(k *keeper, o *orders, cancel context.CancelFunc, signals <-chan os.Signal) error {
	ctx, stop := context.WithTimeout(context.Background(), p.stopTimeout)
	defer stop()
	tidied := make(chan error, 1)
	go func() {
		err := k.close(ctx)
		cancel()
		tidied <- errors.Join(err, <-o.ended)
	}()
	select {
	case err := <-tidied:
		return err
	case sig := <-signals:
		return fmt.Errorf("ended by a second signal (%s): sockets may be left", signalName(sig))
	case <-time.After(2 * p.stopTimeout):
		return fmt.Errorf("what the host's files are needed for hangs, %s after the end was asked for: sockets may be left", 2*p.stopTimeout)
	}
}

// orders are orders being taken.
type orders struct {
	failed chan error // told what broke the start or the API
	ended  chan error // told once everything is over
}

// takeOrders has the server serve what there is at the start, and runs the control API until ctx is done.
func (p *program) takeOrders(ctx context.Context, cfg config.Config, m *managed, k *keeper) *orders {
	o := &orders{failed: make(chan error, 1), ended: make(chan error, 1)}
	go func() {
		if err := k.ask(ctx, askHello, nil, nil); err != nil {
			o.failed <- err
			o.ended <- nil
			return
		}
		// First of all: of two daemons on one control socket the second fails, before it has touched what is the first one's.
		m.control.Daemon, m.control.Log = k, k.log
		api, err := control.New(m.control)
		if err != nil {
			o.failed <- err
			o.ended <- nil
			return
		}
		if err := k.serveAll(ctx, cfg, m); err != nil {
			o.failed <- err
			<-ctx.Done()
			o.ended <- api.Close()
			return
		}
		k.log.Info("Waiting for vhost-user socket connection...")
		tell(p.dialNotify(k.log), k.log)
		err = api.Serve(ctx)
		if ctx.Err() == nil {
			o.failed <- err
			err = nil
		}
		o.ended <- errors.Join(err, api.Close())
	}()
	return o
}

// serverProcess is the server, seen from its keeper.
type serverProcess struct {
	child *sandbox.Child
	ended chan struct{}
	// Once it has ended.
	status int
	err    error
}

// wait returns when the server has ended, which has been asked to. A signal meanwhile ends it at once: requests in progress may
// take too long. It is not passed on, for the server could take it for the first.
func (s *serverProcess) wait(signals <-chan os.Signal) error {
	select {
	case <-s.ended:
		return s.err
	case sig := <-signals:
		_ = s.child.Signal(unix.SIGKILL) // unless it has just ended
		<-s.ended
		return fmt.Errorf("ended by a second signal (%s) before requests in progress were done", signalName(sig))
	}
}

// startServer starts the serving process and waits until it is confined.
func (p *program) startServer(cfg config.Config, m *managed, k *keeper) (*serverProcess, error) {
	registry, err := p.allowed(cfg)
	if err != nil {
		return nil, err
	}
	k.registry = registry
	k.backends = append([]string{extensions.Passthrough, extensions.Mem}, registry.Names()...)
	needs, err := registry.Needs(m.spec())
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
	out, err := createOutputs(cfg)
	if err != nil {
		return nil, errors.Join(err, mine.Close(), theirs.Close())
	}
	files := append([]*os.File{handedLink: theirs}, out.files()...)
	if k.line, err = link.NewKeeper(mine); err != nil {
		return nil, errors.Join(err, theirs.Close())
	}
	caps := keepCaps
	if slices.ContainsFunc(registry.All(), func(e extensions.Extension) bool { _, ok := e.(extensions.Hosted); return ok }) {
		caps |= hostedCaps
	}
	child, err := sandbox.Start(sandbox.Launch{
		Mode: modes[cfg.Sandbox], Network: needs.Network, UIDMap: uids, GIDMap: gids, Args: os.Args, Keep: caps, Files: files,
	})
	if err != nil {
		return nil, errors.Join(err, k.line.Close())
	}
	s := &serverProcess{child: child, ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		s.status, s.err = child.Wait(nil)
	}()
	k.server = child.PID()
	return s, nil
}

// serveAll adds the shares of the start.
func (k *keeper) serveAll(ctx context.Context, cfg config.Config, m *managed) error {
	if k.control != "" {
		if err := k.journal.open(journalOf(k.control), k.log); err != nil {
			return err
		}
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

// stateDir is where the daemon keeps what outlives it; "" says that there is no place for that.
func stateDir(given string, getenv func(string) string) string {
	if given != "" || os.Geteuid() == 0 {
		return cmp.Or(given, "/var/lib/sluice")
	}
	if dir := getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "sluice")
	}
	if home := getenv("HOME"); filepath.IsAbs(home) {
		return filepath.Join(home, ".local/state/sluice")
	}
	return ""
}

// addSingle adds the share of --shared-dir, --bundle or --spec.
func (k *keeper) addSingle(ctx context.Context, cfg config.Config, what *source) error {
	share := cfg.Share
	spec := api.ShareSpec{
		Tag: share.Tag, Socket: cfg.SocketPath, SocketGroup: cfg.SocketGroup, Cache: share.Cache.String(), ReadOnly: share.ReadOnly,
		Writeback: share.Writeback, Xattr: share.Xattr, AllowMmap: share.AllowMmap, AllowDirectIO: share.AllowDirectIO,
		PosixLock: share.PosixLock, Flock: share.Flock, NoReaddirplus: share.NoReaddirplus,
		RequestQueues: cfg.RequestQueues, MaxFDs: share.MaxFDs, MaxInodes: share.MaxInodes, PollUS: share.PollWindow.String(),
	}
	var err error
	if spec.Socket, err = absolute(cfg.SocketPath); err != nil {
		return err
	}
	if spec.Socket == "" && cfg.FD == config.NoFD {
		spec.Socket = configfile.DefaultSocket(k.control, spec.Tag)
		cfg.SocketPath = spec.Socket
	}
	if err := invalid(spec.Validate()); err != nil {
		return err
	}
	grafts, err := k.openPlan(share.Tag, what)
	if err != nil {
		return err
	}
	_, err = k.addShare(ctx, spec, grafts, func() (*listen.Listener, error) { return openListener(cfg) })
	return err
}

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/bundle"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/listen"
	"github.com/sluicefs/sluice/internal/sandbox"
	"github.com/sluicefs/sluice/seccomp"
)

// Exit statuses, as the manual page promises them.
const (
	exitOK    = 0 // the front-end left in good order, or a signal asked for the end
	exitError = 1 // the start failed, the front-end broke the protocol, or the end took too long
	exitUsage = 2 // the command line cannot be run
)

// stopTimeout is how long requests in progress may hold up the end that a signal asked for.
const stopTimeout = 5 * time.Second

// stdio are the standard streams of the process that it uses.
type stdio struct{ out, err io.Writer }

// program is one run: its surroundings, which tests replace, and nothing that changes.
type program struct {
	stdio
	registry    extensions.Registry
	getenv      func(string) string
	newServer   func(config.Config, *tree, *slog.Logger) (server, error)
	stopTimeout time.Duration
}

// run runs sluiced with args, without the program's name, and returns the exit status.
func run(ctx context.Context, args []string, std stdio, exts []extensions.Extension) int {
	p := program{stdio: std, getenv: os.Getenv, newServer: newServer, stopTimeout: stopTimeout}
	var err error
	if p.registry, err = extensions.NewRegistry(exts...); err != nil {
		return p.exit(err)
	}
	return p.run(ctx, args)
}

func (p *program) run(ctx context.Context, args []string) int {
	if wantsCapabilities(args) {
		return p.exit(printCapabilities(p.out))
	}
	cfg := config.Default()
	groups, err := p.registry.FlagSets()
	if err == nil {
		err = checkNames(groups)
	}
	if err != nil {
		return p.exit(err)
	}
	cmd := newCommand(&cfg, groups, func(flags *pflag.FlagSet) error { return p.serve(ctx, cfg, flags) })
	cmd.SetArgs(args)
	cmd.SetOut(p.out)
	cmd.SetErr(p.err)
	return p.exit(cmd.ExecuteContext(ctx))
}

// exit says what went wrong, in one line, and returns the status for it. That line is for the launcher and thus goes to
// standard error whatever --log-level and --syslog say.
func (p *program) exit(err error) int {
	if err == nil {
		return exitOK
	}
	var served statusError
	if errors.As(err, &served) {
		return served.status
	}
	var usage usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(p.err, "sluiced: %v (see sluiced --help)\n", err)
		return exitUsage
	}
	fmt.Fprintf(p.err, "sluiced: %v\n", err)
	return exitError
}

// serve is the daemon's life, from the parsed command line to the end.
func (p *program) serve(ctx context.Context, cfg config.Config, flags *pflag.FlagSet) (err error) {
	if cfg.ListExtensions {
		return p.listExtensions()
	}
	file, err := p.loadFile(&cfg, flags)
	if err != nil {
		return err
	}
	for _, check := range []func(config.Config) error{config.Config.Validate, checkConfinement} {
		if err := check(cfg); err != nil {
			return usageError{err}
		}
	}
	if err := checkShareOptions(cfg, flags); err != nil {
		return usageError{err}
	}
	if cfg.CheckFile {
		if err := p.checkGrafts(file); err != nil {
			return err
		}
		_, err := fmt.Fprintf(p.out, "%s: no errors\n", cfg.File)
		return err
	}
	if cfg.Seccomp == config.SeccompDump {
		what, err := loadSource(&cfg, flags)
		if err != nil {
			return err
		}
		return p.dumpFilter(cfg, what)
	}
	limitMemory(p.getenv)
	what, err := loadSource(&cfg, flags)
	if err != nil {
		return err
	}
	p.nameBackends(what)
	if name := p.inHalves(what); name != "" && !cfg.Managed() {
		if cfg.Keeper = true; cfg.Share.Tag == "" {
			return usageError{fmt.Errorf("--tag is needed: with backend %s, shares are known by their tags", name)}
		}
	}
	box, handed, err := enterBox(cfg)
	if err != nil {
		return err
	}
	if handed == nil && (!cfg.Managed() || cfg.Keeper) && cfg.SocketPath == "" && cfg.FD == config.NoFD {
		fd, ok, err := listen.FromSystemd(p.getenv)
		if err != nil {
			return err
		}
		if !ok {
			return usageError{errors.New("--socket-path or --fd is needed: where the front-end connects to")}
		}
		cfg.FD = fd
	}
	if cfg.Seccomp != config.SeccompNone {
		if err := seccomp.Supported(); err != nil {
			return err
		}
	}

	log, closeLog, err := newLogger(cfg, p.err)
	if err != nil {
		return err
	}
	defer closeLog()
	if cfg.Syslog {
		defer func() {
			if err != nil && !errors.As(err, new(statusError)) {
				log.Error(err.Error())
			}
		}()
	}

	// From here on a signal ends the run in order, so that nothing is left behind.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(signals)
	signal.Ignore(unix.SIGPIPE) // a launcher that closed our standard error is no reason to die

	w := &worker{cfg: cfg, what: what, box: box, handed: handed, log: log, signals: signals}
	if !cfg.Managed() {
		if box == nil {
			return p.launch(cfg, what, log, signals)
		}
		return p.work(ctx, w)
	}
	m, err := newManaged(cfg, what, file)
	switch {
	case err != nil:
		return err
	case box == nil:
		return p.keep(ctx, cfg, m, log, signals)
	default:
		return p.workManaged(ctx, w, m)
	}
}

// nameBackends has mounts whose type is the name of an extension in two halves, overlay say, be served by it.
func (p *program) nameBackends(what *source) {
	for i := range what.plan.Mounts {
		m := &what.plan.Mounts[i]
		if m.Backend != "" || m.Kind != bundle.Other || m.Spec == nil {
			continue
		}
		if _, ok := p.registry.Hosted(m.Spec.Type); ok {
			m.Backend = m.Spec.Type
		}
	}
}

// inHalves names an extension in two halves that what is served needs, "" for none.
func (p *program) inHalves(what *source) string {
	for _, m := range what.mounts() {
		if _, ok := p.registry.Hosted(m.Backend); ok {
			return m.Backend
		}
	}
	return ""
}

// listExtensions prints the extensions' names in the order they are asked in, those that come with the daemon last.
func (p *program) listExtensions() error {
	for _, name := range append(p.registry.Names(), extensions.Mem, extensions.Passthrough) {
		if _, err := fmt.Fprintln(p.out, name); err != nil {
			return err
		}
	}
	return nil
}

// worker is what the process that serves is made of.
type worker struct {
	cfg     config.Config
	what    *source
	box     *sandbox.Box
	handed  []*os.File // by the launching process, if there is one
	log     *slog.Logger
	signals <-chan os.Signal
}

// work is what the serving process does: prepare, enter the sandbox, open the tree, give up what is not needed, serve.
func (p *program) work(ctx context.Context, w *worker) (err error) {
	cfg, log := w.cfg, w.log
	out, err := w.outputs()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.end()) }()
	if err := out.begin(); err != nil {
		return err
	}
	if err := setLimits(&cfg, log); err != nil {
		return err
	}
	warnUnconfined(cfg, log)
	for _, note := range w.what.plan.Notes {
		log.Warn(note)
	}
	spec := w.what.bundle.Spec
	needs, err := p.registry.Needs(spec)
	if err != nil {
		return err
	}
	caps, err := keptCapabilities(cfg, w.what, needs)
	if err != nil {
		return err
	}
	if err := p.registry.Prepare(extensions.PrepareContext{Spec: spec, BundleDir: w.what.bundle.Dir, Log: log}); err != nil {
		return err
	}
	ln, err := w.listener(cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ln.Close()) }()
	if cfg.Persist && ln.Connected() {
		return errors.New("--persist needs a listening socket, and the one passed is connected")
	}

	var manager *listen.Notifier
	if w.handed == nil {
		manager = p.dialNotify(log) // its socket is soon out of reach
	}

	places, err := w.enter(needs)
	if err != nil {
		return err
	}
	opener := opener{registry: p.registry, what: w.what, share: cfg.Share, procFD: w.box.ProcSelfFD(), marks: &seccomp.Marks{}, log: log}
	tree, err := opener.openTree(places)
	for _, p := range places {
		p.close()
	}
	if err != nil {
		return err
	}
	srv, err := p.newServer(cfg, tree, log)
	if err != nil {
		return errors.Join(err, tree.backend.Close())
	}
	// What is created from now on is created for the guest, with the mode that it asks for.
	unix.Umask(0)
	if _, err := w.confine(p.registry, caps, tree, opener.marks); err != nil {
		return errors.Join(err, srv.Close())
	}

	log.Info("Waiting for vhost-user socket connection...")
	if err := w.tellReady(manager); err != nil {
		return errors.Join(err, srv.Close())
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		err := sessions(ctx, cfg, ln, srv, log)
		done <- errors.Join(err, srv.Close())
	}()
	select {
	case err := <-done:
		return err
	case sig := <-w.signals:
		log.Info("ending", "signal", signalName(sig))
	case <-w.box.Orphaned():
		log.Info("ending: the process that started this one is gone")
	}
	cancel()
	return p.awaitEnd(done, w.signals, "the signal")
}

// awaitEnd waits until requests in progress are done, which done tells: not beyond a second signal, and not for long after what has
// asked for the end.
func (p *program) awaitEnd(done <-chan error, signals <-chan os.Signal, asked string) error {
	select {
	case err := <-done:
		return err
	case sig := <-signals:
		return fmt.Errorf("ended by a second signal (%s) before requests in progress were done", signalName(sig))
	case <-time.After(p.stopTimeout):
		return fmt.Errorf("requests in progress were not done %s after %s", p.stopTimeout, asked)
	}
}

func warnUnconfined(cfg config.Config, log *slog.Logger) {
	if os.Geteuid() == 0 && cfg.Sandbox == config.SandboxNone {
		log.Warn("running as root without a sandbox: only sluiced's own checks keep the guest inside the directory")
	}
}

// sessions serves front-ends one after the other: one, or with --persist until ctx is done. It returns what ended it,
// nil if that was in order.
func sessions(ctx context.Context, cfg config.Config, ln *listen.Listener, srv server, log *slog.Logger) error {
	for {
		conn, err := ln.Accept(ctx)
		if ctx.Err() != nil {
			if conn != nil {
				_ = conn.Close()
			}
			return nil
		}
		if err != nil && cfg.Persist && passing(err) {
			log.Error("a front-end cannot be accepted now", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		}
		if err != nil {
			return err
		}
		if !cfg.Persist {
			// A second front-end is refused; left in the queue it would hang for ever.
			if err := ln.Refuse(); err != nil {
				log.Warn("cannot stop listening", "error", err)
			}
		}
		log.Info("Client connected, servicing requests")
		err = srv.Serve(ctx, conn)
		_ = conn.Close()
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			// A front-end that was killed while it was owed an answer has broken no rule.
			log.Debug("the front-end was gone before its last answer", "error", err)
			err = nil
		}
		switch {
		case ctx.Err() != nil:
			if err != nil {
				log.Debug("the session was cut off", "error", err)
			}
			return nil
		case err != nil && !cfg.Persist:
			return fmt.Errorf("serve the front-end: %w", err)
		case err != nil:
			log.Error("the session failed, waiting for the next", "error", err)
		case !cfg.Persist:
			log.Info("Client disconnected, shutting down")
			return nil
		default:
			log.Info("Client disconnected, waiting for the next")
		}
	}
}

// passing says whether accept(2) may succeed later: what it lacks, other shares may use up for a time.
func passing(err error) bool {
	for _, errno := range []syscall.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.ECONNABORTED} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// openListener finds the socket that cfg names.
func openListener(cfg config.Config) (*listen.Listener, error) {
	if cfg.FD != config.NoFD {
		return listen.FD(cfg.FD)
	}
	return listen.Path(cfg.SocketPath, cfg.SocketGroup)
}

// signalName is SIGTERM rather than "terminated".
func signalName(sig os.Signal) string {
	if s, ok := sig.(syscall.Signal); ok {
		return unix.SignalName(s)
	}
	return sig.String()
}

package daemon

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/bundle"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/internal/listen"
	"github.com/sluicefs/sluice/internal/sandbox"
	"github.com/sluicefs/sluice/seccomp"
)

// enterBox returns the sandbox that this process is to confine itself in, and what the launching process handed over. The
// box is nil in the process that has to launch the serving one first.
func enterBox(cfg config.Config) (*sandbox.Box, []*os.File, error) {
	box, handed, err := sandbox.Inherited()
	if err != nil || box != nil {
		return box, handed, err
	}
	switch cfg.Sandbox {
	case config.SandboxNamespace:
		return nil, nil, nil
	case config.SandboxChroot:
		box, err = sandbox.New(sandbox.Chroot)
	default:
		box, err = sandbox.New(sandbox.None)
	}
	return box, nil, err
}

// idMaps parses --uid-map and --gid-map.
func idMaps(cfg config.Config) (uids, gids []sandbox.IDMap, err error) {
	for _, text := range cfg.UIDMap {
		m, err := sandbox.ParseIDMap(text)
		if err != nil {
			return nil, nil, fmt.Errorf("--uid-map: %w", err)
		}
		uids = append(uids, m)
	}
	for _, text := range cfg.GIDMap {
		m, err := sandbox.ParseIDMap(text)
		if err != nil {
			return nil, nil, fmt.Errorf("--gid-map: %w", err)
		}
		gids = append(gids, m)
	}
	return uids, gids, nil
}

// keptCapabilities are those that the options in force need, changed as --modcaps says.
func keptCapabilities(cfg config.Config, what *source, needs extensions.Needs) (sandbox.CapSet, error) {
	readOnly := true
	for _, m := range what.mounts() {
		readOnly = readOnly && m.ReadOnly
	}
	caps := sandbox.Needed(sandbox.Needs{ReadOnly: readOnly, Xattr: cfg.Share.Xattr, FileHandles: true})
	for _, name := range needs.Capabilities {
		c, err := sandbox.ParseCap(name)
		if err != nil {
			return caps, fmt.Errorf("capability that an extension needs: %w", err)
		}
		caps = caps.With(c)
	}
	caps, err := sandbox.Modify(caps, cfg.ModCaps)
	if err != nil {
		return caps, usageError{fmt.Errorf("--modcaps: %w", err)}
	}
	return caps, nil
}

// enter enters the sandbox and returns where the sources of the root and the mounts are in it.
func (w *worker) enter(needs extensions.Needs) (_ []place, err error) {
	v := sandbox.View{Files: needs.Files, Network: needs.Network}
	mounts := w.what.mounts()
	places := make([]place, len(mounts))
	for i, m := range mounts {
		source := sandbox.Source{Path: m.Source, ReadOnly: m.ReadOnly, File: m.Kind == bundle.File}
		if i > 0 && w.cfg.Sandbox == config.SandboxChroot && m.Source != "" {
			// Only the root is below the new root directory; what else there is has to be open before.
			dir := m.Source
			if source.File {
				dir = filepath.Dir(dir)
			}
			if places[i].fd, err = unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
				return nil, fmt.Errorf("open %s for %s: %w", dir, m.Path, err)
			}
			defer unix.Close(places[i].fd)
			source = sandbox.Source{}
		}
		v.Sources = append(v.Sources, source)
	}
	paths, err := w.box.Enter(v)
	for i := range paths {
		places[i].path = paths[i]
	}
	return places, err
}

// listener is the socket that front-ends connect to: the launching process has opened it, if there is one.
func (w *worker) listener(cfg config.Config) (*listen.Listener, error) {
	if w.handed == nil {
		return openListener(cfg)
	}
	socket := w.handed[handedSocket]
	defer socket.Close()
	fd, err := unix.FcntlInt(socket.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("take over the socket: %w", err)
	}
	return listen.FD(fd)
}

// tellReady tells the service manager, or the launching process, which does.
func (w *worker) tellReady(p *program) error {
	if w.handed == nil {
		p.notifyReady(w.log)
		return nil
	}
	defer w.handed[handedReady].Close()
	if _, err := w.handed[handedReady].Write([]byte{1}); err != nil {
		return fmt.Errorf("tell the launching process: %w", err)
	}
	return nil
}

// actions are the options' words in seccomp's own.
var actions = map[config.Seccomp]seccomp.Action{
	config.SeccompKill: seccomp.Kill,
	config.SeccompTrap: seccomp.Trap,
	config.SeccompLog:  seccomp.Log,
}

// checkSeccomp refuses a filter that cannot be had before anything is done.
func checkSeccomp(cfg config.Config) error {
	if cfg.Seccomp == config.SeccompNone {
		return nil
	}
	return seccomp.Supported()
}

// policy is what a process may call that serves t.
func (t *tree) policy(cfg config.Config) (*seccomp.Policy, error) {
	sources := []seccomp.Source{seccomp.Base(seccomp.BaseOptions{Syslog: cfg.Syslog})}
	if t.host {
		sources = append(sources, seccomp.Passthrough(seccomp.PassthroughOptions{ReadOnly: !t.writes, Xattr: cfg.Share.Xattr}))
	}
	return seccomp.New(append(sources, extensions.Rules(t.claimed)...)...)
}

// confine gives up, for all threads and for good, what serving t does not take.
func (w *worker) confine(caps sandbox.CapSet, t *tree) error {
	filter := w.cfg.Seccomp != config.SeccompNone
	var policy *seccomp.Policy
	if filter {
		var err error
		if policy, err = t.policy(w.cfg); err != nil {
			return err
		}
	}
	if err := w.box.Confine(caps); err != nil {
		return err
	}
	if !filter {
		return nil
	}
	return seccomp.Install(policy, seccomp.InstallConfig{Action: actions[w.cfg.Seccomp]})
}

// dumpFilter prints the filter that a run with these options would be under.
func (p *program) dumpFilter(cfg config.Config, what *source, log *slog.Logger) error {
	o := opener{registry: p.registry, spec: what, share: cfg.Share, log: log}
	var places []place
	for _, m := range what.mounts() {
		places = append(places, place{path: m.Source})
	}
	t, err := o.openTree(places)
	if err != nil {
		return err
	}
	defer t.backend.Close()
	policy, err := t.policy(cfg)
	if err != nil {
		return err
	}
	return policy.Dump(p.out)
}

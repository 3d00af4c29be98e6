package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

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
	if cfg.Sandbox == config.SandboxNamespace || cfg.Managed() {
		return nil, nil, nil
	}
	switch cfg.Sandbox {
	case config.SandboxChroot:
		box, err = sandbox.New(sandbox.Chroot)
	default:
		box, err = sandbox.New(sandbox.None)
	}
	return box, nil, err
}

// checkConfinement finds what is wrong with the options of this file.
func checkConfinement(cfg config.Config) error {
	if _, _, err := idMaps(cfg); err != nil {
		return err
	}
	_, err := changeCapabilities(cfg, 0, sandbox.Options{})
	return err
}

// idMaps parses --uid-map and --gid-map.
func idMaps(cfg config.Config) (uids, gids []sandbox.IDMap, err error) {
	if uids, err = parseIDMaps("--uid-map", cfg.UIDMap); err != nil {
		return nil, nil, err
	}
	gids, err = parseIDMaps("--gid-map", cfg.GIDMap)
	return uids, gids, err
}

func parseIDMaps(option string, texts []string) (maps []sandbox.IDMap, err error) {
	for _, text := range texts {
		m, err := sandbox.ParseIDMap(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", option, err)
		}
		maps = append(maps, m)
	}
	return maps, nil
}

// keptCapabilities are those that the options in force need, changed as --modcaps says.
func keptCapabilities(cfg config.Config, what *source, needs extensions.Needs) (sandbox.CapSet, error) {
	o := sandbox.Options{ReadOnly: !cfg.Managed() && what.readOnly(), Xattr: cfg.Share.Xattr || cfg.Managed(), FileHandles: true}
	caps := sandbox.Needed(o)
	for _, name := range needs.Capabilities {
		c, err := sandbox.ParseCap(name)
		if err != nil {
			return 0, fmt.Errorf("capability that an extension needs: %w", err)
		}
		caps |= c
	}
	return changeCapabilities(cfg, caps, o)
}

// changeCapabilities applies --modcaps.
func changeCapabilities(cfg config.Config, caps sandbox.CapSet, o sandbox.Options) (sandbox.CapSet, error) {
	if cfg.ModCaps == "" {
		return caps, nil
	}
	change, err := sandbox.ParseModcaps(cfg.ModCaps)
	if err == nil {
		caps, err = change.Apply(caps, o)
	}
	if err != nil {
		return 0, fmt.Errorf("--modcaps: %w", err)
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

// outputs are the files to be written at the end.
func (w *worker) outputs() (outputs, error) {
	if w.handed == nil {
		return createOutputs(w.cfg)
	}
	return handedOutputs(w.cfg, w.handed[handedOutput:]), nil
}

// tellReady tells the service manager, or the launching process, which does.
func (w *worker) tellReady(manager *listen.Notifier) error {
	if w.handed == nil {
		tell(manager, w.log)
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
	config.SeccompKill:  seccomp.Kill,
	config.SeccompTrap:  seccomp.Trap,
	config.SeccompLog:   seccomp.Log,
	config.SeccompTrace: seccomp.Log,
}

// rules are what a process that serves t with these capabilities may call.
func (t *tree) rules(registry extensions.Registry, base seccomp.BaseOptions, cfg config.Config, caps sandbox.CapSet) ([]seccomp.Source, error) {
	sources := []seccomp.Source{seccomp.Base(base)}
	if t.host {
		sources = append(sources, seccomp.Passthrough(seccomp.PassthroughOptions{
			Writable: t.writes, Xattr: cfg.Share.Xattr || cfg.Managed(),
			FileHandles: caps.Has(capFileHandles), SwitchIDs: caps.Has(capSwitchIDs),
			Locks: cfg.Share.PosixLock || cfg.Share.Flock || cfg.Managed(), Opens: cfg.Managed(),
		}))
	}
	declared, err := registry.Rules(t.claimed)
	return append(sources, declared...), err
}

// unmerged are the clauses of each of the sources for itself, where a Policy has those that lie within another's no more.
func unmerged(sources []seccomp.Source) (all []seccomp.Clause, err error) {
	for _, s := range sources {
		p, err := seccomp.New(s)
		if err != nil {
			return nil, err
		}
		all = append(all, p.Allow()...)
	}
	return all, nil
}

// What passthrough does with capabilities, if it has them.
const (
	capFileHandles = sandbox.CapSet(1) << unix.CAP_DAC_READ_SEARCH
	capSwitchIDs   = sandbox.CapSet(1)<<unix.CAP_SETUID | sandbox.CapSet(1)<<unix.CAP_SETGID
)

// confine gives up, for all threads and for good, what serving t does not take, and returns the capabilities that are left.
func (w *worker) confine(registry extensions.Registry, caps sandbox.CapSet, t *tree, marks *seccomp.Marks) (sandbox.CapSet, error) {
	tasks, err := w.box.Tasks()
	if err != nil {
		return 0, err
	}
	defer tasks.Close()
	missing, err := w.box.Confine(caps)
	if err != nil {
		return 0, err
	}
	caps &^= missing
	if missing != 0 {
		w.log.Debug("not all capabilities are there that could be of use", "missing", missing)
	}
	if w.cfg.Seccomp == config.SeccompNone {
		return caps, nil
	}
	base := seccomp.BaseOptions{
		PID: os.Getpid(), Syslog: w.cfg.Syslog, OwnSocket: w.handed == nil && w.cfg.SocketPath != "", Link: w.cfg.Managed(),
		Profile: w.cfg.CPUProfile != "",
	}
	rules, err := t.rules(registry, base, w.cfg, caps)
	if err != nil {
		return 0, err
	}
	policy, err := seccomp.New(rules...)
	if err != nil {
		return 0, err
	}
	for _, c := range policy.Ineffective() {
		w.log.Warn("an extension asks for a system call that nobody may make", "extension", strings.Join(c.Owners, ","), "call", c.Syscall)
	}
	install := seccomp.InstallConfig{
		Filters: seccomp.Filters{Deny: policy.Deny(), Allow: policy.Allow(), NoSys: policy.NoSys()},
		Action:  actions[w.cfg.Seccomp], Marks: marks, Tasks: tasks, Trace: w.cfg.Seccomp == config.SeccompTrace,
	}
	if install.Trace {
		if install.Filters.Allow, err = unmerged(rules); err != nil {
			return 0, err
		}
	}
	return caps, seccomp.Install(install)
}

// dumpFilter prints the filter that a run with these options would be under.
func (p *program) dumpFilter(cfg config.Config, what *source) error {
	log, closeLog, err := newLogger(cfg, p.err)
	if err != nil {
		return err
	}
	defer closeLog()
	registry, err := p.allowed(cfg)
	if err != nil {
		return err
	}
	needs, err := registry.Needs(what.bundle.Spec)
	if err != nil {
		return err
	}
	caps, err := keptCapabilities(cfg, what, needs)
	if err != nil {
		return err
	}
	base := seccomp.BaseOptions{Syslog: cfg.Syslog, Link: cfg.Managed(), Profile: cfg.CPUProfile != "", OwnSocket: !cfg.Managed() && cfg.SocketPath != "" && cfg.Sandbox != config.SandboxNamespace}
	t := anything(registry)
	if !cfg.Managed() {
		if t, err = p.openAny(cfg, what, log); err != nil {
			return err
		}
		defer t.backend.Close()
	}
	rules, err := t.rules(registry, base, cfg, caps)
	if err != nil {
		return err
	}
	policy, err := seccomp.New(rules...)
	if err != nil {
		return err
	}
	return policy.Dump(p.out)
}

// openAny opens what is served outside of any sandbox.
func (p *program) openAny(cfg config.Config, what *source, log *slog.Logger) (*tree, error) {
	o := opener{registry: p.registry, what: what, share: cfg.Share, marks: &seccomp.Marks{}, log: log}
	var places []place
	for _, m := range what.mounts() {
		places = append(places, place{path: m.Source})
	}
	return o.openTree(places)
}

package sharer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// Sandbox is the FilesystemSharer of one sandbox.
type Sandbox struct {
	config Config
	mounts []bindMount
	dir    string // the sandbox's in Config.HostDir
	back   backend
	sys    system
	log    *slog.Logger
	watch  watch

	watchLimited, events, rescans, copied atomic.Uint64

	// lock has a place for the one who may use what is below. It is a channel so that who waits can stop waiting.
	lock   chan struct{}
	state  state
	shared []*shared
}

var _ FilesystemSharer = (*Sandbox)(nil)

// state is how far a sandbox is.
type state int

const (
	unknown  state = iota // a process before this one, or a Cleanup that failed, may have left something
	prepared              // files can be shared
	clean                 // there is nothing
)

// backend is where shared things are. Calls come one at a time. A call that fails leaves things as they were, but remove and
// cleanup, which can be called again.
type backend interface {
	// prepare makes ready, and returns what takes that back.
	prepare(ctx context.Context) (undo func(context.Context) error, err error)
	// add makes sh visible to the guest, or makes sure of it if it may be there already. errIgnored says that it cannot be shared.
	add(ctx context.Context, sh *shared) error
	// setReadOnly changes sh if it is there.
	setReadOnly(ctx context.Context, sh *shared, readOnly bool) error
	// remove takes sh away if it is there.
	remove(ctx context.Context, sh *shared) error
	// cleanup takes away all that the sandbox has, known to the caller or not.
	cleanup(ctx context.Context, known []*shared) error
	// canChange says whether setReadOnly can.
	canChange() bool
	// hostPath is Mount.HostPath.
	hostPath(sh *shared) string
	// follow tells of changes in what is watched until ctx ends.
	follow(ctx context.Context) error
}

// errIgnored says that a file is left out.
var errIgnored = errors.New("not shared")

// undoTime is how long taking back may take once the caller's context has ended.
const undoTime = 10 * time.Second

// New makes a Sandbox. What a process before this one has shared under the same ID, Prepare takes up and Cleanup removes.
func New(c Config) (*Sandbox, error) { return newSandbox(c, linux{}) }

func newSandbox(c Config, sys system) (*Sandbox, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("configure sandbox: %w", err)
	}
	c = c.withDefaults()
	mounts, err := parseSandboxBindMounts(c.SandboxBindMounts)
	if err != nil {
		return nil, err
	}
	s := &Sandbox{
		config: c,
		mounts: mounts,
		dir:    filepath.Join(c.HostDir, c.ID),
		sys:    sys,
		log:    c.Log.With("sandbox", c.ID),
		watch:  newWatch(),
		lock:   make(chan struct{}, 1),
	}
	s.back = c.Backend.open(s)
	if err := s.readJournal(); err != nil {
		return nil, err
	}
	return s, nil
}

// Stats are a sandbox's counters.
type Stats struct {
	// Shares are what the guest has, Users the mounts that use them (gauges).
	Shares, Users int
	// WatchLimited counts watchable volumes whose changes are not told any more because of a limit.
	WatchLimited uint64
	// Events and Rescans count what StartFileEventWatcher has been told; a rescan stands for any number of lost events.
	Events, Rescans uint64
	// Copied counts what was copied to the guest (Copy).
	Copied uint64
}

// Stats are the counters as they are now.
func (s *Sandbox) Stats(ctx context.Context) (Stats, error) {
	if err := s.acquire(ctx); err != nil {
		return Stats{}, err
	}
	defer s.release()
	stats := Stats{
		Shares:       len(s.shared),
		WatchLimited: s.watchLimited.Load(),
		Events:       s.events.Load(),
		Rescans:      s.rescans.Load(),
		Copied:       s.copied.Load(),
	}
	for _, sh := range s.shared {
		stats.Users += len(sh.Users)
	}
	return stats, nil
}

// acquire waits for the lock, but not for longer than ctx.
func (s *Sandbox) acquire(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case s.lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Sandbox) release() { <-s.lock }

// Prepare makes the sandbox's directory, readies the back-end and shares SandboxBindMounts.
func (s *Sandbox) Prepare(ctx context.Context) (err error) {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	if s.state == prepared {
		s.log.Warn("prepare: it is prepared already")
		return nil
	}
	var undo []func(context.Context) error
	defer func() {
		if err == nil {
			return
		}
		s.state = unknown
		err = fmt.Errorf("prepare sandbox %s: %w", s.config.ID, err)
		s.undo(ctx, undo...)
	}()

	journaled := false
	if _, err := os.Lstat(filepath.Join(s.dir, journalName)); err == nil {
		journaled = true
	}
	made, err := mkdirs(s.sys, s.dir, dirMode)
	undo = append(undo, func(context.Context) error { return s.removeAll(made) })
	if err != nil {
		return err
	}
	if !journaled {
		undo = append(undo, func(context.Context) error { return s.removeJournal() })
		if err := s.writeJournal(); err != nil {
			return err
		}
	}
	takeBack, err := s.back.prepare(ctx)
	if err != nil {
		return err
	}
	undo = append(undo, takeBack)
	for _, m := range s.mounts {
		source, err := resolve(m.source)
		if err != nil {
			return fmt.Errorf("sandbox bind mount: %w", err)
		}
		at := path.Join(sandboxMountsDir, filepath.Base(m.source))
		u := user{Destination: at, ReadOnly: m.readOnly}
		had := s.find(func(sh *shared) bool { return sh.Path == at }) != nil
		sh, err := s.use(ctx, s.same(what{At: at, Source: source}, u), false, func() (string, error) { return at, nil }, u)
		if errors.Is(err, errIgnored) {
			continue
		}
		if err != nil {
			return fmt.Errorf("sandbox bind mount %s: %w", m.source, err)
		}
		if !had {
			undo = append(undo, func(ctx context.Context) error { return s.leave(ctx, sh, u) })
		}
	}
	s.state = prepared
	s.watch.rearm()
	return nil
}

// Cleanup stops the watcher and removes all that the sandbox has shared, this process or one before it.
func (s *Sandbox) Cleanup(ctx context.Context) error {
	// First, because it may have the lock.
	s.StopFileEventWatcher(ctx)
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	if s.state == clean {
		s.log.Warn("clean up: it is clean already")
		return nil
	}
	if err := s.cleanup(ctx); err != nil {
		// Some of it may be gone: Prepare makes sure of everything again, and Cleanup can go on.
		s.state = unknown
		for _, sh := range s.shared {
			sh.applied = false
		}
		return fmt.Errorf("clean up sandbox %s: %w", s.config.ID, err)
	}
	s.shared, s.state = nil, clean
	return nil
}

func (s *Sandbox) cleanup(ctx context.Context) error {
	if err := s.back.cleanup(ctx, s.shared); err != nil {
		return err
	}
	for _, name := range []string{mountsDir, sharedDir, privateDir} {
		if err := s.sys.removeTree(filepath.Join(s.dir, name)); err != nil {
			return err
		}
	}
	if err := s.removeJournal(); err != nil {
		return err
	}
	return s.removeAll([]string{s.dir})
}

// removeJournal removes the file, and one that was being written.
func (s *Sandbox) removeJournal() error {
	name := filepath.Join(s.dir, journalName)
	return s.removeAll([]string{name, name + ".next"})
}

// removeAll removes paths, the last one first. That one is not there is fine.
func (s *Sandbox) removeAll(paths []string) error { return removeAll(s.sys, paths) }

func removeAll(sys system, paths []string) error {
	var errs []error
	for _, p := range slices.Backward(paths) {
		if err := sys.remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// undo takes steps back, the last one first, whether or not ctx has ended.
func (s *Sandbox) undo(ctx context.Context, steps ...func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	for _, step := range slices.Backward(steps) {
		if err := step(ctx); err != nil {
			s.log.Error("take back what was done before a failure", "error", err)
		}
	}
}

// find is the share that a function says is the one, or nil.
func (s *Sandbox) find(is func(*shared) bool) *shared {
	if i := slices.IndexFunc(s.shared, is); i >= 0 {
		return s.shared[i]
	}
	return nil
}

// same is w for a user: where a share cannot be changed, those who may write have another.
func (s *Sandbox) same(w what, u user) what {
	w.ReadOnly = !s.back.canChange() && u.ReadOnly
	return w
}

// use makes u a user of w, which is shared if it was not, at the path that name gives, and writable if it has to be.
func (s *Sandbox) use(ctx context.Context, w what, watch bool, name func() (string, error), u user) (*shared, error) {
	sh := s.find(func(sh *shared) bool { return sh.what == w })
	if sh == nil {
		p, err := name()
		if err != nil {
			return nil, err
		}
		if other := s.find(func(sh *shared) bool { return sh.Path == p }); other != nil {
			return nil, fmt.Errorf("share %s at %s: %s is there already", w.Source, p, other.Source)
		}
		sh = &shared{Path: p, what: w, Watch: watch}
		s.shared = append(s.shared, sh)
	}
	before, wasReadOnly := sh.Users, sh.readOnly()
	sh.Users = sh.with(u)
	readOnly := sh.readOnly()

	err := s.writeJournal()
	var takeBack []func(context.Context) error
	switch {
	case err != nil:
	case !sh.applied:
		err = s.back.add(ctx, sh)
	case readOnly != wasReadOnly:
		takeBack = append(takeBack, func(ctx context.Context) error { return s.back.setReadOnly(ctx, sh, wasReadOnly) })
		err = s.back.setReadOnly(ctx, sh, readOnly)
	}
	if err == nil {
		sh.applied = true
		return sh, nil
	}
	sh.Users = before
	if len(before) == 0 {
		s.forget(sh)
	}
	s.undo(ctx, append(takeBack, func(context.Context) error { return s.writeJournal() })...)
	return nil, err
}

// leave ends u's use of sh.
func (s *Sandbox) leave(ctx context.Context, sh *shared, u user) error {
	rest := sh.without(u)
	if len(rest) == len(sh.Users) {
		return nil
	}
	wasReadOnly := sh.readOnly()
	before := sh.Users
	sh.Users = rest
	readOnly := sh.readOnly()
	switch {
	case len(rest) == 0:
		if err := s.back.remove(ctx, sh); err != nil {
			// Nobody can tell how much of it is still there.
			sh.Users, sh.applied = before, false
			return err
		}
		s.forget(sh)
	case readOnly != wasReadOnly:
		if err := s.back.setReadOnly(ctx, sh, readOnly); err != nil {
			sh.Users = before
			s.undo(ctx, func(ctx context.Context) error { return s.back.setReadOnly(ctx, sh, wasReadOnly) })
			return err
		}
	}
	// It is done: a record that still has this user costs nothing but a user too many after a kill, and the next one is right.
	if err := s.writeJournal(); err != nil {
		s.log.Error("unshare: the record is behind", "error", err)
	}
	return nil
}

func (s *Sandbox) forget(sh *shared) {
	s.shared = slices.DeleteFunc(s.shared, func(other *shared) bool { return other == sh })
}

// ShareFile shares m's source with c. The same source has one share, whoever uses it.
func (s *Sandbox) ShareFile(ctx context.Context, c *Container, m *Mount) (*SharedFile, error) {
	if err := validateID("container", c.ID); err != nil {
		return nil, err
	}
	if err := s.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.release()
	shared, err := s.shareFile(ctx, c, m)
	if errors.Is(err, errIgnored) {
		s.log.Debug("share file: left out", "source", m.Source)
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("share %s with container %s: %w", m.Source, c.ID, err)
	}
	return shared, nil
}

func (s *Sandbox) shareFile(ctx context.Context, c *Container, m *Mount) (*SharedFile, error) {
	if s.state != prepared {
		return nil, errNotPrepared
	}
	if m.BlockDeviceID != "" {
		return nil, errIgnored
	}
	kind, err := s.emptyDirType(m)
	if err != nil {
		return nil, err
	}
	w, scope, where, watch := what{}, c.ID, m.Destination, false
	switch {
	case kind == typeEphemeral && s.config.MemoryGrafts:
		// The volume is the pod's, not the container's that comes first.
		w, err = s.memory(m)
		scope, where = sandboxScope, m.Source
	case kind != "":
		return s.guestVolume(kind, m)
	default:
		w.Source, err = resolve(m.Source)
		if _, copies := s.config.Backend.(Copy); copies && volumeType(m.Source) == k8sEmptyDir {
			scope, where = sandboxScope, m.Source
		}
	}
	if err != nil {
		return nil, err
	}
	u := user{Container: c.ID, Destination: m.Destination, ReadOnly: m.ReadOnly}
	applyOptions(&w, &u, m.Options)
	w = s.same(w, u)
	if s.find(func(sh *shared) bool { return sh.what == w }) == nil {
		if watch, err = s.watchable(m.Source, w.Source); err != nil {
			return nil, err
		}
	}
	sh, err := s.use(ctx, w, watch, func() (string, error) { return fileName(scope, where) }, u)
	if err != nil {
		return nil, err
	}
	m.HostPath = s.back.hostPath(sh)
	if sh.Watch {
		s.watch.again()
	}
	return s.result(sh, m), nil
}

// result is what the runtime is told of sh.
func (s *Sandbox) result(sh *shared, m *Mount) *SharedFile {
	guest := path.Join(s.config.GuestDir, sh.Path)
	if _, ok := s.config.Backend.(BindMounts); !ok || !sh.Watch {
		return &SharedFile{GuestPath: guest}
	}
	// Kata's agent copies what it polls to a tmpfs there.
	target := path.Join(s.config.GuestDir, watchableDir, sh.Path)
	return &SharedFile{
		VolumeStorages: []*Storage{{Driver: "watchable-bind", Source: guest, Fstype: "bind", Options: slices.Clone(m.Options), MountPoint: target}},
		GuestPath:      target,
	}
}

// UnshareFile ends c's use of what ShareFile has shared for m. What was never shared, or is not any more, is fine.
func (s *Sandbox) UnshareFile(ctx context.Context, c *Container, m *Mount) error {
	if err := validateID("container", c.ID); err != nil {
		return err
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	u := user{Container: c.ID, Destination: m.Destination}
	sh := s.find(func(sh *shared) bool {
		if sh.At != "" || !slices.ContainsFunc(sh.Users, u.is) {
			return false
		}
		if m.HostPath != "" {
			return m.HostPath == s.back.hostPath(sh)
		}
		return s.sourceOf(sh, m)
	})
	if sh != nil {
		if err := s.leave(ctx, sh, u); err != nil {
			return fmt.Errorf("unshare %s with container %s: %w", m.Source, c.ID, err)
		}
	}
	m.HostPath = ""
	return nil
}

// sourceOf says whether sh is of m's source, which may not be there any more.
func (s *Sandbox) sourceOf(sh *shared, m *Mount) bool {
	source, err := resolve(m.Source)
	return err != nil || source == sh.Source || sh.Backend == backendMemory
}

// ShareRootFilesystem shares c's root at ID/rootfs, or says what the guest makes it of.
func (s *Sandbox) ShareRootFilesystem(ctx context.Context, c *Container) (*SharedFile, error) {
	if err := validateID("container", c.ID); err != nil {
		return nil, err
	}
	if err := s.acquire(ctx); err != nil {
		return nil, err
	}
	defer s.release()
	shared, err := s.shareRoot(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("share the root of container %s: %w", c.ID, err)
	}
	return shared, nil
}

func (s *Sandbox) shareRoot(ctx context.Context, c *Container) (*SharedFile, error) {
	if s.state != prepared {
		return nil, errNotPrepared
	}
	at := rootPath(c.ID)
	guest := path.Join(s.config.GuestDir, at)
	if len(c.RootFs.Storages) > 0 {
		return &SharedFile{ContainerStorages: c.RootFs.Storages, GuestPath: guest}, nil
	}
	if slices.ContainsFunc(c.RootFs.Options, func(o string) bool { return strings.HasPrefix(o, layerOption) }) {
		// The agent finds the layers itself, and makes the overlay of them.
		made := path.Join(guestRunDir, at)
		return &SharedFile{
			ContainerStorages: []*Storage{{Driver: "overlayfs", Source: "none", Fstype: c.RootFs.Type, Options: slices.Clone(c.RootFs.Options), MountPoint: made}},
			GuestPath:         made,
		}, nil
	}
	if _, ok := s.config.Backend.(Copy); ok {
		return nil, errors.New("a root is not copied: expected RootFs.Storages, of which the guest makes it")
	}
	w := what{At: at, Source: c.RootFs.Target}
	if w.Source == "" {
		w.Source = c.RootFs.Source
	}
	switch c.RootFs.Backend {
	case "", backendPassthrough:
		source, err := resolve(w.Source)
		if err != nil {
			return nil, err
		}
		w.Source, w.Backend = source, c.RootFs.Backend
	default:
		if _, ok := s.config.Backend.(Grafts); !ok {
			return nil, fmt.Errorf("backend %q needs grafts: expected none, and RootFs.Target mounted", c.RootFs.Backend)
		}
		w.Backend, w.Type, w.Options = c.RootFs.Backend, c.RootFs.Type, strings.Join(c.RootFs.Options, ",")
	}
	u := user{Container: c.ID, ReadOnly: c.RootFs.ReadOnly}
	if _, err := s.use(ctx, s.same(w, u), false, func() (string, error) { return at, nil }, u); err != nil {
		return nil, err
	}
	return &SharedFile{GuestPath: guest}, nil
}

// UnshareRootFilesystem ends what ShareRootFilesystem began. What others share stays.
func (s *Sandbox) UnshareRootFilesystem(ctx context.Context, c *Container) error {
	if err := validateID("container", c.ID); err != nil {
		return err
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	sh := s.find(func(sh *shared) bool { return sh.At == rootPath(c.ID) })
	if sh == nil {
		return nil
	}
	if err := s.leave(ctx, sh, user{Container: c.ID}); err != nil {
		return fmt.Errorf("unshare the root of container %s: %w", c.ID, err)
	}
	return nil
}

var errNotPrepared = errors.New("the sandbox is not prepared: call Prepare first")

// resolve follows symbolic links in a source, as Kata does.
func resolve(source string) (string, error) {
	if !filepath.IsAbs(source) {
		return "", fmt.Errorf("source %q is not an absolute path", source)
	}
	return filepath.EvalSymlinks(source)
}

// applyOptions is what a mount's options say: restrictions that hold on the host's side, too, whether mounts below the source
// that come later are followed, and whether it is read-only.
func applyOptions(w *what, u *user, options []string) {
	for _, o := range options {
		switch o {
		case "ro":
			u.ReadOnly = true
		case "nosuid":
			w.NoSUID = true
		case "suid":
			w.NoSUID = false
		case "nodev":
			w.NoDev = true
		case "dev":
			w.NoDev = false
		case "noexec":
			w.NoExec = true
		case "exec":
			w.NoExec = false
		case "nosymfollow":
			w.NoSymfollow = true
		case "slave", "rslave", "shared", "rshared":
			w.FollowMounts = true
		}
	}
}

package sharer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

// Grafter is what a daemon has to be able to do. A control.Daemon in this process is one, and so is a client of the control API.
type Grafter interface {
	Grafts(ctx context.Context, tag string) ([]api.Graft, error)
	AddGraft(ctx context.Context, tag string, spec api.GraftSpec, replace bool) (api.Graft, error)
	ChangeGraft(ctx context.Context, tag, path string, change api.GraftChange) (api.Graft, error)
	RemoveGraft(ctx context.Context, tag, path string) error
	Events(ctx context.Context, tag string, since uint64, send func(api.Event) error) error
}

// Grafts shares by grafts of a running daemon. Nothing is mounted on the host, and no privilege is needed.
type Grafts struct {
	Daemon Grafter
	// Tag names the share that the sandbox's guest has mounted.
	Tag string
	// Prefix is where in the share the sandbox's grafts are: what the guest has at Config.GuestDir. Default: "/".
	Prefix string
}

func (g Grafts) validate() error {
	switch {
	case g.Daemon == nil:
		return errors.New("grafts without a daemon")
	case g.Tag == "":
		return errors.New("grafts without the tag of a share")
	case g.Prefix != "" && (!path.IsAbs(g.Prefix) || path.Clean(g.Prefix) != g.Prefix):
		return fmt.Errorf("prefix %q of grafts is not an absolute, clean path", g.Prefix)
	}
	return nil
}

func (g Grafts) open(s *Sandbox) backend {
	return &grafts{s: s, daemon: g.Daemon, tag: g.Tag, prefix: cmp.Or(g.Prefix, "/")}
}

type grafts struct {
	s           *Sandbox
	daemon      Grafter
	tag, prefix string
}

func (g *grafts) canChange() bool            { return true }
func (g *grafts) hostPath(sh *shared) string { return path.Join(g.prefix, sh.Path) }

// prepare asks for nothing but whether the share is there.
func (g *grafts) prepare(ctx context.Context) (func(context.Context) error, error) {
	if _, err := g.daemon.Grafts(ctx, g.tag); err != nil {
		return nil, fmt.Errorf("look for share %s: %w", g.tag, err)
	}
	return func(context.Context) error { return nil }, nil
}

func (g *grafts) spec(sh *shared) api.GraftSpec {
	spec := api.GraftSpec{
		Path:         g.hostPath(sh),
		Source:       sh.Source,
		Backend:      sh.Backend,
		Type:         sh.Type,
		ReadOnly:     sh.readOnly(),
		NoSUID:       sh.NoSUID,
		NoDev:        sh.NoDev,
		NoExec:       sh.NoExec,
		NoSymfollow:  sh.NoSymfollow,
		MaxBytes:     sh.MaxBytes,
		Watch:        sh.Watch,
		FollowMounts: sh.FollowMounts,
	}
	if sh.Watch {
		// While kubelet changes a volume, the old content is there beside the new one, and the daemon counts directories as well.
		if l := g.s.config.Limits; l.Files > 0 {
			spec.WatchMaxFiles = 2*l.Files + 8
		}
		if l := g.s.config.Limits; l.Bytes > 0 {
			spec.WatchMaxBytes = 2 * uint64(l.Bytes)
		}
	}
	if sh.Options != "" {
		spec.Options = strings.Split(sh.Options, ",")
	}
	if sh.Backend == backendMemory {
		spec.Source = ""
	}
	return spec
}

func (g *grafts) add(ctx context.Context, sh *shared) error {
	spec := g.spec(sh)
	_, err := g.daemon.AddGraft(ctx, g.tag, spec, false)
	if err == nil {
		return nil
	}
	switch code(err) {
	case api.CodeExists:
		// One that a process before this one has added, or somebody else's.
		if there, lookErr := g.look(ctx, spec.Path); lookErr != nil || there == nil || !sameGraft(there.GraftSpec, spec) {
			return errors.Join(err, lookErr)
		}
		return g.setReadOnly(ctx, sh, spec.ReadOnly)
	case "", api.CodeInternal:
		// Whether it was added nobody has said. If it was, nobody uses it.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer cancel()
		there, lookErr := g.look(ctx, spec.Path)
		if lookErr != nil || there == nil || !sameGraft(there.GraftSpec, spec) {
			return errors.Join(err, lookErr)
		}
		return errors.Join(err, g.remove(ctx, sh))
	}
	return err
}

// look is the graft at a path, or nil.
func (g *grafts) look(ctx context.Context, at string) (*api.Graft, error) {
	list, err := g.daemon.Grafts(ctx, g.tag)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(list, func(there api.Graft) bool { return there.Path == at && !there.Leaving }); i >= 0 {
		return &list[i], nil
	}
	return nil, nil
}

// sameGraft says whether one was made by this package for the same source. The daemon may have filled in what was not said.
func sameGraft(there, want api.GraftSpec) bool {
	return there.Source == want.Source && (want.Backend == "" || there.Backend == want.Backend) && there.Watch == want.Watch
}

func (g *grafts) setReadOnly(ctx context.Context, sh *shared, readOnly bool) error {
	_, err := g.daemon.ChangeGraft(ctx, g.tag, g.hostPath(sh), api.GraftChange{ReadOnly: &readOnly})
	if !sh.applied && code(err) == api.CodeNotFound {
		return nil
	}
	return err
}

func (g *grafts) remove(ctx context.Context, sh *shared) error {
	if err := g.daemon.RemoveGraft(ctx, g.tag, g.hostPath(sh)); !gone(err) {
		return err
	}
	return nil
}

// cleanup goes by the names of the grafts: those below the prefix that this package makes are the sandbox's.
func (g *grafts) cleanup(ctx context.Context, known []*shared) error {
	list, err := g.daemon.Grafts(ctx, g.tag)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	// What is below others first.
	for _, there := range slices.Backward(list) {
		name, ok := strings.CutPrefix(there.Path, strings.TrimSuffix(g.prefix, "/")+"/")
		if !ok || there.Leaving {
			continue
		}
		if !ownPattern.MatchString(name) && !slices.ContainsFunc(known, func(sh *shared) bool { return sh.Path == name }) {
			continue
		}
		if err := g.daemon.RemoveGraft(ctx, g.tag, there.Path); err != nil && !gone(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// code is what the daemon has answered; "" if it is not known whether it has.
func code(err error) string {
	var answer *api.Error
	if errors.As(err, &answer) {
		return answer.Code
	}
	return ""
}

// gone says that there is no such graft: because it is not there, its share is not, or the daemon is not. The daemon of a
// sandbox usually ends before the sandbox is cleaned up, and its grafts have ended with it.
func gone(err error) bool {
	var dial *net.OpError
	return code(err) == api.CodeNotFound ||
		errors.As(err, &dial) && dial.Op == "dial" && (errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist))
}

// followWait are how long to wait before asking for events again, at first and at most.
const (
	followWait    = 50 * time.Millisecond
	followWaitMax = 5 * time.Second
)

// follow keeps count of events. They need no help: the daemon sends them to sluice-agent in the guest. What is learned here is
// what was lost or left out for a limit.
func (g *grafts) follow(ctx context.Context) error {
	var since uint64
	wait := followWait
	for {
		err := g.daemon.Events(ctx, g.tag, since, func(e api.Event) error {
			switch e.Kind {
			case api.EventHello:
				return nil // a daemon that says no more than this is not asked more often
			case api.EventLimit:
				g.s.watchLimited.Add(1)
				g.s.log.Warn("volume is above a limit: its content stays current, but changes are not told as events", "path", e.Path)
			case api.EventRescan:
				g.s.rescans.Add(1)
			}
			g.s.events.Add(1)
			since, wait = e.ID, followWait
			return nil
		})
		if ctx.Err() != nil {
			return nil
		}
		g.s.log.Warn("events of the daemon have ended: asking again", "error", err, "in", wait)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, followWaitMax)
	}
}

package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/mem"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/internal/bundle"
	"github.com/sluicefs/sluice/internal/config"
	"github.com/sluicefs/sluice/seccomp"
	"github.com/sluicefs/sluice/share"
)

// tree is what is served, opened.
type tree struct {
	backend  fsbackend.Backend
	readOnly bool                   // all of it is
	claimed  []extensions.Extension // each once
	host     bool                   // passthrough serves some of it
	writes   bool                   // of which some may be changed
}

// place is where a mount's source is, once the process is in its sandbox.
type place struct {
	path string // "" where it is out of reach by path
	fd   int    // a descriptor of the directory, or of the directory of the file, if not 0
}

func (p place) close() {
	if p.fd != 0 {
		_ = unix.Close(p.fd)
	}
}

// dir is the path to speak of.
func (p place) dir(m *bundle.Mount) string {
	if p.path != "" {
		return p.path
	}
	return m.Source
}

// opener opens the backends of a tree.
type opener struct {
	registry extensions.Registry
	what     *source
	share    config.Share
	procFD   int
	marks    *seccomp.Marks
	// noFileHandles keeps passthrough from finding out itself whether it may use them.
	noFileHandles bool

	log *slog.Logger

	tree   tree
	grafts []share.Graft
}

// openTree opens what is served: its root and mounts, at these places, the root's first.
func (o *opener) openTree(places []place) (_ *tree, err error) {
	defer func() {
		if err != nil {
			for i := range o.grafts {
				err = errors.Join(err, o.grafts[i].Close())
			}
		}
	}()
	mounts := o.what.mounts()
	o.share.MaxFDs = max(o.share.MaxFDs/len(mounts), passthrough.MinMaxFDs) // one budget for all
	for i, m := range mounts {
		g, err := o.open(&m, places[i])
		if err != nil {
			return nil, err
		}
		o.grafts = append(o.grafts, g)
	}
	o.tree.readOnly = true
	for i := range o.grafts {
		o.tree.readOnly = o.tree.readOnly && o.grafts[i].ReadOnly
	}
	if root := &o.grafts[0]; len(o.grafts) == 1 && !root.Isolated && root.UIDMap == nil && root.GIDMap == nil {
		// Nothing is put together: requests go straight to the backend. Read-only is then fuseserver's.
		o.tree.backend = root.Backend
		return &o.tree, nil
	}
	s, err := share.New(share.Config{Grafts: o.grafts, Log: o.log})
	if err != nil {
		return nil, err
	}
	o.tree.backend = s
	return &o.tree, nil
}

// open returns the graft for m, whose source is at p.
func (o *opener) open(m *bundle.Mount, p place) (g share.Graft, err error) {
	g = o.graft(m)
	choice, err := o.registry.Select(extensions.Request{
		Spec: o.what.bundle.Spec, Mount: m.Spec, MountPath: p.path, ReadOnly: m.ReadOnly, Backend: m.Backend,
	})
	switch {
	case err != nil:
		return g, err
	case choice.Extension != nil:
		err = o.claim(&g, choice)
	default:
		err = o.openStock(&g, m, p)
	}
	if err != nil {
		return g, fmt.Errorf("%s: %w", m.Path, err)
	}
	return g, nil
}

// graft is what m says of its graft, which has no backend yet.
func (o *opener) graft(m *bundle.Mount) share.Graft {
	return share.Graft{Path: m.Path, Policy: share.Policy{ReadOnly: m.ReadOnly}, UIDMap: idMap(m.UIDMap), GIDMap: idMap(m.GIDMap)}
}

// isStock says whether name is of a backend that comes with the daemon, or of none.
func isStock(name string) bool {
	return name == "" || name == extensions.Mem || name == extensions.Passthrough
}

// claim makes g an extension's.
func (o *opener) claim(g *share.Graft, c extensions.Choice) error {
	g.Backend = c.Backend
	g.Extension = c.Extension.Name()
	g.ReadOnly = c.Options.ReadOnly
	g.Isolated, g.Slow = !c.Options.Stock, !c.Options.Stock && !c.Options.Inline
	switch c.Options.Timeout {
	case 0:
		if c.Options.Stock {
			break
		}
		g.Timeout = extensions.DefaultTimeout
	case extensions.NoTimeout:
	default:
		g.Timeout = c.Options.Timeout
	}
	if g.Isolated {
		owner, err := o.marks.Register(g.Extension)
		if err != nil {
			return errors.Join(err, g.Backend.Close())
		}
		g.Enter, g.Leave = func() { o.marks.Enter(owner) }, o.marks.Leave
	}
	// By name: an extension may be of a type that cannot be compared.
	if !slices.ContainsFunc(o.tree.claimed, func(e extensions.Extension) bool { return e.Name() == g.Extension }) {
		o.tree.claimed = append(o.tree.claimed, c.Extension)
	}
	return nil
}

// idMap is m in share's words.
func idMap(m []bundle.IDRange) share.IDMap {
	var to share.IDMap
	for _, r := range m {
		to = append(to, share.IDRange(r))
	}
	return to
}

// openStock opens what comes with the daemon.
func (o *opener) openStock(g *share.Graft, m *bundle.Mount, p place) (err error) {
	switch {
	case m.Backend == extensions.Mem, m.Kind == bundle.Tmpfs && m.Backend == "":
		g.Backend, err = mem.New(mem.Config{MaxBytes: m.Size, Mode: m.Mode, UID: m.UID, GID: m.GID})
		return err
	case m.Kind == bundle.Dir:
	case m.Kind == bundle.File:
		g.File = filepath.Base(m.Source)
		if p.path != "" {
			p.path, g.File = filepath.Split(p.path)
		}
	default:
		return fmt.Errorf("a mount of type %s is for an extension, and none claimed it", m.Spec.Type)
	}
	o.tree.host = true
	o.tree.writes = o.tree.writes || !m.ReadOnly
	g.Backend, err = passthrough.New(passthrough.Config{
		Dir: p.dir(m), DirFD: p.fd, MaxFDs: o.share.MaxFDs, MaxInodes: o.share.MaxInodes, ProcFD: o.procFD, Log: o.log,
		NoFileHandles: o.noFileHandles, NoOpen: o.share.NoOpen,
	})
	return err
}

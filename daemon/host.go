package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/bundle"
)

// openGraft is an order for a graft, and its directory, nil where it has none.
type openGraft struct {
	graftOrder
	dir *os.File
	// outer is the half outside of a graft in two halves, until it is adopted.
	outer *hostedGraft
}

// files are what goes with the order; nil has none.
func (g *openGraft) files() []*os.File {
	switch {
	case g == nil:
		return nil
	case g.outer != nil:
		return g.outer.files
	case g.dir == nil:
		return nil
	}
	return []*os.File{g.dir}
}

func (g *openGraft) close() {
	if g.dir != nil {
		_ = g.dir.Close()
	}
	if g.outer != nil {
		if err := g.outer.close(); err != nil {
			g.outer.log.Warn("cannot end what a graft had outside the sandbox", "error", err)
		}
	}
}

type grafts []*openGraft

func (all grafts) close() {
	for _, g := range all {
		g.close()
	}
}

// openGrafts makes orders of grafts that were asked for, and opens their directories.
func (k *keeper) openGrafts(tag string, specs []api.GraftSpec) (all grafts, err error) {
	for _, spec := range specs {
		g, err := k.openOne(tag, spec)
		if err != nil {
			all.close()
			return nil, fmt.Errorf("graft %s: %w", spec.Path, err)
		}
		all = append(all, g)
	}
	return all, nil
}

// openOne is openGrafts for one.
func (k *keeper) openOne(tag string, spec api.GraftSpec) (*openGraft, error) {
	spec.Backend = backendOf(k.registry, spec)
	o := &openGraft{graftOrder: graftOrder{Tag: tag, Spec: spec}}
	m := &o.Mount
	m.Path, m.Source, m.ReadOnly, m.Backend = spec.Path, spec.Source, spec.ReadOnly, spec.Backend
	m.UIDMap, m.GIDMap = idRanges(spec.UIDMap), idRanges(spec.GIDMap)
	o.OCI = &specs.Spec{Version: specs.Version, Root: &specs.Root{}}
	if spec.Path == "/" {
		o.OCI.Root.Path, o.OCI.Root.Readonly = spec.Source, spec.ReadOnly
	} else {
		mount := mountOf(spec)
		m.Spec, o.OCI.Mounts = &mount, []specs.Mount{mount}
	}
	if _, ok := k.registry.Hosted(spec.Backend); ok {
		return o, k.openOuter(o)
	}
	if len(spec.Lowers) > 0 {
		return nil, api.Errorf(api.CodeInvalid, "lowers: backend %q is not made of others: expected one that is, such as overlay", spec.Backend)
	}
	switch spec.Backend {
	case extensions.Mem:
		m.Kind, m.Size, m.Mode = bundle.Tmpfs, int64(spec.MaxBytes), 0o1777
		return o, nil
	case "", extensions.Passthrough:
	default:
		m.Kind = bundle.Other
		return o, nil
	}
	if spec.Source == "" || spec.Backend == "" && spec.Type != "" && spec.Type != "bind" {
		m.Kind = bundle.Other // an extension may claim it
		return o, nil
	}
	if err := o.resolve(); err != nil {
		return nil, err
	}
	return o, nil
}

// backendOf is what spec names as its backend, if only by its type: a mount of type overlay, say.
func backendOf(r extensions.Registry, spec api.GraftSpec) string {
	if _, ok := r.Hosted(spec.Type); ok && spec.Backend == "" {
		return spec.Type
	}
	return spec.Backend
}

// openOuter opens the half outside of a graft in two halves.
func (k *keeper) openOuter(o *openGraft) (err error) {
	o.Mount.Kind = bundle.Other
	if o.outer, err = k.openHosted(o.Tag, o.Spec); err != nil {
		return err
	}
	o.Hosted = &o.outer.order
	return nil
}

// openPlan makes orders of what the options for one share describe, and opens the directories.
func (k *keeper) openPlan(tag string, what *source) (all grafts, err error) {
	for _, m := range what.mounts() {
		g := &openGraft{graftOrder: graftOrder{Tag: tag, Mount: m, OCI: what.bundle.Spec}}
		g.Spec = api.GraftSpec{Path: m.Path, Source: m.Source, Backend: m.Backend, ReadOnly: m.ReadOnly, FollowMounts: true}
		for _, r := range m.UIDMap {
			g.Spec.UIDMap = append(g.Spec.UIDMap, api.IDRange(r))
		}
		for _, r := range m.GIDMap {
			g.Spec.GIDMap = append(g.Spec.GIDMap, api.IDRange(r))
		}
		if _, ok := k.registry.Hosted(m.Backend); ok {
			g.Spec.Options = mountOptions(&m)
			if err := k.openOuter(g); err != nil {
				all.close()
				return nil, fmt.Errorf("%s: %w", m.Path, err)
			}
		} else if m.Kind == bundle.Dir || m.Kind == bundle.File {
			g.Mount.Source, err = filepath.EvalSymlinks(m.Source)
			if err == nil {
				err = g.open()
			}
			if err != nil {
				all.close()
				return nil, fmt.Errorf("%s: %w", m.Path, err)
			}
		}
		all = append(all, g)
	}
	return all, nil
}

// mountOptions are a mount's as its file has them.
func mountOptions(m *bundle.Mount) []string {
	if m.Spec == nil {
		return nil
	}
	return m.Spec.Options
}

func idRanges(ranges []api.IDRange) (m []bundle.IDRange) {
	for _, r := range ranges {
		m = append(m, bundle.IDRange(r))
	}
	return m
}

// resolve finds out what the source is, and opens it. Symbolic links are followed, as mount(8) does, and what is
// found then is what is opened, or nothing.
func (g *openGraft) resolve() error {
	m := &g.Mount
	path, err := filepath.EvalSymlinks(m.Source)
	if err != nil {
		return api.Errorf(api.CodeInvalid, "source: %v: expected a directory or a file of the host", err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		return api.Errorf(api.CodeInvalid, "source: %v: expected a directory or a file of the host", err)
	}
	m.Kind, m.Source = bundle.Dir, path
	if !info.IsDir() {
		m.Kind = bundle.File
		if m.Path == "/" {
			return api.Errorf(api.CodeInvalid,
				"source %s is not a directory: expected one for the root of a share; a single file can be grafted at any other path", path)
		}
	}
	return g.open()
}

// open opens the directory that the source is, or is in.
func (g *openGraft) open() error {
	dir, file := g.Mount.Source, ""
	if g.Mount.Kind == bundle.File {
		dir, file = filepath.Dir(dir), filepath.Base(dir)
	}
	fd, err := openTree(dir, g.Spec.FollowMounts)
	if err == nil {
		if err = checkOpened(fd, file); err != nil {
			_ = unix.Close(fd)
		}
	}
	if err != nil {
		return api.Errorf(api.CodeInvalid, "source: open %s: %v", g.Mount.Source, err)
	}
	g.Dir, g.dir = true, os.NewFile(uintptr(fd), dir)
	return nil
}

// checkOpened looks at what was opened, whatever the path has become meanwhile: a directory, and a file in it unless that is "".
func checkOpened(dir int, file string) error {
	if err := unix.Faccessat(dir, ".", unix.X_OK, unix.AT_EACCESS); err != nil {
		return fmt.Errorf("%w: expected a directory that the daemon's user may search", err)
	}
	if file == "" {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, file, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if typ := st.Mode & unix.S_IFMT; typ == unix.S_IFDIR || typ == unix.S_IFLNK {
		return errors.New("it has become something else than a file")
	}
	return nil
}

// openTree returns a descriptor of a directory, O_PATH, that no symbolic link leads to in the end. With the privileges for it, and
// unless the host's later mounts are to be seen, it is of a copy of what is mounted there, out of which no ".." leads, with the
// sandbox's own mount flags.
func openTree(path string, follow bool) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil || follow {
		return fd, err
	}
	defer unix.Close(fd)
	tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE|unix.AT_EMPTY_PATH)
	if err == nil {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
		if err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err == nil {
			return tree, nil
		}
		_ = unix.Close(tree)
	}
	// An ordinary user, a mount that cannot be bound, or an old kernel.
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
}

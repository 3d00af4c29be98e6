package daemon

import (
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
}

func (g *openGraft) files() []*os.File {
	if g.dir == nil {
		return nil
	}
	return []*os.File{g.dir}
}

func (g *openGraft) close() {
	if g.dir != nil {
		_ = g.dir.Close()
	}
}

type grafts []*openGraft

func (all grafts) close() {
	for _, g := range all {
		g.close()
	}
}

// openGrafts makes orders of grafts that were asked for, and opens their directories.
func openGrafts(tag string, specs []api.GraftSpec) (all grafts, err error) {
	for _, spec := range specs {
		g, err := openOne(tag, spec)
		if err != nil {
			all.close()
			return nil, fmt.Errorf("graft %s: %w", spec.Path, err)
		}
		all = append(all, g)
	}
	return all, nil
}

// openOne is openGrafts for one.
func openOne(tag string, spec api.GraftSpec) (*openGraft, error) {
	o := &openGraft{graftOrder: graftOrder{Tag: tag, Spec: spec}}
	m := &o.Mount
	m.Path, m.Source, m.ReadOnly, m.Backend = spec.Path, spec.Source, spec.ReadOnly, spec.Backend
	m.UIDMap, m.GIDMap = idRanges(spec.UIDMap), idRanges(spec.GIDMap)
	o.OCI = &specs.Spec{Version: specs.Version, Root: &specs.Root{}}
	if spec.Path == "/" {
		o.OCI.Root.Path, o.OCI.Root.Readonly = spec.Source, spec.ReadOnly
	} else {
		m.Spec = &specs.Mount{Destination: spec.Path, Type: spec.Type, Source: spec.Source, Options: spec.Options}
		o.OCI.Mounts = []specs.Mount{*m.Spec}
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
	return o, o.open()
}

// openPlan makes orders of what the options for one share describe, and opens the directories.
func openPlan(tag string, what *source) (all grafts, err error) {
	for _, m := range what.mounts() {
		g := &openGraft{graftOrder: graftOrder{Tag: tag, Mount: m, OCI: what.bundle.Spec}}
		g.Spec = api.GraftSpec{Path: m.Path, Source: m.Source, Backend: m.Backend, ReadOnly: m.ReadOnly, FollowMounts: true}
		for _, r := range m.UIDMap {
			g.Spec.UIDMap = append(g.Spec.UIDMap, api.IDRange(r))
		}
		for _, r := range m.GIDMap {
			g.Spec.GIDMap = append(g.Spec.GIDMap, api.IDRange(r))
		}
		if m.Kind == bundle.Dir || m.Kind == bundle.File {
			if err := g.open(); err != nil {
				all.close()
				return nil, fmt.Errorf("%s: %w", m.Path, err)
			}
		}
		all = append(all, g)
	}
	return all, nil
}

func idRanges(ranges []api.IDRange) (m []bundle.IDRange) {
	for _, r := range ranges {
		m = append(m, bundle.IDRange(r))
	}
	return m
}

// resolve finds out what the source is. Symbolic links are followed, as mount(8) does.
func (g *openGraft) resolve() error {
	m := &g.Mount
	path, err := filepath.EvalSymlinks(m.Source)
	if err != nil {
		return api.Errorf(api.CodeInvalid, "source: %v: expected a directory or a file of the host", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return api.Errorf(api.CodeInvalid, "source %s: %v", m.Source, err)
	}
	m.Kind, m.Source = bundle.Dir, path
	if !info.IsDir() {
		m.Kind = bundle.File
		if m.Path == "/" {
			return api.Errorf(api.CodeInvalid,
				"source %s is not a directory: expected one for the root of a share; a single file can be grafted at any other path", path)
		}
	}
	return nil
}

// open opens the directory that the source is, or is in.
func (g *openGraft) open() error {
	path := g.Mount.Source
	if g.Mount.Kind == bundle.File {
		path = filepath.Dir(path)
	}
	fd, err := openTree(path, g.Spec.FollowMounts)
	if err != nil {
		return api.Errorf(api.CodeInvalid, "open %s: %v", path, err)
	}
	g.Dir, g.dir = true, os.NewFile(uintptr(fd), path)
	return nil
}

// openTree returns a descriptor of a directory, O_PATH. With the privileges for it, and unless the host's later mounts are to
// be seen, it is of a copy of what is mounted there, out of which no ".." leads, with the sandbox's own mount flags.
func openTree(path string, follow bool) (int, error) {
	if !follow {
		fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err == nil {
			attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
			if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
				return -1, fmt.Errorf("restrict the copy of the mount: %w", unixClose(fd, err))
			}
			return fd, nil
		}
	}
	return unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

func unixClose(fd int, err error) error {
	_ = unix.Close(fd)
	return err
}

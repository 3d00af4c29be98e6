package bundle

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// MaxMounts is the most mounts that a configuration can have.
const MaxMounts = 4096

// Plan is what a share is made of.
type Plan struct {
	// Root is the root filesystem, with a Kind of Dir and no Spec.
	Root Mount
	// Mounts are those that can be seen, each at a path of its own. One that is below another comes after it.
	Mounts []Mount
	// Options are the annotations io.sluice.option.*, by what comes after that.
	Options map[string]string
	// Notes say what of the configuration has no effect, one line each, for the log.
	Notes []string
}

// Mount is a part of the share.
type Mount struct {
	// Spec is the bundle's own, an element of Spec.Mounts, nil for the root.
	Spec *specs.Mount
	// Path is where in the share it is: clean, absolute, and without symbolic links, of which those in the root filesystem and in
	// earlier mounts are followed. It need not exist there.
	Path string
	// Source is an absolute path on the host: the root filesystem, what is bound, or of Kind Other what the configuration gives
	// as an absolute path and exists; "" where there is none. It is made clean as text is, without a look at symbolic links.
	Source string
	Kind   Kind
	// Size, Mode, UID and GID are of Kind Tmpfs: bytes, 0 where nothing is said; the permissions of its root, and its owner
	// as the guest sees it.
	Size     int64
	Mode     uint32
	UID, GID uint32
	ReadOnly bool
	// UIDMap and GIDMap are nil where the guest sees ids as they are, as it always does on a Tmpfs.
	UIDMap, GIDMap []IDRange
	// Backend is the name of the one that an annotation asks for, "" for any.
	Backend string
}

// Kind is what a mount is made from.
type Kind uint8

// The kinds of mounts.
const (
	Dir   Kind = iota // a directory of the host
	File              // another file of the host
	Tmpfs             // memory, empty at first
	Other             // anything else: only an extension can serve it
)

func (k Kind) String() string {
	names := [...]string{"directory", "file", "tmpfs", "other"}
	if int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// fileType is that of the mount's root, of S_IFMT, or 0.
func (k Kind) fileType() uint32 {
	switch k {
	case Dir, Tmpfs:
		return unix.S_IFDIR
	case File:
		return unix.S_IFREG
	default:
		return 0
	}
}

var (
	// guestTypes are file systems that mean something only in the kernel that the container's processes run on.
	guestTypes = []string{"proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs"}
	// guestPaths hold such file systems.
	guestPaths = []string{"/dev", "/proc", "/sys"}
)

// planner is a plan in the making.
type planner struct {
	bundle      *Bundle
	annotations annotations
	maps        idMaps // the container's
	plan        Plan
	visible     []*Mount          // of the mounts so far
	at          map[string]*Mount // the same by path
}

// Plan checks the configuration and plans the share. It looks at the host's files as they are now.
func (b *Bundle) Plan() (*Plan, error) {
	if b.Spec == nil || b.Spec.Root == nil || b.Spec.Root.Path == "" {
		return nil, errors.New("root.path is missing: expected the directory of the root filesystem")
	}
	if n := len(b.Spec.Mounts); n > MaxMounts {
		return nil, fmt.Errorf("%d mounts: at most %d can be served", n, MaxMounts)
	}
	p := planner{bundle: b, at: map[string]*Mount{}}
	var err error
	if p.annotations, err = readAnnotations(b.Spec); err != nil {
		return nil, err
	}
	p.plan.Options = p.annotations.options
	if linux := b.Spec.Linux; linux != nil {
		if p.maps, err = readMaps(linux.UIDMappings, linux.GIDMappings); err != nil {
			return nil, fmt.Errorf("linux: %w", err)
		}
		joins := slices.ContainsFunc(linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace })
		if joins && p.maps.uid == nil {
			p.note("linux.namespaces has a user namespace without mappings: the guest sees ids as they are on the host")
		}
	}
	if err := p.root(); err != nil {
		return nil, err
	}
	for i := range b.Spec.Mounts {
		m := &b.Spec.Mounts[i]
		if err := p.mount(m); err != nil {
			return nil, fmt.Errorf("mounts[%d] %q: %w", i, m.Destination, err)
		}
	}
	for _, m := range p.visible {
		p.plan.Mounts = append(p.plan.Mounts, *m)
	}
	return &p.plan, nil
}

func (p *planner) root() error {
	root := p.bundle.Spec.Root
	source, err := p.source(root.Path)
	if err != nil {
		return fmt.Errorf("root.path %q: %w", root.Path, err)
	}
	p.plan.Root = Mount{
		Path: "/", Source: source, Kind: Dir, ReadOnly: root.Readonly,
		UIDMap: p.maps.uid, GIDMap: p.maps.gid, Backend: p.annotations.root,
	}
	fileType, err := typeOf(source)
	if err != nil {
		return fmt.Errorf("root.path %q: %w", root.Path, err)
	}
	if fileType != unix.S_IFDIR {
		return fmt.Errorf("root.path %q: %q is not a directory", root.Path, source)
	}
	return nil
}

// mount plans one mount, which comes after those that are planned already.
func (p *planner) mount(spec *specs.Mount) error {
	destination := spec.Destination
	if !path.IsAbs(destination) || strings.ContainsRune(destination, 0) {
		return errors.New("expected a destination that is an absolute path")
	}
	if why := guestsOwn(spec); why != "" {
		return p.leaveOut(spec, why)
	}
	m := &Mount{Spec: spec, Backend: p.annotations.mounts[destination]}
	where, err := p.resolve(destination)
	if err != nil {
		return fmt.Errorf("find the destination: %w", err)
	}
	m.Path = where.path
	if top, ok := below(m.Path, guestPaths...); ok {
		return p.leaveOut(spec, fmt.Sprintf("it is %q in the root filesystem, and %s is the guest's own", m.Path, top))
	}
	if m.Path == "/" {
		return errors.New("the destination is the root itself: give it as root.path")
	}

	if err := p.setSource(m); err != nil {
		return err
	}
	switch is, there := m.Kind.fileType(), where.fileType; {
	case is == 0 || there == 0:
	case is == unix.S_IFDIR && there != unix.S_IFDIR:
		return fmt.Errorf("a directory cannot be mounted on %q, which is a file", m.Path)
	case is != unix.S_IFDIR && there == unix.S_IFDIR:
		return fmt.Errorf("a file cannot be mounted on %q, which is a directory", m.Path)
	}

	asked, err := m.setOptions()
	if err != nil {
		return err
	}
	if asked.copyUp {
		empty, err := where.empty()
		if err != nil {
			return fmt.Errorf("option %q: %w", "tmpcopyup", err)
		}
		if !empty {
			return fmt.Errorf("option %q: there are files at %q, and copies of them are not made: leave the option out, or the files", "tmpcopyup", m.Path)
		}
	}
	if err := p.setMaps(m, asked.idmap); err != nil {
		return err
	}

	p.visible = slices.DeleteFunc(p.visible, func(earlier *Mount) bool {
		if _, hidden := below(earlier.Path, m.Path); !hidden {
			return false
		}
		p.note("the mount on %q is hidden by a later one on %q", earlier.Spec.Destination, destination)
		delete(p.at, earlier.Path)
		return true
	})
	p.visible = append(p.visible, m)
	p.at[m.Path] = m
	return nil
}

// guestsOwn says why a mount is the guest's to make, "" if it is not.
func guestsOwn(spec *specs.Mount) string {
	if top, ok := below(path.Clean(spec.Destination), guestPaths...); ok {
		return top + " is the guest's own"
	}
	if !isBind(spec) && slices.Contains(guestTypes, spec.Type) {
		return spec.Type + " is the guest's own"
	}
	return ""
}

// leaveOut notes that a mount is not served, unless that goes without saying.
func (p *planner) leaveOut(spec *specs.Mount, why string) error {
	if backend, named := p.annotations.mounts[spec.Destination]; named {
		return fmt.Errorf("backend %q cannot serve it: %s", backend, why)
	}
	if isBind(spec) || spec.Type != typeTmpfs && !slices.Contains(guestTypes, spec.Type) {
		p.note("the mount on %q is left out: %s", spec.Destination, why)
	}
	return nil
}

// setSource sets Kind and Source.
func (p *planner) setSource(m *Mount) error {
	switch {
	case isBind(m.Spec):
		if m.Spec.Source == "" {
			return errors.New("a bind mount needs a source")
		}
		source, err := p.source(m.Spec.Source)
		if err != nil {
			return fmt.Errorf("source: %w", err)
		}
		fileType, err := typeOf(source)
		if err != nil {
			return fmt.Errorf("source: %w", err)
		}
		m.Source, m.Kind = source, File
		if fileType == unix.S_IFDIR {
			m.Kind = Dir
		}
	case m.Spec.Type == typeTmpfs:
		m.Kind = Tmpfs
	default:
		m.Kind = Other
		if source := filepath.Clean(m.Spec.Source); filepath.IsAbs(source) {
			if _, err := typeOf(source); err == nil {
				m.Source = source
			}
		}
	}
	return nil
}

func (p *planner) setMaps(m *Mount, idmap bool) error {
	own, err := readMaps(m.Spec.UIDMappings, m.Spec.GIDMappings)
	if err != nil {
		return err
	}
	maps := p.maps
	switch mapped := own.uid != nil || idmap; {
	case m.Kind == Tmpfs && mapped:
		return errors.New("a tmpfs has no ids to map: leave out idmap, uidMappings and gidMappings")
	case m.Kind == Tmpfs:
		return nil
	case mapped && own.uid == nil && p.maps.uid == nil:
		return errors.New("option idmap: there are neither mappings of the mount nor of the container")
	case mapped:
		if own.uid == nil {
			own = p.maps
		}
		if maps, err = p.maps.through(own); err != nil {
			return err
		}
	}
	m.UIDMap, m.GIDMap = maps.uid, maps.gid
	return nil
}

// source makes a path of the configuration absolute.
func (p *planner) source(name string) (string, error) {
	if filepath.IsAbs(name) {
		return filepath.Clean(name), nil
	}
	return filepath.Abs(filepath.Join(p.bundle.Dir, name))
}

func (p *planner) note(format string, args ...any) {
	p.plan.Notes = append(p.plan.Notes, fmt.Sprintf(format, args...))
}

// typeOf is the S_IFMT of a file of the host.
func typeOf(file string) (uint32, error) {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return 0, fmt.Errorf("look at %q: %w", file, err)
	}
	return st.Mode & unix.S_IFMT, nil
}

// below says which of tops the path is, or is below.
func below(p string, tops ...string) (string, bool) {
	for _, top := range tops {
		if rest, ok := strings.CutPrefix(p, top); ok && (rest == "" || rest[0] == '/') {
			return top, true
		}
	}
	return "", false
}

package overlay

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/internal/upperdir"
	"github.com/sluicefs/sluice/seccomp"
)

// Name is what mounts name the extension by.
const Name = "overlay"

// PluginBackend is the extension that serves layers of programs, //NAME/DATA/PATH, whose NAME is no extension's.
const PluginBackend = "plugin"

// Extension makes one tree of layers.
type Extension struct{}

// Name implements extensions.Extension.
func (Extension) Name() string { return Name }

// TryHandleMount implements extensions.Extension; it is not asked.
func (Extension) TryHandleMount(*specs.Spec, *specs.Mount, string, bool) (fsbackend.Backend, extensions.Options, error) {
	return nil, extensions.Options{}, nil
}

// given is what the half outside tells the one inside.
type given struct {
	Lowers []lower `json:"lowers"`
	// Upper says that the first two files are an upper directory and its work directory. With Options.ReadOnly it is but shown.
	Upper   bool     `json:"upper,omitempty"`
	Options *Options `json:"options"`
	// Redirect says that directories of lower layers may be renamed.
	Redirect Redirect `json:"redirect"`
}

// lower is one part, as messages name it.
type lower struct {
	Name string `json:"name"`
	Dir  bool   `json:"dir,omitempty"` // it is a directory of the host
}

// outside is the half of one overlay outside the sandbox.
type outside struct {
	*extensions.Outside
	m      extensions.Mount
	o      *Options
	lowers []extensions.Mount
	store  *upperdir.Store
	upper  *upperdir.Upper // nil without
	dirs   []*os.File      // the lower layers, where all of them are directories of the host
}

// readMount returns what m asks for, and its layers, the uppermost first.
func readMount(m extensions.Mount, has func(string) bool) (*Options, []extensions.Mount, error) {
	lowers := m.Lowers
	options, err := Parse(m.Options)
	if err != nil {
		return nil, nil, err
	}
	for _, l := range options.Lowers {
		lowers = append(lowers, mountOf(m, l, has))
	}
	switch {
	case m.Source != "" && m.Source != Name && m.Source != "none":
		return nil, nil, fmt.Errorf("source %s: an overlay has none: expected it as a layer, lowerdir=%s; or for a share, --share dir=%s,overlay=discard,…", m.Source, m.Source, m.Source)
	case len(lowers) == 0:
		return nil, nil, errors.New("lowerdir= is missing: it names at least one layer, DIR[:DIR...] with the uppermost first")
	}
	for _, l := range lowers {
		if l.Backend == extensions.Passthrough && !filepath.IsAbs(l.Source) {
			return nil, nil, fmt.Errorf("layer %q is relative: expected an absolute path of the host, or //NAME/DATA/PATH for a plug-in", l.Source)
		}
	}
	if options.Plugins != nil {
		plugins := "programs=" + joinColons(options.Plugins)
		for i := range lowers {
			if lowers[i].Backend == PluginBackend {
				lowers[i].Options = append(lowers[i].Options, plugins)
			}
		}
	}
	return options, lowers, nil
}

var _ extensions.Checker = Extension{}

// CheckMount implements extensions.Checker.
func (Extension) CheckMount(c *extensions.Checking, m extensions.Mount) error {
	_, lowers, err := readMount(m, c.Has)
	if err != nil {
		return err
	}
	for _, l := range lowers {
		if err := c.Mount(l); err != nil {
			return fmt.Errorf("layer %s: %w", layerName(l), err)
		}
	}
	return nil
}

// OpenOutside implements extensions.Hosted.
func (Extension) OpenOutside(ctx context.Context, out *extensions.Outside, m extensions.Mount) (*extensions.Given, error) {
	options, lowers, err := readMount(m, out.Has)
	if err != nil {
		return nil, err
	}
	for _, note := range options.Notes {
		out.Log.Warn(note)
	}
	o := &outside{Outside: out, m: m, o: options, lowers: lowers}
	g := &extensions.Given{}
	told := given{Options: options, Redirect: options.Redirect}
	for _, l := range lowers {
		p, err := out.Open(ctx, l)
		if err != nil {
			return g, fmt.Errorf("layer %s: %w", layerName(l), err)
		}
		g.Parts = append(g.Parts, p)
		told.Lowers = append(told.Lowers, lower{Name: layerName(l), Dir: l.Backend == extensions.Passthrough})
		o.warnOfMarks(p)
	}
	// That the graft is read-only can change while guests use it, and is seen to above; the option ro is for good.
	if options.hasUpper() {
		if err := o.openUpper(ctx, g); err != nil {
			return g, err
		}
		told.Upper = true
		if options.UpperKind != UpperDir && !hasOption(m.Options, "redirect_dir") {
			told.Redirect = RedirectOn // nobody else reads it
		}
	}
	g.Data, err = json.Marshal(told)
	return g, err
}

// hasOption says whether options have one of this name.
func hasOption(options []string, name string) bool {
	return slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, name+"=") })
}

// mountOf is the layer l of m, to be opened.
func mountOf(m extensions.Mount, l Lower, has func(string) bool) extensions.Mount {
	part := extensions.Mount{Share: m.Share, Path: m.Path, Backend: extensions.Passthrough, Source: l.Dir, ReadOnly: true}
	switch {
	case l.Plugin == "":
	case has(l.Plugin):
		part.Backend = l.Plugin
		if l.Path != "" {
			part.Source = path.Join("/", l.Path) // of the host: //NAME//srv/base is /srv/base
		}
		if l.Data != "" {
			part.Options = []string{"data=" + l.Data}
		}
	default:
		part.Backend, part.Options = PluginBackend, []string{"name=" + l.Plugin, "data=" + l.Data, "path=" + l.Path, "layers=all"}
	}
	return part
}

// layerName is what messages call a layer.
func layerName(m extensions.Mount) string {
	switch {
	case m.Source != "":
		return m.Source
	case len(m.Options) > 0:
		return m.Backend + " " + m.Options[0]
	}
	return m.Backend
}

// openUpper opens what takes the changes, and says what can be done with it.
func (o *outside) openUpper(ctx context.Context, g *extensions.Given) (err error) {
	state := o.o.State
	if state == "" {
		if o.StateDir == "" {
			return errors.New("there is no place for what the guest writes: expected --state-dir, or the option state=DIR")
		}
		state = filepath.Join(o.StateDir, Name)
		if err := os.MkdirAll(o.StateDir, 0o700); err != nil {
			return fmt.Errorf("make the state directory: %w: expected another --state-dir, or the option state=DIR", err)
		}
	}
	if o.store, err = upperdir.Open(state, o.Log); err != nil {
		return err
	}
	o.OnClose(o.store.Close)
	root := o.rootAttr(g)
	switch {
	case o.o.UpperKind == UpperDir:
		if err := o.apart(); err != nil {
			return err
		}
		o.upper, err = o.store.Given(o.o.Upper, o.o.Work)
	case o.o.From != "" && !(o.o.UpperKind == UpperKeep && o.store.HasKept(o.keepName())):
		o.upper, err = o.store.Restore(ctx, o.o.From, o.keepName())
	case o.o.UpperKind == UpperKeep:
		o.upper, _, err = o.store.Keep(o.keepName(), root)
	default:
		o.upper, err = o.store.Discard(root)
	}
	if err != nil {
		return err
	}
	o.OnClose(func() error { return o.upper.Close() })
	if g.Files, err = upperFiles(o.upper); err != nil {
		return err
	}
	if err := o.keepLowers(g); err != nil {
		return err
	}
	o.actions()
	return nil
}

// keepName is the name of an upper that is kept, "" for one that is not: that of the share and the graft, and no two have the same.
func (o *outside) keepName() string {
	if o.o.UpperKind != UpperKeep {
		return ""
	}
	var b strings.Builder
	b.WriteString("share.")
	for _, c := range []byte(o.m.Share + strings.TrimSuffix(o.m.Path, "/")) {
		switch {
		case c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_':
			b.WriteByte(c)
		case c == '/':
			b.WriteByte('.')
		default:
			fmt.Fprintf(&b, "-%02x", c)
		}
	}
	if b.Len() > maxKeepName {
		return fmt.Sprintf("long.%x", sha256.Sum256([]byte(b.String())))
	}
	return b.String()
}

// maxKeepName is how long a name of package upperdir may be.
const maxKeepName = 128

// apart refuses an upper or work directory that is a lower layer, is in one, or has one in it, as the kernel does: what is written would
// change what lies below.
func (o *outside) apart() error {
	type dir struct{ what, path string }
	var given, below []dir
	for _, d := range []dir{{"upperdir", o.o.Upper}, {"workdir", o.o.Work}} {
		given = append(given, dir{d.what + "=" + d.path, real(d.path)})
	}
	for _, l := range o.lowers {
		if l.Backend == extensions.Passthrough {
			below = append(below, dir{"layer " + l.Source, real(l.Source)})
		}
	}
	if within(given[0].path, given[1].path) || within(given[1].path, given[0].path) {
		return fmt.Errorf("%s and %s are in each other: expected two directories beside each other", given[0].what, given[1].what)
	}
	for _, g := range given {
		for _, b := range below {
			if within(g.path, b.path) || within(b.path, g.path) {
				return fmt.Errorf("%s and %s are the same, or in each other: expected a directory of its own for what is written", g.what, b.what)
			}
		}
	}
	return nil
}

// real is path without symbolic links; where it cannot be found out, opening it says why.
func real(path string) string {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		return p
	}
	return filepath.Clean(path)
}

// within says whether path is dir, or below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// rootAttr is what the root is to look like: the uppermost layer's.
func (o *outside) rootAttr(g *extensions.Given) upperdir.Attr {
	var st unix.Stat_t
	if files := g.Parts[0].Given.Files; len(files) != 1 || unix.Fstat(int(files[0].Fd()), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return upperdir.Attr{}
	}
	return upperdir.Attr{Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid}
}

func upperFiles(u *upperdir.Upper) ([]*os.File, error) {
	dir, err := u.Dir()
	if err != nil {
		return nil, err
	}
	work, err := u.Work()
	if err != nil {
		_ = dir.Close()
		return nil, err
	}
	return []*os.File{dir, work}, nil
}

// keepLowers keeps the lower layers to be compared with, where all are directories.
func (o *outside) keepLowers(g *extensions.Given) error {
	for _, p := range g.Parts {
		if p.Mount.Backend != extensions.Passthrough {
			return nil
		}
	}
	for _, p := range g.Parts {
		fd, err := unix.FcntlInt(p.Given.Files[0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		dir := os.NewFile(uintptr(fd), p.Mount.Source)
		o.OnClose(dir.Close)
		o.dirs = append(o.dirs, dir)
	}
	return nil
}

// SeccompRules implements extensions.Extension: all that it does is done by the layers' backends, and by passthrough.
func (Extension) SeccompRules() seccomp.Rules { return rules }

// rules are what an overlay needs beyond passthrough: to share blocks when it copies a file up.
var rules = seccomp.Rules{"ioctl": seccomp.PerArg{1: seccomp.Int32(unix.FICLONE)}}

// rootsMarks begin the names of marks that only a process with CAP_SYS_ADMIN sees.
const rootsMarks = "trusted.overlay."

// maxMarked is in how many directories of a layer marks are looked for.
const maxMarked = 1000

// warnOfMarks warns of a layer with marks that the other half may not see. Its root and the directories there are looked at: to look
// through all of it would take too long.
func (o *outside) warnOfMarks(p extensions.Part) {
	if p.Mount.Backend != extensions.Passthrough || len(p.Given.Files) != 1 {
		return
	}
	layer := p.Given.Files[0]
	at := fmt.Sprintf("/proc/self/fd/%d", layer.Fd())
	entries, err := os.ReadDir(at)
	if err != nil {
		return // which is for who serves it to tell
	}
	found := hasRootsMark(at + "/.")
	for i := 0; i < min(len(entries), maxMarked) && !found; i++ {
		found = entries[i].IsDir() && hasRootsMark(at+"/"+entries[i].Name())
	}
	if found {
		o.Log.Warn("a layer has marks "+rootsMarks+"*, as the kernel's overlayfs makes them for root; unless the daemon has --modcaps +sys_admin, they are not seen, and what they hide shows",
			"layer", p.Mount.Source)
	}
}

func hasRootsMark(path string) bool {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	return err == nil && strings.Contains("\x00"+string(buf[:n]), "\x00"+rootsMarks)
}

// joinColons is what plugins.Split takes apart.
func joinColons(list []string) string {
	escaped := make([]string, len(list))
	for i, s := range list {
		escaped[i] = strings.NewReplacer(`\`, `\\`, ":", `\:`).Replace(s)
	}
	return strings.Join(escaped, ":")
}

package overlay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/overlay"
	"github.com/sluicefs/sluice/fsbackend/passthrough"
	"github.com/sluicefs/sluice/internal/sys"
)

// inside is the half of one overlay in the sandbox.
type inside struct {
	*extensions.Inside
	fs     *overlay.FS
	lowers []fsbackend.Backend
	// below is the only lower layer, if there is but one.
	below *fsbackend.Resolved
}

// OpenInside implements extensions.Hosted.
func (Extension) OpenInside(in *extensions.Inside, m extensions.Mount, g *extensions.Given) (_ fsbackend.Backend, options extensions.Options, err error) {
	i := &inside{Inside: in}
	defer func() {
		for _, f := range g.Files {
			_ = f.Close() // passthrough has its own
		}
		if err != nil {
			g.Close()
			for _, b := range i.lowers {
				err = errors.Join(err, b.Close())
			}
		}
	}()
	var told given
	if err := json.Unmarshal(g.Data, &told); err != nil {
		return nil, options, err
	}
	o := told.Options
	cfg := overlay.Config{
		UIDMap: idMap(o.UIDs), GIDMap: idMap(o.GIDs), SquashToUID: o.SquashUID, SquashToGID: o.SquashGID, StaticNlink: o.StaticNlink,
		NoACL: o.NoACL, Volatile: o.NoFsync || o.UpperKind == UpperDiscard, MaxInodes: in.MaxInodes, Log: in.Log,
		RedirectDir: map[Redirect]overlay.RedirectDir{
			RedirectOn: overlay.RedirectOn, RedirectFollow: overlay.RedirectFollow, RedirectNone: overlay.RedirectOff,
		}[told.Redirect],
		Xino: map[XIno]overlay.Xino{XInoAuto: overlay.XinoAuto, XInoOn: overlay.XinoOn, XInoOff: overlay.XinoOff}[o.XIno],
	}
	if options, err = i.openLowers(&cfg, g, told.Lowers); err != nil {
		return nil, options, err
	}
	if len(i.lowers) == 1 {
		i.below = fsbackend.Resolve(i.lowers[0])
	}
	if told.Upper {
		options.Timeout = longer(options.Timeout, upperTimeout)
		upper, err := i.upper(g.Files)
		if err != nil {
			return nil, options, err
		}
		if o.ReadOnly {
			i.lowers = append(i.lowers, upper)
			cfg.Lowers = slices.Insert(cfg.Lowers, 0, overlay.Layer{Backend: upper, Name: "upper directory", StableIno: true})
		} else {
			cfg.Upper, cfg.Format = upper, i.format(o, g.Files[1])
		}
	}
	i.lowers = nil // they are New's
	if i.fs, err = overlay.New(cfg); err != nil {
		if told.Upper && errors.Is(err, unix.EACCES) {
			err = fmt.Errorf("%w: expected an upper directory that who serves may write to; the files of an ordinary user are not those of --uid-map and --gid-map: leave these out, or run the daemon as root", err)
		}
		return nil, options, err
	}
	in.OnTell(i.told)
	return i.fs, options, nil
}

// upperTimeout is how long a call may take in an overlay that is isolated for its lower layers' sake: the upper one's disk may be slow.
const upperTimeout = 5 * time.Minute

// openLowers opens the layers, and says how calls of all of them together are to be made.
func (i *inside) openLowers(cfg *overlay.Config, g *extensions.Given, names []lower) (extensions.Options, error) {
	all := extensions.Options{Stock: true, Inline: true}
	if len(names) != len(g.Parts) {
		return all, fmt.Errorf("%d layers with %d names", len(g.Parts), len(names))
	}
	for n, p := range g.Parts {
		b, o, err := i.Open(p)
		if err != nil {
			return all, fmt.Errorf("layer %s: %w", names[n].Name, err)
		}
		if !o.Stock {
			all.Stock = false
			all.Inline = all.Inline && o.Inline
			all.Timeout = longer(all.Timeout, o.Timeout)
		}
		layers := []fsbackend.Backend{b}
		if l, ok := b.(extensions.Layered); ok {
			layers = l.Layers()
		}
		for _, b := range layers {
			i.lowers = append(i.lowers, b)
			layer := overlay.Layer{Backend: b, Name: names[n].Name, StableIno: true}
			if a, ok := b.(interface{ ACL() bool }); ok {
				layer.NoACL = !a.ACL()
			}
			cfg.Lowers = append(cfg.Lowers, layer)
		}
	}
	return all, nil
}

// longer is which of two extensions.Options.Timeout is the longer one.
func longer(a, b time.Duration) time.Duration {
	for _, d := range []*time.Duration{&a, &b} {
		if *d == 0 {
			*d = extensions.DefaultTimeout
		}
	}
	if a == extensions.NoTimeout || b == extensions.NoTimeout {
		return extensions.NoTimeout
	}
	return max(a, b)
}

func idMap(ranges []IDRange) (m overlay.IDMap) {
	for _, r := range ranges {
		m = append(m, overlay.IDRange{Guest: r.Shown, Host: r.Stored, Count: r.Count})
	}
	return m
}

// upper serves an upper directory and its work directory, whose descriptors stay the caller's.
func (i *inside) upper(files []*os.File) (fsbackend.Backend, error) {
	if len(files) != 2 {
		return nil, fmt.Errorf("%d descriptors for an upper directory: expected it and its work directory", len(files))
	}
	return passthrough.New(passthrough.Config{
		Dir: files[0].Name(), DirFD: int(files[0].Fd()), WorkDirFD: int(files[1].Fd()), ProcFD: i.ProcFD,
		MaxFDs: i.MaxFDs, MaxInodes: i.MaxInodes, NoFileHandles: i.NoFileHandles, Log: i.Log,
	})
}

// format is the kind of marks that are written: the kernel's own where somebody else may mount the upper directory, and they can be
// made. work is a directory in which that can be tried.
func (i *inside) format(o *Options, work *os.File) overlay.Format {
	if o.UpperKind != UpperDir || o.UserXattr {
		return overlay.FormatUser
	}
	x, name := sys.NewProcXattr(i.ProcFD), []byte(rootsMarks+"sluice\x00")
	if x.Set(int(work.Fd()), &name[0], []byte("y"), 0) == 0 && x.Remove(int(work.Fd()), &name[0]) == 0 {
		return overlay.FormatTrusted
	}
	i.Log.Info("marks in the upper directory are user.overlay.*: mount it with -o userxattr; for those of root's overlays, run the daemon with --modcaps +sys_admin")
	return overlay.FormatUser
}

// told does what the half outside says.
func (i *inside) told(method string, arg json.RawMessage, files []*os.File) (any, error) {
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	switch method {
	case tellFreeze:
		return nil, i.freeze()
	case tellThaw:
		return nil, i.fs.Thaw()
	case tellReplace:
		upper, err := i.upper(files)
		if err != nil {
			return nil, err
		}
		return nil, i.fs.ReplaceUpper(upper)
	case tellTree:
		return i.tree(arg)
	}
	return nil, fmt.Errorf("%q is nothing that an overlay does", method)
}

// freezePatience is how long changes that have begun may take to end.
const freezePatience = 20 * time.Second

func (i *inside) freeze() error {
	ctx, cancel := context.WithTimeout(context.Background(), freezePatience)
	defer cancel()
	return i.fs.Freeze(ctx)
}

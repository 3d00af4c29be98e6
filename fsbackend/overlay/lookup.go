package overlay

import (
	"bytes"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// checkName refuses what the guest may not have as a name: whiteouts would be taken for one's own.
func checkName(name fsbackend.Name) errno {
	switch {
	case len(name) == 0:
		return unix.ENOENT
	case len(name) > unix.NAME_MAX:
		return unix.ENAMETOOLONG
	case bytes.HasPrefix(name, []byte(whPrefix)), bytes.IndexByte(name, '/') >= 0, string(name) == ".", string(name) == "..":
		return unix.EINVAL
	}
	return 0
}

// lookup finds name in a layer's directory: what is not there is ENOENT.
func (l *layer) lookup(c *fsbackend.Context, dir uint64, name fsbackend.Name, out *fuseproto.EntryOut) errno {
	if !l.may(c) {
		return fsbackend.ErrMayBlock
	}
	e := l.r.Lookup(c, dir, name, out)
	if e == 0 && out.NodeId == 0 || e == unix.ENAMETOOLONG {
		return unix.ENOENT
	}
	return e
}

// isWhiteout says whether a file of a layer says that there is none (fs/overlayfs/overlayfs.h, WHITEOUT_DEV).
func isWhiteout(a *fuseproto.Attr) bool {
	return a.Mode&unix.S_IFMT == unix.S_IFCHR && a.Rdev == 0
}

// Lookup implements fsbackend.Backend.
func (fs *FS) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	epoch := fs.epoch.Load()
	p, e := fs.directory(parent)
	if e != 0 {
		return e
	}
	if e := checkName(name); e != 0 {
		return e
	}
	if e := p.rlock(c); e != 0 {
		return e
	}
	defer p.runlock()
	if p.gone.Load() {
		return unix.ENOENT
	}
	var f found
	if e := fs.find(c, p, name, &f); e != 0 {
		return e
	}
	_, e = fs.enter(epoch, p, name, &f, out)
	return e
}

// find fills f with what name in p is: ENOENT if that is nothing, and f says whether there is a whiteout. p's lock is held.
func (fs *FS) find(c *fsbackend.Context, p *node, name fsbackend.Name, f *found) errno {
	return fs.findFrom(c, p, 0, name, nil, f)
}

// findFrom is find without the parts above the one with number first. given is what a lookup in that one has found, if it is not nil.
func (fs *FS) findFrom(c *fsbackend.Context, p *node, first int, name fsbackend.Name, given *fuseproto.EntryOut, f *found) errno {
	*f = found{}
	f.lowers = f.room[:0]
	e := fs.search(c, p, first, name, given, f)
	if e == 0 && !f.exists() {
		e = unix.ENOENT
	}
	if e != 0 {
		fs.release(f)
	}
	return e
}

// search goes through p's parts from the uppermost down.
func (fs *FS) search(c *fsbackend.Context, p *node, first int, name fsbackend.Name, given *fuseproto.EntryOut, f *found) errno {
	cur := name
	for i := first; i <= len(p.lowers); i++ {
		dir, ok := p.part(fs, i)
		if !ok {
			continue
		}
		last := i == len(p.lowers)
		var out fuseproto.EntryOut
		e := errno(0)
		if i == first && given != nil {
			out = *given
		} else if e = fs.mayHave(c, p, i, cur); e == 0 {
			e = dir.l.lookup(c, dir.node, cur, &out)
		}
		if e != 0 && e != unix.ENOENT {
			return e
		}
		if e == unix.ENOENT {
			p.missed(i)
			if last {
				return 0
			}
			hidden, e := fs.hidden(c, p, i, cur)
			if e != 0 || hidden {
				return e
			}
			continue
		}
		if i == 0 {
			if n := fs.holdUpper(out.NodeId, out.Mode&unix.S_IFMT); n != nil {
				f.attr, f.upper, f.ino, f.node = out.Attr, out.NodeId, n.ino.Load(), n
				return 0
			}
		}
		impure, e := fs.impure(c, p, i)
		if e != 0 {
			dir.l.r.Forget(out.NodeId, 1)
			return e
		}
		redirect, goOn, e := fs.take(c, dir, cur, &out, !last, impure, f)
		if e != 0 || !goOn {
			return e
		}
		if redirect == "" {
			if below, e := fs.below(c, p, i+1, cur); e != 0 || below == belowNothing {
				return e
			}
		}
		if opaque, e := fs.hasFile(c, real{dir.l, out.NodeId}, opaqueFile); e != 0 || opaque {
			return e
		}
		// A file beside it with its name says as much as an opaque mark.
		if hidden, e := fs.hidden(c, p, i, cur); e != 0 || hidden {
			return e
		}
		switch {
		case redirect == "":
		case redirect[0] == '/':
			return fs.searchFromRoot(c, dir.l.index, redirect, f)
		default:
			cur = fsbackend.MakeName(redirect)
		}
	}
	return 0
}

// take adds what a lookup has found in a layer to f, and says whether the layers below count as well, and where in them: if there
// is no opaqueFile in it. more says that the parent directory has more parts; impure that it may have files with marks.
func (fs *FS) take(c *fsbackend.Context, dir real, name fsbackend.Name, out *fuseproto.EntryOut, more, impure bool, f *found) (redirect string, goOn bool, e errno) {
	l := dir.l
	isDir := out.Mode&unix.S_IFMT == unix.S_IFDIR
	if isWhiteout(&out.Attr) {
		l.r.Forget(out.NodeId, 1)
		f.whiteout = f.whiteout || l == fs.upper && !f.exists()
		return "", false, 0
	}
	if f.exists() && !isDir {
		l.r.Forget(out.NodeId, 1) // what is below a file, or a directory above a file
		return "", false, 0
	}
	var m marks
	looked := impure || isDir && !l.bottom && more
	if looked {
		if m, e = fs.marks(c, l, out.NodeId); e != 0 {
			l.r.Forget(out.NodeId, 1)
			return "", false, e
		}
	}
	if m.whiteout && out.Mode&unix.S_IFMT == unix.S_IFREG && out.Size == 0 {
		l.r.Forget(out.NodeId, 1)
		return "", false, 0
	}
	if m.metacopy && out.Mode&unix.S_IFMT == unix.S_IFREG {
		l.r.Forget(out.NodeId, 1)
		fs.metacopy.Do(func() {
			fs.log.Error("a file of a layer has its data elsewhere (metacopy=on): it is EIO; make the layer anew without", "layer", l.name, "name", name.String())
		})
		return "", false, unix.EIO
	}
	if !f.exists() {
		f.attr = out.Attr
		f.ino = l.ino(out.Ino)
		if l == fs.upper && m.ino != 0 && !isDir {
			f.ino = m.ino
		}
	} else if f.upper != 0 && len(f.lowers) == 0 {
		f.ino = l.ino(out.Ino) // a directory that was copied up keeps the number that it had
	}
	if l == fs.upper {
		f.upper = out.NodeId
		f.redirect, f.origin = m.redirect, m.origin
		if looked {
			f.impure = impureOf(m)
		}
	} else {
		f.lowers = append(f.lowers, real{l, out.NodeId})
	}
	if !isDir || l.bottom || m.opaque {
		return "", false, 0
	}
	if fs.cfg.RedirectDir != RedirectOff {
		redirect = m.redirect
	}
	if !validRedirect(redirect) {
		return "", false, unix.EIO
	}
	return redirect, more || redirect != "", 0
}

// maxRedirect is the longest redirect mark (fs/overlayfs/super.c, redirect_max).
const maxRedirect = 4096

// validRedirect says whether a mark can lead anywhere: "", a name, or a path from the root (fs/overlayfs/namei.c,
// ovl_check_redirect).
func validRedirect(r string) bool {
	if r == "" {
		return true
	}
	if len(r) > maxRedirect || strings.IndexByte(r, 0) >= 0 {
		return false
	}
	if r[0] != '/' {
		return !strings.Contains(r, "/") && validComponent(r)
	}
	for name := range strings.SplitSeq(r[1:], "/") {
		if !validComponent(name) {
			return false
		}
	}
	return true
}

func validComponent(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= unix.NAME_MAX
}

// searchFromRoot goes on at path, from the root, in the layers below the one with index above.
func (fs *FS) searchFromRoot(c *fsbackend.Context, above int, path string, f *found) errno {
	for _, l := range fs.layers[above+1:] {
		next, goOn, e := fs.walk(c, l, path, f)
		if e != 0 || !goOn {
			return e
		}
		path = next
	}
	return 0
}

// walk adds the directory at path in layer l to f, if it has one there, and returns the path to go on with below: marks on the way
// change it (fs/overlayfs/namei.c, ovl_lookup_layer).
func (fs *FS) walk(c *fsbackend.Context, l *layer, path string, f *found) (below string, goOn bool, e errno) {
	names := strings.Split(path[1:], "/")
	dir, opaque := real{l, l.root}, false
	defer func() {
		if dir.node != l.root {
			dir.forget()
		}
	}()
	for i, name := range names {
		cur := fsbackend.MakeName(name)
		if !l.bottom {
			hidden, e := fs.hasFile(c, dir, fsbackend.MakeName(whPrefix+name))
			if e != 0 || hidden {
				return "", false, e
			}
		}
		var out fuseproto.EntryOut
		switch e := l.lookup(c, dir.node, cur, &out); e {
		case 0:
		case unix.ENOENT:
			return below + "/" + strings.Join(names[i:], "/"), !opaque, 0
		default:
			return "", false, e
		}
		if i == len(names)-1 {
			redirect, goOn, e := fs.take(c, dir, cur, &out, true, true, f)
			if e == 0 && goOn {
				var marked bool
				marked, e = fs.hasFile(c, real{l, out.NodeId}, opaqueFile)
				opaque = opaque || marked
			}
			return extend(below, name, redirect), goOn && !opaque, e
		}
		if dir.node != l.root {
			dir.forget()
		}
		dir.node = out.NodeId
		if out.Mode&unix.S_IFMT != unix.S_IFDIR {
			return "", false, 0
		}
		var m marks
		if !l.bottom {
			if m, e = fs.marks(c, l, out.NodeId); e != 0 {
				return "", false, e
			}
		}
		opaque = opaque || m.opaque
		below = extend(below, name, m.redirect)
	}
	return below, !opaque, 0
}

// extend is the path of name in path, which redirect says otherwise of.
func extend(path, name, redirect string) string {
	switch {
	case redirect == "" || !validRedirect(redirect):
		return path + "/" + name
	case redirect[0] == '/':
		return redirect
	}
	return path + "/" + redirect
}

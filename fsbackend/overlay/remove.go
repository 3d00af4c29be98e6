package overlay

import (
	"bytes"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// there is what name in p is, as a call needs it that takes the name away. Its lookups are given back by the caller.
type there struct {
	found
	node *node // if it is known
}

// look finds out what name in p is. Of a file that is known nothing is asked. p's lock is held.
func (fs *FS) look(c *fsbackend.Context, p *node, name fsbackend.Name, t *there) errno {
	t.node = fs.at(p, name)
	if n := t.node; n != nil && n.dir == nil {
		t.attr.Mode = n.typ
		if t.below = belowSomething; n.upper.Load() != 0 {
			t.below = fs.knownBelow(n)
		}
		return 0
	}
	return fs.find(c, p, name, &t.found)
}

// inUpper says whether what look has found is in the upper layer.
func (t *there) inUpper() bool {
	return t.upper != 0 || t.node != nil && t.node.upper.Load() != 0
}

// hidesBelow says whether a lower layer has something of the name, which would come to light without what is in the upper one.
func (fs *FS) hidesBelow(c *fsbackend.Context, p *node, name fsbackend.Name, t *there) (bool, errno) {
	if len(p.lowers) == 0 || t.below == belowNothing {
		return false, 0
	}
	if !t.inUpper() || t.below == belowSomething || len(t.lowers) > 0 && t.redirect == "" {
		return true, 0
	}
	return fs.isBelow(c, p, name)
}

// isBelow says whether a lower layer has something of the name: what name would be without what the upper one has there.
func (fs *FS) isBelow(c *fsbackend.Context, p *node, name fsbackend.Name) (bool, errno) {
	if below, e := fs.below(c, p, 1, name); e != 0 || below != belowUnknown {
		return below == belowSomething, e
	}
	var f found
	switch e := fs.findFrom(c, p, 1, name, nil, &f); e {
	case 0:
		fs.release(&f)
		return true, 0
	case unix.ENOENT:
		return false, 0
	default:
		return false, e
	}
}

// Unlink implements fsbackend.Remover.
func (fs *FS) Unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	p, e := fs.changeIn(c, parent, name, expectFile)
	if e != 0 {
		return e
	}
	defer fs.doneIn(c, p)
	if len(p.lowers) == 0 {
		if e = fs.upper.r.Unlink(c, p.upper.Load(), name); e == 0 {
			fs.removed(p, name)
		}
		return e
	}
	var t there
	if e := fs.look(c, p, name, &t); e != 0 {
		return e
	}
	defer fs.release(&t.found)
	if t.isDir() {
		return unix.EISDIR
	}
	below, e := fs.hidesBelow(c, p, name, &t)
	if e != 0 {
		return e
	}
	if below {
		if !c.MayBlock {
			return fsbackend.ErrMayBlock
		}
		e = fs.whiteout(own(c), p, name, t.inUpper())
	} else {
		e = fs.upper.r.Unlink(c, p.upper.Load(), name)
	}
	if e == 0 {
		fs.removed(p, name)
	}
	return e
}

// whiteout hides what the lower layers have as name in p; replace says that there is a file of the upper layer, which goes in the
// same step. p's lock is held.
func (fs *FS) whiteout(c *fsbackend.Context, p *node, name fsbackend.Name, replace bool) errno {
	r, up := fs.upper.r, p.upper.Load()
	if !fs.noMknod.Load() {
		at, dir := name, up
		if replace {
			at, dir = fs.tempName(), fs.work
		}
		e := fs.makeDevice(c, dir, at)
		if e == 0 && replace {
			in := fuseproto.Rename2In{InHeader: header(dir), Newdir: up}
			if e = r.Rename(c, &in, at, name); e != 0 {
				_ = r.Unlink(c, dir, at)
			}
		}
		if !fs.noDevices(e) {
			return e
		}
	}
	if e := fs.hideByFile(c, p, name); e != 0 {
		return e
	}
	if !replace {
		return 0
	}
	e := r.Unlink(c, up, name)
	if e != 0 {
		_ = fs.unhide(c, p, name)
	}
	return e
}

// makeDevice makes a whiteout.
func (fs *FS) makeDevice(c *fsbackend.Context, dir uint64, name fsbackend.Name) errno {
	in := fuseproto.MknodIn{InHeader: header(dir), Mode: unix.S_IFCHR}
	var out fuseproto.EntryOut
	e := fs.upper.r.Mknod(c, &in, name, &out)
	if e == 0 {
		fs.upper.r.Forget(out.NodeId, 1)
	}
	return e
}

// noDevices says whether e is that the upper layer cannot have whiteouts that are devices, and remembers it.
func (fs *FS) noDevices(e errno) bool {
	switch e {
	case unix.EPERM, unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL:
		fs.noMknod.Store(true)
		return true
	}
	return false
}

// hideByFile makes the file .wh.NAME.
func (fs *FS) hideByFile(c *fsbackend.Context, p *node, name fsbackend.Name) errno {
	if len(name) > unix.NAME_MAX-len(whPrefix) {
		return unix.ENAMETOOLONG
	}
	e := fs.makeFile(c, p.upper.Load(), fsbackend.MakeName(whPrefix+string(name)))
	if e == 0 {
		p.hide(name, true)
	}
	return e
}

// Rmdir implements fsbackend.Remover.
func (fs *FS) Rmdir(c *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	p, e := fs.changeIn(c, parent, name, expectEmptyDir)
	if e != 0 {
		return e
	}
	defer fs.doneIn(c, p)
	if e, done := fs.rmdirOwn(c, p, name); done {
		return e
	}
	var t there
	if e := fs.find(c, p, name, &t.found); e != 0 {
		return e
	}
	defer fs.release(&t.found)
	if !t.isDir() {
		return unix.ENOTDIR
	}
	child, e := fs.childDir(c, p, name, &t.found)
	if e != 0 {
		return e
	}
	defer fs.Forget(child.id, 1)
	if !child.dir.mu.TryLock() {
		// Its lock comes after p's here, and before it elsewhere.
		return fs.rmdirBoth(c, p, child, name)
	}
	defer child.unlock()
	return fs.rmdir(c, p, child, name)
}

// rmdirOwn removes a directory that only the upper layer has, and says whether it was one and empty there, too.
func (fs *FS) rmdirOwn(c *fsbackend.Context, p *node, name fsbackend.Name) (errno, bool) {
	child := fs.at(p, name)
	if len(p.lowers) > 0 {
		if child == nil || child.dir == nil || child.upper.Load() == 0 {
			return 0, false
		}
		if fs.knownBelow(child) != belowNothing {
			if below, e := fs.isBelow(c, p, name); e != 0 || below {
				return e, e != 0
			}
		}
	}
	if child == nil {
		// One that was moved here may have parts in lower layers.
		if impure, e := fs.impure(c, p, 0); e != 0 || impure {
			return e, e != 0
		}
	} else if len(child.lowers) > 0 {
		return 0, false
	}
	e := fs.upper.r.Rmdir(c, p.upper.Load(), name)
	if e == 0 {
		fs.removed(p, name)
	}
	// It may have nothing but whiteouts in it.
	return e, e != unix.ENOTEMPTY && e != unix.EEXIST
}

// childDir returns the node of a directory that has been found as name in p, with a lookup counted, which is the caller's.
func (fs *FS) childDir(c *fsbackend.Context, p *node, name fsbackend.Name, f *found) (*node, errno) {
	var out fuseproto.EntryOut
	return fs.enter(fs.epoch.Load(), p, name, f, &out)
}

// rmdirBoth is rmdir where the directory is locked: both locks are taken in their order. p's lock is held, and still when it
// returns.
func (fs *FS) rmdirBoth(c *fsbackend.Context, p, child *node, name fsbackend.Name) errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	p.unlock()
	lockBoth(p, child)
	defer child.unlock()
	if fs.at(p, name) != child {
		return unix.ENOENT // somebody was faster
	}
	return fs.rmdir(c, p, child, name)
}

// rmdir removes a directory that may have whiteouts in it, or parts in lower layers. p and child are locked.
func (fs *FS) rmdir(c *fsbackend.Context, p, child *node, name fsbackend.Name) errno {
	empty, e := fs.empty(c, child)
	if e != 0 {
		return e
	}
	if !empty {
		return unix.ENOTEMPTY
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	c = own(c)
	below, e := fs.isBelow(c, p, name)
	if e != 0 {
		return e
	}
	switch {
	case child.upper.Load() == 0:
		e = fs.whiteout(c, p, name, false)
	case below:
		e = fs.whiteoutDir(c, p, name)
	default:
		e = fs.moveOut(c, p.upper.Load(), name, 0)
	}
	if e != 0 {
		return e
	}
	child.gone.Store(true)
	fs.removed(p, name)
	return 0
}

// whiteoutDir puts a whiteout in the place of a directory of the upper layer in which nothing is to be seen.
func (fs *FS) whiteoutDir(c *fsbackend.Context, p *node, name fsbackend.Name) errno {
	up := p.upper.Load()
	if !fs.noMknod.Load() {
		e := fs.moveOut(c, up, name, unix.RENAME_WHITEOUT)
		if !fs.noDevices(e) {
			return e
		}
	}
	if e := fs.hideByFile(c, p, name); e != 0 {
		return e
	}
	e := fs.moveOut(c, up, name, 0)
	if e != 0 {
		_ = fs.unhide(c, p, name)
	}
	return e
}

// moveOut takes a directory with nothing but whiteouts in it out of the tree, in one step, and removes it. flags may leave a
// whiteout in its place.
func (fs *FS) moveOut(c *fsbackend.Context, dir uint64, name fsbackend.Name, flags uint32) errno {
	temp := fs.tempName()
	in := fuseproto.Rename2In{InHeader: header(dir), Newdir: fs.work, Flags: flags}
	r := fs.upper.r
	if e := r.Rename(c, &in, name, temp); e != 0 {
		return e
	}
	var out fuseproto.EntryOut
	e := fs.upper.lookup(c, fs.work, temp, &out)
	if e == 0 {
		if e = fs.clearOut(c, out.NodeId); e == 0 {
			e = r.Rmdir(c, fs.work, temp)
		}
		r.Forget(out.NodeId, 1)
	}
	if e != 0 {
		fs.log.Warn("a removed directory stays in the work directory", "name", temp.String(), "error", e)
	}
	return 0
}

// clearOut removes the whiteouts in a directory that is in the work directory.
func (fs *FS) clearOut(c *fsbackend.Context, dir uint64) errno {
	var names []string
	if e := fs.each(c, real{fs.upper, dir}, func(d *dirent) bool {
		if d.typ == unix.DT_CHR || d.typ == unix.DT_UNKNOWN || bytes.HasPrefix(d.name, []byte(whPrefix)) {
			names = append(names, string(d.name))
		}
		return true
	}); e != 0 {
		return e
	}
	for _, name := range names {
		if e := fs.upper.r.Unlink(c, dir, fsbackend.MakeName(name)); e != 0 && e != unix.ENOENT {
			return e
		}
	}
	return 0
}

package overlay

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// rename is a RENAME on its way.
type rename struct {
	from, to         *node
	oldName, newName fsbackend.Name
	flags            uint32
	// moves says that renameMu is held, also that this directory is locked, of which there is a lookup: what a first attempt has found
	// to be necessary.
	moves bool
	also  *node
	// copy is to be copied up before the next attempt. It has a lookup.
	copy *node
}

// errAgain never leaves this package: the rename is to be tried again, with what it has asked for.
const errAgain errno = 1<<20 + 2

// Rename implements fsbackend.Renamer.
func (fs *FS) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) fsbackend.Errno {
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 || in.Flags == unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE {
		return unix.EINVAL // RENAME_WHITEOUT too: nobody would see it (fs/overlayfs/dir.c, ovl_rename)
	}
	r := rename{oldName: oldName, newName: newName, flags: in.Flags}
	var e errno
	if r.from, e = fs.directory(in.NodeId); e != 0 {
		return e
	}
	if r.to, e = fs.directory(in.Newdir); e != 0 {
		return e
	}
	if e = checkName(oldName); e != 0 {
		return e
	}
	if e = checkName(newName); e != 0 {
		return e
	}
	if e = fs.begin(c); e != 0 {
		return e
	}
	defer fs.end(c)
	defer func() {
		if r.also != nil {
			fs.Forget(r.also.id, 1)
		}
	}()
	for range 32 {
		if e = fs.tryRename(c, &r); e != errAgain {
			return e
		}
		if r.copy != nil {
			e = fs.copyUp(c, r.copy, wholeFile)
			fs.Forget(r.copy.id, 1)
			if r.copy = nil; e != 0 {
				return e
			}
		}
	}
	return unix.EBUSY // others change the same all the time
}

// tryRename locks what there is to lock.
func (fs *FS) tryRename(c *fsbackend.Context, r *rename) errno {
	if r.moves {
		if c.MayBlock {
			fs.renameMu.Lock()
		} else if !fs.renameMu.TryLock() {
			return fsbackend.ErrMayBlock
		}
		defer fs.renameMu.Unlock()
	}
	dirs := []*node{r.from}
	for _, n := range []*node{r.to, r.also} {
		if n != nil && !slices.Contains(dirs, n) {
			dirs = append(dirs, n)
		}
	}
	slices.SortFunc(dirs, func(a, b *node) int {
		if a.id < b.id {
			return -1
		}
		return 1
	})
	for i, n := range dirs {
		if e := n.lock(c); e != 0 {
			for _, n := range dirs[:i] {
				n.unlock()
			}
			return e
		}
	}
	defer func() {
		for _, n := range dirs {
			n.unlock()
		}
	}()
	if r.from.gone.Load() || r.to.gone.Load() {
		return unix.ENOENT
	}
	if e, done := fs.renamePure(c, r); done {
		return e
	}
	return fs.renameMerged(c, r)
}

// renamePure renames where nothing is below either name, and what moves is the upper layer's alone: one call. It says whether that was
// so.
func (fs *FS) renamePure(c *fsbackend.Context, r *rename) (errno, bool) {
	if r.flags&unix.RENAME_EXCHANGE != 0 {
		return 0, false
	}
	n, target := fs.at(r.from, r.oldName), fs.at(r.to, r.newName)
	merged := len(r.from.lowers) > 0 || len(r.to.lowers) > 0
	switch {
	case n == nil || n.upper.Load() == 0 || len(n.lowers) > 0 || r.to.upper.Load() == 0:
		return 0, false
	case merged && n.dir != nil: // it may have to be marked
		return 0, false
	case r.from != r.to && n.marked() && r.to.dir.parts[0].impure.Load() != impureYes:
		return 0, false
	case target != nil && (target.dir != nil || target.upper.Load() == 0):
		return 0, false
	}
	if merged && fs.knownBelow(n) != belowNothing {
		if below, e := fs.below(c, r.from, 1, r.oldName); e != 0 || below != belowNothing {
			return e, e != 0
		}
	}
	below := uint32(belowNothing)
	switch {
	case target != nil:
		below = fs.knownBelow(target)
	case merged: // a directory in the upper layer is no file's to replace
		var e errno
		if below, e = fs.below(c, r.to, 1, r.newName); e != 0 || below != belowNothing {
			return e, e != 0
		}
	default:
		if impure, e := fs.impure(c, r.to, 0); e != 0 || impure {
			return e, e != 0
		}
	}
	switch e := fs.renameUpper(c, r, r.flags); e {
	case 0:
		fs.renamed(r)
		fs.noteBelow(n, below)
		return 0, true
	case unix.ENOTEMPTY, unix.EEXIST, unix.ENOTDIR, unix.EISDIR:
		return 0, false // the other may be a whiteout, or have nothing else in it
	default:
		return e, true
	}
}

// renameUpper renames in the upper layer.
func (fs *FS) renameUpper(c *fsbackend.Context, r *rename, flags uint32) errno {
	in := fuseproto.Rename2In{InHeader: header(r.from.upper.Load()), Newdir: r.to.upper.Load(), Flags: flags}
	return fs.upper.r.Rename(c, &in, r.oldName, r.newName)
}

// name is one of the two names of a rename: what it leads to, with a lookup, nil if nothing.
type name struct {
	n        *node
	whiteout bool // the upper layer has a device there
}

// resolve finds out what name in p is. p is locked.
func (fs *FS) resolve(c *fsbackend.Context, p *node, cname fsbackend.Name) (x name, e errno) {
	if n := fs.at(p, cname); n != nil && n.upper.Load() != 0 {
		fs.mu.Lock()
		if !n.dead {
			n.count()
			x.n = n
		}
		fs.mu.Unlock()
		if x.n != nil {
			return x, 0
		}
	}
	var f found
	e = fs.find(c, p, cname, &f)
	if e == unix.ENOENT {
		return name{whiteout: f.whiteout}, 0
	}
	if e == 0 {
		var out fuseproto.EntryOut
		x.n, e = fs.enter(fs.epoch.Load(), p, cname, &f, &out)
	}
	return x, e
}

// hold counts a lookup of n.
func (fs *FS) hold(n *node) {
	fs.mu.Lock()
	n.count()
	fs.mu.Unlock()
}

func (fs *FS) put(x *name) {
	if x.n != nil {
		fs.Forget(x.n.id, 1)
	}
}

// renameMerged renames in all other cases. Its checks come in the order of do_renameat2 and vfs_rename in Linux fs/namei.c, and
// ovl_rename in fs/overlayfs/dir.c.
func (fs *FS) renameMerged(c *fsbackend.Context, r *rename) errno {
	src, e := fs.resolve(c, r.from, r.oldName)
	if e != 0 {
		return e
	}
	defer fs.put(&src)
	dst, e := fs.resolve(c, r.to, r.newName)
	if e != 0 {
		return e
	}
	defer fs.put(&dst)
	exchange := r.flags&unix.RENAME_EXCHANGE != 0
	switch {
	case src.n == nil:
		return unix.ENOENT
	case dst.n != nil && r.flags&unix.RENAME_NOREPLACE != 0:
		return unix.EEXIST
	case dst.n == nil && exchange:
		return unix.ENOENT
	}
	if (src.n.dir != nil || dst.n != nil && dst.n.dir != nil) && r.from != r.to && !r.moves {
		r.moves = true
		return errAgain
	}
	if fs.above(src.n, r.to) {
		return unix.EINVAL
	}
	if dst.n != nil && fs.above(dst.n, r.from) {
		if exchange {
			return unix.EINVAL
		}
		return unix.ENOTEMPTY
	}
	if dst.n == src.n {
		return 0
	}
	if dst.n != nil && !exchange {
		switch {
		case src.n.dir == nil && dst.n.dir != nil:
			return unix.EISDIR
		case src.n.dir != nil && dst.n.dir == nil:
			return unix.ENOTDIR
		}
	}
	move := []*name{&src, &dst}
	if !exchange {
		move = move[:1]
	}
	for _, x := range move {
		if x.n.dir != nil && len(x.n.lowers) > 0 && fs.cfg.RedirectDir != RedirectOn {
			return unix.EXDEV
		}
	}
	if dst.n != nil && dst.n.dir != nil && !exchange {
		if e := fs.replaceable(c, r, &dst); e != 0 {
			return e
		}
	}
	for _, x := range move {
		if x.n.upper.Load() == 0 {
			r.copy, x.n = x.n, nil
			return errAgain
		}
	}
	if r.to.upper.Load() == 0 {
		fs.hold(r.to)
		r.copy = r.to
		return errAgain
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	c = own(c)
	if e := fs.prepareMove(c, src.n, r.from, r.to); e != 0 {
		return e
	}
	if exchange {
		if e := fs.prepareMove(c, dst.n, r.to, r.from); e != 0 {
			return e
		}
		e = fs.renameUpper(c, r, unix.RENAME_EXCHANGE)
	} else {
		e = fs.replace(c, r, &src, &dst)
	}
	if e != 0 {
		return e
	}
	fs.renamed(r)
	return 0
}

// above says whether n is p or a directory above it.
func (fs *FS) above(n, p *node) bool {
	if n.dir == nil {
		return false
	}
	fs.mu.RLock()
	defer fs.mu.RUnlock()
	for ; p != nil; p = p.parent {
		if p == n {
			return true
		}
	}
	return false
}

// replaceable says whether the directory that has the new name may lose it.
func (fs *FS) replaceable(c *fsbackend.Context, r *rename, dst *name) errno {
	if r.also != dst.n {
		if r.also != nil {
			fs.Forget(r.also.id, 1)
		}
		r.also, dst.n = dst.n, nil
		return errAgain
	}
	empty, e := fs.empty(c, dst.n)
	if e == 0 && !empty {
		e = unix.ENOTEMPTY
	}
	return e
}

// prepareMove marks n, which goes from one directory to another, so that it is found there as it is: a directory that has parts in
// lower layers says where they are, and one that has none that it has none.
func (fs *FS) prepareMove(c *fsbackend.Context, n, from, to *node) errno {
	if n.dir != nil && len(n.lowers) > 0 {
		if e := fs.setRedirect(c, n, from == to); e != 0 {
			return e
		}
	} else if n.dir != nil && len(to.lowers) > 0 {
		if e := fs.markOpaqueDir(c, n.upper.Load()); e != 0 {
			return e
		}
	}
	if from != to && n.marked() {
		return fs.markImpureDir(c, to)
	}
	return 0
}

// setRedirect has the mark on n's upper directory say where its lower ones are (fs/overlayfs/dir.c, ovl_set_redirect).
func (fs *FS) setRedirect(c *fsbackend.Context, n *node, sameDir bool) errno {
	fs.mu.RLock()
	value := n.redirect
	done := value != "" && (sameDir || value[0] == '/')
	if sameDir && value == "" {
		value = n.name
	}
	if !sameDir && !done {
		value = ""
		for a := n; a != fs.root; a = a.parent {
			if a == nil {
				fs.mu.RUnlock()
				return unix.ESTALE
			}
			part := a.redirect
			if part == "" {
				part = a.name
			}
			if part[0] == '/' {
				value = part + value
				break
			}
			value = "/" + part + value
		}
	}
	fs.mu.RUnlock()
	switch {
	case done:
		return 0
	case len(value) > maxRedirect:
		return unix.EXDEV
	}
	e := fs.mark(c, n.upper.Load(), markRedirect, value)
	if e == unix.EOPNOTSUPP || e == unix.ENOSYS || e == unix.EPERM {
		return unix.EXDEV
	}
	if e == 0 {
		fs.mu.Lock()
		n.redirect = value
		fs.mu.Unlock()
	}
	return e
}

// replace gives src the new name, in one step, and leaves a whiteout for what is below the old one.
func (fs *FS) replace(c *fsbackend.Context, r *rename, src, dst *name) errno {
	below := false
	// What the node knows is of one name, and the file may have others.
	nothing := fs.knownBelow(src.n) == belowNothing && fs.at(r.from, r.oldName) == src.n
	if len(r.from.lowers) > 0 && !nothing {
		var e errno
		if below, e = fs.isBelow(c, r.from, r.oldName); e != 0 {
			return e
		}
	}
	if src.n.dir != nil && dst.whiteout {
		if e := fs.renameUpper(c, r, unix.RENAME_EXCHANGE); e != 0 || below {
			return e
		}
		return fs.upper.r.Unlink(c, r.from.upper.Load(), r.oldName)
	}
	move := func() errno {
		if below {
			return fs.renameOver(c, r)
		}
		return fs.renameUpper(c, r, 0)
	}
	e := move()
	if (e == unix.ENOTEMPTY || e == unix.EEXIST) && dst.n != nil && dst.n.dir != nil && dst.n.upper.Load() != 0 {
		if e = fs.emptyOut(c, r.to, r.newName, dst.n); e == 0 {
			e = move()
		}
	}
	if e != 0 {
		return e
	}
	if dst.n != nil && dst.n.dir != nil {
		dst.n.gone.Store(true)
	}
	return fs.unhide(c, r.to, r.newName)
}

// emptyOut puts an opaque directory in the place of one of the upper layer with nothing but whiteouts in it, so that a rename can
// replace it (fs/overlayfs/dir.c, ovl_clear_empty).
func (fs *FS) emptyOut(c *fsbackend.Context, p *node, cname fsbackend.Name, n *node) errno {
	old := real{fs.upper, n.upper.Load()}
	var attr fuseproto.AttrOut
	in := fuseproto.GetattrIn{InHeader: header(old.node)}
	if e := fs.upper.r.Getattr(c, &in, &attr); e != 0 {
		return e
	}
	m, e := fs.makeCopy(c, n, old, &attr.Attr, 0)
	if e == 0 {
		e = fs.markOpaqueDir(c, m.node)
	}
	if e == 0 {
		swap := fuseproto.Rename2In{InHeader: header(fs.work), Newdir: p.upper.Load(), Flags: unix.RENAME_EXCHANGE}
		e = fs.upper.r.Rename(c, &swap, m.name, cname)
	}
	if e != 0 {
		fs.discard(c, &m)
		return e
	}
	fs.mu.Lock()
	dead := n.dead
	if !dead {
		delete(fs.byUpper, old.node)
		n.upper.Store(m.node)
		fs.byUpper[m.node] = n
	}
	fs.mu.Unlock()
	if dead {
		fs.upper.r.Forget(m.node, 1)
	}
	if e := fs.clearOut(c, old.node); e == 0 {
		_ = fs.upper.r.Rmdir(c, fs.work, m.name)
	}
	if !dead {
		old.forget()
	}
	return 0
}

// renameOver renames and leaves a whiteout.
func (fs *FS) renameOver(c *fsbackend.Context, r *rename) errno {
	if !fs.noMknod.Load() {
		if e := fs.renameUpper(c, r, unix.RENAME_WHITEOUT); !fs.noDevices(e) {
			return e
		}
	}
	if e := fs.hideByFile(c, r.from, r.oldName); e != 0 {
		return e
	}
	e := fs.renameUpper(c, r, 0)
	if e != 0 {
		_ = fs.unhide(c, r.from, r.oldName)
	}
	return e
}

// renamed notes what a rename has done. Both directories are locked.
func (fs *FS) renamed(r *rename) {
	r.from.dir.version.Add(1)
	r.to.dir.version.Add(1)
	fs.mu.Lock()
	var dying []*node
	a := fs.byName[nameKey{r.from.id, string(r.oldName)}]
	b := fs.byName[nameKey{r.to.id, string(r.newName)}]
	if a != b {
		if b != nil {
			dying = fs.unplace(b, dying)
		}
		if a != nil {
			dying = fs.place(a, r.to, string(r.newName), dying)
			fs.noteBelow(a, belowUnknown)
		}
		if b != nil && r.flags&unix.RENAME_EXCHANGE != 0 && !b.dead {
			dying = fs.place(b, r.from, string(r.oldName), dying)
			fs.noteBelow(b, belowUnknown)
		}
	}
	fs.mu.Unlock()
	fs.bury(dying)
}

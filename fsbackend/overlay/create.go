package overlay

import (
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// What a change expects of the name that it is about: where it is not so, no directory is copied up for it.
type expected int

const (
	expectNothing expected = iota
	expectFile
	expectEmptyDir
)

// expect says whether name in p, which is not in the upper layer, is what it is expected to be.
func (fs *FS) expect(c *fsbackend.Context, p *node, name fsbackend.Name, what expected) errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	if e := p.rlock(c); e != 0 {
		return e
	}
	defer p.runlock()
	var f found
	e := fs.find(c, p, name, &f)
	if what == expectNothing {
		if e == 0 {
			fs.release(&f)
			return unix.EEXIST
		}
		if e == unix.ENOENT {
			e = 0
		}
		return e
	}
	if e != 0 {
		return e
	}
	if what == expectFile {
		defer fs.release(&f)
		if f.isDir() {
			return unix.EISDIR
		}
		return 0
	}
	if !f.isDir() {
		fs.release(&f)
		return unix.ENOTDIR
	}
	n, e := fs.childDir(c, p, name, &f)
	if e != 0 {
		return e
	}
	defer fs.Forget(n.id, 1)
	empty, e := fs.empty(c, n)
	if e == 0 && !empty {
		e = unix.ENOTEMPTY
	}
	return e
}

// changeIn begins a change of names in a directory: it is in the upper layer then, and locked. doneIn follows if it returns 0.
func (fs *FS) changeIn(c *fsbackend.Context, parent uint64, name fsbackend.Name, what expected) (*node, errno) {
	p, e := fs.directory(parent)
	if e != 0 {
		return nil, e
	}
	if e := checkName(name); e != 0 {
		return nil, e
	}
	if e := fs.begin(c); e != 0 {
		return nil, e
	}
	if p.upper.Load() == 0 {
		e = fs.expect(c, p, name, what)
	}
	if e == 0 {
		e = fs.copyUp(c, p, wholeFile)
	}
	if e == 0 {
		e = p.lock(c)
	}
	if e == 0 && p.gone.Load() {
		p.unlock()
		e = unix.ENOENT
	}
	if e != 0 {
		fs.end(c)
		return nil, e
	}
	return p, 0
}

func (fs *FS) doneIn(c *fsbackend.Context, p *node) {
	p.unlock()
	fs.end(c)
}

// kind is what is made.
type kind int

const (
	kindFile kind = iota
	kindDir
	kindLink // another name of a file
)

// maker makes something as name in a directory of the upper layer: what is there is EEXIST.
type maker func(c *fsbackend.Context, dir uint64, name fsbackend.Name, out *fuseproto.EntryOut) errno

// make makes what do does as name in p, over a whiteout if there is one, and fills out. p's lock is held.
func (fs *FS) make(c *fsbackend.Context, epoch uint64, p *node, name fsbackend.Name, kind kind, out *fuseproto.EntryOut, do maker) (*node, errno) {
	as, e := fs.as(c)
	if e != 0 {
		return nil, e
	}
	var f found
	isBelow, e := fs.isBelow(c, p, name)
	if e != 0 {
		return nil, e
	}
	below := uint32(belowSomething)
	e = unix.EEXIST
	if !isBelow {
		below = belowNothing
		e = do(as, p.upper.Load(), name, out)
	}
	if e == unix.EEXIST {
		// There is something in the upper layer, or below: that may be a whiteout, or hidden by one.
		if e := fs.find(c, p, name, &f); e != unix.ENOENT {
			if e == 0 {
				fs.release(&f)
				e = unix.EEXIST
			}
			return nil, e
		}
		if !c.MayBlock {
			return nil, fsbackend.ErrMayBlock
		}
		e = fs.makeOver(c, as, p, name, f.whiteout, kind, out, do)
	}
	if e != 0 {
		return nil, e
	}
	p.dir.version.Add(1)
	f = found{attr: out.Attr, upper: out.NodeId, ino: fs.upper.ino(out.Ino), impure: impureNot, below: below}
	n, e := fs.enter(epoch, p, name, &f, out)
	return n, e
}

// makeOver makes something in the place of a whiteout: of a device, or else of a file .wh.NAME. It appears in one step, with
// what the directory has it inherit.
func (fs *FS) makeOver(c, as *fsbackend.Context, p *node, name fsbackend.Name, device bool, kind kind, out *fuseproto.EntryOut, do maker) errno {
	isDir := kind == kindDir
	r, up, c := fs.upper.r, p.upper.Load(), own(c)
	at, dir := name, up
	switch {
	case !device && !isDir:
	case kind == kindLink: // it inherits nothing
		at, dir = fs.tempName(), fs.work
	default:
		at = fsbackend.MakeName(tempPrefix + strconv.FormatUint(fs.temp.Add(1), 16))
	}
	if e := do(as, dir, at, out); e != 0 {
		return e
	}
	undo := func(e errno) errno {
		if isDir {
			_ = r.Rmdir(c, dir, at)
		} else {
			_ = r.Unlink(c, dir, at)
		}
		r.Forget(out.NodeId, 1)
		*out = fuseproto.EntryOut{}
		return e
	}
	if isDir {
		if e := fs.markOpaqueDir(c, out.NodeId); e != 0 {
			return undo(e)
		}
	}
	if device || isDir {
		in := fuseproto.Rename2In{InHeader: header(dir), Newdir: up}
		if device && isDir {
			in.Flags = unix.RENAME_EXCHANGE
		}
		e := r.Rename(c, &in, at, name)
		if in.Flags != 0 && (e == unix.EINVAL || e == unix.ENOSYS || e == unix.EOPNOTSUPP) {
			in.Flags = 0
			if e = r.Unlink(c, up, name); e == 0 {
				e = r.Rename(c, &in, at, name)
			}
		}
		if e != 0 {
			return undo(e)
		}
		if in.Flags != 0 {
			_ = r.Unlink(c, up, at) // the whiteout, which hides nothing there
		}
	}
	if !device {
		return fs.unhide(c, p, name)
	}
	return 0
}

// unhide removes the file .wh.NAME, if there is one.
func (fs *FS) unhide(c *fsbackend.Context, p *node, name fsbackend.Name) errno {
	hidden, e := fs.hidden(c, p, 0, name)
	if e != 0 || !hidden {
		return e
	}
	e = fs.upper.r.Unlink(c, p.upper.Load(), fsbackend.MakeName(whPrefix+string(name)))
	if e == 0 || e == unix.ENOENT {
		p.hide(name, false)
		e = 0
	}
	return e
}

// Mknod implements fsbackend.Maker.
func (fs *FS) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	epoch := fs.epoch.Load()
	if in.Mode&unix.S_IFMT == unix.S_IFCHR && in.Rdev == 0 {
		return unix.EPERM // it would be a whiteout (fs/overlayfs/dir.c, ovl_mknod)
	}
	p, e := fs.changeIn(c, in.NodeId, name, expectNothing)
	if e != 0 {
		return e
	}
	defer fs.doneIn(c, p)
	_, e = fs.make(c, epoch, p, name, kindFile, out, func(c *fsbackend.Context, dir uint64, name fsbackend.Name, out *fuseproto.EntryOut) errno {
		id := in.NodeId
		in.NodeId = dir
		e := fs.upper.r.Mknod(c, in, name, out)
		in.NodeId = id
		return e
	})
	return e
}

// Mkdir implements fsbackend.Maker.
func (fs *FS) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	epoch := fs.epoch.Load()
	p, e := fs.changeIn(c, in.NodeId, name, expectNothing)
	if e != 0 {
		return e
	}
	defer fs.doneIn(c, p)
	_, e = fs.make(c, epoch, p, name, kindDir, out, func(c *fsbackend.Context, dir uint64, name fsbackend.Name, out *fuseproto.EntryOut) errno {
		id := in.NodeId
		in.NodeId = dir
		e := fs.upper.r.Mkdir(c, in, name, out)
		in.NodeId = id
		return e
	})
	return e
}

// Symlink implements fsbackend.Maker.
func (fs *FS) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	epoch := fs.epoch.Load()
	p, e := fs.changeIn(c, parent, name, expectNothing)
	if e != 0 {
		return e
	}
	defer fs.doneIn(c, p)
	_, e = fs.make(c, epoch, p, name, kindFile, out, func(c *fsbackend.Context, dir uint64, name fsbackend.Name, out *fuseproto.EntryOut) errno {
		return fs.upper.r.Symlink(c, dir, name, target, out)
	})
	return e
}

// Link implements fsbackend.Linker.
func (fs *FS) Link(c *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	epoch := fs.epoch.Load()
	n, e := fs.node(in.Oldnodeid)
	if e != 0 {
		return e
	}
	if _, e := fs.directory(in.NodeId); e != 0 {
		return e
	}
	if n.dir != nil {
		return unix.EPERM
	}
	if fs.upper != nil && fs.upper.r.Linker == nil {
		return unix.EPERM
	}
	if fs.upper != nil && n.upper.Load() == 0 {
		if n.gone.Load() {
			return unix.ENOENT
		}
		if e := fs.begin(c); e != 0 {
			return e
		}
		e := fs.copyUp(c, n, wholeFile)
		fs.end(c)
		if e != 0 {
			return e
		}
	}
	p, e := fs.changeIn(c, in.NodeId, name, expectNothing)
	if e != 0 {
		return e
	}
	defer fs.doneIn(c, p)
	if n.marked() {
		if e := fs.markImpureIn(c, p); e != 0 {
			return e
		}
	}
	_, e = fs.make(c, epoch, p, name, kindLink, out, func(c *fsbackend.Context, dir uint64, name fsbackend.Name, out *fuseproto.EntryOut) errno {
		saved := *in
		in.NodeId, in.Oldnodeid = dir, n.upper.Load()
		e := fs.upper.r.Link(c, in, name, out)
		*in = saved
		return e
	})
	return e
}

// marked says whether a file in the upper layer has marks that a lookup must see: a directory that it is put in is impure then.
func (n *node) marked() bool {
	return n.origin.Load() || len(n.lowers) > 0
}

// markImpureIn is markImpureDir for a call that may not sleep.
func (fs *FS) markImpureIn(c *fsbackend.Context, p *node) errno {
	if p.dir.parts[0].impure.Load() == impureYes {
		return 0
	}
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	return fs.markImpureDir(own(c), p)
}

// Create implements fsbackend.Creater.
func (fs *FS) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	epoch := fs.epoch.Load()
	p, e := fs.changeIn(c, in.NodeId, name, expectNothing)
	if e == unix.EEXIST && in.Flags&unix.O_EXCL == 0 {
		if p, e = fs.directory(in.NodeId); e != 0 {
			return e
		}
		if e = fs.begin(c); e != 0 {
			return e
		}
		defer fs.end(c)
		return fs.openExisting(c, epoch, p, in, name, out)
	}
	if e != 0 {
		return e
	}
	var opened file
	n, e := fs.make(c, epoch, p, name, kindFile, &out.EntryOut, func(c *fsbackend.Context, dir uint64, name fsbackend.Name, _ *fuseproto.EntryOut) errno {
		id, flags := in.NodeId, in.Flags
		in.NodeId, in.Flags = dir, flags|unix.O_EXCL
		e := fs.upper.r.Create(c, in, name, out)
		in.NodeId, in.Flags = id, flags
		opened = file{real{fs.upper, out.NodeId}, out.Fh}
		return e
	})
	p.unlock()
	defer fs.end(c)
	switch {
	case e == 0:
		out.Fh, e = fs.opened(c, epoch, n, &opened, in.Flags)
		if e != 0 {
			fs.Forget(n.id, 1)
		}
		return e
	case opened.fh != 0 || opened.node != 0:
		// It was made, but the guest cannot have it.
		if e != unix.EEXIST {
			opened.close(c, &handle{}, 0)
		}
	}
	if e != unix.EEXIST || in.Flags&unix.O_EXCL != 0 {
		return e
	}
	return fs.openExisting(c, epoch, p, in, name, out)
}

// openExisting opens a file that CREATE has found to exist.
func (fs *FS) openExisting(c *fsbackend.Context, epoch uint64, p *node, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) errno {
	*out = fuseproto.CreateOut{}
	if e := p.rlock(c); e != 0 {
		return e
	}
	var f found
	e := fs.find(c, p, name, &f)
	var n *node
	if e == 0 {
		n, e = fs.enter(epoch, p, name, &f, &out.EntryOut)
	}
	p.runlock()
	if e != 0 {
		return e
	}
	switch {
	case n.dir != nil:
		e = unix.EISDIR
	case n.typ != unix.S_IFREG:
		e = unix.EBADF
	default:
		e = fs.openForCreate(c, epoch, n, in, out)
	}
	if e != 0 {
		fs.Forget(n.id, 1)
		*out = fuseproto.CreateOut{}
	}
	return e
}

func (fs *FS) openForCreate(c *fsbackend.Context, epoch uint64, n *node, in *fuseproto.CreateIn, out *fuseproto.CreateOut) errno {
	if e := fs.openChanging(c, epoch, n, in.Flags, in.OpenFlags, &out.OpenOut); e != 0 {
		return e
	}
	if in.Flags&unix.O_TRUNC == 0 {
		return 0
	}
	var attr fuseproto.AttrOut
	e := fs.realAttr(c, n, &attr)
	if e == 0 {
		fs.finish(n, &attr.Attr)
		out.Attr = attr.Attr
	}
	return 0
}

// Tmpfile implements fsbackend.Tmpfiler.
func (fs *FS) Tmpfile(c *fsbackend.Context, in *fuseproto.CreateIn, out *fuseproto.CreateOut) fsbackend.Errno {
	epoch := fs.epoch.Load()
	p, e := fs.directory(in.NodeId)
	if e != 0 {
		return e
	}
	if e := fs.begin(c); e != 0 {
		return e
	}
	defer fs.end(c)
	if fs.upper.r.Tmpfiler == nil {
		return unix.EOPNOTSUPP
	}
	if e := fs.copyUp(c, p, wholeFile); e != 0 {
		return e
	}
	if p.gone.Load() {
		return unix.ENOENT
	}
	as, e := fs.as(c)
	if e != 0 {
		return e
	}
	id := in.NodeId
	in.NodeId = p.upper.Load()
	e = fs.upper.r.Tmpfile(as, in, out)
	in.NodeId = id
	if e != 0 {
		return e
	}
	opened := file{real{fs.upper, out.NodeId}, out.Fh}
	f := found{attr: out.Attr, upper: out.NodeId, ino: fs.upper.ino(out.Ino), below: belowNothing}
	n, e := fs.enter(epoch, nil, nil, &f, &out.EntryOut)
	if e != 0 {
		opened.close(c, &handle{}, 0)
		return e
	}
	if out.Fh, e = fs.opened(c, epoch, n, &opened, in.Flags); e != 0 {
		fs.Forget(n.id, 1)
	}
	return e
}

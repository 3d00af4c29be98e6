package casefold

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// edit is a change of a directory that goes into its index.
type edit struct {
	dir    uint64
	before stamp
	ok     bool // there is an index
}

// begin is called before a change of dir.
func (f *FS) begin(c *fsbackend.Context, dir uint64) (e edit) {
	if !f.cache.has(dir) {
		return edit{}
	}
	s, errno := f.stampOf(c, dir)
	return edit{dir, s, errno == fsbackend.OK}
}

// end is called after it.
func (f *FS) end(c *fsbackend.Context, e edit, changes ...change) {
	if !e.ok {
		return
	}
	after, errno := f.stampOf(c, e.dir)
	if errno != fsbackend.OK {
		f.cache.forget(e.dir)
		return
	}
	f.cache.apply(e.dir, e.before, after, changes)
}

// appeared and gone are changes.
func (f *FS) appeared(name fsbackend.Name) change {
	return change{key: f.key(name), name: name.String()}
}

func (f *FS) gone(name fsbackend.Name) change {
	return change{key: f.key(name), name: name.String(), gone: true}
}

// taken returns what a file is called that has a name in parent that is the same as name, nil if there is none; name itself where the
// backend is to find out.
func (f *FS) taken(c *fsbackend.Context, parent uint64, name fsbackend.Name) (fsbackend.Name, fsbackend.Errno) {
	if f.norm.alone(name) {
		return nil, fsbackend.OK
	}
	var out fuseproto.EntryOut
	host, errno := f.other(c, parent, name, &out)
	if out.NodeId != 0 {
		f.Inner.Forget(out.NodeId, 1)
	}
	return host, errno
}

// make makes a name by call, unless there is one that is the same.
func (f *FS) make(c *fsbackend.Context, parent uint64, name fsbackend.Name, call func() fsbackend.Errno) fsbackend.Errno {
	host, errno := f.taken(c, parent, name)
	switch {
	case errno != fsbackend.OK:
		return errno
	case host != nil:
		return unix.EEXIST
	}
	e := f.begin(c, parent)
	if errno = call(); errno == fsbackend.OK {
		f.end(c, e, f.appeared(name))
	}
	return errno
}

// Mknod implements fsbackend.Maker.
func (f *FS) Mknod(c *fsbackend.Context, in *fuseproto.MknodIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return f.make(c, in.NodeId, name, func() fsbackend.Errno { return f.Forward.Mknod(c, in, name, out) })
}

// Mkdir implements fsbackend.Maker.
func (f *FS) Mkdir(c *fsbackend.Context, in *fuseproto.MkdirIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return f.make(c, in.NodeId, name, func() fsbackend.Errno { return f.Forward.Mkdir(c, in, name, out) })
}

// Symlink implements fsbackend.Maker.
func (f *FS) Symlink(c *fsbackend.Context, parent uint64, name, target fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return f.make(c, parent, name, func() fsbackend.Errno { return f.Forward.Symlink(c, parent, name, target, out) })
}

// Link implements fsbackend.Linker.
func (f *FS) Link(c *fsbackend.Context, in *fuseproto.LinkIn, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return f.make(c, in.NodeId, name, func() fsbackend.Errno { return f.Forward.Link(c, in, name, out) })
}

// Create implements fsbackend.Creater.
func (f *FS) Create(c *fsbackend.Context, in *fuseproto.CreateIn, name fsbackend.Name, out *fuseproto.CreateOut) fsbackend.Errno {
	host, errno := f.taken(c, in.NodeId, name)
	switch {
	case errno != fsbackend.OK:
		return errno
	case host == nil:
	case in.Flags&unix.O_EXCL != 0:
		return unix.EEXIST
	case string(host) != string(name):
		if errno = f.Forward.Create(c, in, host, out); errno == fsbackend.OK {
			alias(&out.EntryOut)
		}
		return errno
	}
	e := f.begin(c, in.NodeId)
	if errno = f.Forward.Create(c, in, name, out); errno == fsbackend.OK {
		f.end(c, e, f.appeared(name))
	}
	return errno
}

// remove removes name, or what it stands for, by call.
func (f *FS) remove(c *fsbackend.Context, parent uint64, name fsbackend.Name, call func(fsbackend.Name) fsbackend.Errno) fsbackend.Errno {
	e := f.begin(c, parent)
	errno := call(name)
	if errno == unix.ENOENT {
		host, resolved := f.taken(c, parent, name)
		switch {
		case resolved != fsbackend.OK:
			return resolved
		case host == nil:
			return errno
		}
		name, e = host, f.begin(c, parent)
		errno = call(name)
	}
	if errno == fsbackend.OK {
		f.end(c, e, f.gone(name))
	}
	return errno
}

// Unlink implements fsbackend.Remover.
func (f *FS) Unlink(c *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return f.remove(c, parent, name, func(name fsbackend.Name) fsbackend.Errno { return f.Forward.Unlink(c, parent, name) })
}

// Rmdir implements fsbackend.Remover.
func (f *FS) Rmdir(c *fsbackend.Context, parent uint64, name fsbackend.Name) fsbackend.Errno {
	return f.remove(c, parent, name, func(name fsbackend.Name) fsbackend.Errno { return f.Forward.Rmdir(c, parent, name) })
}

// Rename implements fsbackend.Renamer.
func (f *FS) Rename(c *fsbackend.Context, in *fuseproto.Rename2In, oldName, newName fsbackend.Name) fsbackend.Errno {
	source, errno := f.taken(c, in.NodeId, oldName)
	if errno != fsbackend.OK {
		return errno
	}
	if source == nil {
		source = oldName
	}
	target, errno := f.taken(c, in.Newdir, newName)
	if errno != fsbackend.OK {
		return errno
	}
	if target == nil || in.NodeId == in.Newdir && string(target) == string(source) {
		target = newName // of the source itself, only the case changes
	}
	from := f.begin(c, in.NodeId)
	to := from
	if in.Newdir != in.NodeId {
		to = f.begin(c, in.Newdir)
	}
	if errno = f.Forward.Rename(c, in, source, target); errno != fsbackend.OK {
		return errno
	}
	var was []change
	if in.Flags&(unix.RENAME_EXCHANGE|unix.RENAME_WHITEOUT) == 0 && (in.NodeId != in.Newdir || string(source) != string(target)) {
		was = append(was, f.gone(source))
	}
	if in.Newdir == in.NodeId {
		f.end(c, from, append(was, f.appeared(target))...)
		return fsbackend.OK
	}
	f.end(c, from, was...)
	f.end(c, to, f.appeared(target))
	return fsbackend.OK
}

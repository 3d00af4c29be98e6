package permshift

import (
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Lookup implements fsbackend.Backend.
func (f *FS) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	return f.shiftEntry(c, out, f.Inner.Lookup(c, parent, name, out))
}

// Getattr implements fsbackend.Backend.
func (f *FS) Getattr(c *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	errno := f.Inner.Getattr(c, in, out)
	if errno == fsbackend.OK {
		errno = f.shift(c, in.NodeId, &out.Attr)
	}
	return errno
}

// Statx implements fsbackend.Statxer.
func (f *FS) Statx(c *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) fsbackend.Errno {
	errno := f.Forward.Statx(c, in, out)
	x := &out.Statx
	if errno != fsbackend.OK || f.format == Off || !carries(uint32(x.Mode)) {
		return errno
	}
	a := fuseproto.Attr{Mode: uint32(x.Mode), Size: x.Size, Blocks: x.Blocks}
	a.Uid, a.Gid = x.Uid, x.Gid
	if errno = f.shift(c, in.NodeId, &a); errno != fsbackend.OK {
		return errno
	}
	x.Mode, x.Size, x.Blocks, x.Uid, x.Gid = uint16(a.Mode), a.Size, a.Blocks, a.Uid, a.Gid
	x.RdevMajor, x.RdevMinor = unix.Major(uint64(a.Rdev)), unix.Minor(uint64(a.Rdev))
	return fsbackend.OK
}

// Access implements fsbackend.Accesser: the guest checks permissions by the attributes, for the host's are not those it sees.
func (f *FS) Access(c *fsbackend.Context, in *fuseproto.AccessIn) fsbackend.Errno {
	if f.format == Off {
		return f.Forward.Access(c, in)
	}
	return unix.ENOSYS
}

const fattrShifted = fuseproto.FATTR_MODE | fuseproto.FATTR_UID | fuseproto.FATTR_GID

// Setattr implements fsbackend.Setattrer. Modes and owners become the value, before the backend does the rest. What it asks for
// again by ErrMayBlock then is done again, with the same outcome.
func (f *FS) Setattr(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	if f.format == Off {
		return f.Forward.Setattr(c, in, out)
	}
	kill := in.Valid&fuseproto.FATTR_SIZE != 0 && in.Valid&fuseproto.FATTR_KILL_SUIDGID != 0
	if in.Valid&fattrShifted == 0 {
		if kill {
			if errno := f.killPriv(c, in.NodeId); errno != fsbackend.OK {
				return errno
			}
		}
		errno := f.Forward.Setattr(c, in, out)
		if errno == fsbackend.OK {
			errno = f.shift(c, in.NodeId, &out.Attr)
		}
		return errno
	}
	host, errno := f.hostAttr(c, in)
	switch {
	case errno != fsbackend.OK:
		return errno
	case !carries(host.Mode):
		return f.setHost(c, in, out)
	}
	valid, mode := in.Valid, in.Mode
	defer func() { in.Valid, in.Mode = valid, mode }()
	st, errno := f.change(c, in, host, kill)
	if errno != fsbackend.OK {
		return errno
	}
	in.Valid &^= fattrShifted
	if host.Mode&0o7000 != 0 {
		// A mode that somebody has left on the host is the value's now.
		in.Valid |= fuseproto.FATTR_MODE
		in.Mode = f.hostMode
	}
	if errno := f.Forward.Setattr(c, in, out); errno != fsbackend.OK {
		return errno
	}
	return f.apply(&out.Attr, st)
}

// hostAttr returns what the host says of the node that in is to change.
func (f *FS) hostAttr(c *fsbackend.Context, in *fuseproto.SetattrIn) (fuseproto.Attr, fsbackend.Errno) {
	r := rooms.Get().(*room)
	defer rooms.Put(r)
	r.get, r.attr = fuseproto.GetattrIn{InHeader: in.InHeader}, fuseproto.AttrOut{}
	if in.Valid&fuseproto.FATTR_FH != 0 {
		r.get.Flags_, r.get.Fh_ = fuseproto.FUSE_GETATTR_FH, in.Fh
	}
	errno := f.Inner.Getattr(c, &r.get, &r.attr)
	return r.attr.Attr, errno
}

// change makes the value of a file with attributes host what in asks for, in passthrough's order: mode, then owner.
func (f *FS) change(c *fsbackend.Context, in *fuseproto.SetattrIn, host fuseproto.Attr, kill bool) (Stat, fsbackend.Errno) {
	defer f.lock(in.NodeId).Unlock()
	st, found, errno := f.value(c, in.NodeId)
	if errno != fsbackend.OK {
		return Stat{}, errno
	}
	if found {
		if errno := f.apply(&host, st); errno != fsbackend.OK {
			return Stat{}, errno
		}
	}
	if in.Valid&fuseproto.FATTR_MODE != 0 {
		host.Mode = host.Mode&unix.S_IFMT | in.Mode&0o7777
	}
	if in.Valid&fuseproto.FATTR_UID != 0 {
		host.Uid = in.Uid
	}
	if in.Valid&fuseproto.FATTR_GID != 0 {
		host.Gid = in.Gid
	}
	if host.Uid == invalidID || host.Gid == invalidID {
		return Stat{}, unix.EINVAL
	}
	if kill || in.Valid&(fuseproto.FATTR_UID|fuseproto.FATTR_GID) != 0 {
		host.Mode = killed(host.Mode)
	}
	st = statOf(&host)
	return st, f.store(c, in.NodeId, st, 0)
}

const invalidID = ^uint32(0)

// setHost changes a file of the host that carries no value. Where the host does not let the storage's user give it away, it stays
// whose it is.
func (f *FS) setHost(c *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	errno := f.Forward.Setattr(c, in, out)
	if errno != unix.EPERM || in.Valid&(fuseproto.FATTR_UID|fuseproto.FATTR_GID) == 0 {
		return errno
	}
	valid := in.Valid
	in.Valid &^= fuseproto.FATTR_UID | fuseproto.FATTR_GID
	errno = f.Forward.Setattr(c, in, out)
	in.Valid = valid
	return errno
}

// Open implements fsbackend.Opener.
func (f *FS) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	if f.format != Off && f.special.has(in.NodeId) {
		st, found, errno := f.value(c, in.NodeId)
		switch typ := st.Mode & unix.S_IFMT; {
		case errno != fsbackend.OK:
			return errno
		case found && typ != unix.S_IFREG && typ != 0:
			return unix.EBADF // as passthrough: a guest's kernel opens these itself
		}
	}
	if in.Flags&unix.O_TRUNC != 0 && in.Mode&fuseproto.FUSE_OPEN_KILL_SUIDGID != 0 {
		if errno := f.killPriv(c, in.NodeId); errno != fsbackend.OK {
			return errno
		}
	}
	return f.Forward.Open(c, in, out)
}

// Write implements fsbackend.Writer.
func (f *FS) Write(c *fsbackend.Context, in *fuseproto.WriteIn, src *fsbackend.Source) (uint32, fsbackend.Errno) {
	if in.WriteFlags&fuseproto.FUSE_WRITE_KILL_SUIDGID != 0 {
		if errno := f.killPriv(c, in.NodeId); errno != fsbackend.OK {
			return 0, errno
		}
	}
	return f.Forward.Write(c, in, src)
}

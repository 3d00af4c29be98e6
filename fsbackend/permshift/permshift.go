// Package permshift shows files with owners and modes that are kept in an extended attribute instead of those that the host has
// for them, so that one user's storage serves a guest with many users: on the host all files are that user's, with mode 0755.
//
// It is a layer over any backend that has extended attributes. The attributes are those of fuse-overlayfs and containers/storage
// (Format), and hidden from the guest. Values are read anew for every reply that has attributes, so that what the host changes is
// seen as soon as any other change of an attribute.
//
// # What carries a value
//
// Regular files and directories. In the formats that say a type, a regular file of the host may stand for a symbolic link (its
// contents are the target), a pipe, a socket or a device, and what a guest makes of the last three kinds is stored so. Symbolic
// links that it makes are the host's own, as in containers/storage: with those, and what else is no regular file or directory, the
// guest is shown, and changes, what the host has. A change of a link's owner that the host does not allow is left out.
//
// A regular file or directory without a value is shown as the host has it. A value that cannot be read is EINVAL.
package permshift

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// DefaultForceMask is the mode of all files on the host, if there is no other.
const DefaultForceMask = 0o755

// Config says how owners and modes are kept.
type Config struct {
	Format Format
	// ForceMask is the mode that files and directories have on the host, as force_mask of containers/storage's: if 0,
	// DefaultForceMask. It has 0700 in it.
	ForceMask uint32
	// ReadOnly says that nothing will be changed. If not, New marks the root with a value where it has none, for then programs that
	// know the format (and Auto) find it.
	ReadOnly bool
}

// Validate says what is wrong with c.
func (c *Config) Validate() error {
	if c.Format < 0 || int(c.Format) >= len(formats) {
		return fmt.Errorf("%v: expected a format", c.Format)
	}
	return validMask(c.ForceMask)
}

// ParseForceMask reads a mode as force_mask of containers-storage.conf(5) has it: an octal one, shared or private.
func ParseForceMask(text string) (uint32, error) {
	switch text {
	case "shared":
		return 0o755, nil
	case "private":
		return 0o700, nil
	}
	mode, err := strconv.ParseUint(text, 8, 32)
	if err != nil || mode == 0 {
		return 0, fmt.Errorf("%q: expected an octal mode, shared or private", text)
	}
	return uint32(mode), validMask(uint32(mode))
}

// validMask says what is wrong with the mode of all files on the host.
func validMask(mode uint32) error {
	if mode != 0 && (mode&^0o777 != 0 || mode&0o700 != 0o700) {
		return fmt.Errorf("force mask %#o: expected one from 0700 to 0777: who owns the storage must get at all of it", mode)
	}
	return nil
}

// FS is the layer. All that is not about owners, modes and extended attributes is the backend's in it.
type FS struct {
	fsbackend.Forward
	format   Format
	name     fsbackend.Name // of the attribute
	hostMode uint32

	features atomic.Uint64
	// reluctant says that a call for a value has asked for a thread that may sleep: calls that make something, and cannot be undone
	// then, ask for one before.
	reluctant atomic.Bool
	// changing are held, one for each node's number, while a value is read and written.
	changing [64]sync.Mutex
	privs    nodeSet // with a set-ID bit
	special  nodeSet // of regular files that stand for something else
}

// New makes the layer over inner, which it takes over: Close closes it. On an error it stays the caller's.
func New(inner fsbackend.Backend, cfg Config) (*FS, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	f := &FS{Forward: fsbackend.Forward{Inner: fsbackend.Resolve(inner)}, format: cfg.Format, hostMode: cfg.ForceMask}
	if f.hostMode == 0 {
		f.hostMode = DefaultForceMask
	}
	if f.format == Off {
		return f, nil
	}
	if f.Inner.XattrReader == nil || f.Inner.XattrWriter == nil && !cfg.ReadOnly {
		return nil, errors.New("the backend below has no extended attributes, which owners and modes are kept in: expected one that has")
	}
	ctx := &fsbackend.Context{MayBlock: true}
	if f.format == Auto {
		if err := f.detect(ctx); err != nil {
			return nil, err
		}
	}
	f.use(f.format)
	if cfg.ReadOnly {
		return f, nil
	}
	return f, f.markRoot(ctx)
}

func (f *FS) use(format Format) {
	f.format, f.name = format, fsbackend.MakeName(format.Xattr())
}

// Format returns the format in use, which is not Auto.
func (f *FS) Format() Format { return f.format }

// detect finds the format that the root carries.
func (f *FS) detect(ctx *fsbackend.Context) error {
	for _, format := range detected {
		f.use(format)
		_, found, errno := f.value(ctx, fuseproto.FUSE_ROOT_ID)
		switch {
		case errno == unix.EINVAL:
			return fmt.Errorf("the root's attribute %s has a value that is none: expected one like %q", format.Xattr(), format.Append(nil, Stat{Mode: unix.S_IFDIR | 0o755}))
		case errno != fsbackend.OK:
			return fmt.Errorf("read attribute %s of the root: %w", format.Xattr(), errno)
		case found:
			return nil
		}
	}
	names := make([]string, len(detected))
	for i, format := range detected {
		names[i] = format.Xattr()
	}
	return fmt.Errorf("the root carries none of %q: name the format (format=containers-override, say), which marks it, or convert the tree first (sluicectl permissions convert)", names)
}

// markRoot gives the root a value, which says what it is without one, unless it has one.
func (f *FS) markRoot(ctx *fsbackend.Context) error {
	_, found, errno := f.value(ctx, fuseproto.FUSE_ROOT_ID)
	if found || errno != fsbackend.OK {
		return asError("read the root's owner and mode", errno)
	}
	in, out := new(fuseproto.GetattrIn), new(fuseproto.AttrOut)
	in.NodeId = fuseproto.FUSE_ROOT_ID
	if errno := f.Inner.Getattr(ctx, in, out); errno != fsbackend.OK {
		return asError("read the root's attributes", errno)
	}
	errno = f.store(ctx, fuseproto.FUSE_ROOT_ID, statOf(&out.Attr), unix.XATTR_CREATE)
	return asError("mark the root with attribute "+f.format.Xattr(), errno)
}

func asError(what string, errno fsbackend.Errno) error {
	if errno == fsbackend.OK {
		return nil
	}
	return fmt.Errorf("%s: %w", what, errno)
}

// Init implements fsbackend.Initer.
func (f *FS) Init(features fsbackend.Features) {
	f.features.Store(features.Flags)
	f.Forward.Init(features)
}

// WantFlags implements fsbackend.Wanter. Access lists are about the host's users.
func (f *FS) WantFlags(defaults uint64) uint64 {
	return f.Forward.WantFlags(defaults) &^ fuseproto.FUSE_POSIX_ACL
}

// Reset implements fsbackend.Backend.
func (f *FS) Reset() {
	f.Forward.Reset()
	f.privs.reset()
	f.special.reset()
}

// statOf is what a value has to say of a file with attributes a.
func statOf(a *fuseproto.Attr) Stat {
	st := Stat{UID: a.Uid, GID: a.Gid, Mode: a.Mode}
	if typ := a.Mode & unix.S_IFMT; typ == unix.S_IFBLK || typ == unix.S_IFCHR {
		st.Major, st.Minor = unix.Major(uint64(a.Rdev)), unix.Minor(uint64(a.Rdev))
	}
	return st
}

// room is what a call for a value takes, kept so that it costs no allocation.
type room struct {
	get  fuseproto.GetattrIn
	attr fuseproto.AttrOut
	read fuseproto.GetxattrIn
	set  fuseproto.SetxattrIn
	sink fsbackend.Sink
	iov  [1]unix.Iovec
	buf  [maxValue]byte
}

var rooms = sync.Pool{New: func() any { return new(room) }}

// value reads the value of node; found is false where it has none.
func (f *FS) value(c *fsbackend.Context, node uint64) (st Stat, found bool, errno fsbackend.Errno) {
	r := rooms.Get().(*room)
	defer rooms.Put(r)
	r.read = fuseproto.GetxattrIn{Size: maxValue}
	r.read.NodeId, r.read.Caller = node, c.Caller
	r.iov[0] = sys.MakeIovec(r.buf[:])
	r.sink.Reset(r.iov[:], 0, maxValue)
	_, errno = f.Inner.Getxattr(c, &r.read, f.name, &r.sink)
	switch errno {
	case fsbackend.OK:
	case unix.ENODATA, unix.EOPNOTSUPP, unix.ENOSYS:
		return Stat{}, false, fsbackend.OK
	case unix.ERANGE:
		return Stat{}, false, unix.EINVAL
	case fsbackend.ErrMayBlock:
		f.reluctant.Store(true)
		return Stat{}, false, errno
	default:
		return Stat{}, false, errno
	}
	st, ok := f.format.Parse(r.buf[:r.sink.Written()])
	if !ok {
		return Stat{}, false, unix.EINVAL
	}
	return st, true, fsbackend.OK
}

// store sets the value of node, with XATTR_* flags. Call it with node's changing held, unless nobody knows the file yet.
func (f *FS) store(c *fsbackend.Context, node uint64, st Stat, flags uint32) fsbackend.Errno {
	r := rooms.Get().(*room)
	defer rooms.Put(r)
	value := f.format.Append(r.buf[:0], st)
	r.set = fuseproto.SetxattrIn{Size: uint32(len(value)), Flags: flags}
	r.set.NodeId, r.set.Caller = node, c.Caller
	f.note(node, st.Mode)
	errno := f.Inner.Setxattr(c, &r.set, f.name, value)
	if errno == fsbackend.ErrMayBlock {
		f.reluctant.Store(true)
	}
	return errno
}

// lock keeps others from changing node's value, until unlock is called.
func (f *FS) lock(node uint64) (m *sync.Mutex) {
	m = &f.changing[node%uint64(len(f.changing))]
	m.Lock()
	return m
}

// carries says whether a file of the host with this mode can have a value.
func carries(mode uint32) bool {
	typ := mode & unix.S_IFMT
	return typ == unix.S_IFREG || typ == unix.S_IFDIR
}

// apply makes a, which the host says of a file that carries values, what st says.
func (f *FS) apply(a *fuseproto.Attr, st Stat) fsbackend.Errno {
	host, typ := a.Mode&unix.S_IFMT, st.Mode&unix.S_IFMT
	if typ == 0 {
		typ = host
	}
	// Only a regular file can stand for something else.
	if typ != host && (host != unix.S_IFREG || typ == unix.S_IFDIR) {
		return unix.EINVAL
	}
	mode := st.Mode & 0o7777
	if f.format == OriginalPermissions {
		mode |= a.Mode & 0o7000 // where another program has left them
	}
	a.Uid, a.Gid, a.Mode = st.UID, st.GID, typ|mode
	switch typ {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
	case unix.S_IFBLK, unix.S_IFCHR:
		a.Rdev = uint32(unix.Mkdev(st.Major, st.Minor))
		fallthrough
	default:
		a.Size, a.Blocks = 0, 0
	}
	return fsbackend.OK
}

// shift makes a, the host's attributes of node, the guest's.
func (f *FS) shift(c *fsbackend.Context, node uint64, a *fuseproto.Attr) fsbackend.Errno {
	if f.format == Off || !carries(a.Mode) {
		return fsbackend.OK
	}
	st, found, errno := f.value(c, node)
	if errno == fsbackend.OK && found {
		errno = f.apply(a, st)
	}
	if errno == fsbackend.OK {
		f.note(node, a.Mode)
	}
	return errno
}

// shiftEntry is shift for a reply that has counted a lookup.
func (f *FS) shiftEntry(c *fsbackend.Context, out *fuseproto.EntryOut, errno fsbackend.Errno) fsbackend.Errno {
	if errno != fsbackend.OK || out.NodeId == 0 {
		return errno
	}
	return f.found(out, f.shift(c, out.NodeId, &out.Attr))
}

// found takes out's lookup back on an error.
func (f *FS) found(out *fuseproto.EntryOut, errno fsbackend.Errno) fsbackend.Errno {
	if errno != fsbackend.OK {
		f.Inner.Forget(out.NodeId, 1)
		*out = fuseproto.EntryOut{}
	}
	return errno
}

// groupsHave says whether the caller is in group gid.
func groupsHave(c *fsbackend.Context, gid uint32) bool {
	return c.Caller.Gid == gid || slices.Contains(c.SuppGroups, gid)
}

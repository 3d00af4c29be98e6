package passthrough

import (
	"bytes"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// checkName refuses what is not one component. The decoder has done so already; containment rests on more than one check.
func checkName(name fsbackend.Name) errno {
	switch {
	case len(name) == 0:
		return unix.ENOENT
	case len(name) > 255:
		return unix.ENAMETOOLONG
	case bytes.IndexByte(name, '/') >= 0, string(name) == ".", string(name) == "..":
		return unix.EINVAL
	}
	return 0
}

// useDir returns a descriptor of the directory that name is in or comes into.
func (fs *FS) useDir(parent uint64, name fsbackend.Name, r *ref) errno {
	if errno := checkName(name); errno != 0 {
		return errno
	}
	if errno := fs.resolve(parent, r); errno != 0 {
		return errno
	}
	if r.typ != typeDir {
		fs.put(r)
		return unix.ENOTDIR
	}
	return 0
}

// Lookup implements fsbackend.Backend.
func (fs *FS) Lookup(_ *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	var p ref
	if errno := fs.useDir(parent, name, &p); errno != 0 {
		return errno
	}
	defer fs.put(&p)
	return fs.lookup(&p, parent, name, out)
}

// lookup is Lookup in the directory behind p. A name that the guest knows and whose node has a descriptor takes one call,
// any other two: open, then look at what was opened. A handle that the guest has open does not count as a descriptor here:
// it may be closed before what was looked up is opened.
func (fs *FS) lookup(p *ref, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) errno {
	var st unix.Statx_t
	if s, _, n := fs.nodes.at(parent, name); n != nil {
		hot := n.slot >= 0
		s.mu.Unlock()
		if hot {
			if errno := sys.Statx(p.fd, name.CString(), statxFlags, statxMask, &st); errno != 0 {
				return errno
			}
			if m, ok := fs.mounts.of(&st, p.mount); ok && fs.countHot(keyOf(&st, m), &st, out) {
				fs.finishEntry(p, m, &st, out)
				return 0
			}
		}
	}
	slot, ok := fs.reserve()
	if !ok {
		// Every descriptor is in use right now: the node is found again by name.
		if errno := sys.Statx(p.fd, name.CString(), statxFlags, statxMask, &st); errno != 0 {
			return errno
		}
		return fs.enter(p, parent, name, &st, -1, -1, out)
	}
	fd, errno := openPath(p.fd, name.CString())
	if errno == 0 {
		if errno = sys.Statx(fd, nil, statxFlags, statxMask, &st); errno == 0 {
			return fs.enter(p, parent, name, &st, slot, fd, out)
		}
		_ = unix.Close(fd)
	}
	fs.fds.putBack(slot)
	return errno
}

// countHot counts a lookup of the file k if it is a node with a descriptor.
func (fs *FS) countHot(k key, st *unix.Statx_t, out *fuseproto.EntryOut) bool {
	t := &fs.nodes
	h := t.hashKey(k)
	i := shardOf(h)
	s := &t.shards[i]
	s.mu.Lock()
	defer s.mu.Unlock()
	slot, n := s.findKey(uint32(h), k)
	if n == nil || n.slot < 0 {
		return false
	}
	n.count()
	fs.fds.slots[n.slot].used.Store(true)
	n.privs.seen(uint32(st.Mode))
	out.NodeId = makeID(i, slot, n.gen)
	return true
}

// enter counts a lookup of the file that st describes and fills out. fd, if not -1, is a descriptor of it in the reserved
// slot; both are taken over.
func (fs *FS) enter(p *ref, parent uint64, name []byte, st *unix.Statx_t, slot int32, fd int, out *fuseproto.EntryOut) errno {
	m, ok := fs.mounts.of(st, p.mount)
	if !ok {
		fs.discard(slot, fd)
		return unix.ENFILE
	}
	if fd >= 0 && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		fs.probe(fs.mounts.at(m), fd)
	}
	s, id, n, rel := fs.nodes.insert(keyOf(st, m), parent, name)
	if n == nil {
		s.mu.Unlock()
		fs.discard(slot, fd)
		fs.tooMany.Do(func() {
			fs.log.Warn("guest knows too many inodes: further ones are ENFILE until it forgets some", "max_inodes", fs.cfg.MaxInodes, "dir", fs.cfg.Dir)
		})
		return unix.ENFILE
	}
	n.privs.seen(uint32(st.Mode))
	if n.btime == 0 && n.slot < 0 && n.handleLen > 0 {
		// Without a birth time this may be another file with a former one's number: its handle would be wrong.
		_, at, _ := splitID(id)
		s.setHandle(at, n, nil)
	}
	taken := false
	if fd >= 0 && n.slot < 0 {
		fs.fds.fill(slot, fd, id)
		s.setSlot(n, slot)
		taken = true
	}
	s.mu.Unlock()
	fs.nodes.settle(rel)
	if !taken {
		fs.discard(slot, fd)
	}
	out.NodeId = id
	fs.finishEntry(p, m, st, out)
	return 0
}

// discard closes fd and frees its slot.
func (fs *FS) discard(slot int32, fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
		fs.fds.putBack(slot)
	}
}

// finishEntry fills what a reply says of the file that st describes, found on mount m in the directory behind p.
func (fs *FS) finishEntry(p *ref, m uint16, st *unix.Statx_t, out *fuseproto.EntryOut) {
	out.Generation = 0
	fillAttr(&out.Attr, st)
	if m != p.mount && st.Mode&unix.S_IFMT == unix.S_IFDIR && fs.has(fuseproto.FUSE_SUBMOUNTS) {
		out.Attr.Flags |= fuseproto.FUSE_ATTR_SUBMOUNT
	}
}

// Forget implements fsbackend.Backend.
func (fs *FS) Forget(node, n uint64) {
	if fs.fixed(node) || n == 0 {
		return
	}
	if fs.withoutOpen(noOpenFlags) {
		fs.forgetUnopened(node, n)
	}
	if fs.nodes.forget(node, n) {
		fs.trim()
	}
}

// Readlink implements fsbackend.Readlinker.
func (fs *FS) Readlink(_ *fsbackend.Context, node uint64, dst *fsbackend.Sink) fsbackend.Errno {
	var r ref
	if errno := fs.resolve(node, &r); errno != 0 {
		return errno
	}
	defer fs.put(&r)
	if r.typ != typeSymlink {
		return unix.EINVAL
	}
	buf := getBuffer()
	defer putBuffer(buf)
	n, errno := sys.ReadlinkFD(r.fd, buf[:unix.PathMax])
	if errno != 0 {
		return errno
	}
	dst.Write(buf[:n])
	return fsbackend.OK
}

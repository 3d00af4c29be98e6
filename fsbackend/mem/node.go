package mem

import (
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// stamp is a time as the wire has it.
type stamp struct {
	sec  uint64 // two's complement seconds since the epoch
	nsec uint32
}

func makeStamp(t time.Time) stamp {
	return stamp{sec: uint64(t.Unix()), nsec: uint32(t.Nanosecond())}
}

// node is a file of any type. All but lookups and data is under FS.mu; size is changed under both FS.mu and data.mu, so
// that either is enough to read it.
type node struct {
	id      uint64 // nodeid and inode number, never used again
	lookups atomic.Uint64
	opens   int // handles

	mode, uid, gid, rdev, nlink uint32

	atime, mtime, ctime, btime stamp

	size     uint64
	target   string // of a symbolic link
	xattrs   map[string][]byte
	dir      *dir // nil if not a directory
	linkable bool // a file of Tmpfile that may get a name

	data data
}

// newNode makes a file that has no name yet. mu is held for writing (but in New).
func (f *FS) newNode(mode, uid, gid uint32) (*node, fsbackend.Errno) {
	if len(f.nodes) >= f.maxInodes {
		return nil, unix.ENOSPC
	}
	f.lastNode++
	now := makeStamp(f.now())
	n := &node{id: f.lastNode, mode: mode, uid: uid, gid: gid, nlink: 1, atime: now, mtime: now, ctime: now, btime: now}
	if n.is(unix.S_IFDIR) {
		n.nlink = 2
		n.dir = &dir{names: make(map[string]*entry), last: cookieDotDot}
	}
	f.nodes[n.id] = n
	return n, fsbackend.OK
}

func (n *node) is(typ uint32) bool {
	return n.mode&unix.S_IFMT == typ
}

// forget takes lookups of n back and says whether those were the last.
func (f *FS) forget(n *node, count uint64) bool {
	for {
		had := n.lookups.Load()
		left := had - min(had, count)
		if !n.lookups.CompareAndSwap(had, left) {
			continue
		}
		if had == 0 || left > 0 {
			return false
		}
		f.known.Add(-1)
		return true
	}
}

// drop takes n out of the table if it has no name, no handle and no lookup; the caller then frees its data, without mu. mu
// is held for writing.
func (f *FS) drop(n *node) bool {
	if n == f.root || n.nlink > 0 || n.opens > 0 || n.lookups.Load() > 0 || f.nodes[n.id] != n {
		return false
	}
	f.discard(n)
	return true
}

// discard takes n out of the table, and its attributes off the account. mu is held for writing.
func (f *FS) discard(n *node) {
	delete(f.nodes, n.id)
	f.refund(int64(len(n.target)))
	for name, value := range n.xattrs {
		f.refund(xattrCost(name, value))
	}
	n.xattrs = nil
}

// free gives the data of dropped nodes back. It waits for calls that still use them.
func (f *FS) free(dead ...*node) {
	for _, n := range dead {
		n.data.mu.Lock()
		f.refund(n.data.truncate(0))
		n.data.dead = true
		n.data.mu.Unlock()
	}
}

// killPriv clears the set-id bits and capabilities that do not outlive a change of contents or owner (fuse.h,
// FUSE_HANDLE_KILLPRIV_V2; setattr_should_drop_suidgid in Linux fs/attr.c). mu is held for writing.
func (f *FS) killPriv(n *node, suidgid bool) {
	if n.dir != nil {
		return
	}
	if suidgid {
		n.mode &^= unix.S_ISUID
		if n.mode&unix.S_IXGRP != 0 {
			n.mode &^= unix.S_ISGID
		}
	}
	const capability = "security.capability"
	if value, ok := n.xattrs[capability]; ok && f.killpriv.Load() {
		f.refund(xattrCost(capability, value))
		delete(n.xattrs, capability)
	}
}

// attr fills out. mu is held.
func (n *node) attr(out *fuseproto.Attr) {
	*out = fuseproto.Attr{
		Ino: n.id, Size: n.bytes(), Blocks: n.blocks(),
		Atime: n.atime.sec, Mtime: n.mtime.sec, Ctime: n.ctime.sec,
		Atimensec: n.atime.nsec, Mtimensec: n.mtime.nsec, Ctimensec: n.ctime.nsec,
		Mode: n.mode, Nlink: n.nlink, Rdev: n.rdev, Blksize: pageSize,
	}
	out.Uid, out.Gid = n.uid, n.gid
}

// bytes is st_size.
func (n *node) bytes() uint64 {
	switch {
	case n.dir != nil:
		return uint64(len(n.dir.names)) * direntBytes
	case n.is(unix.S_IFLNK):
		return uint64(len(n.target))
	default:
		return n.size
	}
}

// direntBytes is what an entry adds to a directory's st_size.
const direntBytes = 32

// blocks is st_blocks, in 512 bytes.
func (n *node) blocks() uint64 {
	return uint64(n.data.pages.Load()) * (pageSize / 512)
}

// entry fills out and counts a lookup of n. mu is held.
func (f *FS) entry(n *node, out *fuseproto.EntryOut) {
	if n.lookups.Add(1) == 1 {
		f.known.Add(1)
	}
	*out = fuseproto.EntryOut{NodeId: n.id}
	n.attr(&out.Attr)
}

// dir is what a directory has beyond a node.
type dir struct {
	parent *node // itself for the root; kept when the directory is removed
	names  map[string]*entry
	// order has the entries by cookie; removed ones have no node and go when they are the most.
	order   []*entry
	removed int
	last    uint64 // cookie given out
}

// Cookies are the offsets of READDIR: they only grow, so that a listing goes on where it was whatever comes and goes.
const (
	cookieDot    = 1
	cookieDotDot = 2
)

type entry struct {
	name   string
	node   *node
	cookie uint64
}

func (d *dir) insert(name string, n *node) {
	d.last++
	e := &entry{name: name, node: n, cookie: d.last}
	d.names[name] = e
	d.order = append(d.order, e)
}

func (d *dir) remove(e *entry) {
	delete(d.names, e.name)
	e.node = nil
	d.removed++
	if d.removed > 16 && d.removed > len(d.order)/2 {
		d.order = slices.DeleteFunc(d.order, func(e *entry) bool { return e.node == nil })
		d.removed = 0
	}
}

// after returns the entries whose cookies are above cookie, and removed ones among them.
func (d *dir) after(cookie uint64) []*entry {
	i, _ := slices.BinarySearchFunc(d.order, cookie, func(e *entry, c uint64) int {
		if e.cookie <= c {
			return -1
		}
		return 1
	})
	return d.order[i:]
}

// Getattr implements fsbackend.Backend.
func (f *FS) Getattr(_ *fsbackend.Context, in *fuseproto.GetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	f.mu.RLock()
	defer f.mu.RUnlock()
	n, errno := f.target(in.NodeId, in.Fh(), in.Flags()&fuseproto.FUSE_GETATTR_FH != 0)
	if errno == 0 {
		n.attr(&out.Attr)
	}
	return errno
}

// target returns the file of a request that may have a handle. mu is held.
func (f *FS) target(id, fh uint64, hasHandle bool) (*node, fsbackend.Errno) {
	if !hasHandle {
		return f.node(id)
	}
	h, errno := f.handle(id, fh)
	if errno != 0 {
		return nil, errno
	}
	return h.node, fsbackend.OK
}

// Statx implements fsbackend.Statxer.
func (f *FS) Statx(_ *fsbackend.Context, in *fuseproto.StatxIn, out *fuseproto.StatxOut) fsbackend.Errno {
	f.mu.RLock()
	defer f.mu.RUnlock()
	n, errno := f.target(in.NodeId, in.Fh, in.GetattrFlags&fuseproto.FUSE_GETATTR_FH != 0)
	if errno != 0 {
		return errno
	}
	sx := &out.Statx
	sx.Mask = unix.STATX_BASIC_STATS | unix.STATX_BTIME
	sx.Blksize, sx.Nlink, sx.Uid, sx.Gid, sx.Mode = pageSize, n.nlink, n.uid, n.gid, uint16(n.mode)
	sx.Ino, sx.Size, sx.Blocks = n.id, n.bytes(), n.blocks()
	sx.Atime.Sec, sx.Atime.Nsec = n.atime.sec, n.atime.nsec
	sx.Mtime.Sec, sx.Mtime.Nsec = n.mtime.sec, n.mtime.nsec
	sx.Ctime.Sec, sx.Ctime.Nsec = n.ctime.sec, n.ctime.nsec
	sx.Btime.Sec, sx.Btime.Nsec = n.btime.sec, n.btime.nsec
	sx.RdevMajor, sx.RdevMinor = unix.Major(uint64(n.rdev)), unix.Minor(uint64(n.rdev))
	return fsbackend.OK
}

// Setattr implements fsbackend.Setattrer.
func (f *FS) Setattr(_ *fsbackend.Context, in *fuseproto.SetattrIn, out *fuseproto.AttrOut) fsbackend.Errno {
	const second = 1_000_000_000
	if in.Atimensec >= second || in.Mtimensec >= second || in.Ctimensec >= second {
		return unix.EINVAL
	}
	f.mu.RLock()
	n, errno := f.target(in.NodeId, in.Fh, in.Valid&fuseproto.FATTR_FH != 0)
	f.mu.RUnlock()
	if errno != 0 {
		return errno
	}
	if in.Valid&fuseproto.FATTR_SIZE != 0 {
		if errno := f.setSize(n, in.Size, in.Valid&fuseproto.FATTR_KILL_SUIDGID != 0); errno != 0 {
			return errno
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.setAttr(n, in)
	n.attr(&out.Attr)
	return fsbackend.OK
}

// setAttr sets all but the size. mu is held for writing.
func (f *FS) setAttr(n *node, in *fuseproto.SetattrIn) {
	now := makeStamp(f.now())
	if in.Valid&(fuseproto.FATTR_UID|fuseproto.FATTR_GID) != 0 {
		f.killPriv(n, true)
	}
	if in.Valid&fuseproto.FATTR_UID != 0 {
		n.uid = in.Uid
	}
	if in.Valid&fuseproto.FATTR_GID != 0 {
		n.gid = in.Gid
	}
	if in.Valid&fuseproto.FATTR_MODE != 0 {
		n.mode = n.mode&unix.S_IFMT | in.Mode&0o7777
	}
	switch {
	case in.Valid&fuseproto.FATTR_ATIME_NOW != 0:
		n.atime = now
	case in.Valid&fuseproto.FATTR_ATIME != 0:
		n.atime = stamp{in.Atime, in.Atimensec}
	}
	switch {
	case in.Valid&fuseproto.FATTR_MTIME_NOW != 0:
		n.mtime = now
	case in.Valid&fuseproto.FATTR_MTIME != 0:
		n.mtime = stamp{in.Mtime, in.Mtimensec}
	}
	n.ctime = now
	if in.Valid&fuseproto.FATTR_CTIME != 0 {
		n.ctime = stamp{in.Ctime, in.Ctimensec}
	}
}

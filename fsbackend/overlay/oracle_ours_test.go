package overlay_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fsbackend/overlay"
	"github.com/sluicefs/sluice/fuseproto"
)

// ourSide is an overlay of ours. What a guest's kernel checks before it asks a file system is checked here, too.
type ourSide struct {
	*fsbackendtest.Client
	fs    *overlay.FS
	slots [slots]ourFile
	upper string // where the upper layer is on the host
	// kept are the files that are not forgotten yet, as a guest has them in its caches: with keep, the last that were looked up.
	keep int
	kept []uint64
}

// forget gives a lookup back, sooner or later.
func (s *ourSide) forget(node uint64) {
	s.kept = append(s.kept, node)
	for len(s.kept) > s.keep {
		s.fs.Forget(s.kept[0], 1)
		s.kept = s.kept[1:]
	}
}

// ourFile is an open file, which has a lookup of its node.
type ourFile struct {
	node, fh  uint64
	open      bool
	readOnly  bool
	temporary bool // O_TMPFILE, without a name so far
}

func newOurSide(fs *overlay.FS, upper string) *ourSide {
	o := &ourSide{Client: &fsbackendtest.Client{R: fsbackend.Resolve(fs)}, fs: fs, upper: upper}
	fs.Init(fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION, Flags: fuseproto.FUSE_POSIX_ACL | fuseproto.FUSE_DONT_MASK})
	return o
}

func (s *ourSide) closeSlots() {
	for i := range s.slots {
		s.closeSlot(i)
	}
	for _, node := range s.kept {
		s.fs.Forget(node, 1)
	}
	s.kept = nil
}

func (s *ourSide) closeSlot(i int) {
	if f := &s.slots[i]; f.open {
		_ = s.Flush(f.node, f.fh)
		s.Release(f.node, f.fh)
		s.forget(f.node)
		*f = ourFile{}
	}
}

func (s *ourSide) put(i int, f ourFile) fsbackend.Errno {
	s.closeSlot(i)
	f.open = true
	s.slots[i] = f
	return 0
}

func kindOf(a *fuseproto.Attr) uint32 { return a.Mode & unix.S_IFMT }

// walk looks path up; its lookup is the caller's to forget.
func (s *ourSide) walk(path string) (at fuseproto.EntryOut, e fsbackend.Errno) {
	at.NodeId = fsbackendtest.Root
	if at.Attr, e = s.Getattr(at.NodeId); e != 0 || path == "" {
		return at, e
	}
	for name := range strings.SplitSeq(path, "/") {
		next, e := s.step(&at, name)
		s.forget(at.NodeId)
		if e != 0 {
			return next, e
		}
		at = next
	}
	return at, 0
}

func (s *ourSide) step(dir *fuseproto.EntryOut, name string) (fuseproto.EntryOut, fsbackend.Errno) {
	switch kindOf(&dir.Attr) {
	case unix.S_IFLNK:
		return fuseproto.EntryOut{}, unix.ENOENT // none of them leads anywhere
	case unix.S_IFDIR:
	default:
		return fuseproto.EntryOut{}, unix.ENOTDIR
	}
	out, e := s.Lookup(dir.NodeId, name)
	if e == 0 && out.NodeId == 0 {
		e = unix.ENOENT
	}
	return out, e
}

// on does something to the file at path.
func (s *ourSide) on(path string, do func(f *fuseproto.EntryOut) fsbackend.Errno) fsbackend.Errno {
	f, e := s.walk(path)
	if e != 0 {
		return e
	}
	defer s.forget(f.NodeId)
	return do(&f)
}

// follow is on for a call that follows symbolic links.
func (s *ourSide) follow(path string, do func(f *fuseproto.EntryOut) fsbackend.Errno) fsbackend.Errno {
	return s.on(path, func(f *fuseproto.EntryOut) fsbackend.Errno {
		if kindOf(&f.Attr) == unix.S_IFLNK {
			return unix.ENOENT
		}
		return do(f)
	})
}

// in does something to a name in a directory; old is what is there, or nil.
func (s *ourSide) in(path string, do func(dir uint64, name string, old *fuseproto.EntryOut) fsbackend.Errno) fsbackend.Errno {
	i := strings.LastIndexByte(path, '/')
	parent, name := path[:max(i, 0)], path[i+1:]
	return s.on(parent, func(dir *fuseproto.EntryOut) fsbackend.Errno {
		f, e := s.step(dir, name)
		switch e {
		case 0:
			defer s.forget(f.NodeId)
			return do(dir.NodeId, name, &f)
		case unix.ENOENT:
			if kindOf(&dir.Attr) == unix.S_IFLNK {
				return e
			}
			return do(dir.NodeId, name, nil)
		}
		return e
	})
}

// entry forgets what a call has made.
func (s *ourSide) entry(out fuseproto.EntryOut, e fsbackend.Errno) fsbackend.Errno {
	if e == 0 {
		s.forget(out.NodeId)
	}
	return e
}

// fresh does something to a name that is not there.
func (s *ourSide) fresh(path string, do func(dir uint64, name string) fsbackend.Errno) fsbackend.Errno {
	return s.in(path, func(dir uint64, name string, old *fuseproto.EntryOut) fsbackend.Errno {
		if old != nil {
			return unix.EEXIST
		}
		return do(dir, name)
	})
}

func (s *ourSide) do(o op) string {
	var f ourFile
	if o.slot >= 0 {
		f = s.slots[o.slot]
	}
	if text, ok := s.doOpen(o, f); ok {
		return text
	}
	var e fsbackend.Errno
	text := ""
	switch o.what {
	case "create":
		e = s.fresh(o.a, func(dir uint64, name string) fsbackend.Errno {
			out, e := s.Create(dir, name, unix.O_RDWR|unix.O_EXCL, o.mode()&0o777)
			if e != 0 {
				return e
			}
			return s.put(o.slot, ourFile{node: out.NodeId, fh: out.Fh})
		})
	case "open", "openro":
		e = s.open(o)
	case "tmpfile":
		e = s.on(o.a, func(d *fuseproto.EntryOut) fsbackend.Errno {
			if kindOf(&d.Attr) != unix.S_IFDIR {
				return unix.ENOTDIR
			}
			out, e := s.Tmpfile(d.NodeId, unix.O_RDWR|unix.O_TMPFILE, o.mode()&0o777)
			if e != 0 {
				return e
			}
			return s.put(o.slot, ourFile{node: out.NodeId, fh: out.Fh, temporary: true})
		})
	case "mkdir":
		e = s.fresh(o.a, func(dir uint64, name string) fsbackend.Errno { return s.entry(s.Mkdir(dir, name, o.mode()&0o1777)) })
	case "rmdir":
		e = s.in(o.a, func(dir uint64, name string, old *fuseproto.EntryOut) fsbackend.Errno {
			switch {
			case old == nil:
				return unix.ENOENT
			case kindOf(&old.Attr) != unix.S_IFDIR:
				return unix.ENOTDIR
			}
			return s.Rmdir(dir, name)
		})
	case "unlink":
		e = s.in(o.a, func(dir uint64, name string, old *fuseproto.EntryOut) fsbackend.Errno {
			switch {
			case old == nil:
				return unix.ENOENT
			case kindOf(&old.Attr) == unix.S_IFDIR:
				return unix.EISDIR
			}
			return s.Unlink(dir, name)
		})
	case "rename":
		e = s.rename(o, 0)
	case "noreplace":
		e = s.rename(o, unix.RENAME_NOREPLACE)
	case "exchange":
		e = s.rename(o, unix.RENAME_EXCHANGE)
	case "whiteout":
		e = s.rename(o, unix.RENAME_WHITEOUT)
	case "link":
		e = s.on(o.a, func(f *fuseproto.EntryOut) fsbackend.Errno {
			return s.fresh(o.b, func(dir uint64, name string) fsbackend.Errno {
				if kindOf(&f.Attr) == unix.S_IFDIR {
					return unix.EPERM
				}
				return s.entry(s.Link(f.NodeId, dir, name))
			})
		})
	case "symlink":
		e = s.fresh(o.a, func(dir uint64, name string) fsbackend.Errno { return s.entry(s.Symlink(dir, name, o.target())) })
	case "readlink":
		e = s.on(o.a, func(f *fuseproto.EntryOut) fsbackend.Errno {
			if kindOf(&f.Attr) != unix.S_IFLNK {
				return unix.EINVAL
			}
			target, e := s.Readlink(f.NodeId)
			text = target
			return e
		})
		text = " " + text
	case "mknod":
		node := nodes[o.n%uint64(len(nodes))]
		e = s.fresh(o.a, func(dir uint64, name string) fsbackend.Errno {
			return s.entry(s.Mknod(dir, name, node.mode|o.mode()&0o777, node.dev))
		})
	case "truncate":
		e = s.follow(o.a, func(f *fuseproto.EntryOut) fsbackend.Errno {
			switch kindOf(&f.Attr) {
			case unix.S_IFDIR:
				return unix.EISDIR
			case unix.S_IFREG:
				return s.Truncate(f.NodeId, o.offset())
			}
			return unix.EINVAL
		})
	case "chmod", "chown", "utimens":
		e = s.setattr(o)
	case "setxattr", "getxattr", "removexattr":
		e, text = s.xattr(o)
	case "setacl", "removeacl":
		name, value, isDefault := o.acl()
		e = s.on(o.a, func(f *fuseproto.EntryOut) fsbackend.Errno {
			if k := kindOf(&f.Attr); k != unix.S_IFDIR && (isDefault || k != unix.S_IFREG) {
				return unix.EACCES
			}
			if o.what == "setacl" {
				return s.Setxattr(f.NodeId, name, value, 0)
			}
			return s.Removexattr(f.NodeId, name)
		})
	case "readdir":
		e = s.follow(o.a, func(f *fuseproto.EntryOut) fsbackend.Errno {
			if kindOf(&f.Attr) != unix.S_IFDIR {
				return unix.ENOTDIR
			}
			entries, e := s.list(f.NodeId)
			for _, d := range entries {
				text += " " + d.Name + ":" + typeLetter(d.Type)
			}
			if len(entries) == 0 && e == 0 {
				text = " "
			}
			return e
		})
	case "stat":
		e = s.on(o.a, func(f *fuseproto.EntryOut) fsbackend.Errno {
			text = describeAttr(&f.Attr, "", nil).String()
			return 0
		})
		if e == 0 {
			return text
		}
	default:
		panic(o.what)
	}
	return errnoText(errnoOf(e)) + text
}

func errnoOf(e fsbackend.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

// doOpen does what is done with open files.
func (s *ourSide) doOpen(o op, f ourFile) (string, bool) {
	var e fsbackend.Errno
	text := ""
	switch o.what {
	default:
		return "", false
	case "close":
		if !f.open {
			return "EBADF", true
		}
		s.closeSlot(o.slot)
	case "write":
		n := uint32(0)
		if e = unix.EBADF; f.open && !f.readOnly {
			n, e = s.Write(f.node, f.fh, o.offset(), o.data(), unix.O_RDWR)
		}
		text = fmt.Sprint(" ", n)
	case "read":
		var data []byte
		if e = unix.EBADF; f.open {
			data, e = s.Read(f.node, f.fh, 0, 1<<17)
		}
		text = " " + digest(data)
	case "fstat":
		if e = unix.EBADF; f.open {
			var a fuseproto.Attr
			if a, e = s.GetattrFh(f.node, f.fh); e == 0 {
				return describeAttr(&a, "", nil).String(), true
			}
		}
	case "ftruncate":
		switch {
		case !f.open:
			e = unix.EBADF
		case f.readOnly:
			e = unix.EINVAL
		default:
			in := fuseproto.SetattrIn{}
			in.Valid, in.Size, in.Fh = fuseproto.FATTR_SIZE|fuseproto.FATTR_FH, o.offset(), f.fh
			_, e = s.Setattr(f.node, in)
		}
	case "fallocate", "punch":
		mode := uint32(o.n%2) * unix.FALLOC_FL_KEEP_SIZE
		if o.what == "punch" {
			mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
		}
		if e = unix.EBADF; f.open && !f.readOnly {
			e = s.Fallocate(f.node, f.fh, o.offset(), o.length()+1, mode)
		}
	case "fchmod":
		if e = unix.EBADF; f.open {
			in := fuseproto.SetattrIn{}
			in.Valid, in.Mode = fuseproto.FATTR_MODE, o.mode()&0o777
			_, e = s.Setattr(f.node, in)
		}
	case "linkslot":
		e = s.linkSlot(o, &s.slots[o.slot])
	case "copyrange":
		out := s.slots[o.other()]
		if !f.open || !out.open || f.node == out.node {
			return "EBADF", true
		}
		var n uint64
		if e = unix.EBADF; !out.readOnly {
			in := fuseproto.CopyFileRangeIn{FhIn: f.fh, OffIn: o.offset() / 2, NodeIdOut: out.node, FhOut: out.fh, OffOut: o.offset(), Len: o.length()}
			in.NodeId = f.node
			n, e = s.CopyFileRange(in)
		}
		text = fmt.Sprint(" ", n)
	}
	return errnoText(errnoOf(e)) + text, true
}

func (s *ourSide) linkSlot(o op, f *ourFile) fsbackend.Errno {
	if !f.open {
		return unix.EBADF
	}
	e := s.fresh(o.a, func(dir uint64, name string) fsbackend.Errno {
		if a, e := s.Getattr(f.node); e != 0 || a.Nlink == 0 && !f.temporary {
			return unix.ENOENT
		}
		return s.entry(s.Link(f.node, dir, name))
	})
	if e == 0 {
		f.temporary = false
	}
	return e
}

func (s *ourSide) open(o op) fsbackend.Errno {
	flags := uint32(unix.O_RDWR)
	if o.what == "openro" {
		flags = unix.O_RDONLY
	}
	f, e := s.walk(o.a)
	if e != 0 {
		return e
	}
	if kindOf(&f.Attr) != unix.S_IFREG {
		s.forget(f.NodeId)
		return unix.EINVAL
	}
	fh, e := s.Open(f.NodeId, flags)
	if e != 0 {
		s.forget(f.NodeId)
		return e
	}
	return s.put(o.slot, ourFile{node: f.NodeId, fh: fh, readOnly: flags == unix.O_RDONLY})
}

// rename is vfs_rename and what leads to it.
func (s *ourSide) rename(o op, flags uint32) fsbackend.Errno {
	return s.in(o.a, func(from uint64, oldName string, old *fuseproto.EntryOut) fsbackend.Errno {
		return s.in(o.b, func(to uint64, newName string, there *fuseproto.EntryOut) fsbackend.Errno {
			switch {
			case old == nil:
				return unix.ENOENT
			case flags&unix.RENAME_NOREPLACE != 0 && there != nil:
				return unix.EEXIST
			case flags&unix.RENAME_EXCHANGE != 0 && there == nil:
				return unix.ENOENT
			case strings.HasPrefix(o.b, o.a+"/"):
				return unix.EINVAL
			case strings.HasPrefix(o.a, o.b+"/"):
				if flags&unix.RENAME_EXCHANGE != 0 {
					return unix.EINVAL
				}
				return unix.ENOTEMPTY
			case there != nil && there.NodeId == old.NodeId:
				return 0
			}
			if there != nil && flags&unix.RENAME_EXCHANGE == 0 {
				oldDir, newDir := kindOf(&old.Attr) == unix.S_IFDIR, kindOf(&there.Attr) == unix.S_IFDIR
				switch {
				case oldDir && !newDir:
					return unix.ENOTDIR
				case !oldDir && newDir:
					return unix.EISDIR
				}
			}
			return s.Rename(from, oldName, to, newName, flags)
		})
	})
}

func (s *ourSide) setattr(o op) fsbackend.Errno {
	in := fuseproto.SetattrIn{}
	find := s.on
	switch o.what {
	case "chmod":
		in.Valid, in.Mode = fuseproto.FATTR_MODE, o.mode()
		find = s.follow
	case "chown":
		uid, gid := o.owner()
		in.Valid, in.Uid, in.Gid = fuseproto.FATTR_UID|fuseproto.FATTR_GID, uint32(uid), uint32(gid)
	default:
		in.Valid, in.Atime, in.Mtime = fuseproto.FATTR_ATIME|fuseproto.FATTR_MTIME, uint64(o.time()), uint64(o.time())
	}
	return find(o.a, func(f *fuseproto.EntryOut) fsbackend.Errno {
		in := in
		if o.what == "chown" && kindOf(&f.Attr) != unix.S_IFDIR && f.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
			// setattr_prepare and fuse_do_setattr take these bits away, without FUSE_HANDLE_KILLPRIV.
			in.Valid |= fuseproto.FATTR_MODE
			in.Mode = f.Mode &^ unix.S_ISUID
			if f.Mode&unix.S_IXGRP != 0 {
				in.Mode &^= unix.S_ISGID
			}
		}
		_, e := s.Setattr(f.NodeId, in)
		return e
	})
}

func (s *ourSide) xattr(o op) (e fsbackend.Errno, text string) {
	name := o.xattr()
	e = s.on(o.a, func(f *fuseproto.EntryOut) fsbackend.Errno {
		// xattr_permission: attributes of users are for files and directories.
		k := kindOf(&f.Attr)
		denied := strings.HasPrefix(name, "user.") && k != unix.S_IFREG && k != unix.S_IFDIR
		switch o.what {
		case "setxattr":
			if denied {
				return unix.EPERM
			}
			return s.Setxattr(f.NodeId, name, o.data()[:o.n%200%uint64(len(o.data()))], 0)
		case "removexattr":
			if denied {
				return unix.EPERM
			}
			return s.Removexattr(f.NodeId, name)
		}
		if denied {
			text = " " + digest(nil)
			return unix.ENODATA
		}
		value, _, e := s.Getxattr(f.NodeId, name, 4096)
		text = " " + digest(value)
		return e
	})
	if o.what == "getxattr" && text == "" {
		text = " " + digest(nil)
	}
	return e, text
}

func typeLetter(typ uint32) string {
	switch typ {
	case unix.DT_DIR:
		return "d"
	case unix.DT_LNK:
		return "L"
	case unix.DT_FIFO:
		return "p"
	case unix.DT_SOCK:
		return "S"
	case unix.DT_CHR, unix.DT_BLK:
		return "D"
	}
	return "-"
}

// list returns a directory's entries, sorted.
func (s *ourSide) list(node uint64) ([]fsbackendtest.Dirent, fsbackend.Errno) {
	fh, e := s.Opendir(node)
	if e != 0 {
		return nil, e
	}
	defer s.Releasedir(node, fh)
	var all []fsbackendtest.Dirent
	for off := uint64(0); ; {
		entries, e := s.Readdir(node, fh, off, 4096, false)
		if e != 0 {
			return nil, e
		}
		if len(entries) == 0 {
			break
		}
		for _, d := range entries {
			off = d.Off
			if d.Name != "." && d.Name != ".." {
				all = append(all, d)
			}
		}
	}
	slices.SortFunc(all, func(a, b fsbackendtest.Dirent) int { return strings.Compare(a.Name, b.Name) })
	return all, 0
}

func describeAttr(a *fuseproto.Attr, extra string, attrs []string) fileInfo {
	return fileInfo{a.Mode, a.Uid, a.Gid, a.Size, a.Nlink, a.Rdev, int64(a.Mtime), extra, attrs}
}

// tree also checks that listings and lookups say the same, and that hard links in the upper layer are one node.
func (s *ourSide) tree() (map[string]string, error) {
	v := &visitor{s: s, all: make(map[string]string), links: make(map[uint64]name)}
	root, e := s.walk("")
	if e != 0 {
		return nil, e
	}
	v.visit("", root)
	// Until now, so that nodes keep their numbers.
	for _, node := range v.seen {
		s.forget(node)
	}
	return v.all, errors.Join(v.errs...)
}

type visitor struct {
	s     *ourSide
	all   map[string]string
	links map[uint64]name // by inode number in the upper layer
	seen  []uint64        // nodes looked up
	errs  []error
}

type name struct {
	path string
	ino  uint64
}

func (v *visitor) wrong(format string, args ...any) {
	v.errs = append(v.errs, fmt.Errorf(format, args...))
}

func (v *visitor) visit(path string, f fuseproto.EntryOut) {
	s := v.s
	var st unix.Stat_t
	if unix.Lstat(s.upper+"/"+path, &st) == nil {
		if other, ok := v.links[st.Ino]; ok && other.ino != f.Ino {
			v.wrong("%s and %s are one file in the upper layer, and have inode numbers %d and %d", other.path, path, other.ino, f.Ino)
		}
		v.links[st.Ino] = name{path, f.Ino}
	}
	extra := ""
	switch kindOf(&f.Attr) {
	case unix.S_IFREG:
		fh, e := s.Open(f.NodeId, unix.O_RDONLY)
		if e != 0 {
			v.wrong("open %s: %w", path, e)
			return
		}
		data, e := s.Read(f.NodeId, fh, 0, 1<<17)
		s.Release(f.NodeId, fh)
		if e != 0 {
			v.wrong("read %s: %w", path, e)
		}
		extra = digest(data)
	case unix.S_IFLNK:
		extra, _ = s.Readlink(f.NodeId)
	}
	list, _, e := s.Listxattr(f.NodeId, 4096)
	if e != 0 {
		v.wrong("list attributes of %s: %w", path, e)
	}
	var attrs []string
	for name := range bytes.SplitSeq(list, []byte{0}) {
		if len(name) == 0 {
			continue
		}
		value, _, e := s.Getxattr(f.NodeId, string(name), 1024)
		if e != 0 {
			v.wrong("attribute %s of %s: %w", name, path, e)
		}
		attrs = append(attrs, string(name)+"="+digest(value))
	}
	key := path
	if key == "" {
		key = "."
	}
	v.all[key] = describeAttr(&f.Attr, extra, attrs).String()
	if kindOf(&f.Attr) != unix.S_IFDIR {
		return
	}
	entries, e := s.list(f.NodeId)
	if e != 0 {
		v.wrong("list %s: %w", path, e)
	}
	for _, d := range entries {
		child, e := s.Lookup(f.NodeId, d.Name)
		if e != 0 {
			v.wrong("%s/%s is listed, but: %w", path, d.Name, e)
			continue
		}
		v.seen = append(v.seen, child.NodeId)
		if child.Ino != d.Ino || child.Mode>>12 != d.Type {
			v.wrong("%s/%s is listed with inode %d, type %d, and has %d, %d", path, d.Name, d.Ino, d.Type, child.Ino, child.Mode>>12)
		}
		v.visit(strings.TrimPrefix(path+"/"+d.Name, "/"), child)
	}
}

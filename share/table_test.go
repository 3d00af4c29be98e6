package share

import (
	"reflect"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fsbackend/fsbackendtest"
	"github.com/sluicefs/sluice/fuseproto"
)

// request is one request to a Share and what came back.
type request struct {
	c          fsbackend.Context
	node, fh   uint64
	node2, fh2 uint64 // LINK's Oldnodeid, RENAME's Newdir, COPY_FILE_RANGE's target
	flags      uint32 // of OPEN, CREATE and RENAME
	mask       uint32 // of ACCESS
	cmd        uint32 // of IOCTL
	valid      uint32 // of SETATTR
	owner      owner
	name       string // "" is "name"

	entry         fuseproto.EntryOut
	attr          fuseproto.Attr
	outFh         uint64
	offset        uint64 // LSEEK's
	dirents       []byte
	before, after any // the In struct, which must come back as it was
}

func (r *request) header() fuseproto.InHeader {
	return fuseproto.InHeader{NodeId: r.node, Caller: r.c.Caller}
}

func (r *request) fsname() fsbackend.Name {
	if r.name == "" {
		return fsbackend.MakeName("name")
	}
	return fsbackend.MakeName(r.name)
}

// with makes a call with an In struct.
func with[T any](r *request, in T, call func(*T) Errno) Errno {
	r.before = in
	errno := call(&in)
	r.after = in
	return errno
}

// list gives call 4 KiB of room for entries.
func (r *request) list(plus bool, call func(*fsbackend.DirList) Errno) Errno {
	buf := make([]byte, 4096)
	l := &fsbackend.DirList{Plus: plus, Translate: func(e *fuseproto.EntryOut) { e.NodeId = 0 }} // another request left it
	l.Reset([]unix.Iovec{{Base: &buf[0], Len: uint64(len(buf))}}, 0, uint64(len(buf)))
	errno := call(l)
	r.dirents = buf[:l.Written()]
	return errno
}

// op is a method through which a guest reaches a backend.
type op struct {
	call     func(*Share, *request) Errno
	modifies bool  // EROFS on a read-only part
	creates  bool  // EOVERFLOW for a caller without an id
	handle   bool  // takes a handle
	second   bool  // takes a second node
	lacking  Errno // what a part among others answers that lacks it
}

// ops has every one. TestOpsAreComplete misses what is left out.
var ops = map[string]op{
	"Lookup": {call: func(s *Share, r *request) Errno { return s.Lookup(&r.c, r.node, r.fsname(), &r.entry) }},
	"Getattr": {handle: true, call: func(s *Share, r *request) Errno {
		in := fuseproto.GetattrIn{InHeader: r.header(), Flags_: fuseproto.FUSE_GETATTR_FH, Fh_: r.fh}
		return with(r, in, func(in *fuseproto.GetattrIn) Errno {
			var out fuseproto.AttrOut
			errno := s.Getattr(&r.c, in, &out)
			r.attr = out.Attr
			return errno
		})
	}},
	"Setattr": {modifies: true, handle: true, lacking: unix.EPERM, call: func(s *Share, r *request) Errno {
		in := fuseproto.SetattrIn{}
		in.InHeader, in.Fh, in.Valid = r.header(), r.fh, fuseproto.FATTR_FH|r.valid
		in.Uid, in.Gid = r.owner.Uid, r.owner.Gid
		return with(r, in, func(in *fuseproto.SetattrIn) Errno {
			var out fuseproto.AttrOut
			errno := s.Setattr(&r.c, in, &out)
			r.attr = out.Attr
			return errno
		})
	}},
	"Statx": {handle: true, call: func(s *Share, r *request) Errno {
		in := fuseproto.StatxIn{InHeader: r.header(), GetattrFlags: fuseproto.FUSE_GETATTR_FH, Fh: r.fh}
		return with(r, in, func(in *fuseproto.StatxIn) Errno {
			var out fuseproto.StatxOut
			errno := s.Statx(&r.c, in, &out)
			r.attr.Ino, r.attr.Uid, r.attr.Gid, r.attr.Size = out.Ino, out.Uid, out.Gid, out.Size
			return errno
		})
	}},
	"Statfs": {call: func(s *Share, r *request) Errno { return s.Statfs(&r.c, r.node, new(fuseproto.StatfsOut)) }},
	"Access": {call: func(s *Share, r *request) Errno {
		in := fuseproto.AccessIn{InHeader: r.header(), Mask: r.mask}
		return with(r, in, func(in *fuseproto.AccessIn) Errno { return s.Access(&r.c, in) })
	}},
	"Readlink": {lacking: unix.EINVAL, call: func(s *Share, r *request) Errno {
		return s.Readlink(&r.c, r.node, new(fsbackend.Sink))
	}},
	"Mknod": {modifies: true, creates: true, lacking: unix.EPERM, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.MknodIn{InHeader: r.header()}, func(in *fuseproto.MknodIn) Errno {
			return s.Mknod(&r.c, in, r.fsname(), &r.entry)
		})
	}},
	"Mkdir": {modifies: true, creates: true, lacking: unix.EPERM, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.MkdirIn{InHeader: r.header()}, func(in *fuseproto.MkdirIn) Errno {
			return s.Mkdir(&r.c, in, r.fsname(), &r.entry)
		})
	}},
	"Symlink": {modifies: true, creates: true, lacking: unix.EPERM, call: func(s *Share, r *request) Errno {
		return s.Symlink(&r.c, r.node, r.fsname(), fsbackend.MakeName("target"), &r.entry)
	}},
	"Link": {modifies: true, creates: true, second: true, lacking: unix.EPERM, call: func(s *Share, r *request) Errno {
		in := fuseproto.LinkIn{InHeader: r.header(), Oldnodeid: r.node2}
		return with(r, in, func(in *fuseproto.LinkIn) Errno { return s.Link(&r.c, in, r.fsname(), &r.entry) })
	}},
	"Unlink": {modifies: true, lacking: unix.EPERM, call: func(s *Share, r *request) Errno {
		return s.Unlink(&r.c, r.node, r.fsname())
	}},
	"Rmdir": {modifies: true, lacking: unix.EPERM, call: func(s *Share, r *request) Errno {
		return s.Rmdir(&r.c, r.node, r.fsname())
	}},
	"Rename": {modifies: true, second: true, lacking: unix.EPERM, call: func(s *Share, r *request) Errno {
		in := fuseproto.Rename2In{InHeader: r.header(), Newdir: r.node2, Flags: r.flags}
		return with(r, in, func(in *fuseproto.Rename2In) Errno { return s.Rename(&r.c, in, r.fsname(), r.fsname()) })
	}},
	"Open": {call: func(s *Share, r *request) Errno {
		in := fuseproto.OpenIn{InHeader: r.header(), Flags: r.flags}
		return with(r, in, func(in *fuseproto.OpenIn) Errno {
			var out fuseproto.OpenOut
			errno := s.Open(&r.c, in, &out)
			r.outFh = out.Fh
			return errno
		})
	}},
	"Release": {handle: true, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.ReleaseIn{InHeader: r.header(), Fh: r.fh}, func(in *fuseproto.ReleaseIn) Errno {
			s.Release(&r.c, in)
			return fsbackend.OK
		})
	}},
	"Create": {modifies: true, creates: true, lacking: unix.EPERM, call: func(s *Share, r *request) Errno {
		in := fuseproto.CreateIn{InHeader: r.header(), Flags: r.flags}
		return with(r, in, func(in *fuseproto.CreateIn) Errno {
			var out fuseproto.CreateOut
			errno := s.Create(&r.c, in, r.fsname(), &out)
			r.entry, r.outFh = out.EntryOut, out.Fh
			return errno
		})
	}},
	"Tmpfile": {modifies: true, creates: true, lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.CreateIn{InHeader: r.header()}, func(in *fuseproto.CreateIn) Errno {
			var out fuseproto.CreateOut
			errno := s.Tmpfile(&r.c, in, &out)
			r.entry, r.outFh = out.EntryOut, out.Fh
			return errno
		})
	}},
	"Read": {handle: true, lacking: unix.EINVAL, call: func(s *Share, r *request) Errno {
		in := fuseproto.ReadIn{InHeader: r.header(), Fh: r.fh}
		return with(r, in, func(in *fuseproto.ReadIn) Errno { return s.Read(&r.c, in, new(fsbackend.Sink)) })
	}},
	"Write": {modifies: true, handle: true, lacking: unix.EINVAL, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.WriteIn{InHeader: r.header(), Fh: r.fh}, func(in *fuseproto.WriteIn) Errno {
			_, errno := s.Write(&r.c, in, new(fsbackend.Source))
			return errno
		})
	}},
	"Flush": {handle: true, call: func(s *Share, r *request) Errno {
		in := fuseproto.FlushIn{InHeader: r.header(), Fh: r.fh}
		return with(r, in, func(in *fuseproto.FlushIn) Errno { return s.Flush(&r.c, in) })
	}},
	"Fsync": {handle: true, call: func(s *Share, r *request) Errno {
		in := fuseproto.FsyncIn{InHeader: r.header(), Fh: r.fh}
		return with(r, in, func(in *fuseproto.FsyncIn) Errno { return s.Fsync(&r.c, in) })
	}},
	"Fsyncdir": {handle: true, call: func(s *Share, r *request) Errno {
		in := fuseproto.FsyncIn{InHeader: r.header(), Fh: r.fh}
		return with(r, in, func(in *fuseproto.FsyncIn) Errno { return s.Fsyncdir(&r.c, in) })
	}},
	"Syncfs": {call: func(s *Share, r *request) Errno { return s.Syncfs(&r.c, r.node) }},
	"Opendir": {lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.OpenIn{InHeader: r.header()}, func(in *fuseproto.OpenIn) Errno {
			var out fuseproto.OpenOut
			errno := s.Opendir(&r.c, in, &out)
			r.outFh = out.Fh
			return errno
		})
	}},
	"Readdir": {handle: true, lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.ReadIn{InHeader: r.header(), Fh: r.fh}, func(in *fuseproto.ReadIn) Errno {
			return r.list(false, func(l *fsbackend.DirList) Errno { return s.Readdir(&r.c, in, l) })
		})
	}},
	"Readdirplus": {handle: true, lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.ReadIn{InHeader: r.header(), Fh: r.fh}, func(in *fuseproto.ReadIn) Errno {
			return r.list(true, func(l *fsbackend.DirList) Errno { return s.Readdirplus(&r.c, in, l) })
		})
	}},
	"Releasedir": {handle: true, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.ReleaseIn{InHeader: r.header(), Fh: r.fh}, func(in *fuseproto.ReleaseIn) Errno {
			s.Releasedir(&r.c, in)
			return fsbackend.OK
		})
	}},
	"Getxattr": {lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.GetxattrIn{InHeader: r.header()}, func(in *fuseproto.GetxattrIn) Errno {
			_, errno := s.Getxattr(&r.c, in, r.fsname(), new(fsbackend.Sink))
			return errno
		})
	}},
	"Listxattr": {lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		return with(r, fuseproto.GetxattrIn{InHeader: r.header()}, func(in *fuseproto.GetxattrIn) Errno {
			_, errno := s.Listxattr(&r.c, in, new(fsbackend.Sink))
			return errno
		})
	}},
	"Setxattr": {modifies: true, lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		in := fuseproto.SetxattrIn{InHeader: r.header()}
		return with(r, in, func(in *fuseproto.SetxattrIn) Errno { return s.Setxattr(&r.c, in, r.fsname(), nil) })
	}},
	"Removexattr": {modifies: true, lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		return s.Removexattr(&r.c, r.node, r.fsname())
	}},
	"Fallocate": {modifies: true, handle: true, lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		in := fuseproto.FallocateIn{InHeader: r.header(), Fh: r.fh}
		return with(r, in, func(in *fuseproto.FallocateIn) Errno { return s.Fallocate(&r.c, in) })
	}},
	"Lseek": {handle: true, call: func(s *Share, r *request) Errno {
		in := fuseproto.LseekIn{InHeader: r.header(), Fh: r.fh, Offset: 3, Whence: unix.SEEK_HOLE}
		return with(r, in, func(in *fuseproto.LseekIn) Errno {
			var out fuseproto.LseekOut
			errno := s.Lseek(&r.c, in, &out)
			r.offset = out.Offset
			return errno
		})
	}},
	"CopyFileRange": {modifies: true, handle: true, second: true, lacking: unix.EOPNOTSUPP, call: func(s *Share, r *request) Errno {
		in := fuseproto.CopyFileRangeIn{InHeader: r.header(), FhIn: r.fh, NodeIdOut: r.node2, FhOut: r.fh2}
		return with(r, in, func(in *fuseproto.CopyFileRangeIn) Errno {
			_, errno := s.CopyFileRange(&r.c, in)
			return errno
		})
	}},
	"Getlk": {handle: true, lacking: unix.ENOLCK, call: func(s *Share, r *request) Errno {
		in := fuseproto.LkIn{InHeader: r.header(), Fh: r.fh}
		return with(r, in, func(in *fuseproto.LkIn) Errno { return s.Getlk(&r.c, in, new(fuseproto.LkOut)) })
	}},
	"Setlk": {handle: true, lacking: unix.ENOLCK, call: func(s *Share, r *request) Errno {
		in := fuseproto.LkIn{InHeader: r.header(), Fh: r.fh}
		return with(r, in, func(in *fuseproto.LkIn) Errno { return s.Setlk(&r.c, in) })
	}},
	"Ioctl": {handle: true, lacking: unix.ENOTTY, call: func(s *Share, r *request) Errno {
		in := fuseproto.IoctlIn{InHeader: r.header(), Fh: r.fh, Cmd: r.cmd}
		return with(r, in, func(in *fuseproto.IoctlIn) Errno {
			_, errno := s.Ioctl(&r.c, in, nil, new(fsbackend.Sink))
			return errno
		})
	}},
}

// TestOpsAreComplete compares the table with the methods of fsbackend's interfaces.
func TestOpsAreComplete(t *testing.T) {
	apart := []string{"Forget", "Reset", "Close", "Init", "WantFlags", "Stats"} // have tests of their own
	resolved := reflect.TypeFor[fsbackend.Resolved]()
	for i := range resolved.NumField() {
		field := resolved.Field(i).Type
		if field.Kind() != reflect.Interface || field == reflect.TypeFor[fsbackend.Filer]() {
			continue // a Filer is for who merges backends, and no request
		}
		if !reflect.TypeFor[*Share]().Implements(field) {
			t.Errorf("a Share is no %v", field)
		}
		if !reflect.TypeFor[*spy]().Implements(field) {
			t.Errorf("a spy is no %v", field)
		}
		for j := range field.NumMethod() {
			name := field.Method(j).Name
			if _, ok := ops[name]; !ok && !slices.Contains(apart, name) {
				t.Errorf("%v.%s has no row in ops: read-only, ids and numbers are not tested for it", field, name)
			}
		}
	}
}

const second = uint64(1) << indexShift // the index of the graft after the root's

// each calls f for every op, with a fresh Share of a root and g at /g, whose backend is a spy unless g has one.
func each(t *testing.T, g Graft, f func(t *testing.T, s *Share, b *spy, name string, o op)) {
	for name, o := range ops {
		t.Run(name, func(t *testing.T) {
			b := new(spy)
			g.Path = "/g"
			own := g
			if own.Backend == nil {
				own.Backend = b
			}
			s := newShare(t, Graft{Path: "/", Backend: newMem(t)}, own)
			f(t, s, b, name, o)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// in is a request for a file of the second graft.
func in() *request {
	r := &request{node: second | 5, fh: second | 6, node2: second | 3, fh2: second | 4}
	r.c.MayBlock = true
	r.c.Caller = fuseproto.Caller{Pid: 1}
	return r
}

// TestNumbers follows every number to the backend and back.
func TestNumbers(t *testing.T) {
	each(t, Graft{}, func(t *testing.T, s *Share, b *spy, name string, o op) {
		r := in()
		if errno := o.call(s, r); errno != fsbackend.OK {
			t.Fatal(errno)
		}
		log := b.taken()
		if len(log) != 1 || log[0].call != name {
			t.Fatalf("the backend was asked %+v, expected one %s", log, name)
		}
		nodes, fhs := []uint64{5}, []uint64(nil)
		if o.second {
			nodes = []uint64{5, 3}
		}
		switch {
		case o.handle && o.second:
			fhs = []uint64{6, 4}
		case o.handle:
			fhs = []uint64{6}
		}
		if !slices.Equal(log[0].nodes, nodes) || !slices.Equal(log[0].fhs, fhs) {
			t.Errorf("the backend was given nodes %v, handles %v, expected %v, %v", log[0].nodes, log[0].fhs, nodes, fhs)
		}
		if !reflect.DeepEqual(r.before, r.after) {
			t.Errorf("the In struct came back as %+v, which a call made again would begin with, expected %+v", r.after, r.before)
		}
		if r.entry.NodeId != 0 && r.entry.NodeId != second|spyNode {
			t.Errorf("the guest was given node %#x", r.entry.NodeId)
		}
		if r.outFh != 0 && r.outFh != second|spyFh {
			t.Errorf("the guest was given handle %#x", r.outFh)
		}
		if name == "Readdirplus" {
			e := fsbackendtest.ParseDirents(r.dirents, true)
			if len(e) != 1 || e[0].Entry.NodeId != second|spyNode {
				t.Errorf("the guest was given %+v", e)
			}
		}
	})
}

// TestRootNumbers has the root's numbers pass as they are.
func TestRootNumbers(t *testing.T) {
	for name, o := range ops {
		b := new(spy)
		s := newShare(t, Graft{Path: "/", Backend: b}, Graft{Path: "/g", Backend: newMem(t)})
		r := &request{node: 5, fh: 6, node2: 3, fh2: 4}
		if errno := o.call(s, r); errno != fsbackend.OK {
			t.Errorf("%s: %v", name, errno)
			continue
		}
		log := b.taken()
		if len(log) != 1 || log[0].nodes[0] != 5 || o.handle && log[0].fhs[0] != 6 {
			t.Errorf("%s: the backend was asked %+v", name, log)
		}
		if r.entry.NodeId != 0 && r.entry.NodeId != spyNode || r.outFh != 0 && r.outFh != spyFh {
			t.Errorf("%s: the guest was given node %#x, handle %#x", name, r.entry.NodeId, r.outFh)
		}
		if name == "Readdirplus" {
			if e := fsbackendtest.ParseDirents(r.dirents, true); len(e) != 1 || e[0].Entry.NodeId != spyNode {
				t.Errorf("the guest was given %+v", e)
			}
		}
	}
}

// TestErrMayBlock makes every call twice, as after ErrMayBlock.
func TestErrMayBlock(t *testing.T) {
	ids := Graft{UIDMap: IDMap{{0, 100, 10}}, GIDMap: IDMap{{0, 200, 10}}}
	each(t, ids, func(t *testing.T, s *Share, b *spy, name string, o op) {
		b.errno = fsbackend.ErrMayBlock
		r := in()
		r.valid = fuseproto.FATTR_UID | fuseproto.FATTR_GID
		r.c.SuppGroups = []uint32{1, 2}
		before := r.c
		errno := o.call(s, r)
		if name != "Release" && name != "Releasedir" && errno != fsbackend.ErrMayBlock {
			t.Errorf("the backend answers ErrMayBlock, the guest gets %v", errno)
		}
		if !reflect.DeepEqual(r.before, r.after) {
			t.Errorf("the In struct came back as %+v, expected %+v", r.after, r.before)
		}
		if !reflect.DeepEqual(r.c, before) {
			t.Errorf("the Context came back as %+v, expected %+v", r.c, before)
		}
	})
}

// TestHostileNumbers gives every op numbers that are nobody's, or another's.
func TestHostileNumbers(t *testing.T) {
	const beyond, last = uint64(3) << indexShift, uint64(0xffff) << indexShift // 2 are directories made up
	each(t, Graft{}, func(t *testing.T, s *Share, b *spy, name string, o op) {
		for _, tt := range []struct {
			name  string
			wrong func(*request)
			want  Errno
			skip  bool
		}{
			{"node of no graft", func(r *request) { r.node = beyond | 5; r.fh = beyond | 6 }, unix.ESTALE, false},
			{"node of the last index", func(r *request) { r.node = last | 5 }, unix.ESTALE, false},
			{"node of all ones", func(r *request) { r.node = ^uint64(0) }, unix.ESTALE, false},
			{"handle of the root's", func(r *request) { r.fh = 6 }, unix.EBADF, !o.handle},
			{"handle of no graft", func(r *request) { r.fh = beyond | 6 }, unix.EBADF, !o.handle},
			{"handle of all ones", func(r *request) { r.fh = ^uint64(0) }, unix.EBADF, !o.handle},
			{"second node of no graft", func(r *request) { r.node2, r.fh2 = beyond|3, beyond|4 }, unix.ESTALE, !o.second},
			{"second node of the root's", func(r *request) { r.node2, r.fh2 = 1, 4 }, unix.EXDEV, !o.second},
			{"second handle of the root's", func(r *request) { r.fh2 = 4 }, unix.EBADF, !o.second || !o.handle},
		} {
			if tt.skip {
				continue
			}
			r := in()
			tt.wrong(r)
			errno := o.call(s, r)
			if name == "Release" || name == "Releasedir" {
				errno = tt.want // they answer nothing
			}
			if errno != tt.want {
				t.Errorf("%s: %v, expected %v", tt.name, errno, tt.want)
			}
			if log := b.taken(); len(log) > 0 {
				t.Errorf("%s: the backend was asked %+v", tt.name, log)
			}
			if !reflect.DeepEqual(r.before, r.after) {
				t.Errorf("%s: the In struct came back as %+v, expected %+v", tt.name, r.after, r.before)
			}
		}
	})
}

// TestBrokenNumbers has a backend hand out numbers that would lead to another graft.
func TestBrokenNumbers(t *testing.T) {
	each(t, Graft{}, func(t *testing.T, s *Share, b *spy, name string, o op) {
		for _, wrong := range []func(){
			func() { b.node, b.fh = 1<<indexShift, spyFh },
			func() { b.node, b.fh = spyNode, 1<<indexShift },
			func() { b.node, b.fh = ^uint64(0), ^uint64(0) },
		} {
			wrong()
			r := in()
			errno := o.call(s, r)
			gives := r.entry.NodeId != 0 && b.node > numberMask || r.outFh != 0 && b.fh > numberMask
			if gives && errno != unix.EIO {
				t.Errorf("node %#x, handle %#x: %v, expected EIO", b.node, b.fh, errno)
			}
			if name == "Readdirplus" && b.node > numberMask {
				if e := fsbackendtest.ParseDirents(r.dirents, true); len(e) != 1 || e[0].Entry.NodeId != 0 {
					t.Errorf("the guest was given %+v, expected an entry to look up", e)
				}
			}
		}
	})
}

func TestReadOnly(t *testing.T) {
	each(t, Graft{Policy: Policy{ReadOnly: true}}, func(t *testing.T, s *Share, b *spy, name string, o op) {
		want := fsbackend.OK
		if o.modifies {
			want = unix.EROFS
		}
		try := func(what string, r *request, want Errno) {
			t.Helper()
			b.taken()
			errno := o.call(s, r)
			if errno != want {
				t.Errorf("%s: %v, expected %v", what, errno, want)
			}
			if log := b.taken(); (len(log) > 0) != (want == fsbackend.OK) {
				t.Errorf("%s: the backend was asked %+v", what, log)
			}
		}
		switch name {
		case "Open":
			try("O_RDONLY", in(), fsbackend.OK)
			for _, flags := range []uint32{unix.O_WRONLY, unix.O_RDWR, 3, unix.O_RDONLY | unix.O_TRUNC} {
				r := in()
				r.flags = flags
				try("writing", r, unix.EROFS)
			}
		case "Access":
			r := in()
			r.mask = unix.R_OK | unix.X_OK
			try("R_OK|X_OK", r, fsbackend.OK)
			r.mask = unix.W_OK
			try("W_OK", r, unix.EROFS)
		case "Ioctl":
			for cmd, want := range map[uint32]Errno{
				unix.FS_IOC_GETFLAGS: fsbackend.OK, 0x801c581f: fsbackend.OK, // FS_IOC_FSGETXATTR
				unix.FS_IOC_SETFLAGS: unix.EROFS, 0x401c5820: unix.EROFS, // FS_IOC_FSSETXATTR
				0x12345678 & (1<<30 - 1): unix.EROFS, 0xc0000001: unix.EROFS,
			} {
				r := in()
				r.cmd = cmd
				try("ioctl", r, want)
			}
		default:
			try(name, in(), want)
		}
	})
}

func TestIDs(t *testing.T) {
	ids := Graft{UIDMap: IDMap{{0, 1000, 10}}, GIDMap: IDMap{{50, 2000, 10}}}
	each(t, ids, func(t *testing.T, s *Share, b *spy, name string, o op) {
		r := in()
		r.c.Caller.Uid, r.c.Caller.Gid = 3, 54
		r.c.SuppGroups = []uint32{50, 7, 59}
		r.valid = fuseproto.FATTR_UID | fuseproto.FATTR_GID
		r.owner = owner{1, 51}
		if errno := o.call(s, r); errno != fsbackend.OK {
			t.Fatal(errno)
		}
		log := b.taken()
		if len(log) != 1 {
			t.Fatalf("the backend was asked %+v", log)
		}
		host := owner{1003, 2004}
		if owner(log[0].caller.Owner) != host || owner(log[0].header.Owner) != host || log[0].caller.Pid != 1 {
			t.Errorf("the backend saw callers %+v and %+v, expected %+v", log[0].caller, log[0].header, host)
		}
		if !slices.Equal(log[0].groups, []uint32{2000, 2009}) {
			t.Errorf("the backend saw groups %v, expected those that it has", log[0].groups)
		}
		if name == "Setattr" && log[0].owner != (owner{1001, 2001}) {
			t.Errorf("the owner to be was %+v, expected 1001, 2001", log[0].owner)
		}
		guest := owner{0, 50}
		if r.entry.NodeId != 0 && owner(r.entry.Owner) != guest {
			t.Errorf("the guest sees owner %+v, expected %+v", owner(r.entry.Owner), guest)
		}
		if r.attr.Ino != 0 && owner(r.attr.Owner) != guest {
			t.Errorf("the guest sees owner %+v, expected %+v", owner(r.attr.Owner), guest)
		}
		if name == "Readdirplus" {
			if e := fsbackendtest.ParseDirents(r.dirents, true); len(e) != 1 || owner(e[0].Entry.Owner) != guest {
				t.Errorf("the guest sees %+v, expected owner %+v", e, guest)
			}
		}
		if !reflect.DeepEqual(r.before, r.after) || r.c.Caller.Uid != 3 || len(r.c.SuppGroups) != 3 {
			t.Errorf("the request came back as %+v, %+v", r.after, r.c)
		}

		// Callers that it has no id for may look and read.
		want := fsbackend.OK
		if o.creates {
			want = unix.EOVERFLOW
		}
		for _, stranger := range []owner{{10, 50}, {0, 0}, {^uint32(0), 50}} {
			r := in()
			r.c.Caller.Uid, r.c.Caller.Gid = stranger.Uid, stranger.Gid
			if errno := o.call(s, r); errno != want {
				t.Errorf("caller %+v: %v, expected %v", stranger, errno, want)
			}
			log := b.taken()
			if want != fsbackend.OK {
				if len(log) > 0 {
					t.Errorf("caller %+v: the backend was asked %+v", stranger, log)
				}
				continue
			}
			if got := owner(log[0].caller.Owner); got != owner(log[0].header.Owner) || got.Uid != OverflowID && got.Gid != OverflowID {
				t.Errorf("caller %+v is %+v to the backend, expected %d where there is none", stranger, got, OverflowID)
			}
		}
		if name == "Rename" {
			r := in()
			r.c.Caller.Uid, r.flags = 10, unix.RENAME_WHITEOUT
			if errno := o.call(s, r); errno != unix.EOVERFLOW {
				t.Errorf("RENAME that leaves a whiteout of a stranger: %v, expected EOVERFLOW", errno)
			}
		}
		if name == "Getxattr" || name == "Setxattr" || name == "Removexattr" {
			r := in()
			r.c.Caller.Gid, r.name = 50, "system.posix_acl_access"
			if errno := o.call(s, r); errno != unix.EOPNOTSUPP {
				t.Errorf("%s of an access list, with ids in it: %v, expected EOPNOTSUPP", name, errno)
			}
		}
		if name == "Setattr" {
			for _, tt := range []struct {
				valid uint32
				owner owner
				want  Errno
			}{
				{fuseproto.FATTR_UID, owner{10, 0}, unix.EOVERFLOW},
				{fuseproto.FATTR_GID, owner{0, 49}, unix.EOVERFLOW},
				{fuseproto.FATTR_UID, owner{9, 49}, fsbackend.OK},
				{0, owner{10, 49}, fsbackend.OK},
			} {
				r := in()
				r.valid, r.owner = tt.valid, tt.owner
				if errno := o.call(s, r); errno != tt.want {
					t.Errorf("FATTR %#x with %+v: %v, expected %v", tt.valid, tt.owner, errno, tt.want)
				}
			}
		}
	})
}

// TestIDsUnmapped has a backend's ids that are the guest's overflow id.
func TestIDsUnmapped(t *testing.T) {
	ids := Graft{UIDMap: IDMap{{0, 5000, 10}}, GIDMap: IDMap{{0, 5000, 10}}}
	each(t, ids, func(t *testing.T, s *Share, b *spy, name string, o op) {
		r := in()
		if errno := o.call(s, r); errno != fsbackend.OK {
			t.Fatal(errno)
		}
		nobody := owner{OverflowID, OverflowID}
		if r.entry.NodeId != 0 && owner(r.entry.Owner) != nobody || r.attr.Ino != 0 && owner(r.attr.Owner) != nobody {
			t.Errorf("the guest sees owners %+v, %+v, expected %+v", owner(r.entry.Owner), owner(r.attr.Owner), nobody)
		}
	})
}

// TestLacking has no op of a part among others answer ENOSYS, whether its backend lacks an interface or says ENOSYS itself.
func TestLacking(t *testing.T) {
	check := func(t *testing.T, s *Share, name string, o op) {
		t.Helper()
		r := in()
		if errno := o.call(s, r); errno != o.lacking {
			t.Errorf("%v, expected %v", errno, o.lacking)
		}
		switch {
		case name == "Lseek" && r.offset != 16:
			t.Errorf("SEEK_HOLE gives %d, expected the size, 16", r.offset)
		case name == "Statx" && (r.attr.Ino != spyNode || r.attr.Size != 16):
			t.Errorf("STATX gives %+v, expected what GETATTR does", r.attr)
		case name == "Open" && r.outFh>>indexShift != 1:
			t.Errorf("OPEN gives handle %#x, expected one of the part", r.outFh)
		}
	}
	t.Run("bare", func(t *testing.T) {
		each(t, Graft{Backend: bare{new(spy)}}, func(t *testing.T, s *Share, _ *spy, name string, o op) { check(t, s, name, o) })
	})
	t.Run("ENOSYS", func(t *testing.T) {
		each(t, Graft{}, func(t *testing.T, s *Share, b *spy, name string, o op) {
			switch name {
			case "Lookup", "Getattr", "Statfs":
				return // from whose ENOSYS a guest concludes nothing
			case "Opendir":
				o.lacking = fsbackend.OK // its lists have no state
			}
			b.errno = unix.ENOSYS
			b.hook = func(call string) {
				b.mu.Lock()
				defer b.mu.Unlock()
				if b.errno = unix.ENOSYS; call == name {
					b.errno = fsbackend.OK // for the GETATTR of those that are made of it
				}
			}
			if name == "Create" {
				b.hook = nil
			}
			check(t, s, name, o)
		})
	})
	t.Run("alone", func(t *testing.T) {
		for name, o := range ops {
			s := newShare(t, Graft{Path: "/", Backend: bare{new(spy)}})
			r := in()
			r.node, r.fh, r.node2, r.fh2 = 5, 6, 3, 4
			want := unix.ENOSYS
			switch name {
			case "Lookup", "Getattr", "Statfs", "Open", "Release", "Releasedir":
				want = fsbackend.OK // as fuseserver has it
			}
			if errno := o.call(s, r); errno != want {
				t.Errorf("%s: %v, expected %v", name, errno, want)
			}
		}
	})
}

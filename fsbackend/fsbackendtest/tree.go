package fsbackendtest

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func testLookup(t *testing.T, s *suite) {
	s.missing(t, Root, "nothing")
	f, d := s.file(t, Root, "f", "four"), s.mkdir(t, Root, "d")
	inner := s.file(t, d.NodeId, "f", "")
	got := s.lookup(t, Root, "f")
	if got.NodeId != f.NodeId || got.Ino != f.Ino {
		t.Errorf("LOOKUP gave node %d, inode %d, CREATE had given node %d, inode %d", got.NodeId, got.Ino, f.NodeId, f.Ino)
	}
	if got.Size != 4 || got.Mode&unix.S_IFMT != unix.S_IFREG {
		t.Errorf("LOOKUP gave size %d, mode %#o, expected 4 and a regular file", got.Size, got.Mode)
	}
	if other := s.lookup(t, d.NodeId, "f"); other.NodeId != inner.NodeId || other.NodeId == f.NodeId {
		t.Errorf("LOOKUP in a directory gave node %d, expected %d", other.NodeId, inner.NodeId)
	}
	_, errno := s.Lookup(f.NodeId, "x")
	want(t, errno, "LOOKUP in a regular file", unix.ENOTDIR)
	root, errno := s.Getattr(Root)
	want(t, errno, "GETATTR of the root", fsbackend.OK)
	checkAttr(t, "the root", &root)
	if root.Mode&unix.S_IFMT != unix.S_IFDIR {
		t.Errorf("the root has mode %#o, expected a directory", root.Mode)
	}
}

func testForget(t *testing.T, s *suite) {
	f := s.file(t, Root, "f", "x")
	s.lookup(t, Root, "f")
	s.lookup(t, Root, "f")
	s.R.Forget(f.NodeId, 2)
	attr, errno := s.Getattr(f.NodeId)
	want(t, errno, "GETATTR after FORGET of 2 of 3 lookups", fsbackend.OK)
	if attr.Ino != f.Ino {
		t.Errorf("inode number went from %d to %d", f.Ino, attr.Ino)
	}
	want(t, s.Unlink(Root, "f"), "UNLINK", fsbackend.OK)
	if !s.cfg.NoUnlinked {
		_, errno = s.Getattr(f.NodeId)
		want(t, errno, "GETATTR of an unlinked file with a lookup left", fsbackend.OK)
	}
	s.R.Forget(f.NodeId, 1)
	_, errno = s.Getattr(f.NodeId)
	want(t, errno, "GETATTR of an unlinked file after its last FORGET", unix.ESTALE)

	// Too many, unknown and the root's are ignored.
	g := s.file(t, Root, "g", "")
	s.R.Forget(g.NodeId, math.MaxUint64)
	s.R.Forget(g.NodeId, 1)
	s.R.Forget(g.NodeId, 0)
	s.R.Forget(1<<47, 1)
	s.R.Forget(math.MaxUint64, math.MaxUint64)
	s.R.Forget(0, 1)
	s.R.Forget(Root, math.MaxUint64)
	s.R.Forget(Root, 1)
	if got := s.lookup(t, Root, "g"); got.Ino != g.Ino {
		t.Errorf("LOOKUP after the last FORGET gave inode %d, expected %d still", got.Ino, g.Ino)
	}

	// A forgotten directory leaves what is in it reachable.
	d := s.mkdir(t, Root, "d")
	inner := s.file(t, d.NodeId, "inner", "in")
	s.R.Forget(d.NodeId, 1)
	attr, errno = s.Getattr(inner.NodeId)
	want(t, errno, "GETATTR in a forgotten directory", fsbackend.OK)
	if attr.Size != 2 {
		t.Errorf("file in a forgotten directory has size %d, expected 2", attr.Size)
	}
	again := s.lookup(t, Root, "d")
	if got := s.lookup(t, again.NodeId, "inner"); got.NodeId != inner.NodeId {
		t.Errorf("LOOKUP in a directory that was forgotten gave node %d, expected %d still", got.NodeId, inner.NodeId)
	}
}

func testStale(t *testing.T, s *suite) {
	f, g, d := s.file(t, Root, "f", "x"), s.file(t, Root, "g", "y"), s.mkdir(t, Root, "d")
	for _, node := range []uint64{0, 1 << 40, 1<<48 - 1, math.MaxUint64} {
		what := fmt.Sprintf(" of unknown node %#x", node)
		_, errno := s.Lookup(node, "f")
		want(t, errno, "LOOKUP"+what, unix.ESTALE)
		_, errno = s.Getattr(node)
		want(t, errno, "GETATTR"+what, unix.ESTALE)
		_, errno = s.Chmod(node, 0o600)
		want(t, errno, "SETATTR"+what, unix.ESTALE)
		_, errno = s.Open(node, unix.O_RDONLY)
		want(t, errno, "OPEN"+what, unix.ESTALE)
		_, errno = s.Opendir(node)
		want(t, errno, "OPENDIR"+what, unix.ESTALE)
		_, errno = s.Mkdir(node, "x", 0o755)
		want(t, errno, "MKDIR"+what, unix.ESTALE)
		_, errno = s.Create(node, "x", unix.O_RDWR, 0o644)
		want(t, errno, "CREATE"+what, unix.ESTALE)
		want(t, s.Unlink(node, "f"), "UNLINK"+what, unix.ESTALE)
		want(t, s.Rmdir(node, "d"), "RMDIR"+what, unix.ESTALE)
		want(t, s.Rename(node, "f", Root, "x", 0), "RENAME from"+what, unix.ESTALE)
		want(t, s.Rename(Root, "f", node, "x", 0), "RENAME to"+what, unix.ESTALE)
		if s.R.Linker != nil {
			_, errno = s.Link(node, Root, "x")
			want(t, errno, "LINK"+what, unix.ESTALE)
		}
		if s.R.Readlinker != nil {
			_, errno = s.Readlink(node)
			want(t, errno, "READLINK"+what, unix.ESTALE)
		}
		if s.R.XattrReader != nil {
			_, _, errno = s.Getxattr(node, "user.x", 10)
			want(t, errno, "GETXATTR"+what, unix.ESTALE)
		}
		if s.R.StatFSer != nil {
			_, errno = s.Statfs(node)
			want(t, errno, "STATFS"+what, unix.ESTALE)
		}
	}
	fh, errno := s.Open(f.NodeId, unix.O_RDWR)
	want(t, errno, "OPEN", fsbackend.OK)
	dh, errno := s.Opendir(d.NodeId)
	want(t, errno, "OPENDIR", fsbackend.OK)
	for _, h := range []struct {
		what     string
		node, fh uint64
	}{
		{"an unknown handle", f.NodeId, 1 << 47},
		{"handle 2^64-1", f.NodeId, math.MaxUint64},
		{"another file's handle", g.NodeId, fh},
		{"an unknown node and a known handle", 1 << 40, fh},
	} {
		_, errno := s.Read(h.node, h.fh, 0, 10)
		want(t, errno, "READ with "+h.what, unix.EBADF, unix.ESTALE)
		_, errno = s.Write(h.node, h.fh, 0, []byte("bad"), unix.O_RDWR)
		want(t, errno, "WRITE with "+h.what, unix.EBADF, unix.ESTALE)
		_, errno = s.GetattrFh(h.node, h.fh)
		want(t, errno, "GETATTR with "+h.what, unix.EBADF, unix.ESTALE)
		if s.R.Lseeker != nil {
			_, errno = s.Lseek(h.node, h.fh, 0, unix.SEEK_HOLE)
			want(t, errno, "LSEEK with "+h.what, unix.EBADF, unix.ESTALE)
		}
		if s.R.Fallocater != nil {
			want(t, s.Fallocate(h.node, h.fh, 0, 10, 0), "FALLOCATE with "+h.what, unix.EBADF, unix.ESTALE)
		}
		_, errno = s.Readdir(h.node, h.fh, 0, 1000, false)
		want(t, errno, "READDIR with "+h.what, unix.EBADF, unix.ESTALE, unix.ENOTDIR)
		s.Release(h.node, h.fh)
		s.Releasedir(h.node, h.fh)
	}
	_, errno = s.Readdir(f.NodeId, fh, 0, 1000, false)
	want(t, errno, "READDIR with a file's handle", unix.EBADF, unix.ENOTDIR)
	_, errno = s.Read(d.NodeId, dh, 0, 10)
	want(t, errno, "READ with a directory's handle", unix.EBADF, unix.EISDIR)
	_, errno = s.Write(d.NodeId, dh, 0, []byte("x"), unix.O_RDWR)
	want(t, errno, "WRITE with a directory's handle", unix.EBADF, unix.EISDIR)
	if b, errno := s.Read(f.NodeId, fh, 0, 10); errno != 0 || string(b) != "x" {
		t.Errorf("READ after all that: %q, %s, expected the file's \"x\"", b, errnoName(errno))
	}
	s.Release(f.NodeId, fh)
	s.Releasedir(d.NodeId, dh)
	s.Release(f.NodeId, fh)
	_, errno = s.Read(f.NodeId, fh, 0, 10)
	want(t, errno, "READ with a released handle", unix.EBADF)
	_, errno = s.Readdir(d.NodeId, dh, 0, 1000, false)
	want(t, errno, "READDIR with a released handle", unix.EBADF)
}

func testNames(t *testing.T, s *suite) {
	names := []string{"a", "...", " ", "\n", "\xff\xfe", "-rf", strings.Repeat("n", s.cfg.MaxName), "é中", "..a", "a*?[", "\\"}
	for _, name := range names {
		s.file(t, Root, name, name)
	}
	for _, name := range names {
		if got := s.contents(t, s.lookup(t, Root, name).NodeId); got != name {
			t.Errorf("file %q holds %q, expected its name", name, got)
		}
	}
	listed := make(map[string]int)
	for _, name := range s.List(t, Root, 4096) {
		listed[name]++
	}
	for _, name := range names {
		if listed[name] != 1 {
			t.Errorf("READDIR has %q %d times, expected once", name, listed[name])
		}
		want(t, s.Unlink(Root, name), fmt.Sprintf("UNLINK %q", name), fsbackend.OK)
	}
	if left := s.List(t, Root, 4096); len(left) > 0 {
		t.Errorf("READDIR has %q after all was removed", left)
	}
}

func testMake(t *testing.T, s *suite) {
	rows := []struct {
		name string
		typ  uint32
		make func(name string) (fuseproto.EntryOut, fsbackend.Errno)
		skip bool
	}{
		{"dir", unix.S_IFDIR, func(n string) (fuseproto.EntryOut, fsbackend.Errno) { return s.Mkdir(Root, n, 0o755) }, false},
		{"file", unix.S_IFREG, func(n string) (fuseproto.EntryOut, fsbackend.Errno) {
			out, errno := s.Create(Root, n, unix.O_RDWR|unix.O_EXCL, 0o644)
			if errno == 0 {
				s.Release(out.NodeId, out.Fh)
			}
			return out.EntryOut, errno
		}, false},
		{"symlink", unix.S_IFLNK, func(n string) (fuseproto.EntryOut, fsbackend.Errno) {
			return s.Symlink(Root, n, "/a/target that is not there")
		}, s.cfg.NoSymlinks},
		{"node", unix.S_IFREG, func(n string) (fuseproto.EntryOut, fsbackend.Errno) {
			return s.Mknod(Root, n, unix.S_IFREG|0o644, 0)
		}, s.cfg.NoNodes},
		{"fifo", unix.S_IFIFO, func(n string) (fuseproto.EntryOut, fsbackend.Errno) {
			return s.Mknod(Root, n, unix.S_IFIFO|0o644, 0)
		}, s.cfg.NoNodes},
		{"socket", unix.S_IFSOCK, func(n string) (fuseproto.EntryOut, fsbackend.Errno) {
			return s.Mknod(Root, n, unix.S_IFSOCK|0o644, 0)
		}, s.cfg.NoNodes},
		{"char", unix.S_IFCHR, func(n string) (fuseproto.EntryOut, fsbackend.Errno) {
			return s.Mknod(Root, n, unix.S_IFCHR|0o644, uint32(unix.Mkdev(1, 3)))
		}, s.cfg.NoNodes || !s.cfg.AsRoot},
		{"block", unix.S_IFBLK, func(n string) (fuseproto.EntryOut, fsbackend.Errno) {
			return s.Mknod(Root, n, unix.S_IFBLK|0o644, uint32(unix.Mkdev(7, 3)))
		}, s.cfg.NoNodes || !s.cfg.AsRoot},
	}
	for _, row := range rows {
		if row.skip {
			continue
		}
		made, errno := row.make(row.name)
		if errno == unix.EPERM && (row.typ == unix.S_IFCHR || row.typ == unix.S_IFBLK) {
			t.Logf("devices cannot be made here: %v", errno) // a container's root
			continue
		}
		want(t, errno, "make "+row.name, fsbackend.OK)
		checkEntry(t, row.name, &made)
		if made.Mode&unix.S_IFMT != row.typ {
			t.Errorf("%s has mode %#o, expected type %#o", row.name, made.Mode, row.typ)
		}
		found := s.lookup(t, Root, row.name)
		if found.NodeId != made.NodeId || found.Ino != made.Ino || found.Mode != made.Mode || found.Rdev != made.Rdev {
			t.Errorf("LOOKUP of %s gave %+v, it was made as %+v", row.name, found.Attr, made.Attr)
		}
		_, errno = row.make(row.name)
		want(t, errno, "make "+row.name+" again", unix.EEXIST)
		if row.typ == unix.S_IFLNK {
			target, errno := s.Readlink(made.NodeId)
			want(t, errno, "READLINK", fsbackend.OK)
			if target != "/a/target that is not there" {
				t.Errorf("READLINK gave %q", target)
			}
		}
		if row.typ != unix.S_IFDIR && row.typ != unix.S_IFREG {
			_, errno := s.Open(made.NodeId, unix.O_RDONLY)
			want(t, errno, "OPEN of "+row.name, unix.EBADF, unix.ELOOP, unix.ENXIO, unix.EINVAL, unix.EOPNOTSUPP)
		}
	}
	if !s.cfg.NoSymlinks {
		for _, n := range []int{1, 59, 60, 255, 256, s.cfg.MaxSymlink} {
			target := strings.Repeat("t", n)
			l, errno := s.Symlink(Root, fmt.Sprint("long", n), target)
			want(t, errno, fmt.Sprintf("SYMLINK to %d bytes", n), fsbackend.OK)
			if got, errno := s.Readlink(l.NodeId); errno != 0 || got != target {
				t.Errorf("READLINK gave %d bytes, %s, expected the %d of the target", len(got), errnoName(errno), n)
			}
		}
	}
	if !s.cfg.NoNodes {
		_, errno := s.Mknod(Root, "bad", unix.S_IFDIR|0o755, 0)
		want(t, errno, "MKNOD of a directory", unix.EPERM, unix.EINVAL)
		_, errno = s.Mknod(Root, "bad", unix.S_IFLNK|0o777, 0)
		want(t, errno, "MKNOD of a symbolic link", unix.EINVAL, unix.EPERM)
	}
}

func testErrnos(t *testing.T, s *suite) {
	f, d, full := s.file(t, Root, "f", "x"), s.mkdir(t, Root, "d"), s.mkdir(t, Root, "full")
	s.mkdir(t, full.NodeId, "child")
	mkdir := func(parent uint64, name string) fsbackend.Errno {
		_, errno := s.Mkdir(parent, name, 0o755)
		return errno
	}
	open := func(node uint64, flags uint32) fsbackend.Errno {
		_, errno := s.Open(node, flags)
		return errno
	}
	create := func(name string, flags uint32) fsbackend.Errno {
		_, errno := s.Create(Root, name, flags, 0o644)
		return errno
	}
	opendir := func(node uint64) fsbackend.Errno {
		_, errno := s.Opendir(node)
		return errno
	}
	for _, row := range []struct {
		what   string
		node   bool // about the types of files
		call   func() fsbackend.Errno
		expect []fsbackend.Errno
	}{
		{"MKDIR of a file's name", false, func() fsbackend.Errno { return mkdir(Root, "f") }, []fsbackend.Errno{unix.EEXIST}},
		{"MKDIR of a directory's name", false, func() fsbackend.Errno { return mkdir(Root, "d") }, []fsbackend.Errno{unix.EEXIST}},
		{"MKDIR in a file", false, func() fsbackend.Errno { return mkdir(f.NodeId, "x") }, []fsbackend.Errno{unix.ENOTDIR}},
		{"CREATE with O_EXCL of a file's name", false, func() fsbackend.Errno { return create("f", unix.O_RDWR|unix.O_EXCL) }, []fsbackend.Errno{unix.EEXIST}},
		{"CREATE with O_EXCL of a directory's name", false, func() fsbackend.Errno { return create("d", unix.O_RDWR|unix.O_EXCL) }, []fsbackend.Errno{unix.EEXIST}},
		{"CREATE of a directory's name", true, func() fsbackend.Errno { return create("d", unix.O_RDWR) }, []fsbackend.Errno{unix.EISDIR, unix.EEXIST}},
		{"UNLINK of nothing", true, func() fsbackend.Errno { return s.Unlink(Root, "none") }, []fsbackend.Errno{unix.ENOENT}},
		{"UNLINK of a directory", true, func() fsbackend.Errno { return s.Unlink(Root, "d") }, []fsbackend.Errno{unix.EISDIR}},
		{"UNLINK in a file", false, func() fsbackend.Errno { return s.Unlink(f.NodeId, "x") }, []fsbackend.Errno{unix.ENOTDIR}},
		{"RMDIR of nothing", true, func() fsbackend.Errno { return s.Rmdir(Root, "none") }, []fsbackend.Errno{unix.ENOENT}},
		{"RMDIR of a file", true, func() fsbackend.Errno { return s.Rmdir(Root, "f") }, []fsbackend.Errno{unix.ENOTDIR}},
		{"RMDIR of a directory with an entry", false, func() fsbackend.Errno { return s.Rmdir(Root, "full") }, []fsbackend.Errno{unix.ENOTEMPTY}},
		{"OPEN of a directory for writing", true, func() fsbackend.Errno { return open(d.NodeId, unix.O_RDWR) }, []fsbackend.Errno{unix.EISDIR}},
		{"OPENDIR of a file", false, func() fsbackend.Errno { return opendir(f.NodeId) }, []fsbackend.Errno{unix.ENOTDIR}},
	} {
		if row.node && s.cfg.NoNodeChecks {
			continue
		}
		want(t, row.call(), row.what, row.expect...)
	}
	if !s.cfg.NoSymlinks {
		_, errno := s.Symlink(Root, "f", "x")
		want(t, errno, "SYMLINK of a file's name", unix.EEXIST)
		_, errno = s.Readlink(f.NodeId)
		want(t, errno, "READLINK of a file", unix.EINVAL, unix.EOPNOTSUPP)
	}
	want(t, s.Rmdir(full.NodeId, "child"), "RMDIR", fsbackend.OK)
	want(t, s.Rmdir(Root, "full"), "RMDIR of a directory that is empty again", fsbackend.OK)
	if !s.cfg.NoNodeChecks {
		// A directory without a name cannot be filled.
		want(t, mkdir(full.NodeId, "x"), "MKDIR in a removed directory", unix.ENOENT, unix.ESTALE)
	}
	s.missing(t, Root, "full")
}

func (s *suite) nlink(t *testing.T, what string, node uint64, expected uint32) {
	t.Helper()
	attr, errno := s.Getattr(node)
	want(t, errno, "GETATTR of "+what, fsbackend.OK)
	if attr.Nlink != expected {
		t.Errorf("%s has %d links, expected %d", what, attr.Nlink, expected)
	}
}

func testLink(t *testing.T, s *suite) {
	f, d := s.file(t, Root, "f", "linked"), s.mkdir(t, Root, "d")
	g, errno := s.Link(f.NodeId, d.NodeId, "g")
	want(t, errno, "LINK", fsbackend.OK)
	if g.NodeId != f.NodeId || g.Ino != f.Ino || g.Nlink != 2 {
		t.Errorf("LINK gave node %d, inode %d, %d links, expected node %d, inode %d, 2", g.NodeId, g.Ino, g.Nlink, f.NodeId, f.Ino)
	}
	if found := s.lookup(t, d.NodeId, "g"); found.NodeId != f.NodeId {
		t.Errorf("LOOKUP of the second name gave node %d, expected %d", found.NodeId, f.NodeId)
	}
	_, errno = s.Link(f.NodeId, d.NodeId, "g")
	want(t, errno, "LINK of a name that exists", unix.EEXIST)
	_, errno = s.Link(d.NodeId, Root, "dd")
	want(t, errno, "LINK of a directory", unix.EPERM)
	_, errno = s.Link(f.NodeId, f.NodeId, "x")
	want(t, errno, "LINK in a file", unix.ENOTDIR)
	want(t, s.Unlink(Root, "f"), "UNLINK", fsbackend.OK)
	s.nlink(t, "a file whose first name is gone", f.NodeId, 1)
	if got := s.contents(t, f.NodeId); got != "linked" {
		t.Errorf("the file holds %q by its other name", got)
	}
	// Four lookups: CREATE, LINK, LOOKUP; then none.
	want(t, s.Unlink(d.NodeId, "g"), "UNLINK", fsbackend.OK)
	s.R.Forget(f.NodeId, 3)
	_, errno = s.Getattr(f.NodeId)
	want(t, errno, "GETATTR after CREATE, LINK, LOOKUP and 3 lookups forgotten", unix.ESTALE)

	if !s.cfg.NoSymlinks {
		l, errno := s.Symlink(Root, "l", "nowhere")
		want(t, errno, "SYMLINK", fsbackend.OK)
		m, errno := s.Link(l.NodeId, Root, "m")
		want(t, errno, "LINK of a symbolic link", fsbackend.OK)
		if m.Mode&unix.S_IFMT != unix.S_IFLNK || m.NodeId != l.NodeId {
			t.Errorf("LINK of a symbolic link gave node %d of mode %#o, expected the link %d itself", m.NodeId, m.Mode, l.NodeId)
		}
	}
}

func testRename(t *testing.T, s *suite) {
	a, b := s.mkdir(t, Root, "a"), s.mkdir(t, Root, "b")
	f := s.file(t, a.NodeId, "f", "F")
	want(t, s.Rename(a.NodeId, "f", b.NodeId, "g", 0), "RENAME", fsbackend.OK)
	if got := s.lookup(t, b.NodeId, "g"); got.NodeId != f.NodeId {
		t.Errorf("after RENAME, LOOKUP gave node %d, expected %d", got.NodeId, f.NodeId)
	}
	s.missing(t, a.NodeId, "f")
	if got := s.contents(t, f.NodeId); got != "F" {
		t.Errorf("the file holds %q after RENAME", got)
	}
	// Onto another file, which goes.
	h := s.file(t, b.NodeId, "h", "H")
	want(t, s.Rename(b.NodeId, "g", b.NodeId, "h", 0), "RENAME onto a file", fsbackend.OK)
	if got := s.lookup(t, b.NodeId, "h"); got.NodeId != f.NodeId {
		t.Errorf("after RENAME onto a file, LOOKUP gave node %d, expected %d", got.NodeId, f.NodeId)
	}
	s.R.Forget(h.NodeId, 1)
	_, errno := s.Getattr(h.NodeId)
	want(t, errno, "GETATTR of a replaced and forgotten file", unix.ESTALE)
	want(t, s.Rename(b.NodeId, "h", b.NodeId, "h", 0), "RENAME to itself", fsbackend.OK)
	s.lookup(t, b.NodeId, "h")
	if !s.cfg.NoHardLinks {
		_, errno := s.Link(f.NodeId, Root, "same")
		want(t, errno, "LINK", fsbackend.OK)
		want(t, s.Rename(Root, "same", b.NodeId, "h", 0), "RENAME of a file onto another name of it", fsbackend.OK)
		s.lookup(t, Root, "same")
		s.lookup(t, b.NodeId, "h")
	}

	sub := s.mkdir(t, a.NodeId, "sub")
	s.file(t, sub.NodeId, "deep", "deep")
	s.mkdir(t, Root, "empty")
	for _, row := range []struct {
		what     string
		from     uint64
		oldName  string
		to       uint64
		newName  string
		flags    uint32
		expected []fsbackend.Errno
		skip     bool
	}{
		{"of nothing", Root, "none", Root, "x", 0, []fsbackend.Errno{unix.ENOENT}, s.cfg.NoNodeChecks},
		{"of a file onto a directory", b.NodeId, "h", Root, "empty", 0, []fsbackend.Errno{unix.EISDIR}, s.cfg.NoNodeChecks},
		{"of a directory onto a file", Root, "empty", b.NodeId, "h", 0, []fsbackend.Errno{unix.ENOTDIR}, s.cfg.NoNodeChecks},
		{"of a directory onto one that is not empty", Root, "empty", Root, "a", 0, []fsbackend.Errno{unix.ENOTEMPTY, unix.EEXIST}, s.cfg.NoNodeChecks},
		{"of a directory into itself", Root, "a", a.NodeId, "x", 0, []fsbackend.Errno{unix.EINVAL}, s.cfg.NoNodeChecks},
		{"of a directory into one below", Root, "a", sub.NodeId, "x", 0, []fsbackend.Errno{unix.EINVAL}, s.cfg.NoNodeChecks},
		{"onto a directory above", sub.NodeId, "deep", Root, "a", 0, []fsbackend.Errno{unix.ENOTEMPTY, unix.EISDIR}, s.cfg.NoNodeChecks},
		{"into a file", Root, "empty", f.NodeId, "x", 0, []fsbackend.Errno{unix.ENOTDIR}, false},
		{"from a file", f.NodeId, "x", Root, "y", 0, []fsbackend.Errno{unix.ENOTDIR}, false},
		{"NOREPLACE onto a file", Root, "empty", b.NodeId, "h", unix.RENAME_NOREPLACE, []fsbackend.Errno{unix.EEXIST}, s.cfg.NoNoreplace},
		{"NOREPLACE to a free name", Root, "empty", Root, "empty2", unix.RENAME_NOREPLACE, []fsbackend.Errno{fsbackend.OK}, s.cfg.NoNoreplace},
		{"EXCHANGE with nothing", Root, "a", Root, "none", unix.RENAME_EXCHANGE, []fsbackend.Errno{unix.ENOENT}, s.cfg.NoExchange},
		{"EXCHANGE and NOREPLACE", Root, "a", Root, "b", unix.RENAME_EXCHANGE | unix.RENAME_NOREPLACE, []fsbackend.Errno{unix.EINVAL}, s.cfg.NoExchange},
		{"EXCHANGE and WHITEOUT", Root, "a", Root, "b", unix.RENAME_EXCHANGE | unix.RENAME_WHITEOUT, []fsbackend.Errno{unix.EINVAL}, s.cfg.NoExchange},
		{"with unknown flags", Root, "a", Root, "z", 1 << 20, []fsbackend.Errno{unix.EINVAL}, s.cfg.NoNoreplace},
	} {
		if !row.skip {
			want(t, s.Rename(row.from, row.oldName, row.to, row.newName, row.flags), "RENAME "+row.what, row.expected...)
		}
	}
	// A directory with all below it.
	want(t, s.Rename(Root, "a", b.NodeId, "moved", 0), "RENAME of a directory", fsbackend.OK)
	moved := s.lookup(t, b.NodeId, "moved")
	if moved.NodeId != a.NodeId {
		t.Errorf("after RENAME of a directory, LOOKUP gave node %d, expected %d", moved.NodeId, a.NodeId)
	}
	deep := s.lookup(t, s.lookup(t, moved.NodeId, "sub").NodeId, "deep")
	if got := s.contents(t, deep.NodeId); got != "deep" {
		t.Errorf("a file below a renamed directory holds %q", got)
	}
	if !s.cfg.NoNodeChecks {
		s.mkdir(t, Root, "target")
		want(t, s.Rename(b.NodeId, "moved", Root, "target", 0), "RENAME of a directory onto an empty one", fsbackend.OK)
	}
}

func testExchange(t *testing.T, s *suite) {
	a, b := s.mkdir(t, Root, "a"), s.mkdir(t, Root, "b")
	f, d := s.file(t, a.NodeId, "f", "F"), s.mkdir(t, b.NodeId, "d")
	inner := s.file(t, d.NodeId, "inner", "inner")
	want(t, s.Rename(a.NodeId, "f", b.NodeId, "d", unix.RENAME_EXCHANGE), "RENAME_EXCHANGE of a file and a directory", fsbackend.OK)
	if got := s.lookup(t, a.NodeId, "f"); got.NodeId != d.NodeId {
		t.Errorf("the file's old name has node %d, expected the directory %d", got.NodeId, d.NodeId)
	}
	if got := s.lookup(t, b.NodeId, "d"); got.NodeId != f.NodeId {
		t.Errorf("the directory's old name has node %d, expected the file %d", got.NodeId, f.NodeId)
	}
	if got := s.lookup(t, d.NodeId, "inner"); got.NodeId != inner.NodeId {
		t.Errorf("below the exchanged directory is node %d, expected %d", got.NodeId, inner.NodeId)
	}
	want(t, s.Rename(Root, "a", a.NodeId, "f", unix.RENAME_EXCHANGE), "RENAME_EXCHANGE of a directory and one below", unix.EINVAL)
	want(t, s.Rename(a.NodeId, "f", Root, "a", unix.RENAME_EXCHANGE), "RENAME_EXCHANGE of a directory and one above", unix.EINVAL)
}

func testWhiteout(t *testing.T, s *suite) {
	f := s.file(t, Root, "f", "F")
	errno := s.Rename(Root, "f", Root, "g", unix.RENAME_WHITEOUT)
	want(t, errno, "RENAME_WHITEOUT", fsbackend.OK)
	white := s.lookup(t, Root, "f")
	if white.Mode&unix.S_IFMT != unix.S_IFCHR || white.Rdev != 0 || white.NodeId == f.NodeId {
		t.Errorf("the old name has mode %#o, device %#x, expected character device 0:0", white.Mode, white.Rdev)
	}
	if got := s.lookup(t, Root, "g"); got.NodeId != f.NodeId {
		t.Errorf("the new name has node %d, expected %d", got.NodeId, f.NodeId)
	}
}

func testOwner(t *testing.T, s *suite) {
	pub := s.mkdir(t, Root, "pub")
	_, errno := s.Chmod(pub.NodeId, 0o777)
	want(t, errno, "SETATTR of mode", fsbackend.OK)
	user := s.As(1000, 1001)
	d, errno := user.Mkdir(pub.NodeId, "d", 0o750)
	want(t, errno, "MKDIR", fsbackend.OK)
	f, errno := user.Create(pub.NodeId, "f", unix.O_RDWR, 0o640)
	want(t, errno, "CREATE", fsbackend.OK)
	entries := map[string]fuseproto.Attr{"d": d.Attr, "f": f.Attr}
	if !s.cfg.NoSymlinks {
		l, errno := user.Symlink(pub.NodeId, "l", "x")
		want(t, errno, "SYMLINK", fsbackend.OK)
		entries["l"] = l.Attr
	}
	if !s.cfg.NoNodes {
		p, errno := user.Mknod(pub.NodeId, "p", unix.S_IFIFO|0o600, 0)
		want(t, errno, "MKNOD", fsbackend.OK)
		entries["p"] = p.Attr
	}
	for name, attr := range entries {
		if attr.Uid != 1000 || attr.Gid != 1001 {
			t.Errorf("%s made by 1000:1001 is said to belong to %d:%d", name, attr.Uid, attr.Gid)
		}
		if found := s.lookup(t, pub.NodeId, name); found.Uid != 1000 || found.Gid != 1001 || found.Mode != attr.Mode {
			t.Errorf("%s made by 1000:1001 belongs to %d:%d, mode %#o, said %#o", name, found.Uid, found.Gid, found.Mode, attr.Mode)
		}
	}
	if d.Mode&0o7777 != 0o750 || f.Mode&0o7777 != 0o640 {
		t.Errorf("modes are %#o and %#o, expected 0750 and 0640", d.Mode&0o7777, f.Mode&0o7777)
	}
	user.Release(f.NodeId, f.Fh)
}

func testSetgid(t *testing.T, s *suite) {
	d := s.mkdir(t, Root, "d")
	in := fuseproto.SetattrIn{}
	in.Valid, in.Gid = fuseproto.FATTR_GID, 77
	_, errno := s.Setattr(d.NodeId, in)
	want(t, errno, "SETATTR of the group", fsbackend.OK)
	_, errno = s.Chmod(d.NodeId, 0o2777)
	want(t, errno, "SETATTR of mode 02777", fsbackend.OK)
	user := s.As(1000, 1001)
	sub, errno := user.Mkdir(d.NodeId, "sub", 0o755)
	want(t, errno, "MKDIR", fsbackend.OK)
	f, errno := user.Create(d.NodeId, "f", unix.O_RDWR, 0o2755)
	want(t, errno, "CREATE", fsbackend.OK)
	user.Release(f.NodeId, f.Fh)
	if sub.Gid != 77 || sub.Mode&unix.S_ISGID == 0 {
		t.Errorf("directory in a set-group-ID directory of group 77 has group %d, mode %#o, expected 77 and S_ISGID", sub.Gid, sub.Mode)
	}
	if f.Gid != 77 || f.Mode&unix.S_ISGID != 0 {
		t.Errorf("file by a non-member in a set-group-ID directory of group 77 has group %d, mode %#o, expected 77 and no S_ISGID", f.Gid, f.Mode)
	}
}

func testAttributes(t *testing.T, s *suite) {
	before := now()
	f := s.file(t, Root, "f", "12345")
	attr, errno := s.Getattr(f.NodeId)
	want(t, errno, "GETATTR", fsbackend.OK)
	if attr.Size != 5 || attr.Nlink != 1 || attr.Mode != unix.S_IFREG|0o644 {
		t.Errorf("size %d, %d links, mode %#o, expected 5, 1, 0100644", attr.Size, attr.Nlink, attr.Mode)
	}
	if attr.Mtime < uint64(before.Unix()) || attr.Ctime < uint64(before.Unix()) {
		t.Errorf("a new file's mtime is %d, ctime %d, expected %d or later", attr.Mtime, attr.Ctime, before.Unix())
	}
	attr, errno = s.Chmod(f.NodeId, 0o600)
	want(t, errno, "SETATTR of mode", fsbackend.OK)
	if attr.Mode != unix.S_IFREG|0o600 {
		t.Errorf("SETATTR replied mode %#o, expected 0100600", attr.Mode)
	}
	in := fuseproto.SetattrIn{}
	in.Valid = fuseproto.FATTR_ATIME | fuseproto.FATTR_MTIME
	in.Atime, in.Atimensec, in.Mtime, in.Mtimensec = 1000, 100, 2000, 200
	attr, errno = s.Setattr(f.NodeId, in)
	want(t, errno, "SETATTR of times", fsbackend.OK)
	again := s.lookup(t, Root, "f").Attr
	for what, a := range map[string]fuseproto.Attr{"SETATTR": attr, "LOOKUP": again} {
		if a.Atime != 1000 || a.Mtime != 2000 || a.Atimensec/100 != 1 || a.Mtimensec/100 != 2 || a.Mode != unix.S_IFREG|0o600 {
			t.Errorf("%s after times were set: atime %d.%09d, mtime %d.%09d, mode %#o", what, a.Atime, a.Atimensec, a.Mtime, a.Mtimensec, a.Mode)
		}
	}
	in.Valid = fuseproto.FATTR_MTIME | fuseproto.FATTR_MTIME_NOW
	attr, errno = s.Setattr(f.NodeId, in)
	want(t, errno, "SETATTR of mtime to now", fsbackend.OK)
	if attr.Mtime < uint64(before.Unix()) || attr.Atime != 1000 {
		t.Errorf("mtime %d, atime %d, expected now and 1000", attr.Mtime, attr.Atime)
	}
	// A change in a directory changes its times.
	d := s.mkdir(t, Root, "d")
	in.Valid = fuseproto.FATTR_MTIME
	_, errno = s.Setattr(d.NodeId, in)
	want(t, errno, "SETATTR of a directory's mtime", fsbackend.OK)
	s.file(t, d.NodeId, "x", "")
	attr, errno = s.Getattr(d.NodeId)
	want(t, errno, "GETATTR", fsbackend.OK)
	if attr.Mtime < uint64(before.Unix()) {
		t.Errorf("directory's mtime is %d after a file was made in it, expected %d or later", attr.Mtime, before.Unix())
	}
	_, errno = s.Setattr(d.NodeId, fuseproto.SetattrIn{})
	want(t, errno, "SETATTR of nothing", fsbackend.OK)
	want(t, s.Truncate(d.NodeId, 0), "SETATTR of a directory's size", unix.EISDIR, unix.EINVAL)
	if time.Since(before) > time.Minute {
		t.Error("the test took over a minute")
	}
}

func testKillpriv(t *testing.T, s *suite) {
	f := s.file(t, Root, "f", "x")
	_, errno := s.Chmod(f.NodeId, 0o6755)
	want(t, errno, "SETATTR of mode 06755", fsbackend.OK)
	in := fuseproto.SetattrIn{}
	in.Valid, in.Uid = fuseproto.FATTR_UID, 1000
	attr, errno := s.Setattr(f.NodeId, in)
	want(t, errno, "SETATTR of the owner", fsbackend.OK)
	if attr.Mode&0o7777 != 0o755 {
		t.Errorf("mode is %#o after the owner changed, expected 0755", attr.Mode&0o7777)
	}
	if !s.features.Has(fuseproto.FUSE_HANDLE_KILLPRIV_V2) {
		return
	}
	for _, row := range []struct {
		mode, after uint32
	}{{0o6755, 0o755}, {0o6745, 0o2745}, {0o4711, 0o711}} {
		_, errno = s.Chmod(f.NodeId, row.mode)
		want(t, errno, "SETATTR of mode", fsbackend.OK)
		fh, errno := s.Open(f.NodeId, unix.O_RDWR)
		want(t, errno, "OPEN", fsbackend.OK)
		write := &fuseproto.WriteIn{InHeader: s.header(f.NodeId), Fh: fh, Size: 1, WriteFlags: fuseproto.FUSE_WRITE_KILL_SUIDGID}
		errno = s.do(func(ctx *fsbackend.Context) fsbackend.Errno {
			_, errno := s.R.Write(ctx, write, NewSource([]byte("y"), 0))
			return errno
		})
		want(t, errno, "WRITE with FUSE_WRITE_KILL_SUIDGID", fsbackend.OK)
		s.Release(f.NodeId, fh)
		attr, errno = s.Getattr(f.NodeId)
		want(t, errno, "GETATTR", fsbackend.OK)
		if attr.Mode&0o7777 != row.after {
			t.Errorf("mode %#o is %#o after a WRITE with FUSE_WRITE_KILL_SUIDGID, expected %#o", row.mode, attr.Mode&0o7777, row.after)
		}
	}
	_, errno = s.Chmod(f.NodeId, 0o6755)
	want(t, errno, "SETATTR of mode", fsbackend.OK)
	in = fuseproto.SetattrIn{}
	in.Valid = fuseproto.FATTR_SIZE | fuseproto.FATTR_KILL_SUIDGID
	attr, errno = s.Setattr(f.NodeId, in)
	want(t, errno, "SETATTR of size with FATTR_KILL_SUIDGID", fsbackend.OK)
	if attr.Mode&0o7777 != 0o755 {
		t.Errorf("mode is %#o after a truncation with FATTR_KILL_SUIDGID, expected 0755", attr.Mode&0o7777)
	}
}

func testStatfs(t *testing.T, s *suite) {
	if s.R.StatFSer == nil {
		return
	}
	out, errno := s.Statfs(Root)
	want(t, errno, "STATFS", fsbackend.OK)
	if out.Bfree > out.Blocks || out.Bavail > out.Blocks || out.Ffree > out.Files {
		t.Errorf("more is free than there is: %+v", out)
	}
	if out.Blocks > 0 && (out.Bsize == 0 || out.NameLen == 0) {
		t.Errorf("%d blocks of %d bytes, names of up to %d bytes: none of these may be 0", out.Blocks, out.Bsize, out.NameLen)
	}
}

func testStatx(t *testing.T, s *suite) {
	f := s.file(t, Root, "f", "statx")
	out, errno := s.Statx(f.NodeId)
	want(t, errno, "STATX", fsbackend.OK)
	attr, errno := s.Getattr(f.NodeId)
	want(t, errno, "GETATTR", fsbackend.OK)
	if out.Ino != attr.Ino || out.Size != attr.Size || uint32(out.Mode) != attr.Mode || out.Nlink != attr.Nlink ||
		out.Uid != attr.Uid || out.Gid != attr.Gid || out.Mtime.Sec != attr.Mtime || out.Mtime.Nsec != attr.Mtimensec {
		t.Errorf("STATX gave %+v, GETATTR %+v", out.Statx, attr)
	}
	if out.Mask&unix.STATX_BASIC_STATS != unix.STATX_BASIC_STATS {
		t.Errorf("STATX mask %#x lacks some of the basic fields, %#x", out.Mask, unix.STATX_BASIC_STATS)
	}
	if out.Mask&unix.STATX_BTIME != 0 && out.Btime.Sec < uint64(now().Add(-time.Hour).Unix()) {
		t.Errorf("a new file was born at %d", out.Btime.Sec)
	}
	if !s.cfg.NoSymlinks {
		l, errno := s.Symlink(Root, "l", "f")
		want(t, errno, "SYMLINK", fsbackend.OK)
		out, errno = s.Statx(l.NodeId)
		want(t, errno, "STATX of a symbolic link", fsbackend.OK)
		if out.Mode&unix.S_IFMT != unix.S_IFLNK || out.Size != 1 {
			t.Errorf("STATX of a symbolic link gave mode %#o, size %d: it was followed", out.Mode, out.Size)
		}
	}
}

func testXattr(t *testing.T, s *suite) {
	f := s.file(t, Root, "f", "")
	_, _, errno := s.Getxattr(f.NodeId, "user.none", 100)
	want(t, errno, "GETXATTR of nothing", unix.ENODATA)
	want(t, s.Removexattr(f.NodeId, "user.none"), "REMOVEXATTR of nothing", unix.ENODATA)
	errno = s.Setxattr(f.NodeId, "user.a", []byte("value"), 0)
	want(t, errno, "SETXATTR", fsbackend.OK)
	want(t, s.Setxattr(f.NodeId, "user.empty", nil, 0), "SETXATTR of an empty value", fsbackend.OK)
	want(t, s.Setxattr(f.NodeId, "user.a", []byte("x"), unix.XATTR_CREATE), "SETXATTR with XATTR_CREATE of what exists", unix.EEXIST)
	want(t, s.Setxattr(f.NodeId, "user.b", []byte("x"), unix.XATTR_REPLACE), "SETXATTR with XATTR_REPLACE of nothing", unix.ENODATA)
	for _, row := range []struct {
		what  string
		name  string
		size  int
		value string
		n     uint32
		errno fsbackend.Errno
	}{
		{"with room", "user.a", 100, "value", 5, fsbackend.OK},
		{"with just enough room", "user.a", 5, "value", 5, fsbackend.OK},
		{"with too little room", "user.a", 4, "", 0, unix.ERANGE},
		{"asking for the size", "user.a", 0, "", 5, fsbackend.OK},
		{"of an empty value", "user.empty", 10, "", 0, fsbackend.OK},
		{"of an empty value, asking for the size", "user.empty", 0, "", 0, fsbackend.OK},
	} {
		value, n, errno := s.Getxattr(f.NodeId, row.name, row.size)
		want(t, errno, "GETXATTR "+row.what, row.errno)
		if errno == 0 && (string(value) != row.value || n != row.n) {
			t.Errorf("GETXATTR %s: %q, size %d, expected %q, %d", row.what, value, n, row.value, row.n)
		}
	}
	list, n, errno := s.Listxattr(f.NodeId, 4096)
	want(t, errno, "LISTXATTR", fsbackend.OK)
	names := strings.Split(strings.TrimSuffix(string(list), "\x00"), "\x00")
	seen := make(map[string]bool)
	for _, name := range names {
		seen[name] = true
	}
	if !seen["user.a"] || !seen["user.empty"] || int(n) != len(list) {
		t.Errorf("LISTXATTR gave %q, size %d, expected user.a and user.empty in it", list, n)
	}
	_, size, errno := s.Listxattr(f.NodeId, 0)
	want(t, errno, "LISTXATTR asking for the size", fsbackend.OK)
	if size != n {
		t.Errorf("LISTXATTR says %d bytes, then gives %d", size, n)
	}
	_, _, errno = s.Listxattr(f.NodeId, 1)
	want(t, errno, "LISTXATTR with too little room", unix.ERANGE)
	want(t, s.Setxattr(f.NodeId, "user.a", []byte("longer than before"), unix.XATTR_REPLACE), "SETXATTR with XATTR_REPLACE", fsbackend.OK)
	if value, _, _ := s.Getxattr(f.NodeId, "user.a", 100); string(value) != "longer than before" {
		t.Errorf("GETXATTR after XATTR_REPLACE: %q", value)
	}
	want(t, s.Removexattr(f.NodeId, "user.a"), "REMOVEXATTR", fsbackend.OK)
	_, _, errno = s.Getxattr(f.NodeId, "user.a", 100)
	want(t, errno, "GETXATTR after REMOVEXATTR", unix.ENODATA)
	want(t, s.Setxattr(f.NodeId, "nospace", []byte("x"), 0), "SETXATTR outside any name space", unix.EOPNOTSUPP)
}

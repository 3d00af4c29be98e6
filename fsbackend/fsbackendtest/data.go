package fsbackendtest

import (
	"bytes"
	"math"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func testOpen(t *testing.T, s *suite) {
	f := s.file(t, Root, "f", "contents")
	fh, errno := s.Open(f.NodeId, unix.O_WRONLY|unix.O_TRUNC)
	want(t, errno, "OPEN with O_TRUNC", fsbackend.OK)
	if s.features.Has(fuseproto.FUSE_ATOMIC_O_TRUNC) {
		if attr, errno := s.Getattr(f.NodeId); errno != 0 || attr.Size != 0 {
			t.Errorf("size is %d, %s after OPEN with O_TRUNC, expected 0", attr.Size, errnoName(errno))
		}
	}
	s.Release(f.NodeId, fh)
	// CREATE of what is there opens it.
	out, errno := s.Create(Root, "f", unix.O_RDWR, 0o600)
	want(t, errno, "CREATE of an existing name", fsbackend.OK)
	if out.Ino != f.Ino || out.NodeId != f.NodeId && !s.cfg.NewNodeOnCreate {
		t.Errorf("CREATE of an existing name gave node %d, inode %d, expected %d, %d", out.NodeId, out.Ino, f.NodeId, f.Ino)
	}
	_, errno = s.Write(out.NodeId, out.Fh, 0, []byte("more"), unix.O_RDWR)
	want(t, errno, "WRITE", fsbackend.OK)
	s.Release(out.NodeId, out.Fh)
	if got := s.contents(t, out.NodeId); got != "more" {
		t.Errorf("the file holds %q, expected \"more\"", got)
	}
	out, errno = s.Create(Root, "f", unix.O_RDWR|unix.O_TRUNC, 0o600)
	want(t, errno, "CREATE with O_TRUNC of an existing name", fsbackend.OK)
	s.Release(out.NodeId, out.Fh)
	if got := s.contents(t, out.NodeId); got != "" {
		t.Errorf("the file holds %q after CREATE with O_TRUNC, expected nothing", got)
	}
	fh, errno = s.Open(out.NodeId, unix.O_RDONLY)
	want(t, errno, "OPEN", fsbackend.OK)
	if !s.cfg.NoNodeChecks {
		_, errno = s.Write(out.NodeId, fh, 0, []byte("no"), unix.O_RDONLY)
		want(t, errno, "WRITE with a handle for reading", unix.EBADF)
	}
	// Handles are their own.
	second, errno := s.Open(out.NodeId, unix.O_RDONLY)
	want(t, errno, "second OPEN", fsbackend.OK)
	s.Release(out.NodeId, fh)
	_, errno = s.Read(out.NodeId, second, 0, 1)
	want(t, errno, "READ with the second handle after the first's RELEASE", fsbackend.OK)
	s.Release(out.NodeId, second)
}

// testData compares random I/O with a model.
func testData(t *testing.T, s *suite) {
	const limit = 200_000
	rnd := rand.New(rand.NewPCG(7, 11))
	f, errno := s.Create(Root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	defer s.Release(f.NodeId, f.Fh)
	model := make([]byte, 0, limit)
	extend := func(n int) {
		if n > len(model) {
			model = append(model, make([]byte, n-len(model))...)
		}
	}
	for i := range 600 {
		s.Piece = []int{0, 1, 7, 512, 4096, 5000}[rnd.IntN(6)]
		off := rnd.IntN(limit)
		n := 1 + rnd.IntN([]int{10, 5000, 50_000}[rnd.IntN(3)])
		if s.Piece > 0 && s.Piece < 10 {
			n = min(n, 3000)
		}
		n = min(n, limit-off)
		switch op := rnd.IntN(10); {
		case op < 4:
			data := make([]byte, n)
			for j := range data {
				data[j] = byte(rnd.Uint32())
			}
			got, errno := s.Write(f.NodeId, f.Fh, uint64(off), data, unix.O_RDWR)
			want(t, errno, "WRITE", fsbackend.OK)
			if int(got) != n {
				t.Fatalf("operation %d: WRITE of %d bytes took %d", i, n, got)
			}
			extend(off + n)
			copy(model[off:], data)
		case op < 8:
			got, errno := s.Read(f.NodeId, f.Fh, uint64(off), n)
			want(t, errno, "READ", fsbackend.OK)
			expected := model[min(off, len(model)):min(off+n, len(model))]
			if !bytes.Equal(got, expected) {
				t.Fatalf("operation %d: READ of %d bytes at %d of %d gave %d bytes, first difference at %d; expected %d bytes",
					i, n, off, len(model), len(got), difference(got, expected), len(expected))
			}
		case op == 8:
			want(t, s.Truncate(f.NodeId, uint64(off)), "SETATTR of size", fsbackend.OK)
			extend(off)
			clear(model[off:])
			model = model[:off]
		default:
			attr, errno := s.Getattr(f.NodeId)
			want(t, errno, "GETATTR", fsbackend.OK)
			if attr.Size != uint64(len(model)) {
				t.Fatalf("operation %d: size is %d, expected %d", i, attr.Size, len(model))
			}
		}
	}
	s.Piece = 0
}

func difference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// testPieces takes one READ and one WRITE over more pieces than one system call takes.
func testPieces(t *testing.T, s *suite) {
	data := make([]byte, 3*1024+5)
	for i := range data {
		data[i] = byte(i % 251)
	}
	f, errno := s.Create(Root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	defer s.Release(f.NodeId, f.Fh)
	s.Piece = 1
	n, errno := s.Write(f.NodeId, f.Fh, 10, data, unix.O_RDWR)
	want(t, errno, "WRITE of many pieces", fsbackend.OK)
	if int(n) != len(data) {
		t.Errorf("WRITE of %d pieces took %d", len(data), n)
	}
	got, errno := s.Read(f.NodeId, f.Fh, 10, len(data)+100)
	want(t, errno, "READ of many pieces", fsbackend.OK)
	if !bytes.Equal(got, data) {
		t.Errorf("READ gave %d bytes, first difference at %d, expected %d", len(got), difference(got, data), len(data))
	}
}

// testOffsets uses every offset that goes wrong when it is taken for a signed number.
func testOffsets(t *testing.T, s *suite) {
	f, errno := s.Create(Root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	defer s.Release(f.NodeId, f.Fh)
	_, errno = s.Write(f.NodeId, f.Fh, 0, []byte("contents"), unix.O_RDWR)
	want(t, errno, "WRITE", fsbackend.OK)
	for _, off := range []uint64{1 << 63, math.MaxUint64, math.MaxUint64 - 7, 1<<63 + 4096} {
		got, errno := s.Read(f.NodeId, f.Fh, off, 8)
		want(t, errno, "READ beyond 2^63", unix.EINVAL, unix.EOVERFLOW, fsbackend.OK)
		if len(got) > 0 {
			t.Errorf("READ at %#x gave %q", off, got)
		}
		_, errno = s.Write(f.NodeId, f.Fh, off, []byte("x"), unix.O_RDWR)
		want(t, errno, "WRITE beyond 2^63", unix.EINVAL, unix.EFBIG, unix.EOVERFLOW)
		want(t, s.Truncate(f.NodeId, off), "SETATTR of a size beyond 2^63", unix.EINVAL, unix.EFBIG)
		if s.cfg.SparseBlock > 0 {
			_, errno = s.Lseek(f.NodeId, f.Fh, off, unix.SEEK_DATA)
			want(t, errno, "LSEEK beyond 2^63", unix.ENXIO, unix.EINVAL, unix.EOVERFLOW)
		}
		if !s.cfg.NoFallocate {
			want(t, s.Fallocate(f.NodeId, f.Fh, off, 10, 0), "FALLOCATE beyond 2^63", unix.EINVAL, unix.EFBIG)
			want(t, s.Fallocate(f.NodeId, f.Fh, 10, off, 0), "FALLOCATE of more than 2^63", unix.EINVAL, unix.EFBIG)
		}
		if !s.cfg.NoCopy {
			in := fuseproto.CopyFileRangeIn{FhIn: f.Fh, NodeIdOut: f.NodeId, FhOut: f.Fh, OffIn: off, OffOut: 100, Len: 8}
			in.NodeId = f.NodeId
			_, errno = s.CopyFileRange(in)
			want(t, errno, "COPY_FILE_RANGE from beyond 2^63", unix.EINVAL, unix.EOVERFLOW, unix.EFBIG)
			in.OffIn, in.OffOut = 0, off
			_, errno = s.CopyFileRange(in)
			want(t, errno, "COPY_FILE_RANGE to beyond 2^63", unix.EINVAL, unix.EOVERFLOW, unix.EFBIG)
		}
	}
	_, errno = s.Write(f.NodeId, f.Fh, math.MaxInt64, []byte("xx"), unix.O_RDWR)
	want(t, errno, "WRITE across 2^63", unix.EINVAL, unix.EFBIG, unix.EOVERFLOW)
	got, errno := s.Read(f.NodeId, f.Fh, 8, 10)
	want(t, errno, "READ at the end", fsbackend.OK)
	if len(got) > 0 {
		t.Errorf("READ at the end gave %q", got)
	}
	got, errno = s.Read(f.NodeId, f.Fh, math.MaxInt64, 10)
	want(t, errno, "READ at 2^63-1", fsbackend.OK, unix.EINVAL, unix.EOVERFLOW)
	if len(got) > 0 {
		t.Errorf("READ at 2^63-1 gave %q", got)
	}
	n, errno := s.Write(f.NodeId, f.Fh, 0, nil, unix.O_RDWR)
	want(t, errno, "WRITE of nothing", fsbackend.OK)
	if n != 0 {
		t.Errorf("WRITE of nothing took %d bytes", n)
	}
	got, errno = s.Read(f.NodeId, f.Fh, 0, 0)
	want(t, errno, "READ of nothing", fsbackend.OK)
	if len(got) > 0 {
		t.Errorf("READ of nothing gave %q", got)
	}
	if got := s.contents(t, f.NodeId); got != "contents" {
		t.Errorf("the file holds %q after requests that all failed", got)
	}
}

func testAppend(t *testing.T, s *suite) {
	f := s.file(t, Root, "f", "one")
	fh, errno := s.Open(f.NodeId, unix.O_WRONLY|unix.O_APPEND)
	want(t, errno, "OPEN with O_APPEND", fsbackend.OK)
	n, errno := s.Write(f.NodeId, fh, 0, []byte("two"), unix.O_WRONLY|unix.O_APPEND)
	want(t, errno, "WRITE with O_APPEND", fsbackend.OK)
	s.Release(f.NodeId, fh)
	if got := s.contents(t, f.NodeId); got != "onetwo" || n != 3 {
		t.Errorf("the file holds %q after an append of %d bytes, expected \"onetwo\"", got, n)
	}
}

func testUnlinked(t *testing.T, s *suite) {
	f, errno := s.Create(Root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	want(t, s.Unlink(Root, "f"), "UNLINK of an open file", fsbackend.OK)
	_, errno = s.Write(f.NodeId, f.Fh, 0, []byte("ghost"), unix.O_RDWR)
	want(t, errno, "WRITE to an unlinked file", fsbackend.OK)
	got, errno := s.Read(f.NodeId, f.Fh, 0, 10)
	want(t, errno, "READ from an unlinked file", fsbackend.OK)
	if string(got) != "ghost" {
		t.Errorf("READ from an unlinked file gave %q", got)
	}
	attr, errno := s.GetattrFh(f.NodeId, f.Fh)
	want(t, errno, "GETATTR by handle of an unlinked file", fsbackend.OK)
	if attr.Size != 5 {
		t.Errorf("an unlinked file has size %d, expected 5", attr.Size)
	}
	g := s.file(t, Root, "f", "new")
	if g.NodeId == f.NodeId {
		t.Errorf("a new file of the same name got the node %d of the unlinked one", g.NodeId)
	}
	s.R.Forget(f.NodeId, 1)
	s.Release(f.NodeId, f.Fh)
	_, errno = s.Getattr(f.NodeId)
	want(t, errno, "GETATTR of an unlinked, closed and forgotten file", unix.ESTALE)
}

func testTmpfile(t *testing.T, s *suite) {
	d := s.mkdir(t, Root, "d")
	f, errno := s.Tmpfile(d.NodeId, unix.O_RDWR, 0o600)
	want(t, errno, "TMPFILE", fsbackend.OK)
	_, errno = s.Write(f.NodeId, f.Fh, 0, []byte("tmp"), unix.O_RDWR)
	want(t, errno, "WRITE", fsbackend.OK)
	if names := s.List(t, d.NodeId, 4096); len(names) > 0 {
		t.Errorf("the directory lists %q after TMPFILE", names)
	}
	if !s.cfg.NoTmpfileLink {
		l, errno := s.Link(f.NodeId, d.NodeId, "named")
		want(t, errno, "LINK of a TMPFILE", fsbackend.OK)
		if l.NodeId != f.NodeId || l.Nlink != 1 {
			t.Errorf("LINK of a TMPFILE gave node %d with %d links, expected %d with 1", l.NodeId, l.Nlink, f.NodeId)
		}
		if got := s.contents(t, l.NodeId); got != "tmp" {
			t.Errorf("the file holds %q", got)
		}
		x, errno := s.Tmpfile(d.NodeId, unix.O_RDWR|unix.O_EXCL, 0o600)
		want(t, errno, "TMPFILE with O_EXCL", fsbackend.OK)
		_, errno = s.Link(x.NodeId, d.NodeId, "x")
		want(t, errno, "LINK of a TMPFILE with O_EXCL", unix.ENOENT)
		s.Release(x.NodeId, x.Fh)
	}
	s.Release(f.NodeId, f.Fh)
}

func testSparse(t *testing.T, s *suite) {
	block := uint64(s.cfg.SparseBlock)
	f, errno := s.Create(Root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	defer s.Release(f.NodeId, f.Fh)
	data := bytes.Repeat([]byte{0xaa}, int(block))
	for _, at := range []uint64{4 * block, 1 << 36} {
		_, errno := s.Write(f.NodeId, f.Fh, at, data, unix.O_RDWR)
		want(t, errno, "WRITE", fsbackend.OK)
	}
	end := uint64(1<<36) + block
	want(t, s.Truncate(f.NodeId, end+10*block), "SETATTR of size", fsbackend.OK)
	attr, errno := s.Getattr(f.NodeId)
	want(t, errno, "GETATTR", fsbackend.OK)
	if attr.Size != end+10*block || attr.Blocks*512 >= 1<<30 {
		t.Errorf("a file of 2 blocks has size %d, %d blocks of 512 bytes", attr.Size, attr.Blocks)
	}
	for _, row := range []struct {
		whence   uint32
		off      uint64
		expected uint64
		errno    fsbackend.Errno
	}{
		{unix.SEEK_DATA, 0, 4 * block, fsbackend.OK},
		{unix.SEEK_DATA, 4*block + 1, 4*block + 1, fsbackend.OK},
		{unix.SEEK_HOLE, 0, 0, fsbackend.OK},
		{unix.SEEK_HOLE, 4 * block, 5 * block, fsbackend.OK},
		{unix.SEEK_DATA, 5 * block, 1 << 36, fsbackend.OK},
		{unix.SEEK_HOLE, 1 << 36, end, fsbackend.OK},
		{unix.SEEK_DATA, end, 0, unix.ENXIO},
		{unix.SEEK_HOLE, end + 10*block, 0, unix.ENXIO},
		{unix.SEEK_DATA, math.MaxInt64, 0, unix.ENXIO},
	} {
		got, errno := s.Lseek(f.NodeId, f.Fh, row.off, row.whence)
		want(t, errno, "LSEEK", row.errno)
		if errno == 0 && got != row.expected {
			t.Errorf("LSEEK whence %d from %#x gave %#x, expected %#x", row.whence, row.off, got, row.expected)
		}
	}
	if !s.cfg.NoFallocate {
		g, errno := s.Create(Root, "g", unix.O_RDWR, 0o644)
		want(t, errno, "CREATE", fsbackend.OK)
		want(t, s.Truncate(g.NodeId, block), "SETATTR of size", fsbackend.OK)
		want(t, s.Fallocate(g.NodeId, g.Fh, 4*block, block, unix.FALLOC_FL_KEEP_SIZE), "FALLOCATE with KEEP_SIZE", fsbackend.OK)
		_, errno = s.Lseek(g.NodeId, g.Fh, 0, unix.SEEK_DATA)
		want(t, errno, "LSEEK to data where there is space beyond the end alone", unix.ENXIO)
		s.Release(g.NodeId, g.Fh)
	}
	got, errno := s.Read(f.NodeId, f.Fh, 4*block-10, 20)
	want(t, errno, "READ", fsbackend.OK)
	if !bytes.Equal(got, append(make([]byte, 10), data[:10]...)) {
		t.Errorf("READ from hole to data gave %x", got)
	}
}

func testFallocate(t *testing.T, s *suite) {
	f, errno := s.Create(Root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	defer s.Release(f.NodeId, f.Fh)
	size := func(expected uint64) {
		t.Helper()
		if attr, errno := s.Getattr(f.NodeId); errno != 0 || attr.Size != expected {
			t.Errorf("size is %d, %s, expected %d", attr.Size, errnoName(errno), expected)
		}
	}
	want(t, s.Fallocate(f.NodeId, f.Fh, 0, 10_000, 0), "FALLOCATE", fsbackend.OK)
	size(10_000)
	want(t, s.Fallocate(f.NodeId, f.Fh, 0, 20_000, unix.FALLOC_FL_KEEP_SIZE), "FALLOCATE with KEEP_SIZE", fsbackend.OK)
	size(10_000)
	if s.cfg.NoPunch {
		return
	}
	data := bytes.Repeat([]byte{0x55}, 20_000)
	_, errno = s.Write(f.NodeId, f.Fh, 0, data, unix.O_RDWR)
	want(t, errno, "WRITE", fsbackend.OK)
	want(t, s.Fallocate(f.NodeId, f.Fh, 5000, 10_000, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE), "FALLOCATE with PUNCH_HOLE", fsbackend.OK)
	clear(data[5000:15_000])
	if got := s.contents(t, f.NodeId); got != string(data) {
		t.Errorf("after PUNCH_HOLE, first difference at %d", difference([]byte(got), data))
	}
	errno = s.Fallocate(f.NodeId, f.Fh, 100, 1000, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE)
	want(t, errno, "FALLOCATE with ZERO_RANGE", fsbackend.OK, unix.EOPNOTSUPP)
	if errno == 0 {
		clear(data[100:1100])
		if got := s.contents(t, f.NodeId); got != string(data) {
			t.Errorf("after ZERO_RANGE, first difference at %d", difference([]byte(got), data))
		}
	}
	size(20_000)
	want(t, s.Fallocate(f.NodeId, f.Fh, 0, 0, 0), "FALLOCATE of nothing", unix.EINVAL)
	want(t, s.Fallocate(f.NodeId, f.Fh, 0, 10, unix.FALLOC_FL_PUNCH_HOLE), "FALLOCATE with PUNCH_HOLE alone", unix.EOPNOTSUPP, unix.EINVAL)
	want(t, s.Fallocate(f.NodeId, f.Fh, 0, 10, 1<<20), "FALLOCATE with unknown flags", unix.EOPNOTSUPP, unix.EINVAL)
}

func testCopy(t *testing.T, s *suite) {
	text := string(bytes.Repeat([]byte("0123456789"), 1000))
	a := s.file(t, Root, "a", text)
	fh, errno := s.Open(a.NodeId, unix.O_RDWR)
	want(t, errno, "OPEN", fsbackend.OK)
	defer s.Release(a.NodeId, fh)
	b, errno := s.Create(Root, "b", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	defer s.Release(b.NodeId, b.Fh)
	in := fuseproto.CopyFileRangeIn{FhIn: fh, OffIn: 3, NodeIdOut: b.NodeId, FhOut: b.Fh, OffOut: 5, Len: 1 << 20}
	in.NodeId = a.NodeId
	n, errno := s.CopyFileRange(in)
	want(t, errno, "COPY_FILE_RANGE", fsbackend.OK)
	if expected := uint64(len(text) - 3); n != expected {
		t.Errorf("COPY_FILE_RANGE copied %d bytes, expected the %d there are", n, expected)
	}
	if got := s.contents(t, b.NodeId); got != "\x00\x00\x00\x00\x00"+text[3:] {
		t.Errorf("the copy holds %d bytes that are not 5 zeros and the original", len(got))
	}
	in.OffIn = 1 << 40
	n, errno = s.CopyFileRange(in)
	want(t, errno, "COPY_FILE_RANGE from beyond the end", fsbackend.OK)
	if n != 0 {
		t.Errorf("COPY_FILE_RANGE from beyond the end copied %d bytes", n)
	}
	in.OffIn, in.NodeIdOut, in.FhOut, in.Len = 0, a.NodeId, fh, 100
	_, errno = s.CopyFileRange(in)
	want(t, errno, "COPY_FILE_RANGE onto itself", unix.EINVAL)
	in.OffOut = 5000
	n, errno = s.CopyFileRange(in)
	want(t, errno, "COPY_FILE_RANGE within a file", fsbackend.OK)
	if n != 100 {
		t.Errorf("COPY_FILE_RANGE within a file copied %d bytes, expected 100", n)
	}
	in.Flags = 1
	_, errno = s.CopyFileRange(in)
	want(t, errno, "COPY_FILE_RANGE with flags", unix.EINVAL)
}

// testSync makes the calls that have an effect on the medium alone.
func testSync(t *testing.T, s *suite) {
	f, errno := s.Create(Root, "f", unix.O_RDWR, 0o644)
	want(t, errno, "CREATE", fsbackend.OK)
	defer s.Release(f.NodeId, f.Fh)
	dh, errno := s.Opendir(Root)
	want(t, errno, "OPENDIR", fsbackend.OK)
	defer s.Releasedir(Root, dh)
	const unknown = 1 << 46
	if s.R.Flusher != nil {
		want(t, s.Flush(f.NodeId, f.Fh), "FLUSH", fsbackend.OK, unix.ENOSYS)
		want(t, s.Flush(f.NodeId, unknown), "FLUSH of an unknown handle", unix.EBADF, unix.ENOSYS)
	}
	if s.R.Fsyncer != nil {
		want(t, s.Fsync(f.NodeId, f.Fh, false), "FSYNC", fsbackend.OK, unix.ENOSYS, unix.EOPNOTSUPP)
		want(t, s.Fsync(f.NodeId, unknown, false), "FSYNC of an unknown handle", unix.EBADF, unix.ENOSYS)
		want(t, s.Fsync(Root, dh, true), "FSYNCDIR", fsbackend.OK, unix.ENOSYS, unix.EOPNOTSUPP)
		want(t, s.Fsync(Root, unknown, true), "FSYNCDIR of an unknown handle", unix.EBADF, unix.ENOSYS)
	}
	if s.R.Ioctler != nil {
		errno := s.doBlocking(func(ctx *fsbackend.Context) fsbackend.Errno {
			in := &fuseproto.IoctlIn{InHeader: s.header(f.NodeId), Fh: f.Fh, Cmd: 0xdeadbeef}
			_, errno := s.R.Ioctl(ctx, in, nil, NewSink(make([]byte, 8), 0))
			return errno
		})
		want(t, errno, "IOCTL of an unknown command", unix.ENOTTY, unix.ENOSYS)
	}
}

package fsbackendtest

import (
	"bytes"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// ReadOnlyConfig says which backend to test whose tree nobody changes.
type ReadOnlyConfig struct {
	// New makes a backend that serves Tree. The suite closes it.
	New func(t *testing.T) fsbackend.Backend
	// Check, if not nil, is called with a backend that rests, and says what of its bookkeeping is wrong.
	Check func(b fsbackend.Backend) error
	// NoSymlinks says that the symbolic links of Tree are not there.
	NoSymlinks bool
	// NoAttrs says that modes and times are not kept.
	NoAttrs bool
	// Strict says that a node is ESTALE as soon as its last lookup has been taken back.
	Strict bool
}

// Tree is what a backend serves that RunReadOnly tests: New puts it where its backend finds it, or serves it as it is.
func Tree() fstest.MapFS {
	rnd := rand.New(rand.NewPCG(1, 2))
	data := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		return b
	}
	file := func(data []byte) *fstest.MapFile {
		return &fstest.MapFile{Data: data, Mode: 0o640, ModTime: time.Unix(1_700_000_000, 0)}
	}
	tree := fstest.MapFS{
		"empty":                  file(nil),
		"small":                  file([]byte("four")),
		"page":                   file(data(4096)),
		"large":                  file(data(2<<20 + 17)),
		"dir/sub/deep":           file([]byte("deep")),
		"dir/" + longName:        file([]byte("long")),
		"dir/tool":               {Data: []byte("#!"), Mode: 0o755, ModTime: time.Unix(1_600_000_000, 0)},
		"dir/link":               {Data: []byte("sub/deep"), Mode: fs.ModeSymlink | 0o777},
		"dir/dangling":           {Data: []byte("/no/such/file"), Mode: fs.ModeSymlink | 0o777},
		"dir/\u00fc\u4e16 \n\t'": file([]byte("odd name")),
	}
	for i := range 100 {
		tree[fmt.Sprintf("many/file%02d", i)] = file([]byte(strings.Repeat("x", i)))
	}
	return tree
}

var longName = strings.Repeat("n", unix.NAME_MAX)

// readOnly is one test's backend and what drives it.
type readOnly struct {
	*Client
	cfg   *ReadOnlyConfig
	files fstest.MapFS
}

// RunReadOnly runs the part of the suite that changes nothing, with a backend of Tree.
func RunReadOnly(t *testing.T, cfg ReadOnlyConfig) {
	files := Tree()
	for p, f := range files {
		if cfg.NoSymlinks && f.Mode.Type() == fs.ModeSymlink {
			delete(files, p)
		}
	}
	for _, test := range []struct {
		name string
		run  func(*testing.T, *readOnly)
	}{
		{"tree", testTree},
		{"lookup", testReadOnlyLookup},
		{"forget", testReadOnlyForget},
		{"stale", testReadOnlyStale},
		{"open", testReadOnlyOpen},
		{"data", testReadOnlyData},
		{"readdirplus", testReadOnlyReaddirplus},
		{"reset", testReadOnlyReset},
		{"concurrent", testReadOnlyConcurrent},
	} {
		withBackend(t, test.name, cfg.New, cfg.Check, func(t *testing.T, b fsbackend.Backend) {
			s := &readOnly{Client: &Client{R: fsbackend.Resolve(b)}, cfg: &cfg, files: files}
			s.init()
			test.run(t, s)
		})
	}
}

func (s *readOnly) init() {
	if s.R.Initer != nil {
		s.R.Init(fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION, Flags: fuseproto.FUSE_DO_READDIRPLUS | fuseproto.FUSE_INIT_EXT})
	}
}

func (s *readOnly) reset() {
	s.R.Reset()
	s.init()
}

// walk looks the file at p up from the root, and gives the lookups on the way back.
func (s *readOnly) walk(p string) (out fuseproto.EntryOut, errno fsbackend.Errno) {
	out.NodeId = Root
	for name := range strings.SplitSeq(p, "/") {
		above := out.NodeId
		out, errno = s.Lookup(above, name)
		s.R.Forget(above, 1)
		if errno != 0 {
			return out, errno
		}
	}
	return out, fsbackend.OK
}

func (s *readOnly) mustWalk(t *testing.T, p string) fuseproto.EntryOut {
	t.Helper()
	out, errno := s.walk(p)
	want(t, errno, "LOOKUP along "+p, fsbackend.OK)
	checkEntry(t, p, &out)
	return out
}

// testTree compares the whole tree with what it should be.
func testTree(t *testing.T, s *readOnly) {
	var visit func(p string, node uint64)
	visit = func(p string, node uint64) {
		inos, types := make(map[string]uint64), make(map[string]uint32)
		expected, err := fs.ReadDir(s.files, p)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range expected {
			at := path.Join(p, e.Name())
			out, errno := s.Lookup(node, e.Name())
			want(t, errno, "LOOKUP "+at, fsbackend.OK)
			checkEntry(t, at, &out)
			inos[e.Name()], types[e.Name()] = out.Ino, out.Mode&unix.S_IFMT>>12
			s.checkFile(t, at, &out)
			if e.IsDir() {
				visit(at, out.NodeId)
			}
		}
		s.checkListing(t, node, inos, types)
	}
	visit(".", Root)
}

// checkFile compares one file with what it should be.
func (s *readOnly) checkFile(t *testing.T, p string, e *fuseproto.EntryOut) {
	t.Helper()
	info, err := s.files.Lstat(p)
	if err != nil {
		t.Fatal(err)
	}
	attr, errno := s.Getattr(e.NodeId)
	want(t, errno, "GETATTR of "+p, fsbackend.OK)
	attr.Atime, attr.Atimensec = e.Atime, e.Atimensec // that may change
	if attr != e.Attr {
		t.Errorf("GETATTR of %s gave %+v, LOOKUP %+v", p, attr, e.Attr)
	}
	if !s.cfg.NoAttrs && info.Mode().IsRegular() {
		if got := fs.FileMode(e.Mode).Perm(); got != info.Mode().Perm() {
			t.Errorf("%s has mode %v, expected %v", p, got, info.Mode().Perm())
		}
		if got := time.Unix(int64(e.Mtime), int64(e.Mtimensec)); !got.Equal(info.ModTime()) {
			t.Errorf("%s was changed %v, expected %v", p, got, info.ModTime())
		}
	}
	typ := e.Mode & unix.S_IFMT
	switch info.Mode().Type() {
	case 0:
		if typ != unix.S_IFREG || e.Size != uint64(info.Size()) {
			t.Errorf("%s has mode %#o and %d bytes, expected a regular file of %d", p, e.Mode, e.Size, info.Size())
		}
		if got := s.contents(t, e.NodeId); !bytes.Equal(got, s.files[p].Data) {
			t.Errorf("%s holds %d bytes that are not the %d expected", p, len(got), len(s.files[p].Data))
		}
	case fs.ModeDir:
		if typ != unix.S_IFDIR {
			t.Errorf("%s has mode %#o, expected a directory", p, e.Mode)
		}
	case fs.ModeSymlink:
		target, errno := s.Readlink(e.NodeId)
		want(t, errno, "READLINK "+p, fsbackend.OK)
		if typ != unix.S_IFLNK || target != string(s.files[p].Data) {
			t.Errorf("%s has mode %#o and points to %q, expected a link to %q", p, e.Mode, target, s.files[p].Data)
		}
	}
}

// contents reads all of a file as a guest does: 128 KiB at a time.
func (s *readOnly) contents(t *testing.T, node uint64) []byte {
	t.Helper()
	fh, errno := s.Open(node, unix.O_RDONLY)
	want(t, errno, "OPEN", fsbackend.OK)
	defer s.Release(node, fh)
	var all []byte
	for {
		b, errno := s.Read(node, fh, uint64(len(all)), 128<<10)
		want(t, errno, "READ", fsbackend.OK)
		if len(b) == 0 {
			return all
		}
		all = append(all, b...)
	}
}

func testReadOnlyLookup(t *testing.T, s *readOnly) {
	for _, name := range []string{"nothing", "SMALL", "small ", "\xff\xfe", "a\\b", longName} {
		out, errno := s.Lookup(Root, name)
		want(t, errno, fmt.Sprintf("LOOKUP of the missing name %q", name), fsbackend.OK, unix.ENOENT)
		if errno == 0 && out.NodeId != 0 {
			t.Errorf("LOOKUP of the missing name %q gave node %d", name, out.NodeId)
		}
	}
	f := s.mustWalk(t, "small")
	_, errno := s.Lookup(f.NodeId, "x")
	want(t, errno, "LOOKUP in a regular file", unix.ENOTDIR)
	if again := s.mustWalk(t, "small"); again.NodeId != f.NodeId || again.Ino != f.Ino {
		t.Errorf("two LOOKUPs gave nodes %d and %d, inodes %d and %d, expected the same", f.NodeId, again.NodeId, f.Ino, again.Ino)
	}
	if other := s.mustWalk(t, "page"); other.NodeId == f.NodeId || other.Ino == f.Ino {
		t.Errorf("two files share node %d or inode %d", f.NodeId, f.Ino)
	}
	_, errno = s.Readlink(f.NodeId)
	if s.R.Readlinker != nil {
		want(t, errno, "READLINK of a regular file", unix.EINVAL)
	}
}

func testReadOnlyForget(t *testing.T, s *readOnly) {
	f := s.mustWalk(t, "dir/sub/deep")
	s.mustWalk(t, "dir/sub/deep")
	s.R.Forget(f.NodeId, 1)
	_, errno := s.Getattr(f.NodeId)
	want(t, errno, "GETATTR after FORGET of 1 of 2 lookups, in a forgotten directory", fsbackend.OK)
	s.R.Forget(f.NodeId, math.MaxUint64)
	if _, errno = s.Getattr(f.NodeId); s.cfg.Strict {
		want(t, errno, "GETATTR after the last FORGET", unix.ESTALE)
	}
	s.R.Forget(f.NodeId, 1)
	s.R.Forget(1<<47, 1)
	s.R.Forget(math.MaxUint64, math.MaxUint64)
	s.R.Forget(0, 1)
	s.R.Forget(Root, math.MaxUint64)
	if again := s.mustWalk(t, "dir/sub/deep"); again.Ino != f.Ino {
		t.Errorf("LOOKUP after the last FORGET gave inode %d, expected %d still", again.Ino, f.Ino)
	}
}

func testReadOnlyStale(t *testing.T, s *readOnly) {
	f, other, d := s.mustWalk(t, "small"), s.mustWalk(t, "page"), s.mustWalk(t, "dir")
	for _, node := range []uint64{0, 1 << 40, 1<<48 - 1, math.MaxUint64} {
		what := fmt.Sprintf(" of unknown node %#x", node)
		_, errno := s.Lookup(node, "small")
		want(t, errno, "LOOKUP"+what, unix.ESTALE)
		_, errno = s.Getattr(node)
		want(t, errno, "GETATTR"+what, unix.ESTALE)
		_, errno = s.Open(node, unix.O_RDONLY)
		want(t, errno, "OPEN"+what, unix.ESTALE)
		_, errno = s.Opendir(node)
		want(t, errno, "OPENDIR"+what, unix.ESTALE)
		if s.R.Readlinker != nil {
			_, errno = s.Readlink(node)
			want(t, errno, "READLINK"+what, unix.ESTALE)
		}
	}
	fh, errno := s.Open(f.NodeId, unix.O_RDONLY)
	want(t, errno, "OPEN", fsbackend.OK)
	dh, errno := s.Opendir(d.NodeId)
	want(t, errno, "OPENDIR", fsbackend.OK)
	for _, h := range []struct {
		what     string
		node, fh uint64
	}{
		{"an unknown handle", f.NodeId, 1 << 40},
		{"another file's handle", other.NodeId, fh},
		{"a directory's handle", d.NodeId, dh},
	} {
		_, errno := s.Read(h.node, h.fh, 0, 10)
		want(t, errno, "READ with "+h.what, unix.EBADF, unix.EISDIR)
		s.Release(other.NodeId, h.fh)
	}
	_, errno = s.Readdir(f.NodeId, fh, 0, 1000, false)
	want(t, errno, "READDIR with a file's handle", unix.EBADF, unix.ENOTDIR)
	_, errno = s.GetattrFh(other.NodeId, fh)
	want(t, errno, "GETATTR with another file's handle", unix.EBADF)
	for node, fh := range map[uint64]uint64{f.NodeId: fh, d.NodeId: dh} {
		_, errno = s.GetattrFh(node, fh)
		want(t, errno, "GETATTR with a handle", fsbackend.OK)
	}
	s.Release(f.NodeId, fh)
	_, errno = s.Read(f.NodeId, fh, 0, 10)
	want(t, errno, "READ after RELEASE", unix.EBADF)
	s.Release(f.NodeId, fh)
	s.Releasedir(d.NodeId, dh)
	s.Releasedir(d.NodeId, dh)
	_, errno = s.Readdir(d.NodeId, dh, 0, 1000, false)
	want(t, errno, "READDIR after RELEASEDIR", unix.EBADF)
}

func testReadOnlyOpen(t *testing.T, s *readOnly) {
	f, d := s.mustWalk(t, "small"), s.mustWalk(t, "dir")
	for _, flags := range []uint32{unix.O_WRONLY, unix.O_RDWR, unix.O_ACCMODE, unix.O_RDONLY | unix.O_TRUNC} {
		_, errno := s.Open(f.NodeId, flags)
		want(t, errno, fmt.Sprintf("OPEN with flags %#x", flags), unix.EROFS, unix.EACCES, unix.EPERM)
	}
	_, errno := s.Open(d.NodeId, unix.O_RDONLY)
	want(t, errno, "OPEN of a directory", unix.EISDIR)
	_, errno = s.Opendir(f.NodeId)
	want(t, errno, "OPENDIR of a file", unix.ENOTDIR)
	// An open file outlives its node.
	fh, errno := s.Open(f.NodeId, unix.O_RDONLY)
	want(t, errno, "OPEN", fsbackend.OK)
	s.R.Forget(f.NodeId, math.MaxUint64)
	b, errno := s.Read(f.NodeId, fh, 1, 10)
	want(t, errno, "READ of a forgotten file", fsbackend.OK)
	if string(b) != "our" {
		t.Errorf("READ of a forgotten file gave %q, expected %q", b, "our")
	}
	s.Release(f.NodeId, fh)
}

// testReadOnlyData reads at random places, in pieces as guest memory has them, and beyond the end.
func testReadOnlyData(t *testing.T, s *readOnly) {
	const p = "large"
	data := s.files[p].Data
	f := s.mustWalk(t, p)
	fh, errno := s.Open(f.NodeId, unix.O_RDONLY)
	want(t, errno, "OPEN", fsbackend.OK)
	defer s.Release(f.NodeId, fh)
	check := func(c *Client, off, n int) {
		t.Helper()
		got, errno := c.Read(f.NodeId, fh, uint64(off), n)
		want(t, errno, fmt.Sprintf("READ of %d bytes at %d", n, off), fsbackend.OK)
		start := min(off, len(data))
		if expected := data[start:min(start+n, len(data))]; !bytes.Equal(got, expected) {
			t.Fatalf("READ of %d bytes at %d gave %d bytes, expected the %d there", n, off, len(got), len(expected))
		}
	}
	pieces := *s.Client
	pieces.Piece = 1000
	for _, n := range []int{0, 1, 4096, 4 << 20} {
		for _, off := range []int{0, 4095, len(data) - 1, len(data), len(data) + 1, len(data) * 2} {
			check(s.Client, off, n)
		}
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 20 {
		check(&pieces, rnd.IntN(len(data)), rnd.IntN(200<<10))
	}
	// As a guest reads ahead: two at a time, in either order.
	for off := 0; off < len(data); off += 256 << 10 {
		check(s.Client, off+128<<10, 128<<10)
		check(s.Client, off, 128<<10)
	}
	for _, off := range []uint64{math.MaxInt64 - 10, math.MaxInt64, math.MaxInt64 + 1, math.MaxUint64} {
		got, errno := s.Read(f.NodeId, fh, off, 4096)
		want(t, errno, fmt.Sprintf("READ at %d", off), fsbackend.OK, unix.EINVAL)
		if len(got) > 0 {
			t.Errorf("READ at %d gave %d bytes", off, len(got))
		}
	}
}

// testReadOnlyReaddirplus has exactly as many lookups counted as READDIRPLUS gives.
func testReadOnlyReaddirplus(t *testing.T, s *readOnly) {
	if s.R.DirPlusReader == nil {
		return
	}
	d := s.mustWalk(t, "many")
	for _, size := range []int{200, 1000, 1 << 16} {
		fh, errno := s.Opendir(d.NodeId)
		want(t, errno, "OPENDIR", fsbackend.OK)
		lookups := make(map[uint64]uint64)
		names := 0
		for off := uint64(0); ; {
			entries, errno := s.Readdir(d.NodeId, fh, off, size, true)
			want(t, errno, "READDIRPLUS", fsbackend.OK)
			if len(entries) == 0 {
				break
			}
			for _, e := range entries {
				off = e.Off
				if e.Name == "." || e.Name == ".." {
					if e.Entry.NodeId != 0 {
						t.Errorf("READDIRPLUS gave %q node %d, expected 0", e.Name, e.Entry.NodeId)
					}
					continue
				}
				names++
				if e.Entry.NodeId == 0 {
					continue // not looked up: that is allowed
				}
				lookups[e.Entry.NodeId]++
				checkEntry(t, e.Name, &e.Entry)
				if expected := s.files["many/"+e.Name]; e.Entry.Ino != e.Ino || expected == nil || e.Entry.Size != uint64(len(expected.Data)) {
					t.Errorf("READDIRPLUS gave %q inode %d and %d, size %d", e.Name, e.Entry.Ino, e.Ino, e.Entry.Size)
				}
			}
		}
		s.Releasedir(d.NodeId, fh)
		if names != 100 {
			t.Errorf("READDIRPLUS gave %d names in replies of %d bytes, expected 100", names, size)
		}
		for node, n := range lookups {
			s.R.Forget(node, n-1)
			_, errno := s.Getattr(node)
			want(t, errno, "GETATTR with one lookup of READDIRPLUS left", fsbackend.OK)
			s.R.Forget(node, 1)
			if _, errno = s.Getattr(node); s.cfg.Strict {
				want(t, errno, "GETATTR after as many lookups were forgotten as READDIRPLUS gave", unix.ESTALE)
			}
		}
	}
}

func testReadOnlyReset(t *testing.T, s *readOnly) {
	f, d := s.mustWalk(t, "small"), s.mustWalk(t, "dir")
	fh, errno := s.Open(f.NodeId, unix.O_RDONLY)
	want(t, errno, "OPEN", fsbackend.OK)
	dh, errno := s.Opendir(d.NodeId)
	want(t, errno, "OPENDIR", fsbackend.OK)
	s.reset()
	_, errno = s.Read(f.NodeId, fh, 0, 10)
	want(t, errno, "READ with a handle from before Reset", unix.EBADF, unix.ESTALE)
	_, errno = s.Readdir(d.NodeId, dh, 0, 1000, false)
	want(t, errno, "READDIR with a handle from before Reset", unix.EBADF, unix.ESTALE)
	s.Release(f.NodeId, fh)
	again := s.mustWalk(t, "small")
	if again.Ino != f.Ino {
		t.Errorf("inode number %d became %d by Reset", f.Ino, again.Ino)
	}
	// Handles still open at Close are Close's to end.
	_, errno = s.Open(again.NodeId, unix.O_RDONLY)
	want(t, errno, "OPEN", fsbackend.OK)
	_, errno = s.Opendir(Root)
	want(t, errno, "OPENDIR", fsbackend.OK)
}

// testReadOnlyConcurrent has several threads walk, list and read while sessions end.
func testReadOnlyConcurrent(t *testing.T, s *readOnly) {
	paths := []string{"small", "large", "dir/sub/deep", "many/file50", "dir/nothing"}
	tolerable := func(errno fsbackend.Errno) bool {
		return slices.Contains([]fsbackend.Errno{fsbackend.OK, unix.ENOENT, unix.ESTALE, unix.EBADF}, errno)
	}
	work := func(rnd *rand.Rand) error {
		p := paths[rnd.IntN(len(paths))]
		e, errno := s.walk(p)
		if errno != 0 {
			if !tolerable(errno) {
				return fmt.Errorf("LOOKUP along %s: %s", p, errnoName(errno))
			}
			return nil
		}
		defer s.R.Forget(e.NodeId, 1)
		fh, errno := s.Open(e.NodeId, unix.O_RDONLY)
		if errno == 0 {
			off := rnd.IntN(len(s.files[p].Data))
			var b []byte
			b, errno = s.Read(e.NodeId, fh, uint64(off), 5000)
			if errno == 0 && !bytes.HasPrefix(s.files[p].Data[off:], b) {
				return fmt.Errorf("READ of %s at %d gave other data", p, off)
			}
			s.Release(e.NodeId, fh)
		}
		if !tolerable(errno) {
			return fmt.Errorf("OPEN or READ of %s: %s", p, errnoName(errno))
		}
		dh, errno := s.Opendir(Root)
		if errno == 0 {
			var entries []Dirent
			entries, errno = s.Readdir(Root, dh, 0, 4096, s.R.DirPlusReader != nil)
			for _, e := range entries {
				if e.Entry.NodeId != 0 {
					s.R.Forget(e.Entry.NodeId, 1)
				}
			}
			s.Releasedir(Root, dh)
		}
		if !tolerable(errno) {
			return fmt.Errorf("OPENDIR or READDIR: %s", errnoName(errno))
		}
		return nil
	}
	var group sync.WaitGroup
	errs := make(chan error, 8)
	for i := range 8 {
		group.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 5))
			for range 40 {
				if err := work(rnd); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	for range 20 {
		s.R.Reset()
	}
	group.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	s.reset()
}

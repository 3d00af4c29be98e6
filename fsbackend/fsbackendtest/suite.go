// Package fsbackendtest is what every backend passes: Run drives the contract of fsbackend directly, with no guest in
// between. Its Client serves other tests that make requests of a backend.
package fsbackendtest

import (
	"cmp"
	"os"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Config says what to test and what the backend is known not to do. Interfaces of fsbackend that it leaves out need not be
// named: their tests are left out with them, but Maker, Creater, Opener, Reader, Writer, Remover, Renamer, Setattrer and
// DirReader are needed by the suite itself.
type Config struct {
	// New makes a backend with an empty tree, whose root belongs to who runs the test. The suite closes it.
	New func(t *testing.T) fsbackend.Backend
	// Check, if not nil, is called with a backend that rests, and says what of its bookkeeping is wrong.
	Check func(b fsbackend.Backend) error
	// AsRoot says that files can be made for any owner, and devices.
	AsRoot bool
	// SparseBlock is the size of a hole that Lseek sees, a power of two; 0 says that it reports none.
	SparseBlock int
	// MaxName and MaxSymlink are how long names and symbolic links may be, in bytes; 0 is 255 and 4095.
	MaxName, MaxSymlink int

	NoHardLinks   bool // LINK is refused
	NoSymlinks    bool // SYMLINK is refused
	NoNodes       bool // MKNOD is refused
	NoXattr       bool // extended attributes are refused
	NoTmpfile     bool // TMPFILE is refused
	NoTmpfileLink bool // a file of TMPFILE cannot get a name
	NoExchange    bool // RENAME_EXCHANGE is refused
	NoNoreplace   bool // RENAME_NOREPLACE is refused
	NoWhiteout    bool // RENAME_WHITEOUT is refused
	NoSetgid      bool // set-group-ID directories are not inherited
	NoAttrs       bool // modes, owners and times are not kept
	NoAppend      bool // O_APPEND in a WRITE is ignored: the guest's offset counts
	NoFallocate   bool // FALLOCATE is refused
	NoCopy        bool // COPY_FILE_RANGE is refused
	NoStatx       bool // STATX is refused
	NoPunch       bool // FALLOCATE only extends
	NoLocks       bool // locks are refused
	NoRaces       bool // calls that change the same name at once may end in EIO or EXDEV
	NoNodeChecks  bool // the types of files that a rename or unlink meets are the guest's to check
	// NoUnlinked says that attributes of an unlinked file can only be had by handle.
	NoUnlinked bool
	// NewNodeOnCreate says that CREATE of an existing name may give it a second nodeid.
	NewNodeOnCreate bool
}

// suite is one test's backend and what drives it.
type suite struct {
	*Client
	cfg      *Config
	features fsbackend.Features
}

// Run runs the suite.
func Run(t *testing.T, cfg Config) {
	probe := cfg.New(t)
	cfg.leaveOut(fsbackend.Resolve(probe))
	cfg.MaxName, cfg.MaxSymlink = cmp.Or(cfg.MaxName, 255), cmp.Or(cfg.MaxSymlink, 4095)
	if err := probe.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	for _, test := range []struct {
		name string
		run  func(*testing.T, *suite)
		skip bool
	}{
		{"lookup", testLookup, false},
		{"forget", testForget, false},
		{"stale", testStale, false},
		{"names", testNames, false},
		{"make", testMake, false},
		{"errnos", testErrnos, false},
		{"link", testLink, cfg.NoHardLinks},
		{"rename", testRename, false},
		{"rename exchange", testExchange, cfg.NoExchange},
		{"rename whiteout", testWhiteout, cfg.NoWhiteout || !cfg.AsRoot},
		{"owner", testOwner, !cfg.AsRoot || cfg.NoAttrs},
		{"setgid", testSetgid, !cfg.AsRoot || cfg.NoAttrs || cfg.NoSetgid},
		{"attributes", testAttributes, cfg.NoAttrs},
		{"killpriv", testKillpriv, cfg.NoAttrs || !cfg.AsRoot},
		{"open", testOpen, false},
		{"data", testData, false},
		{"pieces", testPieces, false},
		{"offsets", testOffsets, false},
		{"append", testAppend, cfg.NoAppend},
		{"unlinked", testUnlinked, false},
		{"tmpfile", testTmpfile, cfg.NoTmpfile},
		{"sparse", testSparse, cfg.SparseBlock == 0},
		{"fallocate", testFallocate, cfg.NoFallocate},
		{"copy", testCopy, cfg.NoCopy},
		{"sync", testSync, false},
		{"readdir", testReaddir, false},
		{"readdir stable", testReaddirStable, false},
		{"readdirplus", testReaddirplus, false},
		{"xattr", testXattr, cfg.NoXattr},
		{"locks", testLocks, cfg.NoLocks},
		{"statfs", testStatfs, false},
		{"statx", testStatx, cfg.NoStatx},
		{"mayblock", testMayBlock, false},
		{"reset", testReset, false},
		{"concurrent", testConcurrent, false},
		{"reset while busy", testResetBusy, false},
	} {
		if test.skip {
			continue
		}
		withBackend(t, test.name, cfg.New, cfg.Check, func(t *testing.T, b fsbackend.Backend) {
			test.run(t, newSuite(&cfg, b))
		})
	}
}

// withBackend runs a subtest with a backend of its own, which must rest in order, close, and leave nothing behind.
func withBackend(t *testing.T, name string, newBackend func(*testing.T) fsbackend.Backend, check func(fsbackend.Backend) error, run func(*testing.T, fsbackend.Backend)) {
	t.Run(name, func(t *testing.T) {
		goroutines := goleak.IgnoreCurrent()
		fds := openFDs(t)
		b := newBackend(t)
		run(t, b)
		if !t.Failed() && check != nil {
			if err := check(b); err != nil {
				t.Errorf("bookkeeping of the backend at rest: %v", err)
			}
		}
		if err := b.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		goleak.VerifyNone(t, goroutines)
		if left := openFDs(t); left > fds {
			t.Errorf("%d file descriptors open after Close, %d before New", left, fds)
		}
	})
}

// leaveOut leaves out the tests of interfaces that a backend does not have.
func (cfg *Config) leaveOut(r *fsbackend.Resolved) {
	cfg.NoHardLinks = cfg.NoHardLinks || r.Linker == nil
	cfg.NoSymlinks = cfg.NoSymlinks || r.Readlinker == nil
	cfg.NoXattr = cfg.NoXattr || r.XattrReader == nil || r.XattrWriter == nil
	cfg.NoTmpfile = cfg.NoTmpfile || r.Tmpfiler == nil
	cfg.NoTmpfileLink = cfg.NoTmpfileLink || cfg.NoHardLinks
	cfg.NoFallocate = cfg.NoFallocate || r.Fallocater == nil
	cfg.NoCopy = cfg.NoCopy || r.CopyFileRanger == nil
	cfg.NoLocks = cfg.NoLocks || r.Locker == nil
	cfg.NoStatx = cfg.NoStatx || r.Statxer == nil
	if r.Lseeker == nil {
		cfg.SparseBlock = 0
	}
}

func newSuite(cfg *Config, b fsbackend.Backend) *suite {
	s := &suite{Client: &Client{R: fsbackend.Resolve(b)}, cfg: cfg}
	s.Caller.Uid, s.Caller.Gid, s.Caller.Pid = uint32(os.Getuid()), uint32(os.Getgid()), 1
	flags := fuseproto.FUSE_ATOMIC_O_TRUNC | fuseproto.FUSE_BIG_WRITES | fuseproto.FUSE_DO_READDIRPLUS |
		fuseproto.FUSE_HANDLE_KILLPRIV_V2 | fuseproto.FUSE_SETXATTR_EXT | fuseproto.FUSE_INIT_EXT
	if s.R.Locker != nil && !cfg.NoLocks {
		flags |= lockFlags
	}
	if s.R.Wanter != nil {
		flags &= s.R.WantFlags(flags)
	}
	s.features = fsbackend.Features{Minor: fuseproto.FUSE_KERNEL_MINOR_VERSION, Flags: flags}
	s.init()
	return s
}

func (s *suite) init() {
	if s.R.Initer != nil {
		s.R.Init(s.features)
	}
}

// reset ends the session and begins another.
func (s *suite) reset() {
	s.R.Reset()
	s.init()
}

// openFDs counts the process's file descriptors, those of the Go runtime's poller left out.
func openFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && target != "anon_inode:[eventpoll]" && target != "anon_inode:[eventfd]" {
			n++
		}
	}
	return n
}

// want ends the test unless errno is one of expected.
func want(t testing.TB, errno fsbackend.Errno, what string, expected ...fsbackend.Errno) {
	t.Helper()
	if !slices.Contains(expected, errno) {
		t.Fatalf("%s: %s, expected %s", what, errnoName(errno), errnoNames(expected))
	}
}

func errnoName(errno fsbackend.Errno) string {
	switch errno {
	case fsbackend.OK:
		return "OK"
	case fsbackend.ErrMayBlock:
		return "ErrMayBlock"
	}
	if name := unix.ErrnoName(errno); name != "" {
		return name
	}
	return errno.Error()
}

func errnoNames(list []fsbackend.Errno) string {
	out := ""
	for i, errno := range list {
		if i > 0 {
			out += " or "
		}
		out += errnoName(errno)
	}
	return out
}

// file makes a file with contents and closes it.
func (s *suite) file(t testing.TB, parent uint64, name, contents string) fuseproto.EntryOut {
	t.Helper()
	out, errno := s.Create(parent, name, unix.O_RDWR|unix.O_EXCL, 0o644)
	want(t, errno, "CREATE "+name, fsbackend.OK)
	if contents != "" {
		n, errno := s.Write(out.NodeId, out.Fh, 0, []byte(contents), unix.O_RDWR)
		want(t, errno, "WRITE "+name, fsbackend.OK)
		if int(n) != len(contents) {
			t.Fatalf("WRITE %s: took %d bytes, expected all %d", name, n, len(contents))
		}
	}
	s.Release(out.NodeId, out.Fh)
	return out.EntryOut
}

func (s *suite) mkdir(t testing.TB, parent uint64, name string) fuseproto.EntryOut {
	t.Helper()
	out, errno := s.Mkdir(parent, name, 0o755)
	want(t, errno, "MKDIR "+name, fsbackend.OK)
	return out
}

// contents opens node and reads up to 1 MiB.
func (s *suite) contents(t testing.TB, node uint64) string {
	t.Helper()
	fh, errno := s.Open(node, unix.O_RDONLY)
	want(t, errno, "OPEN", fsbackend.OK)
	defer s.Release(node, fh)
	b, errno := s.Read(node, fh, 0, 1<<20)
	want(t, errno, "READ", fsbackend.OK)
	return string(b)
}

// lookup finds a name that must be there and checks the reply's form.
func (s *suite) lookup(t testing.TB, parent uint64, name string) fuseproto.EntryOut {
	t.Helper()
	out, errno := s.Lookup(parent, name)
	want(t, errno, "LOOKUP "+name, fsbackend.OK)
	checkEntry(t, name, &out)
	return out
}

// missing checks that a name is not there, which a backend may also say by an entry without a node.
func (s *suite) missing(t testing.TB, parent uint64, name string) {
	t.Helper()
	out, errno := s.Lookup(parent, name)
	want(t, errno, "LOOKUP of the missing name "+name, fsbackend.OK, unix.ENOENT)
	if out.NodeId != 0 {
		t.Errorf("LOOKUP of the missing name %s gave node %d", name, out.NodeId)
	}
}

// checkEntry checks what the contract says of every entry.
func checkEntry(t testing.TB, name string, e *fuseproto.EntryOut) {
	t.Helper()
	const limit = 1 << 48
	if e.NodeId == 0 || e.NodeId >= limit {
		t.Errorf("%s has nodeid %#x, expected one from 1 to below %#x", name, e.NodeId, uint64(limit))
	}
	checkAttr(t, name, &e.Attr)
}

func checkAttr(t testing.TB, name string, a *fuseproto.Attr) {
	t.Helper()
	if a.Ino == 0 || a.Mode&unix.S_IFMT == 0 || a.Nlink == 0 {
		t.Errorf("%s has inode number %d, mode %#o, %d links: none of these may be 0, nor the file type", name, a.Ino, a.Mode, a.Nlink)
	}
}

// now is compared with times that a backend's clock gives; a coarse clock may lag behind it.
func now() time.Time { return time.Now().Add(-2 * time.Second) }

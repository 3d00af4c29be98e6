package fuseserver

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// initReply sends an INIT and returns the reply, and the session's flags.
func initReply(t *testing.T, cfg Config, msg []byte) (fuseproto.InitOut, uint64, Errno) {
	t.Helper()
	g := newGuest(t, cfg)
	body, errno := g.do(msg)
	if errno != 0 {
		return fuseproto.InitOut{}, 0, errno
	}
	if len(body) != 64 {
		t.Fatalf("INIT's reply has %d bytes", len(body))
	}
	var o fuseproto.InitOut
	copy(outBytes(&o), body)
	if o.Flags64() != g.b.features.Flags || o.Minor != g.b.features.Minor {
		t.Errorf("guest is told 7.%d with flags %#x, backend 7.%d with %#x", o.Minor, o.Flags64(), g.b.features.Minor, g.b.features.Flags)
	}
	return o, o.Flags64(), 0
}

func TestInit(t *testing.T) {
	o, flags, errno := initReply(t, Config{}, initMessage(7, 45, allFlags))
	if errno != 0 {
		t.Fatal(errno)
	}
	const want = defaultFlags | readdirplusFlags
	if flags != want {
		t.Errorf("flags %#x, expected %#x", flags, want)
	}
	o.Flags, o.Flags2 = 0, 0
	if want := (fuseproto.InitOut{Major: 7, Minor: 45, MaxReadAhead: 1 << 20, MaxBackground: 65535, CongestionThreshold: 49149, MaxWrite: 1 << 20, TimeGran: 1, MaxPages: 256}); o != want {
		t.Errorf("reply %+v, expected %+v", o, want)
	}
	o, _, _ = initReply(t, Config{MaxPages: 65535}, initMessage(7, 45, allFlags))
	if o.MaxPages != 65535 || o.MaxWrite != 65535*4096 {
		t.Errorf("max_pages %d and max_write %d, expected 65535 and 268431360", o.MaxPages, o.MaxWrite)
	}
	for minor, want := range map[uint32]uint32{31: 31, 38: 38, 45: 45, 46: 45, 1 << 31: 45} {
		if o, _, _ := initReply(t, Config{}, initMessage(7, minor, allFlags)); o.Minor != want {
			t.Errorf("guest of 7.%d gets 7.%d, expected 7.%d", minor, o.Minor, want)
		}
	}
}

func TestInitFlags(t *testing.T) {
	const base = defaultFlags | readdirplusFlags
	never := uint64(fuseproto.FUSE_EXPORT_SUPPORT | fuseproto.FUSE_PASSTHROUGH |
		fuseproto.FUSE_OVER_IO_URING | fuseproto.FUSE_HAS_RESEND | fuseproto.FUSE_MAP_ALIGNMENT | fuseproto.FUSE_HAS_INODE_DAX | fuseproto.FUSE_REQUEST_TIMEOUT)
	wants := func(f func(uint64) uint64) *stub {
		b := newStub()
		b.want = f
		return b
	}
	tests := []struct {
		name    string
		cfg     Config
		offered uint64
		flags   uint64
	}{
		{"nothing offered", Config{}, 0, 0},
		{"writeback", Config{Writeback: true}, allFlags, base | fuseproto.FUSE_WRITEBACK_CACHE},
		{"mmap", Config{AllowMmap: true}, allFlags, base | fuseproto.FUSE_DIRECT_IO_ALLOW_MMAP},
		{"no readdirplus", Config{NoReaddirplus: true}, allFlags, defaultFlags},
		{"cache never", Config{Cache: CacheNever}, allFlags, defaultFlags},
		{"cache always", Config{Cache: CacheAlways}, allFlags, base | fuseproto.FUSE_CACHE_SYMLINKS},
		{"cache metadata", Config{Cache: CacheMetadata}, allFlags, base},
		{"without INIT_EXT", Config{}, allFlags &^ fuseproto.FUSE_INIT_EXT, base &^ fuseproto.FUSE_INIT_EXT & (1<<32 - 1)},
		{"backend wants all", Config{Backend: wants(func(uint64) uint64 { return 1<<64 - 1 })}, allFlags, servable &^ lockFlags},
		{
			"backend wants all, and locks are configured",
			Config{Backend: wants(func(uint64) uint64 { return 1<<64 - 1 }), PosixLock: true, Flock: true},
			allFlags, servable,
		},
		{"locks of fcntl", Config{PosixLock: true}, allFlags, base | fuseproto.FUSE_POSIX_LOCKS},
		{"locks of flock", Config{Flock: true}, allFlags, base | fuseproto.FUSE_FLOCK_LOCKS},
		{"backend wants nothing", Config{Backend: wants(func(uint64) uint64 { return 0 })}, allFlags, 0},
		{
			"backend wants ACLs and no killpriv",
			Config{Backend: wants(func(f uint64) uint64 {
				return f&^fuseproto.FUSE_HANDLE_KILLPRIV_V2 | fuseproto.FUSE_POSIX_ACL | fuseproto.FUSE_DONT_MASK
			})},
			allFlags,
			base&^fuseproto.FUSE_HANDLE_KILLPRIV_V2 | fuseproto.FUSE_POSIX_ACL | fuseproto.FUSE_DONT_MASK,
		},
	}
	for _, tt := range tests {
		_, flags, errno := initReply(t, tt.cfg, initMessage(7, 45, tt.offered))
		if errno != 0 || flags != tt.flags {
			t.Errorf("%s: flags %#x, %v, expected %#x", tt.name, flags, errno, tt.flags)
		}
		if flags&never != 0 {
			t.Errorf("%s: flags %#x have some that cannot be served", tt.name, flags&never)
		}
	}
	// 16 bytes, as before 7.36: flags2 is not there, whatever memory holds.
	short := message(fuseproto.FUSE_INIT, 0, uint32(7), uint32(31), uint32(4096), uint32(1<<32-1), make([]byte, 8))
	if _, flags, errno := initReply(t, Config{}, short); errno != 0 || flags != base&^fuseproto.FUSE_INIT_EXT&(1<<32-1) {
		t.Errorf("short INIT: flags %#x, %v", flags, errno)
	}
}

func TestInitVersions(t *testing.T) {
	for _, v := range [][2]uint32{{7, 30}, {7, 0}, {6, 99}, {0, 0}} {
		g := newGuest(t, Config{})
		g.fails(initMessage(v[0], v[1], allFlags), syscall.EPROTO)
		g.fails(message(fuseproto.FUSE_STATFS, 1), ErrNoSession)
		if g.s.Stats().InitRefused.Load() != 1 {
			t.Errorf("INIT of %v is not counted", v)
		}
	}
	// A newer major is told ours and asks again.
	g := newGuest(t, Config{})
	body, errno := g.do(initMessage(8, 0, allFlags))
	if want := cat(uint32(7), uint32(45)); errno != 0 || !bytes.Equal(body, want) {
		t.Errorf("INIT of 8.0: %x, %v, expected %x", body, errno, want)
	}
	g.fails(message(fuseproto.FUSE_STATFS, 1), ErrNoSession)
	g.mount(allFlags)
	g.fails(message(fuseproto.FUSE_STATFS, 1), 0)
}

// A guest of the other endianness reads its refusal in its own.
func TestInitOtherEndian(t *testing.T) {
	g := newGuest(t, Config{})
	msg := initMessage(7, 45, allFlags)
	binary.NativeEndian.PutUint32(msg, bits.ReverseBytes32(uint32(len(msg))))
	binary.NativeEndian.PutUint32(msg[4:], uint32(fuseproto.FUSE_INIT_BSWAP_RESERVED))
	content := g.begin(msg, 80)
	written, done := g.s.Handle(g.r)
	e := -int32(syscall.EPROTO)
	want := cat(bits.ReverseBytes32(16), bits.ReverseBytes32(uint32(e)), uint64(testUnique))
	if got := content()[:headerSize]; written != headerSize || !done || !bytes.Equal(got, want) {
		t.Errorf("reply %x of %d bytes, expected %x", got, written, want)
	}
}

func TestSessions(t *testing.T) {
	getattr := message(fuseproto.FUSE_GETATTR, 1, make([]byte, 16))
	g := newGuest(t, Config{Xattr: true})
	for _, e := range examples() { // none of which is INIT
		want := ErrNoSession
		if e.name == "DESTROY" || !replies(e.msg) {
			want = 0
		}
		g.fails(e.msg, want)
	}
	if calls := g.b.taken(); len(calls) > 0 {
		t.Errorf("before INIT the backend is asked %v", calls)
	}
	step := func(what string, errno Errno, want ...string) {
		t.Helper()
		g.fails(getattr, errno)
		calls := g.b.taken()
		if errno == 0 {
			want = append(want, "Getattr 1 0 0")
		}
		if !slices.Equal(calls, want) {
			t.Errorf("%s: backend is asked %v, expected %v", what, calls, want)
		}
	}
	g.do(initMessage(7, 45, allFlags))
	step("INIT", 0, "Init")
	g.do(initMessage(7, 45, allFlags))
	step("INIT again", 0, "Reset", "Init")
	g.do(message(fuseproto.FUSE_DESTROY, 0))
	step("DESTROY", ErrNoSession, "Reset")
	g.do(message(fuseproto.FUSE_DESTROY, 0))
	step("DESTROY again", ErrNoSession)
	g.do(initMessage(7, 45, allFlags))
	step("INIT after DESTROY", 0, "Init")
	g.s.Reset()
	g.s.Reset()
	step("Reset", ErrNoSession, "Reset")
	g.do(initMessage(7, 45, allFlags))
	step("INIT after Reset", 0, "Init")
	for range 2 {
		if err := g.s.Close(); err != nil {
			t.Error(err)
		}
	}
	g.do(initMessage(7, 45, allFlags))
	step("Close", ErrNoSession, "Reset", "Close")
}

// Sessions begin and end while requests run (for the race detector).
func TestSessionsWhileRequestsRun(t *testing.T) {
	b := newStub()
	b.quiet = true
	g := mounted(t, Config{Backend: b})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			g := &guest{t: t, s: g.s, r: g.s.NewRequest(), layout: linuxLayout}
			for range 500 {
				switch {
				case i == 0:
					g.raw(initMessage(7, 45, allFlags), 200)
				case i == 1:
					g.s.Reset()
				default:
					if _, errno := g.do(message(fuseproto.FUSE_GETATTR, 1, make([]byte, 16))); errno != 0 && errno != ErrNoSession {
						t.Errorf("GETATTR: %v", errno)
					}
				}
			}
		})
	}
	wg.Wait()
}

func TestReadOnly(t *testing.T) {
	g := mounted(t, Config{ReadOnly: true, Xattr: true})
	refused := []string{
		"SETATTR", "SYMLINK", "MKNOD", "MKDIR", "UNLINK", "RMDIR", "RENAME", "RENAME2", "LINK", "OPEN", "WRITE", "SETXATTR",
		"REMOVEXATTR", "CREATE", "TMPFILE", "FALLOCATE", "COPY_FILE_RANGE", "COPY_FILE_RANGE_64",
	}
	for _, e := range examples() {
		_, errno := g.do(e.msg)
		want := Errno(0)
		if slices.Contains(refused, e.name) {
			want = syscall.EROFS
		}
		if errno != want {
			t.Errorf("%s is answered with %v, expected %v", e.name, errno, want)
		}
		if calls := g.b.taken(); want != 0 && len(calls) > 0 {
			t.Errorf("%s: backend is asked %v", e.name, calls)
		}
	}
	g.mount(allFlags)
	open := func(flags uint32) []byte { return message(fuseproto.FUSE_OPEN, 3, flags, uint32(0)) }
	g.fails(open(unix.O_RDONLY), 0)
	g.fails(open(unix.O_RDONLY|unix.O_TRUNC), syscall.EROFS)
	g.fails(open(unix.O_WRONLY), syscall.EROFS)
	g.fails(open(unix.O_ACCMODE), syscall.EROFS)
	g.fails(message(fuseproto.FUSE_ACCESS, 3, uint32(unix.W_OK|unix.R_OK), uint32(0)), syscall.EROFS)
}

func TestXattrOff(t *testing.T) {
	g := mounted(t, Config{})
	for _, e := range examples() {
		if strings.Contains(e.name, "XATTR") {
			g.fails(e.msg, syscall.ENOSYS)
		}
	}
	if calls := g.b.taken(); len(calls) > 0 {
		t.Errorf("backend is asked %v", calls)
	}
}

func TestDirectIO(t *testing.T) {
	for _, allow := range []bool{false, true} {
		want := uint32(unix.O_RDWR)
		if allow {
			want |= unix.O_DIRECT
		}
		g := mounted(t, Config{AllowDirectIO: allow})
		for _, msg := range [][]byte{
			message(fuseproto.FUSE_OPEN, 3, uint32(unix.O_RDWR|unix.O_DIRECT), uint32(0)),
			message(fuseproto.FUSE_CREATE, 3, uint32(unix.O_RDWR|unix.O_DIRECT), make([]byte, 12), "n\x00"),
			message(fuseproto.FUSE_TMPFILE, 3, uint32(unix.O_RDWR|unix.O_DIRECT), make([]byte, 12)),
		} {
			g.do(msg)
			if got := *in[fuseproto.OpenIn](g.r); got.Flags != want {
				t.Errorf("allow %v: flags %#x, expected %#x", allow, got.Flags, want)
			}
		}
	}
}

func TestCachePolicy(t *testing.T) {
	tests := []struct {
		name           string
		valid, missing uint64
		file, dir      uint32
	}{{"auto", 1, 0, 0, 0}, {"never", 0, 0, 0x41, 0}, {"metadata", 86400, 0, 0x41, 10}, {"always", 86400, 86400, 2, 10}}
	for _, tt := range tests {
		policy, err := fsbackend.ParseCachePolicy(tt.name)
		if err != nil || policy.String() != tt.name {
			t.Fatalf("parse %q: %v, %v", tt.name, policy, err)
		}
		b := newStub()
		g := mounted(t, Config{Backend: b, Cache: policy})
		body, _ := g.do(message(fuseproto.FUSE_LOOKUP, 1, "n\x00"))
		if want := cat(tt.valid, tt.valid, uint64(0)); !bytes.Equal(body[16:40], want) {
			t.Errorf("%s: LOOKUP is valid for %x, expected %x", tt.name, body[16:40], want)
		}
		body, _ = g.do(message(fuseproto.FUSE_READDIRPLUS, 3, uint64(9), uint64(0), uint32(200), make([]byte, 20)))
		if want := cat(tt.valid, tt.valid, uint64(0)); !bytes.Equal(body[16:40], want) {
			t.Errorf("%s: READDIRPLUS is valid for %x, expected %x", tt.name, body[16:40], want)
		}
		body, _ = g.do(message(fuseproto.FUSE_GETATTR, 1, make([]byte, 16)))
		if want := cat(tt.valid, uint32(0)); !bytes.Equal(body[:12], want) {
			t.Errorf("%s: GETATTR is valid for %x, expected %x", tt.name, body[:12], want)
		}
		for opcode, want := range map[fuseproto.Opcode]uint32{fuseproto.FUSE_OPEN: tt.file, fuseproto.FUSE_OPENDIR: tt.dir} {
			body, _ = g.do(message(opcode, 1, uint64(0)))
			if got := binary.NativeEndian.Uint32(body[8:]); got != want {
				t.Errorf("%s: %v has flags %#x, expected %#x", tt.name, opcode, got, want)
			}
		}
		body, _ = g.do(message(fuseproto.FUSE_CREATE, 1, make([]byte, 16), "n\x00"))
		if got := binary.NativeEndian.Uint32(body[136:]); got != tt.file {
			t.Errorf("%s: CREATE has flags %#x, expected %#x", tt.name, got, tt.file)
		}
		b.errno = syscall.ENOENT
		if body, errno := g.do(message(fuseproto.FUSE_LOOKUP, 1, "n\x00")); tt.missing == 0 {
			if errno != syscall.ENOENT {
				t.Errorf("%s: LOOKUP of what is missing: %x, %v, expected ENOENT", tt.name, body, errno)
			}
		} else if want := append(cat(uint64(0), uint64(0), tt.missing), make([]byte, entryOut-24)...); errno != 0 || !bytes.Equal(body, want) {
			t.Errorf("%s: LOOKUP of what is missing: %x, %v, expected node 0, valid for %d s", tt.name, body, errno, tt.missing)
		}
	}
	if _, err := fsbackend.ParseCachePolicy("sometimes"); err == nil {
		t.Error("no error for an unknown policy")
	}
	if _, err := New(Config{Backend: newStub(), Cache: 4}); err == nil {
		t.Error("no error for a policy out of range")
	}
	if _, err := New(Config{}); err == nil {
		t.Error("no error without a backend")
	}
}

// negative answers LOOKUP with entries that are not there, or not for long.
type negative struct {
	*stub
	valid uint64
	nsec  uint32
	flags uint32
}

func (b *negative) Lookup(_ *fsbackend.Context, _ uint64, _ fsbackend.Name, out *fuseproto.EntryOut) Errno {
	out.EntryValid = b.valid
	if b.nsec > 0 {
		b.entry(out)
		out.EntryValidNsec, out.AttrValidNsec = b.nsec, b.nsec
	}
	return 0
}

func (b *negative) Open(_ *fsbackend.Context, _ *fuseproto.OpenIn, out *fuseproto.OpenOut) Errno {
	out.OpenFlags = b.flags
	return 0
}

func TestBackendDecidesItself(t *testing.T) {
	b := &negative{stub: newStub()}
	g := newGuest(t, Config{Backend: b, Cache: CacheAlways})
	g.mount(allFlags)
	lookup := message(fuseproto.FUSE_LOOKUP, 1, "n\x00")
	g.fails(lookup, syscall.ENOENT)
	b.valid = 5
	if body, errno := g.do(lookup); errno != 0 || !bytes.Equal(body[:24], cat(uint64(0), uint64(0), uint64(5))) {
		t.Errorf("negative entry: %x, %v", body, errno)
	}
	b.valid, b.nsec = 0, 1
	if body, errno := g.do(lookup); errno != 0 || !bytes.Equal(body[16:40], make([]byte, 24)) {
		t.Errorf("an entry that is stale: %x, %v, want that it is not valid at all", body, errno)
	}
	b.nsec = 2
	if body, errno := g.do(lookup); errno != 0 || !bytes.Equal(body[16:40], cat(uint64(0), uint64(0), uint32(2), uint32(2))) {
		t.Errorf("entry valid for 2 ns: %x, %v", body, errno)
	}
	for flags, want := range map[uint32]uint32{
		fuseproto.FOPEN_DIRECT_IO:  fuseproto.FOPEN_DIRECT_IO,
		fuseproto.FOPEN_NOFLUSH:    fuseproto.FOPEN_NOFLUSH | fuseproto.FOPEN_KEEP_CACHE,
		fuseproto.FOPEN_KEEP_CACHE: fuseproto.FOPEN_KEEP_CACHE,
	} {
		b.flags = flags
		body, _ := g.do(message(fuseproto.FUSE_OPEN, 1, uint64(0)))
		if got := binary.NativeEndian.Uint32(body[8:]); got != want {
			t.Errorf("backend's flags %#x become %#x, expected %#x", flags, got, want)
		}
	}
}

func TestStatelessOpen(t *testing.T) {
	b := newStub()
	b.want = func(f uint64) uint64 { return f | fuseproto.FUSE_NO_OPEN_SUPPORT }
	g := newGuest(t, Config{Backend: struct {
		bare
		fsbackend.Wanter
	}{bare{b}, b}})
	g.mount(allFlags)
	g.fails(message(fuseproto.FUSE_OPEN, 1, uint64(0)), syscall.ENOSYS)
	g.mount(allFlags &^ fuseproto.FUSE_NO_OPEN_SUPPORT)
	g.fails(message(fuseproto.FUSE_OPEN, 1, uint64(0)), 0)
}

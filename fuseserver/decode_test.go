package fuseserver

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

func TestNames(t *testing.T) {
	long := strings.Repeat("n", 256)
	type rule map[string]Errno
	common := rule{"": syscall.ENOENT, "a/b": syscall.EINVAL, "/": syscall.EINVAL, "../x": syscall.EINVAL, long: syscall.ENAMETOOLONG, long[:255]: 0, "...": 0, " ": 0, "\xff\xfe": 0}
	with := func(more rule) rule {
		all := rule{}
		for _, m := range []rule{common, more} {
			for name, errno := range m {
				all[name] = errno
			}
		}
		return all
	}
	looked := with(rule{".": syscall.ESTALE, "..": syscall.ESTALE})
	created := with(rule{".": syscall.EEXIST, "..": syscall.EEXIST})
	removed := with(rule{".": syscall.EINVAL, "..": syscall.EINVAL})
	xattr := rule{"": syscall.ERANGE, "user.a/b": 0, ".": 0, "..": 0, long: syscall.ERANGE, long[:255]: 0}
	target := rule{"": syscall.ENOENT, "/": 0, "..": 0, "a/../b": 0, strings.Repeat("t", 4095): 0, strings.Repeat("t", 4096): syscall.ENAMETOOLONG}

	tests := []struct {
		name string
		msg  func(name string) []byte
		rule rule
	}{
		{"LOOKUP", func(n string) []byte { return message(fuseproto.FUSE_LOOKUP, 1, n, "\x00") }, looked},
		{"SYMLINK", func(n string) []byte { return message(fuseproto.FUSE_SYMLINK, 1, n, "\x00target\x00") }, created},
		{"SYMLINK target", func(n string) []byte { return message(fuseproto.FUSE_SYMLINK, 1, "name\x00", n, "\x00") }, target},
		{"MKNOD", func(n string) []byte { return message(fuseproto.FUSE_MKNOD, 1, make([]byte, 16), n, "\x00") }, created},
		{"MKDIR", func(n string) []byte { return message(fuseproto.FUSE_MKDIR, 1, uint64(0), n, "\x00") }, created},
		{"LINK", func(n string) []byte { return message(fuseproto.FUSE_LINK, 1, uint64(5), n, "\x00") }, created},
		{"CREATE", func(n string) []byte { return message(fuseproto.FUSE_CREATE, 1, make([]byte, 16), n, "\x00") }, created},
		{"UNLINK", func(n string) []byte { return message(fuseproto.FUSE_UNLINK, 1, n, "\x00") }, removed},
		{"RMDIR", func(n string) []byte { return message(fuseproto.FUSE_RMDIR, 1, n, "\x00") }, removed},
		{"RENAME old", func(n string) []byte { return message(fuseproto.FUSE_RENAME, 1, uint64(1), n, "\x00new\x00") }, removed},
		{"RENAME new", func(n string) []byte { return message(fuseproto.FUSE_RENAME, 1, uint64(1), "old\x00", n, "\x00") }, removed},
		{"RENAME2 old", func(n string) []byte { return message(fuseproto.FUSE_RENAME2, 1, make([]byte, 16), n, "\x00new\x00") }, removed},
		{"RENAME2 new", func(n string) []byte {
			return message(fuseproto.FUSE_RENAME2, 1, make([]byte, 16), "old\x00", n, "\x00")
		}, removed},
		{"GETXATTR", func(n string) []byte { return message(fuseproto.FUSE_GETXATTR, 1, uint64(0), n, "\x00") }, xattr},
		{"SETXATTR", func(n string) []byte { return message(fuseproto.FUSE_SETXATTR, 1, make([]byte, 16), n, "\x00") }, xattr},
		{"REMOVEXATTR", func(n string) []byte { return message(fuseproto.FUSE_REMOVEXATTR, 1, n, "\x00") }, xattr},
	}
	for _, tt := range tests {
		g := mounted(t, Config{Xattr: true})
		for name, want := range tt.rule {
			before := g.s.Stats().Malformed.Load()
			_, errno := g.do(tt.msg(name))
			if counted := g.s.Stats().Malformed.Load() > before; counted != (want != 0 && want != syscall.ENAMETOOLONG) {
				t.Errorf("%s %.20q (%d bytes): counted as malformed %v", tt.name, name, len(name), counted)
			}
			if errno != want {
				t.Errorf("%s %.20q (%d bytes) is answered with %v, expected %v", tt.name, name, len(name), errno, want)
			}
			calls := g.b.taken()
			if (len(calls) > 0) != (want == 0) {
				t.Errorf("%s %.20q: backend is asked %v", tt.name, name, calls)
			}
			if want == 0 && name != "" && !strings.Contains(calls[0], " "+name) {
				t.Errorf("%s: backend is asked %v, expected name %q", tt.name, calls, name)
			}
		}
		msg := tt.msg("name")
		g.fails(message(fuseproto.Opcode(binary.NativeEndian.Uint32(msg[4:])), 1, msg[inHeaderSize:len(msg)-1]), syscall.EINVAL) // no NUL
		g.b.taken()
	}
}

// The NUL behind a name is there for a system call.
func TestNamesEndInNUL(t *testing.T) {
	g := mounted(t, Config{})
	g.begin(message(fuseproto.FUSE_RENAME, 1, uint64(1), "old\x00new\x00"), 64)
	if _, done := g.s.Handle(g.r); !done {
		t.Fatal("RENAME is not done")
	}
	for i, want := range []string{"old\x00", "new\x00"} {
		if name := g.r.names[i]; string(name[:len(name)+1]) != want {
			t.Errorf("name %d is %q in memory, expected %q", i, name[:len(name)+1], want)
		}
	}
}

func TestSetxattr(t *testing.T) {
	value := strings.Repeat("v", 64<<10)
	g := mounted(t, Config{Xattr: true})
	if _, errno := g.do(message(fuseproto.FUSE_SETXATTR, 1, uint32(len(value)), uint32(0), uint64(0), "user.a\x00", value)); errno != 0 {
		t.Errorf("SETXATTR of 64 KiB: %v", errno)
	}
	if calls := g.b.taken(); !slices.Equal(calls, []string{"Setxattr 1 user.a 65536 0 0 65536"}) {
		t.Errorf("backend is asked %v", calls)
	}
	g.fails(message(fuseproto.FUSE_SETXATTR, 1, uint32(len(value)+1), uint32(0), uint64(0), "user.a\x00", value, "v"), syscall.E2BIG)
	g.fails(message(fuseproto.FUSE_SETXATTR, 1, uint32(1<<31), uint32(0), uint64(0), "user.a\x00", value, value), syscall.E2BIG)
	g.fails(message(fuseproto.FUSE_SETXATTR, 1, uint32(6), uint32(0), uint64(0), "user.a\x00value"), syscall.EINVAL)

	// Without FUSE_SETXATTR_EXT the struct has 8 bytes.
	g.mount(allFlags &^ fuseproto.FUSE_SETXATTR_EXT)
	if _, errno := g.do(message(fuseproto.FUSE_SETXATTR, 1, uint32(5), uint32(2), "user.abcdefgh\x00value")); errno != 0 {
		t.Errorf("SETXATTR without FUSE_SETXATTR_EXT: %v", errno)
	}
	if calls := g.b.taken(); !slices.Equal(calls, []string{"Setxattr 1 user.abcdefgh 5 2 0 5"}) {
		t.Errorf("backend is asked %v", calls)
	}
}

func groupsExt(gids ...uint32) []byte {
	b := cat(uint32(len(gids)))
	for _, gid := range gids {
		b = cat(b, gid)
	}
	b = append(b, make([]byte, -len(b)&7)...)
	return cat(uint32(8+len(b)), uint32(fuseproto.FUSE_EXT_GROUPS), b)
}

func secctxExt(name, value string) []byte {
	b := cat(uint32(len(value)), uint32(0), name, "\x00", value)
	b = append(b, make([]byte, -len(b)&7)...)
	return cat(uint32(8+len(b)), uint32(1), b)
}

func TestExtensions(t *testing.T) {
	many := make([]uint32, maxGroups+1)
	label := secctxExt("security.selinux", "system_u:object_r:tmp_t:s0")
	none := cat(uint32(8), uint32(0))
	tests := []struct {
		name   string
		area   []byte
		errno  Errno
		groups []uint32
		secctx string
	}{
		{name: "none"},
		{name: "no security context", area: none},
		{name: "a group", area: groupsExt(27), groups: []uint32{27}},
		{name: "groups", area: groupsExt(many[:maxGroups]...), groups: many[:maxGroups]},
		{name: "context", area: label, secctx: "security.selinux=system_u:object_r:tmp_t:s0"},
		{name: "empty context", area: secctxExt("security.x", ""), secctx: "security.x="},
		{name: "both", area: cat(label, groupsExt(27)), groups: []uint32{27}, secctx: "security.selinux=system_u:object_r:tmp_t:s0"},
		{name: "both, the other way", area: cat(groupsExt(27), label), groups: []uint32{27}, secctx: "security.selinux=system_u:object_r:tmp_t:s0"},
		{name: "empty header", area: make([]byte, 8), errno: syscall.EINVAL},
		{name: "size below header", area: cat(uint32(7), uint32(32)), errno: syscall.EINVAL},
		{name: "size not 8-aligned", area: cat(uint32(12), uint32(32), uint64(0)), errno: syscall.EINVAL},
		{name: "sizes that are 8-aligned together", area: cat(uint32(12), uint32(0), uint32(0), uint32(12), uint32(32), uint32(0)), errno: syscall.EINVAL},
		{name: "size beyond area", area: cat(uint32(24), uint32(32), uint64(0)), errno: syscall.EINVAL},
		{name: "size 2^32-8", area: cat(uint32(1<<32-8), uint32(32), uint64(0)), errno: syscall.EINVAL},
		{name: "unknown type", area: cat(uint32(16), uint32(33), uint64(0)), errno: syscall.EINVAL},
		{name: "two contexts", area: cat(uint32(8), uint32(2)), errno: syscall.EINVAL},
		{name: "context cut", area: cat(uint32(8), uint32(1)), errno: syscall.EINVAL},
		{name: "context without NUL", area: cat(uint32(24), uint32(1), uint64(0), "security"), errno: syscall.EINVAL},
		{name: "context without name", area: cat(uint32(24), uint32(1), uint64(0), "\x00ecurity"), errno: syscall.EINVAL},
		{name: "context's value beyond it", area: cat(uint32(24), uint32(1), uint32(7), uint32(0), "s\x00value_"), errno: syscall.EINVAL},
		{name: "context's value of 2^32-1", area: cat(uint32(24), uint32(1), ^uint32(0), uint32(0), "s\x00value_"), errno: syscall.EINVAL},
		{name: "contexts twice", area: cat(none, none), errno: syscall.EINVAL},
		{name: "groups twice", area: cat(groupsExt(1), groupsExt(1)), errno: syscall.EINVAL},
		{name: "groups without number", area: cat(uint32(8), uint32(32)), errno: syscall.EINVAL},
		{name: "groups cut", area: cat(uint32(16), uint32(32), uint32(2), uint32(1)), errno: syscall.EINVAL},
		{name: "groups 2^32-1", area: cat(uint32(16), uint32(32), ^uint32(0), uint32(1)), errno: syscall.EINVAL},
		{name: "too many groups", area: groupsExt(many...), errno: syscall.EINVAL},
	}
	creators := map[string][]byte{
		"SYMLINK": message(fuseproto.FUSE_SYMLINK, 1, "a name\x00target\x00"),
		"MKNOD":   message(fuseproto.FUSE_MKNOD, 1, make([]byte, 16), "name\x00"),
		"MKDIR":   message(fuseproto.FUSE_MKDIR, 1, make([]byte, 8), "a longer name\x00"),
		"CREATE":  message(fuseproto.FUSE_CREATE, 1, make([]byte, 16), "n\x00"),
		"TMPFILE": message(fuseproto.FUSE_TMPFILE, 1, make([]byte, 16), "/\x00"),
	}
	for creator, msg := range creators {
		for _, tt := range tests {
			var got fsbackend.Context
			var secctx string
			b := newStub()
			b.want = func(f uint64) uint64 { return f | fuseproto.FUSE_SECURITY_CTX }
			g := mounted(t, Config{Backend: b})
			b.hook = func(_ string, c *fsbackend.Context) {
				got = *c
				got.SuppGroups = slices.Clone(c.SuppGroups)
				for _, s := range c.Secctx {
					secctx = fmt.Sprintf("%s=%s", s.Name, s.Value)
				}
			}
			_, errno := g.do(withExtensions(msg, tt.area))
			if errno != tt.errno {
				t.Errorf("%s with %s is answered with %v, expected %v", creator, tt.name, errno, tt.errno)
				continue
			}
			if calls := b.taken(); (len(calls) > 0) != (errno == 0) {
				t.Errorf("%s with %s: backend is asked %v", creator, tt.name, calls)
			}
			if !slices.Equal(got.SuppGroups, tt.groups) || secctx != tt.secctx {
				t.Errorf("%s with %s: groups %v and context %q, expected %v and %q", creator, tt.name, got.SuppGroups, secctx, tt.groups, tt.secctx)
			}
			if want := (fuseproto.Caller{Owner: got.Caller.Owner, Pid: testPID}); errno == 0 && (got.Caller != want || got.Caller.Uid != testUID || got.Caller.Gid != testGID) {
				t.Errorf("%s: caller is %+v", creator, got.Caller)
			}
		}
	}
}

// What was not agreed on is refused, or padding where nothing was.
func TestExtensionsNeedAgreement(t *testing.T) {
	mkdir := message(fuseproto.FUSE_MKDIR, 1, make([]byte, 8), "name\x00")
	g := mounted(t, Config{}) // FUSE_CREATE_SUPP_GROUP alone
	g.fails(withExtensions(mkdir, secctxExt("security.x", "v")), syscall.EINVAL)
	g.fails(withExtensions(mkdir, groupsExt(1)), 0)
	long := withExtensions(mkdir, groupsExt(1))
	binary.NativeEndian.PutUint16(long[36:], 100)
	g.fails(long, syscall.EINVAL)

	g.mount(allFlags &^ (fuseproto.FUSE_CREATE_SUPP_GROUP | fuseproto.FUSE_SECURITY_CTX))
	g.fails(long, 0)
}

func TestForget(t *testing.T) {
	g := mounted(t, Config{})
	for _, msg := range [][]byte{
		message(fuseproto.FUSE_FORGET, fuseproto.FUSE_ROOT_ID, uint64(1)),
		message(fuseproto.FUSE_FORGET, 0, uint64(1)),
		message(fuseproto.FUSE_FORGET, 5, uint64(0)),
		message(fuseproto.FUSE_BATCH_FORGET, 0, uint32(1), uint32(0), uint64(1), uint64(9)),
		message(fuseproto.FUSE_BATCH_FORGET, 0, ^uint32(0), uint32(0), uint64(5), uint64(9)),
		message(fuseproto.FUSE_BATCH_FORGET, 0, uint32(2), uint32(0), uint64(5), uint64(9)),
		message(fuseproto.FUSE_BATCH_FORGET, 0, uint32(maxForget+1), uint32(0), make([]byte, 16*(maxForget+1))),
	} {
		if reply := g.raw(msg, 64); reply != nil {
			t.Errorf("reply %x, expected none", reply)
		}
		if calls := g.b.taken(); len(calls) > 0 {
			t.Errorf("backend is asked %v, expected nothing", calls)
		}
	}
	if got := g.s.Stats().Malformed.Load(); got != 3 {
		t.Errorf("%d malformed requests counted, expected 3", got)
	}

	// A list longer than one chunk, over odd pieces.
	var list []byte
	var want []string
	for i := range uint64(1000) {
		list = cat(list, i+2, i+1)
		want = append(want, fmt.Sprintf("Forget %d %d", i+2, i+1))
	}
	g.layout = randomPieces(3)
	if reply := g.raw(message(fuseproto.FUSE_BATCH_FORGET, 0, uint32(1000), uint32(0), list), 0); reply != nil {
		t.Errorf("reply %x, expected none", reply)
	}
	if calls := g.b.taken(); !slices.Equal(calls, want) {
		t.Errorf("backend is asked %d things, expected %d", len(calls), len(want))
	}
}

func TestIoctl(t *testing.T) {
	ioctl := func(flags, cmd, in, out uint32, arg string) []byte {
		return message(fuseproto.FUSE_IOCTL, 1, uint64(9), flags, cmd, uint64(0), in, out, arg)
	}
	const getFlags, setFlags = 0x80086601, 0x40086602
	g := mounted(t, Config{})
	g.fails(ioctl(fuseproto.FUSE_IOCTL_UNRESTRICTED, getFlags, 0, 8, ""), syscall.ENOTTY)
	g.fails(ioctl(0, setFlags, 9, 0, "12345678"), syscall.EINVAL)
	g.fails(ioctl(0, getFlags, 0, 4096, ""), syscall.EIO) // more than there is room for
	if calls := g.b.taken(); len(calls) > 0 {
		t.Errorf("backend is asked %v, expected nothing", calls)
	}
	g.fails(ioctl(0, setFlags, 16<<10, 0, strings.Repeat("x", 16<<10)), 0)
	g = mounted(t, Config{ReadOnly: true})
	g.fails(ioctl(0, setFlags, 8, 0, "12345678"), syscall.EROFS)
	g.fails(ioctl(0, getFlags, 0, 8, ""), 0)
}

package overlay_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// op is one thing done to a tree. Paths are relative; slot is a place for an open file, of which each side has slots.
type op struct {
	what string
	a, b string
	slot int
	n    uint64
}

const slots = 5

// kind is an operation and its chance; paths is how many it has.
type kind struct {
	what   string
	chance int
	paths  int
	slot   bool
}

var kinds = []kind{
	{"create", 6, 1, true},
	{"open", 6, 1, true},
	{"openro", 4, 1, true},
	{"close", 4, 0, true},
	{"write", 6, 0, true},
	{"read", 4, 0, true},
	{"fstat", 3, 0, true},
	{"ftruncate", 3, 0, true},
	{"fallocate", 3, 0, true},
	{"punch", 2, 0, true},
	{"fchmod", 2, 0, true},
	{"tmpfile", 3, 1, true},
	{"linkslot", 3, 1, true},
	{"copyrange", 2, 0, true},
	{"mkdir", 8, 1, false},
	{"rmdir", 6, 1, false},
	{"unlink", 9, 1, false},
	{"rename", 14, 2, false},
	{"noreplace", 3, 2, false},
	{"exchange", 5, 2, false},
	{"whiteout", 2, 2, false},
	{"link", 6, 2, false},
	{"symlink", 3, 1, false},
	{"readlink", 1, 1, false},
	{"mknod", 4, 1, false},
	{"truncate", 4, 1, false},
	{"chmod", 5, 1, false},
	{"chown", 4, 1, false},
	{"utimens", 3, 1, false},
	{"setxattr", 6, 1, false},
	{"getxattr", 2, 1, false},
	{"removexattr", 3, 1, false},
	{"readdir", 4, 1, false},
	{"stat", 3, 1, false},
	{"setacl", 4, 1, false},
	{"removeacl", 2, 1, false},
}

// choice is what random operations are of: kinds, with paths of so many names, and so many open files.
type choice struct {
	kinds        []kind
	names, files int
}

var (
	// inLayers makes layers. A change of it gives every seed other ones, and pastDifferences have to be found anew: so what comes anew
	// to kinds comes at its end.
	inLayers = choice{kinds[:len(kinds)-2], 5, slots}
	// inTree is done to trees. It has fewer names, so that more of them are there.
	inTree = choice{kinds, 4, 3}
)

// xattrNames are the attributes that operations are about. Names of marks are not among them: the kernel gives a guest that sets
// trusted.overlay.NAME another name behind its back, and leaves those of other overlays to it; ours refuses all of them.
var xattrNames = []string{"user.x", "trusted.x", "user.y", "security.x"}

// nodes are what mknod makes. The last is a whiteout, which a guest must not make.
var nodes = []struct {
	mode uint32
	dev  uint32
}{
	{unix.S_IFIFO, 0},
	{unix.S_IFSOCK, 0},
	{unix.S_IFREG, 0},
	{unix.S_IFCHR, 1<<8 | 3},
	{unix.S_IFBLK, 7 << 8},
	{unix.S_IFCHR, 0},
}

// modes are permissions, with the bits that are inherited.
var modes = []uint32{0o644, 0o600, 0o755, 0o777, 0o711, 0o2775, 0o1777, 0o400, 0}

func (c choice) path(r *rand.Rand) string {
	path := string(rune('a' + r.IntN(c.names)))
	for len(path) < 9 && r.IntN(5) < 2 {
		path += "/" + string(rune('a'+r.IntN(c.names)))
	}
	return path
}

func (c choice) op(r *rand.Rand) op {
	all := 0
	for _, k := range c.kinds {
		all += k.chance
	}
	pick := r.IntN(all)
	for _, k := range c.kinds {
		if pick -= k.chance; pick >= 0 {
			continue
		}
		o := op{what: k.what, slot: -1, n: uint64(r.IntN(1 << 16))}
		if k.paths > 0 {
			o.a = c.path(r)
		}
		if k.paths > 1 {
			o.b = c.path(r)
		}
		if k.slot {
			o.slot = r.IntN(c.files)
		}
		if (o.what == "readdir" || o.what == "tmpfile") && o.n%4 == 0 {
			o.a = ""
		}
		return o
	}
	panic("unreachable")
}

func (o op) String() string {
	return fmt.Sprintf("%s %q %q %d %d", o.what, o.a, o.b, o.slot, o.n)
}

// parseOp is the reverse of String.
func parseOp(s string) (op, error) {
	var o op
	if _, err := fmt.Sscanf(s, "%s %q %q %d %d", &o.what, &o.a, &o.b, &o.slot, &o.n); err != nil {
		return o, fmt.Errorf("operation %q: %w", s, err)
	}
	for _, k := range kinds {
		if k.what == o.what {
			return o, nil
		}
	}
	return o, fmt.Errorf("operation %q is not known", s)
}

// acl is the name of an access control list, and one to be set. Only directories have a default one.
func (o op) acl() (name string, value []byte, isDefault bool) {
	name, isDefault = "system.posix_acl_access", o.n%2 == 0
	if isDefault {
		name = "system.posix_acl_default"
	}
	// posix_acl_xattr_header and its entries (include/uapi/linux/posix_acl_xattr.h): owner, a user, group, mask, others.
	value = binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag  uint16
		perm uint64
		id   uint32
	}{{0x01, 6 + o.n/2%2, ^uint32(0)}, {0x02, o.n / 4 % 8, 5}, {0x04, o.n / 32 % 8, ^uint32(0)}, {0x10, o.n / 256 % 8, ^uint32(0)}, {0x20, o.n / 2048 % 8, ^uint32(0)}} {
		value = binary.LittleEndian.AppendUint16(value, e.tag)
		value = binary.LittleEndian.AppendUint16(value, uint16(e.perm))
		value = binary.LittleEndian.AppendUint32(value, e.id)
	}
	return name, value, isDefault
}

func (o op) mode() uint32      { return modes[o.n%uint64(len(modes))] }
func (o op) xattr() string     { return xattrNames[o.n%uint64(len(xattrNames))] }
func (o op) other() int        { return int(o.n % slots) }
func (o op) offset() uint64    { return o.n % 9000 }
func (o op) length() uint64    { return o.n * 7 % 6000 }
func (o op) data() []byte      { return []byte(strings.Repeat(strconv.Itoa(int(o.n))+" ", int(o.n%400)+1)) }
func (o op) target() string    { return "to/" + o.a }
func (o op) time() int64       { return 1_500_000_000 + int64(o.n) }
func (o op) owner() (int, int) { return int(o.n % 5), int(o.n / 5 % 7) }

func errnoText(err error) string {
	if err == nil {
		return "OK"
	}
	if e, ok := err.(unix.Errno); ok {
		return unix.ErrnoName(e)
	}
	return err.Error()
}

// fileInfo is what two sides are compared by.
type fileInfo struct {
	mode, uid, gid uint32
	size           uint64
	nlink, rdev    uint32
	mtime          int64
	extra          string
	attrs          []string
}

// recent is when a time is the test's own rather than one that an operation has set.
const recent = 1_700_000_000

func (i fileInfo) String() string {
	if i.mode&unix.S_IFMT == unix.S_IFDIR {
		i.size = 0 // the layer's file system's own idea
	}
	when := strconv.FormatInt(i.mtime, 10)
	if i.mtime > recent {
		when = "now"
	}
	slices.Sort(i.attrs)
	return fmt.Sprintf("%07o %d:%d size %d nlink %d rdev %x mtime %s %s %s", i.mode, i.uid, i.gid, i.size, i.nlink, i.rdev, when, i.extra, i.attrs)
}

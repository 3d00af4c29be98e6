package permshift

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Format is the extended attribute that owners and modes are kept in, and how.
type Format int

// Formats. The override_stat ones differ in their attribute's name alone.
const (
	// Auto is the first of SecurityOverride, ContainersOverride, UserOverride and OriginalPermissions that the root carries.
	Auto Format = iota
	// Off shows what the backend says.
	Off
	// OriginalPermissions is that of fuse-overlayfs' shared-storage plug-in: "MODE:UID:GID" with an octal mode, and a NUL.
	OriginalPermissions
	// SecurityOverride is fuse-overlayfs' xattr_permissions=1: it takes CAP_SYS_ADMIN on the host to change one.
	SecurityOverride
	// ContainersOverride is containers/storage's (force_mask), podman's and buildah's, and fuse-overlayfs' xattr_permissions=2.
	ContainersOverride
	// UserOverride is that of fuse-overlayfs before 1.3.
	UserOverride
)

var formats = [...]struct {
	name  string
	xattr string
}{
	Auto:                {"auto", ""},
	Off:                 {"off", ""},
	OriginalPermissions: {"original-permissions", "user.original-permissions"},
	SecurityOverride:    {"security-override", "security.fuseoverlayfs.override_stat"},
	ContainersOverride:  {"containers-override", "user.containers.override_stat"},
	UserOverride:        {"user-override", "user.fuseoverlayfs.override_stat"},
}

// ParseFormat returns the format called name: by its own name, or by its attribute's.
func ParseFormat(name string) (Format, error) {
	for f := range formats {
		if name != "" && (name == formats[f].name || name == formats[f].xattr) {
			return Format(f), nil
		}
	}
	return 0, fmt.Errorf("format %q: expected %s, or the name of the extended attribute", name, strings.Join(FormatNames(), ", "))
}

// FormatNames are the names of all formats.
func FormatNames() []string {
	names := make([]string, len(formats))
	for f := range formats {
		names[f] = formats[f].name
	}
	return names
}

// String returns the format's name.
func (f Format) String() string {
	if f < 0 || int(f) >= len(formats) {
		return fmt.Sprintf("Format(%d)", int(f))
	}
	return formats[f].name
}

// Xattr returns the name of the format's attribute, "" for Auto and Off.
func (f Format) Xattr() string { return formats[f].xattr }

// keepsTypes says whether values have the type of a special file in them.
func (f Format) keepsTypes() bool { return f >= SecurityOverride }

// detected are the formats that Auto looks for, in this order.
var detected = [...]Format{SecurityOverride, ContainersOverride, UserOverride, OriginalPermissions}

// hidden says whether name is one of the attributes that owners and modes are kept in. All of them are, whatever the format:
// a guest that could set one would decide who its files belong to when the tree is served in that format.
func hidden(name []byte) bool {
	for _, f := range detected {
		if string(name) == formats[f].xattr {
			return true
		}
	}
	return false
}

// Stat is what a value says of a file.
type Stat struct {
	UID, GID uint32
	// Mode is the permissions, with set-ID and sticky bits, and the type (S_IFMT), which is 0 where it is that of the host's file.
	Mode uint32
	// Major and Minor are the device's number, for devices.
	Major, Minor uint32
}

// Limits of device numbers (Linux include/linux/kdev_t.h) and of a value, in bytes.
const (
	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1
	maxValue = 64
)

// typeNames are the types as override_stat has them, but for devices.
var typeNames = [...]struct {
	name string
	typ  uint32
}{
	{"file", unix.S_IFREG},
	{"dir", unix.S_IFDIR},
	{"symlink", unix.S_IFLNK},
	{"pipe", unix.S_IFIFO},
	{"socket", unix.S_IFSOCK},
}

// Parse reads a value. It reports false for what is none.
func (f Format) Parse(value []byte) (Stat, bool) {
	if len(value) > maxValue {
		return Stat{}, false
	}
	value = bytes.TrimSuffix(value, []byte{0})
	first, rest, ok := bytes.Cut(value, colon)
	second, third, ok2 := bytes.Cut(rest, colon)
	if !ok || !ok2 {
		return Stat{}, false
	}
	if f == OriginalPermissions {
		st, ok := parseStat(second, third, first, nil)
		if !ok || st.Mode&unix.S_IFMT != 0 {
			return Stat{}, false
		}
		return st, true
	}
	mode, typ, typed := bytes.Cut(third, colon)
	if typed && len(typ) == 0 {
		return Stat{}, false
	}
	return parseStat(first, second, mode, typ)
}

var colon = []byte{':'}

func parseStat(uid, gid, mode, typ []byte) (st Stat, ok bool) {
	var okUID, okGID, okMode bool
	st.UID, okUID = parseID(uid)
	st.GID, okGID = parseID(gid)
	st.Mode, okMode = parseNumber(mode, 8, unix.S_IFMT|0o7777)
	if !okUID || !okGID || !okMode {
		return Stat{}, false
	}
	if len(typ) == 0 {
		// libkrun says the type in the mode. A device would need its number.
		switch st.Mode & unix.S_IFMT {
		case 0, unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFIFO, unix.S_IFSOCK:
			return st, true
		}
		return Stat{}, false
	}
	st.Mode &= 0o7777
	for _, t := range typeNames {
		if string(typ) == t.name {
			st.Mode |= t.typ
			return st, true
		}
	}
	switch {
	case bytes.HasPrefix(typ, []byte("block-")):
		st.Mode |= unix.S_IFBLK
	case bytes.HasPrefix(typ, []byte("char-")):
		st.Mode |= unix.S_IFCHR
	default:
		return Stat{}, false
	}
	_, number, _ := bytes.Cut(typ, []byte{'-'})
	major, minor, ok := bytes.Cut(number, []byte{'-'})
	var okMajor, okMinor bool
	st.Major, okMajor = parseNumber(major, 10, maxMajor)
	st.Minor, okMinor = parseNumber(minor, 10, maxMinor)
	if !ok || !okMajor || !okMinor {
		return Stat{}, false
	}
	return st, true
}

// parseNumber reads digits to the base of at most 10, up to limit.
func parseNumber(digits []byte, base, limit uint32) (uint32, bool) {
	n := uint64(0)
	for _, d := range digits {
		if d < '0' || uint32(d-'0') >= base {
			return 0, false
		}
		if n = n*uint64(base) + uint64(d-'0'); n > uint64(limit) {
			return 0, false
		}
	}
	return uint32(n), len(digits) > 0
}

// parseID reads a user or group id. C programs write those from 1<<31 on as negative numbers (%d). The last one is no id.
func parseID(digits []byte) (uint32, bool) {
	if len(digits) > 0 && digits[0] == '-' {
		n, ok := parseNumber(digits[1:], 10, 1<<31)
		return -n, ok && n > 1
	}
	return parseNumber(digits, 10, math.MaxUint32-1)
}

// Append appends the value that says st to buf. Type 0 in its Mode is a regular file. OriginalPermissions has no types.
func (f Format) Append(buf []byte, st Stat) []byte {
	uid, gid, mode := uint64(st.UID), uint64(st.GID), uint64(st.Mode&0o7777)
	if f == OriginalPermissions {
		// The plug-in reads more bits than it writes: with these, the host's file needs no set-ID bits.
		buf = strconv.AppendUint(buf, mode, 8)
		buf = strconv.AppendUint(append(buf, ':'), uid, 10)
		buf = strconv.AppendUint(append(buf, ':'), gid, 10)
		return append(buf, 0)
	}
	buf = strconv.AppendUint(buf, uid, 10)
	buf = strconv.AppendUint(append(buf, ':'), gid, 10)
	buf = append(buf, ':', '0'+byte(mode>>9), '0'+byte(mode>>6&7), '0'+byte(mode>>3&7), '0'+byte(mode&7), ':')
	switch typ := st.Mode & unix.S_IFMT; typ {
	case unix.S_IFBLK, unix.S_IFCHR:
		name := "block-"
		if typ == unix.S_IFCHR {
			name = "char-"
		}
		buf = strconv.AppendUint(append(buf, name...), uint64(st.Major), 10)
		return strconv.AppendUint(append(buf, '-'), uint64(st.Minor), 10)
	default:
		for _, t := range typeNames {
			if typ == t.typ {
				return append(buf, t.name...)
			}
		}
		return append(buf, "file"...)
	}
}

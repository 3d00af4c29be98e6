package bundle

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const typeTmpfs = "tmpfs"

// guestOptions are those of config.md, "Linux mount options", that do not change what is served: what they ask for is the
// guest's kernel's to do, or a matter of mounts in the host that do not come into the guest at all.
var guestOptions = strings.Fields(`
	async atime defaults dev diratime dirsync exec iversion lazytime loud mand noatime nodev nodiratime noexec noiversion
	nolazytime nomand norelatime nostrictatime nosuid nosymfollow private ratime rdev rdiratime relatime rexec rnoatime rnodev
	rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow rprivate rrelatime rshared rslave rstrictatime rsuid
	rsymfollow runbindable shared silent slave strictatime suid symfollow sync unbindable`)

// asked is what options ask for that needs a look at more than the mount.
type asked struct {
	idmap  bool // apply the mount's maps, or else the container's
	copyUp bool // start with a copy of what is covered
}

// isBind tells a bind mount. Its type is then a dummy, except that some write "bind" there and not among the options.
func isBind(m *specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// setOptions does what the mount's options say. Of Kind Other those that are unknown are left to the extension, which sees
// them in the spec.
func (m *Mount) setOptions() (asked, error) {
	var a asked
	if m.Kind == Tmpfs {
		m.Mode = 0o1777 // as the kernel's
	}
	for _, option := range m.Spec.Options {
		switch option {
		case "ro", "rro":
			m.ReadOnly = true
			continue
		case "rw", "rrw":
			m.ReadOnly = false
			continue
		case "idmap", "ridmap":
			a.idmap = true
			continue
		case "remount":
			return asked{}, fmt.Errorf("option %q changes a mount, and cannot make one: give the mount its options at once", option)
		case "bind", "rbind":
			continue // isBind has seen them
		}
		// mount(8): what starts with x- is for programs of one's own.
		known := slices.Contains(guestOptions, option) || strings.HasPrefix(option, "x-") || m.Kind == Other
		if !known && m.Kind == Tmpfs {
			var err error
			if known, err = m.setTmpfsOption(option, &a); err != nil {
				return asked{}, fmt.Errorf("option %q: %w", option, err)
			}
		}
		if !known {
			return asked{}, fmt.Errorf("option %q is unknown for a mount of a %v: leave it out, or start it with x- if it is for an extension", option, m.Kind)
		}
	}
	return a, nil
}

// setTmpfsOption does what an option of tmpfs(5) says, and reports whether it knows it.
func (m *Mount) setTmpfsOption(option string, a *asked) (known bool, err error) {
	name, value, _ := strings.Cut(option, "=")
	switch name {
	case "size":
		m.Size, err = parseSize(value)
	case "mode":
		var mode uint64
		if mode, err = strconv.ParseUint(value, 8, 32); err != nil || mode > 0o7777 {
			err = errors.New("expected permissions in octal, 7777 at most")
		}
		m.Mode = uint32(mode)
	case "uid":
		m.UID, err = parseID(value)
	case "gid":
		m.GID, err = parseID(value)
	case "tmpcopyup":
		a.copyUp = true
	default:
		return false, nil
	}
	return true, err
}

// parseSize reads a size of tmpfs: a decimal number with a unit of 1024 bytes to some power, or none. (The kernel takes a leading 0
// for octal; nobody means that.)
func parseSize(s string) (int64, error) {
	number, shift := s, 0
	if n := len(s) - 1; n >= 0 {
		switch s[n] {
		case '%':
			return 0, errors.New("a share of the memory can be the host's or the guest's: give a size in bytes, or with k, m or g")
		default:
			if i := strings.IndexByte("kmgtpe", s[n]|0x20); i >= 0 {
				number, shift = s[:n], 10*(i+1)
			}
		}
	}
	size, err := strconv.ParseUint(number, 10, 63)
	if err != nil || size == 0 || number[0] == '0' || size > math.MaxInt64>>shift {
		return 0, errors.New("expected a size in bytes, or with k, m or g, that is not 0")
	}
	return int64(size << shift), nil
}

func parseID(s string) (uint32, error) {
	id, err := strconv.ParseUint(s, 10, 32)
	if err != nil || id == math.MaxUint32 {
		return 0, fmt.Errorf("expected an id, %d at most", uint32(math.MaxUint32-1))
	}
	return uint32(id), nil
}

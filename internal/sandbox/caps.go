package sandbox

import (
	"errors"
	"fmt"
	"math/bits"
	"strings"

	"golang.org/x/sys/unix"
)

// CapSet is a set of capabilities: bit N is the capability with number N of linux/capability.h.
type CapSet uint64

// capNames are the capabilities by number, as capabilities(7) has them, without CAP_.
var capNames = [...]string{
	unix.CAP_CHOWN:              "CHOWN",
	unix.CAP_DAC_OVERRIDE:       "DAC_OVERRIDE",
	unix.CAP_DAC_READ_SEARCH:    "DAC_READ_SEARCH",
	unix.CAP_FOWNER:             "FOWNER",
	unix.CAP_FSETID:             "FSETID",
	unix.CAP_KILL:               "KILL",
	unix.CAP_SETGID:             "SETGID",
	unix.CAP_SETUID:             "SETUID",
	unix.CAP_SETPCAP:            "SETPCAP",
	unix.CAP_LINUX_IMMUTABLE:    "LINUX_IMMUTABLE",
	unix.CAP_NET_BIND_SERVICE:   "NET_BIND_SERVICE",
	unix.CAP_NET_BROADCAST:      "NET_BROADCAST",
	unix.CAP_NET_ADMIN:          "NET_ADMIN",
	unix.CAP_NET_RAW:            "NET_RAW",
	unix.CAP_IPC_LOCK:           "IPC_LOCK",
	unix.CAP_IPC_OWNER:          "IPC_OWNER",
	unix.CAP_SYS_MODULE:         "SYS_MODULE",
	unix.CAP_SYS_RAWIO:          "SYS_RAWIO",
	unix.CAP_SYS_CHROOT:         "SYS_CHROOT",
	unix.CAP_SYS_PTRACE:         "SYS_PTRACE",
	unix.CAP_SYS_PACCT:          "SYS_PACCT",
	unix.CAP_SYS_ADMIN:          "SYS_ADMIN",
	unix.CAP_SYS_BOOT:           "SYS_BOOT",
	unix.CAP_SYS_NICE:           "SYS_NICE",
	unix.CAP_SYS_RESOURCE:       "SYS_RESOURCE",
	unix.CAP_SYS_TIME:           "SYS_TIME",
	unix.CAP_SYS_TTY_CONFIG:     "SYS_TTY_CONFIG",
	unix.CAP_MKNOD:              "MKNOD",
	unix.CAP_LEASE:              "LEASE",
	unix.CAP_AUDIT_WRITE:        "AUDIT_WRITE",
	unix.CAP_AUDIT_CONTROL:      "AUDIT_CONTROL",
	unix.CAP_SETFCAP:            "SETFCAP",
	unix.CAP_MAC_OVERRIDE:       "MAC_OVERRIDE",
	unix.CAP_MAC_ADMIN:          "MAC_ADMIN",
	unix.CAP_SYSLOG:             "SYSLOG",
	unix.CAP_WAKE_ALARM:         "WAKE_ALARM",
	unix.CAP_BLOCK_SUSPEND:      "BLOCK_SUSPEND",
	unix.CAP_AUDIT_READ:         "AUDIT_READ",
	unix.CAP_PERFMON:            "PERFMON",
	unix.CAP_BPF:                "BPF",
	unix.CAP_CHECKPOINT_RESTORE: "CHECKPOINT_RESTORE",
}

// capOf is the set with one capability, of a unix.CAP_* number.
func capOf(number int) CapSet {
	return 1 << number
}

// ParseCap returns the set with the one capability of that name: CAP_CHOWN, cap_chown, chown.
func ParseCap(name string) (CapSet, error) {
	plain := strings.ToUpper(name)
	plain = strings.TrimPrefix(plain, "CAP_")
	for number, known := range capNames {
		if plain == known {
			return capOf(number), nil
		}
	}
	return 0, fmt.Errorf("unknown capability %q: expected a name as in capabilities(7), with or without CAP_: %s", name,
		strings.ToLower(strings.Join(capNames[:], " ")))
}

// Has says whether all of other is in s.
func (s CapSet) Has(other CapSet) bool {
	return s&other == other
}

// String lists the names, separated by spaces; "none" for the empty set.
func (s CapSet) String() string {
	if s == 0 {
		return "none"
	}
	var names []string
	for rest := uint64(s); rest != 0; rest &= rest - 1 {
		number := bits.TrailingZeros64(rest)
		if number < len(capNames) {
			names = append(names, "CAP_"+capNames[number])
		} else {
			names = append(names, fmt.Sprintf("CAP_%d", number))
		}
	}
	return strings.Join(names, " ")
}

// Options are what decides which capabilities a daemon needs.
type Options struct {
	ReadOnly    bool // every share is read-only
	Xattr       bool // extended attributes are served
	FileHandles bool // files are opened by file handle
}

// Needed returns the capabilities with which a directory is served on behalf of users of every id.
func Needed(o Options) CapSet {
	if o.ReadOnly {
		// The guest has checked who may read what; nothing is created, so no other user's id is taken on.
		return capOf(unix.CAP_DAC_READ_SEARCH)
	}
	caps := capOf(unix.CAP_CHOWN) | capOf(unix.CAP_DAC_OVERRIDE) | capOf(unix.CAP_FOWNER) | capOf(unix.CAP_FSETID) |
		capOf(unix.CAP_SETGID) | capOf(unix.CAP_SETUID) | capOf(unix.CAP_MKNOD)
	if o.Xattr {
		caps |= capOf(unix.CAP_SETFCAP)
	}
	if o.FileHandles {
		caps |= capOf(unix.CAP_DAC_READ_SEARCH)
	}
	return caps
}

// Modcaps changes a set of capabilities, as --modcaps asks for.
type Modcaps struct {
	Add, Remove CapSet
}

// ParseModcaps parses "+x:-y": capabilities to add and to remove, separated by colons, the last word on each counts.
func ParseModcaps(text string) (Modcaps, error) {
	var m Modcaps
	for item := range strings.SplitSeq(text, ":") {
		if item == "" || item[0] != '+' && item[0] != '-' {
			return Modcaps{}, fmt.Errorf("change of capabilities %q: expected +NAME or -NAME, several of them separated by colons", item)
		}
		c, err := ParseCap(item[1:])
		if err != nil {
			return Modcaps{}, err
		}
		if item[0] == '+' {
			m.Add, m.Remove = m.Add|c, m.Remove&^c
		} else {
			m.Add, m.Remove = m.Add&^c, m.Remove|c
		}
	}
	return m, nil
}

// Apply returns caps as changed. It refuses what the options cannot work without.
func (m Modcaps) Apply(caps CapSet, o Options) (CapSet, error) {
	if o.FileHandles && m.Remove.Has(capOf(unix.CAP_DAC_READ_SEARCH)) {
		return 0, errors.New("file handles need the capability dac_read_search: expected it to be kept, or file handles to be off")
	}
	return caps&^m.Remove | m.Add, nil
}

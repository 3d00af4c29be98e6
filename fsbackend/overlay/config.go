package overlay

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/sluicefs/sluice/fsbackend"
)

// Config describes a tree made of layers.
type Config struct {
	// Lowers are the layers that are never changed, the uppermost first: at least one.
	Lowers []Layer
	// Upper takes all changes; nil makes each of them EROFS. Its root is the upper layer's.
	Upper fsbackend.Backend
	// Work is the nodeid, in Upper, of a directory on the same file system that is no part of its tree, for what is being made and
	// what is on its way out. 0 takes what Upper's WorkNode returns, if it has such a method.
	Work uint64
	// Format says under which names marks are written. All are read.
	Format Format
	// RedirectDir says what becomes of directories that the guest renames and that a lower layer has.
	RedirectDir RedirectDir
	// UIDMap and GIDMap translate owners between the guest and all layers. With them there are no access control lists.
	UIDMap, GIDMap IDMap
	// SquashToRoot shows all files as owned by 0:0, SquashToUID and SquashToGID, which go before it, by those ids: what the layers
	// have stays as it is, and new files get the caller's.
	SquashToRoot             bool
	SquashToUID, SquashToGID *uint32
	// StaticNlink shows 1 as the number of links of every directory.
	StaticNlink bool
	// NoACL switches access control lists off.
	NoACL bool
	// Volatile has nothing written to its medium: for an upper layer that nobody will look for after a crash.
	Volatile bool
	// Xino says how inode numbers of layers on different file systems are told apart.
	Xino Xino
	// MaxInodes bounds the inodes known to the guest at a time, DefaultMaxInodes if 0; ENFILE answers beyond.
	MaxInodes int
	// MaxNames bounds the bytes that the names of lower layers' directories take which are kept so as not to ask for them again,
	// DefaultMaxNames if 0. Less than 0 keeps none.
	MaxNames int64
	// Log is told of what is worth knowing once; nothing if nil.
	Log *slog.Logger
}

// Layer is one lower layer.
type Layer struct {
	Backend fsbackend.Backend
	// Root is the nodeid of the directory to take as the layer's root, whose lookup is the caller's; 0 is FUSE_ROOT_ID.
	Root uint64
	// Name stands for the layer in the log.
	Name string
	// NoACL says that the layer's files have no access control lists.
	NoACL bool
	// StableIno says that inode numbers are the same each time that the layer is opened.
	StableIno bool
}

// DefaultMaxInodes is Config.MaxInodes where that is 0.
const DefaultMaxInodes = 1 << 22

// DefaultMaxNames is Config.MaxNames where that is 0.
const DefaultMaxNames = 64 << 20

// Format is a name space of the extended attributes that are marks.
type Format int

// Formats.
const (
	FormatUser    Format = iota // user.overlay., which the kernel's overlayfs reads with -o userxattr
	FormatTrusted               // trusted.overlay., the kernel's own; root's alone
	FormatFuse                  // user.fuseoverlayfs.
)

// formats are the prefixes of the names of marks, by Format.
var formats = [...]string{FormatUser: "user.overlay.", FormatTrusted: "trusted.overlay.", FormatFuse: "user.fuseoverlayfs."}

// RedirectDir says how directories of lower layers are renamed: by a mark on the upper one that says where the lower ones are.
type RedirectDir int

// Ways to rename directories of lower layers.
const (
	RedirectOn     RedirectDir = iota // marks are made and followed
	RedirectFollow                    // marks are followed; to rename such a directory is EXDEV, upon which programs copy it
	RedirectOff                       // marks are ignored, and none is made: EXDEV
)

// Xino says how inode numbers are made unique.
type Xino int

// Ways to make inode numbers.
const (
	XinoAuto Xino = iota // layers on different file systems get different upper bits
	XinoOn               // likewise; New fails if a layer's numbers are not stable
	XinoOff              // the layers' own: two files may have the same
)

// IDRange says that the guest's ids from Guest on are the layers' from Host on, Count of them.
type IDRange struct{ Guest, Host, Count uint32 }

// IDMap translates user or group ids. The zero value leaves each as it is; ids outside its ranges read as 65534, and to create
// with one, or to set it, is EOVERFLOW.
type IDMap []IDRange

// overflowID is what an id reads as that has no counterpart.
const overflowID = 65534

func (m IDMap) host(id uint32) (uint32, bool) {
	for _, r := range m {
		if id-r.Guest < r.Count {
			return id - r.Guest + r.Host, true
		}
	}
	return id, len(m) == 0
}

func (m IDMap) guest(id uint32) uint32 {
	for _, r := range m {
		if id-r.Host < r.Count {
			return id - r.Host + r.Guest
		}
	}
	if len(m) == 0 {
		return id
	}
	return overflowID
}

func (m IDMap) validate() error {
	for i, r := range m {
		if r.Count == 0 || r.Count > ^uint32(0)-r.Guest || r.Count > ^uint32(0)-r.Host {
			return fmt.Errorf("id range %d:%d:%d: expected at least one id, and none beyond 4294967294", r.Guest, r.Host, r.Count)
		}
		for _, o := range m[:i] {
			if overlap(r.Guest, r.Count, o.Guest, o.Count) || overlap(r.Host, r.Count, o.Host, o.Count) {
				return fmt.Errorf("id ranges %d:%d:%d and %d:%d:%d overlap", o.Guest, o.Host, o.Count, r.Guest, r.Host, r.Count)
			}
		}
	}
	return nil
}

func overlap(a, aCount, b, bCount uint32) bool { return a-b < bCount || b-a < aCount }

// Validate says what is wrong with c.
func (c *Config) Validate() error {
	switch {
	case len(c.Lowers) == 0:
		return errors.New("overlay without a lower layer: expected at least one")
	case len(c.Lowers) > MaxLowers:
		return fmt.Errorf("overlay of %d lower layers: expected at most %d", len(c.Lowers), MaxLowers)
	case c.Format < 0 || int(c.Format) >= len(formats):
		return fmt.Errorf("mark format %d: expected FormatUser, FormatTrusted or FormatFuse", c.Format)
	case c.MaxInodes < 0:
		return fmt.Errorf("at most %d inodes: expected 0 or more", c.MaxInodes)
	}
	for i, l := range c.Lowers {
		if l.Backend == nil {
			return fmt.Errorf("lower layer %d (%s) has no backend", i, l.Name)
		}
		if c.Xino == XinoOn && !l.StableIno {
			return fmt.Errorf("xino=on, but inode numbers of lower layer %d (%s) are not stable: use xino=auto", i, l.Name)
		}
	}
	if err := c.UIDMap.validate(); err != nil {
		return fmt.Errorf("uid map: %w", err)
	}
	if err := c.GIDMap.validate(); err != nil {
		return fmt.Errorf("gid map: %w", err)
	}
	return nil
}

// MaxLowers is the most lower layers of one overlay, the kernel's limit (OVL_MAX_STACK in fs/overlayfs/params.h).
const MaxLowers = 500

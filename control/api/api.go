// Package api is what Sluice's control API says, as Go types: the bodies of its requests and answers in JSON. The daemon,
// its clients and the helper in the guest share it, so it imports nothing of theirs.
//
// Paths of grafts are absolute and clean, as the guest sees them below its mount point: "/" is the root, "/data/x" a graft.
// Sources are paths of the host.
package api

import "time"

// ShareSpec says what a share is to be. Its zero fields are the defaults of sluiced's options of the same names.
type ShareSpec struct {
	// Tag is the name that the guest mounts by, 1 to 36 bytes, and that the share has in this API. No two shares have the same.
	Tag string `json:"tag" toml:"tag"`
	// Socket is where the daemon listens for the front-end; "" is TAG.sock in the directory of the control socket.
	Socket string `json:"socket,omitempty" toml:"socket"`
	// SocketGroup names a group that may connect.
	SocketGroup string `json:"socket_group,omitempty" toml:"socket-group"`
	// Grafts are what it serves. One at "/" is the root; without, the root is an empty directory that cannot be changed.
	Grafts []GraftSpec `json:"grafts,omitempty" toml:"graft"`

	Cache         string `json:"cache,omitempty" toml:"cache"` // auto, always, metadata, never
	ReadOnly      bool   `json:"read_only,omitempty" toml:"read-only"`
	Writeback     bool   `json:"writeback,omitempty" toml:"writeback"`
	Xattr         bool   `json:"xattr,omitempty" toml:"xattr"`
	AllowMmap     bool   `json:"allow_mmap,omitempty" toml:"allow-mmap"`
	AllowDirectIO bool   `json:"allow_direct_io,omitempty" toml:"allow-direct-io"`
	PosixLock     bool   `json:"posix_lock,omitempty" toml:"posix-lock"`
	Flock         bool   `json:"flock,omitempty" toml:"flock"`
	NoReaddirplus bool   `json:"no_readdirplus,omitempty" toml:"no-readdirplus"`

	// RequestQueues is the number of request queues beside hiprio.
	RequestQueues int `json:"num_request_queues,omitempty" toml:"num-request-queues"`
	// MaxFDs and MaxInodes bound the descriptors and inodes of each graft; see sluiced(1).
	MaxFDs    int `json:"max_fds,omitempty" toml:"max-fds"`
	MaxInodes int `json:"max_inodes,omitempty" toml:"max-inodes"`
	// PollUS is for how many microseconds requests are looked for before a thread sleeps, 0 to MaxPollUS, or "auto"; "" is that.
	PollUS string `json:"poll_us,omitempty" toml:"poll-us"`
}

// GraftSpec says what is to be at one place of a share.
type GraftSpec struct {
	// Path is where in the share.
	Path string `json:"path" toml:"path"`
	// Source is a directory or a single file of the host. A file is followed by its name when the host replaces it.
	Source string `json:"source,omitempty" toml:"source"`
	// Backend serves it: "passthrough", "mem" or an extension; "" asks the extensions, and is passthrough if none claims it.
	Backend string `json:"backend,omitempty" toml:"backend"`
	// Type and Options are what an extension is given as the mount's, as in an OCI runtime spec.
	Type    string   `json:"type,omitempty" toml:"type"`
	Options []string `json:"options,omitempty" toml:"options"`
	// Lowers are the trees that a backend made of others is made of, the uppermost first: the layers of an overlay.
	Lowers []LowerSpec `json:"lowers,omitempty" toml:"lower"`

	ReadOnly bool `json:"read_only,omitempty" toml:"read-only"`
	// Cache is as in ShareSpec, for this graft; "" is the share's.
	Cache string `json:"cache,omitempty" toml:"cache"`
	// NoSUID, NoDev and NoExec are for those of mount(8), NoSymfollow that symbolic links cannot be followed. The daemon keeps to
	// them whatever the guest mounts with.
	NoSUID      bool `json:"nosuid,omitempty" toml:"nosuid"`
	NoDev       bool `json:"nodev,omitempty" toml:"nodev"`
	NoExec      bool `json:"noexec,omitempty" toml:"noexec"`
	NoSymfollow bool `json:"nosymfollow,omitempty" toml:"nosymfollow"`
	// UIDMap and GIDMap translate ids between guest and source; none is identity.
	UIDMap []IDRange `json:"uid_map,omitempty" toml:"uid-map"`
	GIDMap []IDRange `json:"gid_map,omitempty" toml:"gid-map"`
	// MaxBytes and MaxInodes are what may be stored in it, in bytes (whole blocks count) and files; 0 is no limit.
	MaxBytes  uint64 `json:"max_bytes,omitempty" toml:"max-bytes"`
	MaxInodes uint64 `json:"max_inodes,omitempty" toml:"max-inodes"`
	// Watch has the host's changes in it sent as events.
	Watch bool `json:"watch,omitempty" toml:"watch"`
	// WatchMaxFiles and WatchMaxBytes are the files, directories among them, and the bytes in them up to which events are sent. Above, what
	// is in it still is what it is, and one EventLimit says that changes of the rest are not told. 0 is 131,072 files and any number
	// of bytes; Kata's are 16 and 1 MiB.
	WatchMaxFiles int    `json:"watch_max_files,omitempty" toml:"watch-max-files"`
	WatchMaxBytes uint64 `json:"watch_max_bytes,omitempty" toml:"watch-max-bytes"`
	// FollowMounts shows what the host mounts below Source from now on, too. Without it only what is mounted there now is seen,
	// and nothing above Source can be reached by its descriptor, where the daemon has the privileges for that (open_tree(2)).
	FollowMounts bool `json:"follow_mounts,omitempty" toml:"follow-mounts"`
}

// LowerSpec says what one of the trees is that a graft is made of.
type LowerSpec struct {
	// Source, Backend and Options are as in GraftSpec; without a backend it is passthrough.
	Source  string   `json:"source,omitempty" toml:"source"`
	Backend string   `json:"backend,omitempty" toml:"backend"`
	Options []string `json:"options,omitempty" toml:"options"`
	// Lowers are those that it is made of itself.
	Lowers []LowerSpec `json:"lowers,omitempty" toml:"lower"`
}

// IDRange maps Count ids from Guest on to those from Host on.
type IDRange struct {
	Guest uint32 `json:"guest" toml:"guest"`
	Host  uint32 `json:"host" toml:"host"`
	Count uint32 `json:"count" toml:"count"`
}

// GraftChange says what of a graft is to be different; what is nil stays.
type GraftChange struct {
	ReadOnly    *bool   `json:"read_only,omitempty"`
	Cache       *string `json:"cache,omitempty"`
	NoSUID      *bool   `json:"nosuid,omitempty"`
	NoDev       *bool   `json:"nodev,omitempty"`
	NoExec      *bool   `json:"noexec,omitempty"`
	NoSymfollow *bool   `json:"nosymfollow,omitempty"`
	MaxBytes    *uint64 `json:"max_bytes,omitempty"`
	MaxInodes   *uint64 `json:"max_inodes,omitempty"`
}

// Info is the daemon.
type Info struct {
	ID      string    `json:"id"`
	Version string    `json:"version"`
	State   string    `json:"state"` // INIT, READY (serves nobody), RUNNING (a guest is connected), as nydusd has them
	PID     int       `json:"pid"`   // of the process that was started
	Started time.Time `json:"started"`
	Sandbox string    `json:"sandbox"`
	Shares  int       `json:"shares"`
	// Backends are the names that GraftSpec.Backend can have.
	Backends []string `json:"backends"`
}

// States of a share.
const (
	StateWaiting   = "waiting"   // for a front-end
	StateConnected = "connected" // to a front-end, whose guest has not mounted it
	StateServing   = "serving"   // a guest
)

// Share is a share as it is.
type Share struct {
	ShareSpec
	State string `json:"state"`
	// Guests is the number of front-ends that have connected so far.
	Guests uint64 `json:"guests"`
}

// Graft is a graft as it is.
type Graft struct {
	GraftSpec
	// File says that it is a single file.
	File bool `json:"file,omitempty"`
	// Leaving says that it was removed, and only files that are still open go on.
	Leaving bool `json:"leaving,omitempty"`
	// OpenFiles is the number of handles that the guest has open in it.
	OpenFiles int64 `json:"open_files"`
	// UsedBytes and UsedInodes are what counts against MaxBytes and MaxInodes, if there are such.
	UsedBytes  uint64 `json:"used_bytes,omitempty"`
	UsedInodes uint64 `json:"used_inodes,omitempty"`
	// Panics, Timeouts, Refused and Errors count what went wrong in it.
	Panics   uint64 `json:"panics,omitempty"`
	Timeouts uint64 `json:"timeouts,omitempty"`
	Refused  uint64 `json:"refused,omitempty"`
	Errors   uint64 `json:"errors,omitempty"`
}

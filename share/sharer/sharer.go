package sharer

import "context"

// FilesystemSharer shares a sandbox's files with its guest: the interface of Kata's runtime (virtcontainers/fs_share.go), with
// this package's structs for the sandbox's.
type FilesystemSharer interface {
	// Prepare makes ready for sharing. It may be called again at any time, and does nothing then.
	Prepare(ctx context.Context) error
	// Cleanup unshares everything and takes back what Prepare did. It may be called again at any time, does nothing if all is gone, and
	// goes on where it was if it failed before.
	Cleanup(ctx context.Context) error
	// ShareFile shares a file or directory with a container. Without an error, nil says that the file is not shared and the
	// mount is to be left out.
	ShareFile(ctx context.Context, c *Container, m *Mount) (*SharedFile, error)
	// UnshareFile ends what ShareFile began for this container and mount; others that use the same source keep it.
	UnshareFile(ctx context.Context, c *Container, m *Mount) error
	// ShareRootFilesystem shares a container's root.
	ShareRootFilesystem(ctx context.Context, c *Container) (*SharedFile, error)
	// UnshareRootFilesystem ends what ShareRootFilesystem began.
	UnshareRootFilesystem(ctx context.Context, c *Container) error
	// StartFileEventWatcher follows changes in watchable volumes until StopFileEventWatcher, which is nil, or until ctx ends.
	// While one call runs, others return nil at once.
	StartFileEventWatcher(ctx context.Context) error
	// StopFileEventWatcher returns when StartFileEventWatcher has, or ctx has ended. A start after it, without a Prepare in
	// between, does nothing.
	StopFileEventWatcher(ctx context.Context)
}

// SharedFile is the outcome of sharing something.
type SharedFile struct {
	// ContainerStorages and VolumeStorages are what the agent has to mount in the guest, of the container's root and of a volume.
	ContainerStorages []*Storage
	VolumeStorages    []*Storage
	// GuestPath is where it is in the guest.
	GuestPath string
}

// Storage is what the agent mounts: the fields of grpc.Storage in Kata's agent protocol.
type Storage struct {
	Driver        string
	DriverOptions []string
	Source        string
	Fstype        string
	Options       []string
	MountPoint    string
	FSGroup       *FSGroup
}

// FSGroup is a group that a storage is to belong to.
type FSGroup struct {
	GroupID uint32
	// OnRootMismatch leaves a storage alone whose root belongs to the group already (Kubernetes' fsGroupChangePolicy).
	OnRootMismatch bool
}

// Container is what sharing has to know of a container.
type Container struct {
	ID     string
	RootFs RootFs
}

// RootFs is a container's root.
type RootFs struct {
	// Source is what it is made of, Target where the host has it mounted: what is shared is Target, or Source without one.
	Source, Target string
	// Type and Options are those of its mount, for the backend.
	Type    string
	Options []string
	// Mounted says that Target is mounted.
	Mounted  bool
	ReadOnly bool
	// Backend serves it (api.GraftSpec.Backend). Only grafts can have one; "" is what the daemon takes for a directory.
	Backend string
	// Storages say that the guest makes the root itself, from a block device, an image it pulls or layers: nothing is shared,
	// and they are the SharedFile's.
	Storages []*Storage
}

// Mount is what sharing has to know of a container's mount.
type Mount struct {
	Source, Destination string
	// Type is that of the OCI spec; "ephemeral" and "local" are as in Kata: made in the guest, from memory and from its disk.
	Type     string
	Options  []string
	ReadOnly bool
	// HostPath is where ShareFile has put it: a path of the host with BindMounts, in the share with Grafts, "" with Copy.
	HostPath string
	// BlockDeviceID says that the guest gets a block device instead, which is not for sharing: ShareFile says nil.
	BlockDeviceID string
}

package api

import "time"

// Actions of a graft whose backend is overlay (actGraft). What is not named is not needed.
const (
	ActCheckpoint  = "checkpoint"  // OverlayName → Checkpoint
	ActCheckpoints = "checkpoints" // → []Checkpoint, the oldest first
	ActForget      = "forget"      // OverlayName: removes a checkpoint
	ActDiff        = "diff"        // OverlayDiff → []OverlayChange, by path
	ActRestore     = "restore"     // OverlayName: no guest may be connected
	ActApply       = "apply"       // OverlayApply → []OverlayChange
)

// OverlayName names a checkpoint: 1 to 128 of letters, digits, '.', '_' and '-', the first no dot.
type OverlayName struct {
	Name string `json:"name"`
}

// Checkpoint is what a guest had written at some time.
type Checkpoint struct {
	Name string    `json:"name"`
	Time time.Time `json:"time"`
	// Files are those in it, directories among them, and Bytes what is in the files.
	Files uint64 `json:"files"`
	Bytes uint64 `json:"bytes"`
}

// OverlayDiff asks what a guest has changed.
type OverlayDiff struct {
	// Checkpoint compares what there was then; "" what there is now.
	Checkpoint string `json:"checkpoint,omitempty"`
	// Tar writes the changes to this file of the host, which must not exist, too: a layer of an OCI image.
	Tar string `json:"tar,omitempty"`
}

// OverlayApply asks that what a guest has changed be changed in a directory of the host.
type OverlayApply struct {
	// Target is the directory, absolute: that of the lower layer, for one.
	Target string `json:"target"`
	// Checkpoint is as in OverlayDiff.
	Checkpoint string `json:"checkpoint,omitempty"`
	// DryRun changes nothing.
	DryRun bool `json:"dry_run,omitempty"`
	// Devices has device nodes that the guest has made be made there, too.
	Devices bool `json:"devices,omitempty"`
}

// Kinds of OverlayChange.
const (
	ChangeAdded    = "added"
	ChangeModified = "modified" // content, or what it is
	ChangeMetadata = "metadata" // owner, mode, times or extended attributes alone
	ChangeDeleted  = "deleted"
)

// OverlayChange is one file that differs from the lower layers.
type OverlayChange struct {
	Path string `json:"path"` // from the root of the graft on, absolute
	// RawPath is the bytes of Path, in base64 in JSON, where they are no UTF-8; Path has replacement characters then.
	RawPath []byte `json:"raw_path,omitempty"`
	Kind    string `json:"kind"`
	// Type is that of the file as it is now, or was if it is deleted: file, directory, symlink, fifo, socket, char, block.
	Type string `json:"type"`
	// Was is the type below, if that was another one.
	Was string `json:"was,omitempty"`
	// Size is that of a regular file, in bytes.
	Size uint64 `json:"size,omitempty"`
	// From is where a directory was before it was renamed.
	From string `json:"from,omitempty"`
	// RawFrom is to From what RawPath is to Path.
	RawFrom []byte `json:"raw_from,omitempty"`
}

// FullPath is the path with its own bytes.
func (c *OverlayChange) FullPath() string { return whole(c.Path, c.RawPath) }

// FullFrom is where a directory was, with its own bytes.
func (c *OverlayChange) FullFrom() string { return whole(c.From, c.RawFrom) }

func whole(path string, raw []byte) string {
	if raw != nil {
		return string(raw)
	}
	return path
}

// Package store says what an image that is fetched on demand consists of, and how the process that serves it asks the one that
// fetches it. The first speaks to a guest and has no network; the second (package imagefetch, program sluice-fetch) speaks to
// registries and never to a guest. What passes between them is on a SOCK_SEQPACKET pair (wire.go), and every chunk's content as a
// descriptor, so that it is read from the page cache straight into the guest's memory.
package store

import (
	"context"
	"os"
)

// DigestSize is the size of a chunk's SHA-256, in bytes.
const DigestSize = 32

// Store is an image that is open.
type Store interface {
	// Layers are the image's, the lowest first. It waits until all their tables of contents are there and verified.
	Layers(ctx context.Context) ([]Layer, error)
	// Chunk returns a descriptor, for reading only, of the content of chunk number index of a layer: a regular file of Chunk.Size bytes
	// that has been verified, and never changes.
	// It fetches what is not cached. The descriptor is the caller's to close. The only errors are ErrUnavailable and ErrCorrupt,
	// both for EIO, and those of ctx: all else is between the fetcher and its log. It returns within the fetcher's time limits.
	Chunk(ctx context.Context, layer int, index uint32) (*os.File, error)
	// Status says how far a layer has come.
	Status(ctx context.Context, layer int) (Status, error)
	// Prefetched waits until what is fetched before it is asked for (landmarks, prefetch size) is there or cannot be, or ctx ends.
	Prefetched(ctx context.Context) error
	// Reach says why what is not here yet could not be fetched now, after it has tried with a byte of each layer that is not whole. It
	// returns within the fetcher's time limits.
	Reach(ctx context.Context) error
	// Note tells that a file was opened for the first time, for the recorded trace: layer and its path there.
	Note(layer int, path string)
	Close() error
}

// Layer is one layer.
type Layer struct {
	// Digest is the blob's, "sha256:…".
	Digest string
	// Size is the blob's, in bytes.
	Size int64
	// Entries are the files, in no order. Parents may be missing: they are directories of mode 0755 then, root's.
	// They have been decoded from what somebody else wrote; DecodeMeta has checked what the doc comments of Entry say.
	Entries []Entry
	// Chunks are the pieces that contents consist of, which Entry.Chunks count.
	Chunks []Chunk
}

// Entry is one file of a layer.
type Entry struct {
	// Path is relative and clean, "" for the root, which is a directory; no component is "." or "..", or longer than 255 bytes, and
	// the whole not longer than MaxPath. Of several entries with one path the last counts.
	Path string
	// Mode has a file type (S_IFMT) and permission bits with set-id and sticky ones.
	Mode     uint32
	UID, GID uint32
	// MtimeSec and MtimeNsec are since the epoch; the latter is below 1e9.
	MtimeSec  int64
	MtimeNsec uint32
	// Size is that of a regular file, in bytes, at most 1<<62.
	Size uint64
	// RdevMajor and RdevMinor are those of a device, of 12 and 20 bits.
	RdevMajor, RdevMinor uint32
	// Target is a symbolic link's, 1 to 4095 bytes without a NUL; or, where Hardlink is set, the Path of the entry that this one is
	// another name of, which is no directory and no other's Hardlink. Then nothing else is said but Path: the rest is that entry's.
	Target   string
	Hardlink bool
	// Xattrs are in order of their names.
	Xattrs []Xattr
	// Chunks are where the content lies, in order and without overlaps: what is between them is a hole.
	Chunks []Span
}

// Xattr is an extended attribute.
type Xattr struct {
	Name  string // 1 to 255 bytes without a NUL
	Value []byte // at most 64 KiB
}

// Span is a piece of a file.
type Span struct {
	// Off is where in the file, Len how many bytes: all of the chunk's.
	Off, Len uint64
	// Chunk is the index in Layer.Chunks.
	Chunk uint32
}

// Chunk is a run of bytes that is fetched, verified and cached as one.
type Chunk struct {
	// Digest is the SHA-256 of its content.
	Digest [DigestSize]byte
	// Size is the content's, in bytes, 1 to MaxChunk.
	Size uint32
}

// MaxChunk is the largest chunk, in bytes.
const MaxChunk = 256 << 20

// Status is how far a layer has come.
type Status struct {
	// Size is the blob's and Fetched how much of it is here, in bytes.
	Size, Fetched int64
	// Err is the last that went wrong, "" for nothing. It names no credentials.
	Err string
	// Requests and Bytes count what was asked of the registry for it, by this fetcher.
	Requests, Bytes int64
}

// Errors of Store.Chunk.
const (
	// ErrUnavailable says that it could not be fetched.
	ErrUnavailable = Error("the chunk could not be fetched")
	// ErrCorrupt says that what was fetched is not what its digest says.
	ErrCorrupt = Error("the chunk's content is not what its digest says")
)

// Error is an error that is the same in both processes.
type Error string

func (e Error) Error() string { return string(e) }

// Package plugin is for programs that serve layers to Sluice: trees of files that an overlay is made of, by //NAME/DATA/PATH
// in lowerdir.
//
// A plug-in is a program that Sluice starts, with one end of a SOCK_SEQPACKET socket as descriptor 3, or a Plugin that is
// compiled in (Local). docs/layer-plugins.md is the protocol; nothing of Sluice is needed to speak it. In Go:
//
//	func main() {
//		if err := plugin.Main(images{}); err != nil {
//			fmt.Fprintln(os.Stderr, err)
//			os.Exit(1)
//		}
//	}
//
// Methods are called from many goroutines at once. Their contexts end when nobody waits for the answer any more. An error is
// what the guest gets where it is, or wraps, a syscall.Errno, fs.ErrNotExist or fs.ErrPermission, and EIO otherwise.
package plugin

import (
	"context"
	"os"
)

// Plugin serves layers.
type Plugin interface {
	// Name is what the plug-in is called in //NAME/DATA/PATH.
	Name() string
	// NumLayers says how many layers //NAME/data/path is, 1 to MaxLayers.
	NumLayers(ctx context.Context, data, path string) (int, error)
	// Load makes layer n of them, a Tree or a Directory; 0 is the uppermost. The layer is used until its Close.
	Load(ctx context.Context, data, path string, n int) (Layer, error)
}

// Needer is a Plugin that says what it cannot do without.
type Needer interface {
	Needs() Needs
}

// Releaser is a Plugin that is told when it is no longer used, after the last layer's Close.
type Releaser interface {
	Release()
}

// Layer is a Tree or a Directory.
type Layer interface {
	Info() Info
	Close() error
}

// Info is what there is to know of a layer. The zero value is right for most.
type Info struct {
	// ACL says that it has POSIX ACLs, as the extended attributes system.posix_acl_access and system.posix_acl_default.
	ACL bool
	// StableIno says that Attr.Ino is not 0 and a file's own as long as the layer stays the same.
	StableIno bool
	// Dev is the layer's st_dev; with 0 one is made up of NAME, DATA, PATH and n.
	Dev uint64
}

// Tree is a layer whose files the plug-in describes and opens. Paths are "." or names joined by slashes.
type Tree interface {
	Layer
	Stat(ctx context.Context, path string) (Attr, error)
	// ReadDir lists a directory, in any order. "." and ".." may be left out.
	ReadDir(ctx context.Context, path string) ([]DirEntry, error)
	Readlink(ctx context.Context, path string) (string, error)
	// Open opens a regular file, whose size is what Stat says, for reading; what it returns is closed by who called it. The
	// guest then reads from it directly, without the plug-in: memory (memfd_create(2)), or a file of any file system.
	Open(ctx context.Context, path string) (*os.File, error)
}

// XattrReader is a Tree with extended attributes.
type XattrReader interface {
	Listxattr(ctx context.Context, path string) ([]string, error)
	Getxattr(ctx context.Context, path, name string) ([]byte, error)
}

// Directory is a layer that is a directory of the host, which fills on demand. Before a path is looked up in it, Lookup is
// called; before a file in it is read, or a directory listed, Open is. Then what belongs there must be there.
type Directory interface {
	Layer
	// Dir is the directory, which stays the layer's.
	Dir() *os.File
	// Lookup sees that path is in the directory, if the layer has it: its type, size and mode must be right, what is in a
	// file need not be. fs.ErrNotExist says that it is not there.
	Lookup(ctx context.Context, path string) error
	// Open sees that what is in the file at path is right, or that a directory has all its names. It must be the file that was
	// there at Lookup, filled in place, for the guest may know it already.
	Open(ctx context.Context, path string) error
}

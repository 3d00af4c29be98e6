// Package ondemand serves a tree that fills while it is used: a Materializer is told of each path before it is looked up,
// opened or listed, and puts what belongs there where another backend finds it. That one, passthrough of a directory of the
// host as a rule, does all the rest, so that what has come once is read as fast as any file.
//
// The tree is read-only for the guest. READDIRPLUS is not offered, for it looks names up without saying so.
package ondemand

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Materializer puts files where a backend finds them. Paths are relative, "." is the root. Both methods are called again and
// again for the same path, so that what is there already must cost little; for one path only one runs at a time. They are to
// return when ctx ends: nobody waits for them any more.
//
// An error is what the guest gets where it is, or wraps, a syscall.Errno, fs.ErrNotExist (ENOENT) or fs.ErrPermission (EACCES),
// and EIO otherwise, after a timeout too.
type Materializer interface {
	// Lookup sees that path is there, if it exists: its type, size and mode must be right; what is in a file need not be.
	Lookup(ctx context.Context, path string) error
	// Open sees that what is in the file at path is right, or that a directory has all its names. A file is to be filled in place:
	// the guest may know it since Lookup.
	Open(ctx context.Context, path string) error
}

// Defaults of Config.
const (
	DefaultTimeout    = 5 * time.Minute
	DefaultMaxRunning = 64
	DefaultMaxInodes  = 1 << 20
)

// Config says what to serve.
type Config struct {
	// Backend serves what is there. It opens files and lists directories.
	Backend      fsbackend.Backend
	Materializer Materializer
	// Timeout is how long a guest's request may wait for the Materializer until it gets EIO. 0 is DefaultTimeout.
	Timeout time.Duration
	// MaxRunning is how many of the Materializer's calls may run at a time; others wait. 0 is DefaultMaxRunning.
	MaxRunning int
	// MaxInodes is how many files the guest may know at a time; one more is ENFILE. 0 is DefaultMaxInodes.
	MaxInodes int
}

// Validate says what is wrong with the configuration.
func (c *Config) Validate() error {
	switch {
	case c.Backend == nil || c.Materializer == nil:
		return errors.New("on-demand backend: expected a backend and a Materializer")
	case c.Timeout < 0 || c.MaxRunning < 0 || c.MaxInodes < 0:
		return errors.New("on-demand backend with a negative limit: give a positive one, or 0 for the default")
	}
	return nil
}

// FS is a tree that fills on demand.
type FS struct {
	fsbackend.Forward
	maxInodes int
	flights   flights

	mu    sync.Mutex // never held across a call
	nodes map[uint64]*node
}

// node is a file that the guest knows.
type node struct {
	path    string // where it was seen last
	dir     bool
	lookups uint64
}

// New makes a backend around cfg.Backend, which it takes over if there is no error.
func New(cfg Config) (*FS, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	inner := *fsbackend.Resolve(cfg.Backend)
	if inner.Opener == nil || inner.Reader == nil || inner.DirReader == nil {
		return nil, fmt.Errorf("on-demand backend around %T: expected one that opens files and lists directories", cfg.Backend)
	}
	inner.Maker, inner.Linker, inner.Remover, inner.Renamer, inner.Setattrer, inner.Creater = nil, nil, nil, nil, nil, nil
	inner.Tmpfiler, inner.Writer, inner.XattrWriter, inner.Fallocater, inner.CopyFileRanger, inner.Ioctler = nil, nil, nil, nil, nil, nil
	inner.DirPlusReader = nil
	for p, standard := range map[*int]int{&cfg.MaxRunning: DefaultMaxRunning, &cfg.MaxInodes: DefaultMaxInodes} {
		if *p == 0 {
			*p = standard
		}
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	f := &FS{Forward: fsbackend.Forward{Inner: &inner}, maxInodes: cfg.MaxInodes}
	f.flights.init(cfg.Materializer, cfg.Timeout, cfg.MaxRunning)
	f.forgetAll()
	return f, nil
}

// WantFlags implements fsbackend.Wanter: every open is to be heard of.
func (f *FS) WantFlags(defaults uint64) uint64 {
	return f.Forward.WantFlags(defaults) &^ (fuseproto.FUSE_NO_OPEN_SUPPORT | fuseproto.FUSE_NO_OPENDIR_SUPPORT)
}

// node returns what is known of a node.
func (f *FS) node(id uint64) (node, fsbackend.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.nodes[id]
	if n == nil {
		return node{}, unix.ESTALE
	}
	return *n, fsbackend.OK
}

// Lookup implements fsbackend.Backend.
func (f *FS) Lookup(c *fsbackend.Context, parent uint64, name fsbackend.Name, out *fuseproto.EntryOut) fsbackend.Errno {
	dir, errno := f.node(parent)
	switch {
	case errno != 0:
		return errno
	case !dir.dir:
		return unix.ENOTDIR
	}
	child := name.String()
	if dir.path != "." {
		child = dir.path + "/" + child
	}
	if len(child) >= unix.PathMax {
		return unix.ENAMETOOLONG
	}
	if errno := f.flights.wait(c, lookup, child); errno != 0 {
		return errno
	}
	if errno := f.Inner.Lookup(c, parent, name, out); errno != 0 || out.NodeId == 0 {
		return errno
	}
	if !f.count(child, out) {
		f.Inner.Forget(out.NodeId, 1)
		return unix.ENFILE
	}
	return fsbackend.OK
}

// count counts a lookup of what was found at path; it reports false if the guest knows too much.
func (f *FS) count(path string, found *fuseproto.EntryOut) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.nodes[found.NodeId]
	if n == nil {
		if len(f.nodes) > f.maxInodes {
			return false
		}
		n = new(node)
		f.nodes[found.NodeId] = n
	}
	if found.NodeId != fuseproto.FUSE_ROOT_ID {
		n.path, n.dir = path, found.Mode&unix.S_IFMT == unix.S_IFDIR
		n.lookups++
	}
	return true
}

// Forget implements fsbackend.Backend.
func (f *FS) Forget(id, n uint64) {
	f.mu.Lock()
	if known := f.nodes[id]; known != nil && id != fuseproto.FUSE_ROOT_ID {
		if known.lookups -= min(n, known.lookups); known.lookups == 0 {
			delete(f.nodes, id)
		}
	}
	f.mu.Unlock()
	f.Inner.Forget(id, n)
}

// Open implements fsbackend.Opener.
func (f *FS) Open(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	if fsbackend.OpensForWriting(in.Flags) {
		return unix.EROFS
	}
	if errno := f.open(c, in.NodeId); errno != 0 {
		return errno
	}
	return f.Inner.Open(c, in, out)
}

// Opendir implements fsbackend.DirReader.
func (f *FS) Opendir(c *fsbackend.Context, in *fuseproto.OpenIn, out *fuseproto.OpenOut) fsbackend.Errno {
	if errno := f.open(c, in.NodeId); errno != 0 {
		return errno
	}
	return f.Inner.Opendir(c, in, out)
}

func (f *FS) open(c *fsbackend.Context, id uint64) fsbackend.Errno {
	n, errno := f.node(id)
	if errno != 0 {
		return errno
	}
	return f.flights.wait(c, open, n.path)
}

func (f *FS) forgetAll() {
	f.mu.Lock()
	f.nodes = map[uint64]*node{fuseproto.FUSE_ROOT_ID: {path: ".", dir: true}}
	f.mu.Unlock()
}

// Reset implements fsbackend.Backend.
func (f *FS) Reset() {
	f.Inner.Reset()
	f.forgetAll()
}

// Close implements fsbackend.Backend. It waits for calls of the Materializer whose contexts have ended.
func (f *FS) Close() error {
	f.flights.close()
	return f.Inner.Close()
}

// errnoOf is what the guest sees of a Materializer's error.
func errnoOf(err error) fsbackend.Errno {
	const maxErrno = 511 // those above are the kernel's own (include/linux/errno.h)
	var errno fsbackend.Errno
	switch {
	case err == nil:
		return fsbackend.OK
	case errors.As(err, &errno) && errno > 0 && errno <= maxErrno && errno != unix.ENOSYS: // that one would end such requests for good
		return errno
	case errors.Is(err, fs.ErrNotExist):
		return unix.ENOENT
	case errors.Is(err, fs.ErrPermission):
		return unix.EACCES
	}
	return unix.EIO
}

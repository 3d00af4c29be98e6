// Package mem is a backend whose tree lives in this process's memory, within a limit: scratch space for a guest, the
// reference for what the contract of fsbackend means, and a stand-in for other backends in tests.
//
// It is strict where others may be lenient: a nodeid whose lookups have all been taken back is ESTALE at once. Permissions
// are the guest's kernel's to check; reading does not change access times.
package mem

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const (
	pageSize = 4096

	// MaxLinks is the most hard links of a file, or subdirectories and 2 of a directory; one more is EMLINK.
	MaxLinks = 65000
	// MaxHandles is the most files and directories open at once; one more is ENFILE.
	MaxHandles = 1 << 17

	defaultMaxBytes = 64 << 20
	// entryCost is what a directory entry takes beyond its name, about.
	entryCost = 96
)

// Config is what a tree starts from.
type Config struct {
	// MaxBytes limits file data, names, symbolic links' targets and extended attributes together: 0 is 64 MiB.
	MaxBytes int64
	// MaxInodes limits files of all types, the root included: 0 is one for each 4 KiB of MaxBytes, 1024 at least.
	MaxInodes int
	// Mode is the permissions of the root directory, 0755 if 0; UID and GID are its owner.
	Mode     uint32
	UID, GID uint32
	// Now is the clock: nil is time.Now.
	Now func() time.Time
}

// Validate says what is wrong with the configuration.
func (c *Config) Validate() error {
	if c.MaxBytes < 0 {
		return fmt.Errorf("in-memory tree of at most %d bytes: give a positive size, or 0 for 64 MiB", c.MaxBytes)
	}
	if c.MaxInodes < 0 {
		return fmt.Errorf("in-memory tree of at most %d inodes: give a positive number, or 0 for the default", c.MaxInodes)
	}
	return nil
}

// FS is an in-memory tree. It never sleeps, but for its locks.
//
// Lock order: a file's data.mu, then mu. Guest memory is touched under data.mu at most, so that a page of it that is slow
// to come holds up nobody but this file's users.
type FS struct {
	maxBytes  int64
	maxInodes int
	now       func() time.Time

	bytes atomic.Int64 // in use, of maxBytes
	known atomic.Int64 // nodes with lookups

	killpriv  atomic.Bool // FUSE_HANDLE_KILLPRIV_V2 is in force
	dontMask  atomic.Bool // FUSE_DONT_MASK is in force
	writeback atomic.Bool // FUSE_WRITEBACK_CACHE is in force

	mu         sync.RWMutex
	root       *node
	work       *node // nil until WorkNode has been asked for
	nodes      map[uint64]*node
	handles    map[uint64]*handle
	lastNode   uint64
	lastHandle uint64
}

// handle is an open file or directory.
type handle struct {
	node  *node
	flags uint32 // open(2) flags
}

// New makes a tree with an empty root directory.
func New(config Config) (*FS, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if config.MaxBytes == 0 {
		config.MaxBytes = defaultMaxBytes
	}
	if config.MaxInodes == 0 {
		config.MaxInodes = int(max(config.MaxBytes/pageSize, 1024))
	}
	if config.Mode == 0 {
		config.Mode = 0o755
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	f := &FS{
		maxBytes: config.MaxBytes, maxInodes: config.MaxInodes, now: config.Now,
		nodes: make(map[uint64]*node), handles: make(map[uint64]*handle),
	}
	root, errno := f.newNode(unix.S_IFDIR|config.Mode&0o7777, config.UID, config.GID)
	if errno != 0 {
		return nil, errors.New("in-memory tree has no room for its root: raise MaxInodes")
	}
	root.nlink = 2
	root.dir.parent = root
	f.root = root
	return f, nil
}

// Init implements fsbackend.Initer.
func (f *FS) Init(features fsbackend.Features) {
	f.killpriv.Store(features.Has(fuseproto.FUSE_HANDLE_KILLPRIV_V2))
	f.dontMask.Store(features.Has(fuseproto.FUSE_DONT_MASK))
	f.writeback.Store(features.Has(fuseproto.FUSE_WRITEBACK_CACHE))
}

// Reset implements fsbackend.Backend.
func (f *FS) Reset() {
	f.mu.Lock()
	clear(f.handles)
	var dead []*node
	for _, n := range f.nodes {
		n.opens = 0
		f.forget(n, math.MaxUint64)
		if f.drop(n) {
			dead = append(dead, n)
		}
	}
	f.mu.Unlock()
	f.free(dead...)
}

// Close implements fsbackend.Backend.
func (f *FS) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.handles)
	clear(f.nodes)
	f.root, f.work = nil, nil
	f.bytes.Store(0)
	return nil
}

// WorkNode returns the nodeid of a directory that no path leads to: for a backend on top of this one, and for as long as the FS
// lasts. 0 says that there is no room for it.
func (f *FS) WorkNode() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.work == nil {
		work, errno := f.newNode(unix.S_IFDIR|0o700, 0, 0)
		if errno != 0 {
			return 0
		}
		work.dir.parent = work
		f.work = work
	}
	return f.work.id
}

// charge takes n bytes of the limit, or none.
func (f *FS) charge(n int64) bool {
	if f.bytes.Add(n) > f.maxBytes {
		f.bytes.Add(-n)
		return false
	}
	return true
}

func (f *FS) refund(n int64) {
	f.bytes.Add(-n)
}

// node returns the file that a guest calls id. mu is held.
func (f *FS) node(id uint64) (*node, fsbackend.Errno) {
	n := f.nodes[id]
	if n == nil || n != f.root && n != f.work && n.lookups.Load() == 0 {
		return nil, unix.ESTALE
	}
	return n, fsbackend.OK
}

// directory returns the directory that a guest calls id. mu is held.
func (f *FS) directory(id uint64) (*node, fsbackend.Errno) {
	n, errno := f.node(id)
	if errno == 0 && n.dir == nil {
		errno = unix.ENOTDIR
	}
	return n, errno
}

// handle returns the open file fh, which must be one of node id. mu is held.
func (f *FS) handle(id, fh uint64) (*handle, fsbackend.Errno) {
	h := f.handles[fh]
	if h == nil || h.node.id != id {
		return nil, unix.EBADF
	}
	return h, fsbackend.OK
}

// findHandle is handle for a caller that does not hold mu.
func (f *FS) findHandle(id, fh uint64) (*handle, fsbackend.Errno) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.handle(id, fh)
}

// open makes a handle for n. mu is held for writing.
func (f *FS) open(n *node, flags uint32) (uint64, fsbackend.Errno) {
	if len(f.handles) >= MaxHandles {
		return 0, unix.ENFILE
	}
	f.lastHandle++
	f.handles[f.lastHandle] = &handle{node: n, flags: flags}
	n.opens++
	return f.lastHandle, fsbackend.OK
}

// release closes a handle of a file or directory.
func (f *FS) release(in *fuseproto.ReleaseIn) {
	f.mu.Lock()
	h, errno := f.handle(in.NodeId, in.Fh)
	if errno != 0 {
		f.mu.Unlock()
		return
	}
	delete(f.handles, in.Fh)
	h.node.opens--
	dead := f.drop(h.node)
	f.mu.Unlock()
	if dead {
		f.free(h.node)
	}
}

// Forget implements fsbackend.Backend.
func (f *FS) Forget(id, count uint64) {
	f.mu.RLock()
	n := f.nodes[id]
	last := n != nil && f.forget(n, count)
	f.mu.RUnlock()
	if last {
		f.reap(n)
	}
}

// reap frees n if nothing refers to it any more.
func (f *FS) reap(n *node) {
	f.mu.Lock()
	dead := f.drop(n)
	f.mu.Unlock()
	if dead {
		f.free(n)
	}
}

// Statfs implements fsbackend.StatFSer.
func (f *FS) Statfs(_ *fsbackend.Context, id uint64, out *fuseproto.StatfsOut) fsbackend.Errno {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if _, errno := f.node(id); errno != 0 {
		return errno
	}
	blocks := uint64(f.maxBytes / pageSize)
	free := uint64(max(f.maxBytes-f.bytes.Load(), 0) / pageSize)
	*out = fuseproto.StatfsOut{
		Blocks: blocks, Bfree: free, Bavail: free,
		Files: uint64(f.maxInodes), Ffree: uint64(f.maxInodes - len(f.nodes)),
		Bsize: pageSize, Frsize: pageSize, NameLen: unix.NAME_MAX,
	}
	return fsbackend.OK
}

// Stats implements fsbackend.Statser.
func (f *FS) Stats() fsbackend.Stats {
	return fsbackend.Stats{Inodes: 1 + uint64(max(f.known.Load(), 0))}
}

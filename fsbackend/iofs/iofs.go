// Package iofs serves any fs.FS of Go's io/fs to a guest, read-only: a zip file, an embed.FS, an os.Root's, or one of your
// own, which takes three short methods. Tree makes one of a flat list of files.
//
// What the fs.FS can do beyond Open is used: ReadDirFS, StatFS and ReadLinkFS; of its files io.ReaderAt (reads run in
// parallel), else io.Seeker, else only Read. A file of the last kind, as in a zip file, is read in order, and what was
// read last is kept, so that a guest that reads ahead and somewhat out of order finds it; going back further opens the
// file anew and reads up to there, which is slow but right.
//
// A node is a path: its inode number stays the same for as long as the path does, whatever file is there, but a path
// that becomes a file of another type becomes another node. Names that io/fs has no paths for (not UTF-8) are not served.
//
// Serve directories of the host through os.Root's FS, not through os.DirFS: the latter follows symbolic links out of the
// directory. passthrough does it better than both.
package iofs

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

const (
	defaultMaxInodes  = 1 << 20
	defaultMaxHandles = 1 << 14
	defaultMaxListed  = 1 << 20
	defaultMaxBuffers = 64 << 20
)

// Config says what to serve.
type Config struct {
	// FS is the tree. Its methods, and those of its files, are called from many threads at once; files are only if they have
	// ReadAt. Close closes it if it is an io.Closer, as a *zip.ReadCloser is.
	FS fs.FS
	// UID and GID own all files.
	UID, GID uint32
	// Fast says that no call sleeps, so that they may run where they would hold others up.
	Fast bool

	// MaxInodes is how many files the guest may know at a time; one more is ENFILE. 0 is 1048576.
	MaxInodes int
	// MaxHandles is how many files and directories it may have open; one more is ENFILE. 0 is 16384.
	MaxHandles int
	// MaxListed is how many entries the listings of open directories may have together; one more is ENOMEM. 0 is 1048576.
	MaxListed int
	// MaxBuffers is how many bytes may be kept of files that can only be read in order: 1 MiB of each, twice that while it is
	// moved. Where there is no room, nothing is kept. 0 is 64 MiB.
	MaxBuffers int
}

// Validate says what is wrong with the configuration.
func (c *Config) Validate() error {
	if c.FS == nil {
		return errors.New("io/fs backend without a file system: set Config.FS")
	}
	for _, limit := range []struct {
		name  string
		value int
	}{{"MaxInodes", c.MaxInodes}, {"MaxHandles", c.MaxHandles}, {"MaxListed", c.MaxListed}, {"MaxBuffers", c.MaxBuffers}} {
		if limit.value < 0 {
			return fmt.Errorf("io/fs backend with Config.%s %d: give a positive number, or 0 for the default", limit.name, limit.value)
		}
	}
	return nil
}

// FS is an fs.FS as a backend.
type FS struct {
	cfg     Config
	links   bool // cfg.FS is a fs.ReadLinkFS
	listed  budget
	kept    budget
	buffers sync.Pool // of *[]byte, readSize long

	mu       sync.Mutex // never held across a call of cfg.FS
	nodes    map[uint64]*node
	byPath   map[string]*node
	files    map[uint64]*file
	dirs     map[uint64]*dir
	lastNode uint64
	lastFh   uint64
}

// node is a path that the guest knows. All but lookups never changes; that is under FS.mu.
type node struct {
	id      uint64
	path    string
	typ     uint32 // S_IFMT bits
	lookups uint64
}

// New makes a backend of config.FS.
func New(config Config) (*FS, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	for p, standard := range map[*int]int{
		&config.MaxInodes: defaultMaxInodes, &config.MaxHandles: defaultMaxHandles,
		&config.MaxListed: defaultMaxListed, &config.MaxBuffers: defaultMaxBuffers,
	} {
		if *p == 0 {
			*p = standard
		}
	}
	root := &node{id: fuseproto.FUSE_ROOT_ID, path: ".", typ: unix.S_IFDIR}
	f := &FS{
		cfg:    config,
		nodes:  map[uint64]*node{root.id: root},
		byPath: map[string]*node{root.path: root},
		files:  make(map[uint64]*file), dirs: make(map[uint64]*dir),
		lastNode: root.id,
	}
	_, f.links = config.FS.(fs.ReadLinkFS)
	f.listed.left.Store(int64(config.MaxListed))
	f.kept.left.Store(int64(config.MaxBuffers))
	f.buffers.New = func() any { b := make([]byte, readSize); return &b }
	return f, nil
}

// budget is what is left of a limit.
type budget struct{ left atomic.Int64 }

// take takes n, or nothing.
func (b *budget) take(n int) bool {
	if b.left.Add(int64(-n)) < 0 {
		b.give(n)
		return false
	}
	return true
}

func (b *budget) give(n int) { b.left.Add(int64(n)) }

// Slow implements fsbackend.Slow.
func (f *FS) Slow() bool { return !f.cfg.Fast }

// node returns what the guest calls id.
func (f *FS) node(id uint64) (*node, fsbackend.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.nodes[id]
	if n == nil {
		return nil, unix.ESTALE
	}
	return n, fsbackend.OK
}

// directory is node for a directory.
func (f *FS) directory(id uint64) (*node, fsbackend.Errno) {
	n, errno := f.node(id)
	if errno == 0 && n.typ != unix.S_IFDIR {
		return nil, unix.ENOTDIR
	}
	return n, errno
}

// adopt counts a lookup of the file at p.
func (f *FS) adopt(p string, typ uint32) (uint64, fsbackend.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.byPath[p]
	if n == nil || n.typ != typ {
		if p == "." {
			return 0, unix.ENOTDIR // the root's type is for good
		}
		if len(f.nodes) >= f.cfg.MaxInodes {
			return 0, unix.ENFILE
		}
		f.lastNode++
		n = &node{id: f.lastNode, path: p, typ: typ}
		f.nodes[n.id] = n
		f.byPath[p] = n // in place of one of another type, which is stale from here on
	}
	n.lookups++
	return n.id, fsbackend.OK
}

// Forget implements fsbackend.Backend.
func (f *FS) Forget(id, count uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.nodes[id]; n != nil {
		n.lookups -= min(count, n.lookups)
		f.drop(n)
	}
}

// drop takes a node out of the tables that the guest does not know any more. mu is held.
func (f *FS) drop(n *node) {
	if n.id == fuseproto.FUSE_ROOT_ID || n.lookups > 0 {
		return
	}
	delete(f.nodes, n.id)
	if f.byPath[n.path] == n {
		delete(f.byPath, n.path)
	}
}

// Reset implements fsbackend.Backend.
func (f *FS) Reset() {
	var idle []io.Closer
	f.mu.Lock()
	for fh, h := range f.files {
		delete(f.files, fh)
		if h.end() {
			idle = append(idle, h)
		}
	}
	for fh, d := range f.dirs {
		delete(f.dirs, fh)
		if d.end() {
			idle = append(idle, d)
		}
	}
	for _, n := range f.nodes {
		n.lookups = 0
		f.drop(n)
	}
	f.mu.Unlock()
	for _, c := range idle {
		_ = c.Close()
	}
}

// Close implements fsbackend.Backend.
func (f *FS) Close() error {
	f.Reset()
	if c, ok := f.cfg.FS.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// Stats implements fsbackend.Statser.
func (f *FS) Stats() fsbackend.Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	return fsbackend.Stats{Inodes: uint64(len(f.nodes))}
}

// inode is the inode number of the file at p, the same in every session: the contract wants one that is not 0, and the root's
// is its nodeid by custom.
func inode(p string) uint64 {
	if p == "." {
		return fuseproto.FUSE_ROOT_ID
	}
	sum := sha256.Sum256([]byte(p))
	return max(binary.LittleEndian.Uint64(sum[:]), fuseproto.FUSE_ROOT_ID+1)
}

// servable says whether name can be served: it is one to a guest and one to io/fs.
func servable(name string) bool {
	return len(name) <= unix.NAME_MAX && name != "." && fs.ValidPath(name) && !strings.ContainsAny(name, "/\x00")
}

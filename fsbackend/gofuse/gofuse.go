// Package gofuse serves file systems written for go-fuse (github.com/hanwen/go-fuse/v2) as backends: any
// fuse.RawFileSystem, and so any tree of fs.InodeEmbedder. Their methods are called directly.
//
// Such a file system trusts the kernel it was written for. A guest deserves no trust, so the adapter keeps its own tables:
// it hands out its own nodeids and handles, knows each node's type, forgets and releases only what the guest holds, and
// only when no call uses it any more. A panic of the file system is an EIO.
//
// What the file system does on the host is its own business: go-fuse's loopback, for one, works with paths and was not
// written to withstand a guest that races it. go-fuse writes a line to package log's standard logger before it panics: a
// program that serves guests sets that logger's output to something that limits itself.
package gofuse

import (
	"errors"
	"log/slog"
	"math"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// MaxHandles is the most files and directories that a guest can have open at once, about; one more is ENFILE.
const MaxHandles = 1 << 17

// Config says what to serve.
type Config struct {
	// FS is the file system. Its Init is not called: what that is given, a *fuse.Server, speaks to /dev/fuse, which is not
	// there. OnUnmount is, by Close.
	FS fuse.RawFileSystem
	// Fast says that no call sleeps, so that they may run where they would hold others up.
	Fast bool
	// MaxFileSize, in bytes, is what a WRITE, SETATTR, FALLOCATE or COPY_FILE_RANGE may grow a file to; beyond it is EFBIG.
	// 0 is 2^63-1: set less for file systems in memory, many of which allocate what they are asked for.
	MaxFileSize uint64
	// Flags are INIT flags that the file system handles beyond what every go-fuse file system does, such as
	// fuseproto.FUSE_HANDLE_KILLPRIV_V2 and FUSE_WRITEBACK_CACHE.
	Flags uint64
	// Logger is told of panics, one a second at most; nil drops them.
	Logger *slog.Logger
}

// Validate says what is wrong with the configuration.
func (c *Config) Validate() error {
	if c.FS == nil {
		return errors.New("go-fuse backend without a file system: set Config.FS")
	}
	if c.MaxFileSize > math.MaxInt64 {
		return errors.New("go-fuse backend with a file size limit beyond 2^63-1: give a smaller one, or 0")
	}
	return nil
}

// Backend is a go-fuse file system as a backend.
type Backend struct {
	fs       fuse.RawFileSystem
	fast     bool
	maxSize  uint64
	flags    uint64
	log      *slog.Logger
	lastLog  atomic.Int64 // nanoseconds of the last panic logged
	buffers  sync.Pool    // of *[]byte
	mu       sync.Mutex
	nodes    map[uint64]*node // by the guest's number
	byRaw    map[uint64]*node // by the file system's
	handles  map[uint64]*handle
	lastNode uint64
	lastFh   uint64
}

// node is a node that the guest holds, or that a call or handle still uses. Its fields are under Backend.mu, but for the
// first three, which do not change.
type node struct {
	id, raw uint64
	typ     uint32 // S_IFMT bits
	count   uint64 // lookups that the guest holds
	owed    uint64 // lookups that the guest has given back and the file system not yet
	pins    int    // calls and handles that use it
}

// handle is an open file or directory. Its fields are under Backend.mu, but for node, raw and dir.
type handle struct {
	node   *node
	raw    uint64
	dir    bool
	pins   int  // calls that use it
	closed bool // the guest has released it
}

// New makes a backend of a RawFileSystem.
func New(config Config) (*Backend, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if config.MaxFileSize == 0 {
		config.MaxFileSize = math.MaxInt64
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	root := &node{id: fuseproto.FUSE_ROOT_ID, raw: fuse.FUSE_ROOT_ID, typ: unix.S_IFDIR}
	return &Backend{
		fs: config.FS, fast: config.Fast, maxSize: config.MaxFileSize, flags: config.Flags, log: config.Logger,
		nodes:    map[uint64]*node{root.id: root},
		byRaw:    map[uint64]*node{root.raw: root},
		handles:  make(map[uint64]*handle),
		lastNode: root.id,
	}, nil
}

// NewFromRoot makes a backend of a tree of nodes: config.FS is set by it. options may be nil: what a guest may cache is then
// the share's policy, and modes of 0 are what the tree says.
func NewFromRoot(root fs.InodeEmbedder, options *fs.Options, config Config) (*Backend, error) {
	own := fs.Options{NullPermissions: true}
	if options != nil {
		own = *options
	}
	if own.ServerCallbacks == nil {
		own.ServerCallbacks = noNotify{}
	}
	config.FS = fs.NewNodeFS(root, &own)
	return New(config)
}

// noNotify answers a tree's notifications: virtio-fs has no way to carry them.
type noNotify struct{}

func (noNotify) DeleteNotify(uint64, uint64, string) fuse.Status         { return fuse.ENOSYS }
func (noNotify) EntryNotify(uint64, string) fuse.Status                  { return fuse.ENOSYS }
func (noNotify) InodeNotify(uint64, int64, int64) fuse.Status            { return fuse.ENOSYS }
func (noNotify) InodeNotifyStoreCache(uint64, int64, []byte) fuse.Status { return fuse.ENOSYS }
func (noNotify) InodeRetrieveCache(uint64, int64, []byte) (int, fuse.Status) {
	return 0, fuse.ENOSYS
}

// Slow implements fsbackend.Slow.
func (b *Backend) Slow() bool { return !b.fast }

// Stats implements fsbackend.Statser. What descriptors the file system has, it alone knows.
func (b *Backend) Stats() fsbackend.Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	return fsbackend.Stats{Inodes: uint64(len(b.nodes))}
}

// WantFlags implements fsbackend.Wanter: go-fuse has no place for the extensions of requests, and few file systems written
// for it clear set-id bits or can read through a handle for writing.
func (b *Backend) WantFlags(defaults uint64) uint64 {
	return defaults&^(fuseproto.FUSE_HANDLE_KILLPRIV_V2|fuseproto.FUSE_WRITEBACK_CACHE|
		fuseproto.FUSE_SECURITY_CTX|fuseproto.FUSE_CREATE_SUPP_GROUP) | b.flags
}

// contain, deferred, turns a panic of the file system into EIO.
func (b *Backend) contain(op string, errno *fsbackend.Errno) {
	r := recover()
	if r == nil {
		return
	}
	*errno = unix.EIO
	now, last := time.Now().UnixNano(), b.lastLog.Load()
	if now-last >= int64(time.Second) && b.lastLog.CompareAndSwap(last, now) {
		b.log.Error("file system panicked", "operation", op, "panic", r, "stack", string(debug.Stack()))
	}
}

// errnoOf makes an errno that a guest may see of a file system's status.
func errnoOf(s fuse.Status) fsbackend.Errno {
	const maxErrno = 511 // those above are the kernel's own (include/linux/errno.h)
	if s < 0 || s > maxErrno {
		return unix.EIO
	}
	return fsbackend.Errno(s)
}

// pin returns the node that the guest calls id, for the time of a call.
func (b *Backend) pin(id uint64) (*node, fsbackend.Errno) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.nodes[id]
	if n == nil {
		return nil, unix.ESTALE
	}
	n.pins++
	return n, fsbackend.OK
}

// pinDir is pin for a directory.
func (b *Backend) pinDir(id uint64) (*node, fsbackend.Errno) {
	n, errno := b.pin(id)
	if errno == 0 && n.typ != unix.S_IFDIR {
		b.unpin(n)
		return nil, unix.ENOTDIR
	}
	return n, errno
}

// pinHandle returns the handle fh of node id, for the time of a call.
func (b *Backend) pinHandle(id, fh uint64, dir bool) (*handle, fsbackend.Errno) {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.handles[fh]
	if h == nil || h.node.id != id || h.dir != dir {
		return nil, unix.EBADF
	}
	h.pins++
	return h, fsbackend.OK
}

// unpin ends a call's use of n.
func (b *Backend) unpin(n *node) {
	b.mu.Lock()
	n.pins--
	dead := b.drop(n)
	b.mu.Unlock()
	if dead {
		b.forget(n)
	}
}

// drop takes n out of the tables if neither the guest nor a call uses it; the caller then forgets it. mu is held.
func (b *Backend) drop(n *node) bool {
	if n.id == fuseproto.FUSE_ROOT_ID || n.count > 0 {
		return false
	}
	delete(b.nodes, n.id) // the guest cannot name it from here on
	if n.pins > 0 || b.byRaw[n.raw] != n {
		return false
	}
	delete(b.byRaw, n.raw)
	return true
}

// forget gives the file system back all lookups of a dropped node.
func (b *Backend) forget(n *node) {
	var errno fsbackend.Errno
	defer b.contain("FORGET", &errno)
	if n.owed > 0 {
		b.fs.Forget(n.raw, n.owed)
	}
}

// Forget implements fsbackend.Backend.
func (b *Backend) Forget(id, count uint64) {
	b.mu.Lock()
	n := b.nodes[id]
	dead := false
	if n != nil && n.id != fuseproto.FUSE_ROOT_ID {
		back := min(count, n.count)
		n.count -= back
		n.owed += back
		dead = b.drop(n)
	}
	b.mu.Unlock()
	if dead {
		b.forget(n)
	}
}

// adopt turns the file system's entry into the guest's and counts its lookup; with pin, the node is pinned too. An entry
// without a node stays as it is.
func (b *Backend) adopt(out *fuseproto.EntryOut, pin bool) *node {
	if out.NodeId == 0 {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.byRaw[out.NodeId]
	if n == nil {
		b.lastNode++
		n = &node{id: b.lastNode, raw: out.NodeId, typ: out.Mode & unix.S_IFMT}
		if n.typ == 0 {
			n.typ = unix.S_IFREG
		}
		b.byRaw[n.raw] = n
	}
	if n.id != fuseproto.FUSE_ROOT_ID {
		n.count++
		b.nodes[n.id] = n
	}
	if pin {
		n.pins++
	}
	out.NodeId = n.id
	n.complete(&out.Attr)
	return n
}

// complete fills in what file systems leave out that a guest's kernel insists on, or shows.
func (n *node) complete(a *fuseproto.Attr) {
	if a.Ino == 0 {
		a.Ino = n.id
	}
	if a.Mode&unix.S_IFMT == 0 {
		a.Mode |= n.typ
	}
	if a.Nlink == 0 {
		a.Nlink = 1
	}
}

// room says whether another handle may be made.
func (b *Backend) room() fsbackend.Errno {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.handles) >= MaxHandles {
		return unix.ENFILE
	}
	return fsbackend.OK
}

// opened makes a handle of what the file system opened on n, which the caller has pinned.
func (b *Backend) opened(n *node, raw uint64, dir bool) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	n.pins++ // until the file system has released the handle
	b.lastFh++
	b.handles[b.lastFh] = &handle{node: n, raw: raw, dir: dir}
	return b.lastFh
}

// unpinHandle ends a call's use of h.
func (b *Backend) unpinHandle(h *handle) {
	b.mu.Lock()
	h.pins--
	last := h.closed && h.pins == 0
	b.mu.Unlock()
	if last {
		b.release(h)
	}
}

// close takes fh from the guest; calls that use it end normally.
func (b *Backend) close(in *fuseproto.ReleaseIn, dir bool) {
	b.mu.Lock()
	h := b.handles[in.Fh]
	if h == nil || h.node.id != in.NodeId || h.dir != dir {
		b.mu.Unlock()
		return
	}
	delete(b.handles, in.Fh)
	h.closed = true
	last := h.pins == 0
	b.mu.Unlock()
	if last {
		b.release(h)
	}
}

// release has the file system release a closed handle that no call uses.
func (b *Backend) release(h *handle) {
	defer b.unpin(h.node)
	var errno fsbackend.Errno
	defer b.contain("RELEASE", &errno)
	in := &fuse.ReleaseIn{InHeader: fuse.InHeader{NodeId: h.node.raw}, Fh: h.raw}
	if h.dir {
		b.fs.ReleaseDir(in)
	} else {
		b.fs.Release(nil, in)
	}
}

// Reset implements fsbackend.Backend.
func (b *Backend) Reset() {
	b.mu.Lock()
	var handles []*handle
	for _, h := range b.handles {
		h.closed = true
		if h.pins == 0 {
			handles = append(handles, h)
		}
	}
	clear(b.handles)
	var dead []*node
	for _, n := range b.nodes {
		n.owed += n.count
		n.count = 0
		if b.drop(n) {
			dead = append(dead, n)
		}
	}
	b.mu.Unlock()
	for _, h := range handles {
		b.release(h)
	}
	for _, n := range dead {
		b.forget(n)
	}
}

// Close implements fsbackend.Backend: it resets, and tells the file system that it is unmounted.
func (b *Backend) Close() error {
	b.Reset()
	var errno fsbackend.Errno
	defer b.contain("unmount", &errno)
	b.fs.OnUnmount()
	return nil
}

// header is a request's header as the file system is to see it.
func header(c *fsbackend.Context, n *node) fuse.InHeader {
	return fuse.InHeader{NodeId: n.raw, Caller: c.Caller}
}

// buffer returns n bytes for the time of a call: strangers get no pointer into the guest's memory.
func (b *Backend) buffer(n int) *[]byte {
	p, _ := b.buffers.Get().(*[]byte)
	if p == nil || cap(*p) < n {
		p = new([]byte)
		*p = make([]byte, n)
	}
	*p = (*p)[:n]
	return p
}

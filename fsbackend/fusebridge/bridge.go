// Package fusebridge serves any FUSE program as a backend, with no mount and no privilege on the host: the bridge speaks FUSE
// with it as the kernel does, over one end of a SOCK_SEQPACKET pair, whose other end the program has been given as /dev/fd/N.
//
// Such a program was written for a kernel, which it trusts, and which does not trust it. So it is here: every reply is checked;
// the guest gets the bridge's own nodeids and handles, and never the program's. A program that breaks the protocol has its
// socket shut, and is started again by who supervises it (internal/program).
//
// # When the program ends
//
// Requests in flight are EIO at once. Others wait for the next program, up to Config.RestartWait. Nodes are found again there by
// the name that they were last seen at, when they are needed: ESTALE if there is none, or of another type. Handles that only read
// are opened again likewise; for others EIO tells the guest that what it has written through them may be lost.
//
// # Files
//
//	bridge.go     Config, New, Close, sessions
//	conn.go       a connection: requests out, replies in, time limits
//	wire*.go      structs to bytes and back, and what is checked of a reply
//	negotiate.go  INIT
//	notify.go     what a program says without being asked
//	node.go       the guest's nodes and the program's; forgetting
//	idle.go       nodes that the guest has forgotten and may come back to
//	cache.go      names and attributes that the program has said are good for a while
//	burst.go      many lookups at once, for READDIRPLUS
//	handle.go     open files and directories
//	recover.go    the next program: finding nodes and handles again
//	ops_*.go      the operations
package fusebridge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/ratelog"
)

// Line brings the connections to a program: program.Line.
type Line interface {
	// Next blocks until the program has been started (again), and returns this end of its socket. An error is for good.
	Next(ctx context.Context) (*os.File, error)
}

// Limits.
const (
	// MaxHandles is the most files and directories that a guest can have open at once; one more is ENFILE.
	MaxHandles = 1 << 17
	// DefaultMaxWrite is Config.MaxWrite's default. A message is one piece of the host kernel's memory, but for its last 68 KiB:
	// larger ones are not always to be had.
	DefaultMaxWrite = 128 << 10
	// LimitMaxWrite is the most that Config.MaxWrite may be.
	LimitMaxWrite = 1 << 20

	pageSize = 4096
	// headroom is what a message has besides its data, as FUSE_BUFFER_HEADER_SIZE of libfuse.
	headroom = 4096
)

// Config says how a program is served. Only Line is needed.
type Config struct {
	// Line brings the connections; the bridge closes what it brings, and not itself.
	Line Line
	// Timeout is how long the program may take for a request: then it is told with FUSE_INTERRUPT, and the guest gets EIO.
	// 0 is 30 s.
	Timeout time.Duration
	// StartTimeout is how long the program may take to answer INIT; 0 is 30 s.
	StartTimeout time.Duration
	// RestartWait is how long requests wait for a program that has ended to be started again; 0 is 2 s.
	RestartWait time.Duration
	// MaxWrite limits READ and WRITE requests, in bytes, a multiple of 4096; 0 is DefaultMaxWrite. Larger ones of the guest are split.
	MaxWrite int
	// Owner, unless nil, is who asks, in place of the process in the guest.
	Owner *fuseproto.Caller
	// MaxNodes is how many nodes the guest may hold, about; one more is ENFILE. 0 is 1<<20.
	MaxNodes int
	// ParallelLookups says that the program takes several requests about a directory at a time, though its INIT lacks
	// FUSE_PARALLEL_DIROPS: that of libfuse before 3.15 does unless the program asks for it.
	ParallelLookups bool
	// NoCache asks the program about every name and attribute, whatever it has said of how long they are good.
	NoCache bool
	// Log is told of what goes wrong, at a bounded rate; nil drops it.
	Log *slog.Logger
}

// Validate says what is wrong with the configuration.
func (c *Config) Validate() error {
	switch {
	case c.Line == nil:
		return errors.New("FUSE program without a line: set Config.Line")
	case c.MaxWrite < 0 || c.MaxWrite > LimitMaxWrite || c.MaxWrite%pageSize != 0:
		return fmt.Errorf("largest write of %d bytes: expected a multiple of %d up to %d, or 0", c.MaxWrite, pageSize, LimitMaxWrite)
	case c.Timeout < 0 || c.StartTimeout < 0 || c.RestartWait < 0:
		return errors.New("negative time limit: expected a positive one, or 0")
	case c.MaxNodes < 0:
		return errors.New("negative limit of nodes: expected a positive one, or 0")
	}
	return nil
}

// Bridge is a FUSE program as a backend.
type Bridge struct {
	cfg  Config
	log  *ratelog.Logger
	stop context.CancelFunc
	done chan struct{} // the goroutine that takes connections has ended

	watchers sync.WaitGroup // of connections

	current atomic.Pointer[conn]
	guest   atomic.Uint64 // the INIT flags that the guest has in force
	first   uint64        // those agreed on with the first program, which the guest relies on

	// what a program is known not to do, of which it need not be asked again
	noOpen, noOpendir, noFlush atomic.Bool

	reqs, bursts sync.Pool // of *request, *burst

	mu       sync.Mutex
	closed   bool
	arrival  chan struct{} // closed when current changes
	nodes    map[uint64]*node
	idle     idleList
	root     *node
	handles  map[uint64]*handle
	rests    int // handles with something left over of a listing
	lastNode uint64
	lastFh   uint64
}

// New waits for the program's first connection and agrees with it on how to speak, or returns an error when ctx ends.
func New(ctx context.Context, cfg Config) (*Bridge, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.Timeout = cmp.Or(cfg.Timeout, 30*time.Second)
	cfg.StartTimeout = cmp.Or(cfg.StartTimeout, 30*time.Second)
	cfg.RestartWait = cmp.Or(cfg.RestartWait, 2*time.Second)
	cfg.MaxWrite = cmp.Or(cfg.MaxWrite, DefaultMaxWrite)
	cfg.MaxNodes = cmp.Or(cfg.MaxNodes, 1<<20)
	root := &node{id: fuseproto.FUSE_ROOT_ID, typ: unix.S_IFDIR}
	b := &Bridge{
		cfg: cfg, log: ratelog.New(cfg.Log, time.Second, 10),
		done:    make(chan struct{}),
		arrival: make(chan struct{}),
		nodes:   map[uint64]*node{root.id: root}, root: root,
		handles:  make(map[uint64]*handle),
		lastNode: root.id,
	}
	c, err := b.connect(ctx)
	if err != nil {
		return nil, err
	}
	b.first = c.flags
	b.publish(c)
	run, stop := context.WithCancel(context.Background())
	b.stop = stop
	go b.accept(run)
	return b, nil
}

// connect takes the next connection and agrees on how to speak.
func (b *Bridge) connect(ctx context.Context) (*conn, error) {
	f, err := b.cfg.Line.Next(ctx)
	if err != nil {
		return nil, fmt.Errorf("wait for the program: %w", err)
	}
	c, err := newConn(b, f)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	if err := c.negotiate(ctx); err != nil {
		c.kill()
		c.unref()
		return nil, err
	}
	return c, nil
}

// accept takes the connections of restarted programs, until Close.
func (b *Bridge) accept(ctx context.Context) {
	defer close(b.done)
	for {
		c, err := b.connect(ctx)
		if ctx.Err() != nil {
			if err == nil {
				c.kill()
				c.unref()
			}
			return
		}
		switch {
		case err == nil && c.flags&b.first&relied != b.first&relied:
			b.log.Error("restarted program does less than before, which the guest relies on: not used", "had", fmt.Sprintf("%#x", b.first), "has", fmt.Sprintf("%#x", c.flags))
			c.kill()
			c.unref()
		case err == nil:
			b.publish(c)
		case errors.Is(err, errProgram):
			b.log.Error("started program is of no use", "error", err) // its socket is shut: there will be another
		default:
			b.log.Error("there will be no other program: requests fail from here on", "error", err)
			return
		}
	}
}

// publish makes c the connection that requests use.
func (b *Bridge) publish(c *conn) {
	c.refs.Add(1)
	b.watchers.Go(c.watch)
	old := b.current.Swap(c)
	b.mu.Lock()
	close(b.arrival)
	b.arrival = make(chan struct{})
	closed := b.closed
	b.mu.Unlock()
	if old != nil {
		old.kill()
		old.unref()
	}
	if closed {
		c.kill()
	}
}

// live returns the connection, with a reference, once there is one.
func (b *Bridge) live(cancel <-chan struct{}) (*conn, fsbackend.Errno) {
	if c := b.current.Load(); c != nil && c.use() {
		return c, fsbackend.OK
	}
	timer := time.NewTimer(b.cfg.RestartWait)
	defer timer.Stop()
	for {
		b.mu.Lock()
		arrival, closed := b.arrival, b.closed
		b.mu.Unlock()
		if closed {
			return nil, unix.EIO
		}
		if c := b.current.Load(); c != nil && c.use() {
			return c, fsbackend.OK
		}
		select {
		case <-arrival:
		case <-cancel:
			return nil, unix.EINTR
		case <-timer.C:
			return nil, unix.EIO
		}
	}
}

// Init implements fsbackend.Initer.
func (b *Bridge) Init(f fsbackend.Features) { b.guest.Store(f.Flags) }

// Stats implements fsbackend.Statser. What descriptors the program has, it alone knows.
func (b *Bridge) Stats() fsbackend.Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	return fsbackend.Stats{Inodes: uint64(len(b.nodes)), FDs: fsbackend.FDs{Open: uint64(len(b.handles))}}
}

// Close implements fsbackend.Backend: the program is told that it is unmounted, and its socket shut.
func (b *Bridge) Close() error {
	b.Reset()
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.stop()
	c := b.current.Load()
	if c.use() {
		c.destroy()
		c.unref()
	}
	c.kill()
	<-b.done
	// accept may have published another one meanwhile; publish has killed c then.
	c = b.current.Load()
	c.kill()
	c.unref()
	b.watchers.Wait()
	return nil
}

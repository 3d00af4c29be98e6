package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// SocketFD is the descriptor at which a plug-in finds its socket.
const SocketFD = 3

// greetTime is how long the other side's hello may take, and endTime its taking the last replies.
const (
	greetTime = 30 * time.Second
	endTime   = 10 * time.Second
)

// maxListings is how many directories the server may have open at a time.
const maxListings = 1024

// Main serves p to whoever has started this program, until it is told to end. What goes wrong with p is written to the
// standard error.
func Main(p Plugin) error {
	typ, err := unix.GetsockoptInt(SocketFD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || typ != unix.SOCK_SEQPACKET {
		return fmt.Errorf("descriptor %d is no SOCK_SEQPACKET socket: this is a layer plug-in, which Sluice starts (--plugin)", SocketFD)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	return Serve(ctx, os.NewFile(SocketFD, "sluice"), p, slog.New(slog.NewTextHandler(os.Stderr, nil)))
}

// Serve takes f over, one end of a SOCK_SEQPACKET socket, and serves p to the other one until that is closed, tells it to end,
// or sends what it must not. Calls of p have ended then. log is told when p panics, once a second at most; nil drops that.
func Serve(ctx context.Context, f *os.File, p Plugin, log *slog.Logger) error {
	conn, err := NewConn(f)
	if err != nil {
		return err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(ctx)
	s := &server{
		conn: conn, plugin: p, log: log, ctx: ctx,
		calls: make(map[uint64]context.CancelFunc), layers: make(map[uint32]*loaded), listings: make(map[uint64]*listing),
	}
	closeConn := sync.OnceFunc(func() { _ = conn.Close() })
	stop := context.AfterFunc(ctx, closeConn)
	err = s.greet()
	if err == nil {
		err = s.run()
	}
	stop()
	cancel()
	if err != nil {
		closeConn()
	} else {
		_ = conn.f.SetWriteDeadline(time.Now().Add(endTime))
	}
	s.end()
	if err == nil {
		b, _ := (&Reply{Op: OpRelease, ID: s.releaseID}).Append(nil)
		err = conn.Send(b, -1)
	}
	closeConn()
	if r, ok := p.(Releaser); ok {
		r.Release()
	}
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, os.ErrClosed), errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return nil // the server has gone, or this side was told to
	case err != nil:
		return fmt.Errorf("serve layers: %w", err)
	}
	return nil
}

// server is a connection that a Plugin is served over.
type server struct {
	conn    *Conn
	plugin  Plugin
	log     *slog.Logger
	lastLog atomic.Int64 // nanoseconds of the last panic logged
	ctx     context.Context

	running   sync.WaitGroup
	releaseID uint64

	mu       sync.Mutex
	calls    map[uint64]context.CancelFunc
	layers   map[uint32]*loaded
	listings map[uint64]*listing
	lastDir  uint64
}

// loaded is a layer that the server has loaded.
type loaded struct {
	Layer
	calls sync.WaitGroup // begun while it is in server.layers
}

// listing is a directory that the server has open.
type listing struct {
	layer   uint32
	entries []DirEntry
}

func (s *server) greet() error {
	mine := &Hello{Proto: Proto, Name: s.plugin.Name()}
	for op := range opEnd {
		if op != 0 {
			mine.Ops = append(mine.Ops, op.String())
		}
	}
	if n, ok := s.plugin.(Needer); ok {
		mine.Needs = n.Needs()
	}
	ctx, cancel := context.WithTimeout(s.ctx, greetTime)
	defer cancel()
	_, err := s.conn.Greet(ctx, mine)
	return err
}

// run answers requests until there are no more (nil: the server has asked for the end).
func (s *server) run() error {
	b := make([]byte, MaxMessage)
	for {
		n, fd, err := s.conn.Receive(b)
		if err != nil {
			return err
		}
		q, err := ParseRequest(b[:n])
		if fd >= 0 {
			_ = unix.Close(fd)
			err = fmt.Errorf("a descriptor came with request %s", q.Op)
		}
		if err == nil {
			switch q.Op {
			case OpCancel:
				s.mu.Lock()
				if cancel := s.calls[q.Target]; cancel != nil {
					cancel()
				}
				s.mu.Unlock()
				continue
			case OpRelease:
				s.releaseID = q.ID
				return nil
			}
			err = s.begin(&q)
		}
		if err != nil {
			return err
		}
	}
}

// begin answers q in a goroutine.
func (s *server) begin(q *Request) error {
	ctx, cancel := context.WithCancel(s.ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.calls) >= MaxRequests || s.calls[q.ID] != nil {
		cancel()
		return fmt.Errorf("request %d while %d others wait: expected at most %d, and numbers of their own", q.ID, len(s.calls), MaxRequests)
	}
	s.calls[q.ID] = cancel
	s.running.Go(func() {
		defer cancel()
		s.answer(ctx, q)
	})
	return nil
}

// answer answers q.
func (s *server) answer(ctx context.Context, q *Request) {
	a := &Reply{Op: q.Op, ID: q.ID}
	opened, err := s.call(ctx, q, a)
	fd := -1
	if opened != nil {
		defer opened.Close()
		fd = int(opened.Fd())
	}
	b, big := []byte(nil), err
	if err == nil {
		b, big = a.Append(nil)
	}
	if big != nil {
		fd = -1
		b, _ = (&Reply{Op: q.Op, ID: q.ID, Errno: errnoOf(big)}).Append(nil)
	}
	// The number is free as soon as the server has the reply.
	s.mu.Lock()
	delete(s.calls, q.ID)
	s.mu.Unlock()
	if s.conn.Send(b, fd) != nil {
		_ = s.conn.Close()
	}
}

// errnoOf is the errno of an error of a Plugin.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	switch {
	case errors.Is(err, context.Canceled):
		return unix.EINTR
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return unix.ETIMEDOUT
	case errors.As(err, &errno) && errno > 0 && errno <= MaxErrno:
		return errno
	case errors.Is(err, fs.ErrNotExist):
		return unix.ENOENT
	case errors.Is(err, fs.ErrPermission):
		return unix.EACCES
	}
	return unix.EIO
}

// call has the plug-in answer q, and returns the descriptor that goes with the reply.
func (s *server) call(ctx context.Context, q *Request, a *Reply) (opened *os.File, err error) {
	defer func() {
		r := recover()
		if r == nil {
			return
		}
		opened, err = nil, unix.EIO
		now, last := time.Now().UnixNano(), s.lastLog.Load()
		if now-last >= int64(time.Second) && s.lastLog.CompareAndSwap(last, now) {
			s.log.Error("layer plug-in panicked", "plugin", s.plugin.Name(), "operation", q.Op.String(), "path", q.Path, "panic", r, "stack", string(debug.Stack()))
		}
	}()
	switch q.Op {
	case OpNumLayers:
		n, err := s.plugin.NumLayers(ctx, q.Data, q.Path)
		if err == nil && (n < 1 || n > MaxLayers) {
			err = fmt.Errorf("%d layers", n)
		}
		a.Layers = uint32(n)
		return nil, err
	case OpLoad:
		return s.load(ctx, q, a)
	case OpCleanup:
		return nil, s.cleanup(q.Layer)
	}
	l := s.use(q.Layer)
	if l == nil {
		return nil, unix.ESTALE
	}
	defer l.calls.Done()
	switch layer := l.Layer.(type) {
	case Tree:
		return s.callTree(ctx, layer, q, a)
	case Directory:
		switch q.Op {
		case OpLookup:
			return nil, layer.Lookup(ctx, q.Path)
		case OpOpen:
			return nil, layer.Open(ctx, q.Path)
		}
	}
	return nil, unix.EOPNOTSUPP
}

// use returns a layer for the time of a call.
func (s *server) use(number uint32) *loaded {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.layers[number]
	if l != nil {
		l.calls.Add(1)
	}
	return l
}

func (s *server) load(ctx context.Context, q *Request, a *Reply) (*os.File, error) {
	layer, err := s.plugin.Load(ctx, q.Data, q.Path, int(q.Index))
	if err != nil {
		return nil, err
	}
	var dir *os.File
	switch l := layer.(type) {
	case Tree:
		if _, ok := l.(XattrReader); ok {
			a.Flags |= LayerXattr
		}
	case Directory:
		a.Flags |= LayerDirectory
		if dir = l.Dir(); dir == nil {
			return nil, errors.Join(errors.New("a Directory without one"), layer.Close())
		}
	default:
		return nil, errors.Join(fmt.Errorf("layer is a %T, expected a Tree or a Directory", layer), layer.Close())
	}
	info := layer.Info()
	if info.ACL {
		a.Flags |= LayerACL
	}
	if info.StableIno {
		a.Flags |= LayerStableIno
	}
	a.Dev = info.Dev
	s.mu.Lock()
	taken := s.layers[q.Layer] != nil
	if !taken {
		s.layers[q.Layer] = &loaded{Layer: layer}
	}
	s.mu.Unlock()
	if taken {
		return nil, errors.Join(unix.EEXIST, layer.Close())
	}
	return dup(dir)
}

// dup returns another descriptor of f, for the reply: the layer may be gone before that is sent. A nil f has none.
func dup(f *os.File) (*os.File, error) {
	if f == nil {
		return nil, nil
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// cleanup ends a layer once nothing uses it.
func (s *server) cleanup(number uint32) error {
	s.mu.Lock()
	l := s.layers[number]
	delete(s.layers, number)
	for dir, open := range s.listings {
		if open.layer == number {
			delete(s.listings, dir)
		}
	}
	s.mu.Unlock()
	if l == nil {
		return unix.ESTALE
	}
	l.calls.Wait()
	return l.Close()
}

// end waits for the calls that run and ends all layers.
func (s *server) end() {
	s.running.Wait()
	for _, l := range s.layers {
		_ = l.Close()
	}
}

func (s *server) callTree(ctx context.Context, layer Tree, q *Request, a *Reply) (opened *os.File, err error) {
	xattrs, _ := layer.(XattrReader)
	switch q.Op {
	case OpStatat:
		a.Attr, err = layer.Stat(ctx, q.Path)
	case OpOpendir:
		a.Dir, err = s.opendir(ctx, layer, q)
	case OpReaddir:
		err = s.readdir(q, a)
	case OpClosedir:
		s.mu.Lock()
		delete(s.listings, q.Dir)
		s.mu.Unlock()
	case OpOpenat:
		if q.Flags&unix.O_ACCMODE != unix.O_RDONLY {
			return nil, unix.EROFS
		}
		if a.Attr, err = layer.Stat(ctx, q.Path); err == nil {
			opened, err = layer.Open(ctx, q.Path)
		}
		if err == nil && opened == nil {
			err = unix.EIO
		}
	case OpReadlinkat:
		var target string
		target, err = layer.Readlink(ctx, q.Path)
		a.Bytes = []byte(target)
	case OpListxattr:
		if xattrs == nil {
			return nil, unix.EOPNOTSUPP
		}
		var names []string
		names, err = xattrs.Listxattr(ctx, q.Path)
		for _, name := range names {
			a.Bytes = append(append(a.Bytes, name...), 0)
		}
	case OpGetxattr:
		if xattrs == nil {
			return nil, unix.EOPNOTSUPP
		}
		a.Bytes, err = xattrs.Getxattr(ctx, q.Path, q.Name)
	default:
		err = unix.EOPNOTSUPP
	}
	return opened, err
}

func (s *server) opendir(ctx context.Context, layer Tree, q *Request) (uint64, error) {
	entries, err := layer.ReadDir(ctx, q.Path)
	if err != nil {
		return 0, err
	}
	for i := range entries {
		if name := entries[i].Name; !listable(name) {
			return 0, fmt.Errorf("the name %q cannot be in a directory", name)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.listings) >= maxListings {
		return 0, unix.ENFILE
	}
	s.lastDir++
	s.listings[s.lastDir] = &listing{layer: q.Layer, entries: entries}
	return s.lastDir, nil
}

// readdir answers with the entries after q.Cookie, which counts them, that fit.
func (s *server) readdir(q *Request, a *Reply) error {
	s.mu.Lock()
	l := s.listings[q.Dir]
	s.mu.Unlock()
	if l == nil || l.layer != q.Layer {
		return unix.EBADF
	}
	room := int(q.Size) - 8
	for i := q.Cookie; i < uint64(len(l.entries)); i++ {
		e := l.entries[i]
		e.Cookie = i + 1
		if q.Flags&ReaddirPlus == 0 {
			e.Attr = nil
		}
		if room -= e.size(); room < 0 {
			return nil
		}
		a.Entries = append(a.Entries, e)
	}
	a.EOF = true
	return nil
}

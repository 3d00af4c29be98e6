package fusebridge

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/internal/sys"
)

// errProgram is an error of one run of the program: the next one may do better.
var errProgram = errors.New("the program does not speak FUSE as expected")

const (
	// tick is how often time limits are looked after while requests wait.
	tick = 100 * time.Millisecond
	// quiet is after how long without a message the watcher waits for the next one in the kernel.
	quiet = 20 * time.Millisecond
	// maxLate and maxUnsolicited are how many requests may be given up whose replies have not come, and how many replies may come
	// that nobody has asked for, until the program is taken for broken.
	maxLate        = 1024
	maxUnsolicited = 1024
)

// A conn is the connection to one run of the program.
//
// Whoever waits for a reply reads replies, his own and those of others: the leader. There is one at a time, and one whenever
// somebody waits. So a request on its own costs two system calls and no change of threads here.
type conn struct {
	b    *Bridge
	f    *os.File
	fd   int
	refs atomic.Int64

	// what INIT has agreed on
	minor             uint32
	flags             uint64
	maxRead, maxWrite int

	unique  atomic.Uint64
	pace    [64]atomic.Int32 // by operation: how quick answers were lately
	bare    atomic.Bool      // its READDIRPLUS looks nothing up: it is libfuse's high level
	missing atomic.Uint64    // operations that the program has answered ENOSYS, by number
	sinks   atomic.Int32     // requests in flight whose data go to the guest's memory
	heard   atomic.Uint64    // messages received
	byRaw   map[uint64]*node
	timeout time.Duration

	mu          sync.Mutex
	dead        bool
	leading     bool
	waiters     int // pending requests that are waited for, but for who leads
	pending     map[uint64]*request
	late        map[uint64]late // given up, and the reply may still come
	unsolicited int
	forgets     []fuseproto.ForgetOne // there was no room for them in the socket
	posts       [][]byte              // likewise

	// the leader's
	in     []byte
	msg    sys.Message
	ticked time.Time
}

// late is what is to be done about the reply to a request that nobody waits for: who it was about.
type late struct {
	op    fuseproto.Opcode
	raw   uint64
	since time.Time
}

// A request is a request to the program, or may be one again.
type request struct {
	c      *conn
	op     fuseproto.Opcode
	buf    []byte // the request
	raw    uint64
	unique uint64

	sink     *fsbackend.Sink // where a reply's data go, if not to reply
	room     int             // how many of them
	counted  bool            // in conn.sinks
	reply    []byte          // the reply without its header
	got      int             // bytes of data in sink
	max      int             // bytes that the reply may have
	errno    fsbackend.Errno
	cancel   <-chan struct{}
	deadline time.Time
	told     bool // INTERRUPT was sent

	done    bool // under conn.mu
	waiting bool // likewise: for wake
	wake    chan struct{}
	msg     *sys.Message // of WRITE
}

func newConn(b *Bridge, f *os.File) (*conn, error) {
	fd := int(f.Fd())
	if err := unix.SetNonblock(fd, false); err != nil {
		return nil, fmt.Errorf("make the program's socket block: %w", err)
	}
	wait := unix.NsecToTimeval(int64(tick))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return nil, fmt.Errorf("limit waiting for the program: %w", err)
	}
	c := &conn{
		b: b, f: f, fd: fd,
		byRaw:   map[uint64]*node{},
		timeout: b.cfg.Timeout,
		pending: map[uint64]*request{}, late: map[uint64]late{},
		in:      make([]byte, max(b.cfg.MaxWrite, xattrSizeMax)+headroom),
		maxRead: pageSize, maxWrite: pageSize,
	}
	c.refs.Store(1)
	return c, nil
}

// use takes a reference, unless the connection is dead.
func (c *conn) use() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return false
	}
	c.refs.Add(1)
	return true
}

// unref gives one back. The last one closes the descriptor: nobody may use a number that could be another file's by then.
func (c *conn) unref() {
	if c.refs.Add(-1) == 0 {
		_ = c.f.Close()
	}
}

// kill ends the connection: who leads sees the end of it and fails what is in flight.
func (c *conn) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.dead {
		c.dead = true
		_ = unix.Shutdown(c.fd, unix.SHUT_RDWR)
	}
}

// broken is kill for a program that does not keep to the protocol.
func (c *conn) broken(what string, args ...any) {
	c.b.log.Error("FUSE program breaks the protocol: its socket is shut", append([]any{"what", what}, args...)...)
	c.kill()
}

// request returns a request for raw. end gives it back, and the caller's reference to the connection.
func (c *conn) request(ctx *fsbackend.Context, raw uint64) *request {
	r, _ := c.b.reqs.Get().(*request)
	if r == nil {
		r = &request{buf: make([]byte, 0, 1024), wake: make(chan struct{}, 1)}
	}
	r.c, r.raw = c, raw
	r.cancel = ctx.Cancel
	return r
}

// reset makes a request one that has not been sent.
func (r *request) reset() {
	select {
	case <-r.wake:
	default:
	}
	r.got, r.errno, r.told, r.done, r.waiting = 0, 0, false, false, false
	r.reply = r.reply[:0]
}

// end gives a request back.
func (r *request) end() {
	c := r.c
	if cap(r.reply) > LimitMaxWrite {
		r.reply = nil
	}
	r.c, r.sink, r.room, r.cancel = nil, nil, 0, nil
	c.b.reqs.Put(r)
	c.unref()
}

// name appends a name and its NUL.
func (r *request) name(n fsbackend.Name) {
	r.buf = append(append(r.buf, n...), 0)
}

// call sends the request and returns when it is answered: with exactly size bytes, or with up to size if variable.
func (r *request) call(ctx *fsbackend.Context, size int, variable bool) fsbackend.Errno {
	return r.exchange(ctx, size, variable, nil, 0)
}

// exchange is call with n bytes of src behind the request.
func (r *request) exchange(ctx *fsbackend.Context, size int, variable bool, src *fsbackend.Source, n int) fsbackend.Errno {
	began := time.Now()
	if errno := r.start(ctx, size, src, n); errno != 0 {
		return errno
	}
	errno := r.finish(variable)
	r.c.answered(r.op, time.Since(began), errno)
	return errno
}

// start sends the request, whose reply has up to size bytes: it must be finished.
func (r *request) start(ctx *fsbackend.Context, size int, src *fsbackend.Source, n int) fsbackend.Errno {
	c := r.c
	r.max = size
	r.reset()
	r.unique = c.unique.Add(2) // an odd one is an INTERRUPT's
	h := header(r.buf)
	*h = fuseproto.InHeader{Length: uint32(len(r.buf) + n), Opcode: uint32(r.op), Unique: r.unique, NodeId: r.raw, Caller: ctx.Caller}
	h.Caller.Pid = 0 // none of the host's
	if o := c.b.cfg.Owner; o != nil {
		h.Caller = *o
	}
	deadline := time.Now().Add(c.timeout)
	r.deadline = deadline // who leads may set another
	c.mu.Lock()
	if c.dead {
		c.mu.Unlock()
		return unix.EIO
	}
	c.pending[r.unique] = r
	c.mu.Unlock()
	if r.counted = r.sink != nil; r.counted {
		c.sinks.Add(1)
	}
	errno := r.send(deadline, src, n)
	if errno == 0 {
		return fsbackend.OK
	}
	// Nobody should answer it, but something might bear its number all the same, and who leads be at it.
	if r.counted {
		c.kill()
		c.wait(r)
		c.sinks.Add(-1)
		return errno
	}
	c.mu.Lock()
	delete(c.pending, r.unique)
	c.mu.Unlock()
	return errno
}

// finish returns when a request that was started is answered.
func (r *request) finish(variable bool) fsbackend.Errno {
	c := r.c
	c.wait(r)
	if r.counted {
		c.sinks.Add(-1)
	}
	if r.errno != 0 {
		return r.errno
	}
	if got := r.got + len(r.reply); !variable && got != r.max {
		c.broken("length of a reply", "operation", r.op.String(), "bytes", got, "expected", r.max)
		return unix.EIO
	}
	return fsbackend.OK
}

// send sends the request. It waits for room in the socket no longer than for a reply.
func (r *request) send(deadline time.Time, src *fsbackend.Source, n int) fsbackend.Errno {
	c := r.c
	for {
		var errno fsbackend.Errno
		if src == nil {
			errno = sendTo(c.fd, r.buf)
		} else {
			if r.msg == nil {
				r.msg = new(sys.Message)
			}
			errno = src.SendMsg(r.msg, c.fd, r.buf, n, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		}
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
		case unix.EPIPE, unix.ECONNRESET, unix.ENOTCONN:
			c.kill()
			return unix.EIO
		default:
			return errno
		}
		if time.Now().After(deadline) || closed(r.cancel) {
			return unix.EIO
		}
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLOUT}}
		_, _ = unix.Poll(fds, int(tick/time.Millisecond))
		// Who leads makes room by reading what keeps the program from reading, and so do we.
		c.drain()
	}
}

// sendTo sends a message without waiting.
func sendTo(fd int, b []byte) fsbackend.Errno {
	err := unix.Send(fd, b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	if err == nil {
		return fsbackend.OK
	}
	if errno, ok := err.(unix.Errno); ok {
		return errno
	}
	return unix.EIO
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// wait returns when r is done, and leads if nobody does.
func (c *conn) wait(r *request) {
	for {
		c.mu.Lock()
		if r.done {
			c.mu.Unlock()
			return
		}
		if c.leading {
			if !r.waiting {
				r.waiting = true
				c.waiters++
			}
			c.mu.Unlock()
			<-r.wake
			continue
		}
		c.leading = true
		c.unwait(r)
		c.mu.Unlock()
		for !r.done { // only who leads sets it
			if !c.receive(0) {
				c.fail()
			}
		}
		c.resign()
	}
}

// drain handles what has come, unless somebody else does. It reports whether the connection has ended.
func (c *conn) drain() (ended bool) {
	c.mu.Lock()
	if c.leading {
		c.mu.Unlock()
		return false
	}
	c.leading = true
	c.mu.Unlock()
	for {
		before := c.heard.Load()
		if !c.receive(unix.MSG_DONTWAIT) {
			c.fail()
			ended = true
			break
		}
		if c.heard.Load() == before {
			break
		}
	}
	c.resign()
	return ended
}

// resign ends leading and has one of those who wait lead.
func (c *conn) resign() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leading = false
	if c.waiters == 0 {
		return
	}
	for _, r := range c.pending {
		if r.waiting { // the others have yet to come to it
			c.notify(r)
			return
		}
	}
}

// notify wakes who waits for r, or will.
func (c *conn) notify(r *request) {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// unwait notes that nobody waits for r. c.mu is held.
func (c *conn) unwait(r *request) {
	if r.waiting {
		r.waiting = false
		c.waiters--
	}
}

// complete ends a request. c.mu is held, and r no longer pending.
func (c *conn) complete(r *request, errno fsbackend.Errno) {
	c.unwait(r)
	r.errno = errno
	r.done = true
	c.notify(r)
}

// fail ends all requests, for there will be no answers any more.
func (c *conn) fail() {
	c.kill()
	c.mu.Lock()
	defer c.mu.Unlock()
	for u, r := range c.pending {
		delete(c.pending, u)
		c.complete(r, unix.EIO)
	}
}

// watch handles what a program says while nobody waits for it, and sees its end.
func (c *conn) watch() {
	defer c.unref()
	fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}
	for {
		wait := -1
		if c.backlog() {
			wait = int(quiet / time.Millisecond) // and then there may be room
		}
		_, _ = unix.Poll(fds, wait)
		c.flush()
		for {
			before := c.heard.Load()
			if c.drain() {
				return
			}
			c.mu.Lock()
			over := c.dead && !c.leading && len(c.pending) == 0
			c.mu.Unlock()
			if over {
				return
			}
			time.Sleep(quiet)
			if c.heard.Load() == before {
				break
			}
		}
	}
}

// receive takes one message off the socket and handles it. It reports false at the end. It is the leader's.
func (c *conn) receive(flags int) bool {
	var n, received int
	var errno fsbackend.Errno
	var r *request
	if c.sinks.Load() > 0 {
		// Its header says whose memory it is for.
		c.msg.Reset(c.in[:outHeaderSize])
		n, _, errno = c.msg.Receive(c.fd, flags|unix.MSG_PEEK)
		if errno == 0 && n == outHeaderSize {
			r = c.sinkOf(c.in)
			flags |= unix.MSG_DONTWAIT
		}
	}
	switch {
	case errno != 0:
	case r != nil:
		n, received, errno = r.sink.ReceiveMsg(&c.msg, c.fd, c.in[:outHeaderSize], r.room, flags)
		switch errno {
		case unix.EIO: // the guest's memory has been taken away from the call, and the message is still there
			r.sink, r.room = nil, 0
			return true
		case unix.EFAULT: // the memory is not there any more, and neither is the message
			c.mu.Lock()
			delete(c.pending, r.unique)
			c.complete(r, errno)
			c.mu.Unlock()
			return true
		}
	default:
		c.msg.Reset(c.in)
		n, received, errno = c.msg.Receive(c.fd, flags)
	}
	now := time.Now()
	if now.Sub(c.ticked) >= tick {
		c.ticked = now
		c.look(now)
	}
	switch {
	case errno == unix.EAGAIN || errno == unix.EINTR:
		return true
	case errno != 0 || n == 0:
		return false
	}
	c.heard.Add(1)
	if n < outHeaderSize || received&unix.MSG_TRUNC != 0 {
		c.broken("size of a message", "bytes", n)
		return true
	}
	var h fuseproto.OutHeader
	decode(c.in, &h)
	if int(h.Length) != n {
		// One that sends files by way of pipes, for want of the filter that keeps it from that, comes to this as well.
		c.broken("length in a message", "says", h.Length, "bytes", n)
		return true
	}
	if r != nil {
		c.mu.Lock()
		delete(c.pending, r.unique)
		r.got = n - outHeaderSize
		c.complete(r, fsbackend.OK)
		c.mu.Unlock()
		return true
	}
	c.dispatch(&h, c.in[outHeaderSize:n])
	return true
}

// sinkOf returns the request that a message, of which the header is in b, has data for, or nil.
func (c *conn) sinkOf(b []byte) *request {
	var h fuseproto.OutHeader
	decode(b, &h)
	if h.Unique == 0 || h.Status != 0 {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.pending[h.Unique]; r != nil && r.sink != nil {
		return r
	}
	return nil
}

// dispatch handles a message, which is gone afterwards.
func (c *conn) dispatch(h *fuseproto.OutHeader, payload []byte) {
	if h.Unique == 0 {
		c.notification(h.Status, payload)
		return
	}
	c.mu.Lock()
	r := c.pending[h.Unique]
	if r == nil {
		l, ok := c.late[h.Unique]
		delete(c.late, h.Unique)
		if !ok && h.Unique&1 == 0 {
			c.unsolicited++
		}
		flood := c.unsolicited > maxUnsolicited
		c.mu.Unlock()
		if flood {
			c.broken("replies to nothing", "number", maxUnsolicited)
		}
		if ok && h.Status == 0 {
			c.undo(l, payload)
		}
		return
	}
	defer c.mu.Unlock()
	delete(c.pending, h.Unique)
	errno := errnoOf(h.Status)
	if errno == 0 && len(payload) > r.max {
		errno = unix.EIO
	}
	if errno == 0 && len(payload) > 0 {
		if r.sink != nil && r.sink.Write(payload) < len(payload) {
			errno = unix.EIO
		} else if r.sink != nil {
			r.got = len(payload)
		} else {
			r.reply = append(r.reply[:0], payload...)
		}
	}
	c.complete(r, errno)
}

// look looks after time limits, and sends what there was no room for. It is the leader's.
func (c *conn) look(now time.Time) {
	c.flush()
	var interrupt []uint64
	stuck := false
	c.mu.Lock()
	for u, r := range c.pending {
		over, unwanted := now.After(r.deadline), closed(r.cancel)
		if (over || unwanted || now.After(r.deadline.Add(-c.timeout/16))) && !r.told {
			r.told = true
			interrupt = append(interrupt, u)
			if unwanted && !over {
				r.deadline = now.Add(min(r.deadline.Sub(now), time.Second))
			}
		}
		if over {
			delete(c.pending, u)
			c.late[u] = late{op: r.op, raw: r.raw, since: now}
			c.complete(r, unix.EIO)
			c.b.log.Error("FUSE program did not answer in time", "operation", r.op.String(), "limit", c.timeout)
		}
	}
	for _, l := range c.late {
		stuck = stuck || now.Sub(l.since) > c.timeout
	}
	stuck = stuck || len(c.late) > maxLate
	c.mu.Unlock()
	for _, u := range interrupt {
		in := fuseproto.InterruptIn{Unique: u}
		in.InHeader = fuseproto.InHeader{Length: uint32(sizeOf[fuseproto.InterruptIn]()), Opcode: uint32(fuseproto.FUSE_INTERRUPT), Unique: u | 1}
		_ = sendTo(c.fd, bytesOf(&in)) // without room it would not be read anyway
	}
	if stuck {
		c.broken("requests without an answer, ever")
	}
}

// undo gives back what the program has given to a request that was given up.
func (c *conn) undo(l late, payload []byte) {
	switch l.op {
	case fuseproto.FUSE_LOOKUP, fuseproto.FUSE_MKNOD, fuseproto.FUSE_MKDIR, fuseproto.FUSE_SYMLINK, fuseproto.FUSE_LINK:
		c.undoEntry(payload)
	case fuseproto.FUSE_CREATE, fuseproto.FUSE_TMPFILE:
		if raw := c.undoEntry(payload); raw != 0 && len(payload) >= entryOutSize+sizeOf[fuseproto.OpenOut]() {
			c.undoOpen(fuseproto.FUSE_RELEASE, raw, payload[entryOutSize:])
		}
	case fuseproto.FUSE_OPEN:
		c.undoOpen(fuseproto.FUSE_RELEASE, l.raw, payload)
	case fuseproto.FUSE_OPENDIR:
		c.undoOpen(fuseproto.FUSE_RELEASEDIR, l.raw, payload)
	case fuseproto.FUSE_READDIRPLUS:
		var d dirent
		for ok := true; ok; {
			if payload, ok, _ = d.next(payload, true); ok && !isDots(d.name) {
				c.forget(d.entry.NodeId, 1)
			}
		}
	}
}

func (c *conn) undoEntry(payload []byte) (raw uint64) {
	if len(payload) < entryOutSize {
		return 0
	}
	var e fuseproto.EntryOut
	decode(payload, &e)
	c.forget(e.NodeId, 1)
	return e.NodeId
}

func (c *conn) undoOpen(op fuseproto.Opcode, raw uint64, payload []byte) {
	if len(payload) < sizeOf[fuseproto.OpenOut]() {
		return
	}
	var o fuseproto.OpenOut
	decode(payload, &o)
	c.post(op, raw, &fuseproto.ReleaseIn{Fh: o.Fh})
}

// post has the program release a handle, without waiting: replies with odd numbers are passed over.
func (c *conn) post(op fuseproto.Opcode, raw uint64, in *fuseproto.ReleaseIn) {
	in.InHeader = fuseproto.InHeader{Length: uint32(sizeOf[fuseproto.ReleaseIn]()), Opcode: uint32(op), Unique: c.unique.Add(2) | 1, NodeId: raw}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.dead {
		c.posts = append(c.posts, bytes.Clone(bytesOf(in)))
		c.flushLocked()
	}
}

// forget gives n lookups of a node back to the program. It does not wait.
func (c *conn) forget(raw, n uint64) {
	if raw != 0 && raw != fuseproto.FUSE_ROOT_ID && n != 0 {
		c.forgetAll(fuseproto.ForgetOne{Nodeid: raw, Nlookup: n})
	}
}

// forgetAll is forget for many.
func (c *conn) forgetAll(nodes ...fuseproto.ForgetOne) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.dead {
		c.forgets = append(c.forgets, nodes...)
		c.flushLocked()
	}
}

// backlog says whether there is something that there was no room for.
func (c *conn) backlog() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.dead && len(c.forgets)+len(c.posts) > 0
}

// flush sends what is to be forgotten, as far as there is room.
func (c *conn) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flushLocked()
}

// maxForgets is how many go into a message: programs' buffers have room for 4 KiB at least.
const maxForgets = 200

func (c *conn) flushLocked() {
	for len(c.posts) > 0 && !c.dead {
		switch errno := sendTo(c.fd, c.posts[0]); errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN, unix.ENOBUFS:
			return // look tries again
		}
		c.posts = c.posts[1:]
	}
	for len(c.forgets) > 0 && !c.dead {
		n := 1
		var errno fsbackend.Errno
		if len(c.forgets) == 1 || c.minor < 16 {
			one := c.forgets[0]
			in := fuseproto.ForgetIn{Nlookup: one.Nlookup}
			in.InHeader = fuseproto.InHeader{Length: uint32(sizeOf[fuseproto.ForgetIn]()), Opcode: uint32(fuseproto.FUSE_FORGET), Unique: c.unique.Add(2), NodeId: one.Nodeid}
			errno = sendTo(c.fd, bytesOf(&in))
		} else {
			n = min(len(c.forgets), maxForgets)
			var in fuseproto.BatchForgetIn
			in.Count = uint32(n)
			size := sizeOf[fuseproto.BatchForgetIn]() + n*sizeOf[fuseproto.ForgetOne]()
			in.InHeader = fuseproto.InHeader{Length: uint32(size), Opcode: uint32(fuseproto.FUSE_BATCH_FORGET), Unique: c.unique.Add(2)}
			b := append(make([]byte, 0, size), bytesOf(&in)...)
			for i := range n {
				b = append(b, bytesOf(&c.forgets[i])...)
			}
			errno = sendTo(c.fd, b)
		}
		switch errno {
		case fsbackend.OK:
		case unix.EINTR:
			continue
		case unix.EAGAIN, unix.ENOBUFS:
			return // look tries again
		default:
			c.forgets = nil // it has gone, and its nodes with it
			return
		}
		if c.forgets = c.forgets[n:]; len(c.forgets) == 0 {
			c.forgets = nil // and what lies before it
		}
	}
}

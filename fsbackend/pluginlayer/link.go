package pluginlayer

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/plugin"
)

// link is the connection to one run of a plug-in. It ends with the first thing that is wrong with it.
type link struct {
	conn  *plugin.Conn
	has   [plugin.OpRelease + 1]bool
	slots chan struct{} // one for each request that the plug-in has not answered
	out   chan []byte   // messages to send
	dead  chan struct{} // closed when it has ended; err is set then
	err   error
	end   sync.Once
	done  sync.WaitGroup

	mu        sync.Mutex
	pending   map[uint64]*pending
	lastID    uint64
	abandoned int // of pending
}

// pending is a request that the plug-in has not answered.
type pending struct {
	op        plugin.Op
	abandoned bool        // nobody waits for it any more
	done      chan answer // with room for the one answer
}

// answer is a reply and the descriptor that came with it, if one did.
type answer struct {
	plugin.Reply
	file *sys.FD
}

// wait is how long a request may take.
type wait struct {
	cancel <-chan struct{} // closed when nobody waits any more
	limit  time.Duration   // 0: no limit but cancel
}

// queued is how many messages may wait to be sent. What a plug-in has answered it has read, and all that came before it; so there
// are at most the requests that it has not answered, their cancels, and those of the ones it answered since.
const queued = 3 * plugin.MaxRequests

// newLink takes conn over, over which hellos have gone.
func newLink(conn *plugin.Conn, hello *plugin.Hello) *link {
	l := &link{
		conn: conn, slots: make(chan struct{}, plugin.MaxRequests), out: make(chan []byte, queued),
		dead: make(chan struct{}), pending: make(map[uint64]*pending),
	}
	for op := range plugin.OpRelease {
		l.has[op+1] = hello.Has(op + 1)
	}
	l.done.Go(l.receive)
	l.done.Go(l.send)
	return l
}

// serves says what the plug-in lacks to serve a layer with these flags.
func (l *link) serves(flags uint32) error {
	needed := []plugin.Op{plugin.OpStatat, plugin.OpOpendir, plugin.OpReaddir, plugin.OpClosedir, plugin.OpOpenat}
	if flags&plugin.LayerDirectory != 0 {
		needed = []plugin.Op{plugin.OpLookup}
	}
	for _, op := range needed {
		if !l.has[op] {
			return fmt.Errorf("the plug-in does not answer %s: expected it among the ops of its hello", op)
		}
	}
	return nil
}

// fail ends the link.
func (l *link) fail(err error) {
	l.end.Do(func() {
		l.err = err
		_ = l.conn.Close()
		close(l.dead)
	})
}

// close ends the link and waits for its goroutines.
func (l *link) close() {
	l.fail(errors.New("closed"))
	l.done.Wait()
}

func (l *link) send() {
	for {
		select {
		case b := <-l.out:
			if err := l.conn.Send(b, -1); err != nil {
				l.fail(err)
				return
			}
		case <-l.dead:
			return
		}
	}
}

func (l *link) receive() {
	b := make([]byte, plugin.MaxMessage)
	for {
		n, fd, err := l.conn.Receive(b)
		if err != nil {
			l.fail(err)
			return
		}
		var file *sys.FD
		if fd >= 0 {
			file = sys.NewFD(fd)
		}
		reply, err := plugin.ParseReply(b[:n])
		if err == nil {
			reply.Bytes = bytes.Clone(reply.Bytes)
			err = l.deliver(answer{reply, file})
		}
		if err != nil {
			_ = file.Close()
			l.fail(err)
			return
		}
	}
}

// deliver gives an answer to who waits for it. What nobody waits for is dropped.
func (l *link) deliver(a answer) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.pending[a.ID]
	switch {
	case p == nil:
		return fmt.Errorf("a reply to request %d, which there is none of", a.ID)
	case p.op != a.Op:
		return fmt.Errorf("a reply to %s for request %d, which is %s", a.Op, a.ID, p.op)
	case a.file != nil && (a.Errno != 0 || !a.Op.HasFile()):
		return fmt.Errorf("a descriptor came with the reply to %s", a.Op)
	}
	delete(l.pending, a.ID)
	<-l.slots
	if p.abandoned {
		l.abandoned--
		_ = a.file.Close()
		return nil
	}
	p.done <- a
	return nil
}

// call asks the plug-in, and returns its answer, whose Errno is EIO if there is none, and EINTR if nobody waits any more. The
// answer's file is the caller's.
func (l *link) call(q plugin.Request, w wait) answer {
	var limit <-chan time.Time
	if w.limit > 0 {
		timer := time.NewTimer(w.limit)
		defer timer.Stop()
		limit = timer.C
	}
	if !l.has[q.Op] {
		return absent(q.Op)
	}
	failed := func(errno fsbackend.Errno) answer {
		return answer{Reply: plugin.Reply{Op: q.Op, Errno: errno}}
	}
	select {
	case l.slots <- struct{}{}:
	case <-l.dead:
		return failed(unix.EIO)
	case <-w.cancel:
		return failed(unix.EINTR)
	case <-limit:
		return failed(unix.EIO)
	}
	id, p, err := l.begin(&q)
	if err != nil {
		return failed(unix.EIO)
	}
	errno := unix.EIO
	select {
	case a := <-p.done:
		return a
	case <-l.dead:
	case <-w.cancel:
		errno = unix.EINTR
	case <-limit:
	}
	if !l.abandon(id, p) {
		return <-p.done // it came just now
	}
	return failed(errno)
}

// absent is the answer to what a plug-in does not answer. It need not care for the end of anything, and what is looked up in a
// directory may be whole at once.
func absent(op plugin.Op) answer {
	errno := unix.EOPNOTSUPP
	switch op {
	case plugin.OpCleanup, plugin.OpRelease, plugin.OpOpen:
		errno = 0
	}
	return answer{Reply: plugin.Reply{Op: op, Errno: errno}}
}

// begin sends q, which has a slot.
func (l *link) begin(q *plugin.Request) (uint64, *pending, error) {
	p := &pending{op: q.Op, done: make(chan answer, 1)}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lastID++
	q.ID = l.lastID
	b, err := q.Append(nil)
	if err != nil {
		<-l.slots
		return 0, nil, err
	}
	l.pending[q.ID] = p
	l.enqueue(b)
	return q.ID, p, nil
}

// enqueue has b sent.
func (l *link) enqueue(b []byte) {
	select {
	case l.out <- b:
	default:
		l.fail(errors.New("it has answered requests that it cannot have read"))
	}
}

// abandon says that nobody waits for p any more. It reports false if its answer is there.
func (l *link) abandon(id uint64, p *pending) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pending[id] != p {
		return false
	}
	p.abandoned = true
	l.abandoned++
	if l.abandoned == plugin.MaxRequests {
		l.fail(fmt.Errorf("%d requests are not answered, though nobody waits for them any more", l.abandoned))
	}
	if !l.has[plugin.OpCancel] {
		return true
	}
	if b, err := (&plugin.Request{Op: plugin.OpCancel, Target: id}).Append(nil); err == nil {
		l.enqueue(b)
	}
	return true
}

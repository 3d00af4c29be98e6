package virtiofs

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// replaceTimeout bounds how long a notifier's replacement waits for a write to it: only an fd that a front-end has filled
// up on purpose takes that long.
const replaceTimeout = time.Second

// notifier is a call or err fd: an eventfd, or the write end of a pipe from User-Mode Linux
// (arch/um/drivers/virtio_uml.c). It is counted, because it is written to without the queue's lock.
type notifier struct {
	fd   *sys.FD
	pipe bool
	refs atomic.Int32
	done chan struct{}
}

func newNotifier(fd *sys.FD) *notifier {
	n := &notifier{fd: fd, done: make(chan struct{})}
	n.refs.Store(1)
	var st unix.Stat_t
	n.pipe = unix.Fstat(fd.Int(), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO
	return n
}

// one is what an eventfd is signalled with, and a pipe takes just the same.
var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// notify signals the other side. A pipe that is full has signalled already.
func (n *notifier) notify() {
	if n.pipe && !n.writable() {
		return
	}
	for {
		// What else can go wrong is the peer's doing, and nothing here waits for the peer.
		if _, err := unix.Write(n.fd.Int(), one); err != unix.EINTR {
			return
		}
	}
}

func (n *notifier) writable() bool {
	fds := [1]unix.PollFd{{Fd: int32(n.fd.Int()), Events: unix.POLLOUT}}
	ready, err := unix.Poll(fds[:], 0)
	return err == nil && ready == 1 && fds[0].Revents&unix.POLLOUT != 0
}

func (n *notifier) retain() *notifier {
	if n != nil {
		n.refs.Add(1)
	}
	return n
}

// signal notifies and then releases n, which may be nil.
func (n *notifier) signal() {
	if n != nil {
		n.notify()
		n.release()
	}
}

func (n *notifier) release() {
	if n != nil && n.refs.Add(-1) == 0 {
		_ = n.fd.Close()
		close(n.done)
	}
}

// retire gives up the queue's own hold and waits for notifications under way: a front-end that has replaced its call fd
// looks at the old one for the last time (QEMU does so when it unmasks an interrupt).
func (n *notifier) retire() {
	if n == nil {
		return
	}
	n.release()
	timer := time.NewTimer(replaceTimeout)
	defer timer.Stop()
	select {
	case <-n.done:
	case <-timer.C:
		n.unblock()
	}
}

// unblock empties an eventfd whose counter is at its end, on which a write sleeps.
func (n *notifier) unblock() {
	if n.pipe {
		return
	}
	fds := [1]unix.PollFd{{Fd: int32(n.fd.Int()), Events: unix.POLLIN}}
	if ready, err := unix.Poll(fds[:], 0); err == nil && ready == 1 {
		var b [8]byte
		_, _ = unix.Read(n.fd.Int(), b[:])
	}
}

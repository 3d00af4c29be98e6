package frontend

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// ring is the driver's side of one queue. Whoever drives a queue gives each request a descriptor of its own, so that there
// is nothing to allocate: head i is slot i's.
type ring struct {
	fields
	index int // of the queue
	num   uint16
	event bool // VIRTIO_RING_F_EVENT_IDX has been negotiated

	descAddr, availAddr, usedAddr uint64 // as the front-end addresses them

	offered uint16 // the available index
	reaped  uint16 // the used index up to which answers were taken
	kick    *sys.FD
	call    *sys.FD

	kicks         uint64
	notifications uint64
}

func newRing(index, num int, event bool, mem *vqtest.Memory) (*ring, error) {
	n := uint64(num)
	desc, avail, used := mem.Alloc(16*n, vqtest.Page), mem.Alloc(8+2*n, vqtest.Page), mem.Alloc(8+8*n, vqtest.Page)
	r := &ring{
		fields: layFields(num, mem.Bytes(desc, 16*n), mem.Bytes(avail, 8+2*n), mem.Bytes(used, 8+8*n)),
		index:  index, num: uint16(num), event: event,
		descAddr: mem.UserAddr(desc), availAddr: mem.UserAddr(avail), usedAddr: mem.UserAddr(used),
	}
	for _, fd := range []**sys.FD{&r.kick, &r.call} {
		n, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			r.close()
			return nil, fmt.Errorf("make an eventfd for queue %d: %w", index, err)
		}
		*fd = sys.NewFD(n)
	}
	return r, nil
}

func (r *ring) close() {
	_ = r.kick.Close()
	_ = r.call.Close()
}

// offer shows the device head, and kicks it if it asks for that, as Linux does for each request.
func (r *ring) offer(head uint16) error {
	r.avail[r.offered&(r.num-1)] = head
	r.offered++
	// A locked exchange: also the barrier between the index and the look at avail_event.
	atomic.SwapUint32(r.availIdx, atomic.LoadUint32(r.availIdx)&0xffff|uint32(r.offered)<<16)
	if r.event {
		if load16(r.availEvent) != r.offered-1 {
			return nil
		}
	} else if load16(r.usedIdx)&virtqueue.VIRTQ_USED_F_NO_NOTIFY != 0 {
		return nil
	}
	r.kicks++
	return signal(r.kick.Int())
}

// pending says that there is an answer to reap.
func (r *ring) pending() bool {
	return uint16(atomic.LoadUint32(r.usedIdx)>>16) != r.reaped
}

// reap takes the next answer.
func (r *ring) reap() (head, written uint32, ok bool) {
	if !r.pending() {
		return 0, 0, false
	}
	e := r.used[r.reaped&(r.num-1)]
	r.reaped++
	if r.reaped&0xfff == 0 {
		r.leaveBehind()
	}
	return e.id, e.len, true
}

// suppress says that no notification is wanted.
func (r *ring) suppress() {
	if !r.event {
		atomic.StoreUint32(r.availIdx, uint32(r.offered)<<16|virtqueue.VIRTQ_AVAIL_F_NO_INTERRUPT)
	}
	r.leaveBehind()
}

// leaveBehind moves used_event to where the used index was half the numbers ago: as far as can be from being passed.
func (r *ring) leaveBehind() {
	atomic.StoreUint32(r.usedEvent, uint32(r.reaped-1<<15))
}

// arm asks for a notification of the next answer; pending says that it is there already.
func (r *ring) arm() (pending bool) {
	if r.event {
		atomic.SwapUint32(r.usedEvent, uint32(r.reaped))
	} else {
		atomic.SwapUint32(r.availIdx, uint32(r.offered)<<16)
	}
	return r.pending()
}

// sleep waits for a notification, on the thread itself.
func (r *ring) sleep() error {
	n, err := readEvent(r.call.Int(), -1)
	r.notifications += n
	return err
}

// drain counts the notifications that nobody has waited for.
func (r *ring) drain() {
	n, _ := readEvent(r.call.Int(), 0)
	r.notifications += n
}

// state says where the ring stands, for whoever has to find out why nothing moves.
func (r *ring) state(underWay int) string {
	used, event := uint16(atomic.LoadUint32(r.usedIdx)>>16), load16(r.availEvent)
	verdict := "the server has them and is slow, or has lost them"
	unread := pollIn(r.kick.Int(), 0)
	switch {
	case used != r.reaped:
		verdict = "there are answers that the driver was not notified of: a lost notification"
	case unread:
		verdict = "the server has not read its kick: it is busy, or does not look at the eventfd"
	case r.event && event != r.offered:
		verdict = "the server has not asked for a kick since the last was offered: it is busy, or has gone to sleep without looking again: a lost kick"
	}
	return fmt.Sprintf("queue %d: avail idx %d, used idx %d, reaped %d, avail_event %d, used_event %d, %d under way, %d kicks (unread: %t), %d notifications; %s",
		r.index, r.offered, used, r.reaped, event, load16(r.usedEvent), underWay, r.kicks, unread, r.notifications, verdict)
}

// one is what a write to an eventfd adds.
var one = [8]byte{0: 1}

// signal adds 1 to an eventfd.
func signal(fd int) error {
	for {
		_, err := unix.Write(fd, one[:])
		switch {
		case err == nil || errors.Is(err, unix.EAGAIN): // so full that it is as good as written
			return nil
		case !errors.Is(err, unix.EINTR):
			return fmt.Errorf("write to an eventfd: %w", err)
		}
	}
}

// readEvent takes what is in an eventfd; with timeout -1 it waits for there to be something, with 0 it does not. A back-end may
// have made the descriptor non-blocking: the description is shared.
func readEvent(fd, timeout int) (uint64, error) {
	var b [8]byte
	if timeout == 0 && !pollIn(fd, 0) {
		return 0, nil
	}
	for {
		_, err := unix.Read(fd, b[:])
		switch {
		case err == nil:
			return *as[uint64](b[:]), nil
		case errors.Is(err, unix.EAGAIN):
			pollIn(fd, -1)
		case !errors.Is(err, unix.EINTR):
			return 0, fmt.Errorf("read from an eventfd: %w", err)
		}
	}
}

// pollIn says whether fd can be read, within timeout in ms.
func pollIn(fd, timeout int) bool {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, _ := unix.Poll(p[:], timeout)
	return n == 1
}

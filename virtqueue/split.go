package virtqueue

import (
	"encoding/binary"
	"fmt"

	"github.com/sluicefs/sluice/guestmem"
)

// Byte offsets in the two rings of struct virtq_avail and struct virtq_used.
const (
	flagsOff = 0
	idxOff   = 2
	ringOff  = 4
)

// split is the split ring (virtio 1.3, section 2.7). Indices run freely modulo 2^16.
type split struct {
	num      uint16
	eventIdx bool

	desc, avail, used []byte // in guest memory

	next      uint16 // the next available index to fetch
	seen      uint16 // avail.idx when last loaded
	published uint16 // used.idx as the driver sees it
	staged    uint16 // used elements written after that
	told      uint16 // published when the driver was last notified, or found not to want that
	flags     uint16 // used.flags
	started   bool   // published has been taken from the ring
	signalled bool   // a Publish has been, so that the driver's used_event means something
	fence     uint32
}

// bind finds the ring in m. The used index goes on from the ring's own on the first time, and from ours later.
func (s *split) bind(c Config, m *guestmem.Map) error {
	var mem [3][]byte
	for i, a := range c.areas() {
		b, err := m.User(a.addr, a.size)
		if err != nil {
			return fmt.Errorf("bind %s at %#x of %d bytes: %w", a.name, a.addr, a.size, &RingError{ReasonUnmapped})
		}
		// The front-end's address and ours may differ in alignment when a region starts off a page.
		if !aligned(b, a.align) {
			return fmt.Errorf("bind %s at %#x: %w", a.name, a.addr, &RingError{ReasonAlign})
		}
		mem[i] = b
	}
	s.desc, s.avail, s.used = mem[0], mem[1], mem[2]
	if !s.started {
		s.published = load16(s.used, idxOff)
		s.told = s.published
		s.started = true
	}
	s.seen = s.next
	return nil
}

// refresh loads the driver's index.
func (s *split) refresh() Reason {
	idx := load16(s.avail, idxOff)
	if idx-s.next > s.num {
		return ReasonAvailJump
	}
	s.seen = idx
	return reasonNone
}

// head returns the next available head without taking it; ok is false when there is none.
func (s *split) head() (head uint16, ok bool, r Reason) {
	if s.seen == s.next {
		if r := s.refresh(); r != reasonNone || s.seen == s.next {
			return 0, false, r
		}
	}
	slot := int(s.next & (s.num - 1))
	head = binary.LittleEndian.Uint16(s.avail[ringOff+2*slot:])
	if head >= s.num {
		return 0, false, ReasonHead
	}
	return head, true, reasonNone
}

func (s *split) push(head uint16, written uint32) {
	slot := int((s.published + s.staged) & (s.num - 1))
	elem := s.used[ringOff+usedElemSize*slot:]
	binary.LittleEndian.PutUint32(elem[0:], uint32(head))
	binary.LittleEndian.PutUint32(elem[4:], written)
	s.staged++
}

// show lets the driver see the staged elements, if it looks.
func (s *split) show() {
	if s.staged > 0 {
		s.published += s.staged
		s.staged = 0
		s.storeUsed()
	}
}

// publish shows the staged elements to the driver and says whether it wants to be notified of all since the last time.
func (s *split) publish() bool {
	s.show()
	old := s.told
	if old == s.published {
		return false
	}
	s.told = s.published
	if !s.signalled {
		// What the driver last heard of is not known.
		s.signalled = true
		return true
	}
	if s.eventIdx {
		event := load16(s.avail, ringOff+2*int(s.num))
		return needEvent(event, s.published, old)
	}
	return load16(s.avail, flagsOff)&VIRTQ_AVAIL_F_NO_INTERRUPT == 0
}

// storeUsed stores used.flags and used.idx, which share a word that nobody else writes. It releases what was written before
// and is a full barrier against the atomic load of what the driver wants, so that driver and device never both miss the other.
func (s *split) storeUsed() {
	store32(s.used, flagsOff, uint32(s.flags)|uint32(s.published)<<16)
}

// arm asks the driver to kick for the chain at next, and then looks whether it is there already.
func (s *split) arm() (pending bool, r Reason) {
	if s.eventIdx {
		store16(s.used, ringOff+usedElemSize*int(s.num), s.next)
		barrier(&s.fence)
	} else {
		s.flags = 0
		s.storeUsed()
	}
	return s.pending()
}

func (s *split) disarm() {
	// With EVENT_IDX, avail_event stays behind, and the driver kicks only when it passes there.
	if !s.eventIdx && s.flags == 0 {
		s.flags = VIRTQ_USED_F_NO_NOTIFY
		s.storeUsed()
	}
}

func (s *split) pending() (bool, Reason) {
	r := s.refresh()
	return s.seen != s.next, r
}

// needEvent is vring_need_event of include/uapi/linux/virtio_ring.h: whether event is in [old, new).
func needEvent(event, new, old uint16) bool {
	return new-event-1 < new-old
}

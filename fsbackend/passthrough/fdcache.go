package passthrough

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// fdCache holds the descriptors of the inodes used of late, never more than its budget at any moment: whoever opens one
// has a slot first. It is a clock (second chance) and not a list, so that a use costs one store.
type fdCache struct {
	slots []fdSlot
	_     [64]byte // what follows changes, and must not take the line of slots away from other threads

	hand atomic.Uint32

	mu    sync.Mutex
	free  []int32
	fresh int32 // slots from here on have never been used

	starving atomic.Bool   // somebody waits for a slot
	freed    chan struct{} // holds one token
}

// fdSlot is a descriptor that a node has. While pins is not 0 it stays open.
type fdSlot struct {
	node atomic.Uint64 // nodeid; 0: none
	pins atomic.Int32  // and slotDead; raised only under the node's shard lock
	fd   int32
	used atomic.Bool
	_    [40]byte // a slot fills a cache line: neighbours are used by other threads
}

// slotDead marks a slot whose node has let go of it: the last to unpin it closes.
const slotDead = 1 << 30

func (c *fdCache) init(budget int) {
	c.slots = make([]fdSlot, budget)
	c.freed = make(chan struct{}, 1)
}

// pin takes the slot into use; the caller holds its node's shard lock.
func (c *fdCache) pin(slot int32) int {
	s := &c.slots[slot]
	s.pins.Add(1)
	if !s.used.Load() {
		s.used.Store(true)
	}
	return int(s.fd)
}

func (c *fdCache) unpin(slot int32) {
	switch c.slots[slot].pins.Add(-1) {
	case slotDead:
		c.reclaim(slot)
	case 0:
		c.wake()
	}
}

// drop ends a slot that its node has let go of: at once, or when the last call that uses it ends.
func (c *fdCache) drop(slot int32) {
	if c.slots[slot].pins.Add(slotDead) == slotDead {
		c.reclaim(slot)
	}
}

func (c *fdCache) reclaim(slot int32) {
	s := &c.slots[slot]
	_ = unix.Close(int(s.fd))
	c.putBack(slot)
}

// putBack frees a reserved slot that holds no open descriptor.
func (c *fdCache) putBack(slot int32) {
	s := &c.slots[slot]
	s.node.Store(0)
	s.pins.Store(0)
	c.mu.Lock()
	c.free = append(c.free, slot)
	c.mu.Unlock()
	c.wake()
}

func (c *fdCache) wake() {
	if c.starving.Load() {
		select {
		case c.freed <- struct{}{}:
		default:
		}
	}
}

// fill puts fd into a reserved slot for node id, whose shard is locked.
func (c *fdCache) fill(slot int32, fd int, id uint64) {
	s := &c.slots[slot]
	s.fd = int32(fd)
	s.used.Store(true)
	s.node.Store(id)
}

func (c *fdCache) takeFree() (int32, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.free); n > 0 {
		slot := c.free[n-1]
		c.free = c.free[:n-1]
		return slot, true
	}
	if int(c.fresh) < len(c.slots) {
		c.fresh++
		return c.fresh - 1, true
	}
	return 0, false
}

// reserve returns a slot that the caller may open a descriptor for, evicting another node's if it has to. It fails when
// every slot is in use by a running call.
func (fs *FS) reserve() (int32, bool) {
	c := &fs.fds
	if slot, ok := c.takeFree(); ok {
		return slot, true
	}
	// Twice around takes each mark away and comes back; once more for what other threads used meanwhile.
	for range 3 * len(c.slots) {
		slot := int32(c.hand.Add(1) % uint32(len(c.slots)))
		s := &c.slots[slot]
		id := s.node.Load()
		if id == 0 || s.pins.Load() != 0 {
			continue
		}
		if s.used.Swap(false) {
			continue
		}
		if fs.evict(slot, id) {
			return slot, true
		}
	}
	return c.takeFree()
}

// evict takes the descriptor in slot away from node id. A file handle is taken first where the node has none yet: only now
// is it known that it will be needed.
func (fs *FS) evict(slot int32, id uint64) bool {
	sh, n := fs.nodes.lock(id)
	s := &fs.fds.slots[slot]
	if n == nil || n.slot != slot || s.pins.Load() != 0 {
		sh.mu.Unlock()
		return false
	}
	s.pins.Add(1)
	mount, typ, known := n.mount, n.typ, n.handleLen > 0
	sh.mu.Unlock()

	if !known {
		var h sys.FileHandle
		fs.takeHandle(id, int(s.fd), mount, typ, &h)
	}

	sh, n = fs.nodes.lock(id)
	// A node that has died meanwhile lets go of its slot outside its lock, perhaps only after this: the slot is not ours then.
	if n != nil && s.pins.CompareAndSwap(1, 0) {
		sh.setSlot(n, -1)
		s.node.Store(0)
		sh.mu.Unlock()
		_ = unix.Close(int(s.fd))
		return true
	}
	sh.mu.Unlock()
	fs.fds.unpin(slot) // another call uses it, or the node has died
	return false
}

// reserveWait is reserve for the one call at a time that may wait for others to end.
func (fs *FS) reserveWait() int32 {
	c := &fs.fds
	c.starving.Store(true)
	defer c.starving.Store(false)
	for {
		if slot, ok := fs.reserve(); ok {
			return slot
		}
		<-c.freed
	}
}

// closeAll closes every descriptor; no call is running.
func (c *fdCache) closeAll() {
	for i := range c.slots[:c.fresh] {
		if c.slots[i].node.Swap(0) != 0 {
			_ = unix.Close(int(c.slots[i].fd))
		}
	}
}

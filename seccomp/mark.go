package seccomp

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// A bucket is a cache line. There are more buckets than a daemon has threads, and their numbers are mostly in a row.
	markBuckets = 512
	markSlots   = 8

	maxOwners     = 64
	ownerNameSize = 64 // with the NUL
)

// Marks note which extension each thread runs, so that a violation can be put down to one. The zero value is ready.
//
// The handlers of violations read them, which are C and run while Go may be stopped anywhere: hence one block of memory
// without pointers, and nothing but atomic stores to change it.
type Marks struct {
	slots  [markBuckets][markSlots]atomic.Uint64 // thread<<32 | owner, 0 if free
	names  [maxOwners][ownerNameSize]byte        // each written once, before owners says that it is there
	owners atomic.Uint32                         // how many names there are, besides the 0th, which is nobody's

	active atomic.Bool // a filter is installed
	mu     sync.Mutex  // for Register
}

// Owner is an extension, to Marks.
type Owner uint32

// Register makes name an owner, or finds it among those that are. Bytes of the name that would need quotes in a log become
// underscores, and 63 of them are kept. It fails when there are 63 owners.
func (m *Marks) Register(name string) (Owner, error) {
	var text [ownerNameSize]byte
	copy(text[:ownerNameSize-1], name)
	for i, b := range text {
		if b != 0 && (b <= ' ' || b >= 0x7f || b == '"' || b == '=' || b == '\\') || b == 0 && i < len(name) && i < ownerNameSize-1 {
			text[i] = '_'
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.owners.Load()
	for o := range n {
		if m.names[o+1] == text {
			return Owner(o + 1), nil
		}
	}
	if n+1 == maxOwners {
		return 0, fmt.Errorf("mark the calls of %s: there are %d names already, and no room for more", name, n)
	}
	m.names[n+1] = text
	m.owners.Store(n + 1)
	return Owner(n + 1), nil
}

// Enter notes that this thread runs a call of o, until Leave. The goroutine is locked to it. Calls do not nest: a second
// Enter replaces the first. Before a filter is installed it does nothing.
func (m *Marks) Enter(o Owner) {
	if !m.active.Load() {
		return
	}
	thread := uint64(unix.Gettid())
	mark := thread<<32 | uint64(o)
	bucket := &m.slots[thread%markBuckets]
	for i := range bucket {
		if was := bucket[i].Load(); (was == 0 || was>>32 == thread) && bucket[i].CompareAndSwap(was, mark) {
			return
		}
	}
	// All slots are taken: the call will seem to be nobody's, which is what a log can bear.
}

// Leave takes the mark of this thread away.
func (m *Marks) Leave() {
	if !m.active.Load() {
		return
	}
	thread := uint64(unix.Gettid())
	bucket := &m.slots[thread%markBuckets]
	for i := range bucket {
		if bucket[i].Load()>>32 == thread {
			bucket[i].Store(0)
		}
	}
}

// name returns the name of an owner.
func (m *Marks) name(o Owner) string {
	return unix.ByteSliceToString(m.names[o][:])
}

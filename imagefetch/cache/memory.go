package cache

import (
	"container/list"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// memory keeps chunks as files without a name, which cannot be changed any more.
type memory struct {
	budget int64

	mu    sync.Mutex
	used  int64
	order *list.List // of *memChunk, the most recently used first
	by    map[Key]*list.Element
}

type memChunk struct {
	k      Key
	f      *os.File
	charge int64
}

func newMemory(budget int64) *memory {
	return &memory{budget: budget, order: list.New(), by: map[Key]*list.Element{}}
}

func (m *memory) get(k Key) *os.File {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.by[k]
	if e == nil {
		return nil
	}
	m.order.MoveToFront(e)
	f, err := reopen(e.Value.(*memChunk).f)
	if err != nil {
		return nil
	}
	return f
}

func (m *memory) usage() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used
}

func (m *memory) has(k Key) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.by[k] != nil
}

// put takes f over and returns it for reading. What does not fit is not kept.
func (m *memory) put(k Key, size int64, f *os.File) (*os.File, error) {
	const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	_, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	var out *os.File
	if err == nil {
		out, err = reopen(f)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("seal a chunk in memory: %w", err)
	}
	charge := roundUp(size)
	m.mu.Lock()
	defer m.mu.Unlock()
	if charge > m.budget || m.by[k] != nil {
		f.Close()
		return out, nil
	}
	for m.used+charge > m.budget {
		m.dropLocked(m.order.Back())
	}
	m.by[k] = m.order.PushFront(&memChunk{k, f, charge})
	m.used += charge
	return out, nil
}

func (m *memory) dropLocked(e *list.Element) {
	c := m.order.Remove(e).(*memChunk)
	delete(m.by, c.k)
	m.used -= c.charge
	c.f.Close()
}

func (m *memory) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.order.Len() > 0 {
		m.dropLocked(m.order.Back())
	}
}

// reopen opens f for reading, with an offset of its own.
func reopen(f *os.File) (*os.File, error) {
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

// pageSize is what files are charged in.
const pageSize = 4096

func roundUp(n int64) int64 { return (n + pageSize - 1) / pageSize * pageSize }

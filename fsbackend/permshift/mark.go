package permshift

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

// maxMarked bounds how many nodes of a kind are told from others.
const maxMarked = 4096

// nodeSet knows the nodes that had something when they were last seen, so that calls for others, which are nearly all, need not
// look.
type nodeSet struct {
	n     atomic.Int64 // len(nodes)
	mu    sync.Mutex
	nodes map[uint64]struct{}
	full  bool // there were more: any node may be one
}

func (s *nodeSet) add(node uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.nodes == nil {
		s.nodes = make(map[uint64]struct{})
	}
	if len(s.nodes) >= maxMarked {
		s.full = true
		return
	}
	s.nodes[node] = struct{}{}
	s.n.Store(int64(len(s.nodes)))
}

// has says whether node may be one of them.
func (s *nodeSet) has(node uint64) bool {
	if s.n.Load() == 0 {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.nodes[node]
	return ok || s.full
}

// remove takes node out, which has it no more.
func (s *nodeSet) remove(node uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full {
		return // n has to stay above 0
	}
	delete(s.nodes, node)
	s.n.Store(int64(len(s.nodes)))
}

func (s *nodeSet) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes, s.full = nil, false
	s.n.Store(0)
}

// note marks node by its mode, as the guest is to see it. Like passthrough, we trust in that nobody but this guest sets a set-ID bit
// without that the guest sees it soon.
func (f *FS) note(node uint64, mode uint32) {
	switch typ := mode & unix.S_IFMT; {
	case typ == unix.S_IFDIR:
	case typ != unix.S_IFREG:
		f.special.add(node)
	case mode&(unix.S_ISUID|unix.S_ISGID) != 0:
		f.privs.add(node)
	}
}

// killed is mode without what does not outlive a change of a file's contents or owner (setattr_should_drop_suidgid in Linux
// fs/attr.c).
func killed(mode uint32) uint32 {
	if mode&unix.S_IFMT == unix.S_IFDIR {
		return mode
	}
	mode &^= unix.S_ISUID
	if mode&unix.S_IXGRP != 0 {
		mode &^= unix.S_ISGID
	}
	return mode
}

// killPriv takes the set-ID bits away that a change of node's contents ends, before it.
func (f *FS) killPriv(c *fsbackend.Context, node uint64) fsbackend.Errno {
	if f.format == Off || !f.privs.has(node) {
		return fsbackend.OK
	}
	defer f.lock(node).Unlock()
	// Bits without a value are the host's, which clears them itself.
	st, found, errno := f.value(c, node)
	if errno != fsbackend.OK || !found {
		return errno
	}
	less := st
	less.Mode = killed(st.Mode)
	if less != st {
		if errno := f.store(c, node, less, 0); errno != fsbackend.OK {
			return errno
		}
	}
	if less.Mode&(unix.S_ISUID|unix.S_ISGID) == 0 {
		f.privs.remove(node)
	}
	return fsbackend.OK
}

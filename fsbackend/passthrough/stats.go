package passthrough

import "github.com/sluicefs/sluice/fsbackend"

// Tiers are how nodes are found again; see the package's comment. Each shard counts its own.
const (
	tierName = iota
	tierHandle
	tierOPath
	tierCount
)

func (n *node) tier() int {
	switch {
	case n.slot >= 0:
		return tierOPath
	case n.handleLen > 0:
		return tierHandle
	default:
		return tierName
	}
}

// setSlot gives the locked node the descriptor in slot of fdCache, or takes it away with -1.
func (s *shard) setSlot(n *node, slot int32) {
	s.tiers[n.tier()]--
	n.slot = slot
	s.tiers[n.tier()]++
}

// Stats implements fsbackend.Statser. Descriptors of inodes that are about to be opened, or closed, count.
func (fs *FS) Stats() fsbackend.Stats {
	var tiers [tierCount]int
	for i := range fs.nodes.shards {
		s := &fs.nodes.shards[i]
		s.mu.Lock()
		for tier, n := range s.tiers {
			tiers[tier] += n
		}
		s.mu.Unlock()
	}
	const root = 1 // which has a descriptor of its own, and is in no table
	return fsbackend.Stats{
		Inodes: root + uint64(tiers[tierOPath]+tiers[tierHandle]+tiers[tierName]),
		Tiers: fsbackend.InodeTiers{
			OPath:  root + uint64(tiers[tierOPath]),
			Handle: uint64(tiers[tierHandle]),
			Name:   uint64(tiers[tierName]),
		},
		FDs: fsbackend.FDs{
			OPath: root + uint64(fs.fds.inUse()),
			Open:  uint64(fs.handles.inUse()),
			Mount: uint64(fs.mounts.open()),
			Lock:  uint64(fs.locks.inUse()),
		},
	}
}

func (c *fdCache) inUse() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return int(c.fresh) - len(c.free)
}

func (t *handleTable) inUse() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.chunks.Load()
	if p == nil {
		return 0
	}
	return len(*p)*handleChunkSize - len(t.free)
}

// open returns how many mounts have a descriptor.
func (ms *mounts) open() (n int) {
	if p := ms.list.Load(); p != nil {
		for _, m := range *p {
			if m.state.Load() == handlesWork {
				n++
			}
		}
	}
	return n
}

func (l *lockFiles) inUse() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}

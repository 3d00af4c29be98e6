package passthrough

import (
	"fmt"
)

// check says what of the bookkeeping of an FS at rest is wrong.
func (fs *FS) check() error {
	if err := fs.nodes.check(); err != nil {
		return err
	}
	held := map[int32]uint64{}
	for i := range fs.nodes.shards {
		s := &fs.nodes.shards[i]
		for c := range s.chunks {
			for j := 0; s.chunks[c] != nil && j < chunkSize; j++ {
				n := &s.chunks[c][j]
				if n.gen == 0 || n.slot < 0 {
					continue
				}
				id := makeID(i, uint32(c*chunkSize+j), n.gen)
				if other, twice := held[n.slot]; twice {
					return fmt.Errorf("slot %d belongs to nodes %#x and %#x", n.slot, other, id)
				}
				held[n.slot] = id
			}
		}
	}
	for i := range fs.fds.slots[:fs.fds.fresh] {
		s := &fs.fds.slots[i]
		if pins := s.pins.Load(); pins != 0 {
			return fmt.Errorf("slot %d is pinned %#x times", i, pins)
		}
		if s.node.Load() != held[int32(i)] {
			return fmt.Errorf("slot %d says node %#x, its node is %#x", i, s.node.Load(), held[int32(i)])
		}
	}
	if free := len(fs.fds.free); free+len(held) != int(fs.fds.fresh) {
		return fmt.Errorf("%d slots free and %d held of %d", free, len(held), fs.fds.fresh)
	}
	if p := fs.handles.chunks.Load(); p != nil {
		for _, c := range *p {
			for i := range c {
				if pins := c[i].state.Load() & handlePinMask; pins != 0 {
					return fmt.Errorf("handle %d is pinned %d times", c[i].index, pins)
				}
			}
		}
	}
	return nil
}

// check says what of the table is wrong.
func (t *table) check() error {
	count, named := 0, 0
	for i := range t.shards {
		s := &t.shards[i]
		inShard, long := 0, 0
		var tiers [tierCount]int
		for c := range s.chunks {
			fill := 0
			for j := 0; s.chunks[c] != nil && j < chunkSize; j++ {
				n := &s.chunks[c][j]
				if n.gen == 0 {
					continue
				}
				fill++
				switch {
				case n.slot >= 0:
					tiers[tierOPath]++
				case n.handleLen > 0:
					tiers[tierHandle]++
				default:
					tiers[tierName]++
				}
				slot := uint32(c*chunkSize + j)
				k := key{n.ino, n.btime, n.mount, n.typ}
				h := t.hashKey(k)
				if at, _ := s.findKey(uint32(h), k); shardOf(h) != i || at != slot {
					return fmt.Errorf("node %+v is not found by its key", n)
				}
				if n.nameLen > inlineName {
					long++
				}
				if n.nameLen > 0 {
					named++
					var buf [256]byte
					h := t.hashName(n.parent, s.nameOf(slot, n, &buf))
					ref := slot<<shardBits | uint32(i)
					if t.names[shardOf(h)].find(uint32(h), func(r uint32) bool { return r == ref+1 }) == 0 {
						return fmt.Errorf("node %+v is not found by its name", n)
					}
				}
			}
			if fill != int(s.fill[c]) || fill == 0 && s.chunks[c] != nil {
				return fmt.Errorf("shard %d chunk %d: fill %d, nodes %d", i, c, s.fill[c], fill)
			}
			inShard += fill
		}
		if s.byKey.used != inShard || len(s.long) != long {
			return fmt.Errorf("shard %d: %d nodes, %d in its index; %d long names, expected %d", i, inShard, s.byKey.used, len(s.long), long)
		}
		if s.tiers != tiers {
			return fmt.Errorf("shard %d: nodes by tier %v, counted %v", i, tiers, s.tiers)
		}
		count += inShard
	}
	for i := range t.names {
		named -= t.names[i].used
	}
	if count != int(t.count.Load()) || named != 0 {
		return fmt.Errorf("%d nodes, counted %d; name index is off by %d", count, t.count.Load(), named)
	}
	return nil
}

package passthrough

import (
	"hash/maphash"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// A nodeid is, from its low bits up: shard, slot in the shard, and a generation that is never 0, so that no nodeid is
// FUSE_ROOT_ID and a number that has died is seldom another node's soon.
const (
	shardBits = 5
	slotBits  = 23
	genBits   = 20 // 48 together: fsbackend keeps the bits above

	shards = 1 << shardBits

	// chunkSize is what fits in 8 KiB: Go's allocator gives such an object a span of its own, which goes back to the host
	// whatever is alive beside it. A few nodes that the guest keeps out of a million thus keep little memory.
	chunkSize = 78

	// smallShard is how many chunks a shard without nodes has room to list.
	smallShard = 8
)

// key is what a file is known by without a descriptor: birth time tells apart files that had an inode number in turn.
type key struct {
	ino   uint64
	btime int64 // ns since 1970, 0 where the file system has none
	mount uint16
	typ   uint8 // S_IFMT >> 12
}

// Room for names and handles in a node; longer ones lie in shard.long and shard.longHandles.
const (
	inlineName   = 24
	inlineHandle = 20 // Btrfs's 20 bytes, XFS's 12, ext4's 8
)

// node is an inode that the guest knows. It holds no pointers, so that the garbage collector never looks at a million
// of them, and is guarded by its shard's mutex.
type node struct {
	ino        uint64
	btime      int64
	nlookup    uint64 // saturates; a node at 0 only lives for its kids and is none of the guest's any more
	parent     uint64 // nodeid of the directory that name was last seen in
	slot       int32  // of its descriptor in fdCache, -1: none
	kids       int32  // nodes that are located in this one
	handles    uint32 // first open file handle, as index + 1; 0: none
	gen        uint32 // 0: the node is free
	mount      uint16
	handleType uint16
	typ        uint8
	handleLen  uint8 // 0: no file handle known
	nameLen    uint8 // 0: no location known
	privs      privs
	handle     [inlineHandle]byte
	name       [inlineName]byte
	opened     bool // by the guest: it may well be again
}

type chunk [chunkSize]node

// shard is a part of the table with a lock of its own. No lock of this package is held across a system call.
type shard struct {
	mu          sync.Mutex
	chunks      []*chunk // nil: no node of it is in use
	fill        []uint8  // nodes in use in each
	hint        int      // every chunk before it is full
	spare       *chunk   // the last that went, for the next that comes: a guest that looks up and forgets makes no garbage
	gen         uint32
	byKey       index // slot + 1
	tiers       [tierCount]int
	long        map[uint32]string
	longHandles map[uint32]string
	_           [64]byte
}

// nameShard maps (parent, name) to nodes: a hint, for a node's own fields are the truth.
type nameShard struct {
	mu sync.Mutex
	index
	_ [64]byte
}

// table is every node but the root.
type table struct {
	shards [shards]shard
	names  [shards]nameShard
	seed   maphash.Seed
	mix    uint64
	max    int64
	drop   func(slot int32) // ends the descriptor of a node that has died

	_     [64]byte // what follows changes, and must not take the line of the above away from other threads
	count atomic.Int64
	peak  atomic.Int64 // about the largest count since memory was last given back
	_     [64]byte
}

func (t *table) init(maxNodes int, drop func(slot int32)) {
	t.drop = drop
	t.seed = maphash.MakeSeed()
	t.mix = rand.Uint64() | 1
	t.max = int64(maxNodes)
	for i := range t.shards {
		t.shards[i].gen = rand.Uint32N(1 << genBits)
	}
}

func (t *table) hashKey(k key) uint64 {
	// A guest cannot choose inode numbers freely, so that a multiplication with an unknown factor does.
	hi, lo := bits.Mul64(k.ino^t.mix, 0x9e3779b97f4a7c15^t.mix)
	h := hi ^ lo ^ uint64(k.btime) ^ uint64(k.mount)<<40 ^ uint64(k.typ)<<56
	hi, lo = bits.Mul64(h, t.mix)
	return hi ^ lo
}

func (t *table) hashName(parent uint64, name []byte) uint64 {
	hi, lo := bits.Mul64(maphash.Bytes(t.seed, name)^parent, t.mix)
	return hi ^ lo
}

func shardOf(hash uint64) int { return int(hash >> (64 - shardBits)) }

func makeID(shard int, slot, gen uint32) uint64 {
	return uint64(gen)<<(shardBits+slotBits) | uint64(slot)<<shardBits | uint64(shard)
}

func splitID(id uint64) (shard int, slot, gen uint32) {
	return int(id % shards), uint32(id>>shardBits) % (1 << slotBits), uint32(id >> (shardBits + slotBits))
}

// lock locks the shard of node id and returns both, the node nil if there is none.
func (t *table) lock(id uint64) (*shard, *node) {
	i, slot, gen := splitID(id)
	s := &t.shards[i]
	s.mu.Lock()
	n := s.at(slot)
	if n == nil || n.gen == 0 || n.gen != gen || id>>48 != 0 {
		return s, nil
	}
	return s, n
}

func (s *shard) at(slot uint32) *node {
	if c := int(slot / chunkSize); c < len(s.chunks) && s.chunks[c] != nil {
		return &s.chunks[c][slot%chunkSize]
	}
	return nil
}

func (n *node) is(k key) bool {
	return n.ino == k.ino && n.btime == k.btime && n.mount == k.mount && n.typ == k.typ
}

// findKey returns k's node in the locked shard.
func (s *shard) findKey(hash uint32, k key) (uint32, *node) {
	var found *node
	ref := s.byKey.find(hash, func(ref uint32) bool {
		found = s.at(ref - 1)
		return found.is(k)
	})
	if ref == 0 {
		return 0, nil
	}
	return ref - 1, found
}

// alloc returns a new node in the locked shard, nil if the shard is full.
func (s *shard) alloc() (uint32, *node) {
	for s.hint < len(s.fill) && s.fill[s.hint] == chunkSize {
		s.hint++
	}
	if s.hint == len(s.fill) {
		if s.hint == (1<<slotBits)/chunkSize {
			return 0, nil
		}
		s.chunks = append(s.chunks, nil)
		s.fill = append(s.fill, 0)
	}
	c := s.chunks[s.hint]
	if c == nil {
		if c = s.spare; c == nil {
			c = new(chunk)
		}
		s.chunks[s.hint], s.spare = c, nil
	}
	// In a chunk that is filled for the first time this one is free, and mostly where one goes and another comes.
	i := int(s.fill[s.hint])
	for c[i].gen != 0 {
		i = (i + 1) % chunkSize
	}
	s.fill[s.hint]++
	s.gen = s.gen%(1<<genBits-1) + 1
	c[i] = node{gen: s.gen, slot: -1}
	s.tiers[tierName]++
	return uint32(s.hint*chunkSize + i), &c[i]
}

// release frees the node in slot; its chunk goes with its last node.
func (s *shard) release(slot uint32) {
	delete(s.long, slot)
	delete(s.longHandles, slot)
	if len(s.long) == 0 {
		s.long = nil // a map never shrinks by itself
	}
	if len(s.longHandles) == 0 {
		s.longHandles = nil
	}
	c := int(slot / chunkSize)
	n := &s.chunks[c][slot%chunkSize]
	s.tiers[n.tier()]--
	n.gen = 0
	s.fill[c]--
	s.hint = min(s.hint, c)
	if s.fill[c] > 0 {
		return
	}
	s.spare, s.chunks[c] = s.chunks[c], nil
	used := len(s.chunks)
	for used > 0 && s.chunks[used-1] == nil {
		used--
	}
	s.chunks, s.fill = s.chunks[:used], s.fill[:used]
	s.hint = min(s.hint, used)
	if used == 0 && cap(s.chunks) > smallShard {
		s.chunks, s.fill = nil, nil
	}
}

// location is where a node was last seen, and its file handle: a copy, for use without the lock.
type location struct {
	parent  uint64
	nameLen int
	name    [256]byte // with a NUL
	handle  sys.FileHandle
	mount   uint16
	typ     uint8
	key     key
}

func (l *location) hasHandle() bool { return l.handle.Bytes > 0 }

// describe fills l from the locked node.
func (s *shard) describe(slot uint32, n *node, l *location) {
	l.parent = n.parent
	l.nameLen = len(s.nameOf(slot, n, &l.name))
	l.name[l.nameLen] = 0
	s.handleOf(slot, n, &l.handle)
	l.mount, l.typ = n.mount, n.typ
	l.key = key{n.ino, n.btime, n.mount, n.typ}
}

// handleOf copies the file handle, of 0 bytes if there is none, to h.
func (s *shard) handleOf(slot uint32, n *node, h *sys.FileHandle) {
	h.Bytes, h.Type = uint32(n.handleLen), int32(n.handleType)
	if n.handleLen <= inlineHandle {
		copy(h.Handle[:], n.handle[:])
	} else {
		copy(h.Handle[:], s.longHandles[slot])
	}
}

// nameOf copies the name to buf.
func (s *shard) nameOf(slot uint32, n *node, buf *[256]byte) []byte {
	if n.nameLen <= inlineName {
		return buf[:copy(buf[:n.nameLen], n.name[:])]
	}
	return buf[:copy(buf[:], s.long[slot])]
}

func (s *shard) nameIs(slot uint32, n *node, name []byte) bool {
	if int(n.nameLen) != len(name) {
		return false
	}
	if n.nameLen <= inlineName {
		return string(n.name[:n.nameLen]) == string(name)
	}
	return s.long[slot] == string(name)
}

func (s *shard) setName(slot uint32, n *node, parent uint64, name []byte) {
	if n.nameLen > inlineName {
		delete(s.long, slot)
	}
	n.parent, n.nameLen = parent, uint8(len(name))
	if len(name) <= inlineName {
		copy(n.name[:], name)
		return
	}
	if s.long == nil {
		s.long = make(map[uint32]string)
	}
	s.long[slot] = string(name)
}

// setHandle keeps a file handle in the node; a nil one drops it.
func (s *shard) setHandle(slot uint32, n *node, h *sys.FileHandle) {
	s.tiers[n.tier()]--
	defer func() { s.tiers[n.tier()]++ }()
	if n.handleLen > inlineHandle {
		delete(s.longHandles, slot)
	}
	if h == nil || h.Bytes > sys.MaxHandleSize || h.Type&^0xffff != 0 {
		n.handleLen = 0
		return
	}
	n.handleLen, n.handleType = uint8(h.Bytes), uint16(h.Type)
	if h.Bytes <= inlineHandle {
		copy(n.handle[:], h.Handle[:h.Bytes])
		return
	}
	if s.longHandles == nil {
		s.longHandles = make(map[uint32]string)
	}
	s.longHandles[slot] = string(h.Handle[:h.Bytes])
}

// insert counts a lookup of the file k, seen as name in parent, and returns its shard locked, its nodeid and node: nil if
// the table is full. A new node has neither descriptor nor file handle. The caller calls settle with what it also returns
// when it has unlocked the shard.
func (t *table) insert(k key, parent uint64, name []byte) (*shard, uint64, *node, relocation) {
	h := t.hashKey(k)
	i := shardOf(h)
	s := &t.shards[i]
	s.mu.Lock()
	slot, n := s.findKey(uint32(h), k)
	if n == nil {
		count := t.count.Add(1)
		if count > t.max {
			t.count.Add(-1)
			return s, 0, nil, relocation{}
		}
		if count%1024 == 0 && count > t.peak.Load() {
			t.peak.Store(count)
		}
		if slot, n = s.alloc(); n == nil {
			t.count.Add(-1)
			return s, 0, nil, relocation{}
		}
		n.ino, n.btime, n.mount, n.typ = k.ino, k.btime, k.mount, k.typ
		s.byKey.add(uint32(h), slot+1)
	}
	n.count()
	var rel relocation
	if len(name) > 0 && (n.parent != parent || !s.nameIs(slot, n, name)) {
		rel = s.move(t, i, slot, n, parent, name)
	}
	return s, makeID(i, slot, n.gen), n, rel
}

// count counts a lookup of the locked node.
func (n *node) count() {
	if n.nlookup++; n.nlookup == 0 {
		n.nlookup--
	}
}

// relocation is a node's change of directory, 0 for none: the directories' counts of kids follow when no shard is locked,
// for they have locks of their own.
type relocation struct{ from, to uint64 }

// settle makes the counts of kids follow r. A directory that only lived for its kids dies with the last.
func (t *table) settle(r relocation) {
	if r.from == r.to {
		return
	}
	if s, n := t.lock(r.to); n != nil {
		n.kids++
		s.mu.Unlock()
	} else {
		s.mu.Unlock()
	}
	for dir := r.from; dir != 0; {
		s, n := t.lock(dir)
		if n != nil {
			n.kids--
		}
		dir = t.unlockReaped(s, dir, n)
	}
}

// unlockReaped unlocks s after it has taken out node id if nothing needs it any more, and returns the directory that has
// lost it as a kid then, else 0.
func (t *table) unlockReaped(s *shard, id uint64, n *node) uint64 {
	if n == nil || n.nlookup > 0 || n.kids > 0 {
		s.mu.Unlock()
		return 0
	}
	slot, parent := t.remove(s, id, n)
	s.mu.Unlock()
	if slot >= 0 {
		t.drop(slot)
	}
	return parent
}

// move gives the locked node another location; an empty name takes it away.
func (s *shard) move(t *table, i int, slot uint32, n *node, parent uint64, name []byte) relocation {
	ref := slot<<shardBits | uint32(i)
	rel := relocation{from: n.parent, to: parent}
	if n.nameLen > 0 {
		var buf [256]byte
		h := t.hashName(n.parent, s.nameOf(slot, n, &buf))
		x := &t.names[shardOf(h)]
		x.mu.Lock()
		x.remove(uint32(h), ref+1)
		x.mu.Unlock()
	}
	s.setName(slot, n, parent, name)
	if len(name) > 0 {
		h := t.hashName(parent, name)
		x := &t.names[shardOf(h)]
		x.mu.Lock()
		x.add(uint32(h), ref+1)
		x.mu.Unlock()
	}
	return rel
}

// maxSame bounds how many nodes of one name are looked at: a name has one node, unless hashes collide or it went to
// another file behind the guest's back.
const maxSame = 16

// at returns the shard, locked, and node that name in parent was last seen to be; n is nil if none is known. The nodeid is
// valid with n.
func (t *table) at(parent uint64, name []byte) (s *shard, id uint64, n *node) {
	h := t.hashName(parent, name)
	var refs [maxSame]uint32
	x := &t.names[shardOf(h)]
	x.mu.Lock()
	found := 0
	x.find(uint32(h), func(ref uint32) bool {
		refs[found] = ref - 1
		found++
		return found == maxSame
	})
	x.mu.Unlock()
	for _, ref := range refs[:found] {
		i, slot := int(ref%shards), ref>>shardBits
		s := &t.shards[i]
		s.mu.Lock()
		n := s.at(slot)
		if n != nil && n.gen != 0 && n.parent == parent && s.nameIs(slot, n, name) {
			return s, makeID(i, slot, n.gen), n
		}
		s.mu.Unlock()
	}
	return nil, 0, nil
}

// moved says that the guest took the file away from name in parent: to another name, or, with parent 0 and an empty one,
// for good.
func (t *table) moved(parent uint64, name []byte, newParent uint64, newName []byte) {
	if s, id, n := t.at(parent, name); n != nil {
		t.unlockMoved(s, id, n, newParent, newName)
	}
}

// exchanged says that the guest swapped two names.
func (t *table) exchanged(parentA uint64, a []byte, parentB uint64, b []byte) {
	idA := uint64(0)
	if s, id, n := t.at(parentA, a); n != nil {
		idA = id
		s.mu.Unlock()
	}
	t.moved(parentB, b, parentA, a)
	if s, n := t.lock(idA); n != nil {
		t.unlockMoved(s, idA, n, parentB, b)
	} else {
		s.mu.Unlock()
	}
}

func (t *table) unlockMoved(s *shard, id uint64, n *node, parent uint64, name []byte) {
	i, slot, _ := splitID(id)
	rel := s.move(t, i, slot, n, parent, name)
	s.mu.Unlock()
	t.settle(rel)
}

// forget takes count lookups back and reports whether the guest does not know the node any more.
func (t *table) forget(id, count uint64) bool {
	s, n := t.lock(id)
	if n == nil || n.nlookup == 0 {
		s.mu.Unlock()
		return false
	}
	if count < n.nlookup {
		n.nlookup -= count
		s.mu.Unlock()
		return false
	}
	n.nlookup = 0
	t.settle(relocation{from: t.unlockReaped(s, id, n)})
	return true
}

// remove takes the locked node out and returns its descriptor's slot, -1 for none, and the directory it was located in.
func (t *table) remove(s *shard, id uint64, n *node) (slot int32, parent uint64) {
	i, at, _ := splitID(id)
	s.byKey.remove(uint32(t.hashKey(key{n.ino, n.btime, n.mount, n.typ})), at+1)
	rel := s.move(t, i, at, n, 0, nil)
	slot = n.slot
	s.release(at)
	t.count.Add(-1)
	return slot, rel.from
}

// shrunk says whether most nodes have gone since memory was last given back.
func (t *table) shrunk() bool {
	count, peak := t.count.Load(), t.peak.Load()
	return peak-count >= trimStep && 2*count <= peak
}

// clear takes every node of shard i out and returns their descriptors' slots, added to slots.
func (t *table) clear(i int, slots []int32) []int32 {
	s := &t.shards[i]
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := len(s.chunks) - 1; c >= 0; c-- {
		for j := 0; j < chunkSize && c < len(s.chunks) && s.chunks[c] != nil; j++ {
			n := &s.chunks[c][j]
			if n.gen == 0 {
				continue
			}
			if slot, _ := t.remove(s, makeID(i, uint32(c*chunkSize+j), n.gen), n); slot >= 0 {
				slots = append(slots, slot)
			}
		}
	}
	return slots
}

// keyOf is st's key on the mount with this number.
func keyOf(st *unix.Statx_t, mount uint16) key {
	k := key{ino: st.Ino, mount: mount, typ: uint8(st.Mode >> 12)}
	if st.Mask&unix.STATX_BTIME != 0 {
		k.btime = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
	}
	return k
}

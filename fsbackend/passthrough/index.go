package passthrough

// index is a hash table from 32 bits of a key's hash to small numbers, by open addressing. Several entries may have one
// hash; whoever looks one up compares what the number stands for. It holds no pointers and grows and shrinks with its load.
type index struct {
	entries []indexEntry // a power of two long
	used    int
}

type indexEntry struct {
	hash uint32
	ref  uint32 // 0: free
}

const indexMin = 16

// find calls match with the refs stored under hash until it returns true, and returns that ref; 0 if it never did.
func (x *index) find(hash uint32, match func(ref uint32) bool) uint32 {
	if x.used == 0 {
		return 0
	}
	mask := uint32(len(x.entries) - 1)
	for i := hash & mask; x.entries[i].ref != 0; i = (i + 1) & mask {
		if e := x.entries[i]; e.hash == hash && match(e.ref) {
			return e.ref
		}
	}
	return 0
}

// add stores ref, which must not be 0, under hash.
func (x *index) add(hash, ref uint32) {
	if 4*(x.used+1) > 3*len(x.entries) {
		x.resize(max(2*len(x.entries), indexMin))
	}
	x.put(indexEntry{hash, ref})
	x.used++
}

func (x *index) put(e indexEntry) {
	mask := uint32(len(x.entries) - 1)
	i := e.hash & mask
	for x.entries[i].ref != 0 {
		i = (i + 1) & mask
	}
	x.entries[i] = e
}

// remove takes ref under hash out; it does nothing when it is not there.
func (x *index) remove(hash, ref uint32) {
	if x.used == 0 {
		return
	}
	mask := uint32(len(x.entries) - 1)
	i := hash & mask
	for x.entries[i] != (indexEntry{hash, ref}) {
		if x.entries[i].ref == 0 {
			return
		}
		i = (i + 1) & mask
	}
	// Entries behind the gap move up, so that no search ends at it too early.
	for j := (i + 1) & mask; x.entries[j].ref != 0; j = (j + 1) & mask {
		home := x.entries[j].hash & mask
		if (j-home)&mask >= (j-i)&mask {
			x.entries[i] = x.entries[j]
			i = j
		}
	}
	x.entries[i] = indexEntry{}
	x.used--
	switch {
	case x.used == 0 && len(x.entries) > indexMin:
		x.entries = nil
	case len(x.entries) > indexMin && 8*x.used < len(x.entries):
		x.resize(len(x.entries) / 4)
	}
}

func (x *index) resize(size int) {
	old := x.entries
	x.entries = make([]indexEntry, max(size, indexMin))
	for _, e := range old {
		if e.ref != 0 {
			x.put(e)
		}
	}
}

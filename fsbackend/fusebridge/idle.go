package fusebridge

// maxIdle is how many nodes may be idle at once.
const maxIdle = 16384

// idleList are the nodes that the guest has forgotten while their names and attributes are good still, as a kernel keeps names that
// nobody uses: the guest, which may have little memory for it, comes back to them without the program being asked. The guest cannot
// name them: they are not in Bridge.nodes. Who forgets first is first. Bridge.mu.
type idleList struct {
	oldest, newest *node
	len            int
}

func (l *idleList) push(n *node) {
	n.idle, n.older = true, l.newest
	if l.newest != nil {
		l.newest.newer = n
	} else {
		l.oldest = n
	}
	l.newest = n
	l.len++
}

func (l *idleList) remove(n *node) {
	if n.older != nil {
		n.older.newer = n.newer
	} else {
		l.oldest = n.newer
	}
	if n.newer != nil {
		n.newer.older = n.older
	} else {
		l.newest = n.older
	}
	n.idle, n.older, n.newer = false, nil, nil
	l.len--
}

// good says whether n's name and attributes are good at this time.
func (n *node) good(now int64) bool {
	if n.parent == nil || now >= n.until {
		return false
	}
	d := n.parent.children[n.name]
	return d != nil && d.node == n && now < d.until
}

// A goodbye is what the program is to forget, once Bridge.mu is given back: for each node that became idle no more than this many leave,
// so that those that are good no longer do not pile up.
type goodbye [2]struct {
	at   place
	held uint64
}

// send tells the program.
func (g *goodbye) send() {
	for _, f := range g {
		if f.held > 0 {
			f.at.conn.forget(f.at.raw, f.held)
		}
	}
}

// rest makes n, which is in none of the tables that calls use, idle if it may be, and says what is to be forgotten. Bridge.mu is held.
func (b *Bridge) rest(n *node) (g goodbye) {
	now := clock()
	next := 0
	if n.held == 0 || !n.good(now) {
		g[0].at, g[0].held = n.end()
		next++
	} else {
		b.idle.push(n)
	}
	for ; next < len(g) && b.idle.oldest != nil && (b.idle.len > maxIdle || !b.idle.oldest.good(now)); next++ {
		g[next].at, g[next].held = b.evict()
	}
	return g
}

// evict ends the node that has been idle for longest. Bridge.mu is held.
func (b *Bridge) evict() (at place, held uint64) {
	n := b.idle.oldest
	b.idle.remove(n)
	return n.end()
}

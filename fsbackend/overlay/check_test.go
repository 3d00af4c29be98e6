package overlay

import (
	"errors"
	"fmt"
	"maps"
	"slices"
)

// check compares the tables with each other.
func (fs *FS) check() error {
	fs.indexes.mu.Lock()
	defer fs.indexes.mu.Unlock()
	fs.mu.Lock()
	defer fs.mu.Unlock()
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	kids := make(map[*node]int)
	for id, n := range fs.nodes {
		if n.id != id || n.dead {
			wrong("node %d is in the table as %d, dead %v", n.id, id, n.dead)
		}
		if n.parent != nil {
			kids[n.parent]++
			if fs.byName[nameKey{n.parent.id, n.name}] != n {
				wrong("node %d is %q in %d, which is another", id, n.name, n.parent.id)
			}
			if n.parent != fs.root && fs.nodes[n.parent.id] != n.parent {
				wrong("node %d is in %d, which is in no table", id, n.parent.id)
			}
		}
		if up := n.upper.Load(); up != 0 && fs.byUpper[up] == nil {
			wrong("node %d has upper file %d, which nobody has", id, up)
		}
		if n.upper.Load() == 0 && len(n.lowers) == 0 {
			wrong("node %d is nothing", id)
		}
		if n.lookups == 0 && n.kids == 0 {
			wrong("node %d is needed by nobody", id)
		}
	}
	for _, n := range fs.nodes {
		if n.kids != kids[n] {
			wrong("node %d counts %d nodes in it, there are %d", n.id, n.kids, kids[n])
		}
	}
	if fs.root.kids != kids[fs.root] {
		wrong("the root counts %d nodes in it, there are %d", fs.root.kids, kids[fs.root])
	}
	for key, n := range fs.byName {
		if fs.nodes[n.id] != n || n.parent == nil || n.parent.id != key.parent || n.name != key.name {
			wrong("name %q in %d is node %d, which does not say so", key.name, key.parent, n.id)
		}
	}
	for up, n := range fs.byUpper {
		if fs.nodes[n.id] != n || n.upper.Load() != up {
			wrong("upper file %d is node %d, which does not say so", up, n.id)
		}
	}
	size := int64(0)
	for x := range fs.indexes.all {
		size += x.size()
		if x.of.names.Load() != x {
			wrong("the names of a directory are kept that does not know them")
		}
	}
	if size != fs.indexes.size || size > max(fs.cfg.MaxNames, 0) {
		wrong("names take %d bytes, %d are counted, %d may be", size, fs.indexes.size, fs.cfg.MaxNames)
	}
	kept := 0
	for _, n := range append(slices.Collect(maps.Values(fs.nodes)), fs.root) {
		if n.dir == nil {
			continue
		}
		for i := range n.dir.parts {
			if n.dir.parts[i].names.Load() != nil {
				kept++
			}
		}
	}
	if kept != len(fs.indexes.all) {
		wrong("the names of %d parts of directories are kept, %d are known", len(fs.indexes.all), kept)
	}
	return errors.Join(errs...)
}

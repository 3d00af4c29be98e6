package lazyimage

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
)

// What names mean in a layer (OCI image specification, layer.md), and what builders leave in its root.
const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
	metaPrefix     = ".wh..wh." // aufs' own
)

var landmarks = []string{".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"}

// builder puts a tree together, layer by layer. Entries refer to the layers' strings, which finish copies what is left of.
type builder struct {
	max    int
	names  []name
	inodes []inode
	at     map[place]uint32 // of names
}

// place is where a name is: in the directory with the number parent in builder.names.
type place struct {
	parent uint32
	name   string
}

// name is one name of an inode. Those above it have lower numbers. The root is number 0, and itself above it.
type name struct {
	place
	inode uint32
	gone  bool // it was hidden by a layer above
}

// inode is a file as one layer has it.
type inode struct {
	entry  *store.Entry // nil for what is only implied, and for a whiteout
	layer  int
	dir    bool
	white  bool // a whiteout that is shown
	opaque bool // a directory that shows that it is opaque
}

func newBuilder(maxInodes int) *builder {
	return &builder{
		max:    maxInodes,
		names:  []name{{}},
		inodes: []inode{{dir: true}},
		at:     make(map[place]uint32),
	}
}

var errTooMany = errors.New("the image has more files than are allowed")

// add puts a layer on top. With merge, what it hides of those below goes; otherwise it shows what it would hide.
func (b *builder) add(number int, l *store.Layer, merge bool) error {
	var links []*store.Entry
	var white []string // names of whiteouts, and directories with opaqueMarker
	var opaque []string
	var files []*store.Entry
	rootOpaque := false
	for i := range l.Entries {
		x := &l.Entries[i]
		dir, base := split(x.Path)
		switch {
		case dir == "" && slices.Contains(landmarks, strings.TrimPrefix(base, whiteoutPrefix)), hasWhiteout(dir):
		case base == opaqueMarker:
			if dir != "" || !rootOpaque { // whatever is there twice, the root is emptied once
				opaque = append(opaque, dir)
			}
			rootOpaque = rootOpaque || dir == ""
		case strings.HasPrefix(base, metaPrefix):
		case strings.HasPrefix(base, whiteoutPrefix):
			if of := base[len(whiteoutPrefix):]; of != "" && of != "." && of != ".." {
				white = append(white, join(dir, of))
			}
		case x.Hardlink:
			links = append(links, x)
		default:
			files = append(files, x)
		}
	}
	if merge {
		b.hide(white, opaque)
	}
	for _, x := range files {
		if err := b.file(number, x); err != nil {
			return err
		}
	}
	for _, x := range links {
		if err := b.link(number, x); err != nil {
			return err
		}
	}
	if !merge {
		return b.show(number, white, opaque)
	}
	return nil
}

// hasWhiteout says whether a directory's path has a component that only a whiteout could be named: what is in it is nothing.
func hasWhiteout(dir string) bool {
	return strings.HasPrefix(dir, whiteoutPrefix) || strings.Contains(dir, "/"+whiteoutPrefix)
}

func split(p string) (dir, base string) {
	i := strings.LastIndexByte(p, '/')
	if i < 0 {
		return "", p
	}
	return p[:i], p[i+1:]
}

func join(dir, base string) string {
	if dir == "" {
		return base
	}
	return dir + "/" + base
}

// find returns the number of the name at p.
func (b *builder) find(p string) (uint32, bool) {
	at := uint32(0)
	for rest, more := p, p != ""; more; {
		var part string
		part, rest, more = strings.Cut(rest, "/")
		next, ok := b.at[place{at, part}]
		if !ok || b.names[next].gone {
			return 0, false
		}
		at = next
	}
	return at, true
}

// hide takes what a layer hides out of the tree that those below have made.
func (b *builder) hide(white, opaque []string) {
	for _, p := range white {
		if at, ok := b.find(p); ok && at != 0 {
			b.names[at].gone = true
		}
	}
	for _, p := range opaque {
		at, ok := b.find(p)
		switch {
		case !ok || !b.inodes[b.names[at].inode].dir:
		case at == 0:
			for i := range b.names[1:] { // all are below it
				b.names[i+1].gone = true
			}
		default:
			b.replace(at, b.inodes[b.names[at].inode])
		}
	}
}

// replace puts another inode at a name, which loses what is below it: names there have the old number above them.
func (b *builder) replace(at uint32, with inode) uint32 {
	p := b.names[at].place
	b.names[at].gone = true
	return b.put(p, with)
}

// put makes a new name, with an inode of its own.
func (b *builder) put(p place, i inode) uint32 {
	b.inodes = append(b.inodes, i)
	return b.name(p, uint32(len(b.inodes)-1))
}

// name makes a new name of an inode that there is.
func (b *builder) name(p place, inode uint32) uint32 {
	n := uint32(len(b.names))
	b.names = append(b.names, name{place: p, inode: inode})
	b.at[p] = n
	return n
}

// parent returns the directory at p, made if it is missing, by layer number.
func (b *builder) parent(layer int, p string) (uint32, error) {
	if at, ok := b.find(p); ok && b.inodes[b.names[at].inode].dir {
		return at, nil
	}
	at := uint32(0)
	for rest, more := p, p != ""; more; {
		var part string
		part, rest, more = strings.Cut(rest, "/")
		here := place{at, part}
		next, ok := b.at[here]
		switch {
		case len(b.names) > b.max:
			return 0, errTooMany
		case !ok || b.names[next].gone:
			next = b.put(here, inode{layer: layer, dir: true})
		case b.inodes[b.names[next].inode].dir:
		case b.inodes[b.names[next].inode].layer == layer:
			return 0, fmt.Errorf("%q is in %q, which is no directory", p, p[:len(p)-len(rest)])
		default:
			next = b.replace(next, inode{layer: layer, dir: true})
		}
		at = next
	}
	return at, nil
}

// file puts a file of the layer into the tree.
func (b *builder) file(layer int, x *store.Entry) error {
	i := inode{entry: x, layer: layer, dir: x.Mode&unix.S_IFMT == unix.S_IFDIR}
	if x.Path == "" {
		b.inodes[0] = i
		return nil
	}
	return b.set(layer, x.Path, func(at place, old uint32, there bool) error {
		if !there {
			b.put(at, i)
			return nil
		}
		was := &b.inodes[b.names[old].inode]
		switch {
		case was.dir && i.dir:
			*was = i
		case was.layer == layer && was.dir != i.dir:
			return fmt.Errorf("%q is a directory and none", x.Path)
		default:
			b.replace(old, i)
		}
		return nil
	})
}

// link gives a file of the layer another name.
func (b *builder) link(layer int, x *store.Entry) error {
	to, ok := b.find(x.Target)
	if !ok || b.inodes[b.names[to].inode].layer != layer || b.inodes[b.names[to].inode].dir {
		return fmt.Errorf("%q is another name of %q, which is no file of the layer", x.Path, x.Target)
	}
	return b.set(layer, x.Path, func(at place, old uint32, there bool) error {
		if there {
			if was := &b.inodes[b.names[old].inode]; was.layer == layer && was.dir {
				return fmt.Errorf("%q is a directory and none", x.Path)
			}
			b.names[old].gone = true
		}
		b.name(at, b.names[to].inode)
		return nil
	})
}

// set calls put with where p is, in a directory that is made if need be, and with the name that is there.
func (b *builder) set(layer int, p string, put func(at place, old uint32, there bool) error) error {
	if len(b.names) > b.max {
		return errTooMany
	}
	dir, base := split(p)
	above, err := b.parent(layer, dir)
	if err != nil {
		return err
	}
	at := place{above, base}
	old, there := b.at[at]
	return put(at, old, there && !b.names[old].gone)
}

// show puts into the tree of a single layer what it hides of others.
func (b *builder) show(layer int, white, opaque []string) error {
	for _, p := range opaque {
		at, err := b.parent(layer, p)
		if err != nil {
			return err
		}
		b.inodes[b.names[at].inode].opaque = true
	}
	for _, p := range white {
		err := b.set(layer, p, func(at place, _ uint32, there bool) error {
			if !there {
				b.put(at, inode{layer: layer, white: true})
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// finish makes the tree of what is there: nodes are numbered from the root down, and by name in each directory.
func (b *builder) finish(t *tree, layers []store.Layer, firstLayer int, opaque Opaque) error {
	alive := make([]bool, len(b.names))
	alive[0] = true
	below := make([]uint32, len(b.names)+1) // where in children those of a name begin
	count := uint32(1)
	for i := 1; i < len(b.names); i++ {
		n := &b.names[i]
		if alive[i] = !n.gone && alive[n.parent]; alive[i] {
			below[n.parent+1]++
			count++
		}
	}
	if int(count) > b.max {
		return errTooMany
	}
	for i := range b.names {
		below[i+1] += below[i]
	}
	children := make([]uint32, count-1)
	fill := slices.Clone(below)
	for i := 1; i < len(b.names); i++ {
		if alive[i] {
			p := b.names[i].parent
			children[fill[p]] = uint32(i)
			fill[p]++
		}
	}
	b.at = nil // not needed any more, and large
	f := finisher{tree: t, opaque: opaque, sets: make(map[string]uint32)}
	f.begin(layers, firstLayer, count)
	numbers := make([]uint32, len(b.inodes)) // of inodes' nodes
	f.node(&b.inodes[0], 0)
	dirs := []uint32{0} // names whose children are yet to come
	for len(dirs) > 0 {
		at := dirs[0]
		dirs = dirs[1:]
		all := children[below[at]:below[at+1]]
		slices.SortFunc(all, func(x, y uint32) int { return strings.Compare(b.names[x].name, b.names[y].name) })
		parent := numbers[b.names[at].inode]
		t.nodes[parent].first, t.nodes[parent].count = uint32(len(t.entries)), uint32(len(all))
		for _, c := range all {
			n := &b.names[c]
			i := &b.inodes[n.inode]
			if numbers[n.inode] == 0 {
				numbers[n.inode] = f.node(i, uint32(len(t.entries)))
			}
			t.entries = append(t.entries, entry{name: f.write(n.name), nameLen: uint8(len(n.name)), node: numbers[n.inode], parent: parent})
			if i.dir {
				dirs = append(dirs, c)
				t.nodes[parent].nlink++
			} else {
				t.nodes[numbers[n.inode]].nlink++
			}
		}
	}
	return nil
}

// finisher fills a tree.
type finisher struct {
	*tree
	opaque Opaque
	sets   map[string]uint32 // extended attributes that there are already
}

// begin makes room for count entries.
func (f *finisher) begin(layers []store.Layer, firstLayer int, count uint32) {
	f.firstLayer = firstLayer
	spans, text := 0, 0
	for i := range layers {
		f.chunkBase = append(f.chunkBase, uint32(len(f.chunkSizes)))
		for j := range layers[i].Chunks {
			f.chunkSizes = append(f.chunkSizes, layers[i].Chunks[j].Size)
		}
		for j := range layers[i].Entries {
			x := &layers[i].Entries[j]
			_, base := split(x.Path)
			text += len(base)
			if !x.Hardlink {
				spans += len(x.Chunks)
				text += len(x.Target)
			}
		}
	}
	f.nodes = make([]node, 0, count)
	f.entries = make([]entry, 0, count)
	f.spanOff, f.spanChunk = make([]uint64, 0, spans), make([]uint32, 0, spans)
	f.text = make([]byte, 0, text)
	f.xattrSets = [][]xattr{nil}
	f.blocks = make(map[uint32]uint64)
}

// write keeps s.
func (f *finisher) write(s string) uint32 {
	at := uint32(len(f.text))
	f.text = append(f.text, s...)
	return at
}

// node makes the node of i, whose first name is number entry, and returns its number.
func (f *finisher) node(i *inode, entry uint32) uint32 {
	number := uint32(len(f.nodes))
	n := node{entry: entry, layer: uint16(i.layer)}
	var xattrs []store.Xattr
	switch x := i.entry; {
	case i.white:
		n.mode = unix.S_IFCHR
	case x == nil:
		n.mode = unix.S_IFDIR | 0o755
	default:
		n.mode, n.uid, n.gid, n.mtime, n.mtimeNsec, n.size = uint16(x.Mode), x.UID, x.GID, x.MtimeSec, x.MtimeNsec, x.Size
		xattrs = x.Xattrs
		f.content(&n, number, x)
	}
	if i.dir {
		n.size, n.nlink = blockSize, 2
	}
	if i.opaque {
		xattrs = f.marked(xattrs)
	}
	n.xattrs = f.set(xattrs)
	f.nodes = append(f.nodes, n)
	return number
}

// content keeps what x consists of.
func (f *finisher) content(n *node, number uint32, x *store.Entry) {
	switch x.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		n.first, n.count, n.size = f.write(x.Target), uint32(len(x.Target)), uint64(len(x.Target))
	case unix.S_IFCHR, unix.S_IFBLK:
		// As new_encode_dev has it (include/linux/kdev_t.h).
		n.first = x.RdevMinor&0xff | x.RdevMajor<<8 | x.RdevMinor&^0xff<<12
	case unix.S_IFREG:
		n.first, n.count = uint32(len(f.spanOff)), uint32(len(x.Chunks))
		base, held := f.chunkBase[int(n.layer)-f.firstLayer], uint64(0)
		for _, s := range x.Chunks {
			f.spanOff = append(f.spanOff, s.Off)
			f.spanChunk = append(f.spanChunk, base+s.Chunk)
			held += s.Len
		}
		if f.bytes += held; held < x.Size {
			n.sparse = true
			f.blocks[number] = (held + 511) / 512
		}
	}
}

// marked adds to extended attributes those of an opaque directory.
func (f *finisher) marked(xattrs []store.Xattr) []store.Xattr {
	var marks []string
	if f.opaque != OpaqueUser {
		marks = append(marks, "trusted.overlay.opaque")
	}
	if f.opaque != OpaqueTrusted {
		marks = append(marks, "user.overlay.opaque")
	}
	all := slices.DeleteFunc(slices.Clone(xattrs), func(a store.Xattr) bool { return slices.Contains(marks, a.Name) })
	for _, m := range marks {
		all = append(all, store.Xattr{Name: m, Value: []byte("y")})
	}
	return all
}

// set returns the number of a set of extended attributes: most files of an image have the same, or none.
func (f *finisher) set(xattrs []store.Xattr) uint32 {
	if len(xattrs) == 0 {
		return 0
	}
	var key []byte
	for _, a := range xattrs {
		key = append(append(append(append(key, a.Name...), 0), fmt.Sprint(len(a.Value), " ")...), a.Value...)
	}
	number, ok := f.sets[string(key)]
	if !ok {
		number = uint32(len(f.xattrSets))
		f.sets[string(key)] = number
		var set []xattr
		for _, a := range xattrs {
			set = append(set, xattr{name: append([]byte(a.Name), 0), value: slices.Clone(a.Value)})
		}
		f.xattrSets = append(f.xattrSets, set)
	}
	return number
}

package upperdir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Kind is what has become of a path.
type Kind string

const (
	// Added is not below.
	Added Kind = "added"
	// Modified has other data, another type, or another target than below; or is a directory that came from elsewhere in the place
	// of another.
	Modified Kind = "modified"
	// Metadata has the data that it has below, and another mode, owner, extended attribute, or time of change (not for directories).
	Metadata Kind = "metadata"
	// Deleted is only below. What a deleted directory holds is not listed.
	Deleted Kind = "deleted"
)

// Change is one path that is not as it is below.
type Change struct {
	// Path has no slash at its beginning; the root is ".". It need not be UTF-8, nor need From.
	Path string
	Kind Kind
	// Type is file, directory, symlink, fifo, socket, char or block.
	Type string
	// Was is the type below, where that is another one.
	Was string
	// From is where a directory was before it was renamed. It came with what it held then: only further changes are listed.
	From string
	// Size is a regular file's, in bytes.
	Size int64
}

// typeName names the type in a mode.
func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFCHR:
		return "char"
	case unix.S_IFBLK:
		return "block"
	}
	return "file"
}

// Diff calls emit for each path that is another in the upper u than in the tree below, in order: by name, byte for byte, a directory
// before what is in it. An error of emit ends it. Data is compared, whatever its times say.
func (u *Upper) Diff(ctx context.Context, below Tree, emit func(*Change) error) error {
	d := &differ{ctx: ctx, origins: origins{below: below}, emit: emit}
	root, err := below.Root(ctx)
	if err != nil {
		return fmt.Errorf("compare %s: look at the layers below: %w", u.path, err)
	}
	defer root.Close()
	top, err := u.s.h.at(u.dir.fd, ".")
	if err == nil {
		defer top.close()
		err = d.present(top, root, nil, false, "")
	}
	if err != nil {
		return fmt.Errorf("compare %s: %w", u.path, err)
	}
	return nil
}

type differ struct {
	ctx     context.Context
	origins origins
	emit    func(*Change) error
	depth   int
}

// newChange describes a file of the type in mode.
func newChange(path string, kind Kind, mode uint32) *Change {
	c := &Change{Path: path, Kind: kind, Type: typeName(mode)}
	if path == "" {
		c.Path = "."
	}
	return c
}

func (d *differ) change(path string, kind Kind, i *Info) *Change {
	c := newChange(path, kind, i.Mode)
	c.Size = i.Size
	return c
}

// present compares the upper's n with old, what is below at its path, or nil; parent is the directory below that its name is in, or
// nil. hides says that the upper hides what was below.
func (d *differ) present(n *node, old, parent File, hides bool, path string) error {
	if err := n.checkWhole(); err != nil {
		return explain("compare", path, err)
	}
	now, err := n.info()
	if err != nil {
		return explain("compare", path, err)
	}
	var was *Info
	if old != nil {
		if was, err = old.Info(d.ctx); err != nil {
			return explain("compare", path, err)
		}
	}
	if !n.isDir() {
		kind, err := d.compare(n, now, old, was)
		if err != nil {
			return explain("compare", path, err)
		}
		if kind == "" {
			return nil
		}
		return d.emit(d.replaced(path, kind, now, was))
	}

	source, from, _, err := d.origins.of(d.ctx, n, parent, path)
	if err != nil {
		return explain("compare", path, err)
	}
	if source != nil {
		defer source.Close()
	}
	if source != nil && (from != path || was == nil) {
		kind := Added
		if was != nil {
			kind = Modified
		}
		c := d.replaced(path, kind, now, was)
		c.From = from
		if err := d.emit(c); err != nil {
			return err
		}
		return d.inside(n, source, false, path)
	}
	if was == nil || typeName(was.Mode) != "directory" {
		kind := Added
		if was != nil {
			kind = Modified
		}
		if err := d.emit(d.replaced(path, kind, now, was)); err != nil {
			return err
		}
		return d.inside(n, nil, false, path)
	}
	if !sameMetadata(now, was) {
		if err := d.emit(d.change(path, Metadata, now)); err != nil {
			return err
		}
	}
	return d.inside(n, old, hides, path)
}

// replaced is a change of what was something else.
func (d *differ) replaced(path string, kind Kind, now, was *Info) *Change {
	c := d.change(path, kind, now)
	if was != nil && typeName(was.Mode) != c.Type {
		c.Was = typeName(was.Mode)
	}
	return c
}

// inside compares what is in the directory n with what is in old, or with nothing if that is nil. hides says that n is opaque.
func (d *differ) inside(n *node, old File, hides bool, path string) error {
	if d.depth++; d.depth > maxDepth {
		return tooDeep(path)
	}
	defer func() { d.depth-- }()
	l, err := n.read(d.ctx)
	if err != nil {
		return explain("read directory", path, err)
	}
	items := l.items
	if (l.opaque || hides) && old != nil {
		names, err := old.Names(d.ctx)
		if err != nil {
			return explain("read directory below", path, err)
		}
		items = withHidden(items, names)
	}
	for _, it := range items {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		if err := d.item(n, it, old, join(path, it.name)); err != nil {
			return err
		}
	}
	return nil
}

// withHidden adds whiteouts for those of names that items do not have.
func withHidden(items []item, names []string) []item {
	have := make(map[string]bool, len(items))
	all := make([]item, 0, len(items)+len(names))
	for _, it := range items {
		it.hides = true
		have[it.name] = true
		all = append(all, it)
	}
	for _, name := range names {
		if !have[name] {
			all = append(all, item{name: name, hides: true})
		}
	}
	slices.SortFunc(all, func(a, b item) int { return strings.Compare(a.name, b.name) })
	return all
}

func (d *differ) item(n *node, it item, parent File, path string) error {
	var old File
	if parent != nil {
		var err error
		old, err = parent.Lookup(d.ctx, it.name)
		switch {
		case err == nil:
			defer old.Close()
		case errors.Is(err, fs.ErrNotExist):
			old = nil
		default:
			return explain("compare", path, err)
		}
	}
	if it.present {
		f, err := n.child(it.name)
		if gone(err) {
			return nil
		}
		if err != nil {
			return explain("compare", path, err)
		}
		defer f.close()
		return d.present(f, old, parent, it.hides, path)
	}
	if old == nil {
		return nil // a whiteout of nothing
	}
	was, err := old.Info(d.ctx)
	if err != nil {
		return explain("compare", path, err)
	}
	return d.emit(d.change(path, Deleted, was))
}

// compare says what has become of a file that is no directory; "" is nothing.
func (d *differ) compare(n *node, now *Info, old File, was *Info) (Kind, error) {
	switch {
	case was == nil:
		return Added, nil
	case now.Mode&unix.S_IFMT != was.Mode&unix.S_IFMT, now.Size != was.Size, now.Link != was.Link, now.Rdev != was.Rdev:
		return Modified, nil
	}
	if n.kind() == unix.S_IFREG {
		same, err := d.sameData(n, old)
		if err != nil {
			return "", err
		}
		if !same {
			return Modified, nil
		}
	}
	if !sameMetadata(now, was) || now.Mtime != was.Mtime {
		return Metadata, nil
	}
	return "", nil
}

func sameMetadata(a, b *Info) bool {
	return a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && maps.Equal(a.Xattrs, b.Xattrs)
}

func (d *differ) sameData(n *node, old File) (bool, error) {
	a, err := n.reader(d.ctx)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := old.Open(d.ctx)
	if err != nil {
		return false, err
	}
	defer b.Close()
	return sameBytes(a, b)
}

func sameBytes(a, b io.Reader) (bool, error) {
	const step = bufferLen
	x, y := takeBuffer(), takeBuffer()
	defer x.put()
	defer y.put()
	p, q := x[:], y[:]
	for {
		n, errA := io.ReadFull(a, p)
		m, errB := io.ReadFull(b, q)
		for _, err := range []error{errA, errB} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if !bytes.Equal(p[:n], q[:m]) {
			return false, nil
		}
		if n < step {
			return true, nil
		}
	}
}

// shown returns the names that are true, sorted.
func shown(names map[string]bool) []string {
	list := make([]string, 0, len(names))
	for name, show := range names {
		if show {
			list = append(list, name)
		}
	}
	slices.Sort(list)
	return list
}

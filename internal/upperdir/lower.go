package upperdir

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Info is what a file is, beyond its data.
type Info struct {
	// Mode is the type and the permission bits, as st_mode.
	Mode     uint32
	UID, GID uint32
	// Size is a regular file's length.
	Size int64
	// Mtime is in nanoseconds since 1970.
	Mtime int64
	// Rdev is a device's number.
	Rdev uint64
	// Link is a symbolic link's target.
	Link string
	// Xattrs are the extended attributes as a guest sees them.
	Xattrs map[string]string
}

// Tree is what lies below an upper, as one tree.
type Tree interface {
	// Root returns the top directory.
	Root(ctx context.Context) (File, error)
	// Redirected finds the directory that the mark overlay.redirect of an upper names by an absolute path: a path in the layers
	// themselves. fs.ErrNotExist says that there is none.
	Redirected(ctx context.Context, path string) (File, error)
}

// File is a file of a Tree. It is closed by who got it.
type File interface {
	// ID is something that no other file of the tree has.
	ID() string
	// Info describes it.
	Info(ctx context.Context) (*Info, error)
	// Lookup finds a name in a directory; fs.ErrNotExist says that it is not there.
	Lookup(ctx context.Context, name string) (File, error)
	// Names lists a directory, sorted.
	Names(ctx context.Context) ([]string, error)
	// Open reads a regular file from its beginning.
	Open(ctx context.Context) (io.ReadCloser, error)
	Close()
}

// Lowers returns what directories of the host are together, the uppermost first, read as an overlay reads its layers. They stay the
// caller's, and have to stay open.
func (s *Store) Lowers(dirs []*os.File) (Tree, error) {
	l := &lowers{h: s.h}
	for _, d := range dirs {
		l.roots = append(l.roots, int(d.Fd()))
	}
	return l, nil
}

type lowers struct {
	h     *host
	roots []int
}

// lower is a file of lowers: the one that shows, and for a directory the others that it is merged with.
type lower struct {
	l     *lowers
	parts []part
}

// part is a file in one layer.
type part struct {
	layer int
	n     *node
}

func (l *lowers) Root(context.Context) (File, error) {
	m := &merge{l: l}
	for i := range l.roots {
		n, err := l.h.at(l.roots[i], ".")
		if err != nil {
			m.close()
			return nil, err
		}
		if m.add(i, n) {
			break
		}
	}
	return m.file()
}

func (l *lowers) Redirected(_ context.Context, path string) (File, error) {
	m := &merge{l: l}
	m.absolute(0, path)
	return m.file()
}

func (f *lower) Lookup(_ context.Context, name string) (File, error) {
	if !f.parts[0].n.isDir() {
		return nil, unix.ENOTDIR
	}
	m := &merge{l: f.l}
	for _, p := range f.parts {
		if m.step(p.layer, p.n.fd, name) {
			break
		}
		if m.elsewhere != "" {
			if strings.HasPrefix(m.elsewhere, "/") {
				m.absolute(p.layer+1, m.elsewhere)
				break
			}
			name, m.elsewhere = m.elsewhere, ""
		}
	}
	return m.file()
}

// merge puts a file together, layer by layer from above.
type merge struct {
	l     *lowers
	parts []part
	// elsewhere is where layers below have the rest of it, if not under its own name.
	elsewhere string
	err       error
}

func (m *merge) close() {
	for _, p := range m.parts {
		p.n.close()
	}
}

// file returns what was found.
func (m *merge) file() (File, error) {
	switch {
	case m.err != nil:
		m.close()
		return nil, m.err
	case len(m.parts) == 0:
		return nil, fs.ErrNotExist
	}
	return &lower{m.l, m.parts}, nil
}

// add takes n in and says whether it hides the layers below.
func (m *merge) add(layer int, n *node) (last bool) {
	if !n.isDir() && len(m.parts) > 0 {
		n.close()
		return true
	}
	m.parts = append(m.parts, part{layer, n})
	if !n.isDir() {
		m.err = n.checkWhole()
		return true
	}
	var opaque bool
	if opaque, m.elsewhere, m.err = n.dirMarks(); m.err != nil {
		return true
	}
	return opaque
}

// dirMarks reads what says of the directory n whether and where it goes on in the layers below.
func (n *node) dirMarks() (opaque bool, elsewhere string, err error) {
	value, _, err := n.mark("opaque")
	if err != nil {
		return false, "", err
	}
	if value != "y" {
		if exists, err := n.has(whOpaque); err != nil || exists {
			return exists, "", err
		}
		elsewhere, err = n.redirect()
	}
	return value == "y", elsewhere, err
}

// has says whether the directory n has an entry of that name.
func (n *node) has(name string) (bool, error) {
	if len(name) > unix.NAME_MAX {
		return false, nil
	}
	var st unix.Stat_t
	err := unix.Fstatat(n.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if gone(err) {
		return false, nil
	}
	return err == nil, err
}

// find looks name up in one layer's directory. hides says that the layers below have no more to say.
func (h *host) find(dirfd int, name string) (n *node, hides bool, err error) {
	if strings.HasPrefix(name, whPrefix) {
		return nil, true, nil
	}
	dir := &node{h: h, fd: dirfd} // of which only the descriptor is used
	if hides, err = dir.has(whPrefix + name); err != nil {
		return nil, false, err
	}
	n, err = h.at(dirfd, name)
	if gone(err) {
		return nil, hides, nil
	}
	if err != nil {
		return nil, false, err
	}
	marked := false
	if n.kind() == unix.S_IFREG && n.st.Size == 0 {
		value, _, _ := dir.mark("opaque")
		marked = value == "x"
	}
	white, err := n.whiteout(marked)
	if err != nil || white {
		n.close()
		return nil, true, err
	}
	return n, hides, nil
}

// step looks name up in one layer's directory and says whether that was the last layer to look at.
func (m *merge) step(layer, dirfd int, name string) (last bool) {
	n, hides, err := m.l.h.find(dirfd, name)
	if err != nil {
		m.err = err
		return true
	}
	if n == nil {
		return hides
	}
	return m.add(layer, n) || hides
}

// absolute looks for the directory path in the layers from first on, each from its root.
func (m *merge) absolute(first int, path string) {
	for layer := first; layer < len(m.l.roots); layer++ {
		last := false
		if path, last = m.walk(layer, path); last {
			return
		}
	}
}

// walk goes down path in one layer, and returns the path to look for in those below: directories on the way may say that they go on
// elsewhere there, or that they do not go on, which an absolute redirect further down the path overrides.
func (m *merge) walk(layer int, path string) (next string, last bool) {
	dirfd := m.l.roots[layer]
	var dir *node
	defer func() { dir.close() }()
	for rest := strings.TrimPrefix(path, "/"); ; {
		name, after, more := strings.Cut(rest, "/")
		if !more {
			m.elsewhere = ""
			last = m.step(layer, dirfd, name) || last
			return redirectedPath(next, name, m.elsewhere), last && !strings.HasPrefix(m.elsewhere, "/")
		}
		n, hides, err := m.l.h.find(dirfd, name)
		if err != nil {
			m.err = err
			return "", true
		}
		if n == nil {
			return next + "/" + rest, last || hides
		}
		dir.close()
		dir, dirfd = n, n.fd
		if !n.isDir() {
			return "", true
		}
		opaque, elsewhere, err := n.dirMarks()
		if err != nil {
			m.err = err
			return "", true
		}
		last = (last || opaque || hides) && !strings.HasPrefix(elsewhere, "/")
		next = redirectedPath(next, name, elsewhere)
		rest = after
	}
}

// redirectedPath is where the directory name in dir goes on, which says so itself with elsewhere unless that is "".
func redirectedPath(dir, name, elsewhere string) string {
	switch {
	case strings.HasPrefix(elsewhere, "/"):
		return elsewhere
	case elsewhere != "":
		return dir + "/" + elsewhere
	}
	return dir + "/" + name
}

func (f *lower) Close() {
	for _, p := range f.parts {
		p.n.close()
	}
}

func (f *lower) ID() string {
	id := f.parts[0].n.id()
	return fmt.Sprintf("%d:%d", id.dev, id.ino)
}

func (f *lower) Info(context.Context) (*Info, error) { return f.parts[0].n.info() }

func (f *lower) Open(ctx context.Context) (io.ReadCloser, error) { return f.parts[0].n.reader(ctx) }

func (f *lower) Names(ctx context.Context) ([]string, error) {
	seen := make(map[string]bool) // true: shown
	for _, p := range f.parts {
		l, err := p.n.read(ctx)
		if err != nil {
			return nil, err
		}
		for _, it := range l.items {
			if _, above := seen[it.name]; !above && (it.present || it.hides) {
				seen[it.name] = it.present
			}
		}
	}
	return shown(seen), nil
}

// info describes n as a guest sees it.
func (n *node) info() (*Info, error) {
	i := &Info{
		Mode: n.st.Mode, UID: n.st.Uid, GID: n.st.Gid, Mtime: n.st.Mtim.Nano(), Xattrs: make(map[string]string),
	}
	var err error
	switch n.kind() {
	case unix.S_IFREG:
		i.Size = n.st.Size
	case unix.S_IFLNK:
		if i.Link, err = n.readlink(); err != nil {
			return nil, err
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		i.Rdev = n.st.Rdev
	}
	names, err := n.xattrs()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		guest, ok := guestXattr(name)
		if !ok {
			continue
		}
		value, ok, err := n.get(name)
		if err != nil {
			return nil, err
		}
		if ok {
			i.Xattrs[guest] = string(value)
		}
	}
	return i, nil
}

package upperdir

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Exported says what an Export wrote.
type Exported struct {
	Stats
	// Sockets are paths that are left out, as tar has no sockets: the first ones, of SocketCount.
	Sockets     []string `json:"sockets,omitempty"`
	SocketCount int      `json:"socket_count,omitempty"`
}

// maxSockets is how many paths Exported.Sockets has at most.
const maxSockets = 100

// Export writes the changes in the upper u to w as a layer of an OCI image: a tar archive with .wh. files for what is gone. Names are
// sorted; modes, owners, times and extended attributes are the files'. below is needed for directories that were renamed, which are
// written whole; if it is nil, they are an error. A limit other than 0 is how many bytes of data may be written: files can have far
// more than they take on the disk.
func (u *Upper) Export(ctx context.Context, w io.Writer, below Tree, limit int64) (Exported, error) {
	e := &exporter{ctx: ctx, w: tar.NewWriter(w), origins: origins{below: below}, limit: limit, linked: make(map[fileID]string)}
	var root File
	err := func() (err error) {
		if below != nil {
			if root, err = below.Root(ctx); err != nil {
				return fmt.Errorf("look at the layers below: %w", err)
			}
			defer root.Close()
		}
		top, err := u.s.h.at(u.dir.fd, ".")
		if err != nil {
			return err
		}
		defer top.close()
		if err := e.inside(top, root, ""); err != nil {
			return err
		}
		return e.w.Close()
	}()
	if err != nil {
		return e.out, fmt.Errorf("export %s: %w", u.path, err)
	}
	return e.out, nil
}

type exporter struct {
	ctx     context.Context
	w       *tar.Writer
	origins origins
	limit   int64
	linked  map[fileID]string
	out     Exported
	depth   int
}

// inside writes what is in the upper's directory n; parent is what it goes on in below, or nil.
func (e *exporter) inside(n *node, parent File, path string) error {
	if e.depth++; e.depth > maxDepth {
		return tooDeep(path)
	}
	defer func() { e.depth-- }()
	l, err := n.read(e.ctx)
	if err != nil {
		return explain("read directory", path, err)
	}
	if l.opaque && path != "" {
		if err := e.marker(join(path, whOpaque)); err != nil {
			return err
		}
	}
	for _, it := range l.items {
		if err := e.item(n, it, parent, join(path, it.name)); err != nil {
			return err
		}
	}
	return nil
}

func (e *exporter) item(n *node, it item, parent File, path string) error {
	if err := e.ctx.Err(); err != nil {
		return err
	}
	if !it.present {
		dir := path[:len(path)-len(it.name)]
		return e.marker(dir + whPrefix + it.name)
	}
	f, err := n.child(it.name)
	if gone(err) {
		return nil
	}
	if err != nil {
		return explain("read", path, err)
	}
	defer f.close()
	if !f.isDir() {
		return explain("export", path, e.file(f, path))
	}
	if err := e.header(f, path); err != nil {
		return explain("export", path, err)
	}
	opaque, to, err := f.dirMarks()
	if err != nil {
		return explain("read", path, err)
	}
	var old File
	if parent != nil && !opaque && !it.hides {
		old, err = parent.Lookup(e.ctx, it.name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return explain("look below at", path, err)
		}
		if err == nil {
			defer old.Close()
		} else {
			old = nil
		}
	}
	if opaque || to == "" {
		if it.hides && !opaque {
			if err := e.marker(join(path, whOpaque)); err != nil {
				return err
			}
		}
		return e.inside(f, old, path)
	}
	if e.origins.below == nil {
		return fmt.Errorf("%q was renamed, and takes what is below to be exported; name the layers", path)
	}
	source, from, _, err := e.origins.of(e.ctx, f, parent, path)
	if err != nil {
		return explain("look below at", path, err)
	}
	if source == nil {
		return e.inside(f, nil, path)
	}
	defer source.Close()
	if from == path && old != nil {
		return e.inside(f, source, path)
	}
	if err := e.marker(join(path, whOpaque)); err != nil {
		return err
	}
	return e.merged(f, source, path)
}

// merged writes what an overlay shows in a directory that is n above and old below; either may be nil.
func (e *exporter) merged(n *node, old File, path string) error {
	if e.depth++; e.depth > maxDepth {
		return tooDeep(path)
	}
	defer func() { e.depth-- }()
	above := make(map[string]item)
	show := make(map[string]bool)
	opaque := false
	if n != nil {
		l, err := n.read(e.ctx)
		if err != nil {
			return explain("read directory", path, err)
		}
		opaque = l.opaque
		for _, it := range l.items {
			above[it.name], show[it.name] = it, it.present
		}
	}
	if old != nil && !opaque {
		names, err := old.Names(e.ctx)
		if err != nil {
			return explain("read directory below", path, err)
		}
		for _, name := range names {
			if _, ok := show[name]; !ok {
				show[name] = true
			}
		}
	}
	for _, name := range shown(show) {
		if err := e.ctx.Err(); err != nil {
			return err
		}
		if err := e.both(n, old, above[name], name, join(path, name), opaque); err != nil {
			return err
		}
	}
	return nil
}

// both writes one name of a merged directory.
func (e *exporter) both(n *node, parent File, it item, name, path string, opaque bool) error {
	var old File
	if parent != nil && !opaque && !it.hides {
		var err error
		old, err = parent.Lookup(e.ctx, name)
		switch {
		case err == nil:
			defer old.Close()
		case errors.Is(err, fs.ErrNotExist):
			old = nil
		default:
			return explain("look below at", path, err)
		}
	}
	if !it.present {
		if old == nil {
			return nil
		}
		return e.lower(old, path)
	}
	f, err := n.child(name)
	if gone(err) {
		return nil
	}
	if err != nil {
		return explain("read", path, err)
	}
	defer f.close()
	if !f.isDir() {
		return explain("export", path, e.file(f, path))
	}
	if err := e.header(f, path); err != nil {
		return explain("export", path, err)
	}
	source, _, _, err := e.origins.of(e.ctx, f, parent, path)
	if err != nil {
		return explain("look below at", path, err)
	}
	if source != nil {
		defer source.Close()
		old = source
	}
	if old != nil {
		if i, err := old.Info(e.ctx); err != nil {
			return explain("look below at", path, err)
		} else if typeName(i.Mode) != "directory" {
			old = nil
		}
	}
	return e.merged(f, old, path)
}

// lower writes a file of the layers below, and what is in it.
func (e *exporter) lower(f File, path string) error {
	i, err := f.Info(e.ctx)
	if err != nil {
		return explain("look below at", path, err)
	}
	var data io.ReadCloser
	if i.Mode&unix.S_IFMT == unix.S_IFREG && i.Size > 0 {
		if data, err = f.Open(e.ctx); err != nil {
			return explain("open below", path, err)
		}
		defer data.Close()
	}
	if err := e.entry(i, path, data); err != nil {
		return explain("export", path, err)
	}
	if i.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	return e.merged(nil, f, path)
}

// marker writes an empty file whose name says what is gone.
func (e *exporter) marker(path string) error {
	e.out.Files++
	return e.w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: 0o600, ModTime: time.Unix(0, 0)})
}

func (e *exporter) header(f *node, path string) error {
	i, err := f.info()
	if err != nil {
		return err
	}
	return e.entry(i, path, nil)
}

// file writes a file of the upper that is no directory.
func (e *exporter) file(f *node, path string) error {
	if err := f.checkWhole(); err != nil {
		return err
	}
	if f.st.Nlink > 1 {
		if first, ok := e.linked[f.id()]; ok {
			e.out.Files++
			return e.w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: path, Linkname: first, Format: tar.FormatPAX})
		}
		e.linked[f.id()] = path
	}
	i, err := f.info()
	if err != nil {
		return err
	}
	var data io.ReadCloser
	if f.kind() == unix.S_IFREG {
		if data, err = f.reader(e.ctx); err != nil {
			return err
		}
		defer data.Close()
	}
	return e.entry(i, path, data)
}

func (e *exporter) entry(i *Info, path string, data io.Reader) error {
	h := &tar.Header{
		Name: path, Mode: int64(i.Mode & 0o7777), Uid: int(i.UID), Gid: int(i.GID),
		ModTime: time.Unix(0, i.Mtime), Format: tar.FormatPAX,
	}
	switch i.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, i.Size
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, path+"/"
	case unix.S_IFLNK:
		h.Typeflag, h.Linkname = tar.TypeSymlink, i.Link
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if i.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(i.Rdev)), int64(unix.Minor(i.Rdev))
	default:
		if e.out.SocketCount++; len(e.out.Sockets) < maxSockets {
			e.out.Sockets = append(e.out.Sockets, path)
		}
		return nil
	}
	if e.limit > 0 && h.Size > e.limit-e.out.Bytes {
		return fmt.Errorf("it would be more than %d bytes of data; raise the limit", e.limit)
	}
	names := make([]string, 0, len(i.Xattrs))
	for name := range i.Xattrs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string)
		}
		h.PAXRecords["SCHILY.xattr."+name] = i.Xattrs[name]
	}
	if err := e.w.WriteHeader(h); err != nil {
		return err
	}
	e.out.Files++
	if h.Size == 0 {
		return nil
	}
	n, err := io.Copy(e.w, io.LimitReader(data, h.Size))
	e.out.Bytes += n
	if err == nil && n < h.Size {
		err = errors.New("it became shorter while it was read; hold the guest up, and do it again")
	}
	return err
}

package iofs

import (
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
)

// File is a file of a Tree.
type File struct {
	Size    int64
	Mode    fs.FileMode // permissions; 0 is 0444
	ModTime time.Time
	// Data is what the file holds. Its ReadAt is called from many threads at once.
	Data io.ReaderAt
}

// Tree makes a file system of a list of files, as an index or an object store has it: keys are paths with slashes and
// without a leading one; directories are made as needed. The list is only looked at now.
func Tree(files map[string]File) (fs.FS, error) {
	t := tree{".": &treeEntry{name: ".", mode: fs.ModeDir | 0o555}}
	for p, f := range files {
		switch {
		case !fs.ValidPath(p) || p == ".":
			return nil, fmt.Errorf("make tree: %q is no path of a file: expected one like dir/name, with no slash in front and no . or .. in it", p)
		case f.Data == nil || f.Size < 0:
			return nil, fmt.Errorf("make tree: %s needs data and a size of at least 0", p)
		case f.Mode.Type() != 0:
			return nil, fmt.Errorf("make tree: %s has the type %v, expected a regular file", p, f.Mode.Type())
		case f.Mode == 0:
			f.Mode = 0o444
		}
		e := &treeEntry{name: path.Base(p), mode: f.Mode, file: f}
		if err := t.add(p, e); err != nil {
			return nil, err
		}
	}
	for _, e := range t {
		slices.SortFunc(e.children, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	}
	return t, nil
}

// tree is a Tree by path.
type tree map[string]*treeEntry

// treeEntry is a file or directory: an fs.FileInfo and fs.DirEntry of itself.
type treeEntry struct {
	name     string
	mode     fs.FileMode
	file     File
	children []fs.DirEntry
}

// add adds e at p, and the directories above it.
func (t tree) add(p string, e *treeEntry) error {
	switch old := t[p]; {
	case old == nil:
	case old.IsDir() && e.IsDir():
		return nil
	default:
		return fmt.Errorf("make tree: %s is both a file and a directory", p)
	}
	t[p] = e
	dir := path.Dir(p)
	if err := t.add(dir, &treeEntry{name: path.Base(dir), mode: fs.ModeDir | 0o555}); err != nil {
		return err
	}
	t[dir].children = append(t[dir].children, e)
	return nil
}

func (t tree) find(op, name string) (*treeEntry, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	e := t[name]
	if e == nil {
		return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
	}
	return e, nil
}

// Open implements fs.FS.
func (t tree) Open(name string) (fs.File, error) {
	e, err := t.find("open", name)
	if err != nil {
		return nil, err
	}
	if e.IsDir() {
		return &treeDir{treeEntry: e}, nil
	}
	return &treeFile{io.NewSectionReader(e.file.Data, 0, e.file.Size), e}, nil
}

// Stat implements fs.StatFS.
func (t tree) Stat(name string) (fs.FileInfo, error) { return t.find("stat", name) }

// ReadDir implements fs.ReadDirFS.
func (t tree) ReadDir(name string) ([]fs.DirEntry, error) {
	e, err := t.find("readdir", name)
	if err != nil {
		return nil, err
	}
	if !e.IsDir() {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: fs.ErrInvalid}
	}
	return slices.Clone(e.children), nil
}

func (e *treeEntry) Name() string               { return e.name }
func (e *treeEntry) Size() int64                { return e.file.Size }
func (e *treeEntry) Mode() fs.FileMode          { return e.mode }
func (e *treeEntry) Type() fs.FileMode          { return e.mode.Type() }
func (e *treeEntry) ModTime() time.Time         { return e.file.ModTime }
func (e *treeEntry) IsDir() bool                { return e.mode.IsDir() }
func (e *treeEntry) Sys() any                   { return nil }
func (e *treeEntry) Info() (fs.FileInfo, error) { return e, nil }

// treeFile is an open file of a Tree.
type treeFile struct {
	*io.SectionReader
	entry *treeEntry
}

func (f *treeFile) Stat() (fs.FileInfo, error) { return f.entry, nil }
func (f *treeFile) Close() error               { return nil }

// treeDir is an open directory of a Tree.
type treeDir struct {
	*treeEntry
	next int
}

func (d *treeDir) Stat() (fs.FileInfo, error) { return d.treeEntry, nil }
func (d *treeDir) Close() error               { return nil }

func (d *treeDir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.name, Err: fs.ErrInvalid}
}

// ReadDir implements fs.ReadDirFile.
func (d *treeDir) ReadDir(n int) ([]fs.DirEntry, error) {
	rest := d.children[d.next:]
	if n > 0 {
		if len(rest) == 0 {
			return nil, io.EOF
		}
		rest = rest[:min(n, len(rest))]
	}
	d.next += len(rest)
	return slices.Clone(rest), nil
}

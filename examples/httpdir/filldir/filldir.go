// Package filldir fills a directory with the files of a file system of io/fs, each when it is first opened: what comes over a
// network comes once, and is read from the disk from then on, by as many guests as there are.
//
// A Dir is an ondemand.Materializer for a program that is sluiced with an extension, and a plugin.Directory for a layer plug-in.
package filldir

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sync"

	"github.com/sluicefs/sluice/plugin"
)

// pieceSize is how much of a file is asked for at a time, in bytes.
const pieceSize = 1 << 20

// Dir is a directory of the host that fills.
type Dir struct {
	from  fs.FS
	dir   *os.File // what is served
	files *os.Root // the same
	done  *os.Root // has an empty file for each that has been filled, so that it is known the next time, too

	placing sync.Mutex
}

// New has from's files appear in path/files. Which of them are whole is kept in path/done. from's files implement io.ReaderAt.
func New(from fs.FS, path string) (_ *Dir, err error) {
	d := &Dir{from: from}
	defer func() {
		if err != nil {
			_ = d.Close()
		}
	}()
	for name, root := range map[string]**os.Root{"files": &d.files, "done": &d.done} {
		sub := filepath.Join(path, name)
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return nil, err
		}
		if *root, err = os.OpenRoot(sub); err != nil {
			return nil, err
		}
	}
	if d.dir, err = os.Open(filepath.Join(path, "files")); err != nil {
		return nil, err
	}
	return d, d.Open(context.Background(), ".")
}

// Info implements plugin.Layer.
func (d *Dir) Info() plugin.Info { return plugin.Info{} }

// Dir implements plugin.Directory.
func (d *Dir) Dir() *os.File { return d.dir }

// Close implements plugin.Layer.
func (d *Dir) Close() error {
	var errs []error
	for _, root := range []*os.Root{d.files, d.done} {
		if root != nil {
			errs = append(errs, root.Close())
		}
	}
	return errors.Join(append(errs, d.dir.Close())...)
}

// Lookup makes a file of the right size with nothing in it, or a directory.
func (d *Dir) Lookup(_ context.Context, name string) error {
	info, err := fs.Stat(d.from, name)
	if err != nil {
		return err
	}
	return d.place(name, info)
}

func (d *Dir) place(name string, info fs.FileInfo) error {
	d.placing.Lock()
	defer d.placing.Unlock()
	if old, err := d.files.Lstat(name); err == nil && old.IsDir() == info.IsDir() && (info.IsDir() || old.Size() == info.Size()) {
		return nil
	}
	if err := d.files.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if info.IsDir() {
		return d.files.Mkdir(name, 0o755)
	}
	f, err := d.files.OpenFile(name, os.O_CREATE|os.O_WRONLY, info.Mode().Perm())
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(info.Size()), f.Close(), d.files.Chtimes(name, info.ModTime(), info.ModTime()))
}

// Open fills a file, unless that has been done, or makes the files of a directory as Lookup does.
func (d *Dir) Open(ctx context.Context, name string) error {
	info, err := fs.Stat(d.from, name)
	if err != nil {
		return err
	}
	if info.IsDir() {
		entries, err := fs.ReadDir(d.from, name)
		for _, e := range entries {
			if err == nil {
				err = d.Lookup(ctx, path.Join(name, e.Name()))
			}
		}
		return err
	}
	// A file that has changed at its origin is another one.
	mark := fmt.Sprintf("%x", sha256.Sum256(fmt.Appendf(nil, "%s\x00%d\x00%d", name, info.Size(), info.ModTime().UnixNano())))
	if _, err := d.done.Stat(mark); err == nil {
		return nil
	}
	if err := d.place(name, info); err != nil {
		return err
	}
	if err := d.fill(ctx, name, info); err != nil {
		return err
	}
	return d.done.WriteFile(mark, nil, 0o644)
}

// fill copies a file piece by piece to where the guest knows it.
func (d *Dir) fill(ctx context.Context, name string, info fs.FileInfo) (err error) {
	source, err := d.from.Open(name)
	if err != nil {
		return err
	}
	defer source.Close()
	at, ok := source.(io.ReaderAt)
	if !ok {
		return fmt.Errorf("%s is a %T, expected an io.ReaderAt", name, source)
	}
	f, err := d.files.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), d.files.Chtimes(name, info.ModTime(), info.ModTime())) }()
	piece := make([]byte, pieceSize)
	for off := int64(0); off < info.Size(); {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		b := piece[:min(pieceSize, info.Size()-off)]
		n, err := at.ReadAt(b, off)
		if n < len(b) {
			return fmt.Errorf("%s ends after %d bytes, expected %d: %w", name, off+int64(n), info.Size(), err)
		}
		if _, err := f.WriteAt(b, off); err != nil {
			return err
		}
		off += int64(n)
	}
	return f.Sync() // before it is said to be whole
}

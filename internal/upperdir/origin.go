package upperdir

import (
	"context"
	"errors"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

// origins finds where directories of an upper were before they were renamed.
type origins struct {
	below Tree
	// index has the paths of all directories below by their IDs. It is only made where the layers below have renamed directories
	// themselves: the marks are about paths in the layers.
	index map[string]string
}

// of finds the directory below that n at path, in a directory that goes on in parent below, was made of by renaming, and says where
// that was; known is false where only a layer's path can be told. A nil source is none.
func (o *origins) of(ctx context.Context, n *node, parent File, path string) (source File, from string, known bool, err error) {
	opaque, to, err := n.dirMarks()
	if err != nil || opaque || to == "" {
		return nil, "", false, err
	}
	if rest, absolute := strings.CutPrefix(to, "/"); absolute {
		source, err = o.below.Redirected(ctx, to)
		from = rest
	} else if parent != nil {
		source, err = parent.Lookup(ctx, to)
		from = path[:strings.LastIndexByte(path, '/')+1] + to
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", false, nil // nothing of it is left below
	}
	if err != nil || source == nil {
		return nil, "", false, err
	}
	i, err := source.Info(ctx)
	if err == nil && i.Mode&unix.S_IFMT == unix.S_IFDIR {
		if from, known, err = o.locate(ctx, source, from); err == nil {
			return source, from, known, nil
		}
	}
	source.Close()
	return nil, "", false, err
}

// locate finds the path of a directory below, which is probably guess.
func (o *origins) locate(ctx context.Context, dir File, guess string) (path string, known bool, err error) {
	root, err := o.below.Root(ctx)
	if err != nil {
		return "", false, err
	}
	f := root
	for name := range strings.SplitSeq(guess, "/") {
		next, err := f.Lookup(ctx, name)
		f.Close()
		if err != nil {
			f = nil
			break
		}
		f = next
	}
	if f != nil {
		found := f.ID() == dir.ID()
		f.Close()
		if found {
			return guess, true, nil
		}
	}
	if o.index == nil {
		root, err := o.below.Root(ctx)
		if err != nil {
			return "", false, err
		}
		defer root.Close()
		index := make(map[string]string)
		if err := addDirs(ctx, index, root, "", 0); err != nil {
			return "", false, err
		}
		o.index = index
	}
	if path, known = o.index[dir.ID()]; known {
		return path, true, nil
	}
	return guess, false, nil
}

func addDirs(ctx context.Context, index map[string]string, dir File, path string, depth int) error {
	if depth > maxDepth {
		return tooDeep(path)
	}
	index[dir.ID()] = path
	names, err := dir.Names(ctx)
	if err != nil {
		return explain("read directory below", path, err)
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := addDir(ctx, index, dir, name, join(path, name), depth+1); err != nil {
			return err
		}
	}
	return nil
}

func addDir(ctx context.Context, index map[string]string, parent File, name, path string, depth int) error {
	f, err := parent.Lookup(ctx, name)
	if err != nil {
		return explain("look below at", path, err)
	}
	defer f.Close()
	i, err := f.Info(ctx)
	if err != nil {
		return explain("look below at", path, err)
	}
	if i.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	return addDirs(ctx, index, f, path, depth)
}

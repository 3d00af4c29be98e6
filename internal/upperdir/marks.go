package upperdir

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// prefixes are the namespaces that overlays keep their marks in: the kernel's, the kernel's with userxattr, fuse-overlayfs's.
var prefixes = [...]string{"trusted.overlay.", "user.overlay.", "user.fuseoverlayfs."}

// Whiteouts are character devices 0:0, empty files with the attribute overlay.whiteout in a directory whose opaque mark is "x", or
// files with this before the name that they hide.
const (
	whPrefix = ".wh."
	whOpaque = ".wh..wh..opq"
	// whMeta begins names that aufs keeps for itself.
	whMeta = ".wh..wh."
)

// guestXattr returns what a guest calls the attribute name of a layer's file; ok is false for an overlay's own marks.
func guestXattr(name string) (guest string, ok bool) {
	for _, prefix := range prefixes {
		if rest, mark := strings.CutPrefix(name, prefix); mark {
			// overlay.overlay.NAME is what a guest that runs an overlay itself has set as overlay.NAME.
			escaped := strings.HasPrefix(rest, "overlay.") && strings.HasSuffix(prefix, ".overlay.")
			return strings.TrimSuffix(prefix, "overlay.") + rest, escaped
		}
	}
	return name, true
}

// mark returns the value of an overlay's mark in whichever namespace has it.
func (n *node) mark(name string) (string, bool, error) {
	for _, prefix := range prefixes {
		value, ok, err := n.get(prefix + name)
		if err != nil || ok {
			return string(value), ok, err
		}
	}
	return "", false, nil
}

// redirect returns where the rest of the directory n is below: an absolute path, or one name beside it; "" if n is not redirected.
func (n *node) redirect() (string, error) {
	to, ok, err := n.mark("redirect")
	if err != nil || !ok {
		return "", err
	}
	if rest, absolute := strings.CutPrefix(to, "/"); absolute {
		for _, name := range strings.Split(rest, "/") {
			if !validName(name) {
				return "", fmt.Errorf("the mark overlay.redirect is %q, which is no path", to)
			}
		}
	} else if !validName(to) {
		return "", fmt.Errorf("the mark overlay.redirect is %q, which is no name", to)
	}
	return to, nil
}

func validName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= unix.NAME_MAX && !strings.ContainsAny(name, "/\x00")
}

// errMetacopy is about a file whose data is in another layer (metacopy=on).
var errMetacopy = errors.New("the file has the mark overlay.metacopy: only its attributes were copied up; mount the overlay with metacopy=off and write to the file there")

// checkWhole refuses a regular file that a kernel has copied up without its data.
func (n *node) checkWhole() error {
	if n.kind() != unix.S_IFREG {
		return nil
	}
	if _, ok, err := n.mark("metacopy"); err != nil {
		return err
	} else if ok {
		return errMetacopy
	}
	return nil
}

// item is what a layer says about one name of a directory.
type item struct {
	name string
	// hides says that the layers below have nothing to say about it.
	hides bool
	// present says that the layer has a file of that name.
	present bool
}

// listing is a layer's directory, its marks read.
type listing struct {
	opaque bool
	items  []item // sorted by name
}

// read lists the directory n of a layer.
func (n *node) read(ctx context.Context) (*listing, error) {
	entries, err := n.list(ctx)
	if err != nil {
		return nil, err
	}
	opaque, _, err := n.mark("opaque")
	if err != nil {
		return nil, err
	}
	l := &listing{opaque: opaque == "y", items: make([]item, 0, len(entries))}
	hidden := make(map[string]bool)
	for _, e := range entries {
		switch {
		case e.name == whOpaque:
			l.opaque = true
		case strings.HasPrefix(e.name, whMeta):
		case strings.HasPrefix(e.name, whPrefix):
			hidden[e.name[len(whPrefix):]] = true
		default:
			white, err := n.isWhiteout(e, opaque == "x")
			if gone(err) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("%q: %w", e.name, err)
			}
			l.items = append(l.items, item{e.name, white, !white})
		}
	}
	if len(hidden) > 0 {
		for i := range l.items {
			if it := &l.items[i]; hidden[it.name] {
				it.hides = true
				delete(hidden, it.name)
			}
		}
		for name := range hidden {
			if validName(name) {
				l.items = append(l.items, item{name: name, hides: true})
			}
		}
		slices.SortFunc(l.items, func(a, b item) int { return strings.Compare(a.name, b.name) })
	}
	return l, nil
}

// isWhiteout says whether the entry e of n is a whiteout that is no name of its own.
func (n *node) isWhiteout(e dirent, marked bool) (bool, error) {
	switch e.typ {
	case unix.DT_CHR, unix.DT_UNKNOWN:
	case unix.DT_REG:
		if !marked {
			return false, nil
		}
	default:
		return false, nil
	}
	f, err := n.child(e.name)
	if err != nil {
		return false, err
	}
	defer f.close()
	return f.whiteout(marked)
}

func (n *node) whiteout(marked bool) (bool, error) {
	if n.kind() == unix.S_IFCHR {
		return n.st.Rdev == 0, nil
	}
	if !marked || n.kind() != unix.S_IFREG || n.st.Size != 0 {
		return false, nil
	}
	_, ok, err := n.mark("whiteout")
	return ok, err
}

package upperdir

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/internal/sys"
)

// flatAt is the depth from which directories that are being removed are first moved up to the top, so that a tree of any depth
// takes few descriptors and little stack.
const flatAt = 64

// randomName returns a name that nobody else has.
func randomName(prefix string) string {
	var b [12]byte
	_, _ = rand.Read(b[:]) // never fails
	return prefix + hex.EncodeToString(b[:])
}

// empty removes all that is in the directory trash. What others remove meanwhile is none of its concern.
func (h *host) empty(ctx context.Context, trash *node) error {
	for {
		entries, err := trash.list(ctx)
		if err != nil || len(entries) == 0 {
			return err
		}
		for _, e := range entries {
			if err := h.remove(ctx, trash, e, trash, 0); err != nil {
				return err
			}
		}
	}
}

// remove removes the entry e of dir; directories that are deep go to trash.
func (h *host) remove(ctx context.Context, dir *node, e dirent, trash *node, depth int) error {
	if e.typ != unix.DT_DIR {
		switch err := h.unlink(dir, e.name, 0); {
		case err == nil, gone(err):
			return nil
		case !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM):
			return err
		}
	}
	if depth > flatAt {
		err := unix.Renameat(dir.fd, e.name, trash.fd, randomName("deep-"))
		if gone(err) {
			return nil
		}
		return err
	}
	d, err := dir.child(e.name)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.close()
	entries, err := d.list(ctx)
	if errors.Is(err, unix.EACCES) {
		// Its owner, who is no super-user here, may have made it unreadable.
		if errno := sys.ChmodFD(h.proc.Int(), d.fd, 0o700); errno != 0 {
			return errno
		}
		entries, err = d.list(ctx)
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := h.remove(ctx, d, e, trash, depth+1); err != nil {
			return err
		}
	}
	if err := h.unlink(dir, e.name, unix.AT_REMOVEDIR); err != nil && !gone(err) {
		return err
	}
	return nil
}

// unlink removes a name, also where a guest has made it or its directory immutable.
func (h *host) unlink(dir *node, name string, flags int) error {
	err := unix.Unlinkat(dir.fd, name, flags)
	switch {
	case errors.Is(err, unix.EACCES):
		if errno := sys.ChmodFD(h.proc.Int(), dir.fd, 0o700); errno != 0 {
			return errno
		}
	case errors.Is(err, unix.EPERM):
		dir.clearFlags()
		if f, err := dir.child(name); err == nil {
			f.clearFlags()
			f.close()
		}
	default:
		return err
	}
	return unix.Unlinkat(dir.fd, name, flags)
}

// clearFlags takes FS_IMMUTABLE_FL and its like away, if there are any.
func (n *node) clearFlags() {
	fd, err := n.open(unix.O_RDONLY)
	if err != nil {
		return
	}
	_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, 0)
	_ = unix.Close(fd)
}

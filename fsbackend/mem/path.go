package mem

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

// WriteFile makes the regular file path ("a/b", relative to the root) hold contents, and the directories above it as needed;
// all that it makes belongs to user 0. Errors are Errnos, wrapped.
func (f *FS) WriteFile(path string, contents []byte) error {
	n, errno := f.makePath(path)
	if errno == 0 {
		errno = f.overwrite(n, contents)
	}
	if errno != 0 {
		return fmt.Errorf("write %q to the in-memory tree: %w", path, errno)
	}
	return nil
}

// makePath returns the regular file path, made if it is missing.
func (f *FS) makePath(path string) (*node, fsbackend.Errno) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.root
	parts := strings.Split(path, "/")
	for i, part := range parts {
		if part == "" || part == "." || part == ".." {
			return nil, unix.EINVAL
		}
		if n.dir == nil {
			return nil, unix.ENOTDIR
		}
		if e := n.dir.names[part]; e != nil {
			n = e.node
			continue
		}
		mode := uint32(unix.S_IFDIR | 0o755)
		if i == len(parts)-1 {
			mode = unix.S_IFREG | 0o644
		}
		child, errno := f.make(new(fsbackend.Context), n, fsbackend.MakeName(part), mode, "")
		if errno != 0 {
			return nil, errno
		}
		n = child
	}
	return n, fsbackend.OK
}

func (f *FS) overwrite(n *node, contents []byte) fsbackend.Errno {
	if errno := f.setSize(n, 0, false); errno != 0 {
		return errno
	}
	n.data.mu.Lock()
	defer n.data.mu.Unlock()
	if n.data.dead {
		return unix.ESTALE
	}
	for off := 0; off < len(contents); off += pageSize {
		p, errno := f.writablePage(n, uint64(off/pageSize))
		if errno != 0 {
			return errno
		}
		copy(p[:], contents[off:])
	}
	f.written(n, uint64(len(contents)), false)
	return fsbackend.OK
}

// ReadFile returns the contents of the regular file path ("a/b", relative to the root). A sparse file comes with its holes
// as zeros: a file larger than the tree's limit is an error.
func (f *FS) ReadFile(path string) ([]byte, error) {
	n, err := f.walk(path)
	if err != nil {
		return nil, fmt.Errorf("read %q from the in-memory tree: %w", path, err)
	}
	n.data.mu.RLock()
	defer n.data.mu.RUnlock()
	if n.size > uint64(f.maxBytes) {
		return nil, fmt.Errorf("read %q from the in-memory tree: %w", path, unix.EFBIG)
	}
	contents := make([]byte, n.size)
	for off := uint64(0); off < n.size; off += pageSize {
		if p := n.data.page(off / pageSize); p != nil {
			copy(contents[off:], p[:])
		}
	}
	return contents, nil
}

var errNotRegular = errors.New("not a regular file")

func (f *FS) walk(path string) (*node, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	n := f.root
	for part := range strings.SplitSeq(path, "/") {
		if n.dir == nil {
			return nil, unix.ENOTDIR
		}
		e := n.dir.names[part]
		if e == nil {
			return nil, unix.ENOENT
		}
		n = e.node
	}
	if !n.is(unix.S_IFREG) {
		return nil, errNotRegular
	}
	return n, nil
}

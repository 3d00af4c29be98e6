package escape_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// snapshot is a directory tree to the last detail: by path, all that stat(2) tells, attributes and contents. Access times are among it:
// files outside are older than their last change, so that any access shows.
type snapshot map[string]string

// takeSnapshot describes dir and all below it but what is in and below the paths left out. It leaves no trace itself.
func takeSnapshot(dir string, leftOut []string) (snapshot, error) {
	snap := make(snapshot)
	return snap, snap.add(dir, ".", leftOut)
}

func (s snapshot) add(dir, name string, leftOut []string) error {
	path := filepath.Join(dir, name)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("lstat %s: %w", path, err)
	}
	s[name] = fmt.Sprintf("inode %d, mode %#o, links %d, owner %d:%d, device %#x, size %d, atime %v, mtime %v, ctime %v",
		st.Ino, st.Mode, st.Nlink, st.Uid, st.Gid, st.Rdev, st.Size, st.Atim, st.Mtim, st.Ctim)
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && kind != unix.S_IFREG {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if kind == unix.S_IFREG {
		content, err := describeContent(f)
		s[name] += content
		return err
	}
	entries, err := f.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		below := filepath.Join(name, e.Name())
		if slices.Contains(leftOut, below) {
			continue
		}
		if err := s.add(dir, below, leftOut); err != nil {
			return err
		}
	}
	return nil
}

// describeContent describes what a file holds, and its attributes.
func describeContent(f *os.File) (string, error) {
	var text string
	attributes := make([]byte, 1024)
	n, err := unix.Flistxattr(int(f.Fd()), attributes)
	if err != nil {
		return "", fmt.Errorf("list attributes of %s: %w", f.Name(), err)
	}
	for name := range bytes.SplitSeq(attributes[:n], []byte{0}) {
		if len(name) == 0 {
			continue
		}
		value := make([]byte, 1024)
		n, err := unix.Fgetxattr(int(f.Fd()), string(name), value)
		if err != nil {
			return "", fmt.Errorf("read attribute %s of %s: %w", name, f.Name(), err)
		}
		text += fmt.Sprintf(", %s=%q", name, value[:n])
	}
	content, err := io.ReadAll(f)
	return fmt.Sprintf("%s, content %q", text, content), err
}

// diff says what of s is different, gone or new in t.
func (s snapshot) diff(t snapshot) []string {
	var found []string
	for name, before := range s {
		after, ok := t[name]
		switch {
		case !ok:
			found = append(found, name+" has gone")
		case after != before:
			found = append(found, fmt.Sprintf("%s was\n\t%s, and is\n\t%s", name, before, after))
		}
	}
	for name := range t {
		if _, ok := s[name]; !ok {
			found = append(found, fmt.Sprintf("%s is new: %s", name, t[name]))
		}
	}
	slices.Sort(found)
	return found
}

// without returns s without path and all below it.
func (s snapshot) without(path string) snapshot {
	rest := make(snapshot)
	for name, text := range s {
		if name != path && !strings.HasPrefix(name, path+"/") {
			rest[name] = text
		}
	}
	return rest
}

package watch

import (
	"container/list"
	"errors"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// fileType is what an entry of a directory is, as far as events differ.
type fileType uint8

const (
	other   fileType = iota // what has no content that is written: symbolic links, sockets, devices
	regular                 // complete some time after it is created
	directory
)

func typeOf(mode uint32) fileType {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return regular
	case unix.S_IFDIR:
		return directory
	}
	return other
}

// node is a directory in the tree, and what the reader has been told of its entries, or will be by the queue.
type node struct {
	parent  *node // nil: the root
	name    string
	wd      int32    // -1: not watched
	id      identity // of what is watched
	entries map[string]*entry
}

// identity tells directories apart that have one name after another.
type identity struct{ dev, ino uint64 }

func identityOf(st *unix.Stat_t) identity { return identity{st.Dev, st.Ino} }

type entry struct {
	typ     fileType
	dir     *node    // of a directory that is watched
	size    int64    // of a regular file, if there is a limit of bytes
	writing *writing // if its content is not complete, or not told
}

// writing is a regular file that has been written to and not told of since.
type writing struct {
	entry  *entry
	dir    *node
	name   string
	create bool // to be told as Create: the reader does not know this file
	fresh  bool // nor another of its name
	since  time.Time
	due    time.Time
	held   *item         // its Create, if a rename waits for it
	elem   *list.Element // in tracker.writing
}

// path is where the entry name of n is, n itself with ""; false if that is longer than any path can be.
func (n *node) path(name string) (string, bool) {
	var parts []string
	length := 0
	if name != "" {
		parts, length = append(parts, name), 1+len(name)
	}
	for ; n.parent != nil; n = n.parent {
		if length += 1 + len(n.name); length >= unix.PathMax {
			return "", false
		}
		parts = append(parts, n.name)
	}
	slices.Reverse(parts)
	return "/" + strings.Join(parts, "/"), true
}

// below says that n is dir or below it.
func (n *node) below(dir *node) bool {
	for ; n != nil; n = n.parent {
		if n == dir {
			return true
		}
	}
	return false
}

// how a path in the tree is opened: nothing that a guest puts into the tree leads out of it.
const resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// openBeneath opens a path of the tree; root is a descriptor of "/".
func openBeneath(root int, path string, flags uint64) (int, error) {
	path = strings.TrimPrefix(path, "/")
	if path == "" {
		path = "."
	}
	for {
		fd, err := unix.Openat2(root, path, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: resolve})
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// statBeneath looks at a path of the tree without following a link.
func statBeneath(root int, path string) (unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := openBeneath(root, path, unix.O_PATH)
	if err != nil {
		return st, err
	}
	defer unix.Close(fd)
	err = unix.Fstat(fd, &st)
	return st, err
}

// statIn looks at an entry of the open directory dir.
func statIn(dir *os.File, name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

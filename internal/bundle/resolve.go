package bundle

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxSymlinks is how many symbolic links a destination may lead through, as for the kernel (MAXSYMLINKS).
	maxSymlinks = 40

	// inTree keeps a lookup in its tree, and finds symbolic links instead of following them.
	inTree = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS
)

// place is a path in the share, the mount whose tree it is in, and the type of what is there: of S_IFMT, or 0 where there is
// nothing or none can tell.
type place struct {
	path     string // clean, absolute
	in       *Mount
	fileType uint32
}

// resolve finds out where in the share a mount on destination comes to be, which is absolute: symbolic links are those of
// the tree that a runtime would find there, having done the mounts before this one. What does not exist stays as it is written.
func (p *planner) resolve(destination string) (place, error) {
	// The last of walk is where we are. The path of each is free of symbolic links and of "..": nothing can lead out.
	walk := []place{{"/", &p.plan.Root, unix.S_IFDIR}}
	todo := strings.Split(destination, "/")
	links := 0
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		if name == "" || name == "." {
			continue
		}
		here := walk[len(walk)-1]
		if here.fileType != 0 && here.fileType != unix.S_IFDIR {
			return place{}, fmt.Errorf("%q is not a directory", here.path)
		}
		if name == ".." {
			walk = walk[:max(len(walk)-1, 1)]
			continue
		}
		next := place{path.Join(here.path, name), here.in, 0}
		if len(name) > unix.NAME_MAX || len(next.path) >= unix.PathMax {
			return place{}, fmt.Errorf("%.20q… is too long for a file's name or path", name)
		}
		if m := p.at[next.path]; m != nil {
			walk = append(walk, place{next.path, m, m.Kind.fileType()})
			continue
		}
		var target string
		var err error
		if next.fileType, target, err = next.lookup(); err != nil {
			return place{}, err
		}
		if next.fileType != unix.S_IFLNK {
			walk = append(walk, next)
			continue
		}
		if links++; links > maxSymlinks {
			return place{}, fmt.Errorf("it leads through more than %d symbolic links", maxSymlinks)
		}
		if strings.HasPrefix(target, "/") {
			walk = walk[:1]
		}
		todo = slices.Concat(strings.Split(target, "/"), todo)
	}
	return walk[len(walk)-1], nil
}

// lookup returns the type of what is there, and the target of a symbolic link.
func (at place) lookup() (fileType uint32, target string, err error) {
	fd, err := at.open(unix.O_PATH)
	if errors.Is(err, unix.ENOENT) {
		return 0, "", nil
	}
	if err != nil {
		return 0, "", err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, "", fmt.Errorf("look at %q: %w", at.path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return st.Mode & unix.S_IFMT, "", nil
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if err != nil {
		return 0, "", fmt.Errorf("read the symbolic link %q: %w", at.path, err)
	}
	return unix.S_IFLNK, string(buf[:n]), nil
}

// empty says whether there is no directory with something in it.
func (at place) empty() (bool, error) {
	fd, err := at.open(unix.O_RDONLY | unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 4096)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil || n == 0 {
			return true, err
		}
		if _, _, names := unix.ParseDirent(buf[:n], 1, nil); len(names) > 0 {
			return false, nil
		}
	}
}

// open opens what is there in its tree. Trees that are not the host's are ENOENT.
func (at place) open(flags uint64) (fd int, err error) {
	if at.in.Kind != Dir {
		return -1, unix.ENOENT
	}
	// Opened anew each time: nothing to close in the end, and a plan is made once.
	tree, err := unix.Open(at.in.Source, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %q: %w", at.in.Source, err)
	}
	defer unix.Close(tree)
	name := strings.TrimPrefix(strings.TrimPrefix(at.path, at.in.Path), "/")
	if name == "" {
		name = "."
	}
	fd, err = unix.Openat2(tree, name, &unix.OpenHow{Flags: flags | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: inTree})
	if err != nil {
		return -1, fmt.Errorf("look at %q in %q: %w", name, at.in.Source, err)
	}
	return fd, nil
}

package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/test/guest/model"
)

// picture is what a program that goes by inotify believes of a directory.
type picture struct {
	fd    int
	root  string
	dirs  map[int32]string // path by watch
	files model.Files
}

const modelMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_MODIFY | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB |
	unix.IN_ONLYDIR | unix.IN_DONT_FOLLOW

// keepModel says "ready", and then, at each change of the file named end in the directory root, what it believes of the rest.
func keepModel(root, end string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	t := &picture{fd: fd, root: root, dirs: map[int32]string{}, files: model.Files{}}
	t.look(root)
	fmt.Println("ready")
	return eachRecord(fd, func(wd int32, mask, _ uint32, name string) error {
		if mask&unix.IN_Q_OVERFLOW != 0 {
			t.list(root)
			return nil
		}
		dir, ok := t.dirs[wd]
		switch {
		case !ok:
		case dir != root || name != end:
			t.event(mask, filepath.Join(dir, name))
		case mask&unix.IN_MODIFY != 0:
			fmt.Println("model", t.files.Sum(root, end))
		}
		return nil
	})
}

// event believes what it is told: what is deleted is not looked for.
func (t *picture) event(mask uint32, path string) {
	switch {
	case mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0:
		t.forget(path)
	case mask&unix.IN_ISDIR != 0 && mask&unix.IN_ATTRIB != 0:
		t.list(path)
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_MODIFY|unix.IN_CLOSE_WRITE) != 0:
		t.look(path)
	}
}

func (t *picture) forget(path string) {
	for known := range t.files {
		if known == path || strings.HasPrefix(known, path+"/") {
			delete(t.files, known)
		}
	}
	for wd, dir := range t.dirs {
		if dir == path || strings.HasPrefix(dir, path+"/") {
			delete(t.dirs, wd)
			_, _ = unix.InotifyRmWatch(t.fd, uint32(wd))
		}
	}
}

// look reads one file, or watches and lists a directory.
func (t *picture) look(path string) {
	switch what := model.Describe(path); what {
	case "": // its deletion is to be told yet
	case model.Dir:
		t.files[path] = what
		wd, err := unix.InotifyAddWatch(t.fd, path, modelMask)
		if err != nil {
			return // it is gone again
		}
		t.dirs[int32(wd)] = path
		t.list(path)
	default:
		t.files[path] = what
	}
}

// list makes what is believed of a directory that is known what it is: that is how rescans are told of.
func (t *picture) list(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	there := map[string]bool{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		there[path] = true
		if known := t.files[path]; known == "" || (known == model.Dir) != e.IsDir() {
			t.forget(path)
			t.look(path)
		}
	}
	for path := range maps.Clone(t.files) {
		if filepath.Dir(path) == dir && !there[path] {
			t.forget(path)
		}
	}
}

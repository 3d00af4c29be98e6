package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
)

const (
	// maxRescan is how many files a rescan tells of: the kernel queues as many for a watcher (fs.inotify.max_queued_events), and
	// then tells it itself that there was more.
	maxRescan = 1 << 14
	// maxWalk and maxDirs are how many files and directories it looks at.
	maxWalk = 1 << 20
	maxDirs = 1 << 16
	// The server answers an armed event for 30 s.
	armEvery = 5 * time.Second
	// slack is how much later than a file's own time an event's can be: it may have waited for others to be sent.
	slack = 10 * time.Second
	// rescanID arms a rescan, whatever event causes it (share.RescanID).
	rescanID = 1<<64 - 1
)

// rescan tells of all files at and below e.Path that have changed since the event before e: what has happened to them is not
// known, so each fires IN_MODIFY, or IN_ATTRIB if it is no regular file.
func (r *replayer) rescan(e *api.Event) error {
	told, walked := 0, 0
	dirs := []string{e.Path}
	var first error
	for len(dirs) > 0 {
		dir := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		below, err := r.rescanDir(dir, &told, &walked)
		if errors.Is(err, unix.ENOTDIR) && dir == e.Path {
			err = r.rescanFile(dir, &told) // a graft of a single file
		}
		if errors.Is(err, errSkip) {
			continue // it is gone again
		}
		if err != nil && first == nil {
			first = err
		}
		if dirs = append(dirs, below...); told >= maxRescan || walked >= maxWalk || len(dirs) > maxDirs {
			return fmt.Errorf("there are too many changes: %d files were told of, the rest not", told)
		}
	}
	return first
}

// rescanDir tells of one directory and returns those in it.
func (r *replayer) rescanDir(dir string, told, walked *int) (below []string, err error) {
	fd, err := r.openAt(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, gone(err)
	}
	list := os.NewFile(uintptr(fd), dir)
	defer list.Close()
	if err := r.arm(fd, rescanID, ""); err != nil {
		return nil, err
	}
	defer r.disarm(fd)
	begun := time.Now()
	var first error
	for names := []string{"."}; ; {
		for _, name := range names {
			if *walked++; *told >= maxRescan {
				return below, nil
			}
			if time.Since(begun) >= armEvery {
				if err := r.arm(fd, rescanID, ""); err != nil {
					return nil, err
				}
				begun = time.Now()
			}
			isDir, err := r.refresh(fd, name, told)
			if err != nil && !errors.Is(gone(err), errSkip) && first == nil {
				first = fmt.Errorf("%s: %w", path.Join(dir, name), err)
			}
			if isDir && name != "." {
				below = append(below, path.Join(dir, name))
			}
		}
		if names, err = list.Readdirnames(256); errors.Is(err, io.EOF) {
			return below, first
		} else if err != nil {
			return below, err
		}
	}
}

// rescanFile tells of what is no directory.
func (r *replayer) rescanFile(name string, told *int) error {
	dir, err := r.openDir(path.Dir(name))
	if err != nil {
		return gone(err)
	}
	defer unix.Close(dir)
	if err := r.arm(dir, rescanID, ""); err != nil {
		return err
	}
	defer r.disarm(dir)
	_, err = r.refresh(dir, path.Base(name), told)
	return gone(err)
}

// refresh tells of one file, if it has changed.
func (r *replayer) refresh(dir int, name string, told *int) (isDir bool, err error) {
	fd, err := openFile(dir, name)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	v := file{fd: fd}
	if err := v.refresh(); err != nil {
		return false, err
	}
	isDir = v.is(unix.S_IFDIR)
	if changed := time.Unix(v.st.Ctime.Sec, int64(v.st.Ctime.Nsec)); changed.Before(r.since.Add(-slack)) {
		return isDir, nil
	}
	*told++
	if v.is(unix.S_IFREG) {
		return false, r.modify(&v)
	}
	return isDir, attrib(&v)
}

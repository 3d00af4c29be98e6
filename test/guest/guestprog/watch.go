package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// inotifyNames are the events' names, in the order of their bits.
var inotifyNames = []struct {
	bit  uint32
	name string
}{
	{unix.IN_ACCESS, "ACCESS"},
	{unix.IN_MODIFY, "MODIFY"},
	{unix.IN_ATTRIB, "ATTRIB"},
	{unix.IN_CLOSE_WRITE, "CLOSE_WRITE"},
	{unix.IN_CLOSE_NOWRITE, "CLOSE_NOWRITE"},
	{unix.IN_OPEN, "OPEN"},
	{unix.IN_MOVED_FROM, "MOVED_FROM"},
	{unix.IN_MOVED_TO, "MOVED_TO"},
	{unix.IN_CREATE, "CREATE"},
	{unix.IN_DELETE, "DELETE"},
	{unix.IN_DELETE_SELF, "DELETE_SELF"},
	{unix.IN_MOVE_SELF, "MOVE_SELF"},
	{unix.IN_UNMOUNT, "UNMOUNT"},
	{unix.IN_Q_OVERFLOW, "Q_OVERFLOW"},
	{unix.IN_IGNORED, "IGNORED"},
	{unix.IN_ISDIR, "ISDIR"},
}

// watch writes a line for each event: the watch's number from 0, the event's names, the cookie, the file's name, and in quotes what
// reading file gave right then. Before them it writes "ready".
func watch(file string, paths []string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	numbers := map[int32]int{}
	for i, path := range paths {
		mask := uint32(unix.IN_ALL_EVENTS)
		if file != "" {
			mask &^= unix.IN_ACCESS | unix.IN_OPEN | unix.IN_CLOSE_NOWRITE // our own
		}
		wd, err := unix.InotifyAddWatch(fd, path, mask|unix.IN_DONT_FOLLOW)
		if err != nil {
			return fmt.Errorf("watch %s: %w", path, err)
		}
		numbers[int32(wd)] = i
	}
	if _, err := fmt.Println("ready"); err != nil {
		return err
	}
	return eachRecord(fd, func(wd int32, mask, cookie uint32, name string) error {
		content := ""
		if file != "" {
			text, err := os.ReadFile(file)
			if content = string(text); err != nil {
				content = "!" + err.Error()
			}
		}
		var names []string
		for _, in := range inotifyNames {
			if mask&in.bit != 0 {
				names = append(names, in.name)
			}
		}
		if name == "" {
			name = "."
		}
		_, err := fmt.Printf("%d %s %d %s %q\n", numbers[wd], strings.Join(names, "|"), cookie, name, content)
		return err
	})
}

// eachRecord gives f what inotify says, for ever.
func eachRecord(fd int, f func(wd int32, mask, cookie uint32, name string) error) error {
	buf := make([]byte, 256<<10)
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		for b := buf[:n]; len(b) > 0; {
			wd, mask := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:])
			cookie, size := binary.NativeEndian.Uint32(b[8:]), binary.NativeEndian.Uint32(b[12:])
			name := strings.TrimRight(string(b[16:16+size]), "\x00")
			b = b[16+size:]
			if err := f(wd, mask, cookie, name); err != nil {
				return err
			}
		}
	}
}

package sharer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Names of Kata's agent protocol, and where it has things in the guest.
const (
	typeEphemeral = "ephemeral"
	typeLocal     = "local"

	guestRunDir       = "/run/kata-containers"
	guestShmDir       = guestRunDir + "/sandbox/shm"
	guestEphemeralDir = guestRunDir + "/sandbox/ephemeral"
	// layerOption begins an option of a root that names a layer.
	layerOption = "io.katacontainers.fs-opt.layer="
)

// Backends of grafts that this package knows.
const (
	backendPassthrough = "passthrough"
	backendMemory      = "mem"
)

// ShmStorage is the sandbox's shared memory, of that many bytes, for the agent to mount when it makes the sandbox.
func ShmStorage(size uint64) *Storage {
	return &Storage{
		Driver:     typeEphemeral,
		Source:     "shm",
		Fstype:     "tmpfs",
		Options:    []string{"noexec", "nosuid", "nodev", "mode=1777", "size=" + strconv.FormatUint(size, 10)},
		MountPoint: guestShmDir,
	}
}

// emptyDirType is "ephemeral" or "local" for a volume that is made in the guest, and "" for what is shared. Kata sees an emptyDir
// by the second last element of its path, and its medium by what the host has there.
func (s *Sandbox) emptyDirType(m *Mount) (string, error) {
	if m.Type == typeEphemeral || m.Type == typeLocal {
		return m.Type, nil
	}
	if volumeType(m.Source) != k8sEmptyDir {
		return "", nil
	}
	var stat unix.Statfs_t
	if err := unix.Statfs(m.Source, &stat); err != nil {
		return "", &fs.PathError{Op: "statfs", Path: m.Source, Err: err}
	}
	switch {
	case stat.Type == unix.TMPFS_MAGIC:
		return typeEphemeral, nil
	case s.config.DisableGuestEmptyDir:
		return "", nil
	}
	return typeLocal, nil
}

// guestVolume has the agent make a volume in the guest, where all of the sandbox's containers find the same.
func (s *Sandbox) guestVolume(kind string, m *Mount) (*SharedFile, error) {
	name := filepath.Base(m.Source)
	if name == "/" || name == "." {
		return nil, fmt.Errorf("source %q of a volume in the guest has no last element", m.Source)
	}
	storage := &Storage{Driver: kind, Source: "tmpfs", Fstype: "tmpfs", MountPoint: path.Join(guestEphemeralDir, name)}
	if kind == typeLocal {
		storage.Source, storage.Fstype = typeLocal, typeLocal
		storage.Options = []string{"mode=0777"}
		storage.MountPoint = path.Join(s.config.GuestDir, s.config.ID, rootfsName, typeLocal, name)
	}
	// A group other than root's is Kubernetes' fsGroup, which the guest has to know.
	var stat unix.Stat_t
	switch err := unix.Stat(m.Source, &stat); {
	case err == nil && stat.Gid != 0:
		storage.Options = append(storage.Options, fmt.Sprintf("fsgid=%d", stat.Gid))
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, &fs.PathError{Op: "stat", Path: m.Source, Err: err}
	}
	return &SharedFile{VolumeStorages: []*Storage{storage}, GuestPath: storage.MountPoint}, nil
}

// memory is a volume of the daemon's memory, as large as its option size says, or as the host's tmpfs is.
func (s *Sandbox) memory(m *Mount) (what, error) {
	w := what{Source: m.Source, Backend: backendMemory, MaxBytes: s.config.MemoryBytes}
	for _, o := range m.Options {
		if value, ok := strings.CutPrefix(o, "size="); ok {
			size, err := strconv.ParseUint(value, 10, 64)
			if err != nil || size == 0 {
				return what{}, fmt.Errorf("option %q: expected size= and a number of bytes", o)
			}
			w.MaxBytes = size
			return w, nil
		}
	}
	var stat unix.Statfs_t
	if unix.Statfs(m.Source, &stat) == nil && stat.Type == unix.TMPFS_MAGIC && stat.Blocks > 0 {
		w.MaxBytes = stat.Blocks * uint64(stat.Bsize)
	}
	return w, nil
}

// watchable says whether changes in a volume are to be followed: kubelet updates it, and it is within the limits.
func (s *Sandbox) watchable(source, resolved string) (bool, error) {
	if !watchableVolume(source) {
		return false, nil
	}
	if _, copies := s.config.Backend.(Copy); copies && !watchablePattern(s.config.KubeletRoot).MatchString(source) {
		return false, nil
	}
	files, bytes, err := measure(resolved)
	if err != nil || files == 0 {
		return false, err
	}
	l := s.config.Limits
	exceeded := func(n, limit int64) bool { return limit >= 0 && n > limit }
	if exceeded(int64(files), int64(l.HostFiles)) || exceeded(int64(files), int64(l.Files)) || exceeded(bytes, l.Bytes) {
		s.watchLimited.Add(1)
		s.log.Warn("volume is above a limit: its content stays current, but changes are not told as events",
			"source", source, "files", files, "bytes", bytes, "limits", l)
		// What is copied has to be copied again in any case.
		_, copies := s.config.Backend.(Copy)
		return copies, nil
	}
	return true, nil
}

// measure counts a volume's files and their bytes. As Kata's count it has everything but directories: links to data, too.
func measure(root string) (files int, bytes int64, err error) {
	err = filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		files++
		if d.Type().IsRegular() {
			info, err := d.Info()
			if err != nil {
				return err
			}
			bytes += info.Size()
		}
		return nil
	})
	// A file that kubelet has just taken away is none.
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return files, bytes, err
}

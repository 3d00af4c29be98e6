package sharer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// BindMounts shares by mounts of the host, for a daemon that serves the directory shared of the sandbox's: Kata's own layout,
// HostDir/ID/{mounts,shared,private}. It takes CAP_SYS_ADMIN in the host's mount namespace.
type BindMounts struct{}

// The directories of a sandbox. Mounts are made in mounts; shared is mounts again, read-only, and follows it.
const (
	mountsDir  = "mounts"
	sharedDir  = "shared"
	privateDir = "private"
)

// Modes of the directories, as in Kata: shared is for the daemon alone.
const (
	dirMode       = 0o750
	sharedDirMode = 0o700
)

func (BindMounts) validate() error { return nil }

func (BindMounts) open(s *Sandbox) backend {
	return &bindMounts{
		dir: s.dir, sys: s.sys, log: s.log,
		mounts: filepath.Join(s.dir, mountsDir), shared: filepath.Join(s.dir, sharedDir), private: filepath.Join(s.dir, privateDir),
	}
}

type bindMounts struct {
	dir, mounts, shared, private string
	sys                          system
	log                          *slog.Logger
}

// A mount that the guest's daemon has in a namespace of its own cannot be made read-only from here: MS_REMOUNT does not
// propagate. So those who may write and those who may not have a mount each.
func (b *bindMounts) canChange() bool { return false }

func (b *bindMounts) setReadOnly(context.Context, *shared, bool) error { return nil }

func (b *bindMounts) hostPath(sh *shared) string { return filepath.Join(b.mounts, sh.Path) }

// follow has nothing to do: the agent polls what is watchable.
func (b *bindMounts) follow(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

func (b *bindMounts) prepare(context.Context) (_ func(context.Context) error, err error) {
	var undo []func() error
	takeBack := func(context.Context) error {
		var errs []error
		for _, step := range slices.Backward(undo) {
			errs = append(errs, step())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, takeBack(nil))
		}
	}()
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{b.shared, sharedDirMode}, {b.mounts, dirMode}, {b.private, dirMode}} {
		made, err := mkdirs(b.sys, d.path, d.mode)
		undo = append(undo, func() error { return removeAll(b.sys, made) })
		if err != nil {
			return nil, err
		}
	}
	list, err := b.sys.mountinfo()
	if err != nil {
		return nil, err
	}
	// What is mounted in mounts has to be seen in shared, so mounts has to be on a mount that propagates.
	if !mountOf(list, b.mounts).shared {
		if !mounted(list, b.mounts) {
			if err := b.sys.mount(b.mounts, b.mounts, unix.MS_BIND); err != nil {
				return nil, err
			}
			undo = append(undo, func() error { return b.sys.unmount(b.mounts) })
		}
		if err := b.sys.mount("none", b.mounts, unix.MS_SHARED); err != nil {
			return nil, err
		}
	}
	if !mounted(list, b.shared) {
		if err := b.sys.mount(b.mounts, b.shared, unix.MS_BIND); err != nil {
			return nil, err
		}
		undo = append(undo, func() error { return b.sys.unmount(b.shared) })
	}
	if err := b.sys.mount("none", b.shared, unix.MS_SLAVE); err != nil {
		return nil, err
	}
	return takeBack, b.remountReadOnly(b.shared)
}

// remountReadOnly makes one mount read-only, and leaves nosuid and its like as they are.
func (b *bindMounts) remountReadOnly(target string) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(target, &stat); err != nil {
		return &fs.PathError{Op: "statfs", Path: target, Err: err}
	}
	flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY)
	for st, ms := range map[int64]uintptr{
		unix.ST_NOSUID: unix.MS_NOSUID, unix.ST_NODEV: unix.MS_NODEV, unix.ST_NOEXEC: unix.MS_NOEXEC,
		unix.ST_NOATIME: unix.MS_NOATIME, unix.ST_NODIRATIME: unix.MS_NODIRATIME, unix.ST_RELATIME: unix.MS_RELATIME,
	} {
		if stat.Flags&st != 0 {
			flags |= ms
		}
	}
	return b.sys.mount("none", target, flags)
}

func (b *bindMounts) add(_ context.Context, sh *shared) (err error) {
	target := b.hostPath(sh)
	list, err := b.sys.mountinfo()
	if err != nil {
		return err
	}
	if mounted(list, target) {
		// A process before this one has mounted it, but may not have come to this.
		return b.sys.mount("none", target, unix.MS_PRIVATE)
	}
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		for _, step := range slices.Backward(undo) {
			err = errors.Join(err, step())
		}
	}()
	bind := func(source, target string) error {
		made, err := b.makeMountPoint(sh.Source, target)
		undo = append(undo, func() error { return removeAll(b.sys, made) })
		if err != nil {
			return err
		}
		if err := b.sys.mount(source, target, unix.MS_BIND); err != nil {
			return err
		}
		undo = append(undo, func() error { return b.sys.unmount(target) })
		return b.sys.mount("none", target, unix.MS_PRIVATE)
	}
	if !sh.readOnly() {
		return bind(sh.Source, target)
	}
	// It has to be read-only before the daemon's namespace gets to see it, or it never is there.
	private := filepath.Join(b.private, strings.ReplaceAll(sh.Path, "/", "-"))
	if mounted(list, private) {
		if err := b.sys.unmount(private); err != nil {
			return err
		}
	}
	if err := bind(sh.Source, private); err != nil {
		return err
	}
	if err := b.remountReadOnly(private); err != nil {
		return err
	}
	if err := bind(private, target); err != nil {
		return err
	}
	if err := b.sys.unmount(private); err != nil {
		return err
	}
	// The share is whole now; what is left here Cleanup removes.
	undo = nil
	if err := b.sys.remove(private); err != nil {
		b.log.Warn("share: leave an empty mount point behind", "error", err)
	}
	return nil
}

// makeMountPoint makes an empty file or directory, as source is one, and what is missing above it.
func (b *bindMounts) makeMountPoint(source, target string) (made []string, err error) {
	info, err := os.Stat(source)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		return mkdirs(b.sys, target, dirMode)
	}
	if made, err = mkdirs(b.sys, filepath.Dir(target), dirMode); err != nil {
		return made, err
	}
	switch err := b.sys.create(target); {
	case errors.Is(err, fs.ErrExist):
		return made, nil
	case err != nil:
		return made, err
	}
	return append(made, target), nil
}

func (b *bindMounts) remove(_ context.Context, sh *shared) error {
	target := b.hostPath(sh)
	if err := b.sys.unmount(target); err != nil && !notMounted(err) {
		return err
	}
	// It is unshared. A mount point that cannot be removed Cleanup tries again.
	if err := b.removeMountPoint(target); err != nil {
		b.log.Warn("unshare: leave an empty mount point behind", "error", err)
	}
	return nil
}

// removeMountPoint removes an empty file or directory, and the container's directory if it is that of a root.
func (b *bindMounts) removeMountPoint(target string) error {
	info, err := os.Lstat(target)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() && (!info.Mode().IsRegular() || info.Size() != 0) {
		return fmt.Errorf("remove %s: it is not an empty file or directory", target)
	}
	if err := b.sys.remove(target); err != nil {
		return err
	}
	if parent := filepath.Dir(target); parent != b.mounts {
		// Others in there keep it.
		if err := b.sys.remove(parent); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// notMounted says that unmount(2) has found nothing to unmount.
func notMounted(err error) bool { return errors.Is(err, unix.EINVAL) || errors.Is(err, fs.ErrNotExist) }

// cleanup unmounts whatever the host has mounted in the sandbox's directory, in Kata's order: sandbox bind mounts, shared, and
// the rest; each of these the last one first.
func (b *bindMounts) cleanup(_ context.Context, _ []*shared) error {
	for _, dir := range []string{filepath.Join(b.mounts, sandboxMountsDir), b.shared, b.dir} {
		for {
			list, err := b.sys.mountinfo()
			if err != nil {
				return err
			}
			i := len(list) - 1
			for ; i >= 0 && !below(dir, list[i].path); i-- {
			}
			if i < 0 {
				break
			}
			// One less each time: what unmounts nothing is an error. But what is mounted may go by itself, with its like.
			if err := b.sys.unmount(list[i].path); err != nil {
				if now, listErr := b.sys.mountinfo(); listErr != nil || mounted(now, list[i].path) {
					return errors.Join(err, listErr)
				}
			}
		}
	}
	return nil
}

// mounted says whether there is a mount at path.
func mounted(list []mountPoint, path string) bool {
	return slices.ContainsFunc(list, func(m mountPoint) bool { return m.path == path })
}

// mountOf is the mount that path is on: of those at the longest path, the last.
func mountOf(list []mountPoint, path string) mountPoint {
	var found mountPoint
	for _, m := range list {
		if below(m.path, path) && len(m.path) >= len(found.path) {
			found = m
		}
	}
	return found
}

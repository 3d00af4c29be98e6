package fusebridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/extensions"
	"github.com/sluicefs/sluice/internal/program"
)

// startMounted starts a program that really mounts, in a mount namespace that nobody else is in, and returns the line that brings
// the root of what it has mounted, each time that it is started. The host sees no mount. The program keeps CAP_SYS_ADMIN for it, so
// the caller needs that, too.
func (o *options) startMounted(ctx context.Context, out *extensions.Outside, c program.Config) (*os.File, error) {
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		return nil, fmt.Errorf("mount=private: %w: expected to be allowed to open it, which takes the module fuse, and in a container the device", err)
	} else {
		_ = f.Close()
	}
	point, err := os.MkdirTemp("", "sluice-fuse-")
	if err != nil {
		return nil, fmt.Errorf("mount=private: make a mount point: %w", err)
	}
	out.OnClose(func() error { return os.Remove(point) })
	var before unix.Stat_t
	if err := unix.Stat(point, &before); err != nil {
		return nil, &os.PathError{Op: "stat", Path: point, Err: err}
	}
	c.Args = o.at(point)
	first := make(chan error, 1)
	c.Serves = func(ctx context.Context, pid int) (*os.File, error) {
		root, err := mounted(ctx, pid, point, &before)
		select {
		case first <- err:
		default: // not the first
		}
		return root, err
	}
	s, err := program.Start(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("mount=private: %w", err)
	}
	out.OnClose(func() error { return stop(s) })
	actions(out, s)
	select {
	case err = <-first:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		_ = stop(s) // what it has said at its end is known then
		if last := s.Status().Last; errors.Is(err, context.Canceled) && last != "" {
			err = fmt.Errorf("the program has ended: %s", last)
		}
		return nil, errors.Join(fmt.Errorf("mount=private: %w", err), s.Line().Close())
	}
	return s.Line(), nil
}

// mounted waits until the program that runs as process pid has mounted at point, and returns its root.
func mounted(ctx context.Context, pid int, point string, before *unix.Stat_t) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	for {
		// By way of its root directory one is in its mount namespace.
		path := fmt.Sprintf("/proc/%d/root%s", pid, point)
		fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err == nil {
			var now unix.Stat_t
			if err = unix.Fstat(fd, &now); err == nil && now.Dev != before.Dev {
				return os.NewFile(uintptr(fd), point), nil
			}
			_ = unix.Close(fd)
		}
		if err != nil && err != unix.ENOENT && err != unix.ENOTCONN {
			return nil, fmt.Errorf("look for the mount: %w: expected privileges over the program", &os.PathError{Op: "open", Path: path, Err: err})
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the program has mounted nothing at %s: expected {mnt} in its arguments, and an option that keeps it in the foreground: %w", point, ctx.Err())
		case <-time.After(5 * time.Millisecond): // there is no event for a mount in another namespace
		}
	}
}

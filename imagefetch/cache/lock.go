package cache

import (
	"context"
	"encoding/binary"
	"io"

	"golang.org/x/sys/unix"
)

// Lock keeps other processes that use the same directory from fetching what k stands for, until unlock is called; those that want to
// wait, and should look for it with Get after that. Within a process it keeps nobody from anything. Where locks cannot be had there
// are none: something is fetched twice then.
func (c *Cache) Lock(ctx context.Context, k Key) (unlock func(), err error) {
	if c.dir == nil || c.dir.fetching == nil {
		return func() {}, nil
	}
	// Locks of an open file description go with it, so that they do not outlive a process that is killed.
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: int64(binary.BigEndian.Uint64(k[:8]) >> 2), Len: 1}
	set := func(l unix.Flock_t) error { return unix.FcntlFlock(c.dir.fetching.Fd(), unix.F_OFD_SETLK, &l) }
	if err := poll(ctx, func() error { return set(l) }); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return func() {}, nil
	}
	return func() {
		l.Type = unix.F_UNLCK
		_ = set(l)
	}, nil
}

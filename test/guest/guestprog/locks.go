package main

import (
	"fmt"
	"io"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// sharedLocks takes locks on one file by two ways that this kernel does not know to be one.
func sharedLocks(file, same string) error {
	a, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := os.OpenFile(same, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer b.Close()
	if err := flocks(a, b); err != nil {
		return fmt.Errorf("flock: %w", err)
	}
	for name, cmd := range map[string]int{"fcntl": unix.F_SETLK, "OFD": unix.F_OFD_SETLK} {
		if err := fcntls(a, b, cmd); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return closed(file, b)
}

func flocks(a, b *os.File) error {
	lock := func(f *os.File, how int) error { return unix.Flock(int(f.Fd()), how) }
	if err := first(
		lock(a, unix.LOCK_EX|unix.LOCK_NB), want(unix.EWOULDBLOCK, lock(b, unix.LOCK_SH|unix.LOCK_NB)),
		lock(a, unix.LOCK_SH|unix.LOCK_NB), lock(b, unix.LOCK_SH|unix.LOCK_NB), want(unix.EWOULDBLOCK, lock(b, unix.LOCK_EX|unix.LOCK_NB)),
		lock(a, unix.LOCK_UN), lock(b, unix.LOCK_EX|unix.LOCK_NB),
	); err != nil {
		return err
	}
	return waits(func() error { return lock(a, unix.LOCK_EX) }, func() error { return lock(b, unix.LOCK_UN) }, func() error { return lock(a, unix.LOCK_UN) })
}

// fcntls uses cmd, F_SETLK or F_OFD_SETLK. The commands that wait have the next number, and those that ask the one before.
func fcntls(a, b *os.File, cmd int) error {
	lock := func(f *os.File, cmd int, typ int16, start, n int64) error {
		return unix.FcntlFlock(f.Fd(), cmd, &unix.Flock_t{Type: typ, Whence: io.SeekStart, Start: start, Len: n})
	}
	if err := first(
		lock(a, cmd, unix.F_WRLCK, 10, 10), want(unix.EAGAIN, lock(b, cmd, unix.F_RDLCK, 19, 1)), lock(b, cmd, unix.F_WRLCK, 20, 0),
		want(unix.EAGAIN, lock(a, cmd, unix.F_RDLCK, math.MaxInt32, 1)), lock(b, cmd, unix.F_UNLCK, 0, 0),
	); err != nil {
		return err
	}
	found := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(b.Fd(), cmd-1, &found); err != nil {
		return err
	}
	if found.Type != unix.F_WRLCK || found.Start != 10 || found.Len != 10 {
		return fmt.Errorf("the lock in the way is %+v", found)
	}
	return waits(func() error { return lock(b, cmd+1, unix.F_WRLCK, 0, 0) },
		func() error { return lock(a, cmd, unix.F_UNLCK, 0, 0) }, func() error { return lock(b, cmd, unix.F_UNLCK, 0, 0) })
}

// waits has lock wait while unlock is yet to come; after takes it back.
func waits(lock, unlock, after func() error) error {
	got := make(chan error, 1)
	go func() { got <- lock() }()
	select {
	case err := <-got:
		return fmt.Errorf("did not wait for a lock that is another's: %w", err)
	default:
	}
	return first(unlock(), <-got, after())
}

// closed checks that locks go with their file, those of flock(2) soon after.
func closed(file string, b *os.File) error {
	for range 2 {
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		fl := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
		if err := first(
			unix.FcntlFlock(f.Fd(), unix.F_SETLK, &fl), unix.Flock(int(f.Fd()), unix.LOCK_EX),
			want(unix.EAGAIN, unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, &fl)), f.Close(),
			unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, &fl),
		); err != nil {
			return err
		}
		fl.Type = unix.F_UNLCK
		if err := unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, &fl); err != nil {
			return err
		}
	}
	return nil
}

// lockOnce has locks of both kinds while then runs.
func lockOnce(file string, wait bool, then func() error) error {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	how, cmd := unix.LOCK_EX|unix.LOCK_NB, unix.F_SETLK
	if wait {
		how, cmd = unix.LOCK_EX, unix.F_SETLKW
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		return fmt.Errorf("flock: %w", err)
	}
	if err := unix.FcntlFlock(f.Fd(), cmd, &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}); err != nil {
		return fmt.Errorf("fcntl: %w", err)
	}
	if err := then(); err != nil {
		return err
	}
	return unix.Flock(int(f.Fd()), unix.LOCK_UN) // closing would do, but tells the daemon later
}

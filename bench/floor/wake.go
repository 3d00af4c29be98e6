package floor

import (
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Wake is what it takes to wake a thread that sleeps in read(2) of an eventfd, and to be woken by it in turn: what a request
// and its answer cost when both sides sleep.
type Wake struct {
	RoundTrip time.Duration // the median
	CPU       time.Duration // of the thread that is woken, for each round trip
	Rounds    int
}

// MeasureWake passes an event to and fro between two threads, on the CPUs pinger and ponger, for about the duration d.
func MeasureWake(pinger, ponger int, d time.Duration) (w Wake, err error) {
	// Who waits for a thread that has not come to be would wait for ever.
	for _, cpu := range []int{pinger, ponger} {
		if err := onThread(cpu, func() error { return nil }); err != nil {
			return w, err
		}
	}
	var fds [2]int // to the ponger, to the pinger
	for i := range fds {
		if fds[i], err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
			return w, fmt.Errorf("create an eventfd: %w", err)
		}
		defer unix.Close(fds[i])
	}
	const last = 1 << 32
	ended := make(chan error, 1)
	go func() {
		ended <- onThread(ponger, func() error {
			used, rounds := threadCPU(), 0
			for {
				var n uint64
				if errno := receive(fds[0], &n); errno != 0 {
					return failed("read an eventfd", errno)
				}
				if n >= last {
					w.CPU = (threadCPU() - used) / time.Duration(max(rounds, 1))
					return nil
				}
				rounds++
				if errno := send(fds[1], &n); errno != 0 {
					return failed("write an eventfd", errno)
				}
			}
		})
	}()
	var taken []time.Duration
	pinged := onThread(pinger, func() error {
		var n, one, end uint64 = 0, 1, last
		defer send(fds[0], &end)
		for begin := time.Now(); time.Since(begin) < d; {
			sent := time.Now()
			if errno := send(fds[0], &one); errno != 0 {
				return failed("write an eventfd", errno)
			}
			if errno := receive(fds[1], &n); errno != 0 {
				return failed("read an eventfd", errno)
			}
			taken = append(taken, time.Since(sent))
		}
		return nil
	})
	if err := <-ended; err != nil {
		return w, err
	}
	if pinged != nil {
		return w, pinged
	}
	slices.Sort(taken)
	w.RoundTrip, w.Rounds = taken[len(taken)/2], len(taken)
	return w, nil
}

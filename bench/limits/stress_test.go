package limits

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/sluicefs/sluice/bench/frontend"
)

// stressed starts a daemon and connects to all of its queues.
func stressed(t *testing.T, program string, queues int) (*exec.Cmd, *frontend.FrontEnd) {
	t.Helper()
	socket := filepath.Join(sockets(t), "s")
	d := exec.Command(program, "--sandbox", "none", "--num-request-queues", fmt.Sprint(queues), "--socket-path", socket, "--shared-dir", t.TempDir())
	start(t, d)
	f, err := frontend.Connect(t.Context(), frontend.Config{Socket: socket, Queues: queues, Depth: 16, RingSize: 64})
	if err != nil {
		t.Fatal(err)
	}
	return d, f
}

// TestNoWakeUpIsLost is a short run of what bench/stress does.
func TestNoWakeUpIsLost(t *testing.T) {
	program := build(t)
	for _, queues := range []int{1, 4} {
		t.Run(fmt.Sprint(queues), func(t *testing.T) {
			const requests = 20000
			d, f := stressed(t, program, queues)
			r, err := f.Stress(t.Context(), frontend.StressConfig{Requests: requests, PID: d.Process.Pid, Seed: uint64(queues), Window: 50 * time.Microsecond})
			if err != nil || r.Requests != requests {
				t.Errorf("%d requests are answered, expected %d: %v", r.Requests, requests, err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestStressNotices stops the daemon in the middle, which looks like a wake-up that it missed.
func TestStressNotices(t *testing.T) {
	d, f := stressed(t, build(t), 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	time.AfterFunc(100*time.Millisecond, func() { _ = d.Process.Signal(syscall.SIGSTOP) })
	_, err := f.Stress(ctx, frontend.StressConfig{Requests: 1 << 40, PID: d.Process.Pid, Seed: 1})
	if !errors.Is(err, frontend.ErrLost) {
		t.Errorf("%v, expected %v", err, frontend.ErrLost)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

package virtiofs

import (
	"runtime"
	"testing"
)

// A device has threads and descriptors of its own only while a front-end has started a queue.
func TestIdleDeviceHoldsNothing(t *testing.T) {
	fds, goroutines := openFDs(t), runtime.NumGoroutine()
	var devices []*Device
	for range 20 {
		d, _ := newDevice(t, newMem(t), Config{NumRequestQueues: 8})
		devices = append(devices, d)
	}
	if n := openFDs(t) - fds; n != 0 {
		t.Errorf("20 devices that nobody uses hold %d descriptors", n)
	}
	if n := runtime.NumGoroutine() - goroutines; n > 0 {
		t.Errorf("20 devices that nobody uses have %d goroutines", n)
	}
	for _, d := range devices {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// What a front-end has started goes with it, and comes back with the next one.
func TestWorkersGoWithFrontEnd(t *testing.T) {
	r := &rig{t: t, num: 256}
	r.device, r.server = newDevice(t, newMem(t), Config{NumRequestQueues: 4})
	t.Cleanup(func() { r.check(r.device.Close()) })
	fds := openFDs(t)
	for range 3 {
		r.connect()
		r.mount()
		on := 0
		for _, w := range r.device.workers {
			w.mu.Lock()
			if w.thread != nil {
				on++
			}
			w.mu.Unlock()
		}
		if on != len(r.device.workers) {
			t.Errorf("%d of %d workers run with every queue started", on, len(r.device.workers))
		}
		r.check(r.disconnect())
		for i, w := range r.device.workers {
			if w.thread != nil || w.epoll != nil || w.wake != nil {
				t.Errorf("worker %d is on without a front-end", i)
			}
		}
		if n := openFDs(t) - fds; n != 0 {
			t.Errorf("%d descriptors are left of a front-end", n)
		}
	}
}

// A worker that is asked to stay while it leaves stays, or comes back.
func TestWorkerStartsWhileItEnds(t *testing.T) {
	d, _ := newDevice(t, newMem(t), Config{})
	w := d.workers[0]
	for range 500 {
		if err := w.start(); err != nil {
			t.Fatal(err)
		}
		w.end(0)
		if err := w.start(); err != nil {
			t.Fatal(err)
		}
		w.mu.Lock()
		if w.left() {
			t.Error("the worker has left though it was started")
		}
		w.mu.Unlock()
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

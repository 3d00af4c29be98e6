package virtiofs

import (
	"runtime"
	"testing"
	"time"
)

// driver is a guest as a poller sees it: whose next request comes think after the last answer, and whose wake-ups cost.
type driver struct {
	think, wake time.Duration
	shares      bool // a CPU with the worker: it does not go on while that polls
	thief       bool // so does somebody else, who takes a time slice now and then

	p       poller
	now     time.Duration
	polled  time.Duration // in all
	waited  time.Duration // from answers to requests
	vain, n int
}

// turns plays n of them.
func (d *driver) turns(n int) {
	for range n {
		d.n++
		begin, left := d.now, d.think
		window := d.p.window(d.now)
		switch {
		case window == 0:
			d.now += left + d.wake
			d.p.slept(d.now - begin)
		case d.thief && d.n%50 == 0:
			d.now += 3 * time.Millisecond
			d.polled += window
			d.p.robbed(d.now)
		case !d.shares && left <= window:
			d.now += left
			d.polled += left
			d.p.found()
		default:
			d.vain++
			d.polled += window
			d.now += window
			d.p.vain(d.now)
			if !d.shares {
				left = max(left-window, 0)
			}
			d.now += left + d.wake
			// what a poll came before is no turn
		}
		d.waited += d.now - begin
	}
}

func (d *driver) share() float64 {
	return float64(d.polled) / float64(d.now)
}

const us = time.Microsecond

// A driver on another CPU is polled for, from soon after it begins, and its wake-up is saved.
func TestPollerPays(t *testing.T) {
	for _, think := range []time.Duration{us, 10 * us, 40 * us, 100 * us} {
		d := driver{think: think, wake: 30 * us}
		d.turns(1000)
		if sleeps := d.waited - 1000*think; sleeps > 10*d.wake {
			t.Errorf("think time %v: %v waited beyond it, expected fewer than 10 wake-ups of %v", think, sleeps, d.wake)
		}
	}
}

// One that shares our CPU is given it at once.
func TestPollerYields(t *testing.T) {
	d := driver{think: 2 * us, wake: 2 * us, shares: true}
	d.turns(100_000)
	if share := d.share(); share > 0.001 || d.vain > 20 {
		t.Errorf("%d polls in vain, %.2f %% of the time, for one that cannot answer", d.vain, 100*share)
	}
	// The guest moves away, and back.
	d.shares = false
	d.turns(1_000_000)
	if d.p.trust != maxTrust {
		t.Error("no polling after the guest has left the CPU")
	}
	d.shares, d.vain = true, 0
	d.turns(1000)
	if d.vain > 8 {
		t.Errorf("%d polls in vain after the guest has come back, expected to see it sooner", d.vain)
	}
}

// Whoever asks seldom costs nothing.
func TestPollerIdle(t *testing.T) {
	for _, think := range []time.Duration{300 * us, time.Millisecond, time.Second} {
		d := driver{think: think, wake: 30 * us}
		d.turns(10_000)
		if d.polled != 0 {
			t.Errorf("think time %v: polled for %v of %v", think, d.polled, d.now)
		}
	}
	// Nor does it after a burst.
	d := driver{think: 20 * us, wake: 30 * us}
	d.turns(1000)
	d.polled, d.think = 0, 10*time.Millisecond
	d.turns(1000)
	if d.polled > time.Millisecond {
		t.Errorf("polled for %v after a burst", d.polled)
	}
}

// Where another program wants the CPU it gets it.
func TestPollerGivesWay(t *testing.T) {
	d := driver{think: 20 * us, wake: 30 * us, thief: true}
	d.turns(1_000_000)
	if share := d.share(); share > 0.05 {
		t.Errorf("polled for %.1f %% of the time beside another program", 100*share)
	}
}

func TestPollerFixed(t *testing.T) {
	d := driver{think: time.Second, p: poller{fixed: 50 * us}}
	d.turns(100)
	if d.polled != 100*50*us {
		t.Errorf("polled for %v, expected 50 µs each time", d.polled)
	}
	d = driver{think: us, wake: us, p: poller{fixed: PollNever}}
	d.turns(1000)
	if d.polled != 0 {
		t.Errorf("polled for %v, expected never", d.polled)
	}
}

// One P is left to everybody else, however many workers there are.
func TestSpinners(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(3))
	var s spinCount
	s.measure()
	first, second, third := s.enter(), s.enter(), s.enter()
	if !first || !second || third {
		t.Error("expected two of three Ps to be for polling")
	}
	s.leave()
	if !s.enter() {
		t.Error("a place that is free again is not given")
	}
	runtime.GOMAXPROCS(1)
	var alone spinCount
	alone.measure()
	if alone.enter() {
		t.Error("the only P is for polling")
	}
}

// A worker that polls sees requests without kicks, and what else it has to see to.
func TestPolling(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0))))
	r := newRig(t, newMem(t), Config{PollWindow: MaxPollWindow})
	node, _ := r.mount()
	// A driver that sleeps may be woken on the worker's CPU, and then waits until the worker sleeps, each time.
	ask := func() {
		r.offer(request, getattr(node))
		r.kick(request)
		q, began := r.queues[request], time.Now()
		for {
			if head, written, ok := q.Used(); ok {
				r.parse(q, head, written)
				return
			}
			if time.Since(began) > patience {
				t.Fatal("no answer came")
			}
			runtime.Gosched()
		}
	}
	s := r.awaitStats("hits", func(s Stats) bool {
		for range 4 {
			ask()
		}
		return s.Queues[request].PollHits > 20 && s.Queues[request].PollMisses > 0
	}).Queues[request]
	if s.PollWindow != MaxPollWindow || s.PollTime == 0 || s.Kicks >= s.PollHits+s.PollMisses+20 {
		t.Errorf("with a fixed window: %+v", s)
	}
	for range 100 { // stopped while it polls
		r.must(request, getattr(node))
		if _, err := r.fe.GetVringBase(request); err != nil {
			t.Fatal(err)
		}
		r.start(request, r.queues[request].kick.Int(), r.queues[request].call.Int())
	}
	r.must(request, getattr(node))
}

// Polling takes nothing from a stop of the world, nor from goroutines that want to run.
func TestPollingLetsOthersRun(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	r := newRig(t, newMem(t), Config{PollWindow: MaxPollWindow})
	node, _ := r.mount()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 200 {
			runtime.GC()
		}
	}()
	for busy := true; busy; {
		select {
		case <-done:
			busy = false
		default:
			r.must(request, getattr(node))
		}
	}
}

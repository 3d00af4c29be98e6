package frontend

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Limit says how much of a workload a Run does. At least one of Ops and Time must be given; the first that is reached ends it.
type Limit struct {
	Ops  uint64        // operations on all queues together
	Time time.Duration // from the first request
	// Depth is how many operations are under way on each queue: up to Config.Depth; 0 means that.
	Depth int
	// Begin is called when all is prepared, before the first request that counts, and End after the last answer, before what Run
	// cleans up: what they read of a server's costs is the workload's alone. Both may be nil.
	Begin, End func()
}

// Run does w in a closed loop and checks every answer. When an answer is wrong or none comes for Config.Stall, the error says which, and
// the FrontEnd can only be closed. When ctx is done it ends early, with the error that ctx gives.
func (f *FrontEnd) Run(ctx context.Context, w Workload, l Limit) (Result, error) {
	res, err := f.run(ctx, w, l)
	if err != nil {
		return res, fmt.Errorf("run %s: %w", w.Name, err)
	}
	return res, nil
}

func (f *FrontEnd) run(ctx context.Context, w Workload, l Limit) (Result, error) {
	if f.broken != nil {
		return Result{}, fmt.Errorf("nothing can be run any more: %w", f.broken)
	}
	if l.Depth == 0 {
		l.Depth = f.config.Depth
	}
	switch {
	case w.program == nil:
		return Result{}, fmt.Errorf("%q is no workload, take one that Workloads returns", w.Name)
	case l.Ops == 0 && l.Time <= 0:
		return Result{}, errors.New("neither a number of operations nor a time is given")
	case l.Depth < 0 || l.Depth > f.config.Depth:
		return Result{}, fmt.Errorf("depth %d, expected up to that of Connect, %d", l.Depth, f.config.Depth)
	}
	for _, s := range w.shapes {
		if n := s.descs(f.config.Layout); n > f.config.RingSize {
			return Result{}, fmt.Errorf("a ring of %d descriptors has no room for %v with %d, make it larger", f.config.RingSize, s.op, n)
		}
	}
	mark := f.mem.Mark()
	defer f.mem.Reset(mark)
	f.seed++

	var stop, halt atomic.Bool
	for i, q := range f.queues {
		n := uint64(len(f.queues))
		left := l.Ops / n
		if uint64(i) < l.Ops%n {
			left++
		}
		if l.Ops == 0 {
			left = 1 << 63
		}
		if err := q.prepare(w, l.Depth, left, &stop, &halt); err != nil {
			return Result{}, f.breaks(fmt.Errorf("prepare: %w", err))
		}
	}
	res, err := f.measure(ctx, l, &stop, &halt)
	if err != nil {
		return res, f.breaks(err)
	}
	for _, q := range f.queues {
		if err := q.program.finish(q); err != nil {
			return res, f.breaks(fmt.Errorf("clean up: %w", err))
		}
		q.program, q.slots = nil, nil
	}
	if err := f.hiprio.drained(); err != nil {
		return res, f.breaks(err)
	}
	return res, context.Cause(ctx)
}

func (f *FrontEnd) breaks(err error) error {
	f.broken = err
	return err
}

// prepare makes q ready to do w.
func (q *queue) prepare(w Workload, depth int, left uint64, stop, halt *atomic.Bool) error {
	q.program, q.slots = w.program(), make([]slot, depth)
	q.left, q.stop, q.halt = left, stop, halt
	q.ops, q.requests, q.bytes, q.underWay = 0, 0, 0, 0
	q.over.Store(false)
	clear(q.latency[:])
	for i := range q.slots {
		s := &q.slots[i]
		s.index = i
		for _, shape := range w.shapes {
			s.messages = append(s.messages, newMessage(q.f.mem, shape, q.f.config.Layout, q.f.uid, q.f.gid))
		}
	}
	return q.program.prepare(q)
}

// measure runs the queues' loops and gathers what they have counted.
func (f *FrontEnd) measure(ctx context.Context, l Limit, stop, halt *atomic.Bool) (Result, error) {
	rings := []*ring{f.hiprio.ring}
	for _, q := range f.queues {
		rings = append(rings, q.ring)
	}
	for _, r := range rings {
		r.drain()
		r.kicks, r.notifications = 0, 0
	}
	errs := make([]error, len(f.queues))
	begin := make(chan struct{})
	var ready, ended sync.WaitGroup
	for i, q := range f.queues {
		ready.Add(1)
		ended.Go(func() {
			// The thread ends with the goroutine: its CPUs are not those of others.
			runtime.LockOSThread()
			errs[i] = pin(f.config.CPUs)
			ready.Done()
			<-begin
			if errs[i] == nil {
				errs[i] = q.loop()
			}
			q.ended = time.Now()
			q.over.Store(true)
			if errs[i] != nil {
				// The others end as soon as their operations have: nothing that comes counts any more.
				stop.Store(true)
			}
		})
	}
	ready.Wait()
	if l.Begin != nil {
		l.Begin()
	}
	start := time.Now()
	close(begin)
	over := make(chan struct{})
	go func() {
		ended.Wait()
		close(over)
	}()
	stalled := f.watch(ctx, l.Time, stop, halt, over)
	<-over
	if l.End != nil {
		l.End()
	}
	for i, err := range errs {
		if errors.Is(err, errHalted) {
			errs[i] = nil
		}
	}
	var res Result
	var latency histogram
	for _, q := range f.queues {
		res.Ops += q.ops
		res.Requests += q.requests
		res.Bytes += q.bytes
		res.Elapsed = max(res.Elapsed, q.ended.Sub(start))
		latency.merge(&q.latency)
	}
	for _, r := range rings {
		r.drain()
		res.Kicks += r.kicks
		res.Notifications += r.notifications
	}
	res.P50, res.P99, res.P999 = latency.quantile(0.5), latency.quantile(0.99), latency.quantile(0.999)
	return res, errors.Join(append(errs, stalled)...)
}

// watch waits until over is closed, and meanwhile sets stop when the time is up or ctx is done. When no queue with requests under way gets an
// answer for Config.Stall it sets halt and returns what state the rings are in.
func (f *FrontEnd) watch(ctx context.Context, limit time.Duration, stop, halt *atomic.Bool, over <-chan struct{}) error {
	var up <-chan time.Time
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		up = timer.C
	}
	done := ctx.Done()
	tick := time.NewTicker(max(f.config.Stall/8, time.Millisecond))
	defer tick.Stop()
	last := make([]uint64, len(f.queues))
	since := make([]time.Time, len(f.queues))
	for i := range since {
		since[i] = time.Now()
	}
	for {
		select {
		case <-over:
			return nil
		case <-up:
			stop.Store(true)
		case <-done:
			stop.Store(true)
			done = nil
		case now := <-tick.C:
			if !f.stalls(now, last, since) {
				continue
			}
			halt.Store(true)
			for _, q := range f.queues {
				_ = signal(q.ring.call.Int()) // one may be asleep
			}
			<-over
			states := make([]string, 0, len(f.queues))
			for _, q := range f.queues {
				states = append(states, q.ring.state(q.underWay))
			}
			return stallError(f.config.Stall, states)
		}
	}
}

// stalls notes the queues' progress in last and since, and says whether one has made none for too long.
func (f *FrontEnd) stalls(now time.Time, last []uint64, since []time.Time) bool {
	stalled := false
	for i, q := range f.queues {
		if n := q.progress.Load(); n != last[i] || q.over.Load() {
			last[i], since[i] = n, now
		}
		stalled = stalled || now.Sub(since[i]) > f.config.Stall
	}
	return stalled
}

// pin makes the calling thread run on cpus only.
func pin(cpus []int) error {
	if len(cpus) == 0 {
		return nil
	}
	var set unix.CPUSet
	for _, c := range cpus {
		set.Set(c)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("run on the CPUs %v: %w", cpus, err)
	}
	return nil
}

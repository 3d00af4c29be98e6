package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/sluicefs/sluice/bench/floor"
	"github.com/sluicefs/sluice/bench/frontend"
	"github.com/sluicefs/sluice/bench/meter"
	"github.com/sluicefs/sluice/bench/report"
	"github.com/sluicefs/sluice/bench/server"
)

// plan is what is measured.
type plan struct {
	servers    []server.Spec
	workloads  []frontend.Workload
	conditions []condition
	rounds     int
	slice      time.Duration // how long each server is measured at a time
	dir        string        // what is served; MakeTree has made it
	drivers    []int         // CPUs of the driver
	serving    []int         // CPUs of servers
	syscalls   bool          // count them too, which takes root
	files      *floor.Files
	progress   io.Writer
}

// candidate is a server that is up, with its front-end; or the floor, without either.
type candidate struct {
	spec   server.Spec
	driver []int // CPUs
	server *server.Server
	front  *frontend.FrontEnd
}

// start starts the server and connects to it.
func (c *candidate) start(ctx context.Context, p *plan, how condition) error {
	spec := c.spec
	c.driver, spec.CPUs = how.place(p.drivers, p.serving)
	spec.Dir = p.dir
	var err error
	if c.server, err = server.Start(ctx, spec); err != nil {
		return err
	}
	cfg := how.config(c.server.Socket, c.driver)
	cfg.Dir = p.dir
	if c.front, err = frontend.Connect(ctx, cfg); err != nil {
		return errors.Join(fmt.Errorf("server %s: %w\n%s", spec.Name, err, c.server.Log()), c.stop())
	}
	return nil
}

// stop ends both; what a broken connection says at its end is of no interest.
func (c *candidate) stop() error {
	if c.front != nil {
		_ = c.front.Close()
		c.front = nil
	}
	if c.server == nil {
		return nil
	}
	s := c.server
	c.server = nil
	return s.Stop()
}

// run measures everything: in each round, under each condition, each workload on all servers back to back, so that what
// disturbs the machine for longer than that disturbs all of them. Each round has new processes: where one happens to lie in
// memory is a part of the noise, not of the result.
func (p *plan) run(ctx context.Context, r *report.Report) error {
	failed := map[string]bool{}
	begin := time.Now()
	for round := range p.rounds {
		for i, how := range p.conditions {
			done := float64(round*len(p.conditions)+i) / float64(p.rounds*len(p.conditions))
			fmt.Fprintf(p.progress, "bench: round %d of %d, %s; %s\n", round+1, p.rounds, how.name, left(time.Since(begin), done))
			if err := p.under(ctx, r, round, how, failed); err != nil {
				return err
			}
		}
	}
	fmt.Fprintf(p.progress, "bench: %d rounds in %v\n", p.rounds, time.Since(begin).Round(time.Second))
	return nil
}

// left says how much longer it takes.
func left(taken time.Duration, done float64) string {
	if done == 0 {
		return "starting"
	}
	return fmt.Sprintf("%v left", time.Duration(float64(taken)/done*(1-done)).Round(time.Second))
}

// under is one round under one condition. failed has what is not tried again.
func (p *plan) under(ctx context.Context, r *report.Report, round int, how condition, failed map[string]bool) (err error) {
	candidates := make([]*candidate, len(p.servers))
	defer func() {
		for _, c := range candidates {
			if c != nil {
				err = errors.Join(err, c.stop())
			}
		}
	}()
	for i, spec := range p.servers {
		candidates[i] = &candidate{spec: spec}
		if err := candidates[i].start(ctx, p, how); err != nil {
			return err
		}
	}
	for i, w := range p.workloads {
		order := slices.Concat(candidates, []*candidate{nil})
		for k := range order {
			// Everybody is first, and everybody's neighbour, equally often.
			c := order[(k+round+i)%len(order)]
			if c == nil {
				err = p.measureFloor(r, round, how, w)
			} else {
				err = p.measure(ctx, r, c, round, how, w, failed)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// measure is one slice of one server. A server that fails is started anew, and that workload is not tried on it again.
func (p *plan) measure(ctx context.Context, r *report.Report, c *candidate, round int, how condition, w frontend.Workload, failed map[string]bool) error {
	id := c.spec.Name + ", " + w.Name + ", " + how.name
	if failed[id] {
		return nil
	}
	values, ops, err := p.drive(ctx, c, w, round == 0)
	if err == nil {
		r.Samples = append(r.Samples, report.Sample{Round: round, Workload: w.Name, Condition: how.name, Server: c.spec.Name, Ops: ops, Values: values})
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	failed[id] = true
	failure := fmt.Sprintf("%s: %v", id, err)
	if log := c.server.Log(); log != "" {
		failure += "\n" + log
	}
	r.Failures = append(r.Failures, failure)
	fmt.Fprintf(p.progress, "bench: FAILED: %s\n", failure)
	if err := c.stop(); err != nil {
		return err
	}
	return c.start(ctx, p, how)
}

// drive has the server do w for a slice, after a tenth that does not count, and says what it took.
func (p *plan) drive(ctx context.Context, c *candidate, w frontend.Workload, first bool) (map[string]float64, uint64, error) {
	if _, err := c.front.Run(ctx, w, frontend.Limit{Time: p.slice / 10}); err != nil {
		return nil, 0, err
	}
	var before, after meter.Sample
	var errs [2]error
	res, err := c.front.Run(ctx, w, frontend.Limit{
		Time:  p.slice,
		Begin: func() { before, errs[0] = meter.Read(c.server.PID()) },
		End:   func() { after, errs[1] = meter.Read(c.server.PID()) },
	})
	if err := errors.Join(err, errs[0], errs[1]); err != nil {
		return nil, 0, err
	}
	if res.Ops == 0 {
		return nil, 0, fmt.Errorf("no operation ended in %v", p.slice)
	}
	used, ops := after.Sub(before), float64(res.Ops)
	values := map[string]float64{
		report.CPU: float64(used.CPU.Nanoseconds()) / ops,
		report.P50: float64(res.P50.Nanoseconds()), report.P99: float64(res.P99.Nanoseconds()), report.P999: float64(res.P999.Nanoseconds()),
		report.Rate:     ops / res.Elapsed.Seconds(),
		report.Switches: float64(used.Voluntary+used.Involuntary) / ops,
		report.Kicks:    float64(res.Kicks) / ops, report.Notifies: float64(res.Notifications) / ops,
		report.Requests: float64(res.Requests) / ops,
	}
	// Counting slows a server down, and the count is the same each time: once is enough.
	if p.syscalls && first {
		if values[report.Syscalls], err = countSyscalls(ctx, c, w, p.slice/5); err != nil {
			return nil, 0, err
		}
	}
	return values, res.Ops, nil
}

// countSyscalls returns how many system calls of the server an operation takes.
func countSyscalls(ctx context.Context, c *candidate, w frontend.Workload, d time.Duration) (float64, error) {
	counter, err := meter.CountSyscalls(c.server.PID())
	if err != nil {
		return 0, err
	}
	defer counter.Close()
	var before, after uint64
	var errs [2]error
	res, err := c.front.Run(ctx, w, frontend.Limit{
		Time:  d,
		Begin: func() { before, errs[0] = counter.Read() },
		End:   func() { after, errs[1] = counter.Read() },
	})
	return float64(after-before) / float64(max(res.Ops, 1)), errors.Join(err, errs[0], errs[1])
}

// measureFloor is one slice of the floor of w, on the CPU of the servers.
func (p *plan) measureFloor(r *report.Report, round int, how condition, w frontend.Workload) error {
	loop, ok := floors[w.Name]
	if !ok {
		return nil
	}
	_, serving := how.place(p.drivers, p.serving)
	res, err := p.files.Run(loop, serving[0], p.slice)
	if err != nil {
		return err
	}
	ops := float64(res.Ops)
	r.Samples = append(r.Samples, report.Sample{
		Round: round, Workload: w.Name, Condition: how.name, Server: report.Floor, Ops: res.Ops,
		Values: map[string]float64{report.CPU: float64(res.CPU.Nanoseconds()) / ops},
	})
	return nil
}

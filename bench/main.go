// Command bench compares virtio-fs servers with each other and with what no server can do without; README.md says how, and how
// to read it. `make bench` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/bench/command"
	"github.com/sluicefs/sluice/bench/floor"
	"github.com/sluicefs/sluice/bench/frontend"
	"github.com/sluicefs/sluice/bench/report"
	"github.com/sluicefs/sluice/bench/server"
)

func main() { os.Exit(command.Run("bench", run)) }

// options is the command line.
type options struct {
	servers, workloads, conditions string
	drivers, serving               string
	rounds                         int
	slice                          time.Duration
	out, dir                       string
	syscalls                       bool
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o options
	flags.StringVar(&o.servers, "servers", defaultServers, "what to compare, separated by spaces, each [NAME=]KIND[@PROGRAM][,ARG...] with a KIND of sluice, rust, rust-nofh, c; ratios are the first one's to the others'")
	flags.StringVar(&o.workloads, "workloads", "", "names separated by commas; all for all (default those that something must hold for)")
	flags.StringVar(&o.conditions, "conditions", "p16,p1,s1,c1", "names separated by commas: p (driver polls), s (sleeps, on the server's CPU) or c (sleeps, on another CPU), the depth, maybe xQUEUES, maybe -flat (buffers in one piece)")
	flags.StringVar(&o.drivers, "driver-cpus", "", "CPUs of the driver, separated by commas (default the first half)")
	flags.StringVar(&o.serving, "server-cpus", "", "CPUs of the servers (default the other half)")
	flags.IntVar(&o.rounds, "rounds", 6, "how many times everything is measured; intervals take 6")
	flags.DurationVar(&o.slice, "slice", 300*time.Millisecond, "how long each server is measured at a time")
	flags.StringVar(&o.out, "out", filepath.Join("build", "bench"), "the directory for results")
	flags.StringVar(&o.dir, "dir", "", "the directory to serve, 150 MiB (default a temporary one); its file system is part of what is measured")
	flags.BoolVar(&o.syscalls, "syscalls", os.Geteuid() == 0, "count system calls too; takes root and tracefs")
	if err := command.Parse(flags, args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q, all are options: see -help", flags.Arg(0))
	}
	p, err := o.plan()
	if err != nil {
		return err
	}
	p.progress = stderr
	if p.dir == "" {
		if p.dir, err = os.MkdirTemp("", "sluice-bench-tree-"); err != nil {
			return err
		}
		defer os.RemoveAll(p.dir)
	}
	r, err := measureAll(ctx, p)
	switch {
	case err != nil && ctx.Err() != nil && len(r.Samples) > 0:
		// Who interrupts wants to see what there is.
		r.Failures = append(r.Failures, "interrupted before all was measured")
	case err != nil:
		return err
	}
	if err := r.WriteDir(o.out); err != nil {
		return err
	}
	fmt.Fprintln(stdout, filepath.Join(o.out, "report.md"))
	if len(r.Failures) > 0 {
		return fmt.Errorf("%d failures, the report says which", len(r.Failures))
	}
	return nil
}

// plan makes a plan of the command line.
func (o options) plan() (*plan, error) {
	p := &plan{rounds: o.rounds, slice: o.slice, dir: o.dir, syscalls: o.syscalls}
	if o.rounds < 1 || o.slice < time.Millisecond {
		return nil, fmt.Errorf("%d rounds of %v, expected at least 1 of 1ms", o.rounds, o.slice)
	}
	for text := range strings.FieldsSeq(o.servers) {
		s, err := server.Parse(text)
		if err != nil {
			return nil, err
		}
		// Before anything is measured, not after a while.
		if s, err = s.Locate(); err != nil {
			return nil, err
		}
		if s.Name == report.Floor || slices.ContainsFunc(p.servers, func(other server.Spec) bool { return other.Name == s.Name }) {
			return nil, fmt.Errorf("server %q: the name is taken, give another as in NAME=%s", text, text)
		}
		p.servers = append(p.servers, s)
	}
	for name := range strings.SplitSeq(o.conditions, ",") {
		c, err := parseCondition(name)
		if err != nil {
			return nil, err
		}
		p.conditions = append(p.conditions, c)
	}
	switch o.workloads {
	case "":
		for _, row := range rows {
			w, _ := frontend.Find(row.workload)
			p.workloads = append(p.workloads, w)
		}
	case "all":
		p.workloads = frontend.Workloads()
	default:
		for name := range strings.SplitSeq(o.workloads, ",") {
			w, ok := frontend.Find(name)
			if !ok {
				return nil, fmt.Errorf("no workload is called %q; there are %s", name, strings.Join(workloadNames(), ", "))
			}
			p.workloads = append(p.workloads, w)
		}
	}
	if len(p.servers) == 0 {
		return nil, errors.New("no server to measure: name one with -servers")
	}
	return p, o.place(p)
}

func workloadNames() []string {
	var names []string
	for _, w := range frontend.Workloads() {
		names = append(names, w.Name)
	}
	return names
}

// place fills in the CPUs.
func (o options) place(p *plan) (err error) {
	if p.drivers, err = command.CPUs(o.drivers); err != nil {
		return err
	}
	if p.serving, err = command.CPUs(o.serving); err != nil {
		return err
	}
	if len(p.drivers) == 0 || len(p.serving) == 0 {
		all, err := ownCPUs()
		if err != nil {
			return err
		}
		half := max(len(all)/2, 1)
		if len(p.drivers) == 0 {
			p.drivers = all[:half]
		}
		if len(p.serving) == 0 {
			p.serving = all[len(all)-half:]
		}
	}
	for _, c := range p.conditions {
		if driver, server := c.place(p.drivers, p.serving); !c.together && slices.ContainsFunc(driver, func(cpu int) bool { return slices.Contains(server, cpu) }) {
			return fmt.Errorf("condition %s wants driver and server on different CPUs; they have %v and %v", c.name, driver, server)
		}
	}
	return nil
}

// ownCPUs are the CPUs that this process may run on.
func ownCPUs() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("ask for the CPUs: %w", err)
	}
	var cpus []int
	for cpu := 0; len(cpus) < set.Count(); cpu++ {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// measureAll makes what is served and the floor's files, and carries the plan out. With an error the report has what was
// measured until then.
func measureAll(ctx context.Context, p *plan) (r *report.Report, err error) {
	r = &report.Report{Machine: report.Machine(p.dir)}
	if err := frontend.MakeTree(p.dir); err != nil {
		return r, err
	}
	// MakeTree's names for what the workloads work on.
	if p.files, err = floor.Open(floor.Config{
		Read: filepath.Join(p.dir, "data"), Written: filepath.Join(p.dir, "written"), Dir: filepath.Join(p.dir, "thousand"),
		Cold: filepath.Join(p.dir, "cold"), Scratch: filepath.Join(p.dir, "scratch"),
	}); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, p.files.Close()) }()
	facts, err := basics(p.files, p.drivers[0], p.serving[0], p.slice)
	if err != nil {
		return r, err
	}
	r.Machine = append(r.Machine, facts...)
	for _, s := range p.servers {
		r.Servers = append(r.Servers, report.Subject{Name: s.Name, Text: server.Describe(ctx, s)})
	}
	for _, c := range p.conditions {
		r.Conditions = append(r.Conditions, report.Subject{Name: c.name, Text: c.text()})
	}
	chosen := map[string]bool{}
	for _, w := range p.workloads {
		text := w.Doc
		if loop, ok := floors[w.Name]; ok {
			text += "; floor: " + floor.Calls(loop)
		}
		r.Workloads = append(r.Workloads, report.Subject{Name: w.Name, Text: text})
		chosen[w.Name] = true
	}
	r.Limits = limits(chosen)
	before := report.Load()
	err = p.run(ctx, r)
	r.Machine = append(r.Machine, report.Subject{Name: "load", Text: "averages " + before + " before, " + report.Load() + " after"})
	return r, err
}

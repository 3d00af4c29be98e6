// Command guest is the second level of the benchmark: what people do in guests, in a real one, with Sluice and its peers in turn.
//
// One User-Mode Linux boots with a device for each server and cache policy. In each round each workload runs with each of them, in
// another order each time, with nothing in the guest's caches. Times are by the guest's clock; the CPU time that server and guest use
// meanwhile is by the host's. A second boot counts FUSE requests, with servers that tell them or log them.
//
// On a machine that has other things to do, run it with real-time priority (chrt -r 1), which guest and servers inherit: one request at
// a time, which is what most programs have under way, is waiting for who is woken to get a CPU.
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

	"github.com/sluicefs/sluice/bench/command"
	"github.com/sluicefs/sluice/bench/report"
	"github.com/sluicefs/sluice/bench/server"
	"github.com/sluicefs/sluice/internal/testguest"
)

func main() { os.Exit(command.Run("bench/guest", run)) }

// plan is what to run.
type plan struct {
	servers  []server.Spec
	policies []string
	names    []string // of workloads; empty means all
	rounds   int
	count    bool
	sizes    sizes
	memMiB   int
	dir      string
	out      string
	progress io.Writer
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	p, err := parse(args, stderr)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(p.dir, "sluice-bench-guest-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	fmt.Fprintln(p.progress, "bench/guest: making files and the guest's programs")
	fixtures, err := makeFixtures(dir, p.sizes)
	if err != nil {
		return err
	}
	initrd := filepath.Join(dir, "initrd")
	if err := writeInitramfs(initrd, fixtures); err != nil {
		return err
	}
	list, err := choose(workloads(fixtures, p.sizes), p.names)
	if err != nil {
		return err
	}
	before := report.Load()
	samples, err := p.measure(ctx, list, fixtures.share(), initrd, p.rounds, false)
	var counts []sample
	if err == nil && p.count {
		counts, err = p.measure(ctx, list, fixtures.share(), initrd, 1, true)
	}
	interrupted := ctx.Err() != nil && len(samples) > 0
	if err != nil && !interrupted {
		return err
	}
	r := p.report(context.WithoutCancel(ctx), list, samples, counts)
	if interrupted {
		// Who interrupts wants to see what there is.
		r.Failures = append(r.Failures, "interrupted before all was measured")
	}
	r.Machine = append(report.Machine(dir), report.Subject{Name: "load", Text: "averages " + before + " before, " + report.Load() + " after"})
	if err := errors.Join(r.WriteDir(p.out), writeRequests(filepath.Join(p.out, "requests.md"), counts)); err != nil {
		return err
	}
	fmt.Fprintln(stdout, filepath.Join(p.out, "report.md"))
	return err
}

// parse makes a plan of the command line.
func parse(args []string, stderr io.Writer) (*plan, error) {
	p := &plan{sizes: usualSizes, memMiB: 1024, progress: stderr}
	flags := flag.NewFlagSet("guest", flag.ContinueOnError)
	flags.SetOutput(stderr)
	servers := flags.String("servers", "sluice rust c", "what to compare, separated by spaces, each [NAME=]KIND[@PROGRAM][,ARG...]; ratios are the first one's to the others'")
	policies := flags.String("cache", auto+","+never, "cache policies, separated by commas")
	names := flags.String("workloads", "", "names separated by commas (default all)")
	full := flags.Bool("full", false, "full sizes, such as all of Go's source")
	flags.IntVar(&p.rounds, "rounds", 6, "how many times everything is measured; intervals take 6")
	flags.BoolVar(&p.count, "count", true, "count FUSE requests too, in a round of its own")
	flags.StringVar(&p.dir, "dir", "", "where to make the share (default where temporary files are); its file system is part of what is measured")
	flags.StringVar(&p.out, "out", filepath.Join("build", "bench-guest"), "the directory for results")
	if err := command.Parse(flags, args); err != nil {
		return nil, err
	}
	if flags.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q, all are options: see -help", flags.Arg(0))
	}
	if p.rounds < 1 {
		return nil, fmt.Errorf("%d rounds, expected at least 1", p.rounds)
	}
	if *full {
		p.sizes, p.memMiB = fullSizes, 3072
	}
	if *names != "" {
		p.names = strings.Split(*names, ",")
	}
	for text := range strings.FieldsSeq(*servers) {
		s, err := server.Parse(text)
		if err != nil {
			return nil, err
		}
		if s, err = s.Locate(); err != nil {
			return nil, err
		}
		if slices.ContainsFunc(p.servers, func(other server.Spec) bool { return other.Name == s.Name }) {
			return nil, fmt.Errorf("server %q: the name is taken, give another as in NAME=%s", text, text)
		}
		// The name is in the share's tag and in a directory's name.
		if len(s.Name) > 20 || strings.ContainsAny(s.Name, "/,=@") {
			return nil, fmt.Errorf("server %q: give it a short name as in NAME=%s", text, text)
		}
		p.servers = append(p.servers, s)
	}
	if len(p.servers) == 0 {
		return nil, errors.New("no server to measure")
	}
	for policy := range strings.SplitSeq(*policies, ",") {
		if policy != auto && policy != never {
			return nil, fmt.Errorf("cache policy %q: expected %s or %s", policy, auto, never)
		}
		p.policies = append(p.policies, policy)
	}
	return p, nil
}

// choose returns the workloads of these names, all if there are none.
func choose(list []workload, names []string) ([]workload, error) {
	if len(names) == 0 {
		return list, nil
	}
	var chosen []workload
	for _, name := range names {
		i := slices.IndexFunc(list, func(w workload) bool { return w.name == name })
		if i < 0 {
			var all []string
			for _, w := range list {
				all = append(all, w.name)
			}
			return nil, fmt.Errorf("unknown workload %q, there are %s", name, strings.Join(all, ", "))
		}
		chosen = append(chosen, list[i])
	}
	return chosen, nil
}

// writeInitramfs writes what the guest boots from.
func writeInitramfs(path string, f fixtures) error {
	files, err := guestFiles(f)
	if err != nil {
		return err
	}
	bench, remove, err := testguest.BuildProgram("github.com/sluicefs/sluice/bench/guest/guestbench")
	if err != nil {
		return err
	}
	defer remove()
	files["guestbench"] = bench
	kit, err := testguest.FindKit()
	if err != nil {
		return err
	}
	return testguest.WriteInitramfs(path, kit, files)
}

// measure runs the workloads in rounds, within one boot.
func (p *plan) measure(ctx context.Context, list []workload, share, initrd string, rounds int, counting bool) (samples []sample, err error) {
	m, err := p.start(ctx, share, initrd, counting)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	for round := range rounds {
		for i, w := range list {
			for j := range m.entrants {
				e := m.entrants[(round+i+j)%len(m.entrants)]
				if w.policies != nil && !slices.Contains(w.policies, e.policy) {
					continue
				}
				s, err := m.run(ctx, e, w, round)
				if err != nil {
					return samples, err
				}
				fmt.Fprintf(p.progress, "bench/guest: round %d: %-20s %-8s cache=%-5s %8.3f s, server %6.3f s, guest %6.3f s of CPU\n",
					round+1, s.workload, s.server, s.policy, s.elapsed.Seconds(), s.serverCPU.Seconds(), s.guestCPU.Seconds())
				samples = append(samples, s)
			}
		}
	}
	return samples, nil
}

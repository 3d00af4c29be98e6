// Command guest is the second level of the benchmark: what people do in guests, in a real one, with Sluice and its peers in turn.
//
// One User-Mode Linux boots with a device for each server and cache policy. In each round each workload runs with each of them, in
// another order each time, with nothing in the guest's caches. Times are by the guest's clock; the CPU time that server and guest use
// meanwhile is by the host's. A second boot counts FUSE requests, with servers that tell them or log them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/sluicefs/sluice/bench/server"
	"github.com/sluicefs/sluice/internal/testguest"
)

// config is what to run.
type config struct {
	servers   []server.Spec
	policies  []string
	workloads *regexp.Regexp
	rounds    int
	count     bool
	full      bool
	dir       string
	out       string
	memMiB    int
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "bench/guest: %v\n", err)
		os.Exit(1)
	}
}

func parseFlags() (config, error) {
	var cfg config
	var servers []string
	flag.Func("server", "a `server`, [NAME=]KIND[@PROGRAM][,ARG...]; may be repeated (default sluice and rust)", func(text string) error {
		servers = append(servers, text)
		return nil
	})
	policies := flag.String("cache", auto+","+never, "cache `policies`")
	pattern := flag.String("workloads", ".", "run the workloads that match this `regexp` only")
	flag.IntVar(&cfg.rounds, "rounds", 5, "rounds, in each of which each server has its turn with each workload")
	flag.BoolVar(&cfg.count, "count", true, "count FUSE requests too, in one round of its own")
	flag.BoolVar(&cfg.full, "full", false, "full sizes, such as all of Go's source")
	flag.StringVar(&cfg.dir, "dir", "", "make the share in this `directory` instead of the one for temporary files")
	flag.StringVar(&cfg.out, "out", filepath.Join("build", "bench-guest"), "write the results to this `directory`")
	flag.Parse()
	if flag.NArg() > 0 {
		return cfg, fmt.Errorf("%q is no option", flag.Arg(0))
	}
	if len(servers) == 0 {
		servers = []string{string(server.Sluice), string(server.Rust)}
	}
	for _, text := range servers {
		spec, err := server.Parse(text)
		if err != nil {
			return cfg, err
		}
		cfg.servers = append(cfg.servers, spec)
	}
	for policy := range strings.SplitSeq(*policies, ",") {
		if policy != auto && policy != never {
			return cfg, fmt.Errorf("cache policy %q: expected %s or %s", policy, auto, never)
		}
		cfg.policies = append(cfg.policies, policy)
	}
	var err error
	cfg.workloads, err = regexp.Compile(*pattern)
	cfg.memMiB = 1024
	if cfg.full {
		cfg.memMiB = 3072
	}
	return cfg, err
}

func run() (err error) {
	cfg, err := parseFlags()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp(cfg.dir, "sluice-bench-guest-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	size := usualSizes
	if cfg.full {
		size = fullSizes
	}
	fmt.Fprintln(os.Stderr, "bench/guest: making files and the guest's programs")
	fixtures, err := makeFixtures(dir, size)
	if err != nil {
		return err
	}
	initrd := filepath.Join(dir, "initrd")
	if err := writeInitramfs(initrd, fixtures); err != nil {
		return err
	}
	list := slices.DeleteFunc(workloads(fixtures, size), func(w workload) bool { return !cfg.workloads.MatchString(w.name) })
	var samples []sample
	if cfg.rounds > 0 {
		m, err := startMachine(ctx, cfg, fixtures.share(), initrd, false)
		if err != nil {
			return err
		}
		samples, err = m.measure(ctx, list, cfg.rounds)
		if err = errors.Join(err, m.Close()); err != nil {
			return err
		}
	}
	var counts []sample
	if cfg.count {
		m, err := startMachine(ctx, cfg, fixtures.share(), initrd, true)
		if err != nil {
			return err
		}
		counts, err = m.measure(ctx, list, 1)
		if err = errors.Join(err, m.Close()); err != nil {
			return err
		}
	}
	return write(cfg, list, samples, counts)
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

// measure runs the workloads in rounds.
func (m *machine) measure(ctx context.Context, list []workload, rounds int) ([]sample, error) {
	var samples []sample
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
				fmt.Fprintf(os.Stderr, "bench/guest: round %d: %-20s %-8s cache=%-5s %8.3f s, server %6.3f s, guest %6.3f s of CPU\n",
					round+1, s.Workload, s.Server, s.Policy, s.Elapsed.Seconds(), s.ServerCPU.Seconds(), s.GuestCPU.Seconds())
				samples = append(samples, s)
			}
		}
	}
	return samples, nil
}

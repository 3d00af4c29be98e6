package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/sluicefs/sluice/bench/report"
	"github.com/sluicefs/sluice/bench/server"
)

// report makes a report of what was measured and counted.
func (p *plan) report(ctx context.Context, list []workload, samples, counts []sample) *report.Report {
	r := &report.Report{}
	for _, s := range p.servers {
		r.Servers = append(r.Servers, report.Subject{Name: s.Name, Text: server.Describe(ctx, s)})
	}
	for _, policy := range p.policies {
		r.Conditions = append(r.Conditions, report.Subject{Name: condition(policy), Text: "a guest of User-Mode Linux, with nothing cached when a workload begins"})
	}
	for _, w := range list {
		r.Workloads = append(r.Workloads, report.Subject{Name: w.name, Text: fmt.Sprintf("%s, %d times", w.text, w.ops)})
	}
	for _, s := range samples {
		ops := float64(s.ops)
		r.Samples = append(r.Samples, report.Sample{
			Round: s.round, Workload: s.workload, Condition: condition(s.policy), Server: s.server, Ops: uint64(s.ops),
			Values: map[string]float64{
				report.Time: float64(s.elapsed) / ops, report.CPU: float64(s.serverCPU) / ops, report.GuestCPU: float64(s.guestCPU) / ops,
			},
		})
	}
	for _, s := range counts {
		values := map[string]float64{report.Requests: 0}
		for name, n := range s.counts {
			switch perOp := float64(n) / float64(s.ops); name {
			case kicks:
				values[report.Kicks] = perOp
			case notifications:
				values[report.Notifies] = perOp
			default:
				values[report.Requests] += perOp
			}
		}
		r.Samples = append(r.Samples, report.Sample{
			Round: s.round, Workload: s.workload, Condition: condition(s.policy), Server: s.server, Ops: uint64(s.ops), Values: values,
		})
	}
	r.Limits = p.limits(list)
	return r
}

// condition names a cache policy in reports.
func condition(policy string) string { return "cache-" + policy }

// limits are what must hold: with no workload may the first server be slower than another, and with some it shall be faster than Rust
// virtiofsd by a factor.
func (p *plan) limits(list []workload) []report.Limit {
	var all []report.Limit
	for _, w := range list {
		for _, policy := range p.policies {
			if w.policies != nil && !slices.Contains(w.policies, policy) {
				continue
			}
			for _, s := range p.servers[1:] {
				most := 1.0
				if s.Kind == server.Rust {
					most = 1 / w.target
				}
				all = append(all, report.Limit{
					Group: "Time, by the guest's clock:", Workload: w.name, Condition: condition(policy), Metric: report.Time, Than: s.Name, Max: most,
				})
			}
		}
	}
	return all
}

// writeRequests writes a table of the requests by opcode, for each operation.
func writeRequests(path string, counts []sample) error {
	var b strings.Builder
	fmt.Fprint(&b, "# FUSE requests for each operation\n\n| workload | cache | server | all | by opcode |\n|---|---|---|---|---|\n")
	for _, s := range counts {
		names := slices.DeleteFunc(slices.Collect(maps.Keys(s.counts)), func(name string) bool { return name == kicks || name == notifications })
		slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(s.counts[b], s.counts[a]), cmp.Compare(a, b)) })
		all, each := 0, make([]string, 0, len(names))
		for _, name := range names {
			all += s.counts[name]
			// What comes once for the whole workload says nothing.
			if perOp := float64(s.counts[name]) / float64(s.ops); perOp >= 0.005 {
				each = append(each, fmt.Sprintf("%s %.2f", name, perOp))
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %.2f | %s |\n", s.workload, s.policy, s.server, float64(all)/float64(s.ops), strings.Join(each, ", "))
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}

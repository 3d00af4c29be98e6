package main

import "github.com/sluicefs/sluice/bench/report"

// row is a workload of the first table of what must hold: CPU time at most so many times that of others, 0 is no limit.
type row struct {
	workload              string
	rust, c, rustS1, base float64 // p16 ÷ Rust, p16 ÷ C, s1 ÷ Rust, p16 ÷ floor
}

var rows = []row{
	{"getattr", 0.20, 0.70, 0.45, 3.0},
	{"lookup", 0.20, 0.50, 0.40, 1.8},
	{"lookup-cold", 0.50, 1.0, 0.6, 2.0},
	{"openrel", 0.40, 0.80, 0.62, 1.5},
	{"read4k", 0.48, 0.78, 0.62, 1.4},
	{"write4k", 0.50, 0.80, 0.65, 1.3},
	{"read128k", 0.78, 1.0, 0.78, 1.12},
	{"seq1m", 0.78, 1.0, 0.75, 1.12},
	{"readdirplus", 0.25, 0.60, 0.23, 1.6},
	{"create", 0.70, 0.70, 0.70, 4},
}

// The servers that limits are about, as -servers has them by default.
const (
	sluice, unpolled, rust, c = "sluice", "poll0", "rust", "c"
	defaultServers            = sluice + " " + rust + " " + c + " " + unpolled + "=sluice,--poll-us=0"
)

// limits returns what must hold for the workloads chosen.
func limits(chosen map[string]bool) []report.Limit {
	var all []report.Limit
	add := func(group, workload, condition, metric, server, than string, max float64) {
		all = append(all, report.Limit{Group: group, Workload: workload, Condition: condition, Metric: metric, Server: server, Than: than, Max: max})
	}
	for _, r := range rows {
		if !chosen[r.workload] {
			continue
		}
		const group = "CPU time of the server for each operation:"
		add(group, r.workload, "p16", report.CPU, sluice, rust, r.rust)
		add(group, r.workload, "p16", report.CPU, sluice, c, r.c)
		add(group, r.workload, "s1", report.CPU, sluice, rust, r.rustS1)
		add(group, r.workload, "p16", report.CPU, sluice, report.Floor, r.base)
	}
	for _, w := range []string{"getattr", "lookup", "read4k"} {
		if !chosen[w] {
			continue
		}
		const group = "Latency, one request at a time (and what it costs):"
		add(group, w, "c1", report.P50, sluice, rust, 0.5)
		add(group, w, "c1", report.CPU, sluice, rust, 1.1)
		add(group, w, "c1", report.P50, unpolled, rust, 1.05)
		add(group, w, "p1", report.P50, sluice, rust, 0.1)
		// As good as the same within what can be told apart.
		add(group, w, "s1", report.P50, sluice, unpolled, 1.05)
	}
	return all
}

// floors says which of the floor's loops each workload cannot be below; one without has none that says anything.
var floors = map[string]string{
	"getattr":     "getattr",
	"lookup":      "lookup",
	"lookup-cold": "lookup-cold",
	"lookup-miss": "lookup-miss",
	"openrel":     "open",
	"read4k":      "read-4k",
	"read128k":    "read-128k",
	"seq1m":       "seqread-1m",
	"write4k":     "write-4k",
	"write128k":   "write-128k",
	"readdirplus": "readdirplus",
	"create":      "create-unlink",
	"rename":      "rename",
	"setattr":     "setattr",
	"statfs":      "statfs",
}

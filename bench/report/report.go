// Package report turns measurements of several servers, made in turn, into what people and programs read: Go benchmark text,
// Markdown with medians, spreads and paired ratios, and charts. It knows no server and no workload; those who measure do.
package report

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/perf/benchmath"
)

// Confidence is the level of all intervals: 95 times in 100 the true median lies within. It takes six rounds.
const Confidence = 0.95

// Floor is the name of the server that is none: the system calls alone.
const Floor = "floor"

// Metrics, by the unit that Go benchmark text has for them.
const (
	CPU      = "cpu-ns/op"
	P50      = "p50-ns"
	P99      = "p99-ns"
	P999     = "p99.9-ns"
	Rate     = "ops/s"
	GuestCPU = "guest-cpu-ns/op"
	Syscalls = "syscalls/op"
	Switches = "switches/op"
	Kicks    = "kicks/op"
	Notifies = "notifications/op"
	Requests = "requests/op"
	Time     = "ns/op" // elapsed, by the guest's clock
)

// metric is how a metric is shown.
type metric struct {
	unit  string
	title string
	scale float64 // what a value is divided by
	shown string  // the unit then
	less  bool    // less is better, and ratios are of interest
}

var metrics = []metric{
	{Time, "Time", 1e6, "ms", true},
	{CPU, "CPU time of the server for each operation", 1e3, "µs", true},
	{GuestCPU, "CPU time of the guest for each operation", 1e3, "µs", true},
	{P50, "Latency, median", 1e3, "µs", true},
	{P99, "Latency, 99th percentile", 1e3, "µs", true},
	{P999, "Latency, 99.9th percentile", 1e3, "µs", true},
	{Rate, "Operations per second", 1e3, "thousand/s", false},
	{Syscalls, "Host system calls for each operation", 1, "", true},
	{Switches, "Context switches of the server for each operation", 1, "", true},
	{Kicks, "Kicks for each operation (each is an exit of a real guest)", 1, "", true},
	{Notifies, "Notifications for each operation (each is an interrupt of a real guest)", 1, "", true},
	{Requests, "FUSE requests for each operation", 1, "", true},
}

// shownMetrics are the metrics that samples have, those that are not known here last.
func (r *Report) shownMetrics() []metric {
	shown := slices.DeleteFunc(slices.Clone(metrics), func(m metric) bool { return !r.has(key{metric: m.unit}) })
	others := map[string]bool{}
	for _, s := range r.Samples {
		for unit := range s.Values {
			others[unit] = true
		}
	}
	for _, m := range metrics {
		delete(others, m.unit)
	}
	for _, unit := range slices.Sorted(maps.Keys(others)) {
		shown = append(shown, metric{unit, unit, 1, "", true})
	}
	return shown
}

// Subject is one thing that was measured, or a way in which it was.
type Subject struct {
	Name string `json:"name"` // without spaces
	Text string `json:"text"` // a line that says what it is
}

// Sample is what one server did in one slice of time.
type Sample struct {
	Round     int                `json:"round"`
	Workload  string             `json:"workload"`
	Condition string             `json:"condition"`
	Server    string             `json:"server"`
	Ops       uint64             `json:"ops"`
	Values    map[string]float64 `json:"values"` // by metric
}

// Report is everything that was measured. The first server is the one that the others are compared with.
type Report struct {
	Machine    []Subject `json:"machine"` // what it was measured on and with
	Servers    []Subject `json:"servers"`
	Conditions []Subject `json:"conditions"`
	Workloads  []Subject `json:"workloads"`
	Limits     []Limit   `json:"limits"`
	Samples    []Sample  `json:"samples"`
	Failures   []string  `json:"failures,omitempty"` // what servers did not do, or not rightly
}

// Limit is what a ratio must not exceed.
type Limit struct {
	Group     string  `json:"group"` // the table it belongs to
	Workload  string  `json:"workload"`
	Condition string  `json:"condition"`
	Metric    string  `json:"metric"`
	Server    string  `json:"server"` // whose value is divided; "" is the first server's
	Than      string  `json:"than"`   // by whose
	Max       float64 `json:"max"`
}

// WriteJSON writes the report for ReadJSON.
func (r *Report) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", " ")
	return enc.Encode(r)
}

// ReadJSON reads what WriteJSON has written.
func ReadJSON(from io.Reader) (*Report, error) {
	r := new(Report)
	if err := json.NewDecoder(from).Decode(r); err != nil {
		return nil, fmt.Errorf("read results: %w", err)
	}
	return r, nil
}

// Summary is a median with the interval that holds the true one with Confidence. It is the interval of order statistics, which
// assumes nothing of how values are distributed; where there are too few of them it is infinite.
type Summary struct {
	Median, Low, High float64
	N                 int
}

func summarize(values []float64) (Summary, bool) {
	if len(values) == 0 {
		return Summary{}, false
	}
	s := benchmath.AssumeNothing.Summary(benchmath.NewSample(slices.Clone(values), &benchmath.DefaultThresholds), Confidence)
	return Summary{s.Center, s.Lo, s.Hi, len(values)}, true
}

// key says which values belong together.
type key struct{ workload, condition, server, metric string }

// values returns the values of each round that has one.
func (r *Report) values(k key) map[int]float64 {
	found := map[int]float64{}
	for _, s := range r.Samples {
		if s.Workload == k.workload && s.Condition == k.condition && s.Server == k.server {
			if v, ok := s.Values[k.metric]; ok {
				found[s.Round] = v
			}
		}
	}
	return found
}

// value sums up the values of all rounds; false if there are none.
func (r *Report) value(k key) (Summary, bool) {
	return summarize(sorted(r.values(k)))
}

// ratio sums up what server's values are to than's, each divided by the other of its own round: what disturbs a whole round
// disturbs both. False if no round has both.
func (r *Report) ratio(k key, than string) (Summary, bool) {
	a := r.values(k)
	k.server = than
	b := r.values(k)
	ratios := map[int]float64{}
	for round, v := range a {
		if w := b[round]; w > 0 {
			ratios[round] = v / w
		}
	}
	return summarize(sorted(ratios))
}

func sorted(m map[int]float64) []float64 {
	all := make([]float64, 0, len(m))
	for _, v := range m {
		all = append(all, v)
	}
	slices.Sort(all)
	return all
}

// subject is the server that the others are compared with, "" if there is none.
func (r *Report) subject() string {
	if len(r.Servers) == 0 {
		return ""
	}
	return r.Servers[0].Name
}

// peers are the servers that the subject is compared with: all others that have samples, the floor last.
func (r *Report) peers() []string {
	var names []string
	for _, s := range r.Servers[min(1, len(r.Servers)):] {
		names = append(names, s.Name)
	}
	if slices.ContainsFunc(r.Samples, func(s Sample) bool { return s.Server == Floor }) {
		names = append(names, Floor)
	}
	return names
}

// verdict is what a comparison with a limit has come to.
type verdict struct {
	Limit
	Value    Summary
	Measured bool
	// Alone is the floor's CPU time ÷ Than's, 0 where that is not known: below it no server can come.
	Alone float64
}

func (r *Report) verdict(l Limit) verdict {
	if l.Server == "" {
		l.Server = r.subject()
	}
	v, ok := r.ratio(key{l.Workload, l.Condition, l.Server, l.Metric}, l.Than)
	var alone Summary
	if l.Metric == CPU && l.Than != Floor {
		alone, _ = r.ratio(key{l.Workload, l.Condition, Floor, CPU}, l.Than)
	}
	return verdict{l, v, ok, alone.Median}
}

// met says that the median is within the limit.
func (v verdict) met() bool { return v.Measured && v.Value.Median <= v.Max }

// sure says that the whole interval is on the median's side of the limit.
func (v verdict) sure() bool {
	return v.Measured && (v.Value.High <= v.Max || v.Value.Low > v.Max)
}

func (v verdict) String() string {
	switch {
	case !v.Measured:
		return "not measured"
	case v.met() && v.sure():
		return "met"
	case v.met():
		return "met, within noise"
	case v.Alone > v.Max:
		return "**not met**, nor by the floor, " + number(v.Alone)
	case v.sure():
		return "**not met**"
	}
	return "**not met**, within noise"
}

// number shows a value with three digits that count.
func number(v float64) string {
	switch {
	case math.IsInf(v, 0):
		return "∞"
	case v == 0:
		return "0"
	case math.Abs(v) >= 100:
		return fmt.Sprintf("%.0f", v)
	case math.Abs(v) >= 10:
		return fmt.Sprintf("%.1f", v)
	case math.Abs(v) >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// interval shows the interval of s, "" if there are too few values for one.
func (s Summary) interval() string {
	if math.IsInf(s.Low, 0) || math.IsInf(s.High, 0) {
		return ""
	}
	return number(s.Low) + "–" + number(s.High)
}

// noise says that s, a ratio, may as well be 1.
func (s Summary) noise() bool { return s.Low <= 1 && 1 <= s.High }

// workloadsOf returns the workloads that have samples like k, in their order.
func (r *Report) workloadsOf(k key) []string {
	var all []string
	for _, w := range r.Workloads {
		k.workload = w.Name
		if r.has(k) {
			all = append(all, w.Name)
		}
	}
	return all
}

// has says that some sample has such a value; an empty name is any.
func (r *Report) has(k key) bool {
	return slices.ContainsFunc(r.Samples, func(s Sample) bool {
		_, ok := s.Values[k.metric]
		return ok && cmp.Or(k.workload, s.Workload) == s.Workload && cmp.Or(k.condition, s.Condition) == s.Condition &&
			cmp.Or(k.server, s.Server) == s.Server
	})
}

// WriteDir writes results.json, bench.txt, report.md and the charts to dir.
func (r *Report) WriteDir(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	create := func(name string, fill func(io.Writer) error) error {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		return errors.Join(fill(f), f.Close())
	}
	charts := r.Charts()
	err := errors.Join(
		create("results.json", r.WriteJSON),
		create("bench.txt", r.WriteBenchmark),
		create("report.md", func(w io.Writer) error { return r.WriteMarkdown(w, charts) }),
	)
	for _, c := range charts {
		err = errors.Join(err, create(c.File, c.WriteSVG))
	}
	return err
}

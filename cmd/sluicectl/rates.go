package main

import (
	"slices"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

// sample is what the daemon counted until a time.
type sample struct {
	at    time.Time
	stats api.Stats
}

// rate is what a share, or one opcode of it, did in a time. Its JSON is that of stat --json.
type rate struct {
	Tag string `json:"tag"`
	Op  string `json:"op,omitempty"`
	// Ops and Errors are per second, as are BytesRead and BytesWritten.
	Ops    float64 `json:"ops_per_second"`
	Errors float64 `json:"errors_per_second"`
	// P50 and P99 are latencies in nanoseconds; 0 if there was no request.
	P50          time.Duration `json:"p50_ns"`
	P99          time.Duration `json:"p99_ns"`
	BytesRead    float64       `json:"bytes_read_per_second"`
	BytesWritten float64       `json:"bytes_written_per_second"`

	// errors are by name; depth, inodes and faults are the share's as they are.
	errors                map[string]uint64
	depth, inodes, faults uint64
}

// rates are what the shares of cur did since prev. Without prev they are what they did at all, as if in a second.
func rates(prev *sample, cur *sample, byOp bool) (all []rate) {
	seconds := 1.0
	if prev != nil {
		seconds = max(cur.at.Sub(prev.at).Seconds(), 1e-3)
	}
	for i := range cur.stats.Shares {
		now := &cur.stats.Shares[i]
		was := &api.ShareStats{}
		if prev != nil {
			if j := slices.IndexFunc(prev.stats.Shares, func(s api.ShareStats) bool { return s.Tag == now.Tag }); j >= 0 {
				was = &prev.stats.Shares[j]
			}
		}
		d := since(was, now)
		if !byOp {
			all = append(all, rateOf(&d, "", d.Ops, seconds))
			continue
		}
		for i := range d.Ops {
			if d.Ops[i].Count > 0 {
				all = append(all, rateOf(&d, d.Ops[i].Op, d.Ops[i:i+1], seconds))
			}
		}
	}
	return all
}

// rateOf sums up ops of the share s.
func rateOf(s *api.ShareStats, op string, ops []api.OpStats, seconds float64) rate {
	r := rate{Tag: s.Tag, Op: op, errors: make(map[string]uint64), inodes: s.Inodes}
	var count, failed uint64
	var latency []uint64
	for i := range ops {
		o := &ops[i]
		count += o.Count
		for name, n := range o.Errors {
			if n > 0 {
				r.errors[name] += n
				failed += n
			}
		}
		latency = append(latency, make([]uint64, max(0, len(o.Latency)-len(latency)))...)
		for i, n := range o.Latency {
			latency[i] += n
		}
	}
	if op == "" || op == "READ" {
		r.BytesRead = float64(s.BytesRead) / seconds
	}
	if op == "" || op == "WRITE" {
		r.BytesWritten = float64(s.BytesWritten) / seconds
	}
	r.Ops, r.Errors = float64(count)/seconds, float64(failed)/seconds
	r.P50, r.P99 = percentile(latency, 0.5), percentile(latency, 0.99)
	for _, q := range s.Queues {
		r.depth += q.Depth
	}
	for _, n := range s.Faults {
		r.faults += n
	}
	return r
}

// since is what the share did between was and now: the differences of what only rises. A share that has begun anew in between,
// as after one of its counters fell, did all that it counts now.
func since(was, now *api.ShareStats) api.ShareStats {
	d := *now
	d.Ops = nil
	for i := range now.Ops {
		o := &now.Ops[i]
		old := api.OpStats{}
		if j := slices.IndexFunc(was.Ops, func(p api.OpStats) bool { return p.Op == o.Op }); j >= 0 {
			old = was.Ops[j]
		}
		if old.Count > o.Count {
			return *now
		}
		op := api.OpStats{Op: o.Op, Count: o.Count - old.Count, Errors: make(map[string]uint64), Latency: slices.Clone(o.Latency)}
		for name, n := range o.Errors {
			op.Errors[name] = less(n, old.Errors[name])
		}
		for i := range min(len(op.Latency), len(old.Latency)) {
			op.Latency[i] = less(op.Latency[i], old.Latency[i])
		}
		d.Ops = append(d.Ops, op)
	}
	d.BytesRead, d.BytesWritten = less(now.BytesRead, was.BytesRead), less(now.BytesWritten, was.BytesWritten)
	return d
}

// less is a-b, or 0: counters are not read all at once, so that one can seem to fall.
func less(a, b uint64) uint64 {
	if a < b {
		return 0
	}
	return a - b
}

// percentile is the latency that the share q of requests did not exceed, from their histogram: latencies are taken to be even
// within a bucket. Of those above the last bound no more is known than that.
func percentile(latency []uint64, q float64) time.Duration {
	var sum uint64
	for _, n := range latency {
		sum += n
	}
	rank := q * float64(sum)
	var below, lower uint64
	for i, n := range latency {
		if i >= len(api.LatencyBounds) {
			break
		}
		if n > 0 && float64(below+n) >= rank {
			return time.Duration(float64(lower) + float64(api.LatencyBounds[i]-lower)*(rank-float64(below))/float64(n))
		}
		below += n
		lower = api.LatencyBounds[i]
	}
	if sum == 0 {
		return 0
	}
	return time.Duration(lower)
}

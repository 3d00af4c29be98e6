package main

import (
	"slices"
	"testing"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

// histogram has n requests in each of these buckets.
func histogram(n map[int]uint64) []uint64 {
	h := make([]uint64, len(api.LatencyBounds)+1)
	for i, n := range n {
		h[i] = n
	}
	return h
}

func TestPercentile(t *testing.T) {
	last := len(api.LatencyBounds)
	for _, tt := range []struct {
		name    string
		latency []uint64
		q       float64
		want    time.Duration
	}{
		{"nothing", nil, 0.5, 0},
		{"no requests", histogram(nil), 0.99, 0},
		{"half of the first bucket", histogram(map[int]uint64{0: 10}), 0.5, 500},
		{"half of a bucket", histogram(map[int]uint64{3: 10}), 0.5, 6 * time.Microsecond}, // 4 to 8 µs
		{"end of a bucket", histogram(map[int]uint64{3: 50, 8: 50}), 0.5, 8 * time.Microsecond},
		{"behind empty buckets", histogram(map[int]uint64{3: 98, 10: 2}), 0.99, 756 * time.Microsecond}, // half of 512 µs to 1 ms
		{"above the last bound", histogram(map[int]uint64{last: 5}), 0.5, 8 * time.Second},
		{"mostly above the last bound", histogram(map[int]uint64{0: 1, last: 99}), 0.5, 8 * time.Second},
		{"fewer buckets than here", []uint64{0, 4}, 0.5, 1500},
		{"more buckets than here", append(histogram(map[int]uint64{last: 1}), 7, 7), 0.5, 8 * time.Second},
	} {
		if got := percentile(tt.latency, tt.q); got != tt.want {
			t.Errorf("%s: p%v is %v, want %v", tt.name, tt.q*100, got, tt.want)
		}
	}
}

// shareStats is a share that has done lookups, each in 1 to 2 µs, of which some failed, and reads of 4096 bytes in 4 to 8 µs.
func shareStats(tag string, lookups, failed, reads uint64) api.ShareStats {
	return api.ShareStats{
		Tag: tag,
		Ops: []api.OpStats{
			{Op: "LOOKUP", Count: lookups, Errors: map[string]uint64{"ENOENT": failed}, Latency: histogram(map[int]uint64{1: lookups}), Nanoseconds: lookups * 1500},
			{Op: "READ", Count: reads, Latency: histogram(map[int]uint64{3: reads}), Nanoseconds: reads * 6000},
		},
		BytesRead: reads * 4096,
		Queues:    []api.QueueStats{{Index: 0}, {Index: 1, Size: 1024, Depth: 3}},
		Inodes:    1500,
		Faults:    map[string]uint64{"malformed": 2},
	}
}

func at(second int, shares ...api.ShareStats) *sample {
	return &sample{at: time.Date(2026, 1, 2, 3, 4, second, 0, time.UTC), stats: api.Stats{Shares: shares}}
}

func TestRates(t *testing.T) {
	prev := at(0, shareStats("data", 100, 10, 50), shareStats("gone", 1, 0, 0), shareStats("anew", 1000, 0, 0))
	cur := at(2, shareStats("data", 300, 14, 150), shareStats("new", 20, 0, 0), shareStats("anew", 40, 2, 0))
	all := rates(prev, cur, false)
	if len(all) != 3 {
		t.Fatalf("%d rates, want 3: %+v", len(all), all)
	}
	d := all[0]
	if d.Tag != "data" || d.Ops != 150 || d.Errors != 2 || d.BytesRead != 100*4096/2 || d.BytesWritten != 0 || d.depth != 3 || d.inodes != 1500 || d.faults != 2 {
		t.Errorf("data: %+v", d)
	}
	// 200 lookups and 100 reads: the median is 3/4 through the lookups' bucket, the 99th of 100 is 97 % through the reads'.
	if d.P50 != 1750 || d.P99 != 7880 {
		t.Errorf("data: p50 %v, p99 %v, want 1.75µs and 7.88µs", d.P50, d.P99)
	}
	if n := all[1]; n.Tag != "new" || n.Ops != 10 {
		t.Errorf("a share that was not there before: %+v", n)
	}
	if a := all[2]; a.Tag != "anew" || a.Ops != 20 || a.Errors != 1 {
		t.Errorf("a share that was removed and added in between: %+v", a)
	}

	byOp := rates(prev, cur, true)
	if got := slices.Collect(func(yield func(string) bool) {
		for _, r := range byOp {
			if !yield(r.Tag + " " + r.Op) {
				return
			}
		}
	}); !slices.Equal(got, []string{"data LOOKUP", "data READ", "new LOOKUP", "anew LOOKUP"}) {
		t.Errorf("by opcode: %q", got)
	}
	if l, r := byOp[0], byOp[1]; l.Ops != 100 || l.errors["ENOENT"] != 4 || l.BytesRead != 0 || r.Ops != 50 || r.BytesRead != 100*4096/2 {
		t.Errorf("by opcode: %+v %+v", l, r)
	}

	if total := rates(nil, cur, false)[0]; total.Ops != 450 || total.Errors != 14 {
		t.Errorf("totals: %+v", total)
	}
	if idle := rates(cur, cur, false)[0]; idle.Ops != 0 || idle.P99 != 0 {
		t.Errorf("no time: %+v", idle)
	}
}

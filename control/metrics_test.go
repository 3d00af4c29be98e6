package control

import (
	"errors"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/sluicefs/sluice/control/api"
)

// fullStats have something of everything.
func fullStats() api.Stats {
	latency := make([]uint64, len(api.LatencyBounds)+1)
	latency[0], latency[3], latency[len(latency)-1] = 5, 2, 1
	return api.Stats{
		Shares: []api.ShareStats{{
			Tag:       "data",
			Ops:       []api.OpStats{{Op: "LOOKUP", Count: 8, Errors: map[string]uint64{"ENOENT": 3}, Latency: latency, Nanoseconds: 2_500_000_000}},
			BytesRead: 4096, BytesWritten: 8192,
			Queues:   []api.QueueStats{{Index: 1, Size: 1024, Depth: 2, Kicks: 3, Notifications: 4, Polls: 5, PollWindow: 6000, PollHits: 7, PollMisses: 8, PollNanoseconds: 9_000_000_000}},
			Relieved: 20, SlowOps: 21, Avoided: 22,
			Inodes: 6, FDs: map[string]uint64{"opath": 7}, InodeTiers: map[string]uint64{"handle": 8}, Faults: map[string]uint64{"malformed": 9},
		}},
		SeccompViolations: 10, Goroutines: 11, Threads: 12, HeapBytes: 13, OpenFDs: 14,
		Events: []api.EventStats{{Tag: "data", Path: "/x", Watches: 15, Sent: 16, Rescans: 17, Limited: 18, Overflows: 19}},
		Images: []api.ImageStats{{
			Tag: "data", Path: "/i", Images: 2, Size: 50, Fetched: 51, Requests: 52, Bytes: 53, Hits: 54, HitBytes: 55, Misses: 56, MissBytes: 57, Verified: 58, Corrupt: 59,
			FetchErrors: map[string]uint64{"stalled": 60}, ReadErrors: map[string]uint64{"corrupt": 61}, CacheBytes: 62, CacheBudget: 63,
		}},
	}
}

// scrape returns what /metrics says.
func (r *rig) scrape() map[string]*dto.MetricFamily {
	r.t.Helper()
	resp, text := do(r.t, r.client, "GET", "/metrics", "")
	if resp.StatusCode != 200 {
		r.t.Fatalf("%d %s", resp.StatusCode, text)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		r.t.Fatal(err)
	}
	return families
}

func fullRig(t *testing.T) *rig {
	l := newMemListener()
	r := newRig(t, func(cfg *Config, _ *limits) {
		cfg.Listeners = []Listener{{l, []Allow{{Operations: []string{"getHealth"}, CIDs: []uint32{3}}}}}
	})
	r.daemon.SetStats(fullStats())
	// A request and a refusal, for their counters to be there.
	r.expect("GET", "/v1/info", "", 200, nil)
	if c, err := l.dial(9); err == nil {
		_, _ = c.Read(make([]byte, 1))
		_ = c.Close()
	}
	return r
}

func TestMetrics(t *testing.T) {
	families := fullRig(t).scrape()
	var all []*dto.MetricFamily
	for _, f := range families {
		all = append(all, f)
	}
	problems, err := promlint.NewWithMetricFamilies(all).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	for _, name := range []string{"go_goroutines", "process_open_fds"} {
		if families[name] == nil {
			t.Errorf("there is no %s", name)
		}
	}

	value := func(name string, labels ...string) float64 {
		t.Helper()
		f := families["sluice_"+name]
		if f == nil {
			t.Errorf("there is no sluice_%s", name)
			return -1
		}
		for _, m := range f.Metric {
			var have []string
			for _, l := range m.Label {
				have = append(have, l.GetName()+"="+l.GetValue())
			}
			if slices.Equal(have, labels) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
		t.Errorf("there is no sluice_%s with %q: %v", name, labels, f.Metric)
		return -1
	}
	for _, tt := range []struct {
		want   float64
		name   string
		labels []string
	}{
		{1, "up", nil},
		{1, "build_info", []string{"version=0.0.0-test"}},
		{8, "requests_total", []string{"op=LOOKUP", "share=data"}},
		{3, "request_errors_total", []string{"errno=ENOENT", "op=LOOKUP", "share=data"}},
		{4096, "read_bytes_total", []string{"share=data"}},
		{8192, "written_bytes_total", []string{"share=data"}},
		{9, "faults_total", []string{"fault=malformed", "share=data"}},
		{2, "queue_depth", []string{"queue=1", "share=data"}},
		{1024, "queue_size", []string{"queue=1", "share=data"}},
		{3, "queue_kicks_total", []string{"queue=1", "share=data"}},
		{4, "queue_notifications_total", []string{"queue=1", "share=data"}},
		{5, "queue_polls_total", []string{"queue=1", "share=data"}},
		{6, "inodes", []string{"share=data"}},
		{8, "inodes_by_tier", []string{"share=data", "tier=handle"}},
		{7, "fds", []string{"share=data", "tier=opath"}},
		{10, "seccomp_violations_total", nil},
		{11, "server_goroutines", nil},
		{12, "server_threads", nil},
		{13, "server_heap_bytes", nil},
		{14, "server_open_fds", nil},
		{15, "event_watches", []string{"graft=/x", "share=data"}},
		{16, "events_sent_total", []string{"graft=/x", "share=data"}},
		{17, "events_rescans_total", []string{"graft=/x", "share=data"}},
		{18, "events_limited_total", []string{"graft=/x", "share=data"}},
		{19, "events_overflows_total", []string{"graft=/x", "share=data"}},
		{2, "images", []string{"graft=/i", "share=data"}},
		{50, "image_size_bytes", []string{"graft=/i", "share=data"}},
		{51, "image_fetched_bytes", []string{"graft=/i", "share=data"}},
		{52, "image_requests_total", []string{"graft=/i", "share=data"}},
		{53, "image_received_bytes_total", []string{"graft=/i", "share=data"}},
		{54, "image_cache_hits_total", []string{"graft=/i", "share=data"}},
		{55, "image_cache_hit_bytes_total", []string{"graft=/i", "share=data"}},
		{56, "image_cache_misses_total", []string{"graft=/i", "share=data"}},
		{57, "image_cache_miss_bytes_total", []string{"graft=/i", "share=data"}},
		{58, "image_chunks_verified_total", []string{"graft=/i", "share=data"}},
		{59, "image_chunks_corrupt_total", []string{"graft=/i", "share=data"}},
		{60, "image_fetch_errors_total", []string{"graft=/i", "kind=stalled", "share=data"}},
		{61, "image_read_errors_total", []string{"graft=/i", "kind=corrupt", "share=data"}},
		{62, "image_cache_bytes", []string{"graft=/i", "share=data"}},
		{63, "image_cache_budget_bytes", []string{"graft=/i", "share=data"}},
		{1, "control_requests_total", []string{"operation=getInfo", "status=200"}},
		{1, "control_connections", []string{"listener=unix"}},
		{1, "control_connections_refused_total", []string{"listener=vsock:host(2):7000"}},
	} {
		if got := value(tt.name, tt.labels...); got != tt.want {
			t.Errorf("sluice_%s%q is %v, expected %v", tt.name, tt.labels, got, tt.want)
		}
	}
	h := families["sluice_request_duration_seconds"].Metric[0].GetHistogram()
	if h.GetSampleCount() != 8 || h.GetSampleSum() != 2.5 || len(h.Bucket) != len(api.LatencyBounds)+1 {
		t.Errorf("the histogram is %v", h)
	}
	for _, b := range h.Bucket {
		want := uint64(5)
		switch {
		case b.GetUpperBound() > 8:
			want = 8
		case b.GetUpperBound() >= 8e-6:
			want = 7
		}
		if b.GetCumulativeCount() != want {
			t.Errorf("%d requests took up to %v s, expected %d", b.GetCumulativeCount(), b.GetUpperBound(), want)
		}
	}
}

// TestMetricsAreDocumented holds docs/metrics.md against what is answered.
func TestMetricsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := make(map[string]string)
	for _, m := range regexp.MustCompile("(?m)^\\| `(sluice_\\w+)` \\| (\\w+) \\| ([\\w, ]*) ?\\|").FindAllStringSubmatch(string(text), -1) {
		labels := strings.Split(strings.TrimSpace(m[3]), ", ")
		slices.Sort(labels)
		documented[m[1]] = m[2] + " " + strings.Join(labels, ",")
	}
	answered := make(map[string]string)
	for name, f := range fullRig(t).scrape() {
		if !strings.HasPrefix(name, "sluice_") {
			continue
		}
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, l.GetName())
		}
		slices.Sort(labels)
		answered[name] = strings.ToLower(f.GetType().String()) + " " + strings.Join(labels, ",")
	}
	if len(answered) < 25 || !maps.Equal(documented, answered) {
		for name := range answered {
			if documented[name] != answered[name] {
				t.Errorf("%s is %q, and documented as %q", name, answered[name], documented[name])
			}
			delete(documented, name)
		}
		t.Errorf("documented and not there: %q", slices.Collect(maps.Keys(documented)))
	}
}

func TestMetricsWithoutTheDaemon(t *testing.T) {
	r := fullRig(t)
	r.daemon.Fail("Stats", errors.New("the server is gone"))
	families := r.scrape()
	if families["sluice_up"].Metric[0].GetGauge().GetValue() != 0 || families["sluice_requests_total"] != nil || families["go_goroutines"] == nil {
		t.Errorf("without a daemon there is %v", slices.Sorted(maps.Keys(families)))
	}
}

// TestMetricsWithOddStats: what a daemon of another version, or with a bug, says costs itself and nothing else.
func TestMetricsWithOddStats(t *testing.T) {
	r := fullRig(t)
	stats := fullStats()
	stats.Shares[0].Ops[0].Latency = make([]uint64, 100)
	stats.Shares[0].Faults["\xff"] = 1
	stats.Shares = append(stats.Shares, stats.Shares[0])
	r.daemon.SetStats(stats)
	families := r.scrape()
	if families["sluice_up"] == nil || families["go_goroutines"] == nil {
		t.Errorf("there is %v", slices.Sorted(maps.Keys(families)))
	}
	if !strings.Contains(r.log.String(), "not valid UTF-8") {
		t.Errorf("what is wrong is not in the log: %s", r.log.String())
	}
}

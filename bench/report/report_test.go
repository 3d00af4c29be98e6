package report

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/perf/benchfmt"
)

var update = flag.Bool("update", false, "write the golden files anew")

// sample is a report of six rounds in which every second one is disturbed and all servers take three times as long.
func sample() *Report {
	r := &Report{
		Machine:    []Subject{{"cpu", "Some CPU, 2 of them"}, {"load", "0.1 before, 0.2 after"}},
		Servers:    []Subject{{"sluice", "sluiced"}, {"rust", "virtiofsd 1.14"}, {"c", "virtiofsd 7.2"}},
		Conditions: []Subject{{"p16", "16 requests under way"}, {"s1", "one request under way"}},
		Workloads:  []Subject{{"getattr", "GETATTR; floor: fstat"}, {"read-4k", "READ of 4 KiB"}, {"rename", "RENAME"}},
		Limits: []Limit{
			{"CPU time", "getattr", "p16", CPU, "", "rust", 0.2},
			{"CPU time", "getattr", "p16", CPU, "", "c", 0.5},
			{"CPU time", "getattr", "s1", CPU, "", "rust", 0.45},
			{"CPU time", "read-4k", "p16", CPU, "", "rust", 0.48},
			{"CPU time", "read-4k", "p16", CPU, "", Floor, 1.1},
			{"Latency", "read-4k", "s1", P50, "sluice,--poll-us=0", "rust", 1.05},
		},
		Failures: []string{"c: rename: ENOSYS\nand a second line"},
	}
	for round := range 6 {
		noise := 1 + 2*float64(round%2)
		for _, c := range []string{"p16", "s1"} {
			for _, s := range []struct {
				name string
				cpu  [2]float64 // of getattr, read-4k
			}{{"sluice", [2]float64{500, 1400}}, {"rust", [2]float64{2600, 2900}}, {"c", [2]float64{740, 1800}}, {Floor, [2]float64{170, 1200}}} {
				for i, workload := range []string{"getattr", "read-4k"} {
					cpu := s.cpu[i] * noise * (1 + 0.01*float64((round*7+len(s.name))%5))
					values := map[string]float64{CPU: cpu}
					if s.name != Floor {
						values[P50], values[Rate] = 30*cpu, 1e9/cpu
						values[Syscalls] = 1
					}
					r.Samples = append(r.Samples, Sample{round, workload, c, s.name, 1000, values})
				}
			}
		}
	}
	return r
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test -update writes it anew); got\n%s", path, got)
	}
}

func TestWriteMarkdown(t *testing.T) {
	r := sample()
	var b bytes.Buffer
	if err := r.WriteMarkdown(&b, r.Charts()); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.md", b.Bytes())
	// Nothing measured is no reason to fail.
	b.Reset()
	r.Samples = nil
	if err := errors.Join(r.WriteMarkdown(&b, r.Charts()), new(Report).WriteMarkdown(&b, nil)); err != nil {
		t.Error(err)
	}
	if !strings.Contains(b.String(), "0 met, 0 not met") || !strings.Contains(b.String(), "6 not measured") {
		t.Errorf("the report of nothing says\n%s", b.String())
	}
}

func TestWriteBenchmark(t *testing.T) {
	r := sample()
	var b bytes.Buffer
	if err := r.WriteBenchmark(&b); err != nil {
		t.Fatal(err)
	}
	parsed := benchfmt.NewReader(&b, "sample")
	n := 0
	for parsed.Scan() {
		switch rec := parsed.Result().(type) {
		case *benchfmt.Result:
			want := r.Samples[n]
			n++
			name := fmt.Sprintf("%s/condition=%s/server=%s", camel(want.Workload), want.Condition, want.Server)
			cpu, ok := rec.Value("cpu-sec/op") // the package's own unit
			cpu *= 1e9
			if string(rec.Name) != name || rec.Iters != int(want.Ops) || !ok || math.Abs(cpu-want.Values[CPU]) > 0.01 {
				t.Errorf("line %d is %s with %d iterations and %v, want %s with %+v", n, rec.Name, rec.Iters, rec.Values, name, want)
			}
			if rec.GetConfig("cpu") != "Some CPU, 2 of them" {
				t.Errorf("the CPU is %q", rec.GetConfig("cpu"))
			}
		case *benchfmt.SyntaxError:
			t.Error(rec)
		}
	}
	if err := parsed.Err(); err != nil || n != len(r.Samples) {
		t.Errorf("%d results, want %d: %v", n, len(r.Samples), err)
	}
}

func TestJSON(t *testing.T) {
	want := sample()
	var b bytes.Buffer
	if err := want.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	got, err := ReadJSON(&b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read %+v, %v, want %+v", got, err, want)
	}
	if _, err := ReadJSON(strings.NewReader("{")); err == nil {
		t.Error("half a file passes")
	}
}

// TestRatio is why ratios are of rounds: where rounds are far apart, the medians' ratio is between values of different ones.
func TestRatio(t *testing.T) {
	r := &Report{Servers: []Subject{{"a", ""}, {"b", ""}}}
	add := func(server string, round int, v float64) {
		r.Samples = append(r.Samples, Sample{Round: round, Workload: "w", Condition: "c", Server: server, Values: map[string]float64{CPU: v}})
	}
	for round := range 7 {
		slow := float64(1 + round*round)
		add("a", round, 0.5*slow)
		add("b", round, slow)
	}
	add("a", 100, 1000) // a round without b
	add("b", 101, 0)    // one whose ratio is none
	add("a", 101, 1)
	got, ok := r.ratio(key{"w", "c", "a", CPU}, "b")
	if want := (Summary{0.5, 0.5, 0.5, 7}); !ok || got != want {
		t.Errorf("ratio %+v, %v, want %+v", got, ok, want)
	}
	if _, ok := r.ratio(key{"w", "c", "a", CPU}, "nobody"); ok {
		t.Error("there is a ratio to nobody")
	}
}

func TestSummarize(t *testing.T) {
	for _, tt := range []struct {
		values   []float64
		want     Summary
		interval string
	}{
		{[]float64{3, 1, 2, 6, 5, 4}, Summary{3.5, 1, 6, 6}, "1.00–6.00"},
		{[]float64{9, 1, 2, 3, 4, 5, 6, 7, 8, 0}, Summary{4.5, 1, 8, 10}, "1.00–8.00"},
		{[]float64{2, 1, 3}, Summary{2, math.Inf(-1), math.Inf(1), 3}, ""},
	} {
		got, ok := summarize(tt.values)
		if !ok || got != tt.want || got.interval() != tt.interval {
			t.Errorf("%v: %+v %q, %v, want %+v %q", tt.values, got, got.interval(), ok, tt.want, tt.interval)
		}
	}
	if s, ok := summarize(nil); ok {
		t.Errorf("nothing is summed up to %+v", s)
	}
}

func TestVerdict(t *testing.T) {
	for _, tt := range []struct {
		value Summary
		want  string
	}{
		{Summary{0.4, 0.3, 0.5, 9}, "met"},
		{Summary{0.4, 0.3, 0.6, 9}, "met, within noise"},
		{Summary{0.6, 0.5, 0.7, 9}, "**not met**, within noise"},
		{Summary{0.6, 0.51, 0.7, 9}, "**not met**"},
	} {
		if got := (verdict{Limit{Max: 0.5}, tt.value, true, 0.5}).String(); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.value, got, tt.want)
		}
	}
	if got := (verdict{Limit{Max: 0.5}, Summary{0.7, 0.6, 0.8, 9}, true, 0.6}).String(); got != "**not met**, nor by the floor, 0.600" {
		t.Errorf("below the floor is %q", got)
	}
	if got := (verdict{Limit{Max: 0.5}, Summary{}, false, 0}).String(); got != "not measured" {
		t.Errorf("not measured is %q", got)
	}
}

func TestCharts(t *testing.T) {
	r := sample()
	charts := r.Charts()
	if len(charts) != 4 {
		t.Errorf("%d charts, want CPU and latency of two conditions", len(charts))
	}
	for _, c := range charts {
		var b bytes.Buffer
		if err := c.WriteSVG(&b); err != nil {
			t.Error(err)
		}
		if dir := os.Getenv("SLUICE_CHARTS"); dir != "" {
			if err := os.WriteFile(filepath.Join(dir, c.File), b.Bytes(), 0o644); err != nil {
				t.Error(err)
			}
		}
		text := b.String()
		for _, want := range []string{"getattr", "read-4k", "rust", c.title} {
			if !strings.Contains(text, ">"+want) && !strings.Contains(text, want+"<") {
				t.Errorf("%s does not say %q", c.File, want)
			}
		}
		if strings.Contains(text, "rename") {
			t.Errorf("%s has a workload that was not measured", c.File)
		}
		for dec := xml.NewDecoder(&b); ; {
			if _, err := dec.Token(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", c.File, err)
			}
		}
	}
}

// TestOtherMetrics has a metric that is not known here: it is shown all the same.
func TestOtherMetrics(t *testing.T) {
	r := &Report{
		Servers: []Subject{{"a", ""}, {"b", ""}}, Conditions: []Subject{{"guest", "a guest"}}, Workloads: []Subject{{"untar", "tar xf"}},
		Samples: []Sample{
			{0, "untar", "guest", "a", 1, map[string]float64{"LOOKUPs/file": 1.5, Time: 2e6}},
			{0, "untar", "guest", "b", 1, map[string]float64{"LOOKUPs/file": 3, Time: 4e6}},
		},
	}
	var text, bench bytes.Buffer
	charts := r.Charts()
	if err := errors.Join(r.WriteMarkdown(&text, charts), r.WriteBenchmark(&bench)); err != nil {
		t.Fatal(err)
	}
	if len(charts) != 1 || charts[0].File != "guest-time.svg" {
		t.Errorf("charts %+v, want one of times", charts)
	}
	for _, want := range []string{"### LOOKUPs/file\n\n| | a | b | ÷ b |\n|---|---|---|---|\n| untar | 1.50 | 3.00 | ≈0.500 |", "### Time, ms\n\n| | a | b | ÷ b |\n|---|---|---|---|\n| untar | 2.00 | 4.00 | ≈0.500 |", "](guest-time.svg)"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
	if want := "BenchmarkUntar/condition=guest/server=a 1 2e+06 ns/op 1.5 LOOKUPs/file\n"; !strings.Contains(bench.String(), want) {
		t.Errorf("no %q in\n%s", want, bench.String())
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123: "0.012", 0.1234: "0.123", 1.234: "1.23", 12.34: "12.3", 1234: "1234", math.Inf(1): "∞"} {
		if got := number(v); got != want {
			t.Errorf("%v is %q, want %q", v, got, want)
		}
	}
	for name, want := range map[string]string{"read-4k": "Read4k", "git status": "GitStatus", "create+unlink": "CreateUnlink"} {
		if got := camel(name); got != want {
			t.Errorf("%q is %q, want %q", name, got, want)
		}
	}
}

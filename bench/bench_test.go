package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicefs/sluice/bench/floor"
	"github.com/sluicefs/sluice/bench/frontend"
	"github.com/sluicefs/sluice/bench/report"
	"github.com/sluicefs/sluice/bench/server"
	"github.com/sluicefs/sluice/daemon"
)

// TestMain makes this program sluiced, if it is started as that.
func TestMain(m *testing.M) {
	if os.Getenv("SLUICE_BENCH_SERVE") != "" {
		os.Exit(daemon.Main())
	}
	status, err := withTree(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(status)
}

// tree is what the servers of all tests serve, one after the other: it takes longer to make than they do.
var tree string

func withTree(m *testing.M) (status int, err error) {
	// In memory, where there is such a place: these tests are not about disks.
	if tree, err = os.MkdirTemp("/dev/shm", "sluice-bench-test-"); err != nil {
		if tree, err = os.MkdirTemp("", "sluice-bench-test-"); err != nil {
			return 0, err
		}
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tree)) }()
	return m.Run(), nil
}

// TestRun compares a server with itself, from the command line to the files.
func TestRun(t *testing.T) {
	t.Setenv("SLUICE_BENCH_SERVE", "1")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	one := "sluice@" + program + ",--sandbox=none,--seccomp=none"
	var stdout, stderr bytes.Buffer
	err = run(ctx, []string{
		"-servers", "one=" + one + "  two=" + one, "-workloads", "getattr,create,gitstatus", "-conditions", "s1,s4-flat", "-driver-cpus", "0", "-server-cpus", "0",
		"-rounds", "2", "-slice", "20ms", "-out", out, "-dir", tree, "-syscalls=false",
	}, &stdout, &stderr)
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	if got, want := stdout.String(), filepath.Join(out, "report.md")+"\n"; got != want {
		t.Errorf("it says %q, want %q", got, want)
	}
	f, err := os.Open(filepath.Join(out, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := report.ReadJSON(f)
	if err != nil {
		t.Fatal(err)
	}
	// Two rounds, two conditions; two servers with three workloads and the floor, which has no trace, with two.
	if len(r.Samples) != 2*2*(2*3+2) {
		t.Errorf("%d samples, want 32: %+v", len(r.Samples), r.Samples)
	}
	first := map[string]bool{}
	for _, s := range r.Samples {
		if s.Workload == "create" {
			first[fmt.Sprint(s.Round, s.Condition, s.Server)] = true
		}
		if s.Ops == 0 || s.Values[report.CPU] <= 0 || s.Server != report.Floor && (s.Values[report.P50] <= 0 || s.Values[report.Rate] <= 0 || s.Values[report.Requests] < 1) {
			t.Errorf("a sample without values: %+v", s)
		}
	}
	if len(first) != 12 {
		t.Errorf("create was measured as %v", first)
	}
	for _, name := range []string{"bench.txt", "report.md", "s1-cpu.svg", "s1-latency.svg", "s4-flat-cpu.svg"} {
		if st, err := os.Stat(filepath.Join(out, name)); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	text, err := os.ReadFile(filepath.Join(out, "report.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"`wake-same-cpu`", "## s4-flat: 4 requests under way, the driver sleeping, driver and server on one CPU, buffers in one piece", "| getattr |", "![s1: median latency](s1-latency.svg)"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the report does not say %q:\n%s", want, text)
		}
	}
}

// TestRunSurvivesServers has one server end in the middle: the other's figures and the reason are to be had all the same.
func TestRunSurvivesServers(t *testing.T) {
	t.Setenv("SLUICE_BENCH_SERVE", "1")
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	one := "sluice@" + program + ",--sandbox=none,--seccomp=none"
	var stdout, stderr bytes.Buffer
	// What cannot be written to cannot do the workload.
	err = run(t.Context(), []string{
		"-servers", "one=" + one + " two=" + one + ",--readonly", "-workloads", "create,getattr", "-conditions", "s1", "-driver-cpus", "0", "-server-cpus", "0",
		"-rounds", "2", "-slice", "10ms", "-out", out, "-dir", tree, "-syscalls=false",
	}, &stdout, &stderr)
	if err == nil || !strings.Contains(err.Error(), "1 failures") {
		t.Fatalf("%v, want one failure\n%s", err, stderr.String())
	}
	text, err := os.ReadFile(filepath.Join(out, "report.md"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "* two, create, s1: ") {
		t.Errorf("the report does not say what failed:\n%s", text)
	}
	f, err := os.Open(filepath.Join(out, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := report.ReadJSON(f)
	if err != nil {
		t.Fatal(err)
	}
	// Both getattr and the floor, and one's create.
	if len(r.Samples) != 2*(2+2+1) {
		t.Errorf("%d samples, want 10", len(r.Samples))
	}
}

// TestRunInterrupted is interrupted in the second round: the first is to be had.
func TestRunInterrupted(t *testing.T) {
	t.Setenv("SLUICE_BENCH_SERVE", "1")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	var stdout bytes.Buffer
	err = run(ctx, []string{
		"-servers", "one=sluice@" + program + ",--sandbox=none,--seccomp=none", "-workloads", "getattr", "-conditions", "s1", "-driver-cpus", "0", "-server-cpus", "0",
		"-rounds", "1000000", "-slice", "5ms", "-out", out, "-dir", tree, "-syscalls=false",
	}, &stdout, writerFunc(func(b []byte) (int, error) {
		if strings.Contains(string(b), "round 2 of") {
			cancel()
		}
		return len(b), nil
	}))
	if err == nil || !strings.Contains(err.Error(), "1 failures") {
		t.Errorf("%v, want a failure", err)
	}
	text, err := os.ReadFile(filepath.Join(out, "report.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"* interrupted before all was measured", "\n| getattr |"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the report does not say %q:\n%s", want, text)
		}
	}
}

type writerFunc func(b []byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestPlanRefuses(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"-servers=", "no server"},
		{"-servers=d", "unknown kind"},
		{"-servers=a=sluice@/bin/true a=sluice@/bin/false", "the name is taken"},
		{"-servers=floor=sluice@/bin/true", "the name is taken"},
		{"-servers=sluice@/nowhere", "no such file"},
		{"-servers=sluice@/bin/true -workloads=getattr,x", "there are nop, getattr"},
		{"-servers=sluice@/bin/true -conditions=x1", "expected p (polling)"},
		{"-servers=sluice@/bin/true -rounds=0", "0 rounds"},
		{"-servers=sluice@/bin/true -driver-cpus=1;2", "expected numbers"},
		{"-servers=sluice@/bin/true -server-cpus=-1", "expected numbers"},
		{"-servers=sluice@/bin/true -driver-cpus=0 -server-cpus=0", "condition p16 wants driver and server on different CPUs"},
		{"-servers=sluice@/bin/true getattr", "unexpected argument"},
		{"-nothing", "usage"},
	} {
		args := strings.Split(strings.ReplaceAll(tt.args, " -", "\x00-"), "\x00")
		if i := strings.LastIndex(args[len(args)-1], " getattr"); i > 0 {
			args = append(args[:len(args)-1], args[len(args)-1][:i], "getattr")
		}
		args = append([]string{"-out", t.TempDir()}, args...)
		var stdout, stderr bytes.Buffer
		if err := run(t.Context(), args, &stdout, &stderr); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: %v, want %q", args, err, tt.want)
		}
	}
}

func TestParseCondition(t *testing.T) {
	for name, want := range map[string]condition{
		"p16":         {"p16", 16, 1, frontend.Poll, frontend.Pages, false},
		"s1":          {"s1", 1, 1, frontend.Sleep, frontend.Pages, true},
		"c1":          {"c1", 1, 1, frontend.Sleep, frontend.Pages, false},
		"p64x4-flat":  {"p64x4-flat", 64, 4, frontend.Poll, frontend.Contiguous, false},
		"c4096x255":   {"c4096x255", 4096, 255, frontend.Sleep, frontend.Pages, false},
		"s10x10-flat": {"s10x10-flat", 10, 10, frontend.Sleep, frontend.Contiguous, true},
	} {
		got, err := parseCondition(name)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", name, got, err, want)
		}
	}
	for _, name := range []string{"", "p", "16", "p0", "x1", "p16x", "p16x0", "p16-pages", "P16", "p16 "} {
		if got, err := parseCondition(name); err == nil {
			t.Errorf("%q is taken for %+v", name, got)
		}
	}
}

func TestPlace(t *testing.T) {
	drivers, servers := []int{0, 1}, []int{2, 3}
	for _, tt := range []struct {
		c              condition
		driver, server []int
	}{
		{condition{queues: 1}, []int{0}, []int{2}},
		{condition{queues: 4}, []int{0, 1}, []int{2, 3}},
		{condition{queues: 1, together: true}, []int{2}, []int{2}},
		{condition{queues: 2, together: true}, []int{2, 3}, []int{2, 3}},
	} {
		if d, s := tt.c.place(drivers, servers); !slices.Equal(d, tt.driver) || !slices.Equal(s, tt.server) {
			t.Errorf("%+v: %v and %v, want %v and %v", tt.c, d, s, tt.driver, tt.server)
		}
	}
}

// TestTables compares the tables with the rooms that they name things of.
func TestTables(t *testing.T) {
	for workload, loop := range floors {
		if _, ok := frontend.Find(workload); !ok {
			t.Errorf("there is no workload %s", workload)
		}
		if floor.Calls(loop) == "" {
			t.Errorf("there is no floor %s", loop)
		}
	}
	chosen := map[string]bool{}
	for _, r := range rows {
		if floors[r.workload] == "" {
			t.Errorf("%s has no floor", r.workload)
		}
		chosen[r.workload] = true
	}
	known := map[string]bool{report.Floor: true}
	for text := range strings.FieldsSeq(defaultServers) {
		s, err := server.Parse(text)
		if err != nil {
			t.Error(err)
		}
		known[s.Name] = true
	}
	all := limits(chosen)
	if len(all) != 4*10+5*3 {
		t.Errorf("%d limits, want 55", len(all))
	}
	for _, l := range all {
		if !chosen[l.Workload] || !known[l.Server] || !known[l.Than] || l.Max <= 0 {
			t.Errorf("a limit of nothing: %+v", l)
		}
		if _, err := parseCondition(l.Condition); err != nil {
			t.Error(err)
		}
	}
	if got := limits(map[string]bool{"statfs": true}); !reflect.DeepEqual(got, []report.Limit(nil)) {
		t.Errorf("limits for what was not chosen: %+v", got)
	}
}

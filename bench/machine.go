package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/bench/floor"
	"github.com/sluicefs/sluice/bench/report"
	"github.com/sluicefs/sluice/bench/server"
)

// machine describes what is measured on: benchstat wants such lines.
func machine(dir string) []report.Subject {
	var uts unix.Utsname
	// Without a kernel's name the report is still one.
	_ = unix.Uname(&uts)
	return []report.Subject{
		{Name: "goos", Text: runtime.GOOS},
		{Name: "goarch", Text: runtime.GOARCH},
		{Name: "cpu", Text: fmt.Sprintf("%d × %s", runtime.NumCPU(), cpuModel())},
		{Name: "kernel", Text: unix.ByteSliceToString(uts.Release[:])},
		{Name: "filesystem", Text: fileSystem(dir)},
		{Name: "go", Text: runtime.Version()},
		{Name: "commit", Text: commit()},
		{Name: "date", Text: time.Now().UTC().Format("2006-01-02 15:04 UTC")},
	}
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

// fileSystem names the file system of dir, as /proc/self/mountinfo does.
func fileSystem(dir string) string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "unknown"
	}
	best, kind := -1, "unknown"
	for line := range strings.Lines(string(text)) {
		before, after, ok := strings.Cut(line, " - ")
		fields, more := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(more) == 0 {
			continue
		}
		point := fields[4]
		// Of mounts on one point the last is on top.
		if rel, err := filepath.Rel(point, dir); err == nil && filepath.IsLocal(rel) && len(point) >= best {
			best, kind = len(point), more[0]
		}
	}
	return kind
}

func commit() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out))
}

// load is how busy the machine is: with what is measured alone it comes to about one.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(text))[:3], " ")
}

// basics measures what of the machine all figures rest on.
func basics(files *floor.Files, driver, server int, slice time.Duration) ([]report.Subject, error) {
	same, err := floor.MeasureWake(server, server, slice)
	if err != nil {
		return nil, err
	}
	across, err := floor.MeasureWake(driver, server, slice)
	if err != nil {
		return nil, err
	}
	wake := func(w floor.Wake) string {
		return fmt.Sprintf("%.2f µs there and back, %.2f µs of CPU for who is woken", micros(w.RoundTrip), micros(w.CPU))
	}
	all := []report.Subject{
		{Name: "wake-same-cpu", Text: wake(same)},
		{Name: "wake-across-cpus", Text: wake(across)},
	}
	for _, c := range []struct {
		loop string
		size float64
	}{{"memcpy-128k", 128 << 10}, {"memcpy-1m", 1 << 20}} {
		r, err := files.Run(c.loop, server, slice)
		if err != nil {
			return nil, err
		}
		all = append(all, report.Subject{Name: c.loop, Text: fmt.Sprintf("%.1f GB/s from the page cache to memory", c.size*float64(r.Ops)/float64(r.CPU.Nanoseconds()))})
	}
	return all, nil
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// describe says what a server is: its version and its options.
func describe(ctx context.Context, s server.Spec) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, s.Program, "--version").CombinedOutput()
	version, _, _ := strings.Cut(string(out), "\n")
	if err != nil || version == "" {
		version = filepath.Base(s.Program) + " of an unknown version"
	}
	if len(s.Args) > 0 {
		version += ", with " + strings.Join(s.Args, " ")
	}
	return version
}

package main

import (
	"fmt"
	"time"

	"github.com/sluicefs/sluice/bench/floor"
	"github.com/sluicefs/sluice/bench/report"
)

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

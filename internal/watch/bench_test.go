package watch

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"
)

// BenchmarkLatency is the time from the close of a file to its event.
func BenchmarkLatency(b *testing.B) {
	dir := b.TempDir()
	w, err := New(Config{Dir: dir})
	must(b, err)
	events := make(chan Event)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- w.Run(ctx, func(ev Event) { events <- ev }) }()
	write(b, dir+"/f", "")
	<-events
	var took []time.Duration
	for b.Loop() {
		f, err := os.OpenFile(dir+"/f", os.O_WRONLY, 0)
		must(b, err)
		_, err = f.WriteString("content")
		must(b, err, f.Close())
		begun := time.Now()
		<-events
		took = append(took, time.Since(begun))
		// As a host that changes something now and then does.
		time.Sleep(time.Millisecond)
	}
	cancel()
	must(b, <-done)
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "µs/median")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "µs/p99")
}

// BenchmarkCheckout makes 10,000 files in 100 directories, as git checkout does.
func BenchmarkCheckout(b *testing.B) {
	const dirs, files = 100, 100
	for b.Loop() {
		b.StopTimer()
		dir := b.TempDir()
		w, err := New(Config{Dir: dir})
		must(b, err)
		ctx, cancel := context.WithCancel(context.Background())
		done, last := make(chan error), make(chan struct{})
		go func() {
			done <- w.Run(ctx, func(ev Event) {
				if ev.Path == "/last" || ev.Kind == Rescan {
					if _, err := os.Stat(dir + "/last"); err == nil {
						close(last)
						cancel()
					}
				}
			})
		}()
		b.StartTimer()
		begun := time.Now()
		for d := range dirs {
			must(b, os.Mkdir(fmt.Sprintf("%s/%d", dir, d), 0o755))
			for f := range files {
				write(b, fmt.Sprintf("%s/%d/%d", dir, d, f), "content of a file")
			}
		}
		write(b, dir+"/last", "")
		wrote := time.Since(begun)
		<-last
		b.StopTimer()
		must(b, <-done)
		s := w.Stats()
		b.ReportMetric(float64(s.Sent), "events")
		b.ReportMetric(float64(s.Rescans), "rescans")
		b.ReportMetric(float64((time.Since(begun) - wrote).Milliseconds()), "ms-after")
		b.StartTimer()
	}
}

// BenchmarkDirs watches 10,000 directories.
func BenchmarkDirs(b *testing.B) {
	dir := b.TempDir()
	for d := range 10_000 {
		must(b, os.MkdirAll(fmt.Sprintf("%s/%d/%d", dir, d/100, d), 0o755))
	}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	for b.Loop() {
		before := heap()
		w, err := New(Config{Dir: dir})
		must(b, err)
		b.ReportMetric(float64(heap()-before)/float64(w.Stats().Watches), "B/watch")
		must(b, w.Close())
	}
}

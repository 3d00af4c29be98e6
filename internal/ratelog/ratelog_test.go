package ratelog

import (
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// clocked returns a Logger of a record a second, three at once, its output and a function that lets time pass.
func clocked() (*Logger, *strings.Builder, func(time.Duration)) {
	var out strings.Builder
	now := time.Unix(1000, 0)
	l := New(slog.New(slog.NewTextHandler(&out, nil)), time.Second, 3)
	l.now = func() time.Time { return now }
	return l, &out, func(d time.Duration) { now = now.Add(d) }
}

func TestBurstThenInterval(t *testing.T) {
	l, out, pass := clocked()
	expect := func(when string, logged int) {
		t.Helper()
		out.Reset()
		for range 10 {
			l.Warn("too long")
		}
		if n := strings.Count(out.String(), "too long"); n != logged {
			t.Errorf("%s: %d records, expected %d", when, n, logged)
		}
	}
	expect("at first", 3)
	pass(999 * time.Millisecond)
	expect("before the interval", 0)
	pass(time.Millisecond)
	expect("after the interval", 1)
	pass(2500 * time.Millisecond)
	expect("after two and a half", 2)
	pass(500 * time.Millisecond)
	expect("after the other half", 1)
	pass(24 * time.Hour)
	expect("after a day", 3)
}

func TestSuppressedAreCounted(t *testing.T) {
	l, out, pass := clocked()
	for range 10 {
		l.Warn("too long", "n", 1)
	}
	if strings.Contains(out.String(), "suppressed") {
		t.Errorf("nothing was suppressed yet:\n%s", out)
	}
	out.Reset()
	pass(time.Second)
	l.Error("too short", "n", 2)
	if got := out.String(); !strings.Contains(got, "level=ERROR") || !strings.Contains(got, "n=2 suppressed=7\n") {
		t.Errorf("logged %q, expected 7 suppressed records", got)
	}
	out.Reset()
	pass(time.Second)
	l.Warn("too long")
	if strings.Contains(out.String(), "suppressed") {
		t.Errorf("counted twice:\n%s", out)
	}
}

func TestNilLogAndManyGoroutines(t *testing.T) {
	l := New(nil, time.Second, 1)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				l.Warn("nowhere", "n", 1)
			}
		})
	}
	wg.Wait()
	if l.suppressed < 390 {
		t.Errorf("%d suppressed, expected nearly 400", l.suppressed)
	}
}

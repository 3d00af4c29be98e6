package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/sluicefs/sluice/control/api"
)

// A follower notes what it is sent.
type follower struct {
	sent chan api.Event
	stop context.CancelFunc
	done chan error
}

func follow(t *testing.T, l *eventLog, since uint64) *follower {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	f := &follower{sent: make(chan api.Event), stop: cancel, done: make(chan error, 1)}
	go func() {
		f.done <- l.follow(ctx, since, func(e api.Event) error {
			select {
			case f.sent <- e:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	t.Cleanup(cancel)
	return f
}

// want waits for an event of this kind and ID, and returns it.
func (f *follower) want(t *testing.T, kind string, id uint64) api.Event {
	t.Helper()
	e := <-f.sent
	if e.Kind != kind || e.ID != id {
		t.Fatalf("%+v, expected %s with ID %d", e, kind, id)
	}
	return e
}

// newTestLog returns an event log, what it has announced, and a function that adds events and waits until they are published.
func newTestLog(t *testing.T) (l *eventLog, announced func() []uint64, add func(n int)) {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	var mu sync.Mutex
	var ids []uint64
	l = newEventLog(func(events []api.Event) error {
		mu.Lock()
		defer mu.Unlock()
		for _, e := range events {
			ids = append(ids, e.ID)
		}
		return nil
	}, slog.New(slog.NewTextHandler(t.Output(), nil)))
	l.last = 0
	t.Cleanup(func() {
		l.close()
		l.close() // does nothing
		if err := goleak.Find(leaks); err != nil {
			t.Error(err)
		}
	})
	var added uint64
	return l, func() []uint64 {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(ids)
		}, func(n int) {
			for range n {
				added++
				l.add(t.Context(), api.Event{Kind: api.EventModify, Path: fmt.Sprint(added)})
			}
			for {
				l.mu.Lock()
				last, changed := l.last, l.changed
				l.mu.Unlock()
				if last == added {
					return
				}
				<-changed
			}
		}
}

func TestEventOrder(t *testing.T) {
	l, announced, add := newTestLog(t)
	f := follow(t, l, 0)
	if e := f.want(t, api.EventHello, 0); e.Token != "" {
		t.Errorf("token %q before anything is watched", e.Token)
	}
	l.enable("secret")
	l.enable("another") // the first holds
	if e := f.want(t, api.EventHello, 0); e.Token != "secret" {
		t.Errorf("token %q in the second hello", e.Token)
	}
	const n = 3 * pendingEvents
	var adding sync.WaitGroup
	adding.Go(func() { add(n) })
	for id := range uint64(n) {
		if e := f.want(t, api.EventModify, id+1); e.Path != fmt.Sprint(id+1) {
			t.Fatalf("%+v is out of order", e)
		}
		if ids := announced(); !slices.Contains(ids, id+1) {
			t.Fatalf("event %d was sent before it was announced", id+1)
		}
	}
	adding.Wait()
	if !slices.IsSorted(announced()) || len(announced()) != n {
		t.Errorf("announced: %d", announced())
	}
	// Who comes later, from an event on, gets what comes after it, and with 0 nothing that was before.
	since := follow(t, l, n-2)
	since.want(t, api.EventHello, n-2)
	since.want(t, api.EventModify, n-1)
	since.want(t, api.EventModify, n)
	now := follow(t, l, 0)
	now.want(t, api.EventHello, n)
	add(1)
	now.want(t, api.EventModify, n+1)
	since.want(t, api.EventModify, n+1)
	f.want(t, api.EventModify, n+1)

	f.stop()
	if err := <-f.done; !errors.Is(err, context.Canceled) {
		t.Errorf("a follower that left: %v", err)
	}
	l.close()
	for _, f := range []*follower{since, now} {
		if err := <-f.done; err != nil {
			t.Errorf("the share's end: %v", err)
		}
	}
	l.add(t.Context(), api.Event{}) // does not wait for ever
}

// TestEventsGone asks for events that are not kept, and for those of another daemon.
func TestEventsGone(t *testing.T) {
	l, _, add := newTestLog(t)
	l.enable("secret")
	const n = 2*keptEvents + 1
	add(n)
	kept := uint64(len(l.events))
	if kept < keptEvents || kept > 2*keptEvents {
		t.Fatalf("%d events are kept, expected %d to %d", kept, keptEvents, 2*keptEvents)
	}
	for _, tt := range []struct {
		name   string
		since  uint64
		rescan bool
	}{
		{"the first kept", n - kept, false},
		{"one before", n - kept - 1, true},
		{"the last", n, false},
		{"one that never was", n + 1, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			token, events, _ := l.after(tt.since)
			if token != "secret" {
				t.Errorf("token %q", token)
			}
			rescan := len(events) == 1 && events[0].Kind == api.EventRescan && events[0].Path == "/" && events[0].Dir && events[0].ID == n
			if rescan != tt.rescan || !rescan && uint64(len(events)) != n-tt.since {
				t.Errorf("%d events, rescan %t", len(events), rescan)
			}
		})
	}
	l.setWatched("/a", true)
	l.setWatched("/b", true)
	l.setWatched("/c", true)
	l.setWatched("/b", false)
	f := follow(t, l, 1)
	f.want(t, api.EventHello, 1)
	// Who is cut off between the two has to see both again.
	if e := f.want(t, api.EventRescan, 1); e.Path != "/a" {
		t.Errorf("rescan of %s", e.Path)
	}
	if e := f.want(t, api.EventRescan, n); e.Path != "/c" {
		t.Errorf("rescan of %s", e.Path)
	}
	add(1)
	f.want(t, api.EventModify, n+1) // and goes on from there
}

// TestEventsSlow has a follower that does not take what it is sent: others do, and so do watches.
func TestEventsSlow(t *testing.T) {
	l, _, add := newTestLog(t)
	l.enable("secret")
	slow, quick := follow(t, l, 0), follow(t, l, 0)
	slow.want(t, api.EventHello, 0)
	quick.want(t, api.EventHello, 0)
	add(1)
	const n = 3 * keptEvents
	for id := range uint64(n) {
		quick.want(t, api.EventModify, id+1)
		add(1)
	}
	// It gets what there was when it last asked; what came after that is no longer kept.
	e := <-slow.sent
	for id := uint64(1); e.Kind == api.EventModify && e.ID == id && id < n; id++ {
		e = <-slow.sent
	}
	if e.Kind != api.EventRescan {
		t.Errorf("%+v, expected to be told that events are lost", e)
	}
}

// TestAnnounceFails publishes what could not be announced all the same.
func TestAnnounceFails(t *testing.T) {
	l := newEventLog(func([]api.Event) error { return errors.New("made to fail") }, slog.New(slog.DiscardHandler))
	defer l.close()
	l.last = 0
	l.enable("secret")
	f := follow(t, l, 0)
	f.want(t, api.EventHello, 0)
	l.add(t.Context(), api.Event{Kind: api.EventCreate})
	f.want(t, api.EventCreate, 1)
	f.stop()
	<-f.done
}

// TestEventsKept keeps no more than the server can replay, however long the paths are, and numbers events as no daemon before did.
func TestEventsKept(t *testing.T) {
	before := newEventLog(nil, slog.New(slog.DiscardHandler))
	defer before.close()
	l := newEventLog(func([]api.Event) error { return nil }, slog.New(slog.DiscardHandler))
	defer l.close()
	if before.last == 0 || l.last < before.last {
		t.Errorf("IDs begin after %d, and later after %d", before.last, l.last)
	}
	l.enable("secret")
	f := follow(t, l, 0)
	f.want(t, api.EventHello, l.last)
	path := strings.Repeat("x", 4096)
	for range 2 * keptBytes / len(path) {
		l.add(t.Context(), api.Event{Kind: api.EventModify, Path: path})
		if e := <-f.sent; e.Kind != api.EventModify {
			t.Fatalf("%+v", e)
		}
		l.mu.Lock()
		bytes := 0
		for _, e := range l.events {
			bytes += len(e.Path)
		}
		if bytes > 2*keptBytes || bytes != l.bytes {
			t.Fatalf("%d bytes of paths are kept, and %d counted", bytes, l.bytes)
		}
		l.mu.Unlock()
	}
	if len(l.events) == 2*keptBytes/len(path) {
		t.Error("all events are kept")
	}
	f.stop()
	<-f.done
}

package store

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ends is a line and who gives over it.
func ends(t *testing.T, want func()) (*SocketLine, *Giver) {
	t.Helper()
	server, keeper := pair(t)
	l, err := NewSocketLine(server)
	if err != nil {
		t.Fatal(err)
	}
	g, err := NewGiver(keeper, want)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = l.Close(), g.Close() })
	return l, g
}

// given gives a file that says which it is.
func give(t *testing.T, g *Giver, name string) {
	t.Helper()
	f, err := sealed("session", []byte(name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := g.Give(f); err != nil {
		t.Errorf("give %s: %v", name, err)
	}
}

func next(t *testing.T, l *SocketLine) string {
	t.Helper()
	f, err := l.Next(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return string(readAll(t, f))
}

func TestLine(t *testing.T) {
	checkFDs(t)
	var g *Giver
	wanted := make(chan struct{}, 10)
	l, g := ends(t, func() {
		wanted <- struct{}{}
		give(t, g, "wanted")
	})
	give(t, g, "first")
	if got := next(t, l); got != "first" {
		t.Errorf("the first is %q", got)
	}
	give(t, g, "second")
	give(t, g, "third")
	if got := next(t, l); got != "third" {
		t.Errorf("of two it is %q", got)
	}
	if len(wanted) > 0 {
		t.Error("one is wanted where there was one")
	}
	if got := next(t, l); got != "wanted" || len(wanted) != 1 {
		t.Errorf("when it had all it is %q, and %d were wanted", got, len(wanted))
	}
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(10*time.Millisecond, cancel)
	if f, err := l.Next(ctx); f != nil && err == nil {
		_ = f.Close() // it was wanted
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	give(t, g, "after")
	if got := next(t, l); got != "after" && got != "wanted" {
		t.Errorf("after that it is %q", got)
	}
}

func TestLineEndsOnEitherSide(t *testing.T) {
	checkFDs(t)
	l, g := ends(t, func() {})
	give(t, g, "left")
	_ = g.Close()
	if got := next(t, l); got != "left" {
		t.Errorf("what was given before the end is %q", got)
	}
	if _, err := l.Next(context.Background()); err == nil {
		t.Error("there is one more after the end")
	}
	l, g = ends(t, func() {})
	closed := make(chan struct{})
	time.AfterFunc(10*time.Millisecond, func() {
		_ = l.Close()
		close(closed)
	})
	if _, err := l.Next(context.Background()); err == nil {
		t.Error("there is one after Close")
	}
	<-closed // Next returns as soon as it has begun
	f := os.NewFile(uintptr(must(unix.Dup(0))), "")
	defer f.Close()
	if err := g.Give(f); err == nil {
		t.Error("one is given to nobody")
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Who does not listen costs who gives an error, and no time.
func TestGiveToWhoDoesNotListen(t *testing.T) {
	checkFDs(t)
	_, g := ends(t, func() {})
	f, err := sealed("session", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 10000 {
		if err = g.Give(f); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.EAGAIN) {
		t.Errorf("10000 are given: %v", err)
	}
}

// What a server that has been taken over says makes no work.
func TestHostileWishes(t *testing.T) {
	checkFDs(t)
	calls := make(chan struct{}, 1000)
	server, keeper := pair(t)
	g, err := NewGiver(keeper, func() { calls <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	c, err := newConn(server)
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		for _, b := range [][]byte{{1}, {0, 0, 0, 0}, {1, 0, 0, 0}, make([]byte, 100)} {
			_ = c.sendNow(b, int(zero.Fd()))
		}
	}
	<-calls
	_ = g.Close()
	c.close()
	if n := len(calls); n > 2 {
		t.Errorf("%d wishes at once are heard", n+1)
	}
}

// A wish from before the last session was given is answered by that one.
func TestStaleWish(t *testing.T) {
	checkFDs(t)
	server, keeper := pair(t)
	calls := 0
	g, err := NewGiver(keeper, func() { calls++ })
	if err != nil {
		t.Fatal(err)
	}
	give(t, g, "one")
	c, err := newConn(server)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.sendNow([]byte{0, 0, 0, 0}, -1); err != nil {
		t.Fatal(err)
	}
	c.close()
	<-g.done // it has heard all there was
	if calls != 0 {
		t.Error("another one is given")
	}
	_ = g.Close()
}

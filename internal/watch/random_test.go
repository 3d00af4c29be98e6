package watch

import (
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lockedBuilder is a log that is read while it is written.
type lockedBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuilder) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuilder) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuilder) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// churn does random things in dir; the names are few, so that they meet.
func churn(rnd *rand.Rand, dir, outside string, ops int) {
	path := func() string {
		p := dir
		for range 1 + rnd.IntN(3) {
			p += "/" + string(rune('a'+rnd.IntN(4)))
		}
		return p
	}
	for i := range ops {
		// Most of these fail, for their path is not there or is something else.
		switch a, b := path(), path(); rnd.IntN(12) {
		case 0, 1, 2:
			_ = os.WriteFile(a, fmt.Append(nil, i), 0o644)
		case 3, 4:
			_ = os.Mkdir(a, 0o755)
		case 5:
			_ = os.Rename(a, b)
		case 6:
			_ = os.Rename(a, b)
		case 7:
			_ = os.RemoveAll(a)
		case 8:
			_ = os.Symlink(fmt.Sprint(i), a)
		case 9:
			_ = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
		case 10:
			_ = os.Rename(a, outside+"/x")
		case 11:
			_ = os.Rename(outside+"/x", a)
		}
	}
}

// TestRandom lets a mirror follow random changes, and compares.
func TestRandom(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			base := t.TempDir()
			dir, outside := base+"/tree", base+"/outside"
			must(t, os.Mkdir(dir, 0o755), os.Mkdir(outside, 0o755))
			rnd := rand.New(rand.NewPCG(seed, 1))
			churn(rnd, dir, outside, 100)
			m := &mirror{dir: dir, tree: make(map[string]string)}
			m.look("/")
			slow := seed%4 == 3
			r := follow(t, Config{Dir: dir}, newInotify, func(ev Event) {
				if slow && rnd.IntN(20) == 0 {
					time.Sleep(time.Millisecond)
				}
				m.apply(ev)
			})
			for round := range 5 {
				var wg sync.WaitGroup
				for thread := range uint64(1 + seed%2) {
					wg.Go(func() {
						rnd := rand.New(rand.NewPCG(seed, 100*thread+uint64(round)))
						for range 20 {
							churn(rnd, dir, outside, 20)
							if seed%3 == 2 {
								// A Rescan may come at any time; the reader then knows more than what is told next is about.
								r.w.queue.rescan([]string{"/", "/a", "/b"}[rnd.IntN(3)])
							}
						}
					})
				}
				wg.Wait()
				truth := &mirror{dir: dir, tree: make(map[string]string)}
				truth.look("/")
				var got map[string]string
				for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
					m.mu.Lock()
					got = maps.Clone(m.tree)
					m.mu.Unlock()
					if maps.Equal(got, truth.tree) {
						break
					}
				}
				if !maps.Equal(got, truth.tree) {
					t.Fatalf("round %d, %+v:\n%s\nevents %q", round, r.w.Stats(), difference(got, truth.tree), texts(r.evs)[max(0, len(r.evs)-60):])
				}
			}
		})
	}
}

// TestRescanBeforeRename has a reader look in vain for what a Rescan names, for it has been renamed, of which it hears some time later.
func TestRescanBeforeRename(t *testing.T) {
	q, now := newQueue(), time.Now()
	take := func(want Event) {
		t.Helper()
		if ev, _, ok := q.next(now); !ok || ev != want {
			t.Errorf("the queue has %+v, %v, expected %+v", ev, ok, want)
		}
	}
	for i := range 20 {
		q.rescan(fmt.Sprint("/d/", i))
		take(Event{Kind: Rescan, Path: fmt.Sprint("/d/", i), Dir: true})
	}
	now = now.Add(5 * time.Second)
	q.rename("/d/0", "/e", true, now)
	take(Event{Kind: Rename, Path: "/d/0", To: "/e", Dir: true})
	take(Event{Kind: Rescan, Path: "/e", Dir: true})
	now = now.Add(time.Hour)
	q.rename("/d/1", "/f", true, now)
	take(Event{Kind: Rename, Path: "/d/1", To: "/f", Dir: true})
	if ev, _, ok := q.next(now); ok {
		t.Errorf("the queue has %+v for a Rescan of an hour ago", ev)
	}
}

// TestReplacedDirectory has a directory replaced by another one with the same in it, while what was told of the first still waits.
func TestReplacedDirectory(t *testing.T) {
	q := newQueue()
	take := func(path string) {
		t.Helper()
		want := Event{Kind: Create, Path: path, Dir: true}
		if ev, _, ok := q.next(time.Now()); !ok || ev != want {
			t.Errorf("the queue has %+v, %v, expected %+v", ev, ok, want)
		}
	}
	q.create("/d", true, true)
	q.create("/d/x", true, true)
	take("/d")
	q.create("/d", true, false)
	q.create("/d/x", true, true)
	take("/d/x")
	take("/d")
	take("/d/x")
}

// TestRescanAhead has a reader look at what a Rescan names, and find there what is told of only later.
func TestRescanAhead(t *testing.T) {
	del := Event{Kind: Delete, Path: "/d/x"}
	createDir, rescan := Event{Kind: Create, Path: "/d/x", Dir: true}, Event{Kind: Rescan, Path: "/d", Dir: true}
	for _, tt := range []struct {
		name          string
		before, after func(q *queue)
		want          []Event
	}{
		{"unknown", nil, func(q *queue) { q.remove("/d/x", false, true) }, nil},
		{"unknown and seen", func(q *queue) { q.rescan("/d") }, func(q *queue) { q.remove("/d/x", false, true) }, []Event{del}},
		{"seen elsewhere", func(q *queue) { q.rescan("/e") }, func(q *queue) { q.remove("/d/x", false, true) }, nil},
		{"seen, then created and deleted", func(q *queue) { q.rescan("/d") }, func(q *queue) {
			q.create("/d/x", false, true)
			q.remove("/d/x", false, false)
		}, []Event{del}},
		{"another of the name seen", func(q *queue) { q.rescan("/") }, func(q *queue) { q.rename("/d", "/e", true, time.Now()) }, []Event{
			{Kind: Rename, Path: "/d", To: "/e", Dir: true},
			{Kind: Rescan, Path: "/e", Dir: true},
		}},
		{"created while its Rescan waits", nil, func(q *queue) {
			q.rescan("/d/x")
			q.create("/d/x", true, true)
			q.create("/d/x/y", true, true)
		}, []Event{{Kind: Rescan, Path: "/d/x", Dir: true}, createDir, {Kind: Create, Path: "/d/x/y", Dir: true}}},
		{"replaced while its Create waits", nil, func(q *queue) {
			q.create("/d/x", true, true)
			q.create("/d/x/y", true, true)
			q.create("/d/x", true, false)
		}, []Event{createDir, {Kind: Create, Path: "/d/x/y", Dir: true}, createDir}},
		{"many", func(q *queue) {
			q.rescan("/d")
			for i := range 2 * maxRecent {
				q.next(time.Now())
				q.rescan(fmt.Sprint("/e/", i))
			}
		}, func(q *queue) { q.remove("/d/x", false, true) }, []Event{del}},
		{"waits and leads to more", nil, func(q *queue) {
			q.rescan("/d")
			q.rename("/f", "/g", false, time.Now())
			q.remove("/d/x", false, true)
		}, []Event{rescan, {Kind: Rename, Path: "/f", To: "/g"}, del}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := newQueue()
			if tt.before != nil {
				tt.before(q)
				q.next(time.Now())
			}
			tt.after(q)
			var got []Event
			for ev, _, ok := q.next(time.Now()); ok; ev, _, ok = q.next(time.Now()) {
				got = append(got, ev)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("told %q, expected %q", texts(got), texts(tt.want))
			}
		})
	}
}

func difference(got, want map[string]string) string {
	var s strings.Builder
	for p, c := range want {
		if got[p] != c {
			fmt.Fprintf(&s, "%s is %q, the mirror has %q\n", p, c, got[p])
		}
	}
	for p, c := range got {
		if _, ok := want[p]; !ok {
			fmt.Fprintf(&s, "%s is not there, the mirror has %q\n", p, c)
		}
	}
	return s.String()
}

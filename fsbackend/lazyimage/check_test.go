package lazyimage

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicefs/sluice/fsbackend/lazyimage/store"
)

// D9: check waits for what is fetched at once, for a time, and says whether the rest could be had.
func TestCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := layers(t, []file{{name: "f", data: "0123456789"}}, []file{{name: "g", data: "data"}})
		s.status = store.Status{Fetched: 4}
		f, err := New(t.Context(), Config{Store: s, Merge: true})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		const limit = 10 * time.Second
		check := func(prefetched bool, says string, took time.Duration) {
			t.Helper()
			start := time.Now()
			p, err := f.Check(limit)
			if since := time.Since(start); since != took {
				t.Errorf("it took %v, expected %v", since, took)
			}
			if says != "" {
				if err == nil || !strings.Contains(err.Error(), says) {
					t.Errorf("it says %v, expected %q", err, says)
				}
				return
			}
			if err != nil || p.Prefetched != prefetched || len(p.Layers) != 2 || !strings.Contains(string(p.Layers[1]), `"fetchedSize":4,`) {
				t.Errorf("it says %+v, %v", p, err)
			}
		}
		check(true, "", 0)
		s.prefetched = make(chan struct{})
		check(false, "", limit) // that it takes long is no error
		go func() {
			time.Sleep(3 * time.Second)
			close(s.prefetched)
		}()
		check(true, "", 3*time.Second)
		s.unreachable = errors.New("registry.example answers with status 500")
		check(false, "status 500", 0)
		s.unreachable, s.failed = nil, errBroken
		check(false, "broken", 0)
	})
}

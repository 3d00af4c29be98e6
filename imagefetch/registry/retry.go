package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// ErrContent is for whoever is handed content by Blob.Fetch to say that it is wrong. Another host may have the right one.
var ErrContent = errors.New("the content is not what it should be")

// errStalled is the cause of the end of an attempt in which nothing has come for too long.
var errStalled = errors.New("nothing came for too long")

// kind is what can be done about a failure.
type kind int

const (
	final     kind = iota // nothing
	elsewhere             // ask another host, and this one no more
	temporary             // ask another host, and this one again
	instead               // ask this one at once, in another way that is known now
)

// failure is an attempt that has come to nothing.
type failure struct {
	kind   kind
	reason reason
	err    error
	after  time.Duration // that the host wants to be left alone
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// netFailure makes err, of a request to host, one that can be shown: url.Error has the address in it, with a query that may be
// a signature.
func netFailure(ctx context.Context, host string, err error) error {
	var f *failure
	if errors.As(err, &f) {
		return err
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	var u *url.Error
	for errors.As(err, &u) {
		err = u.Err
	}
	return &failure{kind: temporary, reason: reasonNetwork, err: fmt.Errorf("ask %s: %w", host, err)}
}

// statusFailure is of an answer that is none of those expected.
func statusFailure(host string, resp *http.Response) error {
	f := &failure{kind: elsewhere, err: fmt.Errorf("%s answers with status %d", host, resp.StatusCode)}
	switch {
	case resp.StatusCode >= 500:
		f.reason = reasonStatus5xx
	case resp.StatusCode >= 400:
		f.reason = reasonStatus4xx
	}
	switch {
	case resp.StatusCode == http.StatusTooManyRequests, resp.StatusCode == http.StatusServiceUnavailable:
		f.kind, f.after = temporary, retryAfter(resp.Header.Get("Retry-After"), time.Now())
	case resp.StatusCode >= 500, resp.StatusCode == http.StatusRequestTimeout:
		f.kind = temporary
	}
	return f
}

// retryAfter reads the header of that name (RFC 9110, 10.2.3).
func retryAfter(s string, now time.Time) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil {
		return max(0, t.Sub(now))
	}
	return 0
}

// penalty is how long a host that failed is asked after the others.
const penalty = 30 * time.Second

// try has f ask the hosts, each in turn, until one has answered, or none will, or there is no more time.
func (c *Client) try(ctx context.Context, hosts []*host, f func(ctx context.Context, h *host, w *watchdog) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(c.cfg.Timeout), fmt.Errorf("gave up after %v", time.Duration(c.cfg.Timeout)))
	defer cancel()
	var last error
	given := map[*host]bool{}
	for n := 0; ; n++ {
		again := false
		var after time.Duration
		for _, h := range inOrder(hosts) {
			if given[h] {
				continue
			}
			err := c.once(ctx, h, f)
			if err == nil {
				return nil
			}
			last = err
			c.failures.count(ctx, err)
			if ctx.Err() != nil {
				return last
			}
			fail := &failure{kind: final}
			errors.As(err, &fail)
			switch fail.kind {
			case temporary:
				again, after = true, max(after, fail.after)
				h.fail()
			case elsewhere:
				given[h] = true
			default:
				return err
			}
			c.cfg.Log.Debug("asking failed", "host", h.name, "err", err)
		}
		if !again || n+1 >= c.cfg.Tries {
			return last
		}
		pause := jitter(min(time.Duration(c.cfg.Backoff)<<min(n, 20), time.Duration(c.cfg.MaxBackoff)))
		if after > 0 {
			pause = after + jitter(time.Duration(c.cfg.Backoff))
		}
		if end, _ := ctx.Deadline(); time.Now().Add(pause).After(end) {
			return last
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return last
		}
	}
}

// once has f ask h, and again for as long as it finds out how to do it better.
func (c *Client) once(ctx context.Context, h *host, f func(ctx context.Context, h *host, w *watchdog) error) error {
	for {
		w, attempt := newWatchdog(ctx, time.Duration(c.cfg.Stall))
		err := f(attempt, h, w)
		w.stop()
		var fail *failure
		if errors.As(err, &fail) && fail.kind == instead && ctx.Err() == nil {
			continue
		}
		return err
	}
}

func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d+1)
}

// inOrder are the hosts with those that have failed lately last.
func inOrder(hosts []*host) []*host {
	if len(hosts) == 1 {
		return hosts
	}
	now := time.Now()
	var good, bad []*host
	for _, h := range hosts {
		h.mu.Lock()
		failed := now.Before(h.failed)
		h.mu.Unlock()
		if failed {
			bad = append(bad, h)
		} else {
			good = append(good, h)
		}
	}
	return slices.Concat(good, bad)
}

func (h *host) fail() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.failed = time.Now().Add(penalty)
}

// watchdog ends an attempt in which nothing comes. It runs while the host is waited for, and not while what came is worked on.
type watchdog struct {
	timer *time.Timer
	limit time.Duration
	end   context.CancelCauseFunc
}

// newWatchdog makes one that runs already.
func newWatchdog(ctx context.Context, limit time.Duration) (*watchdog, context.Context) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watchdog{limit: limit, end: cancel}
	w.timer = time.AfterFunc(limit, func() { cancel(errStalled) })
	return w, ctx
}

func (w *watchdog) rest() { w.timer.Stop() }
func (w *watchdog) wake() { w.timer.Reset(w.limit) }

func (w *watchdog) stop() {
	w.timer.Stop()
	w.end(nil)
}

// body reads from an answer under a watchdog, and counts.
type body struct {
	r     io.Reader
	w     *watchdog
	count func(n int)
	err   error // the first of the network's
}

func (b *body) Read(p []byte) (int, error) {
	b.w.wake()
	n, err := b.r.Read(p)
	b.w.rest()
	b.count(n)
	if err != nil && err != io.EOF && b.err == nil {
		b.err = err
	}
	return n, err
}

// discard reads what little there is left of an answer, so that its connection can be used again.
func discard(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 4<<10)
	_ = resp.Body.Close()
}

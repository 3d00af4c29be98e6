package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/sluicefs/sluice/control/api"
)

// eventBuffer is how much, in bytes, may wait for a client before the daemon has to for it.
const eventBuffer = 256 << 10

// getEvents streams a share's events, one line of JSON each. What comes while the client reads the last goes out together.
func getEvents(c *call) error {
	since, err := parseSince(c.URL.RawQuery)
	if err != nil {
		return err
	}
	if err := c.checkShare(); err != nil {
		return err
	}

	ctx, cancel := context.WithCancel(c.Context())
	defer cancel()
	stop := context.AfterFunc(c.server.ending, cancel)
	defer stop()

	s := newEventStream(c.w, c.server.limits.event, cancel)
	defer s.end() // the answer is not to be written to later, even if the daemon panics
	err = c.server.cfg.Daemon.Events(ctx, c.tag, since, s.send)
	begun := s.end()
	switch {
	case !begun && err != nil:
		return err
	case err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, errClient):
		c.peer.log.Error("a stream of events failed", "share", c.tag, "error", err)
		// Only a connection that is cut tells the client that this is not the end.
		panic(http.ErrAbortHandler)
	}
	return nil
}

// errClient is that the client does not read.
var errClient = errors.New("client does not take its events")

// An eventStream writes events to a client from a goroutine of its own.
type eventStream struct {
	w      http.ResponseWriter
	rc     *http.ResponseController
	wait   time.Duration // that a client may take for one write
	failed func()        // told once if the client does not read
	done   chan struct{}

	mu      sync.Mutex
	changed *sync.Cond // of what follows
	pending []byte     // lines that are not written yet
	begun   bool       // there was an event
	ended   bool       // there will be none
	err     error      // of writing
}

func newEventStream(w http.ResponseWriter, wait time.Duration, failed func()) *eventStream {
	s := &eventStream{w: w, rc: http.NewResponseController(w), wait: wait, failed: failed, done: make(chan struct{})}
	s.changed = sync.NewCond(&s.mu)
	go s.write()
	return s
}

// send takes an event, and waits only if the client is far behind.
func (s *eventStream) send(e api.Event) error {
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("write an event as JSON: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.pending) > eventBuffer && s.err == nil {
		s.changed.Wait()
	}
	if s.err != nil {
		return s.err
	}
	s.begun = true
	s.pending = append(append(s.pending, line...), '\n')
	s.changed.Broadcast()
	return nil
}

// end returns when everything is written, or cannot be, and whether there was anything.
func (s *eventStream) end() (begun bool) {
	s.mu.Lock()
	s.ended = true
	s.changed.Broadcast()
	s.mu.Unlock()
	<-s.done
	return s.begun
}

// write writes what is pending, until the end.
func (s *eventStream) write() {
	defer close(s.done)
	var buf []byte
	for {
		s.mu.Lock()
		for len(s.pending) == 0 && !s.ended {
			s.changed.Wait()
		}
		if len(s.pending) == 0 {
			s.mu.Unlock()
			if s.begun {
				s.allowWrite() // the end of the body
			}
			return
		}
		buf, s.pending = s.pending, buf[:0]
		s.changed.Broadcast()
		s.mu.Unlock()

		if err := s.writeBatch(buf); err != nil {
			s.mu.Lock()
			s.err = errClient
			s.changed.Broadcast()
			s.mu.Unlock()
			s.failed()
			return
		}
		if cap(buf) > 2*eventBuffer {
			buf = nil
		}
	}
}

func (s *eventStream) writeBatch(lines []byte) error {
	if s.w.Header().Get("Content-Type") == "" {
		s.w.Header().Set("Content-Type", "application/x-ndjson")
		s.w.Header().Set("Cache-Control", "no-store")
	}
	s.allowWrite()
	if _, err := s.w.Write(lines); err != nil {
		return err
	}
	return s.rc.Flush()
}

// allowWrite begins the time that a client has for the next write.
func (s *eventStream) allowWrite() { _ = s.rc.SetWriteDeadline(time.Now().Add(s.wait)) }

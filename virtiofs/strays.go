package virtiofs

import (
	"sync"
	"time"
)

// strays are the threads that were workers' and are in calls that do not come back.
type strays struct {
	mu    sync.Mutex
	n     int
	limit int
	gone  chan struct{} // closed when there are none; nil: nobody waits
}

// enter counts one more, unless there are too many.
func (s *strays) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n == s.limit {
		return false
	}
	s.n++
	return true
}

func (s *strays) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n--; s.n == 0 && s.gone != nil {
		close(s.gone)
		s.gone = nil
	}
}

// wait waits for them to come back, and says whether all have before timeout.
func (s *strays) wait(timeout time.Duration) bool {
	s.mu.Lock()
	if s.n == 0 {
		s.mu.Unlock()
		return true
	}
	gone := make(chan struct{})
	s.gone = gone
	s.mu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-gone:
		return true
	case <-timer.C:
		return false
	}
}

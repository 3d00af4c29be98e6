package vhostuser

import (
	"fmt"

	"github.com/sluicefs/sluice/internal/sys"
)

// ring is what the front-end has said about one virtqueue, and what the Device was told of it.
type ring struct {
	num     uint16 // 0: not set
	base    uint32
	addr    VringAddr
	hasAddr bool
	kick    *sys.FD // nil also if the front-end wants the ring polled
	started bool    // SET_VRING_KICK came, and no GET_VRING_BASE since
	enabled bool    // the Device has the same
	running bool    // StartQueue succeeded, and no StopQueue since
	held    bool    // stopped for a change while disabled; see change
}

// start starts ring i if it is complete and not running. An error is a *deviceError.
func (s *session) start(i int) error {
	r := &s.rings[i]
	// Without any memory there is nowhere for the ring to lie: it starts with the first region.
	if r.running || !r.started || r.held || r.num == 0 || !r.hasAddr || s.regions == 0 {
		return nil
	}
	err := s.device.StartQueue(i, QueueConfig{
		Num:           r.num,
		Base:          r.base,
		DescUserAddr:  r.addr.Desc,
		AvailUserAddr: r.addr.Avail,
		UsedUserAddr:  r.addr.Used,
		Kick:          r.kick,
	})
	if err != nil {
		return &deviceError{fmt.Errorf("start ring %d: %w", i, err)}
	}
	r.running = true
	return nil
}

// stop stops ring i if it runs, and keeps the base from which to go on.
func (s *session) stop(i int) {
	r := &s.rings[i]
	if !r.running {
		return
	}
	base, err := s.device.StopQueue(i)
	r.running = false
	r.base = base
	if err != nil {
		s.warn("ring did not stop in order", "ring", i, "err", err)
	}
}

// change applies set to ring i, which a front-end may describe anew without GET_VRING_BASE first (User-Mode Linux never
// sends that): a running ring is stopped and started again. If it is disabled that waits for the next
// SET_VRING_KICK or SET_VRING_ENABLE, since until all of the new description is there the ring would be started on
// memory that the guest may have given to something else.
func (s *session) change(i int, set func(*ring)) error {
	r := &s.rings[i]
	if r.running {
		s.stop(i)
		r.held = !r.enabled
	}
	set(r)
	return s.start(i)
}

// enable sets whether ring i may run.
func (s *session) enable(i int, on bool) error {
	r := &s.rings[i]
	if r.enabled != on {
		r.enabled = on
		s.device.EnableQueue(i, on)
	}
	if !on {
		return nil
	}
	r.held = false
	return s.start(i)
}

// enableAll enables every ring and returns the first error.
func (s *session) enableAll() (first error) {
	for i := range s.rings {
		if err := s.enable(i, true); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// disableAll disables every ring; none can fail to.
func (s *session) disableAll() {
	for i := range s.rings {
		_ = s.enable(i, false)
	}
}

// kicked sets ring i's kick descriptor, which starts it.
func (s *session) kicked(i int, kick *sys.FD) error {
	s.stop(i)
	r := &s.rings[i]
	_ = r.kick.Close()
	r.kick = kick
	r.started, r.held = true, false
	return s.start(i)
}

// unkick forgets ring i's kick descriptor, and that it was started; it does not run any more.
func (s *session) unkick(i int) {
	r := &s.rings[i]
	_ = r.kick.Close()
	r.kick = nil
	r.started, r.held = false, false
}

// resetRings stops and disables all rings and forgets what was said of them.
func (s *session) resetRings() {
	s.disableAll() // none fetches more while another drains
	for i := range s.rings {
		s.stop(i)
		s.unkick(i)
		s.rings[i] = ring{}
	}
}

package virtiofs

import (
	"runtime"
	"sync/atomic"
	"time"
)

// Values of Config.PollWindow that are not a time.
const (
	// PollAuto has each worker find out whether polling pays.
	PollAuto time.Duration = 0
	// PollNever has it sleep at once.
	PollNever time.Duration = -1
	// MaxPollWindow bounds a fixed window.
	MaxPollWindow = time.Millisecond
)

const (
	// maxTurn is the longest turn that is polled through: beyond it a wake-up saved is not worth the CPU.
	maxTurn = 200 * time.Microsecond
	// nearEnough is how many turns in a row have to be short before polling is tried.
	nearEnough = 4
	// trialTrust is how far polling is trusted at first: not beyond one failure.
	trialTrust = 2
	maxTrust   = 8
	// loss is what a failure costs of trust, against 1 that a success earns: below two successes in three, sleeping is better.
	loss = 2
	// minPause and maxPause bound how long polling is off after it has failed.
	minPause = time.Millisecond
	maxPause = time.Second
	// theftPause is how long it is off at least after somebody else has wanted the CPU.
	theftPause = 10 * time.Millisecond
	// theft is how long a look that takes less than a microsecond has to take until somebody else must have had the CPU: no
	// interrupt takes that long, and no time slice is shorter.
	theft = 300 * time.Microsecond
)

// poller decides how long a worker looks at its rings before it sleeps.
//
// It compares the two ways to wait for the same driver. A turn is the time from the last answer to the next request's being
// seen by a worker that sleeps meanwhile, its wake-up included. A worker that polls for about a turn has then either seen
// the request sooner than sleeping would have shown it, or learned that the driver does not go on while it polls: because
// they share a CPU, or because it has nothing more to ask. Either way nobody has to know which CPU is whose.
type poller struct {
	fixed time.Duration // the window, whatever happens; PollAuto, PollNever

	turn  time.Duration // smoothed, of sleeps that no poll came before
	near  int           // such turns in a row that were short
	trust int           // above 0: it polls
	retry time.Duration // when it may again, by fuseserver.Clock
	pause time.Duration // how long it may not after the next failure
}

// window returns how long to poll at time now, 0 for not at all.
func (p *poller) window(now time.Duration) time.Duration {
	if p.fixed != PollAuto {
		return max(p.fixed, 0)
	}
	if p.trust == 0 {
		if p.near < nearEnough || now < p.retry {
			return 0
		}
		p.trust = trialTrust
		p.pause = max(p.pause, minPause)
		spinners.measure()
	}
	return p.turn + p.turn/2
}

// slept notes a turn that was slept through from its beginning.
func (p *poller) slept(turn time.Duration) {
	if turn > maxTurn {
		p.near = 0
		return
	}
	if p.near++; p.near == 1 {
		p.turn = turn
	}
	p.turn += (turn - p.turn) / 4
}

// found notes that a poll has ended with a request.
func (p *poller) found() {
	p.trust = min(p.trust+1, maxTrust)
	p.pause = max(p.pause-p.pause/1024, minPause)
}

// vain notes that a poll has ended with none at time now.
func (p *poller) vain(now time.Duration) {
	if p.trust -= loss; p.trust <= 0 {
		p.off(now)
	}
}

// robbed notes that somebody else has had the CPU during a poll that ended at time now.
func (p *poller) robbed(now time.Duration) {
	p.pause = max(p.pause, theftPause)
	p.off(now)
}

func (p *poller) off(now time.Duration) {
	p.trust, p.near = 0, 0
	p.retry = now + p.pause
	p.pause = min(2*p.pause, maxPause)
}

// spinners counts the workers of the process that poll. One of Go's Ps is left to everybody else.
var spinners spinCount

type spinCount struct {
	now, limit atomic.Int32
}

// measure asks how many Ps there are, which takes a lock of the scheduler's.
func (s *spinCount) measure() {
	s.limit.Store(int32(runtime.GOMAXPROCS(0)) - 1)
}

// enter lets one more poll, or not.
func (s *spinCount) enter() bool {
	if s.now.Add(1) <= s.limit.Load() {
		return true
	}
	s.now.Add(-1)
	return false
}

func (s *spinCount) leave() {
	s.now.Add(-1)
}

package share

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
)

// patience is how long Init, Reset and Close of an isolated part may take, and at most a call that a request to another
// part waits for.
const patience = 5 * time.Second

// maxWaiting bounds how many requests to other parts wait for one at a time.
const maxWaiting = 8

// begin and end go around each call that the share makes of a part on its own account.
func (p *part) begin() {
	if p.info.Enter != nil {
		p.info.Enter()
	}
}

func (p *part) end() {
	if p.info.Leave != nil {
		p.info.Leave()
	}
}

// contained runs call between begin and end, and reports false if it panicked.
func (s *Share) contained(p *part, what string, call func()) (ok bool) {
	defer func() {
		if cause := recover(); cause != nil {
			p.info.Stats.Panics.Add(1)
			s.bugs.Error("backend panicked: please report this bug", "extension", p.info.Name, "path", p.info.Path,
				"call", what, "panic", cause, "stack", string(debug.Stack()))
		}
	}()
	p.begin()
	defer p.end()
	call()
	return true
}

// aside starts call on a goroutine, and a thread, of its own. The channel says whether it returned.
func (s *Share) aside(p *part, what string, call func()) <-chan bool {
	done := make(chan bool, 1)
	go func() {
		if p.info.Enter != nil {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
		}
		ok := false
		defer func() { done <- ok }() // even if call ends the goroutine
		ok = s.contained(p, what, call)
	}()
	return done
}

// across makes a call of an isolated part that a request to another part waits for: not for long, and not with many others.
// undo takes back a call that succeeded when nobody waits any more.
func (s *Share) across(c *fsbackend.Context, p *part, call func(*fsbackend.Context) Errno, undo func()) Errno {
	if !c.MayBlock {
		return fsbackend.ErrMayBlock
	}
	if p.dead.Load() {
		return unix.EIO
	}
	defer p.waiting.Add(-1)
	if p.waiting.Add(1) > maxWaiting || p.overdue.Load() > 0 {
		p.info.Stats.Refused.Add(1)
		return unix.EIO
	}
	limit := patience
	if t := p.info.Timeout; t > 0 {
		limit = min(limit, t)
	}
	own := fsbackend.Context{Caller: c.Caller, SuppGroups: slices.Clone(c.SuppGroups), MayBlock: true, Cancel: c.Cancel}
	errno := unix.EIO
	if !p.enterCall(&own) {
		return unix.ENOENT
	}
	done := s.aside(p, "on behalf of another part", func() {
		defer p.done(&own)
		errno = call(&own)
	})
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case ok := <-done:
		if !ok {
			return unix.EIO
		}
		return errno
	case <-timer.C:
	case <-c.Cancel:
	}
	p.info.Stats.Timeouts.Add(1)
	p.overdue.Add(1)
	go func() {
		// Where p has gone since, its backend has taken everything back.
		if <-done && errno == fsbackend.OK && p.enterCall(&own) {
			s.contained(p, "undo", undo)
			p.done(&own)
		}
		p.overdue.Add(-1)
	}()
	return unix.EIO
}

// all makes a call of every one of parts. Isolated ones get patience; one that fails is dead: a part that has not forgotten a
// session, or does not know of one, must not serve it. The dead hear of nothing but their Close, and of that only if nothing
// still runs in them.
func (s *Share) all(parts []*part, what string, last bool, call func(*part)) {
	type under struct {
		p    *part
		done <-chan bool
	}
	var aside []under
	begin := func(p *part) bool {
		if p.hung.Load() || p.dead.Load() && !last {
			return false
		}
		return last || p.enterCall(&nobodysContext)
	}
	run := func(p *part) {
		if !last {
			defer p.done(&nobodysContext)
		}
		call(p)
	}
	for _, p := range parts {
		if p.info.Isolated && begin(p) {
			aside = append(aside, under{p, s.aside(p, what, func() { run(p) })})
		}
	}
	for _, p := range parts {
		if !p.info.Isolated && begin(p) && !s.contained(p, what, func() { run(p) }) {
			p.dead.Store(true)
		}
	}
	expired := time.After(patience)
	for _, u := range aside {
		ok := false
		select {
		case ok = <-u.done:
		case <-expired:
			expired = closed
			select {
			case ok = <-u.done: // it was in time, only not the first to be waited for
			default:
				s.hangs(u.p, what)
			}
		}
		if !ok {
			u.p.dead.Store(true)
		}
	}
}

// hangs notes that a call of a session has not come back.
func (s *Share) hangs(p *part, what string) {
	p.hung.Store(true)
	p.info.Stats.Timeouts.Add(1)
	s.log.Error("extension did not come back from a call: its part answers EIO from now on", "extension", p.info.Name,
		"path", p.info.Path, "call", what, "after", patience)
}

// closed is a time that has passed.
var closed = func() <-chan time.Time {
	c := make(chan time.Time)
	close(c)
	return c
}()

// closeAll is all for Close, whose errors count. It also waits for those that are being closed already.
func (s *Share) closeAll() []error {
	s.mu.Lock()
	parts, closing := s.list, s.closing
	s.mu.Unlock()
	deadline := time.Now().Add(patience)
	errs := make(map[*part]chan error)
	var open []*part
	for _, p := range parts {
		errs[p] = make(chan error, 1)
		if p.awaitFinish(deadline) {
			open = append(open, p)
		}
	}
	s.all(open, "Close", true, func(p *part) { errs[p] <- p.Close() })
	var failed []error
	for _, p := range parts {
		select {
		case err := <-errs[p]:
			if err != nil {
				failed = append(failed, fmt.Errorf("close %s: %w", p.title(), err))
			}
		default:
			failed = append(failed, fmt.Errorf("close %s: given up, because a call of it panicked or has never come back", p.title()))
		}
	}
	expired := time.After(patience)
	for _, b := range closing {
		select {
		case <-b.done:
		case <-expired:
			expired = closed
			failed = append(failed, fmt.Errorf("close %s: given up, because it has not come back from Close", b.p.title()))
		}
	}
	return failed
}

func (p *part) title() string {
	if p.info.Name == "" {
		return "graft " + p.info.Path
	}
	return fmt.Sprintf("graft %s of extension %s", p.info.Path, p.info.Name)
}

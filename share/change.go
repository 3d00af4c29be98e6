package share

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
)

// Errors of Add, Replace and Change beside those of the tree.
var (
	// ErrHung says that the backend of an isolated graft did not come back in time from being told of the session. It may not be
	// closed: the call still runs.
	ErrHung = errors.New("the backend has not come back from a call")
	// ErrUnsettled says that a graft is read-only now, but a change that began before still goes on.
	ErrUnsettled = errors.New("a change that began before still goes on")
)

// Add grafts g while guests go on. Once it has returned nil, the backend is the Share's, and the guest finds it: at once where
// there was nothing or another graft; where it knows a file or directory of that name, when its cache lets it ask again. After an error the backend is still
// the caller's, though it may have been told of a session. ErrExists says that something is grafted at exactly that path.
func (s *Share) Add(g Graft) error { return s.graft(&g, false) }

// Replace is Add, but what is grafted at that path, if anything, gives way in the same step, as with Remove. What is grafted
// below stays.
func (s *Share) Replace(g Graft) error { return s.graft(&g, true) }

// sessionTries bounds how many sessions may begin or end while a graft is added.
const sessionTries = 16

func (s *Share) graft(g *Graft, replace bool) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("graft %s: %w", g.Path, err)
		}
	}()
	switch err := g.validate(); {
	case err != nil:
		return err
	case !s.dynamic:
		return ErrFixed
	case g.Path == "/":
		return ErrRoot
	}
	p := s.newPart(g)
	for range sessionTries {
		s.mu.Lock()
		err := s.mayPlace(p, replace)
		session, features, wanted := s.sessions, s.features, s.wanted
		s.mu.Unlock()
		if err != nil {
			return err
		}
		if err := s.join(p, features, wanted); err != nil {
			return err
		}
		again, err := s.publish(p, replace, session)
		if err != nil || !again {
			return err
		}
		if features == nil {
			continue
		}
		if returned, _ := s.try(p, "Reset", p.Reset); !returned {
			s.hangs(p, "Reset")
			return ErrHung
		}
	}
	return errors.New("sessions begin and end too fast: try again")
}

// publish makes p part of the tree, unless another session has begun since.
func (s *Share) publish(p *part, replace bool, session uint64) (again bool, err error) {
	s.mu.Lock()
	if s.sessions != session {
		s.mu.Unlock()
		return true, nil
	}
	at := s.position(p.info.Path)
	var old *part
	if at != nil {
		old = at.graft.Load()
	}
	if err = s.mayPlace(p, replace); err == nil {
		if index := s.freeIndex(); index != 0 {
			s.put(index, p)
			err = s.place(p, replace)
		} else {
			err = ErrFull
		}
	}
	inSession := s.features != nil
	s.mu.Unlock()
	if err != nil {
		return false, err
	}
	s.drop()
	if old != nil {
		s.retire(old)
	}
	if inSession {
		s.walk(p.info.Path)
		s.startCount(p)
	}
	return false, nil
}

// join tells p of the session, if there is one.
func (s *Share) join(p *part, features *fsbackend.Features, wanted uint64) error {
	var fits error
	returned, ok := s.try(p, "Init", func() {
		if features == nil {
			fits = p.adapt(wanted)
		} else if fits = p.adapt(features.Flags); fits == nil && p.Initer != nil {
			p.Init(*features)
		}
	})
	switch {
	case !returned:
		s.hangs(p, "Init")
		return ErrHung
	case !ok:
		return errors.New("the backend panicked")
	}
	return fits
}

// try makes a call of p that nobody else waits for, an isolated part's not for long. It says whether the call has returned, and
// did so without a panic.
func (s *Share) try(p *part, what string, call func()) (returned, ok bool) {
	done := s.aside(p, what, call)
	if !p.info.Isolated {
		return true, <-done
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case ok := <-done:
		return true, ok
	case <-timer.C:
		return false, false
	}
}

// walk looks up the way to path, so that a guest that knows the directories on it already is shown what is in them. What
// hangs or fails, the guest has to look up itself.
func (s *Share) walk(path string) {
	names := components(path)
	at := uint64(rootID)
	for _, name := range names[:len(names)-1] {
		p, errno := s.find(&nobodysContext, at)
		if errno != fsbackend.OK {
			return
		}
		out := new(fuseproto.EntryOut)
		found := false
		look := func() {
			defer p.done(&nobodysContext)
			found = s.Lookup(&fsbackend.Context{MayBlock: true}, at, fsbackend.MakeName(name), out) == fsbackend.OK && out.NodeId != 0
			if found {
				s.Forget(out.NodeId, 1) // the share holds one of its own
			}
		}
		// In a directory made up there may be an isolated part's root, which nobody is asked for.
		if returned, _ := s.try(p, "Lookup", look); !returned || !found {
			return
		}
		at = out.NodeId
	}
}

// Remove takes the graft at path away: ErrNotFound if there is none, ErrBusy, with their names, if others are below it. The
// guest no longer finds its names; what is open goes on. When that is closed too, and no call of the backend runs any more,
// the backend is closed, and Config.OnRemoved called.
func (s *Share) Remove(path string) error {
	err := s.removeAt(path)
	if err != nil {
		return fmt.Errorf("graft %s: %w", path, err)
	}
	return nil
}

func (s *Share) removeAt(path string) error {
	switch {
	case !s.dynamic:
		return ErrFixed
	case path == "/":
		return ErrRoot
	}
	s.mu.Lock()
	g, err := s.graftAt(path)
	if err == nil {
		pos := s.position(path)
		if below := pos.below(nil); len(below) > 0 {
			err = fmt.Errorf("%w: %s", ErrBusy, strings.Join(below, ", "))
		} else {
			s.remove(pos)
		}
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	s.drop()
	s.retire(g)
	return nil
}

// graftAt returns what is grafted at path. s.mu is held.
func (s *Share) graftAt(path string) (*part, error) {
	if strings.HasPrefix(path, "/") {
		if pos := s.position(path); pos != nil {
			if g := pos.graft.Load(); g != nil && !g.madeUp {
				return g, nil
			}
		}
	}
	return nil, ErrNotFound
}

// Change changes the policy of the graft at path; the root's is at "/". Requests see all of it or nothing. What the guest has cached it keeps until that expires:
// attributes and data, but no right to change anything. Made read-only, a graft has no change under way that began before once Change has
// returned nil; ErrUnsettled says that one still went on after 5 s, though none begins any more.
func (s *Share) Change(path string, c Change) error {
	if err := s.change(path, &c); err != nil {
		return fmt.Errorf("graft %s: %w", path, err)
	}
	return nil
}

func (s *Share) change(path string, c *Change) error {
	if !s.dynamic {
		return ErrFixed
	}
	fresh := false
	s.mu.Lock()
	g, err := s.graftAt(path)
	if err == nil {
		policy := c.apply(*g.policy.Load())
		if err = policy.validate(); err == nil {
			g.policy.Store(policy.own())
			if fresh = policy.limited() && g.metered() == nil; fresh {
				g.quota.Store(newQuota(g))
			}
		}
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if fresh || c.ReadOnly != nil && *c.ReadOnly {
		err = g.settle()
	}
	if fresh {
		s.startCount(g) // what began before is not counted on its own
	}
	return err
}

// settle waits for the changes under way.
func (p *part) settle() error {
	deadline := time.Now().Add(patience)
	for i := range p.calls.shards {
		if !waitFor(func() bool { return !p.calls.changing(uint8(i)) }, deadline) {
			return ErrUnsettled
		}
	}
	return nil
}

// GraftState is a graft as it is.
type GraftState struct {
	Path      string
	Extension string
	File      string
	Policy    Policy
	// Leaving says that it was removed or replaced, and goes on for what is open.
	Leaving bool
	// OpenFiles are handles of files and directories that the guest has; they are only counted in a Dynamic share.
	OpenFiles int64
	// UsedBytes and UsedInodes are what counts against MaxBytes and MaxInodes, if there are such. Counting says that they are
	// still being counted, and grow.
	UsedBytes, UsedInodes uint64
	Counting              bool
	Stats                 *fsbackend.PartStats
}

// Grafts returns what is grafted, by path, and then what leaves.
func (s *Share) Grafts() []GraftState {
	var states []GraftState
	for _, p := range s.snapshot() {
		if p.madeUp {
			continue
		}
		state := GraftState{
			Path: p.info.Path, Extension: p.info.Name, File: string(p.file), Policy: *p.policy.Load(),
			Leaving: p.leaving.Load(), OpenFiles: p.calls.kept.Load(), Stats: &p.info.Stats,
		}
		if q := p.metered(); q != nil {
			q.mu.Lock()
			state.UsedBytes, state.UsedInodes, state.Counting = uint64(max(q.bytes, 0)), uint64(max(q.inodes, 0)), q.counting || !q.counted
			q.mu.Unlock()
		}
		states = append(states, state)
	}
	slices.SortStableFunc(states, func(a, b GraftState) int {
		if a.Leaving != b.Leaving {
			if a.Leaving {
				return 1
			}
			return -1
		}
		return cmp.Compare(a.Path, b.Path)
	})
	return states
}

package frontend

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/bench/meter"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/virtqueue"
)

// Stress looks for kicks and notifications that are lost: it is about how rings are driven, where Run is about what requests
// cost. Rounds of requests follow one another in which, by chance, everything differs that decides whether one side must wake
// the other: how many are under way, whether they are shown one by one or together, whether the driver looks or sleeps, which
// answer it wants to be notified of, and how long it pauses, so that the server is met while it works, while it still looks,
// just as it goes to sleep, and asleep. Indices go round every 65,536 requests.

// StressConfig says how a server is stressed.
type StressConfig struct {
	Requests uint64 // on all queues together
	// Window is how long the server looks at a ring before it sleeps, if that is known: many pauses are about as long.
	Window time.Duration
	// Patience is how long a wait may take before it is looked into; 0 means 5 ms.
	Patience time.Duration
	// PID is the server's process, whose threads tell a lost wake-up from a CPU that others have.
	PID  int
	Seed uint64
}

// StressResult is what has been done, and the longest waits.
type StressResult struct {
	Requests      uint64
	Kicks         uint64
	Notifications uint64
	Elapsed       time.Duration
	Longest       []Delay // those beyond Patience, the longest first, at most maxDelays
	Delays        uint64  // how many there were
}

// Delay is a wait that took long but ended.
type Delay struct {
	Queue int
	Took  time.Duration
	Cause string
}

const maxDelays = 8

// ErrLost is wrapped by the error of a Stress that has found a wake-up lost.
var ErrLost = errors.New("a wake-up is lost")

// Stress drives all queues until c.Requests have been answered, at most Config.Depth at a time on each. A wake-up that is lost ends
// it with an error that wraps ErrLost; a queue on which nothing moves for Config.Stall, for whatever reason, with one that wraps ErrStall.
func (f *FrontEnd) Stress(ctx context.Context, c StressConfig) (StressResult, error) {
	if c.Patience == 0 {
		c.Patience = 5 * time.Millisecond
	}
	mark := f.mem.Mark()
	defer f.mem.Reset(mark)
	var stop atomic.Bool
	defer context.AfterFunc(ctx, func() { stop.Store(true) })()
	all := make([]*stress, len(f.queues))
	for i, q := range f.queues {
		s := &stress{StressConfig: c, q: q, stop: &stop, left: c.Requests / uint64(len(f.queues))}
		q.random ^= c.Seed * 0x2545_f491_4f6c_dd1d
		q.ring.kicks, q.ring.notifications = 0, 0
		for head := range f.config.Depth {
			m := newMessage(f.mem, stressShape, Contiguous, f.uid, f.gid)
			m.header().NodeId = fuseproto.FUSE_ROOT_ID
			s.messages = append(s.messages, m)
			s.free = append(s.free, uint16(head))
		}
		if err := s.open(); err != nil {
			return StressResult{}, f.breaks(fmt.Errorf("stress queue %d: prepare: %w", q.ring.index, err))
		}
		all[i] = s
	}
	start := clock()
	errs := make([]error, len(all))
	var ended sync.WaitGroup
	for i, s := range all {
		ended.Go(func() {
			runtime.LockOSThread() // and the thread ends with the goroutine
			errs[i] = pin(f.config.CPUs)
			if errs[i] == nil {
				errs[i] = s.run()
			}
			if errs[i] != nil {
				errs[i] = fmt.Errorf("stress queue %d: %w", s.q.ring.index, errs[i])
				stop.Store(true)
			}
		})
	}
	ended.Wait()
	res := StressResult{Elapsed: clock() - start}
	for _, s := range all {
		s.q.ring.suppress()
		s.q.ring.drain()
		res.Requests += s.done
		res.Kicks += s.q.ring.kicks
		res.Notifications += s.q.ring.notifications
		res.Delays += s.delays
		res.Longest = append(res.Longest, s.longest...)
	}
	slices.SortFunc(res.Longest, func(a, b Delay) int { return int(b.Took - a.Took) })
	res.Longest = res.Longest[:min(len(res.Longest), maxDelays)]
	err := errors.Join(errs...)
	if err != nil {
		return res, f.breaks(err)
	}
	for _, s := range all {
		if err := s.close(); err != nil {
			return res, f.breaks(err)
		}
	}
	return res, context.Cause(ctx)
}

// stressShape is GETATTR's, and that of FSYNCDIR: 16 bytes each, and an answer of 104 or none.
var stressShape = shape{op: fuseproto.FUSE_GETATTR, in: 16, out: 104}

// stress is what one queue is put through.
type stress struct {
	StressConfig
	q        *queue
	stop     *atomic.Bool
	client   *client
	dir      uint64 // a handle of the root, for FSYNCDIR
	messages []*message
	free     []uint16
	left     uint64
	underWay int
	done     uint64
	delays   uint64
	longest  []Delay
	sched    *os.File      // of the thread: how long it has waited for a CPU
	ran      time.Duration // the same, when the round began
}

func (s *stress) open() (err error) {
	s.client = newClient(s.q)
	s.dir, err = s.client.open(opendirShape, fuseproto.FUSE_ROOT_ID, unix.O_RDONLY|unix.O_DIRECTORY)
	return err
}

func (s *stress) close() error {
	return s.client.release(releasedirShape, fuseproto.FUSE_ROOT_ID, s.dir)
}

func (s *stress) run() (err error) {
	if s.sched, err = os.Open(fmt.Sprintf("/proc/self/task/%d/schedstat", unix.Gettid())); err != nil {
		return err
	}
	defer s.sched.Close()
	for s.left > 0 && !s.stop.Load() {
		if err := s.round(); err != nil {
			return err
		}
		s.pause()
	}
	return nil
}

// mode is how a round waits for answers.
type mode int

const (
	look      mode = iota // without notifications
	lookArmed             // with notifications that nobody reads
	sleepNext             // until the next answer
	sleepLast             // until the last of those under way, or one before
	modes
)

// round shows a number of requests and takes their answers.
func (s *stress) round() error {
	q := s.q
	depth := 1 + q.rand(len(s.messages))
	if q.rand(2) == 0 {
		depth = 1 + q.rand(min(3, depth))
	}
	n := min(uint64(1+q.rand(1<<q.rand(9))), s.left)
	s.ran = s.runDelay()
	s.left -= n
	how, together, one := mode(q.rand(int(modes))), q.rand(2) == 0, q.rand(4) == 0
	if how == look {
		q.ring.suppress()
	}
	for n > 0 || s.underWay > 0 {
		k := min(uint64(depth-s.underWay), n)
		n -= k
		if err := s.show(int(k), together); err != nil {
			return err
		}
		want := 1
		if how == sleepLast {
			want = max(1, s.underWay-q.rand(2))
		}
		if err := s.wait(how, want); err != nil {
			return err
		}
		for q.ring.waiting() > 0 {
			if err := s.reap(); err != nil {
				return err
			}
			if one {
				break
			}
		}
	}
	return nil
}

// show shows the server k more requests.
func (s *stress) show(k int, together bool) error {
	q := s.q
	heads := s.free[len(s.free)-k:]
	s.free = s.free[:len(s.free)-k]
	s.underWay += k
	for i, head := range heads {
		m := s.messages[head]
		h := m.header()
		q.unique += 2
		h.Unique, m.unique = q.unique, q.unique
		h.Opcode, m.op = uint32(fuseproto.FUSE_GETATTR), fuseproto.FUSE_GETATTR
		*as[uint64](m.in[inHeader:]) = 0
		if q.rand(256) == 0 {
			// Whoever answers this is another thread.
			h.Opcode, m.op = uint32(fuseproto.FUSE_FSYNCDIR), fuseproto.FUSE_FSYNCDIR
			*as[uint64](m.in[inHeader:]) = s.dir
		}
		q.ring.desc[head] = virtqueue.Desc{Addr: m.tableAddr, Len: m.tableLen, Flags: virtqueue.VIRTQ_DESC_F_INDIRECT}
		if !together {
			if err := q.ring.offerAll(heads[i : i+1]); err != nil {
				return err
			}
		}
	}
	if together && k > 0 {
		return q.ring.offerAll(heads)
	}
	return nil
}

// reap takes one answer.
func (s *stress) reap() error {
	head, written := s.q.ring.take()
	if int(head) >= len(s.messages) || slices.Contains(s.free, uint16(head)) {
		return fmt.Errorf("the server used head %d, which is not under way", head)
	}
	m := s.messages[head]
	r, err := m.result(written)
	if err == nil {
		size := 104
		if m.op == fuseproto.FUSE_FSYNCDIR {
			size = 0
		}
		err = m.success(r, size)
	}
	s.free = append(s.free, uint16(head))
	s.underWay--
	s.done++
	return err
}

// offerAll shows the device all of heads, and kicks it if one of them is the one after which it wants to be kicked
// (virtio 1.3, section 2.7.10).
func (r *ring) offerAll(heads []uint16) error {
	old := r.offered
	for _, head := range heads {
		r.avail[r.offered&(r.num-1)] = head
		r.offered++
	}
	atomic.SwapUint32(r.availIdx, atomic.LoadUint32(r.availIdx)&0xffff|uint32(r.offered)<<16)
	if r.event {
		if r.offered-load16(r.availEvent)-1 >= r.offered-old {
			return nil
		}
	} else if load16(r.usedIdx)&virtqueue.VIRTQ_USED_F_NO_NOTIFY != 0 {
		return nil
	}
	r.kicks++
	return signal(r.kick.Int())
}

// armAt asks for a notification of the n-th answer from now, and says whether it is there already.
func (r *ring) armAt(n int) bool {
	if !r.event {
		return r.arm()
	}
	atomic.SwapUint32(r.usedEvent, uint32(r.reaped+uint16(n)-1))
	return int(r.waiting()) >= n
}

// wait returns when want answers can be reaped; without EVENT_IDX, when one can.
func (s *stress) wait(how mode, want int) error {
	r := s.q.ring
	if how == lookArmed && r.event {
		r.armAt(1 + s.q.rand(s.underWay+1))
	}
	if int(r.waiting()) >= want {
		return nil
	}
	began, due := clock(), s.Patience
	var seen *inquiry
	for n := 1; ; n++ {
		if how >= sleepNext {
			if r.armAt(want) || r.waiting() > 0 && !r.event {
				break
			}
			if pollIn(r.call.Int(), int(s.Patience.Milliseconds())) {
				r.drain()
				continue
			}
		} else if int(r.waiting()) >= want {
			break
		} else if n%64 != 0 {
			continue
		} else if n%1024 == 0 {
			_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
		took := clock() - began
		if took < due {
			continue
		}
		if took > s.q.f.config.Stall {
			return stallError(took, []string{r.state(s.underWay)})
		}
		due += s.Patience
		if seen == nil {
			seen = new(inquiry)
		}
		if err := seen.look(s, how, want); err != nil {
			return err
		}
	}
	if took := clock() - began; took > s.Patience {
		s.note(Delay{Queue: r.index, Took: took, Cause: seen.cause(s.runDelay() - s.ran)})
	}
	return nil
}

func (s *stress) note(d Delay) {
	s.delays++
	s.longest = append(s.longest, d)
	slices.SortFunc(s.longest, func(a, b Delay) int { return int(b.Took - a.Took) })
	s.longest = s.longest[:min(len(s.longest), maxDelays)]
}

// runDelay is how long this thread has waited for a CPU so far.
func (s *stress) runDelay() time.Duration {
	var b [64]byte
	n, _ := s.sched.ReadAt(b[:], 0)
	var ran, waited time.Duration
	_, _ = fmt.Sscanf(string(b[:n]), "%d %d", &ran, &waited)
	return waited
}

// pause lets the server come to rest, or not quite.
func (s *stress) pause() {
	q := s.q
	var d time.Duration
	switch q.rand(8) {
	case 0:
		// Between 1 us and 1 ms, each power of two as often.
		d = time.Microsecond << q.rand(11)
	case 1:
		if s.Window > 0 {
			d = s.Window + time.Duration(q.rand(int(s.Window/2)+1)) - s.Window/4
		}
	case 2:
		d = time.Duration(q.rand(8000))
	}
	if d > 100*time.Microsecond {
		time.Sleep(d)
		return
	}
	for until := clock() + d; clock() < until; {
	}
}

// inquiry is what was found out about a wait while it lasted.
type inquiry struct {
	delayed  map[int]time.Duration // of the server's threads, at the first look
	since    time.Duration         // when that was
	pid      int
	looks    int
	runnable int // looks at which a thread of the server ran, or could have
	disk     int // looks at which one waited for a disk
	asleep   int // looks by which all threads had been asleep for a while, with something to do
	answered bool
}

// A wake-up is lost if nothing moves and all threads sleep at lostLooks looks within lostFor. It is long, for Go's runtime may let
// a thread that has been woken wait for 10 ms and more, until it notices that another one only sleeps (sysmon).
const (
	lostFor   = 200 * time.Millisecond
	lostLooks = 40
)

// look fails if there is something to do that nobody is going to: all of the server's threads are asleep and the indices say that
// one should not be. What it finds it looks at again a little later, for a thread may be about to.
func (i *inquiry) look(s *stress, how mode, want int) error {
	r := s.q.ring
	i.answered = i.answered || int(r.waiting()) >= want
	if s.PID == 0 {
		return nil
	}
	var lost string
	for again := range lostLooks {
		if again > 0 {
			time.Sleep(lostFor / lostLooks)
		}
		used, kicks := uint16(atomic.LoadUint32(r.usedIdx)>>16), r.kicks
		threads, err := meter.Threads(s.PID)
		if err != nil {
			return err
		}
		if i.looks++; i.delayed == nil {
			i.since, i.delayed, i.pid = clock(), make(map[int]time.Duration), s.PID
			for _, t := range threads {
				i.delayed[t.ID] = t.RunDelay
			}
		}
		busy := false
		for _, t := range threads {
			switch t.State {
			case 'R':
				busy, i.runnable = true, i.runnable+1
			case 'D':
				busy, i.disk = true, i.disk+1
			}
		}
		if again > 1 {
			i.asleep++
		}
		if busy || used != uint16(atomic.LoadUint32(r.usedIdx)>>16) {
			return nil
		}
		switch {
		case how >= sleepNext && int(r.waiting()) >= want && !pollIn(r.call.Int(), 0):
			lost = fmt.Sprintf("answer %d of %d is there and used_event asks for a notification of it, which has not come", want, s.underWay)
		case int(r.waiting()) >= want:
			return nil
		case load16(r.availEvent) == r.offered && r.event:
			lost = fmt.Sprintf("the server sleeps, has asked to be kicked for the next request, and has %d it was kicked for or has seen (%d kicks)", s.underWay-int(r.waiting()), kicks)
		default:
			lost = fmt.Sprintf("the server sleeps, has %d requests, and its avail_event asks for no kick, or for one that was given (%d kicks)", s.underWay-int(r.waiting()), kicks)
		}
	}
	return fmt.Errorf("%w: %s: %s", ErrLost, lost, r.state(s.underWay))
}

// cause is why a wait has taken long, which nothing was wrong with. own is how long the driver's thread has waited for a CPU.
func (i *inquiry) cause(own time.Duration) string {
	if i == nil || i.looks == 0 || i.answered {
		return fmt.Sprintf("the driver's thread waited %v for a CPU", own.Round(time.Microsecond))
	}
	waited := time.Duration(0)
	if threads, err := meter.Threads(i.pid); err == nil {
		for _, t := range threads {
			waited = max(waited, t.RunDelay-i.delayed[t.ID])
		}
	}
	return fmt.Sprintf("a thread of the server's waited %v of the last %v for a CPU, the driver's %v in all; of %d looks at the server %d found threads that run or would, %d threads that wait for a disk, %d all asleep although there was something to do",
		waited.Round(time.Microsecond), (clock() - i.since).Round(time.Microsecond), own.Round(time.Microsecond), i.looks, i.runnable, i.disk, i.asleep)
}

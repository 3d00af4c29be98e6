package virtiofs

import (
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
)

// lockable is a twin with one lock for all of it.
type lockable struct {
	*twin
	tries chan uint64 // owners that have found it taken

	mu    sync.Mutex
	owner uint64 // 0: free
}

func newLockable(t testing.TB, timeout time.Duration) *lockable {
	return &lockable{twin: newTwin(t, timeout), tries: make(chan uint64, 1<<16)}
}

// set has the lock be owner's.
func (b *lockable) set(owner uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.owner = owner
}

// onlyWhenTold has n requests rest for so long that nothing is tried again unless retryAll asks for it.
func (w *waitRoom) onlyWhenTold(n int) {
	const long = 24 * time.Hour
	w.mu.Lock()
	defer w.mu.Unlock()
	w.first, w.most = long, long
	for {
		settled := 0
		for _, t := range w.resting {
			if t.delay == long {
				settled++
			}
		}
		if settled == n {
			return
		}
		w.mu.Unlock()
		time.Sleep(time.Millisecond) // no test comes here often: the others rest no longer than lastDelay
		w.mu.Lock()
	}
}

func (b *lockable) Getlk(*fsbackend.Context, *fuseproto.LkIn, *fuseproto.LkOut) fsbackend.Errno {
	return unix.EINVAL
}

func (b *lockable) Setlk(_ *fsbackend.Context, in *fuseproto.LkIn) fsbackend.Errno {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case in.Lk.Typ == unix.F_UNLCK && b.owner == in.Owner:
		b.owner = 0
	case in.Lk.Typ == unix.F_UNLCK:
	case b.owner != 0 && b.owner != in.Owner:
		b.tries <- in.Owner
		return unix.EAGAIN
	default:
		b.owner = in.Owner
	}
	return fsbackend.OK
}

func setlk(op fuseproto.Opcode, node, owner uint64, typ uint32) call {
	return call{op: op, node: node, args: body(uint64(0), owner, uint64(0), uint64(1<<63-1), typ, uint32(owner), uint32(0), uint32(0))}
}

// waits has n owners from first on begin to wait on node, and returns the uniques of their requests.
func (r *rig) waits(b *lockable, node, first uint64, n int) map[uint64]uint64 {
	r.t.Helper()
	owners := make(map[uint64]uint64)
	for i := range uint64(n) {
		r.offer(request, setlk(fuseproto.FUSE_SETLKW, node, first+i, unix.F_WRLCK))
		owners[r.unique] = first + i
	}
	r.kick(request)
	// The first try is the worker's, the second a lane's; the third says that the request has rested.
	left := make(map[uint64]int)
	for _, owner := range owners {
		left[owner] = 3
	}
	for len(left) > 0 {
		select {
		case owner := <-b.tries:
			if left[owner]--; left[owner] <= 0 {
				delete(left, owner)
			}
		case <-time.After(patience):
			r.t.Fatalf("%d requests have not been tried", len(left))
		}
	}
	return owners
}

// A hundred wait for one lock without that anything else does, and get it one after the other as it is given back, although
// they are not tried of their own accord.
func TestManyWaitForALock(t *testing.T) {
	b := newLockable(t, time.Minute)
	r := newRigOf(t, 1024, b, Config{})
	node, fh := r.mount()
	r.must(request, setlk(fuseproto.FUSE_SETLKW, node, 1, unix.F_WRLCK))
	owners := r.waits(b, node, 2, 100)
	r.device.pool.room.onlyWhenTold(100)
	for range 20 {
		r.must(request, read(node, fh, 0, 4096))
		r.must(request, fsync(node, fh)) // runs in the pool
	}
	holder := uint64(1)
	for len(owners) > 0 {
		unlock := r.offer(request, setlk(fuseproto.FUSE_SETLK, node, holder, unix.F_UNLCK))
		r.kick(request)
		for _, p := range []reply{r.next(request), r.next(request)} {
			if p.errno != 0 {
				t.Fatalf("request %d is answered with %v", p.unique, p.errno)
			}
			if p.head != unlock {
				holder = owners[p.unique]
				delete(owners, p.unique)
			}
		}
	}
	r.must(request, setlk(fuseproto.FUSE_SETLK, node, holder, unix.F_UNLCK))
}

// Nothing tells us of a lock that another daemon gives back.
func TestLockGivenBackElsewhere(t *testing.T) {
	b := newLockable(t, time.Minute)
	r := newRig(t, b, Config{})
	node, _ := r.mount()
	b.set(1000)
	r.waits(b, node, 1, 3)
	b.set(0)
	if p := r.next(request); p.errno != 0 {
		t.Errorf("answered with %v", p.errno)
	}
}

// What is stopped does not wait for locks, and what has given up waiting gets none.
func TestStoppedQueueWaitsForNoLock(t *testing.T) {
	b := newLockable(t, time.Minute)
	r := newRig(t, b, Config{DrainTimeout: time.Hour})
	node, _ := r.mount()
	r.must(request, setlk(fuseproto.FUSE_SETLK, node, 1, unix.F_WRLCK))
	r.waits(b, node, 2, 10)
	_, err := r.fe.GetVringBase(request)
	r.check(err)
	for range 10 {
		if p := r.next(request); p.errno != unix.ENOLCK {
			t.Errorf("answered with %v, expected ENOLCK", p.errno)
		}
	}
	b.set(0)
	r.start(request, r.queues[request].kick.Int(), r.queues[request].call.Int())
	r.must(request, setlk(fuseproto.FUSE_SETLK, node, 1, unix.F_WRLCK))
}

// A session that ends takes those that wait with it, whatever the front-end does with its queues.
func TestSessionEndsWaits(t *testing.T) {
	b := newLockable(t, time.Minute)
	r := newRig(t, b, Config{})
	node, _ := r.mount()
	b.set(1000)
	r.waits(b, node, 1, 5)
	r.device.pool.room.onlyWhenTold(5)
	r.server.Reset()
	for range 5 {
		if p := r.next(request); p.errno != fuseserver.ErrNoSession {
			t.Errorf("answered with %v, expected %v", p.errno, fuseserver.ErrNoSession)
		}
	}
}

// The ring keeps room for the request that gives the lock back.
func TestWaitersLeaveRoomInTheRing(t *testing.T) {
	b := newLockable(t, time.Minute)
	r := newRigOf(t, 64, b, Config{})
	node, _ := r.mount()
	b.set(1000)
	r.waits(b, node, 1, 64/waitingShare)
	if p := r.do(request, setlk(fuseproto.FUSE_SETLKW, node, 100, unix.F_WRLCK)); p.errno != unix.ENOLCK {
		t.Errorf("one too many is answered with %v, expected ENOLCK", p.errno)
	}
}

// A front-end that sends INTERRUPT ends a wait with it.
func TestInterruptEndsWait(t *testing.T) {
	b := newLockable(t, time.Minute)
	r := newRig(t, b, Config{})
	node, _ := r.mount()
	b.set(1000)
	owners := r.waits(b, node, 1, 3)
	r.device.pool.room.onlyWhenTold(3)
	for unique := range owners {
		head := r.offer(hiprio, call{op: fuseproto.FUSE_INTERRUPT, args: body(unique), noReply: true})
		r.kick(hiprio)
		if p := r.next(hiprio); p.head != head || p.written != 0 {
			t.Errorf("INTERRUPT is answered: %+v", p)
		}
		if p := r.next(request); p.unique != unique || p.errno != unix.EINTR {
			t.Errorf("INTERRUPT of %d ends %d with %v", unique, p.unique, p.errno)
		}
	}
}

// The time that an isolated part has is for its calls. A lock may be another's for longer.
func TestLockWaitIsNoTimeout(t *testing.T) {
	b := newLockable(t, 200*time.Millisecond)
	b.wild.misbehave(&hook{enter: func(string, *fsbackend.Context) fsbackend.Errno { return fsbackend.OK }})
	r := newRig(t, b, Config{})
	r.mount()
	wild, _ := r.openWild()
	b.set(1000)
	r.waits(b, wild, 1, 1)
	for end := time.Now().Add(3 * b.wild.part.Timeout); time.Now().Before(end); {
		<-b.tries
	}
	b.set(0)
	if p := r.next(request); p.errno != 0 {
		t.Errorf("answered with %v", p.errno)
	}
	if n := b.wild.part.Stats.Timeouts.Load(); n != 0 {
		t.Errorf("%d timeouts", n)
	}
	if lanes := r.device.pool.isolated(); !slices.ContainsFunc(lanes, func(l *lane) bool { return l.part == &b.wild.part }) {
		t.Error("the part's calls are not made in its lane")
	}
}

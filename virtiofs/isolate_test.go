package virtiofs

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fsbackend"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/vhostuser"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
)

// fails sends n requests, many at once, and expects EIO for each.
func (r *rig) fails(n int, c call) {
	r.t.Helper()
	for n > 0 {
		some := min(n, 100)
		for range some {
			r.offer(request, c)
		}
		r.kick(request)
		for range some {
			if p := r.next(request); p.errno != unix.EIO || p.written != 16 {
				r.t.Fatalf("%v is answered with %v (used.len %d), expected EIO", c.op, p.errno, p.written)
			}
		}
		n -= some
	}
}

// text returns what has been logged since the last time.
func (l *testLog) text() string {
	var b strings.Builder
	for {
		select {
		case line := <-l.lines:
			b.WriteString(line)
		default:
			return b.String()
		}
	}
}

func TestPanicsOfAPart(t *testing.T) {
	l, log := newTestLog()
	w := newTwin(t, time.Minute)
	r := newRig(t, w, Config{Log: log})
	node, fh := r.mount()
	wild, wfh := r.openWild()
	w.wild.misbehave(&hook{enter: func(string, *fsbackend.Context) fsbackend.Errno { panic("a bug") }})
	for _, c := range []call{lookupWild(), getattr(wild), read(wild, wfh, 0, 4096), fsync(wild, wfh), write(wild, wfh, make([]byte, 100))} {
		r.fails(1, c)
		r.must(request, read(node, fh, 0, 4096))
	}
	r.fails(10000, getattr(wild))
	r.must(request, read(node, fh, 0, 4096))
	if n := w.wild.part.Stats.Panics.Load(); n != 10005 {
		t.Errorf("%d panics counted, expected 10005", n)
	}
	text := l.text()
	if n := strings.Count(text, "\n"); n == 0 || n > 10 {
		t.Errorf("%d lines logged for 10005 panics", n)
	}
	if !strings.Contains(text, "extension=wildext path=/wild opcode=FUSE_LOOKUP panic=\"a bug\"") {
		t.Errorf("the log does not say whose bug it is:\n%s", text)
	}
	w.wild.behave()
	r.must(request, read(wild, wfh, 0, 4096))
}

func TestErrorStormOfAPart(t *testing.T) {
	l, log := newTestLog()
	w := newTwin(t, time.Minute)
	r := newRig(t, w, Config{Log: log})
	node, _ := r.mount()
	wild, _ := r.openWild()
	w.wild.misbehave(&hook{enter: func(string, *fsbackend.Context) fsbackend.Errno { return unix.EIO }})
	r.fails(3000, getattr(wild))
	r.must(request, getattr(node))
	if n := w.wild.part.Stats.Errors.Load(); n != 3000 {
		t.Errorf("%d errors counted, expected 3000", n)
	}
	if text := l.text(); strings.Count(text, "\n") > 10 || !strings.Contains(text, "extension=wildext") {
		t.Errorf("logged:\n%s", text)
	}
}

// storm has n calls of the wild half outstanding on the request queue.
func (r *rig) storm(n int, wild, wfh uint64) {
	r.t.Helper()
	calls := []call{getattr(wild), read(wild, wfh, 0, 512), lookupWild(), fsync(wild, wfh)}
	for i := range n {
		r.offer(request, calls[i%len(calls)])
	}
	r.kick(request)
}

// A part that hangs takes nothing that another needs, however many of its requests are outstanding, and for ever.
func TestHangingPartHoldsNobodyUp(t *testing.T) {
	w := newTwin(t, 0)
	r := newRigOf(t, 1024, w, Config{})
	node, fh := r.mount()
	wild, wfh := r.openWild()
	h := w.hang(t)
	const n = 600
	r.storm(n, wild, wfh)
	await(t, h.entered, defaultPoolThreads, "calls hang")
	for range 300 {
		r.must(request, read(node, fh, 0, 4096))
		r.must(request, fsync(node, fh)) // on the shared threads
	}
	// Neither do its FORGETs hold hiprio up, nor those that come in one request with them.
	list := body(uint32(3), uint32(0), wild, uint64(0), node, uint64(1), wild, uint64(1))
	for range 300 {
		r.do(hiprio, forget(wild, 1))
		r.do(hiprio, call{op: fuseproto.FUSE_BATCH_FORGET, args: list, noReply: true})
	}
	if p := r.do(request, getattr(node)); p.errno != unix.ESTALE {
		t.Errorf("after the FORGET of a node: %v, expected ESTALE", p.errno)
	}
	if left := len(h.left); left > 0 {
		t.Errorf("%d calls have come back from where they hang", left)
	}
	h.release()
	ok := 0
	for range n {
		switch p := r.next(request); p.errno {
		case 0:
			ok++
		case unix.ESTALE: // FORGETs have overtaken it
		default:
			t.Fatalf("after the hang: %v", p.errno)
		}
	}
	if ok == 0 {
		t.Error("no request was served after the hang")
	}
}

func TestTimeouts(t *testing.T) {
	l, log := newTestLog()
	w := newTwin(t, 300*time.Millisecond)
	r := newRigOf(t, 1024, w, Config{Log: log})
	node, fh := r.mount()
	wild, wfh := r.openWild()
	h := w.hang(t)
	const n = 600
	r.storm(n, wild, wfh)
	await(t, h.entered, defaultPoolThreads, "calls hang")
	others := make(map[uint16]reply)
	for len(others) < n {
		if p := r.among(request, getattr(node), others); p.errno != 0 {
			t.Fatalf("GETATTR of the other part: %v", p.errno)
		}
	}
	r.must(request, read(node, fh, 0, 4096))
	for _, p := range others {
		if p.errno != unix.EIO || p.written != 16 {
			t.Fatalf("a request that hangs is answered %v (used.len %d), expected EIO", p.errno, p.written)
		}
	}
	// Who comes when all threads are known to hang is not even waited for.
	timeouts, refused := w.wild.part.Stats.Timeouts.Load(), w.wild.part.Stats.Refused.Load()
	if timeouts < defaultPoolThreads || timeouts+refused != n {
		t.Errorf("%d calls given up and %d refused, expected %d in all", timeouts, refused, n)
	}
	select {
	case <-await(t, h.cancels, 1, "contexts"):
	default:
		t.Error("a call that was given up is not told so")
	}
	// All of its threads hang: there is nothing to wait for, once that has been noticed.
	r.fails(1, getattr(wild))
	before := w.wild.part.Stats.Refused.Load()
	r.fails(50, getattr(wild))
	if got := w.wild.part.Stats.Refused.Load() - before; got != 50 {
		t.Errorf("%d requests refused, expected 50", got)
	}
	text := l.text()
	if strings.Count(text, "\n") > 10 || !strings.Contains(text, "extension=wildext path=/wild opcode=FUSE_") {
		t.Errorf("logged:\n%s", text)
	}
	if len(h.left) > 0 {
		t.Error("calls have come back from where they hang")
	}

	// The hang ends, and all is as before: the threads, and the count of lookups, of which the guest has one.
	calls := make(chan string, 1<<16)
	w.wild.misbehave(&hook{enter: func(string, *fsbackend.Context) fsbackend.Errno { return 0 }, leave: func(op string) { calls <- op }})
	h.release()
	lookups := 0
	for range defaultPoolThreads {
		if await(t, h.left, 1, "calls come back") == "Lookup" {
			lookups++
		}
	}
	for range lookups {
		if op := await(t, calls, 1, "lookups taken back"); op != "Forget" {
			t.Errorf("%s is called, expected Forget", op)
		}
	}
	for served := 0; served < 200; {
		if r.do(request, read(wild, wfh, 0, 4096)).errno == 0 {
			served++ // refused until the first thread is back
		}
	}
	r.do(hiprio, forget(wild, 1))
	for await(t, calls, 1, "FORGETs") != "Forget" {
	}
	w.wild.behave()
	if p := r.do(request, getattr(wild)); p.errno != unix.ESTALE {
		t.Errorf("%v after the guest's one FORGET, expected ESTALE: lookups that it never saw were counted", p.errno)
	}
	if lookups == 0 {
		t.Error("no LOOKUP has hung")
	}
}

// What a call does after it was given up does not reach the guest, whose memory may be another's by then.
func TestLateMovesOfData(t *testing.T) {
	w := newTwin(t, 50*time.Millisecond)
	r := newRig(t, w, Config{})
	r.mount()
	wild, wfh := r.openWild()
	data := bytes.Repeat([]byte("before"), 100)
	r.must(request, write(wild, wfh, data))
	h := w.hang(t)
	head := r.offer(request, read(wild, wfh, 0, 64<<10))
	r.offer(request, write(wild, wfh, make([]byte, 600)))
	r.kick(request)
	await(t, h.entered, 2, "calls hang")
	for range 2 {
		if p := r.next(request); p.errno != unix.EIO {
			t.Fatalf("answered %v, expected EIO", p.errno)
		}
	}
	chain := r.queues[request].chains[head]
	reused := bytes.Repeat([]byte{0x5a}, 64<<10)
	for _, b := range chain {
		if b.Write {
			r.mem.Write(b.Addr, reused[:b.Len])
		}
	}
	h.release()
	await(t, h.left, 2, "calls come back")
	w.wild.behave()
	if p := r.must(request, read(wild, wfh, 0, len(data))); !bytes.Equal(p.data, data) {
		t.Error("a WRITE that was given up took the guest's data later")
	}
	for _, b := range chain {
		if b.Write && !bytes.Equal(r.mem.Bytes(b.Addr, uint64(b.Len)), reused[:b.Len]) {
			t.Error("a READ that was given up changed guest memory later")
		}
	}
}

// REM_MEM_REG waits for requests that hold the memory, but no longer than for their answers.
func TestGivenUpRequestsHoldNoMemory(t *testing.T) {
	w := newTwin(t, 200*time.Millisecond)
	r := newRig(t, w, Config{DrainTimeout: patience})
	node, _ := r.mount()
	wild, wfh := r.openWild()
	extra := vhostuser.MemRegion{GuestPhysAddr: 1 << 40, Size: 4096, UserAddr: 1 << 45}
	r.check(r.fe.AddMemReg(vhosttest.Region{MemRegion: extra, FD: r.mem.FD()}))
	h := w.hang(t)
	r.offer(request, read(wild, wfh, 0, 4096))
	r.kick(request)
	await(t, h.entered, 1, "calls hang")
	r.check(r.fe.RemMemReg(extra))
	if p := r.next(request); p.errno != unix.EIO {
		t.Errorf("answered %v, expected EIO", p.errno)
	}
	r.must(request, getattr(node))
}

// Guests come and go while calls of an earlier one hang, and then those end.
func TestRebootWhileAPartHangs(t *testing.T) {
	w := newTwin(t, 0)
	r := newRig(t, w, Config{DrainTimeout: 300 * time.Millisecond})
	r.mount()
	wild, wfh := r.openWild()
	h := w.hang(t)
	for range 3 {
		r.storm(40, wild, wfh)
		refused := make(map[uint16]reply)     // later guests' requests may be: no thread is left for them
		r.among(request, getattr(1), refused) // and so they have been fetched
		for q := range r.queues {
			_, err := r.fe.GetVringBase(uint32(q))
			r.check(err)
		}
		for range 40 - len(refused) {
			if p := r.next(request); p.errno != unix.EIO {
				t.Fatalf("answered %v when the queue was stopped, expected EIO", p.errno)
			}
		}
		r.check(r.fe.Tell(vhostuser.VHOST_USER_RESET_DEVICE, nil))
		r.check(r.fe.SetFeatures(1<<32 | 1<<30 | 1<<29 | 1<<28))
		r.startRings()
		node, fh := r.mount()
		r.must(request, read(node, fh, 0, 4096))
		r.must(request, fsync(node, fh))
	}
	await(t, h.entered, defaultPoolThreads, "calls hang")
	_ = r.disconnect()
	r.connect()
	node, _ := r.mount()
	if n := r.device.Stats().Abandoned; n != 0 {
		t.Errorf("%d requests were given up without an answer", n)
	}
	w.wild.behave()
	h.release()
	await(t, h.left, defaultPoolThreads, "calls come back")
	r.must(request, getattr(node))
	wild, wfh = r.openWild()
	r.must(request, read(wild, wfh, 0, 4096))
}

// Without a timeout, a part that hangs fills its lane. Others wait for it no longer than it may be merely slow.
func TestFullLane(t *testing.T) {
	l, log := newTestLog()
	w := newTwin(t, 0)
	r := newRigOf(t, 2048, w, Config{Log: log})
	node, fh := r.mount()
	wild, wfh := r.openWild()
	h := w.hang(t)
	const beyond = 100
	r.storm(maxPartTasks+beyond, wild, wfh)
	await(t, h.entered, defaultPoolThreads, "calls hang")
	others := make(map[uint16]reply)
	if p := r.among(request, read(node, fh, 0, 4096), others); p.errno != 0 {
		t.Errorf("READ of the other part: %v", p.errno)
	}
	if n := w.wild.part.Stats.Refused.Load(); len(others) != beyond || n != beyond {
		t.Errorf("%d requests refused, %d answered, expected %d", n, len(others), beyond)
	}
	if text := l.text(); !strings.Contains(text, "extension=wildext") {
		t.Errorf("logged:\n%s", text)
	}
	r.fails(1, getattr(wild))
	h.release()
	for range maxPartTasks {
		if p := r.next(request); p.errno != 0 {
			t.Fatalf("after the hang: %v", p.errno)
		}
	}
	r.must(request, getattr(wild))
}

// A RELEASE has nobody who waits for it, but a handle that does: it is made when the hang is over.
func TestReleasesAreOwed(t *testing.T) {
	w := newTwin(t, 50*time.Millisecond)
	r := newRig(t, w, Config{PoolThreads: 2})
	r.mount()
	wild, wfh := r.openWild()
	h := w.hang(t)
	r.fails(2, getattr(wild))
	r.fails(1, call{op: fuseproto.FUSE_RELEASE, node: wild, args: body(wfh, uint32(0), uint32(0), uint64(0))})
	if got := w.wild.part.Stats.Refused.Load(); got != 0 {
		t.Errorf("%d requests refused", got)
	}
	h.release()
	for await(t, h.left, 1, "calls come back") != "Release" {
	}
}

func TestCloseNamesThePartThatHangs(t *testing.T) {
	w := newTwin(t, 20*time.Millisecond)
	d, _ := newDevice(t, w, Config{DrainTimeout: 20 * time.Millisecond})
	r := &rig{t: t, num: 256, device: d}
	r.connect()
	r.mount()
	wild, _ := r.openWild()
	h := w.hang(t)
	r.fails(1, getattr(wild))
	_ = r.disconnect()
	if err := d.Close(); err == nil || !strings.Contains(err.Error(), `extension "wildext" at /wild`) {
		t.Errorf("Close: %v", err)
	}
	h.release()
	await(t, h.left, 1, "calls come back")
	goleak.VerifyNone(t)
}

func TestIsolatedRequestsDoNotAllocate(t *testing.T) {
	r := newRig(t, newTwin(t, time.Minute), Config{})
	r.mount()
	wild, wfh := r.openWild()
	clear(r.queues[request].chains)
	r.must(request, read(wild, wfh, 0, 4096))
	if n := r.allocs(request); n != 0 {
		t.Errorf("%v allocations for each request, expected none", n)
	}
}

package frontend

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// newStubbed returns a front-end that is connected to nobody: the test is the device.
func newStubbed(t testing.TB, c Config) *FrontEnd {
	t.Helper()
	f := &FrontEnd{config: c.withDefaults(), gone: make(chan struct{})}
	var err error
	if f.mem, err = vqtest.NewMemory([]guestmem.RegionConfig{{Size: 64 << 20}}); err != nil {
		t.Fatal(err)
	}
	for i := range 1 + f.config.Queues {
		r, err := newRing(i, f.config.RingSize, true, f.mem)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(r.close)
		if i == 0 {
			f.hiprio = newHiprio(f, r)
		} else {
			f.queues = append(f.queues, newQueue(f, r))
		}
	}
	t.Cleanup(func() { _ = f.mem.Close() })
	return f
}

// use is the device: it takes the next request of r, which m is, and has answered it with n bytes and errno.
func use(r *ring, m *message, n int, errno int32) {
	done := uint16(atomic.LoadUint32(r.usedIdx) >> 16)
	*as[fuseproto.OutHeader](m.out) = fuseproto.OutHeader{Length: uint32(outHeader + n), Status: -errno, Unique: m.header().Unique}
	r.used[done&(r.num-1)] = usedElem{id: uint32(r.avail[done&(r.num-1)]), len: uint32(outHeader + n)}
	atomic.StoreUint32(r.usedIdx, uint32(done+1)<<16)
}

func TestRingStates(t *testing.T) {
	f := newStubbed(t, Config{RingSize: 8})
	q := f.queues[0]
	m := q.caller(statfsShape).m
	setAvailEvent := func(v uint16) { atomic.StoreUint32(q.ring.availEvent, uint32(v)) }
	offer := func(kicks uint64) {
		t.Helper()
		if err := q.post(0, m); err != nil {
			t.Fatal(err)
		}
		if q.ring.kicks != kicks {
			t.Errorf("%d kicks after %d requests with avail_event %d, expected %d", q.ring.kicks, q.ring.offered, load16(q.ring.availEvent), kicks)
		}
	}
	expect := func(want string) {
		t.Helper()
		if got := q.ring.state(1); !strings.Contains(got, want) {
			t.Errorf("%q, expected %q", got, want)
		}
	}

	offer(1) // avail_event is 0: the first is wanted
	expect("avail idx 1, used idx 0, reaped 0, avail_event 0, used_event 32768, 1 under way, 1 kicks (unread: true), 0 notifications; the server has not read its kick")
	if n, err := readEvent(q.ring.kick.Int(), 0); n != 1 || err != nil {
		t.Fatalf("the kick eventfd has %d, %v", n, err)
	}
	expect("a lost kick")
	setAvailEvent(1)
	expect("is slow")
	use(q.ring, m, 80, 0)
	expect("a lost notification")
	if !q.ring.arm() || load16(q.ring.usedEvent) != 0 {
		t.Errorf("arm sees nothing, or has set used_event to %d", load16(q.ring.usedEvent))
	}
	if head, written := q.ring.take(); head != 0 || written != outHeader+80 {
		t.Errorf("took head %d with %d bytes", head, written)
	}
	if q.ring.arm() || load16(q.ring.usedEvent) != 1 {
		t.Errorf("arm sees an answer, or has set used_event to %d", load16(q.ring.usedEvent))
	}
	offer(2) // avail_event was 1
	offer(2) // and not 2
	setAvailEvent(3)
	offer(3)

	// With every number once, used_event is never where the used index comes next.
	q.ring.suppress()
	for range 1 << 16 {
		if used := uint16(atomic.LoadUint32(q.ring.usedIdx) >> 16); load16(q.ring.usedEvent) == used {
			t.Fatalf("used_event is %d while polling, and so is the used index", used)
		}
		use(q.ring, m, 80, 0)
		q.ring.take()
	}
}

func TestRingWithoutEventIdx(t *testing.T) {
	f := newStubbed(t, Config{RingSize: 8})
	q := f.queues[0]
	q.ring.event = false
	m := q.caller(statfsShape).m
	for i, want := range []uint64{1, 1, 2} {
		atomic.StoreUint32(q.ring.usedIdx, uint32(i%2)) // VIRTQ_USED_F_NO_NOTIFY
		if err := q.post(0, m); err != nil || q.ring.kicks != want {
			t.Errorf("%d kicks after request %d, %v, expected %d", q.ring.kicks, i, err, want)
		}
	}
	q.ring.suppress()
	if got := atomic.LoadUint32(q.ring.availIdx); got != 3<<16|virtqueue.VIRTQ_AVAIL_F_NO_INTERRUPT {
		t.Errorf("flags and index are %#x, expected no interrupt and 3", got)
	}
	if q.ring.arm() || atomic.LoadUint32(q.ring.availIdx) != 3<<16 {
		t.Errorf("flags and index are %#x, expected interrupts and 3", atomic.LoadUint32(q.ring.availIdx))
	}
}

// TestBadDevice has a device do to the rings what none should.
func TestBadDevice(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(r *ring, m *message)
		want string
	}{
		{"used index jumps", func(r *ring, _ *message) { atomic.StoreUint32(r.usedIdx, 2<<16) }, "by 2 with 1 requests under way"},
		{"used index goes back", func(r *ring, _ *message) { atomic.StoreUint32(r.usedIdx, 0xffff<<16) }, "by 65535 with 1"},
		{"head of nobody", func(r *ring, m *message) { use(r, m, 80, 0); r.used[0].id = 1 }, "used head 1 of queue 1"},
		{"answer to another", func(r *ring, m *message) { use(r, m, 80, 0); as[fuseproto.OutHeader](m.out).Unique++ }, "answer is to request"},
		{"length of another", func(r *ring, m *message) { use(r, m, 80, 0); r.used[0].len++ }, "96 bytes by its header and 97 by the ring"},
		{"longer than the room", func(r *ring, m *message) { use(r, m, 88, 0) }, "answer of 104 bytes"},
		{"short", func(r *ring, m *message) { use(r, m, 72, 0) }, "answer of 72 bytes, expected 80"},
		{"no errno", func(r *ring, m *message) { use(r, m, 0, -5) }, "answer has error 5"},
		{"errno too large", func(r *ring, m *message) { use(r, m, 0, 5000) }, "answer has error -5000"},
		{"errno", func(r *ring, m *message) { use(r, m, 0, 12) }, "FUSE_STATFS of node 1 failed: cannot allocate memory (errno 12)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newStubbed(t, Config{RingSize: 8, Wait: Poll})
			q := f.queues[0]
			w, _ := Find("statfs")
			var stop, halt atomic.Bool
			if err := q.prepare(w, 1, 1, &stop, &halt); err != nil {
				t.Fatal(err)
			}
			m := q.slots[0].messages[0]
			m.header().Unique = q.unique + 2 // as it will be sent
			tt.do(q.ring, m)
			if err := q.loop(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, expected %q", err, tt.want)
			}
		})
	}
}

// stepper answers what q has under way and has it go on.
func stepper(tb testing.TB, w Workload, n int) (q *queue, step func()) {
	tb.Helper()
	f := newStubbed(tb, Config{Depth: 16, Wait: Poll})
	q = f.queues[0]
	var stop, halt atomic.Bool
	if err := q.prepare(w, 16, 1<<63, &stop, &halt); err != nil {
		tb.Fatal(err)
	}
	for i := range q.slots {
		if err := q.begin(&q.slots[i], clock()); err != nil {
			tb.Fatal(err)
		}
	}
	return q, func() {
		for range 16 {
			done := uint16(atomic.LoadUint32(q.ring.usedIdx) >> 16)
			use(q.ring, q.slots[q.ring.avail[done&(q.ring.num-1)]].message(), n, 0)
		}
		now := clock()
		for range q.ring.waiting() {
			head, written := q.ring.take()
			if err := q.answer(&q.slots[head], written, now); err != nil {
				tb.Fatal(err)
			}
		}
	}
}

// reads is a workload of READs that needs no server to prepare.
type reads struct{ readRandom }

func (reads) prepare(*queue) error { return nil }
func (reads) finish(*queue) error  { return nil }

func (p *reads) begin(q *queue, s *slot) {
	p.readRandom.begin(q, s)
	for i := range len(s.message().data) / vqtest.Page {
		w := words(s.message().page(i))
		w[0], w[len(w)-1] = dataWord(s.offset+uint64(i*vqtest.Page)), dataWord(s.offset+uint64((i+1)*vqtest.Page)-8)
	}
	p.readRandom.reads = 0 // never a sample: the device has left the rest as it was
}

// statfses is statfs with an answer that is right already.
type statfses struct{ statfs }

func (p statfses) begin(q *queue, s *slot) {
	*as[fuseproto.StatfsOut](s.message().out[outHeader:]) = fuseproto.StatfsOut{Blocks: 1, Bsize: 4096}
	p.statfs.begin(q, s)
}

var stepped = []struct {
	name string
	w    Workload
	n    int
}{
	{"statfs", Workload{shapes: []shape{statfsShape}, program: newProgram[statfses]}, 80},
	{"read4k", Workload{shapes: []shape{readShape(4096)}, program: newProgram[reads]}, 4096},
	{"read128k", Workload{shapes: []shape{readShape(128 << 10)}, program: newProgram[reads]}, 128 << 10},
}

func TestStepsDoNotAllocate(t *testing.T) {
	for _, tt := range stepped {
		q, step := stepper(t, tt.w, tt.n)
		if n := testing.AllocsPerRun(100, step); n != 0 {
			t.Errorf("%s: 16 requests allocate %v times", tt.name, n)
		}
		if q.ops < 1600 || q.underWay != 16 {
			t.Errorf("%s: %d operations, %d under way", tt.name, q.ops, q.underWay)
		}
	}
	f := newStubbed(t, Config{})
	forgets := []forget{{Nodeid: 2, Nlookup: 1}, {Nodeid: 3, Nlookup: 1}}
	h := f.hiprio
	if n := testing.AllocsPerRun(100, func() {
		for i := range forgets {
			if err := h.send(forgets[:i+1]); err != nil {
				t.Fatal(err)
			}
			done := uint16(atomic.LoadUint32(h.ring.usedIdx) >> 16)
			h.ring.used[done&(h.ring.num-1)] = usedElem{id: uint32(h.ring.avail[done&(h.ring.num-1)])}
			atomic.StoreUint32(h.ring.usedIdx, uint32(done+1)<<16)
		}
	}); n != 0 {
		t.Errorf("two FORGETs allocate %v times", n)
	}
}

// BenchmarkSteps is what the front-end costs for each request: offer, take, check, with next to no device.
func BenchmarkSteps(b *testing.B) {
	for _, bb := range stepped {
		b.Run(bb.name, func(b *testing.B) {
			_, step := stepper(b, bb.w, bb.n)
			b.ReportAllocs()
			for range b.N/16 + 1 {
				step()
			}
		})
	}
}

func TestHistogram(t *testing.T) {
	var h histogram
	if h.quantile(0.5) != 0 {
		t.Error("the median of nothing is not 0")
	}
	for v := time.Duration(1); v <= 100_000; v++ {
		h.add(v)
	}
	for _, tt := range []struct {
		p    float64
		want time.Duration
	}{{0, 1}, {0.5, 50_000}, {0.99, 99_000}, {0.999, 99_900}, {1, 100_000}} {
		if got := h.quantile(tt.p); got < tt.want || float64(got) > 1.016*float64(tt.want)+1 {
			t.Errorf("quantile %v of 1 to 100,000 is %d, expected %d to within 1.6 %%", tt.p, got, tt.want)
		}
	}
	var both histogram
	both.merge(&h)
	both.merge(&h)
	if both.quantile(0.5) != h.quantile(0.5) {
		t.Error("the same twice has another median")
	}
	// Every value is in a bucket whose bounds hold it, up to the largest.
	for v := uint64(1); v < 1<<62; v = v*3 + 1 {
		i := bucket(v)
		if uint64(upper(i)) < v || i > 0 && uint64(upper(i-1)) >= v {
			t.Fatalf("%d is in bucket %d from %d to %d", v, i, upper(i-1)+1, upper(i))
		}
	}
	h.add(-1)
	h.add(1<<63 - 1)
}

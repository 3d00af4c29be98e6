package virtqueue_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/internal/sys"
	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

const (
	indirectDesc = virtqueue.VIRTIO_RING_F_INDIRECT_DESC
	eventIdx     = virtqueue.VIRTIO_RING_F_EVENT_IDX
	usual        = virtqueue.VIRTIO_F_VERSION_1 | indirectDesc | eventIdx
)

// pair is a driver and a queue on the same ring.
type pair struct {
	*vqtest.Driver
	q   *virtqueue.Queue
	mem *guestmem.Memory
	m   *guestmem.Map
	c   virtqueue.Chain
}

func newPair(tb testing.TB, c vqtest.Config) *pair {
	tb.Helper()
	d, err := vqtest.New(c)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = d.Close() })
	mem, err := d.Mem.Map()
	if err != nil {
		tb.Fatal(err)
	}
	p := &pair{Driver: d, mem: mem, m: mem.Acquire()}
	tb.Cleanup(func() {
		p.m.Release()
		mem.Clear()
	})
	if p.q, err = virtqueue.New(d.QueueConfig()); err != nil {
		tb.Fatal(err)
	}
	if err := p.q.Bind(p.m); err != nil {
		tb.Fatal(err)
	}
	return p
}

// pop returns the next head, or fails.
func (p *pair) pop(tb testing.TB) uint16 {
	tb.Helper()
	ok, err := p.q.Pop(&p.c)
	if err != nil || !ok {
		tb.Fatalf("Pop = %v, %v, expected a chain", ok, err)
	}
	return p.c.Head
}

func (p *pair) popNone(tb testing.TB) {
	tb.Helper()
	if ok, err := p.q.Pop(&p.c); ok || err != nil {
		tb.Fatalf("Pop = %v, %v, expected nothing", ok, err)
	}
}

func (p *pair) push(tb testing.TB, head uint16, written uint32) {
	tb.Helper()
	if err := p.q.Push(head, written); err != nil {
		tb.Fatal(err)
	}
}

func (p *pair) publish(tb testing.TB) bool {
	tb.Helper()
	notify, err := p.q.Publish()
	if err != nil {
		tb.Fatal(err)
	}
	return notify
}

func (p *pair) arm(tb testing.TB) bool {
	tb.Helper()
	pending, err := p.q.Arm()
	if err != nil {
		tb.Fatal(err)
	}
	return pending
}

func gather(iov []unix.Iovec) []byte {
	var b []byte
	for i := range iov {
		b = append(b, sys.Bytes(&iov[i])...)
	}
	return b
}

func wantRingError(tb testing.TB, err error, r virtqueue.Reason) {
	tb.Helper()
	var re *virtqueue.RingError
	if !errors.As(err, &re) || re.Reason != r {
		tb.Errorf("error is %v, expected a RingError: %v", err, r)
	}
}

func TestRequestReply(t *testing.T) {
	header, args, data := bytes.Repeat([]byte("h"), 40), bytes.Repeat([]byte("a"), 40), bytes.Repeat([]byte("d"), 5000)
	for _, num := range []uint16{8, 256, 32768} {
		for _, off2 := range []bool{false, true} {
			for _, how := range []string{"direct", "indirect", "mixed"} {
				t.Run(fmt.Sprintf("%d/%v/%s", num, off2, how), func(t *testing.T) {
					p := newPair(t, vqtest.Config{Num: num, Features: usual, AvailOff2: off2, Base: 0xfffe})
					req := p.Mem.Build(vqtest.Request{Header: header, Args: args, Data: data, OutArgs: 8, OutData: 4096})
					for i := range 5 { // across 2^16
						var head uint16
						var ok bool
						switch how {
						case "direct":
							head, ok = p.Offer(req)
						case "indirect":
							head, ok = p.OfferIndirect(req)
						case "mixed":
							head, ok = p.OfferMixed(req[:2], req[2:])
						}
						if !ok {
							t.Fatal("no descriptors left")
						}
						p.popNone(t) // not shown yet
						p.Kick()
						if got := p.pop(t); got != head {
							t.Errorf("head is %d, expected %d", got, head)
						}
						if got, want := gather(p.c.Readable), slices.Concat(header, args, data); !bytes.Equal(got, want) || p.c.ReadableLen != uint64(len(want)) {
							t.Errorf("readable are %d bytes (ReadableLen %d), expected the request's %d", len(got), p.c.ReadableLen, len(want))
						}
						reply := bytes.Repeat([]byte{'r', byte(i)}, (16+8+4096)/2)
						if p.c.WritableLen != uint64(len(reply)) {
							t.Fatalf("WritableLen is %d, expected %d", p.c.WritableLen, len(reply))
						}
						rest := reply
						for i := range p.c.Writable {
							rest = rest[copy(sys.Bytes(&p.c.Writable[i]), rest):]
						}
						p.push(t, head, uint32(len(reply)))
						if _, _, ok := p.Used(); ok {
							t.Error("completion is visible before Publish")
						}
						p.publish(t)
						gotHead, n, ok := p.Used()
						if !ok || gotHead != head || !bytes.Equal(p.Mem.Reply(req, n), reply) {
							t.Errorf("used head %d, %d bytes, %v, expected head %d and the reply", gotHead, n, ok, head)
						}
						p.popNone(t)
						if got, want := p.q.Base(), uint16(0xfffe+i+1); got != want {
							t.Errorf("Base is %d, expected %d", got, want)
						}
					}
				})
			}
		}
	}
}

func TestHostile(t *testing.T) {
	for _, num := range []uint16{1, 2, 128, 32768} {
		for _, c := range vqtest.Hostile {
			t.Run(fmt.Sprintf("%d/%s", num, c.Name), func(t *testing.T) {
				features := uint64(usual)&^c.Without | c.Features
				p := newPair(t, vqtest.Config{Num: num, Features: features, Base: 0xffff})
				heads := c.Set(p.Driver)
				var err error
				var ok bool
				for _, want := range heads {
					ok, err = p.q.Pop(&p.c)
					switch c.Outcome {
					case vqtest.ChainError:
						var ce *virtqueue.ChainError
						if ok || !errors.As(err, &ce) || ce.Head != want || ce.Reason != c.Reason {
							t.Fatalf("Pop = %v, %v, expected a ChainError of head %d: %v", ok, err, want, c.Reason)
						}
						if len(p.c.Readable)+len(p.c.Writable) != 0 || p.c.ReadableLen+p.c.WritableLen != 0 {
							t.Errorf("refused chain leaves %+v", p.c)
						}
					case vqtest.Legal, vqtest.RingError:
						if !ok || err != nil || p.c.Head != want {
							t.Fatalf("Pop = %v, %v, head %d, expected head %d", ok, err, p.c.Head, want)
						}
						checkChain(t, p.m, p.Mem.Regions(), &p.c)
					}
					p.push(t, want, 0)
				}
				if len(heads) > 0 && !p.publish(t) {
					t.Error("first Publish does not notify")
				}
				if c.Outcome == vqtest.RingError {
					base := p.q.Base()
					_, err := p.q.Pop(&p.c)
					wantRingError(t, err, c.Reason)
					// What came before can still be completed.
					if err := p.q.Push(0, 0); err != nil {
						t.Errorf("Push on a ring that fetches no more: %v", err)
					}
					used := p.UsedIdx()
					if _, err = p.q.Publish(); err != nil || p.UsedIdx() != used+1 {
						t.Errorf("Publish on a ring that fetches no more: %v, and used.idx went from %d to %d", err, used, p.UsedIdx())
					}
					_, err = p.q.Arm()
					wantRingError(t, err, c.Reason)
					_, err = p.q.Pending()
					wantRingError(t, err, c.Reason)
					wantRingError(t, p.q.Disarm(), c.Reason)
					if p.q.Base() != base {
						t.Errorf("Base moved from %d to %d", base, p.q.Base())
					}
					return
				}
				for _, want := range heads {
					if head, n, ok := p.Used(); !ok || head != want || n != 0 {
						t.Errorf("used head %d, %d bytes, %v, expected head %d with 0", head, n, ok, want)
					}
				}
				// The ring goes on.
				p.chainAfter(t)
			})
		}
	}
}

// chainAfter sends one legal chain through.
func (p *pair) chainAfter(t *testing.T) {
	t.Helper()
	head, ok := p.Offer(vqtest.Chain{{Addr: vqtest.Page, Len: 40}})
	if !ok {
		t.Fatal("no descriptors left")
	}
	p.Kick()
	if got := p.pop(t); got != head || p.c.ReadableLen != 40 || len(p.c.Writable) != 0 {
		t.Errorf("popped %+v, expected head %d with 40 readable bytes", p.c, head)
	}
	p.popNone(t)
}

func TestMoreInFlightThanDescriptors(t *testing.T) {
	p := newPair(t, vqtest.Config{Num: 4, Features: usual})
	req := vqtest.Chain{{Addr: vqtest.Page, Len: 40}}
	if _, ok := p.Offer(req); !ok {
		t.Fatal("no descriptors left")
	}
	p.Kick()
	head := p.pop(t)
	for range 3 {
		p.OfferHead(head)
		p.Kick()
		p.pop(t)
	}
	p.push(t, head, 0)
	p.OfferHead(head)
	p.Kick()
	p.pop(t) // four again
	p.popNone(t)
	p.OfferHead(head)
	p.Kick()
	_, err := p.q.Pop(&p.c)
	wantRingError(t, err, virtqueue.ReasonInFlight)
}

func TestPublish(t *testing.T) {
	chain := vqtest.Chain{{Addr: vqtest.Page, Len: 40}}
	for _, features := range []uint64{0, eventIdx} {
		t.Run(fmt.Sprintf("%#x", features), func(t *testing.T) {
			p := newPair(t, vqtest.Config{Features: features, Num: 8, Base: 0xfffc})
			serve := func(n int) bool {
				for range n {
					if _, ok := p.Offer(chain); !ok {
						t.Fatal("no descriptors left")
					}
				}
				p.Kick()
				for range n {
					p.push(t, p.pop(t), 0)
				}
				return p.publish(t)
			}
			reap := func() {
				for _, _, ok := p.Used(); ok; _, _, ok = p.Used() {
				}
			}
			if p.publish(t) {
				t.Error("notifies with nothing staged")
			}
			p.DisableInterrupt()
			if !serve(1) {
				t.Error("first Publish does not notify")
			}
			reap()
			if serve(1) {
				t.Error("notifies a driver that wants none")
			}
			reap()
			if p.EnableInterrupt() {
				t.Error("used element is pending, expected none")
			}
			if !serve(3) {
				t.Error("does not notify for a batch that passes 2^16")
			}
			if p.publish(t) {
				t.Error("notifies again with nothing staged")
			}
			if features == eventIdx && serve(1) {
				t.Error("notifies a driver that has not reaped the element it was notified of")
			}
			reap()
			if features == eventIdx {
				p.SetUsedEvent(p.UsedIdx() + 2)
				if serve(2) {
					t.Error("notifies before used_event")
				}
				if !serve(1) {
					t.Error("does not notify at used_event")
				}
				reap()
				p.SetUsedEvent(p.UsedIdx() + 1)
				if !serve(3) {
					t.Error("does not notify when a batch passes used_event")
				}
				reap()
			}
			// What is shown in the middle of a batch is notified of at its end, whatever the driver has done meanwhile.
			for _, reaped := range []bool{false, true} {
				for range 3 {
					p.Offer(chain)
				}
				p.Kick()
				before := p.UsedIdx()
				p.push(t, p.pop(t), 0)
				p.push(t, p.pop(t), 0)
				if err := p.q.Show(); err != nil || p.UsedIdx() != before+2 {
					t.Errorf("shows %d elements, expected 2 (%v)", p.UsedIdx()-before, err)
				}
				if reaped {
					reap()
					p.EnableInterrupt()
				}
				p.push(t, p.pop(t), 0)
				if !p.publish(t) {
					t.Errorf("does not notify for a batch of which some was shown (reaped: %v)", reaped)
				}
				reap()
			}
		})
	}
}

func TestArm(t *testing.T) {
	chain := vqtest.Chain{{Addr: vqtest.Page, Len: 40}}
	for _, features := range []uint64{0, eventIdx} {
		t.Run(fmt.Sprintf("%#x", features), func(t *testing.T) {
			p := newPair(t, vqtest.Config{Features: features, Num: 8, Base: 0xfffe})
			offer := func() bool {
				if _, ok := p.Offer(chain); !ok {
					t.Fatal("no descriptors left")
				}
				return p.Kick()
			}
			serve := func() {
				p.push(t, p.pop(t), 0)
				p.publish(t)
				p.Used()
			}
			if p.arm(t) {
				t.Error("pending on an empty ring")
			}
			if !offer() {
				t.Error("armed, but the driver would not kick")
			}
			if pending, err := p.q.Pending(); !pending || err != nil {
				t.Errorf("Pending = %v, %v, expected a chain", pending, err)
			}
			if !p.arm(t) {
				t.Error("not pending, expected the chain that is there")
			}
			if err := p.q.Disarm(); err != nil {
				t.Fatal(err)
			}
			serve()
			for range 4 { // across 2^16
				if features == eventIdx {
					p.arm(t)
					offer()
					serve()
				}
				if err := p.q.Disarm(); err != nil {
					t.Fatal(err)
				}
				if offer() && features == 0 {
					t.Error("disarmed, but the driver would kick")
				}
				if offer() {
					t.Error("disarmed, but the driver would kick")
				}
				serve()
				if p.publish(t) {
					t.Error("nothing staged, but notifies")
				}
				serve()
			}
			p.arm(t)
			if !offer() {
				t.Error("armed again, but the driver would not kick")
			}
		})
	}
}

// TestUsedIndexGoesOn covers a ring whose used index is not its base, and a driver that writes it.
func TestUsedIndexGoesOn(t *testing.T) {
	d, err := vqtest.New(vqtest.Config{Num: 4, Base: 9})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	mem, err := d.Mem.Map()
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Clear()
	m := mem.Acquire()
	defer m.Release()
	p := &pair{Driver: d}
	if p.q, err = virtqueue.New(d.QueueConfig()); err != nil {
		t.Fatal(err)
	}
	d.SetUsedIdx(7) // two were lost in a crash
	if err := p.q.Bind(m); err != nil {
		t.Fatal(err)
	}
	d.SetUsedIdx(500)
	p.push(t, 3, 5)
	if err := p.q.Bind(m); err != nil { // staged elements stay staged
		t.Fatal(err)
	}
	p.publish(t)
	if d.UsedIdx() != 8 || d.UsedElem(7&3) != (vqtest.UsedElem{ID: 3, Len: 5}) {
		t.Errorf("used index is %d, element %+v, expected 8 and head 3", d.UsedIdx(), d.UsedElem(7&3))
	}
}

func TestConfig(t *testing.T) {
	good := virtqueue.Config{Num: 128, DescUserAddr: 0x1000, AvailUserAddr: 0x2002, UsedUserAddr: 0x3004}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*virtqueue.Config){
		"no descriptors":    func(c *virtqueue.Config) { c.Num = 0 },
		"not a power":       func(c *virtqueue.Config) { c.Num = 100 },
		"too large":         func(c *virtqueue.Config) { c.Num = 65535 },
		"packed":            func(c *virtqueue.Config) { c.Features = virtqueue.VIRTIO_F_RING_PACKED },
		"table unaligned":   func(c *virtqueue.Config) { c.DescUserAddr += 8 },
		"avail unaligned":   func(c *virtqueue.Config) { c.AvailUserAddr++ },
		"used unaligned":    func(c *virtqueue.Config) { c.UsedUserAddr += 2 },
		"address overflows": func(c *virtqueue.Config) { c.UsedUserAddr = ^uint64(0) &^ 3 },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil {
			t.Errorf("%s: Validate accepts %+v", name, c)
		}
		if _, err := virtqueue.New(c); err == nil {
			t.Errorf("%s: New accepts %+v", name, c)
		}
	}
}

func TestBind(t *testing.T) {
	p := newPair(t, vqtest.Config{Num: 128, Features: usual})
	regions := p.Mem.Regions()
	good := p.QueueConfig()
	end := regions[0].UserAddr + regions[0].Size
	for name, change := range map[string]func(*virtqueue.Config){
		"table past the region": func(c *virtqueue.Config) { c.DescUserAddr = end - 16*128 + 16 },
		"avail past the region": func(c *virtqueue.Config) { c.AvailUserAddr = end - 6 - 2*128 + 2 },
		"used past the region":  func(c *virtqueue.Config) { c.UsedUserAddr = end - 8*128 - 4 },
		"used at no address":    func(c *virtqueue.Config) { c.UsedUserAddr = 0x1000 },
	} {
		t.Run(name, func(t *testing.T) {
			c := good
			change(&c)
			q, err := virtqueue.New(c)
			if err != nil {
				t.Fatal(err)
			}
			wantRingError(t, q.Bind(p.m), virtqueue.ReasonUnmapped)
			_, err = q.Pop(&p.c)
			wantRingError(t, err, virtqueue.ReasonUnbound)
		})
	}
	// The last bytes of a region are as good as any.
	c := good
	c.DescUserAddr = end - 16*128
	q, err := virtqueue.New(c)
	if err != nil {
		t.Fatal(err)
	}
	_, err = q.Pop(&p.c)
	wantRingError(t, err, virtqueue.ReasonUnbound)
	if err := q.Bind(p.m); err != nil {
		t.Error(err)
	}
}

// TestBindOtherAlignment has a region whose front-end address is aligned where its memory is not.
func TestBindOtherAlignment(t *testing.T) {
	mem, err := vqtest.NewMemory([]guestmem.RegionConfig{{GuestPhysAddr: 0, Size: 1 << 16, UserAddr: 0x10000, MmapOffset: 2}})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	mm, err := mem.Map()
	if err != nil {
		t.Fatal(err)
	}
	defer mm.Clear()
	m := mm.Acquire()
	defer m.Release()
	q, err := virtqueue.New(virtqueue.Config{Num: 8, DescUserAddr: 0x10000, AvailUserAddr: 0x11000, UsedUserAddr: 0x12000})
	if err != nil {
		t.Fatal(err)
	}
	wantRingError(t, q.Bind(m), virtqueue.ReasonAlign)
}

func TestRebind(t *testing.T) {
	p := newPair(t, vqtest.Config{Num: 8, Features: usual})
	p.chainAfter(t)
	// The ring's memory goes.
	p.mem.Clear()
	empty := p.mem.Acquire()
	defer empty.Release()
	wantRingError(t, p.q.Bind(empty), virtqueue.ReasonUnmapped)
	wantRingError(t, p.q.Push(0, 0), virtqueue.ReasonUnbound)
	// It comes back, and the ring goes on where it was.
	if err := p.q.Bind(p.m); err != nil {
		t.Fatal(err)
	}
	p.push(t, p.c.Head, 0)
	p.publish(t)
	p.chainAfter(t)
	if p.q.Base() != 2 {
		t.Errorf("Base is %d, expected 2", p.q.Base())
	}
}

// TestTruncated takes the file behind the ring away under every method.
func TestTruncated(t *testing.T) {
	for _, features := range []uint64{0, usual} {
		for name, use := range map[string]func(p *pair) error{
			"Pop":     func(p *pair) error { _, err := p.q.Pop(&p.c); return err },
			"Push":    func(p *pair) error { return p.q.Push(0, 0) },
			"Publish": func(p *pair) error { _, err := p.q.Publish(); return err },
			"Arm":     func(p *pair) error { _, err := p.q.Arm(); return err },
			"Pending": func(p *pair) error { _, err := p.q.Pending(); return err },
			"Disarm":  func(p *pair) error { return p.q.Disarm() },
			"Bind": func(p *pair) error {
				q, err := virtqueue.New(p.QueueConfig())
				if err != nil {
					return err
				}
				return q.Bind(p.m)
			},
		} {
			if name == "Disarm" && features&eventIdx != 0 {
				continue // touches nothing
			}
			t.Run(fmt.Sprintf("%s/%#x", name, features), func(t *testing.T) {
				debug.SetPanicOnFault(true) // each subtest is a goroutine
				p := newPair(t, vqtest.Config{Num: 8, Features: features})
				p.push(t, 0, 0)
				if err := p.Mem.Truncate(0); err != nil {
					t.Fatal(err)
				}
				base := p.q.Base()
				wantRingError(t, use(p), virtqueue.ReasonFault)
				if name != "Bind" {
					_, err := p.q.Pop(&p.c)
					wantRingError(t, err, virtqueue.ReasonFault)
				}
				if p.q.Base() != base {
					t.Errorf("Base moved from %d to %d", base, p.q.Base())
				}
			})
		}
	}
	t.Run("indirect table", func(t *testing.T) {
		debug.SetPanicOnFault(true)
		p := newPair(t, vqtest.Config{Num: 8, Features: usual})
		p.Mem.Alloc(1<<20, vqtest.Page) // the table comes after the ring's region
		if _, ok := p.OfferIndirect(vqtest.Chain{{Addr: vqtest.Page, Len: 40}}); !ok {
			t.Fatal("no descriptors left")
		}
		p.Kick()
		if err := p.Mem.Truncate(0xa0000); err != nil {
			t.Fatal(err)
		}
		ok, err := p.q.Pop(&p.c)
		wantRingError(t, err, virtqueue.ReasonFault)
		if ok || p.q.Base() != 0 {
			t.Errorf("Pop = %v and Base %d after a fault, expected the chain to stay in the ring", ok, p.q.Base())
		}
	})
}

// TestBeside runs driver and device at once, with kicks and notifications that come only when asked for: a lost one hangs.
func TestBeside(t *testing.T) {
	const requests = 20000
	for _, features := range []uint64{0, indirectDesc, eventIdx, usual} {
		for _, off2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%#x/%v", features, off2), func(t *testing.T) {
				p := newPair(t, vqtest.Config{Num: 16, Features: features, AvailOff2: off2, Base: 0xff00})
				req := p.Mem.Build(vqtest.Request{Header: make([]byte, 40), OutArgs: 8})
				kick, call := make(chan struct{}, 1), make(chan struct{}, 1)
				signal := func(c chan struct{}) {
					select {
					case c <- struct{}{}:
					default: // an eventfd counts, and is read once
					}
				}
				done := make(chan error, 1)
				go func() { done <- device(p.q, requests, kick, func() { signal(call) }) }()
				offered, reaped := 0, 0
				for reaped < requests {
					progress := false
					for offered < requests {
						binary.LittleEndian.PutUint32(p.Mem.Bytes(req[0].Addr, 4), uint32(offered))
						offer := p.Offer
						if features&indirectDesc != 0 {
							offer = p.OfferIndirect
						}
						if _, ok := offer(req); !ok {
							break
						}
						offered++
						progress = true
					}
					if p.Kick() {
						signal(kick)
					}
					p.DisableInterrupt()
					for {
						_, n, ok := p.Used()
						if !ok {
							break
						}
						if n != 24 {
							t.Fatalf("%d bytes written, expected 24", n)
						}
						reaped++
						progress = true
					}
					if !progress && !p.EnableInterrupt() {
						<-call
					}
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// together runs a on one thread and b on another at the same moment, and then after, again and again for up to 300 ms.
func together(a, b, after func()) {
	var ready, finished atomic.Int64
	var stop atomic.Bool
	meet := func(n *atomic.Int64, want int64) {
		n.Add(1)
		for spins := 0; n.Load() < want; spins++ {
			if spins > 1000 {
				runtime.Gosched()
			}
		}
	}
	// The two differ in length: shift them against each other.
	delay := func(n int64) {
		for n > 0 {
			n -= min(1, ready.Load())
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := int64(0); ; i++ {
			meet(&ready, 2*i+2)
			if stop.Load() {
				return
			}
			delay(i / 32 % 32)
			b()
			meet(&finished, 2*i+2)
		}
	})
	start := time.Now()
	for i := int64(0); ; i++ {
		stop.Store(i == 50000 || time.Since(start) > 300*time.Millisecond)
		meet(&ready, 2*i+2)
		if stop.Load() {
			break
		}
		delay(i % 32)
		a()
		meet(&finished, 2*i+2)
		after()
	}
	wg.Wait()
}

// TestNoLostSignal has driver and device store their index and look at what the other wants at the same moment: at least one
// of them must see the other. Without a barrier both loads pass the stores now and then (some in 100000 rounds on amd64).
func TestNoLostSignal(t *testing.T) {
	for _, features := range []uint64{0, eventIdx} {
		for _, off2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%#x/%v", features, off2), func(t *testing.T) {
				p := newPair(t, vqtest.Config{Num: 16, Features: features, AvailOff2: off2})
				chain := vqtest.Chain{{Addr: vqtest.Page, Len: 40}}
				var kick, pending, notify, used bool
				prepare := func() {
					if _, ok := p.Offer(chain); !ok {
						t.Error("no descriptors left")
					}
				}
				prepare()
				if err := p.q.Disarm(); err != nil {
					t.Fatal(err)
				}
				together(func() { kick = p.Kick() }, func() { pending, _ = p.q.Arm() }, func() {
					if !kick && !pending {
						t.Error("no kick for a chain that Arm has not seen")
					}
					p.push(t, p.pop(t), 0)
					p.publish(t)
					p.Used()
					_ = p.q.Disarm()
					prepare()
				})
				p.Kick()
				p.push(t, p.pop(t), 0)
				p.DisableInterrupt()
				together(func() { used = p.EnableInterrupt() }, func() { notify, _ = p.q.Publish() }, func() {
					if !notify && !used {
						t.Error("no notification for an element that EnableInterrupt has not seen")
					}
					if _, _, ok := p.Used(); !ok {
						t.Error("no used element")
					}
					p.DisableInterrupt()
					prepare()
					p.Kick()
					p.push(t, p.pop(t), 0)
				})
			})
		}
	}
}

// device serves n chains.
func device(q *virtqueue.Queue, n int, kick <-chan struct{}, call func()) error {
	var c virtqueue.Chain
	for served := 0; served < n; {
		if err := q.Disarm(); err != nil {
			return err
		}
		for range 5 {
			ok, err := q.Pop(&c)
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			if err := q.Push(c.Head, uint32(c.WritableLen)); err != nil {
				return err
			}
			served++
		}
		notify, err := q.Publish()
		if err != nil {
			return err
		}
		if notify {
			call()
		}
		pending, err := q.Arm()
		if err != nil {
			return err
		}
		if !pending && served < n {
			<-kick
		}
	}
	return nil
}

// TestChangesUnderWalk has the driver rewrite an indirect table while it is walked: whatever Pop returns, it lies in memory.
func TestChangesUnderWalk(t *testing.T) {
	p := newPair(t, vqtest.Config{Num: 8, Features: usual})
	head, ok := p.OfferIndirect(p.Mem.Build(vqtest.Request{Header: make([]byte, 40), OutData: 100 * vqtest.Page}))
	if !ok {
		t.Fatal("no descriptors left")
	}
	p.Kick()
	p.pop(t)
	p.push(t, head, 0)
	p.publish(t)
	table, entry := p.Desc(head), 50
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		good := virtqueue.Desc{Addr: vqtest.Page, Len: 40, Flags: virtqueue.VIRTQ_DESC_F_WRITE | virtqueue.VIRTQ_DESC_F_NEXT, Next: uint16(entry + 1)}
		bad := virtqueue.Desc{Addr: 1 << 62, Len: ^uint32(0), Flags: 0xffff, Next: 0xffff}
		for {
			select {
			case <-stop:
				return
			default:
			}
			p.WriteTable(table.Addr+16*uint64(entry), []virtqueue.Desc{bad})
			p.SetDesc(head, virtqueue.Desc{Addr: table.Addr, Len: 7, Flags: virtqueue.VIRTQ_DESC_F_INDIRECT})
			p.SetDesc(head, table)
			p.WriteTable(table.Addr+16*uint64(entry), []virtqueue.Desc{good})
		}
	}()
	good, bad := 0, 0
	for i := 0; i < 200000 && (good < 500 || bad < 500); i++ {
		p.OfferHead(head)
		p.Kick()
		ok, err := p.q.Pop(&p.c)
		var ce *virtqueue.ChainError
		switch {
		case ok:
			good++
			checkChain(t, p.m, p.Mem.Regions(), &p.c)
		case errors.As(err, &ce):
			bad++
		default:
			t.Fatalf("Pop = %v, %v, expected a chain or a ChainError", ok, err)
		}
		p.push(t, head, 0)
		p.publish(t)
		runtime.Gosched()
	}
	close(stop)
	<-stopped
	if good == 0 || bad == 0 {
		t.Errorf("popped %d sound and %d broken tables, expected some of each", good, bad)
	}
}

func TestErrorText(t *testing.T) {
	seen := map[string]bool{}
	for r := range virtqueue.NumReasons {
		s := virtqueue.Reason(r).String()
		if seen[s] || s == "" || s[0] == 'R' {
			t.Errorf("reason %d is %q, expected words of its own", r, s)
		}
		seen[s] = true
	}
	ce := &virtqueue.ChainError{Head: 7, Reason: virtqueue.ReasonLoop}
	if got, want := ce.Error(), "refuse chain 7: chain is longer than its table"; got != want {
		t.Errorf("message is %q, expected %q", got, want)
	}
	re := &virtqueue.RingError{Reason: virtqueue.ReasonFault}
	if got, want := re.Error(), "stop ring: ring memory is gone"; got != want {
		t.Errorf("message is %q, expected %q", got, want)
	}
}

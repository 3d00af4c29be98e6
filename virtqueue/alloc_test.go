package virtqueue_test

import (
	"testing"

	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

func TestAllocs(t *testing.T) {
	read := func(p *pair) vqtest.Chain {
		return p.Mem.Build(vqtest.Request{Header: make([]byte, 40), Args: make([]byte, 40), OutData: 1 << 20})
	}
	for name, offer := range map[string]func(p *pair, c vqtest.Chain) uint16{
		"direct": func(p *pair, c vqtest.Chain) uint16 {
			head, _ := p.Offer(c[:3])
			return head
		},
		"indirect": func(p *pair, c vqtest.Chain) uint16 {
			head, _ := p.OfferIndirect(c)
			return head
		},
		"bad": func(p *pair, _ vqtest.Chain) uint16 {
			p.SetDesc(0, virtqueue.Desc{Addr: 1 << 60, Len: 1})
			p.OfferHead(0)
			return 0
		},
	} {
		for _, features := range []uint64{indirectDesc, usual} {
			p := newPair(t, vqtest.Config{Features: features})
			req := read(p)
			cycle := func() {
				head := offer(p, req)
				p.Kick()
				if err := p.q.Disarm(); err != nil {
					t.Fatal(err)
				}
				if pending, err := p.q.Pending(); !pending || err != nil {
					t.Fatalf("Pending = %v, %v", pending, err)
				}
				ok, err := p.q.Pop(&p.c)
				if _, bad := err.(*virtqueue.ChainError); ok == bad || p.c.Head != head {
					t.Fatalf("Pop = %v, %v", ok, err)
				}
				if err := p.q.Push(head, 16); err != nil {
					t.Fatal(err)
				}
				if _, err := p.q.Publish(); err != nil {
					t.Fatal(err)
				}
				if pending, err := p.q.Arm(); pending || err != nil {
					t.Fatalf("Arm = %v, %v", pending, err)
				}
				if _, _, ok := p.Used(); !ok {
					t.Fatal("no used element")
				}
			}
			if n := testing.AllocsPerRun(200, cycle); n != 0 {
				t.Errorf("%s, features %#x: %v allocations for a request, expected 0", name, features, n)
			}
		}
	}
	// A stopped ring is asked again and again.
	p := newPair(t, vqtest.Config{})
	p.SetAvailIdx(1000)
	if n := testing.AllocsPerRun(200, func() {
		if _, err := p.q.Pop(&p.c); err == nil {
			t.Fatal("popped from a broken ring")
		}
		_ = p.q.Bind(p.m)
	}); n != 0 {
		t.Errorf("%v allocations for a broken ring, expected 0", n)
	}
}

// BenchmarkCycle is Pop, Push and Publish of one chain, and the driver's part.
func BenchmarkCycle(b *testing.B) {
	for _, bench := range []struct {
		name     string
		req      vqtest.Request
		indirect bool
	}{
		{"direct=3", vqtest.Request{Header: make([]byte, 40), Args: make([]byte, 16)}, false},
		{"indirect=3", vqtest.Request{Header: make([]byte, 40), Args: make([]byte, 16)}, true},
		{"indirect=259", vqtest.Request{Header: make([]byte, 40), Args: make([]byte, 40), OutData: 1 << 20}, true},
	} {
		b.Run(bench.name, func(b *testing.B) {
			p := newPair(b, vqtest.Config{Features: usual, Num: 1024})
			req := p.Mem.Build(bench.req)
			offer := p.Offer
			if bench.indirect {
				offer = p.OfferIndirect
			}
			head, _ := offer(req)
			p.Kick()
			b.ReportAllocs()
			for b.Loop() {
				if ok, err := p.q.Pop(&p.c); !ok || err != nil {
					b.Fatalf("Pop = %v, %v", ok, err)
				}
				if err := p.q.Push(head, 16); err != nil {
					b.Fatal(err)
				}
				if _, err := p.q.Publish(); err != nil {
					b.Fatal(err)
				}
				p.OfferHead(head)
				p.Kick()
			}
		})
	}
}

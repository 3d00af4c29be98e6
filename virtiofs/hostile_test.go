package virtiofs

import (
	"context"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/vhostuser/vhosttest"
	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// Each hostile ring is put to the whole device. It has to do what virtqueue's own test expects, and the other queue, the
// session and the process must not notice.
func TestHostileRings(t *testing.T) {
	const features = virtqueue.VIRTIO_RING_F_EVENT_IDX | virtqueue.VIRTIO_RING_F_INDIRECT_DESC
	r := newRig(t, newMem(t), Config{NumRequestQueues: 2})
	node, _ := r.mount()
	before := openFDs(t)
	for _, c := range vqtest.Hostile {
		if c.Without&features != 0 {
			continue // the device always has both; virtqueue tests these
		}
		t.Run(c.Name, func(t *testing.T) {
			r.t = t
			q := r.restart(2)
			stats := r.device.Stats()
			heads := c.Set(q.Driver)
			signal(t, q.kick.Int())
			for _, want := range heads {
				if head := r.used(2); head != want {
					t.Fatalf("completed head %d, expected %d", head, want)
				}
			}
			got := r.device.Stats()
			switch c.Outcome {
			case vqtest.RingError:
				awaitFD(t, q.err.Int())
				if got = r.device.Stats(); got.RingErrors != stats.RingErrors+1 {
					t.Errorf("%d rings were stopped, expected 1", got.RingErrors-stats.RingErrors)
				}
			case vqtest.ChainError:
				if n := got.ChainErrors - stats.ChainErrors; n != uint64(len(heads)) {
					t.Errorf("%d chains were refused, expected %d", n, len(heads))
				}
			}
			r.must(request, getattr(node))
		})
	}
	r.t = t
	if after := openFDs(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// restart stops queue i and starts it with a new driver.
func (r *rig) restart(i int) *rigQueue {
	r.t.Helper()
	_, err := r.fe.GetVringBase(uint32(i))
	r.check(err)
	old := r.queues[i]
	d, err := vqtest.New(vqtest.Config{Num: 64, Features: old.QueueConfig().Features, Memory: r.mem})
	r.check(err)
	q := &rigQueue{Driver: d, kick: eventfd(r.t), call: eventfd(r.t), err: eventfd(r.t), chains: make(map[uint16]vqtest.Chain)}
	r.queues[i] = q
	r.start(i, q.kick.Int(), q.call.Int())
	_, _, _ = old.kick.Close(), old.call.Close(), old.err.Close()
	return q
}

// used waits for queue i's next used element.
func (r *rig) used(i int) uint16 {
	r.t.Helper()
	q := r.queues[i]
	for {
		if head, _, ok := q.Used(); ok {
			return head
		}
		if !q.EnableInterrupt() {
			awaitFD(r.t, q.call.Int())
		}
	}
}

// FUSE messages cut at every byte, and every one with a reply buffer that is too small by one: each chain comes back, the
// reply is none or a whole one, and the next request is served.
func TestCutMessages(t *testing.T) {
	r := newRig(t, newMem(t), Config{})
	node, fh := r.mount()
	for _, c := range []call{
		initCall(),
		{op: fuseproto.FUSE_LOOKUP, node: 1, args: body("file"), outArgs: 128},
		getattr(node), read(node, fh, 0, 512), fsync(node, fh),
		{op: fuseproto.FUSE_MKDIR, node: 1, args: body(uint32(0o755), uint32(0), "d"), outArgs: 128},
		{op: fuseproto.FUSE_RENAME2, node: 1, args: body(uint64(1), uint32(0), uint32(0), "a", "b")},
		{op: fuseproto.FUSE_BATCH_FORGET, args: body(uint32(2), uint32(0), node, uint64(0), node, uint64(0)), noReply: true},
	} {
		full := append(body(uint32(40+len(c.args)), uint32(c.op), uint64(7), c.node, make([]byte, 16)), c.args...)
		for cut := range len(full) {
			r.raw(full[:cut], 16+c.outArgs+c.outData)
		}
		for room := range 16 + c.outArgs {
			r.raw(full, room)
		}
	}
	r.must(request, initCall())
	r.must(request, getattr(1))
}

// raw sends a request of these bytes with that much room and checks what comes back, as parse does.
func (r *rig) raw(b []byte, room int) {
	r.t.Helper()
	q := r.queues[request]
	var chain vqtest.Chain
	if len(b) > 0 {
		addr := r.mem.Alloc(uint64(len(b)), 8)
		r.mem.Write(addr, b)
		chain = append(chain, vqtest.Buffer{Addr: addr, Len: uint32(len(b))})
	}
	if room > 0 {
		chain = append(chain, vqtest.Buffer{Addr: r.mem.Alloc(uint64(room), 8), Len: uint32(room), Write: true})
	}
	if len(chain) == 0 {
		return
	}
	head, ok := q.Offer(chain)
	if !ok {
		r.t.Fatal("no descriptor free")
	}
	q.chains[head] = chain
	r.kick(request)
	r.next(request)
}

// A guest that sends nonsense as fast as it can must not fill the log.
func TestLogIsBounded(t *testing.T) {
	l, log := newTestLog()
	r := newRig(t, newMem(t), Config{Log: log})
	r.mount()
	for range 2000 {
		r.raw([]byte{1}, 0)
	}
	q := r.queues[request]
	for range 2000 {
		head, ok := q.Offer(vqtest.Chain{{Addr: 1 << 60, Len: 1}})
		if !ok {
			t.Fatal("no descriptor free")
		}
		q.chains[head] = nil
		r.kick(request)
		r.used(request)
	}
	if n := len(l.lines); n > 60 {
		t.Errorf("4000 malformed requests made %d lines of log", n)
	}
}

// Every sequence that a front-end is known for, on a real device, with requests where it ends with rings running.
func TestRecordedFrontEnds(t *testing.T) {
	for _, seq := range vhosttest.Sequences() {
		t.Run(seq.Name, func(t *testing.T) {
			before := openFDs(t)
			d, _ := newDevice(t, newMem(t), Config{Tag: "share", DrainTimeout: 100 * time.Millisecond})
			fe, back, err := vhosttest.Pair()
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- d.Serve(context.Background(), back) }()
			if err := fe.Play(seq); err != nil {
				t.Error(err)
			}
			if err := fe.CloseWrite(); err != nil {
				t.Error(err)
			}
			select {
			case err := <-served:
				if err != nil {
					t.Errorf("the session ended with %v", err)
				}
			case <-time.After(patience):
				t.Fatal("the session did not end")
			}
			_ = fe.Close()
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			if after := openFDs(t); after > before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

// FuzzSession plays a hostile guest and front-end: the input chooses messages, ring contents and requests. The device must
// survive, end its session when told, and keep no descriptor.
func FuzzSession(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11})
	f.Add([]byte("\x00\x1a\x00\x00\x02\x00\x03\x00\x04\x10\x05\x01\x06\x00\x07\x00\x08\x00"))
	for i := range vqtest.Hostile {
		f.Add([]byte{2, byte(i), 0, 3, 2, byte(i), 5, byte(i)})
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := newRig(t, newMem(t), Config{DrainTimeout: 50 * time.Millisecond})
		in = in[:min(len(in), 256)]
		for len(in) > 1 {
			if !r.act(in[0], in[1], in[2:]) {
				break
			}
			in = in[2:]
		}
		_ = r.fe.CloseWrite()
		r.fe.Discard()
		_ = r.disconnect()
		// The device is as good as new for the next front-end.
		r.connect()
		r.mount()
	})
}

// act does one thing that the input asks for; false ends it.
func (r *rig) act(what, how byte, rest []byte) bool {
	q := r.queues[int(how)%len(r.queues)]
	i := int(how) % len(r.queues)
	r.fe.NeedReply = false
	switch what % 10 {
	case 0: // a request of any bytes
		b := append(body(uint32(40+len(rest)), uint32(how), uint64(1), uint64(1), make([]byte, 16)), rest...)
		addr := r.mem.Alloc(uint64(len(b)), 8)
		r.mem.Write(addr, b)
		q.Offer(vqtest.Chain{{Addr: addr, Len: uint32(len(b))}, {Addr: r.mem.Alloc(4096, 8), Len: uint32(how) * 16, Write: true}})
		q.Kick()
	case 1: // a kick
		_, _ = unix.Write(q.kick.Int(), one)
	case 2: // a hostile ring
		vqtest.Hostile[int(how)%len(vqtest.Hostile)].Set(q.Driver)
	case 3: // an index out of nowhere
		q.SetAvailIdx(uint16(how) << 8)
	case 4: // descriptors of any content
		for j := 0; j+8 <= len(rest) && j < 64; j += 8 {
			q.SetDesc(uint16(j/8), virtqueue.Desc{Addr: uint64(rest[j]) << (rest[j+1] % 64), Len: uint32(rest[j+2]) << (rest[j+3] % 32), Flags: uint16(rest[j+4]), Next: uint16(rest[j+5])})
		}
		q.OfferHead(uint16(how))
		q.Kick()
	case 5: // stop and start
		if r.fe.SetVringEnable(uint32(i), how&0x80 != 0) != nil {
			return false
		}
	case 6:
		if _, err := r.fe.GetVringBase(uint32(i)); err != nil {
			return false
		}
	case 7:
		if r.fe.SetVringKick(uint8(i), q.kick.Int()) != nil || r.fe.SetVringCall(uint8(i), q.call.Int()) != nil {
			return false
		}
	case 8: // the memory goes
		if how > 250 {
			if err := r.mem.Truncate(0); err != nil {
				panic(fmt.Sprint("truncate: ", err))
			}
			_, _ = unix.Write(q.kick.Int(), one)
			return false // the driver's own side would fault
		}
	case 9: // any message
		if r.fe.Write(rest[:min(len(rest), int(how))]) != nil {
			return false
		}
	}
	return true
}

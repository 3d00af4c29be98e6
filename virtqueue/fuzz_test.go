package virtqueue_test

import (
	"encoding/binary"
	"testing"

	"github.com/sluicefs/sluice/guestmem"
	"github.com/sluicefs/sluice/virtqueue"
	"github.com/sluicefs/sluice/virtqueue/vqtest"
)

// The fuzzed memory: all that the driver writes lies in the first region, whose content is the input.
const (
	fuzzNum   = 16
	fuzzDesc  = 0x0
	fuzzAvail = 0x100 // + 2 when the input says so
	fuzzUsed  = 0x180
	fuzzTable = 0x300 // where compact indirect tables go
	fuzzEnd   = 0x1000
)

var fuzzRegions = []guestmem.RegionConfig{
	{GuestPhysAddr: 0, Size: 0x1000, UserAddr: 0, MmapOffset: 0x3000},
	{GuestPhysAddr: 0x1000, Size: 0x1800, UserAddr: 0x100000, MmapOffset: 0x800},
	{GuestPhysAddr: 0x4000, Size: 0x1000, UserAddr: 0x200000, MmapOffset: 0x4000},
}

// compactDesc is a descriptor in 7 bytes, so that most of what the fuzzer makes up is near the rules.
func compactDesc(b []byte) virtqueue.Desc {
	d := virtqueue.Desc{
		Addr:  uint64(binary.LittleEndian.Uint16(b)) << (b[6] & 4),
		Len:   uint32(binary.LittleEndian.Uint16(b[2:])),
		Flags: uint16(b[4] & 7),
		Next:  uint16(b[5]),
	}
	switch b[6] & 3 {
	case 1:
		d.Len <<= 16
	case 2:
		d.Addr = -d.Addr
	case 3:
		d.Len &^= 15
		d.Addr = fuzzTable + d.Addr&0x7f0
	}
	return d
}

func FuzzQueue(f *testing.F) {
	// options, available index, steps, then memory: compact descriptors, or bytes as they are.
	f.Add(uint8(0), uint16(1), []byte{0, 1, 2, 3, 4, 5}, []byte{0, 0x10, 40, 0, 0, 0, 0})
	f.Add(uint8(1), uint16(2), []byte{0, 0, 1, 2, 6, 0}, []byte{0, 0x10, 40, 0, 1, 1, 0, 0, 0x20, 0xff, 0, 2, 0, 0})
	f.Add(uint8(3), uint16(16), []byte{0, 7, 0, 7, 0}, []byte{0, 0, 48, 0, 4, 0, 3, 0, 0x10, 40, 0, 1, 1, 0})
	f.Add(uint8(7), uint16(1), []byte{0, 1, 2, 8, 3}, []byte{0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 0, 0, 4, 0, 1, 0})
	mem, err := vqtest.NewMemory(fuzzRegions)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = mem.Close() })
	gm, err := mem.Map()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { gm.Clear() })
	m := gm.Acquire()
	f.Cleanup(m.Release)
	f.Fuzz(func(t *testing.T, options uint8, availIdx uint16, steps, content []byte) {
		c := virtqueue.Config{Num: fuzzNum, DescUserAddr: fuzzDesc, AvailUserAddr: fuzzAvail, UsedUserAddr: fuzzUsed}
		if options&1 != 0 {
			c.Features |= indirectDesc
		}
		if options&2 != 0 {
			c.Features |= eventIdx
		}
		if options&8 != 0 {
			c.AvailUserAddr += 2
		}
		c.Num >>= options >> 4 & 3
		c.Base = availIdx - uint16(options>>6)
		ring := mem.Bytes(0, fuzzEnd)
		clear(ring)
		if options&4 != 0 {
			copy(ring, content)
		} else {
			at := 0
			for ; len(content) >= 7; content = content[7:] {
				if at == fuzzDesc+16*int(c.Num) {
					at = fuzzTable
				}
				if at == fuzzEnd {
					break
				}
				vqtest.PutDesc(ring[at:], compactDesc(content))
				at += 16
			}
			for i := range int(c.Num) {
				ring[int(c.AvailUserAddr)+4+2*i] = byte(i)
			}
		}
		setIdx := func(idx uint16) { binary.LittleEndian.PutUint16(ring[c.AvailUserAddr+2:], idx) }
		setIdx(availIdx)
		q, err := virtqueue.New(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := q.Bind(m); err != nil {
			t.Fatal(err)
		}
		var chain virtqueue.Chain
		broken := false
		for i, step := range steps[:min(len(steps), 64)] {
			base := q.Base()
			var ok bool
			var err error
			switch step % 9 {
			case 0:
				ok, err = q.Pop(&chain)
				if ok && err != nil {
					t.Fatalf("step %d: Pop gives a chain and %v", i, err)
				}
				checkChain(t, m, fuzzRegions, &chain)
				_, bad := err.(*virtqueue.ChainError)
				if taken := q.Base() != base; taken != (ok || bad) {
					t.Fatalf("step %d: Pop = %v, %v, but Base went from %d to %d", i, ok, err, base, q.Base())
				}
				if bad {
					err = nil
				}
				if (ok || bad) && chain.Head >= c.Num {
					t.Fatalf("step %d: head is %d in a ring of %d", i, chain.Head, c.Num)
				}
			case 1:
				err = q.Push(chain.Head, uint32(i))
			case 2:
				_, err = q.Publish()
			case 3:
				_, err = q.Arm()
			case 4:
				_, err = q.Pending()
			case 5:
				err = q.Disarm()
			case 6:
				availIdx++
				setIdx(availIdx)
			case 7:
				ring[int(step)*16%fuzzEnd] ^= step // the driver writes on
			case 8:
				if err := q.Bind(m); err != nil {
					t.Fatal(err)
				}
				broken = false
			}
			if fetches := step%9 == 0 || step%9 >= 3 && step%9 < 6; fetches && broken && err == nil {
				t.Fatalf("step %d: a broken ring works again", i)
			}
			broken = broken || err != nil
		}
	})
}

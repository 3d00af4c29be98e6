package vqtest

import (
	"github.com/sluicefs/sluice/virtqueue"
)

// Outcome is what the device makes of a HostileCase.
type Outcome int

// The outcomes.
const (
	Legal      Outcome = iota // odd, but allowed: Pop gives the chains
	ChainError                // each chain is refused and completed with length 0; the ring goes on
	RingError                 // the ring is stopped
)

// HostileCase is something that a legal driver does not do, or that hardly any does.
type HostileCase struct {
	Name string
	// Features are needed in the Driver's; Without must not be there.
	Features, Without uint64
	Outcome           Outcome
	Reason            virtqueue.Reason // of ChainError and RingError
	// Set writes it to d's ring, up to the available index: only the kick is missing. It returns the heads that the device
	// must complete, in order; with RingError, those before the ring is stopped. Its readable memory is all zeros, which is no
	// FUSE request either. d must have memory of Regions with at least 4 MiB, and no chain in flight; what the case allocates
	// is free once the device is through with it.
	Set func(d *Driver) (heads []uint16)
}

const (
	next     = virtqueue.VIRTQ_DESC_F_NEXT
	write    = virtqueue.VIRTQ_DESC_F_WRITE
	indirect = virtqueue.VIRTQ_DESC_F_INDIRECT

	indirectDesc = virtqueue.VIRTIO_RING_F_INDIRECT_DESC
)

// chain writes descs at the descriptors from head 0 on, joins them and offers them, n times.
func (d *Driver) chain(n int, descs ...virtqueue.Desc) []uint16 {
	for i, desc := range descs {
		if i+1 < len(descs) {
			desc.Flags |= next
			desc.Next = uint16(i + 1)
		}
		d.SetDesc(uint16(i), desc)
	}
	var heads []uint16
	for range n {
		d.OfferHead(0)
		heads = append(heads, 0)
	}
	d.Kick()
	return heads
}

// table writes descs as an indirect table, not joined, and offers it.
func (d *Driver) table(descs ...virtqueue.Desc) []uint16 {
	addr := d.Mem.Alloc(uint64(16*len(descs)), 16)
	d.WriteTable(addr, descs)
	return d.chain(1, virtqueue.Desc{Addr: addr, Len: uint32(16 * len(descs)), Flags: indirect})
}

// joined is n one-page readable descriptors, each with NEXT for the one after it.
func (d *Driver) joined(n int) []virtqueue.Desc {
	descs := make([]virtqueue.Desc, n)
	addr := d.Mem.Alloc(Page, Page)
	for i := range descs {
		descs[i] = virtqueue.Desc{Addr: addr, Len: 8, Flags: next, Next: uint16(i + 1)}
	}
	descs[n-1].Flags, descs[n-1].Next = 0, 0
	return descs
}

// page is a one-page descriptor.
func (d *Driver) page(flags uint16) virtqueue.Desc {
	return virtqueue.Desc{Addr: d.Mem.Alloc(Page, Page), Len: Page, Flags: flags}
}

// end is where the highest region ends: nothing is mapped there.
func (d *Driver) end() uint64 {
	end := uint64(0)
	for _, r := range d.Mem.regions {
		end = max(end, r.GuestPhysAddr+r.Size)
	}
	return end
}

// gap is the first address of a gap between regions, where low memory ends.
func (d *Driver) gap() uint64 {
	return d.Mem.regions[0].GuestPhysAddr + d.Mem.regions[0].Size
}

// seam is where two adjacent regions meet.
func (d *Driver) seam() uint64 {
	return d.Mem.regions[2].GuestPhysAddr
}

// maxChain is what the device accepts in a chain at least (virtqueue: max(Num, 1024)).
func (d *Driver) maxChain() int {
	return max(int(d.num), 1024)
}

// Hostile is every case, for rings of any size.
var Hostile = []HostileCase{
	// Loops and length.
	{
		Name: "loop of one", Outcome: ChainError, Reason: virtqueue.ReasonLoop,
		Set: func(d *Driver) []uint16 {
			p := d.page(next)
			p.Next = 0
			return d.chain(1, p)
		},
	},
	{
		Name: "loop through every descriptor", Outcome: ChainError, Reason: virtqueue.ReasonLoop,
		Set: func(d *Driver) []uint16 {
			for i, desc := range d.joined(int(d.num)) {
				desc.Flags |= next
				desc.Next = uint16(i+1) & (d.num - 1)
				d.SetDesc(uint16(i), desc)
			}
			d.OfferHead(0)
			d.Kick()
			return []uint16{0}
		},
	},
	{
		Name: "loop of empty descriptors", Outcome: ChainError, Reason: virtqueue.ReasonLoop,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Flags: next})
		},
	},
	{
		Name: "loop in an indirect table", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonLoop,
		Set: func(d *Driver) []uint16 {
			descs := d.joined(4)
			descs[3].Flags, descs[3].Next = next, 1
			return d.table(descs...)
		},
	},
	{
		Name: "chain of every descriptor", Outcome: Legal,
		Set: func(d *Driver) []uint16 { return d.chain(1, d.joined(int(d.num))...) },
	},
	{
		Name: "indirect table as long as accepted", Features: indirectDesc, Outcome: Legal,
		Set: func(d *Driver) []uint16 { return d.table(d.joined(d.maxChain() - 1)...) },
	},
	{
		Name: "indirect table over-long", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonTooLong,
		Set: func(d *Driver) []uint16 { return d.table(d.joined(d.maxChain() + 1)...) },
	},
	{
		Name: "direct and indirect together over-long", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonTooLong,
		Set: func(d *Driver) []uint16 { return d.table(d.joined(d.maxChain())...) },
	},
	{
		Name: "indirect table over-long, chain short", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonTooLong,
		Set: func(d *Driver) []uint16 {
			descs := d.joined(d.maxChain() + 1)
			descs[0].Flags = 0
			return d.table(descs...)
		},
	},
	{
		Name: "indirect table of 4 GiB", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonTooLong,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: 0, Len: 0xffff_fff0, Flags: indirect})
		},
	},
	// Empty descriptors.
	{
		Name: "empty descriptor alone", Outcome: Legal,
		Set: func(d *Driver) []uint16 { return d.chain(1, virtqueue.Desc{}) },
	},
	{
		Name: "empty descriptor at no address", Features: indirectDesc, Outcome: Legal,
		Set: func(d *Driver) []uint16 {
			descs := d.joined(3)
			descs[1].Addr, descs[1].Len = 1<<63, 0
			return d.table(descs...)
		},
	},
	{
		Name: "empty readable descriptor after a writable one", Features: indirectDesc, Outcome: Legal,
		Set: func(d *Driver) []uint16 {
			first := d.page(write | next)
			first.Next = 1
			return d.table(first, virtqueue.Desc{Addr: first.Addr})
		},
	},
	{
		Name: "unknown descriptor flags", Outcome: Legal,
		Set: func(d *Driver) []uint16 { return d.chain(1, d.page(0xfff8)) },
	},
	// Next.
	{
		Name: "next outside the table", Outcome: ChainError, Reason: virtqueue.ReasonNext,
		Set: func(d *Driver) []uint16 {
			p := d.page(next)
			p.Next = d.num
			return d.chain(1, p)
		},
	},
	{
		Name: "next is 65535", Outcome: ChainError, Reason: virtqueue.ReasonNext,
		Set: func(d *Driver) []uint16 {
			p := d.page(next)
			p.Next = 0xffff
			return d.chain(1, p)
		},
	},
	{
		Name: "next outside the indirect table", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonNext,
		Set: func(d *Driver) []uint16 {
			descs := d.joined(2)
			descs[1].Flags, descs[1].Next = next, 2
			return d.table(descs...)
		},
	},
	{
		Name: "indirect table out of order", Features: indirectDesc, Outcome: Legal,
		Set: func(d *Driver) []uint16 {
			descs := d.joined(4)
			for i, n := range []uint16{3, 0, 1, 2} { // 0 → 3 → 2 → 1
				descs[i].Flags, descs[i].Next = next, n
			}
			descs[1].Flags = 0
			return d.table(descs...)
		},
	},
	// Indirect.
	{
		Name: "indirect not negotiated", Without: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonIndirectFeature,
		Set: func(d *Driver) []uint16 { return d.table(d.joined(2)...) },
	},
	{
		Name: "indirect and NEXT", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonIndirectNext,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: d.Mem.Alloc(32, 16), Len: 32, Flags: indirect | next})
		},
	},
	{
		Name: "indirect and WRITE", Features: indirectDesc, Outcome: Legal,
		Set: func(d *Driver) []uint16 {
			addr := d.Mem.Alloc(32, 16)
			d.WriteTable(addr, d.joined(2))
			return d.chain(1, virtqueue.Desc{Addr: addr, Len: 32, Flags: indirect | write})
		},
	},
	{
		Name: "nested indirect", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonIndirectNested,
		Set: func(d *Driver) []uint16 {
			inner := d.Mem.Alloc(32, 16)
			d.WriteTable(inner, d.joined(2))
			return d.table(virtqueue.Desc{Addr: inner, Len: 32, Flags: indirect})
		},
	},
	{
		Name: "indirect table inside itself", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonIndirectNested,
		Set: func(d *Driver) []uint16 {
			addr := d.Mem.Alloc(16, 16)
			self := virtqueue.Desc{Addr: addr, Len: 16, Flags: indirect}
			d.WriteTable(addr, []virtqueue.Desc{self})
			return d.chain(1, self)
		},
	},
	{
		Name: "indirect table of 0 bytes", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonIndirectLen,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: d.Mem.Alloc(16, 16), Flags: indirect})
		},
	},
	{
		Name: "indirect table of 24 bytes", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonIndirectLen,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: d.Mem.Alloc(32, 16), Len: 24, Flags: indirect})
		},
	},
	{
		Name: "indirect table in a gap", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonIndirectUnmapped,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: d.gap() - 16, Len: 32, Flags: indirect})
		},
	},
	{
		Name: "indirect table at the top of the address space", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonIndirectUnmapped,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: ^uint64(15), Len: 32, Flags: indirect})
		},
	},
	{
		Name: "indirect table across regions, not aligned", Features: indirectDesc, Outcome: Legal,
		Set: func(d *Driver) []uint16 {
			addr := d.seam() - 24 // the second descriptor lies across
			d.WriteTable(addr, d.joined(4))
			return d.chain(1, virtqueue.Desc{Addr: addr, Len: 64, Flags: indirect})
		},
	},
	// Addresses.
	{
		Name: "address in a gap", Outcome: ChainError, Reason: virtqueue.ReasonAddress,
		Set: func(d *Driver) []uint16 { return d.chain(1, virtqueue.Desc{Addr: d.gap(), Len: 1}) },
	},
	{
		Name: "buffer into a gap", Outcome: ChainError, Reason: virtqueue.ReasonAddress,
		Set: func(d *Driver) []uint16 { return d.chain(1, virtqueue.Desc{Addr: d.gap() - 8, Len: 16}) },
	},
	{
		Name: "buffer over a gap", Outcome: ChainError, Reason: virtqueue.ReasonAddress,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: d.gap() - 8, Len: 1 << 19, Flags: write})
		},
	},
	{
		Name: "buffer past the end of memory", Outcome: ChainError, Reason: virtqueue.ReasonAddress,
		Set: func(d *Driver) []uint16 { return d.chain(1, virtqueue.Desc{Addr: d.end() - 1, Len: 2}) },
	},
	{
		Name: "buffer wraps around the address space", Outcome: ChainError, Reason: virtqueue.ReasonAddress,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: ^uint64(0) - 7, Len: 0xffff_ffff})
		},
	},
	{
		Name: "front-end address", Outcome: ChainError, Reason: virtqueue.ReasonAddress,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: d.Mem.UserAddr(Page), Len: 1})
		},
	},
	{
		Name: "buffer across regions", Outcome: Legal,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: d.seam() - Page, Len: 2 * Page})
		},
	},
	{
		Name: "last byte of memory", Outcome: Legal,
		Set: func(d *Driver) []uint16 { return d.chain(1, virtqueue.Desc{Addr: d.end() - 1, Len: 1}) },
	},
	{
		Name: "buffer is the descriptor table", Outcome: Legal,
		Set: func(d *Driver) []uint16 {
			return d.chain(1, virtqueue.Desc{Addr: d.descAddr, Len: 16 * uint32(d.num)})
		},
	},
	// Order and size.
	{
		Name: "readable after writable", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonOrder,
		Set: func(d *Driver) []uint16 {
			first := d.page(write | next)
			first.Next = 1
			return d.table(first, d.page(0))
		},
	},
	{
		Name: "same memory readable and writable", Features: indirectDesc, Outcome: Legal,
		Set: func(d *Driver) []uint16 {
			p := d.page(next)
			p.Next = 1
			return d.table(p, virtqueue.Desc{Addr: p.Addr, Len: p.Len, Flags: write})
		},
	},
	{
		Name: "over 2^32 bytes writable", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonTotal,
		Set: func(d *Driver) []uint16 { return d.table(d.huge(false)...) },
	},
	{
		Name: "over 2^32 bytes readable and writable", Features: indirectDesc, Outcome: ChainError, Reason: virtqueue.ReasonTotal,
		Set: func(d *Driver) []uint16 { return d.table(d.huge(true)...) },
	},
	// Heads and indices.
	{
		Name: "same head twice", Outcome: Legal,
		Set: func(d *Driver) []uint16 {
			if d.num == 1 {
				return d.chain(1, d.page(0)) // a ring of one has no room for two
			}
			return d.chain(2, d.page(0))
		},
	},
	{
		Name: "head outside the table", Outcome: RingError, Reason: virtqueue.ReasonHead,
		Set: func(d *Driver) []uint16 {
			d.OfferHead(d.num)
			d.Kick()
			return nil
		},
	},
	{
		Name: "head is 65535 after a sound one", Outcome: RingError, Reason: virtqueue.ReasonHead,
		Set: func(d *Driver) []uint16 {
			if d.num == 1 {
				d.OfferHead(0xffff)
				d.Kick()
				return nil
			}
			heads := d.chain(1, d.page(0))
			d.OfferHead(0xffff)
			d.Kick()
			return heads
		},
	},
	{
		Name: "available index jumps past the ring", Outcome: RingError, Reason: virtqueue.ReasonAvailJump,
		Set: func(d *Driver) []uint16 {
			d.SetAvailIdx(d.AvailIdx() + d.num + 1)
			return nil
		},
	},
	{
		Name: "available index goes back", Outcome: RingError, Reason: virtqueue.ReasonAvailJump,
		Set: func(d *Driver) []uint16 {
			d.SetAvailIdx(d.AvailIdx() - 1)
			return nil
		},
	},
	{
		Name: "available index jumps far", Outcome: RingError, Reason: virtqueue.ReasonAvailJump,
		Set: func(d *Driver) []uint16 {
			d.SetAvailIdx(d.AvailIdx() + d.num + 0x4001)
			return nil
		},
	},
}

// huge is a legal chain but for its 4 GiB: the two adjacent regions again and again.
func (d *Driver) huge(readable bool) []virtqueue.Desc {
	low, high := d.Mem.regions[1], d.Mem.regions[2]
	size := uint32(low.Size + high.Size)
	var descs []virtqueue.Desc
	for total := uint64(0); total < 1<<32; total += uint64(size) {
		flags := uint16(write)
		if readable && total < 1<<31 {
			flags = 0
		}
		descs = append(descs, virtqueue.Desc{Addr: low.GuestPhysAddr, Len: size, Flags: flags | next, Next: uint16(len(descs) + 1)})
	}
	descs[len(descs)-1].Flags &^= next
	return descs
}

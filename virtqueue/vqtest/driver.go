package vqtest

import (
	"encoding/binary"
	"fmt"

	"github.com/sluicefs/sluice/virtqueue"
)

// Config describes a Driver's ring.
type Config struct {
	Num      uint16  // descriptors; 0 means 128
	Features uint64  // the virtio feature bits acknowledged
	Base     uint16  // where both indices start
	Memory   *Memory // shared with other Drivers; nil means its own, of Regions(16 MiB)
	// AvailOff2 puts the available ring at an address that is 2 modulo 4, which is legal and which Linux never does.
	AvailOff2 bool
}

// Driver is the driver's side of one split ring. It is not safe for concurrent use, but for use beside a device.
type Driver struct {
	Mem *Memory

	num      uint16
	features uint64
	base     uint16
	ownsMem  bool

	descAddr, availAddr, usedAddr uint64 // guest-physical
	desc, avail, used             []byte

	free      []uint16 // descriptors not in use
	inUse     [][]uint16
	tables    []table // by head: the indirect table's memory, kept
	availIdx  uint16  // offered
	kicked    uint16  // available index at the last Kick
	lastUsed  uint16
	interrupt bool // the driver wants to be notified
	fence     uint32
}

type table struct {
	addr    uint64
	entries int
}

// New lays out a ring.
func New(c Config) (*Driver, error) {
	if c.Num == 0 {
		c.Num = 128
	}
	d := &Driver{Mem: c.Memory, num: c.Num, features: c.Features, base: c.Base, interrupt: true}
	if d.Mem == nil {
		mem, err := NewMemory(Regions(16 << 20))
		if err != nil {
			return nil, err
		}
		d.Mem, d.ownsMem = mem, true
	}
	n := uint64(c.Num)
	d.descAddr = d.Mem.Alloc(16*n, 16)
	d.availAddr = d.Mem.Alloc(8+2*n, 4)
	if c.AvailOff2 {
		d.availAddr += 2
	}
	d.usedAddr = d.Mem.Alloc(6+8*n, 4)
	d.desc, d.avail, d.used = d.Mem.Bytes(d.descAddr, 16*n), d.Mem.Bytes(d.availAddr, 6+2*n), d.Mem.Bytes(d.usedAddr, 6+8*n)
	clear(d.desc)
	clear(d.avail)
	clear(d.used)
	d.inUse = make([][]uint16, n)
	d.tables = make([]table, n)
	for i := range c.Num {
		d.free = append(d.free, c.Num-1-i)
	}
	d.availIdx, d.kicked, d.lastUsed = c.Base, c.Base, c.Base
	d.SetAvailIdx(c.Base)
	store16(d.used, 2, c.Base)
	d.SetUsedEvent(c.Base)
	return d, nil
}

// Close closes the memory if it is the Driver's own.
func (d *Driver) Close() error {
	if !d.ownsMem {
		return nil
	}
	return d.Mem.Close()
}

// QueueConfig returns what the device is told of the ring.
func (d *Driver) QueueConfig() virtqueue.Config {
	return virtqueue.Config{
		Num:           d.num,
		Features:      d.features,
		DescUserAddr:  d.Mem.UserAddr(d.descAddr),
		AvailUserAddr: d.Mem.UserAddr(d.availAddr),
		UsedUserAddr:  d.Mem.UserAddr(d.usedAddr),
		Base:          d.base,
	}
}

// Num returns the ring's size in descriptors.
func (d *Driver) Num() uint16 { return d.num }

// Free returns how many descriptors are not in use.
func (d *Driver) Free() int { return len(d.free) }

// Buffer is one descriptor's memory.
type Buffer struct {
	Addr  uint64 // guest-physical
	Len   uint32 // bytes
	Write bool   // the device writes it
}

func (b Buffer) desc() virtqueue.Desc {
	d := virtqueue.Desc{Addr: b.Addr, Len: b.Len}
	if b.Write {
		d.Flags = virtqueue.VIRTQ_DESC_F_WRITE
	}
	return d
}

// Chain is the buffers of one request, readable ones first.
type Chain []Buffer

// Offer puts c in the available ring, a descriptor for each buffer; ok is false when there are too few of them. The
// device sees it after the next Kick.
func (d *Driver) Offer(c Chain) (head uint16, ok bool) {
	return d.OfferMixed(c, nil)
}

// OfferIndirect is Offer with one descriptor, of an indirect table.
func (d *Driver) OfferIndirect(c Chain) (head uint16, ok bool) {
	return d.OfferMixed(nil, c)
}

// OfferMixed is Offer with descriptors for direct, and one more of an indirect table unless indirect is empty.
func (d *Driver) OfferMixed(direct, indirect Chain) (head uint16, ok bool) {
	n := len(direct)
	if len(indirect) > 0 {
		n++
	}
	if n == 0 || n > len(d.free) {
		return 0, false
	}
	ids := d.free[len(d.free)-n:]
	d.free = d.free[:len(d.free)-n]
	head = ids[0]
	d.inUse[head] = append(d.inUse[head][:0], ids...)
	for i, id := range ids {
		var desc virtqueue.Desc
		if i < len(direct) {
			desc = direct[i].desc()
		} else {
			desc = d.indirect(head, indirect)
		}
		if i+1 < n {
			desc.Flags |= virtqueue.VIRTQ_DESC_F_NEXT
			desc.Next = ids[i+1]
		}
		d.SetDesc(id, desc)
	}
	d.OfferHead(head)
	return head, true
}

// indirect writes c as head's table and returns its descriptor.
func (d *Driver) indirect(head uint16, c Chain) virtqueue.Desc {
	t := &d.tables[head]
	if t.entries < len(c) {
		*t = table{d.Mem.Alloc(16*uint64(len(c)), 16), len(c)}
	}
	b := d.Mem.Bytes(t.addr, 16*uint64(len(c)))
	for i, buf := range c {
		desc := buf.desc()
		if i+1 < len(c) {
			desc.Flags |= virtqueue.VIRTQ_DESC_F_NEXT
			desc.Next = uint16(i + 1)
		}
		PutDesc(b[16*i:], desc)
	}
	return virtqueue.Desc{Addr: t.addr, Len: uint32(16 * len(c)), Flags: virtqueue.VIRTQ_DESC_F_INDIRECT}
}

// OfferHead puts head in the available ring, whatever it is. The device sees it after the next Kick.
func (d *Driver) OfferHead(head uint16) {
	d.SetAvailRing(d.availIdx&(d.num-1), head)
	d.availIdx++
}

// Kick shows the device what was offered and says whether it wants a kick for that.
func (d *Driver) Kick() bool {
	old := d.kicked
	d.kicked = d.availIdx
	d.SetAvailIdx(d.availIdx)
	barrier(&d.fence)
	if d.eventIdx() {
		return d.availIdx-d.AvailEvent()-1 < d.availIdx-old
	}
	return d.availIdx != old && d.UsedFlags()&virtqueue.VIRTQ_USED_F_NO_NOTIFY == 0
}

func (d *Driver) eventIdx() bool {
	return d.features&virtqueue.VIRTIO_RING_F_EVENT_IDX != 0
}

// Used takes the next used element and frees its chain's descriptors; ok is false when there is none. It panics when the
// device has used a head that it was not given.
func (d *Driver) Used() (head uint16, written uint32, ok bool) {
	if d.UsedIdx() == d.lastUsed {
		return 0, 0, false
	}
	e := d.UsedElem(d.lastUsed & (d.num - 1))
	if e.ID >= uint32(d.num) {
		panic(fmt.Sprintf("vqtest: the device used head %d of a ring of %d", e.ID, d.num))
	}
	d.lastUsed++
	head = uint16(e.ID)
	d.free = append(d.free, d.inUse[head]...)
	d.inUse[head] = d.inUse[head][:0]
	if d.interrupt && d.eventIdx() {
		d.SetUsedEvent(d.lastUsed)
	}
	return head, e.Len, true
}

// EnableInterrupt asks for a notification at the next used element; pending says that there is one already.
func (d *Driver) EnableInterrupt() (pending bool) {
	d.interrupt = true
	if d.eventIdx() {
		d.SetUsedEvent(d.lastUsed)
	} else {
		d.SetAvailFlags(0)
	}
	barrier(&d.fence)
	return d.UsedIdx() != d.lastUsed
}

// DisableInterrupt says that no notification is wanted.
func (d *Driver) DisableInterrupt() {
	d.interrupt = false
	if d.eventIdx() {
		d.SetUsedEvent(d.lastUsed - 1) // it has passed there
	} else {
		d.SetAvailFlags(virtqueue.VIRTQ_AVAIL_F_NO_INTERRUPT)
	}
}

// Raw access to every field, for what no legal driver does.

// Desc returns descriptor i of the table.
func (d *Driver) Desc(i uint16) virtqueue.Desc {
	b := d.desc[16*int(i):]
	return virtqueue.Desc{
		Addr:  binary.LittleEndian.Uint64(b),
		Len:   binary.LittleEndian.Uint32(b[8:]),
		Flags: binary.LittleEndian.Uint16(b[12:]),
		Next:  binary.LittleEndian.Uint16(b[14:]),
	}
}

// SetDesc writes descriptor i of the table.
func (d *Driver) SetDesc(i uint16, desc virtqueue.Desc) { PutDesc(d.desc[16*int(i):], desc) }

// WriteTable writes an indirect table to guest-physical addr, across adjacent regions, as it is.
func (d *Driver) WriteTable(addr uint64, descs []virtqueue.Desc) {
	b := make([]byte, 16*len(descs))
	for i, desc := range descs {
		PutDesc(b[16*i:], desc)
	}
	d.Mem.Write(addr, b)
}

// PutDesc writes desc to the start of b, as a driver does.
func PutDesc(b []byte, d virtqueue.Desc) {
	_ = b[15]
	binary.LittleEndian.PutUint64(b, d.Addr)
	binary.LittleEndian.PutUint32(b[8:], d.Len)
	binary.LittleEndian.PutUint16(b[12:], d.Flags)
	binary.LittleEndian.PutUint16(b[14:], d.Next)
}

// AvailIdx returns the available index that the device sees.
func (d *Driver) AvailIdx() uint16 { return load16(d.avail, 2) }

// SetAvailIdx stores the available index that the device sees.
func (d *Driver) SetAvailIdx(v uint16) { store16(d.avail, 2, v) }

// SetAvailFlags stores VIRTQ_AVAIL_F_* flags.
func (d *Driver) SetAvailFlags(v uint16) { store16(d.avail, 0, v) }

// SetAvailRing stores head in a slot of the available ring.
func (d *Driver) SetAvailRing(slot, head uint16) { store16(d.avail, 4+2*int(slot), head) }

// SetUsedEvent stores used_event, the used index after which the driver wants a notification.
func (d *Driver) SetUsedEvent(v uint16) { store16(d.avail, 4+2*int(d.num), v) }

// UsedIdx returns the used index.
func (d *Driver) UsedIdx() uint16 { return load16(d.used, 2) }

// SetUsedIdx stores the used index, which is the device's to write.
func (d *Driver) SetUsedIdx(v uint16) { store16(d.used, 2, v) }

// UsedFlags returns the device's VIRTQ_USED_F_* flags.
func (d *Driver) UsedFlags() uint16 { return load16(d.used, 0) }

// AvailEvent returns avail_event, the available index after which the device wants a kick.
func (d *Driver) AvailEvent() uint16 { return load16(d.used, 4+8*int(d.num)) }

// UsedElem is struct virtq_used_elem (virtio 1.3, section 2.7.8).
type UsedElem struct {
	ID  uint32
	Len uint32 // bytes written
}

// UsedElem returns what is in a slot of the used ring.
func (d *Driver) UsedElem(slot uint16) UsedElem {
	b := d.used[4+8*int(slot):]
	return UsedElem{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])}
}

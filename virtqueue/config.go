package virtqueue

import "fmt"

// Feature bits of virtio 1.3, sections 6 and 2.7, as masks.
const (
	VIRTIO_RING_F_INDIRECT_DESC = 1 << 28
	VIRTIO_RING_F_EVENT_IDX     = 1 << 29
	VIRTIO_F_VERSION_1          = 1 << 32
	VIRTIO_F_RING_PACKED        = 1 << 34
)

// Flags of a descriptor and of the two rings (virtio 1.3, section 2.7; include/uapi/linux/virtio_ring.h).
const (
	VIRTQ_DESC_F_NEXT     = 1
	VIRTQ_DESC_F_WRITE    = 2
	VIRTQ_DESC_F_INDIRECT = 4

	VIRTQ_AVAIL_F_NO_INTERRUPT = 1
	VIRTQ_USED_F_NO_NOTIFY     = 1
)

// MaxNum is the most descriptors a ring has (virtio 1.3, section 2.7).
const MaxNum = 32768

// Sizes in bytes of what lies in guest memory.
const (
	descSize     = 16
	usedElemSize = 8
)

// minChain is how many descriptors a chain may always have, whatever the ring's size: Linux sends a 1 MiB READ as 259
// in an indirect table even on a ring of 128.
const minChain = 1024

// Config says where a ring lies and how driver and device agreed to use it.
type Config struct {
	Num           uint16 // descriptors: a power of two up to MaxNum (VHOST_USER_SET_VRING_NUM)
	Features      uint64 // the virtio feature bits that the driver acknowledged
	DescUserAddr  uint64 // front-end addresses (VHOST_USER_SET_VRING_ADDR)
	AvailUserAddr uint64
	UsedUserAddr  uint64
	Base          uint16 // the next available index to fetch (VHOST_USER_SET_VRING_BASE)
}

// Validate checks the size, the addresses' alignment (virtio 1.3, section 2.7) and the ring's format.
func (c Config) Validate() error {
	if c.Num == 0 || c.Num > MaxNum || c.Num&(c.Num-1) != 0 {
		return fmt.Errorf("queue size is %d, expected a power of two from 1 to %d", c.Num, MaxNum)
	}
	if c.Features&VIRTIO_F_RING_PACKED != 0 {
		return fmt.Errorf("packed rings are not supported, do not offer VIRTIO_F_RING_PACKED")
	}
	for _, a := range c.areas() {
		if a.addr%a.align != 0 {
			return fmt.Errorf("%s is at %#x, expected a multiple of %d", a.name, a.addr, a.align)
		}
		if a.addr+a.size < a.addr {
			return fmt.Errorf("%s at %#x of %d bytes overflows", a.name, a.addr, a.size)
		}
	}
	return nil
}

// area is one of the three parts of a ring; all in bytes.
type area struct {
	name              string
	addr, size, align uint64
}

// areas lists descriptor table, available ring and used ring. The two rings' sizes count their event index, which the
// driver allocates with or without VIRTIO_RING_F_EVENT_IDX.
func (c Config) areas() [3]area {
	n := uint64(c.Num)
	return [3]area{
		{"descriptor table", c.DescUserAddr, descSize * n, 16},
		{"available ring", c.AvailUserAddr, 6 + 2*n, 2},
		{"used ring", c.UsedUserAddr, 6 + usedElemSize*n, 4},
	}
}

package virtqueue

import "fmt"

//go:generate go tool stringer -type Reason -linecomment

// Reason says what the driver did wrong. There are few, so that they can be counted by reason.
type Reason uint8

// The reasons of a ChainError come first, then those of a RingError.
const (
	reasonNone Reason = iota // none

	ReasonNext             // next descriptor is outside the table
	ReasonLoop             // chain is longer than its table
	ReasonTooLong          // chain is longer than a device accepts
	ReasonAddress          // descriptor address is not mapped
	ReasonOrder            // readable descriptor follows a writable one
	ReasonTotal            // chain is longer than 2^32-1 bytes
	ReasonIndirectFeature  // indirect descriptor without VIRTIO_RING_F_INDIRECT_DESC
	ReasonIndirectNext     // indirect descriptor has NEXT
	ReasonIndirectNested   // indirect descriptor inside an indirect table
	ReasonIndirectLen      // indirect table's length is not a positive multiple of 16
	ReasonIndirectUnmapped // indirect table is not mapped

	ReasonAvailJump // available index is further ahead than the ring is long
	ReasonHead      // head is outside the descriptor table
	ReasonInFlight  // more chains in flight than the ring has descriptors
	ReasonFault     // ring memory is gone
	ReasonAlign     // ring is not aligned in memory
	ReasonUnmapped  // ring address is not mapped
	ReasonUnbound   // ring is not bound to memory

	// NumReasons is one more than the highest Reason.
	NumReasons = int(iota)
)

// ChainError is a chain that breaks a rule of virtio while the ring is sound. The device completes it with Push(Head, 0)
// and goes on.
type ChainError struct {
	Head   uint16
	Reason Reason
}

func (e *ChainError) Error() string {
	return fmt.Sprintf("refuse chain %d: %v", e.Head, e.Reason)
}

// RingError is a ring that cannot be used any more. The device stops it.
type RingError struct {
	Reason Reason
}

func (e *RingError) Error() string {
	return "stop ring: " + e.Reason.String()
}

package vhostuser

import "github.com/sluicefs/sluice/internal/sys"

// QueueConfig says where a ring lies and where to take it up.
type QueueConfig struct {
	// Num is the ring's descriptors, 1 … 32768. That a split ring has a power of 2 of them is the device's to check.
	Num uint16
	// Base is the vring state's num as it came over the wire or from StopQueue. Split: the low 16 bits are the next avail
	// index. Packed: bits 0–14 avail index, 15 avail wrap, 16–30 used index, 31 used wrap; a fresh ring has 0x80008000.
	Base uint32
	// The front-end's own addresses (guestmem.Map.User), neither translated nor checked. Packed: the ring, the driver
	// event area and the device event area.
	DescUserAddr, AvailUserAddr, UsedUserAddr uint64
	// Kick is readable when the driver has added buffers: an eventfd, or a pipe. nil: there is none, poll the ring. It stays
	// the session's, and open until StopQueue has returned. Its file description is shared with the front-end.
	Kick *sys.FD
}

// Device is what a session serves. Calls come from the session's one goroutine, in order, and only indexes below NumQueues
// are passed. The answers of Features, NumQueues, and whether ConfigSpace is nil, are taken once, at the session's start.
type Device interface {
	// Features returns the virtio feature bits offered, without VHOST_USER_F_PROTOCOL_FEATURES, which the session adds.
	Features() uint64
	// NumQueues returns the number of virtqueues, 1 … 256, hiprio included.
	NumQueues() int
	// ConfigSpace returns the device's config space. If nil, PROTOCOL_F_CONFIG is not offered: QEMU warns or worse when it is.
	ConfigSpace() []byte
	// SetFeatures tells the acknowledged features, a subset of Features. It may come again while rings run, and a ring
	// started before is to heed them at its next start.
	SetFeatures(features uint64)
	// StartQueue starts a stopped ring. It must look at the available ring without waiting for a kick, as EnableQueue(true)
	// must. After an error the ring is stopped, the front-end is told, and the session goes on; the start is tried again
	// when the front-end next changes the ring or the memory.
	StartQueue(index int, q QueueConfig) error
	// EnableQueue lets a ring run or not. A ring is served when it is started and enabled, in whichever order that came; the
	// enabled state lasts across StopQueue and StartQueue, and is false at first. A disabled ring fetches nothing more, its
	// requests in flight go on. Only changes are told.
	EnableQueue(index int, enabled bool)
	// StopQueue stops fetching, waits for the ring's requests in flight with the device's own deadline and returns the base
	// from which to start again, valid with an error too. The front-end may wait for it holding its main loop.
	StopQueue(index int) (base uint32, err error)
	// SetCall sets the descriptor by which the driver is notified of used buffers: an eventfd or a pipe, by an 8-byte write; nil:
	// none. The device owns fd from now on and closes the one before, which it no longer uses on return.
	SetCall(index int, fd *sys.FD)
	// SetErr sets the descriptor that tells the front-end that the ring is broken, as SetCall does.
	SetErr(index int, fd *sys.FD)
	// MemoryChanged tells that Config.Memory has a new Map: rings are to be translated anew, and the Map before released as
	// soon as no request uses it, for which the session then waits. An error, such as that an enabled ring lost its memory,
	// is told to the front-end; the session goes on. At the session's end it is called once more, with no memory left.
	MemoryChanged() error
	// Reset is VHOST_USER_RESET_DEVICE: all rings are stopped and disabled already; the FUSE session and the acknowledged
	// features go, the descriptors of SetCall and SetErr stay. It may come at any time and several times in a row.
	Reset()
}

package virtiofs

import "sync/atomic"

type counters struct {
	notifications, chainErrors, ringErrors, abandoned atomic.Uint64
}

// Stats are counts since the device was made.
type Stats struct {
	Notifications uint64 // of the guest, by the call fds
	ChainErrors   uint64 // malformed descriptor chains, completed with nothing written
	RingErrors    uint64 // queues stopped because their ring was broken
	Abandoned     uint64 // requests given up when their queue was stopped
}

// Stats returns the present counts.
func (d *Device) Stats() Stats {
	return Stats{
		Notifications: d.stats.notifications.Load(),
		ChainErrors:   d.stats.chainErrors.Load(),
		RingErrors:    d.stats.ringErrors.Load(),
		Abandoned:     d.stats.abandoned.Load(),
	}
}

// Package frontend drives any vhost-user-fs server as fast as it goes, without a guest: it is the VMM, which sets up guest
// memory and rings, and the guest's driver, which keeps a number of FUSE requests under way on each queue (a closed loop).
// It checks every answer, so that a figure is never that of a server that does not do the work.
//
//	Connect ── vhost-user ──▶ server        Run: build requests once ─▶ offer, kick ─▶ reap, check, time ─▶ offer again
//	   └ guest memory in a memfd, as Linux lays it out
package frontend

import (
	"fmt"
	"time"
)

// Layout is how a request's buffers lie in guest memory.
type Layout int

const (
	// Pages is what Linux does with page-cache pages: a descriptor for each 4 KiB page, in an indirect table.
	Pages Layout = iota
	// Contiguous has one descriptor for each of header, arguments and data.
	Contiguous
)

// Wait is what the driver does while it has nothing to reap.
type Wait int

const (
	// Sleep waits for the call eventfd, as a guest whose virtual CPU halts.
	Sleep Wait = iota
	// Poll looks at the used ring without end and has notifications suppressed.
	Poll
)

// Config says how a server is driven.
type Config struct {
	Socket string // path of the server's vhost-user socket
	Queues int    // request queues that are driven; 0 means 1
	Depth  int    // requests under way on each queue; 0 means 1
	// RingSize is how many descriptors each ring has, a power of 2; 0 means 512, as a request of 1 MiB takes 260 of Pages.
	RingSize int
	Layout   Layout
	Wait     Wait
	// CPUs are what the driver's threads may run on; empty means any.
	CPUs []int
	// Stall is how long no request may end before Run gives up with an error that says what state the rings are in; 0 means 10 s.
	Stall time.Duration
	// Dir is the directory that the server shares, in which what was written is verified; empty means by READ.
	Dir string
}

// Validate says what is wrong with c.
func (c Config) Validate() error {
	switch {
	case c.Socket == "":
		return fmt.Errorf("drive a server: no socket")
	case c.Queues < 0 || c.Queues > 255:
		return fmt.Errorf("drive a server: %d queues, expected 1 to 255", c.Queues)
	case c.Depth < 0 || c.Depth > 4096:
		return fmt.Errorf("drive a server: depth %d, expected 1 to 4096", c.Depth)
	case c.RingSize < 0 || c.RingSize > 32768 || c.RingSize&(c.RingSize-1) != 0:
		return fmt.Errorf("drive a server: ring of %d descriptors, expected a power of 2 up to 32768", c.RingSize)
	}
	return nil
}

// Result is what one Run has counted.
type Result struct {
	Ops      uint64 // operations of the workload
	Requests uint64 // FUSE requests they took
	Bytes    uint64 // file data moved
	Elapsed  time.Duration
	// P50, P99, P999 are how long an operation took, from its first request's being offered to its last answer's being seen.
	P50, P99, P999 time.Duration
	Kicks          uint64 // written to the kick eventfds
	Notifications  uint64 // read from the call eventfds
}

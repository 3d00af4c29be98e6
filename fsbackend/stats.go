package fsbackend

// Statser says what it holds, for people who watch. Stats may be called at any time, during Close and after it too, from any
// thread; it does not sleep and holds up no other call.
type Statser interface {
	Stats() Stats
}

// Stats are gauges of a backend.
type Stats struct {
	// Inodes are those that the guest knows, the root among them, and directories that are kept for the sake of such.
	Inodes uint64
	Tiers  InodeTiers
	FDs    FDs
}

// InodeTiers are Inodes by how they are found again, where that makes a difference.
type InodeTiers struct {
	OPath  uint64 // by an O_PATH descriptor
	Handle uint64 // by a file handle (open_by_handle_at(2))
	Name   uint64 // by directory and name
}

// FDs are open descriptors by what they are for.
type FDs struct {
	OPath uint64 // inodes
	Open  uint64 // files and directories that the guest has open
	Mount uint64 // mounts, for file handles on them
	Lock  uint64 // POSIX locks
}

// Add adds o to s.
func (s *Stats) Add(o Stats) {
	s.Inodes += o.Inodes
	s.Tiers.OPath += o.Tiers.OPath
	s.Tiers.Handle += o.Tiers.Handle
	s.Tiers.Name += o.Tiers.Name
	s.FDs.OPath += o.FDs.OPath
	s.FDs.Open += o.FDs.Open
	s.FDs.Mount += o.FDs.Mount
	s.FDs.Lock += o.FDs.Lock
}

package api

// ShareStats are a share's counters since it was added. All but the gauges only rise.
type ShareStats struct {
	Tag string `json:"tag"`
	// Ops are the requests by opcode, those that have come so far, in the order of their numbers.
	Ops []OpStats `json:"ops,omitempty"`
	// BytesRead and BytesWritten are the data of READ and WRITE, in bytes.
	BytesRead    uint64 `json:"bytes_read"`
	BytesWritten uint64 `json:"bytes_written"`
	// Queues are hiprio and the request queues.
	Queues []QueueStats `json:"queues,omitempty"`
	// Relieved counts calls that took so long that another thread has gone on with their queues. SlowOps (gauge) are opcodes
	// whose calls have slept lately, Avoided the requests of theirs that went to other threads at once.
	Relieved uint64 `json:"relieved"`
	SlowOps  int    `json:"slow_ops"`
	Avoided  uint64 `json:"avoided"`

	// Inodes (gauge) the guest knows. FDs (gauges) are descriptors by tier: "opath" for inodes, "open" for files the guest has
	// open, "mount" for mounts, "lock" for locks.
	Inodes uint64            `json:"inodes"`
	FDs    map[string]uint64 `json:"fds,omitempty"`
	// InodeTiers (gauge) are the inodes by how they are found again: "opath", "handle", "name".
	InodeTiers map[string]uint64 `json:"inode_tiers,omitempty"`

	// Faults are what went wrong, by name: malformed, no_room, no_session, unsupported, aborted, panics, bad_replies,
	// ring_errors, abandoned, …
	Faults map[string]uint64 `json:"faults,omitempty"`
}

// LatencyBounds are the upper bounds of OpStats.Latency's buckets but the last, in nanoseconds.
var LatencyBounds = [...]uint64{
	1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 256_000, 512_000,
	1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000, 64_000_000, 128_000_000, 256_000_000, 512_000_000,
	1_000_000_000, 2_000_000_000, 4_000_000_000, 8_000_000_000,
}

// OpStats are the requests of one opcode.
type OpStats struct {
	Op    string `json:"op"` // as in fuse.h, without FUSE_: "LOOKUP"
	Count uint64 `json:"count"`
	// Errors are the answers that were errors, by name: "ENOENT".
	Errors map[string]uint64 `json:"errors,omitempty"`
	// Latency counts requests by how long they took from being fetched to being answered: element i those up to
	// LatencyBounds[i] and above the one before, the last those above all.
	Latency []uint64 `json:"latency"`
	// Nanoseconds is the sum of all.
	Nanoseconds uint64 `json:"nanoseconds"`
}

// QueueStats are one virtqueue.
type QueueStats struct {
	Index int    `json:"index"` // 0 is hiprio
	Size  int    `json:"size"`  // entries of its ring (gauge), 0 while it is stopped
	Depth uint64 `json:"depth"` // requests fetched and not completed (gauge)
	// Kicks woke the worker for it; Notifications were sent to the guest; Polls are looks at the ring without a kick.
	Kicks         uint64 `json:"kicks"`
	Notifications uint64 `json:"notifications"`
	Polls         uint64 `json:"polls"`
	// PollWindow is for how many nanoseconds its worker polls at present before it sleeps (gauge), 0 when it does not. PollHits
	// are polls that have ended with a request, PollMisses those in vain, PollNanoseconds how long all took.
	PollWindow      uint64 `json:"poll_window"`
	PollHits        uint64 `json:"poll_hits"`
	PollMisses      uint64 `json:"poll_misses"`
	PollNanoseconds uint64 `json:"poll_nanoseconds"`
}

// Stats are everything.
type Stats struct {
	Shares []ShareStats `json:"shares"`
	// SeccompViolations counts system calls outside the filter (--seccomp log; with kill there is never one).
	SeccompViolations uint64 `json:"seccomp_violations"`
	// Goroutines, Threads and HeapBytes are gauges of the process that serves.
	Goroutines int    `json:"goroutines"`
	Threads    int    `json:"threads"`
	HeapBytes  uint64 `json:"heap_bytes"`
	OpenFDs    int    `json:"open_fds"`
	// Events counts by graft what was sent, gathered into rescans and left out for a limit.
	Events []EventStats `json:"events,omitempty"`
	// Images counts by graft what was fetched of images.
	Images []ImageStats `json:"images,omitempty"`
}

// ImageStats are those of the images that a graft is, or is made of, together. Bytes of chunks are those of their content, unpacked.
type ImageStats struct {
	Tag     string `json:"tag"`
	Path    string `json:"path"`
	Images  int    `json:"images"`  // how many there are (gauge)
	Size    uint64 `json:"size"`    // of their layers, as the registry has them (gauge)
	Fetched uint64 `json:"fetched"` // of that (gauge)
	// Requests and Bytes are what was asked for layers, and what came. Like all counts here, they begin at 0 again with the fetcher.
	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"`
	// Hits are chunks that were asked for and in the cache, Misses those that were not.
	Hits      uint64 `json:"hits"`
	HitBytes  uint64 `json:"hit_bytes"`
	Misses    uint64 `json:"misses"`
	MissBytes uint64 `json:"miss_bytes"`
	// Verified are chunks that came and were what they should be, Corrupt those that were not.
	Verified uint64 `json:"verified"`
	Corrupt  uint64 `json:"corrupt"`
	// FetchErrors are attempts at a registry that came to nothing, by why; ReadErrors chunks that a guest has not got.
	FetchErrors map[string]uint64 `json:"fetch_errors,omitempty"`
	ReadErrors  map[string]uint64 `json:"read_errors,omitempty"`
	// CacheBytes is what the largest of their caches takes, which others may share, and CacheBudget what it may (gauges). A guest is
	// not told.
	CacheBytes  uint64 `json:"cache_bytes"`
	CacheBudget uint64 `json:"cache_budget"`
}

// EventStats are a watched graft's.
type EventStats struct {
	Tag       string `json:"tag"`
	Path      string `json:"path"`
	Watches   int    `json:"watches"` // directories under watch (gauge)
	Sent      uint64 `json:"sent"`
	Rescans   uint64 `json:"rescans"`
	Limited   uint64 `json:"limited"`
	Overflows uint64 `json:"overflows"` // of the kernel's queue
}

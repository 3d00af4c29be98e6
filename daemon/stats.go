package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime/metrics"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sluicefs/sluice/control/api"
	"github.com/sluicefs/sluice/fuseproto"
	"github.com/sluicefs/sluice/fuseserver"
	"github.com/sluicefs/sluice/seccomp"
	"github.com/sluicefs/sluice/virtiofs"
)

// shareState is a share's state, of its device's counts.
func shareState(d virtiofs.Stats) string {
	switch {
	case !d.Connected:
		return api.StateWaiting
	case !d.Requests.Session:
		return api.StateConnected
	default:
		return api.StateServing
	}
}

// shareStats puts a device's counts in the words of the API. Gauges and faults are there at 0, too: who watches a number
// wants to see that it is.
func shareStats(tag string, d virtiofs.Stats) api.ShareStats {
	backend, faults := d.Requests.Backend, d.Requests.Faults
	s := api.ShareStats{
		Tag:          tag,
		BytesRead:    d.Requests.BytesRead,
		BytesWritten: d.Requests.BytesWritten,
		Relieved:     d.Relieved,
		SlowOps:      d.SlowOpcodes,
		Avoided:      d.Avoided,
		Inodes:       backend.Inodes,
		FDs: map[string]uint64{
			"opath": backend.FDs.OPath, "open": backend.FDs.Open, "mount": backend.FDs.Mount, "lock": backend.FDs.Lock,
		},
		InodeTiers: map[string]uint64{
			"opath": backend.Tiers.OPath, "handle": backend.Tiers.Handle, "name": backend.Tiers.Name,
		},
		Faults: map[string]uint64{
			"malformed": faults.Malformed, "no_room": faults.NoRoom, "no_session": faults.NoSession,
			"init_refused": faults.InitRefused, "unsupported": faults.Unsupported, "memory_faults": faults.Faults,
			"aborted": faults.Aborted, "bad_replies": faults.BadReplies, "panics": faults.Panics,
			"chain_errors": d.ChainErrors, "ring_errors": d.RingErrors, "abandoned": d.Abandoned,
		},
	}
	for i := range d.Requests.Ops {
		s.Ops = append(s.Ops, opStats(&d.Requests.Ops[i]))
	}
	for i, q := range d.Queues {
		s.Queues = append(s.Queues, api.QueueStats{
			Index: i, Size: q.Size, Depth: uint64(max(q.Depth, 0)), Kicks: q.Kicks, Notifications: q.Notifications, Polls: q.Polls,
			PollWindow: uint64(q.PollWindow), PollHits: q.PollHits, PollMisses: q.PollMisses, PollNanoseconds: uint64(q.PollTime),
		})
	}
	return s
}

func opStats(o *fuseserver.OpStats) api.OpStats {
	op := api.OpStats{Op: opName(o.Opcode), Count: o.Count, Latency: append([]uint64(nil), o.Latency[:]...), Nanoseconds: o.Nanoseconds}
	for errno, n := range o.Errors {
		if op.Errors == nil {
			op.Errors = make(map[string]uint64)
		}
		op.Errors[errnoName(errno)] += n
	}
	return op
}

// imageStats adds the counts of images up by graft, in order.
func imageStats(images []api.ImageStats) (sums []api.ImageStats) {
	slices.SortStableFunc(images, func(a, b api.ImageStats) int {
		return cmp.Or(cmp.Compare(a.Tag, b.Tag), cmp.Compare(a.Path, b.Path))
	})
	for i := range images {
		n := &images[i]
		if last := len(sums) - 1; last < 0 || sums[last].Tag != n.Tag || sums[last].Path != n.Path {
			sums = append(sums, api.ImageStats{Tag: n.Tag, Path: n.Path})
		}
		s := &sums[len(sums)-1]
		s.Images++
		s.Size += n.Size
		s.Fetched += n.Fetched
		s.Requests += n.Requests
		s.Bytes += n.Bytes
		s.Hits += n.Hits
		s.HitBytes += n.HitBytes
		s.Misses += n.Misses
		s.MissBytes += n.MissBytes
		s.Verified += n.Verified
		s.Corrupt += n.Corrupt
		s.FetchErrors, s.ReadErrors = addCounts(s.FetchErrors, n.FetchErrors), addCounts(s.ReadErrors, n.ReadErrors)
		if n.CacheBytes >= s.CacheBytes {
			s.CacheBytes, s.CacheBudget = n.CacheBytes, n.CacheBudget
		}
	}
	return sums
}

func addCounts(to, more map[string]uint64) map[string]uint64 {
	if to == nil && len(more) > 0 {
		to = make(map[string]uint64, len(more))
	}
	for name, n := range more {
		to[name] += n
	}
	return to
}

// opName is the opcode's name in fuse.h without FUSE_.
func opName(o fuseproto.Opcode) string {
	if o == 0 {
		return "UNKNOWN"
	}
	return strings.TrimPrefix(o.String(), "FUSE_")
}

// errnoName is ENOENT and its like, and OTHER for numbers that have no name.
func errnoName(errno fuseserver.Errno) string {
	if name := unix.ErrnoName(errno); name != "" {
		return name
	}
	return "OTHER"
}

// processStats are the gauges of this process and what its filter has seen, without a system call that a filter forbids.
// Threads are those of Go's runtime. Of its descriptors it cannot have a count, nor of C's threads: see countProcess.
func processStats() api.Stats {
	samples := []metrics.Sample{
		{Name: "/sched/goroutines:goroutines"},
		{Name: "/sched/threads/total:threads"},
		{Name: "/memory/classes/heap/objects:bytes"},
	}
	metrics.Read(samples)
	return api.Stats{
		SeccompViolations: seccomp.Violations(),
		Goroutines:        int(samples[0].Value.Uint64()),
		Threads:           int(samples[1].Value.Uint64()),
		HeapBytes:         samples[2].Value.Uint64(),
	}
}

// countProcess counts the open descriptors and the threads of process pid, another one. It is for the keeper: the server's
// filter lets nobody open /proc. Descriptors take the right to trace the process (proc_pid_fd(5)), threads none: what can
// be counted is returned beside an error.
func countProcess(pid int) (fds, threads int, err error) {
	fds, err = countEntries(fmt.Sprintf("/proc/%d/fd", pid))
	threads, e := countEntries(fmt.Sprintf("/proc/%d/task", pid))
	if err = errors.Join(err, e); err != nil {
		err = fmt.Errorf("count descriptors and threads of process %d: %w", pid, err)
	}
	return fds, threads, err
}

func countEntries(dir string) (int, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	return len(names), err
}

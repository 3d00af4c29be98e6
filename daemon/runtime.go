package daemon

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
)

// What Go's runtime is told, in both processes. GOMAXPROCS is left to it, but for its least: it follows the CPUs and the cgroup's quota. So
// is the GC's percentage: what is hot allocates nothing, and garbage is made by what is new only. The user's GOMAXPROCS above that least,
// GOGC and GOMEMLIMIT count.

// minProcs is how many threads run Go code at a time at least: one that serves, and one for everything else.
const minProcs = 2

// raiseProcs has Go run so many. On one CPU it would have one P: no worker could poll, and each of its system calls would have the
// P taken away.
func raiseProcs() {
	if runtime.GOMAXPROCS(0) < minProcs {
		runtime.GOMAXPROCS(minProcs)
	}
}

// memoryShare is the part of the cgroup's memory, in percent, beyond which the garbage collector is to work harder. What is left is
// for what is not Go's: threads' stacks, and pages of files, which count, too.
const memoryShare = 90

// limitMemory has the garbage collector mind the cgroup's limit, which Go does not look for itself. It is to be called with the
// host's files in sight.
func limitMemory(getenv func(string) string) {
	if getenv("GOMEMLIMIT") != "" {
		return
	}
	if limit := cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup"); limit < math.MaxInt64 {
		debug.SetMemoryLimit(limit / 100 * memoryShare)
	}
}

// cgroupMemory is the lowest memory.max of the cgroup that file names and of those around it, in bytes: math.MaxInt64 if there is
// none, or none of version 2.
func cgroupMemory(file, root string) int64 {
	lowest := int64(math.MaxInt64)
	text, err := os.ReadFile(file)
	if err != nil {
		return lowest
	}
	for line := range strings.Lines(string(text)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/")
		if !ok {
			continue
		}
		// In a container / may be a cgroup with a limit, too.
		for path = filepath.Join("/", path); ; path = filepath.Dir(path) {
			max, err := os.ReadFile(filepath.Join(root, path, "memory.max"))
			if err == nil {
				if n, err := strconv.ParseInt(string(bytes.TrimSpace(max)), 10, 64); err == nil && n > 0 {
					lowest = min(lowest, n)
				}
			}
			if path == "/" {
				break
			}
		}
	}
	return lowest
}

// Package timing is what the benchmark's two sides agree on: what guestbench prints, and which files the tree has that it looks at.
package timing

import (
	"fmt"
	"time"
)

// Timing is how long a program took by the guest's clocks, in nanoseconds.
type Timing struct {
	Elapsed      time.Duration
	User, System time.Duration // of the guest's CPU, by its accounting
	Lines        int           // that it has written
}

// TreeFileSize is the size of each file of the tree in bytes.
const TreeFileSize = 100

// TreeFile is the path of a file in the tree: file number f of directory number d.
func TreeFile(d, f int) string { return fmt.Sprintf("dir%03d/file%04d", d, f) }

package seccomp

import "fmt"

// Action is what becomes of a system call that the filter does not allow.
type Action uint8

const (
	// None installs no filter.
	None Action = iota
	// Kill ends the process by SIGSYS, after a line in the log.
	Kill
	// Trap ends the process as a crash of Go does, with the stacks of all goroutines and exit status 2, after a line in the log.
	Trap
	// Log lets the call happen, counts it, and writes a line for the first of a kind. It confines nothing.
	Log
)

func (a Action) String() string {
	names := [...]string{"none", "kill", "trap", "log"}
	if int(a) < len(names) {
		return names[a]
	}
	return fmt.Sprintf("Action(%d)", uint8(a))
}
